# SPDX-License-Identifier: Apache-2.0
"""Twenty steps of every training: each optimizer moves its own parameters, and nothing else moves."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from torch import nn

from shared.networks.frozen import FrozenModule
from tests import stage_gang
from tests.stage_gang import SMALL
from tests.test_frozen_text import clip_folder  # noqa: F401 - a fixture

STEPS = 20


@dataclass(frozen=True)
class Parts:
    """What a stage may change. Names begin with that of the network in the configuration.

    Attributes:
        trained: optimizer -> what its parameters begin with.
        buffers: what changes otherwise: codes and statistics that a forward pass collects.
        frozen: what holds other networks -> file of the earlier stage that they must equal to the end.
        extra: further networks of the configuration that take part.
        idle: may have no gradient in the first steps.
        overrides: over those of ``stage_gang.SMALL``.
    """

    trained: dict[str, tuple[str, ...]]
    buffers: tuple[str, ...] = ()
    frozen: dict[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)


WHOLE = {"optimizer": ("network_def.",)}
PAIR = {"optimizer": ("network_def.",), "discriminator_optimizer": ("discriminator_def.",)}
AUTOENCODER = {"network_def.autoencoder.": "autoencoder.pt"}
CONTROL = ("network_def.controlnets.", "network_def.embeddings.")
DIFFUSION = {"network_def.diffusion.": "diffusion.pt"}
NORM = ("running_mean", "running_var", "num_batches_tracked")
UNLOCKED = {"network_def.diffusion.autoencoder.": "autoencoder.pt"}
STAGES: dict[str, Parts] = {
    "cxr_ldm train_autoencoder": Parts(PAIR, NORM),
    "cxr_ldm train": Parts({"optimizer": ("network_def.unet.", "network_def.text_encoder.")}, frozen=AUTOENCODER),
    # The text encoder of Stable Diffusion is in no state dict: what it holds is looked at in the module itself.
    "cxr_ldm train, published text encoder": Parts({"optimizer": ("network_def.unet.",)}, frozen=AUTOENCODER),
    "cxr_ldm train_classifier": Parts(WHOLE, NORM),
    "brain_controlnet train_autoencoder": Parts(PAIR, NORM),
    "brain_controlnet train_diffusion": Parts(
        {"optimizer": ("network_def.unet.", "network_def.prompt.")}, frozen=AUTOENCODER
    ),
    "brain_controlnet train": Parts({"optimizer": CONTROL}, frozen=DIFFUSION),
    "brain_controlnet train, U-Net unlocked": Parts(
        {"optimizer": (*CONTROL, "network_def.diffusion.unet.")}, frozen=UNLOCKED, overrides={"unlock_unet": True}
    ),
    "brain_controlnet train_regression": Parts(WHOLE),
    "sdseg train_autoencoder": Parts(PAIR, NORM),
    "sdseg train": Parts({"optimizer": ("network_def.unet.", "network_def.vision_encoder.")}, frozen=AUTOENCODER),
    "sdseg train, vision encoder frozen": Parts(
        {"optimizer": ("network_def.unet.",)}, frozen=AUTOENCODER, overrides={"train_vision_encoder": False}
    ),
    "sdseg train_baseline": Parts(WHOLE),
    "dmri2noddi train_vqgan": Parts(
        # Of the hinge loss of one decision and the other, the gradients of the last bias cancel within the margin.
        PAIR,
        (*NORM, "codebook"),
        idle=("final_conv.conv.bias",),
    ),
    "dmri2noddi train_encoder": Parts(WHOLE, frozen={"autoencoder.": "models/stages/vqgan.pt"}, extra=("autoencoder",)),
    "dmri2noddi train": Parts(
        {"optimizer": ("network_def.unet.",)},
        frozen={
            "network_def.autoencoder.": "models/stages/vqgan.pt",
            "network_def.encoder.": "models/stages/encoder.pt",
        },
    ),
    "dmri2noddi train_baseline": Parts(WHOLE),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return stage_gang.prepare(tmp_path_factory.mktemp("frozen"))


@contextlib.contextmanager
def workflow_of(stage: str, options: dict[str, Any]) -> Iterator[ConfigWorkflow]:
    path, hook = list(sys.path), sys.excepthook
    workflow = ConfigWorkflow(
        config_file=stage_gang.files(stage), logging_file=False, run_id="training", workflow_type="train", **options
    )
    try:
        workflow.initialize()
        yield workflow
    finally:
        sys.path[:], sys.excepthook = path, hook


def tensors(networks: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, those of networks that hide from the state dict included."""
    found = {}
    for name, network in networks.items():
        for place, module in network.named_modules():
            hidden = f"{name}.{place}." if place else f"{name}."
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            found |= {f"{hidden}{key}": tensor for key, tensor in own}
            if isinstance(module, FrozenModule):
                inner = {**dict(module.frozen.named_parameters()), **dict(module.frozen.named_buffers())}
                found |= {f"{hidden}frozen.{key}": tensor for key, tensor in inner.items()}
    return found


def copied(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def changed(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], two[name])}


def test_every_training_of_every_bundle_is_here():
    assert {stage.split(",")[0] for stage in STAGES} == set(SMALL)


@pytest.mark.reliability(8)
@pytest.mark.parametrize("case", list(STAGES))
def test_only_what_a_stage_trains_moves(case, folder, tmp_path, request, record_property):
    stage, parts = case.split(",")[0], STAGES[case]
    options = stage_gang.options(stage, "whole", folder, world=1) | parts.overrides
    options |= {"ckpt_dir": str(tmp_path / "models"), "output_dir": str(tmp_path / "run")}
    rare = dict.fromkeys(("max_epochs", "val_interval", "preview_interval"), 99)
    wanted = {**rare, "adversarial_start": 1, "accumulation_steps": 1, "latent_cache_dir": str(tmp_path / "latents")}
    options |= {name: value for name, value in wanted.items() if name in options}
    if "published" in case:
        train = stage_gang.read(stage_gang.names(stage)[0] / "configs/train.json")
        options |= {"text_encoder_def": train["text_encoder_def"], "context_encoder": None}
        options |= {"text_encoder_dir": str(request.getfixturevalue("clip_folder"))}
        options["unet_def"] = {**options["unet_def"], "cross_attention_dim": 16}
    with workflow_of(stage, options) as workflow:
        content = workflow.parser.get_parsed_content
        names = ["network_def", *parts.extra, *(["discriminator_def"] if len(parts.trained) > 1 else [])]
        networks = {name: content(name) for name in names}
        steps: dict[str, list[set[str]]] = {name: [] for name in parts.trained}
        start: dict[str, torch.Tensor] = {}
        before: dict[str, dict[str, torch.Tensor]] = {}
        for name in parts.trained:
            optimizer = content(name)
            optimizer.register_step_pre_hook(lambda *_, n=name: before.update({n: copied(tensors(networks))}))
            optimizer.register_step_post_hook(lambda *_, n=name: steps[n].append(changed(before[n], tensors(networks))))
        trainer = content("train#trainer")
        trainer.add_event_handler(Events.ITERATION_STARTED(once=1), lambda: start.update(copied(tensors(networks))))
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda: trainer.terminate() if len(steps["optimizer"]) == STEPS else None
        )
        workflow.run()
        end = tensors(networks)

        known_as = {id(tensor): name for name, tensor in end.items()}
        owned = {
            name: {
                known_as.get(id(p), "of no network") for group in content(name).param_groups for p in group["params"]
            }
            for name in steps
        }
        parameters = {name for name, tensor in end.items() if isinstance(tensor, nn.Parameter)}
        trained = {name: {key for key in parameters if key.startswith(parts.trained[name])} for name in steps}
        for name, known in trained.items():
            assert owned[name] == known, f"{name} holds other parameters than declared"
            assert len(steps[name]) == STEPS
            strange = set().union(*steps[name]) - known
            assert strange == set(), f"a step of {name} moved what is not its own"
        # Outside of the steps.
        moved = changed(start, end)
        everything = set().union(*trained.values())
        assert {key for key in moved - everything if not any(part in key for part in parts.buffers)} == set()
        still = {key for key in everything - moved if not key.endswith(parts.idle)}
        assert still == set(), "declared as trained, but did not move"
        for prefix, file in parts.frozen.items():
            given = torch.load(folder / "data" / stage.split()[0] / file, weights_only=True)
            assert given
            for key, tensor in given.items():
                assert torch.equal(end[prefix + key], tensor), prefix + key
        frozen = len(end.keys() - moved)
        record_property("figure", f"{case}: {len(everything)} trained, {frozen} tensors unchanged after {STEPS} steps")
