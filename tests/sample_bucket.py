"""Try a training script without an AWS account, on a local S3 server with a small sample bucket.

    python tests/sample_bucket.py xray_tensorflow.py [options of the script]

Starts moto's S3 server on 127.0.0.1, fills the bucket cs205-project-xray, writes a credentials.yml
and runs the script on it as a user would. Your options follow the sample's own and override them.
When the script ends, the server and the temporary folder are removed, and its exit code is passed
on.

The labels are real. tests/sample_labels.csv holds rows of Data_Entry_2017_v2020.csv, copied
verbatim: up to four random images of each of 130 random patients (seed 0), then one or two rows
each of more patients with a finding, rarest finding first, until with seed 0 each finding has 9
rows in the training split, 2 in validation and 4 in test, or as many as its real share of 360 rows.
Rare findings are therefore more common here than in the real file. The data provider is the NIH
Clinical Center (https://nihcc.app.box.com/v/ChestXray-NIHCC): Wang et al., "ChestX-ray8:
Hospital-scale Chest X-ray Database and Benchmarks on Weakly-Supervised Classification and
Localization of Common Thorax Diseases", CVPR 2017.

The images are synthetic: each is drawn from the file name and the row's findings, as a cartoon of
what a radiologist would see. A good score shows that the program runs, nothing about patients.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import boto3
import numpy as np
from botocore.client import BaseClient
from moto.server import ThreadedMotoServer
from PIL import Image

BUCKET = "cs205-project-xray"
LABELS = Path(__file__).with_name("sample_labels.csv")
TRUNCATED = "00001704_000.png"  # a 'No Finding' of the training split with seed 0: its upload broke off halfway
# Enough for a test AUROC of about 0.9 after a minute of training on one core.
DEFAULTS = [
    "--weights",
    "none",
    "--image-size",
    "64",
    "--epochs",
    "12",
    "--batch-size",
    "8",
    "--learning-rate",
    "1e-3",
]
# Side of the square that the anatomy is drawn on, in pixels, before it is enlarged to the film.
GRID = 320


# ---- the synthetic radiograph ----


class Chest(NamedTuple):
    """A chest on film: arrays (GRID, GRID), x and y from 0 to 1, lung 0 on the film's left."""

    film: np.ndarray  # grey levels, 0 black to 255 white; painted in place
    x: np.ndarray
    y: np.ndarray
    u: tuple[np.ndarray, np.ndarray]  # for each lung: -1 at the spine, 1 at the ribs
    v: np.ndarray  # 0 at the apex of the lungs, 1 at their lowest point
    lung: tuple[np.ndarray, np.ndarray]  # for each lung: 1 inside, 0 outside
    centre: float  # x of the spine
    base: float  # y of the lungs' lowest point


def random_stream(*words: str) -> np.random.Generator:
    """A generator seeded by the words alone, so that images can be redrawn in any order."""
    return np.random.default_rng(
        int.from_bytes(hashlib.sha256("/".join(words).encode()).digest()[:8], "big")
    )


def inside(distance: np.ndarray, edge: float) -> np.ndarray:
    """1 if `distance` is negative, 0 if positive, with a ramp of width `edge` between."""
    return np.clip(0.5 - distance / edge, 0, 1)


def clouds(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise (GRID, GRID) of about unit variance; blobs span 1 / `cells` of the film."""
    coarse = rng.standard_normal((cells, cells), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((GRID, GRID), Image.Resampling.BICUBIC))


def blend(chest: Chest, weight: np.ndarray, level: float | np.ndarray) -> None:
    """Blend the film towards a grey level by weight (GRID, GRID): 0 leaves a pixel, 1 covers it."""
    chest.film[:] += (level - chest.film) * weight


def draw_chest(patient: str, findings: Collection[str]) -> Chest:
    """The patient's chest with the findings that reshape it: Cardiomegaly and Emphysema."""
    rng = random_stream(patient)
    y, x = np.mgrid[0:GRID, 0:GRID].astype(np.float32) / GRID
    centre, width, top, base = rng.normal((0.5, 0.175, 0.12, 0.78), (0.01, 0.005, 0.01, 0.01))
    dome, heart, tissue, air = rng.normal((0.12, 0.13, 150, 66), (0.01, 0.007, 8, 5))
    if "Emphysema" in findings:
        width, top, base, dome, heart, air = width * 1.08, top * 0.6, 0.9, 0.03, heart * 0.7, 26
    if "Cardiomegaly" in findings:
        heart *= 1.75
    v = (y - top) / (base - top)
    u, lung = [], []
    for side in (-1, 1):
        u.append(side * (x - centre - side * 0.21) / (width * (0.68 + 0.32 * np.clip(v, 0, 1))))
        wall = np.hypot(u[-1], np.clip(0.6 - v, 0, 1) / 0.6) - 1
        floor = y - base + dome * np.clip(1.1 - u[-1] ** 2, -1, 1) - 0.02 * side
        lung.append(inside(np.maximum(wall, floor * 4), 0.16))
    chest = Chest(np.full_like(x, 18), x, y, tuple(u), v, tuple(lung), centre, base)
    # Air and blood vessels.
    draw_body(chest, tissue, air + 4 * clouds(rng, 48) + 3 * clouds(rng, 24))
    draw_middle(chest, heart)
    return chest


def draw_body(chest: Chest, tissue: float, air: np.ndarray) -> None:
    """Draw neck, shoulders, flanks, abdomen, lungs, ribs and collar bones."""
    aside = np.abs(chest.x - chest.centre)
    trunk = np.maximum(
        aside - 0.44 - 0.1 * inside(chest.y - 0.4, 0.3), 0.3 * aside + 0.02 - chest.y
    )
    body = np.maximum(inside(trunk, 0.05), inside(aside - 0.12, 0.06))
    lungs = chest.lung[0] + chest.lung[1]
    blend(chest, body, tissue)
    blend(chest, body * inside(chest.base - 0.12 - chest.y, 0.25) * inside(aside - 0.38, 0.15), 205)
    blend(chest, lungs, air)
    out = np.where(chest.x < chest.centre, chest.u[0], chest.u[1])
    ribs = np.clip(np.cos(2 * np.pi * (8 * chest.v - 0.8 * (out + 0.3) ** 2)) - 0.4, 0, 1)
    cage = inside(np.abs(out) - 1.1, 0.2) * inside(np.abs(chest.v - 0.45) - 0.5, 0.1)
    collar = inside(np.abs(chest.y - 0.19 + 0.25 * aside) - 0.012, 0.015) * inside(
        np.abs(aside - 0.22) - 0.18, 0.03
    )
    chest.film[:] += 20 * ribs * cage + 25 * collar


def draw_middle(chest: Chest, heart: float) -> None:
    """Draw spine, great vessels, lung roots and heart; `heart` is its half-width in film widths."""
    aside = chest.x - chest.centre
    spine = inside(np.abs(aside) - 0.055, 0.06) * (0.8 + 0.1 * np.cos(2 * np.pi * 18 * chest.y))
    across, down = aside - 0.3 * heart, chest.y - chest.base + 0.19
    beat = np.hypot((across - 0.25 * down) / heart, (down + 0.15 * across) / 0.15) - 1
    roots = [
        inside(np.hypot(aside - side * 0.1, chest.y - 0.42) / 0.07 - 1, 1.4) * 0.5
        for side in (-1, 1)
    ]
    for weight in (*roots, spine, 0.9 * inside(beat, 0.25)):
        blend(chest, weight, 205)


# ---- the findings: each paints roughly what it looks like ----


def some_lungs(rng: np.random.Generator, both: float) -> list[int]:
    """Which lungs are ill: both with probability `both`, otherwise one at random."""
    return [0, 1] if rng.random() < both else [int(rng.integers(2))]


def paint_discs(
    chest: Chest, rng: np.random.Generator, lungs: list[int], radius: float, edge: float
) -> None:
    """Paint a bright disc somewhere in each of the lungs; radius in film widths."""
    for lung in lungs:
        places = np.flatnonzero((np.abs(chest.u[lung]) < 0.65) & (np.abs(chest.v - 0.46) < 0.3))
        place = rng.choice(places)
        away = np.hypot(chest.x - chest.x.flat[place], chest.y - chest.y.flat[place])
        blend(chest, inside(away / (radius * rng.uniform(0.85, 1.15)) - 1, edge), 250)


def atelectasis(chest: Chest, rng: np.random.Generator) -> None:
    """Plates: bright lines across the lower lung."""
    for lung in some_lungs(rng, both=0.5):
        height, tilt = chest.v - rng.uniform(0.44, 0.52), rng.uniform(-0.08, 0.08) * chest.u[lung]
        for plate in range(3):
            blend(
                chest,
                chest.lung[lung] * inside(np.abs(height - 0.14 * plate - tilt) - 0.025, 0.025),
                215,
            )


def consolidation(chest: Chest, rng: np.random.Generator) -> None:
    """A filled upper lobe, down to the fissure."""
    lung = some_lungs(rng, both=0)[0]
    fissure = rng.uniform(0.5, 0.58) + 0.06 * chest.u[lung]
    blend(chest, chest.lung[lung] * inside(chest.v - fissure, 0.05) * 0.95, 230)


def edema(chest: Chest, rng: np.random.Generator) -> None:
    """Bat wings: haze on both sides of the heart."""
    strength = rng.uniform(0.8, 0.95)
    for lung in (0, 1):
        wing = np.hypot((chest.u[lung] + 0.9) / 1.4, (chest.v - 0.5) / 0.3) - 1
        blend(chest, chest.lung[lung] * inside(wing, 0.8) * strength, 195)


def effusion(chest: Chest, rng: np.random.Generator) -> None:
    """Fluid at the base, rising towards the walls."""
    for lung in some_lungs(rng, both=0.3):
        level = rng.uniform(0.52, 0.68) - 0.1 * np.abs(chest.u[lung]) ** 3
        blend(chest, chest.lung[lung] * inside(level - chest.v, 0.06), 205)


def fibrosis(chest: Chest, rng: np.random.Generator) -> None:
    """A mesh over both bases."""
    pitch = rng.uniform(0.07, 0.085)
    warp = 0.006 * clouds(rng, 10)
    rising, falling = (np.cos(2 * np.pi * (chest.x + s * chest.y + warp) / pitch) for s in (-1, 1))
    net = np.clip(2 * np.maximum(rising, falling) - 0.9, 0, 1)
    blend(chest, (chest.lung[0] + chest.lung[1]) * inside(0.45 - chest.v, 0.2) * net * 0.85, 200)


def hernia(chest: Chest, rng: np.random.Generator) -> None:
    """Part of the stomach behind the heart: a bright pouch, with air above a fluid level."""
    x, y, radius = rng.uniform((-0.02, 0.13, 0.09), (0.03, 0.17, 0.11))
    across, down = chest.x - chest.centre - x, chest.y - chest.base + y
    away = np.hypot(across, down) / radius
    blend(chest, inside(away - 1, 0.25), 240)
    blend(chest, inside(away - 0.75, 0.2) * inside(down - 0.01, 0.02), 30)


def infiltration(chest: Chest, rng: np.random.Generator) -> None:
    """Cloudy patches."""
    patches = np.clip(clouds(rng, 11) + 0.2, 0, 1) * 0.85
    for lung in some_lungs(rng, both=0.8):
        blend(chest, chest.lung[lung] * patches, 180)


def mass(chest: Chest, rng: np.random.Generator) -> None:
    """One big disc."""
    paint_discs(chest, rng, some_lungs(rng, both=0), radius=0.12, edge=0.3)


def nodule(chest: Chest, rng: np.random.Generator) -> None:
    """Small discs in both lungs."""
    paint_discs(chest, rng, [0, 1] * int(rng.integers(4, 7)), radius=0.028, edge=0.5)


def pleural_thickening(chest: Chest, rng: np.random.Generator) -> None:
    """A bright rim along the ribs."""
    for lung in some_lungs(rng, both=0.8):
        rim = inside(rng.uniform(0.42, 0.52) - chest.u[lung], 0.12) * inside(0.15 - chest.v, 0.1)
        blend(chest, chest.lung[lung] * rim, 235)


def pneumonia(chest: Chest, rng: np.random.Generator) -> None:
    """A dense patch in the lower lung, its bronchi still dark."""
    lung = some_lungs(rng, both=0)[0]
    patch = np.hypot(chest.u[lung] / 1.1, (chest.v - rng.uniform(0.5, 0.58)) / 0.27) - 1
    fan = (chest.x + 0.012 * clouds(rng, 5)) / rng.uniform(0.065, 0.075)
    blend(
        chest,
        chest.lung[lung] * inside(patch, 0.25),
        140 + 80 * np.clip(2 * np.cos(2 * np.pi * fan), -1, 1),
    )


def pneumothorax(chest: Chest, rng: np.random.Generator) -> None:
    """Black air around the apex, and the thin white edge of the collapsed lung."""
    lung = some_lungs(rng, both=0)[0]
    fallen = np.hypot(chest.u[lung] + 0.45, (chest.v - 0.85) / 0.7) - rng.uniform(0.85, 1.0)
    blend(chest, chest.lung[lung] * inside(-fallen, 0.06), 10)
    blend(chest, chest.lung[lung] * inside(np.abs(fallen + 0.03) - 0.025, 0.04), 185)


# In painting order: what fills the lung first, so that small signs stay visible on top.
PAINTERS = {
    "Infiltration": infiltration,
    "Edema": edema,
    "Consolidation": consolidation,
    "Pneumonia": pneumonia,
    "Fibrosis": fibrosis,
    "Effusion": effusion,
    "Atelectasis": atelectasis,
    "Pleural_Thickening": pleural_thickening,
    "Pneumothorax": pneumothorax,
    "Mass": mass,
    "Nodule": nodule,
    "Hernia": hernia,
}


@functools.lru_cache(maxsize=1)
def film_grain(size: int) -> np.ndarray:
    """Unit-variance noise (size + 256, size + 256), which each film crops: drawing it is slow."""
    return random_stream("grain").standard_normal((size + 256, size + 256), dtype=np.float32)


def draw_radiograph(name: str, findings: Collection[str], size: int = 1024) -> bytes:
    """A PNG of size x size pixels that looks like a frontal chest radiograph with these findings.

    The name (`00000001_000.png`) determines the rest: its first eight characters, the patient, the
    anatomy; the whole name the exposure and the positions of the findings. About one film in fifty
    is RGBA, as in the real data.
    """
    chest = draw_chest(name[:8], findings)
    for finding, paint in PAINTERS.items():
        if finding in findings:
            paint(chest, random_stream(name, finding))
    rng = random_stream(name)
    exposed = 120 + (chest.film - 120) * rng.uniform(0.85, 1.0) + rng.uniform(-8, 8)
    # The margins keep the grain from clipping at black or white: a file's size must not reveal its
    # findings.
    large = Image.fromarray(np.clip(exposed, 10, 245)).resize(
        (size, size), Image.Resampling.BILINEAR
    )
    top, left = rng.integers(0, 256, 2)
    grain = film_grain(size)[top : top + size, left : left + size]
    image = Image.fromarray((np.asarray(large) + rng.uniform(0.8, 1.4) * grain).astype(np.uint8))
    if rng.random() < 0.02:
        image = image.convert("RGBA")
    png = io.BytesIO()
    image.save(png, "PNG", compress_type=zlib.Z_HUFFMAN_ONLY)
    return png.getvalue()


# ---- the bucket ----


def read_rows(labels: Path = LABELS) -> list[tuple[str, list[str]]]:
    """(image name, its findings) for each row of the label file."""
    with labels.open(newline="") as file:
        return [
            (row["Image Index"], row["Finding Labels"].split("|")) for row in csv.DictReader(file)
        ]


def serve_until(address: str, ours: Connection) -> None:
    """Serve, and send the port to `ours`, until its other end closes, even by a kill."""
    # The terminal's Ctrl-C is for the script, which may still be fetching.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    server = ThreadedMotoServer(ip_address=address, port=0, verbose=False)
    server.start()
    ours.send(server.get_host_and_port()[1])
    with contextlib.suppress(EOFError):
        ours.recv()


@contextmanager
def serve(address: str = "127.0.0.1") -> Iterator[str]:
    """An empty S3 server on this machine for as long as the block lasts: yields its endpoint URL.

    It needs its own process: moto shares buckets among all servers of a process.
    """
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    server = context.Process(target=serve_until, args=(address, its), daemon=True)
    server.start()
    its.close()
    try:
        yield f"http://{address}:{ours.recv()}"
    finally:
        ours.close()
        server.join()


def connect(endpoint: str) -> BaseClient:
    """A boto3 S3 client for the server at `endpoint`, which accepts any keys."""
    keys = {"aws_access_key_id": "sample", "aws_secret_access_key": "sample"}
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)


def fill_bucket(
    client: BaseClient, bucket: str, rows: list[tuple[str, list[str]]], size: int = 1024
) -> None:
    """Create the bucket with the label file and, under images/, a radiograph for each row."""

    def put(row: tuple[str, list[str]]) -> None:
        name, findings = row
        png = draw_radiograph(name, findings, size)
        if name == TRUNCATED:
            png = png[: len(png) // 2]
        client.put_object(Bucket=bucket, Key=f"images/{name}", Body=png)

    client.create_bucket(Bucket=bucket)
    client.upload_file(str(LABELS), bucket, "Data_Entry_2017_v2020.csv")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(put, rows))


def write_credentials(folder: Path, endpoint: str) -> Path:
    """Write a credentials.yml in `folder` that only its owner can read; return its path."""
    path = folder / "credentials.yml"
    path.touch(mode=0o600)
    path.write_text(
        f"aws_access_key_id: sample\naws_secret_key_id: sample\nendpoint_url: {endpoint}\nregion_name: us-east-1\n"
    )
    return path


# ---- the run ----


def run_script(command: list[str]) -> int:
    """Run the command to its end and return its exit code, as a shell would."""
    print("running:", subprocess.list2cmdline(command), file=sys.stderr, flush=True)
    # The script gets the terminal's Ctrl-C too and ends in its own way: wait for it.
    signal.signal(signal.SIGINT, lambda *_: None)
    script = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: script.terminate())
    code = script.wait()
    return code if code >= 0 else 128 - code


def main() -> int:
    """Run the script of the command line on the sample bucket; return its exit code."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print("usage: python tests/sample_bucket.py SCRIPT.py [options of the script]")
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    script, *options = sys.argv[1:]
    if not Path(script).is_file():
        print(f"sample_bucket.py: error: no script at {script}", file=sys.stderr)
        return 2
    rows = read_rows()
    with serve() as endpoint, tempfile.TemporaryDirectory(prefix="sample_bucket_") as folder:
        print(
            f"drawing {len(rows)} radiographs into s3://{BUCKET} at {endpoint}",
            file=sys.stderr,
            flush=True,
        )
        fill_bucket(connect(endpoint), BUCKET, rows)
        credentials = str(write_credentials(Path(folder), endpoint))
        # A separate cache: these images have the names of real ones, and must not replace their
        # pixels in cache/.
        sample = ["--credentials", credentials, "--cache", str(Path(folder, "cache")), *DEFAULTS]
        return run_script([sys.executable, script, *sample, *options])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while drawing: there is no child process to stop yet
        sys.exit(130)
