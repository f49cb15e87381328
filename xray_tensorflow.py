"""Train a CNN on chest X-rays from S3 on one CPU thread: the sequential baseline of three targets.

    pip install -r requirements.txt              (or `uv run xray_tensorflow.py`, which reads the versions below)
    cp credentials.example.yml credentials.yml   and fill in your AWS keys
    python xray_tensorflow.py

This one file is all that a machine needs. It reads NIH ChestX-ray14's label CSV and PNGs from the bucket, splits them
by patient, trains MobileNet on the 15 labels and writes history, predictions, metrics, model.keras and report.png to
runs/. The last line on stdout is the result as one line of JSON. An interrupted run goes on with the same options
and `--resume --output ITS_FOLDER`. Without a bucket: `python tests/sample_bucket.py xray_tensorflow.py`.

How it differs: xray_gpu.py trains on GPUs, xray_elephas.py on Spark through Elephas; data, split, CNN, metrics and
clock are the same code in the three, and what follows "target" differs. This script holds the whole process to one
core (`--threads N` for more), decoding included, so that its images per second are what one thread does.

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
# ]
# ///

import argparse
import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import os
import resource
import shutil
import sqlite3
import sys
import time
import zlib
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
from tqdm import tqdm

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
# ---- common to the scripts of one machine: begin ----
# ==== pixel cache and ingest ====


def open_cache(path: Path) -> sqlite3.Connection:
    """The cache of decoded pixels. An image is a transaction: a killed process loses at most the one in hand."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cache = sqlite3.connect(path, timeout=60, isolation_level=None)
    cache.execute("PRAGMA journal_mode = WAL")  # several scripts at once, and no fsync for each image
    cache.execute("PRAGMA synchronous = NORMAL")
    columns = "source TEXT, key TEXT, size INTEGER, etag TEXT, crc INTEGER, pixels BLOB"
    cache.execute(f"CREATE TABLE IF NOT EXISTS pixels ({columns}, PRIMARY KEY (source, key, size))")
    return cache


def set_aside(path: Path) -> None:
    """Rename a damaged cache, and say so. Its log goes with it: SQLite would replay that into the next cache."""
    aside = path.with_name(f"damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{path.name}")
    for ending in ("", "-wal", "-shm"):
        if Path(f"{path}{ending}").exists():
            Path(f"{path}{ending}").rename(f"{aside}{ending}")
    print(f"{path} is damaged or no pixel cache: it is now {aside}, and a new cache is made", flush=True)


def ingest(client: Any, arguments: argparse.Namespace, table: pd.DataFrame) -> tuple[np.ndarray, dict[int, str], int]:
    """What fill_pixels gives; a cache that is damaged is set aside, and all is fetched again."""
    path = Path(arguments.cache, "pixels.sqlite")
    try:
        return fill_pixels(client, arguments, table, path)
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # SQLite may quote the damage
        if isinstance(error, (sqlite3.OperationalError, sqlite3.ProgrammingError)):
            raise  # a full disk, no rights: no fault of the file
    set_aside(path)
    return fill_pixels(client, arguments, table, path)


def fill_pixels(
    client: Any, arguments: argparse.Namespace, table: pd.DataFrame, path: Path
) -> tuple[np.ndarray, dict[int, str], int]:
    """Pixels (n, size, size) uint8 of all rows, {row: reason} of the unreadable ones, and how many were cached."""
    size, bucket = arguments.image_size, arguments.bucket
    if len(table) * size**2 > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise UserError(f"{len(table)} images of {size} x {size} are more than this machine's memory: use --limit")
    pixels, skipped, missing = np.empty((len(table), size, size), np.uint8), {}, {}
    source = f"{client.meta.endpoint_url}/{bucket}"
    with contextlib.closing(open_cache(path)) as cache:
        # The text is compared by SQLite, and the cast is for damage too: Python would fail on text that is not UTF-8.
        what = "crc, CAST(pixels AS BLOB) FROM pixels WHERE source = ? AND key = ? AND size = ? AND etag = ?"
        for row, (key, etag) in enumerate(zip(table["key"], table["etag"])):
            hit = cache.execute(f"SELECT {what}", (source, key, size, etag)).fetchone()
            if hit and hit[1] and hit[0] == zlib.crc32(hit[1]):
                pixels[row] = np.frombuffer(hit[1], np.uint8).reshape(size, size)
            else:
                missing[row] = key
        cached = len(table) - len(missing)
        arrivals = fetch_images(client, bucket, missing, size)
        for row, image, reason in tqdm(arrivals, "radiographs", len(table), unit="", initial=cached):
            if image is None:
                skipped[row] = reason
                check_skipped(skipped, table, arguments.max_skipped)
                continue
            pixels[row] = image
            entry = (source, missing[row], size, table["etag"][row], zlib.crc32(image), image.tobytes())
            cache.execute("INSERT OR REPLACE INTO pixels VALUES (?, ?, ?, ?, ?, ?)", entry)
    table.loc[list(skipped), "split"] = "skipped"
    check_splits(table, arguments.batch_size)
    return pixels, skipped, cached


# ==== training with Keras ====


def training_steps(
    model: Any, pixels: np.ndarray, table: pd.DataFrame, arguments: argparse.Namespace, replicas: int = 1
) -> tuple:
    """`fit_epoch` and `predict` for train_epochs and evaluate, with --batch-size images a replica and step."""
    import keras

    truth = table[LABELS].to_numpy(np.float32)
    rows = {split: np.flatnonzero(table["split"] == split) for split in SPLITS}
    batch_size = arguments.batch_size * replicas

    def fit_epoch(epoch: int) -> float:
        # Order and dropout follow from seed and epoch alone: a resumed run draws what an unbroken one draws.
        order = np.random.default_rng([arguments.seed, epoch]).permutation(rows["train"])
        model.get_layer("dropout").seed_generator.state.assign([arguments.seed, epoch])
        data = batches(pixels, truth, order, batch_size)
        one_epoch = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: setattr(model, "stop_training", True))
        shown = {"epochs": arguments.epochs, "initial_epoch": epoch - 1, "verbose": 1 if sys.stdout.isatty() else 2}
        return model.fit(data, callbacks=[one_epoch], shuffle=False, **shown).history["loss"][0]

    def predict(split: str) -> np.ndarray:
        return model.predict(batches(pixels, truth, rows[split], batch_size), verbose=0)

    return fit_epoch, predict


# ---- common to the scripts of one machine: end ----
# ---- target: one CPU thread ----


def hold_to_cores(threads: int) -> None:
    """Hold the process and all its threads to `threads` cores."""
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("this system cannot hold a process to a core: run on Linux (macOS: in a container)")
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise UserError(f"--threads {threads} is more than the {len(cores)} cores of this machine: use fewer")
    # A new thread has the cores of its maker, but those that numpy started at its import have all of them.
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores[-threads:])


def limit_tensorflow(threads: int) -> None:
    """Give TensorFlow's pools `threads` threads, and no GPU, which it would take unasked."""
    tf = import_tensorflow()
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    tf.config.set_visible_devices([], "GPU")


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--threads", metavar="N", type=number(int, 1), default=1, help="CPU threads [%(default)s]")
    arguments = parser.parse_args()
    seconds: dict[str, float] = {}
    hold_to_cores(arguments.threads)
    with timed(seconds, "ingest"):
        client = connect(read_credentials(arguments.credentials), arguments.bucket)
        table = select_images(client, arguments)
    folder, config = open_run(arguments, table)
    with timed(seconds, "setup"):
        limit_tensorflow(arguments.threads)
        model = build_cnn(arguments, truth_by_split(table)["train"])
        before = restore(model, folder, arguments.epochs)
    with timed(seconds, "ingest"):
        pixels, skipped, cached = ingest(client, arguments, table)
    begin_run(folder, config, table, skipped)
    fit_epoch, predict = training_steps(model, pixels, table, arguments)
    history = train_epochs(model, folder, before, arguments.epochs, truth_by_split(table), fit_epoch, predict)
    with timed(seconds, "evaluate"):
        report = evaluate(folder, table, predict, arguments.seed)
    measured = {"seconds": seconds, "from_cache": cached, "traced": [1, len(before) + 1]}
    measured["target"] = {"threads": arguments.threads}
    write_result(folder, model, table, report, history, measured)


if __name__ == "__main__":
    sys.exit(run_script(main))
