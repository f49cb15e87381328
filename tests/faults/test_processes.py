"""Ingest by several processes: its result, what a kill loses, and that no process is left."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from fault_proxy import fault_proxy
from helpers import ROOT, SECRETS, check_processes, one_line, parse, secrets_in, write_yaml
from sample_bucket import draw_radiograph
from static_s3 import static_s3

import xray_tensorflow as xray

FILMS = [draw_radiograph(f"{number:08}_000.png", [], 64) for number in range(4)]
# The scripts' ingest, without TensorFlow, on two cores.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import xray_tensorflow as xray

def main():
    arguments = xray.common_parser("").parse_args()
    xray.pin_to_cores(2)
    credentials = xray.read_credentials(arguments.credentials)
    table = xray.select_images(xray.s3_client(credentials), arguments)
    xray.WORTH_A_PROCESS = 100
    xray.ingest(credentials, arguments, table)

sys.argv[0] = "xray_tensorflow.py"
sys.exit(xray.run_script(main))
"""
pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: no processes")


def bucket_of(count: int) -> dict[str, bytes]:
    """A label file and `count` films, cycling through four."""
    names = [f"{number:08}_000.png" for number in range(count)]
    rows = "\n".join(f"{name},Mass,{int(name[:8])}" for name in names)
    images = {f"images/{name}": FILMS[number % 4] for number, name in enumerate(names)}
    labels = f"Image Index,Finding Labels,Patient ID\n{rows}\n"
    return {"Data_Entry_2017_v2020.csv": labels.encode(), **images}


def credentials_of(endpoint: str, folder: Path) -> Path:
    keys = {"aws_access_key_id": "sample", **SECRETS, "region_name": "us-east-1"}
    return write_yaml(folder / "credentials.yml", {**keys, "endpoint_url": endpoint})


class Ingest(NamedTuple):
    """A running ingest: the leader of its own session, and the processes in it."""

    leader: subprocess.Popen
    endpoint: str
    cache: Path

    def processes(self) -> dict[int, str]:
        """The command lines of the session's processes."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if os.getsid(int(folder.name)) == self.leader.pid:
                    state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
                    if state != "Z":
                        found[int(folder.name)] = (folder / "cmdline").read_text()
        return found

    def fetching(self) -> list[int]:
        """The fetching processes."""
        return [pid for pid, words in self.processes().items() if "spawn_main" in words]

    def served(self) -> int:
        """The number of images that the server has sent."""
        return int(urllib.request.urlopen(self.endpoint).read()) - 1  # the label file

    def stored(self) -> int:
        """The number of images in the cache."""
        with (
            contextlib.suppress(sqlite3.OperationalError),  # not created yet
            contextlib.closing(sqlite3.connect(self.cache / "pixels.sqlite", timeout=60)) as cache,
        ):
            return cache.execute("SELECT count(*) FROM pixels").fetchone()[0]
        return 0

    def wait_for(self, condition: Callable[[], bool], seconds: float = 100) -> None:
        start = time.monotonic()
        while not condition():
            assert time.monotonic() - start < seconds, self.processes()
            time.sleep(0.02)

    def end(self) -> str:
        """Wait until all processes have ended; return their stderr."""
        self.wait_for(lambda: self.leader.poll() is not None)
        self.wait_for(lambda: not self.processes(), seconds=10)
        stderr = self.leader.stderr.read()
        assert not secrets_in(stderr)
        return stderr.decode()


@contextlib.contextmanager
def ingest(folder: Path, endpoint: str, *options: Any, script: Path = ROOT) -> Iterator[Ingest]:
    """Ingest by two processes that have begun to fetch."""
    credentials = credentials_of(endpoint, folder)
    words = ["--credentials", credentials, "--image-size", 32, "--cache", folder / "cache"]
    command = [sys.executable, "-c", PROGRAM, script, *words, *options]
    with subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as leader:
        running = Ingest(leader, endpoint, folder / "cache")
        try:
            yield running
        finally:
            for pid in running.processes():
                os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_processes_fetch_what_one_does(tmp_path: Path) -> None:
    with static_s3(bucket_of(1500), 0) as endpoint:
        with ingest(tmp_path, endpoint) as running:
            running.wait_for(lambda: len(running.fetching()) == 2)
            check_processes()
            assert not any(
                secrets_in(Path(f"/proc/{pid}/{file}").read_bytes())
                for pid in running.processes()
                for file in ("cmdline", "environ")
            )
            assert "Traceback" not in running.end()
            assert running.leader.returncode == 0
        keys = xray.read_credentials(str(tmp_path / "credentials.yml"))
        arguments = parse("--image-size", 32, "--cache", tmp_path / "cache")
        selected = xray.select_images(xray.s3_client(keys), arguments)
        _, pixels, cached = xray.ingest(keys, arguments, selected)
    assert cached == 1500
    films = np.stack([xray.decode(film, 32) for film in FILMS])
    assert np.array_equal(pixels, films[np.arange(1500) % 4])


def follow(running: Ingest, enough: int) -> list[int]:
    """Samples of the number of images sent but not stored, until `enough` are stored."""
    behind = []
    stored = 0
    while stored < enough:
        assert running.leader.poll() is None
        served = running.served()
        stored = running.stored()
        behind.append(served - stored)
        time.sleep(0.1)
    return behind


@pytest.mark.parametrize(
    ("images", "enough"), [(6000, 2000), pytest.param(30_000, 12_000, marks=pytest.mark.slow)]
)
def test_a_kill_loses_less_than_a_second_and_leaves_no_process(
    tmp_path: Path, images: int, enough: int
) -> None:
    """Small films from a fast server keep the threads busy with Python's lock."""
    with (
        static_s3(bucket_of(images), 0) as endpoint,
        ingest(tmp_path, endpoint) as running,
    ):
        running.wait_for(lambda: running.served() > 0)
        start = time.monotonic()
        behind = follow(running, enough)
        a_second = enough / (time.monotonic() - start)
        running.leader.kill()
        assert "\n" not in running.end()  # only progress, which stays on one line
        lost = running.served() - running.stored()
    # Per process: 64 images that wait, and those of a tenth of a second, being processed and in
    # transit.
    bound = max(a_second, 2 * (64 + 2 * 100))
    assert lost < bound
    assert max(behind) < bound


@pytest.mark.parametrize("kind", [pytest.param("", marks=pytest.mark.slow), "stall"])
def test_ctrl_c_ends_all_processes(tmp_path: Path, kind: str) -> None:
    with (
        static_s3(bucket_of(3000), 0) as endpoint,
        fault_proxy(endpoint) as proxy,
        ingest(tmp_path, proxy.url) as running,
    ):
        proxy.choose = lambda method, path: kind if "images/" in path else ""
        running.wait_for(lambda: proxy.requests > 100 or proxy.injected["stall"] > 40)
        os.killpg(running.leader.pid, signal.SIGINT)
        *_, last = running.end().splitlines()
    assert running.leader.returncode == 130
    assert last.startswith("xray_tensorflow.py: interrupted")


@pytest.mark.slow
@pytest.mark.parametrize("started", [1, 2])
def test_ctrl_c_while_the_processes_start(tmp_path: Path, started: int) -> None:
    # The keys of a process do not fit into its pipe: it is being started until it reads them.
    with static_s3(bucket_of(9000), 0) as endpoint, ingest(tmp_path, endpoint) as running:
        running.wait_for(lambda: len(running.fetching()) == started)
        os.killpg(running.leader.pid, signal.SIGINT)
        stderr = running.end()
    assert running.leader.returncode == 130
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_a_process_that_is_killed_is_one_line(tmp_path: Path) -> None:
    with static_s3(bucket_of(6000), 0) as endpoint, ingest(tmp_path, endpoint) as running:
        running.wait_for(lambda: running.stored() > 100)
        os.kill(running.fetching()[0], signal.SIGKILL)
        error = one_line(*finished(running))
        stored = running.stored()
    assert "killed by signal 9" in error
    assert stored > 100


def finished(running: Ingest) -> tuple[int, str]:
    """Exit code, and stderr without the lines of progress."""
    stderr = running.end()
    return running.leader.returncode, "\n".join(
        line for line in stderr.replace("\r", "\n").splitlines() if "images:" not in line
    )


@pytest.mark.slow
def test_s3_that_fails_is_its_own_line(tmp_path: Path) -> None:
    with (
        static_s3(bucket_of(3000), 0) as endpoint,
        fault_proxy(endpoint, expire_after=500) as proxy,
        ingest(tmp_path, proxy.url) as running,
    ):
        error = one_line(*finished(running))
        stored = running.stored()
    assert "session token is expired" in error
    assert 100 < stored < 500


@pytest.mark.slow
def test_too_many_unreadable_images_end_it_early(tmp_path: Path) -> None:
    objects = bucket_of(6000)
    broken = {key: b"" for key in objects if key.startswith("images/")}
    with (
        static_s3({**objects, **broken}, 0) as endpoint,
        ingest(tmp_path, endpoint, "--max-skipped", 0.05) as running,
    ):
        error = one_line(*finished(running))
        served = running.served()
    assert error.startswith("301 of 6000 images are unreadable, the last ")
    assert error.endswith("replace them or raise --max-skipped 0.05")
    assert served < 6000


@pytest.mark.slow
def test_a_bug_in_a_process_has_its_traceback(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.mkdir()
    text = (ROOT / "xray_tensorflow.py").read_text()
    bug = text.replace("    row, key = item\n", "    row, key = item\n        1 / 0\n")
    assert bug != text
    (script / "xray_tensorflow.py").write_text(bug)
    with (
        static_s3(bucket_of(3000), 0) as endpoint,
        ingest(tmp_path, endpoint, script=script) as running,
    ):
        code, stderr = finished(running)
    assert code == 1
    assert "ZeroDivisionError" in stderr
