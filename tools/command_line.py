# SPDX-License-Identifier: Apache-2.0
"""Start a tool with fire, but refuse unknown options first.

fire runs the function and complains about options it could not use afterwards: `--viewz PA` would prepare a whole data
set with the default views before it says so.
"""

from __future__ import annotations

import difflib
import inspect
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import fire


def check_options(function: Callable[..., Any], arguments: Sequence[str]) -> None:
    """Refuse options that a function does not have, before it is called.

    Args:
        function: what fire will call.
        arguments: words after the command's name; everything after a lone `--` is fire's own.

    Raises:
        ValueError: the message names the option, the nearest existing one and all of them.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    words = list(arguments)
    for word in words[: words.index("--")] if "--" in words else words:
        name = word[2:].split("=")[0].replace("-", "_")
        # fire also takes --nosomething for --something=False
        if not word.startswith("--") or name in (*known, "help") or name.removeprefix("no") in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"{word.split('=')[0]}: expected an option of this command, but there is none of that name; "
            + (f"did you mean --{near[0]}? " if near else "")
            + f"Options: {', '.join('--' + k for k in known)}"
        )


def run(
    component: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    *,
    name: str,
    command: Sequence[str] | None = None,
) -> None:
    """Run a function, or one of several by name, with the words of the command line.

    An error that the user can correct (ValueError, OSError) ends in one line on stderr and exit code 1.

    Args:
        component: the function, or functions by name.
        name: of the command, in its help.
        command: words after the command's name; None reads `sys.argv`.
    """
    words = list(sys.argv[1:] if command is None else command)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file need not be text
    try:
        if callable(component):
            check_options(component, words)
        elif words and words[0].replace("-", "_") in component:
            check_options(component[words[0].replace("-", "_")], words[1:])
        fire.Fire(component, command=words, name=name)
    except (ValueError, OSError) as error:
        # The operating system's own message ends with the file.
        named = isinstance(error, OSError) and error.filename is not None
        sys.exit(f"{error.filename}: {error.strerror}" if named else str(error))  # type: ignore[union-attr]
