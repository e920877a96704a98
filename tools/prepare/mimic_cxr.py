# SPDX-License-Identifier: Apache-2.0
"""MIMIC-CXR-JPG (or the DICOM MIMIC-CXR) with its free-text reports -> dataset folder of cxr_ldm."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.label_sentences import CHEXPERT_LABELS, label_sentences
from shared.reports import report_sentences
from tools.prepare.preparation import Preparation, check_folder, decode_text, read_table
from tools.prepare.radiographs import Candidate, check_options, finish, positive_labels

LICENCE = "PhysioNet Credentialed Health Data License 1.5.0: images and text must not be passed on"


def _find_table(source: Path, kind: str) -> Path | None:
    """`mimic-cxr-2.0.0-<kind>.csv`, packed or not, of any release."""
    found = sorted([*source.glob(f"mimic-cxr-*-{kind}.csv"), *source.glob(f"mimic-cxr-*-{kind}.csv.gz")])
    return found[0] if found else None


class _Reports:
    """Reads `p10/p10000032/s50414267.txt` from `files/`, from an unpacked reports folder or from the archive."""

    def __init__(self, source: Path) -> None:
        self.folders = [source / "files", source / "mimic-cxr-reports" / "files", source]
        self.archive: zipfile.ZipFile | None = None
        file = source if source.is_file() else source / "mimic-cxr-reports.zip"
        if file.is_file():
            try:
                self.archive = zipfile.ZipFile(file)
            except zipfile.BadZipFile as error:
                raise ValueError(f"{file}: expected a zip archive, but {error}; download it anew") from error
            self.names = {name.split("files/")[-1]: name for name in self.archive.namelist() if name.endswith(".txt")}

    def read(self, name: str) -> str | None:
        """Text of a report, or None where there is none."""
        for folder in self.folders:
            if (folder / name).is_file():
                return decode_text((folder / name).read_bytes(), folder / name)
        if self.archive is not None and name in self.names:
            return decode_text(self.archive.read(self.names[name]), f"{self.archive.filename}:{self.names[name]}")
        return None


def _labels(source: Path) -> dict[str, dict[str, str]]:
    file = _find_table(source, "chexpert")
    return {} if file is None else {row["study_id"]: row for row in read_table(file, ["study_id", *CHEXPERT_LABELS])}


def _study_text(text: str, study: str, labels: dict[str, str], *, extended: bool, last_paragraph: bool) -> str:
    sentences = report_sentences(text, study, use_last_paragraph=last_paragraph)
    if extended:
        sentences += label_sentences(labels, " ".join(sentences))
    return " ".join(sentences)


def mimic_cxr(
    source: str,
    out: str,
    *,
    views: str | Sequence[str] = "PA",
    size: int = 512,
    bits: int = 8,
    extended: bool = False,
    last_paragraph: bool = False,
    keep_without_text: bool = False,
    reports: str | None = None,
    seed: int = 42,
    fractions: str | Sequence[float] = (0.8, 0.1, 0.1),
    workers: int = 0,
    limit: int | None = None,
) -> None:
    """Prepare MIMIC-CXR: choose views, resize, section the reports, split by patient. May be stopped and run again.

    Reads the published layout: `mimic-cxr-2.0.0-metadata.csv[.gz]` (dicom_id, subject_id, study_id, ViewPosition),
    `files/p10/p10000032/s50414267/<dicom_id>.jpg` (or `.dcm`), reports `files/p10/p10000032/s50414267.txt` or
    `mimic-cxr-reports.zip`, and, if there, `mimic-cxr-2.0.0-chexpert.csv[.gz]`. The JPEGs were contrast-equalised by
    their publishers, the DICOM files are windowed by their headers, so the two look different: do not mix them.

    Args:
        source: folder of the download.
        out: dataset folder to make: images/, datalist.json, preparation.json (what was dropped and why).
        views: ViewPosition values to keep, such as PA or PA,AP,LATERAL.
        size: pixels of the shorter side; the aspect ratio is kept.
        bits: depth of the written PNG, 8 or 16 (16 for DICOM sources).
        extended: add sentences made from the CheXpert labels that are 1.
        last_paragraph: use a report's last paragraph where it has neither findings nor impression.
        keep_without_text: keep images whose report gives no sentence, with an empty text.
        reports: folder or zip of the reports if they are not in `source`.
        seed: of the split.
        fractions: share of the patients for training, validation and test.
        workers: threads; 0 works in the main thread.
        limit: keep only the first so many images (by patient, study and image), for a trial.
    """
    check_options(size=size, bits=bits, workers=workers)
    folder, target = check_folder(source, "--source"), Path(str(out))
    wanted = {str(v).strip().upper() for v in (views.split(",") if isinstance(views, str) else views)}
    metadata = _find_table(folder, "metadata")
    if metadata is None:
        raise FileNotFoundError(
            f"{folder / 'mimic-cxr-2.0.0-metadata.csv'}: expected this table (or .csv.gz), but it does not exist; "
            "download it from MIMIC-CXR-JPG into --source"
        )
    labels = _labels(folder)
    if extended and not labels:
        raise FileNotFoundError(f"{folder / 'mimic-cxr-2.0.0-chexpert.csv'}: expected this table (or .csv.gz) for "
                                "--extended, but it does not exist; download it or leave --extended out")  # fmt: skip
    if reports is not None and not Path(reports).exists():
        raise FileNotFoundError(f"{reports}: expected a folder or zip of reports (--reports), but it does not exist")
    texts = _Reports(folder if reports is None else Path(reports))
    preparation = Preparation(
        "mimic_cxr", {"views": sorted(wanted), "size": size, "bits": bits, "extended": extended, "seed": seed,
                      "last_paragraph": last_paragraph, "fractions": fractions, "limit": limit},
    )  # fmt: skip
    rows = list(read_table(metadata, ["dicom_id", "subject_id", "study_id", "ViewPosition"]))
    preparation.counts["rows of the metadata table"] = len(rows)
    candidates: list[Candidate] = []
    study_texts: dict[str, str | None] = {}
    for row in sorted(rows, key=lambda r: (r["subject_id"], r["study_id"], r["dicom_id"])):
        if limit is not None and len(candidates) >= limit:
            preparation.drop("beyond --limit", row["dicom_id"])
            continue
        view = row["ViewPosition"].upper()
        if view not in wanted:
            preparation.drop("view " + (view if view not in ("", "-") else "unknown"), row["dicom_id"])
            continue
        patient, study = f"p{row['subject_id']}", f"s{row['study_id']}"
        place = f"{patient[:3]}/{patient}/{study}"
        images = [folder / "files" / place / f"{row['dicom_id']}{suffix}" for suffix in (".jpg", ".dcm")]
        image = next((file for file in images if file.is_file()), None)
        if image is None:
            preparation.drop("image file missing", str(images[0]))
            continue
        if study not in study_texts:
            try:
                report = texts.read(f"{place}.txt")
            except ValueError as error:
                preparation.drop("unreadable report", str(error))
                report = None
            study_texts[study] = (
                None
                if report is None
                else _study_text(report, study, labels.get(row["study_id"], {}), extended=extended,
                                 last_paragraph=last_paragraph)
            )  # fmt: skip
        text = study_texts[study]
        if not text and not keep_without_text:
            preparation.drop("report file missing" if text is None else "report without findings and impression", study)
            continue
        item: dict[str, Any] = {"text": text or "", "subject": patient, "study": study, "view": view}
        if row["study_id"] in labels:
            item["labels"] = positive_labels(labels[row["study_id"]], CHEXPERT_LABELS)
        candidates.append(Candidate(image, f"images/{place}/{row['dicom_id']}.png", item))
    preparation.counts["studies without text"] = sum(not text for text in study_texts.values())
    finish(
        candidates, target, preparation, size=size, bits=bits, seed=seed, fractions=fractions, workers=workers,
        description="MIMIC-CXR images with the sentences of findings and impression; split by patient",
        licence=LICENCE,
    )  # fmt: skip
