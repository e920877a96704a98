# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from shared.files import atomic_path, remove_incomplete, save_tensors, sha256_of_file, sha256_of_state


def test_failed_write_keeps_the_previous_file(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("good")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert path.read_text() == "good"
    assert os.listdir(tmp_path) == ["model.pt"]


def test_full_disk_names_file_and_bytes(tmp_path):
    """A process that may write 20 kB only: the old file stays and the message tells what happened."""
    path = tmp_path / "model.pt"
    save_tensors({"a": torch.zeros(10)}, path)
    program = f"""
        import resource, signal, torch
        from shared.files import save_tensors
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        save_tensors({{"a": torch.zeros(100_000)}}, {str(path)!r})
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert f"{path}: the write failed after" in last_line
    assert " of at least 400000 needed with " in last_line
    assert " bytes free and 20000 bytes allowed in a file" in last_line
    assert torch.load(path, weights_only=True)["a"].shape == (10,)
    assert os.listdir(tmp_path) == ["model.pt"]


def test_remove_incomplete_spares_whole_files(tmp_path):
    (tmp_path / ".model.pt.x.incomplete").write_text("half")
    (tmp_path / "model.pt").write_text("whole")
    assert [path.name for path in remove_incomplete(tmp_path)] == [".model.pt.x.incomplete"]
    assert os.listdir(tmp_path) == ["model.pt"]


def test_remove_incomplete_spares_files_that_are_being_written(tmp_path):
    stray = tmp_path / "below/.model.pt.x.incomplete"
    stray.parent.mkdir()
    stray.write_text("half")
    with atomic_path(stray.parent / "model.pt") as temporary:
        temporary.write_text("whole")
        assert remove_incomplete(tmp_path) == []
        assert remove_incomplete(tmp_path, below=True) == [stray]
    assert os.listdir(stray.parent) == ["model.pt"]


def test_remove_incomplete_waits_a_day_where_files_cannot_be_locked(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    for name, hours in (("new", 23), ("old", 25)):
        path = tmp_path / f".{name}.incomplete"
        path.write_text("half")
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    with atomic_path(tmp_path / "model.pt") as temporary:
        temporary.write_text("whole")
        assert [path.name for path in remove_incomplete(tmp_path)] == [".old.incomplete"]
    assert (tmp_path / "model.pt").read_text() == "whole"


def test_full_disk_is_told_also_where_nothing_can_be_begun(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    path = tmp_path / "absent/model.pt"
    with pytest.raises(OSError, match=f"^{path}: the write failed after 0 bytes of at least 40 needed with ") as caught:
        save_tensors({"a": torch.zeros(10), "b": [torch.zeros(0)]}, path)
    assert caught.value.errno == errno.ENOSPC


def test_state_hash_depends_on_values_names_and_types(tmp_path):
    state = {"a": torch.arange(4.0)}
    reference = sha256_of_state(state)
    assert sha256_of_state({"a": torch.arange(4.0)}) == reference
    assert sha256_of_state({"b": torch.arange(4.0)}) != reference
    assert sha256_of_state({"a": torch.arange(4.0) + 1e-6}) != reference
    assert sha256_of_state({"a": torch.arange(4.0).reshape(2, 2)}) != reference
    assert sha256_of_state({"a": torch.arange(4)}) != reference
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
