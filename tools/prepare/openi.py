# SPDX-License-Identifier: Apache-2.0
"""Indiana University chest X-rays (Open-i, "NLMCXR") -> dataset folder of cxr_ldm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from shared.reports import report_sentences
from tools.prepare.preparation import Preparation, check_folder, read_table
from tools.prepare.radiographs import IMAGE_SUFFIXES, Candidate, check_options, finish

_VIEWS = {"frontal": "frontal", "pa": "frontal", "ap": "frontal", "lateral": "lateral", "l": "lateral", "ll": "lateral"}


def image_key(name: str) -> str:
    """Name of an image without what its mirrors add: "CXR10_IM-0002-1001", "10_IM-0002-1001.dcm.png" -> "10_IM-..."."""
    name = name.rsplit("/", 1)[-1]
    while Path(name).suffix.lower() in IMAGE_SUFFIXES:
        name = name[: -len(Path(name).suffix)]
    return name.removeprefix("CXR")


def read_projections(file: Path) -> dict[str, str]:
    """Image key -> "frontal" or "lateral", from columns filename or imageid, and projection or tsne-view."""
    found: dict[str, str] = {}
    for row in read_table(file, []):
        name = row.get("filename") or row.get("imageid")
        view = row.get("projection") or row.get("tsne-view") or row.get("view")
        if name is None or view is None:
            raise ValueError(
                f"{file}: expected the columns 'filename' or 'imageid' and 'projection' or 'tsne-view', but got "
                f"{', '.join(row)}; rename them"
            )
        found[image_key(name)] = _VIEWS.get(view.lower(), view.lower())
    return found


def projection_by_name(key: str) -> str:
    """Guess from an image's number: "-1001" is frontal, others are not known to be.

    The XML names no projection per image (its caption describes the whole examination), and the DICOM ViewPosition is
    wrong for many. Of 3,143 images ending in -1001 that torchxrayvision judged by their pictures, 2,913 (93 %) are
    frontal; of 230 ending in -2001, 51.
    """
    return "frontal" if key.endswith("-1001") else "other"


def _read_report(file: Path) -> tuple[str, list[str], str]:
    """Report id, image ids, and the report in the layout that `shared.reports` sections."""
    root = ElementTree.parse(file).getroot()
    uid = root.find("uId")
    name = uid.get("id", "") if uid is not None else ""
    images = [image.get("id", "") for image in root.iter("parentImage")]
    parts = [(part.get("Label") or "NOTE", part.text or "") for part in root.iter("AbstractText")]
    # the files hold stray HTML line breaks
    text = "".join(f"\n {label}: {' '.join(words.replace('<BR>', ' ').split())}\n" for label, words in parts)
    return name or f"CXR{file.stem}", images, text


def openi(
    source: str,
    out: str,
    *,
    views: str = "frontal",
    projections: str | None = None,
    size: int = 512,
    bits: int = 8,
    seed: int = 42,
    fractions: str | Sequence[float] = (0.8, 0.1, 0.1),
    workers: int = 0,
    limit: int | None = None,
) -> None:
    """Prepare Open-i (Indiana): choose the projection, resize, take findings and impression, split by report.

    Reads `ecgen-radiology/*.xml` and the images (`NLMCXR_png/CXR10_IM-0002-1001.png`, `NLMCXR_dcm/10/10_IM-...dcm`, or
    a mirror's `10_IM-0002-1001.dcm.png`), each at any depth below `source`. Open-i carries no patient number, so the
    unit of the split is the report: the same patient may be in two parts.

    Args:
        source: folder of the download.
        out: dataset folder to make: images/, datalist.json, preparation.json (what was dropped and why).
        views: frontal, lateral or all.
        projections: table of each image's projection (columns filename or imageid, and projection or tsne-view), such
            as Kaggle's `indiana_projections.csv` (found by itself in `source`) or torchxrayvision's
            `data/nlmcxr_tsne_pa.csv.gz` (one image per report). Without one, only images named "-1001" count as frontal
            (93 % right).
        size: pixels of the shorter side; the aspect ratio is kept.
        bits: depth of the written PNG, 8 or 16 (16 for DICOM sources).
        seed: of the split.
        fractions: share of the reports for training, validation and test.
        workers: threads; 0 works in the main thread.
        limit: keep only the first so many images, for a trial.
    """
    check_options(size=size, bits=bits, workers=workers)
    folder, target = check_folder(source, "--source"), Path(str(out))
    if views not in ("frontal", "lateral", "all"):
        raise ValueError(f"--views: expected frontal, lateral or all, but got {views!r}")
    table = Path(projections) if projections else next(iter(sorted(folder.rglob("indiana_projections.csv"))), None)
    if table is not None and not table.is_file():
        raise FileNotFoundError(f"{table}: expected a table (--projections), but it does not exist; correct the path")
    known = read_projections(table) if table is not None else {}
    if views == "lateral" and not known:
        raise ValueError("--views: lateral needs a table of projections, since names alone do not tell; "
                         "give --projections")  # fmt: skip
    outputs = target.resolve()
    files = {
        image_key(file.name): file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in IMAGE_SUFFIXES and outputs not in file.resolve().parents
    }
    reports = sorted(folder.rglob("*.xml"))
    if not reports:
        raise FileNotFoundError(f"{folder / 'ecgen-radiology'}: expected reports (*.xml), but found none; "
                                "unpack NLMCXR_reports.tgz there")  # fmt: skip
    preparation = Preparation(
        "openi", {"views": views, "projections": table, "size": size, "bits": bits, "seed": seed,
                  "fractions": fractions, "limit": limit},
    )  # fmt: skip
    candidates: list[Candidate] = []
    without_text = 0
    for report in reports:
        try:
            name, images, text = _read_report(report)
        except ElementTree.ParseError as error:
            preparation.drop("unreadable report", f"{report}: expected XML, but {error}; unpack it anew")
            continue
        sentences = " ".join(report_sentences(text))
        without_text += not sentences
        if not images:
            preparation.drop("report without image", name)
        for image in images:
            key = image_key(image)
            view = known.get(key, "unknown") if known else projection_by_name(key)
            if limit is not None and len(candidates) >= limit:
                preparation.drop("beyond --limit", image)
            elif views != "all" and view != views:
                preparation.drop(f"view {view}", image)
            elif not sentences:
                preparation.drop("report without findings and impression", image)
            elif key not in files:
                preparation.drop("image file missing", image)
            else:
                item = {"text": sentences, "subject": name, "study": name, "view": view}
                candidates.append(Candidate(files[key], f"images/{name}/{image}.png", item))
    preparation.counts |= {"reports": len(reports), "studies without text": without_text}
    finish(
        candidates, target, preparation, size=size, bits=bits, seed=seed, fractions=fractions, workers=workers,
        description="Open-i chest X-rays with findings and impression; split by report (no patient numbers exist)",
        licence="Open-i, Indiana University: CC BY-NC-ND 4.0",
    )  # fmt: skip
