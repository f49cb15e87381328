"""Measure speed, memory and learning against common alternatives; update tables in docs/results.md.

    pip install -r tests/benchmark/requirements.txt
    python tests/benchmark/benchmark.py                    everything but gpu, on two idle cores, about two hours
    python tests/benchmark/benchmark.py steps pixels       only these groups; other tables stay as they are
    python tests/benchmark/benchmark.py gpu                on a machine with a GPU, about 40 minutes

XRAY_WEIGHTS names a file with ImageNet's weights, in case Keras cannot download them.

Figures of different days are never compared: the programs in a table run alternately. Ratios are of
medians.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import gpu_peers
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import peers
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
# The scripts and the stand-in servers are in no package.
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "stand_ins")]

import helpers  # noqa: E402
from sample_bucket import DEFAULTS, draw_radiograph, read_rows, write_credentials  # noqa: E402
from sample_bucket import LABELS as SAMPLE_LABELS  # noqa: E402
from static_s3 import static_s3  # noqa: E402

from xray_elephas import STEPS_ALONE  # noqa: E402

RESULTS = ROOT / "docs" / "results.md"
SCALING = ROOT / "docs" / "scaling.md"
# Initial weights of the `learning` group; a path to Keras' weights if there is no network.
WEIGHTS = os.environ.get("XRAY_WEIGHTS", "imagenet")
LATENCY = 0.05  # seconds per GET, S3's time to the first byte


def arguments_of(*options: Any, **more: Any) -> argparse.Namespace:
    """The script's arguments, plus what the peers need."""
    return argparse.Namespace(**vars(helpers.parse(*options)), **more)


# ---- tables ----


def figures(values: list[float], digits: int = 1) -> str:
    """Median and, if there are several values, the range."""
    shown = f"{statistics.median(values):,.{digits}f}"
    return (
        shown
        if len(values) == 1
        else f"{shown} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
    )


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(ours) / statistics.median(theirs)


def times(ours: list[float], theirs: list[float]) -> str:
    return f"{ratio(ours, theirs):.2f}"


def table(head: str, rows: list[tuple]) -> str:
    """A Markdown table; `head` holds the columns between bars."""
    columns = head.count("|") + 1
    lines = [
        f"| {head} |",
        "|---" * columns + "|",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
    ]
    return "\n".join(lines)


def machine() -> str:
    """A line on what the figures depend on: processor, cores, memory, versions, date."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    names = ["tensorflow", "keras", "torch", "pillow", "boto3", "pyspark", "elephas"]
    found = [f"{name} {version_of(name)}" for name in names]
    cores = f"{len(os.sched_getaffinity(0))} cores of {model[1] if model else platform.processor()}"
    return (
        f"{time.strftime('%Y-%m-%d')}; {cores}, {memory:.0f} GiB; Python {platform.python_version()}, "
        + ", ".join(found)
    )


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def put(page: Path, name: str, text: str) -> None:
    """Replace the text between the marks of `name` on a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = page.read_text()
    before, after = old[: old.index(begin)], old[old.index(end) :]
    page.write_text(f"{before}{begin}\n{text}\n{after}")


# ---- training steps ----

CPU_FLAGS = set(Path("/proc/cpuinfo").read_text().split())
# TensorFlow enables oneDNN's kernels by default if the CPU has these instructions.
ONEDNN = "on" if "avx512_vnni" in CPU_FLAGS else "off"
OURS = "xray_tensorflow.py"
TRAINERS: dict[str, Callable] = {
    OURS: peers.our_training,
    f"stock Keras, default environment (oneDNN is {ONEDNN} on this CPU)": peers.stock_keras,
    "stock Keras, `fit` on arrays": peers.stock_keras_fit,
    "stock Keras, oneDNN off (default without AVX-512 VNNI)": peers.stock_keras_without_onednn,
    "PyTorch eager": peers.pytorch,
    "PyTorch eager, channels last": functools.partial(peers.pytorch, channels_last=True),
    "PyTorch `torch.compile`, channels last": functools.partial(
        peers.pytorch, channels_last=True, compiled=True
    ),
    "PyTorch eager, channels last, bfloat16": functools.partial(
        peers.pytorch, channels_last=True, bfloat16=True
    ),
    "PyTorch `torch.compile`, channels last, bfloat16": functools.partial(
        peers.pytorch, channels_last=True, compiled=True, bfloat16=True
    ),
}


def what_lacks(name: str) -> str:
    """Why this machine cannot run the trainer; empty if it can."""
    if "PyTorch" in name and version_of("torch") == "not installed":
        return "PyTorch is not installed"
    if "torch.compile" in name and not shutil.which("g++"):
        return "no C++ compiler (g++)"
    if "bfloat16" in name and not CPU_FLAGS & {"avx512_bf16", "amx_bf16"}:
        return "this CPU has no instructions for it"
    return ""


def compare_trainers(arguments: argparse.Namespace, rounds: int) -> dict[str, list[float]]:
    """Images a second of each trainer that this machine can run."""
    able = {name: trainer for name, trainer in TRAINERS.items() if not what_lacks(name)}
    # Long turns, so that every program warms up again: PyTorch was a sixth slower with 128 images.
    return peers.measure_in_turns(
        {name: peers.Peer(trainer, arguments, 512) for name, trainer in able.items()}, rounds
    )


def best_of(family: str, speeds: dict[str, list[float]], without: str = "") -> str:
    """The fastest trainer whose name begins with `family` and lacks the word `without`."""
    able = [name for name in speeds if name.startswith(family) and without not in name.split(", ")]
    return max(able, key=lambda name: statistics.median(speeds[name]))


def summary(speeds: dict[str, list[float]], ours: list[float], who: str) -> str:
    """How much faster `who` is than the best of each family on this machine."""
    lines = []
    for family, without in (("PyTorch", ""), ("PyTorch", "bfloat16"), ("stock Keras", "")):
        if not any(name.startswith(family) for name in speeds):
            continue
        name = best_of(family, speeds, without)
        kind = f"{family} in float32" if without == "bfloat16" else family
        best = statistics.median(speeds[name])
        if not any(f": {name}, " in line for line in lines):
            lines.append(
                f"- Best of {kind} here: {name}, {best:.1f} images a second. {who} is "
                f"{times(ours, speeds[name])} times as fast."
            )
    return "\n".join(lines)


def steps() -> str:
    """Only training: 128 pixels, batches of 32, float32, pixels in memory, one thread."""
    arguments = arguments_of("--weights", "none", "--epochs", 1000, threads=1)
    speeds = compare_trainers(arguments, 3)
    ours = speeds[OURS]
    rows = [
        (name, figures(speeds[name]), times(ours, speeds[name]))
        if name in speeds
        else (name, f"not measured: {what_lacks(name)}", "")
        for name in TRAINERS
    ]
    rates = table("one thread | images a second | xray_tensorflow.py against it", rows)
    return f"{rates}\n\n{summary(speeds, ours, OURS)}"


def cores() -> str:
    """What more cores gain without Spark: TensorFlow's threads, or independent processes."""
    alone, both = (
        peers.Peer(
            peers.our_training,
            arguments_of("--weights", "none", "--epochs", 1000, threads=threads),
            256,
        )
        for threads in (1, 2)
    )
    one, two, together = [], [], []
    for _ in range(3):  # alternately, since the machine's speed may vary
        one += peers.measure_in_turns({"one": alone}, 2)["one"]
        two += peers.measure_in_turns({"two": both}, 2)["two"]
        together += peers.measure_together(alone, 2, count=2)
    rows = [
        ("xray_tensorflow.py on one core", figures(one), "1.00"),
        ("xray_tensorflow.py --threads 2", figures(two), times(two, one)),
        ("two independent processes of it", figures(together), times(together, one)),
    ]
    return table("128 pixels, from scratch, no Spark | images a second | against one core", rows)


# ---- a bucket of any size ----


def made_up_bucket(images: int, size: int = 1024, distinct: int = 40) -> dict[str, bytes]:
    """Label file and `images` radiographs by key, repeating `distinct` files.

    Findings have the sample's proportions.
    """
    rows, draw = read_rows(), random.Random(0)
    files = []
    for name, findings in rows[:distinct]:
        png = io.BytesIO()
        # The usual PNG compression; the sample's is chosen for fast drawing.
        Image.open(io.BytesIO(draw_radiograph(name, findings, size))).convert("L").save(png, "PNG")
        files.append(png.getvalue())
    names = [f"{image // 4 + 1:08d}_{image % 4:03d}.png" for image in range(images)]
    labels = helpers.label_file([(name, draw.choice(rows)[1]) for name in names])
    objects = {f"images/{name}": file for name, file in zip(names, itertools.cycle(files))}
    return {"Data_Entry_2017_v2020.csv": labels.encode(), **objects}


@contextmanager
def served(
    objects: dict[str, bytes], latency: float = LATENCY, processes: int = 1
) -> Iterator[tuple[Path, Path]]:
    """A folder, and credentials for an S3 server with these objects, `latency` seconds away."""
    with (
        static_s3(objects, latency, processes=processes) as endpoint,
        tempfile.TemporaryDirectory() as folder,
    ):
        yield Path(folder), write_credentials(Path(folder), endpoint)


# ---- pixels ----


def pixels() -> str:
    """Ingest on one core, 50 ms a GET, and the time of each stage."""
    objects = made_up_bucket(4000)
    files = [data for key, data in objects.items() if key.endswith(".png")][:40]
    with served(objects) as (folder, credentials):
        arguments = arguments_of(
            *("--credentials", credentials, "--weights", "none", "--epochs", 1000),
            threads=1,
            folder=str(folder),
            files=files,
        )

        def turns(images: int, rounds: int, *chosen: Callable) -> list[list[peers.Turn]]:
            named = {peer.__name__: peers.Peer(peer, arguments, images) for peer in chosen}
            return list(peers.take_turns(named, rounds).values())

        stages = turns(1000, 4, *INGEST.values())
        (cached,) = turns(4000, 5, peers.our_cached_start)
        naive, training = turns(192, 3, peers.training_from_the_bucket, peers.our_training)
    spent = [processor_time(each) for each in stages]
    bare, ours, cached, naive, training = (
        [turn.images_per_second for turn in each]
        for each in (stages[0], stages[-1], cached, naive, training)
    )
    rows = [
        ("Pillow decoding the same files from memory, nothing else", figures(bare), ""),
        (
            "xray_tensorflow.py: fetch, check, decode, resize, store",
            figures(ours),
            f"{times(ours, bare)} (against bare decoding)",
        ),
        (
            "xray_tensorflow.py, 4,000 images from the cache, without list and labels",
            figures(cached),
            f"{times(cached, ours)} (against ingest)",
        ),
        ("an epoch that fetches and decodes in each step, stock Keras", figures(naive), ""),
        (
            "an epoch of xray_tensorflow.py",
            figures(training),
            f"{ratio(training, naive):.1f} (against that)",
        ),
    ]
    once = (
        5
        / statistics.median(naive)
        / (1 / statistics.median(ours) + 5 / statistics.median(training))
    )
    kept = f"Five epochs including ingest: {once:.1f} times as fast as fetching in each epoch (computed from the rows)."
    return "\n\n".join(
        [
            table("one core | images a second | ratio", rows),
            kept,
            stages_of_an_image(spent),
        ]
    )


INGEST: dict[str, Callable] = {
    "decoding by Pillow: inflate, undo PNG's filters": peers.bare_decoding,
    "GET by boto3, 32 threads": peers.bare_fetching,
    "PNG's checksums (Pillow's `verify`)": peers.bare_verifying,
    "to grey, resize": peers.bare_resizing,
    "list, labels, checksum of the pixels, store in SQLite": peers.bare_storing,
    "all of it": peers.our_ingest,
}


def processor_time(turns: list[peers.Turn]) -> float:
    """Milliseconds of processor time per image, the median of the turns."""
    return statistics.median(turn.milliseconds for turn in turns)


def stages_of_an_image(spent: list[float]) -> str:
    """A table of the milliseconds of each part of ingest, measured alone, and of the rest."""
    *parts, whole = spent
    rest = whole - sum(parts)
    named = [*zip(INGEST, parts), ("rest: 32 threads that share the core and its cache", rest)]
    rows = [(name, f"{each:.2f}", share(each, whole)) for name, each in named]
    rows.append(("all of it", f"{whole:.2f}", "100 %"))
    return table("part of an image's ingest, one core | ms of processor time | share", rows)


# ---- ingest on all cores ----

# With nothing to fetch, a process creates its client and sends an empty group.
START = """
import sys, time
sys.path.insert(0, sys.argv[1])
import xray_tensorflow as xray
xray.pin_to_cores(1)
keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
start = time.perf_counter()
((pipe, process),) = xray.start_processes(keys, "any", [{}], 128).items()
pipe.recv()
print(time.perf_counter() - start)
"""


def ingest() -> str:
    """A process per core against one process with as many threads, on all cores."""
    cores = len(os.sched_getaffinity(0))
    images = 1500 * cores  # at least 1,000 each, so that every core gets a process
    rows = []
    for size, latency in ((1024, LATENCY), (1024, 0), (64, 0)):
        bucket = made_up_bucket(images, size)
        with served(bucket, latency, processes=max(2, cores // 4)) as (folder, credentials):
            arguments = arguments_of(
                "--credentials", credentials, threads=cores, folder=str(folder)
            )
            able = {
                name: peers.Peer(peer, arguments, images)
                for name, peer in (("one", peers.ingest_by_one), ("all", peers.our_ingest))
            }
            speeds = peers.measure_in_turns(able, 2)
        what = f"{size} x {size}, {1000 * latency:.0f} ms a GET"
        one, each = speeds["one"], speeds["all"]
        rows.append((what, figures(one, 0), figures(each, 0), times(each, one)))
    head = (
        f"{images:,} images, {cores} cores, which also serve S3 | one process, images a second "
        "| a process for each core | ratio"
    )
    command = [sys.executable, "-c", START, str(ROOT)]
    starts = [float(subprocess.check_output(command)) for _ in range(3)]
    kept = (
        f"The figures include the {figures(starts)} s of one core that a process takes before it "
        "fetches. With fewer than 1,000 images a core, or on one core, none is started."
    )
    return f"{table(head, rows)}\n\n{kept}"


# ---- whole scripts ----


def run_whole(
    script: str, options: list[Any], output: Path, workers: int = 2, master: str = ""
) -> dict:
    """Run a script; return its result line, `history` and the JVM's peak memory in MB.

    Elephas runs on `master`, by default on one one-core executor per worker.
    """
    command = [Path(sys.executable), ROOT / script]
    if script == "xray_elephas.py":
        command = [
            Path(sys.executable).with_name("spark-submit"),
            *("--master", master or f"local-cluster[{workers},1,1024]"),
            # A small heap for two workers: Java's memory is what it needs, not garbage.
            *("--driver-memory", "2g" if master or workers > 2 else "512m"),
            command[1],
        ]
    command += ["--weights", "none", *options, "--output", output]
    print("running:", *command, flush=True)
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable}
    process, peak = subprocess.Popen([str(word) for word in command], env=environment, **quiet), 0
    reader = ThreadPool(1).apply_async(process.communicate)
    while not reader.ready():
        peak = max(peak, peak_memory(process.pid))
        reader.wait(1)
    if process.returncode:
        raise SystemExit(f"{script} failed: {reader.get()[0]}")
    result = json.loads(reader.get()[0].splitlines()[-1])
    return {**result, "history": pd.read_csv(output / "history.csv"), "jvm_mb": peak}


def peak_memory(pid: int) -> int:
    """The peak resident memory of a process in MB; 0 if it has ended."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) // 977 if found else 0


def scripts() -> str:
    """The sequential script against Elephas with two one-core workers: ingest, epochs, memory.

    Also compares these workers with two processes without Spark.
    """
    runs, small = {}, {}
    with served(made_up_bucket(6000)) as (folder, credentials):
        for script in ("xray_tensorflow.py", "xray_elephas.py"):
            options = [
                "--credentials",
                credentials,
                "--epochs",
                3,
                "--cache",
                folder / f"cache-{script}",
            ]
            runs[script] = run_whole(script, options, folder / script)
            small[script] = run_whole(
                script, [*options, "--limit", 500], folder / f"{script}-small"
            )
    one, two = runs.values()
    rows = [
        (what, figures([value(one)]), figures([value(two)]), times([value(two)], [value(one)]))
        for what, value in (
            (
                "ingest, images a second (50 ms a GET)",
                lambda run: run["ingest"]["images_per_second"],
            ),
            ("training, images a second, epochs after the first", speed_of),
        )
    ]
    seconds = [seconds_of(run) for run in (one, two)]
    rows.append(
        (
            "whole run of 3 epochs, seconds",
            *(f"{each:.0f}" for each in seconds),
            f"{seconds[0] / seconds[1]:.2f} times as fast",
        )
    )
    arguments = arguments_of("--weights", "none", "--epochs", 1000, threads=2)
    speeds = compare_trainers(arguments, 2)
    trainers = [
        (name, figures(speed), times([speed_of(two)], speed)) for name, speed in speeds.items()
    ]
    memory = [
        (
            f"{count:,} images",
            *(f"{run['peak_memory_mb']['driver']:,}" for run in pair.values()),
            f"{java:,}",
        )
        for count, pair in ((500, small), (6000, runs))
        for java in [pair["xray_elephas.py"]["jvm_mb"]]
    ]
    training = one["images"]["train"]
    head = (
        f"6,000 images of 1024 pixels, {training:,} to train on | xray_tensorflow.py, one core | "
        "xray_elephas.py, two workers"
    )
    tall = (
        "peak memory, MB | xray_tensorflow.py | driver of xray_elephas.py, Python | the same, Java"
    )
    threads = "one process with two threads | images a second | the two workers against it"
    return "\n\n".join(
        [
            table(head + " | ratio", rows),
            against_two_processes(),
            table(threads, trainers),
            summary(speeds, [speed_of(two)], "xray_elephas.py with two workers"),
            table(tall, memory),
        ]
    )


def against_two_processes() -> str:
    """Two Elephas workers, whole epochs, against two independent processes that only train."""
    arguments, rows = arguments_of("--weights", "none", "--epochs", 1000, threads=1), []
    for images in (3000, 12_000):
        alone = peers.Peer(peers.our_training, arguments, round(0.35 * images))
        with served(made_up_bucket(images, arguments.image_size)) as (folder, credentials):
            options = ["--credentials", credentials, "--epochs", 4, "--cache", folder / "cache"]
            two = peers.measure_together(alone, 2, count=2)
            run = run_whole("xray_elephas.py", options, folder / "run")
            two += peers.measure_together(alone, 2, count=2)
        epochs = run["history"]["images_per_second"][1:].tolist()
        rows.append(
            (f"{run['images']['train']:,}", figures(two), figures(epochs), times(epochs, two))
        )
    head = (
        "images to train on | two processes without Spark, images a second | "
        "xray_elephas.py, two workers, epochs after the first | ratio"
    )
    return table(head, rows)


def speed_of(run: dict) -> float:
    return run["train"]["images_per_second"]


def seconds_of(run: dict) -> float:
    phases = (run[phase]["seconds"] for phase in ("ingest", "setup", "train", "evaluate"))
    return sum(phases) + run["train"]["validation_seconds"]


# ---- learning ----


def learning() -> str:
    """Seconds until validation AUROC reaches 0.80, and the cost of more workers in learning."""
    put(SCALING, "workers", f"{cost_of_workers()}\n\n{measured_by('learning')}")
    return seconds_to_learn()


def seconds_to_learn() -> str:
    """Seconds of training and validation until the mean validation AUROC reaches 0.80."""
    rows, modes = [], ("synchronous", "asynchronous", "hogwild")
    with served(sample()) as (folder, credentials):
        options = ["--credentials", credentials, "--cache", folder / "cache", *DEFAULTS]
        for script, mode in (
            ("xray_tensorflow.py", None),
            *(("xray_elephas.py", mode) for mode in modes),
        ):
            words = [
                *options,
                "--cache",
                folder / f"cache-{script}",
                *(["--mode", mode] if mode else []),
            ]
            result = run_whole(script, [*words, "--epochs", 16], folder / f"{script}-{mode}")
            history = result["history"].set_index("epoch")
            there = history.index[history["validation_auroc"] >= 0.8]
            spent = history[["seconds", "validation_seconds"]].sum(axis=1).cumsum()
            reached = (there[0], f"{spent[there[0]]:.0f}") if len(there) else ("not reached", "")
            best, test = history["validation_auroc"].max(), result["auroc"]["mean"]
            rows.append(
                (
                    f"{script} {mode or ''}".strip(),
                    *reached,
                    f"{best:.3f}",
                    f"{test:.3f} (epoch {result['train']['best_epoch']})",
                )
            )
    head = (
        "the sample, 64 pixels | epochs to 0.80 | seconds to 0.80 | best validation AUROC | "
        "test AUROC of the best epoch"
    )
    return table(head, rows)


# 32 pixels: a run takes half a minute, and validation resolves AUROC differences of about 0.02.
FILMS, FILM_SIZE, FILM_EPOCHS = 1500, 32, 5
SEEDS = (0, 1, 2)
WORKERS = (2, 4, 8, 16)
CHART = ROOT / "docs" / "workers.svg"


class Learner(NamedTuple):
    """A way to train: `script` with `options`; on Spark, with `slots` task slots."""

    name: str
    script: str
    options: list[Any]
    slots: int = 2

    def runs(self, credentials: Path, folder: Path, weights: str) -> list[pd.DataFrame]:
        """The history for each seed, plus `spent`, the cumulative seconds of training."""
        histories = []
        for seed in SEEDS:
            result = run_whole(
                self.script,
                [
                    *("--credentials", credentials, "--cache", folder / f"cache-{self.script}"),
                    *("--weights", weights, "--image-size", FILM_SIZE, "--batch-size", 8),
                    *("--epochs", FILM_EPOCHS, "--seed", seed, *self.options),
                ],
                folder / f"{self.name}-{seed}",
                master=f"local[{self.slots}]",
            )
            history = result["history"]
            histories.append(history.assign(spent=history["seconds"].cumsum()))
        return histories


def learners() -> list[Learner]:
    """N workers, one process with an N-fold batch, and the asynchronous modes."""
    rate = helpers.parse().learning_rate
    one, many = "xray_tensorflow.py", "xray_elephas.py"
    found = [Learner("one process", one, [])]
    found += [Learner(f"{count} workers", many, ["--workers", count]) for count in WORKERS]
    for count in WORKERS:
        # Adam's learning rate for an N-fold batch: Malladi et al., NeurIPS 2022, arXiv:2205.10287.
        words = ["--batch-size", 8 * count, "--learning-rate", rate * count**0.5]
        found.append(Learner(f"one process, {count}-fold batch", one, words))
    words = ["--workers", 8, "--learning-rate", rate / 8**0.5]
    found.append(Learner("8 workers, one process's rate", many, words))
    for mode in ("asynchronous", "hogwild"):
        for count in (2, 8):
            words = ["--workers", count, "--mode", mode]
            found.append(Learner(f"{count} workers, {mode}", many, words, slots=count))
    return found


def cost_of_workers() -> str:
    """Validation AUROC of N workers and of one process with an N-fold batch; writes CHART."""
    histories = {}
    with served(drawn_bucket(FILMS, FILM_SIZE)) as (folder, credentials):
        for learner in learners():
            histories[learner.name] = learner.runs(credentials, folder, WEIGHTS)
    draw_workers(histories)
    rows = [
        (
            name,
            *(
                figures([run["validation_auroc"][epoch - 1] for run in runs], 3)
                for epoch in (1, 3, FILM_EPOCHS)
            ),
            figures([run["validation_auroc"].max() for run in runs], 3),
            figures([run["spent"].iloc[-1] for run in runs], 0),
        )
        for name, runs in histories.items()
    ]
    head = (
        f"{FILMS:,} synthetic radiographs of {FILM_SIZE} pixels, batch size 8: validation AUROC | "
        f"epoch 1 | epoch 3 | epoch {FILM_EPOCHS} | best epoch | seconds of training, two cores"
    )
    chart = f"![Validation AUROC by epochs and by seconds for 2 to 16 workers]({CHART.name})"
    return f"{table(head, rows)}\n\n{chart}"


def drawn_bucket(images: int, size: int) -> dict[str, bytes]:
    """Label file and synthetic radiographs that match their labels, by key, one per patient."""
    rows, draw = read_rows(), random.Random(0)
    named = [(f"{image + 1:08d}_000.png", draw.choice(rows)[1]) for image in range(images)]
    films = {f"images/{name}": draw_radiograph(name, found, size) for name, found in named}
    return {"Data_Entry_2017_v2020.csv": helpers.label_file(named).encode(), **films}


def draw_workers(histories: dict[str, list[pd.DataFrame]]) -> None:
    """Draw validation AUROC by epochs and by seconds: median and range of the seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    shown = [name for name in histories if re.fullmatch(r"\d+ workers?", name)]
    for index, name in enumerate(shown):
        aurocs = np.array([run["validation_auroc"] for run in histories[name]])
        spent = np.median([run["spent"] for run in histories[name]], axis=0)
        epochs = np.arange(1, FILM_EPOCHS + 1)
        for axis, x in zip(axes, (epochs, spent)):
            axis.plot(x, np.median(aurocs, axis=0), f"C{index}o-", ms=3, label=name)
            axis.fill_between(
                x, aurocs.min(axis=0), aurocs.max(axis=0), color=f"C{index}", alpha=0.1
            )
        count = name.split()[0]
        folded = histories[f"one process, {count}-fold batch"]
        median = np.median([run["validation_auroc"] for run in folded], axis=0)
        axes[0].plot(epochs, median, f"C{index}--", lw=1)
    axes[0].plot([], [], "k--", lw=1, label="one process, N-fold batch")
    axes[0].set(xlabel="epochs", ylabel="validation AUROC", xticks=epochs)
    axes[1].set(xlabel="seconds of training on two cores")
    axes[0].legend(fontsize=8)
    figure.savefig(CHART, metadata={"Date": None})
    plt.close(figure)


def sample() -> dict[str, bytes]:
    """The sample bucket's objects."""
    images = {f"images/{name}": draw_radiograph(name, findings) for name, findings in read_rows()}
    return {"Data_Entry_2017_v2020.csv": SAMPLE_LABELS.read_bytes(), **images}


# ---- how costs grow ----


def growth() -> str:
    """Fit costs linearly to three points each, and check the lines against held-out runs.

    Training by pixels, ingest and memory by images, an epoch's overhead by workers.
    """
    sizes = {
        size: peers.Peer(
            peers.our_training,
            arguments_of("--weights", "none", "--epochs", 1000, "--image-size", size, threads=1),
            images,
        )
        for size, images in ((64, 512), (128, 256), (256, 64))
    }
    step = {
        size**2 / 1000: 1000 / statistics.median(speed)
        for size, speed in peers.measure_in_turns(sizes, 3).items()
    }
    with served(made_up_bucket(2400)) as (folder, credentials):
        options = ["--credentials", credentials, "--epochs", 1]
        ingest, memory = {}, []
        # Held-out runs before and after the fitted ones, since the machine's speed may vary.
        one = held_out("xray_tensorflow.py", folder, credentials)
        for count in (300, 900, 1800):
            words = [*options, "--limit", count, "--cache", folder / f"cache-{count}"]
            result = run_whole("xray_tensorflow.py", words, folder / f"run-{count}")
            ingest[count / 1000] = result["ingest"]["seconds"]
            limit = count * 128**2 / 1e6 + 1700
            memory.append(
                (f"{count:,}", f"{result['peak_memory_mb']['driver']:,}", f"{limit:,.0f}")
            )
        options += ["--limit", 300, "--image-size", 64, "--epochs", 4]
        alone = run_whole(
            "xray_tensorflow.py", [*options, "--cache", folder / "cache-300"], folder / "alone"
        )
        overhead = {}
        for workers in (1, 2, 4):
            words = [*options, "--cache", folder / "cache-spark"]
            result = run_whole("xray_elephas.py", words, folder / f"spark-{workers}", workers)
            busy = steady(alone) / min(workers, len(os.sched_getaffinity(0)))
            overhead[workers] = steady(result) - busy
        two = held_out("xray_elephas.py", folder, credentials)
    lines = [line(step), line(ingest), line(overhead)]
    parts = [
        growth_table(
            "thousand pixels an image",
            "milliseconds of training an image, one core",
            step,
            lines[0],
        ),
        growth_table(
            "thousand images", "seconds of ingest, one core, 50 ms a GET", ingest, lines[1]
        ),
        growth_table("workers", "seconds of an epoch beyond training", overhead, lines[2]),
        table(
            "images of 128 pixels | peak memory of xray_tensorflow.py, MB | 1.7 GB + a byte per pixel",
            memory,
        ),
        held_against(one, two, *lines),
        extrapolated(*lines),
    ]
    return "\n\n".join(parts)


HELD_OUT_SIZE = 160  # pixels a side of the held-out runs


def held_out(script: str, folder: Path, credentials: Path) -> dict:
    """A run with more images than the fitted ones, and of another size."""
    words = ["--image-size", HELD_OUT_SIZE, "--epochs", 2, "--cache", folder / f"held-{script}"]
    return run_whole(script, ["--credentials", credentials, *words], folder / f"held-out-{script}")


def held_against(
    one: dict,
    two: dict,
    step: tuple[float, float],
    ingest: tuple[float, float],
    overhead: tuple[float, float],
) -> str:
    """The lines' predictions for the held-out runs (one core, two workers) and the measurements."""
    images, training = sum(one["images"].values()), one["images"]["train"]
    epoch = training * (step[0] * HELD_OUT_SIZE**2 / 1000 + step[1]) / 1000
    checks = [
        (
            "ingest, one core",
            ingest[0] * images / 1000 + ingest[1],
            one["ingest"]["seconds"],
            "its stored images are larger than those of the fitted runs",
        ),
        (
            "an epoch, one core",
            epoch,
            steady(one),
            "it trains in a whole script; the fitted points are steps on pixels in memory",
        ),
        (
            "an epoch, two workers",
            epoch / 2 + overhead[0] * 2 + overhead[1],
            steady(two),
            f"it redistributes {images:,} images in each epoch, the fitted runs 300 of 64 pixels, "
            "and the line depends only on workers",
        ),
    ]
    rows = [
        (what, f"{said:.1f}", f"{took:.1f}", f"{100 * (said / took - 1):+.0f} %")
        for what, said, took, _ in checks
    ]
    head = (
        f"{images:,} images of {HELD_OUT_SIZE} pixels, not used in the fit | "
        "seconds by the lines | measured | difference"
    )
    far = [
        f"How the run differs from the line ({what}): {why}."
        for what, said, took, why in checks
        if abs(said / took - 1) > 0.15
    ]
    return "\n\n".join([table(head, rows), *far])


def steady(run: dict) -> float:
    """Median seconds of the epochs after the first, excluding validation."""
    return run["history"]["seconds"][1:].median()


def line(points: dict[float, float]) -> tuple[float, float]:
    """Slope and constant of the line with the least squared relative residuals."""
    x, y = np.array([*points]), np.array([*points.values()])
    slope, constant = np.polyfit(x, y, 1, w=1 / y)
    return slope, constant


def growth_table(
    what: str, cost: str, points: dict[float, float], fitted: tuple[float, float]
) -> str:
    slope, constant = fitted
    rows = []
    for x, y in points.items():
        said = constant + slope * x
        rows.append((f"{x:g}", f"{y:.2f}", f"{said:.2f}", f"{100 * (y / said - 1):+.1f} %"))
    return table(
        f"{what} | {cost} | line fitted: {constant:.2f} + {slope:.3f} each | residual", rows
    )


def extrapolated(
    step: tuple[float, float], ingest: tuple[float, float], overhead: tuple[float, float]
) -> str:
    """Hours for all of ChestX-ray14 at 128 pixels on such cores, by the fitted lines."""
    images, training = 112_120, 0.7 * 112_120
    image = (step[0] * 128**2 / 1000 + step[1]) / 1000  # seconds
    batch_size = helpers.parse().batch_size
    reading, rows = ingest[0] * images / 1000 + ingest[1], []
    for name, workers in (
        ("xray_tensorflow.py", 1),
        ("xray_elephas.py", 2),
        ("xray_elephas.py", 8),
    ):
        averages = 0
        if name == "xray_elephas.py":
            # The runs behind the line averaged once an epoch.
            averages = math.ceil(training / workers / batch_size / STEPS_ALONE)
        beyond = averages * (overhead[0] * workers + overhead[1])
        epoch = training * image / workers + beyond
        hours = [reading / workers / 3600, epoch / 3600, (reading / workers + 5 * epoch) / 3600]
        rows.append(
            (
                f"{name}, {workers} {'core' if workers == 1 else 'workers'}",
                *(f"{hour:.2f}" for hour in hours),
            )
        )
    head = "EXTRAPOLATED to 112,120 images | hours of ingest | hours an epoch | hours of ingest and 5 epochs"
    return table(head, rows)


# ---- where the time goes ----


def profile() -> str:
    """The parts of a training step, and the share of the core's peak that it reaches."""
    return profile_table(
        peers.measure_once(peers.step_parts, arguments_of("--weights", "none", threads=1))
    )


def profile_table(step: peers.StepParts) -> str:
    """A table of the step's parts. Raises SystemExit if they do not add up or exceed the peak."""
    whole, large = step.whole, step.rates[2048, 2048, 2048]
    shape = max(step.rates.keys() - {(2048, 2048, 2048)}, key=lambda shape: step.rates[shape])
    peak = max(large, step.rates[shape])
    rows = []
    for part, spent in step.milliseconds.items():
        rate = 1000 * step.gflop[part] / spent if part in step.gflop else None
        if rate and rate > peak:
            raise SystemExit(
                f"profile: {part} at {rate:.0f} GFLOP/s, more than the {peak:.0f} of a matrix "
                "product alone: measure again on an idle machine"
            )
        rows.append((part, f"{spent:.0f}", share(spent, whole), f"{rate:.0f}" if rate else ""))
    between = whole - sum(step.milliseconds.values())
    if abs(between) > 0.1 * whole:
        raise SystemExit(
            f"profile: the parts are {between:.0f} ms off the step's {whole:.0f}, more than 10 %: "
            "measure again on an idle machine"
        )
    rows += [
        (
            "between operations: TensorFlow's runtime, Keras",
            f"{between:.0f}",
            share(between, whole),
            "",
        ),
        ("the whole step, without the profiler", f"{whole:.0f}", "100 %", ""),
    ]
    gflop, speed = sum(step.gflop.values()), 32 / whole * 1000
    own = step.rates[shape]
    bound, large_bound = 32 * own / gflop, 32 * large / gflop
    text = (
        f"The step's matrix products are {gflop:.1f} GFLOP. Alone, the best of their shapes, "
        f"{' x '.join(map(str, shape))}, reaches {own:.0f} GFLOP/s in float32 on this core, which limits "
        f"a step to {bound:.0f} images a second; this one runs at {speed:.0f}, "
        f"{share(speed, bound)} of that. A large product, 2048 x 2048 x 2048, reaches {large:.0f} "
        f"GFLOP/s: {large_bound:.0f} images a second, {share(speed, large_bound)}."
    )
    head = "part of a step of 32 images, 128 pixels, one thread | ms | share | GFLOP/s"
    return f"{table(head, rows)}\n\n{text}"


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"


# ---- one GPU ----


def ours_on_gpu(precision: str, xla: bool, host: bool) -> tuple[str, dict[str, Any]]:
    """A name for xray_gpu.py with these options, and the arguments of gpu_peers.ours."""
    compiler, where = "XLA" if xla else "no XLA", "host" if host else "GPU"
    name = f"xray_gpu.py, {precision}, {compiler}, pixels on the {where}"
    return name, {"prepare": gpu_peers.ours, "precision": precision, "xla": xla, "host": host}


GPU_BATCHES = (32, 128, 512)
GPU_PEERS: dict[str, dict[str, Any]] = {
    **dict(
        ours_on_gpu(precision, xla, host)
        for precision, xla in itertools.product(("mixed_float16", "float32"), (True, False))
        for host in (False, True)
    ),
    **{
        f"stock Keras, {precision}": {"prepare": gpu_peers.stock_keras, "precision": precision}
        for precision in ("mixed_float16", "float32")
    },
    "PyTorch eager, bfloat16": {"prepare": gpu_peers.pytorch, "compiled": False},
    "PyTorch `torch.compile` (CUDA graphs), bfloat16": {
        "prepare": gpu_peers.pytorch,
        "compiled": True,
    },
}


def gpu() -> str:
    """Training on one GPU at 128 pixels from scratch, one program after the other."""
    about = about_gpu()
    # nvidia-smi numbers GPUs by bus, CUDA by default by speed.
    os.environ.update(CUDA_DEVICE_ORDER="PCI_BUS_ID", CUDA_VISIBLE_DEVICES="0")
    tables = []
    for batch_size in GPU_BATCHES:
        rows = [(name, *gpu_figures(name, what, batch_size)) for name, what in GPU_PEERS.items()]
        head = (
            f"batches of {batch_size} | images a second | seconds of the first step | GPU busy | "
            "peak memory on it, MB"
        )
        tables.append(table(head, rows))
    kept = f"{about}. The best of three epochs of {gpu_peers.IMAGES:,} random images."
    return "\n\n".join([*tables, kept])


def about_gpu() -> str:
    """Name, driver and memory of the first GPU. Exits with one line if there is none."""
    if shutil.which("nvidia-smi"):
        query = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader", "--id=0"]
        asked = subprocess.run(["nvidia-smi", *query], stdout=subprocess.PIPE, text=True)
        if not asked.returncode:
            return asked.stdout.strip()
    print("benchmark.py: error: gpu needs an NVIDIA GPU: check nvidia-smi", file=sys.stderr)
    raise SystemExit(2)


def gpu_figures(name: str, what: dict[str, Any], batch_size: int) -> tuple[str, ...]:
    """The cells of a row: images a second, seconds of the first step, percent busy, peak MB."""
    if "PyTorch" in name and version_of("torch") == "not installed":
        return "not measured: PyTorch is not installed", "", "", ""
    options = ("--weights", "none", "--epochs", 1000, "--batch-size", batch_size)
    arguments = arguments_of(*options, threads=len(os.sched_getaffinity(0)), **what)
    found = peers.measure_once(gpu_peers.measure, arguments)
    print(name, batch_size, found, flush=True)
    if found is None:
        return "out of memory", "", "", ""
    speed, first, busy, peak = found
    return f"{speed:,.0f}", f"{first:.1f}", f"{busy:.0f} %", f"{peak:,.0f}"


GROUPS = {
    group.__name__: group
    for group in (steps, profile, cores, pixels, ingest, scripts, growth, learning)
}
ELSEWHERE = {"gpu": gpu}  # needs another machine


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "groups", nargs="*", choices=[*GROUPS, *ELSEWHERE, []], help="what to measure [all]"
    )
    chosen = parser.parse_args().groups
    if not chosen:
        put(RESULTS, "machine", measured_by(""))
        for group in GROUPS:  # so that a failed run leaves no old table under the new date
            put(RESULTS, group, "Not measured.")
    for group in chosen or GROUPS:
        start = time.perf_counter()
        tables = {**GROUPS, **ELSEWHERE}[group]()
        put(RESULTS, group, f"{tables}\n\n{measured_by(group)}" if chosen else tables)
        print(f"\n{tables}\n{group}: {time.perf_counter() - start:.0f} s\n", flush=True)


def measured_by(group: str) -> str:
    """A line with the machine, the date and the command."""
    command = f"python tests/benchmark/benchmark.py {group}".rstrip()
    return f"*{machine()}; `{command}`*"


if __name__ == "__main__":
    main()
