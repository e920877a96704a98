# SPDX-License-Identifier: Apache-2.0
"""The model card of an exported bundle: that of the source, true for the copy."""

from __future__ import annotations

import re
from pathlib import Path

INSTALL = "The package of the repository must be installed (`pip install -e .` there)."
_SELF_CONTAINED = (
    "Nothing of the repository is needed: the bundle carries its own code in `{package}`, and the packages are those "
    "of `configs/metadata.json`. From another folder without `--bundle_root`, weights are sought in the wrong place. "
    "Commands with `tools.` are those of the repository."
)
_ABOUT = (
    "\n## This copy\n\nVersion {version}, exported from commit `{commit}`; `manifest.json` states the SHA-256 of every "
    "file."
)
_DEMO = (
    "**The weights are demo weights, trained on synthetic phantoms only.** The configurations fit them: what the "
    "commands below reach by laying `configs/tiny.json` over a file is already in it, so that consumers which read "
    "`configs/inference.json` or `configs/train.json` alone find the sizes of `models/model.pt`. The full-size "
    "configurations are `configs/published_*.json`; their weights are read from and written to `models/published`."
)
# Where things lie in a demo build, in this order.
_MOVED = {
    "Full-size weights in `models/model.pt`": "Full-size weights in `models/published/model.pt`",
    "Trainings with `tiny.json` write": "Trainings with `tiny.json`, or of a file without `published_`, write",
    "models/tiny": "models",
}
_FIRST_SECTION = "\n## Data\n"
_TINY = "'configs/tiny.json'"


def card(source: Path, *, package: str, version: str, commit: str, build: str, published: list[str]) -> str:
    """Text of `docs/README.md`.

    Args:
        source: the bundle's own card.
        package: name of the vendored package.
        version: of the bundle.
        commit: of the repository.
        build: `demo` or `weights`.
        published: names of configurations of which a full-size copy lies beside as `published_<name>`.

    Raises:
        ValueError: a sentence that has to be replaced is missing. The message starts with the file.
    """
    text = source.read_text(encoding="utf-8")
    for expected in (INSTALL, _FIRST_SECTION):
        if text.count(expected) != 1:
            raise ValueError(f"{source}: expected {expected.strip()!r} once, found it {text.count(expected)} times")
    text = text.replace(INSTALL, _SELF_CONTAINED.format(package=package))
    if build == "demo":
        text = re.sub(r"```bash\n.*?```", lambda block: _full_size(block[0], published), text, flags=re.DOTALL)
        for old, new in _MOVED.items():
            if old not in text:
                raise ValueError(f"{source}: expected {old!r}, to name another place, found it nowhere")
            text = text.replace(old, new)
    about = _ABOUT.format(version=version, commit=commit) + (f"\n\n{_DEMO}" if build == "demo" else "")
    return text.replace(_FIRST_SECTION, f"{about}\n{_FIRST_SECTION}")


def _full_size(block: str, published: list[str]) -> str:
    """Commands of a block without `tiny.json` run what the card describes: the full size."""
    commands = re.split(r"(?<!\\)\n", block)
    return "\n".join(
        command
        if _TINY in command
        else re.sub(
            r"configs/(\w+\.json)",
            lambda name: f"configs/published_{name[1]}" if name[1] in published else name[0],
            command,
        )
        for command in commands
    )
