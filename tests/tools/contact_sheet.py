"""Draw radiographs of a run's test split with their true and predicted findings: a sheet to look
at, not a measure.

    python tests/tools/contact_sheet.py RUN_FOLDER [--cache DIR] [--output contact_sheet.png]

For each label one test image that has it is drawn at random (seed 0), so that rare findings are
seen. A finding is predicted where its probability reaches the run's threshold (metrics.json). The
pixels are those that the network saw, from the cache of xray_tensorflow.py or xray_gpu.py, which
must be there still. The sample bucket's is made so:

    python tests/sample_bucket.py xray_tensorflow.py --cache cache --output runs/sample
    python tests/tools/contact_sheet.py runs/sample
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLUMNS = 5
# Okabe and Ito's colours, told apart by the colour-blind; the marks say the same without colour.
KINDS = {"found": ("●", "#0072B2"), "missed": ("○", "#D55E00"), "false alarm": ("+", "#555555")}


class SheetError(Exception):
    """What the user can fix, in one line."""


def choose(predictions: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    """A row a label that some image has, drawn from those with the label; no image twice."""
    random = np.random.default_rng(0)
    chosen: list[int] = []
    for label in labels:
        rows = predictions.index[predictions[f"true {label}"] == 1].difference(chosen)
        if len(rows):
            chosen.append(random.choice(rows))
    return predictions.loc[chosen]


def findings(row: pd.Series, thresholds: dict[str, float | None]) -> list[tuple[str, str]]:
    """(kind, text) of what is true or predicted of an image: found, missed, then the false
    alarms.
    """
    told = []
    for label, threshold in thresholds.items():
        true, probability = row[f"true {label}"] == 1, row[f"probability {label}"]
        predicted = threshold is not None and probability >= threshold
        if true or predicted:
            kind = "found" if true and predicted else "missed" if true else "false alarm"
            sign = "" if threshold is None else f" {'≥' if predicted else '<'} {threshold:.3f}"
            told.append((kind, -probability, f"{label.replace('_', ' ')} {probability:.3f}{sign}"))
    told.sort(key=lambda entry: (list(KINDS).index(entry[0]), *entry[1:]))
    return [(kind, text) for kind, _, text in told]


def read_pixels(cache: Path, config: dict, images: list[str]) -> list[np.ndarray]:
    """Grey uint8 (size, size) of each image, from the pixel cache. Raises SheetError where it lacks
    one.
    """
    if not cache.is_file():
        raise SheetError(f"no {cache}: name the run's --cache, which must be there still")
    size, prefix = config["arguments"]["image_size"], config["arguments"]["images"].rstrip("/")
    # The newest: the cache may have images of that name from another server too.
    query = (
        "SELECT pixels FROM pixels WHERE source LIKE ? AND key = ? AND size = ? ORDER BY rowid DESC"
    )
    found = []
    with contextlib.closing(sqlite3.connect(cache)) as connection:
        for image in images:
            key = f"{prefix}/{image}" if prefix else image
            row = connection.execute(
                query, (f"%/{config['arguments']['bucket']}", key, size)
            ).fetchone()
            if row is None:
                raise SheetError(
                    f"{cache} has no {key} of {size} pixels a side: name the run's --cache"
                )
            found.append(np.frombuffer(row[0], np.uint8).reshape(size, size))
    return found


def draw_film(
    axes: Axes, pixels: np.ndarray, name: str, told: list[tuple[str, str]], lines: int
) -> None:
    """One radiograph, and below it its findings, at most `lines`."""
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
    axes.set_title(name, fontsize=9, color="#555555")
    axes.set_axis_off()
    if len(told) > lines:
        told = [*told[: lines - 1], ("false alarm", f"{len(told) - lines + 1} more")]
    for line, (kind, text) in enumerate(told):
        mark, color = KINDS[kind]
        below = (0, -6 - 12 * line)  # points
        place = axes.annotate(f"{mark} {text}", (0, 0), below, "axes fraction", "offset points")
        place.set(color=color, fontsize=8.5, va="top")


def draw_sheet(
    path: Path, films: list[np.ndarray], names: list[str], told: list[list], title: str
) -> None:
    """The films in rows of five."""
    lines = min(max(map(len, told)), 7)
    rows = -(-len(films) // COLUMNS)
    height = 2.3 + 0.2 * lines
    figure = Figure(figsize=(2.3 * COLUMNS, height * rows + 0.55))
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    space = 1 - 0.55 / (height * rows + 0.55)
    figure.subplots_adjust(
        0.01, 0.2 * lines / height / rows * space, 0.99, space, 0.06, (0.2 * lines + 0.3) / 2.1
    )
    for axes in grid.flat[len(films) :]:
        axes.set_axis_off()
    for axes, pixels, name, entries in zip(grid.flat, films, names, told):
        draw_film(axes, pixels, name, entries, lines)
    figure.text(0.01, 0.99, title, va="top", fontsize=13)
    for place, (kind, (mark, color)) in enumerate(KINDS.items()):
        figure.text(
            0.72 + 0.085 * place, 0.99, f"{mark} {kind}", va="top", fontsize=12, color=color
        )
    figure.savefig(path, dpi=90)


def main(words: list[str] | None = None) -> int:
    """Draw the sheet and give the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="of the run [as in its config.json]"
    )
    parser.add_argument(
        "--output", type=Path, metavar="PNG", default="contact_sheet.png", help="[%(default)s]"
    )
    arguments = parser.parse_args(words)
    try:
        if not (arguments.run / "metrics.json").is_file():
            raise SheetError(
                f"{arguments.run} has no metrics.json: it is not the folder of a finished run"
            )
        config, metrics = (
            json.loads((arguments.run / name).read_text())
            for name in ("config.json", "metrics.json")
        )
        predictions = pd.read_csv(arguments.run / "predictions.csv")
        chosen = choose(predictions, list(metrics["thresholds"]))
        names = chosen["image"].tolist()
        films = read_pixels(
            (arguments.cache or Path(config["arguments"]["cache"])) / "pixels.sqlite", config, names
        )
    except SheetError as error:
        print(f"contact_sheet.py: error: {error}", file=sys.stderr)
        return 2
    told = [findings(row, metrics["thresholds"]) for _, row in chosen.iterrows()]
    size = config["arguments"]["image_size"]
    title = (
        f"Test images as the network sees them, {size} × {size} pixels: probability and threshold"
    )
    draw_sheet(arguments.output, films, names, told, title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
