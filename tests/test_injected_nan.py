# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events

from shared.errors import root_cause
from shared.files import sha256_of_file
from shared.handlers.guard import NonFiniteLossError, batch_files
from tests import small_stages
from tests.small_stages import ADVERSARIAL, STAGES

pytestmark = [
    pytest.mark.reliability(4),
    # The first of two batches that make a step.
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]

BAD = {"NaN": float("nan"), "Inf": float("inf")}
# Buffers by which latents are scaled.
STATISTICS = ("scale_factor", "latent_mean", "latent_std")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small_stages.prepare(tmp_path_factory.mktemp("stages"))


class Poison:
    """Puts a number that is not finite into one place of one training step, and can take it out again."""

    def __init__(self, workflow: Any) -> None:
        content = workflow.parser.get_parsed_content
        self.trainer = trainer = content("train#trainer")
        self.discriminator = getattr(trainer, "discriminator", None)
        self.average = content("ema").ema_model if "ema" in workflow.parser else None
        self.optimizers = {"": trainer.optimizer}
        if self.discriminator is not None:
            self.optimizers["discriminator "] = trainer.discriminator_optimizer
        self.statistics = {
            name: module for module in trainer.network.modules() for name in STATISTICS if name in module._buffers
        }
        self.kind, self.value = "", 0.0
        self._undo: list[tuple[Any, Any]] = []
        loss = trainer.loss_function
        trainer.loss_function = lambda *args: self._poisoned_loss(loss(*args))
        trainer.network.register_forward_hook(self._poison_output)
        for name, optimizer in self.optimizers.items():
            [parameter] = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad][-1:]
            parameter.register_hook(lambda gradient, name=name: self._if(f"{name}gradient", gradient))

    def kinds(self, batch: dict[str, Any]) -> list[str]:
        """The places of a training: its loss, gradients, rates, networks' outputs, statistics, and what it reads."""
        known = ["loss", "output", *(f"{name}{what}" for name in self.optimizers for what in ("gradient", "rate"))]
        known += self.statistics
        read = [key for key, value in batch.items() if isinstance(value, torch.Tensor) and value.ndim > 2]
        return known + [f"batch {key}" for key in read if "log_variance" not in key]

    def put(self, kind: str, value: float) -> None:
        self.kind, self.value = kind, value
        if kind.startswith("batch "):
            batch = self.trainer.state.batch
            tensor = batch[kind.removeprefix("batch ")] = batch[kind.removeprefix("batch ")].clone()
            tensor[-1][..., 1, 1] = value
        elif kind.endswith("rate"):
            for group in self.optimizers[kind.removesuffix("rate")].param_groups:
                self._undo.append((group, group["lr"]))
                group["lr"] = value
        elif kind in STATISTICS:
            getattr(self.statistics[kind], kind).fill_(value)

    def take_out(self) -> None:
        self.kind = ""
        for group, rate in self._undo:
            group["lr"] = rate
        self._undo.clear()

    def _if(self, kind: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.full_like(tensor, self.value) if self.kind == kind else tensor

    def _poisoned_loss(self, loss: Any) -> Any:
        if self.kind != "loss":
            return loss
        if isinstance(loss, dict):
            return loss | {name: self.value * loss[name] for name in ("total", "reconstruction")}
        return self.value * loss

    def _poison_output(self, module: Any, inputs: Any, output: Any) -> Any:
        if self.kind != "output":
            return output
        return (self.value * output[0], *output[1:]) if isinstance(output, tuple) else self.value * output

    def state(self) -> dict[str, Any]:
        """Everything that a step must leave as it is."""
        parts = {"network": self.trainer.network, "discriminator": self.discriminator, "average": self.average}
        found = {name: part.state_dict() for name, part in parts.items() if part is not None}
        found |= {f"{name}moments": dict(moments_of(optimizer)) for name, optimizer in self.optimizers.items()}
        return copy.deepcopy(found)


def moments_of(optimizer: torch.optim.Optimizer) -> Any:
    for number, state in enumerate(optimizer.state.values()):
        for name, value in state.items():
            yield f"{number} {name}", torch.as_tensor(value)


def differing(one: dict[str, Any], two: dict[str, Any]) -> set[str]:
    return {
        part
        for part in one
        if one[part].keys() != two[part].keys() or any(not torch.equal(one[part][k], two[part][k]) for k in one[part])
    }


def assert_finite(state: dict[str, Any]) -> None:
    for part, tensors in state.items():
        for name, tensor in tensors.items():
            assert torch.isfinite(tensor).all(), (part, name)


# What a refused step may change: the average goes on towards the weights, the other network takes its own step.
FREE = {
    "gradient": {"discriminator", "discriminator moments"},
    "rate": {"discriminator", "discriminator moments"},
    "discriminator gradient": {"network", "moments"},
    "discriminator rate": {"network", "moments"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_skipped_steps_change_nothing_and_training_goes_on(stage, data, tmp_path, caplog, record_property):
    """Every second step is poisoned, each time in another place."""
    options: dict[str, Any] = {"non_finite_policy": "skip", "max_epochs": 16, "val_interval": 16}
    if stage != small_stages.CLASSIFIER:
        options["preview_interval"] = 99
    with small_stages.loaded(stage, data, tmp_path, **options) as workflow:
        poison = Poison(workflow)
        plan: list[tuple[str, float]] = []
        before: dict[str, Any] = {}
        first: dict[str, Any] = {}
        found: list[tuple[str, float, set[str], int]] = []

        def start(engine: Any) -> None:
            if engine.state.iteration == 1:
                plan.extend(itertools.product(poison.kinds(engine.state.batch), BAD.values()))
                # Latents that are divided by it are zero, and the loss is finite: see the start of an epoch.
                with contextlib.suppress(ValueError):
                    plan.remove(("latent_std", BAD["Inf"]))
            if engine.state.iteration % 2 == 0 and plan:
                caplog.clear()
                before.update(poison.state())
                first.update({} if first else before)
                poison.put(*plan.pop(0))

        def end(engine: Any) -> None:
            if poison.kind:
                messages = [record.message for record in caplog.records if "step skipped" in record.message]
                after = poison.state()
                assert_finite(after)
                changed = differing(before, after) - {"average"} - FREE.get(poison.kind, set())
                found.append((poison.kind, poison.value, changed, len(messages)))
                poison.take_out()
            if found and not plan and engine.state.iteration % 2:
                engine.terminate()

        poison.trainer.add_event_handler(Events.ITERATION_STARTED, start)
        poison.trainer.add_event_handler(Events.ITERATION_COMPLETED, end)
        with caplog.at_level(logging.WARNING):
            workflow.run()
        assert not plan
        assert [entry for entry in found if entry[2] or not entry[3]] == []
        assert differing(first, poison.state()) >= {"network", "moments"}
    record_property("cases", len(found))


@pytest.mark.parametrize("stage", STAGES)
def test_training_stops_before_the_step_names_the_files_and_goes_on_from_its_checkpoint(stage, data, tmp_path):
    options: dict[str, Any] = {"max_epochs": 2}
    key, states, files, released = "", [], [], []
    with small_stages.loaded(stage, data, tmp_path, **options) as workflow:
        poison = Poison(workflow)
        best = Path(workflow.parser.get_parsed_content("validate#best").path)

        def start(engine: Any) -> None:
            nonlocal key
            if engine.state.epoch == 2:
                key = poison.kinds(engine.state.batch)[-1]
                states.append(poison.state())
                released.append(sha256_of_file(best))
                dataset = engine.data_loader.dataset
                files.extend(batch_files(engine.state.batch, dataset.data))
                poison.put(key, BAD["NaN"])

        poison.trainer.add_event_handler(Events.ITERATION_STARTED, start)
        with pytest.raises(RuntimeError) as caught:
            workflow.run()
        cause = root_cause(caught.value)
        assert isinstance(cause, NonFiniteLossError)
        assert key.startswith("batch ")
        assert files
        assert all(name.endswith((".png", ".nii.gz", ".bval", ".bvec")) for name in files)
        assert str(cause).startswith(f"{', '.join(files)}: expected a finite loss and gradient, got loss nan (terms {{")
        if stage in ADVERSARIAL:
            assert "'reconstruction': nan" in str(cause)
        assert differing(states[0], poison.state()) == set()
        assert_finite(poison.state())
        assert sha256_of_file(best) == released[0]
    with small_stages.loaded(stage, data, tmp_path, **options) as workflow:
        trainer = workflow.parser.get_parsed_content("train#trainer")
        epochs: list[int] = []
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: epochs.append(engine.state.epoch))
        workflow.run()
        assert set(epochs) == {2}
        assert all(torch.isfinite(p).all() for p in trainer.network.parameters())
    assert (tmp_path / "run/checkpoints/checkpoint_epoch=2.pt").is_file()


@pytest.mark.parametrize(
    "stage", ["cxr_ldm train", "brain_controlnet train_diffusion", "sdseg train", "dmri2noddi train"]
)
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_statistics_of_latents_that_are_not_finite_stop_the_run_at_its_start(stage, value, data, tmp_path):
    latents = str(tmp_path / "latents")
    with small_stages.loaded(stage, data, tmp_path, latent_cache_dir=latents) as workflow:
        dataset = workflow.parser.get_parsed_content("train#dataset")
        path = dataset.cache_path
        mapped = np.load(path, mmap_mode="r+")
        mapped[2, 0, 1, 1] = value  # the store itself looks at the one in the middle
        mapped.flush()
    with small_stages.loaded(stage, data, tmp_path, latent_cache_dir=latents) as workflow:
        network = workflow.parser.get_parsed_content("train#trainer").network
        before = copy.deepcopy(network.state_dict())
        with pytest.raises(RuntimeError) as caught:
            workflow.run()
        assert str(root_cause(caught.value)).startswith(f"{path}: expected latents ")
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("cxr_ldm train", "scale_factor"),
        ("brain_controlnet train", "scale_factor"),
        ("sdseg train", "scale_factor"),
        ("dmri2noddi train", "latent_std"),
        ("cxr_ldm train_classifier", "running_var"),
    ],
)
def test_buffers_that_are_not_finite_stop_the_run_at_the_start_of_an_epoch(stage, name, value, data, tmp_path):
    with small_stages.loaded(stage, data, tmp_path) as workflow:
        trainer = workflow.parser.get_parsed_content("train#trainer")
        module = next(module for module in trainer.network.modules() if name in module._buffers)
        started: list[int] = []

        def spoil(engine: Any) -> None:
            if engine.state.epoch == 1:
                getattr(module, name).fill_(value)

        trainer.add_event_handler(Events.EPOCH_COMPLETED, spoil)
        trainer.add_event_handler(Events.ITERATION_STARTED, lambda engine: started.append(engine.state.epoch))
        with pytest.raises(RuntimeError) as caught:
            workflow.run()
    cause = root_cause(caught.value)
    assert str(cause).startswith(f"{type(module).__name__}.{name}: expected finite numbers at the start of epoch 2")
    assert set(started) == {1}
