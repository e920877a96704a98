# SPDX-License-Identifier: Apache-2.0
"""Measures of what the samples show against what their prompts asked for; ``measures.py`` says how they are called."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from shared.metrics.agreement import PromptAgreement, pathology_auroc
from shared.metrics.confidence import Interval
from shared.metrics.measures import Measurement, clamp_note, collected_images, summary_row

logger = logging.getLogger(__name__)

# MIMIC-CXR carries the 13 labels of CheXpert, the classifier has names of its own. Ten labels are called alike
# ("Enlarged Cardiomediastinum", "Lung Opacity", ...). "Pleural Effusion" is renamed by torchxrayvision itself when it
# reads MIMIC-CXR and CheXpert. The other two have no output: "Pleural Other" is more than "Pleural_Thickening" (plaques
# and scars, for instance), and "Support Devices" is no pathology.
CHEXPERT_TO_XRV = {"Pleural Effusion": "Effusion"}
_NO_LABELS = "no labels in the data list"


class Classifier(Protocol):
    """Anything that classifies: (B, 1, H, W) in [0, 1] -> probabilities (B, K) on the CPU."""

    def classify(self, images: torch.Tensor) -> torch.Tensor: ...


class Agreement:
    """How often a classifier finds in a sample what its prompt asked for; the wrong-prompt control stands beside it.

    Without any labels there is one row without a value.

    Args:
        classifier: with ``classify``; trained on real (or phantom) images only.
        class_names: findings in the order of its outputs.
        field: entry of the label dictionaries that holds the finding.
    """

    name = "Prompt agreement"

    def __init__(self, classifier: Classifier, *, class_names: Sequence[str], field: str = "finding") -> None:
        self.classifier, self.field = classifier, field
        self.agreement = PromptAgreement(class_names)

    def __call__(self, collected: Mapping[str, Any]) -> Measurement:
        labels = collected.get("labels", [])
        if not any(labels):
            return _not_measured(self.name, _NO_LABELS)
        prompted = [(label or {}).get(self.field) for label in labels]
        rows = [i for i, finding in enumerate(prompted) if finding is not None]
        if not rows:
            raise ValueError(f"labels.{self.field}: {self.name} needs the finding of each prompt, but no item has one")
        findings = [str(prompted[i]) for i in rows]
        probabilities = self.classifier.classify(collected_images(collected, "pred", measure=self.name)[rows])
        result = self.agreement(probabilities, findings)
        logger.info("prompted (rows) and predicted (columns) findings of the samples\n%s", result.table())
        chance = f"{len(self.agreement.class_names)} findings; {clamp_note(collected, 'pred')}"
        summary = [
            summary_row(self.name, result.overall, f"Wilson interval; {chance}"),
            summary_row(
                f"{self.name}, wrong prompts (control)",
                result.wrong_prompt,
                "against the other samples' prompts; chance is 1 / findings if balanced",
            ),
        ]
        for name, interval in result.per_class.items():
            if interval is not None:
                summary.append(summary_row(f"{self.name}, {name}", interval, "Wilson interval"))
        if collected.get("image") is not None:
            real = self.agreement(self.classifier.classify(collected["image"][rows]), findings)
            note = "the agreement cannot be expected to exceed this; Wilson interval"
            summary.append(summary_row("Classifier accuracy on real images", real.overall, note))
        predicted: list[str | None] = [None] * len(prompted)
        for i, k in zip(rows, probabilities.argmax(dim=1).tolist(), strict=True):
            predicted[i] = self.agreement.class_names[k]
        return Measurement(summary, {"prompted_finding": prompted, "predicted_finding": predicted})


class PathologyAgreement:
    """Area under the ROC curve of each pathology that torchxrayvision's classifier and the prompts both know.

    Labels that cannot be judged are named in the notes. Where nothing can be judged there is one row without a value.

    Args:
        classifier: with ``classify`` and ``pathologies``, such as ``XrvDenseNetFeatures``.
        findings: finding name -> pathology, for labels of the form ``{"finding": name}``; None reads the label
            dictionary itself as pathology, or its name in CheXpert (``CHEXPERT_TO_XRV``), -> 1 positive, 0 negative,
            anything else unknown.
        field: entry of the label dictionaries that holds the finding.
    """

    name = "AUROC"

    def __init__(self, classifier: Any, *, findings: Mapping[str, str] | None = None, field: str = "finding") -> None:
        self.classifier, self.findings, self.field = classifier, findings, field
        unknown = set((findings or {}).values()) - set(classifier.pathologies)
        if unknown:
            raise ValueError(f"findings: expected pathologies among {classifier.pathologies}, got {sorted(unknown)}")

    def __call__(self, collected: Mapping[str, Any]) -> Measurement:
        labels = collected.get("labels", [])
        if not any(labels):
            return _not_measured(self.name, _NO_LABELS)
        images = collected_images(collected, "pred", measure=self.name)
        wanted = np.array([self._row(label or {}) for label in labels])
        areas = pathology_auroc(self.classifier.classify(images), wanted, self.classifier.pathologies)
        remarks = self._left_out(labels, wanted, areas)
        if not areas:
            return _not_measured(self.name, "; ".join(remarks))
        note = "samples classified by torchxrayvision against the prompted findings; DeLong interval; 0.5 is chance"
        note = "; ".join([note, *remarks])
        return Measurement([summary_row(f"AUROC, {name}", area, note) for name, area in areas.items()], {})

    def _left_out(
        self, labels: Sequence[Mapping[str, Any] | None], wanted: np.ndarray, areas: Mapping[str, Any]
    ) -> list[str]:
        """What is in the labels and in no row, and why, for the note."""
        names = {self._name(name) for label in labels for name in label or {}} if self.findings is None else set()
        unknown = sorted(names - set(self.classifier.pathologies))
        labelled = [name for i, name in enumerate(self.classifier.pathologies) if np.isfinite(wanted[:, i]).any()]
        rare = [name for name in labelled if name and name not in areas]
        remarks = [f"not judged, unknown to the classifier: {', '.join(unknown)}"] if unknown else []
        return remarks + ([f"not judged, fewer than two with and two without: {', '.join(rare)}"] if rare else [])

    def _name(self, label: str) -> str:
        """The classifier's name of a label; the label itself where it has none."""
        return label if label in self.classifier.pathologies else CHEXPERT_TO_XRV.get(label, label)

    def _row(self, label: Mapping[str, Any]) -> list[float]:
        if self.findings is None:
            states = {self._name(name): value for name, value in label.items()}
            return [_state(name, states.get(name)) for name in self.classifier.pathologies]
        finding = label.get(self.field)
        known = set(self.findings.values()) if finding is not None else set()
        target = self.findings.get(str(finding))
        return [float(name == target) if name in known else math.nan for name in self.classifier.pathologies]


def _state(name: str, value: Any) -> float:
    """1 positive, 0 negative, otherwise NaN or another number."""
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"labels.{name}: expected 1, 0 or -1 (uncertain), got {value!r}") from error


def _not_measured(name: str, reason: str) -> Measurement:
    logger.warning("%s: not measured, %s", name, reason)
    return Measurement([summary_row(name, Interval(math.nan, math.nan, math.nan, 0), reason)], {})
