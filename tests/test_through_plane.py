# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch

from shared.metrics.through_plane import ThroughPlaneConsistency, UncertaintyCorrelation
from tests.translations import X, Y
from tests.translations import collected as _collected
from tests.translations import mask as _mask
from tests.translations import smooth as _smooth


def _volumes(seed: int = 0) -> dict[str, Any]:
    """Two subjects of 6 and 4 slices that change slowly, rows out of order, a gap in B, two sessions of A."""
    ends = _smooth(4, seed)
    ramps = [ends[0] + (ends[1] - ends[0]) * k / 5 for k in range(6)]
    ramps += [ends[2] + (ends[3] - ends[2]) * k / 7 for k in (0, 1, 6, 7)]
    order = [3, 0, 9, 5, 1, 8, 2, 7, 4, 6]
    info = {
        "subject": ["A" if i < 6 else "B" for i in order],
        "session": ["1" if i < 3 else "2" if i < 6 else "" for i in order],
        "slice": [[0, 1, 2, 3, 4, 5, 0, 1, 6, 7][i] for i in order],
    }
    real = torch.stack([ramps[i] for i in order])
    return {"image": real, "pred": real.clone(), "info": info}


def test_through_plane_change_is_one_for_the_truth_and_more_for_flicker() -> None:
    collected, measure = _volumes(), ThroughPlaneConsistency()
    result = measure(collected)
    (row,) = result.rows
    assert row["value"] == pytest.approx(1.0)
    # sessions of A: 0-1, 1-2 and 3-4, 4-5; B: 0-1 and 6-7, not 1-6
    assert [(line["subject"], line["pairs"]) for line in result.tables["through_plane"]] == [("A", 4), ("B", 2)]
    assert row["note"].startswith("6 pairs of neighbouring slices")
    assert (row["n"], row["name"]) == (2, "Through-plane change relative to the true volume, ControlNet")
    half = {**collected, "pred": collected["image"] / 2}
    assert measure(half).rows[0]["value"] == pytest.approx(0.5)
    noise = 0.2 * torch.rand(10, 1, X, Y, generator=torch.Generator().manual_seed(0))
    assert measure({**collected, "pred": collected["image"] + noise}).rows[0]["value"] > 1.2
    shared = {**collected, "pred": collected["image"] + noise[:1]}  # noise shared by all slices does not flicker
    assert measure(shared).rows[0]["value"] == pytest.approx(1.0, abs=1e-4)


def test_without_neighbours_there_is_no_through_plane_value() -> None:
    collected = _volumes()
    for info in ({"subject": list("ABCDEFGHIJ"), "slice": [0] * 10}, {"subject": ["A"] * 10}):
        result = ThroughPlaneConsistency()({**collected, "info": info})
        assert result.rows[0]["value"] is None
        assert result.rows[0]["note"] == "no neighbouring slices that differ were evaluated"
        assert result.tables == {"through_plane": []}


def test_uncertainty_that_is_the_error_correlates_fully() -> None:
    collected = _collected(["A", "A", "B", "B", "C"], mask=_mask(5))
    measure = UncertaintyCorrelation()
    assert measure(collected) == ([], {}, {})
    error = (collected["pred"] - collected["image"]).abs()
    assert measure({**collected, "pred_sd": error**2}).rows[0]["value"] == pytest.approx(1.0)  # ranks: any monotone map
    assert measure({**collected, "pred_sd": 1 - error}).rows[0]["value"] == pytest.approx(-1.0)
    unrelated = torch.rand(5, 1, X, Y, generator=torch.Generator().manual_seed(9))
    assert abs(measure({**collected, "pred_sd": unrelated}).rows[0]["value"]) < 0.1
    outside = torch.where(_mask(5) > 0, error, 1 - error)  # wrong outside the mask only
    assert UncertaintyCorrelation(max_voxels=500)({**collected, "pred_sd": outside}).rows[0]["value"] == pytest.approx(
        1
    )
    collected["mask"][4] = 0
    (row,) = measure({**collected, "pred_sd": error}).rows
    assert row["n"] == 2
    assert "2 of 3 subjects" in row["note"]
    constant = measure({**collected, "pred_sd": torch.zeros_like(error)}).rows[0]
    assert (constant["value"], constant["n"]) == (None, 0)
