# SPDX-License-Identifier: Apache-2.0
"""Each configuration by itself: form, ids, wiring, and what consumers cannot follow."""

from __future__ import annotations

import ast
import configparser
import json
import logging
import logging.handlers
import re
from collections.abc import Mapping
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.properties import InferProperties, TrainProperties

from tools.bundle_checks.bundle import MANIFEST, Bundle, is_inference, is_training
from tools.bundle_checks.expressions import IMPORTS, expression_faults
from tools.bundle_checks.reading import components, strings, undefined_references
from tools.bundle_checks.targets import target_faults

TRAINING_IDS = (
    *("bundle_root", "device", "dataset_dir", "network_def", "val_interval", "initialize", "run", "training"),
    *("train#trainer", "train#trainer#max_epochs", "train#dataset", "train#dataset#data", "train#inferer"),
    *("train#handlers", "validate#evaluator", "validate#dataset", "validate#dataset#data", "validate#handlers"),
)
INFERENCE_IDS = (
    *("bundle_root", "device", "network_def", "inferer", "preprocessing", "postprocessing", "dataset", "dataloader"),
    *("evaluator", "initialize", "run"),
)
# Bundles that draw from nothing read no image; MONAI's own list demands the rest.
FROM_NOTHING = ("preprocessing", "dataloader", "postprocessing")
_URL = re.compile(r"\b(?:https?|ftp|s3|gs)://\S+|\b(?:hf|huggingface)\.co/\S+")


def format_faults(bundle: Bundle) -> list[str]:
    """JSON that the Model Zoo's pretty-format hook would rewrite; files that cannot be read."""
    faults = list(bundle.unreadable)
    paths = [*sorted((bundle.folder / "configs").glob("*.json")), bundle.folder / MANIFEST]
    for path in (path for path in paths if path.is_file()):
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            pretty = json.dumps(json.loads(text), indent=4, ensure_ascii=True) + "\n"
        except ValueError:
            continue  # among the unreadable
        if text != pretty:
            lines = zip(text.splitlines(), pretty.splitlines(), strict=False)
            line = next((number for number, (one, two) in enumerate(lines, 1) if one != two), "last")
            name = path.relative_to(bundle.folder).as_posix()
            faults.append(f"{name}, line {line}: expected json.dumps(indent=4) in ASCII with a final newline")
    return faults


def id_faults(bundle: Bundle) -> list[str]:
    """Ids that consumers ask for by name."""
    faults = []
    for name, config in bundle.standalone.items():
        parser = ConfigParser(dict(config))
        wanted: tuple[str, ...] = TRAINING_IDS if is_training(name) else INFERENCE_IDS
        if is_inference(name) and name != "inference":
            wanted = tuple(key for key in wanted if key not in FROM_NOTHING)
        missing = [key for key in wanted if key not in parser]
        faults += [f"{name}.json: {', '.join(missing)}: missing"] if missing else []
        faults += [
            f"{name}.json: {key}: expected a list"
            for key in ("initialize", "run")
            if key in config and not isinstance(config[key], list)
        ]
        if is_training(name) and "training" in config and config["training"] != config.get("run"):
            faults.append(f"{name}.json: training: expected the same as run")
        faults += [f"{name}.json: {fault}" for fault in wiring_faults(config, training=is_training(name))]
    return faults


def wiring_faults(config: Mapping[str, Any], *, training: bool) -> list[str]:
    """Properties that MONAI finds only where they are referred to as exactly `@id`."""
    parser = ConfigParser(dict(config))
    faults = []
    properties: Mapping[Any, Any] = TrainProperties if training else InferProperties
    for content in properties.values():
        if content.get("refer_id") in (None, "validator", "interval"):
            continue
        own, place = (content[key].replace("::", "#") for key in ("id", "refer_id"))
        value = parser.get(place)
        # Of `$` expressions MONAI checks nothing; a list in place makes its check fail with an AttributeError.
        if value is not None and not (
            isinstance(value, str) and (value.startswith("$") or value.replace("::", "#") == f"@{own}")
        ):
            faults.append(f'{place}: expected "@{own}", got {str(value)[:60]!r}')
    handlers = parser.get("train#handlers") if training else None
    for number, handler in enumerate(handlers if isinstance(handlers, list) else ()):
        if isinstance(handler, Mapping) and handler.get("_target_") == "ValidationHandler":
            for argument, own in (("validator", "validate#evaluator"), ("interval", "val_interval")):
                if str(handler.get(argument)).replace("::", "#") != f"@{own}":
                    faults.append(
                        f'train#handlers#{number}#{argument}: expected "@{own}", got {handler.get(argument)!r}'
                    )
    if training and handlers is not None and not isinstance(handlers, list):
        faults.append("train#handlers: expected a list, as MONAI Label and federated clients change it")
    return faults


def reference_faults(bundle: Bundle) -> list[str]:
    """Names that a file which stands alone does not define, and macros that need another file or the metadata."""
    faults = []
    for name, config in bundle.workflows.items():
        if name in bundle.standalone:
            faults += [f"{name}.json: {fault}" for fault in undefined_references(config)]
        for where, text in strings(config, descriptions=True):
            if text.startswith("%") and re.search(r"\.(?:json|ya?ml)", text):
                faults.append(f"{name}.json: {where}: {text}: a macro of a file is looked up in the working directory")
            elif is_inference(name) and ("_meta_" in text and text.startswith(("@", "$", "%"))):
                faults.append(f"{name}.json: {where}: {text}: MONAI Label reads this file without the metadata")
    return faults


def place_faults(bundle: Bundle) -> list[str]:
    """Absolute paths and addresses in values."""
    faults = []
    for name, config in {**bundle.workflows, "metadata": bundle.metadata}.items():
        for where, text in strings(config):
            if name == "metadata" and where.split("#")[0] in ("schema", "references"):
                continue
            for url in _URL.findall(text):
                faults.append(f"{name}.json: {where}: {url}: expected no address; large_files.yml names downloads")
            if re.match(r"(?:/(?!workspace/)\w|[A-Za-z]:[\\/]|~)", text):
                faults.append(f"{name}.json: {where}: {text}: expected a path below @bundle_root or /workspace")
    return faults


def expression_and_consumer_faults(bundle: Bundle) -> list[str]:
    """Expressions and targets outside the allow-lists, and what MONAI Label cannot run."""
    faults = []
    for name, config in {**bundle.workflows, "metadata": bundle.metadata}.items():
        faults += [f"{name}.json: {fault}" for fault in [*expression_faults(config), *target_faults(config)]]
    for where, text in strings(bundle.workflows.get("inference", {})):
        if "@device." in text:
            faults.append(f"inference.json: {where}: {text}: in MONAI Label the device is a string")
    for where, component in components(bundle.workflows.get("inference", {})):
        optional = "_disabled_" in component
        if component["_target_"] == "Spacingd" and "image" in _listed(component.get("keys")) and not optional:
            faults.append(f"inference.json: {where}: Spacingd of 'image' breaks MONAI Label under MONAI 1.6")
    return faults


def own_component_faults(bundle: Bundle) -> list[str]:
    """Components of the bundle that do not put it on the path: they are not found by consumers that never `run`."""
    faults = []
    for name, config in bundle.workflows.items():
        for where, component in components(config):
            target = str(component["_target_"])
            if target.split(".")[0] in ("shared", "tools", "scripts", "bundles"):
                faults.append(
                    f"{name}.json: {where}: {target}: expected {bundle.package}, this package is not in the bundle"
                )
            elif target.startswith(f"{bundle.package}.") and "@bundle_on_path" not in _listed(
                component.get("_requires_")
            ):
                faults.append(f'{name}.json: {where}: {target}: expected "_requires_": "@bundle_on_path"')
        if name in bundle.standalone and "bundle_on_path" not in config:
            faults.append(f"{name}.json: bundle_on_path: missing")
        for text in _listed(config.get("imports")):
            if text.removeprefix("$") not in IMPORTS:
                faults.append(
                    f"{name}.json: imports: {text}: expected nothing but {', '.join(IMPORTS)}; a failing import is "
                    "never repeated"
                )
    return faults


def logging_faults(bundle: Bundle) -> list[str]:
    """`logging.conf` as MONAI 1.6 accepts it: handlers of `logging`, literal arguments."""
    path = bundle.folder / "configs/logging.conf"
    if not path.is_file():
        return []  # among the missing files
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except (configparser.Error, UnicodeDecodeError) as error:
        return [f"logging.conf: {error}"]
    faults = []
    for section in parser.sections():
        if not section.startswith("handler_"):
            continue
        name = parser.get(section, "class", fallback="").removeprefix("logging.").removeprefix("handlers.")
        if not (hasattr(logging, name) or hasattr(logging.handlers, name)):
            faults.append(f"logging.conf: {section}: expected a handler of logging, got {name!r}")
        arguments = parser.get(section, "args", fallback="()")
        try:
            ast.literal_eval(re.sub(r"\bsys\.std(?:out|err)\b", "0", arguments))
        except (ValueError, SyntaxError):
            faults.append(f"logging.conf: {section}: expected literal arguments or sys.stdout, got {arguments}")
    return faults


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
