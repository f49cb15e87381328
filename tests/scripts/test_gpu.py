"""xray_gpu.py without a GPU: its rules on recorded device reports, and the whole script on two CPU
devices.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from helpers import QUICK, ROOT, as_options, parse, result_of, run_process

import xray_gpu

# What tf.config.experimental.get_device_details reports, by the names and capabilities of NVIDIA's
# tables.
M60 = {"device_name": "Tesla M60", "compute_capability": (5, 2)}
T4 = {"device_name": "Tesla T4", "compute_capability": (7, 5)}
A10G = {"device_name": "NVIDIA A10G", "compute_capability": (8, 6)}
L4 = {"device_name": "NVIDIA L4", "compute_capability": (8, 9)}
H100 = {"device_name": "NVIDIA H100 80GB HBM3", "compute_capability": (9, 0)}
P4 = {"device_name": "Tesla P4", "compute_capability": (6, 1)}


@pytest.mark.parametrize("gpus", [[T4], [A10G], [L4], [H100], [P4], [T4, T4]], ids=str)
def test_gpus_that_tensorflow_has_kernels_for(gpus: list[dict]) -> None:
    xray_gpu.check_gpus(gpus, "2.19.1")


def test_no_gpu_is_an_error_and_never_a_cpu_run() -> None:
    with pytest.raises(
        xray_gpu.UserError, match="no NVIDIA GPU.*nvidia-smi.*CUDA_VISIBLE_DEVICES.*and-cuda"
    ):
        xray_gpu.check_gpus([], "2.19.1")


@pytest.mark.parametrize("gpus", [[M60], [T4, M60]], ids=["M60", "T4 and M60"])
def test_an_old_gpu_needs_an_old_tensorflow(gpus: list[dict]) -> None:
    with pytest.raises(xray_gpu.UserError, match="Tesla M60 has compute capability 5.2.*2.16.2"):
        xray_gpu.check_gpus(gpus, "2.19.1")
    xray_gpu.check_gpus(gpus, "2.16.2")


@pytest.mark.parametrize(
    ("wanted", "gpus", "policy"),
    [
        ("auto", [M60], "float32"),
        ("auto", [P4], "float32"),
        ("auto", [T4], "mixed_float16"),
        ("auto", [H100, H100], "mixed_float16"),
        ("auto", [T4, P4], "float32"),
        ("float32", [H100], "float32"),
        ("mixed_float16", [M60], "mixed_float16"),
    ],
)
def test_precision_follows_the_capability_unless_it_is_said(
    wanted: str, gpus: list[dict], policy: str
) -> None:
    assert xray_gpu.choose_precision(wanted, gpus) == policy


def test_without_a_gpu_the_script_ends_at_once(credentials: Path, tmp_path: Path) -> None:
    command = [
        "env",
        "CUDA_VISIBLE_DEVICES=-1",
        sys.executable,
        ROOT / "xray_gpu.py",
        "--credentials",
        credentials,
    ]
    finished = run_process(command, cwd=tmp_path)
    assert finished.code == 2
    assert finished.stderr.startswith("xray_gpu.py: error: TensorFlow")
    assert finished.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_lone_file_shows_its_manual(tmp_path: Path) -> None:
    shutil.copy(ROOT / "xray_gpu.py", tmp_path)
    shown = run_process([sys.executable, "xray_gpu.py", "--help"], cwd=tmp_path)
    assert (shown.code, shown.stderr) == (0, "")
    assert "--precision {auto,float32,mixed_float16}" in shown.stdout
    assert 'pip install -r requirements.txt "tensorflow[and-cuda]"' in shown.stdout


ON_TWO_CPUS = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import xray_gpu

def set_up_two_cpus(precision):
    tf = xray_gpu.import_tensorflow()
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    import keras

    keras.config.set_dtype_policy(precision)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), {"replicas": 2, "xla": False, "precision": precision}

xray_gpu.set_up_gpus = set_up_two_cpus
sys.exit(xray_gpu.run_script(xray_gpu.main))
"""


@pytest.mark.slow
def test_the_whole_script_on_two_devices_in_mixed_precision(
    credentials: Path, tmp_path: Path
) -> None:
    options = [
        "--credentials",
        credentials,
        *QUICK,
        *as_options(epochs="1", output="run", precision="mixed_float16"),
    ]
    finished = run_process([sys.executable, "-c", ON_TWO_CPUS, ROOT, *options], cwd=tmp_path)
    assert finished.code == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result["target"] == {"replicas": 2, "xla": False, "precision": "mixed_float16"}
    assert result["images"] == {"train": 271, "validation": 48, "test": 91, "skipped": 1}
    # --batch-size is a replica's: 271 images are 17 steps of twice 8.
    assert "17/17" in finished.stdout
    resumed = run_process(
        [sys.executable, "-c", ON_TWO_CPUS, ROOT, *options, "--resume"], cwd=tmp_path
    )
    assert json.loads(resumed.stdout.splitlines()[-1])["auroc"] == result["auroc"], resumed.stderr


@pytest.mark.slow
def test_a_last_batch_smaller_than_the_replicas(credentials: Path, tmp_path: Path) -> None:
    """271 images are 3 steps of twice 45, and one image: alone, it would leave a replica with nan
    for statistics.

    So are the 91 of the test split one step and one image.
    """
    options = [
        "--credentials",
        credentials,
        *QUICK,
        *as_options(batch_size=45, epochs=1, output="run"),
    ]
    finished = run_process(
        [sys.executable, "-c", ON_TWO_CPUS, ROOT, *options, "--precision", "float32"], cwd=tmp_path
    )
    result = result_of(finished)
    assert result["images"]["train"] == 271
    (row,) = pd.read_csv(tmp_path / "run" / "history.csv").to_dict("records")
    assert all(math.isfinite(value) for value in row.values())
    assert result["train"]["validation_auroc"]["best"] == row["validation_auroc"]
    with h5py.File(tmp_path / "run" / "checkpoint-1.weights.h5") as file:
        file.visititems(
            lambda name, item: check_finite(name, item) if hasattr(item, "shape") else None
        )


def check_finite(name: str, weights: Any) -> None:
    assert np.isfinite(weights[()]).all(), name


@pytest.mark.slow
def test_resume_on_other_devices_is_refused(credentials: Path, tmp_path: Path) -> None:
    options = ["--credentials", credentials, *QUICK, *as_options(limit=150, epochs=1, output="run")]
    command = [sys.executable, "-c", ON_TWO_CPUS, ROOT, *options]
    result_of(run_process([*command, "--precision", "float32"], cwd=tmp_path))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    config = json.loads(before["config.json"])
    assert config["target"] == {"precision": "float32", "replicas": 2}
    for had, program, changed in [
        ("--precision float32", ON_TWO_CPUS, ["--precision", "mixed_float16"]),
        (
            "replicas 2",
            ON_TWO_CPUS.replace('"replicas": 2', '"replicas": 1'),
            ["--precision", "float32"],
        ),
    ]:
        again = run_process(
            [sys.executable, "-c", program, ROOT, *options, "--resume", *changed], cwd=tmp_path
        )
        assert again.code == 2, again.stderr
        assert f"the run in run had {had}, not" in again.stderr.splitlines()[-1]
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.fixture
def policy(keras: Any) -> Any:
    """Sets Keras' dtype policy for one test."""
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy("float32")


def training_step(model: Any, pixels: np.ndarray, truth: np.ndarray, xla: bool) -> list[np.ndarray]:
    """Loss, gradients and moving statistics of one step, one after the other; without dropout,
    which XLA draws anew.
    """
    import keras
    import tensorflow as tf

    model.get_layer("dropout").rate = 0

    @tf.function(jit_compile=xla)
    def step() -> tuple:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(
                keras.losses.binary_crossentropy(truth, model(pixels, training=True))
            )
            # As Keras' LossScaleOptimizer does: small gradients would vanish in float16.
            scaled = loss * 1024
        gradients = tape.gradient(
            scaled, [variable.value for variable in model.trainable_variables]
        )
        assert loss.dtype == tf.float32
        return loss, [gradient / 1024 for gradient in gradients]

    loss, gradients = step()
    statistics = [
        variable for variable in model.non_trainable_variables if "moving" in variable.name
    ]
    return [
        np.concatenate([np.ravel(part) for part in parts])
        for parts in ([loss], gradients, statistics)
    ]


# float32 without XLA is test_cnn.py's.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "xla"), [("float32", True), ("mixed_float16", False), ("mixed_float16", True)]
)
def test_a_step_is_as_right_as_that_of_stock_layers(policy: Any, precision: str, xla: bool) -> None:
    """Fast layers against Keras' own in float32: no further from them than rounding takes Keras'
    own.

    27 normalised layers make rounding large in the gradients. Keras' own layers show how large, in
    float32 under XLA, which rounds in another order.
    """
    import keras

    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (32, 64, 64, 1), np.uint8)
    truth = (random.random((32, 15)) < 0.3).astype(np.float32)
    arguments = parse("--image-size", 64, "--weights", "none")
    exact = keras.models.model_from_json(xray_gpu.build_cnn(arguments, truth).to_json())
    policy(precision)
    fast = xray_gpu.build_cnn(arguments, truth)
    stock = keras.models.model_from_json(fast.to_json())
    for model in (exact, stock):
        model.set_weights(fast.get_weights())
    wanted = training_step(exact, pixels, truth, False)
    other = training_step(stock, pixels, truth, precision == "float32")
    found = training_step(fast, pixels, truth, xla)
    for part, want, stocks in zip(found, wanted, other):
        error, stock_error = (
            np.linalg.norm(value - want) / np.linalg.norm(want) for value in (part, stocks)
        )
        assert error < 2 * stock_error + 1e-3
