"""What benchmark.py measures, each in a process of its own that is held to its cores and works when
it is told to.

The processes stay alive and take turns: their figures of one round stand next to each other in
time.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Callable

import numpy as np

LABELS = 15


def made_up(arguments: Namespace, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (images, size, size) and labels float32 (images, 15): what they show does not
    change the speed.
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
    trainer = xray.KerasTrainer(xray.build_cnn(arguments, truth), pixels, table, arguments)
    epochs = itertools.count(1)
    return lambda: trainer.fit_epoch(next(epochs))


def stock_keras(arguments: Namespace, images: int) -> Callable[[], Any]:
    """An epoch of the same CNN with Keras' layers as they are, compiled as Keras' guides have it, a
    step at a time.
    """
    model, pixels, truth = stock_model(arguments, images)

    def epoch() -> None:
        order = np.random.default_rng(0).permutation(images)
        for rows in np.split(order, range(arguments.batch_size, images, arguments.batch_size)):
            model.train_on_batch(pixels[rows], truth[rows])

    return epoch


def stock_keras_without_onednn(arguments: Namespace, images: int) -> Callable[[], Any]:
    """The same with the kernels that TensorFlow takes by default on CPUs without AVX-512 VNNI."""
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
    return stock_keras(arguments, images)


def stock_keras_fit(arguments: Namespace, images: int) -> Callable[[], Any]:
    """The same by `fit` on arrays: tf.data's autotuner holds up the end of an epoch until it
    wakes.
    """
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


def pytorch(arguments: Namespace, images: int, channels_last: bool = False) -> Callable[[], Any]:
    """An epoch of it, eager, in PyTorch's default memory format."""
    import torch

    torch.set_num_threads(arguments.threads)
    pixels, truth = map(torch.from_numpy, made_up(arguments, images))
    model, loss_of = pytorch_mobilenet().train(), torch.nn.BCEWithLogitsLoss()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    if arguments.weights != "none":  # statistics, scale and offset stay, as in the other peers
        for layer in model:
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.eval().requires_grad_(False)
    optimizer = torch.optim.Adam(
        [weight for weight in model.parameters() if weight.requires_grad], 1e-4, eps=1e-7
    )

    def epoch() -> None:
        for rows in torch.randperm(images).split(arguments.batch_size):
            batch = pixels[rows].unsqueeze(1).float().div(127.5).sub(1).expand(-1, 3, -1, -1)
            if channels_last:
                batch = batch.contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            loss_of(model(batch), truth[rows]).backward()
            optimizer.step()

    return epoch


def pytorch_channels_last(arguments: Namespace, images: int) -> Callable[[], Any]:
    """The same in the memory format that PyTorch's guide to convolutions on CPUs recommends."""
    return pytorch(arguments, images, channels_last=True)


def our_ingest(arguments: Namespace, images: int) -> Callable[[], Any]:
    """xray_tensorflow.py's way from the bucket to pixels, with nothing in the cache: fetch, decode,
    resize, store.
    """
    caches = itertools.count()

    def ingest() -> None:
        arguments.cache = f"{arguments.folder}/cache-{next(caches)}"
        read_pixels(arguments, images)

    return ingest


def our_cached_start(arguments: Namespace, images: int) -> Callable[[], Any]:
    """The same where a run before has filled the cache."""
    arguments.cache = f"{arguments.folder}/full-cache"
    return lambda: read_pixels(arguments, images)


def read_pixels(arguments: Namespace, images: int) -> None:
    import xray_tensorflow as xray

    client = xray.connect(xray.read_credentials(arguments.credentials), arguments.bucket)
    xray.ingest(client, arguments, bucket_table(arguments)[:images].reset_index(drop=True))


def bucket_table(arguments: Namespace) -> Any:
    import xray_tensorflow as xray

    return xray.select_images(
        xray.connect(xray.read_credentials(arguments.credentials), arguments.bucket), arguments
    )


def bare_decoding(arguments: Namespace, images: int) -> Callable[[], Any]:
    """Pillow decoding the same PNGs from memory, and nothing else."""
    from PIL import Image

    files = [file for _, file in zip(range(images), itertools.cycle(arguments.files))]

    def decode() -> None:
        for file in files:
            Image.open(io.BytesIO(file)).load()

    return decode


def training_from_the_bucket(arguments: Namespace, images: int) -> Callable[[], Any]:
    """What many public scripts do: in each step fetch and decode the images of the batch, and train
    stock Keras.
    """
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


def step_parts(arguments: Namespace, images: int) -> dict[str, float]:
    """Milliseconds of the parts of a training step of xray_tensorflow.py, each alone, forward and
    backward.

    Also the bound: GFLOP of the step's matrix products, and GFLOP/s of a large one (2048 x 2048).
    """
    import keras
    import tensorflow as tf

    import xray_tensorflow as xray

    xray.limit_tensorflow(arguments.threads)
    pixels, truth = made_up(arguments, arguments.batch_size)
    model = xray.build_cnn(arguments, truth)
    parts, flops, layers = dict.fromkeys(PARTS, 0.0), 0.0, model.get_layer("mobilenet").layers
    for layer in layers:
        part = part_of(layer)
        if part:
            shape = (arguments.batch_size, *layer.input.shape[1:])
            parts[part] += milliseconds(forward_and_backward(layer, tf.random.normal(shape)))
            if part == PARTS[0]:
                flops += (
                    6e-9
                    * np.prod(layer.output.shape[1:])
                    * layer.input.shape[-1]
                    * arguments.batch_size
                )
        if isinstance(layer, keras.layers.Conv2D) and part == PARTS[1]:
            flops += (
                4e-9 * np.prod(layer.output.shape[1:]) * 27 * arguments.batch_size
            )  # no gradient of the input
    large = tf.random.normal((2048, 2048))
    product = tf.function(lambda: tf.matmul(large, large))
    parts["GFLOP/s of a large matrix product"] = 2 * 2.048**3 / milliseconds(product) * 1000
    parts["GFLOP of matrix products in a step"] = flops
    data = pixels[..., np.newaxis]
    parts["the whole step"] = milliseconds(lambda: model.train_on_batch(data, truth))
    return parts


PARTS = [
    "1x1 convolutions (matrix products)",
    "first convolution",
    "depthwise convolutions",
    "batch normalisation",
]
PARTS += ["padding and ReLU6"]


def part_of(layer: Any) -> str:
    """Which of PARTS a layer of MobileNet is; none for those that cost nothing."""
    kinds = {
        "Conv2D": 1,
        "DepthwiseConv2D": 2,
        "BatchNormalization": 3,
        "ReLU": 4,
        "ZeroPadding2D": 4,
    }
    kind = kinds.get(type(layer).__name__)
    return "" if kind is None else PARTS[0 if kind == 1 and layer.kernel_size == (1, 1) else kind]


def forward_and_backward(layer: Any, inputs: Any) -> Callable[[], Any]:
    """A traced function of a layer's output for `inputs` and its gradients by input and weights."""
    import tensorflow as tf

    options = {"training": True} if type(layer).__name__ == "BatchNormalization" else {}

    @tf.function
    def both() -> Any:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            output = layer(inputs, **options)
        variables = [variable.value for variable in layer.trainable_weights]
        return tape.gradient(output, [inputs, *variables], output_gradients=tf.ones_like(output))

    return both


def milliseconds(call: Callable[[], Any]) -> float:
    """The fastest of ten calls after two."""
    import tensorflow as tf

    def once() -> float:
        start = time.perf_counter()
        for result in tf.nest.flatten(call()):
            np.asarray(result).ravel()[:1]
        return 1000 * (time.perf_counter() - start)

    return min([once() for _ in range(12)][2:])


# ---- processes that take turns ----


def work(peer: Callable, arguments: Namespace, images: int, pipe: Connection) -> None:
    """In the peer's process: make it ready, and answer each message with the images a second of one
    turn.
    """
    import xray_tensorflow as xray

    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  for as long as the process lives
    xray.hold_to_cores(arguments.threads)
    try:
        turn = peer(arguments, images)
        turn()  # traces, allocates, connects
    except ImportError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    while pipe.recv():
        start = time.perf_counter()
        turn()
        pipe.send(images / (time.perf_counter() - start))


@contextmanager
def started(
    peers: list[Callable], arguments: Namespace, images: int
) -> Iterator[dict[str, Connection]]:
    """A process for each peer that this machine can run, ready for its turns; those it cannot are
    said.
    """
    context, processes, pipes = multiprocessing.get_context("spawn"), [], {}
    os.environ.pop("TF_ENABLE_ONEDNN_OPTS", None)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    try:
        for peer in peers:
            ours, its = context.Pipe()
            processes.append(
                context.Process(target=work, args=(peer, arguments, images, its), daemon=True)
            )
            processes[-1].start()
            problem = ours.recv()
            if problem:
                print(f"{peer.__name__}: not measured: {problem}", flush=True)
            else:
                pipes[peer.__name__] = ours
        yield pipes
    finally:
        for process in processes:
            process.kill()


def measure_once(peer: Callable, arguments: Namespace) -> Any:
    """What `peer` gives, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, hold, (arguments.threads,)) as pool:
        return pool.apply(peer, (arguments, 0))


def hold(threads: int) -> None:
    import xray_tensorflow as xray

    xray.hold_to_cores(threads)


def measure_in_turns(
    peers: list[Callable], arguments: Namespace, images: int, rounds: int
) -> dict[str, list[float]]:
    """Images a second of each peer in each round."""
    speeds: dict[str, list[float]] = {}
    with started(peers, arguments, images) as pipes:
        for _ in range(rounds):
            for name, pipe in pipes.items():
                pipe.send(True)
                speeds.setdefault(name, []).append(pipe.recv())
            print({name: round(speed[-1], 1) for name, speed in speeds.items()}, flush=True)
    return speeds


def measure_together(
    peer: Callable, arguments: Namespace, images: int, rounds: int, count: int
) -> list[float]:
    """Images a second of `count` processes of `peer` together, at once, each on a core of its
    own.
    """
    cores, speeds = os.sched_getaffinity(0), []
    with ExitStack() as stack:
        pipes: list[Connection] = []
        for core in sorted(cores)[-count:]:
            os.sched_setaffinity(0, {core})  # the process inherits it
            pipes += stack.enter_context(started([peer], arguments, images)).values()
        os.sched_setaffinity(0, cores)
        for _ in range(rounds):
            for pipe in pipes:
                pipe.send(True)
            speeds.append(sum(pipe.recv() for pipe in pipes))
    return speeds
