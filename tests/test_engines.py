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

from shared import engines
from shared.engines import EPSILON, MAX_ADAPTIVE_WEIGHT, AutoencoderTrainer
from shared.handlers.guard import GradientGuard, NonFiniteLossError
from shared.losses import AutoencoderLoss, HingeAdversarialLoss, VectorQuantizedLoss
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


@pytest.mark.reliability(8)
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


@pytest.mark.reliability(8)
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


@pytest.mark.reliability(8)
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


@pytest.mark.reliability(8)
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


@pytest.mark.reliability(4)
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


def test_steps_without_adaptive_weight_are_the_plain_ones_bit_for_bit():
    """What the bundles with a KL autoencoder rely on: no new term, no other order of operations."""
    trainer, plain = make_trainer(), make_trainer()
    trainer.run()
    network, discriminator = plain.network, plain.discriminator
    adversarial = plain.adversarial_loss
    for epoch in (1, 2, 3):
        for batch in plain.data_loader:
            image = batch["image"]
            output = network(image)
            loss = plain.loss_function(output, image)["total"]
            if epoch >= START:
                discriminator.requires_grad_(False)
                loss = loss + 0.5 * adversarial(discriminator(output[0])[-1], True, False)
            plain.optimizer.zero_grad()
            loss.backward()
            plain.optimizer.step()
            if epoch >= START:
                discriminator.requires_grad_(True)
                fake = adversarial(discriminator(output[0].detach())[-1], False, True)
                real = adversarial(discriminator(image)[-1], True, True)
                plain.discriminator_optimizer.zero_grad()
                (0.5 * (0.5 * (fake + real))).backward()
                plain.discriminator_optimizer.step()
    assert equal(values(trainer.network), values(network))
    assert equal(values(trainer.discriminator), values(discriminator))


# The adaptive weight


class TinyCodebookAutoencoder(nn.Module):
    """Returns what a VQ-GAN does; its codes move in each forward pass of training."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(1, 1, 2, stride=2), nn.ConvTranspose2d(1, 1, 2, stride=2)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.training:
            self.updates += 1
        z = self.encoder(x)
        code = z.detach().round()
        return self.decoder(z + (code - z).detach()), 0.25 * (z - code).square().mean(), torch.ones(()), torch.ones(())


class TwoDecisions(TinyDiscriminator):
    """A discriminator of two opinions, as one of slices and one of volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(1, 1, 5)

    def forward(self, x: torch.Tensor) -> list[Any]:
        self.inputs.append(x)
        return [[self.layer(x), self.second(x)]]


def make_vqgan_trainer(*, adaptive: bool = True, **options: Any) -> AutoencoderTrainer:
    torch.manual_seed(1)
    network, discriminator = TinyCodebookAutoencoder(), TwoDecisions()
    settings: dict[str, Any] = {
        "network": network,
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.1),
        "loss_function": VectorQuantizedLoss(),
        "discriminator": discriminator,
        "discriminator_optimizer": torch.optim.SGD(discriminator.parameters(), lr=0.1),
        "adversarial_loss": HingeAdversarialLoss(),
        "adversarial_weight": 0.7,
        "adversarial_start": 1,
        "epochs": 1,
        "adaptive_weight_of": network.decoder.weight if adaptive else None,
    }
    return make_trainer(**settings | options)


def gradient(loss: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    return torch.autograd.grad(loss, parameter, retain_graph=True)[0]


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    trainer = make_vqgan_trainer()
    network, discriminator = trainer.network, trainer.discriminator
    expected: list[dict[str, torch.Tensor]] = []

    def predict(engine: AutoencoderTrainer) -> None:
        """The first step by hand, before it is done."""
        image = torch.stack([item["image"] for item in trainer.data_loader.dataset.data[:2]])
        output = network(image)
        reconstruction = 4.0 * (output[0] - image).abs().mean()
        generator = -discriminator.layer(output[0]).mean() - discriminator.second(output[0]).mean()
        norms = [gradient(loss, network.decoder.weight).norm() for loss in (reconstruction, generator)]
        factor = norms[0] / (norms[1] + 1e-4)
        assert norms[1] > 1e-2
        assert abs(factor - 1) > 1e-2
        # The factor itself is a constant.
        total = reconstruction + output[1] + 0.7 * factor.detach() * generator
        gradients = torch.autograd.grad(total, list(network.parameters()))
        expected.append({"factor": factor, "total": total.detach(), "gradients": gradients})

    def compare(engine: AutoencoderTrainer) -> None:
        if engine.stepping is engine.optimizer and engine.state.iteration == 1:
            torch.testing.assert_close(engine.state.losses["adversarial_factor"], expected[0]["factor"])
            assert not engine.state.losses["adversarial_factor"].requires_grad
            torch.testing.assert_close(engine.state.output["loss"].detach(), expected[0]["total"])
            for parameter, wanted in zip(network.parameters(), expected[0]["gradients"], strict=True):
                torch.testing.assert_close(parameter.grad, wanted)
            expected.append({})

    trainer.add_event_handler(Events.EPOCH_STARTED, predict)
    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, compare)
    trainer.run()
    assert len(expected) == 2


def test_weighted_gradients_of_both_losses_are_equal_at_the_last_layer():
    """What the weight is for: with weight 1, the discriminator pulls as strongly as the image."""
    trainer = make_vqgan_trainer(adversarial_weight=1.0)
    reconstruction, generator = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True)
    layer = trainer.adaptive_weight_of
    losses = [3.0 * (layer.sum() * reconstruction).sum(), 0.01 * (layer.square().sum() * generator).sum()]
    factor = trainer._adaptive_weight(*losses)
    strength = [gradient(loss, layer).norm() for loss in losses]
    torch.testing.assert_close(factor * (strength[1] + EPSILON), strength[0])


def test_adaptive_weight_has_a_limit_and_keeps_what_is_not_finite():
    trainer = make_vqgan_trainer()
    layer = trainer.adaptive_weight_of
    large, none = 1e9 * layer.sum(), 0.0 * layer.sum()
    assert trainer._adaptive_weight(large, none).item() == MAX_ADAPTIVE_WEIGHT
    assert trainer._adaptive_weight(none, large).item() == 0.0
    assert trainer._adaptive_weight(float("nan") * layer.sum(), large).isnan()


@pytest.mark.reliability(4)
def test_a_step_that_is_not_finite_is_refused_with_the_adaptive_weight_too():
    trainer = make_vqgan_trainer(handlers=(GradientGuard(),))
    trainer.discriminator.second.weight.data[:] = float("inf")
    start = values(trainer.network)
    with pytest.raises(NonFiniteLossError, match="expected a finite loss and gradient, .*'adversarial_factor'"):
        trainer.run()
    assert equal(values(trainer.network), start)


def test_adaptive_weight_does_not_depend_on_the_scale_of_half_precision():
    trainer = make_vqgan_trainer()
    layer = trainer.adaptive_weight_of
    losses = 3.0 * layer.sum(), 1e-3 * layer.square().sum()
    plain = trainer._adaptive_weight(*losses)
    trainer.amp = True
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    torch.testing.assert_close(trainer._adaptive_weight(*losses), plain)
    # Each of many small gradients would round to zero on its way through half precision, and the weight be 1e4.
    many = (layer.flatten()[0] * torch.ones(2**20)).half().float().mean()
    factor = trainer._adaptive_weight(layer.flatten()[0].clone(), 2.0**-10 * many)
    torch.testing.assert_close(factor, torch.tensor(1 / (2.0**-10 + EPSILON)))


def test_ranks_have_the_factor_of_the_whole_batch(monkeypatch):
    """Two ranks, one after the other: each hands over its gradients, whose mean is that of the doubled batch."""
    handed: list[torch.Tensor] = []
    data = [{"image": torch.rand(4, 1, 8, 12, generator=torch.Generator().manual_seed(3))}]
    shares = [[{"image": data[0]["image"][start : start + 2]}] for start in (0, 2)]

    def run(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        trainer = make_vqgan_trainer(train_data_loader=batches)
        trainer.run()
        return trainer.state.losses["adversarial_factor"]

    monkeypatch.setattr(engines, "mean_over_processes", lambda values: handed.append(values) or values)
    whole, *apart = run(data), run(shares[0]), run(shares[1])
    assert not torch.allclose(apart[0], apart[1])
    torch.testing.assert_close((handed[1] + handed[2]) / 2, handed[0])
    monkeypatch.setattr(engines, "mean_over_processes", lambda values: (handed[1] + handed[2]) / 2)
    for share in shares:
        torch.testing.assert_close(run(share), whole)


def test_codes_move_once_in_a_step_and_in_no_other_pass():
    trainer = make_vqgan_trainer(epochs=3, adversarial_start=START)
    seen = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(int(trainer.network.updates)))
    trainer.run()
    assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.reliability(8)
def test_each_optimizer_moves_its_own_parameters_with_the_adaptive_weight():
    trainer = make_vqgan_trainer(epochs=2, adversarial_start=START)
    parts = {"network": trainer.network, "discriminator": trainer.discriminator}
    before = {name: values(part) for name, part in parts.items()}
    moved, gradients = [], []

    def look(engine: AutoencoderTrainer) -> None:
        moved.append([not equal(values(part), before[name]) for name, part in parts.items()])
        before.update({name: values(part) for name, part in parts.items()})
        if engine.stepping is engine.optimizer:
            gradients.append([parameter.grad for parameter in trainer.discriminator.parameters()])

    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, look)
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: trainer.discriminator.zero_grad(set_to_none=True))
    trainer.run()
    assert moved == [[False, False], [True, False], [True, False], [True, False], [False, True], [True, False]]
    assert gradients == 4 * [[None, None, None, None]]


def test_adaptive_weight_is_measured_from_the_start_of_the_discriminator_on():
    trainer = make_vqgan_trainer(epochs=2, adversarial_start=START)
    names = {}
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: names.update({engine.state.epoch: set(engine.state.losses)})
    )
    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: seen.append(len(trainer.discriminator.inputs)))
    seen: list[int] = []
    trainer.run()
    terms = {"reconstruction", "commitment", "perplexity", "usage"}
    assert names == {1: terms, 2: terms | {"generator", "adversarial_factor", "discriminator"}}
    assert seen == [0]
    assert not any(value.requires_grad for value in trainer.state.losses.values())


def test_weight_of_another_network_is_refused():
    with pytest.raises(
        ValueError, match="^adaptive_weight_of: expected a parameter of the network .* refer to network"
    ):
        make_vqgan_trainer(adaptive_weight_of=TinyCodebookAutoencoder().decoder.weight)


def test_compiled_network_is_refused_with_the_adaptive_weight():
    """It would fail in the first step of the discriminator, after days perhaps."""
    with pytest.raises(ValueError, match="^compile: expected False where adaptive_weight_of is given, got True"):
        make_vqgan_trainer(compile=True)
