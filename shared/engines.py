# SPDX-License-Identifier: Apache-2.0
"""Training steps that a configuration of MONAI's engines cannot express."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import monai
import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch import nn
from torch.optim import Optimizer

from shared.distributed import mean_over_processes, unwrapped

# Of the adaptive weight, as published with it.
EPSILON = 1e-4
MAX_ADAPTIVE_WEIGHT = 1e4


class AccumulatingTrainer(SupervisedTrainer):
    """``SupervisedTrainer`` with an ``accumulation_steps`` of its own, which MONAI's has only since 1.6.

    MONAI Label 0.8 trains with MONAI 1.5, whose trainer refuses the argument; there it can only be 1.

    Args:
        accumulation_steps: iterations over which gradients are added up before an optimizer step.
        kwargs: arguments of ``SupervisedTrainer``.

    Raises:
        ValueError: with ``accumulation_steps`` other than 1 where MONAI has no accumulation.
    """

    def __init__(self, *, accumulation_steps: int = 1, **kwargs: Any) -> None:
        if "accumulation_steps" in inspect.signature(SupervisedTrainer).parameters:
            kwargs["accumulation_steps"] = accumulation_steps
        elif accumulation_steps != 1:
            raise ValueError(
                f"accumulation_steps: expected 1 with MONAI {monai.__version__}, got {accumulation_steps}; "
                "install monai>=1.6, or raise batch_size instead."
            )
        super().__init__(**kwargs)
        self.accumulation_steps = accumulation_steps


class AutoencoderTrainer(AccumulatingTrainer):
    """Train an autoencoder, with a patch discriminator that joins late.

    ``monai.engines.AdversarialTrainer`` does not fit: it takes the network's output for an image, but ``AutoencoderKL``
    returns (reconstruction, mean, sigma) and a VQ-GAN its commitment loss and the use of its codes; it has neither a
    late start nor the terms of the loss by name; and federated clients accept only a ``SupervisedTrainer``.

    Generator: ``L = L_rec + adversarial_weight * lambda * L_adv(D(reconstruction), real)``, with ``L_rec`` the total of
    ``loss_function``; discriminator: ``adversarial_weight * (L_adv(D(reconstruction), fake) + L_adv(D(image), real))
    / 2``. While the generator steps, the discriminator takes no gradient. Before epoch ``adversarial_start`` the
    discriminator is neither called nor trained. The network runs once in each step, so that a codebook that moves in
    its forward pass moves once.

    ``lambda`` is 1, or with ``adaptive_weight_of`` the adaptive weight of VQGAN (arXiv:2012.09841, equation 7):
    ``|grad L_rec| / (|grad L_adv| + 1e-4)``, at most 1e4, with both gradients those of the decoder's last layer. What
    does not depend on that layer (divergence, commitment) has no part in them. Ranks average the gradients before the
    norms are taken: all have the factor of the whole batch. It is no path for gradients, and
    ``state.losses["adversarial_factor"]`` holds it.

    Gradients pass ``IterationEvents.BACKWARD_COMPLETED`` before each of the two steps, with ``engine.stepping`` naming
    the optimizer, so that one guard handler covers both.

    Args:
        discriminator: returns the list of its layers' outputs, the decision last, which may itself be a list of
            decisions where ``adversarial_loss`` takes one; ``None`` trains without a discriminator.
        discriminator_optimizer: optimizer of the discriminator alone.
        adversarial_loss: ``monai.losses.PatchAdversarialLoss``, which averages over several decisions, or
            ``shared.losses.HingeAdversarialLoss``, which adds them up.
        adversarial_weight: weight of both adversarial terms.
        adversarial_start: first epoch, counted from 1, in which the discriminator plays.
        adaptive_weight_of: weight of the last layer of the network's decoder; ``None`` leaves ``lambda`` at 1.
        kwargs: arguments of ``SupervisedTrainer``; ``network`` returns a tuple with the reconstruction first, and
            ``loss_function`` takes it and the target to a dictionary of terms, one of them ``total``.

    Raises:
        ValueError: with ``accumulation_steps`` other than 1, with a discriminator that lacks optimizer or loss, and
            where ``adaptive_weight_of`` is no parameter of the network or meets ``compile``.
    """

    loss_function: Callable[[Any, torch.Tensor], dict[str, torch.Tensor]]

    def __init__(
        self,
        *,
        discriminator: nn.Module | None = None,
        discriminator_optimizer: Optimizer | None = None,
        adversarial_loss: Any = None,
        adversarial_weight: float = 0.0,
        adversarial_start: int = 1,
        adaptive_weight_of: nn.Parameter | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.accumulation_steps != 1:
            raise ValueError(
                f"accumulation_steps: expected 1 for an adversarial training, got {self.accumulation_steps}; "
                "lower the image size or the batch size instead."
            )
        if discriminator is not None and (discriminator_optimizer is None or adversarial_loss is None):
            raise ValueError("discriminator: expected discriminator_optimizer and adversarial_loss with it; give both.")
        if adaptive_weight_of is not None and all(p is not adaptive_weight_of for p in self.network.parameters()):
            raise ValueError(
                f"adaptive_weight_of: expected a parameter of the network that is trained, got one of shape "
                f"{tuple(adaptive_weight_of.shape)} that is not among them; refer to network_def, not to a copy of it."
            )
        if adaptive_weight_of is not None and self.compile:
            # Compiled, the gradients of one layer cost a pass through the whole network, which frees its buffers.
            raise ValueError("compile: expected False where adaptive_weight_of is given, got True; set it to False.")
        self.discriminator = discriminator
        self.discriminator_optimizer = discriminator_optimizer
        self.adversarial_loss = adversarial_loss
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        self.adaptive_weight_of = adaptive_weight_of
        self.stepping: Optimizer = self.optimizer

    def _iteration(self, engine: Any, batchdata: Mapping[str, Any]) -> dict[str, Any]:
        image, target = self.prepare_batch(batchdata, self.state.device, self.non_blocking, **self.to_kwargs)
        adversarial = self.discriminator is not None and self.state.epoch >= self.adversarial_start
        self.network.train()

        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            output = self.inferer(image, self.network)
            terms = self.loss_function(output, target)
            total = terms.pop("total")
            if adversarial:
                terms["generator"] = self._generator_loss(output[0])
        if adversarial:
            weight: torch.Tensor | float = self.adversarial_weight
            if self.adaptive_weight_of is not None:
                terms["adversarial_factor"] = self._adaptive_weight(total, terms["generator"])
                weight = weight * terms["adversarial_factor"]
            total = total + weight * terms["generator"]
        self.state.losses = terms
        self.state.output = {Keys.IMAGE: image, Keys.LABEL: target, Keys.PRED: output[0], Keys.LOSS: total}
        self.fire_event(IterationEvents.FORWARD_COMPLETED)
        self.fire_event(IterationEvents.LOSS_COMPLETED)
        self._step(total, self.optimizer)

        if adversarial:
            self._step_discriminator(output[0].detach(), target)
        self.state.losses = {name: term.detach() for name, term in self.state.losses.items()}
        self.state.output = {name: value.detach() for name, value in self.state.output.items()}
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return self.state.output

    def _generator_loss(self, reconstruction: torch.Tensor) -> torch.Tensor:
        assert self.discriminator is not None
        self.discriminator.requires_grad_(False)
        # Without the wrapper of DistributedDataParallel, which would wait for gradients of its own.
        decision = unwrapped(self.discriminator)(reconstruction)[-1]
        return self.adversarial_loss(decision, target_is_real=True, for_discriminator=False)

    def _adaptive_weight(self, reconstruction: torch.Tensor, generator: torch.Tensor) -> torch.Tensor:
        assert self.adaptive_weight_of is not None
        scale = reconstruction.new_ones(())
        if self.amp and self.scaler is not None:
            # As in the backward pass, lest gradients of half precision vanish. The ratio does not depend on it.
            scale = self.scaler.scale(scale)
        gradients = [
            torch.autograd.grad(scale * loss, self.adaptive_weight_of, retain_graph=True)[0].float() / scale
            for loss in (reconstruction, generator)
        ]
        norms = mean_over_processes(torch.stack(gradients)).flatten(1).norm(dim=1)
        return (norms[0] / (norms[1] + EPSILON)).clamp(0.0, MAX_ADAPTIVE_WEIGHT)

    def _step_discriminator(self, reconstruction: torch.Tensor, image: torch.Tensor) -> None:
        assert self.discriminator is not None
        assert self.discriminator_optimizer is not None
        self.discriminator.requires_grad_(True).train()
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            fake = self.adversarial_loss(
                self.discriminator(reconstruction)[-1], target_is_real=False, for_discriminator=True
            )
            real = self.adversarial_loss(self.discriminator(image)[-1], target_is_real=True, for_discriminator=True)
            loss = 0.5 * (fake + real)
        self.state.losses["discriminator"] = loss
        self._step(self.adversarial_weight * loss, self.discriminator_optimizer)

    def _step(self, loss: torch.Tensor, optimizer: Optimizer) -> None:
        self.stepping = optimizer
        scaler = self.scaler if self.amp else None
        (loss if scaler is None else scaler.scale(loss)).backward()
        self.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    def _autocast(self) -> torch.autocast:
        device = self.state.device.type
        return torch.autocast(device, enabled=self.amp, **(self.amp_kwargs if self.amp else {}))
