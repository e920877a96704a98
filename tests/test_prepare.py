# SPDX-License-Identifier: Apache-2.0
"""`tools.prepare`: generated trees in the published layouts -> dataset folders."""

from __future__ import annotations

import csv
import gzip
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.data_check import check_dataset
from shared.datalist import find_leaks, load_datalist, read_datalist
from shared.label_sentences import CHEXPERT_LABELS
from shared.transforms.images import read_radiograph
from tests import commands
from tests.test_images import ramp, write_dicom
from tools.prepare.image_text_folder import image_text_folder
from tools.prepare.mimic_cxr import mimic_cxr
from tools.prepare.openi import image_key, openi, projection_by_name

REPORT = (
    "FINAL REPORT\n INDICATION: Cough.\n \n FINDINGS: Heart normal. Moderate pleural effusion.\n \n IMPRESSION: 1. {}\n"
)
SMALL = {"size": 16, "fractions": (0.6, 0.2, 0.2)}


def save_image(path, value=0, shape=(40, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".dcm":
        return write_dicom(path, (ramp(*shape, 3000) + value).astype(np.uint16))
    Image.fromarray((ramp(*shape, 200) + value).astype(np.uint8)).save(path)
    return path


def mimic_tree(root, *, patients=10, suffix=".jpg", packed=False, reports="files"):
    """Two studies per patient; the first has a PA and a LATERAL image, the second an AP image."""
    root.mkdir()
    rows, texts = [], {}
    for patient in range(10000032, 10000032 + patients):
        for number, views in enumerate((["PA", "LATERAL"], ["AP"])):
            study = f"5{patient - 10000000:06d}{number}"
            place = f"p{str(patient)[:2]}/p{patient}/s{study}"
            texts[f"files/{place}.txt"] = REPORT.format(f"Stable {study}.")
            for view in views:
                dicom_id = f"{patient:08x}-{study}-{view.lower()}"
                save_image(root / "files" / place / f"{dicom_id}{suffix}", len(rows))
                rows.append({"dicom_id": dicom_id, "subject_id": patient, "study_id": study, "ViewPosition": view})
    rows.append({"dicom_id": "without-view", "subject_id": 10000032, "study_id": "50000320", "ViewPosition": "-"})
    write_csv(root / f"mimic-cxr-2.0.0-metadata.csv{'.gz' if packed else ''}", rows)
    if reports == "zip":
        with zipfile.ZipFile(root / "mimic-cxr-reports.zip", "w") as archive:
            for name, text in texts.items():
                archive.writestr(name, text)
    else:
        for name, text in texts.items():
            (root / name).write_text(text)
    return root


def write_csv(path, rows):
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def all_items(folder):
    return [item for part in read_datalist(folder).values() for item in part]


def record(folder):
    return json.loads((folder / "preparation.json").read_text())


def test_mimic_jpg(tmp_path, capsys):
    source, out = mimic_tree(tmp_path / "mimic"), tmp_path / "set"
    mimic_cxr(str(source), str(out), **SMALL)
    items = all_items(out)
    assert len(items) == 10
    assert {item["view"] for item in items} == {"PA"}
    first = next(item for item in items if item["subject"] == "p10000032")
    assert first == {
        "image": "images/p10/p10000032/s50000320/00989680-50000320-pa.png".replace("00989680", f"{10000032:08x}"),
        "text": "Heart normal. Moderate pleural effusion. Stable 50000320.",
        "subject": "p10000032", "study": "s50000320", "view": "PA",
    }  # fmt: skip
    assert find_leaks(read_datalist(out)) == {}
    assert len(load_datalist(out, "training", required=["image", "text|report"])) == 6
    image = read_radiograph(out / first["image"])
    assert image.shape == (16, 19)
    assert image[-1, -1] > image[0, -1]
    assert image[0, -1] > image[0, 0]
    assert record(out)["counts"] == {
        "rows of the metadata table": 31, "studies without text": 0, "images": 10, "subjects": 10,
        "training": 6, "validation": 2, "test": 2,
        "dropped: view LATERAL": 10, "dropped: view AP": 10, "dropped: view unknown": 1,
    }  # fmt: skip
    assert "10 images" in capsys.readouterr().out
    assert check_dataset(out).problems == []


def test_mimic_dicom_zip_gz_several_views_and_depth(tmp_path):
    source = mimic_tree(tmp_path / "mimic", patients=3, suffix=".dcm", packed=True, reports="zip")
    out = tmp_path / "set"
    mimic_cxr(str(source), str(out), views=("PA", "LATERAL"), bits=16, workers=2, **SMALL)
    items = all_items(out)
    assert sorted(item["view"] for item in items) == ["LATERAL"] * 3 + ["PA"] * 3
    with Image.open(out / items[0]["image"]) as picture:
        assert picture.mode.startswith("I")
    assert find_leaks(read_datalist(out)) == {}


def test_studies_of_a_patient_stay_together(tmp_path):
    source, out = mimic_tree(tmp_path / "mimic"), tmp_path / "set"
    mimic_cxr(str(source), str(out), views=("PA", "AP"), **SMALL)
    found = [(Path(item["image"]).parts[2], part) for part, items in read_datalist(out).items() for item in items]
    assert len(found) == 20
    assert len(set(found)) == len({patient for patient, _ in found}) == 10


def test_mimic_labels_and_extended_text(tmp_path):
    source = mimic_tree(tmp_path / "mimic", patients=3)
    row = dict.fromkeys(CHEXPERT_LABELS, "") | {"Pleural Effusion": "1.0", "Edema": "-1.0", "Fracture": "0.0"}
    write_csv(source / "mimic-cxr-2.0.0-chexpert.csv", [{"subject_id": 10000032, "study_id": "50000320", **row}])
    mimic_cxr(str(source), str(tmp_path / "set"), extended=True, **SMALL)
    item = next(item for item in all_items(tmp_path / "set") if item["study"] == "s50000320")
    assert item["text"].endswith("There is a pleural effusion. The patient has moderate pleural effusion. "
                                 "There is a moderate pleural effusion.")  # fmt: skip
    assert item["labels"] == {"Pleural Effusion": 1.0, "Edema": -1.0, "Fracture": 0.0}


def test_what_is_dropped_is_counted_and_named(tmp_path):
    source, out = mimic_tree(tmp_path / "mimic", patients=8), tmp_path / "set"
    images = sorted((source / "files").rglob("*-pa.jpg"))
    images[0].write_bytes(images[0].read_bytes()[:300])
    images[1].unlink()
    reports = [image.parent.with_suffix(".txt") for image in images]
    reports[2].write_text("\n INDICATION: Cough.\n")
    reports[3].unlink()
    reports[4].write_bytes(b"\n FINDINGS: Caf\xe9.\n")
    mimic_cxr(str(source), str(out), **SMALL)
    dropped = record(out)["dropped"]
    assert dropped["unreadable image"][0].startswith(str(images[0]))
    assert dropped["image file missing"] == [str(images[1])]
    assert dropped["report without findings and impression"] == [images[2].parent.name]
    assert images[3].parent.name in dropped["report file missing"]
    assert dropped["unreadable report"][0].startswith(f"{reports[4]}: expected text in UTF-8")
    assert record(out)["counts"]["studies without text"] == 3
    assert len(all_items(out)) == 3


def test_a_second_run_converts_only_what_is_missing(tmp_path):
    source, out = mimic_tree(tmp_path / "mimic", patients=4), tmp_path / "set"
    mimic_cxr(str(source), str(out), **SMALL)
    files = sorted(out.rglob("*.png"))
    before = {file: file.stat().st_mtime_ns for file in files}
    files[0].unlink()
    first = (out / "datalist.json").read_bytes()
    mimic_cxr(str(source), str(out), **SMALL)
    assert [file for file in files if file.stat().st_mtime_ns != before[file]] == files[:1]
    assert (out / "datalist.json").read_bytes() == first
    mimic_cxr(str(source), str(out), **(SMALL | {"size": 20}))
    assert min(read_radiograph(files[1]).shape) == 20
    assert not list(out.rglob(".*"))


def test_limit(tmp_path):
    source = mimic_tree(tmp_path / "mimic")
    mimic_cxr(str(source), str(tmp_path / "set"), limit=3, **SMALL)
    assert len(all_items(tmp_path / "set")) == 3


def test_mimic_errors_name_file_and_column(tmp_path):
    source = mimic_tree(tmp_path / "mimic", patients=3)
    table = source / "mimic-cxr-2.0.0-metadata.csv"
    with pytest.raises(FileNotFoundError, match=r"chexpert\.csv: expected this table.*--extended"):
        mimic_cxr(str(source), str(tmp_path / "set"), extended=True)
    with pytest.raises(ValueError, match=r"preparation\.json: expected images to keep, but none is left"):
        mimic_cxr(str(source), str(tmp_path / "set"), views="LL", **SMALL)
    for options, message in [({"bits": 12}, "^--bits"), ({"size": 0}, "^--size"), ({"workers": -1}, "^--workers"),
                             ({"fractions": "a,b"}, "^--fractions: expected three numbers")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            mimic_cxr(str(source), str(tmp_path / "set"), **(SMALL | options))
    table.write_text(table.read_text().replace("ViewPosition", "View"))
    with pytest.raises(ValueError, match=r"metadata\.csv: expected the column 'ViewPosition', but got dicom_id"):
        mimic_cxr(str(source), str(tmp_path / "set"))
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata\.csv: expected this table"):
        mimic_cxr(str(source), str(tmp_path / "set"))
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected a folder \(--source\)"):
        mimic_cxr(str(tmp_path / "nowhere"), str(tmp_path / "set"))


XML = """<?xml version="1.0" encoding="utf-8"?>
<eCitation><uId id="CXR{uid}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="INDICATION">Cough.</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText><AbstractText Label="IMPRESSION">1. No disease.</AbstractText>
</Abstract></Article></MedlineCitation>
<parentImage id="CXR{uid}_IM-0002-1001"/><parentImage id="CXR{uid}_IM-0002-2001"/></eCitation>"""


def openi_tree(root, names="NLMCXR_png/CXR{}_IM-0002-{}.png", reports=5):
    (root / "ecgen-radiology").mkdir(parents=True)
    for uid in range(1, reports + 1):
        (root / "ecgen-radiology" / f"{uid}.xml").write_text(XML.format(uid=uid, findings="Clear&lt;BR&gt;lungs."))
        for view in (1001, 2001):
            save_image(root / names.format(uid, view), uid + view % 7)
    return root


@pytest.mark.parametrize(
    "names", ["NLMCXR_png/CXR{}_IM-0002-{}.png", "NLMCXR_dcm/1/{}_IM-0002-{}.dcm", "images/{}_IM-0002-{}.dcm.png"]
)
def test_openi(tmp_path, names):
    openi(str(openi_tree(tmp_path / "openi", names)), str(tmp_path / "openi" / "set"), **SMALL)
    items = all_items(tmp_path / "openi" / "set")
    assert sorted(item["image"] for item in items) == [f"images/CXR{i}/CXR{i}_IM-0002-1001.png" for i in range(1, 6)]
    assert items[0]["text"] == "Clear lungs. No disease."
    assert {item["subject"] for item in items} == {f"CXR{i}" for i in range(1, 6)}
    assert record(tmp_path / "openi" / "set")["counts"]["dropped: view other"] == 5
    openi(str(tmp_path / "openi"), str(tmp_path / "openi" / "set"), views="all", **SMALL)
    assert len(all_items(tmp_path / "openi" / "set")) == 10


def test_openi_projection_table_and_bad_reports(tmp_path):
    source = openi_tree(tmp_path / "openi")
    (source / "ecgen-radiology" / "9.xml").write_text("<eCitation>")
    rows = [{"uid": i, "filename": f"{i}_IM-0002-{n}.dcm.png", "projection": p} for i in range(1, 6)
            for n, p in ((1001, "Lateral"), (2001, "Frontal"))]  # fmt: skip
    write_csv(source / "indiana_projections.csv", rows)
    openi(str(source), str(tmp_path / "set"), **SMALL)
    assert all(item["image"].endswith("2001.png") for item in all_items(tmp_path / "set"))
    assert "9.xml: expected XML" in record(tmp_path / "set")["dropped"]["unreadable report"][0]
    openi(str(source), str(tmp_path / "set"), views="lateral", **SMALL)
    assert all(item["image"].endswith("1001.png") for item in all_items(tmp_path / "set"))


def test_openi_names_and_errors(tmp_path):
    assert image_key("NLMCXR_png/CXR10_IM-0002-1001.png") == image_key("10_IM-0002-1001.dcm.png") == "10_IM-0002-1001"
    assert [projection_by_name(k) for k in ("10_IM-0002-1001", "1_IM-0001-3001")] == ["frontal", "other"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"ecgen-radiology: expected reports"):
        openi(str(tmp_path / "empty"), str(tmp_path / "set"))
    with pytest.raises(ValueError, match="^--views: expected frontal, lateral or all"):
        openi(str(tmp_path / "empty"), str(tmp_path / "set"), views="PA")
    with pytest.raises(ValueError, match="^--views: lateral needs a table"):
        openi(str(tmp_path / "empty"), str(tmp_path / "set"), views="lateral")
    table = tmp_path / "p.csv"
    table.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"p\.csv: expected the columns 'filename' or 'imageid'"):
        openi(str(tmp_path / "empty"), str(tmp_path / "set"), projections=str(table))


def test_folder_with_text_files(tmp_path):
    source = tmp_path / "films"
    for index in range(4):
        save_image(source / "a" / f"{index}.png", index)
    (source / "a" / "0.txt").write_text("Große Herzsilhouette.\nKein Erguss.")
    (source / "a" / "1.txt").write_text(REPORT.format("Stable."))
    (source / "a" / "2.txt").write_text(" \n")
    image_text_folder(str(source), str(tmp_path / "set"), size=16, fractions=(1, 1, 0))
    items = sorted(all_items(tmp_path / "set"), key=lambda item: item["image"])
    assert items[0] == {"image": "images/a/0.png", "text": "Große Herzsilhouette. Kein Erguss.", "subject": "a/0"}
    assert items[1]["text"] == "Heart normal. Moderate pleural effusion. Stable."
    assert {key: len(what) for key, what in record(tmp_path / "set")["dropped"].items()} == {
        "text file missing": 1,
        "empty text": 1,
    }


def test_folder_with_a_table(tmp_path):
    source = tmp_path / "films"
    rows = []
    for index in range(6):
        save_image(source / f"{index}.png", index)
        rows.append({"image": f"{index}.png", "text": "Clear lungs", "subject": f"s{index // 2}", "other": "x"})
    rows.append({"image": "none.png", "text": "x", "subject": "s0", "other": ""})
    write_csv(source / "list.csv", rows)
    image_text_folder(str(source), str(tmp_path / "set"), **(SMALL | {"fractions": (1, 1, 1)}))
    assert all(len(part) == 2 for part in read_datalist(tmp_path / "set").values())
    assert record(tmp_path / "set")["dropped"]["image file missing"] == [str(source / "none.png")]
    write_csv(source / "second.csv", rows)
    with pytest.raises(ValueError, match=r"expected one \.csv file, but got list\.csv, second\.csv"):
        image_text_folder(str(source), str(tmp_path / "set"))
    save_image(source / "0.jpg")
    write_csv(source / "list.csv", [*rows, {"image": "0.jpg", "text": "x", "subject": "s9", "other": ""}])
    with pytest.raises(ValueError, match=r"0\.jpg: expected a name of its own"):
        image_text_folder(str(source), str(tmp_path / "set"), table=str(source / "list.csv"), **SMALL)


def test_command_line(tmp_path):
    source = mimic_tree(tmp_path / "mimic", patients=3)
    options = ["--size", "16", "--views", "PA,AP", "--fractions", "0.4,0.3,0.3"]
    done = commands.run("tools.prepare", "mimic_cxr", "--out", tmp_path / "set", "--source", source, *options)
    assert done.code == 0, done.err
    assert "6 images" in done.out
    assert len(all_items(tmp_path / "set")) == 6
