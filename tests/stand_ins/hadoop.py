"""A stand-in for Amazon EMR: Hadoop's own HDFS and YARN on hosts that are network namespaces.

    python tests/stand_ins/hadoop.py start [--nodes 2] [--memory 12288] [--cores 4] FOLDER
    python tests/stand_ins/hadoop.py stop

`start` takes half a minute and prints the folders of Hadoop's and Spark's configuration. FOLDER
must be empty or absent. `stop` ends every process of the hosts but leaves FOLDER, with the servers'
logs. Only one cluster runs at a time.

FOLDER/on runs a command with EMR's environment, on the master or on `--host NAME`:

    FOLDER/on spark-submit --num-executors 2 xray_elephas.py
    FOLDER/on yarn application -list
    FOLDER/on yarn logs -applicationId application_1234567890123_0001
    FOLDER/on hdfs dfs -ls /

The master runs NameNode and ResourceManager, every other host a DataNode and a NodeManager. The
hosts share this machine's files, but a node's containers work and log in their own folders,
FOLDER/NODE. A node declares its memory and cores, whatever the machine has: YARN hands out no more,
and kills a container that exceeds the memory it asked for. The hosts reach this machine at GATEWAY
and nothing else: a server that they need must listen there.

Settings are EMR's if they matter to Spark: dynamic allocation with Spark's shuffle service in the
NodeManagers, logs aggregated in HDFS, event log in HDFS, two attempts per application, and a
scheduler that counts only memory, Hadoop's default, which EMR keeps. The servers are Hadoop 3.4.1,
as in EMR 7.12: they enforce YARN's rules, and accept the Hadoop 3.3.4 clients of pip's pyspark.

Needs root, Debian's iproute2, openjdk-17-jre-headless and maven (jars from Maven Central, cached in
~/.m2), and pyspark.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

POM = Path(__file__).with_name("hadoop.pom.xml")
EMR = Path(__file__).resolve().parent.parent.parent / "docs" / "emr_cluster.json"
MASTER = "xrayyarn1"
BRIDGE = "xrayyarn0"
GATEWAY = "10.78.0.254"  # this machine, as seen by the hosts
HOSTS_OF = Path("/etc/netns")  # `ip netns exec` mounts the files of a folder there over /etc
# Guice and the class loader of the NodeManager's services access Java's internals, which Java 17
# forbids.
JAVA = [
    "java", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Djava.net.preferIPv4Stack=true",
    "--add-opens=java.base/java.lang=ALL-UNNAMED", "--add-opens=java.base/java.net=ALL-UNNAMED",
]  # fmt: skip
SERVERS = {
    "namenode": "org.apache.hadoop.hdfs.server.namenode.NameNode",
    "datanode": "org.apache.hadoop.hdfs.server.datanode.DataNode",
    "resourcemanager": "org.apache.hadoop.yarn.server.resourcemanager.ResourceManager",
    "nodemanager": "org.apache.hadoop.yarn.server.nodemanager.NodeManager",
}
LOG4J = """log4j.rootLogger=INFO,console
log4j.appender.console=org.apache.log4j.ConsoleAppender
log4j.appender.console.target=System.err
log4j.appender.console.layout=org.apache.log4j.PatternLayout
log4j.appender.console.layout.ConversionPattern=%d{ISO8601} %p %c{1}: %m%n
# What each container takes, every three seconds.
log4j.logger.org.apache.hadoop.yarn.server.nodemanager.containermanager.monitor.ContainersMonitorImpl=DEBUG
"""
ON = """#!/usr/bin/env bash
# A command on a host of the cluster: hadoop.py says how.
set -euo pipefail
host={master}
if [[ $1 == --host ]]; then
  host=$2
  shift 2
fi
export JAVA_HOME={java_home} HADOOP_CONF_DIR={hadoop} SPARK_CONF_DIR={spark} PATH={bin}:$PATH
java=(java -Xmx256m -XX:TieredStopAtLevel=1 -Dlog4j.rootLogger=WARN,console -cp {tools})
case "$1 ${{2:-}}" in
  "hdfs dfs") set -- "${{java[@]}}" org.apache.hadoop.fs.FsShell "${{@:3}}" ;;
  "yarn logs") set -- "${{java[@]}}" org.apache.hadoop.yarn.client.cli.LogsCLI "${{@:3}}" ;;
  "yarn application") set -- "${{java[@]}}" org.apache.hadoop.yarn.client.cli.ApplicationCLI "$2" "${{@:3}}" ;;
esac
exec ip netns exec "$host" unshare --uts sh -c 'hostname "$0" && exec "$@"' "$host" "$@"
"""


class StandInError(Exception):
    """Why the cluster cannot start, in one line."""


class Cluster(NamedTuple):
    """A running cluster. Its nodes are host names and names of network namespaces."""

    folder: Path
    nodes: list[str]

    @property
    def command(self) -> Path:
        """The program that runs a command on a host."""
        return self.folder / "on"

    def run(self, *words: object) -> str:
        """The output of a command on the master, such as `hdfs dfs -ls /`. Raises if it fails."""
        command = [str(word) for word in (self.command, *words)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def missing_needs() -> list[str]:
    """What this machine lacks for the cluster."""
    needs = [name for name in ("ip", "unshare", "java", "mvn") if not shutil.which(name)]
    if importlib.util.find_spec("pyspark") is None:
        needs.append("pyspark")
    if os.getuid():
        needs.append("root (to create network namespaces)")
    return needs


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


def address(host: str) -> str:
    return f"10.78.0.{host[len('xrayyarn') :]}"


def make_hosts(hosts: list[str]) -> None:
    """Create network namespaces that reach each other by name, and this machine at GATEWAY."""
    names = "".join(f"{address(host)} {host}\n" for host in hosts)
    ip(f"link add {BRIDGE} type bridge")
    ip(f"addr add {GATEWAY}/24 dev {BRIDGE}")
    ip(f"link set {BRIDGE} up")
    for host in hosts:
        folder = HOSTS_OF / host
        folder.mkdir(parents=True)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (folder / "resolv.conf").write_text("")  # no name server: unknown names fail at once
        ip(f"netns add {host}")
        ip(f"link add {host} type veth peer name eth0 netns {host}")
        ip(f"link set {host} master {BRIDGE} up")
        ip(f"-n {host} addr add {address(host)}/24 dev eth0")
        ip(f"-n {host} link set eth0 up")
        ip(f"-n {host} link set lo up")


def made_hosts() -> list[str]:
    shown = subprocess.run(
        ["ip", "netns", "list"], check=True, capture_output=True, text=True
    ).stdout
    return [line.split()[0] for line in shown.splitlines() if line.startswith("xrayyarn")]


def processes(host: str, command: str = "") -> list[int]:
    """The processes of a host, or those whose command line contains `command`."""
    shown = subprocess.run(
        ["ip", "netns", "pids", host], check=False, capture_output=True, text=True
    ).stdout
    found = []
    for pid in map(int, shown.split()):
        with contextlib.suppress(OSError):  # it has just ended
            if command in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    return found


def end_host(host: str, patience: float = 10) -> None:
    """End all processes of a host; kill those still alive after `patience` seconds."""
    deadline = time.monotonic() + patience
    asked: set[int] = set()
    while found := processes(host):
        for pid in found:
            number = signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL
            if number == signal.SIGKILL or pid not in asked:
                asked.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        time.sleep(0.2)


def stop() -> None:
    """End the cluster's processes and remove its hosts, if there are any."""
    hosts = made_hosts()
    for host in sorted(hosts, reverse=True):  # master last: nodes wait for a lost one
        end_host(host)
    for host in hosts:
        ip(f"netns del {host}")
    for link in (*hosts, BRIDGE):  # deleting a namespace removes its link, but later
        subprocess.run(["ip", "link", "del", link], check=False, capture_output=True)
    for folder in HOSTS_OF.glob("xrayyarn*"):
        shutil.rmtree(folder)


def find_jars() -> list[str]:
    """The pom's jars. Maven fetches them once, and again only when the pom changes."""
    cache = Path.home() / ".cache" / "xray-hadoop"
    kept = cache / f"{hashlib.sha256(POM.read_bytes()).hexdigest()[:16]}.classpath"
    if not (kept.exists() and all(Path(jar).exists() for jar in kept.read_text().split(":"))):
        cache.mkdir(parents=True, exist_ok=True)
        words = [
            "dependency:build-classpath",
            "-Dmdep.includeScope=runtime",
            f"-Dmdep.outputFile={kept}",
        ]
        finished = subprocess.run(
            ["mvn", "-B", "-q", "-f", POM, *words], check=False, capture_output=True, text=True
        )
        if finished.returncode:
            raise StandInError(
                f"Maven cannot fetch Hadoop: {finished.stdout.strip().splitlines()[0]}"
            )
    return kept.read_text().strip().split(":")


def server_classpath(folder: Path) -> str:
    """The class path of the servers and of Hadoop's command line.

    Spark's service is left out: it needs its own class loader.
    """
    jars = [jar for jar in find_jars() if "spark-network-yarn" not in jar]
    return ":".join([str(folder / "hadoop"), str(folder / "web"), *jars])


def spark_home() -> Path:
    """pip's pyspark."""
    spec = importlib.util.find_spec("pyspark")
    return Path(spec.origin).parent


def shuffle_service() -> str:
    """The jars of Spark's shuffle service: one from Maven, its dependencies from pip's pyspark.

    Both have the same version.
    """
    wanted = (
        "spark-",
        "netty-",
        "jackson-",
        "leveldbjni",
        "rocksdbjni",
        "scala-library",
        "metrics-core",
        "commons-",
    )
    wanted += ("guava", "RoaringBitmap", "shims-0", "log4j-", "slf4j-", "jsr305")
    own = next(jar for jar in find_jars() if "spark-network-yarn" in jar)
    jars = sorted((spark_home() / "jars").glob("*.jar"))
    return ":".join([own, *(str(jar) for jar in jars if jar.name.startswith(wanted))])


def hadoop_settings(
    folder: Path, memory: int, cores: int, calculator: str
) -> dict[str, dict[str, object]]:
    """The settings of Hadoop's configuration files."""
    core = {
        "fs.defaultFS": f"hdfs://{MASTER}:8020",
        "hadoop.tmp.dir": folder / "tmp",
        "hadoop.http.staticuser.user": "root",
        "ipc.client.connect.max.retries": 3,
    }
    hdfs = {
        "dfs.replication": 1,
        "dfs.permissions.enabled": "false",
        "dfs.namenode.name.dir": folder / MASTER / "name",
        "dfs.namenode.safemode.extension": 0,
        "dfs.client.read.shortcircuit": "false",
    }
    yarn = {
        "yarn.resourcemanager.hostname": MASTER,
        "yarn.nodemanager.resource.memory-mb": memory,
        "yarn.nodemanager.resource.cpu-vcores": cores,
        "yarn.scheduler.minimum-allocation-mb": 32,
        "yarn.scheduler.maximum-allocation-mb": memory,
        "yarn.scheduler.maximum-allocation-vcores": 128,
        "yarn.nodemanager.pmem-check-enabled": "true",
        # The NodeManager must enforce the limit. By default Hadoop 3.4 leaves it to cgroups, even
        # if it uses none (ContainersMonitorImpl.checkLimit).
        "yarn.nodemanager.resource.memory.enforced": "false",
        "yarn.nodemanager.vmem-check-enabled": "false",
        "yarn.nodemanager.aux-services": "spark_shuffle",
        "yarn.nodemanager.aux-services.spark_shuffle.class": "org.apache.spark.network.yarn.YarnShuffleService",
        "yarn.nodemanager.aux-services.spark_shuffle.classpath": shuffle_service(),
        "yarn.log-aggregation-enable": "true",
        "yarn.nodemanager.remote-app-log-dir": "/var/log/hadoop-yarn/apps",
        "yarn.nodemanager.delete.debug-delay-sec": 0,
        # By default a node takes no containers once this machine's disk is over 90% full.
        "yarn.nodemanager.disk-health-checker.max-disk-utilization-per-disk-percentage": 100,
        # By default ten minutes, during which a dead node's containers count as running.
        "yarn.nm.liveness-monitor.expiry-interval-ms": 20000,
        "yarn.resourcemanager.nm.liveness-monitor.interval-ms": 5000,
    }
    scheduler = {
        "yarn.scheduler.capacity.root.queues": "default",
        "yarn.scheduler.capacity.root.default.capacity": 100,
        "yarn.scheduler.capacity.maximum-am-resource-percent": 0.5,
        "yarn.scheduler.capacity.resource-calculator": f"org.apache.hadoop.yarn.util.resource.{calculator}",
    }
    return {
        "core-site": core,
        "hdfs-site": hdfs,
        "yarn-site": yarn,
        "capacity-scheduler": scheduler,
    }


def spark_settings() -> dict[str, str]:
    """EMR's defaults that stock Spark supports, overridden by docs/emr_cluster.json."""
    settings = {
        "spark.master": "yarn",
        "spark.dynamicAllocation.enabled": "true",
        "spark.shuffle.service.enabled": "true",
        "spark.eventLog.enabled": "true",
        "spark.eventLog.dir": "hdfs:///var/log/spark/apps",
        "spark.driver.memory": "2048M",
        "spark.executor.memory": "4743M",
        "spark.executor.cores": "2",
        "spark.hadoop.yarn.timeline-service.enabled": "false",
        # EMR's Spark uploads its 300 MB of jars to HDFS for each application; here every host has
        # them.
        "spark.yarn.jars": f"local:{spark_home()}/jars/*",
    }
    for part in json.loads(EMR.read_text())["Configurations"]:
        if part["Classification"] == "spark-defaults":
            settings.update(part["Properties"])
    settings["spark.pyspark.python"] = sys.executable  # EMR's hosts have their own
    return settings


def write_configuration(folder: Path, memory: int, cores: int, calculator: str) -> None:
    """Write FOLDER/hadoop (HADOOP_CONF_DIR), FOLDER/spark (SPARK_CONF_DIR) and FOLDER/on."""
    hadoop, spark = folder / "hadoop", folder / "spark"
    hadoop.mkdir(parents=True)
    spark.mkdir()
    for name, settings in hadoop_settings(folder, memory, cores, calculator).items():
        lines = [
            f"<property><name>{key}</name><value>{escape(str(value))}</value></property>"
            for key, value in settings.items()
        ]
        (hadoop / f"{name}.xml").write_text(
            "\n".join(["<configuration>", *lines, "</configuration>", ""])
        )
    (hadoop / "log4j.properties").write_text(LOG4J)
    # The servers do not start without these folders of web pages, which no jar has.
    for server in ("hdfs", "datanode"):
        (folder / "web" / "webapps" / server).mkdir(parents=True)
    lines = [f"{name} {value}" for name, value in spark_settings().items()]
    (spark / "spark-defaults.conf").write_text("\n".join([*lines, ""]))
    # EMR sets Python in the same file.
    (spark / "spark-env.sh").write_text(f"export PYSPARK_PYTHON={sys.executable}\n")
    java_home = Path(shutil.which("java")).resolve().parent.parent
    words = {
        "java_home": java_home,
        "hadoop": hadoop,
        "spark": spark,
        "bin": Path(sys.executable).parent,
    }
    quoted = {name: shlex.quote(str(word)) for name, word in words.items()}
    (folder / "on").write_text(
        ON.format(master=MASTER, tools=shlex.quote(server_classpath(folder)), **quoted)
    )
    (folder / "on").chmod(0o755)


def start_server(folder: Path, host: str, server: str, *words: str) -> subprocess.Popen:
    """Start a Hadoop server on a host; its log is in FOLDER/logs, its data in FOLDER/HOST."""
    (folder / "logs").mkdir(exist_ok=True)
    home = folder / host
    home.mkdir(exist_ok=True)
    options = {
        "datanode": {"dfs.datanode.data.dir": home / "data"},
        "nodemanager": {
            "yarn.nodemanager.address": f"{host}:8041",
            "yarn.nodemanager.localizer.address": f"{host}:8040",
            "yarn.nodemanager.webapp.address": f"{host}:8042",
            "yarn.nodemanager.local-dirs": home / "local",
            "yarn.nodemanager.log-dirs": home / "containers",
        },
    }
    settings = [
        word
        for name, value in options.get(server, {}).items()
        for word in ("-D", f"{name}={value}")
    ]
    command = [
        folder / "on",
        "--host",
        host,
        *JAVA,
        "-cp",
        server_classpath(folder),
        SERVERS[server],
    ]
    with (folder / "logs" / f"{host}-{server}.log").open("a") as log:
        return subprocess.Popen(
            [str(word) for word in (*command, *settings, *words)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def start_node(folder: Path, node: str) -> list[subprocess.Popen]:
    """Start those of a node's two servers that are not running."""
    return [
        start_server(folder, node, server)
        for server in ("datanode", "nodemanager")
        if not processes(node, SERVERS[server])
    ]


def kill_node(node: str) -> None:
    """Kill a node's servers and containers at once, like a power cut. start_node restarts it."""
    kill(processes(node))


def kill_server(node: str, server: str) -> None:
    """Kill one server of a node; its containers keep running."""
    kill(processes(node, SERVERS[server]))


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ask(path: str) -> dict:
    """The ResourceManager's answer to a path of its REST service; {} if there is none."""
    try:
        with urllib.request.urlopen(f"http://{address(MASTER)}:8088{path}", timeout=10) as reply:
            return json.load(reply)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return {}


def active_nodes() -> int:
    return ask("/ws/v1/cluster/metrics").get("clusterMetrics", {}).get("activeNodes", 0)


def start(
    folder: Path,
    nodes: int = 2,
    memory: int = 12288,
    cores: int = 4,
    calculator: str = "DefaultResourceCalculator",
) -> Cluster:
    """Start a cluster and wait for nodes and a writable HDFS. Raises StandInError if it fails."""
    folder = folder.resolve()
    if needs := missing_needs():
        raise StandInError(f"this machine lacks {', '.join(needs)}")
    if made_hosts():
        raise StandInError("a cluster is already running: stop it first")
    if folder.exists() and any(folder.iterdir()):
        raise StandInError(f"{folder} is not empty")
    cluster = Cluster(folder, [f"xrayyarn{number}" for number in range(2, nodes + 2)])
    write_configuration(folder, memory, cores, calculator)
    try:
        make_hosts([MASTER, *cluster.nodes])
        if start_server(folder, MASTER, "namenode", "-format", "-nonInteractive").wait():
            raise StandInError(f"the NameNode does not start: {folder}/logs says why")
        started = [
            start_server(folder, MASTER, "namenode"),
            start_server(folder, MASTER, "resourcemanager"),
        ]
        for node in cluster.nodes:
            started += start_node(folder, node)
        deadline = time.monotonic() + 120
        while active_nodes() < nodes:
            if any(server.poll() is not None for server in started):
                raise StandInError(f"a server has ended: {folder}/logs says why")
            if time.monotonic() > deadline:
                raise StandInError(f"no {nodes} active nodes after 120 s: {folder}/logs says why")
            time.sleep(1)
        cluster.run(
            "hdfs",
            "dfs",
            "-mkdir",
            "-p",
            "/var/log/spark/apps",
            "/var/log/hadoop-yarn/apps",
            "/user/root",
        )
    except BaseException:
        stop()
        raise
    return cluster


@contextlib.contextmanager
def running(folder: Path, **how: int) -> Iterator[Cluster]:
    """A cluster for as long as the block lasts."""
    cluster = start(folder, **how)
    try:
        yield cluster
    finally:
        stop()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("stop")
    how = actions.add_parser("start")
    how.add_argument("folder", type=Path)
    how.add_argument("--nodes", type=int, default=2, help="hosts besides the master [%(default)s]")
    how.add_argument(
        "--memory", type=int, default=12288, help="MB that each node declares [%(default)s]"
    )
    how.add_argument(
        "--cores", type=int, default=4, help="cores that each node declares [%(default)s]"
    )
    calculators = ["DefaultResourceCalculator", "DominantResourceCalculator"]
    how.add_argument(
        "--calculator", choices=calculators, default=calculators[0], help="YARN's [%(default)s]"
    )
    arguments = parser.parse_args()
    if arguments.action == "stop":
        stop()
        return 0
    try:
        settings = {"cores": arguments.cores, "calculator": arguments.calculator}
        cluster = start(arguments.folder, arguments.nodes, arguments.memory, **settings)
    except StandInError as error:
        print(f"hadoop.py: error: {error}", file=sys.stderr)
        return 1
    print(
        f"HADOOP_CONF_DIR={cluster.folder}/hadoop SPARK_CONF_DIR={cluster.folder}/spark on={cluster.command}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
