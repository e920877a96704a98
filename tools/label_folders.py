# SPDX-License-Identifier: Apache-2.0
"""Folders that a MONAI Label server reads: its app with our bundles in it, and the studies."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.files import save_json
from tools.label_requests import suffix_of

# What the server takes as an image (MONAI_LABEL_DATASTORE_FILE_EXT), as far as our bundles read it.
SERVED = (".nii.gz", ".nii", ".jpg", ".png", ".tif")
TRAINABLE = ("sdseg",)
APP = "monaibundle"
RECORD = "served.json"
LABEL_PYTHON = Path(".label") / "bin" / "python"


def label_python() -> str:
    """This Python where it has MONAI Label, else that of .label.

    Raises:
        FileNotFoundError: neither.
    """
    if importlib.util.find_spec("monailabel") is not None:
        return sys.executable
    if LABEL_PYTHON.is_file():
        return str(LABEL_PYTHON.absolute())
    raise FileNotFoundError(f"{LABEL_PYTHON}: expected MONAI Label's environment, but there is none; run: make label")


def server_environment() -> dict[str, str]:
    """Environment variables of the server: nothing of this repository on the path, no look at a network."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSTARTUP")}
    # A training is a process of its own, which the server looks for on PATH.
    path = f"{Path(label_python()).parent}{os.pathsep}{kept.get('PATH', '')}"
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return {**kept, **offline, "PATH": path, "PYTHONUNBUFFERED": "1"}


def read_record(root: Path) -> dict[str, Any]:
    """What `prepare` put into a folder: `models`, `linked`, and `studies`, id -> file.

    Raises:
        FileNotFoundError: nothing was prepared there.
    """
    record = root / RECORD
    if not record.is_file():
        raise FileNotFoundError(f"{record}: expected what `prepare` writes, but there is none; run that first")
    return json.loads(record.read_text(encoding="utf-8"))


def put_app(root: Path, bundles: Sequence[Path], *, link: bool, overwrite: bool, training: Mapping[str, Any]) -> None:
    """Make `root/app`: MONAI Label's app out of its wheel, and below `model` the bundles under their names.

    Args:
        root: folder to make.
        bundles: exported bundles.
        link: link them instead of copying them.
        overwrite: replace an app in which a bundle was trained.
        training: values for `configs/train.json` of the copies.

    Raises:
        FileNotFoundError, ValueError: not exported bundles, a trained one in the way, or no such id in train.json.
    """
    for bundle in bundles:
        _check_bundle(bundle)
    app = root / "app"
    trained = sorted(app.glob("model/*/runs"))
    if trained and not overwrite:
        raise ValueError(f"{trained[0].parent}: was trained here; copy its models away, then give --overwrite")
    if app.exists():
        shutil.rmtree(app)
    root.mkdir(parents=True, exist_ok=True)
    # The app lies in the wheel: nothing is downloaded.
    command = [label_python(), "-m", "monailabel.main", "apps", "--download", "--name", APP, "--output", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env=server_environment(), check=False)
    if not (root / APP / "main.py").is_file():
        told = (done.stdout + done.stderr)[-800:]
        raise FileNotFoundError(f"{root / APP}: expected MONAI Label's app, got: {told}")
    (root / APP).rename(app)
    (app / "model").mkdir(exist_ok=True)
    for bundle in bundles:
        place = app / "model" / bundle.resolve().name
        if link:
            place.symlink_to(bundle.resolve(), target_is_directory=True)
        else:
            shutil.copytree(bundle, place, ignore=shutil.ignore_patterns("__pycache__", "eval", "runs"))
            if training:
                set_training(place / "configs" / "train.json", training)


def set_training(path: Path, values: Mapping[str, Any]) -> None:
    """Write values of ids at the top of a training's configuration: a client cannot choose them.

    Raises:
        ValueError: no such id.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    unknown = [name for name in values if name not in config]
    if unknown:
        raise ValueError(f"{path}: expected ids of this file, got {unknown[0]!r}; such as learning_rate, batch_size")
    save_json({**config, **values}, path)


def put_studies(root: Path, sources: Sequence[Path], *, patterns: Sequence[str]) -> dict[Path, str]:
    """Copy images to `root/studies`; returns file -> id.

    Copies, as the server follows links: a client that deletes or uploads an image by its id would do so to the
    original. The gradients and the mask of a diffusion series come with it.

    Args:
        root: folder that `prepare` makes.
        sources: folders of images at any depth.
        patterns: of `folder/sub/file`, one of which an image must fit; none takes all.

    Raises:
        FileNotFoundError, ValueError: no such folder, nothing in it that is served, or two images of one id.
    """
    files: dict[Path, str] = {}
    for source in sources:
        if not source.is_dir():
            raise FileNotFoundError(f"{source}: expected a folder of images, but there is none; correct the path")
        found = {file: f"{source.resolve().name}/{file.relative_to(source).as_posix()}" for file in _images(source)}
        if patterns:
            found = {f: name for f, name in found.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}
        if not found:
            like = f" like {', '.join(patterns)}" if patterns else ""
            raise FileNotFoundError(
                f"{source}: expected images {', '.join(SERVED)}{like}, but there are none; other formats can be sent "
                "with `ask --file`"
            )
        files |= found
    ids = ids_of(files)
    folder = root / "studies"
    for old in read_record(root)["copied"] if (root / RECORD).is_file() else []:
        (folder / old).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    copied: list[str] = []
    try:
        for file, name in ids.items():
            for source_file, copy in {file: name + suffix_of(file.name), **_companions(file, name)}.items():
                if (folder / copy).exists():
                    raise ValueError(f"{folder / copy}: was put there by somebody else; move it away")
                shutil.copyfile(source_file, folder / copy)
                copied.append(copy)
    finally:
        save_json({"copied": copied}, root / RECORD)
    return ids


def put_labels(root: Path, sources: Sequence[Path], ids: Mapping[Path, str], *, section: str) -> int:
    """Copy masks of a section of `datalist.json` to `root/studies/labels/final`, where a training looks.

    A mask that is there already, perhaps drawn in a viewer, stays.

    Returns:
        Number of studies with a mask.

    Raises:
        FileNotFoundError, ValueError: no data list, or no mask of a study in this section.
    """
    folder = root / "studies" / "labels" / "final"
    folder.mkdir(parents=True, exist_ok=True)
    known = {path.resolve(): name for path, name in ids.items()}
    count = 0
    for source in sources:
        listed = source / "datalist.json"
        if not listed.is_file():
            raise FileNotFoundError(f"{listed}: expected it for the labels of {section!r}, but there is none")
        for item in json.loads(listed.read_text(encoding="utf-8")).get(section, []):
            name = known.get((source / item["image"]).resolve()) if item.get("label") else None
            if name is not None:
                mask = source / item["label"]
                place = folder / f"{name}{suffix_of(mask.name)}"
                if not place.exists():
                    shutil.copyfile(mask, place)
                count += 1
    if not count:
        raise ValueError(f"labels: expected items with image and label in the section {section!r}, but there are none")
    return count


def chosen_models(root: Path, wanted: Sequence[str], *, train: bool) -> list[str]:
    """Names of the models to serve: the wanted ones, or all that were prepared.

    Raises:
        FileNotFoundError, ValueError: not prepared, unknown, or a training that MONAI Label cannot do.
    """
    record = read_record(root)
    unknown = [name for name in wanted if name not in record["models"]]
    if unknown:
        raise ValueError(f"models: expected some of {record['models']}, got {unknown[0]!r}; prepare it first")
    chosen = list(wanted) or record["models"]
    others = [name for name in chosen if name not in TRAINABLE]
    if train and others:
        raise ValueError(
            f"train: expected {' or '.join(TRAINABLE)} alone, got {others[0]!r}, whose training needs more than images "
            "with masks; give --models sdseg, or start without --train"
        )
    if train and record["linked"]:
        raise ValueError("train: expected copied bundles, as training writes their weights; prepare without --link")
    return chosen


def ids_of(files: Mapping[Path, str]) -> dict[Path, str]:
    """Shortest unique id: of the file, with its folders, with the studies' folder too; the server knows no more.

    Args:
        files: file -> `studies/sub/file`.

    Raises:
        ValueError: two files of one id, such as `a/b.png` and `a_b.png`.
    """
    plain = {file: shown.removesuffix(suffix_of(file.name)) for file, shown in files.items()}
    levels = [{file: name.rsplit("/", 1)[-1] for file, name in plain.items()}]
    levels += [{file: name.split("/", 1)[-1].replace("/", "_") for file, name in plain.items()}]
    levels += [{file: name.replace("/", "_") for file, name in plain.items()}]
    counts = [Counter(level.values()) for level in levels]
    ids = {}
    for file in files:
        names = [level[file] for level in levels]
        ids[file] = next((n for n, count in zip(names, counts, strict=True) if count[n] == 1), names[-1])
    twice = [name for name, count in Counter(ids.values()).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]}: expected one image of this id, got several; choose with --only which to serve")
    return ids


def _check_bundle(bundle: Path) -> None:
    missing = [f for f in ("configs/inference.json", "configs/metadata.json") if not (bundle / f).is_file()]
    if missing:
        raise FileNotFoundError(f"{bundle}: expected an exported bundle, but {missing[0]} is missing; export it")
    weights = sorted(path.name for path in (bundle / "models").glob("*.pt"))
    # The server loads the shortest name into network_def, whatever it holds.
    if weights != ["model.pt"]:
        raise ValueError(f"{bundle / 'models'}: expected model.pt and no other .pt, got {weights}; export it")


def _images(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.name.endswith(SERVED) and file.is_file())
    return sorted(file for file in files if not any(p.startswith(".") for p in file.relative_to(folder).parts))


def _companions(file: Path, name: str) -> dict[Path, str]:
    """What lies beside a diffusion series and is read with it, with the name of its copy."""
    stem = file.name.removesuffix(suffix_of(file.name))
    if not any(file.with_name(stem + ending).is_file() for ending in (".bval", ".bvec")):
        return {}
    from shared.noddi_items import inference_items

    item = inference_items(file)[0]
    copies = {Path(item[key]): f"{name}.{key}" for key in ("bval", "bvec")}
    if item.get("mask"):
        copies[Path(item["mask"])] = f"{name}_mask{suffix_of(item['mask'])}"
    return copies


def listed(value: str | Iterable[Any]) -> list[str]:
    """`a,b` as it is typed, or the tuple that fire makes of it."""
    parts = value.split(",") if isinstance(value, str) else value
    return [str(part).strip() for part in parts if str(part).strip()]
