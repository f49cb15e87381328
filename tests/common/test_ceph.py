"""S3 against Ceph's gateway, which checks signatures and shares no code with moto.

Skipped if Ceph is not installed.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import victim
import yaml
from helpers import QUICK, ROOT, ceph_client, client_of, edited, parse, run_script
from sample_bucket import BUCKET, fill_bucket, read_rows, write_credentials

import xray_tensorflow as xray

pytestmark = pytest.mark.slow
START = ROOT / "tests" / "stand_ins" / "ceph_s3.sh"


def free_port() -> int:
    """A free port whose successor is also free: the server uses both."""
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
    assert "the aws_secret_key_id does not match the aws_access_key_id" in error
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


def test_a_run_gives_the_metrics_of_the_run_against_moto(
    ceph: Path, run: Any, tmp_path: Path
) -> None:
    places = ["--cache", tmp_path / "cache", "--output", tmp_path / "output"]
    finished = run_script("--credentials", ceph, *places, *QUICK)
    assert finished.code == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    for name in ("images", "auroc", "thresholds"):
        assert result[name] == run.result[name]
    assert (tmp_path / "output" / "predictions.csv").read_bytes() == (
        run.folder / "predictions.csv"
    ).read_bytes()


@pytest.fixture(scope="module")
def runs_bucket(ceph: Path) -> Any:
    client = ceph_client(yaml.safe_load(ceph.read_text())["endpoint_url"])
    client.create_bucket(Bucket="runs")
    return client


def test_a_prefix_is_taken_once(ceph: Path, runs_bucket: Any) -> None:
    """Uses Ceph's own conditional PUT."""
    keys = xray.read_credentials(str(ceph))
    one, other = (xray.S3Copy(keys, "s3://runs/once") for _ in range(2))
    for copy in (one, other):
        assert copy.look() == (False, b"")
    one.claim('{"id": 1}')
    with pytest.raises(xray.UserError, match="another run has taken s3://runs/once"):
        other.claim('{"id": 2}')
    resumed = [xray.S3Copy(keys, "s3://runs/once") for _ in range(2)]
    for copy in resumed:
        assert copy.look() == (True, b'{"id": 1}')
    resumed[0].claim('{"id": 3}')
    with pytest.raises(xray.UserError, match="another run has taken s3://runs/once"):
        resumed[1].claim('{"id": 4}')


def test_a_key_that_may_not_write_is_one_line_at_the_start(
    ceph: Path, runs_bucket: Any, fails: Callable
) -> None:
    statement = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:PutObject",
        "Resource": "arn:aws:s3:::runs/closed/*",
    }
    runs_bucket.put_bucket_policy(
        Bucket="runs", Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    )
    try:
        error = fails("--credentials", ceph, "--output", "s3://runs/closed")
    finally:
        runs_bucket.delete_bucket_policy(Bucket="runs")
    assert "no access to s3://runs/closed in bucket runs: " in error
    assert "s3:PutObject" in error


def test_a_run_killed_and_resumed_from_ceph(ceph: Path, runs_bucket: Any, tmp_path: Path) -> None:
    options = ["--credentials", ceph, *QUICK, "--cache", tmp_path / "cache"]
    unbroken = victim.run([*options, "--output", tmp_path / "unbroken"], tmp_path / "screen")
    assert unbroken.code == 0, unbroken.stderr
    options += ["--output", "s3://runs/killed"]
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    killed = victim.run(options, tmp_path / "killed", ("change", 9), tmp_path / "one")
    assert killed.code == -signal.SIGKILL
    again = victim.run([*options, "--resume"], tmp_path / "again", folder=tmp_path / "other")
    assert again.code == 0, again.stderr
    (folder,) = (tmp_path / "other" / "runs").iterdir()
    stored = runs_bucket.list_objects_v2(Bucket="runs", Prefix="killed/")["Contents"]
    assert {entry["Key"].split("/")[1] for entry in stored} == {
        path.name for path in (tmp_path / "unbroken").iterdir() if path.name != ".lock"
    }
    for path in folder.glob("[!.]*"):
        assert (
            runs_bucket.get_object(Bucket="runs", Key=f"killed/{path.name}")["Body"].read()
            == path.read_bytes()
        )
    assert (folder / "predictions.csv").read_bytes() == (
        tmp_path / "unbroken" / "predictions.csv"
    ).read_bytes()
