# SPDX-License-Identifier: Apache-2.0
"""Answer a request as monailabel 0.8.5 does in its ``BundleInferTask``, without its server."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from tests.conftest import ROOT


def answer(task: str, image: str | Path, **params: Any) -> dict[str, Any]:
    """What the transforms of a bundle with its demo weights leave of a request; a file is at ``pred``.

    Args:
        task: name of the bundle.
        image: path of the input, as MONAI Label makes it of an id; "" for an unknown one.
        params: of the client.
    """
    folder = ROOT / "bundles" / task
    config = ConfigParser()
    config.read_config([str(folder / f"configs/{name}.json") for name in ("inference", "tiny")])
    config.config.update({"bundle_root": str(folder)})
    config["inferer"]["progress"] = False
    shown = config.get_parsed_content("displayable_configs")
    data: dict[str, Any] = {**copy.deepcopy(shown), "device": "cpu", "model": task, "image": str(image), **params}
    data["image_path"] = data["image"]
    config["displayable_configs"].update({name: data[name] for name in shown})
    config.parse()
    config.config.update({"device": "cpu"})
    for transform in config.get_parsed_content("preprocessing").transforms:
        data = transform(data)
    # MONAI Label builds it when it starts; requests that are refused need none.
    network = config.get_parsed_content("network_def")
    network.load_state_dict(torch.load(folder / "models/tiny/model.pt", weights_only=True))
    with torch.no_grad():
        data["pred"] = config.get_parsed_content("inferer")(data["image"][None], network.eval())[0]
    for transform in config.get_parsed_content("postprocessing").transforms:
        data = transform(data)
    return data
