"""A run ended by a kill or a full disk: its files are whole, and resuming gives the same result.

By default one moment of each kind; all of them: pytest -m slow tests/faults/test_kills.py
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import shutil
import signal
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pandas as pd
import pytest
import victim
import yaml
from fault_proxy import fault_proxy
from helpers import QUICK, as_options, edited, one_line
from PIL import Image
from sample_bucket import connect

IMAGES = [1, 2, 30, 80, 137, 200, 260, 333, 400, 411]
BATCHES = [1, 2, 10, 33, 34, 35, 40, 41, 60, 80]  # an epoch has 34 for training, 6 for validation
BYTES = [k * 630_000 for k in range(1, 11)]  # of a checkpoint, the largest file (6.6 MB)
MOST = 30  # at least the number of files and objects an unbroken run changes
EVENTS = range(1, MOST + 1)
ALL = {"image": IMAGES, "batch": BATCHES, "byte": BYTES, "event": EVENTS}
MOMENTS = [(kind, n) for kind, counts in ALL.items() for n in counts]


class Unbroken(NamedTuple):
    options: list[Any]  # with a full cache
    folder: Path
    result: dict


@pytest.fixture(scope="module")
def unbroken(credentials: Path, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("unbroken")
    options = ["--credentials", credentials, *QUICK, "--epochs", 2, "--cache", folder / "cache"]
    ended = victim.run([*options, "--output", folder / "run"], folder / "screen")
    assert ended.code == 0, ended.stderr
    return Unbroken(options, folder / "run", json.loads(ended.stdout.splitlines()[-1]))


def stored(cache: Path) -> int:
    with contextlib.closing(sqlite3.connect(cache / "pixels.sqlite")) as open_:
        return open_.execute("SELECT count(*) FROM pixels").fetchone()[0]


def arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays in a checkpoint."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update({name: item[()]}) if hasattr(item, "shape") else None
        )
    return found


def names(folder: Path) -> set[str]:
    """The names of the files in a run folder, or in a copy of one."""
    return {path.name for path in folder.glob("[!.]*")}


def losses(folder: Path) -> pd.DataFrame:
    rows = pd.read_csv(folder / "history.csv", float_precision="round_trip")
    return rows[["epoch", "loss", "validation_loss", "validation_auroc"]]


def check_whole(folder: Path, unbroken: Path) -> int:
    """Fail unless every file is whole. Return the number of finished epochs."""
    there = names(folder)
    for name in there & {"skipped.csv", "predictions.csv"}:
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes()
    for name in there & {"config.json", "metrics.json"}:
        assert (
            json.loads((folder / name).read_text()).keys()
            == json.loads((unbroken / name).read_text()).keys()
        )
    for name in there & {"model.keras"}:
        assert zipfile.ZipFile(folder / name).testzip() is None
    for name in there & {"report.png"}:
        Image.open(folder / name).load()
    for name in there & {"checkpoint-1.weights.h5", "checkpoint-2.weights.h5"}:
        assert arrays(folder / name)
    if "history.csv" not in there:
        return 0
    rows = losses(folder)
    pd.testing.assert_frame_equal(rows, losses(unbroken)[: len(rows)], check_exact=True)
    assert f"checkpoint-{len(rows)}.weights.h5" in there
    return len(rows)


def count_moments(kind: str, options: list[Any], folder: Path) -> int:
    """The number of such moments in an unbroken run."""
    folder.mkdir()
    ended = victim.run(options, folder / "screen", (kind, math.inf), folder)
    assert ended.code == 0, ended.stderr
    count = int(ended.stdout.splitlines()[-1])
    assert 0 < count <= MOST
    return count


@pytest.fixture(scope="module")
def events(unbroken: Unbroken, tmp_path_factory: pytest.TempPathFactory) -> int:
    """The number of file changes that an unbroken run makes in its run folder."""
    folder = tmp_path_factory.mktemp("events") / "home"
    return count_moments("event", [*unbroken.options, "--output", folder / "run"], folder)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS, ids="{0[0]} {0[1]}".format)
def test_a_killed_run_ends_as_an_unbroken_one(
    unbroken: Unbroken, events: int, tmp_path: Path, moment: victim.Moment
) -> None:
    if moment[0] == "event" and moment[1] > events:
        pytest.skip(f"a run changes {events} files")
    folder, options = tmp_path / "run", [*unbroken.options, "--output", tmp_path / "run"]
    if moment[0] == "image":
        options[options.index("--cache") + 1] = tmp_path / "cache"
    killed = victim.run(options, tmp_path / "killed", moment)
    assert killed.code == (-signal.SIGXFSZ if moment[0] == "byte" else -signal.SIGKILL), (
        killed.stderr
    )
    epochs = check_whole(folder, unbroken.folder)
    fetched = stored(
        tmp_path / "cache" if moment[0] == "image" else unbroken.folder.parent / "cache"
    )
    begun = (folder / "config.json").exists()

    again = victim.run([*options, *["--resume"] * begun], tmp_path / "again")
    assert again.code == 0, again.stderr
    result = json.loads(again.stdout.splitlines()[-1])
    assert result["ingest"]["from_cache"] == fetched
    assert re.findall(r"continuing after epoch (\d+)", again.stdout) == [str(epochs)] * bool(epochs)
    assert check_whole(folder, unbroken.folder) == 2
    assert [result[name] for name in ("images", "auroc", "thresholds")] == [
        unbroken.result[name] for name in ("images", "auroc", "thresholds")
    ]
    mine, its = (arrays(path / "checkpoint-2.weights.h5") for path in (folder, unbroken.folder))
    assert mine.keys() == its.keys()
    assert all(np.array_equal(mine[name], its[name]) for name in its)
    assert names(folder) == names(unbroken.folder)
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("count", [400_000, 1_600_000])  # of 2.1 MB
def test_ended_while_it_writes_the_model(unbroken: Unbroken, tmp_path: Path, count: int) -> None:
    folder, options = (
        tmp_path / "run",
        [*unbroken.options, "--output", tmp_path / "run", "--resume"],
    )
    shutil.copytree(unbroken.folder, folder)
    for path in folder.glob("[mr]*"):  # model, metrics and report
        path.unlink()
    killed = victim.run(options, tmp_path / "killed", ("byte", count))
    assert killed.code == -signal.SIGXFSZ, killed.stderr
    assert not list(folder.glob("[mr]*"))
    assert check_whole(folder, unbroken.folder) == 2
    again = victim.run(options, tmp_path / "again")
    assert again.code == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["auroc"] == unbroken.result["auroc"]
    assert names(folder) == names(unbroken.folder)


RUNS = "my-xray-runs-killed"


@pytest.fixture(scope="module")
def runs_bucket(credentials: Path) -> Any:
    """A client for the server, with a bucket for runs."""
    client = connect(yaml.safe_load(credentials.read_text())["endpoint_url"])
    client.create_bucket(Bucket=RUNS)
    return client


def fetched_copy(client: Any, prefix: str, folder: Path) -> Path:
    """Download a run's copy on S3 into a folder."""
    folder.mkdir()
    for entry in client.list_objects_v2(Bucket=RUNS, Prefix=f"{prefix}/").get("Contents", []):
        body = client.get_object(Bucket=RUNS, Key=entry["Key"])["Body"].read()
        (folder / entry["Key"].rsplit("/", 1)[1]).write_bytes(body)
    return folder


@pytest.fixture(scope="module")
def uploads(unbroken: Unbroken, runs_bucket: Any, tmp_path_factory: pytest.TempPathFactory) -> int:
    """The number of requests by which an unbroken run changes its copy."""
    folder = tmp_path_factory.mktemp("uploads") / "home"
    output = ["--output", f"s3://{RUNS}/unbroken"]
    return count_moments("change", [*unbroken.options, *output], folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    range(1, MOST + 1),
    ids="upload {}".format,
)
def test_a_run_killed_at_an_upload_ends_on_another_machine(
    unbroken: Unbroken, uploads: int, runs_bucket: Any, tmp_path: Path, moment: int
) -> None:
    if moment > uploads:
        pytest.skip(f"a run changes {uploads} objects")
    prefix = f"run-{moment}"
    options = [*unbroken.options, "--output", f"s3://{RUNS}/{prefix}"]
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    killed = victim.run(options, tmp_path / "killed", ("change", moment), one)
    assert killed.code == -signal.SIGKILL, killed.stderr
    left = fetched_copy(runs_bucket, prefix, tmp_path / "left")
    epochs = check_whole(left, unbroken.folder)
    begun = (left / "config.json").exists()
    shutil.rmtree(one)

    again = victim.run([*options, *["--resume"] * begun], tmp_path / "again", folder=other)
    assert again.code == 0, again.stderr
    assert re.findall(r"continuing after epoch (\d+)", again.stdout) == [str(epochs)] * bool(epochs)
    result = json.loads(again.stdout.splitlines()[-1])
    for name in ("images", "auroc", "thresholds"):
        assert result[name] == unbroken.result[name]
    (folder,) = (other / "runs").iterdir()
    copy = fetched_copy(runs_bucket, prefix, tmp_path / "copy")
    assert check_whole(copy, unbroken.folder) == 2
    assert names(copy) == names(unbroken.folder)
    for path in folder.glob("[!.]*"):
        assert (copy / path.name).read_bytes() == path.read_bytes()
    assert (copy / "predictions.csv").read_bytes() == (
        unbroken.folder / "predictions.csv"
    ).read_bytes()


@pytest.mark.slow
def test_s3_that_refuses_from_the_first_epoch_on(
    unbroken: Unbroken, credentials: Path, runs_bucket: Any, tmp_path: Path
) -> None:
    """As if a session token expires: the run continues, and its exit code reports it."""
    with fault_proxy(runs_bucket.meta.endpoint_url) as proxy:
        proxy.choose = lambda method, path: "expired" if "checkpoint" in path else ""
        through = edited(credentials, tmp_path, endpoint_url=proxy.url)
        output = f"s3://{RUNS}/refused"
        options = [
            *unbroken.options,
            *as_options(credentials=through, output=output, cache=tmp_path / "cache"),
        ]
        ended = victim.run(options, tmp_path / "screen", folder=tmp_path)
        assert ended.code == 3
        warning, error = (line for line in ended.stderr.splitlines() if "session token" in line)
        assert warning.startswith("warning: the session token is expired or not valid")
        assert error.startswith(f"xray_tensorflow.py: error: {output} is behind runs/")
        assert "Traceback" not in ended.stderr
        assert json.loads(ended.stdout.splitlines()[-1])["auroc"] == unbroken.result["auroc"]
        (folder,) = (tmp_path / "runs").iterdir()
        assert check_whole(folder, unbroken.folder) == 2
        assert names(folder) == names(unbroken.folder)

        # What the error line's command does, without the AWS CLI: its copy can be resumed.
        for path in folder.glob("[!.]*"):
            runs_bucket.upload_file(str(path), RUNS, f"refused/{path.name}")
        proxy.choose = lambda method, path: ""
        again = victim.run([*options, "--resume"], tmp_path / "again", folder=tmp_path)
        assert again.code == 0, again.stderr


@pytest.mark.slow
def test_s3_that_is_away_for_an_epoch(
    unbroken: Unbroken, credentials: Path, runs_bucket: Any, tmp_path: Path
) -> None:
    with fault_proxy(runs_bucket.meta.endpoint_url) as proxy:
        # botocore tries the first file 10 times and each file of the next update 3 times: then S3
        # is back.
        away = itertools.chain(["reset"] * 12, itertools.repeat(""))
        proxy.choose = lambda method, path: next(away) if "checkpoint" in path else ""
        through = edited(credentials, tmp_path, endpoint_url=proxy.url)
        output = ["--output", f"s3://{RUNS}/away"]
        options = [
            *unbroken.options,
            "--credentials",
            through,
            *output,
            "--cache",
            tmp_path / "cache",
        ]
        ended = victim.run(options, tmp_path / "screen", folder=tmp_path)
    assert ended.code == 0, ended.stderr
    assert ended.stderr.count("S3 cannot be reached") == 1
    copy = fetched_copy(runs_bucket, "away", tmp_path / "copy")
    assert check_whole(copy, unbroken.folder) == 2
    assert names(copy) == names(unbroken.folder)


@pytest.mark.slow
def test_a_full_cache_disk(unbroken: Unbroken, disk: Callable, tmp_path: Path) -> None:
    cache = disk("size=400k") / "cache"
    options = [*unbroken.options, "--cache", cache, "--output", tmp_path / "run"]
    full = victim.run(options, tmp_path / "full")
    assert "disk is full" in one_line(full.code, full.stderr)
    disk("size=9m")
    had = stored(cache)
    assert 20 < had < 400
    ended = victim.run(options, tmp_path / "ended")
    assert ended.code == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["ingest"]["from_cache"] == had


# The disk fills at config.json; at the first checkpoint, of 6.6 MB; at the second, which needs room
# next to the first.
@pytest.mark.slow
@pytest.mark.parametrize(("size", "epochs"), [("4k", 0), ("3m", 0), ("10m", 1)])
def test_a_full_output_disk(
    unbroken: Unbroken, disk: Callable, tmp_path: Path, size: str, epochs: int
) -> None:
    folder = disk(f"size={size}") / "run"
    options = [*unbroken.options, "--output", folder]
    full = victim.run(options, tmp_path / "full")
    assert "No space left on device" in one_line(full.code, full.stderr)
    assert check_whole(folder, unbroken.folder) == epochs
    disk("size=40m")
    resume = ["--resume"] * (folder / "config.json").exists()
    ended = victim.run([*options, *resume], tmp_path / "ended")
    assert ended.code == 0, ended.stderr
    assert check_whole(folder, unbroken.folder) == 2
    assert json.loads(ended.stdout.splitlines()[-1])["auroc"] == unbroken.result["auroc"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.keras", "report.png"])
def test_a_disk_full_when_the_result_is_written(
    unbroken: Unbroken, disk: Callable, tmp_path: Path, name: str
) -> None:
    folder = disk("size=40m") / "run"
    shutil.copytree(unbroken.folder, folder)
    for path in folder.glob("[mr]*"):  # model, metrics and report
        path.unlink()
    used = sum(path.stat().st_size for path in folder.iterdir())
    model = (unbroken.folder / "model.keras").stat().st_size * (name == "report.png")
    disk(f"size={(used + model) // 1024 + 60}k")
    options = [*unbroken.options, "--output", folder, "--resume"]
    full = victim.run(options, tmp_path / "full")
    if name == "report.png":  # the result does not depend on its picture
        assert full.code == 0
        assert "warning: no report.png" in full.stderr
        assert (folder / "metrics.json").exists()
    else:
        assert "No space left on device" in one_line(full.code, full.stderr)
    assert check_whole(folder, unbroken.folder) == 2
    assert not (folder / name).exists()
    disk("size=40m")
    ended = victim.run(options, tmp_path / "ended")
    assert ended.code == 0, ended.stderr
    assert names(folder) == names(unbroken.folder)


@pytest.mark.parametrize("option", ["--output", "--cache"])
def test_a_read_only_folder(
    unbroken: Unbroken, disk: Callable, tmp_path: Path, option: str
) -> None:
    folder = disk("ro")
    options = [*unbroken.options, "--output", tmp_path / "run", option, folder / "new"]
    ended = victim.run(options, tmp_path / "screen")
    error = one_line(ended.code, ended.stderr)
    assert "Read-only file system" in error
    assert str(folder) in error


def test_a_cache_that_became_read_only(unbroken: Unbroken, disk: Callable, tmp_path: Path) -> None:
    folder = disk("size=9m")
    shutil.copytree(unbroken.folder.parent / "cache", folder / "cache")
    disk("ro")
    options = [*unbroken.options, "--cache", folder / "cache", "--output", tmp_path / "run"]
    ended = victim.run(options, tmp_path / "screen")
    assert "cache" in one_line(ended.code, ended.stderr)
