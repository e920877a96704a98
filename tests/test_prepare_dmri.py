# SPDX-License-Identifier: Apache-2.0
"""`tools.prepare dmri_pairs`: small subject folders -> dataset folders; each fault is named with its file."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys

import nibabel
import numpy as np
import pytest

from shared.data_check import check_dataset
from shared.datalist import load_datalist, read_datalist, read_description
from shared.gradients import read_gradients
from shared.resolution import block_average, halved_affine, kspace_downsample
from tools.command_line import run
from tools.prepare.__main__ import COMMANDS
from tools.prepare.dmri_conversion import Recipe, prepare_subject
from tools.prepare.dmri_pairs import dmri_pairs
from tools.prepare.dmri_subjects import UnfitSubjectError, find_subject, subject_names

SHAPE = (18, 22, 14)
AFFINE = np.array([[-1.25, 0, 0, 90], [0, 1.2, 0.3, -126], [0, -0.3, 1.2, -72], [0, 0, 0, 1.0]])  # oblique LAS
AMICO = {"ndi": "FIT_ICVF", "odi": "FIT_OD", "fwf": "FIT_ISOVF"}
ALL_TRAINING = {"fractions": (1, 0, 0)}
KSPACE = Recipe()


def save(path, values, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, affine)
    image.header["descrip"] = "Doe^Jane"
    image.to_filename(path)
    return path


def table(counts=((0, 3), (1000, 20), (2000, 24)), seed=0):
    """b-values (N,) and unit directions (N, 3) in mixed order."""
    rng = np.random.default_rng(seed)
    bvals = np.repeat([b for b, _ in counts], [n for _, n in counts]).astype(float)
    vectors = rng.normal(size=(len(bvals), 3))
    order = rng.permutation(len(bvals))
    return bvals[order], vectors[order] / np.linalg.norm(vectors[order], axis=1, keepdims=True)


def brain(shape=SHAPE):
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    return (grid**2).sum(0) < 0.8, grid


def fibres(shape, seed=0):
    """(X, Y, Z, 3) unit vectors along the voxel axes: those of the nearest of 60 straight rods."""
    rng = np.random.default_rng(seed)
    rods = rng.normal(size=(60, 3))
    rods /= np.linalg.norm(rods, axis=1, keepdims=True)
    place = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)[..., None, :] - rng.random((60, 3)) * shape
    along = (place * rods).sum(-1)
    return rods[((place**2).sum(-1) - along**2).argmin(-1)]


def series(bvals, bvecs, shape=SHAPE, seed=0):
    """Signal of fibres in an ellipsoid: (X, Y, Z, N) float32."""
    inside, _ = brain(shape)
    fibre = fibres(shape, seed)
    signal = 1000 * np.exp(-bvals * 1e-3 * (0.3 + 1.4 * (fibre @ bvecs.T) ** 2))
    noise = np.random.default_rng(seed).normal(scale=5, size=signal.shape)
    return np.where(inside[..., None], np.abs(signal + noise), 0).astype(np.float32)


def maps(shape=SHAPE, seed=0):
    inside, grid = brain(shape)
    fields = {"ndi": 0.5 + 0.2 * grid[0], "odi": 0.3 + 0.1 * grid[1], "fwf": 0.2 * (grid[2] + 1)}
    return {key: np.where(inside, field + 0.01 * seed, 0).astype(np.float32) for key, field in fields.items()}


def write_table(folder, bvals, bvecs, names=("dwi.bval", "dwi.bvec")):
    np.savetxt(folder / names[0], bvals[None], fmt="%g")
    np.savetxt(folder / names[1], bvecs.T, fmt="%.6f")


def subject(folder, *, seed=0, shape=SHAPE, counts=((0, 3), (1000, 20), (2000, 24))):
    """A folder as AMICO leaves it; returns its series."""
    bvals, bvecs = table(counts, seed)
    values = series(bvals, bvecs, shape, seed)
    save(folder / "dwi.nii.gz", values)
    write_table(folder, bvals, bvecs)
    save(folder / "brain_mask.nii.gz", brain(shape)[0].astype(np.uint8))
    for key, field in maps(shape, seed).items():
        save(folder / "AMICO" / "NODDI" / f"{AMICO[key]}.nii.gz", field)
    return values


def hcp_subject(folder, seed=0):
    bvals, bvecs = table(seed=seed)
    base = folder / "T1w" / "Diffusion"
    save(base / "data.nii.gz", series(bvals, bvecs, seed=seed))
    write_table(base, np.where(bvals == 0, 5, bvals), bvecs, ("bvals", "bvecs"))
    save(base / "nodif_brain_mask.nii.gz", brain()[0].astype(np.float32))
    for key, name in (("ndi", "fit_NDI"), ("odi", "fit_ODI"), ("fwf", "fit_FWF")):
        save(base / "AMICO" / "NODDI" / f"{name}.nii.gz", maps(seed=seed)[key])


def record(folder):
    return json.loads((folder / "preparation.json").read_text())


def problems(folder):
    """What the data check finds, but for the sections that one subject cannot fill."""
    return [line for line in check_dataset(folder).problems if "the list is empty" not in line]


def items_of(folder):
    return [item for part in read_datalist(folder).values() for item in part]


def load(path):
    image = nibabel.load(path)
    return np.asarray(image.dataobj, np.float32), image


def edit(path, change, affine=None):
    values, image = load(path)
    changed = change(values.copy())
    save(path, values if changed is None else changed, image.affine if affine is None else affine)


def prepare(tmp_path, name="s1", recipe=KSPACE, layout="auto", **patterns):
    """One subject of tmp_path/in, prepared in tmp_path/out."""
    return prepare_subject(find_subject(tmp_path / "in", name, layout=layout, patterns=patterns), recipe,
                           tmp_path / "out")  # fmt: skip


def test_folders_become_a_dataset_folder(tmp_path, capsys):
    for number in range(4):
        subject(tmp_path / "in" / f"s{number}", seed=number)
    (tmp_path / "in" / "code").mkdir()
    out = tmp_path / "set"
    dmri_pairs(str(tmp_path / "in"), str(out), fractions="0.5,0.25,0.25", workers=2)
    assert check_dataset(out).problems == []
    sections = read_datalist(out)
    assert [len(sections[name]) for name in ("training", "validation", "test")] == [2, 1, 1]
    printed = capsys.readouterr().out
    assert "dmri_pairs: 4 subjects, 2 training, 1 validation, 1 test" in printed
    assert "dropped, dwi missing: 1" in printed
    assert read_description(out)["method"] == "kspace"
    assert {"monai", "nibabel", "scipy", "dipy"} <= set(read_description(out)["software"])
    item = load_datalist(out, "test", required=("dwi", "bval", "bvec", "mask", "ndi", "odi", "fwf"))[0]
    assert item["shells"] == [1000, 2000]
    assert item["directions"] == [20, 24]
    source = tmp_path / "in" / item["subject"]
    values, image = load(item["dwi"])
    assert values.shape == (9, 11, 7, 47)
    np.testing.assert_allclose(image.affine, halved_affine(AFFINE), atol=1e-5)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (2, 2)
    assert b"Doe" not in image.header.binaryblock
    expected = np.abs(kspace_downsample(np.moveaxis(load(source / "dwi.nii.gz")[0], -1, 0)))
    assert np.abs(np.moveaxis(values, -1, 0) - expected).max() <= 0.5 * expected.max() / 65535 + 1e-3
    table_out, table_in = (read_gradients(f / "dwi.bval", f / "dwi.bvec", num_volumes=47)
                           for f in (out / "images" / item["subject"], source))  # fmt: skip
    np.testing.assert_allclose(table_out.bvals, table_in.bvals)
    np.testing.assert_allclose(table_out.bvecs, table_in.bvecs, atol=1e-7)
    for key, name in AMICO.items():
        values, image = load(item[key])
        np.testing.assert_array_equal(values, load(source / "AMICO" / "NODDI" / f"{name}.nii.gz")[0])
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)


def test_loaders_read_what_was_prepared(tmp_path):
    from shared.diffusion_features import RotationInvariantFeatures
    from shared.transforms.diffusion_mri import load_brain, load_features, load_maps

    subject(tmp_path / "in" / "s1")
    dmri_pairs(str(tmp_path / "in"), str(tmp_path / "set"), **ALL_TRAINING)
    item = load_datalist(tmp_path / "set")[0]
    features = RotationInvariantFeatures(shells=(1000, 2000), orders=(2,))
    image, target, inside = load_features(item, features), load_maps(item), load_brain(item)
    assert image.shape == (features.num_channels, 9, 11, 7)
    assert target.shape == (3, *SHAPE)
    assert inside.shape == (1, *SHAPE)
    # LAS in the file, RAS in memory: the first axis is turned, and with it the map
    np.testing.assert_allclose(target[0].numpy(), maps()["ndi"][::-1], atol=1e-6)


def test_hcp_layout_and_block_averaging(tmp_path):
    hcp_subject(tmp_path / "in" / "100307")
    dmri_pairs(str(tmp_path / "in"), str(tmp_path / "set"), layout="hcp", method="block", **ALL_TRAINING)
    assert problems(tmp_path / "set") == []
    item = load_datalist(tmp_path / "set")[0]
    assert item["subject"] == "100307"
    source = np.moveaxis(load(tmp_path / "in/100307/T1w/Diffusion/data.nii.gz")[0], -1, 0)
    values = np.moveaxis(load(item["dwi"])[0], -1, 0)
    np.testing.assert_allclose(values, block_average(source), atol=source.max() / 65535)
    assert read_description(tmp_path / "set")["method"] == "block"


def test_toolbox_names_and_patterns(tmp_path):
    folder = tmp_path / "in" / "s1"
    subject(folder)
    for key, name in (("ndi", "s1_ficvf"), ("odi", "s1_odi"), ("fwf", "s1_fiso")):
        (folder / "NODDI").mkdir(exist_ok=True)
        shutil.move(folder / "AMICO/NODDI" / f"{AMICO[key]}.nii.gz", folder / "NODDI" / f"{name}.nii.gz")
    files = find_subject(tmp_path / "in", "s1", layout="auto", patterns={}).files
    assert [files[key].name for key in ("ndi", "odi", "fwf")] == [f"s1_{n}.nii.gz" for n in ("ficvf", "odi", "fiso")]
    save(folder / "dwi" / "s1_ndi.nii.gz", maps()["ndi"])
    with pytest.raises(UnfitSubjectError, match=r"expected one file for 'ndi' of s1, but got 2: .*choose with --ndi"):
        find_subject(tmp_path / "in", "s1", layout="auto", patterns={})
    chosen = find_subject(tmp_path / "in", "s1", layout="auto", patterns={"ndi": "{subject}/dwi/*_ndi.nii.gz"})
    assert chosen.files["ndi"] == folder / "dwi" / "s1_ndi.nii.gz"


def test_odd_sizes_lose_their_last_voxel(tmp_path):
    values = subject(tmp_path / "in" / "s1", shape=(19, 22, 15))
    prepared = prepare(tmp_path, recipe=Recipe("block"))
    low, image = load(tmp_path / "out" / prepared.item["dwi"])
    assert low.shape == (9, 11, 7, 47)
    np.testing.assert_allclose(image.affine, halved_affine(AFFINE), atol=1e-5)
    np.testing.assert_allclose(low[..., 0], block_average(values[:18, :, :14, 0]), atol=values.max() / 65535)
    ndi, image = load(tmp_path / "out" / prepared.item["ndi"])
    np.testing.assert_array_equal(ndi, maps((19, 22, 15))["ndi"][:18, :, :14])
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
    assert load(tmp_path / "out" / prepared.item["mask"])[0].shape == (18, 22, 14)


def measured(tmp_path, mask_on_low=False):
    """A subject with maps at full and diffusion data at half the resolution."""
    folder = tmp_path / "in" / "s1"
    values = subject(folder)
    low = block_average(np.moveaxis(values, -1, 0))
    (folder / "dwi.nii.gz").unlink()
    save(folder / "low" / "dwi.nii.gz", np.moveaxis(low, 0, -1), halved_affine(AFFINE))
    if mask_on_low:
        coarse = block_average(brain()[0].astype(np.float32)) > 0.5
        save(folder / "brain_mask.nii.gz", coarse.astype(np.uint8), halved_affine(AFFINE))
    return {"low_resolution_dwi": "{subject}/low/dwi.nii.gz"}


@pytest.mark.parametrize("mask_on_low", [False, True])
def test_measured_low_resolution_is_taken_as_it_is(tmp_path, mask_on_low):
    pattern = measured(tmp_path, mask_on_low)
    dmri_pairs(str(tmp_path / "in"), str(tmp_path / "set"), **pattern, **ALL_TRAINING)
    assert problems(tmp_path / "set") == []
    item = load_datalist(tmp_path / "set")[0]
    given = load(tmp_path / "in/s1/low/dwi.nii.gz")[0]
    np.testing.assert_allclose(load(item["dwi"])[0], given, atol=given.max() / 65535)
    assert load(item["mask"])[0].shape == SHAPE
    assert read_description(tmp_path / "set")["method"] == "measured"


def test_measured_low_resolution_must_be_half(tmp_path):
    pattern = measured(tmp_path)
    path = tmp_path / "in/s1/low/dwi.nii.gz"
    values, _ = load(path)
    save(path, values, halved_affine(AFFINE) @ np.array([[1, 0, 0, 0.25], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    with pytest.raises(UnfitSubjectError, match=r"low/dwi.nii.gz: expected the origin .* of half the resolution of"):
        prepare(tmp_path, recipe=Recipe(low_resolution=True), **pattern)
    save(path, values[:-1], halved_affine(AFFINE))
    with pytest.raises(UnfitSubjectError, match=r"the grid of half the resolution .*\(9, 11, 7\), but got \(8"):
        prepare(tmp_path, recipe=Recipe(low_resolution=True), **pattern)


def lose(name):
    return lambda folder: (folder / name).unlink()


def rewrite(name, change, affine=None):
    return lambda folder: edit(folder / name, change, affine)


def at_brain(value, share=1):
    def change(values):
        inside = np.flatnonzero(brain()[0])
        values.reshape(-1)[inside[:: round(1 / share)]] = value
        return values

    return change


def retable(change):
    def apply(folder):
        bvals, bvecs = np.loadtxt(folder / "dwi.bval"), np.loadtxt(folder / "dwi.bvec").T
        write_table(folder, *change(bvals, bvecs))

    return apply


def flip_bit(name):
    """Of a file that is packed without compression: only its checksum tells."""

    def apply(folder):
        content = bytearray(gzip.compress(gzip.decompress((folder / name).read_bytes()), 0))
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return apply


NDI, ODI, FWF = (f"AMICO/NODDI/{name}.nii.gz" for name in AMICO.values())
SHIFTED = AFFINE + np.array([[0, 0, 0, 2.0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
FAULTS = {
    "no series": (lose("dwi.nii.gz"), "dwi missing", r"s1: expected the diffusion volumes .* found none in .*s1/dwi; "),
    "no b-values": (lose("dwi.bval"), "bval missing", r"expected b-values .* of s1, but found none in .*--bval"),
    "no directions": (lose("dwi.bvec"), "bvec missing", r"expected gradient directions .* of s1, but found none"),
    "no mask": (lose("brain_mask.nii.gz"), "mask missing", r"expected a brain mask .* of s1, but found none in"),
    "no map": (lose(ODI), "odi missing", r"expected the orientation dispersion .* found none in .*AMICO/NODDI.*--odi"),
    "3-D": (rewrite("dwi.nii.gz", lambda v: v[..., 0]), "not 4-D", r"dwi.nii.gz: expected a series .*\(18, 22, 14\)"),
    "one b-value less": (retable(lambda b, g: (b[1:], g)), "gradient table", r"bval: expected one b-value for each"),
    "table of another series": (retable(lambda b, g: (b[1:], g[1:])), "gradient table",
                                r"bval: expected one b-value for each of the 47 volumes .*, but got 46"),
    "vectors": (retable(lambda b, g: (b, 0.7 * g)), "gradient table", r"bvec: expected unit vectors, but 44 of 44"),
    "no b0": (retable(lambda b, g: (np.maximum(b, 1000), g)), "gradient table", "expected at least one b0 volume"),
    "map grid": (rewrite(NDI, lambda v: v[:-2]), "grids differ", r"FIT_ICVF.*expected the grid .*\(18, 22, 14\), but"),
    "map origin": (rewrite(FWF, lambda v: v, SHIFTED), "grids differ", "FIT_ISOVF.*: expected the origin"),
    "map range": (rewrite(NDI, at_brain(1.2, 0.1)), "map out of range",
                  r"FIT_ICVF.nii.gz: expected fractions in \[0, 1\] .*voxels \(10\.\d+%\) are outside"),
    "map NaN": (rewrite(ODI, at_brain(np.nan, 0.25)), "map out of range", r"FIT_OD.*finite fractions .*\(25\.\d+%\)"),
    "map constant": (rewrite(ODI, lambda v: 0 * v), "map out of range", r"expected a map, but all .* are 0; fit"),
    "map 4-D": (rewrite(ODI, lambda v: np.stack([v, v], -1)), "map", r"expected a 3-D map, but .*\(18, 22, 14, 2\)"),
    "mask grid": (rewrite("brain_mask.nii.gz", lambda v: v[::2, ::2, ::2]), "grids differ",
                  r"brain_mask.nii.gz: expected the grid of .*dwi.nii.gz \(18, 22, 14\), but got \(9, 11, 7\)"),
    "mask 4-D": (rewrite("brain_mask.nii.gz", lambda v: np.stack([v, v], -1)), "mask", "expected a 3-D mask"),
    "empty mask": (rewrite("brain_mask.nii.gz", lambda v: 0 * v), "mask", "brain_mask.nii.gz: .* but it is empty"),
    "NaN": (rewrite("dwi.nii.gz", at_brain(np.nan, 0.1)), "signal", r"finite signal, but volume 0 .* NaN or infinite"),
    "lost volume": (rewrite("dwi.nii.gz", lambda v: v * (np.arange(47) != 5)), "signal", "but volume 5 .* is zero"),
    "truncated": (lambda f: (f / "dwi.nii.gz").write_bytes((f / "dwi.nii.gz").read_bytes()[:200_000]), "unreadable",
                  r"dwi.nii.gz: expected 47 whole volumes, but volume \d+ gives \(EOFError"),
    "flipped bit": (flip_bit("dwi.nii.gz"), "unreadable", r"dwi.nii.gz: expected a whole NIfTI file.*CRC"),
    "flipped bit of a map": (flip_bit(NDI), "unreadable", r"FIT_ICVF.nii.gz: expected a whole NIfTI file.*CRC"),
    "no NIfTI": (lambda f: (f / "dwi.nii.gz").write_bytes(b"text"), "unreadable", "dwi.nii.gz: expected a NIfTI file"),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "reason", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named(tmp_path, fault, reason, message):
    subject(tmp_path / "in" / "s1")
    fault(tmp_path / "in" / "s1")
    with pytest.raises(UnfitSubjectError, match=message) as error:
        prepare(tmp_path)
    assert error.value.reason == reason
    assert str(error.value).startswith(str(tmp_path / "in" / "s1"))
    assert not (tmp_path / "out" / "images").exists()


def test_too_small_volumes_are_named(tmp_path):
    subject(tmp_path / "in" / "s1")
    for path in (tmp_path / "in" / "s1").rglob("*.nii.gz"):
        edit(path, lambda values: values[:, :, :1])
    with pytest.raises(UnfitSubjectError, match="expected at least 2 voxels per axis, but got 18 x 22 x 1; nothing"):
        prepare(tmp_path)


def test_rounding_and_nan_outside_are_repaired(tmp_path):
    folder = tmp_path / "in" / "s1"
    subject(folder)
    inside = brain()[0]
    edit(folder / NDI, lambda v: np.where(inside, np.where(v > 0.5, 1.0005, v), np.nan))
    edit(folder / ODI, lambda v: np.where(inside, v, 7))
    prepared = prepare(tmp_path)
    ndi, odi = (load(tmp_path / "out" / prepared.item[key])[0] for key in ("ndi", "odi"))
    assert ndi.max() == 1
    assert not ndi[~inside].any()
    assert not odi[~inside].any()


def flip_x(bvals, bvecs):
    return bvals, bvecs * np.array([-1, 1, 1])


def test_flipped_axes_are_refused_corrected_or_kept(tmp_path):
    folder = tmp_path / "in" / "s1"
    subject(folder, shape=(42, 46, 38))
    right = np.loadtxt(folder / "dwi.bvec")
    retable(flip_x)(folder)
    with pytest.raises(UnfitSubjectError, match=r"bvec: expected directions along .*; export .* --fix_axes") as error:
        prepare(tmp_path)
    assert error.value.reason == "axes look wrong"
    prepared = prepare(tmp_path, recipe=Recipe(fix_axes=True))
    assert [reason for reason, _ in prepared.warnings] == ["axes corrected"]
    bvals = np.loadtxt(folder / "dwi.bval")
    cosine = (np.loadtxt(tmp_path / "out" / prepared.item["bvec"]) * right).sum(0)[bvals > 0]
    np.testing.assert_allclose(np.abs(cosine), 1, atol=1e-5)  # up to the sign of all, which means nothing
    prepared = prepare(tmp_path, recipe=Recipe(allow_flipped=True))
    assert [reason for reason, _ in prepared.warnings] == ["axes look wrong"]


def test_weak_volumes_beside_a_bright_voxel_are_stored_as_float(tmp_path):
    folder = tmp_path / "in" / "s1"
    subject(folder)

    def spike(values):
        values[:2, :2, :2, :] = 1e6
        return values

    edit(folder / "dwi.nii.gz", spike)
    prepared = prepare(tmp_path, recipe=Recipe("block"))
    assert "stored as float32" in [reason for reason, _ in prepared.warnings]
    assert nibabel.load(tmp_path / "out" / prepared.item["dwi"]).get_data_dtype() == np.float32


def test_finished_subjects_are_kept_and_changed_ones_made_anew(tmp_path, monkeypatch):
    folder = tmp_path / "in" / "s1"
    subject(folder)
    first = prepare(tmp_path)
    path = tmp_path / "out" / first.item["dwi"]
    before = path.stat().st_mtime_ns
    assert prepare(tmp_path) == first
    assert path.stat().st_mtime_ns == before
    (tmp_path / "out" / first.item["fwf"]).unlink()
    assert prepare(tmp_path) == first  # the same bytes again
    assert path.stat().st_mtime_ns > before
    before = path.stat().st_mtime_ns
    assert prepare(tmp_path, recipe=Recipe("block")).digest != first.digest
    os.utime(folder / "dwi.bval", (1, 1))
    changed = path.stat().st_mtime_ns
    assert changed > before
    prepare(tmp_path, recipe=Recipe("block"))
    assert path.stat().st_mtime_ns > changed


def test_differing_tables_and_copies_are_reported(tmp_path):
    for number in range(2):
        subject(tmp_path / "in" / f"s{number}", seed=number)
    subject(tmp_path / "in" / "s2", seed=2, counts=((0, 2), (700, 16), (2000, 24)))
    shutil.copytree(tmp_path / "in" / "s1", tmp_path / "in" / "s1_copy")
    dmri_pairs(str(tmp_path / "in"), str(tmp_path / "set"), **ALL_TRAINING)
    found = record(tmp_path / "set")
    (line,) = found["warnings"]["another gradient table than most subjects"]
    assert "s2/dwi.bval: 16 at b=700, 24 at b=2000, most have 20 at b=1000, 24 at b=2000" in line
    (line,) = found["dropped"]["same data as another subject"]
    assert "s1 has the same; s1_copy is left out" in line
    assert [item["subject"] for item in items_of(tmp_path / "set")] == ["s0", "s1", "s2"]


def test_a_given_split_is_honoured(tmp_path):
    for number in range(4):
        subject(tmp_path / "in" / f"s{number}", seed=number)
    table_file = tmp_path / "split.csv"
    table_file.write_text("subject,section\ns0,test\ns1,training\ns2,test\n")
    dmri_pairs(str(tmp_path / "in"), str(tmp_path / "set"), split=str(table_file))
    sections = read_datalist(tmp_path / "set")
    assert {name: [item["subject"] for item in part] for name, part in sections.items()} == {
        "training": ["s1"], "validation": [], "test": ["s0", "s2"]
    }  # fmt: skip
    assert record(tmp_path / "set")["dropped"] == {"not in the table of --split": ["s3"]}
    table_file.write_text("subject,section\ns0,test\ns0,training\n")
    with pytest.raises(ValueError, match=r"split.csv: expected each subject once, but 's0' is listed twice"):
        dmri_pairs(str(tmp_path / "in"), str(tmp_path / "set"), split=str(table_file))
    table_file.write_text("subject,section\ns0,hidden\n")
    with pytest.raises(ValueError, match=r"split.csv: expected a section of training, .* but 's0' has 'hidden'"):
        dmri_pairs(str(tmp_path / "in"), str(tmp_path / "set"), split=str(table_file))
    table_file.write_text("subject,section\ns0,test\n")
    with pytest.raises(ValueError, match="preparation.json: expected subjects for training, but none is left"):
        dmri_pairs(str(tmp_path / "in"), str(tmp_path / "set"), split=str(table_file))


def test_subjects_can_be_chosen(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / "in" / name).mkdir(parents=True)
    out = tmp_path / "in" / "out"
    out.mkdir()
    assert subject_names(tmp_path / "in", out, None) == ["a", "b", "c"]
    (tmp_path / "list.txt").write_text("c\na\n")
    assert subject_names(tmp_path / "in", out, str(tmp_path / "list.txt")) == ["c", "a"]
    with pytest.raises(ValueError, match="^--subjects: expected each subject once, but 'a' is listed 2 times"):
        subject_names(tmp_path / "in", out, "a,b,a")
    with pytest.raises(FileNotFoundError, match=r"in/d: expected this folder \(--subjects\)"):
        subject_names(tmp_path / "in", out, ("a", "d"))
    with pytest.raises(ValueError, match="a: expected one folder per subject, but there is none"):
        subject_names(tmp_path / "in" / "a", out, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fft"}, "^--method: expected kspace or block, but got 'fft'"),
        ({"layout": "bids"}, "^--layout: expected auto or hcp or folders"),
        ({"fix_axes": "yes"}, "^--fix_axes: expected True or False"),
        ({"fix_axes": True, "allow_flipped": True}, "^--allow_flipped: expected it without --fix_axes"),
        ({"ndi": "*/ndi.nii.gz"}, "^--ndi: expected a pattern with {subject} alone"),
        ({"dwi": "{subject}/a.nii", "low_resolution_dwi": "{subject}/b.nii"}, "^--low_resolution_dwi: expected it"),
        ({"split": "none.csv"}, "none.csv: expected a table"),
        ({"workers": -1}, "^--workers"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options, message):
    (tmp_path / "in" / "s1").mkdir(parents=True)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dmri_pairs(str(tmp_path / "in"), str(tmp_path / "out"), **options)


def test_command_line_reports_when_nothing_is_left(tmp_path, monkeypatch):
    (tmp_path / "in" / "s1").mkdir(parents=True)
    words = ["x", "dmri_pairs", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=r"preparation.json: expected subjects to keep, but none is left"):
        run(COMMANDS, name="tools.prepare")
    assert list(record(tmp_path / "out")["dropped"]) == ["dwi missing"]
