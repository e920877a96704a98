# SPDX-License-Identifier: Apache-2.0
"""Anyone's folder of images and folder of masks -> dataset folder of sdseg."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.transforms.upright import is_nifti
from shared.transforms.volumes import VOLUME_SUFFIXES
from tools.prepare.labelled_volumes import convert_volume, parse_window
from tools.prepare.mask_coding import MaskCoding, parse_colour, parse_levels
from tools.prepare.mask_pairs import (
    IMAGE_SUFFIXES,
    Outcome,
    Pair,
    check_places,
    convert_pairs,
    convert_picture,
    index_files,
    list_files,
    match_names,
    stem_of,
)
from tools.prepare.preparation import Preparation, check_folder, check_workers, read_table
from tools.prepare.stored_split import write_sections


def _key(folder: Path, suffix: str = "") -> Callable[[Path], str]:
    """Place of a file below a folder without file suffix, and without an ending such as `_mask`."""

    def key(file: Path) -> str:
        parent = file.relative_to(folder).parent
        return (parent / stem_of(file).removesuffix(suffix)).as_posix()

    return key


def _pattern(value: str | None) -> re.Pattern[str] | None:
    if value is None:
        return None
    try:
        pattern = re.compile(str(value))
    except re.error as error:
        raise ValueError(f"--group_pattern: expected a regular expression, but got {value!r} ({error})") from error
    if pattern.groups < 1:
        raise ValueError(
            f"--group_pattern: expected a group in parentheses, such as '^(patient\\d+)_', but got {value!r}"
        )
    return pattern


def _read_groups(table: str | None, folder: Path) -> dict[str, str] | None:
    """Name of an image (path below the folder, file name or stem) -> group."""
    if table is None:
        return None
    file = Path(str(table))
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected a table (--groups), but it does not exist; correct the path")
    return {row["image"]: row["group"] for row in read_table(file, ["image", "group"]) if row["group"]}


def _list_both(images: Path, masks: Path, mask_suffix: str, out: Path) -> tuple[list[Path], list[Path]]:
    """Image files and mask files; one folder may be, or lie in, the other."""
    suffixes = (*IMAGE_SUFFIXES, *VOLUME_SUFFIXES)
    found, wanted = (list_files(folder, suffixes, out=out) for folder in (images, masks))
    wanted = [file for file in wanted if stem_of(file).endswith(mask_suffix)]
    if images.resolve() == masks.resolve():
        return sorted(set(found) - set(wanted)), wanted
    inner = [folder.resolve() for folder in (images, masks)]
    return (
        [file for file in found if inner[1] not in file.resolve().parents or inner[1] in inner[0].parents],
        [file for file in wanted if inner[0] not in file.resolve().parents or inner[0] in inner[1].parents],
    )


def _group_of(
    file: Path, name: str, folder: Path, pattern: re.Pattern[str] | None, table: dict[str, str] | None
) -> str | None:
    """The unit of the split; None where pattern or table do not tell."""
    place = file.relative_to(folder).as_posix()
    if pattern is not None:
        match = pattern.search(place)
        return match.group(1) or None if match else None
    if table is not None:
        return next((table[key] for key in (place, name, file.name, stem_of(file)) if key in table), None)
    return name


def _class_names(value: str | Sequence[str] | None, num_classes: int) -> dict[str, str]:
    count = max(num_classes, 2)
    default = ["foreground"] if num_classes == 1 else [f"class {index}" for index in range(1, count)]
    names = default if value is None else value.split(",") if isinstance(value, str) else [str(v) for v in value]
    if len(names) != count - 1:
        raise ValueError(f"--labels: expected {count - 1} names (without background), but got {len(names)}")
    return {"0": "background"} | {str(index): name.strip() for index, name in enumerate(names, start=1)}


def image_mask_folder(
    source: str,
    out: str,
    *,
    images: str = "images",
    masks: str = "masks",
    mask_suffix: str = "",
    group_pattern: str | None = None,
    groups: str | None = None,
    num_classes: int = 1,
    labels: str | Sequence[str] | None = None,
    foreground: str | int | Sequence[int] | None = None,
    mask_colour: str | None = None,
    window: str | Sequence[float] | None = None,
    seed: int = 42,
    fractions: str | Sequence[float] = (0.7, 0.1, 0.2),
    workers: int = 0,
) -> None:
    """Prepare a folder of images and a folder of masks of the same names: check, clean the masks, split by group.

    Pictures (PNG, JPEG, TIFF, BMP, DICOM) are copied as they are, DICOM as 16-bit PNG; volumes (NIfTI) become
    uncompressed NIfTI. Give --group_pattern or --groups if several images are of one patient or one video: without them
    each image is a group of its own, and the same person may be in two sections. Images of equal content stay together
    in any case. What does not fit is left out and named in preparation.json.

    Args:
        source: folder that holds both folders.
        out: dataset folder to make: images/, labels/, datalist.json, preparation.json.
        images: folder of the images, relative to source; sub-folders are searched.
        masks: folder of the masks, relative to source; may be that of the images, with mask_suffix.
        mask_suffix: ending of a mask's name that the image's has not, such as _mask.
        group_pattern: regular expression, searched in the image's path below its folder; its first group is the
            patient or sequence, such as '^(patient\\d+)_'.
        groups: CSV file with the columns image (name, with or without suffix and folder) and group.
        num_classes: 1 (binary), or the number of classes with background 0.
        labels: names of the classes 1.., such as liver,spleen.
        foreground: levels of odd masks: binary: those that are foreground, such as 1,2; multi-class: those of the
            classes 1.. in order. Every other level is background.
        mask_colour: '#RRGGBB', the colour of the foreground in masks that are in colour.
        window: LOW,HIGH in the units of the volumes that become 0 and 1, such as -175,250; without it each volume is
            scaled by its own robust range.
        seed: of the split.
        fractions: share of the groups for training, validation and test.
        workers: threads; 0 works in the main thread.
    """
    check_workers(workers)
    limits, pattern = parse_window(window), _pattern(group_pattern)
    coding = MaskCoding(num_classes, parse_levels(foreground), parse_colour(mask_colour))
    names = _class_names(labels, num_classes)
    if groups is not None and pattern is not None:
        raise ValueError("--groups: expected either --groups or --group_pattern, but got both; give one")
    folder, target = check_places(source, out)
    image_folder, mask_folder = check_folder(folder / images, "--images"), check_folder(folder / masks, "--masks")
    check_places(str(image_folder), out), check_places(str(mask_folder), out)
    if image_folder.resolve() == mask_folder.resolve() and not mask_suffix:
        raise ValueError(f"{image_folder}: expected --mask_suffix, as images and masks lie in one folder")
    table = _read_groups(groups, folder)
    preparation = Preparation(
        "image_mask_folder",
        {"images": images, "masks": masks, "mask_suffix": mask_suffix, "group_pattern": group_pattern, "groups": groups,
         "num_classes": num_classes, "foreground": coding.foreground, "mask_colour": mask_colour, "window": limits,
         "seed": seed, "fractions": fractions},
    )  # fmt: skip
    image_files, mask_files = _list_both(image_folder, mask_folder, mask_suffix, target)
    found = index_files(image_files, _key(image_folder), preparation, what="image")
    wanted = index_files(mask_files, _key(mask_folder, mask_suffix), preparation, what="mask")
    matched = match_names(found, wanted, preparation)
    if not matched:
        raise ValueError(
            f"{image_folder}: expected images whose masks in {mask_folder} have the same name, but of {len(found)} "
            f"images ({next(iter(found), 'none')}) and {len(wanted)} masks ({next(iter(wanted), 'none')}) none match; "
            "name the masks' ending with --mask_suffix, such as _mask"
        )
    pairs = []
    for name in matched:
        group = _group_of(found[name], name, image_folder, pattern, table)
        if group is None:
            preparation.drop("no group in --group_pattern or --groups", str(found[name]))
        elif is_nifti(found[name]) != is_nifti(wanted[name]):
            preparation.drop("picture with volume", f"{wanted[name]}: expected the kind of {found[name].name}")
        else:
            pairs.append(Pair(found[name], wanted[name], name, group))
    if pattern is None and table is None:
        preparation.warn("no groups given: each image is a group of its own", str(image_folder))

    def one(pair: Pair) -> Outcome:
        if is_nifti(pair.image):
            return convert_volume(pair, target, coding.encode, window=limits)
        return convert_picture(pair, target, coding.read_picture, num_classes=num_classes)

    entries = convert_pairs(pairs, one, preparation, workers=workers)
    by = "by group" if pattern is not None or table is not None else "by image (no groups were given)"
    write_sections(
        entries, target, preparation, what="items", seed=seed, fractions=fractions,
        description=f"Images and masks of a folder; split {by}", num_classes=num_classes, labels=names,
    )  # fmt: skip
