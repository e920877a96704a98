# SPDX-License-Identifier: Apache-2.0
"""`tools.ablation`: its commands and table without running them, and one small run of the real thing."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fire
import monai.bundle
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from shared.files import save_json, save_tensors
from shared.handlers.cost import CallCost
from shared.handlers.metrics_csv import COLUMNS
from shared.handlers.segmentation_results import SegmentationResults
from shared.metrics.segmentation import MaskScore
from shared.metrics.segmentation_table import ItemScore
from shared.overrides import refuse_unknown
from tools import ablation as tool
from tools.ablation import BUNDLES, ablation
from tools.ablation_arms import ARMS, LATENT_CHANNELS, chosen_arms, chosen_steps
from tools.ablation_table import Evaluation, parameter_counts, result_rows, steps_chart
from tools.ablation_training import RECORD, Budget
from tools.phantoms.sdseg import make_dataset

RUNNER = str(Path(monai.bundle.__file__).with_name("__main__.py"))
BUNDLE = BUNDLES["sdseg"]
TINY = "configs/tiny.json"
DIFFUSION = [arm.name for arm in ARMS if arm.is_diffusion]
GROUPS = 5
# Dice of the first sample by folder of the evaluation
DICE = {"published_1": 0.9, "published_4": 0.88, "noise_loss_only_1": 0.7, "noise_loss_only_4": 0.6}
DEFAULT_DICE, BASELINE_DICE = 0.8, 0.85


class Killed(BaseException):
    """Stands for a signal: nobody catches it."""


class Runner(list[SimpleNamespace]):
    """Commands that were to be run, in order; each leaves what the real one would, as far as the table reads it.

    Attributes:
        fails: text; a command that holds it ends with exit code 3 and leaves nothing.
        kill_after: epochs after which a training is killed.
        minutes: that an epoch takes.
        classes: of the evaluation.
    """

    fails: str | None = None
    kill_after: int | None = None
    minutes = 2.0
    classes: tuple[str, ...] = ("foreground",)

    def __call__(self, command: list[str], *, cwd: Path, env: dict[str, str]) -> SimpleNamespace:
        assert command[:2] == [sys.executable, "-m"]
        words = command[2:]
        options = dict(word[2:].split("=", 1) for word in words[3:])
        call = SimpleNamespace(words=words, options=options, cwd=Path(cwd), env=env, run_id=words[2])
        self.append(call)
        if self.fails is not None and self.fails in " ".join(words):
            return SimpleNamespace(returncode=3)
        self._train(call) if call.run_id == "training" else self._evaluate(call)
        return SimpleNamespace(returncode=0)

    def trainings(self) -> list[SimpleNamespace]:
        return [call for call in self if call.run_id == "training"]

    def evaluations(self) -> list[SimpleNamespace]:
        return [call for call in self if call.run_id == "run"]

    def _train(self, call: SimpleNamespace) -> None:
        run, models = Path(call.options["output_dir"]), Path(call.options["ckpt_dir"])
        done = len(list((run / "checkpoints").glob("*.pt")))
        epochs = int(call.options.get("max_epochs", 20))
        if "max_minutes" in call.options:
            epochs = min(epochs, done + int(np.ceil(float(call.options["max_minutes"]) / self.minutes)))
        start = datetime(2030, 1, 1 + done, tzinfo=timezone.utc)
        save_json({"started": start.isoformat(timespec="seconds")}, run / "manifest.json")
        if (run / "metrics.csv").exists():  # what is no whole line is dropped, as in a real training
            kept = [line for line in (run / "metrics.csv").read_text().splitlines(keepends=True) if "," in line]
            (run / "metrics.csv").write_text("".join(kept))
        for epoch in range(done + 1, epochs + 1):
            now = (start + timedelta(minutes=self.minutes * (epoch - done))).isoformat(timespec="seconds")
            is_new = not (run / "metrics.csv").exists()
            with (run / "metrics.csv").open("a", newline="") as file:
                writer = csv.writer(file)
                if is_new:
                    writer.writerow(COLUMNS)
                writer.writerow((now, epoch, "", "validation", "mean_dice", 0.5))
                writer.writerow((now, epoch, 10 * epoch, "train", "loss", 1.0))
            save_tensors({}, run / f"checkpoints/checkpoint_epoch={epoch}.pt")
            self._release(call, models, epoch)
            if epoch == self.kill_after:
                with (run / "metrics.csv").open("a") as file:
                    file.write("2030-")  # half a line
                raise Killed

    def _release(self, call: SimpleNamespace, models: Path, epoch: int) -> None:
        if "train_baseline" in call.words[3]:
            path, state = models / "stages/baseline.pt", {"model.0.weight": torch.zeros(3, 5)}
        else:
            state = {
                "scale_factor": torch.tensor(1.0),
                "autoencoder.encoder.weight": torch.zeros(2, 3),
                "vision_encoder.head.weight": torch.zeros(7),
                "unet.out.weight": torch.zeros(100),
            }
            path = models / "model.pt"
        save_tensors(state, path)
        save_json({"epoch": epoch, "metric": {"mean_dice": 0.5}}, path.with_suffix(".json"))

    def _evaluate(self, call: SimpleNamespace) -> None:
        folder = Path(call.options["output_dir"])
        assert (Path(call.options["ckpt_dir"]) / "model.pt").is_file()
        methods = {"one sample": DICE.get(folder.name, DEFAULT_DICE)}
        if (Path(call.options["ckpt_dir"]) / "stages/baseline.pt").is_file():
            methods["U-Net"] = BASELINE_DICE
        write_evaluation(folder / "evaluation", methods, self.classes)


def write_evaluation(folder: Path, methods: dict[str, float], classes: tuple[str, ...]) -> None:
    """Files as the bundle's evaluation writes them: two images in each of `GROUPS` groups, at two resolutions."""
    results = SegmentationResults(
        folder,
        [],
        own=["one sample"],
        class_names=dict(enumerate(classes, start=1)),
        threshold=0.5,
        empty_score=1.0,
        num_samples=1,
        dataset_dir=None,
        max_pictures=0,
    )
    names = classes if len(classes) == 1 else ("mean of classes", *classes)
    for image in range(2 * GROUPS):
        for method, dice in methods.items():
            results.methods[method] = ""
            for resolution, offset in (("native", 0.0), ("96 x 96", -0.3)):
                for index, name in enumerate(names):
                    value = dice + 0.01 * (image // 2 - GROUPS // 2) + offset - 0.1 * index
                    score = MaskScore(name, value, value / 2, None, None, 1, 1, False, 0)
                    one = ItemScore(f"i{image}", f"g{image // 2}", method, resolution, score, "px", None, 0.25)
                    results.scores.append(one)
    cost = CallCost()
    cost.peak_bytes, cost.memory_note = 123_000_000, "as measured"
    results.write(cost=cost, device=torch.device("cpu"), stability_notes={})


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    fake = Runner()
    monkeypatch.setattr(subprocess, "run", fake)
    # `git` is asked for the commit by the same function.
    monkeypatch.setattr("shared.handlers.cost.git_commit", lambda folder: "abc")
    return fake


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The command with data, autoencoder and folder; returns what is in `ablation.json`."""
    weights = tmp_path / "weights/stages/autoencoder.pt"
    save_tensors({"encoder.weight": torch.zeros(1)}, weights)
    items = [{"image": f"{index}.png", "label": f"{index}.png"} for index in range(3)]
    save_json({"training": items, "validation": items[:2], "test": items[:1]}, tmp_path / "data/datalist.json")

    def call(**options: Any) -> dict[str, Any]:
        defaults = {"ckpt_dir": str(weights.parent.parent), "overlay": TINY, "steps": "1,4", "threads": 1}
        ablation("sdseg", str(tmp_path / "data"), str(tmp_path / "out"), **{**defaults, **options})
        return json.loads((tmp_path / "out/ablation.json").read_text())

    return call


def test_commands_name_what_exists(runner, run, monkeypatch, tmp_path):
    run(max_epochs=2, batch_size=3)
    assert len(runner.trainings()) == len(ARMS)
    monkeypatch.chdir(BUNDLE)
    for call in runner:
        assert call.cwd == BUNDLE
        assert call.env["OMP_NUM_THREADS"] == "1"
        assert call.options["config_file"].endswith(f"'{TINY}']"), "the overlay is given last"
        assert call.options["dataset_dir"] == str(tmp_path / "data")
        assert call.options["seed"] == "0"
        monkeypatch.setattr("sys.argv", [RUNNER, *call.words[1:]])
        refuse_unknown()  # every override is in the files, and the files are there


def test_arms_share_all_but_their_difference(runner, run, tmp_path):
    run(max_epochs=2)
    places = {"ckpt_dir", "output_dir"}
    published, *others = [{k: v for k, v in call.options.items() if k not in places} for call in runner.trainings()]
    assert published["autoencoder_weights"] == str(tmp_path / "weights/stages/autoencoder.pt")
    assert published["latent_cache_dir"] == str(tmp_path / "out/latents")
    assert (published["latent_weight"], published["condition_mode"]) == ("1.0", "concat")
    assert (published["train_vision_encoder"], published["max_epochs"]) == ("True", "2")
    changed = [{k: v for k, v in other.items() if v != published.get(k)} for other in others]
    assert changed == [
        {"latent_weight": "0.0"},
        {
            "condition_mode": "crossattn",
            "unet_def#in_channels": LATENT_CHANNELS,
            "unet_def#cross_attention_dim": LATENT_CHANNELS,
        },
        {"train_vision_encoder": "False"},
        {"config_file": f"['configs/train_baseline.json','{TINY}']"},
    ]
    for place in places:
        assert len({call.options[place] for call in runner.trainings()}) == len(ARMS)


def test_every_arm_is_evaluated_in_one_step_and_two_in_more(runner, run):
    run(steps=[4, 2], num_samples=3)
    found = [(Path(call.options["output_dir"]).name, call.options["num_inference_steps"]) for call in runner[-8:]]
    steps = {"published": "124", "noise_loss_only": "124", "cross_attention": "1", "frozen_encoder": "1"}
    assert found == [(f"{name}_{count}", count) for name, counts in steps.items() for count in counts]
    trained = {call.options["ckpt_dir"]: call.options for call in runner.trainings()}
    for call in runner.evaluations():
        assert call.options["num_samples"] == "3"
        of_arm = trained[call.options["ckpt_dir"]]
        for name in ("latent_weight", "condition_mode", "train_vision_encoder", "unet_def#in_channels"):
            assert call.options.get(name) == of_arm.get(name), "the network that was trained"


def test_table(runner, run, tmp_path):
    content = run(max_epochs=3)
    rows = {(row["arm"], row["steps"]): row for row in content["results"]}
    assert list(rows) == [
        *((name, count) for name in ("published", "noise loss only") for count in (1, 4)),
        ("cross-attention", 1),
        ("frozen encoder", 1),
        ("U-Net", None),
    ]
    dices = {name: round(row["dice"]["value"], 4) for name, row in rows.items()}
    assert list(dices.values()) == [0.9, 0.88, 0.7, 0.6, 0.8, 0.8, 0.85], "native resolution"
    first = rows["published", 1]
    assert first["dice"]["ci_low"] < 0.9 < first["dice"]["ci_high"]
    assert first["iou"]["value"] == pytest.approx(0.45)
    assert (first["seconds_per_image"], first["peak_memory_mb"], first["difference"]) == (0.25, 123.0, None)
    baseline = rows["U-Net", None]
    assert baseline["peak_memory_mb"] is None
    assert baseline["seconds_per_image"] == 0.25
    # All images differ alike, so that the paired interval is a point, while those of the means are not.
    difference = baseline["difference"]
    assert [difference[k] for k in ("value", "ci_low", "ci_high")] == pytest.approx([-0.05] * 3, abs=1e-5)
    assert (difference["n"], difference["groups"]) == (2 * GROUPS, GROUPS)
    assert content["setting"]["datalist_sha256"] is None
    assert content["setting"]["images"] == 2 * GROUPS
    assert (content["setting"]["seed"], content["setting"]["training_images"]) == (0, 3)
    assert "--steps=1,4" in content["command"]

    text = (tmp_path / "out/ablation.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert lines[2][:2] == ["published", "1"]
    assert lines[2][2].startswith("0.9000 [0.8")
    assert lines[8][0] == "U-Net"
    assert lines[8][4:] == ["-0.0500 [-0.0500, -0.0500]", "0.25", "not measured"]
    assert len({len(line) for line in lines[:9]}) == 1
    assert "![Dice against the number of reverse steps](ablation.svg)" in text


def test_trainings_of_the_table(runner, run):
    trainings = {one["arm"]: one for one in run(max_epochs=3)["trainings"]}
    published = trainings["published"]
    assert (published["epochs"], published["iterations"], published["best_epoch"]) == (3, 30, 3)
    assert (published["seconds"], published["processes"]) == (3 * 120.0, 1)
    assert published["parameters"] == {"autoencoder": 6, "vision_encoder": 7, "unet": 100}, "no scale factor"
    assert published["trained_parameters"] == 107
    assert trainings["frozen encoder"]["trained_parameters"] == 100
    assert trainings["U-Net"]["parameters"] == {"network": 15}
    assert trainings["U-Net"]["trained_parameters"] == 15


def test_several_classes_are_shown_by_their_mean(runner, run):
    runner.classes = ("liver", "spleen")
    rows = run(arms="published,U-Net")["results"]
    assert [round(row["dice"]["value"], 4) for row in rows] == [0.9, 0.88, 0.85]
    assert rows[-1]["difference"]["n"] == 2 * GROUPS, "an image counts once"


def test_finished_work_is_not_repeated(runner, run, capsys):
    before = run(max_epochs=2)
    runner.clear()
    assert run(max_epochs=2) == before
    assert runner == []
    assert capsys.readouterr().out.count("was trained before") == len(ARMS)


def test_arms_and_steps_can_be_added(runner, run):
    run(max_epochs=2, arms=["published"], steps=1)
    assert len(runner) == 2
    runner.clear()
    content = run(max_epochs=2, arms=["U-Net", "published"], steps=[1, 4])
    assert [call.run_id for call in runner] == ["training", "run", "run"], "the baseline is in the first evaluation"
    assert [row["arm"] for row in content["results"]] == ["published", "published", "U-Net"]
    runner.clear()
    run(max_epochs=2, arms=["U-Net", "published"], steps=[1])
    assert runner == []


def test_failure_stops_and_the_rest_goes_on_later(runner, run, tmp_path):
    runner.fails = "frozen_encoder/models"
    with pytest.raises(SystemExit, match="training of 'frozen encoder'.*exit code 3"):
        run(max_epochs=2)
    assert not (tmp_path / "out/ablation.json").exists()
    runner.fails = None
    runner.clear()
    run(max_epochs=2)
    assert [Path(call.options["ckpt_dir"]).parent.name for call in runner.trainings()] == ["frozen_encoder", "u_net"]


def test_killed_training_gets_what_is_left(runner, run):
    runner.kill_after = 3
    with pytest.raises(Killed):
        run(minutes=10, arms="published")
    assert float(runner[0].options["max_minutes"]) == 10.0
    assert int(runner[0].options["max_epochs"]) >= 1_000_000, "the time alone is the limit"
    runner.kill_after = None
    content = run(minutes=10, arms="published")
    assert float(runner[1].options["max_minutes"]) == pytest.approx(10 - 3 * 2.0)
    assert [w for w in runner[1].words if "max_minutes" not in w] == [
        w for w in runner[0].words if "max_minutes" not in w
    ]
    trained = content["trainings"][0]
    assert (trained["epochs"], trained["seconds"], trained["processes"]) == (5, 600.0, 2)


def test_time_counts_once_when_the_next_process_fails_at_once(runner, run):
    runner.kill_after = 3
    with pytest.raises(Killed):
        run(minutes=10, arms="published")
    runner.kill_after, runner.fails = None, "training"
    for _ in range(2):
        with pytest.raises(SystemExit):
            run(minutes=10, arms="published")
    runner.fails = None
    assert run(minutes=10, arms="published")["trainings"][0]["seconds"] == 600.0
    assert [float(call.options["max_minutes"]) for call in runner.trainings()] == [10, 4, 4, 4]


def test_training_that_was_killed_at_its_end_is_finished(runner, run):
    runner.kill_after = 5
    with pytest.raises(Killed):
        run(minutes=10, arms="published")
    content = run(minutes=10, arms="published")
    assert len(runner.trainings()) == 1
    assert content["trainings"][0]["seconds"] == 600.0


def test_larger_budget_goes_on_and_smaller_is_refused(runner, run, tmp_path):
    run(max_epochs=2, arms="published", steps=1)
    content = run(max_epochs=4, arms="published", steps=1)
    assert content["trainings"][0]["epochs"] == 4
    assert [call.run_id for call in runner] == ["training", "run"] * 2, "other weights are evaluated anew"
    for budget in ({"max_epochs": 3}, {"minutes": 100}, {}):
        with pytest.raises(ValueError, match=r"out/arms/published: expected at least the budget"):
            run(**budget, arms="published", steps=1)
    assert len(runner) == 4


def test_other_options_are_refused_not_deleted(runner, run, tmp_path):
    run(max_epochs=2, arms="published", steps=1)
    for changed in ({"seed": 1}, {"learning_rate": 0.1}, {"overlay": None}):
        with pytest.raises(ValueError, match=r"out/arms/published: expected a training with the options"):
            run(max_epochs=2, arms="published", steps=1, **changed)
    save_tensors({"encoder.weight": torch.ones(1)}, tmp_path / "weights/stages/autoencoder.pt")
    with pytest.raises(ValueError, match="data and autoencoder of now, found one with others"):
        run(max_epochs=2, arms="published", steps=1)
    assert (tmp_path / "out/arms/published/models/model.pt").is_file()


def test_option_that_failed_at_once_can_be_corrected(runner, run):
    runner.fails = "--learning_rate=7"
    with pytest.raises(SystemExit):
        run(max_epochs=2, arms="published", learning_rate=7)
    assert run(max_epochs=2, arms="published", learning_rate=0.1)["setting"]["overrides"] == {"learning_rate": 0.1}


def test_overrides_go_to_the_commands_that_know_them(runner, run):
    run(max_epochs=1, arms="published,U-Net", unet_weights="u.pt", threshold=0.4, batch_size=2, image_size=[64, 96])
    train, baseline, evaluate = runner[0].options, runner[1].options, runner[2].options
    assert (train["unet_weights"], train["batch_size"], train["image_size"]) == ("u.pt", "2", "[64, 96]")
    assert (baseline["batch_size"], baseline["image_size"]) == ("2", "[64, 96]")
    assert not {"unet_weights", "threshold", "latent_weight"} & baseline.keys()
    assert evaluate["threshold"] == "0.4"
    assert "threshold" not in train


def test_nested_overrides_of_one_command(runner, run):
    run(max_epochs=1, arms="published,U-Net", **{"validate#inferer#batch_size": 2})
    assert ["validate#inferer#batch_size" in call.options for call in runner[:3]] == [True, True, True]
    assert "validate#postprocessing#transforms#0#threshold" not in runner[0].options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": "publishd"}, r"^arms: expected names out of .*got 'publishd'; did you mean 'published'\?"),
        ({"arms": ["unet"]}, r"^arms: .*got 'unet'; did you mean 'U-Net'\?"),
        ({"arms": ["U-Net"]}, r"^arms: expected at least one diffusion arm"),
        ({"steps": [0, 1]}, r"^steps: expected whole numbers from 1"),
        ({"steps": 2.5}, r"^steps: expected whole numbers from 1"),
        ({"steps": []}, r"^steps: expected whole numbers from 1"),
        ({"minutes": 0}, r"^minutes: expected more than 0, got 0"),
        ({"max_epochs": -1}, r"^max_epochs: expected more than 0, got -1"),
        ({"epochs": 3}, r"^--epochs: expected an option of this command or an id .*did you mean --max_epochs\?"),
        ({"latent_weight": 2}, r"^--latent_weight: expected an id that this command does not set itself; the arms"),
        ({"num_inference_steps": 2}, r"^--num_inference_steps: .*give --steps"),
        ({"max_minutes": 2}, r"^--max_minutes: .*give --minutes"),
        ({"overlay": "configs/small.json"}, r"^configs/small.json: expected a configuration file for --overlay"),
        ({"ckpt_dir": "nowhere"}, r"nowhere/stages/autoencoder.pt: expected the weights of the autoencoder.*"
         r"configs/train_autoencoder.json','configs/tiny.json'.*convert_checkpoint kl_f8.*--autoencoder_weights FILE"),
        ({"autoencoder_weights": "a.pt"}, r"a.pt: expected the weights of the autoencoder"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_runs(runner, run, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(**options)
    assert runner == []
    assert not (tmp_path / "out").exists()


def test_other_mistakes(runner, run, tmp_path):
    with pytest.raises(ValueError, match=r"^cxr_ldm: expected one of the bundles sdseg"):
        ablation("cxr_ldm", str(tmp_path), str(tmp_path))
    (tmp_path / "out/arms/published").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"out/arms/published: expected no such folder, found one that is not in"):
        run()
    (tmp_path / "out/arms/published").rmdir()
    (tmp_path / "out" / RECORD).write_text("{")
    with pytest.raises(ValueError, match=r"trainings.json: expected JSON"):
        run()
    save_json({"training": [{"image": "1.png"}], "validation": [{"image": "1.png"}]}, tmp_path / "data/datalist.json")
    with pytest.raises(ValueError, match=r"data/datalist.json: expected images in the section 'test'"):
        run()


def test_training_without_weights_is_named(runner, run, tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, "_release", lambda *arguments: None)
    with pytest.raises(ValueError, match=r"models/model.pt: expected the weights of a finished training.*metrics.csv"):
        run(arms="published")


def test_autoencoder_is_found_where_the_configuration_says(runner, run, monkeypatch, tmp_path):
    bundle = tmp_path / "bundle"
    (bundle / "models/tiny/stages").mkdir(parents=True)
    (bundle / "configs").symlink_to(BUNDLE / "configs")
    (bundle / "models/tiny/stages/autoencoder.pt").write_bytes(b"x")
    monkeypatch.setitem(tool.BUNDLES, "sdseg", bundle)
    run(arms="published", steps=1, ckpt_dir=None)
    assert runner[0].options["autoencoder_weights"] == str(bundle / "models/tiny/stages/autoencoder.pt")


def test_evaluations_of_other_images_are_not_compared(tmp_path):
    write_evaluation(tmp_path / "a", {"one sample": 0.5}, ("foreground",))
    write_evaluation(tmp_path / "b", {"one sample": 0.5}, ("foreground",))
    path = tmp_path / "b/per_image.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-2]))
    one, two = (Evaluation(name, 1, tmp_path / name) for name in "ab")
    with pytest.raises(ValueError, match=r"b/per_image.csv: expected the 10 images"):
        result_rows([one, two], root=tmp_path)
    with pytest.raises(ValueError, match=r"a/summary.json: expected dice of 'U-Net'"):
        Evaluation("U-Net", None, tmp_path / "a", method="U-Net").value("dice")


def test_native_resolution_counts_wherever_it_stands(tmp_path):
    write_evaluation(tmp_path, {"one sample": 0.5, "U-Net": 0.6}, ("a", "b"))
    rows = json.loads((tmp_path / "summary.json").read_text())
    save_json(rows[::-1], tmp_path / "summary.json")
    assert Evaluation("x", 1, tmp_path).value("dice")["value"] == pytest.approx(0.5)
    assert Evaluation("x", 1, tmp_path).value("memory_mb")["value"] == 123.0


def test_choices():
    assert [arm.name for arm in chosen_arms("[U-Net, noise loss only]")] == ["noise loss only", "U-Net"]
    assert chosen_arms(None) == list(ARMS)
    assert len({arm.slug for arm in ARMS}) == len(ARMS)
    assert chosen_steps("[20,2]") == chosen_steps((2, 20)) == chosen_steps("2,20,1") == [1, 2, 20]
    assert chosen_steps(1) == [1]
    assert Budget(3, 2.0).words() == "2 minutes and at most 3 epochs"


def test_chart_is_a_picture_of_its_own():
    points = [("published", 1, 0.9), ("published", 10, 0.92), ("noise loss only", 1, 0.8), ("U-Net", None, 0.7)]
    rows = [{"arm": arm, "steps": steps, "dice": {"value": value}} for arm, steps, value in points]
    svg = steps_chart(rows)
    assert svg is not None
    assert svg.startswith("<svg ")
    assert 'xmlns="http://www.w3.org/2000/svg"' in svg
    assert svg.count("<circle") == 3
    assert "latent weight 1, reverse steps 10: 0.92" in svg
    assert steps_chart([row for row in rows if row["arm"] == "U-Net"]) is None


def test_parameter_counts(tmp_path):
    save_tensors(
        {"a.x": torch.zeros(2, 3), "a.y": torch.zeros(4), "b": torch.zeros(1), "s": torch.tensor(1)}, tmp_path / "m.pt"
    )
    assert parameter_counts(tmp_path / "m.pt") == {"a": 10, "b": 1}


# MONAI warns of every configuration that it reads.
@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_small_run_of_the_bundle(tmp_path, monkeypatch):
    """Commands as they are given to a shell, but run in this process, which has imported everything already."""
    make_dataset(str(tmp_path / "data"), num_images=18, split=(0.5, 0.2, 0.3))
    files = [str(BUNDLE / "configs" / f"{name}.json") for name in ("train", "tiny")]
    autoencoder = ConfigParser(ConfigParser.load_config_files(files)).get_parsed_content("autoencoder_def")
    save_tensors(autoencoder.state_dict(), tmp_path / "autoencoder.pt")

    def in_process(command: list[str], *, cwd: Path, env: dict[str, str]) -> SimpleNamespace:
        assert command[:4] == [sys.executable, "-m", "monai.bundle", "run"]
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", [RUNNER, *command[3:]])
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(sys, "excepthook", sys.excepthook)
            fire.Fire(monai.bundle.run, command=[*command[4:], "--logging_file=False"])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("tools.demo_steps.subprocess", SimpleNamespace(run=in_process))
    ablation(
        "sdseg",
        str(tmp_path / "data"),
        str(tmp_path / "out"),
        overlay=TINY,
        steps=[1],
        max_epochs=1,
        arms=["cross-attention", "U-Net"],
        autoencoder_weights=str(tmp_path / "autoencoder.pt"),
        threads=1,
        tracking_uri="",
    )
    content = json.loads((tmp_path / "out/ablation.json").read_text())
    assert [row["arm"] for row in content["results"]] == ["cross-attention", "U-Net"]
    assert all(0 <= row["dice"]["value"] <= 1 for row in content["results"])
    assert all(row["seconds_per_image"] > 0 for row in content["results"])
    assert [one["epochs"] for one in content["trainings"]] == [1, 1]
    assert all(one["trained_parameters"] > 10_000 for one in content["trainings"])
    assert content["setting"]["datalist_sha256"] is not None
    assert not (tmp_path / "out/mlflow.db").exists()
