"""Helpers of several test modules: options, credentials files, bad runs, scripts as processes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
import yaml
from sample_bucket import connect

import xray_tensorflow as xray

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "xray_tensorflow.py"
SECRETS = {"aws_secret_key_id": "Tru5tNo0neWithThis", "aws_session_token": "T0kenToKeepToOneself"}


def as_options(**values: Any) -> list[str]:
    """`--image-size 32` for `image_size=32`, and so on."""
    return [
        word
        for name, value in values.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


# A run of the whole sample in seconds, most of them TensorFlow's start and tracing.
QUICK = as_options(weights="none", image_size=32, epochs=3, batch_size=8, learning_rate=1e-3)


def parse(*options: Any) -> argparse.Namespace:
    """The arguments of a command line with these options."""
    return xray.common_parser("").parse_args([str(option) for option in options])


def write_yaml(path: Path, content: Any) -> Path:
    """Write a YAML file that only its owner can read."""
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(content))
    return path


def edited(path: Path, folder: Path, **changes: str | None) -> Path:
    """A copy, in `folder`, of a credentials file with other values; None removes a name."""
    content = {**yaml.safe_load(path.read_text()), **changes}
    return write_yaml(
        folder / "edited.yml", {name: value for name, value in content.items() if value is not None}
    )


def client_of(credentials: Path) -> Any:
    """The script's own S3 client, with one attempt so that error tests do not wait."""
    return xray.s3_client(xray.read_credentials(str(credentials)), attempts=1)


def make_bucket(credentials: Path, bucket: str, labels: str, images: dict[str, bytes]) -> None:
    """Create a bucket in moto with a label file and images."""
    client = connect(yaml.safe_load(credentials.read_text())["endpoint_url"])
    client.create_bucket(Bucket=bucket)
    client.put_object(Bucket=bucket, Key="Data_Entry_2017_v2020.csv", Body=labels.encode())
    for name, data in images.items():
        client.put_object(Bucket=bucket, Key=f"images/{name}", Body=data)


def label_file(rows: list[tuple[str, list[str]]]) -> str:
    """A label CSV with the columns that matter."""
    lines = [f"{name},{'|'.join(findings)},{int(name[:8])}" for name, findings in rows]
    return "\n".join(["Image Index,Finding Labels,Patient ID", *lines, ""])


def one_line(code: int, stderr: str) -> str:
    """Check that a run failed with a one-line error that the user can fix; return its message."""
    assert code == 2, stderr
    assert "Traceback" not in stderr
    assert not any(secret in stderr for secret in SECRETS.values())
    assert [line for line in stderr.splitlines() if "error:" in line] == stderr.splitlines()[-1:], (
        stderr
    )
    script, error, problem = stderr.splitlines()[-1].split(": ", 2)
    assert (script, error) == ("xray_tensorflow.py", "error")
    return problem


def secrets_in(data: bytes) -> bool:
    return any(secret.encode() in data for secret in SECRETS.values())


def check_processes() -> None:
    """Fail if a process of this session shows ps a secret in its command line or environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if os.getsid(int(folder.name)) == os.getsid(0):
                shown = [(folder / name).read_bytes() for name in ("cmdline", "environ")]
                assert not secrets_in(b"".join(shown)), f"process {folder.name} shows a secret"


class Finished(NamedTuple):
    """How a process ended. A negative code is the signal that ended it."""

    code: int
    stdout: str
    stderr: str
    wall: float  # seconds
    cpu: float


def run_process(
    command: list[Any],
    cwd: Path = ROOT,
    stop: tuple[Callable[[], bool], signal.Signals] | None = None,
) -> Finished:
    """Run a command to its end. With `stop`, send it the signal once the call returns True.

    Fails if a process or its output shows a secret.
    """
    start = time.monotonic()
    looked = 0.0
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        child = subprocess.Popen(
            [str(word) for word in command], cwd=cwd, stdout=stdout, stderr=stderr
        )
        try:
            while not os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                assert time.monotonic() - start < 400, "the process hangs"
                if stop and stop[0]():
                    child.send_signal(stop[1])
                    stop = None
                if time.monotonic() - looked > 0.5:
                    check_processes()
                    looked = time.monotonic()
                time.sleep(0.005)
        except BaseException:
            child.kill()
            raise
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.monotonic() - start
        child.returncode = code = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        stderr.seek(0)
        finished = Finished(
            code, stdout.read(), stderr.read(), wall, usage.ru_utime + usage.ru_stime
        )
        assert not secrets_in((finished.stdout + finished.stderr).encode())
        return finished


def run_script(*options: Any, **how: Any) -> Finished:
    """Run the training script."""
    return run_process([sys.executable, SCRIPT, *options], **how)


def result_of(finished: Finished) -> dict:
    """The parsed result line of a successful run."""
    assert finished.code == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def requirements(path: Path) -> list[str]:
    """The pinned lines of a requirements file."""
    lines = [line.split(" #")[0].strip() for line in path.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def ceph_client(endpoint: str) -> Any:
    """A client for the server of tests/stand_ins/ceph_s3.sh, which checks signatures."""
    keys = {"aws_access_key_id": "XRAYACCESSKEY", "aws_secret_access_key": "xraysecretkey"}
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)


# `instances` tells the script how many executors to wait for: on a busy machine they come one by
# one.
CLUSTER = ["--master", "local-cluster[2,1,2048]", "--conf", "spark.executor.instances=2"]


def shellcheck(*words: str | Path, text: str | None = None) -> str:
    """shellcheck's output for a shell program. Skips the test if there is no shellcheck."""
    program = Path(sys.executable).with_name("shellcheck")
    if not program.exists():
        pytest.skip("PyPI has no shellcheck for aarch64")
    done = subprocess.run([program, *words], input=text, text=True, stdout=subprocess.PIPE)
    return done.stdout


def has_java() -> bool:
    """Whether Spark finds a Java here."""
    return bool(os.environ.get("JAVA_HOME") or shutil.which("java"))


def path_without_java(folder: Path) -> str:
    """A PATH with the programs that Spark's start and elephas_libs.sh need, but no java."""
    programs = folder / "programs"
    programs.mkdir()
    tools = "basename bash cat chmod dirname env grep ls mktemp ps rm sh tr uname"
    for name in tools.split():
        if program := shutil.which(name):
            (programs / name).symlink_to(program)
    return str(programs)


def submit(
    folder: Path,
    *options: Any,
    conf: tuple[str, ...] = (),
    python: Path = Path(sys.executable),
    script: Path = ROOT / "xray_elephas.py",
    **how: Any,
) -> Finished:
    """Submit `script`, alone in `folder`, to two one-core executors. Skips without Java.

    Uses the spark-submit next to `python`.
    """
    if not has_java():
        pytest.skip("Spark needs Java: elephas_libs.sh installs one if there is none")
    settings = [word for setting in conf for word in ("--conf", setting)]
    shutil.copy(script, folder)
    command = [python.with_name("spark-submit"), *CLUSTER, *settings, "xray_elephas.py"]
    # spark-submit takes PATH's first python3, which is this one only in an activated venv.
    environment = ["env", f"PYSPARK_PYTHON={python}"]
    return run_process([*environment, *command, *QUICK, *options], cwd=folder, **how)


def error_line(finished: Finished) -> str:
    """The one-line error of a submitted run; checks that it has no Python or Java trace."""
    # spark-submit passes the script's stderr on to stdout.
    shown = finished.stderr + finished.stdout
    assert finished.code == 2, shown
    assert not re.search(r"^\s+at |Exception|Traceback", shown, re.MULTILINE), shown
    assert not secrets_in(shown.encode())
    *_, last = shown.splitlines()
    assert last.startswith("xray_elephas.py: error: "), shown
    return last.split("error: ", 1)[1]
