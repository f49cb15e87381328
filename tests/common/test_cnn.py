"""The CNN: structure, initial weights, trained statistics, fast layers that match Keras' own."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import parse

import xray_tensorflow as xray

pytestmark = pytest.mark.usefixtures("keras")


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    """Labels of 2,000 rows: the first never set, the last always, the others in 5 to 70 percent."""
    share = np.array([0, *np.linspace(0.05, 0.7, 13), 1])
    return (np.random.default_rng(0).random((2000, 15)) < share).astype(np.float32)


@pytest.fixture(scope="module")
def backbone(keras: Any) -> Any:
    """A MobileNet with statistics of noise, so that signals and gradients pass through it."""
    model = keras.applications.MobileNet(
        (32, 32, 3), include_top=False, weights=None, pooling="avg"
    )
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0
    model(np.random.default_rng(0).uniform(-1, 1, (32, 32, 32, 3)), training=True)
    return model


@pytest.fixture(scope="module")
def weights_file(backbone: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "mobilenet.weights.h5"
    backbone.save_weights(path)
    return str(path)


def options(*words: Any) -> argparse.Namespace:
    return parse("--image-size", 32, "--batch-size", 8, "--weights", "none", *words)


def statistics(model: Any) -> list[np.ndarray]:
    """The moving means and variances of all batch normalisations, in layer order."""
    return [v.numpy() for v in model.weights if v.name in ("moving_mean", "moving_variance")]


def of_backbone(model: Any) -> list[np.ndarray]:
    """The MobileNet's weights in a whole model, by name: Keras' order depends on `trainable`."""
    found = {tuple(v.path.split("/")[-2:]): v.numpy() for v in model.weights}
    kept = sorted(
        name for name in found if name[0] not in ("findings", "dropout") and "seed" not in name[-1]
    )
    assert len(kept) == 135, kept  # 27 convolutions, each with 4 of batch normalisation
    return [found[name] for name in kept]


def test_shapes_types_and_start(truth: np.ndarray) -> None:
    model = xray.build_cnn(options(), truth)
    assert model.input_shape == (None, 32, 32, 1)
    assert model.output_shape == (None, 15)
    assert model.inputs[0].dtype == "uint8"
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), np.uint8)
    probabilities = model.predict(pixels, verbose=0)
    assert probabilities.dtype == np.float32
    assert ((probabilities > 0) & (probabilities < 1)).all()
    bias = model.layers[-1].bias.numpy()
    share = truth[:, 1:-1].mean(axis=0)
    assert bias[1:-1] == pytest.approx(np.log(share / (1 - share)), abs=0.02)
    assert np.isfinite(bias).all()
    assert bias[0] < -5 < 5 < bias[-1]


def test_the_seed_decides_the_start(truth: np.ndarray) -> None:
    one, same, other = (
        xray.build_cnn(options("--seed", seed), truth).get_weights() for seed in (0, 0, 1)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, same))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other))


def layers(model: Any) -> Iterator[Any]:
    for layer in model.layers:
        yield layer
        yield from layers(layer) if hasattr(layer, "layers") else ()


def test_a_short_run_from_scratch_moves_the_statistics(keras: Any, truth: np.ndarray) -> None:
    model = xray.build_cnn(options(), truth)
    momenta = {
        layer.momentum
        for layer in layers(model)
        if isinstance(layer, keras.layers.BatchNormalization)
    }
    assert max(momenta) <= 0.9
    before = statistics(model)
    assert before
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 1), np.uint8)
    model(pixels, training=True)
    for old, new in zip(before, statistics(model)):
        assert np.abs(new - old).max() > 0


# With 40 pixels the sides before strided convolutions are 40, 20, 10 and 5.
@pytest.mark.parametrize(
    ("size", "padded"), [pytest.param(32, False, marks=pytest.mark.slow), (40, True)]
)
def test_what_is_computed_is_what_keras_computes(
    keras: Any, truth: np.ndarray, tmp_path: Path, size: int, padded: bool
) -> None:
    """Outputs, gradients and training statistics match those of the plain model in model.keras.

    A layer pads only if TensorFlow's own padding would differ.
    """
    import tensorflow as tf

    fast = xray.build_cnn(options("--image-size", size), truth)
    pads = [layer for layer in layers(fast) if isinstance(layer, keras.layers.ZeroPadding2D)]
    assert any("call" not in vars(layer) for layer in pads) == padded
    keras.Model(fast.input, fast.output).save(tmp_path / "model.keras")
    plain = keras.models.load_model(tmp_path / "model.keras")
    random = np.random.default_rng(0)
    pixels, target = random.integers(0, 256, (8, size, size, 1), np.uint8), truth[:8]
    assert fast.predict(pixels, verbose=0) == pytest.approx(
        plain.predict(pixels, verbose=0), abs=1e-5
    )
    gradients = []
    for model in (fast, plain):
        model.get_layer("dropout").seed_generator.state.assign([1, 2])
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(
                keras.losses.binary_crossentropy(target, model(pixels, training=True))
            )
        gradients.append(tape.gradient(loss, [v.value for v in model.trainable_variables]))
    assert len(gradients[0]) == len(gradients[1]) == 83
    # Rounding puts some activations on the other side of a kink: in float32 both models differ by
    # up to 3 % from float64.
    for one, other in zip(*gradients):
        assert np.linalg.norm(one - other) <= 0.05 * np.linalg.norm(other)
    for one, other in zip(statistics(fast), statistics(plain)):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_weights_of_a_file_are_the_start_and_all_of_them_are_trained(
    backbone: Any, weights_file: str, truth: np.ndarray, keras: Any
) -> None:
    arguments = options("--weights", weights_file)
    model = xray.build_cnn(arguments, truth)
    for mine, theirs in zip(of_backbone(model), of_backbone(backbone)):
        assert np.array_equal(mine, theirs)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 32), np.uint8)
    table = pd.DataFrame(truth[:24], columns=xray.LABELS).assign(
        split=["train"] * 16 + ["validation"] * 8
    )
    feed = functools.partial(xray.batches, pixels, truth, batch_size=arguments.batch_size)
    trainer = xray.KerasTrainer(model, feed, table, arguments)
    model.run_eagerly = True  # for two steps, tracing would take longest
    trainer.fit_epoch(1)
    moved = [
        not np.array_equal(mine, theirs)
        for mine, theirs in zip(of_backbone(model), of_backbone(backbone))
    ]
    assert all(moved), "kernels, scale, offset and statistics must learn"
    assert trainer.predict("validation").shape == (8, 15)


def test_imagenet_comes_from_the_cache_of_keras(
    backbone: Any, keras_home: Path, truth: np.ndarray
) -> None:
    # A file like Keras' download, at its path: legacy HDF5, for 128 pixels.
    folder = keras_home / "models"
    folder.mkdir(exist_ok=True)
    path = folder / "mobilenet_1_0_128_tf_no_top.h5"
    backbone.save(path)
    try:
        model = xray.build_cnn(options("--weights", "imagenet", "--image-size", 128), truth)
    finally:
        path.unlink()
    for mine, theirs in zip(of_backbone(model), of_backbone(backbone)):
        assert np.array_equal(mine, theirs)


def refuse(weights: str, truth: np.ndarray) -> str:
    with pytest.raises(xray.UserError) as error:
        xray.build_cnn(options("--weights", weights, "--image-size", 128), truth)
    assert "\n" not in str(error.value)
    assert "--weights none" in str(error.value)
    return str(error.value)


def test_imagenet_that_cannot_be_downloaded(
    truth: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A port nobody listens on, even if the machine has a network.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    assert "imagenet" in refuse("imagenet", truth)


# Raised by another CNN's file.
@pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning:keras")
def test_weights_that_are_none(truth: np.ndarray, tmp_path: Path, keras: Any) -> None:
    assert "absent.h5" in refuse(str(tmp_path / "absent.h5"), truth)
    for name in ("text.weights.h5", "text.h5", "text"):
        path = tmp_path / name
        path.write_text("not HDF5")
        assert name in refuse(str(path), truth)
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    other.save_weights(tmp_path / "other.weights.h5")
    assert "other" in refuse(str(tmp_path / "other.weights.h5"), truth)


def test_weights_that_cannot_be_had_leave_no_run_folder(fails: Callable, tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert "absent.h5" in fails(
        "--weights", tmp_path / "absent.h5", "--image-size", 32, "--output", output
    )
    assert not output.exists() or not list(output.iterdir())


# ---- what speed_up changes and what it leaves alone ----


def small(keras: Any, conv: Any, norm: Any | None = None) -> list[Any]:
    """The layers of a model with a convolution and its normalisation."""
    inputs = keras.Input((8, 8, 4))
    outputs = (norm or keras.layers.BatchNormalization())(conv(inputs))
    return keras.Model(inputs, outputs).layers


def test_layers_of_another_kind_stay_as_they_are(keras: Any) -> None:
    def conv(**how: Any) -> Any:
        return keras.layers.Conv2D(4, 3, **{"use_bias": False, **how})

    def norm(**how: Any) -> Any:
        return keras.layers.BatchNormalization(**how)

    others = [
        small(keras, conv(use_bias=True)),
        small(keras, conv(dilation_rate=2)),
        small(keras, conv(groups=2)),
        small(keras, conv(activation="relu")),
        small(keras, conv(data_format="channels_first")),
        small(keras, conv(), norm(scale=False)),
        small(keras, conv(), norm(axis=1)),
        small(keras, keras.layers.DepthwiseConv2D(3)),
        small(keras, keras.layers.ReLU()),
    ]
    for layers in others:
        xray.speed_up(layers)
        assert [layer.name for layer in layers if "call" in vars(layer)] == []


@pytest.mark.parametrize("name", ["ResNet50", "EfficientNetB0"])
def test_another_network_computes_the_same(keras: Any, name: str) -> None:
    """Whether or not it can be made faster."""
    network = getattr(keras.applications, name)(
        weights=None, include_top=False, input_shape=(32, 32, 3)
    )
    images = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype(np.float32)
    wanted = network(images).numpy()
    xray.speed_up(network.layers)
    assert network(images).numpy() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    "conv",
    [
        {"strides": 2, "padding": "valid"},
        {"strides": 2, "padding": "same"},
        {"strides": 1, "padding": "same"},
        {"kernel_size": 1},
        {"kernel_size": 1, "strides": 2},
        {"kernel_size": (3, 1), "padding": "same"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["Conv2D", "DepthwiseConv2D"])
def test_a_convolution_that_it_takes(keras: Any, kind: str, conv: dict) -> None:
    how = {
        "kernel_size": 3,
        **conv,
        **({"filters": 6} if kind == "Conv2D" else {"depth_multiplier": 2}),
    }
    norm = keras.layers.BatchNormalization()
    layers = small(keras, getattr(keras.layers, kind)(use_bias=False, **how), norm)
    random = np.random.default_rng(0)
    start = [random.uniform(0.5, 2, weight.shape) for weight in norm.get_weights()]
    norm.set_weights(start)
    model = keras.Model(layers[0].output, layers[-1].output)
    images = random.normal(size=(3, 8, 8, 4)).astype(np.float32)
    wanted = [model(images, training=training).numpy() for training in (False, True)]
    xray.speed_up(layers)
    norm.set_weights(start)  # training has changed them
    found = [model(images, training=training).numpy() for training in (False, True)]
    for one, other in zip(found, wanted):
        assert one == pytest.approx(other, abs=2e-5)


@pytest.mark.slow
def test_another_backbone_without_biases_is_computed_as_keras_does(keras: Any) -> None:
    backbone = keras.applications.MobileNetV2(
        weights=None, include_top=False, input_shape=(64, 64, 3), pooling="avg"
    )
    norms = [
        layer for layer in backbone.layers if isinstance(layer, keras.layers.BatchNormalization)
    ]
    images = np.random.default_rng(0).uniform(-1, 1, (8, 64, 64, 3)).astype(np.float32)
    for layer in norms:
        layer.momentum = 0
    backbone(images, training=True)  # statistics that let a signal through
    for layer in norms:
        layer.momentum = 0.9
    plain = keras.models.clone_model(backbone)
    plain.set_weights(backbone.get_weights())
    xray.speed_up(backbone.layers)
    assert sum("call" in vars(layer) for layer in norms) == len(norms) == 52
    for training in (False, True):
        found, wanted = (model(images, training=training).numpy() for model in (backbone, plain))
        assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted)
    for one, other in zip(statistics(backbone), statistics(plain)):
        assert one == pytest.approx(other, rel=1e-2, abs=1e-4)
