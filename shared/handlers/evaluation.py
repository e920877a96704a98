# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a generative model at the end of an evaluator's run: summary, one row per image, pictures."""

from __future__ import annotations

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
from monai.data import MetaTensor
from monai.utils import ImageMetaKey

from shared.files import save_json
from shared.handlers.engine_items import engine_items, plain_value
from shared.handlers.evaluation_pictures import write_pictures
from shared.tables import summary_text, write_table

logger = logging.getLogger(__name__)

# A measure takes what was collected and returns summary rows, per-image columns and, where it has them, tables; see
# Measurement and TabledMeasurement in shared.metrics.measures.
Measure = Callable[[Mapping[str, Any]], tuple[Any, ...]]


class GenerativeEvaluation:
    """Collect images from an evaluator's iterations and, when it has completed, measure and write them.

    ``monai.handlers.MetricsSaver`` does not fit: ignite metrics are averages over images, while diversity, distribution
    distances and the memorisation check are properties of the whole set, and reports need intervals, n and pictures.

    Writes into ``output_dir/evaluation``, each file whole or not at all:

    - ``summary.json``: rows ``{"name", "value", "ci_low", "ci_high", "n", "note"}``;
    - ``per_image.csv``: a row per image: its number, the first 12 digits of the SHA-256 of its path, and the measures'
      columns. Neither file names nor subjects; but whoever has the data set, or can guess its paths, can recompute the
      digits: they are pseudonyms;
    - ``<name>.csv``: tables that measures hand over, such as ``per_subject.csv``;
    - pictures, see :mod:`shared.handlers.evaluation_pictures`.

    The values also go to ``engine.state.metrics``. All images are kept in memory until then (4 H W bytes per image and
    key). Runs in one process: the measures need the whole set.

    Args:
        output_dir: run folder.
        measures: objects of :mod:`shared.metrics.measures`, or the like, in the order of the summary.
        image_key: real image, (1, H, W), looked up in the engine's output, then in its batch.
        pred_key: generated sample; likewise.
        reconstruction_key: reconstruction; likewise, and optional.
        reconstruct: makes the reconstruction from real images (B, 1, H, W) where the key is absent; None leaves it out.
        extra_keys: name under which measures find it -> key of a further image (C, H, W) of any channel count, looked
            up like the others, such as ``{"condition": "flair", "mask": "mask"}``. Kept as it is; not collected where
            no item has it.
        info_keys: item keys of plain values (text or numbers), such as ``["subject", "slice"]``. Measures find the
            lists in ``collected["info"]``; the files have a column each, in which text is replaced by the first 12
            digits of its SHA-256.
        display: turns pictures (N, 1, H, W) the way people look at them; None shows them as they are stored.
        label_key: labels of the item in the batch, a dictionary or its JSON text
            (``shared.transforms.labels.LabelsToTextd``); optional.
        path_key: item key with the image's path; None takes the image's metadata.
        dataset_dir: paths are hashed relative to this folder, so that machines agree; None hashes them as they are.
        columns: pictures in a row of the grids.
        grid_images: most pictures of a kind in a grid.

    Raises:
        ValueError: when an image has another shape than the first, or a value that is not finite, or labels are no
            dictionary, or an info value is neither text nor a number; the message starts with the key.
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
        extra_keys: Mapping[str, str] | None = None,
        info_keys: Sequence[str] = (),
        display: Callable[[torch.Tensor], torch.Tensor] | None = None,
        label_key: str = "labels",
        path_key: str | None = None,
        dataset_dir: str | os.PathLike | None = None,
        columns: int = 8,
        grid_images: int = 32,
    ) -> None:
        self.folder = Path(output_dir) / "evaluation"
        self.measures = list(measures)
        self.keys = {"image": image_key, "pred": pred_key, "reconstruction": reconstruction_key}
        self.extra_keys, self.info_keys, self.display = dict(extra_keys or {}), tuple(info_keys), display
        if taken := self.extra_keys.keys() & {*self.keys, "labels", "info", "clamped", "features"}:
            raise ValueError(f"extra_keys: expected names of their own, got {sorted(taken)}; choose other names")
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
        self._extras: dict[str, list[torch.Tensor]] = {name: [] for name in self.extra_keys}
        self._info: dict[str, list[Any]] = {key: [] for key in self.info_keys}
        self._outside = dict.fromkeys(self.keys, 0)
        self._labels: list[Any] = []
        self._ids: list[str] = []

    def _start(self, engine: Engine) -> None:
        if idist.get_world_size() > 1:
            raise RuntimeError("GenerativeEvaluation: expected one process, got several; run it without torchrun")
        self._reset()

    def _collect(self, engine: Any) -> None:
        outputs, items = engine_items(engine.state.output), engine_items(engine.state.batch)
        if len(items) != len(outputs):
            raise ValueError(f"engine.state.output: expected one per batch item ({len(items)}), got {len(outputs)}")
        keys = {**self.keys, **self.extra_keys}
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in keys}
        for output, item in zip(outputs, items, strict=True):
            image = None
            for name, key in keys.items():
                value = _find_image(key, output, item, floating=name in self.keys)
                image = value if name == "image" else image
                if value is not None:
                    rows[name].append(value)
            self._labels.append(_labels(self.label_key, item))
            self._ids.append(self._identity(image, item))
            for key, values in self._info.items():
                value = item.get(key, output.get(key))
                values.append(plain_value(key, value, remedy="remove it from info_keys"))
        if self.reconstruct is not None and not rows["reconstruction"] and rows["image"]:
            real = torch.stack([_plain(image) for image in rows["image"]]).clamp(0, 1)
            with torch.no_grad():
                rows["reconstruction"] = list(self.reconstruct(real.to(engine.state.device)))
        for name, images in rows.items():
            if images and len(images) != len(outputs):
                raise ValueError(
                    f"{keys[name]}: expected it in every item or in none, got {len(images)} of {len(outputs)}"
                )
            for image in images:
                (self._add if name in self.keys else self._add_extra)(name, _plain(image))

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

    def _add_extra(self, name: str, image: torch.Tensor) -> None:
        row, key = len(self._extras[name]), self.extra_keys[name]
        side = next((images[0].shape[1:] for images in self._images.values() if images), image.shape[1:])
        expected = (self._extras[name][0].shape[0] if row else "C", *side)
        if image.ndim != 3 or image.shape[1:] != side or (row and image.shape[0] != expected[0]):
            raise ValueError(
                f"{key}: expected ({', '.join(map(str, expected))}), the size of the other images, got "
                f"{tuple(image.shape)} in row {row}; resize or crop the images together in preprocessing"
            )
        if not torch.isfinite(image).all():
            raise ValueError(f"{key}: expected finite values, got NaN or Inf in row {row}")
        self._extras[name].append(image)

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
        return _digest(Path(str(path)).as_posix())

    def _finish(self, engine: Any) -> None:
        if not self._ids:
            raise ValueError("evaluation: expected at least one image, got none; check the section of datalist.json")
        images = {name: torch.stack(values) for name, values in self._images.items() if values}
        clamped = {name: self._outside[name] / values.numel() for name, values in images.items()}
        images |= {name: torch.stack(values) for name, values in self._extras.items() if values}
        collected = {**images, "labels": self._labels, "info": self._info, "clamped": clamped, "features": {}}
        summary: list[dict[str, Any]] = []
        columns: dict[str, Sequence[Any]] = {}
        tables: dict[str, list[Mapping[str, Any]]] = {}
        for measure in self.measures:
            logger.info("evaluation: %s", getattr(measure, "name", type(measure).__name__))
            rows, more, *further = measure(collected)
            summary += rows
            columns.update(more)
            for name, lines in (further[0] if further else {}).items():
                tables.setdefault(name, []).extend(lines)
        save_json(summary, self.folder / "summary.json")
        self._write_per_image(columns)
        for name, lines in tables.items():
            self._write_table(self.folder / f"{name}.csv", lines)
        write_pictures(
            self.folder, images, columns, columns=self.columns, grid_images=self.grid_images, display=self.display
        )
        engine.state.metrics.update({row["name"]: row["value"] for row in summary if row["value"] is not None})
        logger.info("evaluation of %d images, written to %s\n%s", len(self._ids), self.folder, summary_text(summary))
        self._reset()

    def _write_per_image(self, columns: Mapping[str, Sequence[Any]]) -> None:
        for name, values in columns.items():
            if len(values) != len(self._ids):
                raise ValueError(f"{name}: expected a value for each of {len(self._ids)} images, got {len(values)}")
        lines = [
            {"row": row, "image_id": identity}
            | {name: values[row] for name, values in (self._info | dict(columns)).items()}
            for row, identity in enumerate(self._ids)
        ]
        self._write_table(self.folder / "per_image.csv", lines)

    def _write_table(self, path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """CSV; what would name a person is hashed."""
        write_table(path, [{name: self._cell(name, value) for name, value in line.items()} for line in lines])

    def _cell(self, name: str, value: Any) -> Any:
        if name in self.info_keys and isinstance(value, str):
            return _digest(value) if value else ""
        return value


def _find_image(key: str, *places: Mapping[str, Any], floating: bool = True) -> torch.Tensor | None:
    """The image under ``key`` in the first place that has one; ``floating``: token ids under the same key are none."""
    for place in places:
        value = place.get(key)
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or not floating):
            return value
    return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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
