"""credentials.yml: what is accepted and refused, and that no message repeats its content."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, SECRETS, client_of, one_line, parse, write_yaml

import xray_tensorflow as xray

KEY, SECRET = "AKIAEXAMPLE", SECRETS["aws_secret_key_id"]
GOOD = {"aws_access_key_id": KEY, "aws_secret_key_id": SECRET}


@pytest.mark.parametrize("spelling", ["aws_secret_key_id", "aws_secret_access_key"])
def test_takes_both_spellings_and_the_optional_names(tmp_path: Path, spelling: str) -> None:
    optional = {
        "aws_session_token": "t",
        "region_name": "eu-west-1",
        "endpoint_url": "http://127.0.0.1:9000",
    }
    path = write_yaml(tmp_path / "c.yml", {"aws_access_key_id": KEY, spelling: SECRET, **optional})
    read = xray.read_credentials(str(path))
    assert read == {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, **optional}
    assert xray.s3_client(read).meta.region_name == "eu-west-1"


def refuse(path: Path) -> str:
    """The text of the error from reading `path`."""
    with pytest.raises(xray.UserError) as error:
        xray.read_credentials(str(path))
    text = str(error.value)
    assert "\n" not in text
    assert SECRET not in text
    assert KEY not in text
    assert path.name in text
    # A traceback also prints the error behind an error, and YAML's error quotes the file.
    assert error.value.__suppress_context__ or error.value.__context__ is None
    return text


def test_absent_says_to_copy_the_example(tmp_path: Path) -> None:
    assert "copy credentials.example.yml" in refuse(tmp_path / "absent.yml")


@pytest.mark.parametrize(
    "content",
    [
        f"aws_access_key_id: [{SECRET}",
        f"a: b: {SECRET}",
        f"!!python/object:{SECRET} {{}}",
        f"- {SECRET}",
        SECRET,
        "",
        "5",
        f"\x00{SECRET}",
        "[" * 5000,
    ],
    ids=[
        "open bracket",
        "colons",
        "python object",
        "list",
        "text",
        "empty",
        "number",
        "NUL",
        "deep",
    ],
)
def test_not_a_mapping(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yml"
    path.write_text(content)
    assert "credentials.example.yml" in refuse(path)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "bad.yml"
    path.write_bytes(f"aws_secret_key_id: {SECRET}\xe9".encode("latin-1"))
    assert "credentials.example.yml" in refuse(path)


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("value", [None, ""])
def test_key_missing_or_empty_is_named(tmp_path: Path, name: str, value: object) -> None:
    content = {**GOOD, name: value}
    assert f"no {name}" in refuse(write_yaml(tmp_path / "bad.yml", content))
    del content[name]
    assert f"no {name}" in refuse(write_yaml(tmp_path / "bad.yml", content))


@pytest.mark.parametrize("name", GOOD)
def test_placeholder_left_in_the_example_is_named(tmp_path: Path, name: str) -> None:
    example = yaml.safe_load((ROOT / "credentials.example.yml").read_text())
    assert example.keys() == GOOD.keys()
    assert f"example's {name}" in refuse(
        write_yaml(tmp_path / "bad.yml", {**GOOD, name: example[name]})
    )


@pytest.mark.parametrize(
    "change",
    [{"aws_session_tokn": SECRET}, {SECRET: "x"}, {5: SECRET}, {"region_name": 5}, {"aws_secret_key_id": 5},
     {"aws_access_key_id": [KEY]}, {"endpoint_url": None}],
    ids=str,
)  # fmt: skip
def test_unknown_name_or_value_that_is_not_text(tmp_path: Path, change: dict) -> None:
    assert "names" in refuse(write_yaml(tmp_path / "bad.yml", {**GOOD, **change}))


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o604])
def test_warns_of_a_file_that_others_can_read(
    tmp_path: Path, capsys: pytest.CaptureFixture, mode: int
) -> None:
    path = write_yaml(tmp_path / "c.yml", GOOD)
    path.chmod(mode)
    xray.read_credentials(str(path))
    warning = capsys.readouterr().err
    assert bool(re.fullmatch(rf"warning: .*chmod 600 {path}\n", warning)) == (
        mode in (0o640, 0o604)
    )


def test_a_folder_in_place_of_the_file_is_one_line(fails: object, tmp_path: Path) -> None:
    assert str(tmp_path) in fails("--credentials", tmp_path)


@pytest.mark.parametrize(
    "ending", ["\n", "\nx", "\u2026"], ids=["newline", "two lines", "not latin-1"]
)
def test_a_token_that_no_header_can_hold_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, ending: str
) -> None:
    # Python's http.client quotes a header that it refuses, and one holds the token.
    bad = {
        **GOOD,
        "aws_session_token": SECRETS["aws_session_token"] + ending,
        "endpoint_url": "http://127.0.0.1:1",
    }
    path = write_yaml(tmp_path / "bad.yml", bad)
    monkeypatch.setattr("sys.argv", ["xray_tensorflow.py"])
    code = xray.run_script(lambda: xray.select_images(client_of(path), parse()))
    one_line(code, capsys.readouterr().err)
