"""The cache of decoded pixels: what it reuses, what it never mixes, and that no crash or neighbour
spoils it.
"""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, as_options, client_of, label_file, make_bucket, parse, run_process
from sample_bucket import BUCKET, draw_radiograph, read_rows

import xray_tensorflow as xray

ROWS = read_rows()[:40]
# Ingest as the script does it, in a process of its own that has no TensorFlow to load.
PROGRAM = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import xray_tensorflow as xray
arguments = xray.common_parser("").parse_args()
client = xray.s3_client(xray.read_credentials(arguments.credentials))
print(xray.ingest(client, arguments, xray.select_images(client, arguments))[2])
"""


@pytest.fixture(scope="module")
def client(credentials: Path) -> Any:
    """A client of two buckets with the same 40 keys: in 'twin' each radiograph is another one's."""
    images = {name: draw_radiograph(name, findings, 64) for name, findings in ROWS}
    make_bucket(credentials, "small", label_file(ROWS), images)
    make_bucket(credentials, "twin", label_file(ROWS), dict(zip(images, reversed(images.values()))))
    return client_of(credentials)


def ingest(client: Any, cache: Path, *options: Any) -> tuple[dict[str, np.ndarray], int]:
    """The pixels of each image, and how many came from the cache."""
    words = as_options(bucket="small", image_size=32, batch_size=1, max_skipped=0.1, cache=cache)
    arguments = parse(*words, *options)
    table = xray.select_images(client, arguments)
    pixels, skipped, cached = xray.ingest(client, arguments, table)
    return {
        image: pixels[row] for row, image in enumerate(table["image"]) if row not in skipped
    }, cached


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[image], other[image]) for image in one
    )


def stored(cache: Path) -> int:
    """How many images the cache has."""
    file = cache / "pixels.sqlite"
    with (
        contextlib.suppress(sqlite3.OperationalError),
        contextlib.closing(sqlite3.connect(file, timeout=9)) as open_,
    ):
        return open_.execute("SELECT count(*) FROM pixels").fetchone()[0]
    return 0


def test_a_second_run_fetches_nothing(client: Any, tmp_path: Path) -> None:
    first, cached = ingest(client, tmp_path)
    assert cached == 0
    second, cached = ingest(client, tmp_path)
    assert cached == 40
    assert same(first, second)
    fresh = {name: xray.decode(draw_radiograph(name, findings, 64), 32) for name, findings in ROWS}
    assert same(second, fresh)


def test_another_limit_reuses_what_fits(client: Any, tmp_path: Path) -> None:
    assert ingest(client, tmp_path, "--limit", 25)[1] == 0
    assert ingest(client, tmp_path)[1] == 25
    assert ingest(client, tmp_path, "--limit", 30)[1] == 30


def test_sizes_are_not_mixed(client: Any, tmp_path: Path) -> None:
    small, _ = ingest(client, tmp_path)
    large, cached = ingest(client, tmp_path, "--image-size", 48)
    assert cached == 0
    assert {pixels.shape for pixels in large.values()} == {(48, 48)}
    again, cached = ingest(client, tmp_path)
    assert cached == 40
    assert same(small, again)


def test_buckets_are_not_mixed(client: Any, tmp_path: Path) -> None:
    small, _ = ingest(client, tmp_path)
    twin, cached = ingest(client, tmp_path, "--bucket", "twin")
    assert cached == 0
    assert not same(small, twin)
    assert ingest(client, tmp_path)[1] == ingest(client, tmp_path, "--bucket", "twin")[1] == 40


def test_a_changed_object_is_fetched_again(client: Any, tmp_path: Path) -> None:
    before, _ = ingest(client, tmp_path, "--bucket", "twin")
    name = ROWS[3][0]
    key, body = f"images/{name}", draw_radiograph("00000001_000.png", ["Mass"], 64)
    old = client.get_object(Bucket="twin", Key=key)["Body"].read()
    client.put_object(Bucket="twin", Key=key, Body=body)
    after, cached = ingest(client, tmp_path, "--bucket", "twin")
    client.put_object(Bucket="twin", Key=key, Body=old)
    assert cached == 39
    assert np.array_equal(after[name], xray.decode(body, 32))
    assert same({**after, name: before[name]}, before)


def test_a_flipped_byte_is_noticed(client: Any, tmp_path: Path) -> None:
    before, _ = ingest(client, tmp_path)
    changed = bytearray(before[ROWS[0][0]].tobytes())
    changed[500] ^= 1
    with contextlib.closing(
        sqlite3.connect(tmp_path / "pixels.sqlite", isolation_level=None)
    ) as cache:
        where = f"WHERE key = 'images/{ROWS[0][0]}'"
        assert (
            cache.execute(f"UPDATE pixels SET pixels = ? {where}", (bytes(changed),)).rowcount == 1
        )
    after, cached = ingest(client, tmp_path)
    assert cached == 39
    assert same(before, after)
    assert ingest(client, tmp_path)[1] == 40


def damage(data: bytes, kind: str) -> bytes:
    """A cache file with some of it overwritten or gone."""
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
def test_a_damaged_cache_is_set_aside_and_made_anew(
    client: Any, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str
) -> None:
    right, _ = ingest(client, tmp_path)
    bad = damage((tmp_path / "pixels.sqlite").read_bytes(), kind)
    (tmp_path / "pixels.sqlite").write_bytes(bad)
    (tmp_path / "pixels.sqlite-wal").write_bytes(b"its log")
    capsys.readouterr()
    pixels, cached = ingest(client, tmp_path)
    assert cached == 0
    assert same(pixels, right)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    (aside,) = tmp_path.glob("damaged-*-pixels.sqlite")
    assert str(aside) in said
    assert str(tmp_path / "pixels.sqlite") in said
    assert aside.read_bytes() == bad  # it may be someone's file: nothing is deleted
    pixels, cached = ingest(client, tmp_path)
    assert cached == 40
    assert same(pixels, right)


def test_no_damage_gives_wrong_pixels(client: Any, tmp_path: Path) -> None:
    """Bytes overwritten anywhere, and the file cut anywhere: pixels are right, from what is left or
    from S3.
    """
    right, _ = ingest(client, tmp_path)
    whole, random = (tmp_path / "pixels.sqlite").read_bytes(), np.random.default_rng(0)
    kept = []
    for turn in range(12):
        bad = bytearray(whole)
        # SQLite's words for a damaged header are an error line, as they came.
        start = random.integers(100, len(whole))
        bad[start : start + 40] = random.bytes(len(bad[start : start + 40]))
        (tmp_path / "pixels.sqlite").write_bytes(bad if turn % 3 else bad[:start])
        pixels, cached = ingest(client, tmp_path)
        assert same(pixels, right)
        kept.append(cached)
        for file in tmp_path.iterdir():
            file.unlink()
    assert max(kept) > 30
    assert min(kept) < 40


def test_a_database_of_others_is_one_line_and_stays(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "pixels.sqlite")) as open_:
        open_.execute("CREATE TABLE pixels (mine)")
    monkeypatch.setattr("sys.argv", ["xray_tensorflow.py"])
    assert xray.run_script(lambda: ingest(client, tmp_path)) == 2
    assert "cache" in capsys.readouterr().err.splitlines()[-1]
    with contextlib.closing(sqlite3.connect(tmp_path / "pixels.sqlite")) as open_:
        assert [row[0] for row in open_.execute("SELECT name FROM sqlite_master")] == ["pixels"]


def test_a_killed_process_loses_nothing_that_it_had_stored(
    credentials: Path, client: Any, tmp_path: Path
) -> None:
    seen = []

    def enough() -> bool:
        seen.append(stored(tmp_path))
        return seen[-1] >= 50

    options = ["--credentials", credentials, "--image-size", 32, "--cache", tmp_path]
    killed = run_process([sys.executable, "-c", PROGRAM, *options], stop=(enough, signal.SIGKILL))
    assert killed.code == -signal.SIGKILL
    before, cached = ingest(client, tmp_path, "--bucket", BUCKET)
    assert seen[-1] <= cached < 410
    after, cached = ingest(client, tmp_path, "--bucket", BUCKET)
    assert cached == 410
    assert same(before, after)


def test_two_processes_at_once_share_a_new_cache(
    credentials: Path, client: Any, tmp_path: Path
) -> None:
    options = ["--credentials", credentials, "--image-size", 32, "--cache", tmp_path]
    command = [str(word) for word in [sys.executable, "-c", PROGRAM, *options]]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    together, cached = ingest(client, tmp_path, "--bucket", BUCKET)
    assert cached == 410
    alone, _ = ingest(client, tmp_path / "alone", "--bucket", BUCKET)
    assert same(together, alone)
