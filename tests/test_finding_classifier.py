# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest
import torch
from monai.data import DataLoader, Dataset

from shared.networks.finding_classifier import FindingClassifier
from shared.transforms.labels import FINDINGS, FindingToIndexd, LabelsToTextd


def test_features_lead_to_the_logits() -> None:
    network = FindingClassifier().eval()
    images = torch.rand(2, 1, 48, 64)
    features = network.features(images)
    assert features.ndim == 2
    assert (features >= 0).all()
    torch.testing.assert_close(network.network.class_layers[-1](features), network(images))
    assert network(images).shape == (2, 7)
    assert 200_000 < sum(p.numel() for p in network.parameters()) < 500_000


def test_side_is_learnt() -> None:
    """A blob on the left or on the right of otherwise equal images: global averaging alone could not tell."""
    torch.manual_seed(0)
    network = FindingClassifier(num_classes=2, init_features=8, growth_rate=8, block_config=(2, 2))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)

    def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        images = 0.2 * torch.rand(16, 1, 32, 32, generator=generator)
        side = torch.randint(2, (16,), generator=generator)
        for image, right in zip(images, side, strict=True):
            row = int(torch.randint(4, 20, (1,), generator=generator))
            column = 4 + 16 * int(right) + int(torch.randint(4, (1,), generator=generator))
            image[0, row : row + 8, column : column + 6] += 0.6
        return images, side

    for step in range(40):
        images, side = batch(step)
        loss = torch.nn.functional.cross_entropy(network(images), side)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    images, side = batch(1000)
    assert (network(images).argmax(1) == side).float().mean() > 0.9


def test_small_or_wrong_images_are_refused() -> None:
    network = FindingClassifier()
    with pytest.raises(ValueError, match=r"every side >= 32, got \(1, 1, 31, 64\)"):
        network(torch.zeros(1, 1, 31, 64))
    with pytest.raises(ValueError, match="images: expected"):
        network(torch.zeros(1, 3, 64, 64))


def test_finding_to_index() -> None:
    transform = FindingToIndexd()
    item = {"labels": {"finding": "left_opacity", "severity": "small"}, "text": "x"}
    result = transform(item)
    assert result["label"].dtype == torch.int64
    assert int(result["label"]) == FINDINGS.index("left_opacity") == 4
    assert "label" not in item
    assert int(FindingToIndexd("name")({"name": "no_finding"})["label"]) == 0


def test_unknown_findings_are_named() -> None:
    with pytest.raises(ValueError, match="labels.finding: expected one of no_finding, .* got 'edema'"):
        FindingToIndexd()({"labels": {"finding": "edema"}})
    with pytest.raises(ValueError, match="labels: expected one of .* got None"):
        FindingToIndexd()({"text": "x"})
    with pytest.raises(ValueError, match="classes: expected at least two different names"):
        FindingToIndexd(classes=("a", "a"))


def test_labels_to_text_survive_a_data_loader() -> None:
    items = [
        {"labels": {"Edema": 1.0, "finding": "left_opacity"}},
        {"labels": {"Fracture": -1.0}},
        {},
        {"labels": None},
    ]
    (batch,) = DataLoader(Dataset(items, LabelsToTextd()), batch_size=4)
    assert [json.loads(text) for text in batch["labels"]] == [items[0]["labels"], items[1]["labels"], {}, {}]
    assert items[2] == {}
    assert LabelsToTextd("state")({"state": {"a": 1}}) == {"state": '{"a": 1}'}


def test_labels_that_are_no_dictionary_are_named() -> None:
    with pytest.raises(ValueError, match="labels: expected a dictionary, name -> value, got 'edema'"):
        LabelsToTextd()({"labels": "edema"})
    with pytest.raises(ValueError, match="labels: expected texts and numbers, got "):
        LabelsToTextd()({"labels": {"edema": torch.zeros(1)}})
