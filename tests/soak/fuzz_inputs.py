# SPDX-License-Identifier: Apache-2.0
"""Good input files, damaged at random, given to ``tools.check_data`` and to the bundle that reads them.

``cxr_ldm`` reads pictures only in its trainings; the others make results of the test section. The JSON of
configurations is not damaged: MONAI reads it before anything of a bundle runs, and a configuration is a program.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from tests import commands
from tests.soak.campaign import Campaign, Case
from tests.soak.fuzzing import complaints, damage_file, results, values
from tests.soak.trainings import BUNDLES, sample_data, workflow_command
from tests.test_images import write_dicom

LIMIT = 30
FORMATS = {"cxr_ldm": ("png", "jpg", "dcm"), "sdseg": ("png", "jpg", "dcm")}
SECTION = {"cxr_ldm": "training"}
KEYS = {
    "cxr_ldm": ("image", "image", "image", ""),
    "brain_controlnet": ("flair", "flair", "t1w", "mask", ""),
    "sdseg": ("image", "image", "label", ""),
    "dmri2noddi": ("dwi", "dwi", "bval", "bvec", "mask", "ndi", ""),
}
DATALIST = "datalist.json"


def _in_format(path: Path, ending: str) -> Path:
    """The picture in another format, the PNG removed."""
    if ending == "png":
        return path
    with Image.open(path) as picture:
        grey = picture.convert("L")
        grey_or_colour = picture.convert("RGB") if ending == "jpg" and picture.mode == "RGB" else grey
        new = path.with_suffix(f".{ending}")
        if ending == "jpg":
            grey_or_colour.save(new)
        else:
            write_dicom(new, np.asarray(grey).astype(np.uint16) * 16)
    path.unlink()
    return new


def _damaged(name: str, data: Path, rng: random.Random) -> tuple[Path, str]:
    """One file of a copy of the sample data and what was done to it."""
    key = rng.choice(KEYS[name])
    path = data / DATALIST
    if key:
        content = json.loads(path.read_text())
        item = content[SECTION.get(name, "test")][0]
        path = data / item[key]
        if key == "image":
            path = _in_format(path, rng.choice(FORMATS[name]))
            item[key] = str(path.relative_to(data))
            (data / DATALIST).write_text(json.dumps(content, indent=2))
    return path, damage_file(path, rng)


def _command(name: str, data: Path, out: Path) -> tuple[str, ...]:
    if name == "cxr_ldm":
        runs = BUNDLES[name].runs
        return workflow_command(
            runs, "train_autoencoder", data, run_id="training", **runs.folders(out, "train_autoencoder"), max_epochs=1
        )
    files = "['configs/inference.json','configs/tiny.json']"
    words = ("--dataset_dir", str(data), "--output_dir", str(out), "--num_inference_steps", "2")
    return ("monai.bundle", "run", "--config_file", files, *words, "--seed", "0")


def _unnamed(checked: commands.Finished, data: Path) -> list[str]:
    """``check_data`` lists bad files on standard output, one a line."""
    if checked.timed_out or "Traceback" in checked.err:
        return [f"check_data: {checked.last_line or 'still running'}"]
    named = any(line.strip().startswith(str(data)) for line in (checked.out + checked.err).splitlines())
    return [] if checked.code == 0 or named else [f"check_data: no line begins with the file: {checked.out[-200:]}"]


def _result_problems(name: str, out: Path) -> list[str]:
    """Finite results of the size of what was read: a volume of the sample data or what is left of it."""
    found = [path for path in results(out) if "previews" not in path.parts]
    if not found:
        return [] if name == "cxr_ldm" else ["exit code 0 without results"]
    return [f"{path.name}: not finite" for path in found if not np.isfinite(values(path)).all()]


def case(folder: Path, rng: random.Random, number: int) -> Case:
    name = list(BUNDLES)[number % len(BUNDLES)]
    place = folder / f"inputs{number}"
    data, out = place / "data", place / "out"
    shutil.copytree(sample_data(name, folder), data)
    path, what = _damaged(name, data, rng)
    checked = commands.run("tools.check_data", data, limit=LIMIT)
    problems = _unnamed(checked, data)
    done = commands.run(*_command(name, data, out), cwd=BUNDLES[name].runs.folder, limit=LIMIT)
    problems += complaints(done, data)
    if done.code == 0:
        problems += _result_problems(name, out)
    if not problems:
        shutil.rmtree(place)
    return Case(
        f"{name}, {path.relative_to(data)}: {what}; check_data {checked.code}, bundle {done.code}",
        survived=int(not problems),
        problems=tuple(problems),
        counts={
            "refused by the bundle": int(done.code != 0),
            "refused by check_data": int(checked.code != 0),
            "read all the same": int(done.code == checked.code == 0),
        },
    )


CAMPAIGN = Campaign("inputs", 3, "input files damaged at random", share=0.25, target=300, case=case)
