"""Snapshots of asynchronous epochs in xray_elephas.py, without Spark.

Tests the parameter server's snapshots, and the run folder after a death at any moment.
"""

from __future__ import annotations

import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import free_port

xray = pytest.importorskip("xray_elephas")

ROWS = ["train", "train", "validation", "validation", "test"]
TABLE = pd.DataFrame({"image": list("abcde"), "etag": list("12345"), "split": ROWS}).assign(
    reason="", **dict.fromkeys(xray.LABELS, [0.0, 1.0, 0.0, 1.0, 0.0])
)
EPOCHS = 4
BEST = 2  # the epoch with the highest AUROC


@pytest.fixture
def model(keras: Any) -> Any:
    """A model with moving statistics, compiled with Adam."""
    layers = [keras.Input((2,)), keras.layers.Dense(15), keras.layers.BatchNormalization()]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.Adam(), "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    return model


# ---- the parameter server ----


class Server:
    """A parameter server for two workers, and their client."""

    def __init__(self, model: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from elephas.parameter import HttpClient
        from elephas.utils.serialization import model_to_dict

        monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        port = free_port()
        self.start = model.get_weights()
        self.server = xray.guarded_server(model_to_dict(model), port, mode, "the key", workers=2)
        self.client = HttpClient(port)
        self.trained = [variable.trainable for variable in model.weights]

    def send(self, worker: int, epoch: int, loss: float, statistic: float) -> None:
        """Send a change of -1 in all trained weights, with all statistics set to `statistic`."""
        change = [
            -np.ones_like(array) if trained else np.zeros_like(array)
            for array, trained in zip(self.start, self.trained)
        ]
        statistics = [
            np.full_like(array, statistic)
            for array, trained in zip(self.start, self.trained)
            if not trained
        ]
        words = {"Authorization": "Bearer the key", "Xray-Worker": worker, "Xray-Epoch": epoch}
        self.client.headers.update({name: str(word) for name, word in words.items()})
        self.client.headers["Xray-Loss"] = repr(loss)
        self.client.update_parameters([*change, *statistics])

    def check(self, weights: list[np.ndarray], updates: int, statistic: float) -> None:
        for array, start, trained in zip(weights, self.start, self.trained):
            wanted = start + updates if trained else np.full_like(start, statistic)
            assert np.allclose(array, wanted, atol=1e-5)


@pytest.fixture(params=["asynchronous", "hogwild"])
def server(
    request: pytest.FixtureRequest, model: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    server = Server(model, request.param, monkeypatch)
    server.server.start()
    yield server


def test_a_snapshot_of_each_epoch_that_all_workers_have_finished(server: Server) -> None:
    """With one worker two epochs ahead, statistics are not summed, and no snapshot is lost."""
    before = time.perf_counter()
    for epoch, loss in ((1, 0.1), (2, 0.3), (3, 0.5)):
        server.send(0, epoch, loss, statistic=epoch)
    between = time.perf_counter()
    for epoch, loss in ((1, 0.2), (2, 0.4)):
        server.send(1, epoch, loss, statistic=10 * epoch)
    # Elephas' own client reads the workers' initial weights of an epoch, with the start's
    # statistics.
    weights = server.client.get_parameters()
    for array, start, trained in zip(weights, server.start, server.trained):
        assert np.allclose(array, start + 5 * trained, atol=1e-5)
    server.server.stop()
    after = time.perf_counter()
    first, second = server.server.snapshots()
    assert (first.epoch, second.epoch) == (1, 2)
    assert (first.loss, second.loss) == (np.mean([0.1, 0.2]), np.mean([0.3, 0.4]))
    server.check(first.weights, updates=4, statistic=(3 + 10) / 2)
    server.check(second.weights, updates=5, statistic=(3 + 20) / 2)
    assert before < between < first.end < second.end < after


@pytest.fixture
def large(keras: Any, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A running server of a model whose snapshot exceeds a pipe's capacity."""
    model = keras.Sequential([keras.Input((300,)), keras.layers.Dense(1000)])
    server = Server(model, "asynchronous", monkeypatch)
    server.server.start()
    return server


def test_no_worker_waits_for_a_driver_that_takes_no_snapshot(large: Server) -> None:
    """At the end the driver gets all snapshots."""
    for epoch in range(1, 6):
        for worker in (0, 1):
            large.send(worker, epoch, 0.5, statistic=0)
    stopping = threading.Thread(target=large.server.stop)
    stopping.start()
    assert [snapshot.epoch for snapshot in large.server.snapshots()] == [1, 2, 3, 4, 5]
    stopping.join()


def test_a_driver_that_gives_up_does_not_wait_for_its_server(large: Server) -> None:
    for epoch in (1, 2):
        for worker in (0, 1):
            large.send(worker, epoch, 0.5, statistic=0)
    large.server.receiver.close()
    large.server.stop()  # must not hang


# ---- the run folder ----


class Killed(BaseException):
    """Instead of SIGKILL: nothing in the script catches it."""


class Trainer:
    """Sets all weights to the epoch's number; a worker scores best in epoch BEST."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def fit_asynchronously(self, first: int, keep: Any) -> None:
        for epoch in range(first, EPOCHS + 1):
            weights = [np.full(v.shape, epoch, np.float32) for v in self.model.weights]
            keep(xray.Snapshot(epoch, 1 / epoch, weights, time.perf_counter()))

    def predict(self, split: str) -> np.ndarray:
        epoch = self.model.get_weights()[0].flat[0]
        wrong_way = np.array([[0.9], [0.1]])
        return np.repeat(wrong_way[::-1] if epoch == BEST else wrong_way, 15, axis=1)


def train(
    model: Any, resume: bool, output: str = "mine", keys: dict[str, str] | None = None
) -> float:
    """Run to the end in `output` like main; return the evaluated weight, its epoch's number."""
    words = ["--output", output, "--mode", "hogwild", "--epochs", str(EPOCHS)]
    arguments = xray.elephas_parser().parse_args([*words, *["--resume"] * resume])
    run = xray.Run(arguments, keys or {})
    run.check(TABLE, {})
    try:
        run.open(TABLE, xray.weights_alone(model))
        xray.train_asynchronously(Trainer(model), run)
        run.load_best()
    finally:  # as if the process had ended
        run._lock.close()
    history = run.history
    assert list(history["epoch"]) == list(range(1, EPOCHS + 1))
    assert list(history["validation_auroc"]) == [float(e == BEST) for e in history["epoch"]]
    assert list(history["loss"]) == [1 / epoch for epoch in history["epoch"]]
    return model.get_weights()[0].flat[0]


def checkpoints() -> set[str]:
    return {path.name.split(".")[0] for path in Path("mine").glob("checkpoint-*")}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["xray_elephas.py"])


def die_at(moment: float, patch: pytest.MonkeyPatch) -> list[Path]:
    """Raise Killed before the `moment`-th renaming into place or removal of a file.

    The returned list collects the files whose change was due.
    """
    changed: list[Path] = []

    def dying(change: Callable) -> Callable:
        def call(path: Path, *more: Any) -> Any:
            changed.append(path)
            if len(changed) == moment:
                raise Killed
            return change(path, *more)

        return call

    patch.setattr(Path, "replace", dying(Path.replace))
    patch.setattr(Path, "unlink", dying(Path.unlink))
    return changed


@pytest.mark.slow
def test_a_run_killed_before_any_change_of_a_file_goes_on(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        changed = die_at(math.inf, patch)
        assert train(model, resume=False) == BEST
    shutil.rmtree("mine")
    names = [path.name for path in changed]
    assert len(names) > 3 * EPOCHS
    # Without a config.json there is nothing to resume.
    for moment in range(names.index(".partial-config.json") + 2, len(names) + 1):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_at(moment, patch)
            train(model, resume=False)
        model.set_weights([np.zeros_like(array) for array in model.get_weights()])
        assert train(model, resume=True) == BEST
        assert checkpoints() == {f"checkpoint-{BEST}", f"checkpoint-{EPOCHS}"}
        shutil.rmtree("mine")


def test_checkpoints_have_no_state_of_adam(model: Any) -> None:
    train(model, resume=False)
    with_adam = Path("with_adam.weights.h5")
    model.save_weights(with_adam)
    size = Path(f"mine/checkpoint-{EPOCHS}.weights.h5").stat().st_size
    assert size < with_adam.stat().st_size


class Blind(Trainer):
    """All images look alike from epoch 3 on."""

    def predict(self, split: str) -> np.ndarray:
        scores = super().predict(split)
        epoch = self.model.get_weights()[0].flat[0]
        return scores if epoch <= 2 else np.full_like(scores, 0.5)


def test_a_dead_network_is_said_once(model: Any, capsys: pytest.CaptureFixture) -> None:
    run = xray.Run(xray.elephas_parser().parse_args(["--output", "mine"]), {})
    run.check(TABLE, {})
    run.open(TABLE, xray.weights_alone(model))
    xray.train_asynchronously(Blind(model), run)
    run._lock.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the network has died")


class DiesAsItValidates(Trainer):
    """Dies in epoch 3."""

    def predict(self, split: str) -> np.ndarray:
        if self.model.get_weights()[0].flat[0] == 3:
            raise Killed
        return super().predict(split)


@pytest.fixture
def die_in_validation(model: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call with more arguments of `train`: dies in validation."""

    def call(*more: Any) -> None:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(sys.modules[__name__], "Trainer", DiesAsItValidates)
            train(model, False, *more)

    return call


def test_a_missing_snapshot_is_known_before_training(
    model: Any, die_in_validation: Callable[..., None]
) -> None:
    die_in_validation()
    assert checkpoints() == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}
    Path("mine/checkpoint-3.weights.h5").unlink()
    with pytest.raises(xray.UserError, match="checkpoint-3.weights.h5 in mine is missing"):
        train(model, resume=True)


def test_a_run_goes_on_with_the_snapshots_on_s3(
    model: Any,
    die_in_validation: Callable[..., None],
    credentials: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run dies while validating, and continues in another place."""
    bucket = "my-xray-snapshots"
    keys = xray.read_credentials(str(credentials))
    client = xray.s3_client(keys)
    client.create_bucket(Bucket=bucket)

    def kept() -> set[str]:
        names = {entry["Key"].split("/")[-1] for entry in xray.list_objects(client, bucket, "run/")}
        return {name.split(".")[0] for name in names if name.startswith("checkpoint")}

    die_in_validation(f"s3://{bucket}/run", keys)
    assert kept() == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model.set_weights([np.zeros_like(array) for array in model.get_weights()])
    assert train(model, True, f"s3://{bucket}/run", keys) == BEST
    assert kept() == {f"checkpoint-{BEST}", f"checkpoint-{EPOCHS}"}
