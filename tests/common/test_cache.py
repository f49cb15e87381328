"""The pixel cache: what it reuses, what it keeps apart, and that nothing corrupts it."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, as_options, client_of, label_file, make_bucket, parse, run_process
from sample_bucket import BUCKET, draw_radiograph, read_rows

import xray_tensorflow as xray

ROWS = read_rows()[:40]
# The script's ingest in its own process, without loading TensorFlow.
PROGRAM = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import xray_tensorflow as xray
arguments = xray.common_parser("").parse_args()
credentials = xray.read_credentials(arguments.credentials)
table = xray.select_images(xray.s3_client(credentials), arguments)
print(xray.ingest(credentials, arguments, table)[2])
"""


@pytest.fixture(scope="module")
def client(credentials: Path) -> Any:
    """A client for two buckets with the same 40 keys; 'twin' has the images in reverse order."""
    images = {name: draw_radiograph(name, findings, 64) for name, findings in ROWS}
    make_bucket(credentials, "small", label_file(ROWS), images)
    make_bucket(credentials, "twin", label_file(ROWS), dict(zip(images, reversed(images.values()))))
    return client_of(credentials)


@pytest.fixture
def ingest(credentials: Path, client: Any) -> Callable[..., tuple[dict[str, np.ndarray], int]]:
    """Call with a cache and options: each image's pixels, and how many images were cached."""

    def call(cache: Path, *options: Any) -> tuple[dict[str, np.ndarray], int]:
        words = as_options(bucket="small", image_size=32, batch_size=1, max_skipped=0.1)
        arguments = parse(*words, "--cache", cache, *options)
        keys = xray.read_credentials(str(credentials))
        table, pixels, cached = xray.ingest(keys, arguments, xray.select_images(client, arguments))
        readable = table["split"] != "skipped"
        return dict(zip(table["image"][readable], pixels[readable])), cached

    return call


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[image], other[image]) for image in one
    )


def stored(cache: Path) -> int:
    """The number of images in the cache."""
    file = cache / "pixels.sqlite"
    with (
        contextlib.suppress(sqlite3.OperationalError),
        contextlib.closing(sqlite3.connect(file, timeout=9)) as open_,
    ):
        return open_.execute("SELECT count(*) FROM pixels").fetchone()[0]
    return 0


def test_a_second_run_fetches_nothing(ingest: Callable, tmp_path: Path) -> None:
    first, cached = ingest(tmp_path)
    assert cached == 0
    second, cached = ingest(tmp_path)
    assert cached == 40
    assert same(first, second)
    fresh = {name: xray.decode(draw_radiograph(name, findings, 64), 32) for name, findings in ROWS}
    assert same(second, fresh)


def test_another_limit_reuses_what_fits(ingest: Callable, tmp_path: Path) -> None:
    assert ingest(tmp_path, "--limit", 25)[1] == 0
    assert ingest(tmp_path)[1] == 25
    assert ingest(tmp_path, "--limit", 30)[1] == 30


def test_sizes_are_not_mixed(ingest: Callable, tmp_path: Path) -> None:
    small, _ = ingest(tmp_path)
    large, cached = ingest(tmp_path, "--image-size", 48)
    assert cached == 0
    assert {pixels.shape for pixels in large.values()} == {(48, 48)}
    again, cached = ingest(tmp_path)
    assert cached == 40
    assert same(small, again)


def test_buckets_are_not_mixed(ingest: Callable, tmp_path: Path) -> None:
    small, _ = ingest(tmp_path)
    twin, cached = ingest(tmp_path, "--bucket", "twin")
    assert cached == 0
    assert not same(small, twin)
    assert ingest(tmp_path)[1] == ingest(tmp_path, "--bucket", "twin")[1] == 40


def test_a_changed_object_is_fetched_again(client: Any, ingest: Callable, tmp_path: Path) -> None:
    before, _ = ingest(tmp_path, "--bucket", "twin")
    name = ROWS[3][0]
    key, body = f"images/{name}", draw_radiograph("00000001_000.png", ["Mass"], 64)
    old = client.get_object(Bucket="twin", Key=key)["Body"].read()
    client.put_object(Bucket="twin", Key=key, Body=body)
    after, cached = ingest(tmp_path, "--bucket", "twin")
    client.put_object(Bucket="twin", Key=key, Body=old)
    assert cached == 39
    assert np.array_equal(after[name], xray.decode(body, 32))
    assert same({**after, name: before[name]}, before)


def test_a_flipped_byte_is_noticed(ingest: Callable, tmp_path: Path) -> None:
    before, _ = ingest(tmp_path)
    changed = bytearray(before[ROWS[0][0]].tobytes())
    changed[500] ^= 1
    with contextlib.closing(
        sqlite3.connect(tmp_path / "pixels.sqlite", isolation_level=None)
    ) as cache:
        where = f"WHERE key = 'images/{ROWS[0][0]}'"
        assert (
            cache.execute(f"UPDATE pixels SET pixels = ? {where}", (bytes(changed),)).rowcount == 1
        )
    after, cached = ingest(tmp_path)
    assert cached == 39
    assert same(before, after)
    assert ingest(tmp_path)[1] == 40


def damage(data: bytes, kind: str) -> bytes:
    """A cache file, partly overwritten or truncated."""
    noise = np.random.default_rng(0).bytes(len(data))
    third = len(data) // 3
    return {
        "no database": b"not a database, " * 1000,
        "first page overwritten": data[:100] + noise[100:4096] + data[4096:],
        "cut short": data[:third],
        "from the second page on overwritten": data[:4096] + noise[4096:],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["no database", "first page overwritten", "cut short", "from the second page on overwritten"],
)
def test_a_damaged_cache_is_one_line_and_made_anew_when_deleted(
    ingest: Callable, tmp_path: Path, kind: str
) -> None:
    right, _ = ingest(tmp_path)
    path = tmp_path / "pixels.sqlite"
    bad = damage(path.read_bytes(), kind)
    path.write_bytes(bad)
    (tmp_path / "pixels.sqlite-wal").write_bytes(b"its log")
    with pytest.raises(xray.UserError, match="delete it") as error:
        ingest(tmp_path)
    assert str(path) in str(error.value)
    assert path.read_bytes() == bad  # it may be someone's file
    path.unlink()  # only that file
    (tmp_path / "pixels.sqlite-wal").write_bytes(b"its log")
    pixels, cached = ingest(tmp_path)
    assert cached == 0
    assert same(pixels, right)
    assert ingest(tmp_path)[1] == 40


def test_the_log_of_a_deleted_cache_is_not_read(ingest: Callable, tmp_path: Path) -> None:
    """A killed run leaves the cache's log, with pages of a file that the user then deletes."""
    path = tmp_path / "one" / "pixels.sqlite"
    right, _ = ingest(path.parent)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as cache:
        cache.execute("UPDATE pixels SET etag = 'another'")
        for ending in ("-wal", "-shm"):
            shutil.copy(f"{path}{ending}", tmp_path / f"pixels.sqlite{ending}")
    assert (tmp_path / "pixels.sqlite-wal").stat().st_size > 20_000
    pixels, cached = ingest(tmp_path)
    assert cached == 0
    assert same(pixels, right)


def test_no_damage_gives_wrong_pixels(ingest: Callable, tmp_path: Path) -> None:
    """Overwrite or truncate the file anywhere: right pixels, from the rest or S3, or one line."""
    right, _ = ingest(tmp_path)
    whole, random = (tmp_path / "pixels.sqlite").read_bytes(), np.random.default_rng(0)
    kept, refused = [], 0
    for turn in range(12):
        bad = bytearray(whole)
        start = random.integers(100, len(whole))
        bad[start : start + 40] = random.bytes(len(bad[start : start + 40]))
        (tmp_path / "pixels.sqlite").write_bytes(bad if turn % 3 else bad[:start])
        try:
            pixels, cached = ingest(tmp_path)
        except xray.UserError as error:
            assert str(error).endswith("or delete it")
            refused += 1
        else:
            assert same(pixels, right)
            kept.append(cached)
        for file in tmp_path.iterdir():
            file.unlink()
    assert refused
    assert max(kept) > 30
    assert min(kept) < 40


def test_a_database_of_others_is_one_line_and_stays(
    ingest: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "pixels.sqlite")) as open_:
        open_.execute("CREATE TABLE pixels (mine)")
    with pytest.raises(xray.UserError, match="cache"):
        ingest(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "pixels.sqlite")) as open_:
        assert [row[0] for row in open_.execute("SELECT name FROM sqlite_master")] == ["pixels"]


@pytest.mark.slow
def test_a_killed_process_loses_nothing_that_it_had_stored(
    credentials: Path, ingest: Callable, tmp_path: Path
) -> None:
    seen = []

    def enough() -> bool:
        seen.append(stored(tmp_path))
        return seen[-1] >= 50

    options = ["--credentials", credentials, "--image-size", 32, "--cache", tmp_path]
    killed = run_process([sys.executable, "-c", PROGRAM, *options], stop=(enough, signal.SIGKILL))
    assert killed.code == -signal.SIGKILL
    before, cached = ingest(tmp_path, "--bucket", BUCKET)
    assert seen[-1] <= cached < 410
    after, cached = ingest(tmp_path, "--bucket", BUCKET)
    assert cached == 410
    assert same(before, after)


@pytest.mark.slow
def test_two_processes_at_once_share_a_new_cache(
    credentials: Path, ingest: Callable, tmp_path: Path
) -> None:
    options = ["--credentials", credentials, "--image-size", 32, "--cache", tmp_path]
    command = [str(word) for word in [sys.executable, "-c", PROGRAM, *options]]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    together, cached = ingest(tmp_path, "--bucket", BUCKET)
    assert cached == 410
    alone, _ = ingest(tmp_path / "alone", "--bucket", BUCKET)
    assert same(together, alone)
