# SPDX-License-Identifier: Apache-2.0
"""Requests of MONAI Label for a diffusion MRI, of which only the volumes are sent: where its gradients come from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.transforms import Transform
from monai.utils import ensure_tuple

from shared.noddi_items import inference_items, mask_beside
from shared.transforms.label_answers import is_monai_label_request

# Keys of an item, and the options of a request that stand for their files.
_GIVEN = {"bval": "bvals", "bvec": "bvecs"}
_PATHS = ("dwi", *_GIVEN, "mask")


class WithSeriesOfRequest(Transform):
    """Run transforms that load an item on the file that a MONAI Label request names under ``image``.

    The item is that of `shared.noddi_items.inference_items`: the series with the gradients and the mask that lie beside
    it, so that an answer equals what ``monai.bundle run`` writes for this file. Gradients in the request, ``bvals`` and
    ``bvecs``, count more; a file that is sent needs them, as nothing lies beside it. Paths in the request are not
    followed.

    Outside of MONAI Label these are just the transforms.

    Args:
        transforms: that load the item; none of them random or lazy.

    Raises:
        FileNotFoundError: no gradients.
        ValueError: one of ``bvals`` and ``bvecs`` alone, or not lists of numbers; and as the transforms. The message
            starts with the option or the file.
    """

    def __init__(self, transforms: Sequence[Callable[..., Any]] | Callable[..., Any]) -> None:
        self.transforms = ensure_tuple(transforms)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """What the transforms make of ``data``; of a request it holds a path under ``image``, and optionally ``bvals``
        (N numbers in s/mm2) and ``bvecs`` (3 lists of N numbers as FSL has them, or N lists of 3), also as text."""
        if not is_monai_label_request(data):
            return self._run(data)
        request: dict[Any, Any] = {name: value for name, value in data.items() if name not in _PATHS}
        path = _named_file(request.get("image"))
        given = {key: request[option] for key, option in _GIVEN.items() if request.get(option) not in (None, "", [])}
        if not given:
            return self._run(request | _beside(path))
        if len(given) == 1:
            there, missing = (_GIVEN[key] for key in sorted(_GIVEN, key=lambda key: key not in given))
            raise ValueError(f"{missing}: expected it beside {there}, got none; send both, or none of them.")
        with tempfile.TemporaryDirectory(prefix="gradients_") as folder:
            files = {key: os.path.join(folder, _GIVEN[key]) for key in given}
            for key, value in given.items():
                Path(files[key]).write_text(_as_rows(value, option=_GIVEN[key]), encoding="utf-8")
            try:
                result = self._run(request | {"dwi": str(path)} | files | mask_beside(path))
            except (ValueError, FileNotFoundError) as error:
                # The option instead of the file that stood for it.
                raise type(error)(str(error).replace(f"{folder}{os.sep}", "")) from error
        return {name: value for name, value in result.items() if name not in files}

    def _run(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for transform in self.transforms:
            result = transform(result)
        return result


def _named_file(image: Any) -> Path:
    if not isinstance(image, str | os.PathLike) or not os.fspath(image):
        got = "none of that id" if image in (None, "") else type(image).__name__
        raise ValueError(f"image: expected a diffusion MRI of the studies or a file, got {got}; see GET /datastore/.")
    return Path(os.path.abspath(image))


def _beside(path: Path) -> dict[str, Any]:
    try:
        return inference_items(path)[0]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; or send bvals and bvecs as parameters of the request") from error


def _as_rows(value: Any, *, option: str) -> str:
    """Text of a gradient file: numbers of a row separated by spaces."""
    if isinstance(value, str):
        return value
    rows = value if isinstance(value, list | tuple) else [value]
    rows = rows if isinstance(rows[0], list | tuple) else [rows]
    try:
        return "".join(" ".join(repr(float(number)) for number in row) + "\n" for row in rows)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option}: expected numbers, or lists of them, got ({error}); send JSON lists.") from error
