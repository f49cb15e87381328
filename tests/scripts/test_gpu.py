"""xray_gpu.py without a GPU: its rules on recorded devices, whole runs on two CPU devices."""

from __future__ import annotations

import json
import math
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pandas as pd
import pytest
from helpers import QUICK, ROOT, as_options, parse, result_of, run_process

import xray_gpu

# Output of tf.config.experimental.get_device_details, from the names and capabilities in NVIDIA's
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


# Its first arguments: the project, the number of devices and their memory.
ON_CPUS = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import xray_gpu

count, memory = int(sys.argv.pop(1)), int(sys.argv.pop(1))

def set_up_cpus(precision):
    tf = xray_gpu.import_tensorflow()
    xray_gpu.hide_log()
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * count
    )
    import keras

    keras.config.set_dtype_policy(precision)
    strategy = tf.distribute.get_strategy()
    if count > 1:
        strategy = tf.distribute.MirroredStrategy([f"CPU:{n}" for n in range(count)])
    return strategy, {"replicas": count, "xla": False, "precision": precision}

xray_gpu.set_up_gpus = set_up_cpus
xray_gpu.gpu_memory = lambda: memory
xray_gpu.peak_gpu_memory = lambda: 7 * 10**6
sys.exit(xray_gpu.run_script(xray_gpu.main))
"""
LARGE = 10**9  # bytes, of which the sample needs a small share
SMALL = 10**5


def on_cpus(count: int, memory: int, program: str = ON_CPUS) -> list[Any]:
    """The command, without options, of xray_gpu.py on `count` CPU devices of `memory` bytes."""
    return [sys.executable, "-c", program, ROOT, count, memory]


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
    finished = run_process([*on_cpus(2, LARGE), *options], cwd=tmp_path)
    assert finished.code == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "run" / "metrics.json").read_text())
    target = {"replicas": 2, "xla": False, "precision": "mixed_float16", "pixels": "gpu"}
    assert result["target"] == target
    assert result["peak_memory_mb"]["gpu"] == 7
    assert result["images"] == {"train": 271, "validation": 48, "test": 91, "skipped": 1}
    # --batch-size is per replica: 271 images fill all but one image of 17 steps of twice 8.
    assert "17/17" in finished.stdout
    resumed = run_process([*on_cpus(2, LARGE), *options, "--resume"], cwd=tmp_path)
    assert json.loads(resumed.stdout.splitlines()[-1])["auroc"] == result["auroc"], resumed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("memory", [LARGE, SMALL])
def test_a_last_batch_smaller_than_the_replicas(
    credentials: Path, tmp_path: Path, memory: int
) -> None:
    """271 images are 3 steps of twice 45, and one, which alone gives a replica nan statistics.

    Likewise, the 91 of the test split are one step and one image.
    """
    options = [
        "--credentials",
        credentials,
        *QUICK,
        *as_options(batch_size=45, epochs=1, output="run"),
    ]
    finished = run_process([*on_cpus(2, memory), *options, "--precision", "float32"], cwd=tmp_path)
    result = result_of(finished)
    assert result["images"]["train"] == 271
    assert result["target"]["pixels"] == ("gpu" if memory == LARGE else "host")
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
    command = [*on_cpus(2, LARGE), *options]
    result_of(run_process([*command, "--precision", "float32"], cwd=tmp_path))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    config = json.loads(before["config.json"])
    assert config["target"] == {"precision": "float32", "replicas": 2}
    for had, program, changed in [
        ("--precision float32", ON_CPUS, ["--precision", "mixed_float16"]),
        (
            "replicas 2",
            ON_CPUS.replace('"replicas": count', '"replicas": 1'),
            ["--precision", "float32"],
        ),
    ]:
        command = on_cpus(2, LARGE, program)
        again = run_process([*command, *options, "--resume", *changed], cwd=tmp_path)
        assert again.code == 2, again.stderr
        assert f"the run in run had {had}, not" in again.stderr.splitlines()[-1]
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.slow
def test_both_pipelines_give_the_same_losses_over_a_resume(
    credentials: Path, tmp_path: Path
) -> None:
    options = ["--credentials", credentials, *QUICK, "--flip", "--precision", "float32"]

    def history(output: str, epochs: int, memory: int, *more: str) -> pd.DataFrame:
        words = [*options, *as_options(output=output, epochs=epochs), *more]
        result_of(run_process([*on_cpus(1, memory), *words], cwd=tmp_path))
        return pd.read_csv(tmp_path / output / "history.csv")

    on_gpu = history("gpu", 3, LARGE)
    on_host = history("host", 3, SMALL)
    history("both", 1, SMALL)
    on_both = history("both", 3, LARGE, "--resume")
    for column in ("loss", "validation_loss"):
        wanted = pytest.approx(on_gpu[column].to_numpy(), abs=1e-6)
        assert on_host[column].to_numpy() == wanted
        assert on_both[column].to_numpy() == wanted


class Small(NamedTuple):
    """A GpuTrainer of a small CNN on 45 images, in batches of 4, and its steps' trace inputs."""

    trainer: Any
    model: Any
    traces: list[tuple[str, Any]]


@pytest.fixture
def small(keras: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Small]:
    """Call to make a Small on a device of so much memory; splits: 27, 8, 10 images."""
    import tensorflow as tf

    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (45, 16, 16), np.uint8)
    split = ["train"] * 27 + ["validation"] * 8 + ["test"] * 10
    labels = (random.random((45, 15)) < 0.3).astype(np.float32)
    table = pd.DataFrame(labels, columns=xray_gpu.LABELS).assign(split=split)

    def make(memory: int, *options: Any, xla: bool = False) -> Small:
        monkeypatch.setattr(xray_gpu, "gpu_memory", lambda: memory)
        keras.utils.set_random_seed(0)
        layers = [
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(4, 3, use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),  # makes mirrored images differ
            keras.layers.Dropout(0.2, name="dropout"),
            keras.layers.Dense(15, activation="sigmoid"),
        ]
        model = keras.Sequential([keras.Input((16, 16, 1), dtype="uint8"), *layers])
        model.compile(keras.optimizers.Adam(1e-2), "binary_crossentropy", jit_compile=xla)
        model.optimizer.build(model.trainable_variables)
        traces: list[tuple[str, Any]] = []

        def noted(name: str, step: Callable) -> Callable:
            def traced(data: tuple) -> Any:
                traces.append((name, data[0].shape))
                return step(data)

            return traced

        model.train_step = noted("train", model.train_step)
        model.predict_step = noted("predict", model.predict_step)
        strategy = tf.distribute.get_strategy()
        arguments = parse("--batch-size", 4, "--epochs", 9, *options)
        feed, where = xray_gpu.make_feed(model, pixels, table, 4, strategy)
        assert where == ("gpu" if memory == LARGE else "host")
        trainer = xray_gpu.GpuTrainer(
            xray_gpu.KerasTrainer(model, feed, table, arguments), strategy
        )
        return Small(trainer, model, traces)

    return make


@pytest.mark.parametrize("memory", [LARGE, 0])
def test_a_run_traces_one_training_step_and_one_prediction(
    small: Callable[..., Small], memory: int
) -> None:
    trainer, _, traces = small(memory)
    for epoch in (1, 2):
        trainer.fit_epoch(epoch)
        assert trainer.predict("validation").shape == (8, 15)
    assert trainer.predict("test").shape == (10, 15)
    assert [name for name, _ in traces] == ["train", "predict"]
    if memory == LARGE:
        assert [tuple(shape) for _, shape in traces] == [(4, 16, 16, 1)] * 2


def test_small_pipelines_agree_over_a_resume(small: Callable[..., Small], tmp_path: Path) -> None:
    on_gpu, on_host, resumed = (small(memory, "--flip") for memory in (LARGE, 0, LARGE))
    losses = [[each.trainer.fit_epoch(epoch) for epoch in (1, 2)] for each in (on_gpu, on_host)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for split in ("validation", "test"):
        scores = [each.trainer.predict(split) for each in (on_gpu, on_host)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    xray_gpu.save_checkpoint(on_host.model, tmp_path / "2.weights.h5")
    resumed.model.load_weights(tmp_path / "2.weights.h5")
    assert resumed.trainer.fit_epoch(3) == pytest.approx(on_gpu.trainer.fit_epoch(3), abs=1e-6)
    unmirrored = small(LARGE)
    assert unmirrored.trainer.fit_epoch(1) != pytest.approx(losses[0][0], abs=1e-5)


def test_xla_compiles_the_steps_that_gather_their_images(small: Callable[..., Small]) -> None:
    plain, compiled = small(LARGE), small(LARGE, "--flip", xla=True)
    scores = [each.trainer.predict("validation") for each in (plain, compiled)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert math.isfinite(compiled.trainer.fit_epoch(1))


def has_gpu_kernel(node: Any) -> bool:
    """Whether the installed TensorFlow has a kernel for a graph's `node` that runs on GPUs."""
    from tensorflow.python.framework import kernels

    def fits(kernel: Any) -> bool:
        return kernel.device_type in ("GPU", "DEFAULT") and all(
            set(node.attr[each.name].list.type or [node.attr[each.name].type])
            <= set(each.allowed_values.list.type)
            for each in kernel.constraint
        )

    return any(map(fits, kernels.get_registered_kernels_for_op(node.op).kernel))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only that wheel has GPU kernels")
def test_every_operation_of_a_training_step_has_a_gpu_kernel(
    policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorFlow runs an operation without one on the CPU, and copies its data in each step."""
    import tensorflow as tf

    monkeypatch.setattr(xray_gpu, "gpu_memory", lambda: LARGE)
    policy("mixed_float16")
    pixels = np.zeros((8, 32, 32), np.uint8)
    table = pd.DataFrame(0.0, range(8), xray_gpu.LABELS)
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        options = ["--image-size", 32, "--weights", "none"]
        model = xray_gpu.build_cnn(parse(*options), table.to_numpy())
        model.optimizer.build(model.trainable_variables)
    xray_gpu.make_feed(model, pixels, table, 4, strategy)
    step = tf.function(lambda batch: strategy.run(model.train_step, (batch,)))
    graph = step.get_concrete_function(tf.TensorSpec((4, 2), tf.int32)).graph.as_graph_def()
    called = {function.signature.name for function in graph.library.function}
    nodes = [*graph.node, *(n for each in graph.library.function for n in each.node_def)]
    assert len(nodes) > 500
    lacking = {node.op for node in nodes if node.op not in called and not has_gpu_kernel(node)}
    assert lacking <= {"Placeholder", "NoOp", "PartitionedCall", "StatefulPartitionedCall"}


@pytest.mark.usefixtures("keras")
@pytest.mark.parametrize("memory", [LARGE, 0])
def test_all_batches_are_full_and_have_all_images(
    monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    import keras
    import tensorflow as tf

    monkeypatch.setattr(xray_gpu, "gpu_memory", lambda: memory)
    pixels = np.arange(45, dtype=np.uint8)[:, np.newaxis, np.newaxis].repeat(9, 1).repeat(9, 2)
    table = pd.DataFrame(0.0, range(45), xray_gpu.LABELS)
    model = keras.Sequential([keras.Input((9, 9, 1)), keras.layers.Flatten()])
    model.compile(loss="mse")
    feed, _ = xray_gpu.make_feed(model, pixels, table, 4, tf.distribute.get_strategy())
    order = np.random.default_rng(0).permutation(45)
    for rows in (order[:27], order[:8], order[:3]):
        # An image's grey level is its number.
        batches = [
            batch[:, 0] if memory else batch[0][:, 0, 0, 0]
            for batch in feed(rows).as_numpy_iterator()
        ]
        assert [len(batch) for batch in batches] == [4] * math.ceil(len(rows) / 4)
        assert feed(rows).cardinality() == len(batches)
        found = np.concatenate(batches)
        assert np.array_equal(found, np.resize(rows, len(found)))


QUIET = """
import sys
sys.path.insert(0, sys.argv[1])
import xray_gpu

def compile_by_xla():
    tf = xray_gpu.import_tensorflow()
    xray_gpu.hide_log()
    print("before", file=sys.stderr)
    tf.function(lambda x: 2 * x, jit_compile=True)(tf.ones(3))
    raise xray_gpu.UserError("after")

sys.exit(xray_gpu.run_script(compile_by_xla))
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", [None, "3", "0"])
def test_xla_is_quiet_unless_the_user_wants_its_log(level: str | None) -> None:
    setting = "-uTF_CPP_MIN_LOG_LEVEL" if level is None else f"TF_CPP_MIN_LOG_LEVEL={level}"
    finished = run_process(["env", setting, sys.executable, "-c", QUIET, ROOT])
    assert finished.code == 2
    assert "before\n" in finished.stderr
    if level == "0":
        assert "Compiled cluster using XLA!" in finished.stderr
    else:
        assert finished.stderr == "before\n-c: error: after\n"


CRASH = """
import os, sys
sys.path.insert(0, sys.argv[1])
import xray_gpu

xray_gpu.import_tensorflow()
xray_gpu.hide_log()
os.write(2, b"I0000 00:00:1 1 cuda.cc:1] loaded\\nF0000 00:00:1 1 cuda.cc:2] no driver\\n")
os.abort()
"""


@pytest.mark.slow
def test_the_last_words_of_a_crash_are_shown() -> None:
    shown = run_process(["sh", "-c", '"$@" 2>&1 | cat', "sh", sys.executable, "-c", CRASH, ROOT])
    assert "F0000 00:00:1 1 cuda.cc:2] no driver\n" in shown.stdout
    assert "I0000" not in shown.stdout


@pytest.mark.usefixtures("keras")
def test_too_little_memory_of_the_gpu_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import tensorflow as tf

    def fails() -> None:
        with xray_gpu.memory_errors(512):
            raise tf.errors.ResourceExhaustedError(None, None, "OOM\nwhen allocating\n" * 99)

    monkeypatch.setattr(sys, "argv", ["xray_gpu.py"])
    assert xray_gpu.run_script(fails) == 2
    problem = "the GPU's memory is too small for --batch-size 512: use a smaller one"
    assert capsys.readouterr().err == f"xray_gpu.py: error: {problem}\n"


@pytest.fixture
def policy(keras: Any) -> Any:
    """Call to set Keras' dtype policy for one test."""
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy("float32")


def training_step(model: Any, pixels: np.ndarray, truth: np.ndarray, xla: bool) -> list[np.ndarray]:
    """Loss, gradients and moving statistics of one step, without dropout, which XLA redraws."""
    import keras
    import tensorflow as tf

    model.get_layer("dropout").rate = 0

    @tf.function(jit_compile=xla)
    def step() -> tuple:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(
                keras.losses.binary_crossentropy(truth, model(pixels, training=True))
            )
            # Like Keras' LossScaleOptimizer: small gradients would vanish in float16.
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


# float32 without XLA is in test_cnn.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "xla"), [("float32", True), ("mixed_float16", False), ("mixed_float16", True)]
)
def test_a_step_is_as_right_as_that_of_stock_layers(policy: Any, precision: str, xla: bool) -> None:
    """Fast layers are as close to Keras' own in float32 as rounding allows.

    27 normalised layers amplify rounding in the gradients. Keras' own layers show by how much, in
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
