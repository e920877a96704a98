# SPDX-License-Identifier: Apache-2.0
"""Every stage of `TASK` trained by two processes (nccl on GPUs, gloo on CPUs), on made data.

Run from the root of the Model Zoo: `python ci/unit_tests/runner.py --b TASK --dist True`.
"""

from __future__ import annotations

import shutil
import tempfile
import unittest
from pathlib import Path

from test_TASK import BUNDLE, STAGES, folders, make_data, options
from utils import export_config_and_run_mgpu_cmd


class TestTwoProcesses(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        make_data(self.folder / "data")

    def test_train_mgpu(self) -> None:
        for stage, weights in STAGES.items():
            output_path = f"{BUNDLE}/configs/{stage}_in_two_processes.json"
            self.addCleanup(Path(output_path).unlink, missing_ok=True)
            with self.subTest(stage):
                export_config_and_run_mgpu_cmd(
                    config_file=[f"{BUNDLE}/configs/{name}.json" for name in (stage, "tiny", "multi_gpu_train")],
                    logging_file=f"{BUNDLE}/configs/logging.conf",
                    meta_file=f"{BUNDLE}/configs/metadata.json",
                    override_dict=options(stage) | folders(self.folder, stage),
                    output_path=output_path,
                    ngpu=2,
                )
                assert (self.folder / "models" / weights).is_file()


if __name__ == "__main__":
    unittest.main()
