# SPDX-License-Identifier: Apache-2.0
"""Features of a ResNet-50 trained on RadImageNet (Mei et al. 2022, doi 10.1148/ryai.210315) from a local file."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from shared.assets import missing_asset, verify_file
from shared.metrics.features import check_images
from shared.weights import load_weights

_ASSET = "radimagenet-resnet50"
# Means of ImageNet in the order blue, green, red, as the published evaluation subtracts them.
_MEAN_BGR = (0.406, 0.456, 0.485)
# torch.nn.Sequential of the first nine children of torchvision's ResNet, as in the authors' PyTorch example.
_CHILDREN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")
_KERAS_EPSILON = 1.001e-5


class RadImageNetFeatures:
    """Spatial mean of the last feature map (2048 channels) of a RadImageNet ResNet-50.

    Preprocessing is that of the published evaluation for every file: the grey image in three channels, red-green-blue
    turned into blue-green-red, (0.406, 0.456, 0.485) subtracted from [0, 1], no division, no resizing. (The authors'
    own PyTorch example scales to [-1, 1] instead, their Keras code does as here; see BMEII-AI/RadImageNet issue 18.)

    Two public files are different networks, so ``name``, which every figure carries, says which one was read:

    - ``RadImageNet-ResNet50_notop.pth``, converted from Keras: torchvision's names with a bias in each convolution;
      blocks that halve the resolution do so in the first 1 x 1 convolution, and batch normalisation adds 1.001e-5. The
      published FID used this one. In torchvision's network, whose 3 x 3 convolution halves, the same weights would run
      without an error and give other features.
    - ``ResNet50.pt``, the authors' PyTorch release: torchvision's ResNet-50 under the names ``backbone.<n>...``.

    Either layout of names is read for either network; a classification layer ``fc`` is ignored.

    Args:
        weights_path: state dict of plain tensors.
        sha256: of that file; None skips the comparison.
        device: where the network runs.
        batch_size: images per forward pass.

    Raises:
        FileNotFoundError: no such file; the message says how to get it or to do without.
        ValueError: other checksum, or not this network's weights.
    """

    num_features = 2048

    def __init__(
        self,
        weights_path: str | Path,
        *,
        sha256: str | None = None,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
    ) -> None:
        if not Path(weights_path).is_file():
            raise missing_asset(_ASSET, weights_path, expected="a state dict of its ResNet-50")
        verify_file(weights_path, sha256)
        shapes = _shapes(weights_path)
        keras = any(name.endswith(("conv1.bias", "backbone.0.bias")) for name in shapes)
        network = _resnet50(keras_layout=keras)
        if any(name.startswith("backbone.") for name in shapes):
            trunk = nn.Sequential(*(getattr(network, name) for name in _CHILDREN))
            load_weights(nn.ModuleDict({"backbone": trunk}), weights_path)
        else:
            if "fc.weight" in shapes:
                network.fc = nn.Linear(self.num_features, shapes["fc.weight"][0])
            load_weights(network, weights_path)
            network.fc = nn.Identity()
        self.name = f"RadImageNet ResNet-50 features, {'Keras' if keras else 'PyTorch'} release"
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.network = network.eval().requires_grad_(False).to(self.device)

    @staticmethod
    def preprocess(images: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W) in [0, 1] -> (B, 3, H, W), channels blue, green, red.

        Raises:
            ValueError: wrong shape, or values outside [0, 1].
        """
        grey = check_images(images)
        # The three channels of a grey image are equal, so that turning red-green-blue around changes the means only.
        return grey - grey.new_tensor(_MEAN_BGR).view(1, 3, 1, 1)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W) in [0, 1] -> (B, 2048) float32 on the CPU, >= 0."""
        batches = (self.preprocess(batch.to(self.device)) for batch in images.split(self.batch_size))
        return torch.cat([self.network(batch).float().cpu() for batch in batches])


def _resnet50(*, keras_layout: bool) -> nn.Module:
    """torchvision's ResNet-50 without weights and without a classification layer: images -> spatial means."""
    import torchvision  # here, since only this network needs it

    network = torchvision.models.resnet50(weights=None)
    network.fc = nn.Identity()
    if keras_layout:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.bias = nn.Parameter(torch.zeros(module.out_channels))
            elif isinstance(module, nn.BatchNorm2d):
                module.eps = _KERAS_EPSILON
            elif isinstance(module, torchvision.models.resnet.Bottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    return network


def _shapes(path: str | Path) -> dict[str, torch.Size]:
    """Name -> shape of what the file holds; nothing where it does not load, which ``load_weights`` then explains."""
    content: object = None
    with contextlib.suppress(RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError, ValueError):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    tensors = content.items() if isinstance(content, Mapping) else ()
    return {str(name): value.shape for name, value in tensors if isinstance(value, torch.Tensor)}
