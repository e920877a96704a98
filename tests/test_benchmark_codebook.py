# SPDX-License-Identifier: Apache-2.0
"""The codebook's benchmark: it compares equals, in turns, and says what it measured. Nothing here is timed."""

from __future__ import annotations

import json

import pytest
import torch

from tools import benchmark_codebook
from tools.benchmark_codebook import benchmark, searches, statistics_of_codes, take_turns


def test_ways_take_turns_after_a_first_run_of_each(monkeypatch):
    calls: list[str] = []
    clock = iter([0, 6, 10, 12, 20, 28, 30, 32, 40, 52, 60, 63])  # a: 6, 8, 12; b: 2, 2, 3
    monkeypatch.setattr(benchmark_codebook.time, "process_time_ns", lambda: next(clock) * 10**9)
    result = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, turns=3)
    assert calls == ["a", "b"] * 4
    assert result["a"] == {"seconds": 8.0, "ratio": 4.0, "ratio_min": 3.0, "ratio_max": 4.0}
    assert result["b"] == {"seconds": 2.0, "ratio": 1.0, "ratio_min": 1.0, "ratio_max": 1.0}


def test_all_ways_find_the_same():
    vectors, codes = torch.randn(200, 4), torch.randn(50, 4)
    found = [way() for way in searches(vectors, codes).values()]
    assert len(found) == 3
    assert all(torch.equal(index, found[0]) for index in found)
    plain, ours = (way() for way in statistics_of_codes(vectors, found[0], 50).values())
    torch.testing.assert_close(ours, plain)
    assert ours[0].sum() == 200


def test_result_names_its_setting(tmp_path, capsys):
    benchmark(codes=64, dim=4, side=4, turns=2, out=str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["setting"] == {"codes": 64, "dim": 4, "vectors": 64, "turns": 2, "threads": 1}
    assert set(result["versions"]) == {"python", "torch", "monai"}
    assert list(result["search"]) == ["EMAQuantizer.quantize", "torch.cdist + argmin", "nearest_code"]
    assert all(row["seconds"] > 0 for part in ("search", "statistics") for row in result[part].values())
    assert "bincount + index_add" in capsys.readouterr().out


def test_wrong_search_is_found_out(monkeypatch):
    monkeypatch.setattr(benchmark_codebook, "nearest_code", lambda vectors, codes: torch.zeros(len(vectors)).long())
    with pytest.raises(ValueError, match="nearest_code: expected the indices of the other ways"):
        benchmark(codes=16, dim=2, side=3, turns=1)
