# SPDX-License-Identifier: Apache-2.0
"""From a list of images with masks to what one training step, one reconstruction or one inference needs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.datalist import FILE_NAME, load_datalist, read_description
from shared.transforms.masks import classes_of_slices
from shared.transforms.segmentation_images import SUFFIXES, as_path, check_suffix
from shared.transforms.upright import is_nifti, open_upright
from shared.volume_items import made_by_a_model

FLIPS = {"none": (0,), "horizontal": (0, 1), "both": (0, 1, 2, 3)}
_KEPT = ("label", "group", "subject", "window")
# Known once the items are made; of different lengths, so that no batch could hold them.
_SPENT = ("num_slices", "slice_classes", "classes")


def training_items(
    data: Sequence[Mapping[str, Any]], *, num_classes: int = 1, flips: str = "both"
) -> list[dict[str, Any]]:
    """One item per slice, class and flip, for `LoadPictured`, `LoadMaskd` and `FlipByItemd`.

    Flips are items and not chances, so that the latents of every variant are computed once (`shared.latent_cache`); an
    epoch over all of them equals four epochs of the published loader on average, which flips both ways with p = 1/2.

    Args:
        data: items of images (`shared.datalist.load_datalist`) with `image` and `label`. Of a volume `num_slices`
            saves reading its header, and `slice_classes` (per slice the class ids above 0), of a picture `classes`,
            save reading its label, which is needed for several classes only.
        num_classes: 1 = binary, without `class_id`. N >= 2: an item for each class that the slice shows and one for
            class 0, which stands for any organ (spec/sdseg.md 3.1); of an empty slice one for class 0.
        flips: "both" (4 variants), "horizontal" (2) or "none".

    Returns:
        The image's item without what is used up here (`num_slices`, `slice_classes`, `classes`), with `slice` (volumes:
        index along the upright axis 3, 0 = most inferior), `flip` (bit 1 columns, bit 2 rows) and `class_id`. Images in
        the given order, then slices, classes and flips ascending.

    Raises:
        FileNotFoundError: a file that must be read is missing.
        ValueError: item without image or label, unreadable file, numbers that contradict the file, or unknown flips.
            The message starts with the file, or with the key.
    """
    variants = _variants(flips)
    items: list[dict[str, Any]] = []
    for number, item in enumerate(data):
        image, label = (_path(item, key, number) for key in ("image", "label"))
        count = count_slices(item, image)
        classes = _classes(item, label, count or 1, num_classes) if num_classes > 1 else [[None]] * (count or 1)
        kept = {key: value for key, value in item.items() if key not in _SPENT}
        for index in range(count or 1):
            place = {} if count is None else {"slice": index}
            for class_id in classes[index]:
                chosen = {} if class_id is None else {"class_id": class_id}
                items.extend({**kept, **place, **chosen, "flip": flip} for flip in variants)
    return items


def autoencoder_items(
    data: Sequence[Mapping[str, Any]], *, flips: str = "none", num_classes: int = 1
) -> list[dict[str, Any]]:
    """Images and their masks, both as pictures to reconstruct.

    Args:
        data: as in `training_items`; an item may lack its `label`.
        flips: as in `training_items`.
        num_classes: as in `training_items`; with several, a mask is one class (`class_id`), as it is in the training.

    Returns:
        Per picture or slice an item `{"image": path, "kind": "image", "flip"}`, then, where it has a mask,
        `{"image": path of the mask, "kind": "mask", "flip"}`, with `class_id` for several classes; both with `slice`
        for volumes, images also with their `window`.

    Raises:
        FileNotFoundError, ValueError: as `training_items`.
    """
    variants = _variants(flips)
    items: list[dict[str, Any]] = []
    for number, item in enumerate(data):
        image = _path(item, "image", number)
        label = _path(item, "label", number) if item.get("label") not in (None, "") else None
        count = count_slices(item, image)
        several = num_classes > 1 and label is not None
        classes = _classes(item, str(label), count or 1, num_classes) if several else [[None]] * (count or 1)
        window = {} if item.get("window") is None else {"window": item["window"]}
        for index in range(count or 1):
            place = {} if count is None else {"slice": index}
            items.extend({"image": image, "kind": "image", **place, **window, "flip": flip} for flip in variants)
            for class_id in classes[index] if label is not None else ():
                chosen = {} if class_id is None else {"class_id": class_id}
                items.extend({"image": label, "kind": "mask", **place, **chosen, "flip": flip} for flip in variants)
    return items


def inference_items(source: str | os.PathLike, *, section: str = "test") -> list[dict[str, Any]]:
    """What to segment: a section of a dataset folder, every image of any folder, or one file.

    Args:
        source: a folder with `datalist.json`; another folder: every PNG, JPEG, TIFF, BMP, DICOM and NIfTI file in it at
            any depth, without hidden files and what an earlier run made (the JSON beside it says so); or a file.
        section: section of `datalist.json`: `training`, `validation` or `test`.

    Returns:
        Per image `image` (absolute path), `name` (of the file, without its suffix, with its folders where that alone
        would not be unique), `group` (of the data list; else the name), and of a data list also `label`, `subject` and
        `window` where the item has them. Sorted by path, or in the order of the list.

    Raises:
        FileNotFoundError: no such source, or no image in the folder.
        ValueError: another kind of file, or a fault of the data list. The message starts with the path.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: expected a dataset folder, a folder of images or a file, but it does not exist; correct the path"
        )
    if (path / FILE_NAME).is_file():
        listed = load_datalist(path, section, required=["image"])
        items = []
        for number, item in enumerate(listed):
            kept = {key: item[key] for key in _KEPT if item.get(key) not in (None, "", [])}
            items.append({"image": _path(item, "image", number), **kept})
        return named_items(items, os.path.abspath(path))
    if path.is_file():
        check_suffix(str(path))
        return named_items([{"image": os.path.abspath(path)}], os.path.abspath(path.parent))
    return named_items([{"image": os.path.abspath(file)} for file in _find(path)], os.path.abspath(path))


def class_names(dataset_dir: str | os.PathLike, num_classes: int = 1) -> dict[str, str] | None:
    """Names of the classes in a dataset folder's `labels`, index -> name with the background.

    Args:
        dataset_dir: a dataset folder; what else can be segmented (a folder of images, one file) has no names.
        num_classes: 1 = binary, which has two names.

    Returns:
        None where there is no `datalist.json`, where it names nothing, or another number of classes: a binary model on
        a set of several.
    """
    if not (Path(dataset_dir) / FILE_NAME).is_file():
        return None
    labels = read_description(dataset_dir).get("labels")
    if not isinstance(labels, Mapping) or len(labels) != max(num_classes, 2):
        return None
    return {str(index): str(name) for index, name in labels.items()}


def count_slices(item: Mapping[str, Any], path: str) -> int | None:
    """Slices of a volume along its upright axis 3; None for a picture.

    Args:
        item: its `num_slices`, where present, saves reading the header.
        path: of the image.

    Raises:
        ValueError: `num_slices` is not an integer above 0; unreadable header. Starts with the path.
    """
    if not is_nifti(path):
        return None
    count = item.get("num_slices")
    if count is None:
        source = open_upright(path)
        return source.shape[2] if source.is_volume else None
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{path}: expected `num_slices` to be an integer above 0, but got {count!r}; correct it")
    return count


def _variants(flips: str) -> tuple[int, ...]:
    if flips not in FLIPS:
        raise ValueError(f"flips: expected one of {', '.join(FLIPS)}, but got {flips!r}")
    return FLIPS[flips]


def _path(item: Mapping[str, Any], key: str, number: int) -> str:
    if item.get(key) in (None, "", []):
        raise ValueError(
            f"{key}: expected a file in every item, but item {number} has the keys {sorted(item)}; correct the list"
        )
    return as_path(item[key], key=key)


def _classes(item: Mapping[str, Any], label: str, count: int, num_classes: int) -> list[list[int | None]]:
    """Class ids of each slice: class 0 first, then those it shows."""
    if item.get("slice_classes") is not None:
        known = item["slice_classes"]
    elif item.get("classes") is not None:
        known = [item["classes"]]
    else:
        known = classes_of_slices(label, num_classes=num_classes)
    if len(known) != count:
        raise ValueError(
            f"{label}: expected the classes of {count} slices, but got those of {len(known)}; correct `num_slices` and "
            "`slice_classes` in the data list (python -m tools.prepare writes them)"
        )
    for present in known:
        if any(not isinstance(c, int) or isinstance(c, bool) or not 0 < c < num_classes for c in present):
            raise ValueError(
                f"{label}: expected class ids 1..{num_classes - 1} (num_classes {num_classes}), but the data list has "
                f"{present}; correct num_classes or the data list"
            )
    return [[0, *sorted(set(present))] for present in known]


def named_items(data: Sequence[Mapping[str, Any]], folder: str) -> list[dict[str, Any]]:
    """Items with a `name`: the shortest that is unique among all of file, folders and file, these with the suffix.

    Args:
        data: items with the path of an `image` below `folder`; `group` becomes the name where it is missing.
        folder: absolute path.

    Raises:
        ValueError: an image occurs twice.
    """
    items = [dict(item) for item in data]
    paths = [os.path.relpath(item["image"], folder).replace(os.sep, "/") for item in items]
    stems = [_without_suffix(path) for path in paths]
    candidates = [[stem.rsplit("/", 1)[-1] for stem in stems], [stem.replace("/", "_") for stem in stems]]
    candidates.append([path.replace("/", "_").replace(".", "_") for path in paths])
    counts = [Counter(names) for names in candidates]
    for index, item in enumerate(items):
        names = [names[index] for names in candidates]
        unique = [name for name, count in zip(names, counts, strict=True) if count[name] == 1]
        item["name"] = unique[0] if unique else names[-1]
        item.setdefault("group", item["name"])
    _check_unique([item["name"] for item in items], folder)
    return items


def _check_unique(names: list[str], folder: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        datalist = os.path.join(folder, FILE_NAME)
        raise ValueError(
            f"{datalist if os.path.isfile(datalist) else folder}: expected each image once, but {twice[0]!r} occurs "
            "several times; remove the repeated item or rename the file"
        )


def _without_suffix(path: str) -> str:
    suffix = next((s for s in SUFFIXES if path.lower().endswith(s)), "")
    return path[: -len(suffix)] if suffix else path


def _find(folder: Path) -> list[Path]:
    made = made_by_a_model(folder)
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.name.lower().endswith(SUFFIXES) and not file.name.startswith(".") and file not in made
        if file.is_file()
    )
    if not files:
        raise FileNotFoundError(
            f"{folder}: expected {FILE_NAME}, or files {', '.join(SUFFIXES)} at any depth, but there are none"
            f"{' but synthetic ones' if made else ''}; name another folder"
        )
    return files
