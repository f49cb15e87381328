"""What `benchmark.py gpu` measures on one GPU, one after the other, each in its own process.

Together they would not fit in a GPU's memory.
"""

from __future__ import annotations

import functools
import io
import itertools
import statistics
import subprocess
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, NamedTuple

import numpy as np
import peers

IMAGES = 40 * 512  # an epoch: a multiple of every batch size
# A peer's training epoch, and a function for its peak GPU memory in bytes.
Prepared = tuple[Callable[[], Any], Callable[[], int]]


class Figures(NamedTuple):
    """A peer's figures. The first step's time is the extra time of the first epoch."""

    images_per_second: float
    first_step: float  # seconds
    busy: float  # percent of the time, by nvidia-smi
    peak_mb: float


def measure(arguments: Namespace) -> Figures | None:
    """The figures of `arguments.prepare`; None if the GPU has too little memory."""
    try:
        epoch, peak_memory = arguments.prepare(arguments)
        with redirect_stdout(io.StringIO()):
            first = seconds_of(epoch)
            with watched() as busy:
                later = [seconds_of(epoch) for _ in range(3)]
    except Exception as error:
        # TensorFlow, XLA and PyTorch each raise their own errors.
        if not any(words in str(error) for words in ("OOM", "ut of memory", "emory is too small")):
            raise
        return None
    best = min(later)
    return Figures(
        IMAGES / best, first - best, statistics.fmean(busy or [0]), peak_memory() / 10**6
    )


def seconds_of(epoch: Callable[[], Any]) -> float:
    start = time.perf_counter()
    epoch()
    return time.perf_counter() - start


@contextmanager
def watched() -> Iterator[list[float]]:
    """GPU 0's utilisation during the block: percent, ten samples a second."""
    query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    command = ["nvidia-smi", *query, "--id=0", "--loop-ms=100"]
    busy: list[float] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        reader = threading.Thread(target=lambda: busy.extend(map(float, watcher.stdout or ())))
        reader.start()
        yield busy
        watcher.kill()
        reader.join()


def ours(arguments: Namespace) -> Prepared:
    """xray_gpu.py in `precision`, with or without `xla`, its pixels on the GPU or on the `host`."""
    import pandas as pd

    import xray_gpu as xray

    strategy, _ = xray.set_up_gpus(arguments.precision)
    pixels, truth = peers.made_up(arguments, IMAGES)
    table = pd.DataFrame(truth, columns=xray.LABELS).assign(split="train")
    model = xray.build_cnn(arguments, truth, xla=arguments.xla)
    model.optimizer.build(model.trainable_variables)
    xray.PIXELS_SHARE = 0 if arguments.host else 1
    feed, _ = xray.make_feed(model, pixels, table, arguments.batch_size, strategy)
    trainer = xray.GpuTrainer(xray.KerasTrainer(model, feed, table, arguments), strategy)
    epochs = itertools.count(1)
    return lambda: trainer.fit_epoch(next(epochs)), xray.peak_gpu_memory


def stock_keras(arguments: Namespace) -> Prepared:
    """Keras' layers unchanged, compiled and fitted on arrays as Keras' guides recommend."""
    import xray_gpu as xray

    xray.set_up_gpus(arguments.precision)
    xray.speed_up = lambda layers: None
    pixels, truth = peers.made_up(arguments, IMAGES)
    model = xray.build_cnn(arguments, truth)
    model.compile("adam", "binary_crossentropy")
    images = pixels[..., np.newaxis]
    fit = functools.partial(model.fit, images, truth, arguments.batch_size, verbose=0)
    return fit, xray.peak_gpu_memory


def pytorch(arguments: Namespace) -> Prepared:
    """The same CNN in PyTorch, channels last, bfloat16, pixels on the GPU; `compiled` or eager.

    If compiled, a step runs as CUDA graphs.
    """
    import torch

    torch.backends.cudnn.benchmark = True
    arrays = peers.made_up(arguments, IMAGES)
    pixels, truth = (torch.from_numpy(array).cuda() for array in arrays)
    model = peers.pytorch_mobilenet().train().cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, eps=1e-7, fused=True)

    def loss_of(rows: Any) -> Any:
        images = pixels[rows].unsqueeze(1).float().div(127.5).sub(1).expand(-1, 3, -1, -1)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(images)
        return torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), truth[rows])

    if arguments.compiled:
        loss_of = torch.compile(loss_of, mode="reduce-overhead")

    def epoch() -> None:
        for rows in torch.randperm(IMAGES, device="cuda").split(arguments.batch_size):
            optimizer.zero_grad()
            loss_of(rows).backward()
            optimizer.step()
        torch.cuda.synchronize()

    return epoch, torch.cuda.max_memory_allocated
