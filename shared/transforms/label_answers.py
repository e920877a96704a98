# SPDX-License-Identifier: Apache-2.0
"""What bundles need to answer a request of MONAI Label through the ``BundleInferTask`` of its ``monaibundle`` app."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.transforms import Compose, Spacingd, Transform
from monai.utils import ensure_tuple, optional_import

from shared.files import sha256_of_file
from shared.inferers import flag, number, one_of

# Texts that a configuration takes for an expression, a reference or a macro.
_CODE = ("$", "@", "%")


def is_monai_label_request(data: Mapping[Hashable, Any]) -> bool:
    """Whether ``data`` is a MONAI Label request: it carries the model's name and the path of the input."""
    return "model" in data and "image_path" in data


def refuse_code(name: str, value: Any) -> None:
    """Refuse a client's option that a configuration would execute or instantiate; see `CheckLabelOptions`.

    Raises:
        ValueError: the option is, or a list of it holds, a dictionary or a text that starts with ``$``, ``@`` or ``%``.
    """
    for leaf in _leaves(value):
        if isinstance(leaf, Mapping) or (isinstance(leaf, str) and leaf.lstrip()[:1] in _CODE):
            raise ValueError(f"{name}: expected a plain number or text, got {str(leaf)[:40]!r}; refused.")


class CheckLabelOptions(Transform):
    """The first transform of a ``preprocessing``: refuse what a client of MONAI Label must not or need not ask for.

    MONAI Label copies the client's options into ``displayable_configs`` before ``inferer`` and ``postprocessing`` are
    built, where a text that starts with ``$`` is executed and a dictionary with ``_target_`` instantiated.
    Preprocessing runs in between: this is the place to stop it, and to say what is wrong with an option before minutes
    of sampling. ``preprocessing`` itself must not refer to ``displayable_configs``.

    Does nothing outside of MONAI Label, where options come from whoever may run code anyway.

    Args:
        numbers: ``{name: [lowest, highest]}``; limits that are integers ask for whole numbers.
        choices: ``{name: [word, ...]}``.
        flags: names of options that are true or false.
        texts: names of options that are any text but code.

    Raises:
        ValueError: an option is none of these. The message starts with its name.
    """

    def __init__(
        self,
        *,
        numbers: Mapping[str, Sequence[float]] | None = None,
        choices: Mapping[str, Sequence[str]] | None = None,
        flags: Sequence[str] = (),
        texts: Sequence[str] = (),
    ) -> None:
        self.numbers, self.choices = dict(numbers or {}), dict(choices or {})
        self.flags, self.texts = tuple(flags), tuple(texts)

    @property
    def options(self) -> set[str]:
        """Names of all options that are checked."""
        return {*self.numbers, *self.choices, *self.flags, *self.texts}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if is_monai_label_request(d):
            for name in self.options & d.keys():
                self._check(name, d[name])
        return d

    def _check(self, name: str, value: Any) -> None:
        refuse_code(name, value)
        # All of a list, though the first of its entries is the chosen one: the whole list gets into the configuration.
        for leaf in _leaves(value) or [value]:
            if name in self.numbers:
                low, high = self.numbers[name]
                number(name, leaf, int if isinstance(low, int) and isinstance(high, int) else float, low, high)
            elif name in self.choices:
                one_of(name, leaf, list(self.choices[name]))
            elif name in self.flags:
                flag(name, leaf, words=True)


class AnsweringCompose(Compose):
    """``monai.transforms.Compose`` whose errors reach a client of MONAI Label as text.

    MONAI Label runs the transforms of a ``Compose`` one by one and handles no errors: a client would read "Internal
    Server Error" only. In a request, a ``ValueError`` or ``FileNotFoundError`` of a transform becomes the HTTP error of
    the web framework that MONAI Label uses, status 400, with the message without the folder of the server. Elsewhere,
    and where that framework is absent, errors stay as they are.

    Args:
        transforms: as ``Compose`` has them; none of them random or lazy.
    """

    def __init__(self, transforms: Sequence[Callable[..., Any]] | Callable[..., Any]) -> None:
        super().__init__([_Told(transform) for transform in ensure_tuple(transforms)])

    def flatten(self) -> Compose:
        """The transforms themselves: what inverts them asks for this and looks at their classes."""
        return Compose([told.transform for told in self.transforms]).flatten()


class _Told:
    """A transform whose errors are told to the client."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, data: Any) -> Any:
        try:
            return self.transform(data)
        except (ValueError, FileNotFoundError) as error:
            http_error, found = optional_import("starlette.exceptions", name="HTTPException")
            if not found or not isinstance(data, Mapping) or not is_monai_label_request(data):
                raise
            folder = os.path.dirname(str(data["image_path"]))
            text = str(error).replace(f"{folder}{os.sep}", "") if folder else str(error)
            raise http_error(status_code=400, detail=text) from error

    def __repr__(self) -> str:
        return f"{type(self.transform).__name__} that tells its errors"


class RequestSpacingd(Spacingd):
    """``monai.transforms.Spacingd`` that also runs in a MONAI Label request under MONAI 1.6.

    There ``Spacingd`` takes every entry that is called ``<key>_...`` for the metadata of ``<key>``, and a request holds
    the text ``image_path``. Such entries are put aside meanwhile.
    """

    def __call__(self, data: Mapping[Hashable, torch.Tensor], lazy: bool | None = None) -> dict[Hashable, torch.Tensor]:
        names = tuple(f"{key}_" for key in self.keys)
        aside = {
            name: value
            for name, value in data.items()
            if str(name).startswith(names) and name not in self.keys and not isinstance(value, Mapping)
        }
        rest = {name: value for name, value in data.items() if name not in aside}
        return {**super().__call__(rest, lazy), **aside}


class AnswerFile(str):
    """Path of a finished answer, where MONAI Label expects an array and asks for its shape and type only."""

    shape: tuple[int, ...] = ()
    dtype = "file"


def answer_with_file(
    data: dict[Hashable, Any],
    key: Hashable,
    write: Callable[[str], None],
    *,
    suffix: str,
    result: Mapping[str, Any],
    image_key: str = "image",
) -> None:
    """Make a file of the bundle the answer of a MONAI Label request, whatever format and type the client asked for.

    MONAI Label's writer has no 4-D volumes but segmentations, loses shear, and would cast to the type that viewers
    always ask for, uint8: an image in [0, 1] becomes all zero. A path in the place of the array is sent as it is; the
    server deletes the file afterwards. The entries from which its last transform would resize the "array" are removed.

    Args:
        data: the request, changed in place.
        key: of the prediction.
        write: writes the file to the path that it is given.
        suffix: of the file, such as ``.nii.gz``.
        result: JSON part of the answer; ``sha256`` and ``bytes`` of the file are added.
        image_key: of the loaded input.
    """
    handle, name = tempfile.mkstemp(prefix="answer_", suffix=suffix)
    os.close(handle)
    try:
        write(name)
        # The folder for temporary files of a server is open to others.
        os.chmod(name, 0o600)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    for taken in (image_key, f"{image_key}_meta_dict", f"{key}_meta_dict"):
        data.pop(taken, None)
    data[key] = AnswerFile(name)
    data["result"] = {**result, "sha256": sha256_of_file(name), "bytes": Path(name).stat().st_size}
    data["result_write_to_file"] = False


def _leaves(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, list | tuple) else [value]
