# SPDX-License-Identifier: Apache-2.0
"""`python -m tools.check_data DIR`: one line per problem of a dataset folder; exit code 1 if there are any."""

from __future__ import annotations

import sys

from shared.data_check import check_dataset
from tools.command_line import run


def check_data(dataset_dir: str, *, images: bool = True) -> None:
    """Check datalist.json of a folder and every file it names.

    Args:
        dataset_dir: folder with datalist.json.
        images: also decode every image (unreadable, NaN, constant, duplicates between sections); slow for large sets.
    """
    result = check_dataset(str(dataset_dir), images=images)
    for problem in result.problems:
        print(problem)
    print(result.summary())
    if result.problems:
        sys.exit(1)


if __name__ == "__main__":
    run(check_data, name="tools.check_data")
