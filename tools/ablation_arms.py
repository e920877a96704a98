# SPDX-License-Identifier: Apache-2.0
"""What is compared in an ablation of `sdseg`, and the bundle commands that train and evaluate it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from shared.overrides import is_defined

LATENT_CHANNELS = "@autoencoder_def#latent_channels"


@dataclass(frozen=True)
class Arm:
    """One variant.

    Attributes:
        name: in the table.
        differs: from the published method, in words.
        options: ids that are overridden, in training and in evaluation.
        config: name of the training's stand-alone configuration.
        weights: what the training writes, below its `ckpt_dir`.
        many_steps: whether it is also evaluated with several reverse steps, as in the article's figure 3.
    """

    name: str
    differs: str
    options: Mapping[str, object] = field(default_factory=dict)
    config: str = "train"
    weights: str = "model.pt"
    many_steps: bool = False

    @property
    def slug(self) -> str:
        """Name of its folder."""
        return re.sub(r"\W+", "_", self.name.lower())

    @property
    def is_diffusion(self) -> bool:
        """False for the baseline, which is evaluated inside the evaluation of another arm."""
        return self.config == "train"


PUBLISHED = Arm(
    "published",
    "nothing: noise and latent loss, concatenation, vision encoder trained",
    {"latent_weight": 1.0, "condition_mode": "concat", "train_vision_encoder": True},
    many_steps=True,
)
NOISE_ONLY = Arm("noise loss only", "no latent loss", {**PUBLISHED.options, "latent_weight": 0.0}, many_steps=True)
BASELINE = Arm(
    "U-Net",
    "no diffusion: a plain U-Net with Dice and cross-entropy, same data and budget",
    config="train_baseline",
    weights="stages/baseline.pt",
)
ARMS = (
    PUBLISHED,
    NOISE_ONLY,
    Arm(
        "cross-attention",
        "the latent of the image is context of cross-attention, not concatenated",
        {
            **PUBLISHED.options,
            "condition_mode": "crossattn",
            "unet_def#in_channels": LATENT_CHANNELS,
            "unet_def#cross_attention_dim": LATENT_CHANNELS,
        },
    ),
    Arm(
        "frozen encoder",
        "the vision encoder stays the autoencoder's",
        {**PUBLISHED.options, "train_vision_encoder": False},
    ),
    BASELINE,
)
# The command sets these itself: the same for all arms, or what tells them apart.
_OWN = {
    **{"config_file": "overlay", "dataset_dir": "dataset_dir", "output_dir": "out", "seed": "seed"},
    **{"max_minutes": "minutes", "num_inference_steps": "steps", "run_id": None, "resume": None, "section": None},
    **{name: None for arm in ARMS for name in arm.options},
}


def chosen_arms(names: str | Sequence[str] | None) -> list[Arm]:
    """Arms by name, in the order of `ARMS`; None is all.

    Raises:
        ValueError: an unknown name, or no diffusion arm.
    """
    if names is None:
        return list(ARMS)
    words = names.strip("[]() ").split(",") if isinstance(names, str) else names
    wanted = [str(word).strip(" '\"") for word in words]
    known = {arm.name: arm for arm in ARMS}
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name.lower(), {known.lower(): known for known in known}, n=1)
            hint = f"did you mean {next(k for k in known if k.lower() == near[0])!r}? " if near else ""
            raise ValueError(f"arms: expected names out of {list(known)}, got {name!r}; {hint}give one of these.")
    if not any(known[name].is_diffusion for name in wanted):
        raise ValueError(
            f"arms: expected at least one diffusion arm, in whose evaluation {BASELINE.name} is measured, got "
            f"{wanted}; add {PUBLISHED.name!r}."
        )
    return [arm for arm in ARMS if arm.name in wanted]


def chosen_steps(steps: Any) -> list[int]:
    """Numbers of reverse steps in rising order; 1 is always among them.

    Raises:
        ValueError: anything but whole numbers from 1.
    """
    words = steps.strip("[]() ").split(",") if isinstance(steps, str) else steps
    try:
        numbers = [int(str(word)) for word in (words if isinstance(words, Sequence) else [words])]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ValueError(f"steps: expected whole numbers from 1, such as [1,2,4,10], got {steps!r}")
    return sorted({1, *numbers})


@dataclass(frozen=True)
class BundleCommands:
    """The configuration files of a bundle and what overrides them.

    Attributes:
        folder: of the bundle, in which its commands run.
        overlay: further configuration files, given last, as the commands name them.
        overrides: ids that the user overrides; a command gets those that its files define.
    """

    folder: Path
    overlay: tuple[str, ...] = ()
    overrides: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.overrides:
            if name in _OWN:
                option = _OWN[name]
                how = f"give --{option}" if option else "the arms differ in it, or all have it alike"
                raise ValueError(f"--{name}: expected an id that this command does not set itself; {how}.")
        parsers = [self._parser(names) for names in (["train", "evaluate"], ["train_baseline"])]
        for name in self.overrides:
            if not any(is_defined(name.removeprefix("+"), parser) for parser in parsers):
                ids = sorted({one for parser in parsers for one in parser.get()})
                near = difflib.get_close_matches(name, ids, n=1)
                hint = f"did you mean --{near[0]}?" if near else "look it up there."
                raise ValueError(
                    f"--{name}: expected an option of this command or an id of {self.folder}/configs, found none of "
                    f"that name; {hint}"
                )

    def files(self, names: Sequence[str]) -> list[str]:
        """Configuration files by name, then the overlays, relative to the bundle."""
        return [*(f"configs/{name}.json" for name in names), *self.overlay]

    def paths(self, names: Sequence[str]) -> list[Path]:
        """The same as paths."""
        return [self.folder / file for file in self.files(names)]

    def words(self, run_id: str, names: Sequence[str], options: Mapping[str, object]) -> tuple[str, ...]:
        """What follows `python -m`; `options` are overridden by the user's, those by nothing."""
        files = ",".join(f"'{file}'" for file in self.files(names))
        parser = self._parser(names)
        given = {name: value for name, value in self.overrides.items() if is_defined(name.removeprefix("+"), parser)}
        pairs = {**options, **given}
        start = ("monai.bundle", "run", run_id, f"--config_file=[{files}]")
        return (*start, *(f"--{name}={value}" for name, value in pairs.items()))

    def autoencoder(self, ckpt_dir: str | None, weights: str | None) -> Path:
        """The file of the first stage that all arms share.

        Args:
            ckpt_dir: folder of the bundle's weights; None is that of the configuration.
            weights: the file itself; None is the one in `ckpt_dir`.

        Raises:
            FileNotFoundError: it is not there; the message says how to make it.
        """
        parser = self._parser(["train"])
        parser["bundle_root"] = str(self.folder)
        if ckpt_dir is not None:
            parser["ckpt_dir"] = str(Path(ckpt_dir).resolve())
        path = Path(weights if weights is not None else parser.get_parsed_content("autoencoder_weights")).resolve()
        if not path.is_file():
            files = ",".join(f"'{file}'" for file in self.files(["train_autoencoder"]))
            raise FileNotFoundError(
                f"{path}: expected the weights of the autoencoder, which all arms share, found no such file; train it "
                f'(cd {self.folder} && python -m monai.bundle run training --config_file "[{files}]" --dataset_dir '
                "DIR --ckpt_dir MODELS), or convert a published one (python -m tools.convert_checkpoint kl_f8), and "
                "give --ckpt_dir MODELS or --autoencoder_weights FILE."
            )
        return path

    def _parser(self, names: Sequence[str]) -> ConfigParser:
        return ConfigParser(ConfigParser.load_config_files([str(path) for path in self.paths(names)]))
