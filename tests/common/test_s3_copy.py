"""--output s3://: the order in which a run's copy is written, and what happens if S3 refuses."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import yaml
from fault_proxy import Proxy, fault_proxy
from helpers import edited, parse
from sample_bucket import connect

import xray_tensorflow as xray

BUCKET = "my-xray-runs"
NAMES = itertools.count(1)
LABELS = dict.fromkeys(xray.LABELS, 0.0)
TABLE = pd.DataFrame(
    {"image": ["a.png"], "etag": ["1"], "split": ["train"], "reason": [""], **LABELS}
)


@pytest.fixture(scope="module")
def s3(credentials: Path) -> Any:
    """A client for the server, with a bucket for runs."""
    client = connect(yaml.safe_load(credentials.read_text())["endpoint_url"])
    client.create_bucket(Bucket=BUCKET)
    return client


class Place(NamedTuple):
    """A new prefix, a folder, and the proxy between."""

    proxy: Proxy
    keys: dict[str, str]
    output: str
    folder: Path
    s3: Any

    def copy(self) -> xray.S3Copy:
        return xray.S3Copy(self.keys, self.output)

    def stored(self) -> dict[str, bytes]:
        """The objects below the prefix."""
        prefix = self.output.split("/", 3)[3] + "/"
        found = self.s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return {
            entry["Key"][len(prefix) :]: self.s3.get_object(Bucket=BUCKET, Key=entry["Key"])[
                "Body"
            ].read()
            for entry in found
        }

    def local(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.glob("[!.]*")}

    def write(self, *names: str) -> None:
        for name in names:
            xray.write(self.folder / name, f"{name} {next(NAMES)}")

    def changed(self) -> list[str]:
        """The changes requested since the last call: method and last part of the key."""
        found = [
            f"{method} {path.split('?')[0].rsplit('/', 1)[1]}"
            for method, path in self.proxy.changes
        ]
        self.proxy.changes.clear()
        return found


@pytest.fixture
def place(credentials: Path, s3: Any, tmp_path: Path) -> Iterator[Place]:
    folder = tmp_path / "run"
    folder.mkdir()
    with fault_proxy(s3.meta.endpoint_url) as proxy:
        keys = xray.read_credentials(str(edited(credentials, tmp_path, endpoint_url=proxy.url)))
        yield Place(proxy, keys, f"s3://{BUCKET}/runs/{next(NAMES)}", folder, s3)


def denied(*methods: str, part: str = BUCKET) -> Callable[[str, str], str]:
    return lambda method, path: "denied" if method in methods and part in path else ""


def epoch(place: Place, number: int, *dropped: int) -> None:
    place.write(f"checkpoint-{number}.weights.h5", "history.csv")
    for old in dropped:
        (place.folder / f"checkpoint-{old}.weights.h5").unlink()


# ---- a location ----


@pytest.mark.parametrize(
    "text", ["s3://b", "s3://b/", "s3://b/a", "s3://b/a/", "runs/mine", "/tmp/mine", "a.b", "3:4"]
)
def test_a_location(text: str) -> None:
    assert parse("--output", text).output == (text.rstrip("/") if text.startswith("s3:") else text)


@pytest.mark.parametrize(
    "text",
    ["s3://", "s3:///a", "s3:/b/a", "S3://b/a", "s3a://b/a", "hdfs:run", "file:///a", "gs://b"],
)
def test_no_location(text: str) -> None:
    with pytest.raises(xray.UserError, match=f"{text} is neither a folder nor s3://BUCKET/PREFIX"):
        parse("--output", text)


# ---- an undisturbed copy ----


CONFIGS = (f'{{"id": {number}}}' for number in itertools.count(1))


def claimed(place: Place) -> xray.S3Copy:
    """A copy that owns its prefix; the config.json that claims it is also in the folder."""
    copy = place.copy()
    copy.look()
    config = next(CONFIGS)
    copy.claim(config)
    xray.write(place.folder / "config.json", config)
    return copy


def test_the_copy_follows_the_folder(place: Place) -> None:
    copy = claimed(place)
    place.write("skipped.csv")
    copy.update(place.folder)
    assert place.stored() == place.local()
    for number, dropped in [(1, []), (2, [1]), (3, []), (4, [3])]:
        epoch(place, number, *dropped)
        copy.update(place.folder)
        assert place.stored() == place.local()
    place.write("metrics.json", "model.keras", "report.png", "predictions.csv")
    whole = place.local()
    place.write("notes.txt", "checkpoint-1.txt", ".partial-report.png", ".lock")
    (place.folder / "checkpoint-old").mkdir()
    copy.finish(place.folder)
    assert place.stored() == whole
    assert len(whole) == 9


def test_what_a_file_names_is_there_before_it(place: Place) -> None:
    copy = claimed(place)
    assert place.changed()[-1] == "PUT config.json"
    place.write("skipped.csv")
    copy.update(place.folder)
    epoch(place, 1)
    copy.update(place.folder)
    epoch(place, 2, 1)
    copy.update(place.folder)
    changes = place.changed()
    order = ["PUT checkpoint-1.weights.h5", "PUT history.csv", "PUT checkpoint-2.weights.h5"]
    places = [changes.index(change) for change in order]
    assert places == sorted(places)
    assert changes.index("DELETE checkpoint-1.weights.h5") > places[-1]
    place.write("metrics.json", "model.keras", "report.png", "predictions.csv")
    copy.finish(place.folder)
    assert place.changed()[-1] == "PUT metrics.json"
    copy.finish(place.folder)
    assert place.changed() == []  # unchanged files are not sent again


def test_a_resumed_run_has_what_it_needs_and_drops_what_it_must(
    place: Place, tmp_path: Path
) -> None:
    copy = claimed(place)
    place.write("skipped.csv", "report.png")
    epoch(place, 1)
    copy.update(place.folder)
    other = Place(place.proxy, place.keys, place.output, tmp_path / "other", place.s3)
    other.folder.mkdir()
    resumed = claimed(other)
    resumed.download(other.folder)
    needed = ("history.csv", "checkpoint-1.weights.h5")
    assert {name: other.local()[name] for name in needed} == {
        name: place.local()[name] for name in needed
    }
    assert other.local().keys() == {"config.json", *needed}
    epoch(other, 2, 1)
    resumed.update(other.folder)
    of_before = {name: place.local()[name] for name in ("skipped.csv", "report.png")}
    assert other.stored() == {**other.local(), **of_before}


def test_objects_of_others_stay(place: Place, tmp_path: Path) -> None:
    copy = claimed(place)
    epoch(place, 1)
    copy.update(place.folder)
    names = (
        "checkpoint-notes.txt", "checkpoint-01.weights.h5", "checkpoint-1.weights.h5.bak",
        "history-csv", "checkpoint-old/checkpoint-1.weights.h5",
    )  # fmt: skip
    for name in names:
        place.s3.put_object(
            Bucket=BUCKET, Key=place.output.split("/", 3)[3] + f"/{name}", Body=b"mine"
        )
    other = Place(place.proxy, place.keys, place.output, tmp_path / "other", place.s3)
    other.folder.mkdir()
    resumed = claimed(other)
    resumed.download(other.folder)
    epoch(other, 2, 1)
    resumed.update(other.folder)
    stored = other.stored()
    assert "checkpoint-1.weights.h5" not in stored
    assert [stored.get(name) for name in names] == [b"mine"] * len(names)


# ---- one run per prefix ----


def refused(copy: xray.S3Copy) -> str:
    with pytest.raises(xray.UserError) as error:
        copy.look()
    assert error.value.exit_code == 2
    return str(error.value)


def test_what_a_prefix_has(place: Place) -> None:
    assert place.copy().look() == (False, b"")
    assert place.stored() == {}
    claimed(place)
    before = place.stored()
    assert place.copy().look() == (True, before["config.json"])
    assert place.stored() == before


def test_a_neighbour_is_no_run_of_this_prefix(place: Place) -> None:
    place.s3.put_object(
        Bucket=BUCKET, Key=place.output.split("/", 3)[3] + "0/config.json", Body=b"{}"
    )
    assert place.copy().look() == (False, b"")


def test_a_bucket_that_does_not_exist(place: Place) -> None:
    assert "there is no bucket absent-bucket: check --output" in refused(
        xray.S3Copy(place.keys, "s3://absent-bucket/a")
    )


@pytest.mark.parametrize("resume", [False, True])
def test_of_two_runs_at_once_one_has_the_prefix(place: Place, resume: bool) -> None:
    if resume:
        claimed(place)
    copies = [place.copy() for _ in range(6)]
    for copy in copies:
        copy.look()

    def ending(copy: xray.S3Copy) -> str:
        try:
            copy.claim(next(CONFIGS))
        except xray.UserError as error:
            return str(error)
        return "claimed"

    with ThreadPoolExecutor(6) as pool:
        endings = list(pool.map(ending, copies))
    assert endings.count("claimed") == 1
    taken = f"another run has taken {place.output}: use another --output"
    assert endings.count(taken) == 5


def test_a_run_that_another_has_resumed_ends(place: Place) -> None:
    first = claimed(place)
    epoch(place, 1)
    first.update(place.folder)
    claimed(place)
    before = place.stored()
    epoch(place, 2)
    with pytest.raises(xray.TakenError, match="another run has taken"):
        first.update(place.folder)
    assert place.stored() == before


def test_a_claim_whose_answer_was_lost_is_the_runs_own(place: Place) -> None:
    lost = iter(["lost answer"])
    place.proxy.choose = lambda method, path: next(lost, "") if "config.json" in path else ""
    claimed(place)
    assert place.changed().count("PUT config.json") == 2
    assert place.stored() == place.local()


# ---- S3 that refuses ----


@pytest.mark.parametrize("method", ["PUT", "DELETE", "GET"])
def test_a_key_without_a_right_is_known_at_the_start(place: Place, method: str) -> None:
    place.proxy.choose = denied(method)
    error = refused(place.copy())
    assert f"no access to {place.output} in bucket {BUCKET}: the keys need" in error
    assert "for --output also s3:PutObject and s3:DeleteObject" in error


def test_s3_away_in_the_middle_and_back(place: Place, capsys: pytest.CaptureFixture) -> None:
    copy = claimed(place)
    copy.update(place.folder)
    assert capsys.readouterr().err == ""
    place.proxy.choose = denied("PUT", "DELETE")
    for number in (1, 2):
        epoch(place, number)
        copy.update(place.folder)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: no access to s3://")
    assert warning.endswith(f"the run goes on in {place.folder}")
    with pytest.raises(xray.CopyError) as error:
        copy.finish(place.folder)
    assert error.value.exit_code == 3
    assert f"aws s3 cp --recursive {place.folder} {place.output}" in str(error.value)
    assert "\n" not in str(error.value)
    place.proxy.choose = lambda method, path: ""
    copy.finish(place.folder)
    assert place.stored() == place.local()


def test_a_copy_that_is_deleted_during_the_run(place: Place, capsys: pytest.CaptureFixture) -> None:
    copy = claimed(place)
    place.s3.delete_object(Bucket=BUCKET, Key=place.output.split("/", 3)[3] + "/config.json")
    copy.update(place.folder)
    assert f"config.json in bucket {BUCKET}: check --output" in capsys.readouterr().err
    with pytest.raises(xray.CopyError, match="aws s3 cp --recursive"):
        copy.finish(place.folder)


@pytest.mark.slow
@pytest.mark.parametrize("nth", range(10))
def test_one_refusal_at_any_change(place: Place, nth: int) -> None:
    """S3's state can be resumed, and the end has everything."""
    copy = claimed(place)
    kinds = iter([""] * nth + ["denied"])
    place.proxy.choose = lambda method, path: "" if method == "GET" else next(kinds, "")
    copy.update(place.folder)
    for number in (1, 2, 3):
        epoch(place, number, *[number - 1] * (number > 1))
        history = (place.folder / "history.csv").read_bytes()
        copy.update(place.folder)
        stored = place.stored()
        assert stored.get("history.csv") != history or f"checkpoint-{number}.weights.h5" in stored
    copy.finish(place.folder)
    assert place.stored() == place.local()


# ---- the folder and the copy together ----


def test_the_run_folder_of_a_copy(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["xray_tensorflow.py"])
    first = xray.Run(parse("--output", place.output), place.keys)
    first.check(TABLE, {})
    assert place.stored() == {}
    first.open(TABLE, None)
    assert place.stored() == {
        name: (first.path / name).read_bytes() for name in ("config.json", "skipped.csv")
    }
    with pytest.raises(xray.UserError, match="is not empty: use another --output, or --resume"):
        xray.Run(parse("--output", place.output), place.keys)
    resumed = xray.Run(parse("--output", place.output, "--resume"), place.keys)
    resumed.check(TABLE, {})
    resumed.open(TABLE, None)
    assert resumed.path != first.path
    for run in (first, resumed):
        run._lock.close()


def test_resume_where_there_is_no_run(place: Place) -> None:
    with pytest.raises(xray.UserError, match=f"no run to resume in '{place.output}'"):
        xray.Run(parse("--output", place.output, "--resume"), place.keys)
    assert place.stored() == {}
