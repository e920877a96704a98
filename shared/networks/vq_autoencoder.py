# SPDX-License-Identifier: Apache-2.0
"""Three-dimensional VQ-GAN autoencoder of NODDI maps (handbook, spec/dmri2noddi.md, section 4.2)."""

from __future__ import annotations

import torch
from monai.networks.blocks import Convolution
from torch import nn

from shared.networks.codebook import Codebook


def replicate_padding(kernel_size: int, stride: int) -> nn.ReplicationPad3d:
    """Repeats the border so that a convolution divides sides by ``stride`` exactly: ``kernel_size - stride`` voxels for
    each axis, one more in front than behind when that is odd."""
    total = kernel_size - stride
    return nn.ReplicationPad3d((total - total // 2, total // 2) * 3)


def same_convolution(in_channels: int, out_channels: int, *, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution ``(B, in, X, Y, Z) -> (B, out, X / stride, ...)`` whose border repeats the outermost voxels.

    ``monai.networks.blocks.Convolution`` alone does not fit: it pads with zeros, equally on both sides.
    """
    return nn.Sequential(
        replicate_padding(kernel_size, stride),
        _convolution(in_channels, out_channels, kernel_size=kernel_size, strides=stride, padding=0),
    )


def _convolution(in_channels: int, out_channels: int, **options: object) -> Convolution:
    return Convolution(3, in_channels, out_channels, conv_only=True, **options)  # type: ignore[arg-type]


def _doubling(in_channels: int, out_channels: int) -> nn.Sequential:
    """Transposed convolution of kernel 4 and stride 2 that doubles the sides."""
    kernel, stride = 4, 2
    options = {"kernel_size": kernel, "strides": stride, "padding": kernel - 1, "output_padding": 0}
    return nn.Sequential(
        replicate_padding(kernel, stride), _convolution(in_channels, out_channels, is_transposed=True, **options)
    )


def normalised(channels: int, norm_num_groups: int) -> nn.Sequential:
    """Group normalisation (epsilon 1e-6) and SiLU.

    Raises:
        ValueError: when the channels cannot be divided into the groups.
    """
    if channels % norm_num_groups:
        raise ValueError(
            f"norm_num_groups: expected a divisor of the {channels} channels, got {norm_num_groups}; change it or "
            "num_hiddens."
        )
    return nn.Sequential(nn.GroupNorm(norm_num_groups, channels, eps=1e-6), nn.SiLU())


class VQResidualBlock(nn.Module):
    """``x + conv(silu(norm(conv(silu(norm(x))))))``, all of ``channels`` channels and kernel 3.

    Core's ``ResidualUnit`` convolves before it normalises; ``VQVAEResidualUnit`` has no normalisation.
    """

    def __init__(self, channels: int, norm_num_groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            normalised(channels, norm_num_groups),
            same_convolution(channels, channels),
            normalised(channels, norm_num_groups),
            same_convolution(channels, channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, X, Y, Z)`` to the same shape."""
        return x + self.block(x)


class VQEncoder(nn.Module):
    """A convolution; for each level one that halves the sides and doubles the channels, and a residual block.

    Args:
        in_channels: of the volume.
        num_hiddens: channels after the first convolution.
        num_levels: how often the sides are halved.
        norm_num_groups: groups of the normalisation.
    """

    def __init__(
        self, *, in_channels: int, num_hiddens: int = 64, num_levels: int = 1, norm_num_groups: int = 32
    ) -> None:
        super().__init__()
        self.factor = 2**num_levels
        self.out_channels = num_hiddens * self.factor
        self.conv_in = same_convolution(in_channels, num_hiddens)
        self.levels = nn.Sequential()
        for level in range(num_levels):
            channels = num_hiddens * 2**level
            self.levels.append(same_convolution(channels, 2 * channels, kernel_size=4, stride=2))
            self.levels.append(VQResidualBlock(2 * channels, norm_num_groups))
        self.norm_out = normalised(self.out_channels, norm_num_groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, X, Y, Z)`` to ``(B, num_hiddens * 2**num_levels, X / 2**num_levels, ...)``.

        Raises:
            ValueError: for a side that is no multiple of ``2**num_levels``; MONAI's ``VQVAE`` would change it silently.
        """
        if any(side < self.factor or side % self.factor for side in x.shape[2:]):
            raise ValueError(
                f"patch_size: expected sides that are multiples of {self.factor}, which the encoder divides by, got "
                f"{tuple(x.shape[2:])}; change the patch size or pad the volume."
            )
        return self.norm_out(self.levels(self.conv_in(x)))


class VQDecoder(nn.Module):
    """For each level a transposed convolution that doubles the sides and two residual blocks; then a convolution.

    The channels are ``num_hiddens * 2**num_levels`` in the first level and halve with each further one, so that the
    width at the end is ``2 * num_hiddens``. There is no output activation.

    Args:
        out_channels: of the volume.
        num_hiddens: as in the encoder.
        num_levels: how often the sides are doubled.
        norm_num_groups: groups of the normalisation.
    """

    def __init__(
        self, *, out_channels: int, num_hiddens: int = 64, num_levels: int = 1, norm_num_groups: int = 32
    ) -> None:
        super().__init__()
        channels = num_hiddens * 2**num_levels
        self.norm_in = normalised(channels, norm_num_groups)
        self.levels = nn.Sequential()
        for level in range(num_levels):
            width = num_hiddens * 2 ** (num_levels - level)
            self.levels.append(_doubling(channels, width))
            self.levels.append(VQResidualBlock(width, norm_num_groups))
            self.levels.append(VQResidualBlock(width, norm_num_groups))
            channels = width
        self.conv_out = same_convolution(channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, num_hiddens * 2**num_levels, x, y, z)`` to ``(B, out_channels, x * 2**num_levels, ...)``."""
        return self.conv_out(self.levels(self.norm_in(x)))


class VQAutoencoder(nn.Module):
    """Autoencoder with a codebook (VQ-GAN, arXiv:2012.09841, in three dimensions).

    ``monai.networks.nets.VQVAE`` does not fit: no normalisation, zero padding, another order of layers, no restart of
    unused codes, and sides that cannot be halved come back changed. The published size has one level, so a patch of
    64^3 becomes a latent ``(8, 32, 32, 32)``.

    Args:
        in_channels: maps of a volume, in and out.
        num_hiddens: width; the latent's layers have ``num_hiddens * 2**num_levels`` channels.
        num_levels: how often the sides are halved.
        num_embeddings: number of codes.
        embedding_dim: channels of the latent.
        norm_num_groups: groups of the normalisations.
        restart_threshold: see ``Codebook``; ``None`` keeps unused codes.
        commitment_cost: see ``Codebook``.
        decay: see ``Codebook``.
        epsilon: see ``Codebook``.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        num_hiddens: int = 64,
        num_levels: int = 1,
        num_embeddings: int = 8192,
        embedding_dim: int = 8,
        norm_num_groups: int = 32,
        restart_threshold: float | None = 1.0,
        commitment_cost: float = 0.25,
        decay: float = 0.99,
        epsilon: float = 1e-7,
    ) -> None:
        super().__init__()
        sizes = {"num_hiddens": num_hiddens, "num_levels": num_levels, "norm_num_groups": norm_num_groups}
        self.encoder = VQEncoder(in_channels=in_channels, **sizes)
        self.decoder = VQDecoder(out_channels=in_channels, **sizes)
        width = self.encoder.out_channels
        self.pre_quantization = _convolution(width, embedding_dim, kernel_size=1, padding=0)
        self.post_quantization = _convolution(embedding_dim, width, kernel_size=1, padding=0)
        self.codebook = Codebook(
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            commitment_cost=commitment_cost,
            decay=decay,
            epsilon=epsilon,
            restart_threshold=restart_threshold,
        )

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last convolution, on which the adaptive adversarial weight is measured."""
        return self.decoder.conv_out.get_parameter("1.conv.weight")

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``(B, C, X, Y, Z)``, fractions in [0, 1], to latents ``(B, D, X / 2**num_levels, ...)`` before
        quantisation.

        Raises:
            ValueError: for a side that is no multiple of ``2**num_levels``.
        """
        return self.pre_quantization(self.encoder(x))

    def decode(self, z: torch.Tensor, *, quantize: bool = True) -> torch.Tensor:
        """Latents ``(B, D, x, y, z)`` to maps ``(B, C, x * 2**num_levels, ...)``; nominal range [0, 1], not clamped.

        The codebook stays as it is in every mode. Through the quantisation no gradient reaches ``z``.

        Args:
            z: latents, as from ``encode``.
            quantize: replace the latents by their nearest codes first.
        """
        if quantize:
            z = self.codebook.embed(self.codebook.nearest(z))
        return self.decoder(self.post_quantization(z))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reconstruct, and in training mode update the codebook once.

        Args:
            x: maps ``(B, C, X, Y, Z)``, fractions in [0, 1].

        Returns:
            Reconstruction ``(B, C, X, Y, Z)``, commitment loss ``()``, perplexity ``()`` in [1, K] and share of codes
            chosen ``()`` in [0, 1], the last two without gradient.

        Raises:
            ValueError: for a side that is no multiple of ``2**num_levels``.
        """
        quantized, commitment, _ = self.codebook(self.encode(x))
        reconstruction = self.decode(quantized, quantize=False)
        return reconstruction, commitment, self.codebook.perplexity, self.codebook.usage
