# SPDX-License-Identifier: Apache-2.0
"""Bad volumes, gradient tables, masks and maps: what commands must refuse, and what they are documented to read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from tests import volume_faults as fault
from tests.corpus import COMMANDS, BadInput

NAN, INF = float("nan"), float("inf")
NOT_INFERENCE = ("check_data", "training", "evaluation")  # inference does not read it
LISTED = ("training", "evaluation", "inference")  # no item that could be checked
_Make = Callable[[Path], Path]


def _entries(bundle: str, prefix: str, default: str) -> Callable[..., BadInput]:
    def entry(
        name: str,
        kind: str,
        make: _Make,
        words: str,
        *,
        key: str | None = default,
        commands: tuple[str, ...] = COMMANDS,
        accepted: str | None = None,
    ) -> BadInput:
        return BadInput(f"{prefix}-{name}", bundle, kind, make, key, commands, words, accepted)

    return entry


_brain = _entries("brain_controlnet", "brain", "flair")
_dmri = _entries("dmri2noddi", "dmri", "dwi")
_bval, _bvec, _mask = (partial(_dmri, key=key) for key in ("bval", "bvec", "mask"))
_map = partial(_dmri, commands=NOT_INFERENCE)
_sdseg = _entries("sdseg", "sdseg-volume", "image")
_label = partial(_sdseg, key="label", commands=NOT_INFERENCE)
_cut, _patched, _changed, _placed = fault.cut, fault.patched, fault.changed, fault.placed


def _nan(key: str) -> _Make:
    return partial(_changed, key, partial(fault.one_voxel, NAN))


def _all(key: str, value: float) -> _Make:
    return partial(_changed, key, partial(fault.everywhere, value))


def _twice(key: str) -> _Make:
    return partial(_changed, key, lambda v: np.stack([v, 0.5 * v], -1))


def _flat(key: str) -> _Make:
    return partial(_placed, key, lambda a: np.c_[a[:, :1], a[:, :1], a[:, 2:]])


def _complex(key: str) -> _Make:
    return partial(_changed, key, lambda v: v.astype(np.complex64))


BRAIN = (
    _brain("truncated-nii-gz", "damaged", partial(_cut, "flair", ".nii.gz", 0.6), "ended before"),
    _brain("truncated-nii", "damaged", partial(_cut, "flair", ".nii", 0.6), "announces 23040 bytes of voxels"),
    _brain("empty-nii-gz", "damaged", partial(_cut, "flair", ".nii.gz", 0), "mpty"),
    _brain("empty-nii", "damaged", partial(_cut, "flair", ".nii", 0), "mpty"),
    _brain("header-only-nii", "damaged", partial(fault.header_alone, "flair", ".nii"), "announces 23040 bytes"),
    _brain("header-only-nii-gz", "damaged", partial(fault.header_alone, "flair", ".nii.gz"), "got 0 bytes"),
    _brain("wrong-magic", "damaged", partial(_patched, "flair", 344, "<4s", (b"abc\0",)), "file type"),
    _brain("flipped-bit-compressed", "damaged", partial(fault.flipped_bit, "flair", 4), "expected a readable"),
    _brain("flipped-bit-stored", "damaged", partial(fault.flipped_bit, "flair", 0), "CRC check failed"),
    _brain("words-nii-gz", "damaged", partial(fault.words, "flair", ".nii.gz"), "is not a gzip file"),
    _brain("words-nii", "damaged", partial(fault.words, "flair", ".nii"), "file type"),
    _brain("t1w-truncated", "damaged", partial(_cut, "t1w", ".nii.gz", 0.6), "ended before", key="t1w",
           commands=NOT_INFERENCE),
    _brain("directory", "no file", partial(fault.directory, "flair"), "expected"),
    _brain("broken-link", "no file", partial(fault.broken_link, "flair"), "does not exist"),
    _brain("nan-voxel", "values", _nan("flair"), "1 are NaN or infinite"),
    _brain("inf-voxel", "values", partial(_changed, "flair", partial(fault.one_voxel, INF)), "1 are NaN or infinite"),
    _brain("nan-everywhere", "values", _all("flair", NAN), "5760 are NaN or infinite"),
    _brain("constant", "values", _all("flair", 7), "all voxels are 7"),
    _brain("all-zero", "values", _all("flair", 0), "all voxels are 0"),
    _brain("t1w-nan", "values", _nan("t1w"), "1 are NaN", key="t1w", commands=NOT_INFERENCE),
    _brain("four-d", "shape", _twice("flair"), "expected a 3-D volume"),
    _brain("two-d-of-three", "shape", partial(_changed, "flair", lambda v: v[..., 1]), "expected",
           commands=NOT_INFERENCE),
    _brain("zero-size-axis", "shape", partial(_patched, "flair", 40, "<4h", (3, 40, 0, 3)), "0"),
    _brain("negative-size", "shape", partial(_patched, "flair", 40, "<4h", (3, 40, -48, 3)), "the shape (40, -48, 3)"),
    _brain("no-dimensions", "shape", partial(_patched, "flair", 40, "<4h", (0, 40, 48, 3)), "the shape (0,)"),
    _brain("zero-affine", "affine", partial(_placed, "flair", np.zeros_like), "invertible"),
    _brain("nan-affine", "affine", partial(_placed, "flair", partial(fault.put, (1, 1), NAN)), "nan"),
    _brain("singular-affine", "affine", _flat("flair"), "invertible"),
    _brain("huge-voxels", "affine", partial(fault.no_geometry, "flair", (4000, 4000, 6000)), "(4000, 4000, 6000)"),
    _brain("tiny-voxels", "affine", partial(fault.no_geometry, "flair", (0.004, 0.004, 0.006)), "unit (metres"),
    _brain("rgb", "type", partial(_changed, "flair", fault.as_rgb), "'R'"),
    _brain("complex", "type", _complex("flair"), "complex64"),
    _brain("unknown-type", "type", partial(_patched, "flair", 70, "<2h", (9999, 32)), "data code 9999"),
    _brain("bomb", "size", partial(fault.bomb, "flair", 30000), "announces 216000000000000 bytes"),
    _brain("small-bomb", "size", partial(fault.bomb, "flair", 1000), "announces 8000000000 bytes"),
    _brain("intercept-nan", "scaling", partial(fault.scaled, "flair", 2, NAN), "invalid intercept"),
    _brain("pair-other-size", "grid", partial(_changed, "flair", lambda v: v[1:]), "(39, 48, 3)",
           commands=NOT_INFERENCE),
    _brain("pair-other-place", "grid", partial(_placed, "flair", fault.shifted), "7 mm apart",
           commands=NOT_INFERENCE),
    _brain("pair-mirrored", "grid", partial(_placed, "flair", lambda a: a @ np.diag([-1, 1, 1, 1])), "orientation",
           commands=NOT_INFERENCE),
    _brain("no-flair", "datalist", partial(fault.without, "flair"), "expected 'flair'", key=None, commands=LISTED),
    _brain("number-as-path", "datalist", partial(fault.replaced, "flair", lambda _: 7), "under 'flair'", key=None),
    _brain("subject-in-all-sections", "datalist", partial(fault.replaced, "subject", lambda _: "7"),
           "'7' is in training, validation, test", key=None, commands=("check_data",)),
)  # fmt: skip

DMRI = (
    _dmri("truncated-nii-gz", "damaged", partial(_cut, "dwi", ".nii.gz", 0.6), "ended before"),
    _dmri("flipped-bit-stored", "damaged", partial(fault.flipped_bit, "dwi", 0), "CRC check failed"),
    _dmri("words", "damaged", partial(fault.words, "dwi", ".nii.gz"), "is not a gzip file"),
    _map("map-truncated", "damaged", partial(_cut, "odi", ".nii.gz", 0.6), "ended before", key="odi"),
    _mask("mask-without-content", "damaged", partial(_cut, "mask", ".nii.gz", 0), "mpty"),
    _mask("mask-flipped-bit", "damaged", partial(fault.flipped_bit, "mask", 0), "CRC check failed"),
    _dmri("directory", "no file", partial(fault.directory, "dwi"), "does not exist"),
    _mask("mask-broken-link", "no file", partial(fault.broken_link, "mask"), "does not exist"),
    _dmri("nan-voxel", "values", _nan("dwi"), "NaN or"),
    _dmri("all-zero", "values", _all("dwi", 0), "expected"),
    _dmri("three-d", "shape", partial(_changed, "dwi", lambda v: v[..., 0]), "4-D"),
    _dmri("five-d", "shape", _twice("dwi"), "4-D"),
    _dmri("volume-missing", "shape", fault.one_volume_less, "each of the 63 volumes", key=None),
    _dmri("singular-affine", "affine", _flat("dwi"), "invertible"),
    _dmri("complex", "type", _complex("dwi"), "complex64"),
    _bval("bval-missing", "gradients", lambda folder: folder / "bad.bval", "does not exist"),
    _bval("bval-short", "gradients", partial(fault.bval, lambda b: b[:-1]), "each of the 64 volumes"),
    _bval("bval-letters", "gradients", partial(fault.text, "bad.bval", "0 0 1000 ten 2000\n"), "'ten'"),
    _bval("bval-empty", "gradients", partial(fault.text, "bad.bval", ""), "the file is empty"),
    _bval("bval-nan", "gradients", partial(fault.bval, partial(fault.put, 9, NAN)), "1 are NaN"),
    _bval("bval-negative", "gradients", partial(fault.bval, partial(fault.put, 0, -5)), "got -5"),
    _bval("bval-b0-only", "gradients", partial(fault.bval, np.zeros_like), "the largest is 0"),
    _bval("bval-without-b0", "gradients", partial(fault.bval, lambda b: np.maximum(b, 1000)), "at least one b0"),
    _bval("bval-ms-per-um2", "gradients", partial(fault.bval, lambda b: b / 1000), "multiply values in ms/um2"),
    _bval("bval-s-per-m2", "gradients", partial(fault.bval, lambda b: b * 1e6), "divide values in s/m2"),
    _bvec("bvec-short", "gradients", partial(fault.bvec, lambda v: v[:, :-1]), "each of the 64 b-values"),
    _bvec("bvec-two-rows", "gradients", partial(fault.bvec, lambda v: v[:2]), "2 rows of 64"),
    _bvec("bvec-not-unit", "gradients", partial(fault.bvec, lambda v: 1.5 * v), "expected unit vectors"),
    _bvec("bvec-nan", "gradients", partial(fault.bvec, partial(fault.put, (0, -1), NAN)), "volume 63"),
    _bvec("bvec-ragged", "gradients", partial(fault.text, "bad.bvec", "1 0 0\n0 1\n0 0 1\n"), "rows of equal length"),
    _mask("mask-empty", "mask", _all("mask", 0), "expected a brain mask"),
    _mask("mask-other-grid", "mask", partial(_changed, "mask", lambda v: v[2:]), "(30, 36, 34)"),
    _mask("mask-other-place", "mask", partial(fault.coarse_mask, True), "7 mm apart"),
    _mask("mask-nan", "mask", _nan("mask"), "1 are NaN"),
    _mask("mask-four-d", "mask", _twice("mask"), "3-D"),
    _map("map-beyond-1", "map", partial(_changed, "ndi", lambda v: 1.5 * v), "fractions in [0, 1]", key="ndi"),
    _map("map-percent", "map", partial(_changed, "odi", lambda v: 100 * v), "fractions in [0, 1]", key="odi"),
    _map("map-negative", "map", partial(_changed, "fwf", lambda v: v - 0.5), "fractions in [0, 1]", key="fwf"),
    _map("map-nan", "map", _nan("odi"), "1 are NaN", key="odi"),
    _map("map-constant", "map", _all("odi", 0.5), "all voxels are 0.5", key="odi"),
    _map("map-coarse", "map", partial(_changed, "ndi", lambda v: v[::2, ::2, ::2]), "(16, 18, 17)", key="ndi"),
    _dmri("no-map", "datalist", partial(fault.without, "fwf"), "expected 'fwf'", key=None, commands=("training",)),
    _dmri("list-of-series", "datalist", partial(fault.replaced, "dwi", lambda path: [path, path]),
          "expected a path under 'dwi'", key=None),
)  # fmt: skip

SDSEG = (
    _sdseg("truncated-nii-gz", "damaged", partial(_cut, "image", ".nii.gz", 0.6), "ended before"),
    _sdseg("flipped-bit-stored", "damaged", partial(fault.flipped_bit, "image", 0), "CRC check failed"),
    _label("label-truncated", "damaged", partial(_cut, "label", ".nii.gz", 0.6), "ended before"),
    _sdseg("nan-voxel", "values", _nan("image"), "1 are NaN"),
    _sdseg("constant", "values", _all("image", 3), "all voxels are 3"),
    _sdseg("four-d", "shape", _twice("image"), "3-D volume"),
    _sdseg("nan-affine", "affine", partial(_placed, "image", partial(fault.put, (0, 3), NAN)), "nan"),
    _sdseg("rgb", "type", partial(_changed, "image", fault.as_rgb), "'R'"),
    _sdseg("directory", "no file", partial(fault.directory, "image"), "expected"),
    _label("label-fractions", "mask", partial(_changed, "label", lambda v: 0.3 * v), "fractions (0, 0.3)"),
    _label("label-negative", "mask", partial(_changed, "label", lambda v: -v), "got -1, 0"),
    _label("label-nan", "mask", _nan("label"), "1 are NaN"),
    _label("label-other-size", "grid", partial(_changed, "label", lambda v: v[1:]), "(39, 36, 3)"),
    _label("label-other-place", "grid", partial(_placed, "label", fault.shifted), "7 mm apart"),
)

# What is read, as documented: each beside its well-written twin, of which the same must be made.
READ = ("check_data", "inference")
_given: dict[str, _Make] = {
    "flair": partial(_changed, "flair", fault.as_given),
    "mask": partial(_changed, "mask", fault.as_given),
    "bvec": partial(fault.bvec, fault.as_given),
}
PAIRS: tuple[tuple[BadInput, _Make], ...] = (
    (
        _brain("two-forms", "affine", partial(fault.two_forms, "flair", False), "", commands=READ,
               accepted="of sform and qform the sform counts"),
        partial(fault.two_forms, "flair", True),
    ),
    (
        _brain("zero-voxel-size", "affine", partial(fault.no_geometry, "flair", (0, 4, 6)), "", commands=("inference",),
               accepted="nibabel takes 1 mm for a voxel size of 0, and says so"),
        partial(fault.no_geometry, "flair", (1, 4, 6)),
    ),
    (
        _brain("slope-nan", "scaling", partial(fault.scaled, "flair", NAN, NAN), "", commands=READ,
               accepted="a slope that is no number scales nothing, like the 0 of the NIfTI standard"),
        _given["flair"],
    ),
    (
        _brain("fourth-axis-of-1", "shape", partial(_changed, "flair", lambda v: v[..., None]), "",
               commands=("inference",), accepted="further axes of length 1 are dropped"),
        _given["flair"],
    ),
    (
        _bvec("bvec-columns", "gradients", partial(fault.bvec, np.transpose), "", commands=READ,
              accepted="three rows or three columns"),
        _given["bvec"],
    ),
    (
        _bvec("bvec-nan-at-b0", "gradients", partial(fault.bvec, partial(fault.put, (0, 0), NAN)), "", commands=READ,
              accepted="at b0 any vector is fine"),
        _given["bvec"],
    ),
    (
        _mask("mask-of-probabilities", "mask", partial(_changed, "mask", lambda v: 0.1 + 0.7 * v), "", commands=READ,
              accepted="cut at one half"),
        _given["mask"],
    ),
    (
        _mask("mask-coarse", "mask", partial(fault.coarse_mask, False), "", commands=READ,
              accepted="on the grid of the series or on the doubled one"),
        partial(fault.blocky_mask),
    ),
    (
        _sdseg("slope-zero", "scaling", partial(fault.scaled, "image", 0, 0), "", commands=READ,
               accepted="a slope of 0 scales nothing"),
        partial(fault.scaled, "image", 1, 0),
    ),
)  # fmt: skip
TWINS = {bad.name: twin for bad, twin in PAIRS}

VOLUMES: tuple[BadInput, ...] = (*BRAIN, *DMRI, *SDSEG, *(bad for bad, _ in PAIRS))
