"""Compare runs of the three scripts: a table, and a chart of how many times as fast as one CPU
thread each trains.

    python tests/tools/compare_runs.py [--chart speedup.png] runs/*

reads config.json and metrics.json of each run folder. The runs must be of the same images, split
and CNN, and one of them sequential (xray_tensorflow.py on one thread): the first of those is what
the others are compared with. Exit code 2 and one line where they are not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

PHASES = ["ingest", "setup", "train", "evaluate"]


class CompareError(Exception):
    """Why the runs cannot be compared, in one line."""


class Run(NamedTuple):
    """A run folder's files, read."""

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def sequential(self) -> bool:
        return self.metrics["target"] == {"threads": 1, "held_to_cores": True}

    @property
    def target(self) -> str:
        """What the run ran on, in a few words."""
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
    """Raises CompareError for a folder that is not of a finished run."""
    files = [folder / name for name in ("config.json", "metrics.json")]
    for file in files:
        if not file.is_file():
            raise CompareError(
                f"{folder} has no {file.name}: it is not the folder of a finished run"
            )
    return Run(folder, *(json.loads(file.read_text(encoding="utf-8")) for file in files))


def check(runs: list[Run]) -> Run:
    """The sequential run. Raises CompareError where the runs are not of the same data, split and
    CNN, or lack it.
    """
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
                f"different data: {first.folder} and {run.folder} are not of the same images and labels"
            )
    for run in runs:
        if run.sequential:
            return run
    raise CompareError(
        "none of the runs is sequential (xray_tensorflow.py on one thread): there is nothing to compare to"
    )


def table(runs: list[Run], base: Run) -> str:
    """A line a run: target, images/s of training, speed-up, mean AUROC and its interval, epochs,
    seconds a phase.
    """
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
    """A bar a run, as long as its speed-up; the sequential run's ends at 1."""
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(runs)), layout="constrained")
    axes = figure.subplots()
    speed_ups = [run.speed / base.speed for run in runs]
    bars = axes.barh(
        range(len(runs)), speed_ups, color=["#999999" if run is base else "#0072B2" for run in runs]
    )
    axes.bar_label(
        bars,
        [f"{ratio:.2f} ×  ({run.speed:.0f} images/s)" for ratio, run in zip(speed_ups, runs)],
        padding=4,
    )
    axes.set_yticks(range(len(runs)), [run.target for run in runs])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvline(1, color="black", linewidth=1, linestyle=":")
    axes.set(xlabel="training speed, times that of one CPU thread", xlim=(0, max(speed_ups) * 1.6))
    figure.savefig(path, dpi=120)


def main(words: list[str] | None = None) -> int:
    """Print the table, write the chart, and give the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--chart", type=Path, default=Path("speedup.png"), help="where the chart goes [%(default)s]"
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
