# SPDX-License-Identifier: Apache-2.0
"""The unit tests that go with exported bundles, run as the Model Zoo runs them: from its root, beside a `utils.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.exports import TASKS, exported, run_alone
from tools.export.unit_tests import write_unit_tests

# Stands in for the Model Zoo's `ci/unit_tests/utils.py`: the same names and the same order of steps.
UTILS = """
import os
import subprocess
import sys

from monai.bundle import ConfigParser


def check_workflow(workflow, check_properties=False):
    workflow.initialize()
    if check_properties and workflow.check_properties():
        raise ValueError(f"properties: {workflow.check_properties()}")
    workflow.run()
    workflow.finalize()


def export_config_and_run_mgpu_cmd(config_file, meta_file, logging_file, override_dict, output_path, ngpu=2):
    parser = ConfigParser()
    parser.read_config(config_file)
    parser.update(pairs=override_dict)
    ConfigParser.export_config_file(parser.config, output_path, indent=4)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ngpu}"]
    options = ["--config_file", output_path, "--logging_file", logging_file, "--meta_file", meta_file]
    subprocess.check_call([*launcher, "-m", "monai.bundle", "run", *options], env=dict(os.environ))
"""
# As `runner.py` does: the folder of the tests on the path, the root of the zoo as working directory.
RUN = """
import sys, unittest
sys.path.insert(0, "ci/unit_tests")
import {module} as tests
{before}
unittest.main(module=tests, argv=["runner"])
"""


@pytest.fixture
def zoo(tmp_path) -> Path:
    folder = tmp_path / "zoo"
    (folder / "ci/unit_tests").mkdir(parents=True)
    (folder / "ci/unit_tests/utils.py").write_text(UTILS)
    return folder


def run_in(zoo: Path, task: str, module: str, before: str = "") -> subprocess.CompletedProcess[str]:
    shutil.copytree(exported(task), zoo / "models" / task)
    write_unit_tests(task, zoo / "ci/unit_tests")
    return run_alone("-c", RUN.format(module=module, before=before), cwd=zoo)


@pytest.mark.parametrize("task", TASKS)
def test_unit_test_passes_in_the_zoo_and_leaves_the_bundle_as_it_is(zoo, task):
    done = run_in(zoo, task, f"test_{task}")
    assert done.returncode == 0, done.stdout[-5000:]
    assert "\nOK" in done.stdout
    kept = {path.relative_to(zoo / "models" / task) for path in (zoo / "models" / task).rglob("*")}
    extra = kept - {path.relative_to(exported(task)) for path in exported(task).rglob("*")}
    assert [path for path in extra if "__pycache__" not in path.parts] == []


def test_unit_test_of_two_processes_passes_in_the_zoo(zoo):
    first = "tests.STAGES = dict([next(iter(tests.STAGES.items()))])"
    done = run_in(zoo, "sdseg", "test_sdseg_dist", first)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "\nOK" in done.stdout
    assert not list((zoo / "models/sdseg/configs").glob("*_in_two_processes.json"))


def test_unit_test_fails_with_the_bundle(zoo):
    before = "tests.STAGES = {}; tests.TestSdseg.train = lambda self, *stages: None"
    done = run_in(zoo, "sdseg", "test_sdseg", before)
    assert done.returncode == 1
    assert "FAILED (errors=2)" in done.stdout


def test_tests_are_written_beside_others_in_the_zoos_format(tmp_path):
    (tmp_path / "test_other.py").write_text("x\n")
    written = [path for task in TASKS for path in write_unit_tests(task, tmp_path)]
    assert {path.name for path in written} == {f"test_{task}{end}.py" for task in TASKS for end in ("", "_dist")}
    assert (tmp_path / "test_other.py").read_text() == "x\n"
    ruff = shutil.which("ruff", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert ruff is not None
    style = [
        "--isolated",
        "--no-cache",
        "--config",
        "line-length=120",
        "--config",
        "format.skip-magic-trailing-comma=true",
    ]
    done = subprocess.run([ruff, "format", "--check", *style, *map(str, written)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_bundle_without_tests_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"test_other\.py: expected the unit test of the bundle, found none"):
        write_unit_tests("other", tmp_path)
