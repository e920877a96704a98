# SPDX-License-Identifier: Apache-2.0
"""What two processes do for ``test_sharded.py``: ``torchrun --nproc_per_node=2 -m tests.sharded_gang FOLDER``.

All of it in one launch, since starting two processes takes longer than the work. Data sets and weights lie in
``FOLDER`` by bundle; results go to ``FOLDER/two/<run>``, where both processes write, and what they say to
``FOLDER/rank<rank>.pt``. The tests do the same runs in one process, into ``FOLDER/one/<run>``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow

from shared.distributed import first_owner, from_all_processes, join_processes, to_main_process
from shared.result_files import ResultFiles
from tests.bundle_runs import BundleRuns
from tests.dmri_runs import BASELINE as UPSAMPLING
from tests.dmri_runs import DMRI
from tests.sdseg_runs import BASELINE, SDSEG
from tests.test_brain_bundle import BRAIN
from tests.test_brain_bundle import STAGES as BRAIN_STAGES
from tests.test_cxr_bundle import CXR

PROMPTS = ["Cardiomegaly.", "No finding.", "Pneumothorax.", "Left pleural effusion.", "Right opacity."]
EVALUATION = {"num_inference_steps": 2, "ms_ssim_kernel_size": 3}
REGRESSION = {"regression_def": BRAIN_STAGES["train_regression"]["regression_def"]}
PATCHES = {"num_inference_steps": 2, "overlap": 0.0, "patches_per_batch": 16}
# Name -> bundle, configurations, options. Odd numbers of items, and of batches: 3 or 5 images, heads and volumes.
RUNS: dict[str, tuple[BundleRuns, str, dict[str, Any]]] = {
    "cxr inference": (CXR, "inference", {"prompt": PROMPTS, "batch_size": 2, "num_inference_steps": 3}),
    "cxr evaluation": (CXR, "train evaluate", {**EVALUATION, "batch_size": 2}),
    "brain inference": (BRAIN, "inference", {"num_samples": 2, "num_inference_steps": 2}),
    "brain samples": (BRAIN, "inference_unconditional", {"num_samples": 5, "batch_size": 2}),
    "brain evaluation": (BRAIN, "train evaluate", {**EVALUATION, **REGRESSION, "num_samples": 2, "batch_size": 5}),
    "brain evaluation of samples": (BRAIN, "train_diffusion evaluate_diffusion", {**EVALUATION, "batch_size": 5}),
    "sdseg inference": (SDSEG, "inference", {"num_samples": 2}),
    "sdseg evaluation": (SDSEG, "train evaluate", {"num_samples": 3, "baseline_def": BASELINE}),
    "sdseg inference of one image": (SDSEG, "inference", {}),
    "sdseg evaluation of one image": (SDSEG, "train evaluate", {"num_samples": 2, "baseline_def": BASELINE}),
    "dmri inference": (DMRI, "inference", {**PATCHES, "num_samples": 2}),
    "dmri evaluation": (DMRI, "train evaluate", {**PATCHES, "num_samples": 4, "baseline_def": UPSAMPLING}),
}
LOADERS = {"inference": "dataloader", "inference_unconditional": "dataloader"}


def options_of(name: str, folder: Path, processes: str) -> dict[str, Any]:
    """Overrides of a run, its folders among them."""
    runs, stage, options = RUNS[name]
    data = folder / ("one_image" if name.endswith("one image") else runs.name)
    result = runs.folders(folder / "runs" / runs.name, stage.split()[0]) | {
        "ckpt_dir": str(folder / "models" / runs.name)
    }
    return {**result, "output_dir": str(folder / processes / name), "dataset_dir": str(data), **options}


def execute(name: str, folder: Path, processes: str, *overlay: str) -> ConfigWorkflow:
    runs, stage, _ = RUNS[name]
    options = options_of(name, folder, processes)
    with runs.small(" ".join((stage, *overlay)), options.pop("dataset_dir", Path("unused")), options) as workflow:
        workflow.run()
    return workflow


def share(name: str, folder: Path) -> dict[str, Any]:
    """Do this process's part of a run, and say which items it had."""
    loader = LOADERS.get(RUNS[name][1], "validate#dataloader")
    overlay = "multi_gpu_inference" if loader == "dataloader" else "multi_gpu_evaluate"
    workflow = execute(name, folder, "two", overlay)
    content = workflow.parser.get_parsed_content
    engine = content("evaluator" if loader == "dataloader" else "validate#evaluator")
    result = {
        "items": list(content(loader).sampler),
        "batches": engine.state.iteration,
        # Of an evaluation they hold a trainer, which wants what earlier stages left.
        "properties": workflow.check_properties() if loader == "dataloader" else [],
        "metrics": {key: float(value) for key, value in engine.state.metrics.items()},
    }
    if name == list(RUNS)[-1]:  # a group can be joined once in the life of a process
        workflow.finalize()
    return result


def claim(folder: Path, path: str) -> str:
    """The name of an input's results, or why it has none."""
    try:
        return ResultFiles(folder / "claims").claim(path, "mask", source_sha256=path, endings=[".png"]).name
    except ValueError as error:
        return str(error)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    join_processes("cpu")
    rank = torch.distributed.get_rank()
    results: dict[str, Any] = {"owner": first_owner("name", "both")}
    results["gathered"] = to_main_process([f"{rank}.{number}" for number in range(40 * rank)])
    # One after the other: the second finds a name that it cannot number.
    for turn in range(2):
        if turn == rank:
            results["claim"] = claim(folder, f"/in/{rank}/x.png")
        from_all_processes(None)
    for name in RUNS:
        results[name] = share(name, folder)
    assert not torch.distributed.is_initialized()
    torch.save(results, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
