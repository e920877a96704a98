# SPDX-License-Identifier: Apache-2.0
"""Tests of the sample data of `dmri2noddi`: anatomy, bundles, acquisition and the dataset folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_erosion, map_coordinates

from shared.datalist import SECTIONS, find_leaks, load_datalist, read_datalist
from shared.gradients import read_gradients
from shared.resolution import block_average, doubled_affine, halved_affine
from tests.conftest import HANDBOOK, digest
from tools.phantoms import dmri2noddi
from tools.phantoms.__main__ import main
from tools.phantoms.noddi_acquisition import acquire, along_voxel_axes, default_table, read_table
from tools.phantoms.noddi_anatomy import NoddiMaps, draw_maps
from tools.phantoms.noddi_bundles import MIN_SHARE
from tools.phantoms.noddi_signal import D_ISO

SHAPE = (64, 72, 56)
SMALL = (32, 36, 34)
MAPS = ("ndi", "odi", "fwf")
TABLES = HANDBOOK / "data" / "dmri2noddi" / "gradient_tables"


@pytest.fixture(scope="module")
def brains() -> list[NoddiMaps]:
    return [draw_maps(SHAPE, np.random.default_rng(seed), lesions=seed == 2) for seed in range(3)]


def white(maps: NoddiMaps) -> np.ndarray:
    """Well inside white matter."""
    return maps.mask & (maps.bundle_odi < 0.32) & (maps.water < 0.15) & (maps.density > 0.48)


def grey(maps: NoddiMaps) -> np.ndarray:
    return maps.mask & (maps.bundle_odi > 0.46) & (maps.water < 0.2)


# anatomy


def test_maps_are_fractions_and_nothing_outside_of_the_mask(brains: list[NoddiMaps]) -> None:
    for maps in brains:
        assert 0.3 < maps.mask.mean() < 0.5
        for name in MAPS:
            values = getattr(maps, name)
            assert (values.shape, values.dtype) == (SHAPE, np.float32)
            assert values.min() >= 0
            assert values.max() <= 1
            assert not values[~maps.mask].any()
        assert not maps.mask[0].any()
        assert not maps.mask[-1].any()
        assert not maps.mask[:, 0].any()
        # a very large head may touch the end of the field of view
        assert maps.mask[:, -1].sum() < 60
        assert maps.mask[:, :, -1].sum() < 60


def test_tissues_have_their_ranges(brains: list[NoddiMaps]) -> None:
    for maps in brains:
        inner, cortex = white(maps) & ~maps.lesions, grey(maps)
        assert inner.sum() > 10_000
        assert cortex.sum() > 15_000
        low, middle, high = np.percentile(maps.ndi[inner], (2, 50, 98))
        assert 0.46 < low < 0.52 < middle < 0.635
        assert 0.62 < high < 0.78
        assert high - low > 0.1
        low, middle, high = np.percentile(maps.odi[inner], (2, 50, 98))
        assert 0.03 <= low < 0.1 < middle < 0.27 < high < 0.5
        assert np.percentile(maps.fwf[inner], 98) < 0.12
        low, middle, high = np.percentile(maps.ndi[cortex], (2, 50, 98))
        assert 0.27 < low < middle < high < 0.56
        low, middle, high = np.percentile(maps.odi[cortex], (2, 50, 98))
        assert 0.4 < low < 0.5 < middle < 0.62 < high < 0.75
        assert 0.04 < np.median(maps.fwf[cortex]) < 0.12


def test_water_has_neither_neurites_nor_directions(brains: list[NoddiMaps]) -> None:
    for maps in brains:
        water = maps.mask & (maps.fwf > 0.99)
        assert 100 < water.sum() < 0.1 * maps.mask.sum()
        assert maps.ndi[water].max() < 0.01
        assert maps.odi[water].max() < 0.01
        tissue = maps.mask & (maps.fwf < 0.65)
        assert np.array_equal(maps.ndi[tissue], maps.density[tissue]), "no fading where there is tissue to see"
        assert maps.b0[water].mean() > 1.8 * maps.b0[white(maps)].mean()


def test_cortex_is_two_to_three_voxels_thick(brains: list[NoddiMaps]) -> None:
    """Twice the volume over the surface of the sheet's both sides."""
    for maps in brains:
        sheet = maps.mask & (maps.bundle_odi > 0.4) & (maps.water < 0.4)
        faces = sum(np.abs(np.diff(sheet.astype(int), axis=axis)).sum() for axis in range(3))
        # a surface in a random direction shows 1.5 times its area in faces of voxels
        assert 1.8 < 2 * sheet.sum() / (faces / 1.5) < 3


def test_halves_are_nearly_mirrored(brains: list[NoddiMaps]) -> None:
    for maps in brains:
        mirrored = maps.mask[::-1]
        assert 2 * (maps.mask & mirrored).sum() / (2 * maps.mask.sum()) > 0.9
        both = maps.mask & mirrored
        likeness = np.corrcoef(maps.odi[both], maps.odi[::-1][both])[0, 1]
        assert 0.2 < likeness < 0.9, "alike, not equal"


def test_people_differ(brains: list[NoddiMaps]) -> None:
    one, other = brains[0], brains[1]
    both = one.mask & other.mask
    assert np.corrcoef(one.odi[both], other.odi[both])[0, 1] < 0.6


def test_lesions(brains: list[NoddiMaps]) -> None:
    assert not brains[0].lesions.any()
    hurt = brains[2]
    spots = hurt.lesions & (hurt.share == 0)
    assert hurt.lesions.sum() > 20
    around = white(hurt) & ~hurt.lesions
    assert hurt.ndi[spots].mean() < hurt.ndi[around].mean() - 0.1
    assert hurt.fwf[spots].mean() > hurt.fwf[around].mean() + 0.08
    healthy = draw_maps(SHAPE, np.random.default_rng(2))
    assert np.array_equal(healthy.mask, hurt.mask)
    far = healthy.mask & ~hurt.lesions
    assert np.median(np.abs(healthy.ndi - hurt.ndi)[far]) < 1e-6, "nothing else changes"


def test_cubic_upsampling_leaves_something_to_win(brains: list[NoddiMaps]) -> None:
    grid = np.meshgrid(*((np.arange(side) + 0.5) / 2 - 0.5 for side in SHAPE), indexing="ij")
    for maps in brains:
        for name, low, high in (("ndi", 22, 27), ("odi", 19, 24), ("fwf", 17, 22)):
            truth = getattr(maps, name)
            up = map_coordinates(block_average(truth), grid, order=3, mode="nearest")
            psnr = -10 * np.log10(((up - truth)[maps.mask] ** 2).mean())
            assert low < psnr < high, name


def test_larger_grid_shows_finer_folds() -> None:
    small, large = (draw_maps(shape, np.random.default_rng(5)) for shape in (SMALL, (64, 72, 68)))
    coarse = block_average(large.mask) > 0.5
    assert 2 * (small.mask & coarse).sum() / (small.mask.sum() + coarse.sum()) > 0.9, "the brain fills the grid"
    shares = [binary_erosion(grey(maps), iterations=2).sum() / maps.mask.sum() for maps in (small, large)]
    assert max(shares) < 0.1, "the cortex stays thin in voxels"


# bundles


def test_directions_are_unit_and_smooth_within_a_bundle(brains: list[NoddiMaps]) -> None:
    for maps in brains:
        for field in (maps.first, maps.second):
            assert np.linalg.norm(field[:, maps.mask], axis=0) == pytest.approx(1, abs=1e-4)
        inner = white(maps)
        cosine = np.abs((maps.first[:, 1:] * maps.first[:, :-1]).sum(axis=0))[inner[1:] & inner[:-1]]
        angle = np.degrees(np.arccos(np.clip(cosine, 0, 1)))
        assert np.median(angle) < 8
        assert (angle > 40).mean() < 0.15, "where one bundle meets another"


def test_known_tracts_run_their_way(brains: list[NoddiMaps]) -> None:
    for maps in brains:
        inner = white(maps)
        x, y, z = (np.abs(part) for part in maps.first)
        middle = slice(30, 34)
        callosum = inner[middle, 22:52, 28:48] & (x[middle, 22:52, 28:48] > 0.95)
        assert callosum.sum() > 60, "the corpus callosum crosses the midline"
        stem = inner[26:38, 28:40, :10]
        assert np.median(z[26:38, 28:40, :10][stem]) > 0.6, "the corticospinal tracts climb through the brain stem"
        for half in (slice(0, 32), slice(32, 64)):
            assert (inner[half] & (y[half] > 0.95)).sum() > 300, "association bundles run from back to front"


def test_crossings_disperse(brains: list[NoddiMaps]) -> None:
    for maps in brains:
        inner = white(maps)
        share = maps.share[inner]
        assert 0.4 < (share > 0).mean() < 0.9
        assert share[share > 0].min() >= MIN_SHARE
        assert share.max() <= 0.5
        alone, crossing = inner & (maps.share == 0), inner & (maps.share > 0.3)
        assert maps.odi[alone] == pytest.approx(maps.bundle_odi[alone], abs=1e-3)
        assert maps.odi[crossing].mean() > maps.bundle_odi[crossing].mean() + 0.04
        wide = np.abs((maps.first * maps.second).sum(axis=0)) < 0.3
        assert maps.odi[crossing & wide].mean() > 0.3


# acquisition


def test_default_table() -> None:
    table = default_table()
    values, counts = np.unique(table.bvals, return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {0.0: 4, 1000.0: 20, 2000.0: 40}
    assert table.bvals[0] == 0
    assert np.array_equal(table.b0, table.bvals == 0)
    for b, spread in ((1000, 25), (2000, 17)):
        vectors = table.bvecs[table.bvals == b]
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
        cosine = np.abs(vectors @ vectors.T) - 2 * np.eye(len(vectors))
        nearest = np.degrees(np.arccos(cosine.max(axis=1)))
        assert nearest.min() > spread, "directions keep away from each other and from each other's opposites"


def test_low_resolution_signal_is_the_mean_of_the_fine_one() -> None:
    maps, volumes, affine = dmri2noddi.make_subject(3, shape=SMALL, snr=None)
    gain = np.median(volumes[..., 0][block_average(maps.b0) > 0] / block_average(maps.b0)[block_average(maps.b0) > 0])
    assert volumes.dtype == np.float32
    b0 = volumes[..., default_table().b0]
    assert b0 / gain == pytest.approx(np.repeat(block_average(maps.b0)[..., None], 4, axis=3), rel=1e-4, abs=1e-5)
    water = block_average(maps.water) > 0.97
    assert water.any()
    at_1000 = volumes[..., default_table().bvals == 1000][water] / b0[water].mean(axis=1, keepdims=True)
    assert at_1000 == pytest.approx(np.exp(-1000 * D_ISO), abs=0.01)


def test_noise_is_rician_and_relative_to_white_matter() -> None:
    maps, clean, affine = dmri2noddi.make_subject(4, shape=SMALL, snr=None)
    _, noisy, again = dmri2noddi.make_subject(4, shape=SMALL, snr=25.0)
    assert np.array_equal(affine, again)
    b0 = default_table().b0
    gain = np.median(clean[..., b0].mean(axis=-1) / np.maximum(block_average(maps.b0), 1e-6))
    bright = block_average(maps.b0) > 0.5
    assert ((noisy - clean) / gain)[bright][:, b0].std() == pytest.approx(1 / 25, rel=0.03)
    air = block_average(maps.b0) == 0
    assert air.sum() > 100
    assert (noisy / gain)[air].mean() == pytest.approx(np.sqrt(np.pi / 2) / 25, rel=0.02), "Rayleigh in air"


def test_vectors_follow_the_convention_of_fsl() -> None:
    """A signal is lowest along the fibres: with x negated where the determinant is positive, and as it is elsewhere."""
    maps = draw_maps(SMALL, np.random.default_rng(0))
    table = default_table()
    right, left = np.eye(4), np.diag([-1.0, 1, 1, 1])
    assert np.array_equal(along_voxel_axes(table, right), table.bvecs * [-1, 1, 1])
    assert np.array_equal(along_voxel_axes(table, left), table.bvecs)
    alone = (block_average(maps.share) == 0) & (block_average(white(maps)) == 1)
    fibres = np.moveaxis(maps.first[:, ::2, ::2, ::2], 0, -1)[alone]
    high = table.bvals == 2000
    for affine, mirrored in ((right, True), (left, False)):
        signal = acquire(maps, table, affine, np.random.default_rng(0), snr=None)[alone][:, high]
        found = {}
        for flip in (True, False):
            cosine = fibres @ (table.bvecs[high] * [-1 if flip else 1, 1, 1]).T
            found[flip] = np.mean([np.corrcoef(s, c**2)[0, 1] for s, c in zip(signal, cosine, strict=True)])
        assert found[mirrored] < -0.85
        assert found[not mirrored] > -0.8


@pytest.mark.skipif(not TABLES.is_dir(), reason="no real gradient tables here")
@pytest.mark.parametrize("name", ["hcp_wu_minn", "mdt_multishell_b6k_max", "nifreeze_hcph_multishell"])
def test_real_tables(name: str) -> None:
    table = read_table(TABLES / name)
    maps = draw_maps(SMALL, np.random.default_rng(1))
    # a few planes suffice
    signal = acquire(maps, table, np.eye(4), np.random.default_rng(0), snr=None)[:, ::4, ::4]
    assert signal.shape[3] == len(table.bvals)
    assert np.isfinite(signal).all()
    means = [signal[..., table.bvals == b].mean() for b in (table.bvals.min(), table.bvals.max())]
    assert means[1] < 0.6 * means[0]


# dataset folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "noddi"
    path = dmri2noddi.make_dataset(str(folder), num_subjects=4, shape=SMALL, split="0.5,0.25,0.25", directions=True)
    assert path == str(folder / "datalist.json")
    return folder


def items(folder: Path) -> Iterator[dict]:
    for section in SECTIONS:
        yield from load_datalist(folder, section, required=("dwi", "bval", "bvec", "mask", *MAPS))


def test_dataset_folder(dataset: Path) -> None:
    content = json.loads((dataset / "datalist.json").read_text())
    assert "num_subjects=4, shape=[32, 36, 34], seed=0, noise=rician, snr=40.0" in content["description"]
    assert [len(content[section]) for section in SECTIONS] == [2, 1, 1]
    assert find_leaks(read_datalist(dataset)) == {}
    for item in items(dataset):
        assert set(item) == {"dwi", "bval", "bvec", "mask", *MAPS, "subject"}
        table = read_gradients(item["bval"], item["bvec"], num_volumes=64)
        assert table.bvecs == pytest.approx(default_table().bvecs, abs=1e-6)
        dwi = nib.load(item["dwi"])
        assert dwi.shape == (16, 18, 17, 64)
        assert dwi.get_data_dtype() == np.int16
        mask = nib.load(item["mask"])
        assert mask.get_data_dtype() == np.uint8
        assert mask.affine == pytest.approx(doubled_affine(dwi.affine), abs=1e-4)
        for name in MAPS:
            image = nib.load(item[name])
            assert image.shape == SMALL
            assert image.get_data_dtype() == np.float32
            assert image.affine == pytest.approx(mask.affine, abs=1e-6)
            assert not image.get_fdata()[np.asarray(mask.dataobj) == 0].any()


def test_geometry_of_the_files(dataset: Path) -> None:
    affines = [nib.load(item["ndi"]).affine for item in items(dataset)]
    for affine in affines:
        assert nib.aff2axcodes(affine) == ("R", "A", "S")
        assert np.linalg.norm(affine[:3, :3], axis=0) == pytest.approx(dmri2noddi.VOXEL, rel=1e-4)
        turn = affine[:3, :3] / dmri2noddi.VOXEL
        assert 0.4 < np.degrees(np.arccos((np.trace(turn) - 1) / 2)) < dmri2noddi.MAX_OBLIQUE + 0.1
    assert np.abs(affines[0] - affines[1]).max() > 1
    image = nib.load(next(items(dataset))["dwi"])
    assert image.get_qform() == pytest.approx(image.affine, abs=1e-3)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header.get_zooms()[:3] == pytest.approx((2.5, 2.5, 2.5), rel=1e-4)


def test_files_hold_the_subject(dataset: Path) -> None:
    maps, volumes, affine = dmri2noddi.make_subject(2, shape=SMALL)
    folder = dataset / "subjects" / "sub-002"
    dwi = nib.load(folder / "dwi.nii.gz")
    assert dwi.get_fdata() == pytest.approx(volumes, abs=0.5)
    assert dwi.affine == pytest.approx(halved_affine(affine), abs=1e-4)
    for name in MAPS:
        assert np.array_equal(nib.load(folder / f"{name}.nii.gz").get_fdata(dtype=np.float32), getattr(maps, name))
    direction = nib.load(folder / "direction.nii.gz").get_fdata(dtype=np.float32)
    assert np.array_equal(direction, np.moveaxis(maps.first, 0, -1))


def test_dataset_is_deterministic(dataset: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    dmri2noddi.make_dataset(str(again), num_subjects=3, shape=SMALL, directions=True, split="0.4,0.3,0.3", workers=2)
    found, expected = digest(again), digest(dataset)
    names = [name for name in found if name.startswith("subjects")]
    assert len(names) == 3 * 8
    assert [found[name] for name in names] == [expected[name] for name in names], "neither number nor workers matter"
    volumes = {name: found[name] for name in names if name.endswith(".nii.gz")}
    assert len(set(volumes.values())) == len(volumes)


def test_seed_and_noise_change_what_they_should(dataset: Path) -> None:
    maps, volumes, affine = dmri2noddi.make_subject(1, shape=SMALL, snr=None)
    truth = nib.load(dataset / "subjects/sub-001/ndi.nii.gz")
    noisy = nib.load(dataset / "subjects/sub-001/dwi.nii.gz").get_fdata()
    assert np.array_equal(truth.get_fdata(dtype=np.float32), maps.ndi)
    assert np.abs(noisy - volumes).mean() > 1
    other, _, elsewhere = dmri2noddi.make_subject(1, shape=SMALL, seed=1)
    assert not np.array_equal(other.mask, maps.mask)
    assert not np.array_equal(affine, elsewhere)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_subjects": 2}, "num_subjects: expected at least 3, one for each section, got 2"),
        ({"shape": "64,72"}, "shape: expected 3 numbers, got '64,72'"),
        ({"shape": 64}, "shape: expected 3 numbers such as 1,2,3, got 64"),
        ({"shape": (64, 73, 56)}, "shape: expected three even numbers of at least 32"),
        ({"shape": (64, 72, 30)}, "shape: expected three even numbers of at least 32"),
        ({"split": (0.5, 0.5, 0.5)}, "split: expected shares >= 0 that sum to 1"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
        ({"snr": 0}, "snr: expected a number above 0, got 0; --noise none leaves the noise out"),
        ({"noise": "gaussian"}, "noise: expected rician or none, got 'gaussian'"),
        ({"lesions": 2}, "lesions: expected a share of the subjects between 0 and 1, got 2"),
        ({"workers": 0}, "workers: expected at least 1 process, got 0"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dmri2noddi.make_dataset(str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


def test_absent_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(tmp_path))}/none\.bval"):
        dmri2noddi.make_dataset(str(tmp_path / "out"), gradient_table=str(tmp_path / "none"))
    assert not (tmp_path / "out").exists()


def test_command_line_and_overwriting(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "x"
    np.savetxt(tmp_path / "t.bval", [[0, 1000, 1000, 1000, 1000, 1000, 1000, 2]], fmt="%g")
    vectors = np.concatenate(
        [np.zeros((1, 3)), default_table().bvecs[default_table().bvals == 1000][:6], np.zeros((1, 3))]
    )
    np.savetxt(tmp_path / "t.bvec", vectors.T, fmt="%.6f")
    words = ["dmri2noddi", "--out", str(folder), "--num_subjects", "3", "--shape", "[32,36,34]", "--noise", "none"]
    main([*words, "--gradient_table", str(tmp_path / "t")])
    assert capsys.readouterr().out.strip() == str(folder / "datalist.json")
    assert nib.load(folder / "subjects/sub-003/dwi.nii.gz").shape == (16, 18, 17, 8)
    name = "subjects/sub-001/ndi.nii.gz"
    assert (folder / name).read_bytes() == (dataset / name).read_bytes()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match=rf"^{re.escape(str(folder))}: expected an empty or absent folder"):
        main(words)
    main([*words, "--overwrite"])
    assert nib.load(folder / "subjects/sub-003/dwi.nii.gz").shape == (16, 18, 17, 64)
    assert (folder / "mine.txt").read_text() == "mine"
