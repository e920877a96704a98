# SPDX-License-Identifier: Apache-2.0
"""Training steps that a configuration of MONAI's engines cannot express."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch import nn
from torch.optim import Optimizer

from shared.distributed import unwrapped
from shared.losses import AutoencoderLoss


class AutoencoderTrainer(SupervisedTrainer):
    """Train a KL autoencoder, with a patch discriminator that joins late.

    ``monai.engines.AdversarialTrainer`` does not fit: it takes the network's output for an image, but ``AutoencoderKL``
    returns (reconstruction, mean, sigma); it has neither a late start nor the terms of the loss by name; and federated
    clients accept only a ``SupervisedTrainer``.

    Generator: ``L = AutoencoderLoss + adversarial_weight * L_adv(D(reconstruction), real)``; discriminator:
    ``adversarial_weight * (L_adv(D(reconstruction), fake) + L_adv(D(image), real)) / 2``. While the generator steps,
    the discriminator takes no gradient. Before epoch ``adversarial_start`` the discriminator is neither called nor
    trained.

    Gradients pass ``IterationEvents.BACKWARD_COMPLETED`` before each of the two steps, with ``engine.stepping`` naming
    the optimizer, so that one guard handler covers both.

    Args:
        discriminator: returns the list of its layers' outputs, the decision last; ``None`` trains without one.
        discriminator_optimizer: optimizer of the discriminator alone.
        adversarial_loss: ``monai.losses.PatchAdversarialLoss``.
        adversarial_weight: weight of both adversarial terms.
        adversarial_start: first epoch, counted from 1, in which the discriminator plays.
        kwargs: arguments of ``SupervisedTrainer``; ``loss_function`` is an ``AutoencoderLoss``.
    """

    loss_function: AutoencoderLoss

    def __init__(
        self,
        *,
        discriminator: nn.Module | None = None,
        discriminator_optimizer: Optimizer | None = None,
        adversarial_loss: Any = None,
        adversarial_weight: float = 0.0,
        adversarial_start: int = 1,
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
        self.discriminator = discriminator
        self.discriminator_optimizer = discriminator_optimizer
        self.adversarial_loss = adversarial_loss
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
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
                total = total + self.adversarial_weight * terms["generator"]
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
