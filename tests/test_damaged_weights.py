# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import gzip
import json
import logging
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from shared.handlers.best import SaveBest
from shared.handlers.checkpoint import ResumableCheckpoint
from shared.tokenizer import ClipTokenizer, read_merges
from shared.weights import load_weights
from tests import commands
from tests.bundle_runs import BundleRuns
from tests.conftest import ROOT
from tests.dmri_runs import make_phantoms
from tools.phantoms.brain_controlnet import make_dataset as make_heads
from tools.phantoms.sdseg import make_dataset as make_pictures

pytestmark = pytest.mark.reliability(7)

# Released file -> the configuration and the part of its network that it belongs to.
FILES = {
    "brain_controlnet/model": ("inference", ""),
    "brain_controlnet/stages/autoencoder": ("train_autoencoder", ""),
    "brain_controlnet/stages/diffusion": ("train_diffusion", ""),
    "brain_controlnet/stages/regression": ("train_regression", ""),
    "cxr_ldm/model": ("inference", ""),
    "cxr_ldm/stages/autoencoder": ("train_autoencoder", ""),
    "cxr_ldm/stages/classifier": ("train_classifier", ""),
    "dmri2noddi/model": ("inference", ""),
    "dmri2noddi/stages/vqgan": ("train_vqgan", ""),
    "dmri2noddi/stages/encoder": ("inference", "encoder"),
    "dmri2noddi/stages/baseline": ("train_baseline", ""),
    "sdseg/model": ("inference", ""),
    "sdseg/stages/autoencoder": ("train_autoencoder", ""),
    "sdseg/stages/baseline": ("train_baseline", ""),
}
VOCABULARY = ROOT / "bundles/cxr_ldm/models/tokenizer/clip_bpe_merges.txt.gz"
NUM_FLIPS = 12


def released(name: str) -> Path:
    bundle, _, file = name.partition("/")
    return ROOT / f"bundles/{bundle}/models/tiny/{file}.pt"


def test_every_released_file_is_damaged_here():
    found = {path for folder in ROOT.glob("bundles/*/models") for path in folder.rglob("*") if path.is_file()}
    weights = {released(name) for name in FILES}
    assert found == weights | {path.with_suffix(".json") for path in weights} | {
        VOCABULARY,
        VOCABULARY.with_name("NOTICE"),
    }


def network_of(name: str) -> nn.Module:
    bundle, (config, part) = name.partition("/")[0], FILES[name]
    overlays = [] if config == "train_classifier" else ["tiny"]
    with BundleRuns(bundle, {}).loaded(config, *overlays, device="$torch.device('cpu')") as workflow:
        network = workflow.parser.get_parsed_content("network_def")
    return network.get_submodule(part)


@pytest.fixture(scope="module", params=FILES)
def case(request) -> tuple[Path, nn.Module]:
    """A released file and an untrained network for it."""
    return released(request.param), network_of(request.param)


def flips(content: bytes, seed: int, places: list[int] | None = None) -> Iterator[tuple[int, bytes]]:
    """One bit turned over, at given or at random places."""
    draw = random.Random(seed)
    for place in places or draw.sample(range(len(content)), NUM_FLIPS):
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        yield place, bytes(damaged)


def lengths(size: int) -> list[int]:
    return [0, 1, 3, 40, size // 10, size // 2, size - 4096, size - 30, size - 1]


def places_of(path: Path) -> dict[str, list[int]]:
    """Where the parts of torch's zip file lie."""
    with zipfile.ZipFile(path) as archive:
        entries, directory = archive.infolist(), archive.start_dir
    data = [entry for entry in entries if "/data/" in entry.filename]
    largest = max(data, key=lambda entry: entry.file_size)
    # A local header: 30 bytes, the name, an extra field that fills up to a multiple of 64.
    with path.open("rb") as file:
        file.seek(largest.header_offset)
        header = file.read(30)
    start = largest.header_offset + 30 + int.from_bytes(header[26:28], "little")
    start += int.from_bytes(header[28:30], "little")
    return {
        "header": [entries[0].header_offset, largest.header_offset + 2, largest.header_offset + 27],
        "pickle": [entries[0].header_offset + 200, entries[0].header_offset + entries[0].file_size // 2],
        "tensor": [start, start + 1, start + largest.file_size // 2, start + largest.file_size - 1],
        "directory": [directory, directory + 10, directory + 16, directory + 20, directory + 42, directory + 50],
        "end": [path.stat().st_size - offset for offset in (22, 12, 10, 6, 1)],
    }


def outcome(network: nn.Module, path: Path, expected: dict[str, torch.Tensor]) -> str:
    """``refused`` by the file's name with the network as it was, or ``loaded`` whole; anything else fails."""
    before = copy.deepcopy(network.state_dict())
    refusal = ""
    try:
        load_weights(network, path)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith((f"{path}: expected ", f"{path.with_suffix('.json')}: expected "))
        assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
        return "refused"
    state = network.state_dict()
    assert all(torch.equal(state[key], tensor.to(state[key].dtype)) for key, tensor in expected.items())
    network.load_state_dict(before)
    return "loaded"


def test_truncated_or_swapped_weights_are_refused(case, tmp_path, record_property):
    """With the description beside them, and without it."""
    source, network = case
    path, content = tmp_path / "weights.pt", source.read_bytes()
    expected = torch.load(source, weights_only=True)
    other = next(released(name) for name in FILES if released(name) != source)
    damages = [content[:size] for size in lengths(len(content))] + [other.read_bytes(), b"\0" * len(content)]
    for described in (True, False):
        if described:
            shutil.copyfile(source.with_suffix(".json"), tmp_path / "weights.json")
        else:
            (tmp_path / "weights.json").unlink()
        for damaged in damages:
            path.write_bytes(damaged)
            assert outcome(network, path, expected) == "refused"
        path.write_bytes(content)
        assert outcome(network, path, expected) == "loaded"
    record_property("cases", 2 * len(damages))


def test_no_flipped_bit_reaches_the_network(case, tmp_path, record_property):
    """Without a description a flip can stay unnoticed where nothing depends on it: between entries, in a time."""
    source, network = case
    path, content = tmp_path / "weights.pt", source.read_bytes()
    expected = torch.load(source, weights_only=True)
    parts = places_of(source)
    damages = [damaged for places in parts.values() for _, damaged in flips(content, 0, places)]
    damages += [damaged for _, damaged in flips(content, seed=1)]
    found = []
    for damaged in damages:
        path.write_bytes(damaged)
        found.append(outcome(network, path, expected))
    in_tensor = slice(len(parts["header"] + parts["pickle"]), len(parts["header"] + parts["pickle"] + parts["tensor"]))
    assert found[in_tensor] == ["refused"] * len(parts["tensor"])
    shutil.copyfile(source.with_suffix(".json"), tmp_path / "weights.json")
    for damaged in damages[::4]:
        path.write_bytes(damaged)
        assert outcome(network, path, expected) == "refused"
    refused = found.count("refused")
    record_property("cases", len(damages) + len(damages[::4]))
    record_property("figure", f"{refused} of {len(found)} flips refused by checksums, the others change no weight")


def test_a_damaged_description_is_named_or_does_no_harm(case, tmp_path, record_property):
    source, network = case
    path, described = tmp_path / "weights.pt", tmp_path / "weights.json"
    shutil.copyfile(source, path)
    content, expected = source.with_suffix(".json").read_bytes(), torch.load(source, weights_only=True)
    place = content.index(b'"sha256": "') + len(b'"sha256": "')
    truncated = [content[:size] for size in (0, 1, len(content) // 2, len(content) - 2)]
    wrong = [damaged for _, damaged in flips(content, 0, [place, place + 63])] + [b'{"sha256": 5}']
    for damaged in [*truncated, *wrong]:
        described.write_bytes(damaged)
        assert outcome(network, path, expected) == "refused"
    for _, damaged in flips(content, seed=1):
        described.write_bytes(damaged)
        outcome(network, path, expected)
    for harmless in (b"{}", b"[1]"):
        described.write_bytes(harmless)
        assert outcome(network, path, expected) == "loaded"
    record_property("cases", len(truncated) + len(wrong) + NUM_FLIPS + 2)


def test_messages_say_what_is_wrong(tmp_path):
    source = released("sdseg/stages/baseline")
    path, network = tmp_path / "baseline.pt", network_of("sdseg/stages/baseline")
    place = places_of(source)["tensor"][2]
    [(_, damaged)] = flips(source.read_bytes(), 0, [place])
    path.write_bytes(damaged)
    with pytest.raises(
        ValueError, match=r"does not load \(wrong checksum of the entry .*/data/\d+\); it is damaged or"
    ):
        load_weights(network, path)
    shutil.copyfile(source.with_suffix(".json"), path.with_suffix(".json"))
    digest = json.loads(path.with_suffix(".json").read_text())["sha256"]
    with pytest.raises(ValueError, match=rf"expected the file with sha256 {digest} that baseline.json describes, got"):
        load_weights(network, path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match=rf"^{path.with_suffix('.json')}: expected the description of baseline.pt as"):
        load_weights(network, path)


def test_a_damaged_vocabulary_is_named_or_does_no_harm(tmp_path, record_property):
    content, path, expected = VOCABULARY.read_bytes(), tmp_path / "merges.txt.gz", read_merges(VOCABULARY)
    text = gzip.decompress(content)
    cut = [content[:size] for size in lengths(len(content))] + [text[: len(text) // 2], text[:-3000], b"\0" * 5000]
    for damaged in cut:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"^{path}: (not a readable CLIP vocabulary|expected the 48894 merges)"):
            ClipTokenizer(path)
    refused = 0
    for place, damaged in [*flips(content, 0), *flips(content, 1, [0, 1, 2, 3, 5, 9, 12])]:
        path.write_bytes(damaged)
        refusal = f"{path}: "
        try:
            assert read_merges(path) == expected, place
        except ValueError as error:
            refusal, refused = str(error), refused + 1
        assert refusal.startswith(f"{path}: ")
    assert refused >= NUM_FLIPS
    record_property("cases", len(cut) + NUM_FLIPS + 7)


# Checkpoints of an interrupted training


def resumed(folder: Path, resume: str = "auto", epochs: int = 4) -> tuple[nn.Module, list[int]]:
    """Go on with a training of one weight that grows by one in each epoch."""
    network, seen = nn.Linear(1, 1, bias=False), []
    nn.init.zeros_(network.weight)

    def grow(engine: Engine, batch: int) -> None:
        seen.append(engine.state.epoch)
        network.weight.data += 1

    engine = Engine(grow)
    engine.state.rank, engine.scaler = 0, None  # as MONAI's trainers have
    ResumableCheckpoint(folder, {"network": network}, resume=resume).attach(engine)
    engine.run([0], max_epochs=epochs)
    return network, seen


def damages_of(content: bytes, path: Path) -> list[bytes]:
    tensor = places_of(path)["tensor"]
    places = [place for places in places_of(path).values() for place in places]
    flipped = [damaged for _, damaged in [*flips(content, 0, places), *flips(content, seed=1)]]
    # The first is one that torch reads without an error.
    return [next(flips(content, 2, tensor[-1:]))[1], *flipped, *(content[: max(n, 0)] for n in lengths(len(content)))]


def test_training_goes_on_from_the_newest_checkpoint_that_is_whole(tmp_path, caplog, record_property):
    resumed(tmp_path / "run", epochs=3)
    newest = tmp_path / "run/checkpoint_epoch=3.pt"
    damages = damages_of(newest.read_bytes(), newest)
    fell_back = 0
    for number, damaged in enumerate(damages):
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"run{number}")
        broken = folder / newest.name
        broken.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            network, epochs = resumed(folder)
        # Epoch 4 either way: nothing of a damaged file is in the weights.
        assert network.weight.item() == 4
        assert epochs in ([4], [3, 4])
        if epochs == [3, 4]:
            fell_back += 1
            assert f"{broken}: does not load (" in caplog.text
            assert "trying the one before" in caplog.text
    assert fell_back >= len(damages) - 12
    record_property("cases", len(damages))
    record_property("figure", f"{fell_back} of {len(damages)} damaged checkpoints replaced by the one before")


def test_a_damaged_checkpoint_that_was_asked_for_stops_the_run(tmp_path):
    resumed(tmp_path, epochs=2)
    path = tmp_path / "checkpoint_epoch=2.pt"
    path.write_bytes(damages_of(path.read_bytes(), path)[0])
    assert torch.load(path, weights_only=True)["network"]["weight"].item() != 2  # torch reads another weight
    with pytest.raises(ValueError, match=rf"^{path}: expected a state dict of plain tensors, .*wrong checksum"):
        resumed(tmp_path, resume=str(path))


def test_weights_never_lie_beside_the_description_of_others(tmp_path, monkeypatch):
    """A run that is killed between the two files leaves weights that load."""
    network, path = nn.Linear(1, 1), tmp_path / "model.pt"

    def improve(engine: Engine, score: float) -> None:
        engine.state.rank, engine.state.metrics["score"] = 0, score  # type: ignore[attr-defined]

    evaluator = Engine(improve)
    SaveBest(path, network, "score").attach(evaluator)
    evaluator.run([2.0])
    assert torch.equal(load_weights(nn.Linear(1, 1), path).weight, network.weight)

    def die(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shared.handlers.best.save_json", die)
    network.weight.data += 1
    with pytest.raises(KeyboardInterrupt):
        evaluator.run([1.0])
    assert torch.equal(load_weights(nn.Linear(1, 1), path).weight, network.weight)


# What a user reads


PHANTOMS: dict[str, Callable[[Path], object]] = {
    "brain_controlnet": lambda folder: make_heads(str(folder), n=3, size=(48, 64, 4), spacing=(3.4, 3.5, 6.0)),
    "sdseg": lambda folder: make_pictures(str(folder), num_images=18, size=(80, 64)),
    "dmri2noddi": lambda folder: make_phantoms(folder, num_subjects=3),
}


def damage_tensor(path: Path) -> None:
    [(_, damaged)] = flips(path.read_bytes(), 0, places_of(path)["tensor"][:1])
    path.write_bytes(damaged)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("bundle", "damage", "described"),
    [
        ("cxr_ldm", cut, False),
        ("brain_controlnet", damage_tensor, False),
        ("sdseg", damage_tensor, True),
        ("dmri2noddi", lambda path: path.write_bytes(b""), False),
    ],
)
def test_inference_ends_in_one_line_that_names_the_file(
    bundle: str, damage: Callable[[Path], None], described: bool, tmp_path: Path
):
    folder = ROOT / "bundles" / bundle
    path = tmp_path / "models/model.pt"
    path.parent.mkdir()
    shutil.copyfile(folder / "models/tiny/model.pt", path)
    if described:
        shutil.copyfile(folder / "models/tiny/model.json", path.with_suffix(".json"))
    damage(path)
    words = ["monai.bundle", "run", "--config_file", "['configs/inference.json','configs/tiny.json']"]
    options = ["--ckpt_dir", str(path.parent), "--output_dir", str(tmp_path / "out")]
    if bundle in PHANTOMS:
        PHANTOMS[bundle](tmp_path / "data")
        options += ["--dataset_dir", str(tmp_path / "data")]
    finished = commands.run(*words, *options, cwd=folder, limit=30)
    assert finished.code != 0
    assert finished.last_line.startswith(f"{path}: expected ")
    assert "Traceback" not in finished.err
    assert not list((tmp_path / "out").rglob("*.png")) + list((tmp_path / "out").rglob("*.nii.gz"))
