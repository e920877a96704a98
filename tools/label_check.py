# SPDX-License-Identifier: Apache-2.0
"""Requests to a running MONAI Label server, compared with one another and with `monai.bundle run`, as a table."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared.files import atomic_path, save_json, sha256_of_file
from tools.label_folders import listed, read_record
from tools.label_requests import Answer, get_json, infer, read_image

VERSIONS = (
    "import json, platform as p; from importlib.metadata import version as v; "
    "print(json.dumps({'python': p.python_version(), **{n: v(n) for n in ('monai', 'torch', 'numpy')}}))"
)


@dataclass(frozen=True)
class Case:
    """A request that is answered.

    Attributes:
        model: name of the bundle.
        image: pattern of the study's id, the first that fits is taken; "" for a model that reads no image.
        parameters: options of the request, and of `monai.bundle run`.
        results: patterns of the files that `monai.bundle run` writes; several are maps, stacked along a last axis.
        levels: value of a foreground of 1 in the picture that `monai.bundle run` writes.
    """

    model: str
    image: str
    results: tuple[str, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    levels: int = 1


_MAPS = ("*_ndi.nii.gz", "*_odi.nii.gz", "*_fwf.nii.gz")
# Few steps: what is compared is the way through the server, not the quality of the answer.
CASES = (
    Case("sdseg", "g*_1", ("*_mask.png",), levels=255),
    Case("sdseg", "g*_1", ("*_mask.png",), {"seed": 3, "num_samples": 3, "num_inference_steps": 5}, levels=255),
    Case("sdseg", "img*", ("*_mask.nii.gz",), {"num_inference_steps": 2}),
    Case("brain_controlnet", "*FLAIR", ("*T1w.nii.gz",), {"num_inference_steps": 5}),
    Case(
        "brain_controlnet",
        "*FLAIR",
        ("*T1w.nii.gz",),
        {"seed": 3, "scheduler": "ddim", "num_inference_steps": 4, "conditioning_scale": 0.5},
    ),
    Case("dmri2noddi", "*dwi", _MAPS, {"num_inference_steps": 3}),
    Case("dmri2noddi", "*dwi", _MAPS, {"deterministic": True}),
    Case("cxr_ldm", "", ("*.png",), {"prompt": "Small left-sided pleural effusion.", "num_inference_steps": 8}),
    Case(
        "cxr_ldm",
        "",
        ("*.png",),
        {"prompt": "Big heart, no effusion.", "seed": 3, "guidance_scale": 2.0, "num_inference_steps": 8},
    ),
)
# Each of these must be refused with a message that starts with the name of the option.
REFUSED = (
    ("sdseg", {"num_samples": 0}),
    ("sdseg", {"seed": "$1+1"}),
    ("brain_controlnet", {"scheduler": "euler"}),
    ("brain_controlnet", {"seed": "$1+1"}),
    ("dmri2noddi", {"num_inference_steps": "many"}),
    ("dmri2noddi", {"seed": "$1+1"}),
    ("cxr_ldm", {"guidance_scale": -1}),
    ("cxr_ldm", {"negative_prompt": "$1+1"}),
)
NO_IMAGE = "none"


def check(url: str, work: str, *, pythons: str = "", out: str = "answers", note: str = "") -> None:
    """Ask every model twice, compare the answers with `monai.bundle run`, and print the table.

    Args:
        url: of the server, http://127.0.0.1:8000.
        work: folder that `prepare` made for it.
        pythons: interpreters, separated by commas, that run the same bundle for comparison; empty for none.
        out: folder for the answers.
        note: Markdown file to write the table to; empty prints it only.

    Raises:
        ConnectionError: no server. ValueError: an answer that differs, or a wrong option that is not refused by name;
            after the table.
    """
    models = get_json(url, "info/")["models"]
    ids = sorted(get_json(url, "datastore/?output=all")["objects"])
    interpreters = [interpreter(python) for python in listed(pythons)]
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, case in enumerate(case for case in CASES if case.model in models):
        image = next((i for i in ids if fnmatch.fnmatch(i, case.image)), "") if case.image else NO_IMAGE
        if not image:
            problems.append(f"{case.model}: no study like {case.image}")
            continue
        study = "" if image == NO_IMAGE else read_record(Path(work))["studies"][image]
        row, path = _ask_twice(url, case, image, study, Path(out) / f"{number}")
        for python in interpreters:
            row[_named(python)] = _difference(case, path, Path(work).absolute(), study, python)
        print(f"{case.model} {image} {dict(case.parameters)}: {row}", file=sys.stderr, flush=True)
        rows.append(row)
        problems += [f"{case.model} {image} {dict(case.parameters)}: {fault}" for fault in _faults(row)]
    refusals = [_refusal(url, model, options, ids) for model, options in REFUSED if model in models]
    problems += [f"{r['bundle']}: {r['options']} was answered with {r['answer']}" for r in refusals if not r["named"]]
    # Also shows that it is still there.
    server = get_json(url, "info/")["name"]
    environments = {_named(python): _versions(python) for python in interpreters}
    text = _as_note(Path(work), rows, refusals, environments, server=server)
    print(text)
    if note:
        with atomic_path(note) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if problems:
        raise ValueError("check: expected equal answers and named refusals, but:\n" + "\n".join(problems))


def _ask_twice(url: str, case: Case, image: str, study: str, folder: Path) -> tuple[dict[str, Any], Path]:
    answers = [infer(url, case.model, image, parameters=case.parameters) for _ in range(2)]
    path = _saved(answers[0], folder / f"{case.model}{answers[0].suffix}")
    save_json(answers[0].parameters, folder / f"{case.model}.json")
    values, affine = read_image(path)
    row = {
        "bundle": case.model,
        "study": "(none)" if image == NO_IMAGE else image,
        "options": dict(case.parameters),
        "answer": answers[0].suffix,
        "size": " x ".join(map(str, values.shape)),
        "type": str(values.dtype),
        "range": f"{values.min():.4g} to {values.max():.4g}",
        "affine": "none" if affine is None else _compared(values, affine, study),
        "sha256": answers[0].sha256[:16],
        "same twice": answers[0].sha256 == answers[1].sha256,
        "seconds": f"{answers[0].seconds:.2f}, {answers[1].seconds:.2f}",
    }
    return row, path


def _compared(values: np.ndarray, affine: np.ndarray, study: str) -> str:
    given, own = read_image(study)
    if own is not None and given.shape[:3] == values.shape[:3]:
        return "equal to the input's" if np.allclose(affine, own, atol=1e-4) else "NOT THE INPUT'S"
    return "voxels of " + " x ".join(f"{size:.2f}" for size in np.linalg.norm(affine[:3, :3], axis=0)) + " mm"


def _saved(answer: Answer, path: Path) -> Path:
    with atomic_path(path) as temporary:
        temporary.write_bytes(answer.content)
    return path


def _difference(case: Case, path: Path, work: Path, study: str, python: str) -> str:
    """What `monai.bundle run` of the served bundle in another interpreter says about the same file."""
    bundle = work / "app" / "model" / case.model
    with tempfile.TemporaryDirectory() as folder:
        options = {"output_dir": folder, **case.parameters}
        if study:
            options["dataset_dir"] = study
        run_bundle(python, bundle, options)
        found = [sorted(Path(folder).rglob(pattern)) for pattern in case.results]
        if any(len(files) != 1 for files in found):
            return f"expected one file each of {list(case.results)}, got {found}"
        results = [read_image(files[0]) for files in found]
        same_bytes = len(found) == 1 and found[0][0].read_bytes() == path.read_bytes()
    values, affine = read_image(path)
    expected = np.stack([r[0] for r in results], axis=-1) if len(results) > 1 else results[0][0]
    expected = expected // case.levels if case.levels > 1 else expected
    if expected.shape != values.shape:
        return f"size {expected.shape}"
    grid = results[0][1]
    if affine is not None and (grid is None or not np.allclose(affine, grid, atol=1e-4)):
        return "another affine"
    largest = float(np.abs(expected.astype(np.float64) - values.astype(np.float64)).max())
    return "same bytes" if same_bytes else "equal" if largest == 0 else f"differs by at most {largest:.3g}"


def run_bundle(python: str, bundle: Path, options: Mapping[str, Any]) -> None:
    """`python -m monai.bundle run` on the inference of a bundle, with nothing of this repository on the path.

    Raises:
        ValueError: it failed; the message ends with its log.
    """
    words = [python, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    for name, value in options.items():
        # Quoted twice: a text with a comma would become a tuple.
        words += [f"--{name}", json.dumps(value) if isinstance(value, str) else str(value)]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=bundle, env=kept, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise ValueError(f"{bundle}: expected {python} to run it, got: {(done.stdout + done.stderr)[-2000:]}")


def _faults(row: Mapping[str, Any]) -> list[str]:
    faults = [] if row["same twice"] else ["the second answer differs from the first"]
    faults += ["the affine is not that of the input"] if row["affine"] == "NOT THE INPUT'S" else []
    verdicts = ("same bytes", "equal")
    return faults + [f"{name}: {row[name]}" for name in row if name.startswith("MONAI") and row[name] not in verdicts]


def _refusal(url: str, model: str, options: dict[str, Any], ids: Sequence[str]) -> dict[str, Any]:
    pattern = next(case.image for case in CASES if case.model == model)
    image = next((i for i in ids if fnmatch.fnmatch(i, pattern)), NO_IMAGE)
    try:
        infer(url, model, image, parameters=options)
        answer = "an image"
    except ConnectionError as error:
        answer = str(error).partition(": the server answered ")[2]
    told = answer.partition('"detail":"')[2].removesuffix('"}')
    return {"bundle": model, "options": options, "answer": answer, "named": told.startswith(f"{next(iter(options))}:")}


def _versions(python: str) -> dict[str, str]:
    return json.loads(subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout)


def interpreter(python: str) -> str:
    """Absolute path of a Python: bundles are run in their own folders.

    Raises:
        FileNotFoundError: there is none.
    """
    found = shutil.which(python)
    if found is None:
        raise FileNotFoundError(f"{python}: expected a Python interpreter, but there is none; correct --pythons")
    return os.path.abspath(found)


def _named(python: str) -> str:
    return f"MONAI {_versions(python)['monai']}"


def _as_note(
    work: Path,
    rows: Sequence[Mapping[str, Any]],
    refusals: Sequence[Mapping[str, Any]],
    environments: Mapping[str, Mapping[str, str]],
    *,
    server: str,
) -> str:
    served = [_served(work / "app" / "model" / name) for name in read_record(work)["models"]]
    device = f"{os.cpu_count()} hyper-threads, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"
    lines = [
        "# MONAI Label: answers of the exported bundles",
        "",
        "Made by `python -m tools.serve_label check URL OUT --pythons ... --note FILE` ([guide](../monai_label.md)): "
        "each request was sent twice to a running server, and the same bundle run with `python -m monai.bundle run` in "
        "the environments below. Seconds are those of both requests, the first with loading; other work may have run "
        "beside it.",
        "",
        f"Server: {server}. Machine of the client: {device}.",
        "",
        *(f"- {name}: {_listed_versions(versions)}" for name, versions in environments.items()),
        "",
        *_table(served),
        "",
        "## Answers",
        "",
        "`same bytes`: the file of the run; `equal`: its values and affine (a mask's 0 and 255 taken as 0 and 1, maps "
        "stacked), in another file.",
        "",
        *_table(rows),
        "",
        "## Refused",
        "",
        *_table(refusals),
    ]
    return "\n".join(lines) + "\n"


def _listed_versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def _served(bundle: Path) -> dict[str, Any]:
    manifest = bundle / "manifest.json"
    said = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    weights = bundle / "models" / "model.pt"
    return {
        "bundle": bundle.name,
        **{name: said.get(name, "unknown") for name in ("version", "build", "commit")},
        "sha256 of models/model.pt": sha256_of_file(weights),
        "MB": f"{weights.stat().st_size / 1e6:.1f}",
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return lines + ["| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |" for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, Mapping | list):
        return f"`{json.dumps(value)}`" if value else "-"
    return str(value).replace("|", "/")
