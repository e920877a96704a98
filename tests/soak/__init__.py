# SPDX-License-Identifier: Apache-2.0
"""What takes too long for ``make test``: ``python -m tests.soak`` tries it for as long as it is given, and counts."""
