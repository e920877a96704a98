# SPDX-License-Identifier: Apache-2.0
"""How many steps does a solver need? Quality against steps with the demo weights of a bundle, on phantoms.

    python -m tools.solver_steps cxr_ldm --out FILE.json [--steps 5,10,15,20,25,50,100,200] [--count 42]
        [--solvers dpm-karras,dpm-trailing,ddim-trailing] [--values 4,1] [--reference 1000]

All runs start from the same noise. Each is compared with DDIM of as many steps as there are noise levels: difference of
latents and images, and the bundle's own metric, paired. Every result is written to FILE.json as it comes; the same
command goes on where it stopped, and other steps, solvers or values are added to the file.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from shared.files import save_json, save_tensors, sha256_of_file
from shared.pictures import save_grid
from shared.provenance import software_versions
from tools import command_line
from tools.solver_steps_table import RULES, comparison, markdown, recommended, relative_rms, run_of
from tools.solver_steps_tasks import REFERENCE_SOLVER, SOLVERS, TASKS, Sampled, Task

COUNTS = {"cxr_ldm": 42, "brain_controlnet": 8, "dmri2noddi": 4}
STEPS = (5, 10, 15, 20, 25, 50, 100, 200)


def solver_steps(
    bundle: str,
    out: str,
    *,
    steps: Any = STEPS,
    solvers: Any = tuple(SOLVERS),
    values: Any = (),
    count: int = 0,
    reference: int = 1000,
    check_reference: bool = True,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Compare solvers and numbers of steps with the reference, DDIM of `reference` steps, from the same noise.

    Beside FILE.json, a folder FILE_samples holds the latents of the reference, by which later runs are compared, and a
    picture of some samples of each run.

    Args:
        bundle: `cxr_ldm`, `brain_controlnet` or `dmri2noddi`.
        out: JSON file to write, or to go on with.
        steps: numbers of steps, separated by commas.
        solvers: of `dpm-karras`, `dpm-trailing` and `ddim-trailing`.
        values: of `guidance_scale` (brain_controlnet: 1; cxr_ldm: 4 and 1), or of `start` (dmri2noddi: 1 and 0.5).
        count: images, subjects or volumes; 0 takes 42, 8 or 4.
        reference: steps of the reference; the number of noise levels is 1000.
        check_reference: also run the first solver with so many steps: do two solvers agree on what is right?
        seed: of phantoms and noise.
        threads: CPU threads.

    Raises:
        ValueError: an option that is not allowed, or a file of other settings; the message starts with its name.
    """
    if bundle not in TASKS:
        raise ValueError(f"bundle: expected one of {', '.join(TASKS)}, got {bundle!r}; correct it")
    numbers = [_whole("steps", entry, 1, reference) for entry in _entries(steps)]
    names = [str(entry) for entry in _entries(solvers)]
    if not names or (unknown := [name for name in names if name not in SOLVERS]):
        raise ValueError(f"--solvers: expected some of {', '.join(SOLVERS)}, got {unknown if names else 'none'}")
    for option, number, low in (("count", count, 0), ("seed", seed, 0), ("threads", threads, 1)):
        _whole(option, number, low, 2**31)
    torch.set_num_threads(threads)
    path = Path(out)
    count = count or COUNTS[bundle]
    task = TASKS[bundle](count=count, seed=seed)
    chosen = [_option_value(task, entry) for entry in _entries(values)] or list(task.values)
    record = _opened(
        path,
        {
            **{"bundle": bundle, "option": task.option, "count": count, "seed": seed, "reference": reference},
            **{"threads": threads, "device": "cpu", "weights_sha256": sha256_of_file(task.weights)},
            "versions": software_versions(),
        },
    )
    for value in chosen:
        plan = [(REFERENCE_SOLVER, reference), *((name, number) for name in names for number in numbers)]
        plan += [(names[0], reference)] if check_reference else []
        for solver, number in dict.fromkeys(plan):
            if run_of(record["runs"], value, solver, number) is None:
                record["runs"].append(_run(task, path, value, solver, number, reference))
                _save(record, task, path)
    _save(record, task, path)
    print(markdown(record["comparison"], task.metrics, option=task.option, reference=reference))
    for rule, text in RULES.items():
        print(f"{rule}: {text}.")
    for key, by_rule in record["recommended"].items():
        for rule, best in by_rule.items():
            found = "none of these runs" if best is None else f"{best['solver']}, {best['steps']} steps"
            print(f"{task.option} {key}, {rule}: {found}")


def _entries(given: Any) -> list[Any]:
    """fire makes a tuple of numbers with commas, a number of one, and leaves words a string."""
    if isinstance(given, str):
        return [word.strip() for word in given.split(",") if word.strip()]
    return list(given) if isinstance(given, list | tuple) else [given]


def _whole(option: str, number: Any, low: int, high: int) -> int:
    text = str(number)
    if isinstance(number, bool) or not text.isdecimal() or not low <= int(text) <= high:
        raise ValueError(f"--{option}: expected a whole number from {low} to {high}, got {number!r}; correct it")
    return int(text)


def _option_value(task: Task, entry: Any) -> float:
    try:
        return float(entry)
    except ValueError as error:
        raise ValueError(f"--values: expected numbers for {task.option}, got {entry!r}; correct it") from error


def _opened(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run with the same settings left, or a new record."""
    if not path.exists():
        return {"settings": settings, "runs": []}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected results of this tool, got another file ({error!r}); name another"
        ) from error
    if found != settings:
        other = [key for key in settings if not isinstance(found, dict) or found.get(key) != settings[key]]
        raise ValueError(
            f"{path}: expected results of the same {', '.join(other)}, got others; name another file, or give the "
            "options of this one"
        )
    return record


def _run(task: Task, path: Path, value: float, solver: str, steps: int, reference: int) -> dict[str, Any]:
    """One line of ``runs``; the reference also leaves its latents and images."""
    folder = path.with_name(f"{path.stem}_samples")
    begin = time.process_time()
    sampled = task.sample(task.scheduler(solver), steps, value)
    seconds = time.process_time() - begin
    kept = folder / f"reference_{value:g}.pt"
    if (solver, steps) == (REFERENCE_SOLVER, reference):
        save_tensors({"latents": sampled.latents, "images": sampled.images}, kept)
    differences = _differences(sampled, kept, path)
    save_grid(task.pictures(sampled.images), folder / f"{value:g}_{solver}_{steps}.png", columns=1)
    print(
        f"{value:g} {solver} {steps}: images differ by {differences['images_difference']:.4f}, {seconds:.1f} s",
        flush=True,
    )
    return {
        **{"value": value, "solver": solver, "steps": steps, "evaluations": sampled.evaluations, "seconds": seconds},
        **differences,
        "values": task.measure(sampled.images),
    }


def _differences(sampled: Sampled, kept: Path, path: Path) -> dict[str, float]:
    if not kept.is_file():
        raise ValueError(f"{path}: expected the samples of its reference in {kept}, found no file; delete {path.name}")
    reference = torch.load(kept, weights_only=True)
    return {
        "latents_difference": relative_rms(sampled.latents, reference["latents"]),
        "images_difference": relative_rms(sampled.images, reference["images"]),
    }


def _save(record: dict[str, Any], task: Task, path: Path) -> None:
    reference = record["settings"]["reference"]
    rows = comparison(record["runs"], task.metrics, reference=reference, published=task.published_steps)
    best = recommended(rows, task.metrics, published=task.published_steps)
    record |= {"comparison": rows, "rules": RULES, "recommended": best}
    save_json(record, path)


def main() -> None:
    """Entry point; expected errors end with their message alone."""
    command_line.run(solver_steps, name="tools.solver_steps")


if __name__ == "__main__":
    main()
