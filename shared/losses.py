# SPDX-License-Identifier: Apache-2.0
"""Loss terms of the autoencoders, their discriminators and of latent estimation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from monai.networks.schedulers import Scheduler
from torch import nn


def kl_divergence(mean: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of ``N(mean, sigma^2)`` from ``N(0, 1)``, summed per sample, averaged over the batch.

    ``0.5 sum(mean^2 + sigma^2 - log sigma^2 - 1)`` (arXiv:1312.6114, appendix B), in float32 whatever the input: the
    sum over all latent elements overflows half precision.

    Args:
        mean: posterior mean ``(B, C, *spatial)``.
        sigma: posterior standard deviation, same shape, > 0.

    Returns:
        Scalar tensor, >= 0, in nats.
    """
    mean, sigma = mean.float(), sigma.float()
    per_element = 0.5 * (mean.square() + sigma.square() - 2.0 * sigma.log() - 1.0)
    return per_element.flatten(1).sum(dim=1).mean()


class AutoencoderLoss(nn.Module):
    """Reconstruction, KL and optional perceptual term of a KL autoencoder (arXiv:2112.10752, section 3.1).

    MONAI core has the parts but no loss that takes ``AutoencoderKL``'s triple output. Terms come back unweighted and by
    name, so that logs compare between weights; ``total`` is their weighted sum.

    Args:
        kl_weight: weight of :func:`kl_divergence`.
        perceptual: callable ``(reconstruction, image) -> scalar``, or ``None`` to train without the term.
        perceptual_weight: weight of ``perceptual``; ignored without it.
        reconstruction: pixel term, mean absolute error by default.
    """

    def __init__(
        self,
        *,
        kl_weight: float,
        perceptual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        perceptual_weight: float = 0.0,
        reconstruction: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.kl_weight = kl_weight
        # Held in a tuple: a pretrained perceptual network is no part of this module's parameters or checkpoint.
        self._perceptual = (perceptual,)
        self.perceptual_weight = perceptual_weight if perceptual is not None else 0.0
        self.reconstruction = reconstruction or nn.L1Loss()

    def forward(
        self, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor], image: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Compute the terms.

        Args:
            output: reconstruction ``(B, 1, H, W)``, posterior mean and sigma ``(B, C, h, w)``.
            image: target ``(B, 1, H, W)`` in [0, 1].

        Returns:
            Scalars ``reconstruction``, ``kl``, ``perceptual`` (if used) and ``total``.
        """
        reconstructed, mean, sigma = output
        terms = {
            "reconstruction": self.reconstruction(reconstructed.float(), image.float()),
            "kl": kl_divergence(mean, sigma),
        }
        total = terms["reconstruction"] + self.kl_weight * terms["kl"]
        perceptual = self._perceptual[0]
        if perceptual is not None and self.perceptual_weight > 0:
            terms["perceptual"] = perceptual(reconstructed.float(), image.float()).mean()
            total = total + self.perceptual_weight * terms["perceptual"]
        terms["total"] = total
        return terms


class VectorQuantizedLoss(nn.Module):
    """Reconstruction and commitment term of a VQ-GAN (arXiv:2012.09841, equation 4).

    ``total = w * L1 + commitment``. The codes themselves have no term: exponential averages move them. MONAI core has
    the quantiser but no loss that takes the output of a network with one; terms come back by name as those of
    :class:`AutoencoderLoss` do.

    Args:
        reconstruction_weight: ``w``; 4 is published.
        reconstruction: voxel term, mean absolute error by default.
    """

    def __init__(self, *, reconstruction_weight: float = 4.0, reconstruction: nn.Module | None = None) -> None:
        super().__init__()
        self.reconstruction_weight = reconstruction_weight
        self.reconstruction = reconstruction or nn.L1Loss()

    def forward(
        self, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], target: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Compute the terms in float32.

        Args:
            output: of ``VQAutoencoder``: reconstruction ``(B, C, X, Y, Z)``, then scalars: commitment loss with its
                weight (0.25) in it, perplexity of the codes in this batch (1 to their number), share of codes used
                ([0, 1]).
            target: ``(B, C, X, Y, Z)`` in [0, 1].

        Returns:
            Scalars ``reconstruction`` (unweighted), ``commitment`` (as it came), ``total``, and, as figures that are no
            part of it and pass no gradient, ``perplexity`` and ``usage``.
        """
        reconstructed, commitment, perplexity, usage = output
        terms = {
            "reconstruction": self.reconstruction(reconstructed.float(), target.float()),
            "commitment": commitment.float(),
            "perplexity": perplexity.detach().float(),
            "usage": usage.detach().float(),
        }
        terms["total"] = self.reconstruction_weight * terms["reconstruction"] + terms["commitment"]
        return terms


class HingeAdversarialLoss(nn.Module):
    """Hinge loss of a discriminator, summed over its decisions (arXiv:1705.02894).

    Real ``mean(relu(1 - D))``, fake ``mean(relu(1 + D))``, generator ``-mean(D)``; a discriminator that returns several
    decisions, as one of slices and one of volumes, has the sum over them, each with weight 1.

    ``monai.losses.PatchAdversarialLoss(criterion="hinge")`` does not fit: it sends the decisions through ``tanh``
    first, which no published hinge loss does and which keeps them within the margin for ever, gives the generator
    ``mean(relu(1 - D))``, and averages over decisions by default. The call is the same.
    """

    def forward(
        self, decision: torch.Tensor | Sequence[torch.Tensor], target_is_real: bool, for_discriminator: bool
    ) -> torch.Tensor:
        """Compute the loss in float32.

        Args:
            decision: raw scores of any shape, or several of them.
            target_is_real: whether real images were judged; true for the generator, which wants to pass for real.
            for_discriminator: whether the discriminator learns from it, or else the generator.

        Returns:
            Scalar.

        Raises:
            ValueError: for a generator that is to look fake, or no decision at all.
        """
        if not for_discriminator and not target_is_real:
            raise ValueError("target_is_real: expected True where for_discriminator is False, got False; set it.")
        decisions = [decision] if isinstance(decision, torch.Tensor) else list(decision)
        if not decisions:
            raise ValueError("decision: expected a tensor or some of them, got an empty list; check the discriminator.")
        return torch.stack([self._one(scores.float(), target_is_real, for_discriminator) for scores in decisions]).sum()

    @staticmethod
    def _one(scores: torch.Tensor, target_is_real: bool, for_discriminator: bool) -> torch.Tensor:
        if not for_discriminator:
            return -scores.mean()
        return torch.relu(1.0 - scores if target_is_real else 1.0 + scores).mean()


class NoiseAndLatentLoss(nn.Module):
    """Mean absolute error of the noise plus that of the latent estimated from it (arXiv:2406.18361, section 2.3).

    ``L = |n~ - n| + w |z~ - z|`` with ``z~ = (x_t - sqrt(1 - alpha_bar) n~) / sqrt(alpha_bar)``. Both come from one
    pass of the network. Since ``z~ - z = -sqrt((1 - alpha_bar) / alpha_bar) (n~ - n)``, the second term is the first
    times a factor of the timestep alone, which is how it is computed here: exact at all levels, where the difference of
    two estimates would lose digits at the noisiest. Nothing is clamped. With the published schedule the factor is 2.4
    in the median, 6.1 on average and 38.7 at the last timestep, from which inference starts.

    Args:
        scheduler: the noise schedule, of ``epsilon`` prediction.
        latent_weight: ``w``; 0 leaves the usual loss of the noise.
    """

    ratios: torch.Tensor

    def __init__(self, scheduler: Scheduler, *, latent_weight: float = 1.0) -> None:
        super().__init__()
        self.latent_weight = latent_weight
        alpha_bar = scheduler.alphas_cumprod.double()
        self.register_buffer("ratios", torch.sqrt((1.0 - alpha_bar) / alpha_bar).float(), persistent=False)

    def forward(self, predicted: torch.Tensor, target: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Compute the loss in float32.

        Args:
            predicted: noise ``(B, C, h, w)``.
            target: ``noise`` of the same shape and ``timesteps`` ``(B,)``.

        Returns:
            Scalar, averaged over all elements.
        """
        error = (predicted.float() - target["noise"].float()).abs().flatten(1).mean(dim=1)
        self.ratios = self.ratios.to(error.device)  # once: nobody moves a loss
        weights = 1.0 + self.latent_weight * self.ratios[target["timesteps"]]
        return (weights * error).mean()
