# SPDX-License-Identifier: Apache-2.0
"""Stage 2 of the chest model as programs with the same weights, films and random numbers: published, and the bundle's.

The bundle's program is built from ``bundles/cxr_ldm/configs/train.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.inferers import SimpleInferer
from monai.networks.nets import DiffusionModelUNet
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from shared.diffusion import sample_posterior
from shared.weights import load_weights
from tools.benchmarks.bundle_config import bundle_config, options_of
from tools.benchmarks.published_chest import LEARNING_RATE, SCALE_FACTOR, training_steps
from tools.benchmarks.published_networks import published_network, some_in_core_order, spread_zeros
from tools.benchmarks.temporary import temporary_folder
from tools.benchmarks.trained import Trained
from tools.benchmarks.workload import Setting

SENTENCES = (
    "Big right-sided pleural effusion.",
    "Normal heart size and clear lungs.",
    "Cardiomegaly with mild pulmonary oedema.",
    "Small left apical pneumothorax.",
)
# Gradients and updates are those of about 256 numbers of each weight: all would be part of the measured peak memory.
Program = Callable[[], Trained]


class Stage2:
    """Films, texts and weights on disk, and programs that train on them.

    Args:
        setting: where and how large.
        steps: optimizer steps of one run.
        batch_size: films in a batch.
    """

    def __init__(self, setting: Setting, *, steps: int, batch_size: int) -> None:
        self.setting, self.steps, self.batch_size = setting, steps, batch_size
        self.folder = temporary_folder("cxr_ldm_stage2")
        self.size: tuple[int, int] = setting.pick((64, 96), (256, 256), (512, 512))
        self.channels: list[int] = setting.pick([8, 16, 16], [64, 128, 192], [256, 512, 768])
        self.text_layers: int = setting.pick(2, 23, 23)
        self.text_width: int = setting.pick(16, 256, 1024)
        with torch.random.fork_rng():
            torch.manual_seed(setting.seed)
            self._write_text_encoder()
            self._write_films()
            parser = self._parser()
            autoencoder = spread_zeros(parser.get_parsed_content("autoencoder_def"), setting.seed)
            (self.folder / "stages").mkdir()
            torch.save(autoencoder.state_dict(), self.folder / "stages/autoencoder.pt")
            torch.save(spread_zeros(self._core_unet(parser), setting.seed).state_dict(), self.folder / "unet.pt")

    @property
    def sizes(self) -> str:
        """What is run, in words."""
        height, width = self.size
        reduced = self.setting.pick(
            "far below the published size in every respect",
            "a quarter of the published channels and heads' width in all networks, half of the published side",
            "as published",
        )
        return (
            f"{self.steps} steps, {self.batch_size} films of {height} x {width} a step, latents {height // 8} x "
            f"{width // 8}, U-Net channels {self.channels}, text encoder of {self.text_layers} layers of "
            f"{self.text_width}: {reduced}"
        )

    def published(
        self, *, core: bool = False, cached_latents: bool = False, cached_texts: bool = False, once: bool = False
    ) -> Program:
        """The published loop.

        Args:
            core: on MONAI core's networks with their defaults, not on monai-generative's.
            cached_latents: latents come from the bundle's cache of means and variances.
            cached_texts: so do texts.
            once: the program is run once, and keeps no copy of the first weights.
        """
        device, parser = self.setting.device, self._parser()
        core_unet = self._core_unet(parser)
        load_weights(core_unet, self.folder / "unet.pt")
        unet = core_unet if core else published_network(core_unet, options_of(parser, "unet_def"))
        del core_unet
        unet.to(device)
        autoencoder: Any = parser.get_parsed_content("autoencoder")
        if not core:
            autoencoder = published_network(autoencoder, options_of(parser, "autoencoder_def"))
        autoencoder.to(device).eval()
        frozen = parser.get_parsed_content("text_encoder_def")
        cached = parser.get_parsed_content("context_encoder") if cached_texts else None
        # Not in the optimizer, but its weights take gradients.
        text_encoder = frozen.frozen.to(device).requires_grad_(not cached_texts)
        dataset = parser.get_parsed_content("train#dataset")
        preprocessing = parser.get_parsed_content("image_preprocessing")
        tokens = torch.stack([dataset[index]["tokens"] for index in range(len(dataset))]).split(self.batch_size)
        films = torch.stack([preprocessing(dict(item))["image"].as_tensor() for item in self._items()])
        images = films.split(self.batch_size)
        before = _FirstWeights(unet, self._core_unet(parser, "meta"), once=once)

        def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            if not cached_latents:
                yield from zip(images, tokens, strict=True)
                return
            for batch in parser.get_parsed_content("train#dataloader"):
                yield torch.stack((batch["latent_mean"], batch["latent_log_variance"]), dim=1), batch["tokens"]

        def latents_of(source: torch.Tensor) -> torch.Tensor:
            if cached_latents:
                return sample_posterior(source[:, 0], source[:, 1], torch.randn_like(source[:, 0]))
            mean, sigma = autoencoder.encode(source)
            return autoencoder.sampling(mean, sigma)

        def context_of(ids: torch.Tensor) -> torch.Tensor:
            return cached(ids) if cached is not None else text_encoder(ids)[0]

        def run() -> Trained:
            before.restore()
            text_encoder.zero_grad()
            optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)
            losses = training_steps(
                unet, optimizer, batches(), latents_of=latents_of, context_of=context_of, seed=self.setting.seed
            )
            return before.trained(losses)

        return run

    def bundle(self, *, half: bool = False, checkpointing: bool = False, once: bool = False) -> Program:
        """The bundle's program.

        Args:
            half: bfloat16 autocast on a CPU too; on a GPU the bundle has it anyway.
            checkpointing: blocks of the U-Net are computed twice instead of kept.
            once: see ``published``.
        """
        parser = self._parser({"gradient_checkpointing": checkpointing})
        network = parser.get_parsed_content("network")
        load_weights(network.unet, self.folder / "unet.pt")
        network.scale_factor.fill_(SCALE_FACTOR)
        ema, optimizer = parser.get_parsed_content("ema"), parser.get_parsed_content("optimizer")
        trainer = parser.get_parsed_content("train#trainer")
        if half and not trainer.amp:
            # The trainer's own autocast is that of GPUs.
            trainer.inferer = _HalfPrecision()
        before = _FirstWeights(network.unet, network.unet, once=once)
        losses: list[torch.Tensor] = []
        trainer.add_event_handler(
            Events.ITERATION_STARTED,
            lambda engine: torch.manual_seed(self.setting.seed + engine.state.iteration - 1),
        )
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output["loss"].detach())
        )

        def run() -> Trained:
            losses.clear()
            optimizer.state.clear()
            before.restore()
            ema.ema_model.load_state_dict(network.state_dict())
            trainer.run()
            return before.trained(torch.stack(losses).cpu())

        return run

    def _core_unet(self, parser: ConfigParser, device: str = "cpu") -> DiffusionModelUNet:
        options = options_of(parser, "unet_def")
        with torch.device(device):
            return DiffusionModelUNet(**{key: value for key, value in options.items() if key != "use_flash_attention"})

    def _items(self) -> list[dict[str, str]]:
        count = self.steps * self.batch_size
        return [
            {"image": str(self.folder / f"films/{index}.png"), "text": SENTENCES[index % len(SENTENCES)]}
            for index in range(count)
        ]

    def _parser(self, more: Mapping[str, Any] | None = None) -> ConfigParser:
        """The configuration at this size, without what the published loop does not have: warm-up and clipping change
        the weights, records and previews take time."""
        changes = {
            "device": f"$torch.device('{self.setting.device}')",
            "ckpt_dir": str(self.folder),
            "latent_cache_dir": str(self.folder / "latents"),
            "text_cache_dir": str(self.folder / "texts"),
            "text_encoder_dir": str(self.folder / "text_encoder"),
            "image_size": list(self.size),
            "latent_shape": [3, *(side // 8 for side in self.size)],
            "seed": self.setting.seed,
            "learning_rate": LEARNING_RATE,
            "batch_size": self.batch_size,
            "max_epochs": 1,
            "num_workers": 0,
            "null_prompt_probability": 0.0,
            "clip_norm": None,
            "autoencoder_def#channels": self.setting.pick([4, 4, 8, 8], [16, 32, 32, 32], [64, 128, 128, 128]),
            "autoencoder_def#norm_num_groups": self.setting.pick(4, 16, 32),
            "unet_def#channels": self.channels,
            "unet_def#num_head_channels": [0, *self.channels[1:]],
            "unet_def#norm_num_groups": self.setting.pick(8, 32, 32),
            "unet_def#cross_attention_dim": self.text_width,
            "train#dataset#data": self._items(),
            # Both programs take the films in the order of the list.
            "train#dataloader#shuffle": False,
            "train#dataloader#drop_last": False,
            **(more or {}),
        }
        parser = bundle_config("cxr_ldm", ["train"], changes)
        handlers = [part for part in parser["train#handlers"] if part["_target_"].endswith("GradientGuard")]
        parser["train#trainer#train_handlers"] = "$[*@train#handlers, @ema]"
        parser["train#handlers"] = handlers
        return parser

    def _write_text_encoder(self) -> None:
        # Imported here: it takes seconds.
        from transformers import CLIPTextConfig, CLIPTextModel

        width = self.text_width
        # Stable Diffusion 2.1's, but for the width.
        config = CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=max(width // 2, 8),
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.setting.pick(2, 16, 16),
            max_position_embeddings=77,
            hidden_act="gelu",
        )
        folder = self.folder / "text_encoder"
        folder.mkdir()
        config.to_json_file(folder / "config.json")
        save_file(CLIPTextModel(config).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})

    def _write_films(self) -> None:
        generator = np.random.default_rng(self.setting.seed)
        height, width = self.size
        (self.folder / "films").mkdir()
        for item in self._items():
            coarse = Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8))
            coarse.resize((width + 16, height), Image.Resampling.BICUBIC).save(item["image"])


class _FirstWeights:
    """The weights before training, restored before each run, and what a run has made of them.

    Args:
        unet: what is trained.
        core_unet: MONAI core's, whose shapes and order count.
        once: there is one run only.
    """

    def __init__(self, unet: nn.Module, core_unet: nn.Module, *, once: bool) -> None:
        self.unet, self.core_unet = unet, core_unet
        self.copy = None if once else {key: value.clone() for key, value in unet.state_dict().items()}
        self.some = some_in_core_order(dict(unet.named_parameters()), core_unet)

    def restore(self) -> None:
        if self.copy is not None:
            self.unet.load_state_dict(self.copy)

    def trained(self, losses: torch.Tensor) -> Trained:
        weights = dict(self.unet.named_parameters())
        gradients = {key: weight.grad for key, weight in weights.items() if weight.grad is not None}
        updates = some_in_core_order(weights, self.core_unet) - self.some
        return Trained(losses, some_in_core_order(gradients, self.core_unet), updates)


class _HalfPrecision(SimpleInferer):
    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
            return super().__call__(inputs, network, *args, **kwargs).float()
