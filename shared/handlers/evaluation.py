# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a generative model at the end of an evaluator's run: summary, one row per image, pictures."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.utils import ImageMetaKey

from shared.files import save_json
from shared.handlers.engine_items import engine_items, plain_value
from shared.handlers.evaluation_pictures import write_pictures
from shared.shares import write_together
from shared.tables import summary_text, write_table

logger = logging.getLogger(__name__)

# A measure takes what was collected and returns summary rows, per-image columns and, where it has them, tables; see
# Measurement and TabledMeasurement in shared.metrics.measures.
Measure = Callable[[Mapping[str, Any]], tuple[Any, ...]]


class _Row(NamedTuple):
    """What is kept of an item: images by name, float32 on the CPU; labels; plain values; digest of its path."""

    images: dict[str, torch.Tensor]
    labels: Mapping[str, Any] | None
    info: dict[str, Any]
    identity: str


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
    key). Where several processes share the list (``shared.shares``), rank 0 gets the images of all, in the order of the
    list, since the measures need the whole set; it measures and writes while the others wait.

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
        engine.add_event_handler(Events.STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _reset(self) -> None:
        self._rows: list[_Row] = []

    def _collect(self, engine: Any) -> None:
        outputs, items = engine_items(engine.state.output), engine_items(engine.state.batch)
        if len(items) != len(outputs):
            raise ValueError(f"engine.state.output: expected one per batch item ({len(items)}), got {len(outputs)}")
        rows = [self._row(output, item) for output, item in zip(outputs, items, strict=True)]
        if self.reconstruct is not None and not any("reconstruction" in row.images for row in rows):
            shown = [row for row in rows if "image" in row.images]
            if shown:
                real = torch.stack([row.images["image"] for row in shown]).clamp(0, 1)
                with torch.no_grad():
                    made = self.reconstruct(real.to(engine.state.device))
                for row, image in zip(shown, made, strict=True):
                    row.images["reconstruction"] = _plain(image)
        for name, key in {**self.keys, **self.extra_keys}.items():
            count = sum(name in row.images for row in rows)
            if count not in (0, len(rows)):
                raise ValueError(f"{key}: expected it in every item or in none, got {count} of {len(rows)}")
        for row in rows:
            self._check(row, (self._rows or rows)[0], len(self._rows))
            self._rows.append(row)

    def _row(self, output: Mapping[str, Any], item: Mapping[str, Any]) -> _Row:
        found = {
            name: _find_image(key, output, item, floating=name in self.keys)
            for name, key in {**self.keys, **self.extra_keys}.items()
        }
        info = {
            key: plain_value(key, item.get(key, output.get(key)), remedy="remove it from info_keys")
            for key in self.info_keys
        }
        images = {name: _plain(image) for name, image in found.items() if image is not None}
        return _Row(images, _labels(self.label_key, item), info, self._identity(found["image"], item))

    def _check(self, row: _Row, first: _Row, number: int) -> None:
        """Every image by itself and beside those of the first row."""
        for name, key in {**self.keys, **self.extra_keys}.items():
            if (name in row.images) != (name in first.images):
                raise ValueError(f"{key}: expected it in every item or in none, row {number} differs from row 0")
        side = next((first.images[name].shape for name in self.keys if name in first.images), None)
        for name, image in row.images.items():
            key, shape = (self.keys | self.extra_keys)[name], tuple(image.shape)
            if name in self.keys:
                if image.ndim != 3 or image.shape[0] != 1 or image.shape != side:
                    raise ValueError(
                        f"{key}: expected (1, H, W) of one size, {tuple(side or ())}, got {shape} in row {number}; "
                        "resize or crop the images in preprocessing"
                    )
            else:
                expected = (first.images[name].shape[0] if row is not first else "C", *(side or image.shape)[1:])
                if image.ndim != 3 or shape[1:] != expected[1:] or expected[0] not in ("C", shape[0]):
                    raise ValueError(
                        f"{key}: expected ({', '.join(map(str, expected))}), the size of the other images, got {shape} "
                        f"in row {number}; resize or crop the images together in preprocessing"
                    )
            if not torch.isfinite(image).all():
                raise ValueError(f"{key}: expected finite values, got NaN or Inf in row {number}")

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
        write_together(engine, self._rows, self._write)
        self._reset()

    def _write(self, rows: Sequence[_Row]) -> dict[str, float]:
        if not rows:
            raise ValueError("evaluation: expected at least one image, got none; check the section of datalist.json")
        for number, row in enumerate(rows):  # each process knows only its own rows
            self._check(row, rows[0], number)
        images = {name: torch.stack([row.images[name] for row in rows]) for name in rows[0].images}
        clamped = {}
        for name in self.keys.keys() & images.keys():
            clamped[name] = int(((images[name] < -1e-6) | (images[name] > 1 + 1e-6)).sum()) / images[name].numel()
            images[name] = images[name].clamp(0, 1)
        info = {key: [row.info[key] for row in rows] for key in self.info_keys}
        labels = [row.labels for row in rows]
        collected = {**images, "labels": labels, "info": info, "clamped": clamped, "features": {}}
        summary: list[dict[str, Any]] = []
        columns: dict[str, Sequence[Any]] = {}
        tables: dict[str, list[Mapping[str, Any]]] = {}
        for measure in self.measures:
            logger.info("evaluation: %s", getattr(measure, "name", type(measure).__name__))
            found, more, *further = measure(collected)
            summary += found
            columns.update(more)
            for name, lines in (further[0] if further else {}).items():
                tables.setdefault(name, []).extend(lines)
        save_json(summary, self.folder / "summary.json")
        self._write_per_image([row.identity for row in rows], info | columns)
        for name, lines in tables.items():
            self._write_table(self.folder / f"{name}.csv", lines)
        write_pictures(
            self.folder, images, columns, columns=self.columns, grid_images=self.grid_images, display=self.display
        )
        logger.info("evaluation of %d images, written to %s\n%s", len(rows), self.folder, summary_text(summary))
        return {row["name"]: row["value"] for row in summary if row["value"] is not None}

    def _write_per_image(self, identities: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
        for name, values in columns.items():
            if len(values) != len(identities):
                raise ValueError(f"{name}: expected a value for each of {len(identities)} images, got {len(values)}")
        lines = [
            {"row": row, "image_id": identity} | {name: values[row] for name, values in columns.items()}
            for row, identity in enumerate(identities)
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
    """A copy: of a view the whole batch would be kept, and sent to rank 0."""
    return image.detach().as_subclass(torch.Tensor).to("cpu", torch.float32, copy=True)
