# SPDX-License-Identifier: Apache-2.0
"""A process that works on request, alone or with others: ``torchrun ... -m tools.benchmarks.scaling_worker FOLDER``.

It stays alive between repetitions, so that what is measured is the work and not the start. Rank 0 reads the name of a
work from each line of its standard input and passes it on; the end of the input ends all. What the work gave goes to
``FOLDER/result.pt``, and a line of JSON to standard output says that it is there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from shared.distributed import (
    from_main_process,
    is_distributed,
    is_main_process,
    join_processes,
    leave_processes,
    local_device,
)
from tools.benchmarks.scaling_chest import ChestWorks
from tools.benchmarks.workload import Setting, Size

RESULT = "result.pt"


def main(folder: Path, size: str, seed: int) -> None:
    """Join the others, say so, and serve requests until there are no more."""
    torch.set_num_threads(1)
    device = local_device()
    if int(os.environ["WORLD_SIZE"]) > 1:
        join_processes(device)
    # Whatever a library prints must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    works = ChestWorks(Setting(device=device, size=Size(size), seed=seed), device)
    started = from_main_process(time.time())
    if is_main_process():
        print(json.dumps({"started": started}), file=answers, flush=True)
    while request := from_main_process(sys.stdin.readline() if is_main_process() else ""):
        result = works.run(request.strip())
        if is_main_process():
            torch.save(result, folder / RESULT)
            print(json.dumps({"seconds": result["seconds"]}), file=answers, flush=True)
    if is_distributed():
        leave_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
