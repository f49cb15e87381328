"""Train a CNN on chest X-rays from S3 on one NVIDIA GPU or several: the second of three targets.

    pip install -r requirements.txt "tensorflow[and-cuda]"   (or `uv run xray_gpu.py`)
    cp credentials.example.yml credentials.yml               and fill in your AWS keys
    python xray_gpu.py

This one file is all that a machine needs. It reads NIH ChestX-ray14's label CSV and PNGs from the
bucket, splits them by patient, trains MobileNet on the 15 labels and writes history, predictions,
metrics, model.keras and report.png to runs/, and to S3 with `--output s3://BUCKET/PREFIX`. The last
line on stdout is the result as one line of JSON. An interrupted run goes on with the same options
and `--resume --output ITS_FOLDER`. Without a bucket: `python tests/sample_bucket.py xray_gpu.py`.

How it differs from xray_tensorflow.py, whose data, split, CNN, metrics and clock it shares (they
come after what is special to this script): it takes every GPU that TensorFlow sees (several by
MirroredStrategy, --batch-size images each), computes in mixed precision from compute capability 7.0
on, compiles by XLA on one GPU, and stops where there is no GPU instead of training on the CPU.
g3s.xlarge (Tesla M60, capability 5.2) needs `pip install "tensorflow[and-cuda]==2.16.2"`. Not yet
measured on a GPU.

Not a medical device. Data: NIH Clinical Center, https://nihcc.app.box.com/v/ChestXray-NIHCC;
Wang et al., CVPR 2017.
"""

# /// script
# requires-python = ">=3.9,<3.13"
# dependencies = [
#   "tensorflow[and-cuda]==2.19.1",
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
#   "tqdm==4.67.1",
#   "matplotlib==3.9.4",
# ]
# ///

import argparse
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
import os
import queue
import re
import resource
import shutil
import signal
import sqlite3
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NoReturn, Optional

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

# ---- target: GPU ----


def main() -> None:
    parser = common_parser(__doc__)
    precisions = ["auto", "float32", "mixed_float16"]
    parser.add_argument(
        "--precision", choices=precisions, default="auto", help="of the computation [%(default)s]"
    )
    arguments = parser.parse_args()
    seconds: dict[str, float] = {}
    with timed(seconds, "setup"):
        strategy, target = set_up_gpus(arguments.precision)
    credentials = read_credentials(arguments.credentials)
    with RunFolder(arguments, credentials) as run:
        with timed(seconds, "ingest"):
            client = connect(credentials, arguments.bucket)
            table = select_images(client, arguments)
        # Adam's state fits one precision alone, and the replicas decide what a step is made of.
        decisive = {name: target[name] for name in ("precision", "replicas")}
        run.check_resumed(table, target=decisive)
        with timed(seconds, "setup"), strategy.scope():
            model = build_cnn(arguments, labels_by_split(table)["train"], xla=target["xla"])
            history = run.restore(model)
        with timed(seconds, "ingest"):
            table, pixels, cached = ingest(credentials, arguments, table)
        run.begin(table, table["reason"][table["split"] == "skipped"].to_dict())
        traced = [1, len(history) + 1]
        trainer = ReplicaTrainer(
            KerasTrainer(model, pixels, table, arguments, target["replicas"]), strategy
        )
        history = train_epochs(trainer, run, history, table, arguments.epochs)
        with timed(seconds, "evaluate"):
            run.load_best(model, history)
            report = evaluate(run.path, table, trainer.predict, arguments.seed)
        measured = {"seconds": seconds, "from_cache": cached, "traced": traced, "target": target}
        write_result(run.path, model, table, report, history, measured)


def set_up_gpus(precision: str) -> tuple[Any, dict]:
    """The strategy (for one GPU the default) and the result's `target`.

    Raises UserError where no GPU can be used.
    """
    tf = import_tensorflow()
    import keras

    devices = tf.config.list_physical_devices("GPU")
    gpus = [tf.config.experimental.get_device_details(device) for device in devices]
    check_gpus(gpus, tf.__version__)
    for device in devices:
        tf.config.experimental.set_memory_growth(device, True)
    policy = choose_precision(precision, gpus)
    keras.config.set_dtype_policy(policy)
    target = {
        "gpus": [gpu["device_name"] for gpu in gpus],
        "compute_capability": [".".join(map(str, gpu["compute_capability"])) for gpu in gpus],
        "driver": driver_version(),
        "precision": policy,
        "xla": len(gpus) == 1,  # Keras does not compile the steps of a strategy
        "replicas": len(gpus),
    }
    strategy = tf.distribute.MirroredStrategy() if len(gpus) > 1 else tf.distribute.get_strategy()
    return strategy, target


def check_gpus(gpus: list[dict], tensorflow: str) -> None:
    """Raise UserError unless there is a GPU and TensorFlow `tensorflow` has kernels for each.

    `gpus` are TensorFlow's device details: {"device_name": str, "compute_capability": (major,
    minor)}.
    """
    if not gpus:
        fix = 'check nvidia-smi, CUDA_VISIBLE_DEVICES and pip install "tensorflow[and-cuda]"'
        raise UserError(
            f"TensorFlow {tensorflow} sees no NVIDIA GPU: {fix}; this never trains on a CPU"
        )
    release = tuple(map(int, tensorflow.split(".")[:2]))
    for gpu in gpus:
        # Wheels from 2.17 on have no kernels below 6.0 (release notes); the Tesla M60 of g3s.xlarge
        # has 5.2.
        if gpu["compute_capability"] < (6, 0) and release >= (2, 17):
            capability = ".".join(map(str, gpu["compute_capability"]))
            raise UserError(
                f"{gpu['device_name']} has compute capability {capability}, "
                f"TensorFlow {tensorflow} needs 6.0: pip install 'tensorflow[and-cuda]==2.16.2'"
            )


def choose_precision(wanted: str, gpus: list[dict]) -> str:
    """The Keras dtype policy.

    auto: mixed_float16 where every GPU has tensor cores, which came with compute capability 7.0.
    """
    if wanted != "auto":
        return wanted
    tensor_cores = all(gpu["compute_capability"] >= (7, 0) for gpu in gpus)
    return "mixed_float16" if tensor_cores else "float32"


def driver_version() -> Optional[str]:
    """The NVIDIA driver's version; None where Linux does not tell."""
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text().split() if path.exists() else []
    return next((word for word in words if word[0].isdigit()), None)


class ReplicaTrainer:
    """A KerasTrainer whose model is mirrored on the GPUs of `strategy`."""

    def __init__(self, trainer: "KerasTrainer", strategy: Any) -> None:
        self.model = trainer.model
        self.predict = trainer.predict
        self._trainer = trainer
        self._strategy = strategy

    def fit_epoch(self, epoch: int) -> float:
        loss = self._trainer.fit_epoch(epoch)
        average_statistics(self.model, self._strategy)
        return loss


def average_statistics(model: Any, strategy: Any) -> None:
    """Give every replica the mean of all replicas' moving statistics.

    In Keras 3 each replica keeps its own, and one of them is saved.
    """
    import tensorflow as tf

    for variable in model.non_trainable_variables:
        if "moving" in variable.name:
            values = strategy.experimental_local_results(variable.value)
            variable.assign(tf.reduce_mean(tf.stack(values), axis=0))


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
FETCH_THREADS = 32  # of a process: a GET takes about 50 ms, an image 5 to 14 ms of a core
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

    items = iter(keys.items())
    # Threads wait at a full queue: they share Python's lock with the caller, and would leave it
    # further and further behind.
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
# ---- common to the scripts of one machine: begin ----
# ==== pixel cache and ingest ====


WORTH_A_PROCESS = 1000  # images: 7 s of fetching and decoding, where its start takes 1.5


def ingest(
    credentials: dict[str, str], arguments: argparse.Namespace, table: pd.DataFrame
) -> tuple[pd.DataFrame, np.ndarray, int]:
    """The table with a column reason, pixels (n, size, size) uint8 of its rows, and how many were
    cached.

    An unreadable image has a reason, and "skipped" as its split. Raises UserError where too many
    are unreadable, S3 or the cache fails, or the pixels are more than the memory.
    """
    size = arguments.image_size
    if len(table) * size**2 > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise UserError(
            f"{len(table)} images of {size} x {size} are more than this machine's memory: "
            "use --limit"
        )
    pixels = np.empty((len(table), size, size), np.uint8)
    source = f"{s3_client(credentials).meta.endpoint_url}/{arguments.bucket}"
    skipped: dict[int, str] = {}
    with open_cache(Path(arguments.cache, "pixels.sqlite")) as cache:
        is_cached = read_cache(cache, source, table, pixels)
        missing = table["key"][~is_cached].to_dict()
        cached = len(table) - len(missing)
        groups = fetch_groups(credentials, arguments.bucket, missing, size)
        progress = tqdm(desc="radiographs", total=len(table), unit="", initial=cached)
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
    table = table.assign(reason=[skipped.get(row, "") for row in table.index])
    table.loc[list(skipped), "split"] = "skipped"
    check_splits(table, arguments.batch_size)
    return table, pixels, cached


@contextlib.contextmanager
def open_cache(path: Path) -> Iterator[sqlite3.Connection]:
    """The cache of decoded pixels, which several runs may use at once.

    Raises UserError, in the block too, where it is damaged or its disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as cache:
            # Readers beside a writer, and no fsync for each group of images.
            cache.execute("PRAGMA journal_mode = WAL")
            cache.execute("PRAGMA synchronous = NORMAL")
            cache.execute(
                "CREATE TABLE IF NOT EXISTS pixels (source TEXT, key TEXT, size INTEGER, "
                "etag TEXT, crc INTEGER, pixels BLOB, PRIMARY KEY (source, key, size))"
            )
            yield cache
    except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite may quote damaged text
        raise UserError(
            f"the pixel cache {path} fails ({error}): check disk space and rights, or delete it"
        ) from None


def read_cache(
    cache: sqlite3.Connection, source: str, table: pd.DataFrame, pixels: np.ndarray
) -> np.ndarray:
    """Put what is cached into `pixels` (n, size, size), rows as in the table; which rows those are:
    bool (n,).
    """
    is_cached = np.zeros(len(table), bool)
    entries = zip(table["key"].str.encode("utf-8"), table["etag"].str.encode("utf-8"))
    rows = {entry: row for row, entry in enumerate(entries)}
    # As bytes, since damaged text need not be UTF-8. Other runs' pixels are not read.
    cache.create_function("row_of", 2, lambda key, etag: rows.get((key, etag)))
    # In the order of the file, which takes SQLite half as long as a query for each image.
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
    """What fetch_images yields, in groups, from a process for each core.

    Few images, or those of one core, are fetched by this process. Raises UserError when S3 fails or
    a process is killed.
    """
    count = min(len(os.sched_getaffinity(0)), len(keys) // WORTH_A_PROCESS)
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
                except (EOFError, OSError):  # the process has ended, perhaps amid a group
                    check_ended(processes.pop(pipe))
                    continue
                if isinstance(group, str):
                    raise UserError(group)
                yield group
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def in_groups(arrivals: Iterator[tuple]) -> Iterator[list[tuple]]:
    """Lists of what came in a tenth of a second each: this is what a kill can lose."""
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
    """A process for each share of the keys, by the pipe that its groups come from."""
    context = multiprocessing.get_context("spawn")  # TensorFlow's threads and CUDA survive no fork
    processes = {}
    # Ctrl-C reaches all processes of a terminal. They inherit that they ignore it: this one ends
    # them.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for share in shares:
        pipe, its_end = context.Pipe(duplex=False)
        work = (its_end, credentials, bucket, share, size)
        processes[pipe] = context.Process(target=send_images, args=work, daemon=True)
        processes[pipe].start()
        its_end.close()  # the process has the only one left: the pipe ends with it
    signal.signal(signal.SIGINT, handler)
    return processes


def send_images(
    pipe: Any, credentials: dict[str, str], bucket: str, keys: dict[int, str], size: int
) -> None:
    """Send groups of images, or, as text, why S3 fails; a full pipe holds the requests up.

    This process ends with its parent, even one that is killed.
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
    """Raise UserError for a process that was killed, RuntimeError for one that failed."""
    process.join()
    if process.exitcode < 0:
        raise UserError(
            f"a process that fetches images was killed by signal {-process.exitcode}, as Linux does "
            "when memory runs out: end other programs, then start again"
        )
    if process.exitcode:
        raise RuntimeError("a process that fetches images failed: its traceback stands above")


# ==== training with Keras ====


class KerasTrainer:
    """Trains and predicts with a compiled Keras model on pixels (n, size, size) in memory, a row of
    `table` each.

    A step takes --batch-size images for each of `replicas`.
    """

    def __init__(
        self,
        model: Any,
        pixels: np.ndarray,
        table: pd.DataFrame,
        arguments: argparse.Namespace,
        replicas: int = 1,
    ) -> None:
        self.model = model
        self._pixels = pixels
        self._labels = table[LABELS].to_numpy(np.float32)
        self._rows = {split: np.flatnonzero(table["split"] == split) for split in SPLITS}
        self._arguments = arguments
        self._replicas = replicas
        self._batch_size = arguments.batch_size * replicas

    def fit_epoch(self, epoch: int) -> float:
        """Train one epoch; its mean loss."""
        import keras

        class OneEpoch(keras.callbacks.Callback):
            """Ends the fit, which is told of all epochs to show the number of this one among
            them.
            """

            def on_epoch_end(self, epoch: int, logs: Optional[dict] = None) -> None:
                self.model.stop_training = True

        # Order, flips and dropout follow from seed and epoch alone: a resumed run draws what an
        # unbroken one draws.
        seeds = [self._arguments.seed, epoch]
        order = np.random.default_rng(seeds).permutation(self._rows["train"])
        # A last batch without an image for each replica would leave one with nan for statistics.
        order = order[: len(order) // self._replicas * self._replicas]
        flips = draw_flips(self._arguments, epoch, len(self._labels))
        self.model.get_layer("dropout").seed_generator.state.assign(seeds)
        trained = self.model.fit(
            batches(self._pixels, self._labels, order, self._batch_size, flips),
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
        # As in training, each replica needs an image of the last batch: the last one is repeated.
        whole = np.pad(rows, (0, -len(rows) % self._replicas), mode="edge")
        data = batches(self._pixels, self._labels, whole, self._batch_size)
        return self.model.predict(data, verbose=0)[: len(rows)]


# ---- common to the scripts of one machine: end ----


if __name__ == "__main__":  # main stands at the top, below the imports
    sys.exit(run_script(main))
