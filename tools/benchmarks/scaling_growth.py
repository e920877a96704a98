# SPDX-License-Identifier: Apache-2.0
"""What a pair, an image or a patch costs when there are more of them.

The first way of each workload has the smallest number, and ``factors`` make the times those of one item: a ratio above
1 says that an item of a larger set costs less, and 1 that the cost grows as the number of items does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from monai.inferers.utils import dense_patch_slices
from monai.networks.nets import DiffusionModelUNet
from torch import nn

from shared.metrics.distribution import FeatureStatistics
from shared.metrics.ms_ssim import PairwiseMultiScaleSSIM
from shared.networks.low_resolution_encoder import LowResolutionEncoder
from shared.networks.noddi import NoddiModel
from shared.networks.vq_autoencoder import VQAutoencoder
from shared.noddi_sampler import NoddiSampler
from shared.schedulers import DPMSolverMultistepScheduler
from tools.benchmarks.scaling_chest import chest_unet, context_size, latent_shape, unet_channels
from tools.benchmarks.workload import Builder, Kind, Setting, Workload, equal_within, relative_difference

FLOAT32, FLOAT64 = 1e-5, 1e-12
# Side of a patch and shape of the volume by size, voxels of the features; the last is a subject's brain.
VOLUMES = ((8, (12, 14, 8)), (8, (16, 14, 12)), (32, (68, 86, 68)))


def _same_part(tolerance: float, what: str) -> Callable[[Mapping[str, Any]], str]:
    """An ``equal`` for tensors of which the first entries along each axis belong to the first way's items."""

    def equal(results: Mapping[str, Any]) -> str:
        first = next(iter(results.values()))
        part = tuple(slice(0, side) for side in first.shape)
        return equal_within(tolerance, what)({name: result[part] for name, result in results.items()})

    return equal


def pairs_by_images(setting: Setting) -> Workload:
    """MS-SSIM of all pairs: their number grows with the square of the number of images."""
    counts = setting.pick([3, 6], [8, 16, 32, 64], [8, 16, 32, 64, 128])
    size = setting.pick((52, 48), (256, 256), (512, 512))
    generator = torch.Generator().manual_seed(setting.seed)
    images = torch.rand(counts[-1], 1, *size, generator=generator).to(setting.device)
    similarity = PairwiseMultiScaleSSIM(kernel_size=setting.pick(3, 11, 11))
    names = {f"N = {n}, {n * (n - 1) // 2} pairs": n for n in counts}
    return Workload(
        name="pairwise MS-SSIM, time of a pair by number of images",
        sizes=f"images of {size[0]} x {size[1]}; times are those of one pair",
        ways={name: lambda n=n: similarity(images[:n]).matrix for name, n in names.items()},  # type: ignore[misc]
        equal=_same_part(FLOAT32, "similarities of the same images"),
        factors={name: 2 / (n * (n - 1)) for name, n in names.items()},
    )


def _stream(count: int, features: int, seed: int) -> FeatureStatistics:
    """Statistics of ``count`` random feature vectors, which arrive in batches of 50."""
    generator = torch.Generator().manual_seed(seed)
    statistics = FeatureStatistics(features)
    for start in range(0, count, 50):
        statistics.update(torch.randn(min(50, count - start), features, generator=generator))
    return statistics


def _kept(count: int, features: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of the same vectors, kept until the last has come."""
    generator = torch.Generator().manual_seed(seed)
    kept = [torch.randn(min(50, count - start), features, generator=generator) for start in range(0, count, 50)]
    values = torch.cat(kept).double()
    return values.mean(dim=0), torch.cov(values.T)


def fid_by_images(setting: Setting) -> Workload:
    """Mean and covariance for FID, image by image."""
    counts = setting.pick([60, 100], [100, 200, 500, 1000, 2000], [100, 200, 500, 1000, 2000, 10000])
    features = setting.pick(16, 1024, 1024)

    def equal(results: Mapping[str, Any]) -> str:
        worst = 0.0
        for (name, result), count in zip(results.items(), counts, strict=True):
            mean, covariance = _kept(count, features, setting.seed)
            difference = max(relative_difference(result.mean, mean), relative_difference(result.covariance, covariance))
            if result.n != count or not difference <= FLOAT64:
                raise ValueError(
                    f"{name}: expected moments of {count} kept vectors within {FLOAT64:g}, got {difference:.3g} of "
                    f"{result.n}."
                )
            worst = max(worst, difference)
        return f"mean and covariance equal those of kept features within {worst:.0e}"

    return Workload(
        name="streamed FID statistics, time of an image by number of images",
        sizes=f"{features} random features of an image, batches of 50, float64; times are those of one image",
        ways={f"n = {n}": lambda n=n: _stream(n, features, setting.seed) for n in counts},  # type: ignore[misc]
        equal=equal,
        factors={f"n = {n}": 1 / n for n in counts},
    )


def fid_memory(setting: Setting) -> Workload:
    """Peak memory of mean and covariance: kept features grow with the number of images, streamed ones do not."""
    few, many = setting.pick((60, 200), (1000, 20000), (1000, 100000))
    features = setting.pick(16, 1024, 1024)

    def streamed(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        statistics = _stream(count, features, setting.seed)
        return statistics.mean, statistics.covariance

    last = f"{many} images streamed"

    def equal(results: Mapping[str, Any]) -> str:
        expected = next(iter(results.values()))
        pairs = zip(results[last], expected, strict=True)
        difference = max(relative_difference(result, value) for result, value in pairs)
        if not difference <= FLOAT64:
            raise ValueError(f"{last}: expected kept features' moments within {FLOAT64:g}, got {difference:.3g}.")
        return f"mean and covariance equal within {difference:.0e}"

    return Workload(
        name=f"FID statistics of {many} images",
        sizes=f"{features} features of an image, batches of 50",
        ways={
            f"{many} images kept": lambda: _kept(many, features, setting.seed),
            f"{few} images streamed": lambda: streamed(few),
            last: lambda: streamed(many),
        },
        equal=equal,
        measured="memory",
    )


def _noddi(setting: Setting) -> NoddiModel:
    """The networks of ``dmri2noddi``, joint maps, at reduced width and with random weights."""
    width, groups = setting.pick((8, 4), (8, 4), (64, 32))
    with torch.random.fork_rng():
        torch.manual_seed(setting.seed)
        autoencoder = VQAutoencoder(
            in_channels=3, num_hiddens=width, num_levels=1, num_embeddings=setting.pick(32, 512, 8192), embedding_dim=8,
            norm_num_groups=groups,
        )  # fmt: skip
        encoder = LowResolutionEncoder(
            in_channels=8, num_hiddens=2 * width, embedding_dim=8, kernel_sizes=[3, 5, 9, 13],
            kernel_channels=[width, width // 2, width // 4, width // 4], norm_num_groups=groups,
            head_num_groups=setting.pick(2, 4, 8),
        )  # fmt: skip
        unet = DiffusionModelUNet(
            spatial_dims=3, in_channels=16, out_channels=8, num_res_blocks=setting.pick(1, 2, 2),
            channels=[2 * width, 4 * width, 4 * width, 8 * width][: setting.pick(2, 4, 4)],
            attention_levels=[False, True, True, True][: setting.pick(2, 4, 4)],
            num_head_channels=[0, width, width, width][: setting.pick(2, 4, 4)],
            norm_num_groups=groups, use_flash_attention=True,
        )  # fmt: skip
        for parameter in unet.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        # Continuous latents: a code that rounding changes would be far away.
        model = NoddiModel(autoencoder, encoder, unet, quantize=False)
    return model.eval().to(setting.device)


def _patches(setting: Setting, ways: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Callable[[], Any]], str]:
    """Ways that sample one volume with options of the sampler, and the sizes in words."""
    model = _noddi(setting)
    side, shape = setting.pick(*VOLUMES)
    steps = setting.pick(2, 2, 50)
    generator = torch.Generator().manual_seed(setting.seed)
    features = torch.rand(1, 8, *shape, generator=generator).to(setting.device)
    schedule: dict[str, Any] = {
        "num_train_timesteps": 1000, "schedule": "scaled_linear_beta", "beta_start": 0.0001, "beta_end": 0.02,
        "prediction_type": "epsilon", "spacing": "karras",
    }  # fmt: skip

    def sample(options: Mapping[str, Any]) -> torch.Tensor:
        scheduler = DPMSolverMultistepScheduler(**schedule)
        sampler = NoddiSampler(scheduler=scheduler, patch_size=side, num_inference_steps=steps, **options)
        return sampler(features, model)[0]

    width = setting.pick("tiny", "an eighth of the published width, a quarter of the patch", "published width")
    sizes = f"{shape[0]} x {shape[1]} x {shape[2]} voxels of features, patches of {side}, {steps} steps; {width}"
    return {name: lambda options=options: sample(options) for name, options in ways.items()}, sizes  # type: ignore[misc]


def patches_by_batch(setting: Setting) -> Workload:
    """A volume with more patches in a forward pass."""
    counts = setting.pick([1, 2, 4], [1, 2, 4, 8], [1, 2, 4, 8])
    ways, sizes = _patches(setting, {f"{n} a pass": {"patches_per_batch": n, "overlap": 0.0} for n in counts})
    return Workload(
        name="NODDI maps of a volume by patches in a forward pass",
        sizes=sizes,
        ways=ways,
        equal=equal_within(1e-4, "maps"),
        repeats=3,
    )


def patches_by_volume(setting: Setting) -> Workload:
    """A volume cut into more patches: overlap raises their number."""
    overlaps = [0.0, 0.25, 0.4375]
    side, shape = setting.pick(*VOLUMES)
    intervals = [max(1, int(side * (1 - overlap))) for overlap in overlaps]
    counts = [len(dense_patch_slices(shape, (side,) * 3, (interval,) * 3)) for interval in intervals]
    names = [f"overlap {overlap:g}, {n} patches" for overlap, n in zip(overlaps, counts, strict=True)]
    ways, sizes = _patches(setting, {name: {"overlap": o} for name, o in zip(names, overlaps, strict=True)})

    def equal(results: Mapping[str, Any]) -> str:
        shapes = {tuple(result.shape) for result in results.values()}
        if len(shapes) > 1 or not all(result.isfinite().all() for result in results.values()):
            raise ValueError(f"{names[-1]}: expected finite maps of one size, got {sorted(shapes)}.")
        return "maps of one size; patches that overlap are blended, so the values differ by design"

    return Workload(
        name="NODDI maps of a volume, time of a patch by number of patches",
        sizes=f"{sizes}; times are those of one patch",
        ways=ways,
        equal=equal,
        factors={name: 1 / n for name, n in zip(names, counts, strict=True)},
        repeats=3,
    )


def steps_by_batch(setting: Setting) -> Workload:
    """A denoising step of the chest U-Net with more images in it."""
    counts = setting.pick([1, 3], [1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
    shape = latent_shape(setting)
    with torch.random.fork_rng():
        torch.manual_seed(setting.seed)
        unet = chest_unet(setting).eval().to(setting.device)
        x = torch.randn(counts[-1], *shape).to(setting.device)
        context = torch.randn(counts[-1], 77, context_size(setting)).to(setting.device)
    timesteps = torch.full((counts[-1],), 500, device=setting.device)

    @torch.no_grad()
    def step(count: int) -> torch.Tensor:
        return unet(x[:count], timesteps[:count], context=context[:count])

    return Workload(
        name="denoising step of the chest U-Net, time of an image by batch size",
        sizes=f"channels {unet_channels(setting)}, latents {shape}; times are those of one image",
        ways={f"batch {n}": lambda n=n: step(n) for n in counts},  # type: ignore[misc]
        equal=_same_part(1e-4, "predictions for the same image"),
        factors={f"batch {n}": 1 / n for n in counts},
    )


BUILDERS: Mapping[Kind, tuple[Builder, ...]] = {
    Kind.SCALING: (pairs_by_images, fid_by_images, patches_by_volume, patches_by_batch, steps_by_batch),
    Kind.MEMORY: (fid_memory,),
}
