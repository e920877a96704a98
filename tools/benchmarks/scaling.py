# SPDX-License-Identifier: Apache-2.0
"""How cost grows with the number of items, and shrinks with that of processes.

There is no published counterpart here: the first way is the smallest number, and ratios are those to it.
"""

from __future__ import annotations

from tools.benchmarks import scaling_growth, scaling_loading, scaling_processes
from tools.benchmarks.workload import Catalogue, Kind

WORKLOADS: Catalogue = {
    Kind.DATA: scaling_loading.BUILDERS,
    Kind.MEMORY: scaling_growth.BUILDERS[Kind.MEMORY],
    Kind.SCALING: (*scaling_processes.BUILDERS, *scaling_growth.BUILDERS[Kind.SCALING]),
}
