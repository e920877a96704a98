# SPDX-License-Identifier: Apache-2.0
"""What every conversion of published weights needs: the network's definition, the summary, the file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from shared.checkpoint_files import read_published
from shared.checkpoints import Rules, convert_state_dict
from shared.files import sha256_of_file
from shared.weights import save_weights

BUNDLES = Path(__file__).parents[1] / "bundles"


def read_config(config: str | Sequence[str]) -> tuple[ConfigParser, list[str]]:
    """A configuration (or several, later ones override) and its files."""
    files = [config] if isinstance(config, str) else list(config)
    parser = ConfigParser()
    parser.read_config(files)
    return parser, files


def under(part: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as that of the network `part` inside a larger one."""
    return {f"{part}.{key}": value for key, value in weights.items()}


def definition(parser: ConfigParser, name: str, files: list[str]) -> dict[str, Any]:
    """The definition behind `name`, references followed."""
    try:
        content = parser[name]
        while isinstance(content, str) and content[:1] in "@%":
            content = parser[content[1:]]
    except (KeyError, IndexError, ValueError):
        content = None
    if not isinstance(content, dict) or "_target_" not in content:
        raise ValueError(
            f"{files[-1]}: expected the key {name} to define a network with _target_, got {content!r}. "
            "Remedy: give the bundle's own configuration with --config"
        )
    return content


def checked_scale_factor(scale_factor: float | None) -> Tensor:
    """The scale factor of weights that were published without it, given by the user, as the tensor to save.

    Raises:
        ValueError: none, or no positive number.
    """
    if scale_factor is None:
        raise ValueError(
            "--scale_factor: expected a number, got none. The published files do not contain it, and a wrong one gives "
            "grey or burnt images without any error. Remedy: --scale_factor 0.3 for the published weights; "
            "for your own, the value given to the diffusion training"
        )
    if not (isinstance(scale_factor, (int, float)) and math.isfinite(scale_factor) and scale_factor > 0):
        raise ValueError(f"--scale_factor: expected a positive number, got {scale_factor!r}")
    print(f"scale_factor: {scale_factor}")
    return torch.tensor(float(scale_factor))


def convert(
    source: str, network: nn.Module, *, entry: str | None = None, rules: Rules | None = None
) -> dict[str, Tensor]:
    """Weights of monai-generative in the file `source` for `network` (see `shared.checkpoints.convert_state_dict`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights that do not fit; the message starts with the file.
    """
    published = read_published(source, entry=entry)
    try:
        converted = convert_state_dict(published, network, rules=rules)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    summarize(network, converted, published, source)
    return converted


def summarize(
    network: nn.Module, converted: Mapping[str, Tensor], published: Mapping[str, Tensor], source: str
) -> None:
    """Print how much of `source` became the weights of `network`."""
    renamed = sum(key not in published for key in converted)
    count = sum(value.numel() for value in converted.values())
    print(
        f"{type(network).__name__}: {count / 1e6:.2f} M values in {len(converted)} tensors from {source}, "
        f"{renamed} under a new name"
    )


def save(weights: dict[str, Tensor], out: str) -> None:
    """Write the weights and print what was written."""
    save_weights(weights, out)
    report(out)


def report(out: str) -> None:
    """Print size and checksum of a written file."""
    print(f"saved {out} ({Path(out).stat().st_size / 1e6:.1f} MB)\nsha256 {sha256_of_file(out)}")
