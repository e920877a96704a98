# SPDX-License-Identifier: Apache-2.0
"""The one rule that turns scanner intensities of a volume into [0, 1], and back.

A volume whose values lie in [0, 1] is taken as scaled and left as it is; any other is scaled by its own robust range.
Preparation, training and inference use these functions, so that a raw volume and its prepared copy give equal images.
"""

from __future__ import annotations

import numpy as np

# Percentiles against hot voxels: the published code took minimum and maximum of five slices, so that one hot voxel
# rescaled a whole subject (spec/brain_controlnet.md 2.9, defect 8).
LOW_PERCENTILE = 0.5
HIGH_PERCENTILE = 99.5


def robust_range(values: np.ndarray, *, name: str = "values") -> tuple[float, float]:
    """Intensities that become 0 and 1.

    The lower one is the 0.5th percentile of all voxels, the upper one the 99.5th percentile of the voxels above the
    mean. These are the foreground: among all voxels the amount of air around the head would move the percentile.

    Args:
        values: voxels of one whole volume (one contrast), any shape and real type.
        name: what an error message starts with: the path of the file.

    Returns:
        (low, high), low < high, in the units of `values`.

    Raises:
        ValueError: empty, NaN or infinite, constant, or so nearly constant that both intensities are equal.
    """
    if values.size == 0:
        raise ValueError(f"{name}: expected voxels, but got the shape {values.shape}; remove the file")
    smallest, largest = float(values.min()), float(values.max())
    if not np.isfinite([smallest, largest]).all():  # both are NaN where one voxel is
        count = int((~np.isfinite(values)).sum())
        raise ValueError(f"{name}: expected finite voxels, but {count} are NaN or infinite; repair or remove the file")
    if smallest == largest:
        raise ValueError(f"{name}: expected an image, but all voxels are {smallest:g}; remove the file")
    low = float(np.percentile(values, LOW_PERCENTILE))
    foreground = values[values > values.mean(dtype=np.float64)]
    high = float(np.percentile(foreground, HIGH_PERCENTILE)) if foreground.size else low
    if high <= low:
        raise ValueError(
            f"{name}: expected an image, but nearly all voxels are {low:g} (values {smallest:g}..{largest:g}); "
            "remove the file or the outliers in it"
        )
    if not _has_width(low, high):
        raise ValueError(
            f"{name}: expected intensities whose range float32 can hold, but it is {low:g}..{high:g}; repair the file"
        )
    return low, high


def is_scaled(values: np.ndarray) -> bool:
    """Whether the values lie in [0, 1] (up to 1e-6 above, for rounding), so that they need no scaling; NaN do not."""
    return bool(values.size and values.min() >= 0 and values.max() <= 1 + 1e-6)


def scale_intensity(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map low..high to 0..1 and clip.

    Args:
        values: intensities of any shape and real type.
        low: intensity that becomes 0.
        high: intensity that becomes 1, above `low`.

    Returns:
        float32 of the same shape in [0, 1].

    Raises:
        ValueError: high is not above low.
    """
    _check_range(low, high)
    with np.errstate(over="ignore"):  # far above the range: infinite here, 1 after clipping
        scaled = (np.asarray(values, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return np.clip(scaled, 0.0, 1.0)


def unscale_intensity(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map 0..1 back to low..high: the inverse of `scale_intensity` for what it did not clip.

    Args:
        values: scaled intensities of any shape.
        low: intensity that had become 0.
        high: intensity that had become 1, above `low`.

    Returns:
        float32 of the same shape, in the units of `low` and `high`; not clipped.

    Raises:
        ValueError: high is not above low.
    """
    _check_range(low, high)
    return np.asarray(values, dtype=np.float32) * np.float32(high - low) + np.float32(low)


def _check_range(low: float, high: float) -> None:
    if not (np.isfinite([low, high]).all() and high > low and _has_width(low, high)):
        raise ValueError(f"intensity: expected low < high, both finite, but got {low} and {high}; correct the range")


def _has_width(low: float, high: float) -> bool:
    """Whether float32 holds the difference: not infinite, and not rounded to 0, by which nothing can be divided."""
    limits = np.finfo(np.float32)
    return float(limits.smallest_subnormal) <= high - low <= float(limits.max)
