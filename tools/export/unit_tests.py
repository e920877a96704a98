# SPDX-License-Identifier: Apache-2.0
"""The Model Zoo's unit tests of an exported bundle: `ci/unit_tests/test_<task>.py` and `test_<task>_dist.py`.

The Model Zoo runs them from its root with the bundle in `models/<task>`. They import its `ci/unit_tests/utils.py`, make
their own data and need nothing of this repository.
"""

from __future__ import annotations

from pathlib import Path

from shared.files import atomic_path

TEMPLATES = Path(__file__).resolve().parent / "ci"


def write_unit_tests(task: str, folder: Path) -> list[Path]:
    """Write the two tests of a bundle.

    Args:
        task: name of the bundle.
        folder: where to; made when missing. Tests of other bundles in it stay as they are.

    Returns:
        The files that were written.

    Raises:
        ValueError: there are no tests of that name.
    """
    source = TEMPLATES / f"test_{task}.py"
    if not source.is_file():
        raise ValueError(f"{source}: expected the unit test of the bundle, found none; write it")
    written = {
        f"test_{task}.py": source.read_text(encoding="utf-8"),
        # The same for every bundle: all that differs is in the first.
        f"test_{task}_dist.py": (TEMPLATES / "test_TASK_dist.py").read_text(encoding="utf-8").replace("TASK", task),
    }
    for name, text in written.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / name for name in written]
