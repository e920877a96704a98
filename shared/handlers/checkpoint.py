# SPDX-License-Identifier: Apache-2.0
"""Checkpoints from which an interrupted training goes on as if nothing had happened."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from shared.distributed import from_main_process, unwrapped
from shared.files import remove_incomplete, save_tensors
from shared.handlers.given_weights import GivenWeights
from shared.weights import read_tensors

logger = logging.getLogger(__name__)

_PATTERN = re.compile(r"checkpoint_epoch=(\d+)\.pt")


class ResumableCheckpoint:
    """Save the whole state of a training after each epoch, and go on from the newest loadable file.

    ``monai.handlers.CheckpointSaver`` writes in place, so that a kill leaves a broken file; ignite's ``Checkpoint`` is
    atomic, but neither picks the newest file that loads, nor compares settings, nor keeps the epoch limit of the new
    run. Random states are not stored: :class:`shared.handlers.seeding.EpochSeeds` derives them from seed and epoch. In
    distributed runs rank 0 alone writes, and all ranks load the file that it picks.

    Weights that were put into the network after the training was built, by a federated client or MONAI Label, are what
    the training goes on from, and no checkpoint is read.

    Args:
        save_dir: folder of the checkpoints.
        state: name to object with ``state_dict`` and ``load_state_dict``; the trainer's counters are added.
        settings: plain values that must equal those of the checkpoint (batch size, learning rate, seed, ...).
        resume: ``auto`` continues from the newest loadable checkpoint in ``save_dir`` if there is one, ``never`` starts
            anew, anything else is the path of a checkpoint that must load.
        force: load a checkpoint although ``settings`` differ.
        interval: epochs between checkpoints; the last epoch is always saved.
        n_saved: checkpoints kept.

    Raises (when the engine starts):
        FileNotFoundError: when there is no checkpoint at the path ``resume``.
        ValueError: for a checkpoint of other settings or another configuration, and for a path where weights were put
            into the network.
    """

    def __init__(
        self,
        save_dir: str | Path,
        state: Mapping[str, Any],
        *,
        settings: Mapping[str, Any] | None = None,
        resume: str = "auto",
        force: bool = False,
        interval: int = 1,
        n_saved: int = 2,
    ) -> None:
        self.save_dir = Path(save_dir)
        self.state = dict(state)
        self.settings = {name: _plain(value) for name, value in (settings or {}).items()}
        self.resume = str(resume)
        self.force = force
        self.interval = interval
        self.n_saved = n_saved
        self._weights = GivenWeights(*self.state.values())

    def attach(self, engine: Engine) -> None:
        self._weights.watch()
        engine.add_event_handler(Events.STARTED, self._resume)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _resume(self, engine: Any) -> None:
        if engine.state.rank == 0:
            for stray in remove_incomplete(self.save_dir):
                logger.info("%s: removed, left by an interrupted write", stray)
        if self.resume == "never":
            return
        if self._weights.given:
            if self.resume != "auto":
                raise ValueError(
                    f"resume: expected auto or never where weights were put into the network before the training "
                    f"started (federated client, MONAI Label), got {self.resume!r}, which would replace them."
                )
            logger.info("%s: not read, the training goes on from the weights in the network", self.save_dir)
            return
        content, path = self._read(engine.state.rank)
        if content is None or path is None:
            return
        self._check_settings(content, path)
        for name, part in self.state.items():
            if name not in content:
                raise KeyError(
                    f"{path}: expected an entry {name!r}, got {sorted(content)}; start anew (--resume never)."
                )
            self._load(unwrapped(part), content[name], name, path)
        engine.state.iteration = content["engine"]["iteration"]
        engine.state.epoch = content["engine"]["epoch"]
        if engine.scaler is not None and content["engine"].get("scaler"):
            engine.scaler.load_state_dict(content["engine"]["scaler"])
        if engine.state.epoch >= engine.state.max_epochs:
            logger.info("%s: all %d epochs are done; raise --max_epochs to go on", path, engine.state.epoch)
            engine.terminate()
        else:
            logger.info("resuming from %s after epoch %d", path, engine.state.epoch)

    def _read(self, rank: int) -> tuple[dict[str, Any] | None, Path | None]:
        # Two ranks that go on after different epochs would wait for each other for ever, so one looks for the file.
        content, path = self._find() if rank == 0 else (None, None)
        path = from_main_process(path)
        if rank != 0 and path is not None:
            content = torch.load(path, map_location="cpu", weights_only=True)
        return content, path

    def _find(self) -> tuple[dict[str, Any] | None, Path | None]:
        if self.resume != "auto":
            chosen = Path(self.resume)
            if not chosen.is_file():
                raise FileNotFoundError(
                    f"{chosen}: expected a checkpoint named by --resume, found no file; give its path, auto or never."
                )
            return read_tensors(chosen), chosen
        for candidate in reversed(checkpoints_in(self.save_dir)):
            try:
                return read_tensors(candidate), candidate
            except (ValueError, OSError) as error:
                logger.warning("%s: does not load (%s); trying the one before", candidate, error)
        return None, None

    def _check_settings(self, content: Mapping[str, Any], path: Path) -> None:
        saved = content.get("settings", {})
        names = sorted({*saved, *self.settings})
        differing = [name for name in names if saved.get(name) != self.settings.get(name)]
        if not differing:
            return
        details = ", ".join(
            f"{name}: {saved.get(name)!r} there, {self.settings.get(name)!r} here" for name in differing
        )
        message = f"{path}: made with other settings ({details})"
        if not self.force:
            raise ValueError(
                f"{message}; use the same settings, choose another --output_dir, or start anew with --resume never."
            )
        logger.warning("%s; loaded all the same, as asked", message)

    @staticmethod
    def _load(part: Any, state: Any, name: str, path: Path) -> None:
        try:
            part.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:400]
            raise ValueError(
                f"{path}: expected a checkpoint of this configuration, but {name!r} does not fit ({reason}); use the "
                "configuration it was made with, choose another --output_dir, or start anew with --resume never."
            ) from error

    def _save(self, engine: Any) -> None:
        epoch = engine.state.epoch
        if engine.state.rank != 0 or (epoch % self.interval and epoch != engine.state.max_epochs):
            return
        scaler = engine.scaler.state_dict() if engine.scaler is not None else None
        content: dict[str, Any] = {name: unwrapped(part).state_dict() for name, part in self.state.items()}
        content["engine"] = {"epoch": epoch, "iteration": engine.state.iteration, "scaler": scaler}
        content["settings"] = self.settings
        save_tensors(content, self.save_dir / f"checkpoint_epoch={epoch}.pt")
        for path in checkpoints_in(self.save_dir)[: -self.n_saved]:
            path.unlink()


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Checkpoints of a folder, oldest epoch first."""
    found = (
        (match, path) for path in Path(folder).glob("checkpoint_epoch=*.pt") if (match := _PATTERN.match(path.name))
    )
    return [path for _, path in sorted((int(match[1]), path) for match, path in found)]


def _plain(value: Any) -> Any:
    """Values that ``weights_only`` loading accepts: numbers, strings and lists of them."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return str(value)
