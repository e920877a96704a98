# SPDX-License-Identifier: Apache-2.0
"""Measures of generated images that MONAI core does not offer; each module says why core does not fit."""
