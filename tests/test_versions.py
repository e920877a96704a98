# SPDX-License-Identifier: Apache-2.0
"""What keeps the bundles running with MONAI 1.5.2, numpy 1.26 and ignite 0.4 (MONAI Label) and on Python 3.10 (the
Model Zoo), as far as one environment can tell; `tools.compare_versions` runs them with several."""

from __future__ import annotations

import ast
import gzip
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.engines import SupervisedTrainer
from monai.networks.schedulers import DDIMScheduler as CoreDDIMScheduler

from shared.engines import AccumulatingTrainer
from shared.handlers import progress
from shared.handlers.accumulation import completed_steps, completes_step
from shared.nifti_files import grid_image, save_image
from shared.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, diffusion_timesteps
from tests.bundle_tools import CONFIGS, WORKFLOWS, components, label, read
from tests.conftest import ROOT

SHARED = sorted((ROOT / "shared").rglob("*.py"))
# Arguments of MONAI 1.6 that MONAI 1.5.2 does not know, of everything that `shared` or a config uses: the difference of
# the signatures in both versions. Another one that comes into use fails with `tools.compare_versions`.
NEW_IN_MONAI_16 = {
    "DiceMetric": {"ignore_index", "per_component"},
    "MLFlowHandler": {"artifact_location"},
    "MeanIoU": {"ignore_index"},
    "MetaTensor": {"spatial_ndim"},
    "PersistentDataset": {"track_meta", "weights_only"},
    "SupervisedTrainer": {"accumulation_steps"},
    "compute_dice": {"ignore_index", "per_component"},
    "compute_iou": {"ignore_index"},
    "scale_affine": {"align_corners"},
}
ACCUMULATES = "accumulation_steps" in inspect.signature(SupervisedTrainer).parameters
# Modules and names of the standard library that Python 3.10 lacks.
NEW_MODULES = {"tomllib", "wsgiref.types", "asyncio.taskgroups"}
NEW_NAMES = {
    "asyncio": {"Runner", "TaskGroup", "timeout"},
    "contextlib": {"chdir"},
    "datetime": {"UTC"},
    "enum": {"EnumCheck", "FlagBoundary", "ReprEnum", "StrEnum", "member", "nonmember", "verify"},
    "hashlib": {"file_digest"},
    "itertools": {"batched"},
    "math": {"cbrt", "exp2", "sumprod"},
    "operator": {"call"},
    "typing": {
        *("LiteralString", "Never", "NotRequired", "Required", "Self", "TypeAliasType", "TypeVarTuple", "Unpack"),
        *("assert_never", "assert_type", "dataclass_transform", "override", "reveal_type"),
    },
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def newer_arguments(tree: ast.AST) -> list[str]:
    """Calls with a keyword that only MONAI 1.6 takes."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            known = NEW_IN_MONAI_16.get(name, set())
            found += [f"line {node.lineno}: {name}({k.arg}=...)" for k in node.keywords if k.arg in known]
    return found


def newer_names(tree: ast.AST) -> Iterator[str]:
    """Imports and attributes of the standard library that came after Python 3.10; a `hasattr` beside them excuses."""
    excused = {
        f"{ast.unparse(node.args[0])}.{node.args[1].value}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr" and isinstance(node.args[1], ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in NEW_MODULES)
        elif isinstance(node, ast.ImportFrom):
            if node.module in NEW_MODULES:
                yield str(node.module)
            new = NEW_NAMES.get(node.module or "", set())
            yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name in new)
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if node.attr in NEW_NAMES.get(ast.unparse(node.value), set()) and name not in excused:
                yield name


# Python 3.10


def test_code_of_bundles_is_python_3_10() -> None:
    assert len(SHARED) > 100
    found = {}
    for path in SHARED:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=(3, 10))
        found[relative(path)] = list(newer_names(tree))
    assert {name: names for name, names in found.items() if names} == {}


def test_the_check_sees_what_python_3_10_lacks() -> None:
    with pytest.raises(SyntaxError):
        ast.parse("try:\n    f()\nexcept* ValueError:\n    pass", feature_version=(3, 10))
    code = "import tomllib, hashlib, math\nfrom typing import Any, Self\nhashlib.file_digest(f, 'md5')\nmath.sqrt(2)"
    assert sorted(newer_names(ast.parse(code))) == ["hashlib.file_digest", "tomllib", "typing.Self"]
    assert list(newer_names(ast.parse("hashlib.file_digest(f) if hasattr(hashlib, 'file_digest') else g(f)"))) == []


def test_bundles_agree_on_the_version_of_a_package() -> None:
    versions: dict[str, set[str]] = {}
    for path in CONFIGS:
        if path.stem == "metadata":
            metadata = read(path)
            pins = {**metadata["required_packages_version"], "numpy": metadata["numpy_version"]}
            pins |= {"monai": metadata["monai_version"], "torch": metadata["pytorch_version"]}
            for name, version in pins.items():
                versions.setdefault(name, set()).add(version)
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}
    # The last releases for Python 3.10.
    assert tuple(int(part) for part in min(versions["numpy"]).split(".")[:2]) == (2, 2)
    assert tuple(int(part) for part in min(versions["scipy"]).split(".")[:2]) == (1, 15)


def test_every_bundle_names_what_its_command_line_and_its_files_need() -> None:
    needed = {
        # `monai.bundle run` parses its words with fire, and `shared.overrides` reads them in the same way.
        **{task: {"fire", "pytorch-ignite", "einops"} for task in ("brain_controlnet", "dmri2noddi")},
        "sdseg": {"fire", "pytorch-ignite", "einops", "nibabel", "pydicom"},
        # Its modules are imported with those that read volumes.
        "cxr_ldm": {"fire", "pytorch-ignite", "einops", "nibabel", "pydicom"},
    }
    for task, packages in needed.items():
        metadata = read(ROOT / f"bundles/{task}/configs/metadata.json")
        assert packages <= metadata["required_packages_version"].keys(), task


# MONAI 1.5.2


def test_code_gives_monai_no_argument_that_only_1_6_takes() -> None:
    found = {relative(path): newer_arguments(ast.parse(path.read_text(encoding="utf-8"))) for path in SHARED}
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize("path", WORKFLOWS, ids=label)
def test_configs_give_monai_no_argument_that_only_1_6_takes(path: Path) -> None:
    faults = [
        f"{where}: {component['_target_']}({name})"
        for where, component in components(read(path))
        for name in NEW_IN_MONAI_16.get(component["_target_"].rpartition(".")[2], set()) & component.keys()
    ]
    assert faults == []


def test_the_check_sees_a_newer_argument() -> None:
    assert newer_arguments(ast.parse("engines.SupervisedTrainer(\n a, accumulation_steps=2)")) == [
        "line 1: SupervisedTrainer(accumulation_steps=...)"
    ]


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_timesteps_are_ours_whatever_core_lays_out(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    trailing = [1000 * (steps - i) // steps - 1 for i in range(steps)]
    sampled = []
    for layout in (None, "1.5"):
        scheduler = CoreDDIMScheduler(1000, clip_sample=False)
        if layout:  # down from T - T / n: 980, 960, ..., 0 for 50 steps

            def older(n: int, device: Any = None, of: CoreDDIMScheduler = scheduler) -> None:
                of.num_inference_steps = n
                of.timesteps = torch.arange(n).flip(0) * (of.num_train_timesteps // n)

            monkeypatch.setattr(scheduler, "set_timesteps", older)
        assert diffusion_timesteps(scheduler, steps) == trailing
        sample = torch.linspace(-1, 1, 12).reshape(1, 1, 3, 4)
        for timestep in diffusion_timesteps(scheduler, steps):
            sample = scheduler.step(0.1 * sample, timestep, sample)[0]
        sampled.append(sample)
    assert torch.equal(*sampled)


@pytest.mark.parametrize(
    ("scheduler", "spacing", "expected"),
    [
        (DDIMScheduler, "trailing", [999, 749, 499, 249]),
        (DDIMScheduler, "linspace", [999, 749, 500, 250]),
        (DPMSolverMultistepScheduler, "karras", [999, 799, 356, 0]),
    ],
)
def test_timesteps_by_number(scheduler: type, spacing: str, expected: list[int]) -> None:
    """The same numbers with every MONAI: a picture does not depend on it."""
    made = scheduler(1000, "scaled_linear_beta", beta_start=0.0015, beta_end=0.0205, spacing=spacing)
    assert diffusion_timesteps(made, 4) == expected


def trainer(**options: Any) -> AccumulatingTrainer:
    network = torch.nn.Linear(2, 2)
    return AccumulatingTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=torch.nn.MSELoss(),
        **options,
    )


@pytest.fixture
def older_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI's trainer without the argument that 1.6 brought."""
    original = SupervisedTrainer.__init__
    signature = inspect.signature(original)
    if not ACCUMULATES:
        return
    parameters = [p for name, p in signature.parameters.items() if name != "accumulation_steps"]

    def older(self: SupervisedTrainer, *args: Any, **kwargs: Any) -> None:
        signature.replace(parameters=parameters).bind(self, *args, **kwargs)
        original(self, *args, **kwargs)
        del self.accumulation_steps

    older.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    monkeypatch.setattr(SupervisedTrainer, "__init__", older)


@pytest.mark.skipif(not ACCUMULATES, reason="MONAI 1.5 has no accumulation")
def test_trainer_accumulates_with_monai_1_6() -> None:
    assert trainer(accumulation_steps=3).accumulation_steps == 3


def test_trainer_runs_where_monai_cannot_accumulate(older_trainer: None) -> None:
    assert trainer(accumulation_steps=1).accumulation_steps == trainer().accumulation_steps == 1
    with pytest.raises(ValueError, match=r"^accumulation_steps: expected 1 with MONAI .*, got 2; install monai>=1.6"):
        trainer(accumulation_steps=2)


def test_every_iteration_is_a_step_for_a_trainer_without_accumulation() -> None:
    engine = SimpleNamespace(state=SimpleNamespace(iteration=5, epoch_length=3))
    assert completes_step(engine)
    assert completed_steps(engine) == 5


def test_progress_bar_of_ignite_0_4(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        pass

    contrib = ModuleType("ignite.contrib.handlers")
    contrib.ProgressBar = Older  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ignite.handlers", ModuleType("ignite.handlers"))
    monkeypatch.setitem(sys.modules, "ignite.contrib.handlers", contrib)
    spec = importlib.util.spec_from_file_location("older_progress", progress.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.EpochProgress.__base__ is Older


# Files


def test_the_header_of_gzip_is_the_same_with_every_python(tmp_path: Path) -> None:
    """`gzip.compress` writes operating system 255 with Python 3.10 and 3 (Unix) with 3.11."""
    values = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    image = grid_image(values, np.diag([1.0, 2.0, 3.0, 1.0]))
    save_image(image, tmp_path / "a.nii.gz")
    content = (tmp_path / "a.nii.gz").read_bytes()
    assert content[:10] == b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
    assert gzip.decompress(content) == image.to_bytes()
    np.testing.assert_array_equal(np.asarray(nibabel.load(tmp_path / "a.nii.gz").dataobj), values)
