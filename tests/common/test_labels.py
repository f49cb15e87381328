"""The label CSV: its two versions, edited copies, and invalid files."""

from __future__ import annotations

import csv
import gzip
import io
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT
from sample_bucket import LABELS as SAMPLE
from sample_bucket import read_rows

import xray_tensorflow as xray

FULL = ROOT.parent / "shared" / "data" / "Data_Entry_2017_v2020.csv.gz"
HEAD = "Image Index,Finding Labels,Patient ID\n"


def in_the_form_of_2017(text: str) -> bytes:
    """The rows of a 2020 CSV in NIH's 2017 format."""
    header, *rows = csv.reader(io.StringIO(text))
    lines = [",".join([*header, ""])]
    for row in rows:
        row[header.index("Patient ID")] = row[header.index("Patient ID")].zfill(8)
        row[header.index("Patient Age")] = f"{int(row[header.index('Patient Age')]):03}Y"
        lines.append(",".join(row))
    return "\r\n".join([*lines, ""]).encode()


def test_counts_of_the_full_file() -> None:
    if not FULL.exists():
        pytest.skip(f"NIH's full label file is not at {FULL}")
    table = xray.parse_labels(gzip.decompress(FULL.read_bytes()), "full")
    assert len(table) == 112120
    assert table["patient"].nunique() == 30805
    assert table[xray.LABELS].sum().to_dict() == {
        "Atelectasis": 11559, "Cardiomegaly": 2776, "Consolidation": 4667, "Edema": 2303, "Effusion": 13317,
        "Emphysema": 2516, "Fibrosis": 1686, "Hernia": 227, "Infiltration": 19894, "Mass": 5782, "No Finding": 60361,
        "Nodule": 6331, "Pleural_Thickening": 3385, "Pneumonia": 1431, "Pneumothorax": 5302,
    }  # fmt: skip
    assert (table["patient"] == table["image"].str[:8]).all()


def test_rows_of_the_sample() -> None:
    table = xray.parse_labels(SAMPLE.read_bytes(), "sample")
    rows = read_rows()
    assert list(table["image"]) == [name for name, _ in rows]
    assert list(table["patient"]) == [name[:8] for name, _ in rows]
    assert (table[xray.LABELS].dtypes == np.float32).all()
    found = [{label for label in xray.LABELS if row[label]} for _, row in table.iterrows()]
    assert found == [set(findings) for _, findings in rows]
    count = Counter(finding for _, findings in rows for finding in findings)
    assert table[xray.LABELS].sum().to_dict() == count


FORMS = {
    "2017": in_the_form_of_2017,
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "Patient Sex": lambda text: text.replace("Patient Gender", "Patient Sex").encode(),
    "byte order mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16, as Windows writes it": lambda text: text.encode("utf-16"),
    "UTF-16, the other way round": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "spaces around the names": lambda text: (
        text.replace("\n0", "\n 0").replace(".png,", ".png ,").encode()
    ),
    "no end of the last line": lambda text: text.rstrip("\n").encode(),
    "only the columns that matter": lambda text: (
        pd.read_csv(io.StringIO(text), dtype=str)[HEAD.strip().split(",")]
        .to_csv(index=False)
        .encode()
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_file_gives_the_same(form: str) -> None:
    text = SAMPLE.read_text()
    data = FORMS[form](text)
    assert data != text.encode()
    pd.testing.assert_frame_equal(
        xray.parse_labels(data, form), xray.parse_labels(text.encode(), "2020")
    )


GOOD = "00000001_000.png,Edema|Mass,1\n"
WRONG = {
    "unknown label": (
        HEAD + GOOD + "00000002_000.png,Mass|Oedema,2\n",
        ["row 3", "00000002_000.png", "'Oedema'"],
    ),
    "no label": (HEAD + GOOD + "00000002_000.png,,2\n", ["row 3", "00000002_000.png", "''"]),
    "label in the case of another": (HEAD + "00000002_000.png,mass,2\n", ["row 2", "'mass'"]),
    "doubled image": (
        HEAD + GOOD + "00000002_000.png,Mass,2\n" + GOOD,
        ["row 4", "00000001_000.png"],
    ),
    "patient that is not a number": (HEAD + GOOD + "00000002_000.png,Mass,x2\n", ["row 3", "'x2'"]),
    "row cut short": (HEAD + GOOD + "00000002_000.png", ["row 3", "00000002_000.png"]),
    "empty": ("", ["CSV"]),
    "no rows": (HEAD, ["no rows"]),
    "no columns": ("a,b\n1,2\n", ["no Finding Labels and no Image Index and no Patient ID"]),
    "one column missing": ("Image Index,Finding Labels\na.png,Mass\n", ["no Patient ID"]),
    "not text": ("\x1f\x8b\udcff\x00", ["CSV"]),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_refused_in_one_line(what: str) -> None:
    text, words = WRONG[what]
    with pytest.raises(xray.UserError) as error:
        xray.parse_labels(text.encode(errors="surrogateescape"), "my.csv")
    for word in ["my.csv", *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
