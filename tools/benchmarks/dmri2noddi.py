# SPDX-License-Identifier: Apache-2.0
"""What is measured of ``dmri2noddi``, against the published program."""

from __future__ import annotations

from tools.benchmarks.dmri2noddi_codes import codebook_statistics, map_errors, nearest_codes
from tools.benchmarks.dmri2noddi_loading import patch_loading
from tools.benchmarks.dmri2noddi_sampling import denoising, patch_sampling
from tools.benchmarks.dmri2noddi_training import decoding_memory, training_memory, training_step
from tools.benchmarks.workload import Catalogue, Kind

WORKLOADS: Catalogue = {
    Kind.TRAIN: [training_step],
    Kind.SAMPLE: [patch_sampling, denoising],
    Kind.METRIC: [nearest_codes, codebook_statistics, map_errors],
    Kind.DATA: [patch_loading],
    Kind.MEMORY: [training_memory, decoding_memory],
}
