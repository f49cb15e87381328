"""The run folder: who has it, what is left of a run that fails, and which epochs' weights it
keeps.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import h5py
import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, parse

import xray_tensorflow as xray

TABLE = pd.DataFrame(
    {"image": ["a.png"], "etag": ["1"], "split": ["train"], **dict.fromkeys(xray.LABELS, 0.0)}
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the runs of a test begin in."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["xray_tensorflow.py"])
    return folder


def run_folder(*options: Any) -> xray.RunFolder:
    return xray.RunFolder(parse(*options), {})


def in_threads(call: Callable[[], None], count: int) -> None:
    """Call it in `count` threads at once. Raises what the first of them that failed has raised."""
    barrier = threading.Barrier(count)
    errors: list[BaseException] = []

    def work() -> None:
        barrier.wait()
        try:
            call()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def begin(run: xray.RunFolder) -> None:
    """Let a run begin to train."""
    run.check_resumed(TABLE, target={})
    run.begin(TABLE, {})


# ---- who has it ----


def test_runs_that_begin_in_the_same_second_have_different_folders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        xray.time, "strftime", lambda form, _: form.replace("%Y%m%dT%H%M%SZ", "20261122T120000Z")
    )
    taken: list[Path] = []
    held = threading.Barrier(12)

    def take() -> None:
        with run_folder() as run:
            taken.append(run.path)
            held.wait(20)

    in_threads(take, 12)
    first = Path("runs/xray_tensorflow-20261122T120000Z")
    assert set(taken) == {first, *(Path(f"{first}-{number}") for number in range(2, 13))}


def test_one_output_has_one_run() -> None:
    with run_folder("--output", "mine") as run:
        for _ in range(2):
            with pytest.raises(
                xray.UserError, match="another run is at work in .*mine: use another --output"
            ):
                run_folder("--output", "mine").__enter__()
        assert (run.path / ".lock").exists()
    with run_folder("--output", "mine"):
        pass


def test_two_runs_never_hold_one_folder_however_short_they_are() -> None:
    at_work: list[int] = []
    most: list[int] = []

    def come_and_go() -> None:
        for _ in range(100):
            try:
                with run_folder("--output", "runs/mine"):
                    at_work.append(1)
                    most.append(len(at_work))
                    at_work.pop()
            except xray.UserError as error:
                assert "another run is at work" in str(error)  # noqa: PT017

    in_threads(come_and_go, 6)
    assert most
    assert max(most) == 1
    assert not [path for path in Path("runs").rglob("*") if path.is_file()]


def test_runs_that_fail_do_not_take_the_folder_of_those_that_begin(home: Path) -> None:
    def come_and_go() -> None:
        for _ in range(60):
            with run_folder():
                pass

    in_threads(come_and_go, 6)
    # The folder runs/ itself may stay, where another run was just coming.
    assert list(home.glob("runs/*")) == []


HOLD = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import xray_tensorflow as xray
sys.argv[0] = "xray_tensorflow.py"
with xray.RunFolder(xray.common_parser("").parse_args(), {}) as run:
    print("taken", flush=True)
    time.sleep(60)
"""


def test_the_folder_of_a_killed_run_can_be_taken_again() -> None:
    command = [sys.executable, "-c", HOLD, str(ROOT), "--output", "mine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "taken\n"
        with pytest.raises(xray.UserError, match="another run is at work"):
            run_folder("--output", "mine").__enter__()
        holder.send_signal(signal.SIGKILL)
    assert Path("mine/.lock").exists()
    with run_folder("--output", "mine"):
        pass


def test_an_output_that_is_a_link_to_nothing_yet(home: Path) -> None:
    Path("link").symlink_to(home / "target")
    with run_folder("--output", "link") as run:
        begin(run)
    assert (home / "target" / "config.json").exists()


@pytest.mark.slow
def test_a_loop_of_a_shell_that_starts_three_runs(credentials: Path, home: Path) -> None:
    python = f"{sys.executable} {ROOT / 'xray_tensorflow.py'}"
    options = "--weights none --image-size 32 --epochs 1 --batch-size 8 --limit 150 --cache cache"
    command = (
        f"for s in 1 2 3; do {python} --credentials {credentials} {options} --seed $s & done; wait"
    )
    ended = subprocess.run(["bash", "-c", command], cwd=home, capture_output=True, text=True)
    assert "error" not in ended.stderr, ended.stderr
    runs = list((home / "runs").iterdir())
    assert len(runs) == 3
    seeds = {json.loads((run / "config.json").read_text())["arguments"]["seed"] for run in runs}
    assert seeds == {1, 2, 3}
    assert all((run / "metrics.json").exists() for run in runs)


# ---- what a run that fails leaves ----


@pytest.mark.parametrize("output", [None, "new", "a/b/new"])
def test_a_run_that_fails_before_it_trains_leaves_no_folder(home: Path, output: str | None) -> None:
    with pytest.raises(ZeroDivisionError), run_folder(*["--output", output] * bool(output)) as run:
        assert run.path.is_dir()
        _ = 1 / 0
    assert list(home.iterdir()) == []


def test_a_folder_of_the_users_stays(home: Path) -> None:
    (home / "mine").mkdir()
    with pytest.raises(ZeroDivisionError), run_folder("--output", "mine"):
        _ = 1 / 0
    assert list((home / "mine").iterdir()) == []


def test_a_run_that_has_begun_stays_and_only_resume_takes_it() -> None:
    with pytest.raises(ZeroDivisionError), run_folder("--output", "mine") as run:
        begin(run)
        _ = 1 / 0
    assert {path.name for path in Path("mine").iterdir()} == {"config.json", "skipped.csv"}
    with pytest.raises(
        xray.UserError, match="mine is not empty: use another --output, or --resume"
    ):
        run_folder("--output", "mine").__enter__()
    with run_folder("--output", "mine", "--resume") as run:
        begin(run)


def test_resume_without_a_run() -> None:
    with pytest.raises(xray.UserError, match="--resume needs --output"):
        run_folder("--resume").__enter__()
    with pytest.raises(xray.UserError, match="has no run that has begun to train"):
        run_folder("--resume", "--output", "absent").__enter__()
    assert not Path("absent").exists()


# ---- the best epoch ----


@pytest.mark.parametrize(
    ("aurocs", "best"),
    [
        ([0.5, 0.7, 0.6], 2),
        ([0.5, 0.6, 0.7], 3),
        ([0.7, 0.6, 0.5], 1),
        ([0.6, 0.7, 0.7, 0.5], 2),  # the first of equal ones
        ([math.nan, 0.5, math.nan], 2),
        ([math.nan, math.nan, math.nan], 3),  # none is defined: the last
        ([0.5], 1),
    ],
)
def test_best_epoch(aurocs: list[float], best: int) -> None:
    history = pd.DataFrame({"epoch": range(1, len(aurocs) + 1), "validation_auroc": aurocs})
    assert xray.best_epoch(history) == best


@pytest.fixture
def model(keras: Any) -> Iterator[Any]:
    """A compiled model of one weight, which says the epoch that it is of."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(keras.optimizers.Adam(), "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    yield model


class Trainer:
    """Each epoch sets the weight to its number; the validation AUROC of each is given."""

    def __init__(self, model: Any, aurocs: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = model
        monkeypatch.setattr(xray, "validate", lambda labels, scores: self.validated)
        self._aurocs = aurocs
        self.validated: dict[str, float] = {}

    def fit_epoch(self, epoch: int) -> float:
        self.model.set_weights([np.full((1, 1), epoch)])
        self.validated = {"validation_loss": 1.0, "validation_auroc": self._aurocs[epoch - 1]}
        return 1.0

    def predict(self, split: str) -> np.ndarray:
        return np.repeat([[0.1], [0.9]], 15, axis=1)


def train(model: Any, patch: pytest.MonkeyPatch, aurocs: list[float], *options: Any) -> float:
    """Train to the end of `aurocs`; the weight that is evaluated, which is the number of its
    epoch.
    """
    with run_folder("--output", "mine", "--epochs", len(aurocs), *options) as run:
        run.check_resumed(TABLE, target={})
        history = run.restore(model)
        run.begin(TABLE, {})
        history = xray.train_epochs(Trainer(model, aurocs, patch), run, history, TABLE, len(aurocs))
        run.load_best(model, history)
    return model.get_weights()[0].item()


def checkpoints() -> set[str]:
    return {path.name.split(".")[0] for path in Path("mine").glob("checkpoint-*")}


def test_the_weights_of_the_best_epoch_are_kept_across_resumes(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    aurocs = [0.5, 0.8, 0.6, 0.7, 0.9, 0.9, math.nan]
    for epochs, best in [(1, 1), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5), (7, 5)]:
        resume = ["--resume"] * (epochs > 1)
        assert train(model, monkeypatch, aurocs[:epochs], *resume) == best
        assert checkpoints() == {f"checkpoint-{best}", f"checkpoint-{epochs}"}


def test_a_dead_network_is_said_once_and_trained_on(
    model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert train(model, monkeypatch, [0.6, 0.5, 0.5, 0.5, 0.8, 0.5, 0.5]) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the network has died")
    assert "a smaller --learning-rate" in line


def test_a_resume_goes_on_from_the_last_epoch_not_from_the_best(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(model, monkeypatch, [0.9, 0.5])
    model.set_weights([np.zeros((1, 1))])
    with run_folder("--output", "mine", "--epochs", 3, "--resume") as run:
        run.check_resumed(TABLE, target={})
        assert len(run.restore(model)) == 2
        assert model.get_weights()[0].item() == 2


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "text": lambda data: b"not HDF5",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "zeros within": lambda data: data[:100] + bytes(len(data) - 200) + data[-100:],
}


@pytest.mark.parametrize("which", [1, 2], ids=["best", "last"])
@pytest.mark.parametrize("damage", [None, *DAMAGES])
def test_a_checkpoint_missing_or_damaged(
    model: Any, monkeypatch: pytest.MonkeyPatch, which: int, damage: str | None
) -> None:
    train(model, monkeypatch, [0.9, 0.5])
    checkpoint = Path("mine", f"checkpoint-{which}.weights.h5")
    if damage:
        checkpoint.write_bytes(DAMAGES[damage](checkpoint.read_bytes()))
    else:
        checkpoint.unlink()
    before = contents(Path("mine"))
    problem = "damaged" if damage else "missing"
    with pytest.raises(xray.UserError, match=rf"{checkpoint.name} in mine is {problem}"):
        train(model, monkeypatch, [0.9, 0.5, 0.5], "--resume")
    assert contents(Path("mine")) == before


def test_a_checkpoint_without_the_state_of_adam(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keras reads it with a warning, and Adam would start anew."""
    train(model, monkeypatch, [0.9, 0.5])
    with h5py.File("mine/checkpoint-2.weights.h5", "a") as file:
        del file["optimizer"]["vars"]
    with pytest.raises(xray.UserError, match=r"checkpoint-2.weights.h5 in mine is damaged"):
        train(model, monkeypatch, [0.9, 0.5, 0.5], "--resume")


def test_no_damage_of_a_checkpoint_is_a_traceback(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HDF5 has no checksums: a changed number is read as it is, anything else is one line."""
    train(model, monkeypatch, [0.9, 0.5])
    checkpoint = Path("mine", "checkpoint-2.weights.h5")
    whole = checkpoint.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        start = random.integers(len(whole))
        damaged[start : start + 30] = random.bytes(len(damaged[start : start + 30]))
        checkpoint.write_bytes(damaged)
        try:
            train(model, monkeypatch, [0.9, 0.5], "--resume")
        except xray.UserError as error:
            refused += 1
            assert "checkpoint-2.weights.h5 in mine is damaged" in str(error)  # noqa: PT017
    assert refused > 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0\0",
        "epoch,loss\n1,0.5\n",
        "epoch,validation_auroc\n",
        "epoch,validation_auroc\n1,what\n,0.5\n",
        "epoch,validation_auroc\n1,0.5\n3,0.6\n",
    ],
)
def test_a_history_that_is_damaged(model: Any, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    train(model, monkeypatch, [0.9, 0.5])
    Path("mine/history.csv").write_text(text)
    before = contents(Path("mine"))
    with pytest.raises(xray.UserError, match="history.csv in mine is damaged"):
        train(model, monkeypatch, [0.9, 0.5, 0.5], "--resume")
    assert contents(Path("mine")) == before


# ---- what a resumed run must have in common with the one that began ----


@pytest.mark.parametrize(
    ("name", "had", "wanted"),
    [("precision", "mixed_float16", "float32"), ("replicas", 2, 1), ("replicas", 1, 4)],
)
def test_resume_on_a_machine_that_computes_otherwise(
    home: Path, name: str, had: Any, wanted: Any
) -> None:
    target = {"precision": "float32", "replicas": 1}
    with run_folder("--output", "mine") as run:
        run.check_resumed(TABLE, target={**target, name: had})
        run.begin(TABLE, {})
    before = contents(home / "mine")
    with (
        run_folder("--output", "mine", "--resume") as run,
        pytest.raises(xray.UserError, match=f"had --{name} {had}, not {wanted}"),
    ):
        run.check_resumed(TABLE, target={**target, name: wanted})
    assert {path.name for path in Path("mine").iterdir()} == before.keys()
    with run_folder("--output", "mine", "--resume") as run:
        run.check_resumed(TABLE, target={**target, name: had})


def test_resume_with_and_without_flip() -> None:
    with run_folder("--output", "mine") as run:
        begin(run)
    with (
        run_folder("--output", "mine", "--resume", "--flip") as run,
        pytest.raises(xray.UserError, match="--flip False"),
    ):
        begin(run)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"arguments": 1, "script": 1, "data": 1}', "null"]
)
def test_a_config_that_is_damaged(text: str) -> None:
    with run_folder("--output", "mine") as run:
        begin(run)
    Path("mine/config.json").write_text(text)
    with (
        run_folder("--output", "mine", "--resume") as run,
        pytest.raises(xray.UserError, match="config.json in mine is"),
    ):
        begin(run)
