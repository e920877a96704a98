# SPDX-License-Identifier: Apache-2.0
"""Which configurations there are; what is wrong with one say the checks of ``tools.bundle_checks``."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import ROOT
from tools.bundle_checks.expressions import expression_faults
from tools.bundle_checks.reading import components, read_json, strings, undefined_references
from tools.bundle_checks.signatures import signature_faults

__all__ = ["components", "expression_faults", "signature_faults", "strings", "undefined_references"]

read = read_json
MULTI_GPU = ("multi_gpu_train", "multi_gpu_evaluate", "multi_gpu_inference")
OVERLAYS = ("tiny", "evaluate", "evaluate_diffusion", "directions", *MULTI_GPU)
CONFIGS = sorted(ROOT.glob("bundles/*/configs/*.json"))
WORKFLOWS = [path for path in CONFIGS if path.stem != "metadata"]
STANDALONE = [path for path in WORKFLOWS if path.stem not in OVERLAYS]
TRAINING = [path for path in STANDALONE if path.stem.startswith("train")]


def label(path: Path) -> str:
    """``cxr_ldm/train.json``, for the names of parametrised tests."""
    return f"{path.parent.parent.name}/{path.name}"
