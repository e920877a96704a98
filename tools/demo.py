# SPDX-License-Identifier: Apache-2.0
"""From nothing to a page of pictures: `python -m tools.demo cxr_ldm --out demo`.

Runs the commands of the README one after the other on generated phantoms: short trainings of both stages from scratch,
then samples and an evaluation of the demo weights that ship with the bundle, then one HTML page.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tools import command_line

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"

PROMPTS = (
    "Normal chest radiograph.",
    "The heart is markedly enlarged, consistent with cardiomegaly.",
    "There is a large left pleural effusion.",
    "There is a large right pleural effusion.",
    "There is a large consolidation in the left mid lung.",
    "There is a large consolidation in the right mid lung.",
    "There is a large right pneumothorax.",
)


def demo(bundle: str = "cxr_ldm", out: str = "demo", n: int = 200, threads: int = 0) -> None:
    """Make sample data, train briefly, sample, evaluate and write ``OUT/report.html``.

    Args:
        bundle: which bundle; only ``cxr_ldm`` so far.
        out: folder for everything the demo writes. The sentences to draw are in ``OUT/prompts.txt``, one a line: edit
            them and run again; finished steps are not repeated.
        n: number of phantom films.
        threads: CPU threads, 0 for all cores.
    """
    folder = BUNDLES / bundle
    if not (folder / "configs" / "tiny.json").is_file():
        known = ", ".join(sorted(path.parent.parent.name for path in BUNDLES.glob("*/configs/tiny.json")))
        raise SystemExit(f"{bundle}: expected one of the bundles {known}; give one of these names.")
    root = Path(out).resolve()
    root.mkdir(parents=True, exist_ok=True)
    prompts = root / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads or os.cpu_count() or 1)}
    data, weights = root / "data", root / "models"

    started = time.monotonic()
    if not (data / "datalist.json").exists():
        _step(
            "sample data",
            [sys.executable, "-m", "tools.phantoms", bundle, f"--out={data}", f"--n={n}"],
            root,
            environment,
        )
    # Sampled anew each time: the sentences may have been edited.
    shutil.rmtree(root / "samples", ignore_errors=True)
    samples = {
        "prompt": prompts,
        "num_samples": 4,
        "batch_size": 14,
        "output_dir": root / "samples",
    }
    _step("samples of the shipped weights", _bundle_command("run", ["inference"], samples), folder, environment)
    evaluation = {"dataset_dir": data, "output_dir": root / "evaluation", "latent_cache_dir": root / "latents"}
    if not (root / "evaluation" / "evaluation" / "summary.json").exists():
        _step(
            "evaluation of the shipped weights",
            _bundle_command("run", ["train", "evaluate"], evaluation),
            folder,
            environment,
        )
    stages = {
        "train_autoencoder": {"output_dir": root / "autoencoder", "max_epochs": 50},
        "train": {"output_dir": root / "diffusion", "latent_cache_dir": root / "latents", "max_epochs": 100},
    }
    for config, options in stages.items():
        shared = {"dataset_dir": data, "ckpt_dir": weights, "tracking_uri": f"sqlite:///{root}/mlflow.db"}
        _step(
            f"short training: {config}",
            _bundle_command("training", [config], {**shared, **options}),
            folder,
            environment,
        )
    page = root / "report.html"
    title = "Text to chest X-ray: demo on phantoms"
    _step(
        "report",
        [sys.executable, "-m", "tools.report", str(root), f"--out={page}", f"--title={title}"],
        root,
        environment,
    )
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Open {page}")


def _bundle_command(run_id: str, configs: list[str], options: Mapping[str, object]) -> list[str]:
    files = ",".join(f"'configs/{name}.json'" for name in [*configs, "tiny"])
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "monai.bundle", "run", run_id, f"--config_file=[{files}]", *arguments]


def _quoted(word: str) -> str:
    """A word as a person would type it: lists of files hold single quotes, so double ones go around."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\') else shlex.quote(word)


def _step(title: str, command: list[str], folder: Path, environment: dict[str, str]) -> None:
    shown = " ".join(["python", *(_quoted(word) for word in command[1:])])
    print(f"\n=== {title}\n$ cd {os.path.relpath(folder)} && {shown}", flush=True)
    started = time.monotonic()
    result = subprocess.run(command, cwd=folder, env=environment)
    if result.returncode != 0:
        raise SystemExit(
            f"{title}: the command above ended with exit code {result.returncode}; its last line says why."
        )
    print(f"=== {title}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    command_line.run(demo, name="demo")
