# SPDX-License-Identifier: Apache-2.0
"""Federated clients: ``monai.fl.client.MonaiAlgo`` trains, exchanges and evaluates with the bundles as they are."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, FlStatistics, WeightType
from monai.fl.utils.exchange_object import ExchangeObject

from tests.bundle_runs import BundleRuns, curve
from tests.sdseg_runs import SDSEG, save_network
from tests.test_cxr_bundle import CXR
from tools.phantoms.cxr_ldm import make_dataset as make_radiographs
from tools.phantoms.sdseg import make_dataset

# MONAI reminds that a configuration is a program, which a server could have written.
pytestmark = pytest.mark.filterwarnings("ignore:executing the bundle config:UserWarning")

Weights = dict[str, torch.Tensor]
# Whole evaluation, few samples; the perturbations of the stability study take most of its time.
EVALUATION: dict[str, Any] = {"num_samples": 2, "validate#handlers#3#stability": None}
# 9 images: 4 steps an epoch.
SHORT: dict[str, Any] = {"flips": "none", "batch_size": 2}


@pytest.fixture(autouse=True)
def unchanged_process() -> Iterator[None]:
    """Undo what ``initialize`` of a configuration does to the process."""
    path, hook = list(sys.path), sys.excepthook
    yield
    sys.path[:], sys.excepthook = path, hook


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory) -> list[Path]:
    """Two halves of the phantoms: 9 images for training each, no two alike."""
    root = tmp_path_factory.mktemp("hospitals")
    for seed in (1, 2):
        make_dataset(str(root / str(seed)), num_images=18, seed=seed)
    return [root / "1", root / "2"]


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """Folder of models: the autoencoder that all clients have, and a ``model.pt`` that none of them must evaluate."""
    return save_network(tmp_path_factory.mktemp("released") / "models")


def make_client(
    runs: BundleRuns,
    dataset: Path,
    root: Path,
    models: Path,
    *,
    evaluate: str = "evaluate",
    evaluation: Mapping[str, Any] | None = None,
    diff: bool = False,
    **overrides: Any,
) -> MonaiAlgo:
    """A client with files of its own below ``root``, and networks of a few channels."""
    if not (root / "models").exists():
        shutil.copytree(models, root / "models")
    folders = runs.folders(root, "train")
    options = copy.deepcopy({**runs.stages["train"], "dataset_dir": str(dataset), **folders, **overrides})
    overlays = [] if evaluate == "train" else [f"configs/{evaluate}.json"]
    result = MonaiAlgo(
        str(runs.folder),
        send_weight_diff=diff,
        config_train_filename=["configs/train.json", "configs/tiny.json"],
        config_evaluate_filename=["configs/train.json", *overlays, "configs/tiny.json"],
        train_kwargs=options,
        eval_kwargs=copy.deepcopy({**options, "output_dir": str(root / "runs/server"), **(evaluation or {})}),
    )
    result.initialize({ExtraItems.CLIENT_NAME: root.name})
    return result


def cloned(state: Mapping[str, torch.Tensor]) -> Weights:
    """On a CPU the weights that a client gives are those that it goes on training."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def equal(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


def averaged(states: list[Weights], counts: list[int]) -> Weights:
    """What a server does: the mean, weighted by the steps that each client made."""
    shares = [count / sum(counts) for count in counts]
    return {
        name: sum(share * state[name].double() for share, state in zip(shares, states, strict=True)).float()  # type: ignore[union-attr]
        for name in states[0]
    }


class Watched:
    """A client, and what its network and moving average hold when the first step of a round is made."""

    def __init__(self, client: MonaiAlgo) -> None:
        self.client = client
        self.seen: list[Weights] = []
        self.average: list[Weights] = []
        assert client.trainer is not None
        client.trainer.add_event_handler(Events.EPOCH_STARTED, self._look)

    def _look(self, engine: Any) -> None:
        content = self.client.train_workflow.parser.get_parsed_content
        self.seen.append(cloned(engine.network.state_dict()))
        self.average.append(cloned(content("ema").ema_model.state_dict()))

    def average_now(self) -> Weights:
        return cloned(self.client.train_workflow.parser.get_parsed_content("ema").ema_model.state_dict())

    def train(self, weights: Weights) -> tuple[Weights, int]:
        """One round: what the client gives back, and its number of steps."""
        self.client.train(ExchangeObject(weights=cloned(weights)))
        given = self.client.get_weights()
        return cloned(given.weights), given.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS]

    def evaluate(self, weights: Weights) -> dict[str, float]:
        return self.client.evaluate(ExchangeObject(weights=cloned(weights))).metrics


def first_weights(client: MonaiAlgo) -> Weights:
    assert client.trainer is not None
    return cloned(client.trainer.network.state_dict())


@pytest.fixture(scope="module")
def federation(hospitals, released, tmp_path_factory) -> dict[str, Any]:
    """Two rounds of federated averaging between two clients of ``sdseg``; the second makes more steps."""
    root = tmp_path_factory.mktemp("federation")
    path, hook = list(sys.path), sys.excepthook
    sizes = ({"batch_size": 2}, {"batch_size": 1})
    sites = [
        Watched(make_client(SDSEG, data, root / f"site{n}", released, evaluation=EVALUATION, **{**SHORT, **size}))
        for n, (data, size) in enumerate(zip(hospitals, sizes, strict=True))
    ]
    weights = first_weights(sites[0].client)
    result: dict[str, Any] = {"root": root, "sites": sites, "server": [weights], "rounds": [], "averages": []}
    for _ in range(2):
        replies = [site.train(weights) for site in sites]
        result["averages"].append([site.average_now() for site in sites])
        weights = averaged([reply[0] for reply in replies], [reply[1] for reply in replies])
        result["rounds"].append(replies)
        result["server"].append(weights)
    result["metrics"] = [[site.evaluate(state) for state in result["server"][-1:]] for site in sites]
    sys.path[:], sys.excepthook = path, hook
    return result


def test_both_clients_start_every_round_with_the_servers_weights(federation):
    for number in (0, 1):
        server = federation["server"][number]
        for site in federation["sites"]:
            differing = [name for name in server if not torch.equal(site.seen[number][name], server[name])]
            # Before the first round nobody has measured the scale of the latents: each client does.
            assert differing == (["scale_factor"] if number == 0 else [])


def test_a_round_trains_for_local_epochs_and_the_mean_is_that_of_the_clients(federation):
    for number, replies in enumerate(federation["rounds"]):
        assert [steps for _, steps in replies] == [4, 9]
        server = federation["server"][number + 1]
        for name in ("unet.conv_out.weight", "vision_encoder.head.weight"):
            expected = (4 * replies[0][0][name] + 9 * replies[1][0][name]) / 13
            torch.testing.assert_close(server[name], expected, rtol=1e-5, atol=1e-7)
            for state, _ in replies:
                assert not torch.equal(state[name], federation["server"][number][name])
    for site in federation["sites"]:
        assert site.client.trainer.state.epoch == 2


@pytest.mark.reliability(8)
def test_loss_falls_and_the_frozen_autoencoder_keeps_its_bits(federation, released):
    autoencoder = torch.load(released / "stages/autoencoder.pt", weights_only=True)
    for state in (*federation["server"], *(reply[0] for replies in federation["rounds"] for reply in replies)):
        assert all(torch.equal(state[f"autoencoder.{name}"], tensor) for name, tensor in autoencoder.items())
    for number in (0, 1):
        losses = [float(row[4]) for row in curve(federation["root"] / f"site{number}/runs/train", "train", "loss")]
        assert len(losses) == 2
        assert losses[1] < losses[0]


def test_clients_measure_the_scale_once_and_then_share_its_mean(federation):
    own = [reply[0]["scale_factor"].item() for reply in federation["rounds"][0]]
    assert own[0] != own[1]
    mean = (4 * own[0] + 9 * own[1]) / 13
    for state in (federation["server"][1], *(reply[0] for reply in federation["rounds"][1])):
        assert state["scale_factor"].item() == pytest.approx(mean, rel=1e-6)


def test_moving_average_moves_with_the_servers_weights(federation):
    """By as much as the weights did: round by round the mean of the clients' averages stays."""
    server = federation["server"]
    for number, site in enumerate(federation["sites"]):
        before, own = federation["averages"][0][number], federation["rounds"][0][number][0]
        for name in ("unet.conv_out.weight", "vision_encoder.head.weight"):
            assert torch.equal(site.average[0][name], server[0][name])
            expected = before[name] + server[1][name] - own[name]
            torch.testing.assert_close(site.average[1][name], expected, rtol=1e-4, atol=1e-6)
            assert not torch.allclose(before[name], expected, rtol=1e-3, atol=1e-5)


def test_evaluation_measures_the_servers_weights_and_not_the_file(federation):
    """``models/model.pt`` lies in every client's folder; ``evaluate.json`` alone would load it."""
    server = federation["server"][-1]
    for site, metrics in zip(federation["sites"], federation["metrics"], strict=True):
        assert equal(site.client.evaluator.network.state_dict(), server)
        assert "Dice, one sample (Native resolution)" in metrics[0]
        assert (federation["root"] / site.client.client_name / "runs/server/evaluation/summary.json").exists()


def test_a_new_client_leaves_its_old_checkpoints_alone(federation, hospitals, released):
    """A process that died is started again: the server knows better than the files of an earlier round."""
    root = federation["root"] / "site0"
    assert sorted(path.name for path in (root / "runs/train/checkpoints").iterdir())[-1] == "checkpoint_epoch=2.pt"
    site = Watched(make_client(SDSEG, hospitals[0], root, released, **SHORT))
    server = federation["server"][-1]
    _, steps = site.train(server)
    assert equal(site.seen[0], server)
    assert (site.client.trainer.state.epoch, steps) == (1, 4)
    checkpoint = root / "runs/train/checkpoints/checkpoint_epoch=2.pt"
    asked = make_client(SDSEG, hospitals[0], root, released, **SHORT, resume=str(checkpoint))
    with pytest.raises(ValueError, match=r"^resume: expected auto or never where weights were put into the network"):
        asked.train(ExchangeObject(weights=cloned(server)))


def test_differences_give_the_same_weights_and_none_for_frozen_parts(federation, hospitals, released, tmp_path):
    site = Watched(make_client(SDSEG, hospitals[0], tmp_path / "site", released, diff=True, **SHORT))
    server = federation["server"][0]
    difference, _ = site.train(server)
    assert site.client.get_weights().weight_type == WeightType.WEIGHT_DIFF
    for name, tensor in federation["rounds"][0][0][0].items():
        if name.startswith("autoencoder."):
            assert not difference[name].any()
        torch.testing.assert_close(server[name] + difference[name], tensor, rtol=1e-5, atol=1e-6)


def test_one_client_alone_trains_as_without_a_federation(federation, hospitals, released, tmp_path):
    shutil.copytree(released, tmp_path / "plain/models")
    SDSEG.execute("train", hospitals[0], **SHORT, **SDSEG.folders(tmp_path / "plain", "train"), max_epochs=2)
    site = Watched(make_client(SDSEG, hospitals[0], tmp_path / "site", released, **SHORT))
    weights = first_weights(site.client)
    for _ in range(2):
        weights, _ = site.train(weights)
    plain, alone = (tmp_path / name / "runs/train" for name in ("plain", "site"))
    assert curve(alone, "train", "loss") == curve(plain, "train", "loss")
    for one, two in zip(curve(alone, "validation"), curve(plain, "validation"), strict=True):
        assert one[:4] == two[:4]
        assert float(one[4]) == pytest.approx(float(two[4]), abs=1e-3)
    model = torch.load(tmp_path / "plain/models/model.pt", weights_only=True)
    best = torch.load(tmp_path / "site/models/model.pt", weights_only=True)
    for name in model:
        torch.testing.assert_close(best[name], model[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def radiographs(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("radiographs")
    for seed in (1, 2):
        make_radiographs(str(root / str(seed)), n=20, size=128, split=(0.4, 0.2, 0.4), seed=seed)
    return [root / "1", root / "2"]


def test_text_to_image_model_trains_exchanges_and_validates(radiographs, tmp_path):
    with CXR.small("train", radiographs[0], CXR.folders(tmp_path, "train")) as workflow:
        autoencoder = workflow.parser.get_parsed_content("autoencoder_def")
        (tmp_path / "models/stages").mkdir(parents=True)
        torch.save(autoencoder.state_dict(), tmp_path / "models/stages/autoencoder.pt")
    sites = [
        Watched(
            make_client(
                *(CXR, data, tmp_path / f"site{n}", tmp_path / "models"),
                evaluate="train",
                evaluation={"validate#best#path": str(tmp_path / f"best{n}.pt")},
                **{"preview_sampler#num_inference_steps": 2},
            )
        )
        for n, data in enumerate(radiographs)
    ]
    weights = first_weights(sites[0].client)
    for number in range(2):
        replies = [site.train(weights) for site in sites]
        started, weights = weights, averaged([reply[0] for reply in replies], [reply[1] for reply in replies])
        moved = {name.split(".")[0] for name in weights if not torch.equal(weights[name], started[name])}
        assert {"unet"} <= moved - {"scale_factor"} <= {"unet", "text_encoder"}
        assert ("scale_factor" in moved) == (number == 0)
    for n, site in enumerate(sites):
        metrics = site.evaluate(weights)
        assert metrics.keys() == {"velocity_mse"}
        assert metrics["velocity_mse"] < 100.0
        # The best of the server's weights, by this client's validation.
        assert equal(torch.load(tmp_path / f"best{n}.pt", weights_only=True), weights)
