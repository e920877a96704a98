# SPDX-License-Identifier: Apache-2.0
"""The steps of each bundle's demo, for `tools.demo`: one module per bundle."""
