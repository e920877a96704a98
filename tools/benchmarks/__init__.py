# SPDX-License-Identifier: Apache-2.0
"""Work to be timed, by bundle, with the baselines it is compared with; ``python -m tools.benchmark`` runs it."""
