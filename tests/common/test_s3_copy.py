"""--output s3://: the copy of a run folder, in which order it grows, and what becomes of it where
S3 refuses.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
import yaml
from fault_proxy import Proxy, fault_proxy
from helpers import edited, parse
from sample_bucket import connect

import xray_tensorflow as xray

BUCKET = "my-xray-runs"
NAMES = itertools.count(1)


@pytest.fixture(scope="module")
def s3(credentials: Path) -> Any:
    """A client of the server, with a bucket for runs."""
    client = connect(yaml.safe_load(credentials.read_text())["endpoint_url"])
    client.create_bucket(Bucket=BUCKET)
    return client


class Place(NamedTuple):
    """A prefix that is new, a folder, and what can stand between."""

    proxy: Proxy
    keys: dict[str, str]
    output: str
    folder: Path
    s3: Any

    def copy(self) -> xray.S3Copy:
        return xray.S3Copy(self.keys, self.output)

    def stored(self) -> dict[str, bytes]:
        """What S3 has below the prefix."""
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
        """What was asked to change since the last call: the method and the last part of the key."""
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


# ---- a copy that nothing disturbs ----


def test_the_copy_follows_the_folder(place: Place) -> None:
    copy = place.copy()
    copy.take(resume=False)
    assert set(place.stored()) == {".taken"}
    place.write("skipped.csv", "config.json")
    copy.update(place.folder)
    assert place.stored() == place.local()  # and no .taken
    for number, dropped in [(1, []), (2, [1]), (3, []), (4, [3])]:
        epoch(place, number, *dropped)
        copy.update(place.folder)
        assert place.stored() == place.local()
    place.write("metrics.json", "model.keras", "report.png", "predictions.csv")
    (place.folder / ".partial-report.png").write_text("half")
    (place.folder / ".lock").touch()
    copy.finish(place.folder)
    assert place.stored() == place.local()
    assert len(place.stored()) == 9


def test_what_a_file_names_is_there_before_it(place: Place) -> None:
    copy = place.copy()
    copy.take(resume=False)
    assert place.changed() == ["DELETE .partial", "PUT .taken"]
    place.write("config.json", "skipped.csv")
    copy.update(place.folder)
    assert place.changed() == ["PUT skipped.csv", "PUT config.json", "DELETE .taken"]
    epoch(place, 1)
    copy.update(place.folder)
    epoch(place, 2, 1)
    copy.update(place.folder)
    assert place.changed() == [
        "PUT checkpoint-1.weights.h5", "PUT history.csv",
        "PUT checkpoint-2.weights.h5", "PUT history.csv", "DELETE checkpoint-1.weights.h5",
    ]  # fmt: skip
    place.write("metrics.json", "model.keras", "report.png", "predictions.csv")
    copy.finish(place.folder)
    assert place.changed() == [
        "PUT model.keras",
        "PUT predictions.csv",
        "PUT report.png",
        "PUT metrics.json",
    ]
    copy.finish(place.folder)
    assert place.changed() == []  # what has not changed is not sent again


def test_a_resumed_run_has_what_it_needs_and_drops_what_it_must(
    place: Place, tmp_path: Path
) -> None:
    copy = place.copy()
    copy.take(resume=False)
    place.write("config.json", "skipped.csv", "report.png")
    epoch(place, 1)
    copy.update(place.folder)
    other = Place(place.proxy, place.keys, place.output, tmp_path / "other", place.s3)
    other.folder.mkdir()
    resumed = other.copy()
    resumed.take(resume=True)
    resumed.download(other.folder)
    assert other.local() == {name: data for name, data in place.local().items() if name[0] in "ch"}
    epoch(other, 2, 1)
    resumed.update(other.folder)
    of_before = {name: place.local()[name] for name in ("skipped.csv", "report.png")}
    assert other.stored() == {**other.local(), **of_before}


# ---- who has a prefix ----


def refused(copy: xray.S3Copy, resume: bool = False) -> str:
    with pytest.raises(xray.UserError) as error:
        copy.take(resume)
    assert error.value.exit_code == 2
    return str(error.value)


def test_a_prefix_that_another_run_has_or_had(place: Place) -> None:
    copy = place.copy()
    copy.take(resume=False)
    assert f"another run has taken {place.output}: use another --output" in refused(place.copy())
    assert "no run that has begun" in refused(place.copy(), resume=True)
    place.write("config.json")
    copy.update(place.folder)
    before = place.stored()
    assert f"{place.output} holds another run" in refused(place.copy())
    assert place.stored() == before


def test_resume_where_there_is_none(place: Place) -> None:
    assert f"{place.output} has no run that has begun to train" in refused(
        place.copy(), resume=True
    )
    assert place.stored() == {}


def test_a_neighbour_is_no_run_of_this_prefix(place: Place) -> None:
    place.s3.put_object(
        Bucket=BUCKET, Key=place.output.split("/", 3)[3] + "0/config.json", Body=b"{}"
    )
    assert "no run" in refused(place.copy(), resume=True)
    place.copy().take(resume=False)


def test_a_bucket_that_does_not_exist(place: Place) -> None:
    assert "there is no bucket absent-bucket: check --output" in refused(
        xray.S3Copy(place.keys, "s3://absent-bucket/a")
    )


def test_of_two_runs_at_once_one_has_the_prefix(place: Place) -> None:
    ends: list[str] = []
    barrier = threading.Barrier(6)

    def take() -> None:
        copy = place.copy()
        barrier.wait(20)
        try:
            copy.take(resume=False)
            ends.append("taken")
        except xray.UserError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends.count("taken") == 1
    assert sum("another run has taken" in end for end in ends) == 5


def test_a_claim_whose_answer_was_lost_is_the_runs_own(place: Place) -> None:
    lost = iter(["lost answer"])
    place.proxy.choose = lambda method, path: next(lost, "") if method == "PUT" else ""
    copy = place.copy()
    copy.take(resume=False)
    assert place.changed() == ["DELETE .partial", "PUT .taken", "PUT .taken"]
    copy.give_back()
    assert place.stored() == {}


# ---- S3 that refuses ----


@pytest.mark.parametrize("method", ["PUT", "DELETE", "GET"])
def test_a_key_without_a_right_is_known_at_the_start(place: Place, method: str) -> None:
    place.proxy.choose = denied(method)
    copy = place.copy()
    error = refused(copy)
    copy.give_back()  # as RunFolder does
    assert f"no right to write {place.output} in bucket {BUCKET}: s3:PutObject" in error
    assert place.stored() == {}


def test_s3_away_in_the_middle_and_back(place: Place, capsys: pytest.CaptureFixture) -> None:
    copy = place.copy()
    copy.take(resume=False)
    place.write("config.json")
    copy.update(place.folder)
    assert capsys.readouterr().err == ""
    place.proxy.choose = denied("PUT", "DELETE")
    for number in (1, 2):
        epoch(place, number)
        copy.update(place.folder)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: no right to write")
    assert warning.endswith(f"the run goes on in {place.folder}")
    with pytest.raises(xray.CopyError) as error:
        copy.finish(place.folder)
    assert error.value.exit_code == 3
    assert f"aws s3 cp --recursive {place.folder} {place.output}" in str(error.value)
    assert "\n" not in str(error.value)
    place.proxy.choose = lambda method, path: ""
    copy.finish(place.folder)
    assert place.stored() == place.local()


def test_a_prefix_stays_taken_where_s3_is_away_at_the_begin(place: Place) -> None:
    copy = place.copy()
    copy.take(resume=False)
    place.write("config.json")
    place.proxy.choose = denied("PUT", part="config.json")
    copy.update(place.folder)
    assert set(place.stored()) == {".taken"}
    place.proxy.choose = lambda method, path: ""
    assert "another run has taken" in refused(place.copy())
    copy.update(place.folder)
    assert place.stored() == place.local()


@pytest.mark.slow
@pytest.mark.parametrize("nth", range(3, 13))
def test_one_refusal_at_any_change(place: Place, nth: int) -> None:
    """What S3 has is a state that a run can go on from, and the end has all."""
    kinds = iter([""] * (nth - 1) + ["denied"])
    place.proxy.choose = lambda method, path: "" if method == "GET" else next(kinds, "")
    copy = place.copy()
    copy.take(resume=False)
    place.write("config.json")
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
    arguments = parse("--output", place.output)
    with pytest.raises(ZeroDivisionError), xray.RunFolder(arguments, place.keys) as run:
        assert run.path.parent == Path("runs")
        assert set(place.stored()) == {".taken"}
        _ = 1 / 0
    assert place.stored() == {}
    assert not Path("runs").exists()
    with pytest.raises(xray.UserError, match="no run that has begun"):
        xray.RunFolder(parse("--output", place.output, "--resume"), place.keys).__enter__()
    assert not Path("runs").exists()
