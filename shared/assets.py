# SPDX-License-Identifier: Apache-2.0
"""Pretrained files the bundles can use: what they are, where they come from, and whether a local copy is intact.

Nothing here reaches for the network except `fetch_asset`, which only ``python -m tools.assets fetch`` calls.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import urllib.request
from pathlib import Path

from shared.files import atomic_path, sha256_of_file

# Eight digits are what torchvision's file names carry, and what torch.hub itself compares.
_SHORTEST_SHA256 = 8


@dataclasses.dataclass(frozen=True)
class Asset:
    """One pretrained file or folder.

    Attributes:
        name: how commands and messages call it.
        path: file or folder below the assets folder (or below the package that carries it).
        purpose: what it is for.
        used_by: where the configs name it.
        without: how to work without it.
        licence: terms of the weights.
        url: official download, None where there is none.
        mirror: second source, None where none is known to be official.
        size_bytes: None where we have not measured the official file.
        sha256: checksum, or its beginning (at least 8 digits) where that is all the publisher states, or None.
        package: Python package that carries the file, None for a file of its own.
        note: what else the user must know.
    """

    name: str
    path: str
    purpose: str
    used_by: str
    without: str
    licence: str
    url: str | None = None
    mirror: str | None = None
    size_bytes: int | None = None
    sha256: str | None = None
    package: str | None = None
    note: str = ""


ASSETS: tuple[Asset, ...] = (
    Asset(
        name="sd21-text-encoder",
        path="stable-diffusion-2-1-base/text_encoder",
        purpose="text encoder that turns prompts into the 77 x 1024 context of the published chest X-ray model",
        used_by="cxr_ldm: text_encoder (shared.networks.text_encoder.FrozenClipTextEncoder); tools.embed_prompt",
        without="use shared.networks.text_encoder.TransformerTextEncoder, which is trained with the U-Net",
        licence="CreativeML Open RAIL++-M",
        note=(
            "Folder `text_encoder` (config.json, model.safetensors) of stabilityai/stable-diffusion-2-1-base. That "
            "repository has left the Hugging Face hub, so it must come from a copy of your own; we have none and "
            "therefore state no checksum: write down the sha256 of yours (`python -m tools.assets check` prints it) "
            "and set it in the config. No tokenizer is needed: the vocabulary is in bundles/cxr_ldm/models/tokenizer."
        ),
    ),
    Asset(
        name="squeezenet1_1",
        path="squeezenet1_1-b8a52dc0.pth",
        purpose="network trunk of the perceptual loss LPIPS-squeeze",
        used_by="train_autoencoder of all bundles: perceptual_def (shared.perceptual.LpipsSqueeze); sdseg evaluate",
        without='train with --perceptual_trunk "": reconstructions become a little smoother',
        licence="BSD-3-Clause (torchvision); trained on ImageNet",
        url="https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
        sha256="b8a52dc0",
        note="The publisher states the first eight digits of the checksum, in the file name.",
    ),
    Asset(
        name="lpips-squeeze-linear",
        path="weights/v0.1/squeeze.pth",
        purpose="linear layers of the perceptual loss LPIPS-squeeze",
        used_by="shared.perceptual.LpipsSqueeze",
        without='train with --perceptual_trunk ""',
        licence="BSD-2-Clause",
        size_bytes=10811,
        sha256="4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
        package="lpips",
        note="Part of the Python package lpips 0.1.4; the checksum was computed from that package.",
    ),
    Asset(
        name="xrv-densenet121-all",
        path="nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt",
        purpose="classifier (torchxrayvision densenet121-res224-all) behind FID and the agreement metrics",
        used_by="cxr_ldm evaluate.json: xrv_weights, models/pretrained/xrv_densenet121_all.pt, made from this file",
        without="evaluate without FID; the other metrics need no pretrained network",
        licence="Apache-2.0 (torchxrayvision); trained on eight data sets with terms of their own",
        url=(
            "https://github.com/mlmed/torchxrayvision/releases/download/v1/"
            "nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt"
        ),
        note=(
            "The publisher states no checksum. The file is a pickled module, which runs code when it is opened. "
            "Convert it once: `python -m tools.convert_checkpoint xrv --source FILE --out "
            "bundles/cxr_ldm/models/pretrained/xrv_densenet121_all.pt --sha256 DIGEST --trust_pickle True` "
            "(shared.metrics.features.convert_xrv_checkpoint). evaluate.json reads the result."
        ),
    ),
    Asset(
        name="radimagenet-resnet50",
        path="RadImageNet-ResNet50_notop.pth",
        purpose="network (ResNet-50 trained on RadImageNet, from Keras) behind the published FID of brain images",
        used_by="shared.metrics.features_radimagenet.RadImageNetFeatures",
        without=(
            "use features of your own autoencoder (shared.metrics.features_autoencoder.AutoencoderFeatures); such a "
            "distance cannot be compared with the published one"
        ),
        licence="not stated for the weights; the code of BMEII-AI/RadImageNet is under the MIT licence",
        url="https://huggingface.co/MONAI/checkpoints/resolve/main/RadImageNet-ResNet50_notop.pth",
        note=(
            "We have no copy and therefore state no checksum; the address was read in public code and not tried. The "
            "published evaluation took the file of the same name through torch.hub Warvito/radimagenet-models. "
            "The authors' PyTorch release (ResNet50.pt, github.com/BMEII-AI/RadImageNet) is read too and is another "
            "network: its distances are reported under another name."
        ),
    ),
)


def get_asset(name: str) -> Asset:
    """Row of the table.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    for asset in ASSETS:
        if asset.name == name:
            return asset
    raise ValueError(f"{name}: unknown asset, expected one of {', '.join(asset.name for asset in ASSETS)}")


def asset_path(name: str, folder: str | os.PathLike = "pretrained") -> Path:
    """Where the asset lies: inside the installed package that carries it, or below ``folder``."""
    asset = get_asset(name)
    if asset.package is None:
        return Path(folder) / asset.path
    # find_spec looks the package up without running it.
    spec = importlib.util.find_spec(asset.package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{asset.package}: this Python package carries {name} and is not installed; pip install it"
        )
    return Path(spec.submodule_search_locations[0]) / asset.path


def missing_asset(name: str, path: str | os.PathLike, *, expected: str = "") -> FileNotFoundError:
    """Error that says what is missing, why it is needed, where it was looked for, how to get it or do without it."""
    asset = get_asset(name)
    if asset.url is not None:
        source = (
            f"on a connected machine run `python -m tools.assets fetch {name}` (from {asset.url}) and copy the result"
        )
    elif asset.package is not None:
        source = f"install the Python package {asset.package}"
    else:
        source = "copy it from a machine that has it"
    return FileNotFoundError(
        f"{path}: {name} was not found here (looked at {Path(path).absolute()}"
        + (f", expected {expected}" if expected else "")
        + f"). It is the {asset.purpose}. "
        f"To get it, {source}. Checksum (sha256): {asset.sha256 or 'none stated by the publisher'}. "
        f"To do without it, {asset.without}." + (f" {asset.note}" if asset.note else "")
    )


def verify_file(path: str | os.PathLike, sha256: str | None) -> str:
    """SHA-256 of a file (64 hexadecimal digits), after comparing it with ``sha256`` unless that is None.

    Args:
        path: the file.
        sha256: expected digest, or its first digits (8 or more; torchvision states 8).

    Raises:
        FileNotFoundError: no such file.
        ValueError: another digest, or ``sha256`` is not one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file not found (looked at {path.absolute()})")
    actual = sha256_of_file(path)
    if sha256 is None:
        return actual
    expected = sha256.lower()
    if not _SHORTEST_SHA256 <= len(expected) <= 64 or set(expected) - set("0123456789abcdef"):
        raise ValueError(f"sha256: expected 64 hexadecimal digits (or the first 8 or more) for {path}, got {sha256!r}")
    if not actual.startswith(expected):
        raise ValueError(
            f"{path}: expected sha256 {expected}, got {actual} ({path.stat().st_size} bytes); the file is damaged or "
            "another version. Delete it and get it anew, or correct the checksum in the config if you trust this file"
        )
    return actual


def check_asset(name: str, folder: str | os.PathLike = "pretrained") -> tuple[str, str]:
    """Status of a local copy and a sentence about it.

    Status is "ok" (checksum matches), "unverified" (present, no checksum is known), "missing" or "damaged".
    """
    asset = get_asset(name)
    try:
        path = asset_path(name, folder)
    except FileNotFoundError as error:
        return "missing", str(error)
    if path.is_dir():
        digests = [f"{file.name} {sha256_of_file(file)}" for file in sorted(path.iterdir()) if file.is_file()]
        return (
            ("unverified", f"{path}: sha256 {', '.join(digests)}") if digests else ("missing", f"{path}: empty folder")
        )
    if not path.is_file():
        return "missing", str(missing_asset(name, path))
    try:
        digest = verify_file(path, asset.sha256)
    except ValueError as error:
        return "damaged", str(error)
    return ("ok" if asset.sha256 else "unverified"), f"{path}: sha256 {digest}"


def fetch_asset(name: str, folder: str | os.PathLike = "pretrained", *, timeout: float = 60.0) -> Path:
    """Download an asset into ``folder``, check it, and return its path. An intact copy is left alone.

    Args:
        name: row of the table.
        folder: assets folder, made if needed.
        timeout: seconds without an answer before giving up.

    Raises:
        ValueError: there is no download for this asset, or the checksum differs (nothing is kept then).
        OSError: the connection failed; the message starts with the address.
    """
    asset = get_asset(name)
    path = asset_path(name, folder)
    if asset.url is None:
        raise ValueError(f"{name}: cannot be downloaded. {missing_asset(name, path)}")
    if path.is_file():
        verify_file(path, asset.sha256)
        return path
    failures = []
    for url in filter(None, (asset.url, asset.mirror)):
        try:
            with atomic_path(path) as temporary:
                with urllib.request.urlopen(url, timeout=timeout) as response, temporary.open("wb") as file:
                    while block := response.read(1 << 20):
                        file.write(block)
                try:
                    verify_file(temporary, asset.sha256)
                except ValueError as error:
                    raise ValueError(f"{url}: the download does not have the stated checksum; {error}") from error
            return path
        except OSError as error:
            failures.append(f"{url}: {error}")
    raise OSError("; ".join(failures) + f". Download it by hand to {path} and run `python -m tools.assets check`")
