# SPDX-License-Identifier: Apache-2.0
"""What a deliberate fault is: one substitution in one file of the product, and the test that must notice it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The kinds of fault that issue 8 names; every one occurs in the catalogue.
KINDS = (
    "prediction target swapped",
    "scale factor skipped",
    "EMA dropped",
    "DDIM order reversed",
    "wrong data range in a metric",
    "axis flipped",
    "subject leaked",
    "frozen part trained",
    "null prompt padded wrongly",
    "seed ignored",
)


@dataclass(frozen=True)
class Mutation:
    """A deliberate fault.

    Attributes:
        name: what is wrong then, in a few words; no two of a bundle are equal.
        bundle: whose trap it is. A file of ``shared`` may serve others too.
        file: of the product, relative to the root: Python or JSON.
        old: text that occurs there exactly once.
        new: text in its place.
        test: node id that passes without the fault and fails with it.
        kind: one of ``KINDS``, or empty for a trap of the bundle's own.
    """

    name: str
    bundle: str
    file: str
    old: str
    new: str
    test: str
    kind: str = ""

    def applied(self, root: Path) -> str:
        """Text of the file below ``root`` with the fault in it.

        Raises:
            ValueError: ``old`` does not occur exactly once, or the result cannot be read as Python or JSON.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file}: expected the text of {self.name!r} once, but got it {count} times")
        changed = text.replace(self.old, self.new)
        if changed == text:
            raise ValueError(f"{self.file}: expected a change by {self.name!r}, but got the same text")
        try:
            parsed(changed, self.file)
        except (SyntaxError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.file}: cannot be read with the fault {self.name!r}: {error}") from error
        return changed


def parsed(text: str, file: str) -> Any:
    """Python compiled, or JSON read."""
    return json.loads(text) if file.endswith(".json") else compile(text, file, "exec")
