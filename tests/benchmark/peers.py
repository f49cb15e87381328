"""What benchmark.py measures, each in its own process, pinned to its cores and working on demand.

The processes stay alive and run alternately, so the figures of a round are close in time.
"""

from __future__ import annotations

import functools
import io
import itertools
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LABELS = 15


class Peer(NamedTuple):
    """A program to measure: `prepare(arguments, images)` returns a call that processes them."""

    prepare: Callable[[Namespace, int], Callable[[], Any]]
    arguments: Namespace
    images: int


class Turn(NamedTuple):
    """The speed of one call, and its processor time per image in milliseconds."""

    images_per_second: float
    milliseconds: float


def made_up(arguments: Namespace, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Random pixels uint8 (images, size, size) and labels float32 (images, 15).

    Their content does not affect the speed.
    """
    random, size = np.random.default_rng(0), arguments.image_size
    return random.integers(0, 256, (images, size, size), np.uint8), random.random(
        (images, LABELS), np.float32
    ).round()


def our_training(arguments: Namespace, images: int) -> Callable[[], Any]:
    """An epoch of xray_tensorflow.py."""
    import pandas as pd

    import xray_tensorflow as xray

    xray.limit_tensorflow(arguments.threads)
    pixels, truth = made_up(arguments, images)
    table = pd.DataFrame(truth, columns=xray.LABELS).assign(split="train")
    feed = functools.partial(xray.batches, pixels, truth, batch_size=arguments.batch_size)
    trainer = xray.KerasTrainer(xray.build_cnn(arguments, truth), feed, table, arguments)
    epochs = itertools.count(1)
    return lambda: trainer.fit_epoch(next(epochs))


def stock_keras(arguments: Namespace, images: int) -> Callable[[], Any]:
    """An epoch of the same CNN with Keras' unchanged layers, a step at a time.

    Compiled as Keras' guides recommend.
    """
    model, pixels, truth = stock_model(arguments, images)

    def epoch() -> None:
        order = np.random.default_rng(0).permutation(images)
        for rows in np.split(order, range(arguments.batch_size, images, arguments.batch_size)):
            model.train_on_batch(pixels[rows], truth[rows])

    return epoch


def stock_keras_without_onednn(arguments: Namespace, images: int) -> Callable[[], Any]:
    """The same with TensorFlow's default kernels for CPUs without AVX-512 VNNI."""
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
    return stock_keras(arguments, images)


def stock_keras_fit(arguments: Namespace, images: int) -> Callable[[], Any]:
    """The same by `fit` on arrays; tf.data's autotuner delays the end of each epoch."""
    model, pixels, truth = stock_model(arguments, images)
    return lambda: model.fit(pixels, truth, arguments.batch_size, verbose=0)


def stock_model(arguments: Namespace, images: int) -> tuple:
    """The compiled model, pixels (images, size, size, 1) and labels."""
    import tensorflow as tf

    import xray_tensorflow as xray

    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    pixels, truth = made_up(arguments, images)
    xray.speed_up = lambda model: None
    model = xray.build_cnn(arguments, truth)
    model.compile("adam", "binary_crossentropy")
    return model, pixels[..., np.newaxis], truth


def pytorch_mobilenet() -> Any:
    """The same CNN in PyTorch: (n, 3, size, size) to logits (n, 15)."""
    from torch import nn

    def block(
        *convolution: int, stride: int = 1, kernel: int = 3, groups: int = 1
    ) -> list[nn.Module]:
        layer = nn.Conv2d(*convolution, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [layer, nn.BatchNorm2d(convolution[1], eps=1e-3), nn.ReLU6(inplace=True)]

    layers = block(3, 32, stride=2)
    wide = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    for number, (channels, wider) in enumerate(zip(wide, wide[1:])):
        layers += block(
            channels, channels, stride=2 if number in (1, 3, 5, 11) else 1, groups=channels
        )
        layers += block(channels, wider, kernel=1)
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1024, LABELS)
    )


def pytorch(
    arguments: Namespace,
    images: int,
    channels_last: bool = False,
    compiled: bool = False,
    bfloat16: bool = False,
) -> Callable[[], Any]:
    """An epoch of it in PyTorch: by default eager, in the default memory format, in float32.

    PyTorch's guide recommends channels last for convolutions on CPUs. With `bfloat16` the forward
    pass is under autocast, which needs no loss scaling.
    """
    import torch

    torch.set_num_threads(arguments.threads)
    pixels, truth = map(torch.from_numpy, made_up(arguments, images))
    model, loss_of = pytorch_mobilenet().train(), torch.nn.BCEWithLogitsLoss()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=memory_format)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, eps=1e-7)
    logits_of = torch.compile(model) if compiled else model

    def epoch() -> None:
        for rows in torch.randperm(images).split(arguments.batch_size):
            batch = pixels[rows].unsqueeze(1).float().div(127.5).sub(1).expand(-1, 3, -1, -1)
            batch = batch.contiguous(memory_format=memory_format)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                logits = logits_of(batch)
            loss_of(logits.float(), truth[rows]).backward()
            optimizer.step()

    return epoch


def our_ingest(arguments: Namespace, images: int) -> Callable[[], Any]:
    """xray_tensorflow.py's ingest with an empty cache: fetch, decode, resize, store."""
    caches = itertools.count()

    def ingest() -> None:
        arguments.cache = f"{arguments.folder}/cache-{os.getpid()}-{next(caches)}"
        read_pixels(arguments, images)

    return ingest


def ingest_by_one(arguments: Namespace, images: int) -> Callable[[], Any]:
    """The same in one process, whatever the number of cores."""
    import xray_tensorflow as xray

    xray.WORTH_A_PROCESS = 10**9
    return our_ingest(arguments, images)


def our_cached_start(arguments: Namespace, images: int) -> Callable[[], Any]:
    """The pixels of images that an earlier run has cached."""
    import xray_tensorflow as xray

    arguments.cache = f"{arguments.folder}/full-cache"
    read_pixels(arguments, images)
    keys = xray.read_credentials(arguments.credentials)
    table = bucket_table(arguments)[:images].reset_index(drop=True)
    return lambda: xray.ingest(keys, arguments, table)


def read_pixels(arguments: Namespace, images: int) -> None:
    import xray_tensorflow as xray

    credentials = xray.read_credentials(arguments.credentials)
    xray.ingest(credentials, arguments, bucket_table(arguments)[:images].reset_index(drop=True))


def bucket_table(arguments: Namespace) -> Any:
    import xray_tensorflow as xray

    credentials = xray.read_credentials(arguments.credentials)
    return xray.select_images(xray.connect(credentials, arguments), arguments)


def bare_decoding(arguments: Namespace, images: int) -> Callable[[], Any]:
    """Pillow decoding the same PNGs from memory, and nothing else."""
    from PIL import Image

    files = [file for _, file in zip(range(images), itertools.cycle(arguments.files))]

    def decode() -> None:
        for file in files:
            Image.open(io.BytesIO(file)).load()

    return decode


def bare_fetching(arguments: Namespace, images: int) -> Callable[[], Any]:
    """Only the GETs, on as many threads as ingest uses."""
    import xray_tensorflow as xray

    client = xray.connect(xray.read_credentials(arguments.credentials), arguments)
    keys = list(bucket_table(arguments)["key"][:images])

    def fetch_all() -> None:
        with ThreadPool(xray.FETCH_THREADS) as pool:
            for _ in pool.imap_unordered(
                lambda key: xray.fetch(client, arguments.bucket, key), keys
            ):
                pass

    return fetch_all


def bare_verifying(arguments: Namespace, images: int) -> Callable[[], Any]:
    """Only the check of the PNGs' checksums, from memory."""
    from PIL import Image

    files = list(itertools.islice(itertools.cycle(arguments.files), images))

    def verify() -> None:
        for file in files:
            Image.open(io.BytesIO(file)).verify()

    return verify


def bare_resizing(arguments: Namespace, images: int) -> Callable[[], Any]:
    """From decoded images in memory to a run's pixels, as by xray_tensorflow.py's `decode`."""
    from PIL import Image

    opened = [Image.open(io.BytesIO(file)) for file in arguments.files]
    for image in opened:
        image.load()
    size = (arguments.image_size, arguments.image_size)

    def resize() -> None:
        for image in itertools.islice(itertools.cycle(opened), images):
            grey = image.convert("L").resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
            np.asarray(grey)

    return resize


def bare_storing(arguments: Namespace, images: int) -> Callable[[], Any]:
    """Ingest without fetching or decoding: list, labels, checksums of the pixels, SQLite."""
    import xray_tensorflow as xray

    image = np.zeros((arguments.image_size, arguments.image_size), np.uint8)
    xray.fetch_images = lambda client, bucket, keys, size: ((row, image, "") for row in keys)
    return our_ingest(arguments, images)


def training_from_the_bucket(arguments: Namespace, images: int) -> Callable[[], Any]:
    """Train stock Keras as many public scripts do: fetch and decode each batch in each step."""
    import boto3
    import tensorflow as tf
    import yaml
    from PIL import Image

    import xray_tensorflow as xray

    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    keys = yaml.safe_load(Path(arguments.credentials).read_text())
    keys["aws_secret_access_key"] = keys.pop("aws_secret_key_id")
    client, size = boto3.client("s3", **keys), arguments.image_size
    _, truth = made_up(arguments, images)
    xray.speed_up = lambda model: None
    model = xray.build_cnn(arguments, truth)
    names = bucket_table(arguments)["key"][:images].to_numpy()

    def pixels_of(key: str) -> np.ndarray:
        file = io.BytesIO(client.get_object(Bucket=arguments.bucket, Key=key)["Body"].read())
        return np.asarray(
            Image.open(file).convert("L").resize((size, size), Image.Resampling.BILINEAR)
        )

    def epoch() -> None:
        for rows in np.array_split(np.arange(images), max(1, images // arguments.batch_size)):
            model.train_on_batch(
                np.stack([pixels_of(key) for key in names[rows]])[..., np.newaxis], truth[rows]
            )

    return epoch


# ---- the parts of a step ----

# By a pattern in the operation's name, which includes the layer's; the first match counts.
PARTS = {
    "Adam": r"^adam(_\d+)?/",
    "batch normalisation": "_bn_",
    "ReLU6": "_relu_",
    "depthwise convolutions": "conv_dw_",
    "1x1 convolutions (matrix products)": "conv_pw_",
    "first convolution": "conv1_",
    "rest: input, pooling, loss": "",
}


class StepParts(NamedTuple):
    """Costs of one training step.

    Milliseconds by part, GFLOP of the parts that are matrix products, milliseconds of the whole
    step, and GFLOP/s of matrix products alone, by shape.
    """

    milliseconds: dict[str, float]
    gflop: dict[str, float]
    whole: float
    rates: dict[tuple[int, int, int], float]


def step_parts(arguments: Namespace) -> StepParts:
    """The parts of a training step of xray_tensorflow.py, from TensorFlow's own profiler.

    It times each operation within the step. If a part were measured alone, unused outputs would not
    be computed, and its inputs would already be in the cache.
    """
    import tensorflow as tf

    import xray_tensorflow as xray

    xray.limit_tensorflow(arguments.threads)
    pixels, truth = made_up(arguments, arguments.batch_size)
    model, data = xray.build_cnn(arguments, truth), pixels[..., np.newaxis]

    def steps(count: int) -> list[float]:
        return [milliseconds(lambda: model.train_on_batch(data, truth)) for _ in range(count)]

    steps(3)
    whole = steps(10)
    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            steps(10)
        operations = operations_of(folder)
    whole += steps(10)
    parts = dict.fromkeys(PARTS, 0.0)
    for name, spent in operations.items():
        part = next(part for part, pattern in PARTS.items() if re.search(pattern, name))
        parts[part] += spent / 10
    gflop, shapes = products(model, arguments.batch_size)
    rates = {shape: rate_of(*shape) for shape in {*shapes, (2048, 2048, 2048)}}
    return StepParts(parts, gflop, statistics.median(whole), rates)


def milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def operations_of(folder: str) -> dict[str, float]:
    """Milliseconds of each operation of a graph, by name, from the profile in `folder`."""
    from tensorflow.tsl.profiler.protobuf.xplane_pb2 import XSpace

    (file,) = Path(folder).rglob("*.xplane.pb")
    (host,) = (p for p in XSpace.FromString(file.read_bytes()).planes if p.name == "/host:CPU")
    spent: dict[str, float] = {}
    for event in itertools.chain.from_iterable(line.events for line in host.lines):
        name = host.event_metadata[event.metadata_id].name
        if re.fullmatch(r"[^ :]+:\w+", name):  # an operation's name and type
            spent[name] = spent.get(name, 0.0) + event.duration_ps / 1e9
    return spent


def products(model: Any, batch_size: int) -> tuple[dict[str, float], list[tuple[int, int, int]]]:
    """GFLOP of a step by part, and the shapes (m, k, n) of its products (m, k) x (k, n).

    A 1x1 convolution has three: forward, gradient of the input, gradient of the kernel. The first
    convolution, of 3 x 3 x 3 values an output, needs no gradient of its input.
    """
    import keras

    gflop = {"1x1 convolutions (matrix products)": 0.0, "first convolution": 0.0}
    shapes = []
    for layer in model.get_layer("mobilenet").layers:
        if type(layer) is not keras.layers.Conv2D:
            continue
        _, height, width, after = layer.output.shape
        rows = batch_size * height * width
        if layer.kernel_size == (1, 1):
            before = layer.input.shape[-1]
            gflop["1x1 convolutions (matrix products)"] += 6e-9 * rows * before * after
            shapes += [(rows, before, after), (rows, after, before), (before, rows, after)]
        else:
            gflop["first convolution"] += 4e-9 * rows * 27 * after
    return gflop, shapes


def rate_of(m: int, k: int, n: int) -> float:
    """GFLOP/s of the matrix product (m, k) x (k, n), the fastest of five."""
    import tensorflow as tf

    # A sum over the long axis, as in a kernel's gradient, has its first factor transposed.
    transposed = k > m and k > n
    one = tf.random.normal((k, m) if transposed else (m, k))
    product = tf.function(lambda a, b: tf.matmul(a, b, transpose_a=transposed))
    other = tf.random.normal((k, n))
    product(one, other)
    return 2e-6 * m * k * n / min(milliseconds(lambda: product(one, other)) for _ in range(5))


# ---- processes that run alternately ----


def work(peer: Peer, pipe: Connection) -> None:
    """In the peer's process: prepare it, then answer each message with a turn."""
    import xray_tensorflow as xray

    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  for as long as the process lives
    xray.pin_to_cores(peer.arguments.threads)
    call = peer.prepare(peer.arguments, peer.images)
    call()  # traces, allocates, connects
    pipe.send("ready")
    while pipe.recv():
        start, busy = time.perf_counter(), time.process_time()
        call()
        wall, processor = time.perf_counter() - start, time.process_time() - busy
        pipe.send(Turn(peer.images / wall, 1000 * processor / peer.images))


@contextmanager
def started(peers: dict[Any, Peer]) -> Iterator[dict[Any, Connection]]:
    """Start a process for each peer and wait until it is ready. Raises EOFError if one fails."""
    context, processes, pipes = multiprocessing.get_context("spawn"), [], {}
    os.environ.pop("TF_ENABLE_ONEDNN_OPTS", None)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    try:
        for name, peer in peers.items():
            pipes[name], its = context.Pipe()
            processes.append(context.Process(target=work, args=(peer, its)))
            processes[-1].start()
            its.close()  # the pipe closes with the process
            pipes[name].recv()
        yield pipes
    finally:
        for pipe in pipes.values():
            with suppress(OSError):  # it has failed
                pipe.send(False)
        for process in processes:  # a killed one would leave tqdm's semaphore behind
            process.join()


def measure_once(peer: Callable, arguments: Namespace) -> Any:
    """The result of `peer`, called in its own process."""
    with multiprocessing.get_context("spawn").Pool(1, hold, (arguments.threads,)) as pool:
        return pool.apply(peer, (arguments,))


def hold(threads: int) -> None:
    import xray_tensorflow as xray

    xray.pin_to_cores(threads)


def take_turns(peers: dict[Any, Peer], rounds: int) -> dict[Any, list[Turn]]:
    """The turns of each peer, one per round."""
    turns: dict[Any, list[Turn]] = {name: [] for name in peers}
    with started(peers) as pipes:
        for _ in range(rounds):
            for name, pipe in pipes.items():
                pipe.send(True)
                turns[name].append(pipe.recv())
            print({name: round(turn[-1][0], 1) for name, turn in turns.items()}, flush=True)
    return turns


def measure_in_turns(peers: dict[Any, Peer], rounds: int) -> dict[Any, list[float]]:
    """Images a second of each peer in each round."""
    return {
        name: [turn.images_per_second for turn in turns]
        for name, turns in take_turns(peers, rounds).items()
    }


def measure_together(peer: Peer, rounds: int, count: int) -> list[float]:
    """Images a second of `count` simultaneous processes of `peer`, each on its own core."""
    cores, speeds = os.sched_getaffinity(0), []
    with ExitStack() as stack:
        pipes: list[Connection] = []
        for core in sorted(cores)[-count:]:
            os.sched_setaffinity(0, {core})  # the process inherits it
            pipes += stack.enter_context(started({core: peer})).values()
        os.sched_setaffinity(0, cores)
        for _ in range(rounds):
            for pipe in pipes:
                pipe.send(True)
            speeds.append(sum(pipe.recv().images_per_second for pipe in pipes))
    return speeds
