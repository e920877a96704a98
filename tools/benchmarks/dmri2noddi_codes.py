# SPDX-License-Identifier: Apache-2.0
"""The codebook's search and statistics, and the errors of maps, beside MONAI core's and the published ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from monai.networks.layers.vector_quantizer import EMAQuantizer
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from shared.metrics.noddi_maps import FLATTENED, flattened_scores
from shared.networks.codebook import nearest_code
from tools.benchmarks.workload import Setting, Workload, equal_within

DIM = 8


def _vectors(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of one latent ``(M, 8)`` and codes ``(K, 8)``; 32^3 and 8192 as published."""
    side, count = setting.pick(6, 32, 32), setting.pick(100, 8192, 8192)
    generator = torch.Generator().manual_seed(setting.seed)
    vectors = torch.randn(side**3, DIM, generator=generator)
    codes = torch.randn(count, DIM, generator=generator)
    return vectors.to(setting.device), codes.to(setting.device)


def nearest_codes(setting: Setting) -> Workload:
    """Index of the nearest code of every vector of a latent."""
    vectors, codes = _vectors(setting)
    core: Any = EMAQuantizer(3, *codes.shape).to(setting.device)
    core.embedding.weight.data.copy_(codes)
    latent = vectors.t().reshape(1, -1, len(vectors), 1, 1).contiguous()

    def equal(results: Mapping[str, torch.Tensor]) -> str:
        first = next(iter(results.values()))
        worst = 0.0
        for name, index in results.items():
            share = (index != first).float().mean().item()
            # Single precision may order two codes of almost equal distance either way.
            if index.shape != first.shape or share > 1e-3:
                raise ValueError(f"{name}: expected the codes of the other ways, got {share:.2%} others.")
            worst = max(worst, share)
        return f"the same codes, {worst:.3%} aside, whose two nearest are equally near in single precision"

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "MONAI's EMAQuantizer": torch.no_grad()(lambda: core.quantize(latent)[2].flatten()),
        "torch.cdist and argmin": lambda: torch.cdist(vectors, codes).argmin(dim=1),
        "dmri2noddi": partial(nearest_code, vectors, codes),
    }
    sizes = f"{len(codes)} codes of {DIM} numbers, {len(vectors)} vectors"
    return Workload(name="nearest codes of a latent", sizes=sizes, ways=ways, equal=equal, target=10.0)


def codebook_statistics(setting: Setting) -> Workload:
    """How many vectors chose each code, and their sums, from which the codes' averages move."""
    vectors, codes = _vectors(setting)
    indices, count = nearest_code(vectors, codes), len(codes)
    repetitions = setting.pick(1, 20, 20)

    # MONAI's search has built it already.
    encodings = nn.functional.one_hot(indices, count).to(vectors.dtype)

    def one_hot() -> torch.Tensor:
        return torch.cat((encodings.sum(0)[:, None], encodings.t() @ vectors), dim=1)

    def counted() -> torch.Tensor:
        for _ in range(repetitions):
            counts = torch.bincount(indices, minlength=count).to(vectors.dtype)
            sums = torch.zeros(count, DIM, device=vectors.device).index_add_(0, indices, vectors)
        return torch.cat((counts[:, None], sums), dim=1)

    bundle = "dmri2noddi: bincount and index_add"
    return Workload(
        name="statistics of the codebook",
        sizes=f"{count} codes of {DIM} numbers, {len(vectors)} vectors; the bundle's way timed {repetitions} times",
        ways={"sum of the one-hot matrix and product, MONAI's EMAQuantizer": one_hot, bundle: counted},
        equal=equal_within(1e-5, "counts and sums"),
        factors={bundle: 1.0 / repetitions},
    )


def map_errors(setting: Setting) -> Workload:
    """PSNR and SSIM of a volume as published: of all maps together, along the voxels' order in memory."""
    shape = setting.pick((12, 10, 14), (136, 172, 136), (136, 172, 136))
    generator = torch.Generator().manual_seed(setting.seed)
    true = torch.rand(3, *shape, generator=generator)
    pred = (true + 0.1 * torch.randn(true.shape, generator=generator)).clamp(0.0, 1.0)

    def published() -> torch.Tensor:
        one, two = (part.movedim(0, -1).reshape(-1, 3).double().numpy() for part in (pred, true))
        span = float(two.max() - two.min())
        ssim = structural_similarity(one, two, channel_axis=1, data_range=span)
        return torch.tensor([peak_signal_noise_ratio(two, one, data_range=span), ssim])

    def bundle() -> torch.Tensor:
        scores = flattened_scores(pred, true)
        return torch.tensor([scores[name] for name in FLATTENED])

    return Workload(
        name="errors of maps, as published",
        sizes=f"three maps of {' x '.join(map(str, shape))} voxels",
        ways={"scikit-image": published, "dmri2noddi": bundle},
        equal=equal_within(1e-6, "PSNR and SSIM"),
    )
