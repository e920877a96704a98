# SPDX-License-Identifier: Apache-2.0
"""Twenty sizes that no network takes, for each bundle: refused at the start, or given back exactly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from PIL import Image

from shared.files import save_json
from tests.dmri_runs import DMRI, MAPS
from tests.dmri_runs import save_network as save_dmri
from tests.sdseg_runs import SDSEG
from tests.sdseg_runs import save_network as save_sdseg
from tests.test_brain_bundle import BRAIN
from tests.test_cxr_bundle import CXR
from tools.phantoms.noddi_acquisition import default_table


def values(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Float32 above 0 of mean 200, no two alike."""
    return np.random.default_rng(seed).gamma(4.0, 50.0, shape).astype(np.float32)


def size_of(picture: Path) -> tuple[int, int]:
    """Height and width."""
    with Image.open(picture) as image:
        return image.height, image.width


def save_weights(runs: Any, models: Path, **overrides: Any) -> Path:
    """Random weights where an inference looks for those of a training."""
    with torch.random.fork_rng(), runs.small("inference", Path("unused"), overrides) as workflow:
        torch.manual_seed(0)
        models.mkdir()
        torch.save(workflow.parser.get_parsed_content("network_def").state_dict(), models / "model.pt")
    return models


def affine(number: int, codes: str, shape: tuple[int, ...], spacing: tuple[float, ...]) -> np.ndarray:
    """Of a volume whose axes run as ``codes`` say; oblique for two numbers in three."""
    angles = np.radians((0.0, 9.0, -14.0)[number % 3]) * np.array([1.0, 0.6, -0.4])
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        one, two = (axis + 1) % 3, (axis + 2) % 3
        about = np.eye(3)
        about[[one, one, two, two], [one, two, one, two]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        turn = about @ turn
    # Of the grid in RAS order, then as seen from the stored one.
    result = np.eye(4)
    result[:3, :3] = turn @ np.diag(spacing)
    result[:3, 3] = (-31.5, 12.25, 7.0 * number)
    transform = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    ordered = tuple(shape[int(axis)] for axis in axcodes2ornt(codes)[:, 0].argsort())
    return result @ inv_ornt_aff(transform, ordered)


def assert_grid(result: Path, source: Path) -> None:
    one, two = nibabel.load(result), nibabel.load(source)
    assert one.shape == two.shape, result
    for form in ("get_sform", "get_qform"):
        (matrix, code), (expected, expected_code) = (getattr(image, form)(coded=True) for image in (one, two))
        assert np.array_equal(matrix, expected), (result, form)
        assert code == expected_code
    assert np.isfinite(np.asarray(one.dataobj)).all()


# cxr_ldm

FILMS = (
    *((1, 2), (2, 1), (3, 3), (1, 97), (211, 1), (5, 300), (300, 5), (31, 33), (63, 65), (64, 64)),
    *((67, 71), (101, 13), (127, 128), (129, 257), (199, 64), (64, 199), (233, 241), (255, 7), (400, 96), (97, 509)),
)  # height, width


@pytest.mark.reliability(6)
def test_films_of_any_size_train(tmp_path, record_property):
    items = []
    for number, shape in enumerate(FILMS):
        name = f"{number}.png"
        Image.fromarray(np.clip(values(shape, number) / 2, 0, 255).astype(np.uint8)).save(tmp_path / name)
        items.append({"image": name, "subject": str(number)})
    save_json({"training": items, "validation": items, "test": items}, tmp_path / "datalist.json")
    folders = CXR.folders(tmp_path, "train_autoencoder")
    workflow = CXR.execute("train_autoencoder", tmp_path, **folders, max_epochs=1, adversarial_start=9)
    data = workflow.parser.get_parsed_content("train#dataset")
    assert {tuple(item["image"].shape) for item in data} == {(1, 64, 64)}
    assert (tmp_path / "models/stages/autoencoder.pt").is_file()
    record_property("cases", len(FILMS))


@pytest.fixture(scope="module")
def chest_models(tmp_path_factory) -> Path:
    return save_weights(CXR, tmp_path_factory.mktemp("chest") / "models")


@pytest.mark.reliability(6)
@pytest.mark.parametrize("size", [(32, 32), (32, 288), (96, 64), (160, 32), (224, 128)], ids=str)
def test_film_of_a_legal_size_is_drawn(size, chest_models, tmp_path):
    options = {"image_size": list(size), "latent_shape": [3, size[0] // 8, size[1] // 8], "num_inference_steps": 2}
    CXR.execute("inference", tmp_path, **options, ckpt_dir=str(chest_models), output_dir=str(tmp_path / "out"))
    (picture,) = (tmp_path / "out").glob("*.png")
    assert size_of(picture) == size


ILLEGAL = (
    *((31, 32), (32, 33), (1, 1), (97, 101), (128, 130), (512, 500), (48, 48), (16, 64), (0, 64), (250, 251)),
    *((64, 7), (1023, 1025), (65, 64), (40, 72), (509, 512)),
)


@pytest.mark.reliability(6)
@pytest.mark.parametrize("size", ILLEGAL, ids=str)
def test_film_of_another_size_is_refused_with_the_nearest_legal_one(size, tmp_path, capsys):
    """Before the weights are looked for: there are none."""
    line = CXR.last_line("inference", tmp_path, capsys, image_size=list(size), output_dir=str(tmp_path / "out"))
    assert line.startswith("image_size: expected multiples of 32")
    assert f"got {list(size)}" in line
    nearest = [int(side) for side in re.search(r"nearest is \[(\d+), (\d+)\]", line).groups()]  # type: ignore[union-attr]
    for side, legal in zip(size, nearest, strict=True):
        assert legal % 32 == 0
        assert legal >= 32
        assert abs(legal - side) <= 16 or (legal == 32 and side < 32)
    assert not list(tmp_path.rglob("*.png"))


# brain_controlnet: shape as stored, axes as stored, spacing along right, anterior and superior in mm

HEADS = (
    *(((61, 75, 5), "RAS", (2.6, 2.4, 5.0)), ((48, 64, 1), "LPS", (3.0, 3.0, 7.0)), ((47, 64, 2), "LAS", (3.1, 2, 4))),
    *(((3, 59, 67), "SPL", (2, 2, 2)), ((71, 4, 53), "LSP", (2.5, 2.5, 1)), ((5, 67, 43), "IRA", (3, 3, 3))),
    *(((1, 65, 3), "RAS", (90, 2, 2)), ((53, 1, 3), "PSR", (0.7, 2.9, 3)), ((1, 1, 40), "SRA", (2, 3, 1))),
    *(((13, 17, 4), "RAS", (12, 11, 9)), ((2, 3, 2), "LPI", (80, 60, 70)), ((7, 5, 3), "AIL", (20, 30, 25))),
    *(((257, 6, 2), "RAS", (0.7, 25, 4)), ((2, 197, 1), "LAS", (70, 1, 6)), ((96, 97, 2), "RPS", (1.7, 1.9, 8))),
    *(((49, 65, 3), "PRS", (3, 3, 0.5)), ((64, 48, 2), "ALS", (2, 4, 6)), ((33, 101, 1), "LPS", (5, 1.6, 10))),
    *(((113, 79, 1), "RAI", (1.3, 2.1, 2)), ((50, 2, 66), "LIA", (3.2, 2.6, 3))),
)


@pytest.mark.reliability(6)
def test_every_flair_gets_a_t1w_on_its_own_grid(tmp_path, record_property):
    source, out = tmp_path / "source", tmp_path / "out"
    items = []
    for number, (shape, codes, spacing) in enumerate(HEADS):
        subject = f"sub-{number:02d}"
        (source / subject).mkdir(parents=True)
        matrix = affine(number, codes, shape, spacing)
        assert "".join(nibabel.aff2axcodes(matrix)) == codes
        image = nibabel.Nifti1Image(values(shape, number), matrix)
        # What scanners and tools leave: both forms, the first alone, the second alone.
        image.set_sform(matrix, code=(1, 2, 0)[number % 3])
        image.set_qform(matrix, code=(1, 0, 1)[number % 3])
        nibabel.save(image, source / f"{subject}/{subject}_FLAIR.nii.gz")
        items.append({"flair": f"{subject}/{subject}_FLAIR.nii.gz", "subject": subject})
    save_json({"training": [], "validation": [], "test": items}, source / "datalist.json")
    models = save_weights(BRAIN, tmp_path / "models")
    BRAIN.execute("inference", source, ckpt_dir=str(models), output_dir=str(out), num_inference_steps=1)
    assert len(list(out.rglob("*_T1w.nii.gz"))) == len(HEADS)
    for item in items:
        assert_grid(out / item["flair"].replace("FLAIR", "T1w"), source / item["flair"])
    record_property("cases", len(HEADS))


# sdseg

PICTURES = (
    *((1, 2), (2, 3), (3, 1), (5, 5), (1, 97), (83, 1), (3, 251), (257, 4), (47, 63), (49, 65), (199, 31)),
)  # height, width
VOLUMES = (
    *((1, 9, 4), (40, 1, 3), (3, 4, 1), (2, 2, 2), (7, 5, 11), (53, 47, 1), (1, 1, 13), (101, 13, 2), (65, 49, 3)),
)


@pytest.mark.reliability(6)
def test_every_picture_and_volume_gets_a_mask_of_its_own_size(tmp_path, record_property):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for number, shape in enumerate(PICTURES):
        levels = np.clip(values((*shape, 3), number) / 2, 0, 255).astype(np.uint8)
        Image.fromarray(levels if number % 2 else levels[..., 0]).save(source / f"p{number}.png")
    codes = ("RAS", "LPS", "SRA", "LAS", "AIL")
    for number, shape in enumerate(VOLUMES):
        matrix = affine(number, codes[number % 5], shape, (1.1, 0.9, 3.0))
        nibabel.save(nibabel.Nifti1Image(values(shape, number), matrix), source / f"v{number}.nii.gz")
    models = save_sdseg(tmp_path / "models")
    SDSEG.execute("inference", source, ckpt_dir=str(models), output_dir=str(out))
    for number, shape in enumerate(PICTURES):
        for kind in ("mask", "mask_probability"):
            assert size_of(out / f"p{number}_{kind}.png") == shape
    for number in range(len(VOLUMES)):
        for kind in ("mask", "mask_probability"):
            assert_grid(out / f"v{number}_{kind}.nii.gz", source / f"v{number}.nii.gz")
    assert len(list(out.rglob("*_mask.*"))) == 2 * (len(PICTURES) + len(VOLUMES))  # with its JSON
    record_property("cases", len(PICTURES) + len(VOLUMES))


# dmri2noddi

# A corner stays a corner (docs/dmri2noddi.md).
DOUBLED = np.array([[0.5, 0, 0, -0.25], [0, 0.5, 0, -0.25], [0, 0, 0.5, -0.25], [0, 0, 0, 1]])
SERIES = (
    *((8, 8, 8), (7, 11, 5), (1, 9, 6), (9, 1, 4), (6, 7, 1), (1, 1, 13), (2, 1, 1), (3, 2, 5), (17, 13, 7)),
    *((16, 16, 16), (15, 16, 17), (9, 9, 9), (41, 2, 3), (2, 37, 2), (3, 3, 31), (12, 5, 19), (23, 4, 9)),
    *((5, 29, 6), (10, 12, 14), (4, 4, 4)),
)


@pytest.mark.reliability(6)
def test_every_series_gets_maps_on_the_doubled_grid(tmp_path, record_property):
    source, out, table = tmp_path / "source", tmp_path / "out", default_table()
    source.mkdir()
    codes = ("RAS", "LPS", "SRA", "LAS", "AIL")
    for number, shape in enumerate(SERIES):
        signal = values((*shape, 1), number) * np.exp(-table.bvals / 1500.0)
        signal *= np.random.default_rng(number).uniform(0.9, 1.1, signal.shape)
        matrix = affine(number, codes[number % 5], shape, (2.5, 2.4, 2.6))
        nibabel.save(nibabel.Nifti1Image(signal.astype(np.float32), matrix), source / f"s{number}_dwi.nii.gz")
        nibabel.save(nibabel.Nifti1Image(np.ones(shape, np.uint8), matrix), source / f"s{number}_dwi_mask.nii.gz")
        np.savetxt(source / f"s{number}_dwi.bval", table.bvals[None], fmt="%g")
        np.savetxt(source / f"s{number}_dwi.bvec", table.bvecs.T, fmt="%.6f")
    models = save_dmri(tmp_path / "models")
    options = {"num_inference_steps": 1, "num_samples": 2}
    DMRI.execute("inference", source, ckpt_dir=str(models), output_dir=str(out), **options)
    for number, shape in enumerate(SERIES):
        expected = nibabel.load(source / f"s{number}_dwi.nii.gz").affine @ DOUBLED
        for name in (*MAPS, *(f"{name}_sd" for name in MAPS)):
            image = nibabel.load(out / f"s{number}_{name}.nii.gz")
            assert image.shape == tuple(2 * side for side in shape)
            assert np.allclose(image.affine, expected, atol=1e-5)
            assert np.isfinite(np.asarray(image.dataobj)).all()
    record_property("cases", len(SERIES))
