# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics import compute_roc_auc

from shared.metrics.agreement import PromptAgreement, area_under_roc, pathology_auroc

NAMES = ("a", "b", "c", "d", "e", "f", "g")


def test_agreement_by_hand() -> None:
    result = PromptAgreement(NAMES[:3])(torch.tensor([0, 0, 1, 2]), ["a", "b", "b", "c"])
    assert result.overall[0] == 0.75
    assert result.overall.n == 4
    np.testing.assert_array_equal(result.confusion, [[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    assert result.per_class["b"] is not None
    assert (result.per_class["b"].value, result.per_class["b"].n) == (0.5, 2)
    assert "b      1     1     0" in result.table()


def test_perfect_samples_and_the_wrong_prompt_control() -> None:
    """Sorted prompts: one roll by 1 would match 6 of 7 neighbours; the mean over all rolls is (n_k - 1) / (n - 1)."""
    prompted = torch.arange(7).repeat_interleave(20)
    result = PromptAgreement(NAMES)(torch.nn.functional.one_hot(prompted, 7).float(), prompted)
    assert result.overall.value == 1.0
    assert result.overall.low > 0.95
    rolls = [(torch.roll(prompted, r) == prompted).float().mean().item() for r in range(1, 140)]
    assert result.wrong_prompt.value == pytest.approx(np.mean(rolls), abs=1e-6)
    assert result.wrong_prompt.value == pytest.approx(19 / 139)
    assert abs(result.wrong_prompt.value - 1 / 7) < 0.01


def test_a_generator_that_ignores_its_prompt_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    prompted = torch.randint(7, (300,), generator=generator)
    guessed = torch.randint(7, (300,), generator=generator)
    result = PromptAgreement(NAMES)(guessed, prompted)
    assert result.overall.low < result.wrong_prompt.value < result.overall.high
    assert result.wrong_prompt.low < 1 / 7 < result.wrong_prompt.high


def test_class_without_samples_has_no_value() -> None:
    assert PromptAgreement(NAMES[:2])([0, 0], [0, 0]).per_class["b"] is None


def test_bad_classes_are_named() -> None:
    agreement = PromptAgreement(NAMES[:3])
    with pytest.raises(ValueError, match="prompted: expected one of a, b, c, got 'z'"):
        agreement([0], ["z"])
    with pytest.raises(ValueError, match="predicted: expected class indices 0 to 2, got 0 to 3"):
        agreement([0, 3], [0, 1])
    with pytest.raises(ValueError, match="predicted: expected 3 columns, got 7"):
        agreement(torch.zeros(1, 7), [0])
    with pytest.raises(ValueError, match="got 1 for 2"):
        agreement([0], [0, 1])
    with pytest.raises(ValueError, match="class_names: expected"):
        PromptAgreement(["a", "a"])


def test_area_equals_monai_and_covers() -> None:
    generator = np.random.default_rng(0)
    labels = (generator.random(60) < 0.4).astype(float)
    scores = np.round(generator.normal(labels, 1), 1)  # rounding makes ties
    expected = compute_roc_auc(torch.tensor(scores), torch.tensor(labels))
    assert area_under_roc(scores, labels).value == pytest.approx(expected, abs=1e-9)
    truth, covered = 0.760250, 0  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt(2))
    for _ in range(200):
        labels = np.arange(60) % 2
        interval = area_under_roc(generator.normal(labels, 1), labels)
        covered += interval.low <= truth <= interval.high
    assert 178 <= covered <= 199


def test_area_excludes_unknown_and_needs_both_kinds() -> None:
    area = area_under_roc([0.1, 0.2, 0.8, 0.9, 0.0], [0, 0, 1, 1, np.nan])
    assert area == (1.0, 1.0, 1.0, 4)
    assert np.isnan(area_under_roc([0.1, 0.2, 0.3], [0, 0, 1]).value)
    with pytest.raises(ValueError, match="scores: expected 2 finite values"):
        area_under_roc([0.1, np.nan], [0, 1])


def test_pathologies_with_one_kind_only_are_left_out() -> None:
    labels = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    probabilities = torch.tensor([0.1, 0.3, 0.2, 0.9])[:, None].expand(4, 3)
    areas = pathology_auroc(probabilities, labels, ["Effusion", "Edema", ""])
    assert list(areas) == ["Effusion"]
    assert areas["Effusion"].value == 0.75
    with pytest.raises(ValueError, match="labels: expected the shape"):
        pathology_auroc(probabilities, labels[:, :2], ["Effusion", "Edema", ""])
