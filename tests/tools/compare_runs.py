"""Compare runs of the three scripts: a table on stdout, and a chart of their speed and learning.

    python tests/tools/compare_runs.py [--chart comparison.png] runs/*

The chart shows each run's training speed relative to one CPU thread, and its validation AUROC
against epochs and against seconds of training and validation.

Reads config.json, metrics.json and history.csv of each run folder. The runs must share images,
split and CNN, and at least one must be sequential (xray_tensorflow.py on one thread): the first of
those is the baseline. Otherwise it prints one line and exits with code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter

PHASES = ["ingest", "setup", "train", "evaluate"]
MARKERS = "os^Dv*PX"


class CompareError(Exception):
    """Why the runs cannot be compared, in one line."""


class Run(NamedTuple):
    """The contents of a run folder."""

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    history: pd.DataFrame

    @property
    def sequential(self) -> bool:
        return self.metrics["target"] == {"threads": 1, "pinned_to_cores": True}

    @property
    def target(self) -> str:
        """The hardware of the run, in a few words."""
        target = self.metrics["target"]
        if "threads" in target:
            return f"{target['threads']} CPU thread{'s' * (target['threads'] > 1)}"
        if "mode" in target:
            return f"Spark, {target['executors']} executors, {target['workers']} workers, {target['mode']}"
        return f"{len(target['gpus'])} × {target['gpus'][0]}"

    @property
    def speed(self) -> float:
        """Training images a second."""
        return self.metrics["train"]["images_per_second"]


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises CompareError if the run has not finished."""
    files = [folder / name for name in ("config.json", "metrics.json", "history.csv")]
    for file in files:
        if not file.is_file():
            raise CompareError(
                f"{folder} has no {file.name}: it is not the folder of a finished run"
            )
    config, metrics = (json.loads(file.read_text(encoding="utf-8")) for file in files[:2])
    return Run(folder, config, metrics, pd.read_csv(files[2]))


def check(runs: list[Run]) -> Run:
    """The sequential run. Raises CompareError if there is none, or data, split or CNN differ."""
    first = runs[0]
    for run in runs[1:]:
        for kind, names in {
            "split": ["seed", "test_list", "limit"],
            "CNN": ["image_size", "weights"],
        }.items():
            for name in names:
                values = [r.config["arguments"][name] for r in (first, run)]
                if values[0] != values[1]:
                    option = f"--{name.replace('_', '-')}"
                    raise CompareError(
                        f"different {kind}: {first.folder} has {option} {values[0]}, {run.folder} {values[1]}"
                    )
        if run.config["data"] != first.config["data"]:
            raise CompareError(
                f"different data: {first.folder} and {run.folder} do not have the same images and labels"
            )
    for run in runs:
        if run.sequential:
            return run
    raise CompareError(
        "none of the runs is sequential (xray_tensorflow.py on one thread): there is no baseline"
    )


def table(runs: list[Run], base: Run) -> str:
    """A line per run: target, images/s, speed-up, AUROC, its interval, epochs, seconds by phase."""
    headers = ["target", "images/s", "speed-up", "mean AUROC", "95 % interval", "epochs"]
    rows = [[*headers, *(f"{phase} s" for phase in PHASES)]]
    for run in runs:
        auroc, train = run.metrics["auroc"], run.metrics["train"]
        low, high = auroc["ci95"]
        seconds = [f"{run.metrics[phase]['seconds']:.1f}" for phase in PHASES]
        speed = [f"{run.speed:.1f}", f"{run.speed / base.speed:.2f}"]
        scores = [f"{auroc['mean']:.3f}", f"{low:.3f} to {high:.3f}"]
        rows.append([run.target, *speed, *scores, str(train["epochs"]), *seconds])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        for row in rows
    ]
    return "\n".join("  ".join(row) for row in rows)


def draw_chart(path: Path, runs: list[Run], base: Run) -> None:
    """Speed-ups above, learning below; each run has the same colour in both."""
    heights = [1.25 + 0.5 * len(runs), 4 + 0.25 * len(runs)]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    above, below = figure.subfigures(2, height_ratios=heights)
    draw_speed(above.subplots(), runs, base)
    by_epoch, by_second = below.subplots(1, 2, sharey=True)
    draw_learning(by_epoch, by_second, runs)
    below.legend(*by_epoch.get_legend_handles_labels(), loc="outside lower center", frameon=False)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def draw_speed(axes: Axes, runs: list[Run], base: Run) -> None:
    """A bar per run, as long as its speed-up; the sequential run's ends at 1."""
    speed_ups = [run.speed / base.speed for run in runs]
    bars = axes.barh(range(len(runs)), speed_ups, color=[f"C{place}" for place in range(len(runs))])
    axes.bar_label(
        bars,
        [f"{ratio:.2f} ×  ({run.speed:.0f} images/s)" for ratio, run in zip(speed_ups, runs)],
        padding=4,
    )
    axes.set_yticks(range(len(runs)), [run.target for run in runs])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1, linestyle=":")
    axes.set(xlabel="training speed, relative to one CPU thread", xlim=(0, max(speed_ups) * 1.6))


def draw_learning(by_epoch: Axes, by_second: Axes, runs: list[Run]) -> None:
    """Each run's validation AUROC by epoch, and by second of training and validation."""
    for place, run in enumerate(runs):
        history = run.history
        look = {"color": f"C{place}", "marker": MARKERS[place % len(MARKERS)], "markersize": 5}
        look["label"] = f"{run.target}: {run.folder.name}"
        by_epoch.plot(history["epoch"], history["validation_auroc"], **look)
        seconds = (history["seconds"] + history["validation_seconds"]).cumsum()
        by_second.plot(seconds, history["validation_auroc"], **look)
    by_epoch.set(xlabel="epoch", ylabel="validation mean AUROC")
    by_epoch.xaxis.get_major_locator().set_params(integer=True)
    # On a linear scale a GPU's curve would be a twentieth as wide as a CPU thread's.
    by_second.set(xlabel="seconds of training and validation (log scale)", xscale="log")
    by_second.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    by_second.xaxis.set_major_formatter(ScalarFormatter())


def main(words: list[str] | None = None) -> int:
    """Print the table, write the chart and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--chart",
        type=Path,
        metavar="PNG",
        default="comparison.png",
        help="file of the chart [%(default)s]",
    )
    arguments = parser.parse_args(words)
    try:
        runs = [read_run(folder) for folder in arguments.runs]
        base = check(runs)
    except CompareError as error:
        print(f"compare_runs.py: error: {error}", file=sys.stderr)
        return 2
    print(table(runs, base))
    draw_chart(arguments.chart, runs, base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
