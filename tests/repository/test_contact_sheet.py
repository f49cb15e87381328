"""tests/tools/contact_sheet.py: an image's findings, its map, and the sheet of a real run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from contact_sheet import (
    choose,
    class_activation_maps,
    enlarge,
    findings,
    load_model,
    main,
    most_probable,
)
from helpers import ROOT, parse
from PIL import Image

import xray_tensorflow as xray


def test_findings_are_told_apart() -> None:
    row = pd.Series(
        {
            **{
                "true Mass": 1,
                "true Edema": 1,
                "true Hernia": 0,
                "true Nodule": 0,
                "true Effusion": 1,
            },
            **{"probability Mass": 0.5, "probability Edema": 0.2, "probability Hernia": 0.9},
            **{"probability Nodule": 0.1, "probability Effusion": 0.9},
        }
    )
    thresholds = {"Mass": 0.5, "Edema": 0.3, "Hernia": 0.8, "Nodule": 0.2, "Effusion": None}
    assert findings(row, thresholds) == [
        ("found", "Mass 0.500 ≥ 0.500"),
        ("missed", "Effusion 0.900"),  # no threshold: never predicted
        ("missed", "Edema 0.200 < 0.300"),
        ("false alarm", "Hernia 0.900 ≥ 0.800"),
    ]


def test_each_label_has_an_image_and_no_image_comes_twice() -> None:
    frame = pd.DataFrame(
        {"true Mass": [1, 1, 0, 0], "true Edema": [1, 0, 0, 0], "true Hernia": [0, 0, 0, 0]}
    )
    assert sorted(choose(frame, ["Edema", "Mass", "Hernia"]).index) == [0, 1]


def test_no_finding_is_not_the_most_probable_finding() -> None:
    row = pd.Series({"probability No Finding": 0.9, "probability Mass": 0.2})
    row["probability Edema"] = 0.3
    assert most_probable(row, ["Edema", "Mass", "No Finding"]) == "Edema"


def without_sigmoid(keras: Any, model: Any) -> Any:
    """The model, changed to return logits."""
    model.get_layer("findings").activation = keras.activations.linear
    return model


@pytest.mark.parametrize("size", [32, 100, 128])
def test_a_map_and_the_bias_sum_up_to_the_logit(size: int, keras: Any, run: Any) -> None:
    """Tests the trained model of 32 pixels, and larger ones."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, size, size), np.uint8)
    if size == 32:
        model = load_model(run.folder / "model.keras")
    else:
        labels = np.eye(15, dtype=np.float32)
        model = xray.build_cnn(parse("--image-size", size, "--weights", "none"), labels)
        # Without statistics from images the last feature map is almost 0.
        for layer in model.get_layer("mobilenet").layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.momentum = 0
        model(pixels[..., None], training=True)
    maps = class_activation_maps(model, pixels)
    assert maps.shape == (4, size // 32, size // 32, 15)
    _, bias = model.get_layer("findings").get_weights()
    logits = without_sigmoid(keras, model).predict(pixels[..., None], verbose=0)
    np.testing.assert_allclose(maps.mean(axis=(1, 2)) + bias, logits, atol=1e-4, rtol=0)
    assert np.ptp(logits) > 0.01


def test_a_map_lies_where_the_network_looks(keras: Any) -> None:
    """The gradient of each value of the last feature map is centred where `enlarge` draws it."""
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    size = 224
    backbone = keras.applications.MobileNet((size, size, 3), include_top=False, weights=None)
    image = tf.random.uniform((1, size, size, 3), -1, 1)
    for place in (2, 3, 4):
        with tf.GradientTape() as tape:
            tape.watch(image)
            value = tf.reduce_sum(backbone(image, training=False)[:, place, 3] ** 2)
        weight = np.abs(tape.gradient(value, image)).sum(axis=(0, 2, 3))
        centre = np.average(np.arange(size), weights=weight)
        values = np.zeros((7, 7), np.float32)
        values[place, 3] = 1
        drawn, _ = np.unravel_index(enlarge(values, size).argmax(), (size, size))
        assert drawn == 32 * place + 31
        # A film's edges cut the gradient off, moving its centre to the middle; a map stretched from
        # edge to edge would be 16 pixels off everywhere.
        assert abs(drawn - centre) < 10


def test_enlarging_is_bilinear() -> None:
    drawn = enlarge(np.array([[0, 1], [2, 3]], np.float32), 64)
    assert drawn[31, 31] == 0
    assert drawn[63, 31] == 2
    assert drawn[63, 63] == 3
    assert drawn[47, 47] == pytest.approx(1.5)
    assert (drawn[:31, :31] == 0).all()


def test_a_sheet_of_a_real_run(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sheet, cache = tmp_path / "sheet.png", run.folder.parent.parent / "cache"
    command = [str(run.folder), "--cache", str(cache), "--output", str(sheet)]
    assert main(command) == 0
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert image.width == 887
    # Some findings were found, some missed.
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (pixels == colour).all(axis=1).any()

    most_probable_ones = sheet.read_bytes()
    assert main([*command, "--finding", "No Finding"]) == 0
    assert sheet.read_bytes() != most_probable_ones
    capsys.readouterr()
    assert main([*command, "--finding", "Gout"]) == 2
    error = "contact_sheet.py: error: no label Gout: --finding takes Atelectasis, Cardiomegaly, "
    printed = capsys.readouterr().err
    assert printed.startswith(error)
    assert printed.count("\n") == 1
    assert main([*command, "--cache", str(tmp_path)]) == 2
    assert f"error: no {tmp_path}/pixels.sqlite: give the run's --cache" in capsys.readouterr().err
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["arguments"]["image_size"] = 64
    (copy / "config.json").write_text(json.dumps(config))
    assert main([str(copy), *command[1:]]) == 2
    assert "png of 64 pixels a side: give the run's --cache" in capsys.readouterr().err
    for name in ("model.keras", "metrics.json"):
        (copy / name).unlink()
        assert main([str(copy), *command[1:]]) == 2
        assert f"run has no {name}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_tool_prints_nothing(run: Any, tmp_path: Path) -> None:
    """Not even TensorFlow's startup messages."""
    cache = run.folder.parent.parent / "cache"
    tool = ROOT / "tests" / "tools" / "contact_sheet.py"
    command = [sys.executable, tool, run.folder, "--cache", cache, "--finding", "Mass"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["contact_sheet.png"]
