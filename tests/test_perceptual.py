# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torchvision.models import squeezenet1_1

from shared.files import sha256_of_file
from shared.perceptual import LpipsSqueeze


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("trunk") / "squeezenet1_1.pth"
    torch.save(squeezenet1_1(weights=None).state_dict(), path)
    return path


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 65, 50, generator=generator), torch.rand(2, 3, 65, 50, generator=generator)


@pytest.fixture(scope="module")
def reference(trunk):
    lpips = pytest.importorskip("lpips")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips builds its trunk with torchvision's deprecated arguments
        network = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    state = torch.load(trunk, weights_only=True)
    network.net.load_state_dict(
        {key: state["features." + key.split(".", 1)[1]] for key in network.net.state_dict()}, strict=True
    )
    return network


@pytest.mark.parametrize("normalize", [True, False])
def test_parity_with_lpips(trunk, images, reference, normalize):
    loss = LpipsSqueeze(trunk, normalize=normalize, reduction="none")
    expected = reference(*images, normalize=normalize).flatten().detach()
    torch.testing.assert_close(loss(*images), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(LpipsSqueeze(trunk, normalize=normalize)(*images), expected.mean(), rtol=1e-5, atol=1e-7)


def test_gradient_parity_with_lpips(trunk, images, reference):
    x, y = images
    x = x.clone().requires_grad_()
    (ours,) = torch.autograd.grad(LpipsSqueeze(trunk)(x, y), x)
    (theirs,) = torch.autograd.grad(reference(x, y, normalize=True).mean(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-8)


def test_grey_equals_three_equal_channels(trunk, images):
    loss = LpipsSqueeze(trunk)
    x, y = (image[:, :1] for image in images)
    assert torch.equal(loss(x, y), loss(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))


def test_a_distance(trunk, images):
    loss, (x, y) = LpipsSqueeze(trunk), images
    assert loss(x, x) == 0
    assert loss(x, y) > 0
    torch.testing.assert_close(loss(x, y), loss(y, x))
    assert loss(x, x + 0.01 * (y - x)) < loss(x, y)


def test_gradient_is_finite_where_all_features_are_zero(trunk, tmp_path, reference):
    state = torch.load(trunk, weights_only=True)
    state["features.0.bias"] = torch.full_like(state["features.0.bias"], -100.0)
    torch.save(state, tmp_path / "dead.pth")
    x = torch.rand(1, 1, 32, 32, requires_grad=True)
    LpipsSqueeze(tmp_path / "dead.pth")(x, torch.rand(1, 1, 32, 32)).backward()
    assert torch.isfinite(x.grad).all()


def test_frozen_and_in_no_checkpoint(trunk, images):
    loss = LpipsSqueeze(trunk)
    parent = nn.Sequential(loss, nn.Linear(1, 1)).train()
    assert list(parent.state_dict()) == ["1.weight", "1.bias"]
    assert len(list(parent.parameters())) == 2
    assert not loss.frozen.training
    assert not any(parameter.requires_grad for parameter in loss.frozen.parameters())
    assert copy.deepcopy(parent)[0].frozen is loss.frozen
    parent.to(torch.float64)
    assert loss.frozen.scale.dtype == torch.float64


def test_mixed_precision_does_not_change_it(trunk, images):
    loss = LpipsSqueeze(trunk)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(*images), loss(*images).float())
        mixed = loss(*images)
    assert torch.equal(mixed, loss(*images))


def test_construction_draws_no_random_numbers(trunk):
    before = torch.get_rng_state()
    LpipsSqueeze(trunk)
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_trunk_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        LpipsSqueeze(tmp_path / "absent.pth")
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "absent.pth"))
    for words in ("tools.assets fetch squeezenet1_1", "b8a52dc0", '--perceptual_trunk ""'):
        assert words in message


def test_wrong_files_are_refused(trunk, tmp_path):
    with pytest.raises(ValueError, match=r"squeezenet1_1\.pth: expected sha256 b8a52dc0, got "):
        LpipsSqueeze(trunk, trunk_sha256="b8a52dc0")
    LpipsSqueeze(trunk, trunk_sha256=sha256_of_file(trunk))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: not the weights of torchvision's SqueezeNet"):
        LpipsSqueeze(tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: not the LPIPS linear layers"):
        LpipsSqueeze(trunk, linear_path=tmp_path / "other.pth")
    torch.save({f"lin{i}.model.1.weight": torch.zeros(1, 8, 1, 1) for i in range(7)}, tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match=r"narrow\.pth: expected LPIPS linear layers of the shapes"):
        LpipsSqueeze(trunk, linear_path=tmp_path / "narrow.pth")


def test_argument_and_shape_errors(trunk):
    with pytest.raises(ValueError, match="reduction: expected 'mean' or 'none', got 'sum'"):
        LpipsSqueeze(trunk, reduction="sum")
    loss = LpipsSqueeze(trunk)
    for shape, other in (((1, 2, 32, 32), (1, 2, 32, 32)), ((1, 1, 32, 32), (1, 1, 32, 31)), ((1, 1, 16, 32),) * 2):
        with pytest.raises(ValueError, match=r"input, target: expected .* sides of at least 17"):
            loss(torch.rand(shape), torch.rand(other))
    assert torch.isfinite(loss(torch.rand(1, 1, 17, 17), torch.rand(1, 1, 17, 17)))
