"""Radiographs of every mode, and files that are not images: the pixels, and the run's reaction."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import as_options, client_of, label_file, make_bucket, parse
from PIL import EpsImagePlugin, Image, UnidentifiedImageError
from sample_bucket import TRUNCATED, draw_radiograph, read_rows

import xray_tensorflow as xray

# One image is a decompression bomb.
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def encode(image: Image.Image, form: str = "PNG") -> bytes:
    data = io.BytesIO()
    image.save(data, form)
    return data.getvalue()


# Left half dark, right half bright.
GREY = np.tile(np.repeat([[40, 200]], 32, axis=1), (64, 1)).astype(np.uint8)
PICTURE = Image.fromarray(GREY)
RGBA = PICTURE.convert("RGBA")
# NIH's alpha channels are meaningless: do not blend the grey with a background.
RGBA.putalpha(90)
PALETTE = Image.fromarray((GREY > 100).astype(np.uint8), "P")
PALETTE.putpalette([40] * 3 + [200] * 3)
MOVING = io.BytesIO()
PICTURE.save(
    MOVING,
    "PNG",
    save_all=True,
    append_images=[PICTURE.point(lambda level: 255 - level)],
    duration=100,
)
READABLE = {
    "L": encode(PICTURE),
    "LA": encode(RGBA.convert("LA")),
    "RGB": encode(PICTURE.convert("RGB")),
    "RGBA": encode(RGBA),
    "palette": encode(PALETTE),
    "16 bits": encode(Image.fromarray(GREY.astype(np.uint16) * 256 + 77)),
    "JPEG": encode(PICTURE, "JPEG"),
    "CMYK JPEG": encode(PICTURE.convert("CMYK"), "JPEG"),
    "animated": MOVING.getvalue(),  # the first frame counts
}


def png(width: int, height: int, pixels: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """An 8-bit grey PNG with any size in its header, any compressed pixels and any extra chunks."""
    head = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), *more, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(data)) + kind + data for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        part + struct.pack(">I", zlib.crc32(part[4:])) for part in parts
    )


WHOLE = draw_radiograph("00000001_000.png", [], 64)
UNREADABLE = {
    "truncated": WHOLE[: len(WHOLE) // 2],
    "header only": WHOLE[:40],
    "HTML": b"<html>Service unavailable</html>",
    "zero bytes": b"",
    "damaged": WHOLE[:200] + bytes(100) + WHOLE[300:],
    "20000 x 20000 in 70 bytes": png(20000, 20000, b""),
    "13000 x 13000, all of them there": png(13000, 13000, bytes(13001 * 13000)),
    "EPS": encode(PICTURE, "EPS"),
    "GIF": encode(PICTURE, "GIF"),
    "text of 64 MB": png(1, 1, bytes(2), (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26)))),
}


@pytest.mark.parametrize("form", READABLE)
def test_every_mode_gives_the_same_grey(form: str) -> None:
    pixels = xray.decode(READABLE[form], 32)
    assert pixels.shape == (32, 32)
    assert pixels.dtype == np.uint8
    halves = pixels[:, :14].astype(int), pixels[:, 18:].astype(int)
    assert np.abs(halves[0] - 40).max() <= 2
    assert np.abs(halves[1] - 200).max() <= 2


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_16_bit_png_of_a_detector_with_fewer_bits(bits: int) -> None:
    """Its levels are stored unscaled, and PNG does not say so."""
    levels = GREY.astype(np.uint16) << (bits - 8)
    pixels = xray.decode(encode(Image.fromarray(levels)), 32).astype(int)
    assert np.abs(pixels[:, :14] - 40).max() <= 2
    assert np.abs(pixels[:, 18:] - 200).max() <= 2


def test_a_black_16_bit_png() -> None:
    assert xray.decode(encode(Image.fromarray(GREY.astype(np.uint16) * 0)), 32).max() == 0


def test_one_bit() -> None:
    pixels = xray.decode(encode(Image.fromarray(GREY > 100)), 32)
    assert np.unique(pixels[:, :14]) == [0]
    assert np.unique(pixels[:, 18:]) == [255]


def test_a_bit_flipped_anywhere_is_noticed() -> None:
    right = xray.decode(WHOLE, 32)
    for place in range(8, len(WHOLE)):
        flipped = bytearray(WHOLE)
        flipped[place] ^= 1 << place % 8
        # What unreadable files raise.
        with contextlib.suppress(OSError, ValueError, SyntaxError, struct.error):
            assert np.array_equal(xray.decode(bytes(flipped), 32), right), place


def test_a_large_radiograph_is_averaged_not_sampled() -> None:
    checks = (np.indices((1024, 1024)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert np.abs(xray.decode(encode(Image.fromarray(checks)), 64).astype(int) - 127).max() <= 3


def test_an_image_that_is_not_square_and_one_that_is_smaller() -> None:
    assert (
        xray.decode(encode(Image.new("L", (300, 100), 9)), 64).tolist()
        == np.full((64, 64), 9).tolist()
    )
    assert (
        xray.decode(encode(Image.new("L", (1, 1), 9)), 64).tolist() == np.full((64, 64), 9).tolist()
    )


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 64 64
%%EndComments
(touched) (w) file closefile showpage
"""
FOREIGN = {
    "EPS": EPS,
    "EPS by Pillow": encode(PICTURE, "EPS"),
    **{
        form: encode(PICTURE, form)
        for form in ("GIF", "TIFF", "BMP", "PPM", "WEBP", "TGA", "JPEG2000", "PDF", "ICO")
    },
}


@pytest.mark.parametrize("form", FOREIGN)
def test_a_format_that_no_radiograph_has_is_no_image(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow opens these too, and would run an EPS, which is a program, in Ghostscript."""
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # forget the one Pillow has found
    with pytest.raises(UnidentifiedImageError):
        xray.decode(FOREIGN[form], 32)
    assert not (tmp_path / "started").exists()
    if form.startswith("EPS"):  # Pillow would have started the stand-in
        with contextlib.suppress(OSError, SystemError):
            Image.open(io.BytesIO(FOREIGN[form])).load()
        assert (tmp_path / "started").exists()


@pytest.fixture(scope="module")
def odd(credentials: Path) -> dict[str, str]:
    """A bucket of 60 images, some unreadable: {their name: what is wrong}."""
    rows = read_rows()[:60]
    names = [name for name, _ in rows]
    wrong = dict(zip(names[::6], UNREADABLE))
    images = {name: UNREADABLE[wrong[name]] if name in wrong else READABLE["LA"] for name in names}
    make_bucket(credentials, "odd", label_file(rows), images)
    return wrong


def test_unreadable_images_are_skipped_and_said_why(
    credentials: Path, odd: dict, tmp_path: Path
) -> None:
    client = client_of(credentials)
    options = as_options(bucket="odd", image_size=32, batch_size=8, cache=tmp_path, max_skipped=0.2)
    selected = xray.select_images(client, parse(*options))
    before = selected.copy()
    keys = xray.read_credentials(str(credentials))
    table, pixels, cached = xray.ingest(keys, parse(*options), selected)
    pd.testing.assert_frame_equal(selected, before)
    skipped = table["split"] == "skipped"
    assert set(table["image"][skipped]) == set(odd)
    assert all(
        reason and "\n" not in reason and "0x" not in reason for reason in table["reason"][skipped]
    )
    assert set(table["reason"][~skipped]) == {""}
    right = xray.decode(READABLE["LA"], 32)
    assert np.array_equal(
        pixels[~skipped], np.broadcast_to(right, (cached + 60 - len(odd), 32, 32))
    )
    # The next run requests them again: someone may have fixed them.
    assert xray.ingest(keys, parse(*options), selected)[2] == 60 - len(odd)


def test_too_many_unreadable_images(credentials: Path, odd: dict, tmp_path: Path) -> None:
    client = client_of(credentials)
    options = as_options(
        bucket="odd", image_size=32, batch_size=8, cache=tmp_path, max_skipped=0.05
    )
    with pytest.raises(xray.UserError, match="--max-skipped") as error:
        keys = xray.read_credentials(str(credentials))
        xray.ingest(keys, parse(*options), xray.select_images(client, parse(*options)))
    assert any(name in str(error.value) for name in odd)
    assert "4 of 60" in str(error.value)


def test_an_image_gone_between_listing_and_fetching_is_skipped(
    credentials: Path, odd: dict, tmp_path: Path
) -> None:
    client = client_of(credentials)
    ((_, pixels, reason),) = xray.fetch_images(client, "odd", {0: "images/gone.png"}, 32)
    assert pixels is None
    assert "gone" in reason


def test_a_split_that_loses_all_its_images_is_one_line(
    credentials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable
) -> None:
    client, rows = client_of(credentials), read_rows()[:60]
    make_bucket(
        credentials, "lost", label_file(rows), dict.fromkeys([name for name, _ in rows], b"")
    )
    table = xray.select_images(client, parse("--bucket", "lost", "--batch-size", 8))
    for image in table["image"][table["split"] != "validation"]:
        client.put_object(Bucket="lost", Key=f"images/{image}", Body=READABLE["L"])
    options = as_options(bucket="lost", max_skipped=1, weights="none", image_size=32, epochs=1)
    assert "validation" in fails(
        *options, "--cache", tmp_path / "cache", "--output", tmp_path / "output"
    )


def test_skipped_csv(run: object) -> None:
    header, *rows = (run.folder / "skipped.csv").read_text().splitlines()
    assert header == "image,reason"
    assert [row.split(",")[0] for row in rows] == [TRUNCATED]
    assert run.result["images"]["skipped"] == 1
    assert TRUNCATED not in (run.folder / "predictions.csv").read_text()
