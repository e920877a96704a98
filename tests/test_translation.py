# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics import MAEMetric, MultiScaleSSIMMetric, PSNRMetric

from shared.metrics.baselines import CopyCondition
from shared.metrics.confidence import bootstrap_interval
from shared.metrics.ms_ssim import PairwiseMultiScaleSSIM
from shared.metrics.translation import CEILING, MEASURES, TranslationQuality, slice_scores
from tests.translations import X, Y
from tests.translations import collected as _collected
from tests.translations import mask as _mask
from tests.translations import smooth as _smooth

SSIM: dict[str, Any] = {"kernel_size": 7, "weights": (0.4, 0.6)}
CONTROL = "wrong FLAIR (control)"


def _rows(measurement: Any) -> dict[str, dict[str, Any]]:
    rows = {row["name"]: row for row in measurement.rows}
    assert len(rows) == len(measurement.rows)  # names are unique, since they become keys
    return rows


def _scores(images: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, np.ndarray]:
    return slice_scores(images, target, mask, ssim=PairwiseMultiScaleSSIM(**SSIM))


@pytest.mark.reliability(10)
def test_psnr_and_mae_in_closed_form() -> None:
    target = torch.full((2, 1, X, Y), 0.5)
    scores = _scores(target + torch.tensor([0.1, -0.01]).view(2, 1, 1, 1), target)
    np.testing.assert_allclose(scores["psnr"], [20.0, 40.0], rtol=1e-5)  # -10 lg(0.1^2), -10 lg(0.01^2)
    np.testing.assert_allclose(scores["mae"], [0.1, 0.01], rtol=1e-5)
    assert not any("brain" in name for name in scores)


def test_equal_images_have_the_best_scores() -> None:
    target = _smooth(3, 0)
    scores = _scores(target, target.clone(), _mask(3))
    for name, best in {"psnr": 100.0, "mae": 0.0, "ms_ssim": 1.0}.items():
        np.testing.assert_allclose(scores[name], best, atol=1e-5)
        np.testing.assert_allclose(scores[f"brain_{name}"], best, atol=1e-5)


@pytest.mark.reliability(10)
def test_whole_image_scores_are_monais() -> None:
    x, y = _smooth(18, 1), _smooth(18, 2)  # more than one batch
    scores = _scores(x, y)
    shape = (x, y)
    np.testing.assert_allclose(scores["psnr"], PSNRMetric(max_val=1.0, reduction="none")(*shape)[:, 0], rtol=1e-5)
    np.testing.assert_allclose(scores["mae"], MAEMetric(reduction="none")(*shape)[:, 0], rtol=1e-5)
    reference = MultiScaleSSIMMetric(2, kernel_size=7, weights=SSIM["weights"], reduction="none")
    np.testing.assert_allclose(scores["ms_ssim"], reference(*shape)[:, 0], atol=1e-5)


def test_errors_outside_the_mask_do_not_count_inside() -> None:
    target, mask = 0.2 + 0.6 * _smooth(3, 3), _mask(3)
    mask[2] = 0
    outside = (target + 0.1 * (1 - _mask(3))).clamp(0, 1)
    scores = _scores(outside, target, mask)
    assert (scores["psnr"] < 25).all()
    np.testing.assert_allclose(scores["brain_psnr"][:2], 100.0)
    np.testing.assert_allclose(scores["brain_ms_ssim"][:2], 1.0, atol=1e-6)
    assert all(math.isnan(scores[f"brain_{name}"][2]) for name in ("psnr", "mae", "ms_ssim"))
    inside = target + 0.1 * _mask(3)
    scores = _scores(inside, target, mask)
    np.testing.assert_allclose(scores["brain_psnr"][:2], 20.0, rtol=1e-4)  # not diluted by the background
    np.testing.assert_allclose(scores["brain_mae"][:2], 0.1, rtol=1e-4)
    np.testing.assert_allclose(scores["mae"], 0.1 * 20 * 32 / (X * Y), rtol=1e-4)
    share = _mask(1).mean().item()
    np.testing.assert_allclose(scores["psnr"], 20 - 10 * math.log10(share), rtol=1e-4)


def test_interval_is_students_over_subjects() -> None:
    target = torch.full((3, 1, X, Y), 0.5)
    pred = target + torch.tensor([0.1, 0.01, 0.1]).view(3, 1, 1, 1)
    result = TranslationQuality(**SSIM)({"image": target, "pred": pred, "info": {"subject": ["A", "B", "C"]}})
    row = _rows(result)["PSNR (dB), ControlNet"]
    # 20, 40 and 20 dB; two degrees of freedom: 4.3027 standard errors of 20 / 3 dB
    assert row["ci_high"] - row["value"] == pytest.approx(4.3027 * 20 / 3, abs=0.01)
    assert row["value"] - row["ci_low"] == pytest.approx(4.3027 * 20 / 3, abs=0.01)


def test_slices_are_averaged_within_a_subject_first() -> None:
    subjects = ["A", "A", "A", "B"]
    target = torch.full((4, 1, X, Y), 0.5)
    pred = target + torch.tensor([0.1, 0.1, 0.1, 0.01]).view(4, 1, 1, 1)
    collected = {"image": target, "pred": pred, "info": {"subject": subjects}}
    result = TranslationQuality(**SSIM)(collected)
    row = _rows(result)["PSNR (dB), ControlNet"]
    assert row["value"] == pytest.approx(30.0, abs=1e-3)  # the mean over slices would be 25
    assert row["sd"] == pytest.approx(20 / math.sqrt(2), abs=1e-3)
    assert row["n"] == 2
    assert row["note"].startswith("4 slices of 2 subjects, averaged per subject first")
    assert (row["method"], row["measure"]) == ("ControlNet", "psnr")
    assert row["ci_high"] is None
    assert "no interval from fewer than 3 subjects" in row["note"]
    lines = result.tables["per_subject"]
    assert [(line["subject"], line["slices"]) for line in lines if line["method"] == "ControlNet"] == [
        ("A", 3),
        ("B", 1),
    ]
    assert lines[0]["psnr"] == pytest.approx(20.0, abs=1e-3)
    assert len(result.columns["psnr"]) == 4


def test_the_table_ranks_what_theory_ranks() -> None:
    subjects = [name for name in "ABCDEF" for _ in range(3)]
    real = 0.2 + 0.6 * _smooth(18, 0)
    collected = _collected(subjects, mask=_mask(18), reconstruction=real + 0.01)
    collected["mask"][4] = 0
    result = TranslationQuality(baselines={"FLAIR copied": CopyCondition()}, **SSIM)(collected)
    rows = _rows(result)
    for measure, title in MEASURES.items():
        values = {m: rows[f"{title}, {m}"]["value"] for m in ("ControlNet", "FLAIR copied", CONTROL, CEILING)}
        sign = -1 if measure.endswith("mae") else 1
        assert sign * values[CEILING] > sign * values["ControlNet"]
        assert sign * values["ControlNet"] > sign * values[CONTROL]
        assert sign * values["ControlNet"] > sign * values["FLAIR copied"]
    assert rows[f"PSNR (dB), {CEILING}"]["value"] == pytest.approx(40.0, abs=1e-3)
    assert "1 slices with an empty mask left out" in rows["MAE in the brain, FLAIR copied"]["note"]
    assert "left out" not in rows["MAE, FLAIR copied"]["note"]
    assert "multiplied by the mask" in rows["MS-SSIM of the masked brain, ControlNet"]["note"]
    assert "kernel 7" in rows["MS-SSIM, ControlNet"]["note"]
    assert result.columns["brain_psnr"][4] is None
    assert result.columns["psnr"][4] is not None

    difference = rows["PSNR (dB), ControlNet minus FLAIR copied"]
    by_subject = {(line["subject"], line["method"]): line["psnr"] for line in result.tables["per_subject"]}
    expected = [by_subject[s, "ControlNet"] - by_subject[s, "FLAIR copied"] for s in "ABCDEF"]
    assert difference["value"] == pytest.approx(np.mean(expected))
    assert difference["sd"] == pytest.approx(np.std(expected, ddof=1))
    assert (difference["ci_low"], difference["ci_high"]) == pytest.approx(bootstrap_interval(expected)[1:3])
    assert difference["ci_low"] > 0
    assert (difference["n"], difference["measure"]) == (6, "psnr")
    assert rows[f"PSNR (dB) in the brain, ControlNet minus {CONTROL}"]["ci_low"] > 0
    assert all({"sd", "method", "measure"} < row.keys() for row in result.rows)


def test_a_method_that_ignores_its_condition_equals_the_control() -> None:
    subjects = [name for name in "ABCD" for _ in range(2)]
    collected = _collected(subjects)
    collected["pred"] = torch.full_like(collected["image"], 0.5)
    rows = _rows(TranslationQuality(**SSIM)(collected))
    assert rows["MAE, ControlNet"]["value"] == pytest.approx(rows[f"MAE, {CONTROL}"]["value"])
    assert rows[f"PSNR (dB), ControlNet minus {CONTROL}"]["value"] == pytest.approx(0.0, abs=1e-9)


def test_what_cannot_be_had_is_a_row_without_a_value() -> None:
    class Untrained:
        note = "not trained: see the guide"

        def __call__(self, condition: torch.Tensor) -> None:
            return None

    result = TranslationQuality(baselines={"U-Net regression": Untrained()}, **SSIM)(_collected(["A", "A"]))
    rows = _rows(result)
    for method, note in (("U-Net regression", "not trained"), (CONTROL, "second subject"), (CEILING, "no recon")):
        row = rows[f"PSNR (dB), {method}"]
        assert (row["value"], row["ci_low"], row["sd"], row["n"]) == (None, None, None, 0)
        assert note in row["note"]
    assert rows["PSNR (dB), ControlNet minus U-Net regression"]["value"] is None
    single = rows["PSNR (dB), ControlNet"]
    assert single["value"] is not None
    assert (single["ci_low"], single["sd"]) == (None, None)
    assert [row["name"] for row in result.rows if "brain" in row["measure"]] == [
        f"{MEASURES[measure]}, ControlNet" for measure in MEASURES if "brain" in measure
    ]
    assert rows["MAE in the brain, ControlNet"]["note"] == "no brain mask in the data"
    empty = _collected(["A", "A"], mask=torch.zeros(2, 1, X, Y))
    assert _rows(TranslationQuality(**SSIM)(empty))["MAE in the brain, ControlNet"]["value"] is None


def test_missing_inputs_are_named() -> None:
    measure = TranslationQuality(baselines={"FLAIR copied": CopyCondition()}, **SSIM)
    collected = _collected(["A", "B"])
    with pytest.raises(ValueError, match=r"info_keys: expected 'subject' among them for Translation quality, got \[\]"):
        measure({**collected, "info": {}})
    with pytest.raises(ValueError, match="subject: expected one for every image, got none in row 1"):
        measure({**collected, "info": {"subject": ["A", None]}})
    with pytest.raises(ValueError, match="slice: expected it in every item or in none, got none in row 0"):
        measure({**collected, "info": {"subject": ["A", "B"], "slice": [None, 3]}})
    with pytest.raises(ValueError, match="condition: expected images for Translation quality"):
        measure({key: value for key, value in collected.items() if key != "condition"})
    with pytest.raises(ValueError, match=r"half: expected images \(2, 1, 40, 56\), got \(2, 1, 20, 56\)"):
        TranslationQuality(baselines={"half": _Half()}, **SSIM)(collected)
    with pytest.raises(ValueError, match="baselines: expected names of their own, got .'ControlNet'."):
        TranslationQuality(baselines={"ControlNet": CopyCondition()})


class _Half:
    note = "half"

    def __call__(self, condition: torch.Tensor) -> torch.Tensor:
        return condition[:, :, ::2]
