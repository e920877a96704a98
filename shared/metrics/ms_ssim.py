# SPDX-License-Identifier: Apache-2.0
"""Multi-scale structural similarity (Wang, Simoncelli and Bovik 2003), of image pairs and of all pairs of a set.

``monai.metrics.MultiScaleSSIMMetric`` gives the same numbers (a test holds both to 1e-5). It does not fit for the
diversity of a set: it filters five images per pair, where the moments of an image can be computed once for all its
pairs and only the product of the two images has to be filtered. The separable Gaussian is applied here as a product
with a narrow banded (Toeplitz) matrix, tile by tile: many more multiplications than a convolution of 11 taps, but in
the one operation that processors do near their peak speed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shared.metrics.confidence import Interval, pairwise_interval

# Wang et al. 2003, section 4: exponents of the five scales, fine to coarse.
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# Outputs per matrix product: 32 was the fastest of 32, 64, 128 and a whole row on a 512 x 512 image.
_TILE = 32


@dataclass(frozen=True)
class PairwiseSimilarity:
    """MS-SSIM of all unordered pairs of a set.

    Attributes:
        interval: mean over pairs, its limits by a jackknife over images, n = number of images.
        num_pairs: n (n - 1) / 2.
        matrix: (n, n) float32 on the CPU, symmetric, diagonal 1.
    """

    interval: Interval
    num_pairs: int
    matrix: torch.Tensor


@dataclass(frozen=True)
class _Scale:
    """One resolution of a batch: pixels (B, h, w), local mean and local variance (B, h - k + 1, w - k + 1)."""

    pixels: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor

    def __getitem__(self, index: slice) -> _Scale:
        return _Scale(self.pixels[index], self.mean[index], self.variance[index])


@functools.lru_cache(maxsize=8)
def _gaussian_band(kernel_size: int, sigma: float, device: torch.device) -> torch.Tensor:
    """(_TILE + k - 1, _TILE) matrix whose column j holds the window at rows j to j + k - 1."""
    taps = torch.arange(kernel_size, device=device, dtype=torch.float32) - (kernel_size - 1) / 2
    taps = torch.exp(-((taps / sigma) ** 2) / 2)
    band = torch.zeros(_TILE + kernel_size - 1, _TILE, device=device)
    for column in range(_TILE):
        band[column : column + kernel_size, column] = taps / taps.sum()
    return band


class PairwiseMultiScaleSSIM:
    """MS-SSIM of every unordered pair of a set of single-channel images; lower means a more diverse set.

    Args:
        data_range: largest possible value minus smallest possible value; images must lie in [0, data_range].
        kernel_size: side of the Gaussian window in pixels, odd.
        kernel_sigma: standard deviation of the window in pixels.
        weights: exponent of each scale, fine to coarse; their number is the number of scales.
        k1, k2: stability constants of luminance and contrast (Wang et al. 2004).
        pairs_per_step: pairs filtered in one call; a few keep a CPU's cache warm, a GPU wants more.
        memory_bytes: bound on the cached moments; larger sets are worked off in blocks of images.
    """

    def __init__(
        self,
        *,
        data_range: float = 1.0,
        kernel_size: int = 11,
        kernel_sigma: float = 1.5,
        weights: Sequence[float] = WEIGHTS,
        k1: float = 0.01,
        k2: float = 0.03,
        pairs_per_step: int = 8,
        memory_bytes: int = 1 << 29,
    ) -> None:
        if data_range <= 0:
            raise ValueError(f"data_range: expected a value > 0, got {data_range}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number >= 1, got {kernel_size}")
        if len(weights) == 0:
            raise ValueError("weights: expected one exponent per scale, got none")
        self.data_range = float(data_range)
        self.kernel_size = kernel_size
        self.kernel_sigma = float(kernel_sigma)
        self.weights = tuple(float(weight) for weight in weights)
        self.c1 = (k1 * data_range) ** 2
        self.c2 = (k2 * data_range) ** 2
        self.pairs_per_step = max(1, int(pairs_per_step))
        self.memory_bytes = int(memory_bytes)

    @property
    def note(self) -> str:
        """The protocol in words, for a report."""
        return (
            f"MS-SSIM, data range {self.data_range:g}, kernel {self.kernel_size}, sigma {self.kernel_sigma:g}, "
            f"{len(self.weights)} scales"
        )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> PairwiseSimilarity:
        """All unordered pairs of a set, each once.

        Args:
            images: (N, 1, H, W) in [0, data_range], N >= 2.

        Raises:
            ValueError: wrong shape, too small for the number of scales, not finite, or outside the data range.
        """
        self._check(images, name="images")
        n = images.shape[0]
        if n < 2:
            raise ValueError(f"images: expected at least 2 images to form a pair, got {n}")
        # Pixels, mean and variance of all scales: 3 values of 4 bytes, times 4/3 for the pyramid, for two blocks.
        block = max(1, self.memory_bytes // (2 * 16 * images.shape[-2] * images.shape[-1]))
        matrix = torch.eye(n)
        for start in range(0, n, block):
            rows = self._moments(images[start : start + block])
            for other in range(start, n, block):
                columns = rows if other == start else self._moments(images[other : other + block])
                for i in range(rows[0].pixels.shape[0]):
                    first = i + 1 if other == start else 0
                    for j in range(first, columns[0].pixels.shape[0], self.pairs_per_step):
                        step = slice(j, j + self.pairs_per_step)
                        values = self._compare([s[i : i + 1] for s in rows], [s[step] for s in columns]).cpu()
                        matrix[start + i, other + j : other + j + len(values)] = values
                        matrix[other + j : other + j + len(values), start + i] = values
        return PairwiseSimilarity(pairwise_interval(matrix.numpy()), n * (n - 1) // 2, matrix)

    @torch.no_grad()
    def paired(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """MS-SSIM of ``x[i]`` with ``y[i]``.

        Args:
            x, y: (B, 1, H, W) in [0, data_range].

        Returns:
            (B,) float32, in [0, 1], on the device of ``x``.

        Raises:
            ValueError: as for a set, or different shapes.
        """
        if x.shape != y.shape:
            raise ValueError(f"y: expected the shape of x {tuple(x.shape)}, got {tuple(y.shape)}")
        self._check(x, name="x")
        self._check(y, name="y")
        steps = zip(x.split(self.pairs_per_step), y.split(self.pairs_per_step), strict=True)
        return torch.cat([self._compare(self._moments(a), self._moments(b)) for a, b in steps])

    def _check(self, images: torch.Tensor, *, name: str) -> None:
        if images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"{name}: expected (N, 1, H, W), got {tuple(images.shape)}")
        side, scales, k = min(images.shape[-2:]), len(self.weights), self.kernel_size
        needed = 2 ** (scales - 1) * k  # halving rounds down, and the window must fit into the coarsest scale
        if side < needed:
            # The largest kernel and the largest number of scales that this size allows, to name a remedy that works.
            kernel = side // 2 ** (scales - 1)
            kernel -= 1 - kernel % 2
            fewer = max((s for s in range(1, scales) if side >= 2 ** (s - 1) * k), default=0)
            remedies = [f"kernel_size {kernel}"] if kernel >= 3 else []
            remedies += [f"`weights` of length {fewer}"] if fewer else []
            raise ValueError(
                f"{name}: {scales} scales with kernel {k} need every side >= {needed}, got "
                f"{images.shape[-2]} x {images.shape[-1]}; use {' or '.join(remedies) or 'larger images'}"
            )
        low, high = (float(v) for v in torch.aminmax(images.detach()))
        tolerance = 1e-4 * self.data_range
        if not (low >= -tolerance and high <= self.data_range + tolerance):  # false for NaN as well
            raise ValueError(
                f"{name}: expected finite values in [0, {self.data_range:g}], got [{low:g}, {high:g}]; "
                "clamp the images or declare another data_range"
            )

    def _blur(self, x: torch.Tensor) -> torch.Tensor:
        """Valid Gaussian filter: (B, h, w) -> (B, h - k + 1, w - k + 1)."""
        k = self.kernel_size
        band = _gaussian_band(k, self.kernel_sigma, x.device)
        height, width = x.shape[-2] - k + 1, x.shape[-1] - k + 1
        across = x.new_empty(x.shape[0], x.shape[-2], width)
        for start in range(0, width, _TILE):
            size = min(_TILE, width - start)
            across[..., start : start + size] = x[..., start : start + size + k - 1] @ band[: size + k - 1, :size]
        result = x.new_empty(x.shape[0], height, width)
        for start in range(0, height, _TILE):
            size = min(_TILE, height - start)
            result[:, start : start + size] = band[: size + k - 1, :size].T @ across[:, start : start + size + k - 1]
        return result

    def _moments(self, images: torch.Tensor) -> list[_Scale]:
        x = images.detach().as_subclass(torch.Tensor)[:, 0].to(torch.float32)
        scales = []
        for level in range(len(self.weights)):
            if level:
                x = F.avg_pool2d(x[:, None], kernel_size=2)[:, 0]
            mean = self._blur(x)
            scales.append(_Scale(x, mean, self._blur(x * x) - mean * mean))
        return scales

    def _compare(self, a: list[_Scale], b: list[_Scale]) -> torch.Tensor:
        """MS-SSIM (B,) of moments that broadcast against each other."""
        result: torch.Tensor | float = 1.0
        for level, (p, q, weight) in enumerate(zip(a, b, self.weights, strict=True)):
            covariance = self._blur(p.pixels * q.pixels).addcmul_(p.mean, q.mean, value=-1)
            similarity = covariance.mul_(2).add_(self.c2).div_((p.variance + q.variance).add_(self.c2))
            if level == len(self.weights) - 1:  # luminance counts at the coarsest scale only
                luminance = (p.mean * q.mean).mul_(2).add_(self.c1)
                similarity.mul_(luminance.div_((p.mean**2 + q.mean**2).add_(self.c1)))
            result = result * torch.relu(similarity.flatten(1).mean(1)) ** weight
        assert isinstance(result, torch.Tensor)
        return result


def multiscale_ssim(x: torch.Tensor, y: torch.Tensor, **options: float | int | Sequence[float]) -> torch.Tensor:
    """MS-SSIM of each image pair ``x[i]``, ``y[i]``.

    Args:
        x, y: (B, 1, H, W) in [0, data_range].
        options: the arguments of :class:`PairwiseMultiScaleSSIM`.

    Returns:
        (B,) float32.

    Raises:
        ValueError: see :meth:`PairwiseMultiScaleSSIM.paired`.
    """
    return PairwiseMultiScaleSSIM(**options).paired(x, y)  # type: ignore[arg-type]
