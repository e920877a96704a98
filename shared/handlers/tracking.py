# SPDX-License-Identifier: Apache-2.0
"""MLflow, if wanted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine


class ExperimentTracker:
    """Parameters, curves and pictures of a run in MLflow while it runs, or nothing when ``tracking_uri`` is ``None``.

    A thin holder of ``monai.handlers.MLFlowHandler``, which opens the run, records parameters and continues an
    unfinished run of the same name; its own curves do not fit, since they cannot show epoch means of several loss
    terms. MLflow is imported only when it is used.

    Args:
        tracking_uri: e.g. ``sqlite:////data/runs/mlflow.db``; ``None`` turns tracking off. MLflow 3 refuses folders.
        experiment: name of the experiment, e.g. the bundle and stage.
        run_name: name of the run; a resumed training must give the same one.
        settings: parameters recorded at the start.
    """

    def __init__(
        self, tracking_uri: str | None, *, experiment: str, run_name: str, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self.run_name = run_name
        self.settings = dict(settings or {})
        self._handler: Any = None

    def attach(self, engine: Any) -> None:
        if not self.tracking_uri or engine.state.rank != 0:
            return
        # MLflow reports its use to its makers unless told not to, and a run must never reach for the network.
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        from monai.handlers import MLFlowHandler

        if self.tracking_uri.startswith("sqlite:///"):
            Path(self.tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        with self._named():
            self._handler = MLFlowHandler(
                tracking_uri=self.tracking_uri,
                iteration_log=False,
                epoch_log=False,
                experiment_name=self.experiment,
                run_name=self.run_name,
                experiment_param=self.settings,
                close_on_complete=True,
            )
        start = self._handler.start

        def begin(engine: Any) -> None:
            with self._named():
                start(engine)

        self._handler.start = begin
        self._handler.attach(engine)

    def log_values(self, engine: Engine, values: Mapping[str, float], step: int) -> None:
        """Record numbers under their names at ``step``.

        Raises:
            RuntimeError: MLflow cannot record them, e.g. on a full disk.
        """
        if self._handler is not None and self._handler.cur_run is not None:
            with self._named():
                for name, value in values.items():
                    self._handler.client.log_metric(self._handler.cur_run.info.run_id, name, value, step=step)

    def log_picture(self, path: str | Path) -> None:
        """Keep a picture with the run.

        Raises:
            RuntimeError: MLflow cannot record it, e.g. on a full disk.
        """
        if self._handler is not None and self._handler.cur_run is not None:
            with self._named():
                self._handler.client.log_artifact(self._handler.cur_run.info.run_id, str(path), "previews")

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # An address of another kind may hold a password.
            uri = str(self.tracking_uri)
            where = uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else "tracking_uri"
            reason = " ".join(str(error).split())[:200]
            raise RuntimeError(
                f"{where}: expected MLflow to record the run, but it could not ({reason}); is the disk full? Free some "
                'space, or give another --tracking_uri, "" for none, then resume.'
            ) from error
