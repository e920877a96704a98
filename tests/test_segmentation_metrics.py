# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from torch import nn

from shared.metrics.confidence import bootstrap_interval, grouped_bootstrap_interval
from shared.metrics.segmentation import MEAN, MaskScore, foreground_names, mask_scores
from shared.metrics.segmentation_baselines import MeanTrainingMask, SegmentationBaseline
from shared.metrics.segmentation_ceiling import reconstructed_mask
from shared.metrics.segmentation_table import ItemScore, scored_rows
from shared.metrics.surface import surface_distance

BINARY = {1: "polyp"}
ORGANS = {1: "aorta", 2: "liver", 3: "spleen"}


def square(top: int, left: int, height: int, width: int, *, value: int = 1) -> torch.Tensor:
    """(20, 30) class index."""
    mask = torch.zeros(20, 30, dtype=torch.uint8)
    mask[top : top + height, left : left + width] = value
    return mask


def only(prediction: torch.Tensor, truth: torch.Tensor, **options) -> MaskScore:
    (score,) = mask_scores(prediction, truth, BINARY, **options)
    return score


@pytest.mark.reliability(10)
def test_overlap_in_closed_form():
    score = only(square(2, 3, 6, 8), square(2, 3, 6, 4))
    assert (score.dice, score.iou) == (pytest.approx(2 * 24 / 72), pytest.approx(24 / 48))
    assert (score.true_pixels, score.predicted_pixels) == (24, 48)
    assert (score.both_empty, score.one_empty) == (False, 0)


def test_conventions_of_empty_masks():
    empty, full = square(0, 0, 0, 0), square(1, 1, 3, 5)
    both = only(empty, empty)
    assert (both.dice, both.iou, both.both_empty, both.one_empty) == (1, 1, True, 0)
    assert math.isnan(both.hd95)
    assert math.isnan(both.assd)
    assert only(empty, empty, empty_score=0).dice == 0
    for prediction, truth in ((empty, full), (full, empty)):  # the published code gives 0 and 1
        one = only(prediction, truth)
        assert (one.dice, one.iou, one.hd95, one.assd) == (0, 0, math.inf, math.inf)
        assert (one.both_empty, one.one_empty) == (False, 1)


def test_the_mean_leaves_out_classes_that_are_nowhere():
    truth = square(2, 2, 4, 4, value=1) + square(10, 10, 4, 8, value=2)
    prediction = square(2, 2, 4, 2, value=1)  # liver missed, spleen in neither
    mean, aorta, liver, spleen = mask_scores(prediction, truth, ORGANS)
    assert [score.name for score in (mean, aorta, liver, spleen)] == [MEAN, *ORGANS.values()]
    assert (aorta.dice, liver.dice, spleen.dice) == (pytest.approx(2 * 8 / 24), 0, 1)
    assert mean.dice == pytest.approx(aorta.dice / 2)
    assert mean.hd95 == aorta.hd95
    assert mean.assd == aorta.assd
    assert (mean.one_empty, mean.both_empty) == (1, False)
    assert (mean.true_pixels, mean.predicted_pixels) == (48, 8)
    nothing = torch.zeros(20, 30, dtype=torch.uint8)
    assert (mask_scores(nothing, nothing, ORGANS)[0].dice, mask_scores(nothing, nothing, ORGANS)[0].both_empty) == (
        1,
        1,
    )
    assert mask_scores(nothing, square(0, 0, 2, 2), ORGANS)[0].hd95 == math.inf


def test_without_surface_there_are_no_distances():
    assert all(
        score.hd95 is None and score.assd is None
        for score in mask_scores(square(1, 1, 2, 2), square(1, 1, 2, 2), ORGANS, surface=False)
    )


@pytest.mark.reliability(10)
def test_surface_distance_of_shifted_squares():
    one, other = square(4, 5, 8, 8).bool(), square(4, 8, 8, 8).bool()
    assert surface_distance(one, other).hd95 == pytest.approx(3)
    assert surface_distance(one, other, spacing=[1, 0.5]).hd95 == pytest.approx(1.5)
    assert surface_distance(one, one) == (0, 0)


@pytest.mark.reliability(10)
@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI 1.6 warns of its own call
@pytest.mark.parametrize("spacing", [None, [0.7, 1.9, 3.0]])
def test_surface_distance_is_monais(spacing: list[float] | None):
    generator = torch.Generator().manual_seed(0)
    noise = nn.functional.avg_pool3d(torch.rand(2, 1, 18, 23, 11, generator=generator), 5, 1, 2)
    one, other = (part[0] > noise.mean() for part in noise)
    found = surface_distance(one, other, spacing=spacing)
    batch = {"y_pred": one[None, None], "y": other[None, None], "include_background": True, "spacing": spacing}
    assert found.hd95 == pytest.approx(float(compute_hausdorff_distance(**batch, percentile=95)), rel=1e-5)
    assert found.assd == pytest.approx(float(compute_average_surface_distance(**batch, symmetric=True)), rel=1e-5)


@pytest.mark.reliability(10)
def test_the_larger_direction_counts_for_hd95_and_both_for_assd() -> None:
    """A false alarm far from a found square: all of the truth is found, half of the prediction lies 12 pixels off."""
    truth = torch.zeros(9, 21, dtype=torch.bool)
    truth[3:6, 2:5] = True
    prediction = truth | truth.roll(12, dims=1)
    for found in (surface_distance(prediction, truth), surface_distance(truth, prediction)):
        assert found.hd95 == pytest.approx(12.0)
        # Columns of the other square are 10, 11 and 12 from the truth, with 3, 2 and 3 border pixels.
        assert found.assd == pytest.approx((3 * 10 + 2 * 11 + 3 * 12) / (8 + 16))


def test_an_axis_of_one_slice_is_no_border():
    flat = [square(2, 2, 10, 10).bool(), square(2, 2, 10, 14).bool()]
    deep = [mask[..., None] for mask in flat]
    assert surface_distance(*deep, spacing=[2, 2, 5]) == surface_distance(*flat, spacing=[2, 2])
    assert surface_distance(*flat).assd > 0
    dot = torch.ones(1, 1, dtype=torch.bool)
    assert surface_distance(dot, dot) == (0, 0)


def test_cropping_changes_nothing():
    """Of foreground in one slice of a volume every pixel is border; at the edge of the image as well as inside."""
    for index in (0, 2):
        truth, prediction = torch.zeros(20, 30, 4), torch.zeros(20, 30, 4)
        truth[..., index], prediction[..., index] = square(0, 3, 9, 9), square(2, 3, 9, 9)
        score = only(prediction, truth, spacing=[1, 1, 5])
        whole = surface_distance(prediction > 0, truth > 0, spacing=[1, 1, 5])
        assert (score.hd95, score.assd) == whole
        assert whole.assd == pytest.approx(2 * 9 * (1 + 2) / (2 * 81))
        assert score.dice == pytest.approx(7 / 9)


def test_sizes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"prediction: expected the shape of truth \(20, 30\), got \(30, 20\)"):
        only(square(0, 0, 1, 1).T, square(0, 0, 1, 1))
    with pytest.raises(ValueError, match="spacing: expected 2 numbers, one per axis, got 3"):
        surface_distance(square(0, 0, 1, 1).bool(), square(0, 0, 1, 1).bool(), spacing=[1, 1, 1])


def test_names_of_classes():
    assert foreground_names(1, None) == {1: "foreground"}
    assert foreground_names(3, None) == {1: "class 1", 2: "class 2"}
    for given in (
        ["aorta", "liver"],
        ["background", "aorta", "liver"],
        {"0": "background", "1": "aorta", "2": "liver"},
    ):
        assert foreground_names(3, given) == {1: "aorta", 2: "liver"}
    assert foreground_names(1, ["polyp"]) == foreground_names(1, {"0": "background", "1": "polyp"}) == {1: "polyp"}
    with pytest.raises(ValueError, match=r"class_names: expected names for the classes \[1, 2\], got {1: 'aorta'}"):
        foreground_names(3, {"1": "aorta"})
    with pytest.raises(ValueError, match="class_names: expected different names"):
        foreground_names(3, ["aorta", "aorta"])
    with pytest.raises(ValueError, match="num_classes: expected at least 1"):
        foreground_names(0, None)


def test_bootstrap_draws_whole_groups():
    values = np.random.default_rng(1).normal(size=12)
    alone = grouped_bootstrap_interval(values, range(12))
    assert alone == pytest.approx(bootstrap_interval(values))  # each its own group: the plain bootstrap
    copies = grouped_bootstrap_interval(np.repeat(values, 5), np.repeat(np.arange(12), 5))
    assert copies == pytest.approx(alone)  # five equal frames of each video add no certainty
    assert grouped_bootstrap_interval([1.0, 2.0, 6.0], "aab").value == 3
    assert math.isnan(grouped_bootstrap_interval([1.0, 2.0], "aa").low)
    with pytest.raises(ValueError, match="groups: expected one for each of 2 values, got 3"):
        grouped_bootstrap_interval([1.0, 2.0], "aab")


def item(index: int, method: str, score: MaskScore, *, unit: str = "px", resolution: str = "native") -> ItemScore:
    return ItemScore(f"image{index}", index // 2, method, resolution, score, unit, 0.5 if unit == "mm" else None, 0.1)


def test_rows_of_the_table():
    empty, full = square(0, 0, 0, 0), square(1, 1, 4, 6)
    pairs = [(full, full), (square(1, 1, 4, 3), full), (empty, full), (empty, empty), (full, full), (full, full)]
    ours = [item(i, "one sample", only(*pair)) for i, pair in enumerate(pairs)]
    theirs = [item(i, "U-Net", only(empty, truth)) for i, (_, truth) in enumerate(pairs)]
    methods = {"one sample": "ours", "U-Net": "direct", "absent": "not trained: x.pt was not found."}
    rows = scored_rows([*ours, *theirs], methods, own=["one sample"])
    table = {(row["method"], row["measure"]): row for row in rows}

    dice = table["one sample", "dice"]
    values = [1, 2 / 3, 0, 1, 1, 1]
    assert (dice["name"], dice["group"]) == ("Dice, one sample", "Native resolution")
    assert (dice["value"], dice["median"], dice["n"], dice["groups"]) == (pytest.approx(np.mean(values)), 1, 6, 3)
    assert dice["sd"] == pytest.approx(np.std(values, ddof=1))
    interval = grouped_bootstrap_interval(values, [0, 0, 1, 1, 2, 2])
    assert (dice["ci_low"], dice["ci_high"]) == pytest.approx(interval[1:3])
    assert "both masks are empty in 1 images, which count 1" in dice["note"]
    without = table["one sample", "dice_not_empty"]
    assert (without["value"], without["n"]) == (pytest.approx(np.mean([1, 2 / 3, 0, 1, 1])), 5)

    distance = table["one sample", "hd95_px"]
    assert (distance["n"], distance["name"]) == (4, "HD95 (px), one sample")
    assert math.isfinite(distance["value"])
    assert "1 of 5 images have one empty mask" in distance["note"]
    assert (table["one sample", "one_empty"]["value"], table["U-Net", "one_empty"]["value"]) == (1, 5)

    difference = table["one sample - U-Net", "dice"]
    assert difference["value"] == pytest.approx(np.mean([1, 2 / 3, 0, 0, 1, 1]))
    assert (difference["n"], difference["groups"]) == (6, 3)
    for key in (("absent", "dice"), ("one sample - absent", "dice"), ("U-Net", "hd95_px")):
        assert (table[key]["value"], table[key]["ci_low"], table[key]["n"]) == (None, None, 0)
    assert table["absent", "dice"]["note"] == "not trained: x.pt was not found."


def test_several_classes_sizes_and_units_stand_apart():
    score = mask_scores(square(1, 1, 3, 5), square(1, 1, 3, 5), ORGANS)
    lines = [item(0, "one sample", one, unit="mm") for one in score]
    lines += [item(1, "one sample", one) for one in score]
    lines += [item(0, "one sample", one, resolution="64 x 48", unit="mm") for one in score]
    rows = scored_rows(lines, {"one sample": "ours"}, own=["one sample"])
    headings = list(dict.fromkeys(row["group"] for row in rows))
    assert headings[:2] == ["Native resolution, mean of classes", "Working size 64 x 48, mean of classes"]
    assert len(headings) == 8
    native = {row["measure"]: row["n"] for row in rows if row["group"] == headings[0]}
    assert native == {"dice": 2, "iou": 2, "hd95_mm": 1, "assd_mm": 1, "hd95_px": 1, "assd_px": 1}
    liver = [row for row in rows if row["class"] == "liver"]
    assert {row["measure"] for row in liver} >= {"dice", "dice_not_empty"}
    assert "no interval from fewer than 3 groups" in rows[0]["note"]
    columns = lines[0].columns
    assert (columns["true_size"], columns["size_unit"], columns["distance_unit"]) == (7.5, "ml", "mm")


class TwoClasses(nn.Conv2d):
    """Scores of 2 classes: grey level against its opposite."""

    def __init__(self) -> None:
        super().__init__(3, 2, 1, bias=False)


def test_baseline_network(tmp_path: Path):
    network = TwoClasses()
    weight = torch.tensor([[-1.0, -2, -3], [1, 2, 3]])[..., None, None]
    baseline = SegmentationBaseline(network, tmp_path / "baseline.pt", num_classes=2, batch_size=2)
    image = torch.rand(1, 12, 10, 5)
    assert baseline(image) is None
    assert baseline.note.startswith("not trained: baseline.pt was not found. Train it with configs/train_baseline.json")
    torch.save({"weight": weight}, tmp_path / "baseline.pt")
    found = baseline(image)
    assert found is not None
    assert found.shape == (2, 12, 10, 5)
    torch.testing.assert_close(found[1], torch.sigmoid(12 * image[0]))
    torch.testing.assert_close(baseline(image[..., 3]), found[..., 3])
    with pytest.raises(
        FileNotFoundError, match="none.pt: expected weights of the segmentation baseline, found no file"
    ):
        SegmentationBaseline(network, tmp_path / "none.pt", required=True)
    with pytest.raises(ValueError, match=r"network: expected scores \(1, 1, 12, 10\) of the baseline, got \(1, 2,"):
        SegmentationBaseline(network, tmp_path / "baseline.pt")(image[..., 0])


def test_mean_training_mask():
    labels = [square(0, 0, 20, 10)[None], torch.stack([square(0, 0, 20, 30), square(0, 0, 0, 0)], dim=-1)[None]]
    baseline = MeanTrainingMask([{"label": label} for label in labels])
    found = baseline(torch.zeros(3, 20, 30))
    assert found.shape == (1, 20, 30)
    torch.testing.assert_close(found[0, :, 0], torch.full((20,), 2 / 3))
    torch.testing.assert_close(found[0, :, 29], torch.full((20,), 1 / 3))
    assert baseline.note.startswith("mean of 3 training masks")
    assert baseline(torch.zeros(1, 10, 60, 4)).shape == (1, 10, 60, 4)
    classes = MeanTrainingMask([{"label": labels[0] * 2}], num_classes=4)(torch.zeros(3, 20, 30))
    assert classes[:, 0, 0].tolist() == [0, 0, 1, 0]
    with pytest.raises(ValueError, match="training_data: expected items"):
        MeanTrainingMask([])(torch.zeros(3, 20, 30))


def test_ceiling_is_the_truth_for_a_perfect_autoencoder():
    label = (square(1, 1, 5, 8) + square(12, 12, 6, 9, value=3))[..., None].repeat(1, 1, 11)
    seen: list[tuple[int, ...]] = []

    def reconstruct(pictures: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(pictures.shape))
        return pictures

    found = reconstructed_mask(label, reconstruct, num_classes=4)
    assert found.shape == (4, 20, 30, 11)
    assert torch.equal(found.argmax(0).to(torch.uint8), label)
    torch.testing.assert_close(found.sum(0), torch.ones(20, 30, 11))
    assert all(shape[1:] == (3, 20, 30) and shape[0] <= 8 for shape in seen)
    binary = reconstructed_mask(label[..., 0], lambda pictures: pictures * 0.8)
    torch.testing.assert_close(binary[0], (label[..., 0] > 0) * 0.8)
