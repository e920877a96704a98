# SPDX-License-Identifier: Apache-2.0
"""What each bundle samples when solvers are compared: demo weights, phantoms they never saw, its own metric."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser

from shared.controlnet_sampler import ControlNetSampler
from shared.datalist import load_datalist
from shared.inferers import GuidedLatentSampler
from shared.metrics.ms_ssim import PairwiseMultiScaleSSIM
from shared.metrics.noddi_maps import MAPS
from shared.metrics.translation import errors_within, slice_scores
from shared.noddi_sampler import NoddiSampler
from shared.pictures import spread_indices
from shared.schedulers import DDIMScheduler, DeterministicScheduler, DPMSolverMultistepScheduler, TimestepSpacing
from shared.transforms.diffusion_mri import LoadNoddiMapsd
from shared.weights import load_weights
from tools.phantoms import brain_controlnet, cxr_ldm, dmri2noddi

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"
# Demo weights were trained on phantoms of the seeds 0 and 7, and guidance chosen on 101.
_PHANTOM_SEED = 1000
_TEST_ONLY = (0.0, 0.0, 1.0)
_SLICES = 2  # of a head; more of one head say little that is new


@dataclass(frozen=True)
class Metric:
    """What a bundle is measured by.

    Attributes:
        label: with its unit, as a column of the table.
        is_share: its values are 0 or 1.
        negligible: a difference of means below this is none for the choice of steps.
    """

    label: str
    is_share: bool = False
    negligible: float = 0.0


@dataclass(frozen=True)
class Sampled:
    """Latents and images of one run, samples first, and how often the network was evaluated for each."""

    latents: torch.Tensor
    images: torch.Tensor
    evaluations: int


class Recording(DeterministicScheduler):
    """Keeps the latents that a plan ends with, and counts steps: samplers return images alone."""

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.evaluations = 0

    def begin(self) -> None:
        """Forget the latents of an earlier run."""
        self.finished: list[torch.Tensor] = []

    def step(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the scheduler that records."""
        result = super().step(model_output, timestep, sample)  # type: ignore[misc]
        self.evaluations += 1
        if self._position == len(self._plan):
            self.finished.append(result[0])
        return result


class RecordingDDIM(Recording, DDIMScheduler):
    """DDIM that records."""


class RecordingDPM(Recording, DPMSolverMultistepScheduler):
    """DPM-Solver++ 2M that records."""


SOLVERS: dict[str, tuple[type[Recording], TimestepSpacing]] = {
    "dpm-karras": (RecordingDPM, TimestepSpacing.KARRAS),
    "dpm-trailing": (RecordingDPM, TimestepSpacing.TRAILING),
    "ddim-trailing": (RecordingDDIM, TimestepSpacing.TRAILING),
}
REFERENCE_SOLVER = "ddim-trailing"


class Task(ABC):
    """A bundle with its demo weights, as ``configs/inference.json`` and ``configs/tiny.json`` say, and its data.

    Attributes:
        option: the sampler's option of which several values are compared, those of ``values`` unless others are asked
            for.
        published_steps: of the published sampler, DDIM.
        metrics: by key.
        weights: file of the weights.
    """

    option: str
    values: tuple[float, ...]
    published_steps: int
    metrics: Mapping[str, Metric]

    def __init__(self, name: str) -> None:
        root = BUNDLES / name
        files = [str(root / "configs" / f"{part}.json") for part in ("inference", "tiny")]
        self.config = ConfigParser(ConfigParser.load_config_files(files))
        self.config["bundle_root"], self.config["device"] = str(root), "cpu"
        self.weights = root / "models/tiny/model.pt"
        self.network = load_weights(self.get("network_def"), self.weights).eval()
        self.schedule: dict[str, Any] = self.get("noise_schedule")

    def get(self, name: str) -> Any:
        """An id of the configuration, instantiated."""
        return self.config.get_parsed_content(name)

    def scheduler(self, solver: str) -> Recording:
        """A solver of ``SOLVERS`` on the bundle's noise schedule."""
        kind, spacing = SOLVERS[solver]
        return kind(**self.schedule, spacing=spacing)

    @abstractmethod
    def sample(self, scheduler: Recording, steps: int, value: float) -> Sampled:
        """Sample with ``option`` at ``value``; each call starts from the same noise."""

    @abstractmethod
    def measure(self, images: torch.Tensor) -> dict[str, list[float]]:
        """Each metric for each unit that is independent of the others: image, subject or volume."""

    @abstractmethod
    def pictures(self, images: torch.Tensor) -> torch.Tensor:
        """Some samples as ``(N, 1, H, W)`` to look at."""

    def _run(self, sampler: Any, scheduler: Recording, inputs: torch.Tensor, seeds: Sequence[int]) -> Sampled:
        scheduler.begin()
        images = sampler(inputs, self.network, seeds=seeds)
        return Sampled(torch.cat(scheduler.finished), images, scheduler.evaluations)


class ChestImages(Task):
    """Images from the canonical sentences of phantom findings; guided, and by the prompt alone.

    Measured by the classifier of findings that ships with the demo weights: does it see what the prompt asked for, and
    the probability that it gives to it.
    """

    option, values, published_steps = "guidance_scale", (4.0, 1.0), 200
    metrics = {
        "agreement": Metric("prompt agreement", is_share=True),
        "probability": Metric("probability of the prompted finding", negligible=0.005),
    }

    def __init__(self, *, count: int, seed: int) -> None:
        super().__init__("cxr_ldm")
        with tempfile.TemporaryDirectory() as folder:
            # Of the smallest size: the texts count, the pictures are not looked at.
            cxr_ldm.make_dataset(folder, count, 32, seed=_PHANTOM_SEED + seed, split=_TEST_ONLY, text="prompt")
            items = load_datalist(folder, "test", required="text")
        tokenizer = self.get("tokenizer")
        self.tokens = torch.stack([tokenizer([item["text"], ""]) for item in items])
        self.seeds = range(seed, seed + count)
        agreement = self.get("prompt_agreement")
        names = list(agreement.agreement.class_names)
        self.classifier = agreement.classifier
        self.wanted = torch.tensor([names.index(item["labels"]["finding"]) for item in items])

    def sample(self, scheduler: Recording, steps: int, value: float) -> Sampled:
        sampler = GuidedLatentSampler(
            scheduler=scheduler,
            num_inference_steps=steps,
            guidance_scale=value,
            latent_shape=self.get("latent_shape"),
        )
        return self._run(sampler, scheduler, self.tokens, self.seeds)

    def measure(self, images: torch.Tensor) -> dict[str, list[float]]:
        found = self.classifier.classify(images)
        return {
            "agreement": (found.argmax(dim=1) == self.wanted).double().tolist(),
            "probability": found.double().gather(1, self.wanted[:, None])[:, 0].tolist(),
        }

    def pictures(self, images: torch.Tensor) -> torch.Tensor:
        return images[:7]


class BrainSlices(Task):
    """T1w slices from FLAIR slices of phantom heads, without guidance; PSNR and MS-SSIM to the true T1w by subject."""

    option, values, published_steps = "guidance_scale", (1.0,), 200
    metrics = {"psnr": Metric("PSNR (dB)", negligible=0.05), "ms_ssim": Metric("MS-SSIM", negligible=0.001)}

    def __init__(self, *, count: int, seed: int) -> None:
        super().__init__("brain_controlnet")
        load = self.get("preprocessing")
        with tempfile.TemporaryDirectory() as folder:
            brain_controlnet.make_dataset(folder, count, seed=_PHANTOM_SEED + seed, split=_TEST_ONLY)
            items = load_datalist(folder, "test")
            volumes = {
                key: torch.stack([load({"image": item[key]})["image"].as_tensor() for item in items])
                for key in ("flair", "t1w")
            }
        chosen = spread_indices(volumes["t1w"].shape[-1], _SLICES)
        self.condition, self.target = (volumes[key][..., chosen].float() for key in ("flair", "t1w"))
        self.seeds = range(seed, seed + count)
        # Side of the window as in configs/evaluate.json with configs/tiny.json.
        self.ssim = PairwiseMultiScaleSSIM(kernel_size=self.get("ms_ssim_kernel_size"))

    def sample(self, scheduler: Recording, steps: int, value: float) -> Sampled:
        sampler = ControlNetSampler(
            scheduler=scheduler,
            num_inference_steps=steps,
            guidance_scale=value,
            latent_shape=self.get("latent_shape"),
            image_size=self.get("image_size"),
        )
        return self._run(sampler, scheduler, self.condition, self.seeds)

    def measure(self, images: torch.Tensor) -> dict[str, list[float]]:
        drawn, true = (volumes.movedim(-1, 1).flatten(0, 1) for volumes in (images, self.target))
        scores = slice_scores(drawn, true, None, ssim=self.ssim)
        return {name: scores[name].reshape(len(images), -1).mean(axis=1).tolist() for name in self.metrics}

    def pictures(self, images: torch.Tensor) -> torch.Tensor:
        return images[:6, ..., 0].transpose(-1, -2).flip(-2)


class NoddiBlocks(Task):
    """Maps of a block in the middle of phantom brains, two overlapping patches long: from noise, and from the encoder's
    estimate half-way. PSNR of each map in the brain."""

    option, values, published_steps = "start", (1.0, 0.5), 100
    metrics = {f"{key}_psnr": Metric(f"PSNR {name} (dB)", negligible=0.05) for key, name in MAPS.items()}

    def __init__(self, *, count: int, seed: int) -> None:
        super().__init__("dmri2noddi")
        load, load_maps = self.get("preprocessing"), LoadNoddiMapsd()
        self.patch: list[int] = list(self.get("patch_size"))
        self.overlap: float = self.get("overlap")
        block = [self.patch[0] + round(self.patch[0] * (1 - self.overlap)), *self.patch[1:]]
        with tempfile.TemporaryDirectory() as folder:
            dmri2noddi.make_dataset(folder, count, seed=_PHANTOM_SEED + seed, split=_TEST_ONLY)
            items = [load_maps(load(item)) for item in load_datalist(folder, "test")]
        self.features = torch.stack([_middle(item["image"], block) for item in items])
        self.target = torch.stack([_middle(item["maps"], block, factor=2) for item in items])
        self.brain = torch.stack([_middle(item["brain"], block, factor=2) for item in items])
        self.seeds = range(seed, seed + count)

    def sample(self, scheduler: Recording, steps: int, value: float) -> Sampled:
        sampler = NoddiSampler(
            scheduler=scheduler,
            num_inference_steps=steps,
            start=value,
            patch_size=self.patch,
            overlap=self.overlap,
            fusion=self.get("fusion"),
            patches_per_batch=2,
        )
        return self._run(sampler, scheduler, self.features, self.seeds)

    def measure(self, images: torch.Tensor) -> dict[str, list[float]]:
        inside = (self.brain > 0.5).double()[:, 0]
        error = (images - self.target).double()
        return {f"{key}_psnr": errors_within(error[:, row], inside)["psnr"].tolist() for row, key in enumerate(MAPS)}

    def pictures(self, images: torch.Tensor) -> torch.Tensor:
        return images[:2, :, :, :, images.shape[-1] // 2].flatten(0, 1)[:, None]


def _middle(volume: torch.Tensor, sides: Sequence[int], *, factor: int = 1) -> torch.Tensor:
    """Block of ``factor * sides`` in the middle of ``(C, X, Y, Z)``, at the same place on a grid ``factor`` as fine."""
    starts = [(length // factor - side) // 2 for length, side in zip(volume.shape[1:], sides, strict=True)]
    places = [slice(factor * start, factor * (start + side)) for start, side in zip(starts, sides, strict=True)]
    return torch.as_tensor(np.asarray(volume)[(slice(None), *places)]).float()


# Made with count and seed.
TASKS: dict[str, Callable[..., Task]] = {
    "cxr_ldm": ChestImages,
    "brain_controlnet": BrainSlices,
    "dmri2noddi": NoddiBlocks,
}
