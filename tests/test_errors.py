# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    from monai.bundle import ConfigWorkflow
    config = {{
        "initialize": [{{"_target_": "shared.errors.show_cause_last"}}],
        "images": {{"_target_": "shared.transforms.images.LoadRadiographd", "keys": "image"}},
        "data": {{"_target_": "Dataset", "data": [{{"image": {path!r}}}], "transform": "@images"}},
        "loader": {{"_target_": "DataLoader", "dataset": "@data", "batch_size": 1, "num_workers": {workers}}},
        "failing": {{"_target_": "torch.nn.Linear", "in_features": -1, "out_features": 1}},
        "run": ["{expression}"],
    }}
    if __name__ == "__main__":
        import json, pathlib
        path = pathlib.Path({path!r}).with_name("config.json")
        path.write_text(json.dumps(config))
        workflow = ConfigWorkflow(config_file=str(path), meta_file=None, logging_file=None)
        workflow.initialize()
        workflow.run()
"""


def run(tmp_path, expression, workers=0):
    path = tmp_path / "film.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    program = textwrap.dedent(PROGRAM).format(path=str(path), workers=workers, expression=expression)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    return path, result.stderr


def test_our_error_is_one_line_without_traceback(tmp_path):
    path, stderr = run(tmp_path, "$next(iter(@loader))")
    assert "Traceback" not in stderr
    assert stderr.strip().splitlines()[-1].startswith(f"{path}: ")


@pytest.mark.filterwarnings("ignore")
def test_error_in_a_worker_ends_in_its_cause(tmp_path):
    path, stderr = run(tmp_path, "$next(iter(@loader))", workers=1)
    assert stderr.strip().splitlines()[-1].startswith(f"{path}: ")


def test_foreign_error_keeps_its_traceback_and_names_its_cause(tmp_path):
    _, stderr = run(tmp_path, "$@failing")
    assert "Traceback" in stderr
    last = stderr.strip().splitlines()[-1]
    assert "ConfigExpression" not in last
    assert last.startswith(("RuntimeError", "ValueError"))


def test_message_has_the_last_line_to_itself_beside_a_progress_bar(tmp_path):
    program = """
        from tqdm import tqdm
        from shared.errors import show_cause_last
        from shared.weights import load_weights
        show_cause_last()
        bar = tqdm(range(3))
        next(iter(bar))
        load_weights(None, "absent.pt")
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1].startswith("absent.pt: expected trained weights")
