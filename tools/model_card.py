# SPDX-License-Identifier: Apache-2.0
"""Model card for the Hugging Face hub: the bundle's own card under a head that the hub reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

DEMO_NOTE = (
    "> **Demo weights.** The networks of this repository are tiny and were trained on synthetic phantoms only: they "
    "have never seen a real image. They show that the bundle runs. Results on real images mean nothing."
)
DEMO_DATA = "synthetic phantoms, computed from formulas; no person stands behind them"
RESEARCH_NOTE = "> **Research only. Not for diagnosis or any clinical use.**"


@dataclasses.dataclass(frozen=True)
class Card:
    """What the hub wants to know of a bundle and its metadata do not say.

    Args:
        pipeline_tag: one of the hub's tasks.
        tags: words by which it is found, beside `monai` and `medical`.
        options: what `inference.json` needs to run, beside its own values.
    """

    pipeline_tag: str
    tags: tuple[str, ...]
    options: str = " --dataset_dir DIR"


CARDS: Mapping[str, Card] = {
    "brain_controlnet": Card("image-to-image", ("brain", "mri", "image-translation", "latent-diffusion", "controlnet")),
    "cxr_ldm": Card(
        "text-to-image", ("chest-x-ray", "radiology", "image-synthesis", "latent-diffusion"), " --prompt 'No effusion.'"
    ),
    "dmri2noddi": Card("image-to-image", ("brain", "diffusion-mri", "noddi", "super-resolution", "latent-diffusion")),
    "sdseg": Card("image-segmentation", ("segmentation", "endoscopy", "ct", "mri", "latent-diffusion")),
}


def model_card(
    folder: Path, *, manifest: Mapping[str, Any], repo: str, tag: str, license: str, datasets: Sequence[str] = ()
) -> str:
    """Text of `README.md`: YAML head, notes, `docs/README.md`, how to get and run it.

    Args:
        folder: an exported bundle.
        manifest: content of its `manifest.json`.
        repo: `ORG/NAME` on the hub.
        tag: of the version on the hub.
        license: of code and weights, in the hub's words (`apache-2.0`); `other` points to `docs/data_license.txt`.
        datasets: `ORG/NAME` of training sets that lie on the hub.

    Raises:
        ValueError: the hub's task of this bundle is not known here.
    """
    name = manifest["name"]
    if name not in CARDS:
        raise ValueError(
            f"{folder}: expected one of the bundles {', '.join(CARDS)}, got {name!r}; give it a line in CARDS of "
            "tools/model_card.py"
        )
    card = CARDS[name]
    demo = manifest["build"] == "demo"
    metadata = json.loads((folder / "configs" / "metadata.json").read_text(encoding="utf-8"))
    other: dict[str, Any] = (
        {"license_name": "see-data-license", "license_link": "docs/data_license.txt"} if license == "other" else {}
    )
    head = ModelCardData(
        license=license,
        library_name="monai",
        pipeline_tag=card.pipeline_tag,
        tags=["monai", "medical", *card.tags, *(["demo"] if demo else [])],
        datasets=list(datasets) or None,
        **other,
    )
    notes = [RESEARCH_NOTE, *([">", DEMO_NOTE] if demo else [])]
    rows = {
        "bundle": f"{metadata['name']}, version {manifest['version']}",
        "built from": f"commit `{manifest['commit']}`",
        "trained on": DEMO_DATA if demo else metadata["data_source"],
        "licence": f"{license}; terms of data: [docs/data_license.txt](docs/data_license.txt)",
        "files": "SHA-256 of each in [manifest.json](manifest.json)",
    }
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    body = (folder / "docs" / "README.md").read_text(encoding="utf-8").strip()
    return "\n".join(
        ["---", head.to_yaml().strip(), "---", *notes, "", *table, "", body, "", _use(name, card, repo, tag)]
    )


def _use(name: str, card: Card, repo: str, tag: str) -> str:
    return f"""# Use from the hub

```bash
python -m monai.bundle download --name {name} --source huggingface_hub --repo {repo} --version {tag} --bundle_dir .
cd {name}
python -m monai.bundle run --config_file configs/inference.json{card.options}
```

Every `.pt` file has a `.safetensors` copy beside it with the same tensors. MONAI reads the `.pt` files; the copies are
for those who load weights without MONAI: `safetensors.torch.load_file("models/model.safetensors")`.
"""
