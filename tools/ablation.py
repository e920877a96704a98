# SPDX-License-Identifier: Apache-2.0
"""The ablation table of a bundle on any data set: `python -m tools.ablation sdseg --dataset_dir DIR --out DIR`.

Trains variants of the method with one budget, and a U-Net, by the bundle's own commands; evaluates them on the test
section; writes `OUT/ablation.md`, `ablation.json` and `ablation.svg`. Given again, it goes on where it was stopped.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.datalist import FILE_NAME, read_datalist
from shared.files import atomic_path, save_json, sha256_of_file
from tools import command_line
from tools.ablation_arms import BASELINE, Arm, BundleCommands, chosen_arms, chosen_steps
from tools.ablation_table import Evaluation, page, parameter_counts, result_rows, steps_chart
from tools.ablation_training import Budget, Training, train
from tools.demo_steps import REPOSITORY, Step, run_steps

BUNDLES = {"sdseg": REPOSITORY / "bundles/sdseg"}
SECTION = "test"


def ablation(
    bundle: str,
    dataset_dir: str,
    out: str,
    overlay: str | Sequence[str] | None = None,
    steps: Any = (1, 2, 4, 10, 20, 50),
    max_epochs: int | None = None,
    minutes: float | None = None,
    arms: str | Sequence[str] | None = None,
    seed: int = 0,
    num_samples: int = 1,
    ckpt_dir: str | None = None,
    autoencoder_weights: str | None = None,
    threads: int = 0,
    **overrides: Any,
) -> None:
    """Train and evaluate the arms of an ablation and write the table.

    Further options, such as `--batch_size 8` or `--num_classes 9`, go to the bundle's commands that know them.

    Args:
        bundle: `sdseg`.
        dataset_dir: dataset folder with `datalist.json`.
        out: folder for everything that is made.
        overlay: configuration file(s) given last, such as `configs/tiny.json`; below the bundle's folder, or a path.
        steps: numbers of reverse steps of the arms `published` and `noise loss only`; the others take 1.
        max_epochs: of every training; None: the configurations' numbers, or no limit where `minutes` are given.
        minutes: of every training, which ends after the epoch in which they have passed; None is no limit.
        arms: names out of `published`, `noise loss only`, `cross-attention`, `frozen encoder`, `U-Net`; None is all.
        seed: of trainings and evaluations.
        num_samples: samples an image; the first one is in the table, the time is a part of theirs.
        ckpt_dir: folder of the bundle's weights, which holds `stages/autoencoder.pt`; None: as configured.
        autoencoder_weights: that file, where it is elsewhere.
        threads: CPU threads, 0 for all cores.
    """
    if bundle not in BUNDLES:
        raise ValueError(f"{bundle}: expected one of the bundles {', '.join(BUNDLES)}; give one of these names.")
    chosen, counts, root, data = (
        chosen_arms(arms),
        chosen_steps(steps),
        Path(out).resolve(),
        Path(dataset_dir).resolve(),
    )
    budget = Budget(max_epochs, minutes)
    commands = BundleCommands(BUNDLES[bundle], _overlays(BUNDLES[bundle], overlay), overrides)
    sections = read_datalist(data)
    for section in ("training", "validation", SECTION):
        if not sections.get(section):
            raise ValueError(f"{data / FILE_NAME}: expected images in the section {section!r}, found none; split anew")
    autoencoder = commands.autoencoder(ckpt_dir, autoencoder_weights)
    root.mkdir(parents=True, exist_ok=True)

    plan = _Plan(commands, data, root, autoencoder, seed, num_samples, threads)
    trainings = {arm.name: plan.training(arm) for arm in chosen}
    spent = {name: train(training, budget, root=root, threads=threads) for name, training in trainings.items()}
    evaluations = plan.evaluate(chosen, trainings, counts)

    options = {
        "dataset_dir": dataset_dir,
        "out": out,
        "overlay": overlay,
        "steps": ",".join(map(str, counts)),
        "max_epochs": max_epochs,
        "minutes": minutes,
        "arms": ",".join(arm.name for arm in chosen),
        "seed": seed,
        "num_samples": num_samples,
        "ckpt_dir": ckpt_dir,
        "autoencoder_weights": autoencoder_weights,
        **overrides,
    }
    rows = result_rows(evaluations, root=root)
    chart = steps_chart(rows)
    protocol = evaluations[0].protocol()
    content = {
        "bundle": bundle,
        "command": _command(bundle, options),
        "setting": {
            "seed": seed,
            "section": SECTION,
            "budget": budget.words(),
            "training_images": len(sections["training"]),
            "validation_images": len(sections["validation"]),
            "autoencoder_sha256": sha256_of_file(autoencoder),
            "files": sorted({file for arm in chosen for file in commands.files([arm.config])}),
            "overrides": overrides,
            **protocol,
        },
        "results": rows,
        "trainings": [_trained(arm, trainings[arm.name], spent[arm.name]) for arm in chosen],
        "chart": "ablation.svg" if chart is not None else None,
    }
    _write(root, content, chart)


def _overlays(folder: Path, overlay: str | Sequence[str] | None) -> tuple[str, ...]:
    """Overlays as a command in the bundle's folder names them."""
    names = [] if not overlay else [overlay] if isinstance(overlay, str) else list(overlay)
    found = []
    for name in names:
        if (folder / name).is_file():
            found.append(name)
        elif Path(name).is_file():
            found.append(str(Path(name).resolve()))
        else:
            raise FileNotFoundError(
                f"{name}: expected a configuration file for --overlay in {folder} or in the current folder, found "
                "none; give configs/tiny.json, or a path."
            )
    return tuple(found)


@dataclass(frozen=True)
class _Plan:
    """What all arms have alike."""

    commands: BundleCommands
    data: Path
    root: Path
    autoencoder: Path
    seed: int
    num_samples: int
    threads: int

    def training(self, arm: Arm) -> Training:
        folder = self.root / "arms" / arm.slug
        options: dict[str, object] = {
            "dataset_dir": self.data,
            "ckpt_dir": folder / "models",
            "output_dir": folder / "run",
            "tracking_uri": f"sqlite:///{self.root}/mlflow.db",
            "seed": self.seed,
        }
        reads = (*self.commands.paths([arm.config]), self.data / FILE_NAME)
        if arm.is_diffusion:
            options |= {"latent_cache_dir": self.root / "latents", "autoencoder_weights": self.autoencoder}
            options |= arm.options
            reads = (*reads, self.autoencoder)
        words = self.commands.words("training", [arm.config], options)
        return Training(arm.name, words, self.commands.folder, folder, arm.weights, reads)

    def evaluate(
        self, arms: Sequence[Arm], trainings: Mapping[str, Training], counts: Sequence[int]
    ) -> list[Evaluation]:
        """Evaluate what is not evaluated yet; the baseline stands in the evaluation of the first arm."""
        first = trainings[arms[0].name]
        baseline = first.folder / "models" / BASELINE.weights
        if BASELINE.name in trainings:
            _copy(trainings[BASELINE.name].path, baseline)
        steps: list[Step] = []
        evaluations: list[Evaluation] = []
        for arm in arms:
            for count in (counts if arm.many_steps else [1]) if arm.is_diffusion else []:
                folder = self.root / "evaluations" / f"{arm.slug}_{count}"
                training = trainings[arm.name]
                steps.append(self._evaluation(arm, count, folder, training, [baseline] if not evaluations else []))
                evaluations.append(Evaluation(arm.name, count, folder / "evaluation"))
        run_steps(steps, name="ablation", root=self.root, threads=self.threads)
        if BASELINE.name in trainings:
            evaluations.append(Evaluation(BASELINE.name, None, evaluations[0].folder, method=BASELINE.name))
        return evaluations

    def _evaluation(self, arm: Arm, count: int, folder: Path, training: Training, more: Sequence[Path]) -> Step:
        options: dict[str, object] = {
            "dataset_dir": self.data,
            "ckpt_dir": training.folder / "models",
            "output_dir": folder,
            "seed": self.seed,
            "num_inference_steps": count,
            "num_samples": self.num_samples,
            **arm.options,
        }
        names = ["train", "evaluate"]
        return Step(
            f"evaluation of {arm.name!r} with {count} reverse step{'s' if count > 1 else ''}",
            self.commands.words("run", names, options),
            makes=folder,
            reads=(*self.commands.paths(names), training.path, self.data / FILE_NAME, *more),
            folder=self.commands.folder,
        )


def _copy(source: Path, target: Path) -> None:
    if target.is_file() and sha256_of_file(target) == sha256_of_file(source):
        return
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def _trained(arm: Arm, training: Training, spent: Mapping[str, Any]) -> dict[str, Any]:
    parameters = parameter_counts(training.path)
    frozen = {"autoencoder"} if arm.options.get("train_vision_encoder", True) else {"autoencoder", "vision_encoder"}
    if not arm.is_diffusion:
        parameters, frozen = {"network": sum(parameters.values())}, set()
    return {
        "arm": arm.name,
        "differs": arm.differs,
        "parameters": parameters,
        "trained_parameters": sum(count for part, count in parameters.items() if part not in frozen),
        **spent,
        "weights": sha256_of_file(training.path),
    }


def _command(bundle: str, options: Mapping[str, Any]) -> str:
    """The command that writes the same, except for time."""
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return shlex.join(["python", "-m", "tools.ablation", bundle, *words])


def _write(root: Path, content: dict[str, Any], chart: str | None) -> None:
    save_json(content, root / "ablation.json")
    if chart is None:
        (root / "ablation.svg").unlink(missing_ok=True)
    else:
        with atomic_path(root / "ablation.svg") as temporary:
            temporary.write_text(chart, encoding="utf-8")
    text = page(content)
    with atomic_path(root / "ablation.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"\n{text}\nWritten to {root / 'ablation.md'}")


if __name__ == "__main__":
    command_line.run(ablation, name="ablation")
