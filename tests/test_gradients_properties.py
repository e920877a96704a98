# SPDX-License-Identifier: Apache-2.0
"""Gradient tables: any text is read or named; what is read does not depend on layout, order, sign or frame."""

from __future__ import annotations

import string
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from shared.diffusion_features import RotationInvariantFeatures
from shared.gradient_axes import _ARRANGEMENTS, GIVEN, rearranged
from shared.gradient_files import gradients_beside, gradients_in, series_in
from shared.gradients import B0_MAX, GradientTable, read_gradients
from shared.spherical_harmonics import ShellFit
from tests.properties import error_of, examples

SEEDS = st.integers(0, 2**32 - 1)
ROTATIONS = SEEDS.map(lambda seed: Rotation.random(random_state=seed).as_matrix())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gradients")


def directions(count: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@st.composite
def tables(draw) -> tuple[np.ndarray, np.ndarray]:
    """b-values with at least one b0 and one diffusion-weighted volume, and directions."""
    weighted = draw(st.lists(st.floats(B0_MAX, 50_000, exclude_min=True), min_size=1, max_size=12))
    zeros = draw(st.lists(st.sampled_from([0.0, 5.0, 50.0]), min_size=1, max_size=4))
    bvals = np.asarray(draw(st.permutations([*zeros, *weighted])))
    return bvals, np.where(bvals[:, None] > B0_MAX, directions(len(bvals), draw(SEEDS)), 0.0)


def write(folder: Path, bvals: np.ndarray, bvecs: np.ndarray, *, columns=False, separator=" ") -> tuple[Path, Path]:
    rows = [bvals[:, None], bvecs] if columns else [bvals[None], bvecs.T]
    files = folder / "dwi.bval", folder / "dwi.bvec"
    for file, values in zip(files, rows, strict=True):
        file.write_text("".join(separator.join(map(repr, map(float, row))) + "\n" for row in values))
    return files


# Text


@examples(200)
@given(table=tables(), columns=st.booleans(), separator=st.sampled_from([" ", "  ", "\t", ",", ", "]))
def test_what_is_written_is_read_again_whatever_the_layout(folder, table, columns, separator):
    bvals, bvecs = table
    assume(len(bvals) != 3 or not columns)  # three volumes are read as FSL writes them
    read = read_gradients(*write(folder, bvals, bvecs, columns=columns, separator=separator), num_volumes=len(bvals))
    np.testing.assert_array_equal(read.bvals, bvals)
    np.testing.assert_allclose(read.bvecs, bvecs, atol=1e-15)
    np.testing.assert_array_equal(read.b0, bvals <= B0_MAX)


@examples(100)
@given(table=tables(), rounding=SEEDS)
def test_lengths_become_one_and_directions_stay(folder, table, rounding):
    bvals, bvecs = table
    factors = np.random.default_rng(rounding).uniform(0.981, 1.019, len(bvals))
    read = read_gradients(*write(folder, bvals, bvecs * factors[:, None]))
    np.testing.assert_allclose(read.bvecs, bvecs, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(read.bvecs, axis=1), bvals > B0_MAX, atol=1e-12)


NUMBERS = st.one_of(
    st.floats(allow_nan=True).map(repr), st.integers().map(str), st.sampled_from(["0", "1", "1000", "-1", "1e999"]),
    st.sampled_from(["nan", "inf", "1_0", "٣", "0x1", "1.2.3", "--1", "1e", "1,2", ""]),
)  # fmt: skip
ROWS = st.lists(st.lists(NUMBERS, max_size=5).map(" ".join), max_size=5).map("\n".join).map(str.encode)
FILES = st.one_of(
    ROWS, st.text(max_size=40).map(lambda text: text.encode(errors="replace")), st.binary(max_size=40),
    st.sampled_from([b"0 1000", b"0\n1000\n", b"0 0 1000", b"1 0\n0 1\n0 0", b"0 0 0\n1 0 0", b"1 0 0\n0 1 0\n0 0 1"]),
)  # fmt: skip


@examples(400)
@given(bval=FILES, bvec=FILES, count=st.one_of(st.none(), st.integers(0, 5)))
@example(bval=b"0 1000", bvec=b"0 1e200\n0 1e200\n0 0", count=None)
@example(bval=b"0 1000", bvec=b"nan 1\nnan 0\nnan 0", count=2)
@example(bval=b"0 1000", bvec=b"0 0 0\n1e999 0 0", count=None)
@example(bval=b"\xef\xbb\xbf0 1000", bvec=b"0 1\n0 0\n0 0", count=None)
def test_any_text_is_a_table_or_an_error_that_begins_with_its_file(folder, bval, bvec, count):
    files = folder / "any.bval", folder / "any.bvec"
    for file, content in zip(files, (bval, bvec), strict=True):
        file.write_bytes(content)
    found: list[GradientTable] = []
    error = error_of(lambda: found.append(read_gradients(*files, num_volumes=count)))
    if error is not None:
        assert type(error) is ValueError
        assert str(error).startswith((f"{files[0]}: ", f"{files[1]}: "))
        return
    table = found[0]
    assert len(table.bvals) == len(table.bvecs) == (count or len(table.bvals))
    assert np.isfinite(table.bvals).all()
    assert table.b0.any()
    np.testing.assert_allclose(np.linalg.norm(table.bvecs, axis=1), ~table.b0, atol=1e-12)


# Shells


@examples(150)
@given(table=tables(), order=SEEDS, tolerance=st.sampled_from([0.0, 20.0, 100.0, 1e5]))
def test_shells_hold_every_weighted_volume_once_in_any_order(table, order, tolerance):
    shells = GradientTable(*table).shells(tolerance)
    bvals = table[0]
    indices = np.concatenate([shell.indices for shell in shells])
    assert sorted(indices.tolist()) == np.flatnonzero(bvals > B0_MAX).tolist()
    for shell, following in zip(shells, [*shells[1:], None], strict=True):
        values = bvals[shell.indices]
        assert (np.diff(shell.indices) > 0).all()
        assert values.max() - values.min() <= 2 * tolerance
        assert shell.b == pytest.approx(values.mean())
        assert following is None or values.max() < bvals[following.indices].min()
    places = np.random.default_rng(order).permutation(len(bvals))
    moved = GradientTable(bvals[places], table[1][places]).shells(tolerance)
    assert [sorted(places[shell.indices].tolist()) for shell in moved] == [s.indices.tolist() for s in shells]


# Frames and signs


def signal_of(bvals: np.ndarray, bvecs: np.ndarray, tensors: np.ndarray) -> np.ndarray:
    """(v, 1, 1, N) of two tensors in each voxel, (v, 2, 3, 3) mm2/s."""
    decay = np.einsum("na,vkab,nb->vkn", bvecs, tensors, bvecs)
    return 900 * np.exp(-bvals * decay).mean(1)[:, None, None]


@st.composite
def measured(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(draw(SEEDS))
    counts = draw(st.tuples(st.integers(20, 40), st.integers(20, 40)))
    bvals = np.repeat([0.0, 1000.0, 2000.0], [2, *counts])
    bvecs = np.vstack([np.zeros((2, 3)), *(directions(count, draw(SEEDS)) for count in counts)])
    frames = Rotation.random(6, random_state=rng.integers(2**32)).as_matrix().reshape(3, 2, 3, 3)
    values = rng.uniform(2e-4, 2e-3, (3, 2, 3))
    return bvals, bvecs, np.einsum("vkab,vkb,vkcb->vkac", frames, values, frames)


@examples(15)
@given(measurement=measured(), turn=ROTATIONS, seed=SEEDS)
def test_features_depend_neither_on_frame_nor_sign_nor_order(measurement, turn, seed):
    bvals, bvecs, tensors = measurement
    features = RotationInvariantFeatures()
    expected = features(signal_of(bvals, bvecs, tensors), GradientTable(bvals, bvecs))
    assert (expected[0] > 0.05).all()
    # Turned tissue under turned directions.
    turned = turn @ tensors @ turn.T
    table = GradientTable(bvals, bvecs @ turn.T)
    np.testing.assert_allclose(features(signal_of(bvals, table.bvecs, turned), table), expected, atol=2e-5)
    # A direction and its opposite are the same measurement.
    rng = np.random.default_rng(seed)
    flipped = GradientTable(bvals, bvecs * rng.choice([-1.0, 1.0], (len(bvals), 1)))
    np.testing.assert_allclose(features(signal_of(bvals, bvecs, tensors), flipped), expected, atol=2e-5)
    # Volumes in another order.
    order = rng.permutation(len(bvals))
    signal = signal_of(bvals, bvecs, tensors)[..., order]
    np.testing.assert_allclose(features(signal, GradientTable(bvals[order], bvecs[order])), expected, atol=2e-5)


@examples(40)
@given(count=st.integers(20, 60), order=st.sampled_from([0, 2, 4]), seed=SEEDS, turn=ROTATIONS)
def test_harmonics_of_a_shell_turn_with_it(count, order, seed, turn):
    """Mean and strengths are the same, and what the fit leaves; a constant has its mean and no strength."""
    vectors, indices = directions(count, seed), np.arange(count)
    values = np.random.default_rng(seed).uniform(0, 1, (4, count))
    one, other = (ShellFit(v, indices=indices, order=order) for v in (vectors, -vectors @ turn.T))
    (first, left), (second, left_too) = one.fit(values), other.fit(values)
    none = np.zeros(4)
    orders = tuple(range(2, order + 1, 2))
    np.testing.assert_allclose(one.mean(first), other.mean(second), atol=1e-8)
    np.testing.assert_allclose(left, left_too, atol=1e-8)
    strengths = [fit.strengths(h, orders, variance=none) for fit, h in ((one, first), (other, second))]
    np.testing.assert_allclose(*strengths, atol=1e-6)
    flat, _ = one.fit(np.full((1, count), 0.7))
    assert one.mean(flat) == pytest.approx(0.7, abs=1e-6)
    np.testing.assert_allclose(one.strengths(flat, orders, variance=none[:1]), 0, atol=1e-6)


@examples(50)
@given(table=tables(), name=st.sampled_from(sorted(_ARRANGEMENTS)))
def test_each_arrangement_has_one_that_takes_it_back_but_for_a_sign(table, name):
    given_table = GradientTable(*table)
    moved = rearranged(given_table, name)
    np.testing.assert_array_equal(np.sort(np.abs(moved.bvecs), 1), np.sort(np.abs(given_table.bvecs), 1))
    # Directions have no sign: their squares say what they are.
    squares = given_table.bvecs[:, :, None] * given_table.bvecs[:, None]
    back = [rearranged(moved, other).bvecs for other in _ARRANGEMENTS]
    assert any(np.allclose(vectors[:, :, None] * vectors[:, None], squares) for vectors in back)
    np.testing.assert_array_equal(rearranged(given_table, GIVEN).bvecs, given_table.bvecs)


# Which files belong to which series

NAMES = [f"sub{end}" for end in (".bval", ".bvals", ".bvec", ".bvecs")] + ["bval", "bvals", "bvec", "bvecs"]
SERIES = ["sub.nii", "sub.nii.gz", "data.nii.gz"]


@examples(80)
@given(
    gradients=st.sets(st.sampled_from(NAMES), max_size=5),
    series=st.dictionaries(st.sampled_from(SERIES), st.integers(1, 3), min_size=1),
    content=st.one_of(st.sampled_from(["0 1000", "0 1000 1000", "0, 1000", ""]), st.text(string.printable, max_size=9)),
)
def test_any_folder_gives_a_pair_of_files_or_names_what_is_wrong(tmp_path_factory, gradients, series, content):
    folder = tmp_path_factory.mktemp("series")
    for name in gradients:
        (folder / name).write_text(content)
    for name, volumes in series.items():
        nibabel.save(nibabel.Nifti1Image(np.ones((2, 3, 2, volumes), np.float32), np.eye(4)), folder / name)
    found: dict = {}
    error = error_of(lambda: found.update(gradients_in(folder, series_in(folder))), ValueError, FileNotFoundError)
    assert error is None or str(error).startswith(str(folder))
    for file, pair in found.items():
        assert set(pair) == {"bval", "bvec"}
        assert all(Path(path).is_file() and Path(path).parent == folder for path in pair.values())
        if list(series) == [file.name]:
            assert gradients_beside(file) == pair
    for name in series:
        error = error_of(lambda name=name: gradients_beside(folder / name), ValueError, FileNotFoundError)
        assert error is None or str(error).startswith(str(folder))
