"""S3 that answers late, broken, half or not at all, through the fault proxy: effects on images."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import victim
import yaml
from botocore.config import Config
from fault_proxy import FAULTS, STALLS, Proxy, fault_proxy
from helpers import QUICK, ROOT, SECRETS, as_options, edited, one_line, parse, run_process
from sample_bucket import TRUNCATED

import xray_tensorflow as xray


@contextlib.contextmanager
def faulty(credentials: Path, folder: Path, **how: Any) -> Iterator[tuple[Proxy, Path]]:
    """A proxy in front of the sample bucket, and a credentials file that points to it."""
    with fault_proxy(yaml.safe_load(credentials.read_text())["endpoint_url"], **how) as proxy:
        yield proxy, edited(credentials, folder, endpoint_url=proxy.url)


def ingest(credentials: Path, cache: Path, *options: Any) -> dict[str, np.ndarray]:
    """The pixels of each readable image."""
    keys = xray.read_credentials(str(credentials))
    arguments = parse("--image-size", 32, "--batch-size", 1, "--cache", cache, *options)
    selected = xray.select_images(xray.s3_client(keys), arguments)
    table, pixels, cached = xray.ingest(keys, arguments, selected)
    assert cached == 0
    readable = table["split"] != "skipped"
    assert set(table["image"][~readable]) <= {TRUNCATED}
    return dict(zip(table["image"][readable], pixels[readable]))


@pytest.fixture(scope="module")
def right(credentials: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The pixels without faults."""
    pixels = ingest(credentials, tmp_path_factory.mktemp("right"))
    assert len(pixels) == 410
    return pixels


def assert_right(pixels: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert all(np.array_equal(pixels[image], right[image]) for image in pixels)


# By default one that breaks a connection and one that S3 reports as an error.
KINDS = [
    kind if kind in ("reset", "slow down") else pytest.param(kind, marks=pytest.mark.slow)
    for kind in FAULTS
]


def run_options(credentials: Path, folder: Path, **more: Any) -> list[Any]:
    """Options of a quick run with the pixel cache and the run folder `run` in `folder`."""
    output = folder / "run"
    return [*QUICK, *as_options(credentials=credentials, cache=folder, output=output, **more)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_fault(credentials: Path, right: dict, tmp_path: Path, kind: str) -> None:
    # Rare enough that no image meets five faults in a row, after which the run blames S3.
    with faulty(credentials, tmp_path, every=8, kinds=[kind]) as (proxy, through):
        pixels = ingest(through, tmp_path, "--limit", 40)
        assert proxy.injected[kind] >= 40 / 8
    assert len(pixels) >= 39
    assert_right(pixels, right)


@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_of_list_and_labels(credentials: Path, tmp_path: Path, kind: str) -> None:
    # A CSV cut between two rows, with a matching length, looks like a shorter one (docs/faults.md).
    labels = kind if kind != "short length" else ""
    with faulty(credentials, tmp_path, every=1, kinds=[kind, "", labels, *[""] * 99]) as (
        proxy,
        through,
    ):
        table = xray.select_images(xray.s3_client(xray.read_credentials(str(through))), parse())
        assert proxy.injected[kind] == (2 if labels else 1)
    assert len(table) == 411


def test_latency_is_no_fault(credentials: Path, right: dict, tmp_path: Path) -> None:
    start = time.monotonic()
    with faulty(credentials, tmp_path, latency_ms=300) as (proxy, through):
        pixels = ingest(through, tmp_path, "--limit", 60)
    assert time.monotonic() - start > 3 * 0.3  # list, labels and images really were late
    assert_right(pixels, right)


def cached_pixels(cache: Path) -> dict[str, np.ndarray]:
    with contextlib.closing(sqlite3.connect(cache / "pixels.sqlite")) as open_:
        rows = open_.execute("SELECT key, pixels FROM pixels").fetchall()
    return {
        key[len("images/") :]: np.frombuffer(data, np.uint8).reshape(32, 32) for key, data in rows
    }


@pytest.mark.slow
def test_a_run_with_one_request_in_twenty_faulty_has_all_images(
    credentials: Path, right: dict, tmp_path: Path
) -> None:
    with faulty(credentials, tmp_path, every=20) as (proxy, through):
        options = run_options(through, tmp_path, epochs=1)
        ended = victim.run(options, tmp_path / "screen")
        assert set(proxy.injected) == set(FAULTS)
    assert ended.code == 0, ended.stderr
    images = json.loads(ended.stdout.splitlines()[-1])["images"]
    assert images == {"train": 271, "validation": 48, "test": 91, "skipped": 1}
    pixels = cached_pixels(tmp_path)
    assert pixels.keys() == right.keys()
    assert_right(pixels, right)


def test_stalls_end_at_the_read_timeout(
    credentials: Path, right: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xray, "Config", lambda **how: Config(**{**how, "read_timeout": 1}))
    with faulty(credentials, tmp_path, every=9, kinds=STALLS) as (proxy, through):
        pixels = ingest(through, tmp_path, "--limit", 60)
        assert min(proxy.injected[kind] for kind in STALLS) >= 3
    assert_right(pixels, right)


@pytest.mark.slow
def test_one_stall_of_each_kind_with_the_real_timeout(
    credentials: Path, right: dict, tmp_path: Path
) -> None:
    with faulty(credentials, tmp_path, every=200, kinds=STALLS) as (proxy, through):
        pixels = ingest(through, tmp_path)
        assert proxy.injected == dict.fromkeys(STALLS, 1)
    assert pixels.keys() == right.keys()
    assert_right(pixels, right)


@pytest.mark.slow
def test_an_expired_token_is_one_line_and_a_fresh_one_goes_on(
    credentials: Path, right: dict, tmp_path: Path
) -> None:
    with faulty(credentials, tmp_path, expire_after=200) as (_, through):
        options = run_options(through, tmp_path, epochs=1)
        stale = victim.run(options, tmp_path / "stale")
        assert "session token is expired" in one_line(stale.code, stale.stderr)
        assert not (tmp_path / "run").exists()
        stored = cached_pixels(tmp_path)
        assert 100 < len(stored) < 200
        edited(through, tmp_path, aws_session_token="Fresh" + SECRETS["aws_session_token"])
        fresh = victim.run(options, tmp_path / "fresh")
    assert fresh.code == 0, fresh.stderr
    assert json.loads(fresh.stdout.splitlines()[-1])["ingest"]["from_cache"] == len(stored)
    assert_right(cached_pixels(tmp_path), right)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_a_signal_ends_a_run_whose_requests_all_hang(
    credentials: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with faulty(credentials, tmp_path, every=1, kinds=["", "", "", *["stall"] * 9999]) as (
        proxy,
        through,
    ):
        options = run_options(through, tmp_path)
        process = victim.start(options, tmp_path / "screen")
        while proxy.injected["stall"] < xray.FETCH_THREADS:
            assert process.is_alive()
            time.sleep(0.01)
        os.kill(process.pid, number)
        process.join(15)  # well before a request's timeout of 30 s
        ended = victim.end(process, tmp_path / "screen") if not process.is_alive() else None
        process.kill()
    assert ended, "the process goes on"
    assert ended.code == code
    assert "Traceback" not in ended.stderr
    assert (code == 130) == ("--resume" in ended.stderr.splitlines()[-1])


BUGS = {
    "in the main thread": "xray.parse_labels = lambda *_: 1 / 0",
    "in a fetching thread": "real = xray.fetch; xray.fetch = lambda *how: 1 / 0 if 'images/' in how[2] else real(*how)",
    "in botocore": "import botocore.auth; botocore.auth.S3SigV4Auth.add_auth = lambda self, request: 1 / 0",
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_the_traceback_of_a_bug_shows_no_secret(
    credentials: Path, tmp_path: Path, bug: str
) -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport xray_tensorflow as xray\n{BUGS[bug]}\n"
    program += "sys.exit(xray.run_script(xray.main))"
    options = run_options(credentials, tmp_path)
    ended = run_process([sys.executable, "-c", program, *options], cwd=tmp_path)
    assert ended.code == 1
    assert "Traceback" in ended.stderr
    assert "ZeroDivisionError" in ended.stderr  # run_process has checked it for secrets
