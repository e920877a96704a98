# SPDX-License-Identifier: Apache-2.0
"""Every training of every bundle in this process: very small networks, a handful of items, two epochs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow

from tests import stage_gang
from tests.bundle_runs import BundleRuns

STAGES = tuple(stage_gang.SMALL)
ADVERSARIAL = tuple(stage_gang.ADVERSARIAL)
CLASSIFIER = stage_gang.CLASSIFIER


def prepare(folder: Path) -> Path:
    """Phantoms and random weights of the stages before, for `loaded`."""
    return stage_gang.prepare(folder)


@contextlib.contextmanager
def loaded(stage: str, data: Path, root: Path, /, **overrides: Any) -> Iterator[ConfigWorkflow]:
    """The small workflow of a stage (``sdseg train``) on what `prepare` made, writing below ``root``.

    Latents and volumes are encoded once and kept beside the data.
    """
    options = stage_gang.options(stage, "whole", data, world=1)
    options |= {"ckpt_dir": str(root / "models"), "output_dir": str(root / "run"), "adversarial_start": 1}
    if "latent_cache_dir" in options:
        options["latent_cache_dir"] = str(data / "latents" / stage.replace(" ", "_"))
    if stage not in ADVERSARIAL:
        options.pop("adversarial_start")
    bundle, config = stage.split()
    overlays = [] if stage == CLASSIFIER else ["tiny"]
    with BundleRuns(bundle, {}).loaded(config, *overlays, **{**options, **overrides}) as workflow:
        yield workflow
