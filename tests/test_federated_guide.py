# SPDX-License-Identifier: Apache-2.0
"""The programs of ``docs/federated.md`` run as they stand there, with the bundle as users have it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from tests.conftest import ROOT
from tests.exports import exported, run_alone
from tools.phantoms.sdseg import make_dataset


def programs() -> list[str]:
    """The Python programs of the guide: the two clients, and the three files of NVFlare."""
    guide = (ROOT / "docs/federated.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", guide, re.DOTALL)


def test_programs_of_the_guide_are_python():
    found = programs()
    assert len(found) == 4
    for program in found:
        compile(program, "guide", "exec")


def test_server_of_nvflare_has_the_weights_of_the_clients():
    """NVFlare is not installed here: of its three files the model needs MONAI alone."""
    model = next(program for program in programs() if "class BundleNetwork" in program)
    names: dict[str, Any] = {}
    exec(compile(model, "guide", "exec"), names)
    state = names["BundleNetwork"](str(exported("sdseg"))).state_dict()
    assert state.keys() == torch.load(exported("sdseg") / "models/model.pt", weights_only=True).keys()


def test_two_clients_run_with_an_exported_bundle_from_another_folder(tmp_path: Path):
    (tmp_path / "dist").mkdir()
    os.symlink(exported("sdseg"), tmp_path / "dist/sdseg")
    for seed, name in enumerate(("a", "b"), start=1):
        make_dataset(str(tmp_path / f"data/{name}"), num_images=18, seed=seed)
    done = run_alone("-c", programs()[0], cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    said = re.findall(r"^round (\d), (hospital_\w): mean_dice (0\.\d+)$", done.stdout, re.MULTILINE)
    assert [line[:2] for line in said] == [(n, f"hospital_{x}") for n in "12" for x in "ab"]
    weights = torch.load(tmp_path / "federation/model.pt", weights_only=True)
    start = torch.load(exported("sdseg") / "models/model.pt", weights_only=True)
    moved = {name.split(".")[0] for name in weights if not torch.equal(weights[name], start[name])}
    assert moved == {"unet", "vision_encoder"}
