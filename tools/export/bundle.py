# SPDX-License-Identifier: Apache-2.0
"""From a bundle of this repository to a folder that needs nothing of it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.provenance import git_commit
from tools.export import archive, card, configs, vendor
from tools.export.large_files import large_files

REPOSITORY = Path(__file__).resolve().parents[2]
BUNDLES = REPOSITORY / "bundles"
OVERLAY = "configs/tiny.json"
DEMO = "models/tiny"
PUBLISHED = "models/published"
# Sizes that stand in metadata.json as numbers, and in configurations under these ids.
_SIZES = ("image_size", "patch_size")


def tasks() -> list[str]:
    """Names of the bundles."""
    return sorted(path.parent.parent.name for path in BUNDLES.glob("*/configs/inference.json"))


def export(
    task: str, out: Path, *, weights: Path | None = None, overlay: Path | None = None, url_base: str = ""
) -> Path:
    """Write `out/<task>`, whole or not at all; an earlier export there is replaced.

    Args:
        task: name of the bundle.
        out: folder of exports.
        weights: folder with `model.pt` and, optionally, `stages/`, as trainings leave it; None: the demo weights.
        overlay: configuration that is baked into all others, because the weights were trained with it; None: with the
            demo weights `tiny.json`, else none.
        url_base: address below which the bundle's files will be served, for `large_files.yml`; else there is none.

    Returns:
        The folder of the exported bundle.

    Raises:
        ValueError: no such bundle, or something is in the way. The message starts with it.
        FileNotFoundError: no weights.
    """
    source = BUNDLES / task
    if task not in tasks():
        raise ValueError(f"{task}: expected one of {', '.join(tasks())}")
    build = "demo" if weights is None else "weights"
    weights = source / DEMO if weights is None else weights
    if not (weights / "model.pt").is_file():
        raise FileNotFoundError(
            f"{weights / 'model.pt'}: expected weights, found no such file; train them or name them"
        )
    overlay = source / OVERLAY if build == "demo" else overlay
    target = out / task
    if target.exists() and not (target / archive.MANIFEST).is_file():
        raise ValueError(f"{target}: expected nothing or an earlier export, found something else; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{task}.", dir=out))
    try:
        _fill(temporary, source, weights, overlay, build=build, url_base=url_base)
        temporary.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _fill(folder: Path, source: Path, weights: Path, overlay: Path | None, *, build: str, url_base: str) -> None:
    task = source.name
    package = f"{task}_lib"
    metadata = configs.read_config(source / "configs/metadata.json")
    commit = git_commit(REPOSITORY) or "unknown"
    written = _configs(source, overlay)
    if overlay is not None:
        metadata = _resized(metadata, written["inference"], configs.read_config(source / "configs/inference.json"))
    for name, config in written.items():
        configs.write_config(configs.self_contained(config, package), folder / f"configs/{name}.json")
    configs.write_config(metadata, folder / "configs/metadata.json")
    shutil.copy(source / "configs/logging.conf", folder / "configs")
    shutil.copy(source / "LICENSE", folder)
    (folder / "docs").mkdir()
    for path in sorted((source / "docs").iterdir()):
        shutil.copy(path, folder / "docs")
    published = [f"{name.removeprefix('published_')}.json" for name in written if name.startswith("published_")]
    text = card.card(
        source / "docs/README.md",
        package=package,
        version=metadata["version"],
        commit=commit,
        build=build,
        published=published,
    )
    (folder / "docs/README.md").write_text(text, encoding="utf-8")
    _weights(source, weights, folder / "models", keep_demo=build != "demo")
    targets = [target for config in written.values() for target in configs.targets(config)]
    vendor.vendor(
        vendor.needed_modules(targets, REPOSITORY),
        package,
        root=REPOSITORY,
        out=folder,
        stamp={"__version__": metadata["version"], "__commit__": commit},
    )
    listed = large_files(folder, url_base=url_base) if url_base else None
    if listed is not None:
        (folder / "large_files.yml").write_text(listed, encoding="utf-8")
    archive.write_manifest(folder, name=task, version=metadata["version"], commit=commit, build=build)


def _configs(source: Path, overlay: Path | None) -> dict[str, dict[str, Any]]:
    """Configurations by name, before their components are renamed; demo weights move to the top of `models`."""
    written: dict[str, dict[str, Any]] = {}
    for path in sorted((source / "configs").glob("*.json")):
        config = configs.read_config(path)
        if path.stem == "metadata":
            continue
        if overlay is None:
            written[path.stem] = config
        elif path.samefile(overlay):
            written[path.stem] = _moved({**config, "ckpt_dir": _ckpt_dir("models")})
        elif configs.is_standalone(config):
            written[path.stem] = _moved({**configs.baked(path, overlay), "ckpt_dir": _ckpt_dir("models")})
            written[f"published_{path.stem}"] = {**config, "ckpt_dir": _ckpt_dir(PUBLISHED)}
        else:
            written[path.stem] = config
    return written


def _moved(config: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(config).replace(f"/{DEMO}/", "/models/"))


def _ckpt_dir(folder: str) -> str:
    return f"$@bundle_root + '/{folder}'"


def _weights(source: Path, weights: Path, models: Path, *, keep_demo: bool) -> None:
    """Weights in the places where the configurations look for them; nothing else of a training's folder."""
    ignored = shutil.ignore_patterns("tiny", "published", "model.pt", "stages")
    if (source / "models").is_dir():
        shutil.copytree(source / "models", models, ignore=ignored, symlinks=False)
    models.mkdir(exist_ok=True)
    for path in (weights / "model.pt", weights / "model.json"):
        if path.is_file():
            shutil.copy(path, models)
    if (weights / "stages").is_dir():
        shutil.copytree(weights / "stages", models / "stages")
    if keep_demo:
        shutil.copytree(source / DEMO, models / "tiny")


def _resized(metadata: Mapping[str, Any], config: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with the shapes of the weights: numbers that repeat a size of the configuration change with it."""
    sizes = {}
    for name in _SIZES:
        if name in full:
            for factor in (1, 2):
                sizes[tuple(factor * n for n in full[name])] = [factor * n for n in config[name]]

    def resized(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: {**tensor, "spatial_shape": sizes.get(tuple(tensor["spatial_shape"]), tensor["spatial_shape"])}
            for name, tensor in tensors.items()
        }

    data_format = metadata["network_data_format"]
    return {**metadata, "network_data_format": {key: resized(value) for key, value in data_format.items()}}
