# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
import re

import pytest

from shared import assets
from shared.assets import ASSETS, Asset, asset_path, check_asset, fetch_asset, get_asset, missing_asset, verify_file
from shared.files import sha256_of_file
from tests.conftest import ROOT
from tools import assets as command


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A table with one asset whose address is a local file: fetching works without a socket."""
    source = tmp_path / "server" / "weights.pth"
    source.parent.mkdir()
    source.write_bytes(b"weights" * 1000)
    asset = Asset(
        name="demo", path="sub/weights.pth", purpose="demonstration", used_by="tests", without="skip it",
        licence="Apache-2.0", url=source.as_uri(), sha256=sha256_of_file(source),
    )  # fmt: skip

    def install(**changes):
        monkeypatch.setattr(assets, "ASSETS", (dataclasses.replace(asset, **changes),))
        return source

    install()
    return install


def test_table_is_complete_and_invents_nothing():
    assert len({asset.name for asset in ASSETS}) == len(ASSETS) == 5
    for asset in ASSETS:
        assert asset.purpose, asset.name
        assert asset.used_by, asset.name
        assert asset.without, asset.name
        assert asset.licence, asset.name
        assert asset.url is None or asset.url.startswith("https://"), asset.name
        assert asset.sha256 is not None or "no checksum" in asset.note, asset.name
        assert asset.url or asset.package or "copy of your own" in asset.note, asset.name
    torchvision_url = get_asset("squeezenet1_1").url
    assert torchvision_url is not None
    assert f"-{get_asset('squeezenet1_1').sha256}.pth" in torchvision_url


def test_addresses_are_those_of_the_libraries():
    from torchvision.models import SqueezeNet1_1_Weights

    assert get_asset("squeezenet1_1").url == SqueezeNet1_1_Weights.IMAGENET1K_V1.url


def test_linear_layers_of_the_installed_package_have_the_stated_checksum():
    asset = get_asset("lpips-squeeze-linear")
    path = asset_path(asset.name)
    assert path.stat().st_size == asset.size_bytes
    assert verify_file(path, asset.sha256) == asset.sha256
    assert check_asset(asset.name)[0] == "ok"


def test_verify_file(tmp_path):
    path = tmp_path / "abc.bin"
    path.write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert verify_file(path, None) == digest
    assert verify_file(path, digest.upper()) == digest
    assert verify_file(path, digest[:8]) == digest
    with pytest.raises(ValueError, match=r"abc\.bin: expected sha256 00000000, got ba7816bf.*3 bytes.*Delete it"):
        verify_file(path, "0" * 8)
    for wrong in ("", digest[:7], digest + "0", "g" * 64):
        with pytest.raises(ValueError, match="sha256: expected 64 hexadecimal digits"):
            verify_file(path, wrong)
    with pytest.raises(FileNotFoundError, match=r"nothing\.bin: file not found"):
        verify_file(tmp_path / "nothing.bin", None)


@pytest.mark.parametrize("asset", ASSETS, ids=lambda asset: asset.name)
def test_missing_asset_answers_every_question(asset):
    message = str(missing_asset(asset.name, "some/where"))
    assert message.startswith("some/where: ")
    assert "/some/where" in message  # absolute: where it was looked for
    for part in (asset.name, asset.purpose, asset.without, asset.sha256 or "none stated"):
        assert part in message
    assert (asset.url or "copy" if asset.package is None else asset.package) in message


def test_texts_name_what_the_bundle_has():
    bundle = ROOT / "bundles/cxr_ldm/configs"
    for name in ("squeezenet1_1", "lpips-squeeze-linear"):
        (option,) = re.findall(r"--(\w+)", get_asset(name).without)
        assert option in json.loads((bundle / "train_autoencoder.json").read_text())
    classifier = get_asset("xrv-densenet121-all")
    assert "shared.metrics.features.convert_xrv_checkpoint" in classifier.note
    assert "tools.convert_checkpoint xrv" in classifier.note
    assert "pretrained/xrv_densenet121_all.pt" in json.loads((bundle / "evaluate.json").read_text())["xrv_weights"]
    assert "evaluate.json" in classifier.used_by
    assert "models/pretrained/xrv_densenet121_all.pt" in classifier.used_by


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="squeeznet: unknown asset, expected one of sd21-text-encoder, squeezenet1_1"):
        get_asset("squeeznet")


def test_check_states(served, tmp_path):
    assert check_asset("demo", tmp_path)[0] == "missing"
    path = tmp_path / "sub" / "weights.pth"
    path.parent.mkdir()
    path.write_bytes(b"other")
    assert check_asset("demo", tmp_path)[0] == "damaged"
    served(sha256=None)
    status, sentence = check_asset("demo", tmp_path)
    assert status == "unverified"
    assert sha256_of_file(path) in sentence
    served(sha256=None, path="sub")
    status, sentence = check_asset("demo", tmp_path)
    assert status == "unverified"
    assert f"weights.pth {sha256_of_file(path)}" in sentence


def test_fetch(served, tmp_path):
    source = served()
    path = fetch_asset("demo", tmp_path / "pretrained")
    assert path == tmp_path / "pretrained/sub/weights.pth"
    assert path.read_bytes() == source.read_bytes()
    source.unlink()
    assert fetch_asset("demo", tmp_path / "pretrained") == path  # an intact copy needs no connection
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"weights\.pth: expected sha256"):
        fetch_asset("demo", tmp_path / "pretrained")


def test_wrong_download_is_not_kept(served, tmp_path):
    served(sha256="0" * 64)
    with pytest.raises(ValueError, match="file://.*does not have the stated checksum"):
        fetch_asset("demo", tmp_path / "pretrained")
    assert [path for path in (tmp_path / "pretrained").rglob("*") if path.is_file()] == []


def test_mirror_is_tried_and_failures_are_listed(served, tmp_path):
    source = served()
    served(url="file:///nowhere/a.pth", mirror=source.as_uri())
    assert fetch_asset("demo", tmp_path / "one").is_file()
    served(url="file:///nowhere/a.pth", mirror="file:///nowhere/b.pth")
    with pytest.raises(OSError, match=r"file:///nowhere/a\.pth: .*file:///nowhere/b\.pth: .*by hand"):
        fetch_asset("demo", tmp_path / "two")


def test_assets_without_a_download_say_so(tmp_path):
    with pytest.raises(ValueError, match="sd21-text-encoder: cannot be downloaded.*left the Hugging Face hub"):
        fetch_asset("sd21-text-encoder", tmp_path)


def test_command_lists_and_checks(capsys, tmp_path):
    command.list_assets()
    text = capsys.readouterr().out
    assert all(asset.name in text and asset.licence in text for asset in ASSETS)
    command.list_assets(as_json=True)
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [asset.name for asset in ASSETS]
    command.check("lpips-squeeze-linear")
    assert "lpips-squeeze-linear: ok" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        command.check(folder=str(tmp_path))
    assert caught.value.code == 1
    assert "squeezenet1_1: missing" in capsys.readouterr().out


def test_command_fetches(served, tmp_path, capsys):
    command.fetch("demo", folder=str(tmp_path / "pretrained"))
    assert capsys.readouterr().out.strip().endswith("weights.pth")
    with pytest.raises(ValueError, match="name at least one asset"):
        command.fetch()
    with pytest.raises(ValueError, match="nope: unknown asset"):
        command.fetch("nope")
