# SPDX-License-Identifier: Apache-2.0
"""The measures of a generative evaluation as objects that a config lists.

A measure is called once with everything that was collected and returns summary rows and per-image columns. It receives
a plain mapping, so that it needs no engine:

- ``image``, ``pred``, ``reconstruction``: (N, 1, H, W) float32 in [0, 1] on the CPU, real image, generated sample and
  reconstruction of the same row; absent keys were not produced;
- ``labels``: N label dictionaries (or None), what the prompt of the row asked for;
- ``info``: item key -> N plain values, such as the subjects' names, which belong into no message and no note;
- further images (N, C, H, W) under the names of the handler's ``extra_keys``, as they came;
- ``clamped``: key -> fraction of values that lay outside [0, 1] and were clamped;
- ``features``: a dictionary in which measures share what they computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from shared.metrics.confidence import Interval, bootstrap_interval, mean_interval, wilson_interval
from shared.metrics.distribution import disjoint_halves, frechet_distance, kernel_distance, real_versus_real_floor
from shared.metrics.features import FeatureExtractor
from shared.metrics.memorization import describe, find_copies
from shared.metrics.ms_ssim import PairwiseMultiScaleSSIM

_LEAST_IMAGES = 8  # for a distance and its floor, which compares disjoint halves of at least 4


class Measurement(NamedTuple):
    """Summary rows ``{"name", "value", "ci_low", "ci_high", "n", "note"}`` and per-image columns of N values each."""

    rows: list[dict[str, Any]]
    columns: dict[str, Sequence[Any]]


class TabledMeasurement(NamedTuple):
    """A :class:`Measurement` with tables: name -> lines, column -> value; each becomes ``evaluation/<name>.csv``.

    A type of its own, since callers take a :class:`Measurement` apart into two.
    """

    rows: list[dict[str, Any]]
    columns: dict[str, Sequence[Any]]
    tables: dict[str, list[dict[str, Any]]]


def summary_row(name: str, interval: Interval, note: str) -> dict[str, Any]:
    """A row of ``summary.json``; values that are not finite become None."""
    value, low, high = (float(v) if math.isfinite(v) else None for v in interval[:3])
    return {"name": name, "value": value, "ci_low": low, "ci_high": high, "n": int(interval.n), "note": note}


def _single(value: float, n: int) -> Interval:
    return Interval(value, math.nan, math.nan, n)


def collected_images(collected: Mapping[str, Any], key: str, *, measure: str) -> torch.Tensor:
    """Images (N, 1, H, W) of a key, or a ValueError that names key and measure."""
    images = collected.get(key)
    if images is None:
        raise ValueError(
            f"{key}: expected images for {measure}, but none were collected; produce the key or remove the measure"
        )
    return images


def clamp_note(collected: Mapping[str, Any], *keys: str) -> str:
    """What was done to values outside [0, 1], in words for a row's note."""
    parts = [f"{100 * share:.2g} % of {key}" for key in keys if (share := collected.get("clamped", {}).get(key, 0.0))]
    return "values clamped to [0, 1]" + (f" ({', '.join(parts)} lay outside)" if parts else "")


def _features(collected: Mapping[str, Any], extractor: FeatureExtractor, key: str, *, measure: str) -> torch.Tensor:
    cache = collected.get("features", {})
    if (id(extractor), key) not in cache:
        cache[(id(extractor), key)] = extractor(collected_images(collected, key, measure=measure))
    return cache[(id(extractor), key)]


class ReconstructionMsssim:
    """MS-SSIM of each real image with its reconstruction, and its mean: how much the autoencoder keeps.

    Args:
        device: where it is computed.
        ssim: arguments of :class:`~shared.metrics.ms_ssim.PairwiseMultiScaleSSIM`, such as ``kernel_size``.
    """

    name = "MS-SSIM of reconstructions"

    def __init__(self, *, device: torch.device | str = "cpu", **ssim: Any) -> None:
        self.device = torch.device(device)
        self.ssim = PairwiseMultiScaleSSIM(**ssim)

    def __call__(self, collected: Mapping[str, Any]) -> Measurement:
        real = collected_images(collected, "image", measure=self.name)
        reconstruction = collected_images(collected, "reconstruction", measure=self.name)
        pairs = zip(real.split(16), reconstruction.split(16), strict=True)
        values = torch.cat([self.ssim.paired(x.to(self.device), y.to(self.device)).cpu() for x, y in pairs]).numpy()
        note = f"{self.ssim.note}; {clamp_note(collected, 'image', 'reconstruction')}; higher is better"
        columns = {"reconstruction_ms_ssim": values.tolist()}
        return Measurement([summary_row(self.name, mean_interval(values), note)], columns)


class _Diversity:
    name: str
    key: str

    def __init__(self, *, max_images: int | None = None, device: torch.device | str = "cpu", **ssim: Any) -> None:
        self.max_images = max_images
        self.device = torch.device(device)
        self.ssim = PairwiseMultiScaleSSIM(**ssim)

    def __call__(self, collected: Mapping[str, Any]) -> Measurement:
        images = collected_images(collected, self.key, measure=self.name)[: self.max_images]
        result = self.ssim(images.to(self.device))
        note = (
            f"{self.ssim.note}; all {result.num_pairs} unordered pairs once, interval by jackknife over images; "
            f"{clamp_note(collected, self.key)}; lower is more diverse"
        )
        return Measurement([summary_row(self.name, result.interval, note)], {})


class SampleDiversity(_Diversity):
    """Mean MS-SSIM over all pairs of samples; compare with :class:`RealDiversity`: collapse makes it *higher*.

    Args:
        max_images: the first so many; None takes all.
        device: where it is computed.
        ssim: arguments of :class:`~shared.metrics.ms_ssim.PairwiseMultiScaleSSIM`.
    """

    name, key = "MS-SSIM between samples", "pred"


class RealDiversity(_Diversity):
    """The same for the real images; arguments as for :class:`SampleDiversity`."""

    name, key = "MS-SSIM between real images", "image"


class FrechetAndKernelDistance:
    """Fréchet and kernel distance of samples and real images, with their floor; names state whose features they are.

    Args:
        feature_extractor: see :mod:`shared.metrics.features`.
        floor: add what real images reach against real images, and the samples' value at that same n.
        subsets: of the kernel distance.
        repeats: random splits that the floor averages.
        seed: of subsets and splits.
    """

    def __init__(
        self,
        feature_extractor: FeatureExtractor,
        *,
        floor: bool = True,
        subsets: int = 100,
        repeats: int = 5,
        seed: int = 0,
    ) -> None:
        self.extractor = feature_extractor
        self.name = f"FID and KID ({feature_extractor.name})"
        self.floor, self.subsets, self.repeats, self.seed = floor, subsets, repeats, seed

    def __call__(self, collected: Mapping[str, Any]) -> Measurement:
        real = _features(collected, self.extractor, "image", measure=self.name)
        fake = _features(collected, self.extractor, "pred", measure=self.name)
        label = f"({self.extractor.name})"
        if min(len(real), len(fake)) < _LEAST_IMAGES:
            # The other measures of a small test section must not be lost.
            note = (
                f"needs at least {_LEAST_IMAGES} images in each set, got {len(fake)} samples and {len(real)} real ones"
            )
            nothing = Interval(math.nan, math.nan, math.nan, min(len(real), len(fake)))
            return Measurement([summary_row(f"{name} {label}", nothing, note) for name in ("FID", "KID")], {})
        frechet = frechet_distance(fake, real)
        kernel = kernel_distance(fake, real, subsets=self.subsets, seed=self.seed)
        n = min(frechet.n_a, frechet.n_b)
        sets = f"{frechet.n_a} samples, {frechet.n_b} real images, {frechet.num_features} features"
        if n < frechet.num_features:
            sets += "; fewer images than features: the value is mostly bias, read it against the floor only"
        inputs = f"both sets in [0, 1] and preprocessed alike, {clamp_note(collected, 'image', 'pred')}"
        half = 1.96 * kernel.standard_error
        kernel_note = f"unbiased, mean of {self.subsets} subsets of {kernel.subset_size} (std {kernel.std:.3g}); {sets}"
        rows = [
            summary_row(f"FID {label}", _single(frechet.value, n), f"{sets}; {inputs}"),
            summary_row(f"KID {label}", Interval(kernel.mean, kernel.mean - half, kernel.mean + half, n), kernel_note),
        ]
        if self.floor:
            floor = real_versus_real_floor(real, n=min(len(real) // 2, len(fake)), seed=self.seed, repeats=self.repeats)
            same_n = f"n = {floor.n} in each set, mean of {self.repeats} random splits"
            halves = disjoint_halves(len(real), n=floor.n, repeats=self.repeats, seed=self.seed)
            generator = torch.Generator().manual_seed(self.seed)
            draws = [(torch.randperm(len(fake), generator=generator)[: floor.n], rows) for rows, _ in halves]
            at_floor_n = [frechet_distance(fake[i], real[j], warn=False).value for i, j in draws]
            rows += [
                summary_row(f"FID at the floor's n {label}", _single(float(np.mean(at_floor_n)), floor.n), same_n),
                summary_row(f"FID floor, real versus real {label}", _single(floor.frechet, floor.n), same_n),
                summary_row(f"KID floor, real versus real {label}", _single(floor.kernel, floor.n), same_n),
            ]
        return Measurement(rows, {})


class Memorization:
    """Share of samples that are nearer to a training image than held-out images are (see ``memorization.py``).

    The collected real images are the held-out reference: they must come from the test section.

    Args:
        training_dataset: map-style dataset of items with ``image_key``; read lazily, in batches.
        feature_extractor: adds the view ``feature``; None compares pixels only.
        max_training: the first so many training images; None takes all.
        image_key: key of the training image, (1, H, W) in [0, 1].
        batch_size: training images in memory at a time.
        percentile: of the held-out distances below which a sample is flagged.
    """

    name = "Near copies of training images"

    def __init__(
        self,
        training_dataset: Any,
        *,
        feature_extractor: FeatureExtractor | None = None,
        max_training: int | None = None,
        image_key: str = "image",
        batch_size: int = 32,
        percentile: float = 1.0,
    ) -> None:
        self.dataset, self.extractor, self.image_key = training_dataset, feature_extractor, image_key
        self.max_training, self.batch_size, self.percentile = max_training, batch_size, percentile

    def _training(self) -> Iterator[torch.Tensor]:
        count = len(self.dataset) if self.max_training is None else min(len(self.dataset), self.max_training)
        for start in range(0, count, self.batch_size):
            rows = range(start, min(start + self.batch_size, count))
            yield torch.stack([torch.as_tensor(self.dataset[i][self.image_key]).float() for i in rows])

    def __call__(self, collected: Mapping[str, Any]) -> Measurement:
        sets = [collected_images(collected, key, measure=self.name).split(self.batch_size) for key in ("pred", "image")]
        samples, held_out = (describe(batches, feature_extractor=self.extractor) for batches in sets)
        training = describe(self._training(), feature_extractor=self.extractor)
        report = find_copies(samples, training, held_out, percentile=self.percentile)
        n, m = len(report.flagged), len(held_out["pixel"])
        views = ", ".join(report.distances)
        # Below the smallest of m held-out distances lies one in m + 1 by chance, however small the percentile.
        chance = max(self.percentile, 100.0 / (m + 1))
        protocol = (
            f"nearer to one of {report.num_training} training images than percentile {self.percentile:g} of {m} "
            f"held-out images, in any view of {views}; about {chance:.2g} % per view by chance; look at each"
        )
        rows = [summary_row(self.name, wilson_interval(int(report.flagged.sum()), n), protocol)]
        columns: dict[str, Sequence[Any]] = {"near_copy": report.flagged.astype(int).tolist()}
        for view, distance in report.distances.items():
            typical = float(np.median(report.reference[view]))
            ratio = distance / typical if typical > 0 else np.full(n, math.nan)
            interval = bootstrap_interval(ratio, statistic=np.median) if typical > 0 else _single(math.nan, n)
            note = "median over samples divided by the median over held-out images; well below 1 suggests copying"
            rows.append(summary_row(f"Distance to nearest training image, {view}", interval, note))
            columns[f"training_distance_{view}"] = distance.tolist()
            columns[f"training_row_{view}"] = report.indices[view].tolist()
        return Measurement(rows, columns)
