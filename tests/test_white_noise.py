# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from xml.etree import ElementTree

import nibabel
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from shared.inferers import seeded_noise
from shared.metrics.white_noise import THRESHOLD, autocorrelation, measure_white_noise
from tools import white_noise


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def run(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["white_noise", *map(str, words)])
    white_noise.main()


def refused(monkeypatch, *words) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *words)
    return str(stopped.value.code)


@pytest.mark.parametrize("length", [2, 3, 16, 101, 1000])
def test_equals_the_direct_sum(length):
    values = normal(length) * 3 + 7
    centred = values - values.mean()
    expected = np.correlate(centred, centred, mode="full") / (length * values.var())
    np.testing.assert_allclose(autocorrelation(values), expected, atol=1e-12)


def test_equals_the_direct_sum_over_several_axes():
    values = normal(4, 6, 3) + 2
    centred = (values - values.mean()) / values.std()
    result = autocorrelation(values)
    assert result.shape == (7, 11, 5)
    for lag in itertools.product(range(-3, 4), range(-5, 6), range(-2, 3)):
        here = tuple(slice(max(0, -k), min(n, n - k)) for k, n in zip(lag, values.shape, strict=True))
        there = tuple(slice(max(0, k), min(n, n + k)) for k, n in zip(lag, values.shape, strict=True))
        direct = (centred[here] * centred[there]).sum() / values.size
        assert result[lag[0] + 3, lag[1] + 5, lag[2] + 2] == pytest.approx(direct, abs=1e-12)


def test_is_one_at_lag_zero_and_symmetric():
    result = autocorrelation(normal(5, 8))
    assert result[4, 7] == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(result, result[::-1, ::-1], atol=1e-12)


def test_does_not_wrap_around():
    values = np.zeros(50)
    values[0] = values[-1] = 1.0  # neighbours on a circle, 49 apart on a line
    result = measure_white_noise(values).along()
    assert result[1] < 0
    assert result[49] == pytest.approx((0.96**2) / (50 * values.var()), abs=1e-12)


def test_lags_of_an_autoregressive_series():
    """r(k) = a^k of x(t) = a x(t - 1) + e(t)."""
    a, count = 0.6, 100_000
    noise = normal(count)
    series = np.empty(count)
    series[0] = noise[0] / math.sqrt(1 - a**2)
    for t in range(1, count):
        series[t] = a * series[t - 1] + noise[t]
    result = measure_white_noise(series)
    np.testing.assert_allclose(result.along()[:6], a ** np.arange(6), atol=0.015)
    assert result.largest_lag == (1,)
    assert result.variance == pytest.approx(1 / (1 - a**2), rel=0.03)
    assert result.flagged
    assert result.is_decidable
    assert result.chance < 1e-12


def test_white_noise_passes():
    result = measure_white_noise(normal(8 * 32 * 30 * 28))
    assert result.mean == pytest.approx(0, abs=0.01)
    assert result.variance == pytest.approx(1, abs=0.01)
    assert not result.flagged
    assert result.above == 0
    assert result.is_decidable
    assert result.largest == pytest.approx(result.expected_largest, rel=0.35)
    assert result.chance > 0.05


def test_noise_of_the_project_is_white_in_all_directions():
    noise = seeded_noise([0, 1], (8, 16, 20, 24)).numpy()
    for array in (noise[0].ravel(), noise[0], noise[:, 0]):
        result = measure_white_noise(array)
        assert result.chance > 1e-3
        assert abs(result.mean) < 4 / math.sqrt(array.size)
    assert not measure_white_noise(noise[0].ravel()).flagged


def test_smoothed_noise_is_flagged():
    noise = gaussian_filter(normal(8, 20, 24, 28), (0, 0.6, 0.6, 0.6))
    for array in (noise, noise.ravel()):
        result = measure_white_noise(array)
        assert result.flagged
        assert result.is_decidable
        assert result.chance < 1e-12
    assert sorted(measure_white_noise(noise).largest_lag) == [0, 0, 0, 1]


def test_correlation_across_is_seen_with_all_axes():
    """Two channels with common parts: neighbours along the channels, half the array apart when it is flat."""
    common = normal(30, 40, 50)
    channels = np.stack([common, common * 0.5 + normal(30, 40, 50, seed=1)])
    result = measure_white_noise(channels)
    assert result.largest_lag == (1, 0, 0, 0)
    assert measure_white_noise(channels.ravel()).largest_lag == (common.size,)


@pytest.mark.parametrize("count", [1000, 10_000])
def test_fixed_threshold_flags_white_noise_that_is_too_short(count):
    results = [measure_white_noise(normal(count, seed=seed)) for seed in range(10)]
    assert all(result.flagged for result in results)  # although it is white:
    assert not any(result.is_decidable for result in results)
    assert all(result.chance > 0.01 for result in results)
    assert results[0].false_alarm > 0.99
    expected = results[0].expected_largest
    assert expected > THRESHOLD
    assert np.median([result.largest for result in results]) == pytest.approx(expected, rel=0.08)
    rule_of_thumb = math.sqrt(2 * math.log(count) / count)
    assert 0.75 * rule_of_thumb < expected < rule_of_thumb


def test_threshold_is_decidable_from_forty_thousand_values_on():
    assert not measure_white_noise(normal(35_000)).is_decidable
    assert measure_white_noise(normal(42_000)).is_decidable


@pytest.mark.parametrize("shape", [(500,), (6, 7, 11)])
def test_chance_and_expectation_are_those_of_white_noise(shape):
    results = [measure_white_noise(normal(*shape, seed=seed)) for seed in range(400)]
    chances = np.array([result.chance for result in results])
    for level in (0.05, 0.2):
        assert level - 0.06 <= (chances <= level).mean() <= level + 0.03
    larger = np.mean([result.largest > result.expected_largest for result in results])
    assert 0.4 < larger < 0.6


def test_a_higher_threshold_counts_fewer_lags():
    values = normal(5000)
    counts = [measure_white_noise(values, threshold=t).above for t in (0.01, 0.023, 0.5)]
    assert counts[0] > counts[1] > counts[2] == 0
    sizes = np.abs(autocorrelation(values)[5000:])
    assert counts[1] == (sizes > 0.023).sum()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((5, 4), 0.1), "expected numbers that vary, but all are 0.1"),
        (np.zeros(9), "but all are 0"),
        (np.array([1.0, np.nan, np.inf]), "2 of 3 are NaN or infinite"),
        (np.ones(1), r"at least two numbers, got the shape \(1,\)"),
        (np.float64(3), r"at least two numbers, got the shape \(\)"),
    ],
)
def test_arrays_without_a_correlation_are_named(values, message):
    with pytest.raises(ValueError, match=f"^values: .*{message}"):
        measure_white_noise(values)


def test_offset_and_scale_do_not_matter():
    values = normal(300)
    np.testing.assert_allclose(autocorrelation(values * 1e-9 + 1e-3), autocorrelation(values), atol=1e-6)


def test_command_on_its_own_noise(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "--seeded_noise", "8,16,20,24", "--seed", 3, "--out", tmp_path / "a.json")
    text = capsys.readouterr().out
    assert "noise of seed 3 (8, 16, 20, 24)" in text
    assert "verdict" in text
    assert text.count("passes") == 2
    (entry,) = json.loads((tmp_path / "a.json").read_text())["arrays"]
    expected = measure_white_noise(seeded_noise([3], (8, 16, 20, 24))[0].numpy())
    assert entry["all_axes"] == json.loads(json.dumps(expected.description()))
    assert entry["flattened"]["shape"] == [61440]


def test_command_says_when_an_array_is_too_small(monkeypatch, capsys):
    run(monkeypatch, "--seeded_noise", "4000")
    text = capsys.readouterr().out
    assert "flagged, as is white noise of this size" in text
    assert "all axes" not in text


@pytest.mark.parametrize("name", ["a.npy", "a.pt", "a.nii.gz", "dict.pt"])
def test_command_reads_files(monkeypatch, capsys, tmp_path, name):
    array = gaussian_filter(normal(30, 40, 50), 1).astype(np.float32)
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, array)
    elif name == "a.nii.gz":
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    else:
        torch.save(torch.from_numpy(array) if name == "a.pt" else {"z": torch.from_numpy(array), "n": 3}, path)
    run(monkeypatch, path)  # ends without an error though it is flagged
    text = capsys.readouterr().out
    assert f"{name} (30, 40, 50)" in text
    assert text.rstrip().endswith("flagged")
    run(monkeypatch, path, "--item", 2)
    assert "item 2 (40, 50)" in capsys.readouterr().out


@pytest.mark.parametrize("parts", [1, 2])
def test_command_takes_items_of_a_latent_cache(monkeypatch, capsys, tmp_path, parts):
    latents = normal(20, parts, 3, 4, 5, 6)
    np.save(tmp_path / "latents_0.npy", latents)
    (tmp_path / "latents_0.json").write_text(json.dumps({"items": 20}))
    out = tmp_path / "a.json"
    run(monkeypatch, tmp_path / "latents_0.npy", "--max_items", 2, "--out", out)
    assert "latents_0.npy, item 5 (3, 4, 5, 6)" in capsys.readouterr().out
    entries = json.loads(out.read_text())["arrays"]
    assert [entry["name"][-2:].strip() for entry in entries] == ["5", "15"]
    assert entries[0]["flattened"]["mean"] == pytest.approx(latents[5, 0].mean())  # not the log-variance
    run(monkeypatch, tmp_path / "latents_0.npy", "--item", 7)
    assert "item 7 (3, 4, 5, 6)" in capsys.readouterr().out


def test_picture(monkeypatch, tmp_path):
    path = tmp_path / "a.svg"
    run(monkeypatch, "--seeded_noise", "3,7,9", "--picture", path)
    svg = ElementTree.fromstring(path.read_text())
    words = " ".join(node.text or "" for node in svg.iter())
    assert "log10 of the lag" in words
    assert "threshold 0.023" in words
    lines = [node for node in svg.iter() if node.tag.endswith("polyline")]
    assert len(lines) >= 2


def test_faults_of_the_command(monkeypatch, tmp_path):
    np.save(tmp_path / "constant.npy", np.ones((3, 4)))
    np.save(tmp_path / "nan.npy", np.array([1.0, np.nan]))
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    (tmp_path / "broken.npy").write_bytes(b"no array")
    (tmp_path / "broken.pt").write_bytes(b"no tensor")
    (tmp_path / "a.txt").write_text("1 2 3")
    torch.save({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path / "two.pt")
    for name, message in {
        "constant.npy": "expected numbers that vary",
        "nan.npy": "1 of 2 are NaN",
        "words.npy": "expected real numbers",
        "broken.npy": "expected a readable array",
        "broken.pt": "expected a readable array",
        "a.txt": "expected a file .npy, .pt, .nii or .nii.gz",
        "two.pt": "expected one tensor, but the file has a, b; give --key NAME",
        "absent.npy": "does not exist",
    }.items():
        assert message in (text := refused(monkeypatch, tmp_path / name)), text
        assert name in text
    assert "file: expected a file or --seeded_noise SHAPE" in refused(monkeypatch)
    assert "--seeded_noise: expected sizes above 0" in refused(monkeypatch, "--seeded_noise", "8,x")
    assert "--item: expected one of 0..2" in refused(monkeypatch, tmp_path / "constant.npy", "--item", 3)
    assert "--threshold: expected" in refused(monkeypatch, "--seeded_noise", "8", "--threshold", 2)
    assert "did you mean --seed" in refused(monkeypatch, "--sed", 8)
    monkeypatch.setattr(white_noise, "MAX_VALUES", 10)
    assert "expected at most 10 values, but got 12" in refused(monkeypatch, "--seeded_noise", "3,4")


def test_key_names_a_tensor(monkeypatch, capsys, tmp_path):
    torch.save({"a": torch.ones(3), "b": torch.from_numpy(normal(50))}, Path(tmp_path / "two.pt"))
    run(monkeypatch, tmp_path / "two.pt", "--key", "b")
    assert "two.pt (50,)" in capsys.readouterr().out
