# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Spacingd
from scipy.spatial.transform import Rotation

from shared.files import sha256_of_file
from shared.resolution import doubled_affine
from shared.transforms.diffusion_requests import WithSeriesOfRequest
from shared.transforms.label_answers import (
    AnswerFile,
    AnsweringCompose,
    CheckLabelOptions,
    RequestSpacingd,
    answer_with_file,
    is_monai_label_request,
)
from shared.transforms.volumes import LoadVolumed
from tests.bundle_runs import BundleRuns
from tests.bundle_tools import read, strings
from tests.conftest import ROOT
from tests.label_runs import answer
from tools.phantoms.noddi_acquisition import default_table

REQUEST = {"model": "m", "image": "/srv/studies/a.nii.gz", "image_path": "/srv/studies/a.nii.gz"}
CPU = {"device": "$torch.device('cpu')"}
BRAIN = BundleRuns("brain_controlnet", {"inference": CPU})
DMRI = BundleRuns("dmri2noddi", {"inference": CPU})
MAPS = ("ndi", "odi", "fwf")
TASKS = ("brain_controlnet", "dmri2noddi", "sdseg", "cxr_ldm")
# File axes S, L, P and A, I, L, oblique, anisotropic.
TURNS = {
    "plain": np.diag([2.0, 2.0, 3.0]),
    "permuted": np.array([[0.0, -1.9, 0.0], [0.0, 0.0, -2.1], [3.0, 0.0, 0.0]]),
    "oblique": Rotation.from_euler("xyz", (12, -7, 25), degrees=True).as_matrix()
    @ np.array([[0.0, 0.0, -1.8], [2.2, 0.0, 0.0], [0.0, -2.9, 0.0]]),
}


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    """Where answers and gradients are kept meanwhile."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


class HttpError(Exception):
    """As that of starlette, which MONAI Label's server turns into an answer."""

    def __init__(self, status_code: int, detail: str) -> None:
        super().__init__(detail)
        self.status_code, self.detail = status_code, detail


@pytest.fixture
def web(monkeypatch) -> None:
    module = types.ModuleType("starlette.exceptions")
    module.HTTPException = HttpError
    monkeypatch.setitem(sys.modules, "starlette", types.ModuleType("starlette"))
    monkeypatch.setitem(sys.modules, "starlette.exceptions", module)


# Options


CHECK = CheckLabelOptions(
    numbers={"seed": [0, 100], "scale": [0.0, 2.0]}, choices={"map": ["all", "x"]}, flags=["fast"], texts=["note"]
)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"seed": 3}, {"seed": "3"}, {"seed": [3]}, {"seed": 100.0}, {"scale": 0.5}, {"scale": "1"},
        {"scale": [1, 0.5]}, {"map": "x"}, {"map": ["x", "all"]}, {"fast": True}, {"fast": "False"},
        {"note": "costs 5 $, 3 %"}, {"unknown": "$1"},
    ],
)  # fmt: skip
def test_what_a_client_may_ask_for_passes_unchanged(options):
    assert CHECK({**REQUEST, **options}) == {**REQUEST, **options}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", 0.5, "expected a whole number from 0 to 100, got 0.5"),
        ("seed", 101, "expected a whole number from 0 to 100, got 101"),
        ("seed", True, "expected a whole number"),
        ("seed", None, "expected a whole number"),
        ("seed", [], "expected a whole number"),
        ("seed", [1, "two"], "expected a whole number from 0 to 100, got 'two'"),
        ("scale", "nan", "expected a number from 0 to 2, got 'nan'"),
        ("map", "y", "expected all or x, got 'y'"),
        ("map", ["x", "y"], "expected all or x, got 'y'"),
        ("fast", "perhaps", "expected true or false, got 'perhaps'"),
        ("note", "$1", "refused"),
        ("note", " @seed", "refused"),
        ("note", "%a.json::b", "refused"),
        ("seed", {"_target_": "os.mkdir"}, "refused"),
        ("map", ["x", ["$1"]], "refused"),
    ],
)
def test_another_option_is_named(name, value, message):
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        CHECK({**REQUEST, name: value})
    assert CHECK({name: value}) == {name: value}, "not a request"


@pytest.mark.parametrize("task", TASKS)
def test_every_option_of_a_bundle_is_checked_first_and_never_before(task, monkeypatch):
    monkeypatch.chdir(ROOT / "bundles" / task)
    config = ConfigParser(read(ROOT / f"bundles/{task}/configs/inference.json"))
    first = config.get_parsed_content("preprocessing").transforms[0].transform
    assert isinstance(first, CheckLabelOptions)
    assert first.options == config["displayable_configs"].keys()
    # Preprocessing is built before anything is checked.
    assert not [text for _, text in strings(config["preprocessing"]) if "displayable_configs" in text]


@pytest.mark.parametrize("task", TASKS)
def test_limits_are_those_of_the_sampler(task):
    source = read(ROOT / f"bundles/{task}/configs/inference.json")
    limits = source["preprocessing"]["transforms"][0]["numbers"]
    for name, (low, high) in limits.items():
        for value, fits in ((low, True), (high, True), (low - 1, False), (high + 1, False)):
            config = ConfigParser({**source, "displayable_configs": {**source["displayable_configs"], name: value}})
            if fits:
                assert config.get_parsed_content("inferer") is not None
            elif value < 2**53:  # one more is the same float
                with pytest.raises(RuntimeError) as caught:
                    config.get_parsed_content("inferer")
                assert str(caught.value.__cause__).startswith(f"{name}: expected")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("evil", ["$__import__('os').mkdir('{}')", {"_target_": "os.mkdir", "path": "{}"}])
def test_client_cannot_run_code(task, evil, tmp_path):
    trap = tmp_path / "trap"
    evil = json.loads(json.dumps(evil).replace("{}", str(trap)))
    for name in read(ROOT / f"bundles/{task}/configs/inference.json")["displayable_configs"]:
        for value in (evil, [evil], ["1", evil]):
            with pytest.raises(Exception, match=f"{name}: expected"):
                answer(task, "a.nii.gz", **{name: value})
            assert not trap.exists()


# Errors


class Refuses:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, data: Any) -> Any:
        raise self.error


def test_client_reads_the_message_without_the_folder_of_the_server(web):
    error = ValueError("/srv/studies/a.nii.gz: expected a, got b, unlike /srv/studies/c.nii.gz.")
    (told,) = AnsweringCompose([Refuses(error)]).transforms
    with pytest.raises(HttpError) as caught:
        told(REQUEST)
    assert caught.value.status_code == 400
    assert caught.value.detail == "a.nii.gz: expected a, got b, unlike c.nii.gz."
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError("x"), RuntimeError("x")])
def test_errors_stay_as_they_are_elsewhere(web, monkeypatch, error):
    (told,) = AnsweringCompose([Refuses(error)]).transforms
    with pytest.raises(type(error)):
        told({"image": "a"})
    monkeypatch.setitem(sys.modules, "starlette.exceptions", None)
    with pytest.raises(type(error)):
        told(REQUEST)
    # MONAI's wrapper, which shows the cause last.
    with pytest.raises(RuntimeError):
        AnsweringCompose([Refuses(error)])({"image": "a"})


def test_a_fault_of_the_program_is_no_fault_of_the_client(web):
    (told,) = AnsweringCompose([Refuses(RuntimeError("x"))]).transforms
    with pytest.raises(RuntimeError, match="^x$"):
        told(REQUEST)


# Spacing


@pytest.fixture
def flair(tmp_path) -> Path:
    values = np.random.default_rng(0).integers(1, 400, (13, 17, 5)).astype(np.int16)
    path = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, affine_of("oblique")), path)
    return path


def affine_of(turn: str) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = TURNS[turn], (31.5, -17.25, 40.0)
    return affine


def test_spacing_and_its_inversion_work_in_a_request(flair):
    """Under MONAI 1.6 ``Spacingd`` stops at ``image_path``; without it, it is the same transform."""
    request = {"model": "m", "image": str(flair), "image_path": str(flair), "image_range": [[0.0, 1.0]]}
    pixdim = (1.5, 1.5, -1.0)
    chain = AnsweringCompose([LoadVolumed("image"), RequestSpacingd("image", pixdim)])
    data: Any = request
    for transform in chain.transforms:
        data = transform(data)
    assert (data["image_path"], data["image_range"]) == (str(flair), [[0.0, 1.0]])
    stock = Compose([LoadVolumed("image"), Spacingd("image", pixdim)])({"image": str(flair)})
    assert torch.equal(data["image"].as_tensor(), stock["image"].as_tensor())
    assert torch.equal(data["image"].affine, stock["image"].affine)
    data["pred"] = data["image"].clone()
    back = Invertd("pred", chain, "image", nearest_interp=False)(data)["pred"]
    assert back.shape == (1, 13, 17, 5)
    assert torch.allclose(back.affine, torch.from_numpy(nibabel.load(flair).affine))
    assert is_monai_label_request(data)


# Files


def test_file_takes_the_place_of_the_array(temporary):
    data: dict[Any, Any] = {
        **REQUEST,
        "image": MetaTensor(torch.rand(1, 2, 3)),
        "image_meta_dict": {"spatial_shape": 1},
    }
    answer_with_file(data, "pred", lambda name: Path(name).write_bytes(b"abc"), suffix=".nii.gz", result={"a": 1})
    # Of these MONAI Label's last transform takes the size of its "array".
    assert not {"image", "image_meta_dict"} & data.keys()
    pred = data["pred"]
    assert isinstance(pred, str)
    assert (pred.shape, pred.shape[1:], data["result_write_to_file"]) == ((), (), False)
    assert pred.endswith(".nii.gz")
    assert Path(pred).read_bytes() == b"abc"
    assert stat.S_IMODE(os.stat(pred).st_mode) == 0o600
    assert data["result"] == {"a": 1, "sha256": sha256_of_file(pred), "bytes": 3}


def test_failed_answer_leaves_no_file(temporary):
    def fail(name: str) -> None:
        Path(name).write_bytes(b"half")
        raise OSError(5, "broken disk")

    data: dict[Any, Any] = dict(REQUEST)
    with pytest.raises(OSError, match="broken disk"):
        answer_with_file(data, "pred", fail, suffix=".nii.gz", result={})
    assert data == REQUEST
    assert not list(temporary.iterdir())


# brain_controlnet


def write_flair(folder: Path, turn: str) -> Path:
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (5, 7, 4)), indexing="ij"))
    values = (np.maximum(2 - (grid**2).sum(axis=0), 0) * 900 + 40 * grid[0]).clip(0).astype(np.int16)
    folder.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine_of(turn)), folder / "sub-01_FLAIR.nii.gz")
    return folder / "sub-01_FLAIR.nii.gz"


@pytest.mark.parametrize("turn", TURNS)
def test_translated_volume_is_the_file_of_a_run(turn, tmp_path):
    path = write_flair(tmp_path / "studies", turn)
    options = {"seed": 3, "num_inference_steps": 1, "num_samples": 2}
    BRAIN.execute("inference", path, output_dir=str(tmp_path / "out"), **options)
    # What a viewer sends: choices as lists, numbers as text, its own format and type.
    viewer = {"seed": "3", "scheduler": ["dpm", "ddim"], "result_extension": ".nrrd", "result_dtype": "uint8"}
    for end, params in (("_sd", {"volume": ["sd", "t1w"]}), ("", {} if turn == "plain" else viewer)):
        data = answer("brain_controlnet", path, **options | params)
        saved = tmp_path / f"out/sub-01_T1w{end}.nii.gz"
        assert isinstance(data["pred"], AnswerFile)
        assert Path(data["pred"]).read_bytes() == saved.read_bytes()
        said = {"num_samples": 2, "num_inference_steps": 1, "synthetic": True, "shape": [5, 7, 4]}
        assert said.items() <= data["result"].items()
        assert data["result"]["sha256"] == sha256_of_file(saved)
        assert json.loads(json.dumps(data["result"])) == data["result"]
    image = nibabel.load(data["pred"])
    assert np.array_equal(image.affine, nibabel.load(path).affine)
    assert image.get_data_dtype() == np.float32
    assert 0.5 < np.asarray(image.dataobj).max() <= 1


def test_picture_is_answered_by_a_picture(tmp_path):
    from PIL import Image

    rows = np.random.default_rng(0).integers(0, 255, (20, 16)).astype(np.uint8)
    Image.fromarray(rows).save(tmp_path / "a_FLAIR.png")
    data = answer("brain_controlnet", tmp_path / "a_FLAIR.png", num_inference_steps=1)
    with Image.open(data["pred"]) as picture:
        assert (picture.size, picture.mode, "ynthetic" in picture.text["Comment"]) == ((16, 20), "L", True)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"volume": "sd", "num_inference_steps": 1},
            "^volume: expected t1w of one sample, got sd; ask for num_samples",
        ),
        ({"volume": "flair"}, "^volume: expected t1w or sd, got 'flair'"),
        ({"num_inference_steps": 1001}, "^num_inference_steps: expected a whole number from 1 to 1000, got 1001"),
        ({"scheduler": "ddpm"}, "^scheduler: expected dpm or ddim, got 'ddpm'"),
    ],
)
def test_client_of_brain_controlnet_reads_what_to_correct(web, tmp_path, params, message):
    with pytest.raises(HttpError, match=message):
        answer("brain_controlnet", write_flair(tmp_path, "plain"), **params)


def test_files_that_brain_controlnet_cannot_read_are_named(web, tmp_path, temporary):
    with pytest.raises(HttpError, match="^image: expected the path of a file"):
        answer("brain_controlnet", "")
    path = write_flair(tmp_path, "plain")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(HttpError, match=r"^sub-01_FLAIR\.nii\.gz: expected a readable file"):
        answer("brain_controlnet", path)
    assert not list(temporary.iterdir())


# dmri2noddi


def write_series(folder: Path, turn: str = "plain", *, gradients: bool = True) -> Path:
    """Diffusion along x in an ellipsoid, without other structure."""
    folder.mkdir(parents=True, exist_ok=True)
    table = default_table()
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (7, 5, 6)), indexing="ij"))
    inside = (grid**2).sum(axis=0) < 1.3
    decay = np.exp(-table.bvals * (3e-4 + 1e-3 * table.bvecs[:, 0] ** 2))
    values = ((20 + inside * (1000 + 200 * grid[0]))[..., None] * decay).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, affine_of(turn)), folder / "p7_dwi.nii.gz")
    if gradients:
        np.savetxt(folder / "p7_dwi.bval", table.bvals[None], fmt="%.17g")
        np.savetxt(folder / "p7_dwi.bvec", table.bvecs.T, fmt="%.17g")
    return folder / "p7_dwi.nii.gz"


@pytest.mark.parametrize("turn", TURNS)
def test_maps_are_those_of_a_run(turn, tmp_path):
    path = write_series(tmp_path / "studies", turn)
    mask = np.zeros((14, 10, 12), np.uint8)
    mask[2:11, 3:9, 1:10] = 1
    nibabel.save(nibabel.Nifti1Image(mask, doubled_affine(nibabel.load(path).affine)), path.parent / "p7_mask.nii.gz")
    options = {"seed": 3, "num_inference_steps": 1, "num_samples": 2}
    DMRI.execute("inference", path, output_dir=str(tmp_path / "out"), **options)
    data = answer("dmri2noddi", path, **options)
    image = nibabel.load(data["pred"])
    kinds = [*MAPS, *(f"{name}_sd" for name in MAPS)]
    assert data["result"]["maps"] == kinds
    assert (image.shape, data["result"]["shape"]) == ((14, 10, 12, 6), [14, 10, 12, 6])
    for index, kind in enumerate(kinds):
        saved = nibabel.load(tmp_path / f"out/p7_{kind}.nii.gz")
        assert np.array_equal(np.asarray(image.dataobj)[..., index], np.asarray(saved.dataobj))
        assert np.array_equal(image.affine, saved.affine)
        if kind in MAPS:
            mean = np.asarray(saved.dataobj, dtype=float)[mask > 0].mean()
            assert data["result"]["mean_in_brain"][kind] == pytest.approx(mean, rel=1e-6)
    viewer = {"seed": "3", "map": ["odi", "all"], "result_extension": ".nrrd", "result_dtype": "uint8"}
    one = answer("dmri2noddi", path, **options | viewer)
    assert Path(one["pred"]).read_bytes() == (tmp_path / "out/p7_odi.nii.gz").read_bytes()
    assert {"seed": "3", "num_inference_steps": 1}.items() <= one["result"].items()
    assert json.loads(json.dumps(one["result"])) == one["result"]


def test_seed_decides_the_bytes(tmp_path):
    path = write_series(tmp_path, "oblique")
    options = {"num_inference_steps": 1, "map": "fwf"}
    answers = [answer("dmri2noddi", path, **options, seed=seed)["pred"] for seed in (1, "1", 2)]
    one, again, other = (Path(name).read_bytes() for name in answers)
    assert one == again != other


@pytest.mark.parametrize("form", ["lists", "rows", "columns", "text"])
def test_gradients_may_come_with_the_request(form, tmp_path, temporary):
    table = default_table()
    given: dict[str, Any] = {"bvals": table.bvals.tolist(), "bvecs": table.bvecs.T.tolist()}
    if form == "rows":
        given["bvals"] = [given["bvals"]]
    elif form == "columns":
        given["bvecs"] = table.bvecs.tolist()
    elif form == "text":
        given["bvals"] = " ".join(map(repr, given["bvals"]))
        given["bvecs"] = "\n".join(", ".join(map(repr, row)) for row in given["bvecs"])
    sent = write_series(tmp_path / "sent", "permuted", gradients=False)
    stored = write_series(tmp_path / "stored", "permuted")
    for path in (sent, stored):
        nibabel.save(
            nibabel.Nifti1Image(np.ones((7, 5, 6), np.uint8), nibabel.load(path).affine), path.parent / "mask.nii.gz"
        )
    one = answer("dmri2noddi", sent, deterministic="true", **given)
    other = answer("dmri2noddi", stored, deterministic=True)
    assert Path(one["pred"]).read_bytes() == Path(other["pred"]).read_bytes()
    assert one["result"]["seed"] is None
    assert sorted(path.name for path in temporary.iterdir()) == sorted(Path(d["pred"]).name for d in (one, other))


def test_paths_of_a_client_are_not_followed(tmp_path):
    path, other = write_series(tmp_path / "a"), write_series(tmp_path / "b", "oblique")
    named = {"dwi": str(other), "bval": "/none", "bvec": "/none", "mask": "/none", "deterministic": True}
    one, plain = answer("dmri2noddi", path, **named), answer("dmri2noddi", path, deterministic=True)
    assert Path(one["pred"]).read_bytes() == Path(plain["pred"]).read_bytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"^p7_dwi\.nii\.gz: expected its gradients beside it, .*or send bvals and bvecs as parameters"),
        ({"bvals": [0, 1000]}, "^bvecs: expected it beside bvals, got none"),
        ({"bvecs": [[1, 0, 0]]}, "^bvals: expected it beside bvecs, got none"),
        ({"bvals": [0, 1000], "bvecs": [[0, 1], [0, 0], [0, 0]]}, "^bvals: expected one b-value for each of the 64"),
        ({"bvals": 32 * [0, 1000], "bvecs": [[0, 1], [0, 0]]}, "^bvecs: expected 3 rows"),
        ({"bvals": ["x"], "bvecs": [[0, 1]]}, r"^bvals: expected numbers, or lists of them.*'x'"),
        ({"bvals": [0], "bvecs": [[0, {}]]}, "^bvecs: expected numbers, or lists of them"),
        ({"bvals": "0 x", "bvecs": "0"}, "^bvals: expected b-values as plain numbers"),
    ],
)
def test_gradients_that_do_not_fit_are_named(web, given, message, tmp_path, temporary):
    with pytest.raises(HttpError, match=message):
        answer("dmri2noddi", write_series(tmp_path, gradients=False), **given)
    assert not list(temporary.iterdir())


def test_files_that_dmri2noddi_cannot_read_are_named(web, tmp_path):
    with pytest.raises(
        HttpError, match="^image: expected a diffusion MRI of the studies or a file, got none of that id"
    ):
        answer("dmri2noddi", "")
    with pytest.raises(HttpError, match=r"^sub-01_FLAIR\.nii\.gz: expected a diffusion MRI of four axes"):
        answer("dmri2noddi", write_flair(tmp_path, "plain"))
    with pytest.raises(HttpError, match="^map: expected all or ndi or odi or fwf, got 'xyz'"):
        answer("dmri2noddi", write_series(tmp_path), map="xyz")


def test_items_of_a_run_are_left_alone():
    seen: list[Any] = []
    load = WithSeriesOfRequest([lambda d: {**d, "a": 1}, lambda d: seen.append(d) or d])
    item = {"dwi": "x", "bval": "y", "bvec": "z", "mask": "m", "bvals": [1]}
    assert load(item) == {**item, "a": 1} == seen[0]
