# SPDX-License-Identifier: Apache-2.0
"""What is measured of ``sdseg``."""

from __future__ import annotations

from tools.benchmarks.sdseg_measures import mask_measures, pictures_and_masks
from tools.benchmarks.sdseg_sampling import inference, reverse_steps
from tools.benchmarks.sdseg_training import training_memory, training_step
from tools.benchmarks.workload import Catalogue, Kind

WORKLOADS: Catalogue = {
    Kind.TRAIN: [training_step],
    Kind.SAMPLE: [inference, reverse_steps],
    Kind.METRIC: [mask_measures],
    Kind.DATA: [pictures_and_masks],
    Kind.MEMORY: [training_memory],
}
