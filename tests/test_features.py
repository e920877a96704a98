# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import pytest
import torch

from shared.metrics.features import (
    ClassifierFeatures,
    XrvDenseNetFeatures,
    _xrv_densenet,
    choose_features,
    convert_xrv_checkpoint,
)
from shared.networks.finding_classifier import FindingClassifier
from tools import convert_checkpoint

pytest.importorskip("torchxrayvision", reason="torchxrayvision is an optional dependency")


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return _xrv_densenet().eval()


@pytest.fixture(scope="module")
def weights(network: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "xrv.pt"
    torch.save(network.state_dict(), path)
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_features_and_findings_are_the_networks_own(network: torch.nn.Module, weights: Path) -> None:
    extractor = XrvDenseNetFeatures(weights, sha256=_sha256(weights), batch_size=2)
    images = torch.rand(3, 1, 224, 224)
    with torch.no_grad():
        expected = network.features2((2 * images - 1) * 1024)
        logits = network((2 * images - 1) * 1024)
    features = extractor(images)
    assert features.shape == (3, 1024)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    probabilities = extractor.classify(images)
    assert probabilities.shape == (3, len(extractor.pathologies)) == (3, 18)
    torch.testing.assert_close(probabilities, torch.sigmoid(logits), rtol=1e-4, atol=1e-4)


def test_preprocessing_range_size_and_antialias() -> None:
    x = XrvDenseNetFeatures.preprocess(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 512, 512))
    assert x.shape == (2, 1, 224, 224)
    torch.testing.assert_close(x[:, 0, 0, 0], torch.tensor([-1024.0, 1024.0]))
    checkerboard = (torch.arange(512)[:, None] + torch.arange(512)) % 2
    smooth = XrvDenseNetFeatures.preprocess(checkerboard.float()[None, None])
    assert smooth.abs().max() < 200  # without antialiasing single pixels survive: +-1024
    wide = torch.zeros(1, 1, 224, 300)
    wide[..., 38:262] = 1
    assert (XrvDenseNetFeatures.preprocess(wide) == 1024).all()


def test_images_in_another_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images: expected finite values in \[0, 1\], got \[0, 255\]"):
        XrvDenseNetFeatures.preprocess(torch.tensor([0.0, 255.0]).view(1, 1, 1, 2))
    with pytest.raises(ValueError, match="images: expected finite values"):
        XrvDenseNetFeatures.preprocess(torch.full((1, 1, 4, 4), torch.nan))
    with pytest.raises(ValueError, match=r"images: expected \(B, 1, H, W\)"):
        XrvDenseNetFeatures.preprocess(torch.zeros(1, 3, 4, 4))


def test_missing_and_wrong_files_are_named(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.pt: xrv-densenet121-all was not found here .*convert_xrv"):
        XrvDenseNetFeatures(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match=r"xrv.pt: expected sha256 0+, got"):
        XrvDenseNetFeatures(weights, sha256="0" * 64)
    other = tmp_path / "other.pt"
    torch.save({"a": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match=r"other.pt: expected the weights of this configuration"):
        XrvDenseNetFeatures(other)
    torch.save([1], other)
    with pytest.raises(ValueError, match=r"other.pt: expected .*a list instead of a state dict"):
        XrvDenseNetFeatures(other)


def test_pickled_release_is_converted_only_on_request(network: torch.nn.Module, tmp_path: Path) -> None:
    source, target = tmp_path / "release.pt", tmp_path / "plain.pt"
    torch.save(network, source)
    with pytest.raises(ValueError, match=r"release.pt: expected a state dict of plain tensors"):
        XrvDenseNetFeatures(source)
    with pytest.raises(PermissionError, match=r"release.pt: this file is a pickled module"):
        convert_xrv_checkpoint(source, target, sha256=_sha256(source))
    with pytest.raises(ValueError, match=r"release.pt: expected sha256"):
        convert_xrv_checkpoint(source, target, sha256="0" * 64, trust_pickle=True)
    assert not target.exists()
    convert_xrv_checkpoint(source, target, sha256=_sha256(source), trust_pickle=True)
    loaded = XrvDenseNetFeatures(target).network.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in network.state_dict().items())
    with pytest.raises(FileExistsError, match=r"plain.pt: expected a new file"):
        convert_xrv_checkpoint(source, target, sha256=_sha256(source), trust_pickle=True)


def test_conversion_from_the_command_line(
    network: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "release.pt", tmp_path / "plain.pt"
    torch.save(network, source)
    words = ["convert_checkpoint", "xrv", "--source", str(source), "--out", str(target), "--sha256", _sha256(source)]
    for consent in ([], ["--trust_pickle", "true"]):  # fire reads a small "true" as a text
        monkeypatch.setattr("sys.argv", [*words, *consent])
        with pytest.raises(SystemExit, match=r"release.pt: this file is a pickled module"):
            convert_checkpoint.main()
        assert not target.exists()
    monkeypatch.setattr("sys.argv", [*words, "--trust_pickle", "True"])
    convert_checkpoint.main()
    assert _sha256(target) in capsys.readouterr().out
    loaded = XrvDenseNetFeatures(target, sha256=_sha256(target)).network.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in network.state_dict().items())


def test_importing_torchxrayvision_leaves_the_warning_filters() -> None:
    before = list(warnings.filters)
    _xrv_densenet()
    assert warnings.filters == before


def test_classifier_features_say_whose_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = FindingClassifier()
    path = tmp_path / "classifier.pt"
    torch.save(classifier.state_dict(), path)
    extractor = ClassifierFeatures(FindingClassifier(), weights_path=path, batch_size=2)
    assert extractor.name == "phantom-classifier features"
    images = torch.rand(5, 1, 64, 64)
    with torch.no_grad():
        expected = classifier.eval().features(images)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-5)
    probabilities = extractor.classify(images)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5))
    assert extractor.network.training  # the mode of a network in training is restored
    with pytest.raises(FileNotFoundError, match=r"gone.pt: .* Train the classifier first"):
        ClassifierFeatures(FindingClassifier(), weights_path=tmp_path / "gone.pt")


class _Named:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def test_features_are_chosen_by_their_file_and_the_choice_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "weights.pt"

    def unused(*paths: str) -> _Named:
        raise AssertionError("only the chosen extractor is built")

    chosen = choose_features(path, preferred=unused, fallback=lambda: _Named("own features"))
    assert chosen.name == "own features"
    assert f"{path}: no file, so distances are measured with own features instead" in caplog.text
    caplog.clear()
    path.write_bytes(b"")
    assert choose_features(path, preferred=_Named, fallback=unused).name == str(path)
    assert caplog.text == ""

    def damaged(file: str) -> _Named:
        raise ValueError(f"{file}: damaged")

    with pytest.raises(ValueError, match="weights.pt: damaged"):  # a damaged file is no absent file
        choose_features(path, preferred=damaged, fallback=unused)
