"""Train a CNN on chest X-rays from S3 on one CPU thread: the sequential baseline of three targets.

    pip install -r requirements.txt              (or `uv run xray_tensorflow.py`)
    cp credentials.example.yml credentials.yml   and fill in your AWS keys
    python xray_tensorflow.py

The script is self-contained. It reads NIH ChestX-ray14's label CSV and PNGs from the bucket, splits
them by patient, trains MobileNet on the 15 labels and writes history, predictions, metrics,
model.keras and report.png to runs/, and to S3 with `--output s3://BUCKET/PREFIX`. The last line on
stdout is the result as JSON. To continue an interrupted run, repeat its options with `--resume
--output ITS_FOLDER`. Without a bucket: `python tests/sample_bucket.py xray_tensorflow.py`.

Its siblings: xray_gpu.py trains on GPUs, xray_elephas.py on Spark through Elephas. The code for the
target comes first; data, split, CNN, metrics and clock follow, the same code in all three. This
script pins the whole process, decoding included, to one core (`--threads N` for more), so its
images per second are those of one thread.

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
#   "tqdm==4.67.1",
#   "matplotlib==3.10.9",
# ]
# ///

import argparse
import codecs
import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import queue
import re
import resource
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import uuid
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NoReturn, Protocol, TextIO

import boto3
import botocore.exceptions
import numpy as np
import pandas as pd
import scipy.stats
import sklearn.metrics
import yaml
from botocore.config import Config
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

# ---- target: one CPU thread ----


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument(
        "--threads", metavar="N", type=number(int, 1), default=1, help="CPU threads [%(default)s]"
    )
    arguments = parser.parse_args()
    pinned = pin_to_cores(arguments.threads)
    credentials = read_credentials(arguments.credentials)
    run = Run(arguments, credentials)
    with run.timed("ingest"):
        table = select_images(connect(credentials, arguments), arguments)
    run.check(table, {"threads": arguments.threads})
    with run.timed("setup"):
        limit_tensorflow(arguments.threads)
        model = build_cnn(arguments, labels_by_split(table)["train"])
    with run.timed("ingest"):
        table, pixels, cached = ingest(credentials, arguments, table)
    run.open(table, model)
    labels = table[LABELS].to_numpy(np.float32)
    feed = functools.partial(batches, pixels, labels, batch_size=arguments.batch_size)
    trainer = KerasTrainer(model, feed, table, arguments)
    train_epochs(trainer, run)
    report = evaluate(trainer, run)
    run.finish(report, {"threads": arguments.threads, "pinned_to_cores": pinned}, cached)


def pin_to_cores(threads: int) -> bool:
    """Pin the process and all its threads to `threads` cores; return whether the system can.

    macOS cannot. Raises UserError if there are fewer cores.
    """
    cores = usable_cores()
    if threads > len(cores):
        raise UserError(f"--threads {threads} is more than this machine's {len(cores)} cores")
    if not hasattr(os, "sched_setaffinity"):
        problem = "this system cannot pin a process to a core: images are decoded on all cores"
        print(f"warning: {problem}", file=sys.stderr)
        return False
    # New threads inherit the cores, but numpy started its threads at import.
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores[-threads:])
    return True


def limit_tensorflow(threads: int) -> None:
    """Limit TensorFlow to `threads` threads per pool, and hide the GPU from it."""
    tf = import_tensorflow()
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    tf.config.set_visible_devices([], "GPU")


# ---- common to the scripts of one machine: begin ----
# ==== ingest: fetch, decode, keep in the cache ====

WORTH_A_PROCESS = 1000  # images, fetched and decoded in 7 s; a process starts in 1.5 s


def ingest(
    credentials: dict[str, str], arguments: argparse.Namespace, table: pd.DataFrame
) -> tuple[pd.DataFrame, np.ndarray, int]:
    """Get the table's images from the cache, or from S3 into the cache.

    Returns the table, where an unreadable image has the split "skipped" and a reason, the pixels
    (n, size, size) uint8 of its rows, and the number of images from the cache. Raises UserError if
    too many are unreadable, S3 or the cache fails, or the pixels do not fit into memory.
    """
    size = arguments.image_size
    if len(table) * size**2 > memory_limit():
        problem = f"{len(table)} images of {size} x {size} do not fit into the memory"
        raise UserError(f"{problem} of this machine or container: use --limit")
    pixels = np.empty((len(table), size, size), np.uint8)
    source = f"{s3_client(credentials).meta.endpoint_url}/{arguments.bucket}"
    skipped: dict[int, str] = {}
    with open_cache(Path(arguments.cache, "pixels.sqlite")) as cache:
        is_cached = read_cache(cache, source, table, pixels)
        missing = table["key"][~is_cached].to_dict()
        cached = len(table) - len(missing)
        groups = fetch_groups(credentials, arguments.bucket, missing, size)
        progress = tqdm(desc="images", total=len(table), unit="", initial=cached)
        with contextlib.closing(groups), progress:
            for group in groups:
                images = {row: image for row, image, _ in group if image is not None}
                store(cache, source, table.loc[list(images)], images)
                progress.update(len(group))
                for row, image, reason in group:
                    if image is None:
                        skipped[row] = reason
                        check_skipped(skipped, table, arguments.max_skipped)
                    else:
                        pixels[row] = image
    return leave_out(skipped, table, arguments.batch_size), pixels, cached


@contextlib.contextmanager
def open_cache(path: Path) -> Iterator[sqlite3.Connection]:
    """The cache of decoded pixels, which several runs may use at once.

    Raises UserError, in the block too, if it is damaged or its disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as cache:
            # Readers next to a writer, and no fsync per group of images.
            cache.execute("PRAGMA journal_mode = WAL")
            cache.execute("PRAGMA synchronous = NORMAL")
            cache.execute(
                "CREATE TABLE IF NOT EXISTS pixels (source TEXT, key TEXT, size INTEGER, "
                "etag TEXT, crc INTEGER, pixels BLOB, PRIMARY KEY (source, key, size))"
            )
            yield cache
    except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite may quote damaged text
        raise UserError(
            f"cannot use the cache {path} ({error}): check disk and permissions, or delete it"
        ) from None


def read_cache(
    cache: sqlite3.Connection, source: str, table: pd.DataFrame, pixels: np.ndarray
) -> np.ndarray:
    """Read cached images into `pixels` (n, size, size); return which rows those are: bool (n,)."""
    is_cached = np.zeros(len(table), bool)
    entries = zip(table["key"].str.encode("utf-8"), table["etag"].str.encode("utf-8"))
    rows = {entry: row for row, entry in enumerate(entries)}
    # As bytes, since damaged text may not be UTF-8. Other runs' pixels are not read.
    cache.create_function("row_of", 2, lambda key, etag: rows.get((key, etag)))
    # One scan in file order takes SQLite half as long as a query per image.
    hits = cache.execute(
        "SELECT row_of(CAST(key AS BLOB), CAST(etag AS BLOB)) AS row, crc, CAST(pixels AS BLOB) "
        "FROM pixels NOT INDEXED WHERE source = ? AND size = ? AND row IS NOT NULL",
        (source, pixels.shape[1]),
    )
    for row, crc, data in hits:
        if data and crc == zlib.crc32(data):
            pixels[row] = np.frombuffer(data, np.uint8).reshape(pixels.shape[1:])
            is_cached[row] = True
    return is_cached


def store(
    cache: sqlite3.Connection, source: str, table: pd.DataFrame, images: dict[int, np.ndarray]
) -> None:
    """Store the images of the rows of `table`, all of them or none."""
    data = [image.tobytes() for image in images.values()]
    sizes = [len(image) for image in images.values()]
    columns = table["key"], sizes, table["etag"], map(zlib.crc32, data), data
    with cache:
        cache.executemany(
            "INSERT OR REPLACE INTO pixels VALUES (?, ?, ?, ?, ?, ?)",
            zip(itertools.repeat(source), *columns),
        )


def fetch_groups(
    credentials: dict[str, str], bucket: str, keys: dict[int, str], size: int
) -> Generator[list[tuple], None, None]:
    """Groups of what fetch_images yields, from one process per core.

    With few images or one core this process fetches them. Raises UserError if S3 fails or a process
    is killed.
    """
    count = min(len(usable_cores()), len(keys) // WORTH_A_PROCESS)
    if count < 2:
        yield from in_groups(fetch_images(s3_client(credentials), bucket, keys, size))
        return
    shares = [dict(itertools.islice(keys.items(), n, None, count)) for n in range(count)]
    processes = start_processes(credentials, bucket, shares, size)
    try:
        while processes:
            ready: list[Any] = multiprocessing.connection.wait(list(processes))
            for pipe in ready:
                try:
                    group = pipe.recv()
                except (EOFError, OSError):  # the process has ended, maybe in mid-group
                    check_ended(processes.pop(pipe))
                    continue
                if isinstance(group, str):
                    raise UserError(group)
                yield group
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def usable_cores() -> list[int]:
    """The numbers of the cores that this process may use; on macOS all cores."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def in_groups(arrivals: Iterator[tuple]) -> Iterator[list[tuple]]:
    """Lists of what arrives in about a tenth of a second, so that a kill loses little."""
    group = []
    begun = time.monotonic()
    for arrival in arrivals:
        group.append(arrival)
        if time.monotonic() - begun > 0.1:
            yield group
            group = []
            begun = time.monotonic()
    yield group


def start_processes(
    credentials: dict[str, str], bucket: str, shares: list[dict[int, str]], size: int
) -> dict[Any, Any]:
    """Start a process for each share of the keys; return the processes by their pipes."""
    context = multiprocessing.get_context("spawn")  # fork breaks TensorFlow's threads and CUDA
    processes = {}
    # Ctrl-C reaches every process of a terminal. These inherit a mask that blocks it: this one ends
    # them. A thread of NumPy may still get it here: then the handler records it for later.
    presses: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: presses.append(number))
    multiprocessing.resource_tracker.ensure_running()  # its start unblocks Ctrl-C
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    for share in shares:
        pipe, its_end = context.Pipe(duplex=False)
        work = (its_end, credentials, bucket, share, size)
        processes[pipe] = context.Process(target=send_images, args=work, daemon=True)
        processes[pipe].start()
        its_end.close()  # now only the process has it: the pipe ends with it
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal.signal(signal.SIGINT, handler)
    if presses:
        raise KeyboardInterrupt  # the processes are daemons: multiprocessing ends them at exit
    return processes


def send_images(
    pipe: Any, credentials: dict[str, str], bucket: str, keys: dict[int, str], size: int
) -> None:
    """Send groups of images, or S3's failure as text; a full pipe pauses the requests.

    This process ends with its parent, even if that is killed.
    """
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        for group in in_groups(fetch_images(s3_client(credentials), bucket, keys, size)):
            pipe.send(group)
    except UserError as error:
        pipe.send(str(error))
    except BrokenPipeError:  # the parent has been killed
        os._exit(1)


def end_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)


def check_ended(process: Any) -> None:
    """Raise UserError if a process was killed, RuntimeError if it failed."""
    process.join()
    if process.exitcode < 0:
        raise UserError(
            f"a process that fetches images was killed by signal {-process.exitcode}, as Linux "
            "does when memory runs out: close other programs, then start again"
        )
    if process.exitcode:
        raise RuntimeError("a process that fetches images failed: see its traceback above")


# ==== training with Keras ====


class KerasTrainer:
    """Trains and predicts with a compiled Keras model.

    `feed(rows, flips=None)` gives Keras the images of these rows of `table` in batches, and may add
    images at the end; `flips` says which images of the table to mirror.
    """

    def __init__(
        self,
        model: Any,
        feed: Callable[..., Any],
        table: pd.DataFrame,
        arguments: argparse.Namespace,
    ) -> None:
        self.model = model
        self._feed = feed
        self._images = len(table)
        self._rows = {split: np.flatnonzero(table["split"] == split) for split in SPLITS}
        self._arguments = arguments

    def fit_epoch(self, epoch: int) -> float:
        """Train one epoch; its mean loss."""
        import keras

        class OneEpoch(keras.callbacks.Callback):
            """Ends the fit after one epoch; Keras still shows, say, 3/5."""

            def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
                self.model.stop_training = True

        # Order, flips and dropout depend only on seed and epoch: a resumed run draws the same as an
        # unbroken one.
        seeds = [self._arguments.seed, epoch]
        order = np.random.default_rng(seeds).permutation(self._rows["train"])
        flips = draw_flips(self._arguments, epoch, self._images)
        self.model.get_layer("dropout").seed_generator.state.assign(seeds)
        trained = self.model.fit(
            self._feed(order, flips=flips),
            callbacks=[OneEpoch()],
            shuffle=False,
            epochs=self._arguments.epochs,
            initial_epoch=epoch - 1,
            verbose=1 if sys.stdout.isatty() else 2,
        )
        return trained.history["loss"][0]

    def predict(self, split: str) -> np.ndarray:
        """Probabilities (n, 15) of the images of a split, in the order of the table."""
        rows = self._rows[split]
        return self.model.predict(self._feed(rows), verbose=0)[: len(rows)]


# ---- common to the scripts of one machine: end ----
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
