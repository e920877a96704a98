# SPDX-License-Identifier: Apache-2.0
"""Embedded sample data: phantoms from analytic shapes, one module per bundle (`python -m tools.phantoms NAME`)."""
