"""Draw a sheet of a run's test images, true and predicted findings, and where the network looks.

    python tests/tools/contact_sheet.py RUN_FOLDER [--finding LABEL] [--cache DIR] [--output PNG]

The sheet is for looking at; it measures nothing. It has one random test image (seed 0) for each
label, so that rare findings appear too. A finding is predicted if its probability reaches the run's
threshold (metrics.json).

Next to each radiograph is the class activation map (Zhou et al., CVPR 2016, arXiv:1512.04150) of
its most probable finding, or of --finding. "No Finding" is a label but not a finding: only
--finding "No Finding" shows its map. The map is exact: its mean over the image, plus the bias of
the output layer, is the log-odds that the network gives the finding. Orange regions raise the
log-odds, purple regions lower them, in full colour at the map's strongest value: the scale differs
from map to map and is printed below each. A map has one value per 32 x 32 pixels of the network's
input (4 x 4 values at 128 pixels), interpolated bilinearly: it shows a region, not an outline.

The pixels are those that the network saw, from the cache of xray_tensorflow.py or xray_gpu.py; the
maps also need model.keras. To make a sheet of the sample bucket:

    python tests/sample_bucket.py xray_tensorflow.py --image-size 128 --cache cache \\
        --output runs/sample
    python tests/tools/contact_sheet.py runs/sample
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from scipy.ndimage import affine_transform

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from xray_tensorflow import limit_tensorflow  # noqa: E402

# Okabe and Ito's colours, safe for colour-blind readers; the marks say the same without colour.
KINDS = {"found": ("●", "#0072B2"), "missed": ("○", "#D55E00"), "false alarm": ("+", "#555555")}
# Lowers the log-odds, no effect (transparent), raises them.
MAP_COLORS = LinearSegmentedColormap.from_list("map", ["#8A2BE2A6", "#FFFFFF00", "#FF8C00A6"])
STRIDE = 32  # pixels of MobileNet's input from one value of its last feature map to the next

# Inches.
COLUMNS = 3
SIDE = 1.5  # of a film, and of its map
MARGIN = 0.12
BETWEEN = 0.25  # between two films with their maps
TITLE = 0.2  # of a film
LINE = 0.165  # of text
HEADER = 0.95


class SheetError(Exception):
    """A one-line message for the user."""


def choose(predictions: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    """A random row for each label that occurs, among the images with it; no image twice."""
    random = np.random.default_rng(0)
    chosen: list[int] = []
    for label in labels:
        rows = predictions.index[predictions[f"true {label}"] == 1].difference(chosen)
        if len(rows):
            chosen.append(random.choice(rows))
    return predictions.loc[chosen]


def findings(row: pd.Series, thresholds: dict[str, float | None]) -> list[tuple[str, str]]:
    """(kind, text) of an image's true or predicted findings: found, missed, then false alarms."""
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


def most_probable(row: pd.Series, labels: list[str]) -> str:
    """The most probable finding of an image, "No Finding" excluded."""
    candidates = [label for label in labels if label != "No Finding"]
    return max(candidates, key=lambda label: row[f"probability {label}"])


def read_pixels(cache: Path, config: dict, images: list[str]) -> np.ndarray:
    """Grey uint8 (n, size, size) from the pixel cache. Raises SheetError if an image is missing."""
    if not cache.is_file():
        raise SheetError(f"no {cache}: give the run's --cache, which must still exist")
    size, prefix = config["arguments"]["image_size"], config["arguments"]["images"].rstrip("/")
    # The newest: the cache may also have images of that name from another server.
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
                    f"{cache} has no {key} of {size} pixels a side: give the run's --cache"
                )
            found.append(np.frombuffer(row[0], np.uint8).reshape(size, size))
    return np.stack(found)


def load_model(path: Path) -> Any:
    """The Keras model of a run, on the CPU, without TensorFlow's startup messages."""
    limit_tensorflow(1)
    import keras

    return keras.models.load_model(path, compile=False)  # Keras warns of some optimizers' state


def class_activation_maps(model: Any, pixels: np.ndarray) -> np.ndarray:
    """Maps (n, h, w, 15) of grey uint8 (n, size, size): what each place adds to each label's logit.

    A map's mean plus the bias of the output layer is the logit, since MobileNet ends in global
    average pooling and one dense layer (Zhou et al., CVPR 2016, arXiv:1512.04150).
    """
    import keras

    backbone = model.get_layer("mobilenet")
    before_pooling = keras.Model(backbone.input, backbone.layers[-1].input)
    features = keras.Model(model.input, before_pooling(model.get_layer("grey_to_rgb").output))
    kernel, _ = model.get_layer("findings").get_weights()
    return features.predict(pixels[..., None], verbose=0).astype(np.float32) @ kernel


def enlarge(values: np.ndarray, size: int) -> np.ndarray:
    """A map (h, w) at the pixels (size, size) of the network's input, by bilinear interpolation.

    MobileNet's five convolutions of stride 2 each pad right and below only, so value i is centred
    on pixel 32 i + 31. Stretched to the image's edges, the map would lie half a value too far up
    and left.
    """
    scale = np.eye(2) / STRIDE
    offset = -(STRIDE - 1) / STRIDE
    return affine_transform(values, scale, offset, (size, size), order=1, mode="nearest")


def show_picture(figure: Figure, left: float, top: float, pixels: np.ndarray, title: str) -> Axes:
    """Draw a square film; `left` and `top` are in inches from the sheet's upper left corner."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes(
        (left / width, 1 - (top + SIDE) / height, SIDE / width, SIDE / height), frameon=False
    )
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
    axes.set_title(title, fontsize=8.5, color="#333333", pad=3)
    axes.set(xticks=[], yticks=[])
    return axes


def write_below(axes: Axes, line: int, text: str, **look: str) -> None:
    """Write a line of text below a film, aligned by `ha`."""
    corner = (1 if look["ha"] == "right" else 0, 0)
    below = (0, -4 - 72 * LINE * line)  # points
    axes.annotate(
        text, corner, below, "axes fraction", "offset points", va="top", fontsize=8.5, **look
    )


def draw_sheet(
    path: Path,
    films: np.ndarray,
    names: list[str],
    told: list[list[tuple[str, str]]],
    maps: np.ndarray,
    mapped: list[str],
) -> None:
    """Draw films (n, size, size), each with its map (n, h, w), the map's title and the findings."""
    size = films.shape[1]
    rows = [range(len(films))[start : start + COLUMNS] for start in range(0, len(films), COLUMNS)]
    heights = [SIDE + LINE * max(len(told[film]) for film in row) + TITLE + BETWEEN for row in rows]
    pair = 2 * SIDE + 0.04
    width = 2 * MARGIN + COLUMNS * pair + (COLUMNS - 1) * BETWEEN
    figure = Figure(figsize=(width, HEADER + sum(heights)))
    draw_header(figure, size, maps.shape[1:])
    top = HEADER + TITLE
    for row, height in zip(rows, heights):
        for column, film in enumerate(row):
            left = MARGIN + column * (pair + BETWEEN)
            axes = show_picture(figure, left, top, films[film], names[film])
            for line, (kind, text) in enumerate(told[film]):
                mark, color = KINDS[kind]
                write_below(axes, line, f"{mark} {text}", color=color, ha="left")
            axes = show_picture(figure, left + pair - SIDE, top, films[film], mapped[film])
            strongest = np.abs(maps[film]).max()
            enlarged = enlarge(maps[film], size)
            axes.imshow(enlarged, cmap=MAP_COLORS, vmin=-strongest, vmax=strongest)
            write_below(axes, 0, f"scale ± {strongest:.1f}", color="#333333", ha="right")
        top += height
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})


def draw_header(figure: Figure, size: int, grid: tuple[int, ...]) -> None:
    """Explain the sheet, its marks and the colour scale of its maps."""
    width, height = figure.get_size_inches()

    def write(left: float, top: float, text: str, **look: Any) -> None:
        figure.text(left / width, 1 - top / height, text, va="top", **look)

    title = f"Test images as the network sees them ({size} × {size} pixels), and where it looks"
    write(MARGIN, 0.1, title, fontsize=12)
    explained = (
        "Below each image: its true and predicted findings, with probability and threshold.\n"
        "Beside it: class activation map of the finding named above the map.\nA map has "
        f"{grid[0]} × {grid[1]} values; their mean + the output bias = the log-odds of the finding."
    )
    write(MARGIN, 0.4, explained, fontsize=9, color="#333333", linespacing=1.3)
    right = width - MARGIN - 2.9
    for place, (kind, (mark, color)) in enumerate(KINDS.items()):
        write(right + 0.9 * place, 0.12, f"{mark} {kind}", fontsize=11, color=color)
    bar = figure.add_axes((right / width, 1 - 0.62 / height, 2.8 / width, 0.14 / height))
    bar.set_facecolor("#808080")  # a film's grey
    colors = ScalarMappable(Normalize(-1, 1), MAP_COLORS)
    colorbar = figure.colorbar(colors, bar, orientation="horizontal")
    colorbar.set_ticks([-1, 0, 1], labels=["lowers (− scale)", "log-odds", "raises (+ scale)"])
    for tick, side in zip(bar.get_xticklabels(), ("left", "center", "right")):
        tick.set(horizontalalignment=side, fontsize=8.5)


def main(words: list[str] | None = None) -> int:
    """Draw the sheet and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER")
    parser.add_argument(
        "--finding",
        metavar="LABEL",
        help='label whose maps to show [each image\'s most probable, except "No Finding"]',
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="pixel cache of the run [as in its config.json]"
    )
    parser.add_argument(
        "--output", type=Path, metavar="PNG", default="contact_sheet.png", help="[%(default)s]"
    )
    arguments = parser.parse_args(words)
    try:
        for name in ("metrics.json", "model.keras"):
            if not (arguments.run / name).is_file():
                raise SheetError(
                    f"{arguments.run} has no {name}: it is not the folder of a finished run"
                )
        config, metrics = (
            json.loads((arguments.run / name).read_text())
            for name in ("config.json", "metrics.json")
        )
        labels = list(metrics["thresholds"])
        if arguments.finding not in (None, *labels):
            raise SheetError(f"no label {arguments.finding}: --finding takes {', '.join(labels)}")
        predictions = pd.read_csv(arguments.run / "predictions.csv")
        chosen = choose(predictions, labels)
        names = chosen["image"].tolist()
        films = read_pixels(
            (arguments.cache or Path(config["arguments"]["cache"])) / "pixels.sqlite", config, names
        )
    except SheetError as error:
        print(f"contact_sheet.py: error: {error}", file=sys.stderr)
        return 2
    told = [findings(row, metrics["thresholds"]) for _, row in chosen.iterrows()]
    mapped = [arguments.finding or most_probable(row, labels) for _, row in chosen.iterrows()]
    titles = [
        f"{label.replace('_', ' ')} {row[f'probability {label}']:.3f}"
        for label, (_, row) in zip(mapped, chosen.iterrows())
    ]
    maps = class_activation_maps(load_model(arguments.run / "model.keras"), films)
    maps = np.stack([maps[film, ..., labels.index(label)] for film, label in enumerate(mapped)])
    draw_sheet(arguments.output, films, names, told, maps, titles)
    return 0


if __name__ == "__main__":
    sys.exit(main())
