# SPDX-License-Identifier: Apache-2.0
"""Cached volumes: made once, whole or absent, and made again where a file is damaged."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from shared.cache_keys import describe, file_signature
from shared.volume_cache import VolumeCache

VOLUME = np.random.default_rng(0).random((3, 5, 7, 4), dtype=np.float32)


class Maker:
    """Gives an array and counts how often."""

    def __init__(self, array: np.ndarray = VOLUME) -> None:
        self.array, self.calls = array, 0

    def __call__(self) -> np.ndarray:
        self.calls += 1
        return self.array


def test_an_array_is_made_once_and_read_as_a_memory_map(tmp_path):
    make = Maker()
    first = VolumeCache(tmp_path / "cache").get("a", make)
    second = VolumeCache(str(tmp_path / "cache")).get("a", make)
    assert make.calls == 1
    assert isinstance(first, np.memmap)
    for stored in (first, second):
        assert stored.dtype == np.float32
        assert np.array_equal(stored, VOLUME)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a.npy"]


def test_keys_have_arrays_of_their_own(tmp_path):
    cache = VolumeCache(tmp_path)
    assert cache.get("a", Maker()).shape == VOLUME.shape
    assert np.array_equal(cache.get("b", Maker(VOLUME + 1)), VOLUME + 1)


@pytest.mark.parametrize("on_disk", [True, False])
def test_arrays_are_read_only(tmp_path, on_disk):
    original = VOLUME.copy()
    stored = VolumeCache(tmp_path if on_disk else "").get("a", Maker(original))
    with pytest.raises(ValueError, match="read-only"):
        stored[0] = 1.0
    original[:] = 0.0  # the array of who made it stays writeable


@pytest.mark.parametrize("folder", ["", None])
def test_without_a_folder_arrays_stay_in_memory(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache, make = VolumeCache(folder), Maker()
    assert cache.get("a", make) is cache.get("a", make)
    assert make.calls == 1
    assert VolumeCache(folder).get("a", make) is not cache.get("a", make)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", [np.asfortranarray, lambda a: a.transpose(0, 3, 1, 2), lambda a: a[:, ::-1]])
def test_values_survive_whatever_the_layout_in_memory(tmp_path, layout):
    array = layout(VOLUME)
    assert np.array_equal(VolumeCache(tmp_path).get("a", Maker(array)), array)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "uint8", "bool"])
def test_values_are_kept_as_they_are_made(tmp_path, dtype):
    stored = VolumeCache(tmp_path).get("a", Maker(VOLUME.astype(dtype)))
    assert stored.dtype == np.dtype(dtype)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_bytes(b""), "unreadable volume cache"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "unreadable volume cache"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "unreadable volume cache"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "expected 1808 bytes, got 1812"),
        (lambda path: path.write_bytes(b"no array " * 50), "unreadable volume cache"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "unreadable volume cache"),
    ],
    ids=["empty", "header cut", "data cut", "too long", "text", "zip"],
)
def test_a_damaged_file_is_made_again_with_a_warning(tmp_path, caplog, spoil, reason):
    path, make = tmp_path / "a.npy", Maker()
    VolumeCache(tmp_path).get("a", make)
    good = path.read_bytes()
    spoil(path)
    with caplog.at_level(logging.WARNING, logger="shared.volume_cache"):
        stored = VolumeCache(tmp_path).get("a", make)
    assert make.calls == 2
    assert np.array_equal(stored, VOLUME)
    assert path.read_bytes() == good
    assert f"{path}: {reason}" in caplog.text


def test_an_interrupted_computation_leaves_nothing(tmp_path):
    def interrupted() -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        VolumeCache(tmp_path).get("a", interrupted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["", "cache"])
def test_what_is_no_array_of_numbers_is_refused(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"a(\.npy)?: expected an array of numbers, got object"):
        VolumeCache(folder).get("a", lambda: np.asarray([None]))
    assert not Path("cache/a.npy").exists()


def test_the_loser_of_a_race_reads_an_equal_file(tmp_path):
    """Another process writes the same key while this one computes; the map it already holds stays valid."""
    other = VolumeCache(tmp_path)
    held = []

    def late() -> np.ndarray:
        held.append(other.get("a", Maker()))
        return VOLUME

    assert np.array_equal(VolumeCache(tmp_path).get("a", late), VOLUME)
    assert np.array_equal(held[0], VOLUME)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def _use(folder: str, barrier: multiprocessing.synchronize.Barrier, results: multiprocessing.Queue) -> None:
    def make() -> np.ndarray:
        barrier.wait(20)  # both miss the key before either has written it
        return VOLUME

    results.put(bool(np.array_equal(VolumeCache(folder).get("a", make), VOLUME)))


def test_two_processes_may_make_the_same_file_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_use, args=(str(tmp_path), barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=30) for _ in processes] == [True, True]
    for process in processes:
        process.join(30)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("folder", ["cache", ""])
def test_copies_for_workers_are_small_and_work(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    cache, make = VolumeCache(folder), Maker()
    cache.get("a", make)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 200
    assert np.array_equal(pickle.loads(pickled).get("a", make), VOLUME)
    assert make.calls == (1 if folder else 2)


def test_the_folder_is_no_part_of_a_description(tmp_path):
    """A cache of latents depends on what a transform makes, not on where it keeps volumes, or whether it has run."""
    used = VolumeCache("")
    used.get("a", Maker())
    assert describe(used) == describe(VolumeCache(tmp_path)) == ["shared.volume_cache.VolumeCache", {}]


class Settings:
    def __init__(self, **values: object) -> None:
        self.__dict__.update(values)


def test_descriptions_differ_where_settings_do():
    settings = [
        {"shells": (1000, 2000)},
        {"shells": (1000, 3000)},
        {"shells": np.asarray([1000, 2000])},
        {"shells": np.asarray([1000, 3000])},
        {"shells": np.int64(1000)},
        {"shells": Settings(b=1000)},
        {"shells": Settings(b=2000)},
    ]
    descriptions = [repr(describe(Settings(**values))) for values in settings]
    assert len(set(descriptions)) == len(settings)
    assert describe(Settings(shells=[1, 2])) == describe(Settings(shells=(1, 2)))


def test_signature_of_a_file(tmp_path):
    path = tmp_path / "a.nii"
    path.write_bytes(b"12345")
    os.utime(path, ns=(0, 1_000_000_123))
    assert file_signature(path) == "a.nii 5 1000000123"
    with pytest.raises(FileNotFoundError, match=r"^.*b\.nii: expected this file, but it does not exist"):
        file_signature(tmp_path / "b.nii")
