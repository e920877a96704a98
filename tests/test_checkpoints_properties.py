# SPDX-License-Identifier: Apache-2.0
"""Tables of keys for networks of any width and depth: every weight has one origin, and nothing else is taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import monai.networks.nets as core
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shared.checkpoint_origins import Origin, convert_by_table
from shared.checkpoints import KEYS, _apply, convert_state_dict
from shared.checkpoints_latent_diffusion import (
    COMPVIS,
    COUNTERS,
    DIFFUSERS,
    EMA,
    OLD_DIFFUSERS,
    SCHEDULE,
    UNET,
    autoencoder_table,
    part_of,
    unet_table,
    vision_encoder_table,
    with_averages,
)
from shared.networks.film_unet import FiLMUNet
from shared.networks.kl_autoencoder import KLAutoencoder
from shared.networks.vision_encoder import VisionEncoder
from tests.properties import error_of, examples
from tests.published_networks import old_network
from tests.test_checkpoints import CASES

LEVELS = st.lists(st.tuples(st.sampled_from([8, 16]), st.booleans()), min_size=1, max_size=3)


@st.composite
def published(draw) -> tuple[nn.Module, dict[str, Origin]]:
    """A small network and its table."""
    levels = draw(LEVELS)
    options: dict[str, Any] = {
        "channels": [width for width, _ in levels],
        "attention_levels": [attends for _, attends in levels],
        "norm_num_groups": 8,
        "num_res_blocks": draw(st.integers(1, 2)),
    }
    kind = draw(st.sampled_from(["unet", "vision encoder", "autoencoder"]))
    if kind == "unet":
        network: nn.Module = FiLMUNet(**options, num_heads=2, num_classes=draw(st.sampled_from([None, 3])))
        return network, unet_table(network)  # type: ignore[arg-type]
    options["latent_channels"] = draw(st.integers(1, 4))
    if kind == "vision encoder":
        network = VisionEncoder(**options)
        return network, vision_encoder_table(network)  # type: ignore[arg-type]
    network = KLAutoencoder(**options)
    layout = draw(st.sampled_from([COMPVIS, DIFFUSERS, OLD_DIFFUSERS]))
    return network, autoencoder_table(network, layout)  # type: ignore[arg-type]


def as_published(state: Mapping[str, Tensor], table: Mapping[str, Origin], *, pointwise: bool) -> dict[str, Tensor]:
    """The way back: parts put together, and, if asked for, matrices as 1x1 convolutions."""
    source: dict[str, Tensor] = {}
    for key, value in state.items():
        origin = table[key]
        rows = value.unflatten(0, (origin.heads, -1))
        whole = source.setdefault(origin.key, torch.full((len(value) * origin.parts, *value.shape[1:]), torch.nan))
        whole.unflatten(0, (origin.heads, origin.parts, -1))[:, origin.part] = rows
    return {key: value[..., None, None] if pointwise and value.ndim == 2 and is_conv(key) else value
            for key, value in source.items()}  # fmt: skip


def is_conv(key: str) -> bool:
    """Attention was made of convolutions."""
    return any(name in key for name in ("attn", "attentions", "qkv", "proj_out")) and key.endswith("weight")


@examples(30)
@given(case=published(), pointwise=st.booleans())
def test_a_table_uses_every_published_weight_once_and_the_way_back_leads_to_it(case, pointwise):
    network, table = case
    state = {key: torch.randn_like(value) for key, value in network.state_dict().items()}
    assert set(table) == set(state)
    origins = Counter((origin.key, origin.part) for origin in table.values())
    assert set(origins.values()) == {1}
    source = as_published(state, table, pointwise=pointwise)
    assert all(value.isfinite().all() for value in source.values()), "each row has an origin"
    before = {key: value.clone() for key, value in source.items()}
    converted = convert_by_table(source, network, table)
    assert list(converted) == list(state)
    assert all(torch.equal(converted[key], value) for key, value in state.items())
    assert all(torch.equal(source[key], value) for key, value in before.items())


@examples(30)
@given(case=published(), data=st.data())
def test_what_is_missing_or_too_much_is_named(case, data):
    network, table = case
    source = as_published(network.state_dict(), table, pointwise=False)
    key = data.draw(st.sampled_from(sorted(source)))
    fault = data.draw(st.sampled_from(["missing", "surplus", "shape"]))
    if fault == "missing":
        del source[key]
    elif fault == "surplus":
        key = f"{key}.{data.draw(st.text('abc.0', max_size=4))}x"
        source[key] = torch.zeros(1)
    else:
        source[key] = torch.zeros(*source[key].shape, 1, 2)
    error = error_of(lambda: convert_by_table(source, network, table))
    assert str(error).startswith(f"{type(network).__name__}: the weights do not fit.")
    assert key in str(error)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rules_of_monai_generative_are_one_to_one_and_change_nothing_twice(case):
    kind, options, new_options = case
    source, network = old_network(kind, options).state_dict(), getattr(core, kind)(**options, **new_options)
    renamed = [_apply(KEYS[kind], key)[0] for key in source]
    assert len(set(renamed)) == len(source), "no two keys become one"
    converted = convert_state_dict(source, network)
    assert list(converted) == list(network.state_dict())
    again = convert_state_dict(converted, network)
    assert all(torch.equal(again[key], value) for key, value in converted.items())
    # Weights that the rules do not touch are the source's own, bit for bit.
    for key in set(source) & set(converted):
        assert torch.equal(source[key], converted[key])


@examples(40)
@given(case=st.sampled_from(sorted(CASES)), data=st.data())
def test_rules_of_monai_generative_name_what_does_not_fit(case, data):
    kind, options, new_options = CASES[case]
    network = getattr(core, kind)(**options, **new_options)
    state = dict(network.state_dict())
    key = data.draw(st.sampled_from(sorted(state)))
    if data.draw(st.booleans()):
        del state[key]
    else:
        key = f"{key}.surplus"
        state[key] = torch.zeros(1)
    error = error_of(lambda: convert_state_dict(state, network))
    assert str(error).startswith(f"{kind}: the weights do not fit.")
    assert key in str(error)


# Whole checkpoints

NAMES = st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=5, unique_by=lambda n: n.replace(".", ""))


@examples(60)
@given(names=NAMES, others=st.sets(st.text("xyz.", max_size=3)), schedule=st.sets(st.sampled_from(sorted(SCHEDULE))))
def test_parts_of_a_checkpoint_lose_nothing_but_the_schedule(names, others, schedule):
    state = {f"{UNET}{name}": torch.tensor(float(i)) for i, name in enumerate(names)}
    state |= {f"other.{name}": torch.tensor(-1.0) for name in others}
    part = part_of(state | {name: torch.zeros(1) for name in schedule}, UNET)
    assert len(part) == len(state)
    assert all(part[name] is state[f"{UNET}{name}"] for name in names)
    assert {key for key in part if "not under" in key} == {f"other.{name} (not under {UNET})" for name in others}
    assert set(part_of(state, UNET, inert=("other.",))) == set(names)


@examples(60)
@given(names=NAMES, ema=st.sampled_from([None, True, False]), drop=st.booleans())
def test_averages_replace_each_weight_or_say_which_stands_alone(names, ema, drop):
    weights = {f"{UNET}{name}": torch.tensor(float(i)) for i, name in enumerate(names)}
    averages = {
        EMA + f"diffusion_model.{name}".replace(".", ""): torch.tensor(100.0 + i) for i, name in enumerate(names)
    }
    state = {**weights, **averages, **{name: torch.zeros(1) for name in COUNTERS}}
    if drop:
        del state[next(iter(averages))]
    found: list = []
    error = error_of(lambda: found.append(with_averages(state, ema=ema)))
    if error is not None:
        assert drop
        assert str(error).startswith(f"{EMA}: expected ")
        return
    result, used = found[0]
    assert list(result) == list(weights)
    assert used == (ema is not False and len(averages) > drop)
    expected = averages.values() if used else weights.values()
    assert [float(value) for value in result.values()] == [float(value) for value in expected]
