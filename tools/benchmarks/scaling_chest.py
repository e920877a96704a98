# SPDX-License-Identifier: Apache-2.0
"""The chest model at reduced width, its data and its works, for measurements with one and with several processes.

Everything runs on the classes that ``cxr_ldm``'s configs name, ``multi_gpu_*.json`` among them. Each work starts from
the same weights every time, so that a repetition gives the same result.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset, DistributedSampler
from monai.engines import SupervisedEvaluator
from monai.engines.utils import PrepareBatchExtraInput
from monai.inferers import SimpleInferer
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler
from monai.utils import set_determinism
from torch import nn

from shared.distributed import data_parallel, from_all_processes, is_distributed, process_count
from shared.engines import AccumulatingTrainer
from shared.handlers.ema import TrainedWeightsAverage
from shared.handlers.engine_items import engine_items
from shared.handlers.evaluation import GenerativeEvaluation
from shared.handlers.guard import GradientGuard
from shared.inferers import GuidedLatentSampler
from shared.metrics.features import ClassifierFeatures
from shared.metrics.measures import FrechetAndKernelDistance, RealDiversity, ReconstructionMsssim, SampleDiversity
from shared.networks.finding_classifier import FindingClassifier
from shared.networks.latent_diffusion import TextToImageModel
from shared.prepare_batch import PromptBatch, TextLatentDiffusionBatch
from shared.schedulers import DPMSolverMultistepScheduler
from shared.shares import BatchShares, in_list_order, run_share
from tools.benchmarks.workload import Setting

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000, "schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0205,
    "prediction_type": "v_prediction",
}  # fmt: skip
WORDS = 77


def unet_channels(setting: Setting) -> list[int]:
    """Channels of the U-Net: an eighth of the published ones at ``quick``."""
    return setting.pick([8, 16, 16], [32, 64, 96], [256, 512, 768])


def latent_shape(setting: Setting) -> tuple[int, int, int]:
    return setting.pick((3, 8, 12), (3, 64, 64), (3, 64, 64))


def context_size(setting: Setting) -> int:
    return setting.pick(16, 128, 1024)


def chest_unet(setting: Setting) -> DiffusionModelUNet:
    """The denoising U-Net with random weights, its last convolution too, which MONAI starts at zero."""
    channels = unet_channels(setting)
    unet = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=3,
        num_res_blocks=2,
        channels=channels,
        attention_levels=[False, True, True],
        num_head_channels=[0, *channels[1:]],
        norm_num_groups=setting.pick(8, 32, 32),
        with_conditioning=True,
        transformer_num_layers=1,
        cross_attention_dim=context_size(setting),
        use_flash_attention=True,
    )
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return unet


def chest_model(setting: Setting) -> TextToImageModel:
    """The network of ``cxr_ldm`` with an embedding table for a text encoder, since texts are embedded once."""
    channels = setting.pick([4, 4, 8, 8], [8, 16, 16, 16], [64, 128, 128, 128])
    with torch.random.fork_rng():
        torch.manual_seed(setting.seed)
        autoencoder = AutoencoderKL(
            spatial_dims=2,
            in_channels=1,
            out_channels=1,
            channels=channels,
            latent_channels=3,
            num_res_blocks=2,
            norm_num_groups=setting.pick(4, 8, 32),
            attention_levels=[False] * 4,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )
        text_encoder = nn.Embedding(1000, context_size(setting)).requires_grad_(False)
        return TextToImageModel(autoencoder, chest_unet(setting), text_encoder)


class ChestWorks:
    """The works that several processes share; call them on all ranks alike.

    Args:
        setting: size and seed; the device is that of this process.
        device: where this process computes.
    """

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.device = setting, device
        self.model = chest_model(setting).to(device)
        self.initial = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.network = data_parallel(self.model) if is_distributed() else self.model
        self.works: Mapping[str, Callable[[], dict[str, Any]]] = {
            "train": self.train, "sample": self.sample, "evaluate": self.evaluate,
        }  # fmt: skip

    def run(self, work: str) -> dict[str, Any]:
        """Do a work by name.

        Returns:
            What it gives, on rank 0, and the wall-clock ``seconds`` it took, on every rank.
        """
        self.model.load_state_dict(self.initial)
        set_determinism(self.setting.seed)
        from_all_processes(None)  # the clock starts when all are here
        start = time.perf_counter()
        result = self.works[work]()
        return {**result, "seconds": time.perf_counter() - start}

    def _tokens(self, count: int) -> torch.Tensor:
        return torch.randint(1, 1000, (count, WORDS), generator=torch.Generator().manual_seed(self.setting.seed))

    def train(self) -> dict[str, Any]:
        """Steps of stage 2 on cached latents, one batch shared by all: losses by step (means over the ranks), and the
        trained weights of the last convolution."""
        steps, batch = self.setting.pick((3, 4), (2, 4), (4, 32))
        shape = latent_shape(self.setting)
        generator = torch.Generator().manual_seed(self.setting.seed)
        items = [
            {
                "latent_mean": torch.randn(shape, generator=generator),
                "latent_log_variance": torch.full(shape, -4.0),
                "tokens": tokens,
                "item_id": str(number),
            }
            for number, tokens in enumerate(self._tokens(steps * batch))
        ]
        dataset = Dataset(items)
        sampler = DistributedSampler(dataset, shuffle=False) if is_distributed() else None
        trainer = AccumulatingTrainer(
            device=self.device,
            max_epochs=1,
            train_data_loader=DataLoader(dataset, batch_size=batch // process_count(), sampler=sampler),
            network=self.network,
            optimizer=torch.optim.AdamW(list(self.model.trainable_parameters()), lr=2.5e-5, fused=True),
            loss_function=nn.MSELoss(),
            inferer=SimpleInferer(),
            # With a seed noise belongs to the item, whichever process has it.
            prepare_batch=TextLatentDiffusionBatch(
                DDPMScheduler(**SCHEDULE, clip_sample=False), self.model, text_encoder=self.model.text_encoder, seed=0
            ),
            train_handlers=[GradientGuard(max_norm=1.0), TrainedWeightsAverage(self.network)],
            decollate=False,
        )
        losses: list[float] = []
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output["loss"].item())
        )
        trainer.run()
        mean = torch.tensor(from_all_processes(losses), dtype=torch.float64).mean(dim=0)
        last = [p.detach().cpu().flatten() for name, p in self.model.unet.named_parameters() if name.startswith("out.")]
        return {"losses": mean, "weights": torch.cat(last), "steps": steps, "batch": batch}

    def sample(self) -> dict[str, Any]:
        """Guided images of a list of prompts, as inference does: ``images (N, 1, H, W)`` on rank 0."""
        count, batch = self.setting.pick((4, 2), (4, 2), (16, 4))
        tokens = torch.stack((self._tokens(count), torch.zeros(count, WORDS, dtype=torch.long)), dim=1)
        dataset = Dataset([{"image": pair, "seed": number} for number, pair in enumerate(tokens)])
        evaluator = SupervisedEvaluator(
            device=self.device,
            val_data_loader=DataLoader(dataset, batch_size=batch, sampler=BatchShares(dataset, batch)),
            network=self.network,
            inferer=self._sampler(self.setting.pick(2, 2, 25)),
            prepare_batch=PrepareBatchExtraInput(extra_keys={"seeds": "seed"}),
        )
        rows: list[torch.Tensor] = []
        evaluator.add_event_handler(
            Events.ITERATION_COMPLETED,
            lambda engine: rows.extend(row["pred"].detach().cpu().clone() for row in engine_items(engine.state.output)),
        )
        evaluator.state.dataloader = evaluator.data_loader
        run_share(evaluator)
        images = in_list_order(evaluator, rows)
        return {"images": torch.stack(images) if images else torch.empty(0), "batches": -(-count // batch)}

    def evaluate(self) -> dict[str, Any]:
        """Samples, reconstructions and measures of a test set: the files that the evaluation writes, on rank 0."""
        count, batch = self.setting.pick((8, 2), (8, 2), (64, 4))
        channels, *sides = latent_shape(self.setting)
        generator = torch.Generator().manual_seed(self.setting.seed)
        images = torch.rand(count, 1, *(8 * side for side in sides), generator=generator)
        dataset = Dataset(
            [
                {"image": image, "tokens": tokens, "item_id": str(number)}
                for number, (image, tokens) in enumerate(zip(images, self._tokens(count), strict=True))
            ]
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.setting.seed)
            classifier = FindingClassifier(init_features=8, growth_rate=4, block_config=(2, 2))
        options: dict[str, Any] = {"kernel_size": self.setting.pick(3, 11, 11), "device": self.device}
        with tempfile.TemporaryDirectory() as folder:
            evaluator = SupervisedEvaluator(
                device=self.device,
                val_data_loader=DataLoader(dataset, batch_size=batch, sampler=BatchShares(dataset, batch)),
                network=self.network,
                inferer=self._sampler(self.setting.pick(1, 1, 25)),
                prepare_batch=PromptBatch(lambda texts: torch.zeros(len(texts), WORDS, dtype=torch.long)),
                val_handlers=[
                    GenerativeEvaluation(
                        folder,
                        [
                            ReconstructionMsssim(**options),
                            SampleDiversity(**options),
                            RealDiversity(**options),
                            FrechetAndKernelDistance(ClassifierFeatures(classifier, device=self.device)),
                        ],
                        reconstruct=self.model.reconstruct,
                    )
                ],
            )
            run_share(evaluator)
            written = sorted(path for path in (Path(folder) / "evaluation").glob("*.*") if path.suffix != ".png")
            return {"files": {path.name: path.read_text(encoding="utf-8") for path in written}}

    def _sampler(self, steps: int) -> GuidedLatentSampler:
        return GuidedLatentSampler(
            scheduler=DPMSolverMultistepScheduler(**SCHEDULE, spacing="karras"),
            num_inference_steps=steps,
            guidance_scale=7.0,
            latent_shape=latent_shape(self.setting),
        )
