"""xray_elephas.py on a Spark cluster of three hosts that are network namespaces of this machine.

Needs root to create them, and Debian's iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import QUICK, ROOT, SECRETS, as_options, edited, free_port, result_of, run_process
from sample_bucket import BUCKET, connect, fill_bucket, read_rows, serve, write_credentials

SPARK = Path(pytest.importorskip("pyspark").__file__).parent / "bin" / "spark-class"
DRIVER = "10.77.0.1"  # the executors' hosts are 10.77.0.2 and 10.77.0.3

pytestmark = pytest.mark.slow


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


@contextlib.contextmanager
def hosts() -> Iterator[list[str]]:
    """Names of two network namespaces that reach this one at DRIVER, and nothing else."""
    made = [f"xray{number}" for number in (2, 3)]
    ip("link add xray0 type bridge")
    try:
        ip(f"addr add {DRIVER}/24 dev xray0")
        ip("link set xray0 up")
        for name in made:
            ip(f"netns add {name}")
            ip(f"link add {name} type veth peer name eth0 netns {name}")
            ip(f"link set {name} master xray0 up")
            ip(f"-n {name} addr add 10.77.0.{name[-1]}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} link set lo up")
        yield made
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        ip("link del xray0")


class Cluster(NamedTuple):
    """A standalone cluster's master URL, and credentials for an S3 server that its hosts reach."""

    master: str
    credentials: Path
    folder: Path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if os.getuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    folder, port = tmp_path_factory.mktemp("hosts"), free_port()
    master = f"spark://{DRIVER}:{port}"
    with contextlib.ExitStack() as stack:
        namespaces = stack.enter_context(hosts())
        endpoint = stack.enter_context(serve(DRIVER))
        fill_bucket(connect(endpoint), BUCKET, read_rows(), 64)
        credentials = edited(write_credentials(folder, endpoint), folder, **SECRETS)
        words = [
            "org.apache.spark.deploy.master.Master",
            *as_options(host=DRIVER, port=port, webui_port=0),
        ]
        commands = [[SPARK, *words]]
        for name in namespaces:
            words = [
                "org.apache.spark.deploy.worker.Worker",
                *as_options(host=f"10.77.0.{name[-1]}", cores=1),
            ]
            words += ["--memory", "1g", "--webui-port", 0, "--work-dir", folder / name, master]
            commands.append(["ip", "netns", "exec", name, SPARK, *words])
        log = stack.enter_context((folder / "log").open("a"))
        for command in commands:
            process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        wait_for(DRIVER, port)
        yield Cluster(master, credentials, folder)


def wait_for(host: str, port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, port)):
            return
        time.sleep(0.5)
    raise TimeoutError(port)


def submit(cluster: Cluster, folder: Path, *options: Any) -> Any:
    """Run the script on the cluster's two hosts; return its result and output."""
    settings = ["--conf", f"spark.driver.host={DRIVER}", "--conf", "spark.executor.instances=2"]
    command = [
        Path(sys.executable).with_name("spark-submit"),
        "--master",
        cluster.master,
        *settings,
    ]
    words = [*QUICK, "--credentials", cluster.credentials, "--output", folder / "run", *options]
    python = f"PYSPARK_PYTHON={sys.executable}"
    finished = run_process(["env", python, *command, ROOT / "xray_elephas.py", *words], cwd=folder)
    return result_of(finished), finished.stdout


def test_synchronous(cluster: Cluster, tmp_path: Path) -> None:
    result, shown = submit(cluster, tmp_path)
    assert result["target"]["executors"] == result["target"]["workers"] == 2
    assert result["target"]["master"] == cluster.master
    assert "no cache: --cache cache is on this host only" in shown
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("mode", ["asynchronous", "hogwild"])
def test_workers_reach_the_parameter_server(cluster: Cluster, tmp_path: Path, mode: str) -> None:
    result, _ = submit(cluster, tmp_path, "--mode", mode, "--port", free_port())
    assert result["target"].items() >= {"mode": mode, "executors": 2}.items()


def test_a_cache_that_the_hosts_share(cluster: Cluster, tmp_path: Path) -> None:
    words = ["--cache", f"file://{tmp_path}/cache", "--epochs", 1]
    first, _ = submit(cluster, tmp_path, *words)
    again, _ = submit(cluster, tmp_path, *words, "--output", tmp_path / "again")
    assert (first["ingest"]["from_cache"], again["ingest"]["from_cache"]) == (0, 410)
