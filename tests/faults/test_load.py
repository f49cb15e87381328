"""As many images as NIH has, and unlikely names."""

from __future__ import annotations

import csv
import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, SECRETS, parse, run_process, write_yaml
from sample_bucket import draw_radiograph
from static_s3 import static_s3

import xray_tensorflow as xray

IMAGES, PATIENTS = 112_120, 30_805
WHOLE = draw_radiograph("00000001_000.png", [], 64)
SELECT = f"""
import json, re, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import xray_tensorflow as xray

def peak():  # not ru_maxrss, which has the peak of pytest in it
    return int(re.search("VmHWM:[^0-9]*([0-9]+)", Path("/proc/self/status").read_text())[1]) / 1024

arguments, before, start = xray.common_parser("").parse_args(), peak(), time.perf_counter()
client = xray.s3_client(xray.read_credentials(arguments.credentials))
table = xray.select_images(client, arguments)
splits = table["split"].value_counts().to_dict()
result = {{"seconds": time.perf_counter() - start, "mb": peak() - before, "splits": splits}}
print(json.dumps(result))
"""


def credentials_of(endpoint: str, folder: Path) -> Path:
    keys = {
        "aws_access_key_id": "sample",
        **SECRETS,
        "endpoint_url": endpoint,
        "region_name": "us-east-1",
    }
    return write_yaml(folder / "credentials.yml", keys)


def label_csv(rows: list[tuple[str, str, int]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([("Image Index", "Finding Labels", "Patient ID"), *rows])
    return text.getvalue().encode()


def bucket_of(rows: list[tuple[str, str, int]]) -> dict[str, bytes]:
    """The label file, and the same radiograph under all names."""
    return {
        "Data_Entry_2017_v2020.csv": label_csv(rows),
        **{f"images/{name}": WHOLE for name, *_ in rows},
    }


@pytest.mark.slow
def test_list_join_and_split_of_the_full_number_of_images(tmp_path: Path) -> None:
    draw = random.Random(0)
    patients = [*range(1, PATIENTS + 1), *draw.choices(range(1, PATIENTS + 1), k=IMAGES - PATIENTS)]
    findings = ["|".join(draw.sample(xray.LABELS, draw.choice([1, 1, 1, 2, 3]))) for _ in patients]
    rows = [
        (f"{p:08}_{i:06}.png", labels, p) for i, (p, labels) in enumerate(zip(patients, findings))
    ]
    with static_s3(bucket_of(rows), 0) as endpoint:
        options = ["--credentials", credentials_of(endpoint, tmp_path)]
        ended = run_process([sys.executable, "-c", SELECT, *options], cwd=tmp_path)
    assert ended.code == 0, ended.stderr
    counts, _, last = ended.stdout.splitlines()
    assert counts == "112,120 images have labels, 112,120 are in the bucket, 112,120 are in both"
    result = json.loads(last)
    print(f"{result['seconds']:.1f} s, {result['mb']:.0f} MB more than the imports take")
    assert sum(result["splits"].values()) == IMAGES
    assert result["splits"]["train"] / IMAGES == pytest.approx(0.7, abs=0.01)
    assert 10 < result["mb"] < 500


ODD = [
    "../../outside.png", "/tmp/outside.png", "..", "a/../../b.png", "C:\\outside.png", "with blank.png", "--help",
    "'; DROP TABLE pixels; --.png", '"quoted".png', "%2e%2e%2f.png", "$(touch outside).png", "~/outside.png",
    "tab\tin.png", "line\nbreak.png", "\u202egnp.png", "é.png", "e\u0301.png", "=1+1.png", "?versionId=1", "#.png",
    "x" * 900,
]  # fmt: skip


def test_no_name_reaches_beyond_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        (name, "Mass", patient)
        for patient, name in enumerate([*ODD, *map("{}.png".format, range(200))])
    ]
    inner = tmp_path / "one" / "two"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    arguments = parse("--cache", inner / "cache", "--image-size", 32, "--batch-size", 1)
    with static_s3(bucket_of(rows), 0) as endpoint:
        keys = xray.read_credentials(str(credentials_of(endpoint, tmp_path)))
        selected = xray.select_images(xray.s3_client(keys), arguments)
        assert set(ODD) < set(selected["image"])
        table, pixels, cached = xray.ingest(keys, arguments, selected)
        assert (set(table["reason"]), cached) == ({""}, 0)
        assert xray.ingest(keys, arguments, selected)[2] == len(rows)
    assert np.array_equal(pixels, np.broadcast_to(xray.decode(WHOLE, 32), pixels.shape))
    written = [
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    ]
    assert sorted(written) == ["credentials.yml", "one/two/cache/pixels.sqlite"]
    assert not any(
        path.exists() for path in (Path("/tmp/outside.png"), Path.home() / "outside.png")
    )
