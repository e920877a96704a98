# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, Invertd
from PIL import Image

from shared.segmentation_items import inference_items
from shared.segmentation_picture import overlay
from shared.transforms.in_plane import ResizeInPlaned, UprightVolumed
from shared.transforms.mask_saving import SaveSegmentationd
from shared.transforms.saving import write_secondary_capture
from shared.transforms.segmentation_images import LoadPictured

SHAPE = (11, 18, 7)
# File axes S, L, P; anisotropic, slightly oblique.
AFFINE = np.array([[0.1, -1.2, 0.0, 31.5], [0.05, 0.02, -0.9, 17.25], [2.5, 0.03, 0.04, -40.125], [0, 0, 0, 1]])


def pixels(height: int = 20, width: int = 30, *, top: int = 255) -> np.ndarray:
    """Grey with a bright L in the upper left: no flip and no transpose looks the same."""
    values = np.full((height, width), top // 5)
    values[3:14, 4:9] = top
    values[10:14, 4:16] = top
    return values.astype(np.uint16 if top > 255 else np.uint8)


def write_picture(path: Path, values: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels() if values is None else values).save(
        path, **({"quality": 100} if "jp" in path.suffix else {})
    )
    return path


def write_volume(
    path: Path, values: np.ndarray, affine: np.ndarray = AFFINE, *, qform: int = 1, sform: int = 4
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, affine)
    image.set_qform(affine, code=qform)
    image.set_sform(affine, code=sform)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = "MILLER^JOHN"
    nibabel.save(image, path)
    return path


def labels() -> np.ndarray:
    """Class indices 0 to 2 in file orientation, alike in no two directions."""
    values = np.zeros(SHAPE, dtype=np.uint8)
    values[2:9, 3:8, 1:6] = 1
    values[3:6, 10:17, 2:4] = 2
    values[4, 12, 3] = 0
    return values


def scan() -> np.ndarray:
    return (labels().astype(np.int16) * 400 - 300) + np.arange(SHAPE[2], dtype=np.int16)


def picture_item(path: Path, channels: int = 1, **changes) -> dict:
    """An item as it stands after ``Invertd``: foreground where the picture is bright."""
    image = LoadPictured("image")({"image": str(path)})["image"]
    bright = (image[:1].as_tensor() > 0.6).float() * 0.75 + 0.125
    pred = torch.cat([bright, *[torch.full_like(bright, 0.9)] * (channels - 1)])
    meta = {"filename_or_obj": str(path)}
    return {"image": image, "pred": MetaTensor(pred, affine=torch.eye(4), meta=meta), **changes}


def volume_item(path: Path, num_classes: int = 3, channels: int = 0, **changes) -> dict:
    index = torch.from_numpy(labels().astype(np.int64))
    if num_classes == 1:
        pred = (index > 0).float()[None] * 0.75 + 0.125
    else:
        pred = torch.nn.functional.one_hot(index, num_classes).movedim(-1, 0) * 0.7 + 0.1
    pred = torch.cat((pred, torch.full((channels, *SHAPE), 0.9)))
    meta = {"filename_or_obj": str(path)}
    return {"pred": MetaTensor(pred, affine=nibabel.load(path).affine, meta=meta), **changes}


def levels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def sidecar(path: Path) -> dict:
    return json.loads(path.read_text())


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def run(items: list[dict], save: SaveSegmentationd, segment, size: tuple[int, int]) -> list[dict]:
    """The pipeline of inference, with ``segment`` in the place of the network."""
    preprocessing = Compose([LoadPictured("image"), UprightVolumed("image"), ResizeInPlaned("image", size, "bilinear")])
    postprocessing = Compose([Invertd("pred", transform=preprocessing, orig_keys="image", nearest_interp=False), save])
    results = []
    for batch in DataLoader(Dataset(items, preprocessing), batch_size=1):
        batch["pred"] = segment(batch["image"])
        results += [postprocessing(item) for item in decollate_batch(batch)]
    return results


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.tif", "a.bmp", "deep.png", "a.dcm", "IM.0001"])
def test_pipeline_returns_a_picture_mask_of_the_pictures_size(tmp_path, name):
    path = tmp_path / "in" / name
    path.parent.mkdir()
    if name in ("a.dcm", "IM.0001"):
        write_secondary_capture(pixels(), path, study_uid="1.2.3")
    else:
        write_picture(path, pixels(top=65535) if name == "deep.png" else None)
    size = (20, 30) if name == "a.png" else (40, 36)
    (result,) = run(
        [{"image": str(path)}],
        SaveSegmentationd(output_dir=tmp_path / "out"),
        lambda image: torch.sigmoid(40 * (image.mean(1, keepdim=True) - 0.6)),
        size,
    )
    stem = "IM.0001" if name == "IM.0001" else path.stem
    mask = levels(tmp_path / "out" / f"{stem}_mask.png")
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 255}
    expected = np.where(pixels() == 255, 255, 0)
    wrong = (mask != expected).sum()
    assert wrong == 0 if size == (20, 30) else wrong <= 10
    assert result["pred"].shape == (1, 20, 30)
    assert result["pred"].dtype == torch.uint8
    np.testing.assert_array_equal(np.asarray(result["pred"])[0] * 255, mask)
    assert names(tmp_path / "out") == [
        f"{stem}_mask.json", f"{stem}_mask.png", f"{stem}_mask_overlay.png", f"{stem}_mask_probability.png",
    ]  # fmt: skip
    shown = levels(tmp_path / "out" / f"{stem}_mask_overlay.png")
    assert shown.shape == (20, 30, 3)
    assert shown[5, 4].tolist() == [0x24, 0xFF, 0x24]
    assert shown[0, 29].tolist() == [51, 51, 51]


def test_mask_of_a_turned_photograph_stands_as_it_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rows run along the columns of the upright picture
    Image.fromarray(np.rot90(pixels()).copy()).save(tmp_path / "a.png", exif=exif)
    SaveSegmentationd(output_dir=tmp_path / "out")(picture_item(tmp_path / "a.png"))
    np.testing.assert_array_equal(levels(tmp_path / "out/a_mask.png") > 0, pixels() == 255)


def test_probability_and_agreement_are_16_bit_pictures(tmp_path):
    path = write_picture(tmp_path / "a.png")
    item = picture_item(path, channels=2)
    SaveSegmentationd(output_dir=tmp_path / "out", num_samples=4)(item)
    probability = levels(tmp_path / "out/a_mask_probability.png")
    np.testing.assert_array_equal(probability, (item["pred"][0].numpy() * 65535).round())
    assert probability.dtype == np.uint16
    assert (levels(tmp_path / "out/a_mask_agreement.png") == round(0.9 * 65535)).all()
    SaveSegmentationd(output_dir=tmp_path / "out", num_samples=4, save_probability=False, save_overlay=False)(item)
    assert names(tmp_path / "out") == ["a_mask.json", "a_mask.png"], "those of the earlier run are gone"


def test_threshold_decides_of_one_foreground(tmp_path):
    path = write_picture(tmp_path / "a.png")
    for threshold, expected in ((0.1, 600), (0.5, int((pixels() == 255).sum())), (0.9, 0)):
        SaveSegmentationd(output_dir=tmp_path / "out", threshold=threshold)(picture_item(path))
        assert int((levels(tmp_path / "out/a_mask.png") > 0).sum()) == expected
        assert sidecar(tmp_path / "out/a_mask.json")["classes"][0]["pixels"] == expected


def test_several_classes_of_a_picture_are_indices_with_an_overlay_in_colours(tmp_path):
    path = write_picture(tmp_path / "a.png")
    index = torch.from_numpy((pixels() == 255) * 2 + (np.indices((20, 30))[1] > 25)).long()
    pred = torch.nn.functional.one_hot(index, 3).movedim(-1, 0) * 0.6 + 0.1
    item = {"pred": MetaTensor(pred, meta={"filename_or_obj": str(path)})}
    class_names = {"0": "background", "1": "rim", "2": "cup"}
    result = SaveSegmentationd(output_dir=tmp_path / "out", num_classes=3, class_names=class_names)(item)
    np.testing.assert_array_equal(levels(tmp_path / "out/a_mask.png"), index)
    np.testing.assert_array_equal(np.asarray(result["pred"])[0], index)
    np.testing.assert_allclose(levels(tmp_path / "out/a_mask_probability.png"), 0.7 * 65535, atol=1)
    image = torch.from_numpy(pixels()[None] / 255)
    expected = (overlay(image, index) * 255).round().permute(1, 2, 0)
    np.testing.assert_allclose(levels(tmp_path / "out/a_mask_overlay.png"), expected, atol=1)
    said = sidecar(tmp_path / "out/a_mask.json")
    assert said["threshold"] is None
    assert said["classes"] == [
        {"index": 1, "name": "rim", "pixels": 80, "fraction": 80 / 600},
        {"index": 2, "name": "cup", "pixels": 83, "fraction": 83 / 600},
    ]


def test_pipeline_returns_a_volume_on_the_grid_of_its_input(tmp_path):
    """Upright the volume is (7, 18, 11); of the working size that, nothing is interpolated."""
    path = write_volume(tmp_path / "in/p.nii.gz", scan())

    def segment(image: torch.Tensor) -> torch.Tensor:
        index = ((image + 1e-3) * 2.5).long().clamp(0, 2).squeeze(1)
        return MetaTensor(torch.nn.functional.one_hot(index, 3).movedim(-1, 1).float(), meta=image.meta)

    save = SaveSegmentationd(output_dir=tmp_path / "out", num_classes=3, class_names=["none", "liver", "spleen"])
    (result,) = run([{"image": str(path), "window": [-300, 500]}], save, segment, (7, 18))
    saved = nibabel.load(tmp_path / "out/p_mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(saved.dataobj), labels())
    np.testing.assert_array_equal(np.asarray(result["pred"]), labels()[None])
    assert saved.get_data_dtype() == np.uint8
    assert np.array_equal(saved.affine, nibabel.load(path).affine)
    probability = nibabel.load(tmp_path / "out/p_mask_probability.nii.gz")
    assert probability.get_data_dtype() == np.float32
    assert (probability.get_fdata() == 1).all()
    millilitres = abs(np.linalg.det(AFFINE[:3, :3])) / 1000
    first, second = sidecar(tmp_path / "out/p_mask.json")["classes"]
    counts = [int((labels() == index).sum()) for index in (1, 2)]
    assert (first["name"], first["voxels"], second["voxels"]) == ("liver", *counts)
    assert [first["ml"], second["ml"]] == pytest.approx([count * millilitres for count in counts], rel=1e-5)
    assert names(tmp_path / "out") == [
        "p_mask.json", "p_mask.nii.gz", "p_mask_overlay.png", "p_mask_probability.nii.gz",
    ]  # fmt: skip


@pytest.mark.parametrize(("qform", "sform"), [(1, 4), (1, 0), (0, 2)])
def test_geometry_is_the_inputs_bit_for_bit(tmp_path, qform, sform):
    path = write_volume(tmp_path / "a.nii", scan(), qform=qform, sform=sform)
    SaveSegmentationd(output_dir=tmp_path / "out", num_samples=2, save_overlay=False)(volume_item(path, 1, 1))
    source = nibabel.load(path)
    for name in ("a_mask", "a_mask_probability", "a_mask_agreement"):
        saved = nibabel.load(tmp_path / f"out/{name}.nii.gz")
        for field in ("pixdim", "srow_x", "quatern_b", "qoffset_z", "qform_code", "sform_code", "xyzt_units"):
            assert np.array_equal(saved.header[field], source.header[field]), field
        assert b"MILLER" not in saved.to_bytes()
    np.testing.assert_array_equal(np.asarray(nibabel.load(tmp_path / "out/a_mask.nii.gz").dataobj), labels() > 0)


def test_mosaic_of_a_volume_stands_upright_with_square_pixels(tmp_path):
    """Class 2 at the left, anterior, in slice 4 of 11 (2.5 mm each) from below."""
    path = write_volume(
        tmp_path / "a.nii", scan(), np.array([[0, -1.0, 0, 0], [0, 0, -2, 0], [3, 0, 0, 0], [0, 0, 0, 1]])
    )
    only = torch.zeros(1, *SHAPE)
    only[0, 4, 14:17, 0:2] = 1  # file axes: inferior to superior, right to left, anterior to posterior
    item = {"pred": MetaTensor(only, affine=nibabel.load(path).affine, meta={"filename_or_obj": str(path)})}
    SaveSegmentationd(output_dir=tmp_path / "out")(item)
    shown = levels(tmp_path / "out/a_mask_overlay.png")
    assert shown.shape == (14, 18, 3), "one slice, rows of 2 mm enlarged"
    green = (shown == [0x24, 0xFF, 0x24]).all(axis=-1)
    rows, columns = np.nonzero(green)
    assert (rows.max(), columns.min(), columns.max()) == (3, 14, 16)


def test_two_and_three_slices_are_a_volume(tmp_path):
    for depth in (1, 2, 3):
        path = write_volume(tmp_path / f"v{depth}.nii", scan()[..., 2 : 2 + depth])
        pred = MetaTensor(torch.rand(1, *SHAPE[:2], depth), affine=AFFINE, meta={"filename_or_obj": str(path)})
        SaveSegmentationd(output_dir=tmp_path / "out")({"pred": pred})
        assert nibabel.load(tmp_path / f"out/v{depth}_mask.nii.gz").shape == (11, 18, depth)


@pytest.mark.parametrize("directions", [(1, 1), (-1, 1), (1, -1)])
def test_nifti_picture_gets_its_mask_on_its_own_grid(tmp_path, directions):
    values = np.ascontiguousarray(pixels().T).astype(np.int16)
    path = write_volume(tmp_path / "a.nii.gz", values, np.diag([*directions, 1.0, 1.0]))
    run(
        [{"image": str(path)}],
        SaveSegmentationd(output_dir=tmp_path / "out"),
        lambda image: torch.sigmoid(40 * (image.mean(1, keepdim=True) - 0.6)),
        (20, 30),
    )
    saved = nibabel.load(tmp_path / "out/a_mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(saved.dataobj), values == 255)
    assert np.array_equal(saved.affine, nibabel.load(path).affine)
    assert "pixels" in sidecar(tmp_path / "out/a_mask.json")["classes"][0]


def test_sidecar_says_what_made_the_mask_and_the_picture_says_it_too(tmp_path):
    path = write_picture(tmp_path / "polyp-7.jpg")
    (tmp_path / "model.pt").write_bytes(b"abc")
    save = SaveSegmentationd(
        output_dir=tmp_path / "out",
        weights_path=tmp_path / "model.pt",
        class_names=["background", "polyp"],
        num_samples=2,
        seed=7,
        num_inference_steps=1,
    )
    save(picture_item(path, channels=2))
    said = sidecar(tmp_path / "out/polyp-7_mask.json")
    assert said["synthetic"] is True
    assert said["intended_use"] == "research only, not for diagnosis"
    assert said["weights_sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (said["seed"], said["num_inference_steps"], said["num_samples"]) == (7, 1, 2)
    assert (said["threshold"], said["num_classes"], said["source"]) == (0.5, 1, "polyp-7.jpg")
    assert len(said["source_sha256"]) == 64
    count = int((pixels() == 255).sum())
    assert said["classes"] == [{"index": 1, "name": "polyp", "pixels": count, "fraction": count / 600}]
    assert said["files"] == {
        "mask": "polyp-7_mask.png", "probability": "polyp-7_mask_probability.png",
        "agreement": "polyp-7_mask_agreement.png", "overlay": "polyp-7_mask_overlay.png",
    }  # fmt: skip
    for name in said["files"].values():
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.text["Comment"].startswith("Mask drawn by a segmentation model")
            assert picture.text["synthetic"] == "true"
            assert "polyp-7" not in json.dumps(picture.text)


def test_names_overwrite_only_what_the_same_input_wrote(tmp_path):
    first = write_picture(tmp_path / "in/x/a.png")
    second = write_picture(tmp_path / "in/y/a.png", pixels()[::-1].copy())
    write_picture(tmp_path / "in/a_mask.png")
    for _ in range(2):
        save = SaveSegmentationd(output_dir=tmp_path / "flat", save_probability=False, save_overlay=False)
        for path in (first, second):
            save(picture_item(path))
        assert names(tmp_path / "flat") == ["a_mask.json", "a_mask.png", "a_mask_1.json", "a_mask_1.png"]
    np.testing.assert_array_equal(levels(tmp_path / "flat/a_mask_1.png"), levels(tmp_path / "flat/a_mask.png")[::-1])

    save = SaveSegmentationd(output_dir=tmp_path / "tree", source=tmp_path / "in", save_overlay=False)
    save(picture_item(first))
    save(picture_item(second))
    assert [name for name in names(tmp_path / "tree") if name.endswith("mask.png")] == ["x/a_mask.png", "y/a_mask.png"]

    true = shutil.copy(first, tmp_path / "in/a.png")
    before = (tmp_path / "in/a_mask.png").read_bytes()
    with pytest.raises(ValueError, match=f"^{tmp_path}/in/a_mask.png: expected no file or a synthetic one"):
        SaveSegmentationd(output_dir=tmp_path / "in")(picture_item(Path(true)))
    assert (tmp_path / "in/a_mask.png").read_bytes() == before
    assert not (tmp_path / "in/a_mask.json").exists()


@pytest.mark.parametrize("kind", ["png", "nii"])
def test_a_run_whose_results_lie_among_its_inputs_can_be_repeated(tmp_path, kind):
    path = write_picture(tmp_path / "x/a.png") if kind == "png" else write_volume(tmp_path / "x/a.nii", scan())
    for _ in range(2):
        (item,) = inference_items(tmp_path)
        assert item["image"] == str(path)
        made = picture_item(path) if kind == "png" else volume_item(path, 1)
        SaveSegmentationd(output_dir=tmp_path, source=tmp_path)({**item, **made})
        assert len(names(tmp_path / "x")) == 5


def test_a_picture_of_the_user_beside_the_mask_is_kept(tmp_path):
    path = write_picture(tmp_path / "a.png")
    save = SaveSegmentationd(output_dir=tmp_path / "out", save_overlay=False)
    save(picture_item(path))
    mine = write_picture(tmp_path / "out/a_mask_overlay.png")
    save(picture_item(path))
    with pytest.raises(ValueError, match=f"^{mine}: expected no file or a synthetic one"):
        SaveSegmentationd(output_dir=tmp_path / "out")(picture_item(path))


def test_monai_label_gets_a_mask_of_indices_that_its_writer_turns(tmp_path):
    path = write_picture(tmp_path / "a.jpg")
    item = picture_item(path, 2, model="sdseg", image_path=str(path))
    save = SaveSegmentationd(output_dir=tmp_path / "out", num_samples="2", class_names=["none", "polyp"], seed=[3, 4])
    answer = save(item)
    assert answer["pred"].shape == (30, 20)
    assert answer["pred"].dtype == np.uint8
    # The writer hands the transpose to ITK, whose pictures are rows first.
    np.testing.assert_array_equal(answer["pred"].T, pixels() == 255)
    assert answer["result_extension"] == ".png"
    # Its last transform compares the size with metadata of the image, where there are any.
    assert not isinstance(answer["image"], MetaTensor)
    assert json.loads(json.dumps(answer["result"]))["classes"][0]["name"] == "polyp"
    assert (answer["result"]["synthetic"], answer["result"]["seed"]) == (True, 3)
    assert not (tmp_path / "out").exists()
    assert isinstance(item["image"], MetaTensor), "the caller's item stays as it was"


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        ("a.png", None, None), ("a.png", ".nrrd", ".nrrd"), ("a.jpg", ".nrrd", ".nrrd"), ("a.png", ".jpg", ".png"),
        ("a.dcm", None, ".png"), ("a.tif", "", ""),
    ],
)  # fmt: skip
def test_monai_label_never_gets_a_lossy_mask(tmp_path, name, asked, expected):
    path = tmp_path / name
    if name.endswith("dcm"):
        write_secondary_capture(pixels(), path, study_uid="1.2.3")
    else:
        write_picture(path)
    changes = {} if asked is None else {"result_extension": asked}
    item = picture_item(path, model="sdseg", image_path=str(path), **changes)
    assert SaveSegmentationd(output_dir=tmp_path / "out")(item).get("result_extension") == expected


def test_monai_label_gets_volumes_in_file_orientation_with_their_affine(tmp_path):
    path = write_volume(tmp_path / "a.nii.gz", scan())
    item = volume_item(path, model="sdseg", image_path=str(path))
    answer = SaveSegmentationd(output_dir=tmp_path / "out", num_classes=3)(item)
    np.testing.assert_array_equal(np.asarray(answer["pred"]), labels())
    assert answer["pred"].dtype == torch.uint8
    np.testing.assert_allclose(answer["pred"].affine, nibabel.load(path).affine)
    assert [entry["name"] for entry in answer["result"]["classes"]] == ["class 1", "class 2"]
    assert answer["result"]["classes"][0]["ml"] > 0
    assert "result_extension" not in answer

    flat = write_volume(
        tmp_path / "f.nii", np.ascontiguousarray(pixels().T).astype(np.int16), np.diag([-1, -1, 1.0, 1])
    )
    item = picture_item(flat, model="sdseg", image_path=str(flat))
    answer = SaveSegmentationd(output_dir=tmp_path / "out")(item)
    np.testing.assert_array_equal(answer["pred"], pixels().T == 255)


def test_errors_start_with_what_to_correct(tmp_path):
    path, volume = write_picture(tmp_path / "a.png"), write_volume(tmp_path / "v.nii", scan())
    save = SaveSegmentationd(output_dir=tmp_path / "out")
    item = picture_item(path)
    with pytest.raises(ValueError, match=r"^pred: expected the size \(20, 30\) as .*a.png has it, got \(30, 20\)"):
        save({**item, "pred": item["pred"].transpose(1, 2)})
    with pytest.raises(ValueError, match=r"^pred: expected 1 channels .*, got 2"):
        save({**item, "pred": item["pred"].repeat(2, 1, 1)})
    broken = item["pred"].clone()
    broken[0, 3, 4] = torch.nan
    with pytest.raises(ValueError, match=f"^pred: expected finite values for {path}, got NaN"):
        save({**item, "pred": broken})
    with pytest.raises(ValueError, match="^pred: expected metadata with the input file"):
        save({"pred": item["pred"].as_tensor()})
    with pytest.raises(ValueError, match=r"^pred: expected the size \(11, 18, 7\) as .*v.nii has it"):
        save({"pred": volume_item(volume, 1)["pred"][..., :6]})
    moved = volume_item(volume, 1)["pred"]
    moved.affine = moved.affine + torch.tensor([[0, 0, 0, 1.0]] + [[0.0] * 4] * 3)
    with pytest.raises(ValueError, match="^pred: expected the affine of .*v.nii, got one .* up to 1 mm apart"):
        save({"pred": moved})
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/absent.pt: "):
        SaveSegmentationd(output_dir=tmp_path / "out", weights_path=tmp_path / "absent.pt")(item)
    for given in (["polyp"], "polyp", {"1": "polyp", "2": "x"}, {"one": "polyp"}, {0: "background"}):
        with pytest.raises(ValueError, match="^class_names: expected a name for each of 2 classes"):
            SaveSegmentationd(output_dir=tmp_path, class_names=given)
    assert not (tmp_path / "out").exists()
