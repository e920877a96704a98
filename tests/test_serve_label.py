# SPDX-License-Identifier: Apache-2.0
"""`tools.serve_label` without a server: folders, the command that starts one, requests and what becomes of answers."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import stat
import sys
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from tools import command_line, label_check, label_folders, label_requests
from tools.label_requests import Answer, as_multipart, from_multipart, read_image, suffix_of
from tools.serve_label import COMMANDS, ask, prepare, start, train

URL = "http://127.0.0.1:8000"
# Every byte, line ends of all kinds, and what looks like a boundary.
BINARY = bytes(range(256)) + b"\r\n\n\r--other--\r\n\r\n--x\r\n"


@pytest.fixture(autouse=True)
def label_environment(tmp_path, monkeypatch) -> Path:
    """A stand-in for `make label`: a Python that can only unpack the app."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    python = tmp_path / ".label/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\n[ "$2 $3" = "monailabel.main apps" ] || exit 1\nmkdir -p "$8/$6" && touch "$8/$6/main.py"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


@pytest.fixture
def bundle(tmp_path) -> Path:
    return make_bundle(tmp_path / "dist" / "sdseg")


def make_bundle(folder: Path) -> Path:
    for name in ("configs", "models", "eval"):
        (folder / name).mkdir(parents=True)
    for name in ("inference", "metadata"):
        (folder / "configs" / f"{name}.json").write_text("{}")
    (folder / "configs/train.json").write_text(json.dumps({"learning_rate": 1, "train": {"trainer": {}}}))
    (folder / "models/model.pt").write_bytes(b"weights")
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Three pictures, two of one name, with masks in another folder."""
    folder = tmp_path / "set"
    for name in ("a/images/1.png", "b/images/1.png", "b/images/two.png", "masks/a1.png", "b/.hidden.png", "b/list.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    items = [{"image": "a/images/1.png", "label": "masks/a1.png"}, {"image": "b/images/two.png"}]
    (folder / "datalist.json").write_text(json.dumps({"training": items, "test": []}))
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Folders


def test_bundle_and_pictures_are_copied_under_ids(tmp_path, bundle, pictures, capsys):
    prepare(str(bundle), str(tmp_path / "out"), studies=str(pictures), only="*/images/*")
    out = tmp_path / "out"
    assert (out / "app/main.py").is_file()
    assert (out / "app/model/sdseg/models/model.pt").read_bytes() == b"weights"
    assert not (out / "app/model/sdseg/eval").exists()
    assert names_in(out / "studies") == ["a_images_1.png", "b_images_1.png", "two.png"]
    # The server follows links: its client could delete or overwrite the original.
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert (out / "studies/b_images_1.png").read_bytes() == b"b/images/1.png"
    assert label_folders.read_record(out)["studies"]["two"] == str(out / "studies/two.png")
    assert "two  <-" in capsys.readouterr().out


def test_a_second_call_replaces_its_own_files_and_keeps_what_was_drawn(tmp_path, bundle, pictures):
    out = tmp_path / "out"
    prepare(str(bundle), str(out), studies=str(pictures), only="*/images/*", labels="training")
    final = out / "studies/labels/final"
    assert names_in(final) == ["a_images_1.png"]
    assert (final / "a_images_1.png").read_bytes() == b"masks/a1.png"
    (final / "a_images_1.png").write_bytes(b"drawn")
    (out / "studies/uploaded.png").write_bytes(b"uploaded")
    prepare(str(bundle), str(out), studies=str(pictures / "a"))
    assert names_in(out / "studies") == ["1.png", "labels/final/a_images_1.png", "uploaded.png"]
    assert (final / "a_images_1.png").read_bytes() == b"drawn"
    (pictures / "b/images/two.png").rename(pictures / "b/images/uploaded.png")
    with pytest.raises(ValueError, match=r"uploaded\.png: was put there by somebody else"):
        prepare(str(bundle), str(out), studies=str(pictures), only="*/uploaded*")
    assert (out / "studies/uploaded.png").read_bytes() == b"uploaded"


def test_gradients_and_mask_come_with_a_diffusion_series(tmp_path, bundle):
    series = tmp_path / "scans" / "sub-7"
    series.mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(np.ones((5, 4, 3, 2), np.float32), np.eye(4)), series / "dwi.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.ones((5, 4, 3), np.uint8), np.eye(4)), series / "mask.nii.gz")
    (series / "dwi.bval").write_text("0 1000")
    (series / "dwi.bvec").write_text("0 1\n0 0\n0 0")
    prepare(str(bundle), str(tmp_path / "out"), studies=str(tmp_path / "scans"), only="*/dwi*")
    expected = ["dwi.bval", "dwi.bvec", "dwi.nii.gz", "dwi_mask.nii.gz"]
    assert names_in(tmp_path / "out/studies") == expected
    assert list(label_folders.read_record(tmp_path / "out")["studies"]) == ["dwi"]


def test_trained_weights_are_not_lost(tmp_path, bundle):
    out = tmp_path / "out"
    prepare(str(bundle), str(out), training='{"learning_rate": 0.5}')
    model = out / "app/model/sdseg"
    assert json.loads((model / "configs/train.json").read_text())["learning_rate"] == 0.5
    assert json.loads((bundle / "configs/train.json").read_text())["learning_rate"] == 1
    (model / "runs").mkdir()
    (model / "models/model.pt").write_bytes(b"trained")
    with pytest.raises(ValueError, match=r"model/sdseg: was trained here.*--overwrite"):
        prepare(str(bundle), str(out))
    assert (model / "models/model.pt").read_bytes() == b"trained"
    prepare(str(bundle), str(out), overwrite=True)
    assert (model / "models/model.pt").read_bytes() == b"weights"


def test_linked_bundles_stay_where_they_are(tmp_path, bundle):
    prepare(str(bundle), str(tmp_path / "out"), link=True)
    assert (tmp_path / "out/app/model/sdseg").resolve() == bundle
    prepare(str(bundle), str(tmp_path / "out"))
    assert (bundle / "models/model.pt").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: (b / "models/ae.pt").write_bytes(b""), r"models: expected model.pt and no other .pt, got \['ae.pt'"),
        (lambda b: (b / "models/model.pt").unlink(), r"models: expected model.pt"),
        (lambda b: (b / "configs/inference.json").unlink(), "sdseg: expected an exported bundle, but configs/inf"),
    ],
)
def test_faults_of_bundles_are_named_before_anything_is_written(tmp_path, bundle, change, message):
    change(bundle)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(str(bundle), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"studies": "nowhere"}, "nowhere: expected a folder of images"),
        ({"studies": "SET", "only": "*.dcm"}, r"set: expected images .* like \*\.dcm, but there are none"),
        ({"studies": "SET", "only": "*/two*", "labels": "test"}, "labels: expected items with image and label"),
        ({"studies": "SET/a", "labels": "training"}, r"datalist\.json: expected it for the labels of 'training'"),
        ({"training": '{"learning_rat": 1}'}, r"train\.json: expected ids of this file, got 'learning_rat'"),
        ({"training": "learning_rate=1"}, "training: expected JSON"),
    ],
)
def test_faults_of_options_are_named(tmp_path, bundle, pictures, options, message):
    options = {name: value.replace("SET", str(pictures)) for name, value in options.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(str(bundle), str(tmp_path / "out"), **options)


def test_two_bundles_need_two_names(tmp_path, bundle):
    twin = make_bundle(tmp_path / "other" / "sdseg")
    with pytest.raises(ValueError, match="bundles: expected exported bundles of different names"):
        prepare(f"{bundle},{twin}", str(tmp_path / "out"))


def test_one_id_cannot_stand_for_two_files():
    def ids(*names: str) -> list[str]:
        return list(label_folders.ids_of({Path(name): name for name in names}).values())

    assert ids("x/a/1.png", "x/b/2.png") == ["1", "2"]
    assert ids("x/a/1.png", "x/b/1.png") == ["a_1", "b_1"]
    assert ids("x/a/1.png", "y/a/1.png", "y/b/1.nii.gz") == ["x_a_1", "y_a_1", "b_1"]
    with pytest.raises(ValueError, match="x_a_b_1: expected one image of this id"):
        ids("x/a_b/1.png", "x/a/b/1.png", "y/1.nii")


# The server's command line


@pytest.fixture
def started(monkeypatch) -> list[Any]:
    calls: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *words: calls.append((Path.cwd(), *words)))
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    return calls


def conf(words: list[str]) -> dict[str, str]:
    return {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == "--conf"}


def test_server_is_local_offline_and_knows_nothing_of_this_repository(
    tmp_path, bundle, started, label_environment, monkeypatch
):
    prepare(f"{bundle},{make_bundle(tmp_path / 'dist' / 'cxr_ldm')}", str(tmp_path / "out"))
    start(str(tmp_path / "out"), port=8123)
    ((folder, python, words, environment),) = started
    assert (folder, python) == (tmp_path / "out", str(label_environment))
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--port") + 1] == "8123"
    expected = {"models": "sdseg,cxr_ldm", "zoo_source": "local", "sam2": "false", "skip_trainers": "true"}
    assert conf(words) == expected
    assert "PYTHONPATH" not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["PATH"].startswith(str(label_environment.parent))
    monkeypatch.chdir(tmp_path)
    start("out", models="sdseg", train=True)
    assert conf(started[-1][2]) == expected | {"models": "sdseg", "skip_trainers": "false"}


def test_what_cannot_be_served_or_trained_is_refused(tmp_path, bundle, started):
    out = str(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"served\.json: expected what `prepare` writes"):
        start(out)
    prepare(f"{bundle},{make_bundle(tmp_path / 'dist' / 'cxr_ldm')}", out, link=True)
    with pytest.raises(ValueError, match=r"models: expected some of \['sdseg', 'cxr_ldm'\], got 'brain'"):
        start(out, models="brain")
    with pytest.raises(ValueError, match="train: expected sdseg alone, got 'cxr_ldm'"):
        start(out, train=True)
    with pytest.raises(ValueError, match="train: expected copied bundles"):
        start(out, train=True, models="sdseg")
    assert started == []


def test_environment_is_asked_for_by_name(label_environment):
    label_environment.unlink()
    with pytest.raises(FileNotFoundError, match=r"\.label/bin/python: expected MONAI Label's environment.*make label"):
        label_folders.label_python()


# Requests


def test_multipart_keeps_every_byte():
    body = as_multipart([("params", "", b"{}"), ("image", 'a "b".nii.gz', BINARY), ("empty", "e", b"")], "x1")
    parts = from_multipart("multipart/form-data; boundary=x1", body)
    assert parts == [("params", "", b"{}"), ("image", "a _b_.nii.gz", BINARY), ("empty", "e", b"")]
    with pytest.raises(ValueError, match="expected an answer of several parts"):
        from_multipart("multipart/form-data; boundary=other", body)
    with pytest.raises(ValueError, match="expected an answer of several parts"):
        from_multipart("multipart/form-data", body)


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.b.nii.gz", ".nii.gz"), ("tmp1.PNG", ".png"), ("x.seg.nrrd", ".seg.nrrd"), ("none", "")]
)
def test_suffix(name, suffix):
    assert suffix_of(name) == suffix


@pytest.fixture
def server(monkeypatch):
    """A server of one model in the place of the network; `server.seen` are the requests."""

    class Server:
        seen: list[urllib.request.Request] = []
        content = BINARY
        states: list[dict[str, Any]] = []

        def send(self, request: urllib.request.Request, *, timeout: float) -> tuple[str, bytes]:
            self.seen.append(request)
            if "/info/" in request.full_url:
                config = {"seed": 0, "num_samples": 1, "deterministic": False}
                return "application/json", json.dumps({"name": "x", "models": {"sdseg": {"config": config}}}).encode()
            if "/train/" in request.full_url:
                state = self.states.pop(0) if request.data is None and len(self.states) > 1 else self.states[0]
                return "application/json", json.dumps([state] if "all=true" in request.full_url else state).encode()
            parts = [("params", "", b'{"label_names": {}}'), ("image", "t.png", self.content)]
            return "multipart/form-data; boundary=b", as_multipart(parts, "b")

    fake = Server()
    fake.seen, fake.states = [], []
    monkeypatch.setattr(label_requests, "send", fake.send)
    return fake


def test_request_carries_options_and_file(server, tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(BINARY)
    answer = label_requests.infer(URL, "sdseg", parameters={"seed": 3}, file=tmp_path / "scan.nii.gz")
    (request,) = server.seen
    assert request.full_url == f"{URL}/infer/sdseg?output=all"
    sent = from_multipart(request.get_header("Content-type"), request.data)
    assert sent == [("params", "", b'{"seed": 3}'), ("file", "scan.nii.gz", BINARY)]
    assert (answer.content, answer.suffix, answer.parameters) == (BINARY, ".png", {"label_names": {}})
    with pytest.raises(FileNotFoundError, match=r"none\.nii: expected a file to send"):
        label_requests.infer(URL, "sdseg", file=tmp_path / "none.nii")
    with pytest.raises(ValueError, match="image: expected the id of a study"):
        label_requests.infer(URL, "sdseg")
    with pytest.raises(ValueError, match="url: expected http://HOST:PORT, got '127"):
        label_requests.infer("127.0.0.1:8000", "sdseg", "a")


def test_ask_stores_file_and_json(server, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "p.png"
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(4, 3)).save(picture)
    server.content = picture.read_bytes()
    words = ["ask", URL, "sdseg", "--image", "001", "--params", '{"deterministic": true}', "--out", str(tmp_path / "o")]
    monkeypatch.setattr(sys, "argv", ["tools.serve_label", *words])
    command_line.run(COMMANDS, name="tools.serve_label")
    assert (tmp_path / "o/sdseg_001.png").read_bytes() == server.content
    written = json.loads((tmp_path / "o/sdseg_001.json").read_text())
    # Not the number 1 and not the word "true", which fire would make of them.
    assert (written["image"], written["params"]) == ("001", {"deterministic": True})
    said = capsys.readouterr().out
    assert "size: [4, 3]" in said
    assert "affine: None" in said
    assert Answer({}, server.content, ".png", 0.0).sha256 in said


@pytest.mark.parametrize(
    ("model", "params", "message"),
    [
        ("sdseg", '{"num_sample": 2}', "num_sample: expected an option of sdseg: .*did you mean num_samples"),
        ("sdsegg", "", r"sdsegg: expected one of \['sdseg'\]"),
        ("sdseg", "[1]", "params: expected JSON of names and values"),
        ("sdseg", "{seed: 1}", "params: expected JSON such as"),
    ],
)
def test_ask_names_what_the_server_would_ignore(server, tmp_path, model, params, message):
    with pytest.raises(ValueError, match=message):
        ask(URL, model, image="a", params=params, out=str(tmp_path))
    assert not any("/infer/" in request.full_url for request in server.seen)


def test_train_waits_for_its_own_task(server, capsys):
    server.states = [{"id": "t", "status": "RUNNING"}, {"id": "t", "status": "DONE"}]
    train(URL, params='{"max_epochs": 2}', every=0.0)
    assert json.loads(server.seen[0].data) == {"max_epochs": 2}
    assert "sdseg: trained in" in capsys.readouterr().out
    server.states = [{"id": "t", "status": "ERROR", "details": ["a", "autoencoder.pt: missing"]}]
    with pytest.raises(ValueError, match=r"sdseg: the training failed(.|\n)*autoencoder\.pt: missing"):
        train(URL, every=0.0)
    server.states = [{"id": "t", "status": "RUNNING"}]
    with pytest.raises(TimeoutError, match="sdseg: the training did not end"):
        train(URL, every=0.0, timeout=0.05)


def test_no_server_and_errors_of_a_server_are_named(monkeypatch):
    def refuse(self: Any, request: urllib.request.Request, timeout: float) -> None:
        raise urllib.error.URLError(ConnectionRefusedError(111, "Connection refused"))

    def fail(self: Any, request: urllib.request.Request, timeout: float) -> None:
        raise urllib.error.HTTPError(
            request.full_url, 400, "Bad", Message(), io.BytesIO(b'{"detail":"seed: expected"}')
        )

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:8000/info/: expected a running server.*refused"):
        label_requests.get_json(URL, "info/")
    with pytest.raises(TimeoutError, match=r"127\.0\.0\.1:8000: expected a server"):
        label_requests.wait_until_ready(URL, alive=lambda: False)
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", fail)
    with pytest.raises(ConnectionError, match=r"infer/sdseg\?.*: the server answered 400: .*seed: expected"):
        label_requests.infer(URL, "sdseg", "a")


def test_answers_are_described(tmp_path):
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    path = tmp_path / "v.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.full((4, 3, 2), 0.5, np.float32), affine), path)
    said = label_requests.describe(path, Answer({}, path.read_bytes(), ".nii.gz", 1.234))
    assert (said["size"], said["dtype"], said["minimum"], said["seconds"]) == ([4, 3, 2], "float32", 0.5, 1.23)
    assert said["affine"] == affine.tolist()
    with pytest.raises(ValueError, match=r"a\.txt: expected \.nii"):
        read_image(tmp_path / "a.txt")


# The comparison with `monai.bundle run`


VOLUME = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
CASE = label_check.Case("brain_controlnet", "*", ("*T1w.nii.gz",))


def save(values: np.ndarray, path: Path, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 3.0, 4.0, 1.0]) if affine is None else affine), path)
    return path


@pytest.mark.parametrize(
    ("values", "affine", "verdict"),
    [
        (VOLUME, None, "same bytes"),
        (VOLUME + np.float32(0.5), None, "differs by at most 0.5"),
        (VOLUME[:, :, :1], None, "size (4, 3, 1)"),
        (VOLUME, np.eye(4), "another affine"),
    ],
)
def test_comparison_says_what_differs(tmp_path, monkeypatch, values, affine, verdict):
    path = save(VOLUME, tmp_path / "answer.nii.gz")

    def run(python: str, bundle: Path, options: dict[str, Any]) -> None:
        save(values, Path(options["output_dir"]) / "x_T1w.nii.gz", affine)

    monkeypatch.setattr(label_check, "run_bundle", run)
    # gzip's header holds the time and the name.
    monkeypatch.setattr(Path, "read_bytes", lambda self: read_image(self)[0].tobytes())
    assert label_check._difference(CASE, path, tmp_path, "", "python") == verdict


def test_interpreters_are_found_from_everywhere(label_environment):
    assert label_check.interpreter(".label/bin/python") == str(label_environment)
    with pytest.raises(FileNotFoundError, match="pithon: expected a Python interpreter"):
        label_check.interpreter("pithon")


def test_comparison_stacks_maps_and_scales_pictures(tmp_path, monkeypatch):
    def run(python: str, bundle: Path, options: dict[str, Any]) -> None:
        for number, name in enumerate(("ndi", "odi", "fwf")):
            save(VOLUME + number, Path(options["output_dir"]) / f"a_{name}.nii.gz")
        Image.fromarray(np.array([[0, 255, 255]], np.uint8)).save(Path(options["output_dir"]) / "a_mask.png")

    monkeypatch.setattr(label_check, "run_bundle", run)
    maps = save(np.stack([VOLUME, VOLUME + 1, VOLUME + 2], axis=-1), tmp_path / "maps.nii.gz")
    dmri = next(case for case in label_check.CASES if case.model == "dmri2noddi")
    assert label_check._difference(dmri, maps, tmp_path, "", "python") == "equal"
    Image.fromarray(np.array([[0, 1, 1]], np.uint8)).save(tmp_path / "mask.png")
    assert label_check._difference(label_check.CASES[0], tmp_path / "mask.png", tmp_path, "", "python") == "equal"


def test_every_bundle_is_asked_and_every_option_of_the_refused_is_its_own():
    models = {"sdseg", "brain_controlnet", "dmri2noddi", "cxr_ldm"}
    assert {case.model for case in label_check.CASES} == models
    assert {model for model, _ in label_check.REFUSED} == models
    for model in models:
        served = Path(__file__).parents[1] / "bundles" / model / "configs" / "inference.json"
        options = json.loads(served.read_text())["displayable_configs"]
        asked = [case.parameters for case in label_check.CASES if case.model == model]
        asked += [refused for name, refused in label_check.REFUSED if name == model]
        assert {name for parameters in asked for name in parameters} <= set(options), model


def test_faults_end_in_an_error(tmp_path, monkeypatch, capsys):
    make_bundle(tmp_path / "app/model/cxr_ldm")
    (tmp_path / "served.json").write_text(json.dumps({"models": ["cxr_ldm"], "studies": {}}))
    models = {"name": "server", "models": {"cxr_ldm": {}}, "objects": {}}
    monkeypatch.setattr(label_check, "get_json", lambda url, path: models)
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(tmp_path / "p.png")
    content = (tmp_path / "p.png").read_bytes()
    count = iter(range(100))

    def infer(*words: Any, parameters: dict[str, Any]) -> Answer:
        if parameters.get("guidance_scale") == -1:
            detail = '{"detail":"guidance_scale: expected a number"}'
            raise ConnectionError(f"{URL}: the server answered 400: {detail}")
        return Answer({}, content + bytes([next(count)]), ".png", 0.1)

    monkeypatch.setattr(label_check, "infer", infer)
    with pytest.raises(ValueError, match="the second answer differs") as error:
        label_check.check(URL, str(tmp_path), out=str(tmp_path / "o"), note=str(tmp_path / "note.md"))
    assert "negative_prompt" in str(error.value)
    assert "guidance_scale': -1" not in str(error.value)
    note = (tmp_path / "note.md").read_text()
    assert "| cxr_ldm | (none) |" in note
    assert hashlib.sha256(b"weights").hexdigest() in note
    assert note in capsys.readouterr().out
