# SPDX-License-Identifier: Apache-2.0
"""The shell commands that a document states, read from it and run as they are written.

A block is what stands between ```` ```bash ```` and ```` ``` ````. A reader starts each one in the repository's folder,
with this project installed. What is run keeps every word but the paths below ``/tmp``, which lead to a folder of the
test.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests import commands
from tests.conftest import ROOT

README = ROOT / "README.md"
TEMPORARY = "/tmp"
# Commands that only arrange files.
FILE_COMMANDS = ("cd", "mkdir", "cp")
_FENCE = re.compile(r"^( *)```bash\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


@dataclass(frozen=True)
class Command:
    """One command of a block.

    Attributes:
        words: all words, unquoted, without variables that are set for this command alone.
        folder: where it runs, relative to the repository or absolute.
        text: as it is written, continued lines joined.
    """

    words: tuple[str, ...]
    folder: str
    text: str

    @property
    def module(self) -> tuple[str, ...]:
        """The words after ``python -m``; empty for other programs."""
        return self.words[2:] if self.words[:2] == ("python", "-m") else ()


@dataclass(frozen=True)
class Block:
    """A block of commands.

    Attributes:
        document: file.
        number: line of the first command, from 1.
        heading: the nearest heading above it.
        text: as it is written, without the indent of a list.
    """

    document: Path
    number: int
    heading: str
    text: str

    @property
    def commands(self) -> tuple[Command, ...]:
        """Every command in turn; none is left out, whatever it calls."""
        return tuple(_commands(self.text))

    def __str__(self) -> str:
        return f"{self.document.name}:{self.number}"


def blocks(document: Path = README) -> list[Block]:
    """The ``bash`` blocks of a document."""
    text = document.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start(2)]
        headings = re.findall(r"^#+ (.*)$", re.sub(r"^ *```.*?^ *```", "", before, flags=re.M | re.S), re.M)
        body = re.sub(rf"^{match[1]}", "", match[2], flags=re.M)
        found.append(Block(document, before.count("\n") + 1, headings[-1] if headings else "", body))
    return found


def _commands(text: str) -> Iterator[Command]:
    folder = "."
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for words in _split(_without_comment(line)):
            while words and _ASSIGNMENT.match(words[0]):
                words = words[1:]
            if words:
                yield Command(tuple(words), folder, line.strip())
            if words[:1] == ["cd"]:
                folder = words[1] if folder == "." or words[1].startswith("/") else f"{folder}/{words[1]}"


def _without_comment(line: str) -> str:
    """A line up to a ``#`` that begins a word and is not quoted; ``a#b`` is a word."""
    for match in re.finditer(r"(?:^|(?<=\s))#", line):
        try:
            shlex.split(line[: match.start()])
        except ValueError:  # within quotes
            continue
        return line[: match.start()]
    return line


def _split(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, which ``&&`` or ``;`` separate."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    for word in lexer:
        if word in ("&&", ";"):
            yield words
            words = []
        elif word and set(word) <= set("&;|<>"):
            raise ValueError(f"{line}: expected only && and ; between commands, got {word}")
        else:
            words.append(word)
    yield words


def execute(
    block: Block,
    temporary: Path,
    *,
    root: Path = ROOT,
    limit: float = 300,
    environment: Mapping[str, str] | None = None,
) -> list[commands.Finished]:
    """Run a block as a reader does who starts in the repository's folder, until a command fails.

    Args:
        block: may hold ``cd``, ``mkdir``, ``cp`` and ``python -m``.
        temporary: stands for ``/tmp``.
        root: the repository, or a copy of what the commands read and write of it.
        limit: seconds for each command.
        environment: variables to set for each.

    Returns:
        what each ``python -m`` left behind; the last one may have failed.

    Raises:
        ValueError: another program is called.
    """
    finished = []
    for command in block.commands:
        words = [_below(word, temporary) for word in command.words]
        folder = root / _below(command.folder, temporary)
        if command.module:
            finished.append(commands.run(*words[2:], cwd=folder, limit=limit, environment=environment))
            if finished[-1].code:
                break
        elif words[0] == "cd":
            assert (folder / words[1]).is_dir(), f"{command.text}: no such folder"
        elif words[:2] == ["mkdir", "-p"]:
            for word in words[2:]:
                (folder / word).mkdir(parents=True, exist_ok=True)
        elif words[:2] == ["cp", "-r"]:
            *sources, target = (folder / word for word in words[2:])
            for source in sources:
                shutil.copytree(source, target / source.name, dirs_exist_ok=True)
        else:
            raise ValueError(f"{block}: {command.text}: expected {', '.join(FILE_COMMANDS)} or python -m")
    return finished


def _below(word: str, temporary: Path) -> str:
    return re.sub(rf"(?<![\w/.]){TEMPORARY}(?=/|$)", str(temporary), word)
