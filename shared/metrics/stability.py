# SPDX-License-Identifier: Apache-2.0
"""How much a mask depends on the noise: repeated runs on one image, compared with one another.

The published study (SDSeg's ``stability_evaluation.ipynb``) compared the first listed of ten runs with the nine others,
on 8-bit maps, each pair with its own data range, and every image of a run had the same noise. Here, unless told
otherwise, all pairs are compared, the data range is 1, and the noise is whatever the caller drew for each image.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.assets import missing_asset
from shared.metrics.ms_ssim import WEIGHTS, PairwiseMultiScaleSSIM
from shared.perceptual import LpipsSqueeze
from shared.segmentation_probability import mask_of

# Column -> name in a report, and whether more is better.
MEASURES = {
    "pairwise_dice": ("Pairwise Dice", True),
    "lpips": ("LPIPS (SqueezeNet)", False),
    "psnr": ("PSNR (dB)", True),
    "ssim": ("SSIM", True),
    "ms_ssim": ("MS-SSIM", True),
}
# The published maps were 8-bit files: everything below 1/255 was 0, and half a step between two maps was none.
_EMPTY, _EQUAL = 1 / 255, 0.5 / 255
_KERNEL = 11


class StabilityStudy:
    """Compare K runs on one image, in pairs: Dice of the masks; LPIPS, PSNR, SSIM and MS-SSIM of the probability maps.

    SSIM is MS-SSIM of one scale: ``monai.metrics.SSIMMetric`` gives the same numbers (a test holds both) but filters
    five images for each pair; a mean below 0 counts as 0. The map of several classes is the probability of foreground,
    1 - p(background). Each measure is the mean over the pairs of a slice, then over the slices of a volume, of which
    those without foreground in the truth are left out, as published; Dice is that of whole volumes.

    Left out of PSNR, SSIM and MS-SSIM, and counted: pairs with an all-zero map (nothing reaches 1/255: 0 in an 8-bit
    file), as published; out of PSNR also pairs of identical maps (no pixel differs by half an 8-bit step), where it is
    infinite or measures rounding. LPIPS takes all pairs.

    Args:
        reference: "all": each pair once; "first": the first run with each other one, as published.
        threshold: of the masks of one class.
        lpips_weights: SqueezeNet trunk, see :class:`~shared.perceptual.LpipsSqueeze`; None or an absent file leaves the
            measure out, and :attr:`notes` says why. The published study took AlexNet's.
        lpips_linear: LPIPS linear layers; None takes those of the installed ``lpips`` package.
        device: where it is computed.

    Attributes:
        notes: column -> how it was measured, or why not.
    """

    def __init__(
        self,
        *,
        reference: str = "all",
        threshold: float = 0.5,
        lpips_weights: str | os.PathLike[str] | None = None,
        lpips_linear: str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if reference not in ("all", "first"):
            raise ValueError(f"reference: expected 'all' or 'first', got {reference!r}")
        self.reference, self.threshold, self.device = reference, threshold, torch.device(device)
        pairs = "each pair of runs once" if reference == "all" else "the first run with each other one"
        self.notes = {column: f"{pairs}; {_better(more)}" for column, (_, more) in MEASURES.items()}
        self.notes["pairwise_dice"] += "; masks at the working size; two empty masks agree fully"
        self.notes["psnr"] += "; data range 1; pairs with an all-zero map and identical maps left out"
        self.lpips: LpipsSqueeze | None = None
        if lpips_weights is None:
            self.notes["lpips"] = "not measured: no weights were given (lpips_weights)"
        elif not Path(lpips_weights).is_file():
            self.notes["lpips"] = f"not measured: {missing_asset('squeezenet1_1', lpips_weights)}"
        else:
            self.lpips = LpipsSqueeze(lpips_weights, linear_path=lpips_linear, reduction="none").to(self.device)
            self.notes["lpips"] += "; maps in [0, 1] mapped to [-1, 1] and repeated to 3 channels"

    def __call__(self, probabilities: torch.Tensor, truth: torch.Tensor) -> dict[str, Any]:
        """Measures of one image.

        Args:
            probabilities: (K, N, h, w[, Z]) in [0, 1], K >= 2 runs; N = 1, or N classes with background first.
            truth: (h, w[, Z]) class index at the same size; says only which slices of a volume count.

        Returns:
            The columns of ``MEASURES`` (NaN where there is nothing to measure; ``lpips`` only with weights), and the
            counts ``slices``, ``slices_without_truth``, ``pairs`` (of all slices that count), ``pairs_all_zero``,
            ``pairs_identical``.

        Raises:
            ValueError: fewer than two runs, or other shapes.
        """
        if probabilities.ndim not in (4, 5) or len(probabilities) < 2 or probabilities.shape[2:] != truth.shape:
            raise ValueError(
                f"probabilities: expected (K, N, {', '.join(map(str, truth.shape))}) of K >= 2 runs and a 2-D or 3-D "
                f"truth, got {tuple(probabilities.shape)}; raise num_samples"
            )
        runs = probabilities.detach().as_subclass(torch.Tensor).to(self.device, torch.float32)
        classes = runs.shape[1]
        first, second = self._pairs(len(runs))
        result: dict[str, Any] = {"pairwise_dice": self._dice(runs)[first, second].mean().item()}
        maps = runs[:, 0] if classes == 1 else 1 - runs[:, 0]
        used = [...] if truth.ndim == 2 else torch.nonzero((truth > 0).flatten(0, 1).any(0))[:, 0].tolist()
        values = [self._compare(maps[..., index].clamp(0, 1).unsqueeze(1), first, second) for index in used]
        for column in ("lpips", "psnr", "ssim", "ms_ssim") if self.lpips is not None else ("psnr", "ssim", "ms_ssim"):
            found = np.array([value[column] for value in values])
            result[column] = float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")
        total = 1 if truth.ndim == 2 else truth.shape[-1]
        result |= {"slices": len(used), "slices_without_truth": total - len(used), "pairs": len(first) * len(used)}
        return result | {name: sum(v[name] for v in values) for name in ("pairs_all_zero", "pairs_identical")}

    def _pairs(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = torch.triu_indices(count, count, offset=1)
        chosen = slice(None) if self.reference == "all" else slice(count - 1)  # row 0 comes first
        return first[chosen], second[chosen]

    def _dice(self, runs: torch.Tensor) -> torch.Tensor:
        """(K, K) Dice of each pair of masks: mean over the foreground classes that either of the two has."""
        masks = torch.stack([mask_of(run, threshold=self.threshold) for run in runs]).flatten(1)
        total = torch.zeros(len(runs), len(runs), dtype=torch.float64)
        present = torch.zeros_like(total)
        for index in range(1, max(2, runs.shape[1])):
            inside = masks == index
            sizes = inside.sum(1).double().cpu()
            if not sizes.any():
                continue
            # Products of 0 and 1 summed in float32 are exact up to 2^24, which a volume exceeds: chunks of it do not.
            shared = sum(part.float().mm(part.float().T).double().cpu() for part in inside.split(1 << 20, dim=1))
            both = sizes[:, None] + sizes
            total += torch.where(both > 0, 2 * shared / both.clamp(min=1), 0.0)
            present += (both > 0).double()
        return torch.where(present > 0, total / present.clamp(min=1), 1.0)

    def _compare(self, maps: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> dict[str, float]:
        """Means over the pairs of one slice; maps (K, 1, h, w) in [0, 1]."""
        count = len(maps)
        error, largest = torch.zeros(count, count), torch.zeros(count, count)
        for row in range(count if self.reference == "all" else 1):
            difference = (maps - maps[row]).flatten(1)
            error[row] = difference.double().square().mean(1).float().cpu()
            largest[row] = difference.abs().amax(1).cpu()
        empty = maps.flatten(1).amax(1).cpu() < _EMPTY
        kept = ~(empty[first] | empty[second])
        same = largest[first, second] < _EQUAL
        distinct = kept & ~same
        found = {
            "pairs_all_zero": int((~kept).sum()),
            "pairs_identical": int((kept & same).sum()),
            "psnr": _mean(-10 * torch.log10(error[first, second][distinct])),
        }
        for column, weights in (("ssim", (1.0,)), ("ms_ssim", WEIGHTS)):
            kernel = fitting_kernel(min(maps.shape[-2:]), scales=len(weights))
            if kernel < 3:
                self.notes[column] = f"not measured: maps of {tuple(maps.shape[-2:])} are too small"
                found[column] = float("nan")
                continue
            measure = PairwiseMultiScaleSSIM(kernel_size=kernel, weights=weights)
            self.notes[column] = f"{self._ssim_note(column)}; {measure.note.replace('MS-SSIM, ', '')}"
            if not kept.any():
                found[column] = float("nan")
            elif self.reference == "all":
                found[column] = _mean(measure(maps).matrix[first, second][kept])
            else:
                found[column] = _mean(measure.paired(maps[:1].expand(count - 1, -1, -1, -1), maps[1:]).cpu()[kept])
        if self.lpips is not None:
            found["lpips"] = _mean(self.lpips.pairwise(maps).cpu()[first, second])
        return found

    def _ssim_note(self, column: str) -> str:
        return "; ".join(self.notes[column].split("; ")[:2]) + "; pairs with an all-zero map left out"


def fitting_kernel(side: int, *, scales: int) -> int:
    """Largest odd window of at most 11 pixels that fits at the coarsest of ``scales`` scales; below 3 there is none."""
    widest = side // 2 ** (scales - 1)
    return min(_KERNEL, widest - 1 + widest % 2)


def _better(more: bool) -> str:
    return "higher is more stable" if more else "lower is more stable"


def _mean(values: torch.Tensor) -> float:
    return float(values.double().mean()) if len(values) else float("nan")
