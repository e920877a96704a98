# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from shared.gradient_files import gradients_beside, gradients_in, series_in


def series(path: Path, *, volumes: int = 7) -> Path:
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 3, volumes), np.float32), np.eye(4)), path)
    return path


def table(folder: Path, bval: str, bvec: str, *, count: int = 7) -> dict[str, str]:
    for name in (bval, bvec):
        (folder / name).write_text("0 " * count + "\n")
    return {"bval": str(folder / bval), "bvec": str(folder / bvec)}


@pytest.mark.parametrize("name", ["sub-01_dwi.nii.gz", "sub-01_dwi.nii", "sub-01_dwi.NII.GZ"])
@pytest.mark.parametrize("ending", ["", "s"])
def test_gradients_of_the_same_name(tmp_path: Path, name: str, ending: str) -> None:
    table(tmp_path, "bvals", "bvecs")
    own = table(tmp_path, f"sub-01_dwi.bval{ending}", f"sub-01_dwi.bvec{ending}")
    assert gradients_beside(tmp_path / name) == own


def test_gradients_of_the_folder_belong_to_the_series_with_so_many_volumes(tmp_path: Path) -> None:
    data, _ = series(tmp_path / "data.nii.gz"), series(tmp_path / "grad_dev.nii.gz", volumes=9)
    shared = table(tmp_path, "bvals", "bvecs")
    other = series(tmp_path / "other_dwi.nii.gz")  # as many, but it has its own
    own = table(tmp_path, "other_dwi.bval", "other_dwi.bvec")
    assert gradients_beside(data) == shared
    assert gradients_in(tmp_path, series_in(tmp_path)) == {other: own, data: shared}
    with pytest.raises(
        ValueError, match=r"grad_dev.nii.gz: expected as many volumes as .*bvals .*\(7\), got 9; correct"
    ):
        gradients_beside(tmp_path / "grad_dev.nii.gz")


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = table(tmp_path, "a.bval", "a.bvec")
    monkeypatch.chdir(tmp_path)
    assert gradients_beside("a.nii.gz") == own


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = series(tmp_path / "a.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"a.nii.gz: .* a.bval and a.bvec \(or bvals and bvecs, as FSL"):
        gradients_beside(path)
    assert gradients_in(tmp_path, [path]) == {}
    (tmp_path / "a.bvec").write_text("0\n")
    with pytest.raises(
        FileNotFoundError, match=r"a.nii.gz: expected its gradients beside it, but a.bval or a.bvals is"
    ):
        gradients_beside(path)
