# SPDX-License-Identifier: Apache-2.0
"""What `python -m tools.check_bundle` looks at, a topic in each module. A check returns its faults; none is good."""
