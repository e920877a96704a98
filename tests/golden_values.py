# SPDX-License-Identifier: Apache-2.0
"""Numbers that must stay what they are: first losses of every training, and what the demo weights make.

They lie in ``tests/golden/losses.json`` and ``tests/golden/demo.json``, each with the setting they were made in. After
a change that is meant to move them, write them anew and say in the commit why::

    python -m tests.golden_values
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from ignite.engine import Events
from PIL import Image

from shared.files import save_json
from shared.provenance import software_versions
from tests import small_stages
from tests.bundle_runs import BundleRuns
from tests.conftest import ROOT
from tests.dmri_runs import make_phantoms
from tools.phantoms.brain_controlnet import make_dataset as make_heads
from tools.phantoms.sdseg import make_dataset as make_pictures

FOLDER = ROOT / "tests/golden"
ITERATIONS = 5
BLOCKS = 8  # along each side of a result
SEED = 0
# What the demo weights are asked for, beyond tiny.json: few steps, that every processor has time for.
DEMO: dict[str, dict[str, Any]] = {
    "cxr_ldm": {"prompt": ["Big right-sided pleural effusion.", "Cardiomegaly."], "num_inference_steps": 8},
    "brain_controlnet": {"num_inference_steps": 5},
    "sdseg": {},
    "dmri2noddi": {"num_inference_steps": 3},
}


def losses(stage: str, data: Path, root: Path) -> list[dict[str, float]]:
    """Every term of the loss in the first iterations of a training (see `tests.small_stages`), at seed 0."""
    found: list[dict[str, float]] = []

    def note(engine: Any) -> None:
        terms = {"loss": engine.state.output["loss"], **getattr(engine.state, "losses", {})}
        found.append({name: float(value.detach()) for name, value in terms.items()})
        if len(found) == ITERATIONS:
            # A run that ends here would validate and save first.
            raise _EnoughError

    with small_stages.loaded(stage, data, root, seed=SEED) as workflow:
        trainer = workflow.parser.get_parsed_content("train#trainer")
        trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
        with contextlib.suppress(_EnoughError):
            trainer.run()
    return found


class _EnoughError(Exception):
    pass


def demo(bundle: str, folder: Path) -> dict[str, dict[str, Any]]:
    """What a bundle's demo weights make with ``tiny.json``: each file's mean, deviation, and means of 8 blocks a side.

    Blocks and not voxels: another processor rounds otherwise, and a grey level more or less is no fault.
    """
    options: dict[str, Any] = {"output_dir": str(folder / "out"), "device": "$torch.device('cpu')", **DEMO[bundle]}
    if bundle == "brain_controlnet":
        make_heads(str(folder / "data"), n=3, size=(48, 64, 4), spacing=(3.4, 3.5, 6.0))
    elif bundle == "sdseg":
        make_pictures(str(folder / "data"), num_images=18)
    elif bundle == "dmri2noddi":
        make_phantoms(folder / "data", num_subjects=3)
    if (folder / "data").exists():
        options["dataset_dir"] = str(folder / "data")
    with BundleRuns(bundle, {}).loaded("inference", "tiny", **options) as workflow:
        workflow.run()
    files = sorted(path for path in (folder / "out").rglob("*") if path.name.endswith((".png", ".nii.gz")))
    return {path.relative_to(folder / "out").as_posix(): summary(_read(path)) for path in files}


def summary(values: torch.Tensor) -> dict[str, Any]:
    """Of an array with two or three axes."""
    pool = torch.nn.functional.adaptive_avg_pool2d if values.ndim == 2 else torch.nn.functional.adaptive_avg_pool3d
    blocks = pool(values[None], BLOCKS)[0]
    return {
        "shape": list(values.shape),
        "mean": round(float(values.mean()), 6),
        "sd": round(float(values.std()), 6),
        "blocks": " ".join(f"{value:.4f}" for value in blocks.flatten().tolist()),
    }


def _read(path: Path) -> torch.Tensor:
    if path.suffix == ".png":
        array = np.asarray(Image.open(path), dtype=np.float32) / 255
        return torch.from_numpy(array.mean(axis=2) if array.ndim == 3 else array)
    return torch.from_numpy(np.asarray(nibabel.load(path).dataobj, dtype=np.float32))


def stored(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def _write(name: str, values: dict[str, Any], **setting: Any) -> None:
    save_json({"setting": {**setting, "software": software_versions()}, "values": values}, FOLDER / f"{name}.json")
    print(f"{FOLDER / name}.json")


def main() -> None:
    """Write both files."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = small_stages.prepare(folder / "data")
        trained = {stage: losses(stage, data, folder / stage) for stage in small_stages.STAGES}
        made = {}
        for bundle in DEMO:
            (folder / bundle).mkdir()
            made[bundle] = demo(bundle, folder / bundle)
    setting = "small networks of tests/small_stages.py on phantoms"
    _write("losses", trained, what=setting, seed=SEED, iterations=ITERATIONS)
    _write("demo", made, what="inference.json with tiny.json, demo weights, phantoms", options=DEMO, blocks=BLOCKS)


if __name__ == "__main__":
    main()
