# SPDX-License-Identifier: Apache-2.0
"""Commands that a README or a configuration's `_desc_` states, and the combinations of files that they name."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from tools.bundle_checks.bundle import PUBLISHED, Bundle, is_inference, is_training

README = "docs/README.md"
BLOCK = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A `monai.bundle` command.

    Attributes:
        text: as it is written.
        verb: `run`, `verify_net_in_out`, ...
        run_id: what `run` runs.
        files: values of `--config_file`, as written.
        options: names of the other options, without dashes.
    """

    text: str
    verb: str
    run_id: str
    files: tuple[str, ...]
    options: tuple[str, ...]


def parse(text: str) -> Command | None:
    """A command line; None when it is none of `monai.bundle`.

    Raises:
        ValueError: quotes that do not end, or a `--config_file` that is neither a file nor a list of files.
    """
    words = shlex.split(text, comments=True)
    start = next((i for i, word in enumerate(words[1:], 1) if word == "monai.bundle" and words[i - 1] == "-m"), None)
    if start is None or start + 1 >= len(words):
        return None
    verb, rest = words[start + 1], words[start + 2 :]
    run_id, files, options = "run", [], []
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            run_id = word
            continue
        name, equals, value = word[2:].partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        if name == "config_file":
            files = _files(value)
        else:
            options.append(name)
    return Command(text, verb, run_id, tuple(files), tuple(options))


def _files(value: str) -> list[str]:
    if not value.startswith("["):
        return value.split(",")
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"--config_file: expected a file or a list of files, got {value}") from error
    return [str(item) for item in found]


def written(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """Every command line of the bundle's documents with its place, continued lines joined."""
    path = bundle.folder / README
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for block in BLOCK.findall(text):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield README, line.strip().removeprefix("$ ")
    for name, config in bundle.workflows.items():
        description = config.get("_desc_")
        _, marker, command = (description if isinstance(description, str) else "").partition("Run: ")
        if marker:
            yield f"configs/{name}.json: _desc_", command.strip()


def combinations(bundle: Bundle) -> list[tuple[str, ...]]:
    """Names of configurations that are meant to be laid over one another, each set once.

    Those of documented commands; every file that stands alone, by itself, with `tiny`, and with the overlay for several
    processes; every `evaluate*` on its training.
    """
    found: dict[tuple[str, ...], None] = {}
    names = bundle.workflows
    for name in bundle.standalone:
        found[(name,)] = None
        full_size = name.startswith(PUBLISHED)
        overlays = ["multi_gpu_train"] if is_training(name) else ["multi_gpu_inference"]
        for overlay in [*overlays, *(() if full_size else ("tiny",))]:
            if overlay in names:
                found[(name, overlay)] = None
        if is_training(name) and not full_size and "tiny" in names:
            evaluate = name.replace("train", "evaluate", 1)
            if evaluate in names:
                found[(name, evaluate)] = None
                found[(name, evaluate, "tiny")] = None
    for _, text in written(bundle):
        try:
            command = parse(text)
        except ValueError:
            continue  # a fault of the README's check
        files = [file.removeprefix("configs/").removesuffix(".json") for file in command.files] if command else []
        if files and all(name in names for name in files) and (is_training(files[0]) or is_inference(files[0])):
            found[tuple(files)] = None
    return list(found)
