# SPDX-License-Identifier: Apache-2.0
"""NODDI maps on disk: one NIfTI file each, at twice the resolution, in the axis order of the diffusion MRI."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import MetaKeys
from nibabel import orientations

from shared.files import save_json, sha256_of_file
from shared.inferers import chosen, one_of
from shared.nifti_files import write_nifti
from shared.noddi_items import name_of
from shared.pair_checks import grid_distance
from shared.pictures import INTENDED_USE, made_with
from shared.resolution import doubled_affine
from shared.result_files import ResultFiles, path_of, remove_earlier
from shared.transforms.label_answers import answer_with_file, is_monai_label_request

# Millimetres that two programs may put the same voxel apart by rounding.
_TOLERANCE = 1e-2
# Settings that decide nothing where nothing is drawn.
_OF_DRAWN = ("seed", "num_samples", "num_inference_steps", "scheduler")


class SaveNoddiMapsd(MapTransform):
    """Write `<name>_ndi.nii.gz`, `<name>_odi.nii.gz`, `<name>_fwf.nii.gz` and `<name>.json` beside them.

    With standard deviations also `<name>_ndi_sd.nii.gz`, .... Files are float32 on the grid with twice the resolution
    of the diffusion MRI over the same field of view, with its axis order (features are in RAS orientation, files go
    back to that of the input) and sform = qform; a sheared affine, which a qform cannot hold, is in the sform alone.
    Maps are clipped to [0, 1], standard deviations to 0 and more.

    `monai.transforms.SaveImaged` does not fit: it writes all channels into one 4-D file (and with `resample` moves
    voxels between them, as it takes them for an axis of space), in place, names nothing as synthetic, and overwrites
    the maps of another input of the same name.

    The same input overwrites what an earlier run wrote for it. Of another input with the same name the files are kept
    and the new ones are called `<name>_1_ndi.nii.gz`, .... A file that no run wrote, such as a true map, is never
    overwritten.

    Afterwards the key holds what was saved, still in the orientation of the features: a MetaTensor whose metadata are
    those of the doubled grid (`affine`, and of the file `original_affine` and `spatial_shape`), so that MONAI's own
    transforms turn a map to the file's axes too.

    In a MONAI Label request nothing is written to `output_dir`: the answer is one float32 file on the same grid, also
    to a viewer that asks for `.nrrd` and `uint8`. A client chooses by `map`: `all` (the default), the maps along a
    fourth axis in the order of `map_names`, then their standard deviations; or the name of one, 3-D, which is then the
    file of a run byte for byte. The JSON part of the answer is that of a run, with the mean of each map in the brain.

    Args:
        keys: maps `(M, 2X, 2Y, 2Z)` in [0, 1] for the M names, or `(2M, ...)`: means, then standard deviations.
        output_dir: folder, made when missing.
        reference_key: features `(F, X, Y, Z)` as `shared.transforms.diffusion_mri` loads them: a MetaTensor with its
            affine, `original_affine` (of the file) and `filename_or_obj`.
        map_names: of the channels, used in the names of files.
        source: folder below which the inputs lie: their subfolders are kept below `output_dir`; a file or `None`: all
            results go into `output_dir` itself.
        name_key: key of the name of each item (`shared.noddi_items`); an item without it is called after its file.
        brain_key: brain `(1, 2X, 2Y, 2Z)` on the grid of the maps, in which a request gets the means.
        weights_path: file whose SHA-256 is stated; `None` states null.
        settings: stated in the JSON: seed, num_inference_steps, num_samples, deterministic, ... Of a deterministic
            result what belongs to drawing is null.

    Raises:
        ValueError: maps of another shape or grid than the doubled one, features without their metadata, values
            that are not finite, a file in the way that no run wrote, or a `map` that is none of these.
        FileNotFoundError: no such weights.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        *,
        output_dir: str | os.PathLike,
        reference_key: str = "image",
        map_names: Sequence[str] = ("ndi", "odi", "fwf"),
        source: str | os.PathLike | None = None,
        name_key: str = "name",
        brain_key: str = "brain",
        weights_path: str | os.PathLike | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(keys)
        self.map_names = tuple(map_names)
        if not self.map_names or len(set(self.map_names)) != len(self.map_names):
            raise ValueError(f"map_names: expected one different name per map, got {list(map_names)}.")
        self.results = ResultFiles(output_dir, source)
        self.reference_key, self.name_key, self.brain_key = reference_key, name_key, brain_key
        self.weights_path = weights_path
        self.settings = {name: chosen(value) for name, value in settings.items()}
        if str(self.settings.get("deterministic")).lower() == "true":  # a command line may hand over text
            self.settings |= {name: None for name in _OF_DRAWN if name in self.settings}
        self._made_with: dict[str, Any] | None = None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            features = self._features(d, key)
            path = str(path_of(features))
            maps = self._maps(d, key, features)
            if is_monai_label_request(d):
                self._answer(d, key, maps, path, features)
                continue
            self._save(maps, path, features, str(d.get(self.name_key) or name_of(path)))
            d[key] = MetaTensor(maps, affine=torch.from_numpy(_affine_of(features)), meta=_meta_of(features, path))
        return d

    def _features(self, data: Mapping[Hashable, Any], key: Hashable) -> MetaTensor:
        features = data.get(self.reference_key)
        wanted = ("filename_or_obj", MetaKeys.ORIGINAL_AFFINE)
        missing = [str(name) for name in wanted if not isinstance(features, MetaTensor) or name not in features.meta]
        if missing or path_of(features) is None:
            raise ValueError(
                f"{self.reference_key}: expected features with the file and grid that {key} goes back to "
                f"({' and '.join(wanted)} in the metadata), got {_kind(features)} without "
                f"{' and '.join(missing) or wanted[0]}; load with LoadDiffusionFeaturesd and keep MetaTensors."
            )
        assert isinstance(features, MetaTensor)
        return features

    def _maps(self, data: Mapping[Hashable, Any], key: Hashable, features: MetaTensor) -> torch.Tensor:
        """Checked and clipped, float32 on the CPU."""
        path, pred, count = path_of(features), data[key], len(self.map_names)
        maps = torch.as_tensor(pred).detach().cpu().as_subclass(torch.Tensor).float()
        grid = tuple(2 * n for n in features.shape[1:])
        if maps.ndim != 4 or len(maps) not in (count, 2 * count) or tuple(maps.shape[1:]) != grid:
            raise ValueError(
                f"{key}: expected ({count} or {2 * count}, {', '.join(map(str, grid))}), twice the resolution of the "
                f"features of {path}, got {tuple(maps.shape)}; give the maps as the sampler made them."
            )
        if isinstance(pred, MetaTensor):
            _check_affine(pred, key, features)
        if not torch.isfinite(maps).all():
            raise ValueError(f"{key}: expected finite values for {path}, got NaN or infinity; try --amp False.")
        # What follows the means are standard deviations, which have no upper end.
        return torch.cat((maps[:count].clamp(0.0, 1.0), maps[count:].clamp(min=0.0)))

    def _save(self, maps: torch.Tensor, path: str, features: MetaTensor, name: str) -> None:
        values, affine = self._in_file(maps, path, features)
        endings = {kind: f"_{kind}.nii.gz" for kind in values}
        description = self._description(path, affine)
        source_sha256 = description["source_sha256"]
        stem = self.results.claim(path, name, source_sha256=source_sha256, endings=list(endings.values()))
        files = {kind: stem.name + ending for kind, ending in endings.items()}
        # The JSON first: it says whose the other files are, should the process end in between.
        sidecar = stem.with_name(f"{stem.name}.json")
        remove_earlier(sidecar, set(files.values()))
        # The name of a file may be that of a patient: in the JSON beside the maps, not inside what is passed on.
        save_json({**description, "source": Path(path).name, "files": files}, sidecar)
        for kind, channel in values.items():
            write_nifti(channel, stem.with_name(files[kind]), like=path, affine=affine)

    def _answer(
        self, data: dict[Hashable, Any], key: Hashable, maps: torch.Tensor, path: str, features: MetaTensor
    ) -> None:
        wanted = one_of("map", data.get("map", "all"), ["all", *self.map_names])
        values, affine = self._in_file(maps, path, features)
        kinds = list(values) if wanted == "all" else [wanted]
        voxels = np.stack([values[kind] for kind in kinds], axis=-1) if wanted == "all" else values[wanted]
        result = {
            **self._description(path, affine),
            "maps": kinds,
            "shape": list(voxels.shape),
            "mean_in_brain": self._means(maps, data.get(self.brain_key)),
        }
        answer_with_file(
            data,
            key,
            lambda name: write_nifti(voxels, name, like=path, affine=affine),
            suffix=".nii.gz",
            result=result,
            image_key=self.reference_key,
        )

    def _means(self, maps: torch.Tensor, brain: Any) -> dict[str, float] | None:
        """Of each map inside the brain, None without one."""
        inside = None if brain is None else torch.as_tensor(brain).as_subclass(torch.Tensor)[0] > 0
        if inside is None or not inside.any():
            return None
        return {name: float(map_[inside].double().mean()) for name, map_ in zip(self.map_names, maps, strict=False)}

    def _in_file(self, maps: torch.Tensor, path: str, features: MetaTensor) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Maps by name, then their standard deviations, and their affine, in the axis order of the file."""
        original = np.asarray(features.meta[MetaKeys.ORIGINAL_AFFINE], dtype=np.float64)
        values, affine = _as_in_file(maps.numpy(), _affine_of(features), original, path=path)
        kinds = [*self.map_names, *(f"{name}_sd" for name in self.map_names)]
        return dict(zip(kinds, values, strict=False)), affine

    def _description(self, path: str, affine: np.ndarray) -> dict[str, Any]:
        # Hashing large weights takes seconds: once, not for each volume.
        if self._made_with is None:
            self._made_with = {**made_with(self.weights_path), "nibabel_version": nibabel.__version__}
        return {
            "synthetic": True,
            "intended_use": INTENDED_USE,
            "unit": "fraction, [0, 1]",
            "voxel_mm": [round(float(size), 6) for size in np.linalg.norm(affine[:3, :3], axis=0)],
            "source_sha256": sha256_of_file(path),
            **self.settings,
            **self._made_with,
        }


def _affine_of(features: MetaTensor) -> np.ndarray:
    """Of the doubled grid in the orientation of the features."""
    return doubled_affine(features.affine.detach().cpu())


def _meta_of(features: MetaTensor, path: str) -> dict[str, Any]:
    """Metadata of maps, as if they had been loaded from a file on the doubled grid and turned like the features."""
    meta = {name: value for name, value in features.meta.items() if name != MetaKeys.AFFINE}
    meta[MetaKeys.ORIGINAL_AFFINE] = doubled_affine(meta[MetaKeys.ORIGINAL_AFFINE])
    meta[MetaKeys.SPATIAL_SHAPE] = np.asarray(_doubled_shape(path))
    return meta


def _doubled_shape(path: str) -> tuple[int, ...]:
    return tuple(2 * int(n) for n in nibabel.load(path).shape[:3])  # type: ignore[attr-defined]


def _check_affine(pred: MetaTensor, key: Hashable, features: MetaTensor) -> None:
    """Refuse maps that were moved; those of a sampler still have the affine of the features they were made from."""
    affine = pred.affine.detach().cpu().double().numpy()
    known = [_affine_of(features), features.affine.detach().cpu().double().numpy()]
    apart = [grid_distance(pred.shape[1:], affine, other) for other in known]
    if min(apart) > _TOLERANCE:
        raise ValueError(
            f"{key}: expected the affine of the doubled grid of {path_of(features)} (or that of its features, as the "
            f"sampler leaves it), got one that puts voxels up to {min(apart):.3g} mm apart; save before other spatial "
            "transforms."
        )


def _as_in_file(
    maps: np.ndarray, affine: np.ndarray, original: np.ndarray, *, path: str
) -> tuple[np.ndarray, np.ndarray]:
    """Maps `(N, 2X, 2Y, 2Z)` turned to the axis order of the file, and their affine: the doubled one of the file."""
    turn = orientations.ornt_transform(orientations.io_orientation(affine), orientations.io_orientation(original))
    turned = affine @ orientations.inv_ornt_aff(turn, maps.shape[1:])
    wanted = doubled_affine(original)
    values = np.stack([orientations.apply_orientation(channel, turn) for channel in maps])
    apart = grid_distance(values.shape[1:], turned, wanted)
    stored = _doubled_shape(path)
    if apart > _TOLERANCE or values.shape[1:] != stored:
        raise ValueError(
            f"{path}: expected features on the grid of the file, turned to another orientation at most, got maps "
            f"{values.shape[1:]} for {stored} with voxels up to {apart:.3g} mm apart; leave out transforms that crop, "
            "pad or resample the features."
        )
    return values, wanted


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
