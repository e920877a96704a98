# SPDX-License-Identifier: Apache-2.0
"""Do the bundles draw the same with other versions of MONAI, numpy, torch and Python?

`python -m tools.compare_versions --bundles DIST/sdseg,DIST/cxr_ldm --pythons A/bin/python,B/bin/python --out DIR`
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.files import atomic_path, save_json
from tools.command_line import run
from tools.compare_results import Comparison, compare_folders
from tools.phantoms.__main__ import BUNDLES as PHANTOMS

REPOSITORY = Path(__file__).resolve().parent.parent
# Imports nothing but the standard library, so that it runs in any environment.
_VERSIONS = """
import json, platform
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version()}
for name in ("monai", "numpy", "torch", "scipy", "pytorch-ignite", "nibabel", "pillow", "dipy"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Workload:
    """What a bundle's inference is given, small.

    Attributes:
        phantoms: sample data, as of `tools.phantoms`; None: the bundle needs none.
        options: ids of ``inference.json`` -> value.
    """

    phantoms: Mapping[str, Any] | None
    options: Mapping[str, Any]


WORKLOADS = {
    "sdseg": Workload({"num_images": 20, "seed": 1}, {"num_samples": 2}),
    "brain_controlnet": Workload({"n": 7, "size": (80, 112, 6)}, {"num_samples": 2, "num_inference_steps": 8}),
    "dmri2noddi": Workload(
        {"num_subjects": 3, "shape": (36, 40, 32), "split": (0.34, 0.33, 0.33)},
        {"num_samples": 2, "num_inference_steps": 4},
    ),
    "cxr_ldm": Workload(None, {"num_samples": 3, "num_inference_steps": 10}),
}


def compare_versions(
    bundles: str | Sequence[str],
    pythons: str | Sequence[str],
    out: str,
    *,
    tolerance: float = 0.0,
    timeout: float = 600.0,
    overlay: str = "",
) -> None:
    """Run the inference of bundles with several interpreters and compare what they write; exit code 1 if they differ.

    `OUT/versions.json` and `OUT/versions.md` hold the table, `OUT/runs/A/sdseg` the results, `OUT/runs/A/sdseg.log`
    what was printed. An exported bundle runs from an empty folder with an empty PYTHONPATH, a source folder
    (`bundles/sdseg`) with this repository on it and `configs/tiny.json` laid over.

    Args:
        bundles: folders, separated by commas; the name of a folder says which bundle it is.
        pythons: interpreters, separated by commas; the others are compared with the first.
        out: folder to write.
        tolerance: largest allowed difference of pixels and voxels, as stored (0 to 255 in an 8-bit PNG).
        timeout: seconds for a run.
        overlay: overlay of exported bundles by its name, such as `tiny`; none by default.

    Raises:
        ValueError: a folder that is no known bundle, or fewer than two interpreters.
    """
    folders = [_bundle(path) for path in _paths(bundles)]
    # Not resolved: the interpreter of a virtual environment is a link, and finds its packages by where the link is.
    interpreters = {chr(ord("A") + i): Path(os.path.abspath(path)) for i, path in enumerate(_paths(pythons))}
    if len(interpreters) < 2:
        raise ValueError(f"--pythons: expected two interpreters or more, separated by commas, got {pythons!r}.")
    root = Path(os.path.abspath(out))
    versions = {label: versions_of(path) for label, path in interpreters.items()}
    failures: list[str] = []
    comparisons: list[Comparison] = []
    for folder in folders:
        data = _sample_data(folder.name, root)
        failed = set()
        for label, python in interpreters.items():
            print(f"{folder.name} with {label}: {describe(versions[label])}", flush=True)
            fault = infer(folder, python, root / "runs" / label / folder.name, data, timeout=timeout, overlay=overlay)
            if fault:
                failed.add(label)
                failures.append(f"{folder.name} with {label}: {fault}")
        first, *others = interpreters
        for label in others:
            if not {first, label} & failed:
                comparisons += compare_folders(
                    root / "runs" / first / folder.name, root / "runs" / label / folder.name, folder.name, label
                )
    wrong = [c for c in comparisons if not c.acceptable(tolerance)]
    save_json(
        {"versions": versions, "failures": failures, "files": [asdict(comparison) for comparison in comparisons]},
        root / "versions.json",
    )
    table = markdown(versions, comparisons, failures)
    with atomic_path(root / "versions.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    print(table)
    if failures or wrong:
        sys.exit(f"{len(failures)} runs failed and {len(wrong)} files differ; see {root}/versions.md")


def _paths(value: str | Sequence[str]) -> list[str]:
    """fire makes a tuple of some lists of words and leaves others a string."""
    words = value.strip("[]() ").split(",") if isinstance(value, str) else value
    return [str(word).strip() for word in words if str(word).strip()]


def _bundle(path: str) -> Path:
    folder = Path(os.path.abspath(path))
    if folder.name not in WORKLOADS or not (folder / "configs/inference.json").is_file():
        raise ValueError(
            f"{path}: expected the folder of a bundle with configs/inference.json, called {', '.join(WORKLOADS)}; "
            "export one with python -m tools.export_bundle, or correct --bundles."
        )
    return folder


def _sample_data(name: str, root: Path) -> Path | None:
    """Sample data of a bundle, made anew by this interpreter for all of them."""
    workload = WORKLOADS[name]
    if workload.phantoms is None:
        return None
    with contextlib.redirect_stdout(sys.stderr):
        PHANTOMS[name](str(root / "data" / name), overwrite=True, **workload.phantoms)
    return root / "data" / name


def versions_of(python: Path) -> dict[str, str]:
    """Versions of an interpreter and of the packages that decide a result.

    Raises:
        ValueError: not an interpreter that runs.
    """
    try:
        answer = subprocess.run([str(python), "-c", _VERSIONS], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"{python}: expected a Python interpreter ({error}); correct --pythons.") from error
    return json.loads(answer.stdout)


def describe(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def infer(
    folder: Path, python: Path, output: Path, data: Path | None, *, timeout: float = 600.0, overlay: str = ""
) -> str | None:
    """Run the inference of a bundle in another interpreter; its log is written beside ``output``.

    Args:
        folder: the bundle, exported (with a ``manifest.json``) or of the source tree.
        python: interpreter.
        output: folder for the results, made anew.
        data: ``dataset_dir``, or None.
        timeout: seconds.
        overlay: see ``compare_versions``.

    Returns:
        None, or the last line that a failed run printed.
    """
    exported = (folder / "manifest.json").is_file()
    layers = ["inference", *([overlay] if exported and overlay else [] if exported else ["tiny"])]
    options = {"bundle_root": folder, "output_dir": output, "device": "cpu", **WORKLOADS[folder.name].options}
    if data is not None:
        options["dataset_dir"] = data
    files = ",".join(f"'{folder / 'configs' / layer}.json'" for layer in layers)
    command = [str(python), "-m", "monai.bundle", "run", f"--config_file=[{files}]"]
    command += [f"--{key}={value}" for key, value in options.items()]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Sums over several threads depend on their number.
    environment |= {"OMP_NUM_THREADS": "1"} | ({} if exported else {"PYTHONPATH": str(REPOSITORY)})
    shutil.rmtree(output, ignore_errors=True)
    elsewhere = output.parent / "empty"
    elsewhere.mkdir(parents=True, exist_ok=True)
    log = output.with_name(f"{output.name}.log")
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                command, cwd=elsewhere, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=timeout
            ).returncode
        except subprocess.TimeoutExpired:
            return f"not finished after {timeout:g} s; raise --timeout ({log})"
    if code == 0:
        return None
    return (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"exit code {code}"])[-1]


def markdown(
    versions: Mapping[str, Mapping[str, str]], comparisons: Sequence[Comparison], failures: Sequence[str]
) -> str:
    """The interpreters, a summary and the files as tables."""
    lines = ["| | versions |", "|---|---|"]
    lines += [f"| {label} | {describe(found)} |" for label, found in versions.items()]
    lines += ["", *(f"FAILED: {failure}" for failure in failures)]
    lines += ["", "| bundle | with A and | files | equal bytes | images and volumes | their max difference |"]
    lines += ["|---|---|---|---|---|---|"]
    for bundle, label in dict.fromkeys((c.bundle, c.python) for c in comparisons):
        files = [c for c in comparisons if (c.bundle, c.python) == (bundle, label)]
        values = [c.max_difference for c in files if c.max_difference is not None]
        largest = f"{max(values):.3g}" if values else ""
        lines.append(
            f"| {bundle} | {label} | {len(files)} | {sum(c.equal_bytes for c in files)} | {len(values)} | {largest} |"
        )
    head = "| bundle | with A and | file | max difference | of the affine | equal bytes | what else differs |"
    lines += ["", head, "|---|---|---|---|---|---|---|"]
    for c in comparisons:
        numbers = ["" if d is None else f"{d:.3g}" for d in (c.max_difference, c.affine_difference)]
        lines.append(
            f"| {c.bundle} | {c.python} | {c.file} | {' | '.join(numbers)} | {'yes' if c.equal_bytes else 'no'} | "
            f"{', '.join(c.elsewhere)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(compare_versions, name="tools.compare_versions")
