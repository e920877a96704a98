# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from shared.transforms.saving import SampleForLabeld, SaveSampled, to_grey

PROMPT = "Patient Miller has a small effusion."


def picture() -> torch.Tensor:
    """(1, 5, 9) with every pixel different, so that a swap of rows and columns shows."""
    return torch.linspace(0, 1, 45).reshape(1, 5, 9)


def item(**data):
    return {"pred": picture(), "prompt": PROMPT, "negative_prompt": "", "seed": 4, "prompt_index": 2, **data}


def read(path):
    with Image.open(path) as opened:
        return np.asarray(opened).astype(np.int64), dict(opened.text)


@pytest.mark.parametrize(("bits", "top"), [(8, 255), (16, 65535)])
def test_png_keeps_rows_columns_and_depth(tmp_path, bits, top):
    SaveSampled(output_dir=tmp_path, bits=bits)(item())
    pixels, _ = read(tmp_path / "2_4.png")
    assert np.array_equal(pixels, np.round(picture()[0].numpy() * top).astype(np.int64))


def test_values_are_rounded_and_clipped():
    values = torch.tensor([[[-1.0, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 2.0]]])
    assert to_grey(values, 8).tolist() == [[0, 0, 0, 1, 255, 255]]
    with pytest.raises(ValueError, match=r"^pred: expected a picture \(1, H, W\), got \(2, 4, 4\)"):
        to_grey(torch.zeros(2, 4, 4), 8)


def test_sidecar_explains_and_picture_is_marked(tmp_path):
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"abc")
    out = tmp_path / "out"
    save = SaveSampled(
        output_dir=out, weights_path=weights, guidance_scale=7.0, num_inference_steps=50, scheduler="dpm"
    )
    save(item(seed=torch.tensor(4)))
    said = json.loads((out / "2_4.json").read_text())
    assert said["synthetic"] is True
    assert said["prompt"] == PROMPT
    assert said["seed"] == 4
    assert said["scheduler"] == "dpm"
    assert said["weights_sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert said["intended_use"].startswith("research only")
    assert {"monai_version", "torch_version", "guidance_scale", "num_inference_steps"} <= set(said)
    _, marks = read(out / "2_4.png")
    assert "Synthetic" in marks["Comment"]
    assert marks["synthetic"] == "true"
    assert marks["seed"] == "4"
    assert "Miller" not in "".join(marks.values())
    assert not any("Miller" in path.name for path in out.iterdir())
    assert len(list(out.iterdir())) == 2


def test_other_pictures_are_not_overwritten(tmp_path):
    save = SaveSampled(output_dir=tmp_path)
    save(item())
    save(item())
    assert len(list(tmp_path.glob("*.png"))) == 1
    save(item(prompt="another"))
    SaveSampled(output_dir=tmp_path, guidance_scale=1.0)(item())
    save(item(prompt="another"))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["2_4.png", "2_4_1.png", "2_4_2.png"]
    assert json.loads((tmp_path / "2_4_1.json").read_text())["prompt"] == "another"


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise OSError(5, "broken disk")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="broken disk"):
        SaveSampled(output_dir=tmp_path)(item())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [8, 16])
def test_dicom_secondary_capture(tmp_path, bits):
    pydicom = pytest.importorskip("pydicom")
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"weights")
    save = SaveSampled(output_dir=tmp_path, bits=bits, dicom=True, weights_path=weights, scheduler="ddim")
    save(item())
    save(item(seed=5))
    dataset, second = (pydicom.dcmread(tmp_path / f"2_{seed}.dcm") for seed in (4, 5))
    assert dataset.SOPClassUID.name == "Secondary Capture Image Storage"
    assert list(dataset.ImageType) == ["DERIVED", "SECONDARY"]
    assert dataset.PatientID == "SYNTHETIC"
    assert "Synthetic" in dataset.ImageComments
    assert "SYNTHETIC" in dataset.StudyDescription
    assert "Miller" not in str(dataset)
    said = dict(line.split(": ", 1) for line in dataset.DerivationDescription.splitlines())
    assert (said["seed"], said["scheduler"], said["synthetic"]) == ("4", '"ddim"', "true")
    assert json.loads(said["weights_sha256"]) == hashlib.sha256(b"weights").hexdigest()
    assert said["prompt_sha256"] == hashlib.sha256(item()["prompt"].encode()).hexdigest()
    assert len(dataset.DerivationDescription) <= 1024  # DICOM's short text
    assert np.array_equal(dataset.pixel_array.astype(np.int64), to_grey(picture(), bits).astype(np.int64))
    assert dataset.StudyInstanceUID == second.StudyInstanceUID
    assert dataset.SeriesInstanceUID == second.SeriesInstanceUID
    assert dataset.SOPInstanceUID != second.SOPInstanceUID
    for uid in (dataset.StudyInstanceUID, dataset.SeriesInstanceUID):
        assert uid.is_valid


def test_monai_label_gets_the_picture_instead_of_a_file(tmp_path):
    request = item(model="cxr_ldm", image_path="", seed="4", guidance_scale=7.0)
    data = SampleForLabeld()(SaveSampled(output_dir=tmp_path)(request))
    assert not list(tmp_path.iterdir())
    assert data["pred"].dtype == np.uint8
    assert np.array_equal(data["pred"].T, to_grey(picture(), 8))
    assert data["result"]["synthetic"] is True
    assert data["result"]["seed"] == "4"
    assert "Miller" not in json.dumps(data["result"])


def test_outside_of_monai_label_the_picture_stays():
    data = item()
    assert SampleForLabeld()(data)["pred"] is data["pred"]


def test_errors_name_the_key(tmp_path):
    with pytest.raises(ValueError, match="^bits: expected 8 or 16, got 12"):
        SaveSampled(output_dir=tmp_path, bits=12)
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/absent.pt: "):
        SaveSampled(output_dir=tmp_path, weights_path=tmp_path / "absent.pt")(item())
