# SPDX-License-Identifier: Apache-2.0
"""Is an array white noise? Mean, variance and autocorrelation at all lags, the diagnostic of the article on dmri2noddi.

    python -m tools.white_noise FILE                       .npy, .pt, .nii.gz, or a latent cache (latents_*.npy)
    python -m tools.white_noise --seeded_noise 8,32,32,32 --seed 0      the noise that sampling starts from

Noise that a sampler starts from must be white. Latents of images never are: what they have in common is what a
diffusion model learns. The residual of a good reconstruction is nearly so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fire
import nibabel
import numpy as np
import torch

from shared.files import atomic_path, save_json
from shared.inferers import seeded_noise as draw_noise
from shared.metrics.white_noise import THRESHOLD, WhiteNoise, measure_white_noise
from shared.pictures import spread_indices
from shared.transforms.volumes import VOLUME_SUFFIXES
from tools import command_line
from tools.report_chart import Points, Series, line_chart, standalone

MAX_VALUES = 2**25
MAX_LAGS = 2**26  # with all axes kept there are about 2^axes N lags, and several arrays of that size
_BINS = 60


@fire.decorators.SetParseFns(file=str, out=str, picture=str, key=str)
def white_noise(
    file: str | None = None,
    *,
    seeded_noise: Any = None,
    seed: int = 0,
    key: str | None = None,
    item: int | None = None,
    max_items: int = 8,
    threshold: float = THRESHOLD,
    out: str | None = None,
    picture: str | None = None,
) -> None:
    """Print mean, variance and the largest autocorrelation, flattened (the article's) and with all axes kept.

    A lag above the threshold flags the array. With fewer than about 40,000 values white noise is flagged too; the
    table gives the largest lag that white noise of this size has in the median, and an upper bound of the probability
    of the one found. All axes are left out where that would take too much memory.

    Args:
        file: array (`.npy`), tensor (`.pt`), volume (`.nii`, `.nii.gz`) or latent cache (`latents_*.npy` with its
            `.json`), of which evenly spaced items are tested one by one.
        seeded_noise: instead of a file, the shape of one sample of the project's own noise, such as 8,32,32,32.
        seed: of that noise.
        key: which tensor of a `.pt` file that holds several.
        item: only this index of the first axis; of a latent cache this item.
        max_items: the most items of a latent cache.
        threshold: |r| above which a lag counts; 0.023 is the article's.
        out: JSON file for the results.
        picture: SVG file for a chart of the flattened autocorrelation (of the first array).

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither file nor seeded_noise or both, an unreadable file, a constant array, too many values.
    """
    if (file is None) == (seeded_noise is None):
        raise ValueError("file: expected a file or --seeded_noise SHAPE, not both; name one of them")
    if not isinstance(threshold, int | float) or not 0 < threshold < 1:
        raise ValueError(f"--threshold: expected a number between 0 and 1, but got {threshold!r}")
    arrays = _noise(seeded_noise, seed) if file is None else _read(Path(file), key, item, max_items)
    results = []
    first: WhiteNoise | None = None
    for name, array in arrays.items():
        flat, whole = _measured(name, array, threshold)
        first = first or flat
        print(_table(name, array, flat, whole))
        entry = {"name": name, "flattened": flat.description()}
        results.append(entry if whole is None else {**entry, "all_axes": whole.description()})
    if out:
        save_json({"threshold": threshold, "arrays": results}, out)
    if picture and first is not None:
        with atomic_path(picture) as part:
            part.write_text(_chart(first), encoding="utf-8")


def _noise(shape: Any, seed: int) -> dict[str, np.ndarray]:
    sizes = list(shape) if isinstance(shape, list | tuple) else [shape]
    if not sizes or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in sizes):
        raise ValueError(f"--seeded_noise: expected sizes above 0 such as 8,32,32,32, but got {shape!r}")
    if not isinstance(seed, int):
        raise ValueError(f"--seed: expected a whole number, but got {seed!r}")
    return {f"noise of seed {seed}": draw_noise([seed], sizes)[0].numpy()}


def _read(path: Path, key: str | None, item: int | None, max_items: int) -> dict[str, np.ndarray]:
    """Arrays to test by name; every fault of the file starts with its path."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a file .npy, .pt, .nii or .nii.gz, but it does not exist; correct it"
        )
    is_cache = path.name.startswith("latents_") and path.suffix == ".npy" and path.with_suffix(".json").is_file()
    array = _load(path, key)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{path}: expected real numbers, but got the type {array.dtype}; give an array of numbers")
    if is_cache and array.ndim > 2:
        if not isinstance(max_items, int) or max_items < 1:
            raise ValueError(f"--max_items: expected a number above 0, but got {max_items!r}")
        chosen = spread_indices(len(array), max_items) if item is None else [_index(path, item, len(array))]
        # (items, 1 or 2, C, ...): the mean, and of a latent that is drawn its log-variance
        return {f"{path.name}, item {index}": np.asarray(array[index, 0]) for index in chosen}
    if item is None:
        return {path.name: np.asarray(array)}
    return {f"{path.name}, item {item}": np.asarray(array[_index(path, item, len(array) if array.ndim else 0)])}


def _index(path: Path, item: Any, count: int) -> int:
    if not isinstance(item, int) or not 0 <= item < count:
        raise ValueError(f"--item: expected one of 0..{count - 1} of {path}, but got {item!r}")
    return item


def _load(path: Path, key: str | None) -> np.ndarray:
    name = path.name.lower()
    try:
        if name.endswith(".npy"):
            return np.lib.format.open_memmap(path, mode="r")
        if name.endswith(VOLUME_SUFFIXES):
            image: Any = nibabel.load(path)
            return np.asarray(image.dataobj, dtype=np.float64)
        content = torch.load(path, map_location="cpu", weights_only=True) if name.endswith((".pt", ".pth")) else None
    except Exception as error:  # numpy, nibabel, gzip, pickle and torch each raise their own kind
        raise ValueError(
            f"{path}: expected a readable array, but got ({type(error).__name__}: {error}); write it anew"
        ) from error
    if content is None:
        raise ValueError(f"{path}: expected a file .npy, .pt, .nii or .nii.gz; save the array as one of them")
    tensors = {"": content} if isinstance(content, torch.Tensor) else _tensors(content)
    if key is not None and key in tensors:
        return tensors[key].float().numpy()
    if len(tensors) == 1 and key is None:
        return next(iter(tensors.values())).float().numpy()
    raise ValueError(
        f"{path}: expected one tensor{f' {key!r}' if key is not None else ''}, but the file has "
        f"{', '.join(filter(None, tensors)) or 'none by a name'}; give --key NAME"
    )


def _tensors(content: Any) -> dict[str, torch.Tensor]:
    if not isinstance(content, Mapping):
        return {}
    return {str(name): value.detach() for name, value in content.items() if isinstance(value, torch.Tensor)}


def _measured(name: str, array: np.ndarray, threshold: float) -> tuple[WhiteNoise, WhiteNoise | None]:
    if array.size > MAX_VALUES:
        raise ValueError(
            f"{name}: expected at most {MAX_VALUES} values, but got {array.size}; give --item INDEX for a part"
        )
    try:
        flat = measure_white_noise(array.reshape(-1), threshold=threshold)
        # Axes of length one have no lags; with a single other axis the array is flat already.
        kept = array.squeeze()
        several = kept.ndim > 1 and kept.size * 2**kept.ndim <= MAX_LAGS
        whole = measure_white_noise(kept, threshold=threshold) if several else None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return flat, whole


def _table(name: str, array: np.ndarray, flat: WhiteNoise, whole: WhiteNoise | None) -> str:
    columns = {"flattened": flat} | ({} if whole is None else {"all axes": whole})
    rows: list[list[str]] = [[f"{name} {array.shape}", *columns]]
    for label, cell in (
        ("mean", lambda r: f"{r.mean:.4g}"),
        ("variance", lambda r: f"{r.variance:.4g}"),
        ("largest |r|", lambda r: f"{r.largest:.4f}"),
        ("at the lag", lambda r: ",".join(map(str, r.largest_lag))),
        ("white noise has", lambda r: f"{r.expected_largest:.4f}"),
        ("chance, at most", lambda r: f"{r.chance:.2g}"),
        (f"lags above {flat.threshold:g}", lambda r: f"{r.above} of {r.lags}"),
        ("verdict", _verdict),
    ):
        rows.append([label, *(cell(result) for result in columns.values())])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _verdict(result: WhiteNoise) -> str:
    if not result.flagged:
        return "passes"
    return "flagged" if result.is_decidable else "flagged, as is white noise of this size"


def _chart(result: WhiteNoise) -> str:
    """Largest |r| in bins of the lag, evenly on a logarithmic axis: near lags matter most, far ones are many."""
    sizes = np.abs(result.along(0))
    lags = np.arange(len(sizes))
    edges = np.unique(np.geomspace(1, len(sizes), min(_BINS, len(sizes)) + 1).round().astype(int))
    points: Points = [
        (math.log10(lags[low]), float(sizes[low:high].max()))
        for low, high in zip(edges[:-1], edges[1:], strict=True)
        if sizes[low:high].max() > 0
    ] or [(0.0, result.largest)]
    ends = (points[0][0], points[-1][0])
    lines = [
        Series("largest |r|", "train", points),
        Series(f"threshold {result.threshold:g}", "validation", [(x, result.threshold) for x in ends]),
    ]
    svg = line_chart(lines, label="autocorrelation against the lag", x_label="log10 of the lag")
    return standalone(svg, lines)


def main() -> None:
    """Entry point; expected errors end with their message alone."""
    command_line.run(white_noise, name="tools.white_noise")


if __name__ == "__main__":
    main()
