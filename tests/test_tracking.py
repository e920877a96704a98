# SPDX-License-Identifier: Apache-2.0
"""Tracking into a real MLflow database."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.inferers import SimpleInferer
from torch import nn

from shared.handlers.metrics_csv import MetricsCsv
from shared.handlers.previews import PreviewGrid
from shared.handlers.tracking import ExperimentTracker


def train(tracker: ExperimentTracker, folder: Path, epochs: int = 2) -> None:
    network = nn.Linear(2, 2)
    data = [{"image": torch.rand(2), "label": torch.zeros(2)} for _ in range(4)]
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=DataLoader(Dataset(data), batch_size=2),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=nn.MSELoss(),
        inferer=SimpleInferer(),
        train_handlers=[
            tracker,
            MetricsCsv(folder / "metrics.csv", phase="train", tracker=tracker),
            PreviewGrid(lambda: torch.zeros(2, 1, 4, 4), folder / "previews", name="x", interval=2, tracker=tracker),
        ],
        decollate=False,
    )
    trainer.run()


# MLflow 3.17's own queries use an option that SQLAlchemy 2.1 deprecates; nothing on our side can choose another.
@pytest.mark.filterwarnings("ignore:The .*noload.* loader strategy is deprecated:sqlalchemy.exc.SADeprecationWarning")
def test_parameters_curves_and_pictures_are_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    settings = {"seed": 3, "image_size": [4, 4]}
    # pytest switches MLflow's telemetry off by itself, so only the variable can be looked at.
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    train(ExperimentTracker(uri, experiment="cxr_ldm test", run_name="first", settings=settings), tmp_path)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"

    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == "cxr_ldm test"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "first"
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == "3"
    assert run.data.params["image_size"] == "[4, 4]"
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert [point.step for point in history] == [1, 2]
    assert run.data.metrics["train_learning_rate"] == pytest.approx(0.1)
    written = (tmp_path / "metrics.csv").read_text()
    assert all(repr(point.value) in written for point in history)
    pictures = client.list_artifacts(run.info.run_id, "previews")
    assert [picture.path for picture in pictures] == ["previews/epoch_0002_x.png"]


@pytest.mark.parametrize("uri", [None, ""])
def test_without_an_address_nothing_is_tracked(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    train(ExperimentTracker(uri, experiment="x", run_name="x"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "previews"]


def test_other_ranks_do_not_track(tmp_path):
    from ignite.engine import Engine

    tracker = ExperimentTracker(f"sqlite:///{tmp_path}/mlflow.db", experiment="x", run_name="x")
    engine = Engine(lambda engine, batch: None)
    engine.state.rank = 1
    tracker.attach(engine)
    tracker.log_values(engine, {"loss": 1.0}, 1)
    tracker.log_picture(tmp_path / "x.png")
    assert not engine.has_event_handler(tracker._handler, Events.STARTED)
    assert list(tmp_path.iterdir()) == []
