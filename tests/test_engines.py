# SPDX-License-Identifier: Apache-2.0
"""The two-network training step on networks of a few parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer
from monai.losses import PatchAdversarialLoss
from torch import nn

from shared.engines import AutoencoderTrainer
from shared.handlers.guard import GradientGuard, NonFiniteLossError
from shared.losses import AutoencoderLoss
from shared.prepare_batch import ImageAsTarget

START = 2


class TinyAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(1, 2, 2, stride=2), nn.ConvTranspose2d(1, 1, 2, stride=2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return self.decoder(mean), mean, torch.exp(0.5 * log_variance)


class TinyDiscriminator(nn.Module):
    """Returns its layers' outputs, as MONAI's does; keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3)
        self.inputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.inputs.append(x)
        return [x, self.layer(x)]


def make_trainer(*, epochs: int = 3, handlers: tuple[Any, ...] = (), **options: Any) -> AutoencoderTrainer:
    torch.manual_seed(0)
    network, discriminator = TinyAutoencoder(), TinyDiscriminator()
    data = [{"image": torch.rand(1, 8, 8)} for _ in range(4)]
    settings: dict[str, Any] = {
        "device": torch.device("cpu"),
        "max_epochs": epochs,
        "train_data_loader": DataLoader(Dataset(data), batch_size=2),
        "network": network,
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.1),
        "loss_function": AutoencoderLoss(kl_weight=1e-3),
        "inferer": SimpleInferer(),
        "prepare_batch": ImageAsTarget(),
        "train_handlers": list(handlers),
        "discriminator": discriminator,
        "discriminator_optimizer": torch.optim.SGD(discriminator.parameters(), lr=0.1),
        "adversarial_loss": PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True),
        "adversarial_weight": 0.5,
        "adversarial_start": START,
        "decollate": False,
    }
    return AutoencoderTrainer(**settings | options)


def values(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_each_optimizer_moves_its_own_parameters_only():
    trainer = make_trainer()
    network, discriminator = trainer.network, trainer.discriminator
    before = {"network": values(network), "discriminator": values(discriminator)}
    moved: list[tuple[bool, bool, bool]] = []

    def look(engine: AutoencoderTrainer) -> None:
        # Runs before a step: what changed since the last look was moved by the step before.
        now = {"network": values(network), "discriminator": values(discriminator)}
        changed = [not equal(now[name], before[name]) for name in ("network", "discriminator")]
        moved.append((engine.stepping is trainer.discriminator_optimizer, changed[0], changed[1]))
        before.update(now)

    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, look)
    trainer.run()
    # (about to step the discriminator, network moved, discriminator moved)
    first, second = moved[:2], moved[2:]
    assert first == [(False, False, False), (False, True, False)]
    assert second == [(False, True, False), (True, True, False)] + 3 * [(False, False, True), (True, True, False)]


def test_discriminator_is_neither_called_nor_trained_before_its_epoch():
    trainer = make_trainer()
    start = values(trainer.discriminator)
    history = {}

    def look(engine: AutoencoderTrainer) -> None:
        history[engine.state.epoch] = (len(trainer.discriminator.inputs), equal(values(trainer.discriminator), start))

    trainer.add_event_handler(Events.EPOCH_COMPLETED, look)
    trainer.run()
    # Three calls in each of two iterations: generator, fake, real.
    assert history == {1: (0, True), 2: (6, False), 3: (12, False)}


def test_generator_pass_leaves_no_gradient_in_the_discriminator():
    trainer = make_trainer(adversarial_start=1, epochs=1)
    gradients: list[list[torch.Tensor | None]] = []

    def look(engine: AutoencoderTrainer) -> None:
        if engine.stepping is engine.optimizer:
            gradients.append([parameter.grad for parameter in trainer.discriminator.parameters()])
            trainer.discriminator.zero_grad(set_to_none=True)

    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, look)
    # Gradients that the generator pass must neither use nor extend.
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: trainer.discriminator.zero_grad(set_to_none=True))
    trainer.run()
    assert gradients == [[None, None], [None, None]]
    assert all(parameter.requires_grad for parameter in trainer.discriminator.parameters())


def test_discriminator_step_leaves_no_gradient_in_the_network():
    trainer = make_trainer(adversarial_start=1, epochs=1)
    at_step: dict[bool, list[torch.Tensor]] = {}

    def look(engine: AutoencoderTrainer) -> None:
        second = engine.stepping is engine.discriminator_optimizer
        at_step[second] = [parameter.grad.clone() for parameter in trainer.network.parameters()]
        assert not second or equal(at_step[True], at_step[False])

    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, look)
    trainer.run()
    assert set(at_step) == {False, True}


def test_losses_equal_their_formulas():
    trainer = make_trainer(adversarial_start=1, epochs=1)
    network, discriminator = trainer.network, trainer.discriminator
    checked: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []

    def look(engine: AutoencoderTrainer) -> None:
        if engine.stepping is engine.optimizer:
            discriminator.requires_grad_(True)
            image = engine.state.batch["image"]
            with torch.no_grad():
                reconstruction, mean, sigma = network(image)
                score = discriminator.layer(reconstruction)
                expected = {
                    "reconstruction": (reconstruction - image).abs().mean(),
                    "kl": 0.5 * (mean**2 + sigma**2 - 2 * sigma.log() - 1).sum(dim=(1, 2, 3)).mean(),
                    "generator": ((score - 1) ** 2).mean(),
                }
            # The reconstruction of before the network's step; the discriminator has not moved yet.
            real, fake = discriminator.layer(image), discriminator.layer(reconstruction)
            loss = 0.5 * ((fake**2).mean() + ((real - 1) ** 2).mean())
            gradients[:] = torch.autograd.grad(0.5 * loss, list(discriminator.layer.parameters()))
            checked.append(loss.detach())
            assert set(engine.state.losses) == set(expected)
            for name, value in expected.items():
                torch.testing.assert_close(engine.state.losses[name].detach(), value)
            total = expected["reconstruction"] + 1e-3 * expected["kl"] + 0.5 * expected["generator"]
            torch.testing.assert_close(engine.state.output["loss"].detach(), total)
        else:
            for parameter, expected_gradient in zip(discriminator.parameters(), gradients, strict=True):
                torch.testing.assert_close(parameter.grad, expected_gradient)

    def compare(engine: AutoencoderTrainer) -> None:
        torch.testing.assert_close(engine.state.losses["discriminator"], checked[-1])
        assert not any(value.requires_grad for value in engine.state.losses.values())
        assert not any(value.requires_grad for value in engine.state.output.values())

    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, look)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, compare)
    trainer.run()
    assert len(checked) == 2


def test_terms_are_named_and_output_has_the_usual_keys():
    trainer = make_trainer(epochs=2)
    names = {}
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: names.update({engine.state.epoch: set(engine.state.losses)})
    )
    trainer.run()
    assert names == {1: {"reconstruction", "kl"}, 2: {"reconstruction", "kl", "generator", "discriminator"}}
    assert set(trainer.state.output) == {"image", "label", "pred", "loss"}
    assert trainer.state.output["pred"].shape == (2, 1, 8, 8)


def test_training_without_a_discriminator_lowers_the_loss():
    losses = []
    trainer = make_trainer(discriminator=None, discriminator_optimizer=None, adversarial_loss=None, epochs=30)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output["loss"].item())
    )
    trainer.run()
    assert losses[-1] < 0.8 * losses[0]


def test_guard_covers_both_steps_and_reports_the_norm_of_the_network():
    trainer = make_trainer(adversarial_start=1, epochs=1, handlers=(GradientGuard(max_norm=1e-3),))
    norms: dict[bool, float] = {}
    reported = []

    def look(engine: AutoencoderTrainer) -> None:
        grads = [p.grad for group in engine.stepping.param_groups for p in group["params"]]
        norms[engine.stepping is engine.optimizer] = torch.stack([g.norm() for g in grads]).norm().item()
        reported.append(float(engine.state.gradient_norm))

    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, look)
    trainer.run()
    assert max(norms.values()) <= 1e-3 * (1 + 1e-4)
    # Measured before clipping, and not overwritten when the discriminator steps.
    assert reported[0] == reported[1] > 1e-3


def test_guard_stops_a_discriminator_that_is_not_finite():
    trainer = make_trainer(adversarial_start=1, handlers=(GradientGuard(),))
    trainer.discriminator.layer.weight.data[:] = float("inf")
    start = values(trainer.network)
    with pytest.raises(NonFiniteLossError, match="expected a finite loss and gradient, .*'generator'"):
        trainer.run()
    assert equal(values(trainer.network), start)


def test_accumulation_and_missing_parts_are_refused():
    with pytest.raises(ValueError, match="^accumulation_steps: expected 1 for an adversarial training, got 2"):
        make_trainer(accumulation_steps=2)
    for name in ("discriminator_optimizer", "adversarial_loss"):
        with pytest.raises(ValueError, match="^discriminator: expected discriminator_optimizer and adversarial_loss"):
            make_trainer(**{name: None})
