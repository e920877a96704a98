# SPDX-License-Identifier: Apache-2.0
"""Names on a bundle's command line that its configuration does not have."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser, ConfigWorkflow, create_workflow, run, update_kwargs
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

_RUN_PARAMETERS = [name for name, p in inspect.signature(run).parameters.items() if p.kind is not p.VAR_KEYWORD]
_RUNNER_NAMES = {
    *_RUN_PARAMETERS,
    *inspect.signature(create_workflow).parameters,
    *inspect.signature(ConfigWorkflow).parameters,
}


def refuse_unknown() -> None:
    """Stop when the command line overrides an id that the configuration files do not define.

    ``python -m monai.bundle run ... --epoch 3`` adds an id ``epoch`` that nothing reads, and trains with the default
    ``max_epochs``, exit code 0. MONAI has no hook for this, so every configuration calls this function in
    ``initialize``, after ``shared.errors.show_cause_last``. It reads ``sys.argv`` and the files again; a workflow that
    was made in Python (tests, MONAI Label, federated clients) has no such command line and passes.

    Known are the runner's own arguments, the ids of the configuration files, nested ids (``a#b`` or ``a::b``) whose
    path exists there, new arguments of a component (which refuses those it does not take itself), and the ids that
    ``--tracking`` adds.

    Raises:
        ValueError: the message starts with the option as it was typed and suggests the nearest id.
    """
    words = sys.argv
    if Path(words[0]).parts[-3:] != ("monai", "bundle", "__main__.py") or words[1:2] != ["run"]:
        return
    # "+", merge instead of replace, is no part of the id.
    arguments = {name.removeprefix("+"): DefaultParseValue(value) for name, value in _options(words[2:])}
    arguments = update_kwargs(arguments.pop("args_file", None), **arguments)
    files: Any = arguments.get("config_file")
    parser = ConfigParser(ConfigParser.load_config_files(files))
    known = _RUNNER_NAMES | _tracking_names(arguments.get("tracking"))
    unknown = [name for name in arguments if name not in known and not is_defined(name, parser, arguments)]
    if not unknown:
        return
    near = _nearest(unknown[0], {*parser.get(), *known}, parser)
    where = ", ".join(Path(file).name for file in (files.split(",") if isinstance(files, str) else files))
    raise ValueError(
        f"--{unknown[0]}: expected an id of the configuration, found none of that name in {where}; "
        + (f"did you mean --{near}?" if near else "look it up there.")
        + (f" Unknown as well: {', '.join('--' + name for name in unknown[1:])}" if unknown[1:] else "")
    )


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and unparsed values, split as fire does: ``--name=value``, ``--name value``, ``--name``, ``--noname``."""
    for separator in ("-", "--"):  # behind them are fire's own words
        words = words[: words.index(separator)] if separator in words else words
    flags = [re.match("--|-[a-zA-Z]", word) is not None for word in words]
    positional, named = [], {}
    index = 0
    while index < len(words):
        word, has_value = words[index], index + 1 < len(words) and not flags[index + 1]
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        index += 1
        if not flags[index - 1]:
            positional.append(word)
        elif equals:
            named[name] = value
        elif has_value:
            named[name] = words[index]
            index += 1
        elif name.startswith("no") and name not in _RUN_PARAMETERS:
            named[name[2:]] = "False"
        else:
            named[name] = "True"
    yield from zip([name for name in _RUN_PARAMETERS if name not in named], positional, strict=False)
    yield from named.items()


def _tracking_names(tracking: Any) -> set[str]:
    """Ids that MONAI's own experiment tracking adds to the configuration."""
    if tracking is None:
        return set()
    settings: Any = DEFAULT_EXP_MGMT_SETTINGS.get(tracking) if isinstance(tracking, str) else tracking
    return set((settings or ConfigParser.load_config_files(tracking)).get("configs", {}))


def is_defined(name: str, parser: ConfigParser, overrides: Collection[str] = ()) -> bool:
    """Whether an override names something: an id, a new argument of a component, or a part of what is replaced too.

    Args:
        name: id as on the command line, without dashes and "+".
        parser: the configuration.
        overrides: names of all overrides.
    """
    if name in parser:
        return True
    parent = name.replace("::", "#").rpartition("#")[0]
    if not parent:
        return name == "_meta_"
    if parent in overrides or parent.split("#")[0] == "_meta_":  # replaced as a whole; the metadata file's
        return True
    content = parser.get(parent)
    return isinstance(content, dict) and "_target_" in content


def _nearest(name: str, ids: Collection[str], parser: ConfigParser) -> str | None:
    """The known id that looks most like ``name``; for a nested one, among the entries beside it."""
    parent, _, last = name.replace("::", "#").rpartition("#")
    siblings = parser.get(parent) if parent else None
    if isinstance(siblings, dict):
        near = difflib.get_close_matches(last, siblings, n=1)
        return f"{parent}#{near[0]}" if near else None
    near = difflib.get_close_matches(name, sorted(ids), n=1)
    return near[0] if near else None
