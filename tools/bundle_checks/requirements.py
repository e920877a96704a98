# SPDX-License-Identifier: Apache-2.0
"""Whether the packages that a bundle imports are pinned in its metadata, and can be installed on Python 3.10."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tools.bundle_checks.bundle import Bundle
from tools.bundle_checks.reading import components

# Where a package is called otherwise than its module, and may not be installed here.
DISTRIBUTIONS = {
    **{"ignite": "pytorch-ignite", "PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"},
    **{"cv2": "opencv-python", "yaml": "pyyaml", "open_clip": "open-clip-torch", "pytorch_msssim": "pytorch-msssim"},
}
# Parts of MONAI that fail without a package that MONAI itself does not demand.
NEEDED_BY_MONAI = {
    "einops": {"AutoencoderKL", "DiffusionModelUNet", "ControlNet", "SPADEDiffusionModelUNet", "SPADEAutoencoderKL"},
    "pytorch-ignite": {"SupervisedTrainer", "SupervisedEvaluator", "ValidationHandler", "LrScheduleHandler"},
    "torchvision": {"PerceptualLoss"},
    "mlflow": {"MLFlowHandler"},
    "tensorboard": {"TensorBoardStatsHandler", "TensorBoardImageHandler"},
    "nibabel": {"NibabelReader"},
}
# The Model Zoo's CI runs Python 3.10: the first release that does not install there.
FIRST_WITHOUT_310 = {"numpy": (2, 3), "scipy": (1, 16), "scikit-image": (0, 26), "pandas": (3, 0), "pillow": (13, 0)}
_OWN = ("monai", "torch", "numpy")


def pins(bundle: Bundle) -> dict[str, Any]:
    """Version, as it stands there, that the metadata demands, by the normalised name of the package."""
    content = bundle.metadata
    named = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}
    required = content.get("required_packages_version")
    result: dict[str, Any] = {name: content.get(key) for name, key in named.items()}
    result |= required if isinstance(required, dict) else {}
    return {_normalised(name): version for name, version in result.items()}


def pin_faults(bundle: Bundle) -> list[str]:
    """Pins that pip cannot take: no exact versions, or none for Python 3.10."""
    faults = []
    for name, version in pins(bundle).items():
        if not isinstance(version, str) or not re.fullmatch(r"\d+(\.\d+)*(\.?(rc|post)\d+)?", version):
            faults.append(f"{name}: expected an exact version such as '1.2.3', got {version!r}")
            continue
        first = FIRST_WITHOUT_310.get(name)
        if first and tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= first:
            faults.append(f"{name}: {version} needs Python 3.11 or newer; the Model Zoo's CI has 3.10")
    return faults


def missing_pins(bundle: Bundle) -> list[str]:
    """Packages that the bundle's code imports when a module is loaded, or its configurations name, without a pin."""
    needed: dict[str, str] = {}
    for name, where in _imports(bundle, inside_functions=False):
        needed.setdefault(name, where)
    for stem, config in bundle.workflows.items():
        for place, component in components(config):
            target = str(component["_target_"])
            where = f"configs/{stem}.json: {place}"
            if "." in target and not target.startswith((f"{bundle.package}.", "$", "@")):
                needed.setdefault(target.split(".")[0], where)
            for package in _needed_by_monai({target.rpartition(".")[2]}):
                needed.setdefault(package, where)
    for path in _modules(bundle):
        names = {
            alias.name for node in ast.walk(_tree(path)) if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        for package in _needed_by_monai(names):
            needed.setdefault(package, path.relative_to(bundle.folder).as_posix())
    return [
        f"{package}: {where} needs it, but required_packages_version does not name it"
        for package, where in _unpinned(bundle, needed).items()
    ]


def optional_packages(bundle: Bundle) -> list[str]:
    """Packages without a pin that are imported only when a function is called: parts that this bundle may not use."""
    needed = dict(reversed(list(_imports(bundle, inside_functions=True))))
    return sorted(_unpinned(bundle, needed))


def _unpinned(bundle: Bundle, needed: dict[str, str]) -> dict[str, str]:
    known = {*pins(bundle), *_dependencies(_OWN)}
    installed = _installed()
    result = {}
    for module, where in needed.items():
        if module in sys.stdlib_module_names or module == bundle.package:
            continue
        candidates = {
            _normalised(name) for name in (DISTRIBUTIONS.get(module), *installed.get(module, ()), module) if name
        }
        if not candidates & known:
            result[_normalised(DISTRIBUTIONS.get(module, module))] = where
    return result


@functools.cache
def _installed() -> Mapping[str, list[str]]:
    """Packages that bring a module, by its name."""
    return metadata.packages_distributions()


def _modules(bundle: Bundle) -> list[Path]:
    return [bundle.folder / name for name in bundle.files if name.endswith(".py")]


def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ast.Module([], [])  # a fault of the code's check


def _imports(bundle: Bundle, *, inside_functions: bool) -> Iterator[tuple[str, str]]:
    """First parts of absolute imports, with the file."""
    for path in _modules(bundle):
        tree = _tree(path)
        functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        lazy = {
            id(node) for function in ast.walk(tree) if isinstance(function, functions) for node in ast.walk(function)
        }
        where = path.relative_to(bundle.folder).as_posix()
        for node in ast.walk(tree):
            if (id(node) in lazy) != inside_functions:
                continue
            if isinstance(node, ast.Import):
                yield from ((alias.name.split(".")[0], where) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield node.module.split(".")[0], where
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("optional_import"):
                names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
                yield from ((str(name).split(".")[0], where) for name in names)


def _needed_by_monai(names: set[str]) -> list[str]:
    return [package for package, parts in NEEDED_BY_MONAI.items() if parts & names]


def _dependencies(names: tuple[str, ...]) -> set[str]:
    """What installing packages brings without a pin: `typing_extensions` comes with torch."""
    requirements = [line for name in names for line in metadata.requires(name) or () if "extra ==" not in line]
    return {_normalised(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in requirements}


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
