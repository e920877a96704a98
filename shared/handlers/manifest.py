# SPDX-License-Identifier: Apache-2.0
"""Every run explains itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.engines import Trainer

from shared.distributed import process_count
from shared.files import remove_incomplete, save_json, sha256_of_file
from shared.provenance import active_config, git_commit, sha256_of_json, software_versions
from shared.run_folder import claim_folder, release_folder

logger = logging.getLogger(__name__)


class RunManifest:
    """Write ``config.json`` and ``manifest.json`` into the run folder when an engine starts.

    Temporary files that a killed run left there are removed. A training keeps others out of its folder while it runs.

    Args:
        output_dir: run folder.
        task: name of the stage, e.g. ``cxr_ldm diffusion``.
        settings: values worth seeing at a glance (seed, batch size, ...).
        dataset_dir: folder whose ``datalist.json`` is hashed.

    Raises:
        ValueError: at the start of a training, when another process trains in the folder.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        task: str,
        settings: Mapping[str, Any] | None = None,
        dataset_dir: str | Path | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.task = task
        self.settings = dict(settings or {})
        self.dataset_dir = Path(dataset_dir) if dataset_dir is not None else None
        self.config = active_config()

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._write)
        if isinstance(engine, Trainer):
            engine.add_event_handler(Events.COMPLETED, lambda: release_folder(self.output_dir))

    def _write(self, engine: Any) -> None:
        if engine.state.rank != 0:
            return
        if isinstance(engine, Trainer):
            claim_folder(self.output_dir)
        for stray in remove_incomplete(self.output_dir, below=True):
            logger.info("%s: removed, left by an interrupted write", stray)
        datalist = self.dataset_dir / "datalist.json" if self.dataset_dir is not None else None
        manifest = {
            "task": self.task,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": str(engine.state.device),
            "processes": process_count(),
            "settings": self.settings,
            "config_sha256": sha256_of_json(self.config) if self.config is not None else None,
            "datalist_sha256": sha256_of_file(datalist) if datalist is not None and datalist.exists() else None,
            "git_commit": git_commit(Path(__file__).parent),
            "software": software_versions(),
        }
        if self.config is not None:
            save_json(self.config, self.output_dir / "config.json")
        save_json(manifest, self.output_dir / "manifest.json")
