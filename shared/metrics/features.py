# SPDX-License-Identifier: Apache-2.0
"""Feature extractors for distribution distances, agreement and the memorisation check.

An extractor is any callable ``(B, 1, H, W) in [0, 1] -> (B, F)`` with a ``name``, which every reported figure carries:
a distance of one network's features cannot be compared with another's. Nothing is fetched: weights are local files.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from shared.assets import missing_asset, verify_file
from shared.files import save_tensors
from shared.weights import load_weights

logger = logging.getLogger(__name__)

_XRV_ASSET = "xrv-densenet121-all"
_XRV_SIZE = 224  # input side of torchxrayvision's DenseNet121 weights ("densenet121-res224-*")


class FeatureExtractor(Protocol):
    """Images (B, 1, H, W) in [0, 1] -> features (B, F) on the CPU, float32."""

    name: str

    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...


def choose_features(
    preferred_path: str | os.PathLike[str],
    *,
    preferred: Callable[[str], FeatureExtractor],
    fallback: Callable[[], FeatureExtractor],
) -> FeatureExtractor:
    """The preferred features where their weights are at hand, else the stated alternative, with a sentence in the log.

    What is chosen shows in every figure, since the rows are named after the extractor. In a config both are components
    with ``"_mode_": "callable"``, so that only the chosen one is built.

    Args:
        preferred_path: weights of the preferred extractor.
        preferred: called with that path; its errors are not caught, so that a damaged file ends the run.
        fallback: called without arguments.
    """
    if Path(preferred_path).is_file():
        return preferred(os.fspath(preferred_path))
    extractor = fallback()
    logger.warning(
        "%s: no file, so distances are measured with %s instead; they cannot be compared with distances of others",
        os.fspath(preferred_path), extractor.name,
    )  # fmt: skip
    return extractor


def _xrv_densenet() -> nn.Module:
    """torchxrayvision's DenseNet121 without weights; the package is imported here since only this network needs it."""
    with warnings.catch_warnings():  # importing it silences all warnings of the whole process: keep that inside
        import torchxrayvision
    return torchxrayvision.models.DenseNet(weights=None)


def check_images(images: torch.Tensor) -> torch.Tensor:
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"images: expected (B, 1, H, W), got {tuple(images.shape)}")
    low, high = (float(v) for v in torch.aminmax(images.detach()))
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # false for NaN as well
        raise ValueError(f"images: expected finite values in [0, 1], got [{low:g}, {high:g}]; clamp them first")
    return images.detach().as_subclass(torch.Tensor).to(torch.float32)


class XrvDenseNetFeatures:
    """Features and findings of torchxrayvision's DenseNet121 (Cohen et al., arXiv:2111.00595) from a local file.

    Both the real and the generated images pass the network's own preprocessing: square centre crop, bilinear resize
    with antialiasing to 224 x 224, [0, 1] -> [-1024, 1024]. Features are ReLU of the last map, averaged over space, as
    in the package's ``features2``. (The published evaluation fed 512 x 512 images, one set in [0, 255] and the other in
    [0, 1], to the bare layers: its figure 9.02 cannot be compared with ours.)

    Args:
        weights_path: plain state dict, made once by :func:`convert_xrv_checkpoint`.
        sha256: of that file; None skips the comparison.
        device: where the network runs.
        batch_size: images per forward pass.

    Raises:
        FileNotFoundError: no such file; the message says how to get it.
        ValueError: other checksum, or not this network's weights.
    """

    name = "torchxrayvision DenseNet121 features"
    num_features = 1024

    def __init__(
        self,
        weights_path: str | Path,
        *,
        sha256: str | None = None,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
    ) -> None:
        if not Path(weights_path).is_file():
            raise missing_asset(_XRV_ASSET, weights_path, expected="the state dict that convert_xrv_checkpoint makes")
        verify_file(weights_path, sha256)
        network = _xrv_densenet()
        load_weights(network, weights_path)
        self.pathologies: list[str] = list(network.targets)  # type: ignore[arg-type]
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.network = network.eval().requires_grad_(False).to(self.device)

    @staticmethod
    def preprocess(images: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W) in [0, 1] -> (B, 1, 224, 224) in [-1024, 1024].

        Raises:
            ValueError: wrong shape, or values outside [0, 1].
        """
        x = check_images(images)
        side = min(x.shape[-2:])
        top, left = (x.shape[-2] - side) // 2, (x.shape[-1] - side) // 2
        x = x[..., top : top + side, left : left + side]
        if side != _XRV_SIZE:
            x = F.interpolate(x, size=(_XRV_SIZE, _XRV_SIZE), mode="bilinear", antialias=True)
        return (2 * x - 1) * 1024

    @torch.no_grad()
    def _batched(self, images: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        batches = images.split(self.batch_size)
        return torch.cat([function(self.preprocess(batch.to(self.device))).float().cpu() for batch in batches])

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W) in [0, 1] -> (B, 1024) float32 on the CPU, >= 0."""
        return self._batched(images, self.network.features2)  # type: ignore[arg-type]

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W) in [0, 1] -> (B, 18) probabilities in the order of ``pathologies`` (sigmoid, not calibrated)."""
        return self._batched(images, lambda x: torch.sigmoid(self.network(x)))


class ClassifierFeatures:
    """Penultimate-layer features and class probabilities of a small classifier trained on the user's own labels.

    The stated alternative where the torchxrayvision weights are not at hand: distances of these features are only
    comparable with distances of the same classifier's features, so ``name`` says whose they are.

    Args:
        network: module with ``features(images) -> (B, F)`` and ``forward(images) -> logits (B, K)``, such as
            :class:`shared.networks.finding_classifier.FindingClassifier`.
        weights_path: its state dict; None uses the network as it is (already loaded).
        sha256: of that file; None skips the comparison.
        name: printed with every figure.
        device: where the network runs.
        batch_size: images per forward pass.

    Raises:
        FileNotFoundError: no such file.
        ValueError: other checksum, or not this network's weights.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        weights_path: str | Path | None = None,
        sha256: str | None = None,
        name: str = "phantom-classifier features",
        device: torch.device | str = "cpu",
        batch_size: int = 64,
    ) -> None:
        if weights_path is not None:
            load_weights(network, weights_path, remedy="Train the classifier first, or give the path of its weights.")
            verify_file(weights_path, sha256)
        self.name = name
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.network: Any = network.to(self.device)

    @torch.no_grad()
    def _batched(self, images: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        was_training = self.network.training
        self.network.eval()
        try:
            batches = images.split(self.batch_size)
            return torch.cat([function(check_images(batch.to(self.device))).float().cpu() for batch in batches])
        finally:
            self.network.train(was_training)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W) in [0, 1] -> (B, F) float32 on the CPU."""
        return self._batched(images, self.network.features)

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W) in [0, 1] -> (B, K) probabilities that sum to 1."""
        return self._batched(images, lambda x: torch.softmax(self.network(x), dim=1))


def convert_xrv_checkpoint(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], *, sha256: str, trust_pickle: bool = False
) -> Path:
    """Turn torchxrayvision's released DenseNet121 file, a pickled module, into a plain state dict. Once, by hand.

    DANGER: loading a pickled module runs whatever code the file holds, with the user's rights. Nothing else in this
    project unpickles objects. Do it only with a file whose sha256 you have from a source you trust, best in a
    throw-away environment; the result loads with ``weights_only=True`` and is safe to share.

    Args:
        source: the downloaded file.
        destination: the state dict to write; must not exist.
        sha256: of ``source``; compared before it is opened.
        trust_pickle: must be True: the explicit consent to run the file's code.

    Returns:
        The path written.

    Raises:
        PermissionError: ``trust_pickle`` is not True.
        FileNotFoundError, FileExistsError: source missing, destination present.
        ValueError: other checksum, or not this network.
    """
    if trust_pickle is not True:
        raise PermissionError(
            f"{source}: this file is a pickled module and loading it runs the code it holds; read the docstring, then "
            "pass trust_pickle=True if you trust the file"
        )
    if not Path(source).is_file():
        raise missing_asset(_XRV_ASSET, source)
    verify_file(source, sha256)
    target = Path(destination)
    if target.exists():
        raise FileExistsError(f"{target}: expected a new file, found one; remove it or choose another name")
    network = _xrv_densenet()
    module = torch.load(source, map_location="cpu", weights_only=False)  # the consent above
    if not isinstance(module, nn.Module):
        raise ValueError(f"{source}: expected a pickled torchxrayvision network, got {type(module).__name__}")
    state = {key: value.clone() for key, value in module.state_dict().items() if key != "op_threshs"}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{source}: expected the weights of torchxrayvision's DenseNet121; {error}") from error
    save_tensors(state, target)
    return target
