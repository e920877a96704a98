# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a segmentation at the end of an evaluator's run: every image, beside baselines and a ceiling."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor

from shared.handlers.cost import CallCost, wait_for
from shared.handlers.engine_items import engine_items, plain_value
from shared.handlers.segmentation_results import Case, MeasuredImage, SegmentationResults
from shared.metrics.segmentation import foreground_names, mask_scores
from shared.metrics.segmentation_baselines import Segmenter
from shared.metrics.segmentation_ceiling import CEILING, reconstructed_mask
from shared.metrics.segmentation_table import ItemScore
from shared.metrics.stability import StabilityStudy
from shared.segmentation_probability import mask_of
from shared.shares import write_together
from shared.transforms.in_plane import resize_in_plane

ONE_SAMPLE = "one sample"
_SLICES = 16  # of a volume that are resized at a time; several classes at native size would fill the memory


class SegmentationEvaluation:
    """Score each image or volume as it comes and, when the evaluator has completed, write what was found.

    ``monai.handlers.MeanDice``, ``SurfaceDistance`` and ``MetricsSaver`` do not fit: they know one prediction at one
    size, average what is infinite, and give neither intervals over groups nor comparisons.

    Needs batches of one item, since labels have their native sizes, with ``image`` (1 or 3, h, w[, Z]) in [0, 1] and
    ``pred`` (num_samples * N, h, w[, Z]) probabilities at the working size, sample after sample; ``label``
    (1, H, W[, Z]) class index at native size, upright, a ``MetaTensor`` where it is a volume; ``name``; optionally
    ``group``. Each is looked up in the engine's output, then in its batch.

    Methods of the table: "one sample", the first; "mean of K samples" of their probabilities, for K > 1; each baseline;
    "autoencoder's ceiling". What is written: see :class:`~shared.handlers.segmentation_results.SegmentationResults`;
    conventions: ``shared.metrics.segmentation.CONVENTIONS``. Values also go to ``engine.state.metrics``. Images at the
    working size are kept, in 8 bits, until the end; of volumes one slice. Where several processes share the list
    (``shared.shares``), rank 0 gets what all measured, in the order of the list, and writes it.

    Args:
        output_dir: run folder.
        num_classes: N: 1 for one foreground class, else the number of classes including background 0.
        class_names: see :func:`shared.metrics.segmentation.foreground_names`.
        num_samples: K samples in ``pred``.
        threshold: of the probability of one foreground class.
        baselines: name in the table -> :mod:`shared.metrics.segmentation_baselines`.
        reconstruct: pictures of masks (B, 3, h, w) in {0, 1} -> reconstructions in [0, 1], on the engine's device; None
            leaves the ceiling out.
        surface: whether surface distances are measured.
        stability: compares the samples where K > 1; None leaves it out.
        empty_score: Dice and IoU where both masks are empty.
        dataset_dir: its ``datalist.json`` is hashed, so that the numbers name their data.
        max_pictures: rows of each of the pictures of worst, median and best cases; 0 writes none.

    Raises:
        ValueError: an item that is not as above; the message starts with the key.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        num_classes: int = 1,
        class_names: Mapping[str, str] | Sequence[str] | None = None,
        num_samples: int = 1,
        threshold: float = 0.5,
        baselines: Mapping[str, Segmenter] | None = None,
        reconstruct: Callable[[torch.Tensor], torch.Tensor] | None = None,
        surface: bool = True,
        stability: StabilityStudy | None = None,
        empty_score: float = 1.0,
        dataset_dir: str | os.PathLike[str] | None = None,
        max_pictures: int = 4,
    ) -> None:
        self.names = foreground_names(num_classes, class_names)
        self.num_classes, self.num_samples, self.threshold = num_classes, num_samples, threshold
        self.baselines, self.reconstruct, self.surface = dict(baselines or {}), reconstruct, surface
        self.stability, self.empty_score = stability if num_samples > 1 else None, empty_score
        self.own = [ONE_SAMPLE, f"mean of {num_samples} samples"][: 1 + (num_samples > 1)]
        if taken := {*self.own, CEILING} & self.baselines.keys():
            raise ValueError(f"baselines: expected names of their own, got {sorted(taken)}; choose other names")
        if num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
        self.folder, self.dataset_dir, self.max_pictures = Path(output_dir) / "evaluation", dataset_dir, max_pictures
        self.cost = CallCost()
        self._measured: list[MeasuredImage] = []

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator (pass the handler in ``val_handlers``)."""
        engine.add_event_handler(Events.STARTED, self._reset)
        self.cost.attach(engine)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _reset(self) -> None:
        self._measured = []

    def _collect(self, engine: Any) -> None:
        outputs, items = engine_items(engine.state.output), engine_items(engine.state.batch)
        if len(outputs) != 1 or len(items) != 1:
            raise ValueError(f"batch_size: expected 1, got {len(outputs)}; labels keep their own sizes")
        item = {**items[0], **outputs[0]}
        name, group = (plain_value(key, item.get(key), remedy="give the file's name") for key in ("name", "group"))
        if name is None:
            raise ValueError("name: expected it in every item, got none; see shared.segmentation_items.inference_items")
        image, label, samples = self._checked(item, str(name))
        device = samples.device
        group = str(name) if group is None else group
        working = resize_in_plane(label.as_subclass(torch.Tensor), samples.shape[2:4], "nearest")[0]
        target = _Target(str(name), group, label, working)
        case = Case.of(target.name, image, working, samples[0], threshold=self.threshold)
        stability = None
        if self.stability is not None:
            values = self.stability(samples, working.to(device))
            stability = {"name": target.name, "group": group, "samples": self.num_samples} | values
        self._measured.append(MeasuredImage({}, [], stability, case))

        seconds = self.cost.seconds
        note = "" if self.num_samples == 1 else f"; time: a part of that of {self.num_samples} samples drawn together"
        self._add(ONE_SAMPLE, samples[0], target, seconds / self.num_samples, f"the evaluated model{note}")
        if self.num_samples > 1:
            self._add(self.own[1], samples.mean(dim=0), target, seconds, "the evaluated model")
        for method, baseline in self.baselines.items():
            began = time.perf_counter()
            found = baseline(image)
            wait_for(device)
            self._add(method, found, target, time.perf_counter() - began, baseline.note)
        if self.reconstruct is not None:
            found = reconstructed_mask(working, self.reconstruct, num_classes=self.num_classes, device=device)
            self._add(CEILING, found, target, None, "the true mask through the autoencoder, at the working size")

    def _checked(self, item: Mapping[str, Any], name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image, label, and samples (K, N, h, w[, Z])."""
        for key in ("image", "label", "pred"):
            if not isinstance(item.get(key), torch.Tensor):
                raise ValueError(f"{key}: expected a tensor in the item of {name}, got {type(item.get(key)).__name__}")
        image, pred = (item[key].detach().as_subclass(torch.Tensor).float() for key in ("image", "pred"))
        label = item["label"].detach().cpu()
        channels = self.num_samples * self.num_classes
        if pred.ndim not in (3, 4) or pred.shape[0] != channels:
            raise ValueError(
                f"pred: expected ({channels}, h, w[, Z]) for num_samples {self.num_samples} and num_classes "
                f"{self.num_classes}, got {tuple(pred.shape)} of {name}; give the sampler output 'samples'"
            )
        if image.shape[1:] != pred.shape[1:]:
            raise ValueError(f"pred: expected the size of the image {tuple(image.shape[1:])}, got {tuple(pred.shape)}")
        if label.ndim != pred.ndim or label.shape[0] != 1 or label.shape[3:] != pred.shape[3:]:
            raise ValueError(
                f"label: expected (1, H, W) of a picture, (1, H, W, {tuple(pred.shape)[-1]}) of this volume, got "
                f"{tuple(label.shape)} of {name}; load both with shared.transforms"
            )
        if not (torch.isfinite(pred).all() and pred.min() > -1e-3 and pred.max() < 1 + 1e-3):
            raise ValueError(
                f"pred: expected probabilities in [0, 1], got {pred.min():.4g} to {pred.max():.4g} of {name}"
            )
        classes = label.as_subclass(torch.Tensor).unique()
        most = max(1, self.num_classes - 1)
        if not torch.isin(classes, torch.arange(most + 1, dtype=classes.dtype)).all():
            raise ValueError(
                f"label: expected classes 0 to {most}, got {classes.tolist()[:12]} of {name}; "
                "load it with shared.transforms.masks.LoadMaskd and the same num_classes"
            )
        return image, label, pred.unflatten(0, (self.num_samples, self.num_classes))

    def _add(self, method: str, found: torch.Tensor | None, target: _Target, seconds: float | None, note: str) -> None:
        self._measured[-1].methods[method] = note
        if found is None:
            return
        if tuple(found.shape) != (self.num_classes, *target.working.shape):
            expected = (self.num_classes, *target.working.shape)
            raise ValueError(f"{method}: expected probabilities {expected}, got {tuple(found.shape)}")
        size = f"{target.working.shape[0]} x {target.working.shape[1]}"
        for resolution, mask, truth, surface in (
            ("native", self._native(found, target.native.shape), target.native, self.surface),
            (size, mask_of(found, threshold=self.threshold).cpu(), target.working, False),
        ):
            spacing = target.spacing(truth)
            scores = mask_scores(
                mask, truth, self.names, spacing=spacing, surface=surface, empty_score=self.empty_score
            )
            for score in scores:
                line = ItemScore(
                    name=target.name,
                    group=target.group,
                    method=method,
                    resolution=resolution,
                    score=score,
                    unit="px" if spacing is None else "mm",
                    millilitres=None if spacing is None else spacing[0] * spacing[1] * spacing[2] / 1000,
                    seconds=seconds if resolution == "native" else None,
                )
                self._measured[-1].scores.append(line)

    def _native(self, probabilities: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        parts = probabilities.split(_SLICES, dim=-1) if probabilities.ndim == 4 else [probabilities]
        masks = [
            mask_of(resize_in_plane(part, shape[:2], "bilinear"), threshold=self.threshold).cpu() for part in parts
        ]
        return torch.cat(masks, dim=-1) if probabilities.ndim == 4 else masks[0]

    def _finish(self, engine: Any) -> None:
        self.cost.merge()
        write_together(engine, self._measured, lambda measured: self._write(measured, engine.state.device))
        self._reset()

    def _write(self, measured: Sequence[MeasuredImage], device: torch.device) -> dict[str, float]:
        results = SegmentationResults(
            self.folder,
            measured,
            own=self.own,
            class_names=self.names,
            threshold=self.threshold,
            empty_score=self.empty_score,
            num_samples=self.num_samples,
            dataset_dir=self.dataset_dir,
            max_pictures=self.max_pictures,
        )
        notes = {} if self.stability is None else self.stability.notes
        return results.write(cost=self.cost, device=device, stability_notes=notes)


class _Target:
    """The truth about one item, at both sizes."""

    def __init__(self, name: str, group: Any, label: torch.Tensor, working: torch.Tensor) -> None:
        self.name, self.group, self.working = name, group, working
        self.native = label.as_subclass(torch.Tensor)[0]
        self._pixdim: Sequence[float] | None = None
        if self.native.ndim == 3:
            if not isinstance(label, MetaTensor):
                raise ValueError(f"label: expected the MetaTensor of a volume, which knows its spacing, of {name}")
            self._pixdim = [float(step) for step in label.pixdim]

    def spacing(self, mask: torch.Tensor) -> list[float] | None:
        """Millimetres along the axes of a volume at the size of ``mask``; None for pictures."""
        if self._pixdim is None:
            return None
        return [
            step * whole / part for step, whole, part in zip(self._pixdim, self.native.shape, mask.shape, strict=True)
        ]
