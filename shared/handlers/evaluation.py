# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a generative model at the end of an evaluator's run: summary, one row per image, pictures."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor, decollate_batch
from monai.utils import ImageMetaKey

from shared.files import atomic_path, save_json
from shared.handlers.previews import save_grid

logger = logging.getLogger(__name__)

# A measure takes what was collected and returns (summary rows, per-image columns); see shared.metrics.measures.
Measure = Callable[[Mapping[str, Any]], tuple[list[dict[str, Any]], dict[str, Sequence[Any]]]]


class GenerativeEvaluation:
    """Collect images from an evaluator's iterations and, when it has completed, measure and write them.

    ``monai.handlers.MetricsSaver`` does not fit: ignite metrics are averages over images, while diversity, distribution
    distances and the memorisation check are properties of the whole set, and reports need intervals, n and pictures.

    Writes into ``output_dir/evaluation``, each file whole or not at all:

    - ``summary.json``: rows ``{"name", "value", "ci_low", "ci_high", "n", "note"}``;
    - ``per_image.csv``: a row per image: its number, the first 12 digits of the SHA-256 of its path, and the measures'
      columns. Neither file names nor subjects; but whoever has the data set, or can guess its paths, can recompute the
      digits: they are pseudonyms;
    - ``samples.png``; ``reconstructions.png`` (real over reconstruction); ``failures.png`` (worst reconstructions under
      their originals, then samples whose finding is not the prompted one under the real image of that row).

    The values also go to ``engine.state.metrics``. All images are kept in memory until then (4 H W bytes per image and
    key). Runs in one process: the measures need the whole set.

    Args:
        output_dir: run folder.
        measures: objects of :mod:`shared.metrics.measures`, or the like, in the order of the summary.
        image_key: real image, (1, H, W), looked up in the engine's output, then in its batch.
        pred_key: generated sample; likewise.
        reconstruction_key: reconstruction; likewise, and optional.
        reconstruct: makes the reconstruction from real images (B, 1, H, W) where the key is absent; None leaves it out.
        label_key: labels of the item in the batch, a dictionary or its JSON text
            (``shared.transforms.labels.LabelsToTextd``); optional.
        path_key: item key with the image's path; None takes the image's metadata.
        dataset_dir: paths are hashed relative to this folder, so that machines agree; None hashes them as they are.
        columns: pictures in a row of the grids.
        grid_images: most pictures of a kind in a grid.

    Raises:
        ValueError: when an image has another shape than the first, or a value that is not finite, or labels are no
            dictionary; the message starts with the key.
        RuntimeError: when run by several processes.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        measures: Sequence[Measure],
        *,
        image_key: str = "image",
        pred_key: str = "pred",
        reconstruction_key: str = "reconstruction",
        reconstruct: Callable[[torch.Tensor], torch.Tensor] | None = None,
        label_key: str = "labels",
        path_key: str | None = None,
        dataset_dir: str | os.PathLike | None = None,
        columns: int = 8,
        grid_images: int = 32,
    ) -> None:
        self.folder = Path(output_dir) / "evaluation"
        self.measures = list(measures)
        self.keys = {"image": image_key, "pred": pred_key, "reconstruction": reconstruction_key}
        self.reconstruct, self.label_key, self.path_key = reconstruct, label_key, path_key
        self.dataset_dir = dataset_dir
        self.columns, self.grid_images = columns, grid_images
        self._reset()

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator (pass the handler in ``val_handlers``)."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _reset(self) -> None:
        self._images: dict[str, list[torch.Tensor]] = {name: [] for name in self.keys}
        self._outside = dict.fromkeys(self.keys, 0)
        self._labels: list[Any] = []
        self._ids: list[str] = []

    def _start(self, engine: Engine) -> None:
        if idist.get_world_size() > 1:
            raise RuntimeError("GenerativeEvaluation: expected one process, got several; run it without torchrun")
        self._reset()

    def _collect(self, engine: Any) -> None:
        outputs, items = _items(engine.state.output), _items(engine.state.batch)
        if len(items) != len(outputs):
            raise ValueError(f"engine.state.output: expected one per batch item ({len(items)}), got {len(outputs)}")
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in self.keys}
        for output, item in zip(outputs, items, strict=True):
            image = None
            for name, key in self.keys.items():
                value = _find_image(key, output, item)
                image = value if name == "image" else image
                if value is not None:
                    rows[name].append(value)
            self._labels.append(_labels(self.label_key, item))
            self._ids.append(self._identity(image, item))
        if self.reconstruct is not None and not rows["reconstruction"] and rows["image"]:
            real = torch.stack([_plain(image) for image in rows["image"]]).clamp(0, 1)
            with torch.no_grad():
                rows["reconstruction"] = list(self.reconstruct(real.to(engine.state.device)))
        for name, images in rows.items():
            if images and len(images) != len(outputs):
                key = self.keys[name]
                raise ValueError(f"{key}: expected it in every item or in none, got {len(images)} of {len(outputs)}")
            for image in images:
                self._add(name, _plain(image))

    def _add(self, name: str, image: torch.Tensor) -> None:
        row, key = len(self._images[name]), self.keys[name]
        first = next((images[0] for images in self._images.values() if images), image)
        if image.ndim != 3 or image.shape[0] != 1 or image.shape != first.shape:
            raise ValueError(
                f"{key}: expected (1, H, W) of one size, {tuple(first.shape)}, got {tuple(image.shape)} in row {row}; "
                "resize or crop the images in preprocessing"
            )
        if not torch.isfinite(image).all():
            raise ValueError(f"{key}: expected finite values, got NaN or Inf in row {row}")
        self._outside[name] += int(((image < -1e-6) | (image > 1 + 1e-6)).sum())
        self._images[name].append(image.clamp(0, 1))

    def _identity(self, image: Any, item: Mapping[str, Any]) -> str:
        """First 12 digits of the SHA-256 of the path, "" where none is known."""
        path: Any = item.get(self.path_key) if self.path_key is not None else None
        for candidate in (image, *item.values()) if path is None else ():
            if isinstance(candidate, MetaTensor) and candidate.meta.get(ImageMetaKey.FILENAME_OR_OBJ):
                path = candidate.meta[ImageMetaKey.FILENAME_OR_OBJ]
                break
        if path is None:
            return ""
        if self.dataset_dir is not None:
            path = os.path.relpath(path, self.dataset_dir)
        return hashlib.sha256(Path(str(path)).as_posix().encode()).hexdigest()[:12]

    def _finish(self, engine: Any) -> None:
        if not self._ids:
            raise ValueError("evaluation: expected at least one image, got none; check the section of datalist.json")
        images = {name: torch.stack(values) for name, values in self._images.items() if values}
        clamped = {name: self._outside[name] / values.numel() for name, values in images.items()}
        collected = {**images, "labels": self._labels, "clamped": clamped, "features": {}}
        summary: list[dict[str, Any]] = []
        columns: dict[str, Sequence[Any]] = {}
        for measure in self.measures:
            logger.info("evaluation: %s", getattr(measure, "name", type(measure).__name__))
            rows, more = measure(collected)
            summary += rows
            columns.update(more)
        save_json(summary, self.folder / "summary.json")
        self._write_per_image(columns)
        self._write_grids(images, columns)
        engine.state.metrics.update({row["name"]: row["value"] for row in summary if row["value"] is not None})
        logger.info("evaluation of %d images, written to %s\n%s", len(self._ids), self.folder, _table(summary))
        self._reset()

    def _write_per_image(self, columns: Mapping[str, Sequence[Any]]) -> None:
        for name, values in columns.items():
            if len(values) != len(self._ids):
                raise ValueError(f"{name}: expected a value for each of {len(self._ids)} images, got {len(values)}")
        with atomic_path(self.folder / "per_image.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "image_id", *columns])
            for row, identity in enumerate(self._ids):
                writer.writerow([row, identity, *(_cell(values[row]) for values in columns.values())])

    def _write_grids(self, images: Mapping[str, torch.Tensor], columns: Mapping[str, Sequence[Any]]) -> None:
        grids: dict[str, list[torch.Tensor]] = {"samples": [], "reconstructions": [], "failures": []}
        some = slice(self.grid_images)
        if "pred" in images:
            grids["samples"].append(images["pred"][some])
        if {"image", "reconstruction"} <= images.keys():
            grids["reconstructions"] += self._over(images["image"][some], images["reconstruction"][some])
            quality = columns.get("reconstruction_ms_ssim")
            if quality is not None:
                worst = sorted(range(len(quality)), key=quality.__getitem__)[: self.columns]
                grids["failures"] += self._over(images["image"][worst], images["reconstruction"][worst])
        prompted, predicted = (columns.get(f"{kind}_finding", []) for kind in ("prompted", "predicted"))
        wrong = [i for i, (p, q) in enumerate(zip(prompted, predicted, strict=True)) if p is not None and p != q]
        wrong = wrong[: self.grid_images]
        if wrong:
            grids["failures"] += self._over(images.get("image", images["pred"])[wrong], images["pred"][wrong])
        for name, parts in grids.items():
            path = self.folder / f"{name}.png"
            if parts:
                save_grid(torch.cat(parts), path, columns=self.columns)
            else:  # a picture of an earlier evaluation in this folder would be misread
                path.unlink(missing_ok=True)

    def _over(self, upper: torch.Tensor, lower: torch.Tensor) -> list[torch.Tensor]:
        """Alternating full grid rows of ``upper`` and ``lower``; white where a row is not full."""
        parts = []
        for pair in zip(upper.split(self.columns), lower.split(self.columns), strict=True):
            for part in pair:
                parts += [part, part.new_ones(self.columns - len(part), *part.shape[1:])]
        return parts


def _items(content: Any) -> list[Mapping[str, Any]]:
    """A decollated list as it is; a batch dictionary taken apart."""
    if isinstance(content, Mapping):
        return decollate_batch(dict(content))
    return list(content)


def _find_image(key: str, *places: Mapping[str, Any]) -> torch.Tensor | None:
    """The floating-point image under ``key`` in the first place that has one (token ids under the same key are not)."""
    for place in places:
        value = place.get(key)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    return None


def _labels(key: str, item: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The item's label dictionary; None where it has none."""
    value = item.get(key)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{key}: expected a dictionary as JSON text, got {value!r} ({error})") from error
    if value is None or isinstance(value, Mapping):
        return value
    raise ValueError(f"{key}: expected a dictionary of labels, got {value!r}; write one with LabelsToTextd")


def _plain(image: torch.Tensor) -> torch.Tensor:
    return image.detach().as_subclass(torch.Tensor).to("cpu", torch.float32)


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def _table(summary: Sequence[Mapping[str, Any]]) -> str:
    width = max((len(row["name"]) for row in summary), default=0)
    lines = []
    for row in summary:
        value, low, high = ("-" if row[k] is None else f"{row[k]:.4g}" for k in ("value", "ci_low", "ci_high"))
        lines.append(f"{row['name']:<{width}}  {value:>9}  [{low}, {high}]  n = {row['n']}")
    return "\n".join(lines)
