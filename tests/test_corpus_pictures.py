# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.transforms.images import read_radiograph
from shared.transforms.masks import load_mask
from shared.transforms.segmentation_images import LoadPictured
from tests import commands
from tests.conftest import ROOT
from tests.corpus import DATALIST, BadInput, complaint, copied, edit_list, good_pictures, place
from tests.corpus_pictures import FILM, MASK, PICTURES, encoded
from tests.corpus_texts import SECTIONS, TEXTS

BUNDLES = ("cxr_ldm", "sdseg")
CORPUS = PICTURES + TEXTS
CONFIGS = {
    "training": ("train", "tiny"),
    "evaluation": ("train", "evaluate", "tiny"),
    "inference": ("inference", "tiny"),
}
SECTION = {"check_data": "training", "training": "training", "evaluation": "test", "inference": "test"}


def runs() -> Iterator[Any]:
    """Every input with every command but check_data, which takes ten minutes; two of three inputs with one at once."""
    for number, bad in enumerate(CORPUS):
        others = [command for command in bad.commands if command != "check_data"]
        for turn, command in enumerate(others):
            at_once = number % 3 != 2 and turn == number % len(others) and not bad.accepted
            yield pytest.param(bad, command, id=f"{bad}-{command}", marks=() if at_once else pytest.mark.soak)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    commands.run("platform", limit=200)  # the server's imports are no command's time
    root = tmp_path_factory.mktemp("good")
    return {bundle: good_pictures(bundle, root / bundle) for bundle in BUNDLES}


def run_command(bad: BadInput, command: str, folder: Path, file: Path, root: Path) -> commands.Finished:
    """The documented command line, with the small networks and the shipped demo weights."""
    bundle = ROOT / "bundles" / bad.bundle
    files = [f"configs/{name}.json" for name in CONFIGS[command]]
    options: dict[str, Any] = {"output_dir": root / "runs", "num_inference_steps": 1}
    if command != "inference" or bad.bundle == "sdseg":
        options["dataset_dir"] = folder
    if command == "training":
        del options["num_inference_steps"]
        options |= {"max_epochs": 1, "tracking_uri": "", "latent_cache_dir": root / "latents"}
        options["ckpt_dir"] = root / "models"
        (root / "models").mkdir()
        (root / "models/stages").symlink_to(bundle / "models/tiny/stages")
    if bad.kind == "prompt":
        options |= dict([bad.value or ("prompt", str(file))])
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    run_id = ["training"] if command == "training" else []
    return commands.run("monai.bundle", "run", *run_id, "--config_file", str(files), *words, cwd=bundle, limit=30)


def first_images(folder: Path) -> list[Path]:
    """Of each section; a text without a file of its own is named by its image."""
    content = json.loads((folder / DATALIST).read_text())
    return [folder / content[section][0]["image"] for section in SECTIONS]


def skip_as_root(bad: BadInput, file: Path) -> None:
    if bad.name.endswith("no-rights"):
        try:
            file.read_bytes()
        except PermissionError:
            return
        pytest.skip("root may read every file")


@pytest.mark.reliability(3)
@pytest.mark.parametrize(("bad", "command"), list(runs()))
def test_command(bad, command, good, tmp_path):
    folder = copied(good[bad.bundle], tmp_path / "data")
    file = bad.make(folder)
    skip_as_root(bad, file)
    if bad.key in ("image", "label"):
        place(folder, file, key=bad.key, section=SECTION[command])
    if bad.key == "report":  # the items that lost their text
        for section in SECTIONS:
            place(folder, file, key=bad.key, section=section)
    finished = run_command(bad, command, folder, file, tmp_path)
    if bad.accepted and command in bad.accepted_by:
        assert (finished.code, finished.timed_out) == (0, False), finished.err[-2000:]
        assert not finished.network_attempts
        return
    begins = [bad.value[0] if bad.value else file]
    if bad.name.startswith("cxr_ldm-text"):
        begins += first_images(folder)
    found = [complaint(finished, begin, bad.words) for begin in begins]
    assert None in found, found[0]


def in_own_list(bad: BadInput) -> bool:
    return bad.key is None and bad.kind == "data list"


@pytest.mark.reliability(3)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_check_data_lists_them_all_at_once(bundle, good, tmp_path, record_property):
    folder = copied(good[bundle], tmp_path / "data")
    chosen = [b for b in CORPUS if b.bundle == bundle and "check_data" in b.commands and not in_own_list(b)]
    items = json.loads((folder / DATALIST).read_text())["training"]
    padded = [dict(items[number % len(items)]) for number in range(len(chosen))]
    edit_list(folder, lambda content: content.update(training=padded))
    begins = []
    for number, bad in enumerate(chosen):
        # The next item of the training section comes to the front, where a bad input goes.
        edit_list(folder, lambda content: content["training"].append(content["training"].pop(0)))
        file = bad.make(folder)
        if bad.key is not None:
            place(folder, file, key=bad.key, section="training")
        own = bad.key is None and file == folder / DATALIST
        position = (number - len(chosen) + 1) % len(chosen)
        begins.append(f"{file}: training[{position}]: " if own else f"{file}: ")
    finished = commands.run("tools.check_data", folder, limit=30)
    assert (finished.code, finished.timed_out, finished.err) == (1, False, "")
    *problems, summary = finished.out.splitlines()
    assert [line for line in problems if not line.startswith("/")] == []
    assert summary.startswith(f"{len(problems)} problems in ")
    for bad, begin in zip(chosen, begins, strict=True):
        begin = begin.encode(errors="backslashreplace").decode()
        lines = [line for line in problems if line.startswith(begin)]
        wanted = 0 if bad.accepted and "check_data" in bad.accepted_by else 1
        assert len(lines) == wanted or bad.name.endswith("no-rights"), (bad.name, lines)
    record_property("cases", len(chosen))


@pytest.mark.reliability(3)
@pytest.mark.parametrize("bad", [b for b in CORPUS if in_own_list(b) and "check_data" in b.commands], ids=str)
def test_check_data_names_a_bad_list(bad, good, tmp_path):
    folder = copied(good[bad.bundle], tmp_path / "data")
    file = bad.make(folder)
    finished = commands.run("tools.check_data", folder, limit=30)
    lines = (finished.out + finished.err).splitlines()
    assert (finished.code, finished.timed_out) == (1, False)
    assert "Traceback" not in finished.err
    assert any(line.startswith(f"{file}: ") and bad.words in line for line in lines), lines


# What is read although it is unusual is read right


def read(bad: BadInput, path: Path) -> np.ndarray:
    if bad.bundle == "cxr_ldm":
        return read_radiograph(path)
    if bad.key == "label":
        return load_mask(str(path)).numpy()[0]
    return LoadPictured("image")({"image": str(path)})["image"].numpy()


@pytest.mark.parametrize("bad", [bad for bad in PICTURES if bad.accepted], ids=str)
def test_unusual_pictures_are_read_right(bad, good, tmp_path):
    path = bad.make(copied(good[bad.bundle], tmp_path / "data"))
    kind = bad.name.removeprefix(f"{bad.bundle}-")
    # 12 bits of which 8 are in use; as many levels as a palette of 64 colours has; rounding of a printer's colours
    wanted = {
        "1-bit": MASK / 255,
        "dicom-named-png": FILM * (16 / 4095),
        "palette": FILM // 4 * 4 / 255,
        "mask-nothing-in-it": np.zeros_like(MASK),
        "grey": np.stack([FILM / 255] * 3),
    }.get(kind, FILM / 255)
    np.testing.assert_allclose(read(bad, path), wanted, atol=1e-6)


def silent(path: Path, contents: Sequence[bytes], right: np.ndarray) -> list[int]:
    """Numbers of the contents that are read without complaint as other pixels than the right ones."""
    found = []
    for number, content in enumerate(contents):
        path.write_bytes(content)
        try:
            image = read_radiograph(path)
        except ValueError:
            continue
        if not np.array_equal(image, right):
            found.append(number)
    return found


@pytest.mark.reliability(3)
@pytest.mark.parametrize("values", [MASK, FILM[:24, :16], np.dstack([FILM, MASK, FILM])[:16, :20]], ids=["1", "2", "3"])
def test_no_flipped_bit_of_a_png_is_read_as_another_picture(values, tmp_path, record_property):
    """Pillow does not compare the checksums of pixels: of a mask's file every tenth flip made another mask."""
    path = tmp_path / "a.png"
    content = encoded(values)
    path.write_bytes(content)
    right = read_radiograph(path)
    flips = [
        content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]
        for place in range(len(content))
    ]
    assert silent(path, flips, right) == []
    record_property("cases", len(flips))


@pytest.mark.reliability(3)
@pytest.mark.parametrize(("form", "suffix"), [("PNG", "png"), ("JPEG", "jpg"), ("TIFF", "tif"), ("BMP", "bmp")])
def test_no_cut_file_is_read_as_another_picture(form, suffix, tmp_path, record_property):
    path = tmp_path / f"a.{suffix}"
    content = encoded(FILM[:24, :16], form)
    path.write_bytes(content)
    right = read_radiograph(path)
    assert silent(path, [content[:length] for length in range(len(content))], right) == []
    record_property("cases", len(content))
