# SPDX-License-Identifier: Apache-2.0
"""`metadata.json`: the published schema, what the Model Zoo's scripts read, and names that its scripts trip over.

The schema (`tools/schemas/meta_schema_20240725.json`) is MONAI's, Apache-2.0, byte for byte as published at
https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema

from tools.bundle_checks.bundle import MANIFEST, Bundle
from tools.bundle_checks.reading import read_json

SCHEMA = Path(__file__).resolve().parents[1] / "schemas/meta_schema_20240725.json"
# Beside those that the schema demands: the Model Zoo's pages and checks read them.
EXPECTED = (
    *("changelog", "name", "data_source", "data_type", "image_classes", "label_classes", "pred_classes"),
    *("eval_metrics", "intended_use", "references", "supported_apps"),
)
RESEARCH_ONLY = re.compile(r"research\s+(?:use\s+)?only", re.IGNORECASE)
NOT_DIAGNOSIS = re.compile(
    r"not (?:for|intended for|meant for)\b[^.]{0,40}\b(?:diagnosis|diagnostic|clinical)", re.IGNORECASE
)


def schema_faults(bundle: Bundle) -> list[str]:
    """Where `metadata.json` breaks the published schema, read from this repository."""
    metadata = bundle.metadata
    if not metadata:
        return ["metadata.json: missing or unreadable"]
    faults = []
    if not str(metadata.get("schema", "")).endswith(f"/{SCHEMA.name}"):
        faults.append(f"schema: expected the address of {SCHEMA.name}, got {metadata.get('schema')!r}")
    validator = jsonschema.Draft201909Validator(read_json(SCHEMA))
    for found in sorted(validator.iter_errors(metadata), key=lambda error: list(map(str, error.absolute_path))):
        error = found
        # Of several forms that an entry may have, the one that it comes nearest to says what is wrong.
        while error.context:
            error = max(error.context, key=lambda inner: len(inner.absolute_path))
        where = "#".join(str(part) for part in error.absolute_path) or "metadata.json"
        faults.append(f"{where}: {error.message[:200]}")
    return faults


def version_faults(bundle: Bundle) -> list[str]:
    """Version, changelog and the version of the code."""
    metadata = bundle.metadata
    version = str(metadata.get("version", ""))
    faults = []
    if not re.fullmatch(r"\d\.\d\.\d", version):
        # Versions are sorted as strings: 0.10.0 < 0.9.0.
        faults.append(f"version: expected three single digits such as 0.1.0, got {version!r}")
    if version not in metadata.get("changelog", {}):
        faults.append(f"changelog: expected an entry for version {version}, found none")
    monai_version = str(metadata.get("monai_version", ""))
    if re.fullmatch(r"\d+\.\d+\.\d*9", monai_version):
        faults.append(
            f"monai_version: expected a version that does not end in 9, got {monai_version}: the Model Zoo's CI makes "
            "an empty range of it"
        )
    stamp = bundle.folder / bundle.package / "__init__.py"
    text = stamp.read_text(encoding="utf-8") if stamp.is_file() else ""
    found = re.search(r"""^__version__ = ["'](.*)["']$""", text, re.MULTILINE)
    if (found[1] if found else None) != version:
        faults.append(
            f'{bundle.package}/__init__.py: expected __version__ = "{version}", got {found[1] if found else None!r}'
        )
    return faults


def content_faults(bundle: Bundle) -> list[str]:
    """Entries that readers expect beside the schema's, and the statement of intended use."""
    metadata = bundle.metadata
    faults = [f"{key}: missing" for key in EXPECTED if key not in metadata]
    use = str(metadata.get("intended_use", ""))
    if not (RESEARCH_ONLY.search(use) and NOT_DIAGNOSIS.search(use)):
        faults.append(f"intended_use: expected 'research only, not for diagnosis', got {use!r}")
    tensors: Any = metadata.get("network_data_format", {})
    for kind, first in (("inputs", "image"), ("outputs", "pred")):
        names = list(tensors.get(kind, {})) if isinstance(tensors, dict) else []
        if names[:1] != [first]:
            faults.append(f"network_data_format#{kind}: expected {first!r} first, as MONAI Label takes it, got {names}")
    return faults


def name_faults(bundle: Bundle) -> list[str]:
    """The folder's name, which the Model Zoo's scripts cut into pieces."""
    name, faults = bundle.name, []
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        faults.append(f"{name}: expected small letters, digits and underscores")
    if "_v" in name:
        faults.append(f"{name}: expected no '_v' in a name, at which file names are split into name and version")
    for other in sorted(bundle.folder.parent.iterdir()):
        if other != bundle.folder and (other / MANIFEST).is_file() and (other.name in name or name in other.name):
            faults.append(f"{name}: part of another bundle's name or the other way round: {other.name}")
    return faults
