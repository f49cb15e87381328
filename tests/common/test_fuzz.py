"""Any label or credentials file is read or fails in one clear line, which quotes no credentials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, SECRETS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sample_bucket import LABELS as SAMPLE

import xray_tensorflow as xray

SETTINGS = settings(
    max_examples=200,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ROWS = "".join(SAMPLE.read_text().splitlines(keepends=True)[:6]).encode()
EXAMPLE = (ROOT / "credentials.example.yml").read_bytes()
SECRET = SECRETS["aws_secret_key_id"]
GOOD = {
    "aws_access_key_id": "AKIAEXAMPLE",
    "aws_secret_key_id": SECRET,
    "aws_session_token": SECRET,
}


@st.composite
def edited(draw: Any, data: bytes) -> bytes:
    """`data` with a few parts deleted, doubled or replaced."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(start + 20, len(data))))
        data = (
            data[:start]
            + draw(st.sampled_from([b"", data[start:stop] * 2]) | st.binary(max_size=9))
            + data[stop:]
        )
    return data


cell = (
    st.sampled_from(
        ["", "1", "00000001_000.png", "Mass", "Mass|Edema", "|", "No Finding", '"', "٣"]
    )
    | st.text()
)
table = st.lists(st.lists(cell, max_size=5).map(",".join), max_size=6).map("\n".join)
HEAD = "Image Index,Finding Labels,Patient ID\n"


# pandas warns of rows longer than the header, which the fuzzer also generates.
@pytest.mark.filterwarnings("ignore:Length of header or names:pandas.errors.ParserWarning")
@SETTINGS
@given(
    st.binary()
    | edited(ROWS)
    | table.map(lambda rows: (HEAD + rows).encode(errors="surrogatepass"))
)
@example((HEAD + "a.png,Mass,1" + "0" * 500).encode())
@example((HEAD + "a.png,Mass,\u0663").encode())
@example((HEAD + '"a.png,Mass,1').encode())
@example(HEAD.encode("utf-16"))
def test_parse_labels(data: bytes) -> None:
    try:
        found = xray.parse_labels(data, "my.csv")
    except xray.UserError as error:
        assert "my.csv" in str(error)
        assert len(str(error).splitlines()) == 1
        return
    assert list(found) == ["image", "patient", *xray.LABELS]
    assert len(found) > 0
    assert found["image"].is_unique
    assert found["patient"].str.fullmatch("[0-9]{8,}").all()
    assert found[xray.LABELS].isin([0, 1]).all(axis=None)
    assert (found[xray.LABELS].sum(axis=1) > 0).all()


tag = st.sampled_from(
    ["!!int", "!!float", "!!bool", "!!timestamp", "!!binary", "!!set", "!!omap", "!!merge", "&a *a"]
)
value = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
    | st.text()
    | st.just(SECRET)
)
tree = st.recursive(
    value,
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from([*GOOD]), inner),
)
files = st.one_of(
    st.binary(),
    edited(EXAMPLE),
    edited(yaml.safe_dump(GOOD).encode()),
    tree.map(lambda content: yaml.safe_dump(content).encode(errors="replace")),
    st.builds("{} {}".format, tag, st.text() | st.just(SECRET)).map(
        lambda text: text.encode(errors="replace")
    ),
)


@SETTINGS
@given(files)
@example(f"!!timestamp {SECRET}".encode())
@example(f"aws_access_key_id: !!bool {SECRET}".encode())
@example(b"a: &a [*a, *a]")
@example(b"!!int ''")
def test_read_credentials(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = Path(tmp_path_factory.getbasetemp(), "fuzzed.yml")
    path.touch(mode=0o600)
    path.write_bytes(data)
    try:
        read = xray.read_credentials(str(path))
    except xray.UserError as error:
        assert path.name in str(error)
        assert len(str(error).splitlines()) == 1
        assert SECRET not in str(error)
        return
    assert {"aws_access_key_id", "aws_secret_access_key"} <= read.keys()
    assert all(isinstance(text, str) and text for text in read.values())
