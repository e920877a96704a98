# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision

from shared.metrics.features_radimagenet import RadImageNetFeatures

IMAGES = torch.rand(3, 1, 64, 96, generator=torch.Generator().manual_seed(0))
CHILDREN = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
BGR_MEANS = (0.406, 0.456, 0.485)


@pytest.fixture(scope="module")
def torchvision_state() -> dict[str, torch.Tensor]:
    """Random weights of torchvision's own network, with the running moments of real use."""
    torch.manual_seed(0)
    network = torchvision.models.resnet50(weights=None, num_classes=165)
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand_like(buffer) * (1.0 if "var" in name else 0.1) + 0.1 * ("var" in name))
    return network.state_dict()


@pytest.fixture(scope="module")
def keras_state(torchvision_state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layout of RadImageNet-ResNet50_notop.pth: a bias in each convolution, no classification layer."""
    state = {name: value for name, value in torchvision_state.items() if not name.startswith("fc.")}
    for name, value in list(state.items()):
        if value.ndim == 4:
            state[name.replace("weight", "bias")] = 0.1 * torch.randn(len(value))
    return state


def _sequential(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of the authors' PyTorch example: backbone.<place in torchvision's children>."""
    parts = [(name.partition("."), value) for name, value in state.items() if not name.startswith("fc.")]
    return {f"backbone.{CHILDREN[child]}.{rest}": value for (child, _, rest), value in parts}


def _keras_resnet(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """ResNet-50 as in keras.applications, written down once more: stride in the first 1 x 1, epsilon 1.001e-5."""

    def unit(x: torch.Tensor, conv: str, norm: str, stride: int = 1, padding: int = 0) -> torch.Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], state[f"{conv}.bias"], stride=stride, padding=padding)
        moments = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        return F.batch_norm(x, *moments, state[f"{norm}.weight"], state[f"{norm}.bias"], eps=1.001e-5)

    x = F.max_pool2d(F.relu(unit(x, "conv1", "bn1", 2, 3)), 3, 2, 1)
    for level, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            at, stride = f"layer{level}.{block}", 2 if level > 1 and block == 0 else 1
            y = F.relu(unit(x, f"{at}.conv1", f"{at}.bn1", stride))
            y = F.relu(unit(y, f"{at}.conv2", f"{at}.bn2", 1, 1))
            y = unit(y, f"{at}.conv3", f"{at}.bn3")
            short = unit(x, f"{at}.downsample.0", f"{at}.downsample.1", stride) if block == 0 else x
            x = F.relu(y + short)
    return x.mean((2, 3))


def _inputs() -> torch.Tensor:
    return torch.cat([IMAGES - mean for mean in BGR_MEANS], dim=1)


def test_preprocessing_is_the_published_one() -> None:
    rgb = IMAGES.expand(-1, 3, -1, -1)
    published = rgb[:, [2, 1, 0]].clone()
    for channel, mean in enumerate(BGR_MEANS):
        published[:, channel] -= mean
    torch.testing.assert_close(RadImageNetFeatures.preprocess(IMAGES), published)
    with pytest.raises(ValueError, match=r"images: expected finite values in \[0, 1\], got \[0, 255\]"):
        RadImageNetFeatures.preprocess(torch.tensor([0.0, 255.0]).view(1, 1, 1, 2))


@pytest.mark.parametrize("layout", ["torchvision", "backbone"])
def test_the_pytorch_release_is_torchvisions_network(
    torchvision_state: dict[str, torch.Tensor], tmp_path: Path, layout: str
) -> None:
    path = tmp_path / "ResNet50.pt"
    torch.save(torchvision_state if layout == "torchvision" else _sequential(torchvision_state), path)
    extractor = RadImageNetFeatures(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), batch_size=2)
    reference = torchvision.models.resnet50(weights=None, num_classes=165)
    reference.load_state_dict(torchvision_state)
    reference.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = reference.eval()(_inputs())
    features = extractor(IMAGES)
    assert features.shape == (3, 2048)
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
    assert extractor.name == "RadImageNet ResNet-50 features, PyTorch release"


@pytest.mark.parametrize("layout", ["torchvision", "backbone"])
def test_the_keras_release_is_kerass_network(keras_state: dict[str, torch.Tensor], tmp_path: Path, layout: str) -> None:
    path = tmp_path / "RadImageNet-ResNet50_notop.pth"
    torch.save(keras_state if layout == "torchvision" else _sequential(keras_state), path)
    extractor = RadImageNetFeatures(path)
    with torch.no_grad():
        expected = _keras_resnet(keras_state, _inputs())
    torch.testing.assert_close(extractor(IMAGES), expected, rtol=1e-3, atol=1e-4)
    assert extractor.name == "RadImageNet ResNet-50 features, Keras release"


def test_missing_and_wrong_weights_are_named(torchvision_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "rad.pt"
    with pytest.raises(
        FileNotFoundError, match=r"rad.pt: radimagenet-resnet50 was not found here .*AutoencoderFeatures"
    ):
        RadImageNetFeatures(path)
    small = {"backbone.0.weight": torch.zeros(64, 3, 7, 7)}
    for content, message in (
        (small, "backbone.1.weight is missing"),
        ({"other": torch.zeros(1)}, "conv1.weight is missing"),
        (["list"], "a list instead of a state dict"),
        (torchvision_state | {"extra": torch.zeros(1)}, "extra is not part of the network"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"rad.pt: expected the weights of this configuration.*{message}"):
            RadImageNetFeatures(path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=r"rad.pt: expected a state dict of plain tensors"):
        RadImageNetFeatures(path)
    with pytest.raises(ValueError, match=r"rad.pt: expected sha256 0+, got"):
        RadImageNetFeatures(path, sha256="0" * 64)
