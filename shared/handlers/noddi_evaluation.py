# SPDX-License-Identifier: Apache-2.0
"""Evaluation of NODDI maps at twice the resolution: every subject, beside baselines and a ceiling."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor

from shared.handlers.cost import CallCost, wait_for
from shared.handlers.engine_items import engine_items, plain_value
from shared.handlers.noddi_results import PICTURES, MeasuredScan, NoddiResults
from shared.metrics.noddi_baselines import NoddiBaseline
from shared.metrics.noddi_maps import MAPS, SSIMWindow, map_scores
from shared.metrics.noddi_table import SubjectScore
from shared.metrics.segmentation_ceiling import CEILING
from shared.metrics.uncertainty import LEAST_SAMPLES, calibration_bins, uncertainty_scores
from shared.noddi_picture import centre_of, map_panels, tri_planar
from shared.shares import write_together

ONE_SAMPLE = "diffusion, one sample"


class NoddiEvaluation:
    """Score each subject as it comes and, when the evaluator has completed, write what was found.

    ``monai.handlers.MetricsSaver`` and the metric handlers of MONAI do not fit: they know one prediction, no mask, no
    comparison of methods and no intervals over subjects.

    Needs batches of one item, since heads differ in size, with ``image``, the features (F, X, Y, Z); ``maps``, the
    truth (3, 2X, 2Y, 2Z) in [0, 1]; ``brain`` (1, 2X, 2Y, 2Z); ``pred`` (num_samples * 3, 2X, 2Y, 2Z) in [0, 1], sample
    after sample; ``name``; optionally ``subject``, without which the name is the subject. Each is looked up in the
    engine's output, then in its batch.

    Methods of the table: "diffusion, one sample", the first; "diffusion, mean of N samples", for N > 1; each baseline;
    "autoencoder's ceiling". From 4 samples on, their standard deviation is compared with the error of the mean. What is
    written: see :class:`~shared.handlers.noddi_results.NoddiResults`; conventions: ``CONVENTIONS`` of
    :mod:`shared.metrics.noddi_maps` and :mod:`shared.metrics.uncertainty`. Values also go to ``engine.state.metrics``.
    Where several processes share the list (``shared.shares``), rank 0 gets what all measured, in the order of the list,
    and writes it.

    Args:
        output_dir: run folder.
        num_samples: N samples in ``pred``.
        baselines: name in the table -> :mod:`shared.metrics.noddi_baselines`.
        reconstruct: maps (1, 3, 2X, 2Y, 2Z) on the engine's device -> their reconstruction by the autoencoder, such as
            :class:`~shared.metrics.noddi_baselines.PatchwiseReconstruction`; None leaves the ceiling out.
        compare: further pairs [method, other] of the table whose paired differences are given, beside those of the
            diffusion with every baseline; such as ``[["encoder only", "cubic"]]``.
        window: of the 3-D SSIM; None takes the default of :class:`~shared.metrics.noddi_maps.SSIMWindow`.
        num_bins: of the calibration.
        dataset_dir: its ``datalist.json`` is hashed, so that the numbers name their data.
        pictures: which subjects are shown, by PSNR in the brain: some of "worst", "median", "best".
        shown: baselines in the pictures; None shows all.

    Raises:
        ValueError: an item that is not as above; the message starts with the key.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        num_samples: int = 1,
        baselines: Mapping[str, NoddiBaseline] | None = None,
        reconstruct: Callable[[torch.Tensor], torch.Tensor] | None = None,
        compare: Sequence[Sequence[str]] = (),
        window: SSIMWindow | None = None,
        num_bins: int = 10,
        dataset_dir: str | os.PathLike[str] | None = None,
        pictures: Sequence[str] = PICTURES,
        shown: Sequence[str] | None = None,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
        self.num_samples, self.baselines, self.reconstruct = num_samples, dict(baselines or {}), reconstruct
        self.own = [ONE_SAMPLE, f"diffusion, mean of {num_samples} samples"][: 1 + (num_samples > 1)]
        if taken := {*self.own, CEILING} & self.baselines.keys():
            raise ValueError(f"baselines: expected names of their own, got {sorted(taken)}; choose other names")
        self.shown = list(self.baselines if shown is None else shown)
        if unknown := set(self.shown) - self.baselines.keys():
            raise ValueError(f"shown: expected some of {list(self.baselines)}, got {sorted(unknown)}")
        known = [*self.own, *self.baselines]
        if wrong := [list(pair) for pair in compare if len(pair) != 2 or not set(pair) <= set(known)]:
            raise ValueError(f"compare: expected pairs of {known}, got {wrong[0]}")
        self.pairs = [(own, other) for own in self.own for other in self.baselines]
        self.pairs += [(pair[0], pair[1]) for pair in compare if tuple(pair) not in self.pairs]
        if wrong_pictures := set(pictures) - set(PICTURES):
            raise ValueError(f"pictures: expected some of {list(PICTURES)}, got {sorted(wrong_pictures)}")
        self.window, self.num_bins = window or SSIMWindow(), num_bins
        self.folder, self.dataset_dir, self.pictures = Path(output_dir) / "evaluation", dataset_dir, tuple(pictures)
        self.cost = CallCost()
        self._measured: list[MeasuredScan] = []

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
            raise ValueError(f"batch_size: expected 1, got {len(outputs)}; heads differ in size")
        item = {**items[0], **outputs[0]}
        seconds = self.cost.seconds
        name, subject = (plain_value(key, item.get(key), remedy="give the file's name") for key in ("name", "subject"))
        if name is None:
            raise ValueError("name: expected it in every item, got none; see shared.noddi_items.inference_items")
        truth = _Truth(str(name), name if subject is None else subject, item, self.num_samples)
        samples = truth.samples
        self._measured.append(MeasuredScan({}, [], [], [], {}))

        note = "" if self.num_samples == 1 else f"; time: a part of that of {self.num_samples} samples drawn together"
        found = {ONE_SAMPLE: samples[0]}
        self._add(ONE_SAMPLE, samples[0], truth, seconds / self.num_samples, f"the evaluated model{note}")
        if self.num_samples > 1:
            found[self.own[1]] = samples.mean(dim=0)
            self._add(self.own[1], found[self.own[1]], truth, seconds, "the evaluated model")
        for method, baseline in self.baselines.items():
            began = time.perf_counter()
            maps = baseline(item)
            wait_for(samples.device)
            self._add(method, maps, truth, time.perf_counter() - began, baseline.note)
            if maps is not None and method in self.shown:
                found[method] = maps
        if self.reconstruct is not None:
            with torch.no_grad():
                maps = self.reconstruct(truth.maps[None].to(engine.state.device))[0].float().clamp(0, 1)
            self._add(
                CEILING, maps, truth, None, "the true maps through the autoencoder, which no result can beat much"
            )
        if self.num_samples >= LEAST_SAMPLES:
            self._measure_uncertainty(truth)
        if self.pictures:
            self._measured[-1].pictures.update(self._pictures(found, truth))

    def _add(self, method: str, maps: torch.Tensor | None, truth: _Truth, seconds: float | None, note: str) -> None:
        self._measured[-1].methods[method] = note
        if maps is None:
            return
        if maps.shape != truth.maps.shape:
            raise ValueError(f"{method}: expected maps {tuple(truth.maps.shape)}, got {tuple(maps.shape)}")
        if not torch.isfinite(maps).all():
            raise ValueError(f"{method}: expected finite maps, got NaN or Inf for {truth.name}")
        scores = map_scores(maps.to(truth.maps.device), truth.maps, truth.brain, window=self.window)
        self._measured[-1].scores.append(
            SubjectScore(subject=truth.subject, name=truth.name, method=method, scores=scores, seconds=seconds)
        )

    def _measure_uncertainty(self, truth: _Truth) -> None:
        inside = truth.brain[0] > 0.5
        for row, key in enumerate(MAPS):
            samples = truth.samples[:, row, inside].double().cpu().numpy()
            true = truth.maps[row, inside].double().cpu().numpy()
            bins = calibration_bins(samples, true, num_bins=self.num_bins)
            line = {"subject": truth.subject, "name": truth.name, "map": key}
            self._measured[-1].uncertainty.append(line | uncertainty_scores(samples, true, bins))
            self._measured[-1].calibration.extend(line | {"bin": i} | one._asdict() for i, one in enumerate(bins))

    def _pictures(self, found: Mapping[str, torch.Tensor], truth: _Truth) -> dict[str, np.ndarray]:
        """Map -> picture (H, W) in 8 bits."""
        centre = centre_of(truth.brain[0].cpu())
        sd = truth.samples.std(dim=0).cpu() if self.num_samples > 1 else None
        own = (f"mean of {self.num_samples}" if self.num_samples > 1 else "diffusion", found[self.own[-1]].cpu())
        pictures = {}
        for row, key in enumerate(MAPS):
            panels = map_panels(
                truth.maps[row].cpu(),
                {name: found[name][row].cpu() for name in self.shown if name in found},
                (own[0], own[1][row]),
                None if sd is None else sd[row],
            )
            picture = tri_planar(panels, centre, spacing=truth.spacing)
            pictures[key] = (255 * picture[0]).round().byte().numpy()
        return pictures

    def _finish(self, engine: Any) -> None:
        self.cost.merge()
        write_together(engine, self._measured, lambda measured: self._write(measured, engine.state.device))
        self._reset()

    def _write(self, measured: Sequence[MeasuredScan], device: torch.device) -> dict[str, float]:
        results = NoddiResults(
            self.folder,
            measured,
            own=self.own,
            pairs=self.pairs,
            num_samples=self.num_samples,
            window=self.window,
            dataset_dir=self.dataset_dir,
            pictures=self.pictures,
        )
        return results.write(cost=self.cost, device=device)


class _Truth:
    """What is known about one subject, checked: name, maps (3, ...), brain (1, ...), samples (N, 3, ...)."""

    def __init__(self, name: str, subject: Any, item: Mapping[str, Any], num_samples: int) -> None:
        for key in ("image", "maps", "brain", "pred"):
            if not isinstance(item.get(key), torch.Tensor):
                raise ValueError(f"{key}: expected a tensor in the item of {name}, got {type(item.get(key)).__name__}")
        self.name, self.subject = name, subject
        maps = item["maps"]
        self.spacing = [float(step) for step in maps.pixdim] if isinstance(maps, MetaTensor) else [1.0, 1.0, 1.0]
        image, pred = (item[key].detach().as_subclass(torch.Tensor).float() for key in ("image", "pred"))
        self.maps, self.brain = (
            item[key].detach().as_subclass(torch.Tensor).float().to(pred.device) for key in ("maps", "brain")
        )
        if image.ndim != 4:
            raise ValueError(f"image: expected features (F, X, Y, Z), got {tuple(image.shape)} of {name}")
        doubled = tuple(2 * length for length in image.shape[1:])
        for key, values, channels, remedy in (
            ("maps", self.maps, len(MAPS), "load them with LoadNoddiMapsd"),
            ("brain", self.brain, 1, "load it with LoadBrainMaskd"),
            ("pred", pred, num_samples * len(MAPS), f"give the sampler num_samples {num_samples}, output 'samples'"),
        ):
            if tuple(values.shape) != (channels, *doubled):
                raise ValueError(
                    f"{key}: expected {(channels, *doubled)}, twice the grid of the features, got "
                    f"{tuple(values.shape)} of {name}; {remedy}"
                )
        for key, values in (("maps", self.maps), ("pred", pred)):
            if not (torch.isfinite(values).all() and values.min() > -1e-3 and values.max() < 1 + 1e-3):
                low, high = values.min(), values.max()
                raise ValueError(f"{key}: expected fractions in [0, 1], got {low:.4g} to {high:.4g} of {name}")
        self.samples = pred.unflatten(0, (num_samples, len(MAPS)))
