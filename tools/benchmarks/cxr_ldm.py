# SPDX-License-Identifier: Apache-2.0
"""What is measured of ``cxr_ldm``, against the published program."""

from __future__ import annotations

from tools.benchmarks.cxr_ldm_films import film_loading
from tools.benchmarks.cxr_ldm_measures import frechet, pairwise_diversity
from tools.benchmarks.cxr_ldm_sampling import guided_sampling
from tools.benchmarks.cxr_ldm_training import training_memory, training_step
from tools.benchmarks.workload import Catalogue, Kind

WORKLOADS: Catalogue = {
    Kind.TRAIN: [training_step],
    Kind.SAMPLE: [guided_sampling],
    Kind.METRIC: [pairwise_diversity, frechet],
    Kind.DATA: [film_loading],
    Kind.MEMORY: [training_memory],
}
