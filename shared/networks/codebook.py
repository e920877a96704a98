# SPDX-License-Identifier: Apache-2.0
"""Vector quantisation with many codes: exact search in little memory, and a codebook in which no code stays unused."""

from __future__ import annotations

import torch
from monai.networks.layers.vector_quantizer import EMAQuantizer
from torch import nn

from shared.distributed import is_distributed

# Vectors searched at once. On a CPU the scores of a block (1 MB) then stay in its cache; a GPU, whose time goes into
# starting many small operations, takes as many as fill it (64 MB).
CPU_BLOCK, GPU_BLOCK = 1024, 65536


@torch.no_grad()
def nearest_code(vectors: torch.Tensor, codes: torch.Tensor, *, chunk: int = 256) -> torch.Tensor:
    """Index of the code nearest to each vector, by squared Euclidean distance; the lowest of equally near ones.

    Neither ``torch.cdist`` with ``argmin`` nor ``EMAQuantizer.quantize`` fits: both write the whole M x K matrix
    (1 GB for one 32^3 latent and 8192 codes), and waiting for memory is most of their time. Here scores of ``chunk``
    codes are compared with the best so far and forgotten. ``python -m tools.benchmark dmri2noddi --what metric``
    measures the ratio.

    Always in float32, also under autocast: bfloat16 holds 3 digits and takes neighbours for equal. Both sides are
    centred on the codes' mean first, which keeps the digits that distinguish codes far from the origin.

    Args:
        vectors: ``(M, D)``, any floating-point type.
        codes: ``(K, D)``, on the same device.
        chunk: number of codes compared at once.

    Returns:
        int64 ``(M,)`` in [0, K). A vector that is not finite gets index 0.

    Raises:
        ValueError: when the shapes do not fit, or ``chunk`` is less than 1.
    """
    if vectors.ndim != 2 or codes.ndim != 2 or vectors.shape[1] != codes.shape[1] or len(codes) == 0:
        raise ValueError(
            f"codes: expected (K >= 1, D) beside vectors (M, D), got {tuple(codes.shape)} beside "
            f"{tuple(vectors.shape)}; flatten the latent with its channels last."
        )
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1 code, got {chunk}; leave it out for the measured 256.")
    with torch.autocast(vectors.device.type, enabled=False):
        centre = codes.float().mean(dim=0)
        codes = codes.float() - centre
        # |v - c|^2 / 2 without |v|^2 / 2, which is the same for all codes.
        offsets = codes.square().sum(dim=1) / 2.0
        blocks = vectors.split(CPU_BLOCK if vectors.device.type == "cpu" else GPU_BLOCK)
        return torch.cat([_search(block.float() - centre, codes.t(), offsets, chunk) for block in blocks])


def _search(vectors: torch.Tensor, columns: torch.Tensor, offsets: torch.Tensor, chunk: int) -> torch.Tensor:
    best = vectors.new_full((len(vectors),), float("inf"))
    index = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
    for start in range(0, len(offsets), chunk):
        part = slice(start, start + chunk)
        score, column = torch.addmm(offsets[part], vectors, columns[:, part], alpha=-1.0).min(dim=1)
        closer = score < best
        best = torch.where(closer, score, best)
        index = torch.where(closer, column + start, index)
    return index


class Codebook(EMAQuantizer):
    """``EMAQuantizer`` of MONAI core for thousands of codes: starts from the data and revives codes out of use.

    Core's does not fit 8192 codes: it builds the distances and a one-hot matrix of all vectors and codes, keeps codes
    that are never chosen, starts from noise, switches off autocast on GPUs alone, and holds the codes in a parameter,
    which an average of trained weights copies once and which a later ``requires_grad_(True)`` would train. The search
    is exact, the update is core's, and so are the names in the state dict; ``quantize`` is core's too, for comparison.

    In training mode each ``forward`` (Jukebox, arXiv:2005.00341, section 3.1; decay as in arXiv:1711.00937, appendix):

    1. takes the codes from the batch, when they have never been trained (``ema_cluster_size`` is zero): a random choice
       of its vectors; fewer vectors than codes are repeated with noise of standard deviation 0.01 / sqrt(D);
    2. quantises with the codes as they are;
    3. moves them: ``N <- decay N + (1 - decay) count``, ``w <- decay w + (1 - decay) sum``, code = w / smoothed N;
    4. replaces codes with ``N < restart_threshold`` by random vectors of the batch, whose count and sum start anew.

    In several processes the counts and sums are those of all, and drawn vectors come from rank 0, so all ranks hold
    equal codes. Vectors are drawn by torch's generator of their device, the same number in every step. A batch with a
    value that is not finite changes nothing, so that the step can be skipped. Evaluation mode never changes anything.

    Args:
        num_embeddings: number of codes K.
        embedding_dim: length of a code D, the channels of the latent.
        spatial_dims: 2 or 3.
        commitment_cost: weight of the mean squared distance between latent and codes.
        decay: of the averages.
        epsilon: Laplace smoothing of the counts (published 1e-7).
        restart_threshold: average number of vectors for each step below which a code is replaced; ``None`` keeps all.
        ddp_sync: false lets each process have a codebook of its own.
    """

    embedding: nn.Embedding

    def __init__(
        self,
        *,
        num_embeddings: int = 8192,
        embedding_dim: int = 8,
        spatial_dims: int = 3,
        commitment_cost: float = 0.25,
        decay: float = 0.99,
        epsilon: float = 1e-7,
        restart_threshold: float | None = 1.0,
        ddp_sync: bool = True,
    ) -> None:
        super().__init__(
            spatial_dims=spatial_dims,
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            commitment_cost=commitment_cost,
            decay=decay,
            epsilon=epsilon,
            ddp_sync=ddp_sync,
        )
        codes = self.embedding.weight.detach()
        del self.embedding.weight
        self.embedding.register_buffer("weight", codes)
        self.restart_threshold = restart_threshold
        # A new code counts as used as often as it must be to stay.
        self._first_count = max(1.0, restart_threshold or 0.0)
        self.perplexity = torch.zeros(())
        self.usage = torch.zeros(())

    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Latents ``(B, D, *s)`` to int64 indices ``(B, *s)`` of their nearest codes; changes nothing."""
        return nearest_code(self._vectors(z), self.embedding.weight).view(len(z), *z.shape[2:])

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantise, and in training mode update the codes.

        Leaves ``perplexity``, exp of the entropy of the codes' frequencies (1 to K), and ``usage``, the share of codes
        chosen (0 to 1), as tensors ``()``: of this batch, in training those of all processes.

        Args:
            inputs: latents ``(B, D, *s)``; computed in float32.

        Returns:
            Codes in the place of the latents ``(B, D, *s)``, float32, whose gradient is that of the latents (straight
            through); commitment loss ``()``, ``commitment_cost`` times the mean squared distance; indices ``(B, *s)``.
        """
        with torch.autocast(inputs.device.type, enabled=False):
            inputs = inputs.float()
            vectors = self._vectors(inputs)
            if self.training:
                self._start(vectors)
            indices = self.nearest(inputs)
            quantized = self.embed(indices)
            self._update(vectors, indices.flatten())
            loss = self.commitment_cost * nn.functional.mse_loss(quantized, inputs)
            return inputs + (quantized - inputs).detach(), loss, indices

    @torch.no_grad()
    def _vectors(self, z: torch.Tensor) -> torch.Tensor:
        if z.ndim != self.spatial_dims + 2 or z.shape[1] != self.embedding_dim:
            raise ValueError(
                f"embedding_dim: expected latents (B, {self.embedding_dim}) with {self.spatial_dims} spatial axes, got "
                f"{tuple(z.shape)}; the encoder's last convolution must have as many channels as a code."
            )
        return z.movedim(1, -1).reshape(-1, self.embedding_dim).float()

    @torch.no_grad()
    def _start(self, vectors: torch.Tensor) -> None:
        if bool(self.ema_cluster_size.any()):
            return
        codes = self._draw(vectors)
        if bool(torch.isfinite(codes).all()):
            self.embedding.weight.copy_(codes)
            self.ema_w.copy_(codes * self._first_count)
            self.ema_cluster_size.fill_(self._first_count)

    def _draw(self, vectors: torch.Tensor) -> torch.Tensor:
        """K random vectors of the batch ``(M, D)``, equal on all ranks."""
        missing = self.num_embeddings - len(vectors)
        if missing > 0:
            tiled = vectors.repeat(-(-self.num_embeddings // len(vectors)), 1)
            vectors = tiled + torch.randn_like(tiled) * (0.01 / self.embedding_dim**0.5)
        drawn = vectors[torch.randperm(len(vectors), device=vectors.device)[: self.num_embeddings]]
        if self.ddp_sync and is_distributed():
            torch.distributed.broadcast(drawn, src=0)
        return drawn

    @torch.no_grad()
    def _update(self, vectors: torch.Tensor, indices: torch.Tensor) -> None:
        counts = torch.bincount(indices, minlength=self.num_embeddings).to(vectors.dtype)
        if self.training:
            sums = torch.zeros_like(self.ema_w).index_add_(0, indices, vectors)
            self.distributed_synchronization(counts, sums)
            self._move(counts, sums, vectors)
        share = counts / counts.sum()
        self.perplexity = torch.exp(-torch.xlogy(share, share).sum())
        self.usage = (counts > 0).float().mean()

    def _move(self, counts: torch.Tensor, sums: torch.Tensor, vectors: torch.Tensor) -> None:
        size = self.ema_cluster_size * self.decay + counts * (1.0 - self.decay)
        total = self.ema_w * self.decay + sums * (1.0 - self.decay)
        weights = (size + self.epsilon) / (size.sum() + self.num_embeddings * self.epsilon) * size.sum()
        codes = total / weights.unsqueeze(1)
        if self.restart_threshold is not None:
            drawn = self._draw(vectors)
            unused = size < self.restart_threshold
            size = torch.where(unused, self._first_count, size)
            total = torch.where(unused.unsqueeze(1), drawn * self._first_count, total)
            codes = torch.where(unused.unsqueeze(1), drawn, codes)
        # A value on the device, no branch: asking for it would make a GPU wait in every step.
        valid = torch.isfinite(total).all()
        for old, new in ((self.ema_cluster_size, size), (self.ema_w, total), (self.embedding.weight, codes)):
            old.copy_(torch.where(valid, new, old))
