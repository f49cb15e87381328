"""Measure speed, memory and learning against what a user would write instead; writes the tables of
docs/results.md.

    pip install -r tests/benchmark/requirements.txt
    python tests/benchmark/benchmark.py                    everything, on two idle cores
    python tests/benchmark/benchmark.py steps pixels       these groups alone; the other tables stay as they are

Nothing is compared with a figure of another day: the peers of a table take turns in one run. A
ratio is that of medians.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peers
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
# The scripts and what stands in for a server are in no package.
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "stand_ins")]

import helpers  # noqa: E402
from sample_bucket import DEFAULTS, draw_radiograph, read_rows, write_credentials  # noqa: E402
from sample_bucket import LABELS as SAMPLE_LABELS  # noqa: E402
from static_s3 import static_s3  # noqa: E402

RESULTS = ROOT / "docs" / "results.md"
LATENCY = 0.05  # seconds of a GET: what S3 takes for its first byte


def arguments_of(*options: Any, **more: Any) -> argparse.Namespace:
    """The script's arguments, and what the peers need besides."""
    return argparse.Namespace(**vars(helpers.parse(*options)), **more)


# ---- tables ----


def figures(values: list[float], digits: int = 1) -> str:
    """Median and, of several, the range."""
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
    """What the figures depend on: processor, cores, memory, versions, day."""
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


def publish(group: str, tables: str) -> None:
    """Put the group's tables into docs/results.md, in the place of those before."""
    begin, end = f"<!-- {group}: begin -->", f"<!-- {group}: end -->"
    where = f"*{machine()}; `python tests/benchmark/benchmark.py {group}`*"
    text = RESULTS.read_text()
    before, after = text[: text.index(begin)], text[text.index(end) :]
    RESULTS.write_text(f"{before}{begin}\n{tables}\n\n{where}\n{after}")
    print(f"\n{tables}\n", flush=True)


# ---- training steps ----

# TensorFlow turns oneDNN's kernels on by itself where the CPU has these instructions.
VNNI = "avx512_vnni" in Path("/proc/cpuinfo").read_text()
TRAINERS = {
    "our_training": "xray_tensorflow.py",
    "stock_keras": f"stock Keras, default environment (on this CPU oneDNN is {'on' if VNNI else 'off'})",
    "stock_keras_fit": "the same by `fit` on arrays",
    "stock_keras_without_onednn": "stock Keras, `TF_ENABLE_ONEDNN_OPTS=0`: the default on CPUs without AVX-512 VNNI",
    "pytorch": "PyTorch eager",
    "pytorch_channels_last": "PyTorch eager, channels last",
}


def steps() -> str:
    """Training alone: the CNN of 128 pixels, batches of 32, float32, pixels in memory."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "One thread, from scratch": ["none", 1],
            "One thread, statistics of pretrained weights frozen (what `--weights imagenet` trains)": [
                "frozen",
                1,
            ],
        }
        for title, (weights, threads) in settings.items():
            if weights != "none":
                weights = save_weights(folder)
            arguments = arguments_of("--weights", weights, "--epochs", 1000, threads=threads)
            speeds = peers.measure_in_turns(
                [getattr(peers, name) for name in TRAINERS], arguments, 128, 3
            )
            rows = [
                (TRAINERS[name], figures(speed), times(speeds["our_training"], speed))
                for name, speed in speeds.items()
            ]
            parts.append(
                f"**{title}**\n\n{table('what | images a second | ours against it', rows)}"
            )
    return "\n\n".join(parts)


def cores() -> str:
    """What more cores give to training without Spark: TensorFlow's own threads, and processes that
    share nothing.
    """
    one, two, together = [], [], []
    for _ in range(3):  # in turns, as the machine may not be as fast all the time
        for speeds, threads in ((one, 1), (two, 2)):
            arguments = arguments_of("--weights", "none", "--epochs", 1000, threads=threads)
            speeds += peers.measure_in_turns([peers.our_training], arguments, 256, 2)[
                "our_training"
            ]
        arguments = arguments_of("--weights", "none", "--epochs", 1000, threads=1)
        together += peers.measure_together(peers.our_training, arguments, 256, 2, count=2)
    rows = [
        ("xray_tensorflow.py on one core", figures(one), "1.00"),
        ("xray_tensorflow.py --threads 2", figures(two), f"{ratio(two, one):.2f}"),
        (
            "two processes of it, which share nothing",
            figures(together),
            f"{ratio(together, one):.2f}",
        ),
    ]
    return table("128 pixels, from scratch, no Spark | images a second | against one core", rows)


def save_weights(folder: str) -> str:
    """A file of weights for the CNN, made in a process of its own: which ones does not change the
    speed.
    """
    path = f"{folder}/mobilenet.weights.h5"
    code = "import sys, keras; m = keras.applications.MobileNet((128, 128, 3), include_top=False, weights=None); "
    subprocess.run(
        [sys.executable, "-c", code + "m.save_weights(sys.argv[1])", path],
        check=True,
        capture_output=True,
    )
    return path


# ---- a bucket of any size ----


def made_up_bucket(images: int, size: int = 1024, distinct: int = 40) -> dict[str, bytes]:
    """Label file and radiographs by key: `images` of them in the sample's proportions, of
    `distinct` files.
    """
    rows, draw = read_rows(), random.Random(0)
    files = []
    for name, findings in rows[:distinct]:
        png = io.BytesIO()
        # The compression that most PNGs have; the sample's own is made for quick drawing.
        Image.open(io.BytesIO(draw_radiograph(name, findings, size))).convert("L").save(png, "PNG")
        files.append(png.getvalue())
    names = [f"{image // 4 + 1:08d}_{image % 4:03d}.png" for image in range(images)]
    labels = helpers.label_file([(name, draw.choice(rows)[1]) for name in names])
    objects = {f"images/{name}": file for name, file in zip(names, itertools.cycle(files))}
    return {"Data_Entry_2017_v2020.csv": labels.encode(), **objects}


@contextmanager
def served(objects: dict[str, bytes]) -> Iterator[tuple[Path, Path]]:
    """A folder, and the credentials file of an S3 server with these objects, 50 ms away."""
    with static_s3(objects, LATENCY) as endpoint, tempfile.TemporaryDirectory() as folder:
        yield Path(folder), write_credentials(Path(folder), endpoint)


# ---- pixels ----


def pixels() -> str:
    """From the bucket to pixels on one core, every GET 50 ms late."""
    objects = made_up_bucket(4000)
    files = [data for key, data in objects.items() if key.endswith(".png")][:40]
    with served(objects) as (folder, credentials):
        more = {"threads": 1, "folder": str(folder), "files": files}
        arguments = arguments_of("--credentials", credentials, "--weights", "none", **more)
        chosen = [peers.bare_decoding, peers.our_ingest]
        speeds = peers.measure_in_turns(chosen, arguments, 1200, 4)
        # On more images, as most of what it takes for few is to connect and list.
        cached = peers.measure_in_turns([peers.our_cached_start], arguments, 4000, 5)[
            "our_cached_start"
        ]
        both = [peers.training_from_the_bucket, peers.our_training]
        epochs = peers.measure_in_turns(
            both, argparse.Namespace(**{**vars(arguments), "epochs": 1000}), 192, 3
        )
    bare, ours = (speeds[peer.__name__] for peer in chosen)
    naive, training = (epochs[peer.__name__] for peer in both)
    rows = [
        ("Pillow decoding the same files from memory, nothing else", figures(bare), ""),
        ("xray_tensorflow.py: fetch, decode, resize, store", figures(ours), times(ours, bare)),
        (
            "xray_tensorflow.py, 4,000 images from the cache",
            figures(cached),
            f"{times(cached, ours)} (against ingest)",
        ),
        ("an epoch that fetches and decodes in each step, stock Keras", figures(naive), ""),
        ("an epoch of xray_tensorflow.py", figures(training), f"{ratio(training, naive):.1f}"),
    ]
    once = (
        5
        / statistics.median(naive)
        / (1 / statistics.median(ours) + 5 / statistics.median(training))
    )
    kept = f"Five epochs with ingest: {once:.1f} times faster than fetching in each epoch (computed from the rows)."
    return table("one core | images a second | ratio", rows) + "\n\n" + kept


# ---- whole scripts ----


def run_whole(script: str, options: list[Any], output: Path, workers: int = 2) -> dict:
    """A script's result line; its history as `history`, and the JVM's peak memory in MB where it
    has one.
    """
    command = [Path(sys.executable), ROOT / script]
    if script == "xray_elephas.py":
        command = [
            Path(sys.executable).with_name("spark-submit"),
            *("--master", f"local-cluster[{workers},1,1024]"),
            # So small that what Java has in memory is what it needs, not garbage that it had no
            # reason to collect.
            *("--driver-memory", "512m"),
            command[1],
        ]
    command += [*options, "--weights", "none", "--output", output]
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
    """The peak of the resident memory of a process, in MB; 0 of one that has ended."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) // 977 if found else 0


def scripts() -> str:
    """The sequential script against Elephas with two workers of one core each: ingest, epochs,
    memory.
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
    arguments = arguments_of("--weights", "none", "--epochs", 1000, threads=2)
    for name, speed in peers.measure_in_turns(
        [getattr(peers, name) for name in TRAINERS], arguments, 128, 2
    ).items():
        what = f"the same against {TRAINERS[name]} with two threads"
        rows.append((what, figures(speed), figures([speed_of(two)]), times([speed_of(two)], speed)))
    seconds = [seconds_of(run) for run in (one, two)]
    rows.append(
        (
            "whole run of 3 epochs, seconds",
            *(f"{each:.0f}" for each in seconds),
            f"{seconds[0] / seconds[1]:.2f}",
        )
    )
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
    head = f"6,000 images of 1024 pixels, {training:,} to train on | one process | xray_elephas.py, two workers"
    tall = (
        "peak memory, MB | xray_tensorflow.py | driver of xray_elephas.py, Python | the same, Java"
    )
    return f"{table(head + ' | ratio', rows)}\n\n{table(tall, memory)}"


def speed_of(run: dict) -> float:
    return run["train"]["images_per_second"]


def seconds_of(run: dict) -> float:
    phases = (run[phase]["seconds"] for phase in ("ingest", "setup", "train", "evaluate"))
    return sum(phases) + run["train"]["validation_seconds"]


# ---- learning ----


def learning() -> str:
    """Seconds of training, validation included, until the mean AUROC of the validation split is
    0.80.
    """
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
                    f"{script} {mode or ''}",
                    *reached,
                    f"{best:.3f}",
                    f"{test:.3f} after {len(history)}",
                )
            )
    head = "the sample, 64 pixels | epochs to 0.80 | seconds to 0.80 | best validation AUROC | test AUROC after epochs"
    return table(head, rows)


def sample() -> dict[str, bytes]:
    """The sample bucket's objects."""
    images = {f"images/{name}": draw_radiograph(name, findings) for name, findings in read_rows()}
    return {"Data_Entry_2017_v2020.csv": SAMPLE_LABELS.read_bytes(), **images}


# ---- how cost grows ----


def growth() -> str:
    """Training by pixels a side, ingest and memory by images, an epoch's overhead by workers: three
    points each.
    """
    step = {}
    for size, images in ((64, 512), (128, 256), (256, 64)):
        arguments = arguments_of(
            "--weights", "none", "--epochs", 1000, "--image-size", size, threads=1
        )
        speed = peers.measure_in_turns([peers.our_training], arguments, images, 3)["our_training"]
        step[size**2 / 1000] = 1000 / statistics.median(speed)
    with served(made_up_bucket(1800)) as (folder, credentials):
        options = ["--credentials", credentials, "--epochs", 1]
        ingest, memory = {}, []
        for count in (300, 900, 1800):
            words = [*options, "--limit", count, "--cache", folder / f"cache-{count}"]
            result = run_whole("xray_tensorflow.py", words, folder / f"run-{count}")
            ingest[count / 1000] = result["ingest"]["seconds"]
            limit = 1.2 * count * 128**2 / 1e6 + 2000
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
            "images of 128 pixels | peak memory of xray_tensorflow.py, MB | 1.2 x pixels + 2 GB",
            memory,
        ),
        extrapolated(*lines),
    ]
    return "\n\n".join(parts)


def steady(run: dict) -> float:
    """Median seconds of the epochs after the first, validation left out."""
    return run["history"]["seconds"][1:].median()


def line(points: dict[float, float]) -> tuple[float, float]:
    """Slope and constant of the least squares line."""
    slope, constant = np.polyfit([*points], [*points.values()], 1)
    return slope, constant


def growth_table(
    what: str, cost: str, points: dict[float, float], fitted: tuple[float, float]
) -> str:
    slope, constant = fitted
    rows = [(f"{x:g}", f"{y:.2f}", f"{constant + slope * x:.2f}") for x, y in points.items()]
    return table(f"{what} | {cost} | line fitted: {constant:.2f} + {slope:.3f} each", rows)


def extrapolated(
    step: tuple[float, float], ingest: tuple[float, float], overhead: tuple[float, float]
) -> str:
    """Hours for all of ChestX-ray14 at 128 pixels on cores like these, by the fitted lines."""
    images, training = 112_120, 0.7 * 112_120
    image = (step[0] * 128**2 / 1000 + step[1]) / 1000  # seconds
    reading, rows = ingest[0] * images / 1000 + ingest[1], []
    for name, workers in (
        ("xray_tensorflow.py", 1),
        ("xray_elephas.py", 2),
        ("xray_elephas.py", 8),
    ):
        beyond = overhead[0] * workers + overhead[1] if name == "xray_elephas.py" else 0
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
    """The parts of a training step, each measured alone, and the share of the core's peak that the
    step reaches.
    """
    measured = peers.measure_once(peers.step_parts, arguments_of("--weights", "none", threads=1))
    whole = measured.pop("the whole step")
    peak = measured.pop("GFLOP/s of a large matrix product")
    flops = measured.pop("GFLOP of matrix products in a step")
    rows = [(part, f"{each:.0f}", f"{100 * each / whole:.0f} %") for part, each in measured.items()]
    rest = whole - sum(measured.values())
    rows += [("rest: Adam, input, pooling, loss", f"{rest:.0f}", f"{100 * rest / whole:.0f} %")]
    rows += [("the whole step", f"{whole:.0f}", "100 %")]
    bound = 32 / (flops / peak)
    text = (
        f"Peak of one core in a large float32 matrix product: {peak:.0f} GFLOP/s. The step's matrix products are "
        f"{flops:.1f} GFLOP, so no step could be faster than {bound:.0f} images a second; this one runs at "
        f"{32 / whole * 1000:.0f}: {100 * 32 / whole * 1000 / bound:.0f} % of the bound."
    )
    return (
        table("part of a step of 32 images, 128 pixels, one thread | ms | share", rows)
        + "\n\n"
        + text
    )


GROUPS = {
    group.__name__: group for group in (steps, cores, pixels, scripts, learning, growth, profile)
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="what to measure [all]")
    for group in parser.parse_args().groups or GROUPS:
        publish(group, GROUPS[group]())


if __name__ == "__main__":
    main()
