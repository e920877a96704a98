# SPDX-License-Identifier: Apache-2.0
"""Make dataset folders (`datalist.json` and its files) from published data sets: python -m tools.prepare NAME ..."""
