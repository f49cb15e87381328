"""xray_elephas.py on YARN and HDFS, configured like EMR by stand_ins/hadoop.py.

See that file for requirements. Eight TensorFlow workers share this machine's cores: the runs are as
small as possible, but still take minutes.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from fault_proxy import fault_proxy
from helpers import QUICK, ROOT, SECRETS, as_options, client_of, edited, secrets_in
from sample_bucket import BUCKET, connect, fill_bucket, read_rows, serve, write_credentials
from stand_ins import hadoop

pytestmark = pytest.mark.slow

# The project's own command on EMR, and one that fits next to a driver on a node in cluster mode.
OWN = ["--num-executors", 2, "--executor-cores", 4, "--driver-memory", "5G"]
SMALL = ["--num-executors", 2, "--executor-cores", 1]
TINY = [*QUICK, "--epochs", 1]  # tracing eight models takes most of a run
NO_BUCKET = "xray_elephas.py: error: there is no bucket no-such-bucket: check --bucket"
RUNS = "runs"  # bucket of the run whose folder does not outlast it
IMAGES = 410  # of the sample bucket's 411, one cannot be read


class Yarn(NamedTuple):
    """A cluster, and credentials for an S3 server that its hosts reach."""

    cluster: hadoop.Cluster
    credentials: Path


@pytest.fixture(scope="module")
def yarn(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Yarn]:
    """The cluster; a parameter sets the memory in MB that each node declares."""
    if needs := hadoop.missing_needs():
        pytest.skip(f"this machine lacks {', '.join(needs)}")
    folder = tmp_path_factory.mktemp("yarn")
    with contextlib.ExitStack() as stack:
        memory = getattr(request, "param", 12288)
        cluster = stack.enter_context(hadoop.running(folder / "cluster", memory=memory))
        endpoint = stack.enter_context(serve(hadoop.GATEWAY))
        fill_bucket(connect(endpoint), BUCKET, read_rows(), 64)
        connect(endpoint).create_bucket(Bucket=RUNS)
        yield Yarn(cluster, edited(write_credentials(folder, endpoint), folder, **SECRETS))


class Application(NamedTuple):
    """YARN's report on a run."""

    name: str  # application_…
    state: str  # SUCCEEDED, FAILED or KILLED
    attempts: int
    logs: str  # of all containers


class Run(NamedTuple):
    """A run of the script on the cluster, and the folder it started in."""

    folder: Path
    finished: subprocess.CompletedProcess
    application: Application


def newest() -> dict[str, Any]:
    """The newest application on YARN."""
    applications = (hadoop.ask("/ws/v1/cluster/apps").get("apps") or {}).get("app", [])
    return max(applications, key=lambda application: application["startedTime"], default={})


def look_back(cluster: hadoop.Cluster) -> Application:
    """The last application to end, once its logs are in HDFS."""
    deadline = time.monotonic() + 60
    while newest()["logAggregationStatus"] not in ("SUCCEEDED", "FAILED", "TIME_OUT"):
        assert time.monotonic() < deadline, newest()
        time.sleep(1)
    name = newest()["id"]
    attempts = hadoop.ask(f"/ws/v1/cluster/apps/{name}/appattempts")["appAttempts"]["appAttempt"]
    logs = cluster.run("yarn", "logs", "-applicationId", name)
    return Application(name, newest()["finalStatus"], len(attempts), logs)


def run_command(command: list[Any], folder: Path) -> subprocess.CompletedProcess:
    """Run a command in `folder`. Fails if its output shows a secret, or after 15 minutes."""
    words = [str(word) for word in command]
    finished = subprocess.run(
        words, cwd=folder, check=False, capture_output=True, text=True, timeout=900
    )
    assert not secrets_in((finished.stdout + finished.stderr).encode())
    return finished


def spark_submit(
    yarn: Yarn, folder: Path, words: list[Any], options: list[Any]
) -> subprocess.CompletedProcess:
    """Run the script, alone with its credentials in `folder`, on the cluster's master."""
    shutil.copy(ROOT / "xray_elephas.py", folder)
    shutil.copy(yarn.credentials, folder / "credentials.yml")
    command = [yarn.cluster.command, "spark-submit", *words, "xray_elephas.py", *options]
    return run_command(command, folder)


def submit(yarn: Yarn, folder: Path, words: list[Any], options: list[Any]) -> Run:
    """Run spark_submit; return the run with YARN's report."""
    finished = spark_submit(yarn, folder, words, options)
    return Run(folder, finished, look_back(yarn.cluster))


def result_of(printed: str) -> dict[str, Any]:
    """The result line, wherever it is in the output or logs."""
    (line,) = re.findall(r'^\{"script": .*\}$', printed, re.MULTILINE)
    return json.loads(line)


def losses(folder: Path) -> np.ndarray:
    """Each epoch's losses in history.csv."""
    with (folder / "history.csv").open() as file:
        return np.array(
            [[float(row["loss"]), float(row["validation_loss"])] for row in csv.DictReader(file)]
        )


def memory_of(cluster: hadoop.Cluster, application: str) -> dict[str, float]:
    """Each container's peak memory, as a share of its limit."""
    units = {"KB": 1 / 1024, "MB": 1, "GB": 1024}
    number = application[len("application_") :]
    line = re.compile(
        rf"container-id (container_{number}\S+): (\S+) (\S\S) of (\S+) (\S\S) physical"
    )
    shares: dict[str, float] = {}
    for log in (cluster.folder / "logs").glob("*-nodemanager.log"):
        for container, taken, unit, given, given_unit in line.findall(log.read_text()):
            share = float(taken) * units[unit] / (float(given) * units[given_unit])
            shares[container] = max(share, shares.get(container, 0))
    return shares


def files_with_secrets(cluster: hadoop.Cluster) -> list[Path]:
    """Files of all hosts that hold a secret, in local folders, logs and HDFS blocks."""
    found = []
    for folder, _, names in os.walk(cluster.folder):  # it skips folders that vanish
        for path in (Path(folder, name) for name in names):
            with contextlib.suppress(OSError):  # it has just been removed
                if path.is_file() and secrets_in(path.read_bytes()):
                    found.append(path)
    return found


class Watcher(threading.Thread):
    """Looks for secrets on all hosts during a run, since YARN then deletes most of its files."""

    def __init__(self, cluster: hadoop.Cluster) -> None:
        super().__init__(daemon=True)
        self.cluster, self.over = cluster, threading.Event()
        self.looked, self.files, self.commands = 0, set(), set()

    def run(self) -> None:
        while not self.over.wait(3):
            self.files.update(files_with_secrets(self.cluster))
            for host in hadoop.made_hosts():
                for pid in hadoop.processes(host):
                    self.look_at(Path("/proc", str(pid)))
            self.looked += 1

    def look_at(self, process: Path) -> None:
        """Look at what ps would show of a process."""
        with contextlib.suppress(OSError):  # it has just ended
            command = (process / "cmdline").read_bytes()
            if secrets_in(command + (process / "environ").read_bytes()):
                self.commands.add(command)


@pytest.fixture(scope="module")
def watched(yarn: Yarn, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Watcher]:
    """The project's own command, word for word, in client mode, with the default cache."""
    watcher = Watcher(yarn.cluster)
    watcher.start()
    run = submit(yarn, tmp_path_factory.mktemp("client"), OWN, [*TINY, "--output", "run"])
    watcher.over.set()
    watcher.join()
    assert run.finished.returncode == 0, run.finished.stderr
    return run, watcher


@pytest.fixture(scope="module")
def client(watched: tuple[Run, Watcher]) -> Run:
    return watched[0]


@pytest.fixture(scope="module")
def in_cluster_mode(yarn: Yarn, client: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The project's second command; its output is on S3."""
    folder = tmp_path_factory.mktemp("cluster_mode")
    words = ["--deploy-mode", "cluster", "--files", "credentials.yml", *SMALL]
    options = [*TINY, "--cache", "hdfs:///user/root/cache", "--output", f"s3://{RUNS}/one"]
    run = submit(yarn, folder, words, options)
    assert run.finished.returncode == 0, run.application.logs
    return run


def test_two_executors_of_four_slots(yarn: Yarn, client: Run) -> None:
    result = result_of(client.finished.stdout)
    assert result == json.loads((client.folder / "run" / "metrics.json").read_text())
    assert result["target"].items() >= {"master": "yarn", "executors": 2, "workers": 8}.items()
    assert sum(result["images"][split] for split in ("train", "validation", "test")) == IMAGES
    assert (client.application.state, client.application.attempts) == ("SUCCEEDED", 1)
    # The application master's container and one per executor: dynamic allocation has asked for no
    # more.
    memory = memory_of(yarn.cluster, client.application.name)
    assert len(memory) == 3
    assert max(memory.values()) < 0.9


def test_it_learns_what_it_learns_elsewhere(yarn: Yarn, client: Run, tmp_path: Path) -> None:
    words = ["--master", "local-cluster[2,4,2048]", ROOT / "xray_elephas.py", *TINY]
    words += as_options(
        credentials=yarn.credentials, cache=tmp_path / "cache", output=tmp_path / "run"
    )
    command = [Path(sys.executable).with_name("spark-submit"), *words]
    finished = run_command(["env", f"PYSPARK_PYTHON={sys.executable}", *command], tmp_path)
    assert result_of(finished.stdout)["target"]["workers"] == 8
    np.testing.assert_allclose(losses(client.folder / "run"), losses(tmp_path / "run"), atol=1e-4)


def test_cluster_mode(yarn: Yarn, in_cluster_mode: Run) -> None:
    result = result_of(in_cluster_mode.application.logs)
    client = client_of(yarn.credentials)
    kept = {entry["Key"] for entry in client.list_objects_v2(Bucket=RUNS)["Contents"]}
    assert {
        "one/config.json",
        "one/history.csv",
        "one/checkpoint-1.weights.h5",
        "one/model.keras",
    } < kept
    assert result == json.loads(
        client.get_object(Bucket=RUNS, Key="one/metrics.json")["Body"].read()
    )
    assert result["target"].items() >= {"master": "yarn", "executors": 2, "workers": 2}.items()
    assert (in_cluster_mode.application.state, in_cluster_mode.application.attempts) == (
        "SUCCEEDED",
        1,
    )


def test_a_run_uses_the_cache_of_another(client: Run, in_cluster_mode: Run) -> None:
    """The default cache, a plain folder, is on HDFS if that is the cluster's file system."""
    first = result_of(client.finished.stdout)["ingest"]
    again = result_of(in_cluster_mode.application.logs)["ingest"]
    assert (first["from_cache"], again["from_cache"]) == (0, IMAGES)


def test_cluster_mode_says_where_a_run_folder_would_be_lost(yarn: Yarn, tmp_path: Path) -> None:
    words = ["--deploy-mode", "cluster", "--files", "credentials.yml", *SMALL]
    run = submit(yarn, tmp_path, words, TINY)
    assert run.finished.returncode != 0
    assert re.search("^xray_elephas.py: error: .*--output", run.application.logs, re.MULTILINE)


@pytest.fixture(scope="module")
def refused(yarn: Yarn, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in cluster mode that fails with an error the user can fix."""
    words = ["--deploy-mode", "cluster", "--files", "credentials.yml", *SMALL]
    options = [*TINY, "--bucket", "no-such-bucket", "--output", "/tmp/nowhere"]
    return submit(yarn, tmp_path_factory.mktemp("refused"), words, options)


def test_an_error_is_one_line_of_the_logs(refused: Run) -> None:
    assert refused.finished.returncode == 1
    assert refused.application.state == "FAILED"
    lines = re.findall("^xray_elephas.py: error: .*$", refused.application.logs, re.MULTILINE)
    assert set(lines) == {NO_BUCKET}
    assert not re.search("^Traceback", refused.application.logs, re.MULTILINE)


def test_an_error_is_on_spark_submits_screen(refused: Run) -> None:
    """Through YARN's diagnostics; the driver is on another host."""
    assert NO_BUCKET in refused.finished.stderr


def test_what_the_user_must_fix_is_tried_once(refused: Run) -> None:
    assert refused.application.attempts == 1


def test_in_client_mode_an_error_is_the_last_line(yarn: Yarn, tmp_path: Path) -> None:
    before = newest()
    finished = spark_submit(yarn, tmp_path, OWN, ["--bucket", "no-such-bucket"])
    assert finished.returncode == 2
    # spark-submit passes the script's stderr on to stdout; its own log goes to stderr.
    assert finished.stdout.splitlines()[-1] == NO_BUCKET
    assert newest() == before  # it never went to YARN


def test_no_secret_while_it_runs(watched: tuple[Run, Watcher]) -> None:
    run, watcher = watched
    assert watcher.looked > 5
    assert (watcher.files, watcher.commands) == (set(), set())
    assert not secrets_in(run.application.logs.encode())


def test_no_secret_is_left(yarn: Yarn, client: Run, in_cluster_mode: Run, refused: Run) -> None:
    """YARN keeps the files of --files, readable only by the cluster's user; no other has a key."""
    for run in (client, in_cluster_mode, refused):
        assert not secrets_in(run.application.logs.encode())
    deadline = time.monotonic() + 60
    # A DataNode removes a deleted file's blocks some seconds later.
    while any(path.name.startswith("blk_") for path in files_with_secrets(yarn.cluster)):
        assert time.monotonic() < deadline
        time.sleep(2)
    left = files_with_secrets(yarn.cluster)
    assert {path.name for path in left} <= {"credentials.yml"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in left)
    assert yarn.cluster.run("hdfs", "dfs", "-ls", "/user/root/.sparkStaging") == ""


def node_without_master(yarn: Yarn, application: str) -> str:
    """The node without the application master."""
    master = hadoop.ask(f"/ws/v1/cluster/apps/{application}")["app"]["amHostHttpAddress"].split(
        ":"
    )[0]
    (node,) = set(yarn.cluster.nodes) - {master}
    return node


class Killer(threading.Thread):
    """Calls `kill` on the node without the application master, once `when` is true of a new run."""

    def __init__(self, yarn: Yarn, when: Callable[[], bool], kill: Callable[[str], None]) -> None:
        super().__init__(daemon=True)
        self.yarn, self.when, self.kill = yarn, when, kill
        self.before = newest().get("id")
        self.killed = ""
        self.noticed = False  # by the ResourceManager, during the run

    def run(self) -> None:
        while not self.when() or newest().get("id") == self.before:
            time.sleep(0.2)
        self.killed = node_without_master(self.yarn, newest()["id"])
        self.kill(self.killed)
        while not self.noticed and newest()["state"] == "RUNNING":
            time.sleep(1)
            nodes = hadoop.ask("/ws/v1/cluster/nodes?states=LOST").get("nodes") or {}
            self.noticed = bool(nodes.get("node"))


def bring_back(yarn: Yarn, node: str) -> None:
    hadoop.start_node(yarn.cluster.folder, node)
    deadline = time.monotonic() + 120
    while hadoop.active_nodes() < len(yarn.cluster.nodes):
        assert time.monotonic() < deadline
        time.sleep(1)


@contextlib.contextmanager
def killing(
    yarn: Yarn, when: Callable[[], bool], kill: Callable[[str], None] = hadoop.kill_node
) -> Iterator[Killer]:
    """Run a killer; restart the node at the end."""
    killer = Killer(yarn, when, kill)
    killer.start()
    try:
        yield killer
    finally:
        if killer.killed:
            killer.join()
            bring_back(yarn, killer.killed)


def options_of(folder: Path, epochs: int, cache: str = "") -> list[Any]:
    """Options of a run whose folder is `run` in `folder`, with a cache shared by the hosts."""
    cache = cache or f"file://{folder}/cache"
    return [*TINY, *as_options(epochs=epochs, output=folder / "run", cache=cache)]


def check_whole(folder: Path, finished: subprocess.CompletedProcess, epochs: int) -> None:
    assert finished.returncode == 0, finished.stdout + finished.stderr
    images = result_of(finished.stdout)["images"]
    assert sum(images[split] for split in ("train", "validation", "test")) == IMAGES
    assert losses(folder / "run").shape == (epochs, 2)
    assert np.isfinite(losses(folder / "run")).all()


@pytest.mark.parametrize("place", ["of this machine", "of HDFS"])
def test_a_node_lost_in_an_epoch_costs_time_alone(yarn: Yarn, tmp_path: Path, place: str) -> None:
    """Its executor's images are rebuilt from the cache; a lost DataNode takes part of that too."""
    cache = "hdfs:///user/root/cache-of-a-lost-node" if place == "of HDFS" else ""
    with killing(yarn, (tmp_path / "run" / "history.csv").exists):  # after the first epoch
        finished = spark_submit(yarn, tmp_path, SMALL, options_of(tmp_path, 4, cache))
    check_whole(tmp_path, finished, epochs=4)


def test_a_node_lost_in_ingest_costs_time_alone(yarn: Yarn, tmp_path: Path) -> None:
    endpoint = yaml.safe_load(yarn.credentials.read_text())["endpoint_url"]
    with fault_proxy(endpoint, latency_ms=500, host=hadoop.GATEWAY) as proxy:
        slow = Yarn(yarn.cluster, edited(yarn.credentials, tmp_path, endpoint_url=proxy.url))
        with killing(yarn, lambda: proxy.requests > 60):
            finished = spark_submit(slow, tmp_path, SMALL, options_of(tmp_path, 1))
        assert proxy.requests > IMAGES + 20  # some were requested again
    check_whole(tmp_path, finished, epochs=1)


def test_a_lost_node_manager_costs_time_alone(yarn: Yarn, tmp_path: Path) -> None:
    """Its containers keep running until YARN declares the node lost and Spark the executor."""

    def kill(node: str) -> None:
        hadoop.kill_server(node, "nodemanager")

    with killing(yarn, (tmp_path / "run" / "history.csv").exists, kill) as killer:
        finished = spark_submit(yarn, tmp_path, SMALL, options_of(tmp_path, 60))
        assert killer.noticed, "the run was over before YARN noticed"
    check_whole(tmp_path, finished, epochs=60)


@pytest.mark.parametrize("mode", ["asynchronous", "hogwild"])
def test_a_node_lost_ends_a_run_that_adds_changes_up(yarn: Yarn, tmp_path: Path, mode: str) -> None:
    """A repeated task would add its changes twice. The run can resume from the kept epochs."""
    history = tmp_path / "run" / "history.csv"
    with killing(yarn, history.exists):  # after the first epoch
        options = [*options_of(tmp_path, 200), "--mode", mode]
        finished = spark_submit(yarn, tmp_path, SMALL, options)
    assert finished.returncode == 2, finished.stdout + finished.stderr
    problem = finished.stdout.splitlines()[-1]
    assert problem.startswith("xray_elephas.py: error: an executor or its Python process died")
    assert "--resume" in problem
    assert "Traceback" not in finished.stdout
    epochs = len(history.read_text().splitlines())  # one more than the kept epochs
    options = [*options_of(tmp_path, epochs), "--mode", mode, "--resume"]
    finished = spark_submit(yarn, tmp_path, SMALL, options)
    assert f"continuing after epoch {epochs - 1}\n" in finished.stdout
    check_whole(tmp_path, finished, epochs)


def test_a_killed_driver_leaves_nothing_on_the_nodes(yarn: Yarn, tmp_path: Path) -> None:
    before = newest().get("id")

    def kill_driver() -> None:
        while not (tmp_path / "run" / "history.csv").exists():
            time.sleep(0.2)
        hadoop.kill(hadoop.processes(hadoop.MASTER, "xray_elephas.py"))

    killer = threading.Thread(target=kill_driver, daemon=True)
    killer.start()
    finished = spark_submit(yarn, tmp_path, SMALL, options_of(tmp_path, 400))
    killer.join()
    assert finished.returncode < 0
    assert newest()["id"] != before
    deadline = time.monotonic() + 90
    while any(
        hadoop.processes(node, command)
        for node in yarn.cluster.nodes
        for command in ("org.apache.spark.", "pyspark.daemon")
    ):
        assert time.monotonic() < deadline, "processes of the run are left"
        time.sleep(1)
    while newest()["state"] == "RUNNING":
        assert time.monotonic() < deadline, "YARN takes the run for running"
        time.sleep(1)
    assert yarn.cluster.run("hdfs", "dfs", "-ls", "/user/root/.sparkStaging") == ""


def test_a_container_killed_for_memory_is_one_line(yarn: Yarn, tmp_path: Path) -> None:
    words = [*SMALL, "--executor-memory", "512m", "--conf", "spark.executor.memoryOverhead=64m"]
    finished = spark_submit(yarn, tmp_path, words, options_of(tmp_path, 1))
    assert finished.returncode == 2, finished.stdout + finished.stderr
    assert finished.stdout.splitlines()[-1].startswith(
        "xray_elephas.py: error: an executor or its Python process died"
    )
    assert "spark.executor.memoryOverhead" in finished.stdout.splitlines()[-1]
    assert "Traceback" not in finished.stdout


def executor_of_a_stranger(yarn: Yarn, port: int) -> str:
    """The log of Spark's executor, registered with a driver by a stranger without YARN's secret."""
    (*_, node) = yarn.cluster.nodes
    java = "SPARK_EXECUTOR_OPTS=--add-opens=java.base/sun.nio.ch=ALL-UNNAMED"
    spark_class = hadoop.spark_home() / "bin" / "spark-class"
    name = "org.apache.spark.executor.CoarseGrainedExecutorBackend"
    backend = ["env", java, spark_class, name]
    options = as_options(
        driver_url=f"spark://CoarseGrainedScheduler@{hadoop.MASTER}:{port}",
        executor_id=99,
        hostname=node,
        cores=1,
        app_id="application_1",
    )
    command = [yarn.cluster.command, "--host", node, "timeout", 20, *backend, *options]
    words = [str(word) for word in command]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("locked", [True, False])
def test_nobody_registers_as_an_executor_without_the_secret(
    yarn: Yarn, tmp_path: Path, locked: bool
) -> None:
    """Without authentication, which a user may turn off, the same stranger gets in."""
    words = [*SMALL, "--conf", "spark.driver.port=4056"]
    words += [] if locked else ["--conf", "spark.authenticate=false"]
    logs: list[str] = []

    def knock() -> None:
        while not (tmp_path / "run" / "history.csv").exists():
            time.sleep(0.2)
        logs.append(executor_of_a_stranger(yarn, 4056))

    stranger = threading.Thread(target=knock, daemon=True)
    stranger.start()
    finished = spark_submit(yarn, tmp_path, words, options_of(tmp_path, 15))
    stranger.join()
    assert ("Successfully registered with driver" in logs[0]) != locked, logs[0]
    if locked:
        check_whole(tmp_path, finished, epochs=15)


@pytest.mark.parametrize("yarn", [24576], indirect=True)
def test_four_executors_of_four_slots(yarn: Yarn, tmp_path: Path) -> None:
    """The project's command for four nodes, on two that declare twice the cores they have.

    Sixteen workers would be too many for this machine: four of the slots train.
    """
    own = ["--num-executors", 4, "--executor-cores", 4, "--driver-memory", "5G"]
    finished = spark_submit(yarn, tmp_path, own, [*options_of(tmp_path, 1), "--workers", 4])
    check_whole(tmp_path, finished, epochs=1)
    target = result_of(finished.stdout)["target"]
    assert target.items() >= {"executors": 4, "workers": 4}.items()
