# SPDX-License-Identifier: Apache-2.0
"""``brain_controlnet`` beside the published programs: training, FLAIR to T1w, reading, measuring, memory."""

from __future__ import annotations

from tools.benchmarks.brain_controlnet_data import slice_reading, translation_scores
from tools.benchmarks.brain_controlnet_memory import stage2_memory, stage3_memory
from tools.benchmarks.brain_controlnet_sampling import denoising_step, slab_sampling
from tools.benchmarks.brain_controlnet_training import stage2_training, stage3_training
from tools.benchmarks.workload import Catalogue, Kind

WORKLOADS: Catalogue = {
    Kind.TRAIN: [stage2_training, stage3_training],
    Kind.SAMPLE: [slab_sampling, denoising_step],
    Kind.METRIC: [translation_scores],
    Kind.DATA: [slice_reading],
    Kind.MEMORY: [stage2_memory, stage3_memory],
}
