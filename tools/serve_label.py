# SPDX-License-Identifier: Apache-2.0
"""Serve exported bundles with MONAI Label: `python -m tools.serve_label prepare|start|ask|train|check`.

Runs in MONAI Label's environment and in the project's; guide: docs/monai_label.md.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from fire.decorators import SetParseFn

from shared.files import atomic_path, save_json
from tools import command_line
from tools.label_check import check
from tools.label_folders import (
    RECORD,
    chosen_models,
    label_python,
    listed,
    put_app,
    put_labels,
    put_studies,
    read_record,
    server_environment,
)
from tools.label_requests import check_names, describe, get_json, infer, post_json, suffix_of

SHOWN = 20


@SetParseFn(str, "bundles", "studies", "only", "labels", "training")
def prepare(
    bundles: str,
    out: str,
    *,
    studies: str = "",
    only: str = "",
    labels: str = "",
    training: str = "",
    link: bool = False,
    overwrite: bool = False,
) -> None:
    """Make OUT/app (MONAI Label's app with the bundles) and OUT/studies (copies of the images).

    Args:
        bundles: exported bundles, separated by commas.
        out: folder to make. What it holds of an earlier `prepare` is replaced, all else is kept.
        studies: folders of images, separated by commas; empty for none (cxr_ldm needs none). The id of an image is its
            file name without ending, with its folders where that is not unique.
        only: patterns of files, separated by commas: `*FLAIR*,*dwi*`; empty takes all images.
        labels: section of datalist.json whose masks are to train on: `training`; empty for none.
        training: values for the training as JSON, which clients cannot choose: '{"learning_rate": 0.0001}'.
        link: link the bundles instead of copying them. Not for a server that trains: it would change their weights.
        overwrite: replace an app in which a bundle was trained.

    Raises:
        FileNotFoundError, ValueError: not an exported bundle, no studies, ids that collide, a trained bundle in the
            way. The message starts with the path.
    """
    root, places = Path(out).absolute(), [Path(bundle) for bundle in listed(bundles)]
    names = [place.resolve().name for place in places]
    if not names or len({*names}) != len(names):
        raise ValueError(f"bundles: expected exported bundles of different names, got {names}; see docs/monai_label.md")
    put_app(root, places, link=bool(link), overwrite=bool(overwrite), training=_as_options(training, "training"))
    folders = [Path(folder) for folder in listed(studies)]
    ids = put_studies(root, folders, patterns=listed(only))
    masks = put_labels(root, folders, ids, section=labels) if labels else 0
    files = {name: str(root / "studies" / f"{name}{suffix_of(path.name)}") for path, name in ids.items()}
    save_json({**read_record(root), "models": names, "linked": bool(link), "studies": files}, root / RECORD)
    print(f"{root}: models {', '.join(names)}; {len(ids)} studies, {masks} with a mask to train on")
    for path, name in sorted(ids.items(), key=lambda item: item[1])[:SHOWN]:
        print(f"  {name}  <-  {path}")
    if len(ids) > SHOWN:
        print(f"  ... and {len(ids) - SHOWN} more")


def start(out: str, *, port: int = 8000, train: bool = False, models: str = "") -> None:
    """Run the server on 127.0.0.1, without a network, until it is stopped with Ctrl-C.

    Args:
        out: folder that `prepare` made.
        port: of 127.0.0.1.
        train: offer training. Only for sdseg, on copied bundles; the weights in OUT/app change.
        models: names, separated by commas; empty serves all that were prepared.

    Raises:
        FileNotFoundError, ValueError: not prepared, unknown model, no MONAI Label, or training of another bundle.
    """
    root = Path(out).absolute()
    chosen = chosen_models(root, listed(models), train=bool(train))
    python = label_python()
    command = [python, "-m", "monailabel.main", "start_server", "--app", str(root / "app"), "--host", "127.0.0.1"]
    command += ["--studies", str(root / "studies"), "--port", str(port), "--conf", "models", ",".join(chosen)]
    # `local`: any word but the default, which asks GitHub for the list of the zoo even for a local bundle.
    command += ["--conf", "zoo_source", "local", "--conf", "sam2", "false"]
    command += ["--conf", "skip_trainers", "false" if train else "true"]
    print(" ".join(command), flush=True)
    environment = server_environment()
    os.chdir(root)
    # Becomes the server, so that whoever started or stops this process starts or stops the server.
    os.execve(python, command, environment)


# As typed: fire would make a number of the id `001` and a text of JSON's `true`.
@SetParseFn(str, "image", "params")
def ask(url: str, model: str, *, image: str = "", params: str = "", file: str = "", out: str = "answers") -> None:
    """Send one request, store the file and the JSON of the answer, print size, affine, hash and seconds.

    Args:
        url: http://127.0.0.1:8000
        model: name of a bundle.
        image: id of a study; any word for cxr_ldm.
        params: options as JSON: '{"seed": 3}'.
        file: a file to send instead of an id.
        out: folder for the answer.
    """
    options = _as_options(params)
    check_names(url, model, options)
    answer = infer(url, model, str(image), parameters=options, file=file or None)
    stem = Path(out) / f"{model}_{Path(file).name.split('.')[0] if file else image}"
    save_json({"model": model, "image": str(image), "params": options, "answer": answer.parameters}, f"{stem}.json")
    if not answer.content:
        print(json.dumps(answer.parameters, indent=2))
        return
    path = stem.with_name(stem.name + answer.suffix)
    with atomic_path(path) as temporary:
        temporary.write_bytes(answer.content)
    for name, value in describe(path, answer).items():
        print(f"{name}: {value}")


@SetParseFn(str, "params")
def train(url: str, model: str = "sdseg", *, params: str = "", timeout: float = 86400, every: float = 5) -> None:
    """Start a training on the masks in studies/labels/final and wait for its end.

    Args:
        url: http://127.0.0.1:8000
        model: name of a bundle.
        params: as JSON: '{"max_epochs": 20, "val_split": 0.2}'.
        timeout: seconds to wait.
        every: seconds between questions.

    Raises:
        ConnectionError: the server refused. TimeoutError, ValueError: not finished in time, or it failed.
    """
    started = time.monotonic()
    task = post_json(url, f"train/{model}", _as_options(params))
    while time.monotonic() - started < timeout:
        state: dict[str, Any] = next((t for t in get_json(url, "train/?all=true") if t["id"] == task["id"]), {})
        if state.get("status") == "DONE":
            print(f"{model}: trained in {time.monotonic() - started:.0f} s")
            return
        if state.get("status") == "ERROR":
            details = "\n".join(str(line).rstrip() for line in state.get("details", [])[-15:])
            raise ValueError(f"{model}: the training failed. The end of its log:\n{details}")
        time.sleep(every)
    raise TimeoutError(f"{model}: the training did not end in {timeout} s; look at GET {url}/train/")


def _as_options(params: str, name: str = "params") -> dict[str, Any]:
    try:
        options = json.loads(params) if params else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: expected JSON such as '{{\"seed\": 3}}', got {params!r}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{name}: expected JSON of names and values, got {params!r}")
    return options


COMMANDS = {"prepare": prepare, "start": start, "ask": ask, "train": train, "check": check}

if __name__ == "__main__":
    command_line.run(COMMANDS, name="tools.serve_label")
