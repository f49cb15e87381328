"""Against Ceph's S3 gateway, which checks signatures and shares no code with moto. Skipped where Ceph is absent."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from helpers import QUICK, ROOT, ceph_client, client_of, edited, parse, run_script
from sample_bucket import BUCKET, fill_bucket, read_rows, write_credentials

import xray_tensorflow as xray

pytestmark = pytest.mark.slow
START = ROOT / "tests" / "stand_ins" / "ceph_s3.sh"


def free_port() -> int:
    """A port that is free, as is the next one: the server takes the two."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@pytest.fixture(scope="module")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The credentials file of a Ceph server with the sample bucket."""
    folder = tmp_path_factory.mktemp("ceph")
    command = [str(START), str(folder / "server")]
    started = subprocess.run([*command, str(free_port())], capture_output=True, text=True)
    if started.returncode == 3:
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stderr
    try:
        endpoint = started.stdout.strip()
        fill_bucket(ceph_client(endpoint), BUCKET, read_rows(), 64)
        keys = {"aws_access_key_id": "XRAYACCESSKEY", "aws_secret_key_id": "xraysecretkey"}
        yield edited(write_credentials(folder, endpoint), folder, **keys)
    finally:
        subprocess.run([str(START), "stop", str(folder / "server")], check=True)


def test_wrong_secret(ceph: Path, tmp_path: Path, fails: Callable) -> None:
    wrong = edited(ceph, tmp_path, aws_secret_key_id="xraysecretkez")
    error = fails("--credentials", wrong)
    assert "the aws_secret_key_id is not the key id's" in error
    assert "xraysecretke" not in error


def test_unknown_key(ceph: Path, tmp_path: Path, fails: Callable) -> None:
    wrong = edited(ceph, tmp_path, aws_access_key_id="XRAYOTHERKEY")
    assert "does not know the aws_access_key_id" in fails("--credentials", wrong)


def test_missing_bucket(ceph: Path, fails: Callable) -> None:
    assert "no bucket absent" in fails("--credentials", ceph, "--bucket", "absent")


def test_missing_labels(ceph: Path, fails: Callable) -> None:
    assert "no absent.csv" in fails("--credentials", ceph, "--labels", "absent.csv")


def test_an_image_gone_between_listing_and_fetching_is_skipped(ceph: Path) -> None:
    ((_, pixels, reason),) = xray.fetch_images(client_of(ceph), BUCKET, {0: "images/gone.png"}, 32)
    assert pixels is None
    assert "gone" in reason


def test_the_list_is_that_of_moto(ceph: Path, credentials: Path) -> None:
    ours, theirs = (xray.select_images(client_of(path), parse()) for path in (ceph, credentials))
    assert ours.equals(theirs)


def test_a_run_gives_the_metrics_of_the_run_against_moto(ceph: Path, run: Any, tmp_path: Path) -> None:
    places = ["--cache", tmp_path / "cache", "--output", tmp_path / "output"]
    finished = run_script("--credentials", ceph, *places, *QUICK)
    assert finished.code == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    for name in ("images", "auroc", "thresholds"):
        assert result[name] == run.result[name]
    assert (tmp_path / "output" / "predictions.csv").read_bytes() == (
        run.folder / "predictions.csv"
    ).read_bytes()
