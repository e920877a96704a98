# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shared.gradients import read_gradients
from tests.conftest import HANDBOOK

TABLES = HANDBOOK / "data" / "dmri2noddi" / "gradient_tables"
BVALS = [0, 1000, 1005, 5, 2005, 1995, 995]


def directions(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write(folder: Path, bvals: list, bvecs: np.ndarray | None = None, *, columns: bool = False) -> tuple[Path, Path]:
    bval, bvec = folder / "dwi.bval", folder / "dwi.bvec"
    bval.write_text(("\n" if columns else " ").join(map(str, bvals)) + "\n")
    bvecs = directions(len(bvals)) if bvecs is None else bvecs
    rows = bvecs if columns else bvecs.T
    bvec.write_text("\n".join(" ".join(f"{value:.6f}" for value in row) for row in rows) + "\n")
    return bval, bvec


@pytest.mark.parametrize("columns", [False, True], ids=["fsl", "columns"])
def test_both_layouts_give_the_same_table(tmp_path: Path, columns: bool):
    table = read_gradients(*write(tmp_path, BVALS, columns=columns), num_volumes=7)
    assert table.bvals.tolist() == BVALS
    weighted = np.array(BVALS) > 50
    np.testing.assert_allclose(table.bvecs[weighted], directions(7)[weighted], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(table.bvecs[weighted], axis=1), 1, atol=1e-12)
    assert not table.bvecs[~weighted].any()
    assert table.b0.tolist() == [True, False, False, True, False, False, False]


def test_three_volumes_are_read_as_fsl_writes_them(tmp_path: Path):
    bvecs = np.array([[0, 0, 0], [1, 0, 0], [0.6, 0.8, 0]])
    np.testing.assert_allclose(read_gradients(*write(tmp_path, [0, 1000, 1000], bvecs)).bvecs, bvecs, atol=1e-6)


def test_commas_tabs_and_a_byte_order_mark_are_fine(tmp_path: Path):
    bval, bvec = write(tmp_path, BVALS)
    bval.write_text("\ufeff" + ",\t".join(map(str, BVALS)), encoding="utf-8")
    assert read_gradients(bval, bvec).bvals.tolist() == BVALS


def test_rounded_b_values_are_one_shell(tmp_path: Path):
    shells = read_gradients(*write(tmp_path, BVALS)).shells()
    assert [(shell.b, shell.indices.tolist()) for shell in shells] == [(1000.0, [1, 2, 6]), (2000.0, [4, 5])]


def test_a_chain_of_b_values_does_not_become_one_shell(tmp_path: Path):
    shells = read_gradients(*write(tmp_path, [0, *range(500, 3001, 90)])).shells()
    assert max(len(shell.indices) for shell in shells) == 3
    assert sum(len(shell.indices) for shell in shells) == 28


def test_nan_directions_are_accepted_at_b0_only(tmp_path: Path):
    bvecs = directions(7)
    bvecs[3] = np.nan
    assert not read_gradients(*write(tmp_path, BVALS, bvecs)).bvecs[3].any()
    bvecs[4] = np.nan
    with pytest.raises(ValueError, match=r"dwi\.bvec: expected finite directions, but 1 are NaN.*volume 4"):
        read_gradients(*write(tmp_path, BVALS, bvecs))


@pytest.mark.parametrize(
    ("bvals", "message"),
    [
        ([0, 1000, "nan"], "expected finite b-values, but 1 are NaN"),
        ([0, 1000, "b=2000"], "expected b-values as plain numbers"),
        ([0, 1000, -5], "expected b-values of at least 0, but got -5"),
        ([0, 1, 2], "largest is 2; multiply values in ms/um2 by 1000"),
        ([0, 0, 0], "largest is 0"),
        ([0, 1e9, 2e9], r"largest is 2e\+09; divide values in s/m2"),
        ([1000, 1000, 2000], "expected at least one b0 volume.*smallest b-value is 1000"),
        ([], "but the file is empty"),
    ],
)
def test_bad_b_values_are_named(tmp_path: Path, bvals: list, message: str):
    with pytest.raises(ValueError, match=rf"dwi\.bval: .*{message}"):
        read_gradients(*write(tmp_path, bvals, directions(3)))


@pytest.mark.parametrize("factor", [0.97, 1.03, 0.0])
def test_vectors_that_are_not_of_unit_length_are_named(tmp_path: Path, factor: float):
    bvecs = directions(7)
    bvecs[4] *= factor
    with pytest.raises(ValueError, match=r"dwi\.bvec: expected unit vectors, but 1 of 5 are not \(volume 4"):
        read_gradients(*write(tmp_path, BVALS, bvecs))


def test_rounding_of_unit_vectors_is_removed(tmp_path: Path):
    table = read_gradients(*write(tmp_path, BVALS, directions(7) * 1.015))
    np.testing.assert_allclose(np.linalg.norm(table.bvecs[~table.b0], axis=1), 1, atol=1e-12)


def test_counts_that_differ_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"dwi\.bvec: expected one direction for each of the 7 b-values.*but got 6"):
        read_gradients(*write(tmp_path, BVALS, directions(6)))
    with pytest.raises(ValueError, match=r"dwi\.bval: expected one b-value for each of the 8 volumes.*but got 7"):
        read_gradients(*write(tmp_path, BVALS), num_volumes=8)


def test_damaged_layouts_are_named(tmp_path: Path):
    bval, bvec = write(tmp_path, BVALS)
    bvec.write_text("1 0 0\n0 1\n")
    with pytest.raises(ValueError, match=r"dwi\.bvec: expected rows of equal length, but they have \[2, 3\] numbers"):
        read_gradients(bval, bvec)
    bvec.write_text("1 0 0 0\n0 1 0 0\n")
    with pytest.raises(ValueError, match=r"dwi\.bvec: expected 3 rows \(FSL\) or 3 columns.*got 2 rows of 4"):
        read_gradients(bval, bvec)
    with pytest.raises(ValueError, match=r"expected b-values in one row or one column.*is this the file of the dir"):
        read_gradients(write(tmp_path, BVALS)[1], bvec)
    with pytest.raises(FileNotFoundError, match=r"none\.bval: expected a file of b-values"):
        read_gradients(tmp_path / "none.bval", bvec)


@pytest.mark.skipif(not TABLES.is_dir(), reason="real gradient tables are not here")
@pytest.mark.parametrize(
    ("name", "shells"),
    [
        ("hcp_wu_minn", {1000: 90, 2000: 90, 3000: 90}),
        ("mdt_b1k_b2k", {1000: 30, 2000: 60}),
        ("nifreeze_hcph_multishell", {700: 12, 1000: 40, 2000: 90, 3000: 132}),
        ("tractseg_example", {1000: 32}),
        ("mrtrix_msmt", {700: 16, 1200: 30, 2800: 50}),
    ],
)
def test_real_tables_have_their_published_shells(name: str, shells: dict[int, int]):
    table = read_gradients(TABLES / f"{name}.bval", TABLES / f"{name}.bvec")
    assert {round(shell.b, -1): len(shell.indices) for shell in table.shells()} == shells


@pytest.mark.skipif(not TABLES.is_dir(), reason="real gradient tables are not here")
def test_real_grid_scheme_falls_into_small_shells():
    name = "nifreeze_ds004737_dsi"
    shells = read_gradients(TABLES / f"{name}.bval", TABLES / f"{name}.bvec").shells()
    assert len(shells) == 17
    assert max(len(shell.indices) for shell in shells) == 15
