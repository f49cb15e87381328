"""The run folder: its lock, what a failed run leaves, and which epochs' weights it keeps."""

from __future__ import annotations

import contextlib
import json
import math
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, parse

import xray_tensorflow as xray

TABLE = pd.DataFrame(
    {"image": ["a.png"], "etag": ["1"], "split": ["train"], **dict.fromkeys(xray.LABELS, 0.0)}
)
USED = TABLE.assign(reason="")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a test's runs start in."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["xray_tensorflow.py"])
    return folder


def new_run(*options: Any) -> xray.Run:
    return xray.Run(parse(*options), {})


@contextlib.contextmanager
def opened(
    *options: Any, model: Any = None, target: dict[str, Any] | None = None
) -> Iterator[xray.Run]:
    """A run that has begun to train; at the end, its folder is free as if its process had ended."""
    run = new_run(*options)
    run.check(TABLE, target or {})
    try:
        run.open(USED, model)
        yield run
    finally:
        if run._lock:
            run._lock.close()


def begin(*options: Any, **more: Any) -> None:
    """Start a run, begin training, and end."""
    with opened(*options, **more):
        pass


# ---- one run at a time ----


def test_runs_that_begin_in_the_same_second_have_different_folders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        xray.time, "strftime", lambda form, _: form.replace("%Y%m%dT%H%M%SZ", "20261122T120000Z")
    )
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda _: begin(), range(12)))
    first = Path("runs/xray_tensorflow-20261122T120000Z")
    wanted = {first, *(Path(f"{first}-{number}") for number in range(2, 13))}
    assert set(Path("runs").iterdir()) == wanted


def test_of_runs_that_begin_at_once_one_has_the_folder() -> None:
    runs = [new_run("--output", "a/b/mine") for _ in range(6)]

    def ending(run: xray.Run) -> str:
        run.check(TABLE, {})
        try:
            run.open(USED, None)
        except xray.UserError as error:
            return str(error)
        return "opened"

    with ThreadPoolExecutor(6) as pool:
        endings = sorted(pool.map(ending, runs))
    for run in runs:
        run._lock.close()
    assert endings.pop() == "opened"
    for text in endings:
        assert re.search(r"another run is using .*a/b/mine: use another --output", text)


def test_a_run_that_ended_meanwhile_keeps_its_folder() -> None:
    second = new_run("--output", "mine")
    begin("--output", "mine")
    config = Path("mine/config.json").read_bytes()
    second.check(TABLE, {})
    with pytest.raises(xray.UserError, match="mine is not empty"):
        second.open(USED, None)
    second._lock.close()
    assert Path("mine/config.json").read_bytes() == config


HOLD = """
import sys, time
sys.path[:0] = sys.argv.pop(1).split(":")
from test_run_folder import opened
sys.argv[0] = "xray_tensorflow.py"
with opened(*sys.argv[1:]):
    print("taken", flush=True)
    time.sleep(60)
"""


def test_the_folder_of_a_killed_run_can_be_resumed() -> None:
    tests = ROOT / "tests"
    path = f"{tests / 'common'}:{tests}:{ROOT}"
    command = [sys.executable, "-c", HOLD, path, "--output", "mine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "taken\n"
        with pytest.raises(xray.UserError, match="another run is using"):
            begin("--output", "mine", "--resume")
        holder.send_signal(signal.SIGKILL)
    begin("--output", "mine", "--resume")


def test_an_output_that_is_a_link_to_nothing_yet(home: Path) -> None:
    Path("link").symlink_to(home / "target")
    begin("--output", "link")
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


# ---- the folder before and after a run ----


@pytest.mark.parametrize("output", [None, "new", "a/b/new"])
def test_a_run_that_has_not_begun_to_train_leaves_nothing(home: Path, output: str | None) -> None:
    run = new_run(*["--output", output] * bool(output))
    run.check(TABLE, {})
    assert list(home.iterdir()) == []


OUTPUTS = ["file", "file/below", "loop", "loop/below", "/proc/mine", "/dev/null/mine", "x" * 300]


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_that_cannot_be_a_folder_is_known_at_the_start(
    output: str, capsys: pytest.CaptureFixture
) -> None:
    Path("file").touch()
    Path("loop").symlink_to("loop")
    assert xray.run_script(lambda: new_run("--output", output) and None) == 2
    assert output.split("/mine")[0].split("/below")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "make",
    [Path.touch, lambda path: path.symlink_to("absent"), lambda path: path.symlink_to("runs")],
    ids=["file", "dangling link", "loop"],
)
def test_runs_that_is_no_folder(make: Callable[[Path], None]) -> None:
    make(Path("runs"))
    with pytest.raises(OSError, match="runs"):
        new_run()


def test_a_run_that_has_begun_is_only_resumed() -> None:
    begin("--output", "mine")
    assert {path.name for path in Path("mine").glob("[!.]*")} == {"config.json", "skipped.csv"}
    with pytest.raises(
        xray.UserError, match="mine is not empty: use another --output, or --resume"
    ):
        new_run("--output", "mine")
    begin("--output", "mine", "--resume")


def test_skipped_images_are_listed() -> None:
    run = new_run("--output", "mine")
    run.check(TABLE, {})
    run.open(USED.assign(split="skipped", reason="not an image"), None)
    run._lock.close()
    assert Path("mine/skipped.csv").read_text() == "image,reason\na.png,not an image\n"


def test_resume_without_a_run() -> None:
    for options in (["--resume"], ["--resume", "--output", "absent"]):
        with pytest.raises(xray.UserError, match="no run to resume in '.*': name its folder with"):
            new_run(*options)
    assert not Path("absent").exists()


# ---- the best epoch ----


@pytest.mark.parametrize(
    ("aurocs", "best"),
    [
        ([0.5, 0.7, 0.6], 2),
        ([0.5, 0.6, 0.7], 3),
        ([0.7, 0.6, 0.5], 1),
        ([0.6, 0.7, 0.7, 0.5], 2),  # ties: the first
        ([math.nan, 0.5, math.nan], 2),
        ([math.nan, math.nan, math.nan], 3),  # undefined: the last
        ([0.5], 1),
    ],
)
def test_best_epoch(aurocs: list[float], best: int) -> None:
    history = pd.DataFrame({"epoch": range(1, len(aurocs) + 1), "validation_auroc": aurocs})
    assert xray.best_epoch(history) == best


@pytest.fixture
def model(keras: Any) -> Iterator[Any]:
    """A compiled model with one weight, the number of its epoch."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(keras.optimizers.Adam(), "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    yield model


class Trainer:
    """Sets the weight to the epoch's number; validation AUROCs are given."""

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


def train(model: Any, patch: pytest.MonkeyPatch, aurocs: list[float], *options: Any) -> xray.Run:
    """Train a run through `aurocs`; return it and its best epoch's weight."""
    with opened("--output", "mine", "--epochs", len(aurocs), *options, model=model) as run:
        xray.train_epochs(Trainer(model, aurocs, patch), run)
        run.load_best()
        return run


def checkpoints() -> set[str]:
    return {path.name.split(".")[0] for path in Path("mine").glob("checkpoint-*")}


def test_the_weights_of_the_best_epoch_are_kept_across_resumes(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    aurocs = [0.5, 0.8, 0.6, 0.7, 0.9, 0.9, math.nan]
    for epochs, best in [(1, 1), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5), (7, 5)]:
        resume = ["--resume"] * (epochs > 1)
        train(model, monkeypatch, aurocs[:epochs], *resume)
        assert model.get_weights()[0].item() == best
        assert checkpoints() == {f"checkpoint-{best}", f"checkpoint-{epochs}"}


def test_a_dead_network_is_said_once_and_trained_on(
    model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = train(model, monkeypatch, [0.6, 0.5, 0.5, 0.5, 0.8, 0.5, 0.5])
    assert len(run.history) == 7
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the network has died")
    assert "a smaller --learning-rate" in line


def test_a_resume_goes_on_from_the_last_epoch_not_from_the_best(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(model, monkeypatch, [0.9, 0.5])
    model.set_weights([np.zeros((1, 1))])
    with opened("--output", "mine", "--epochs", 3, "--resume", model=model) as run:
        assert len(run.history) == 2
    assert model.get_weights()[0].item() == 2


def test_each_process_of_a_run_traces_an_epoch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """images_per_second counts only epochs without tracing, over any number of resumes."""
    for epochs in (2, 4, 6):
        resume = ["--resume"] * (epochs > 2)
        run = train(model, monkeypatch, [0.5] * epochs, *resume)
    assert list(run.history["traced"]) == [True, False] * 3
    run.history["seconds"] = [100.0, 1.0, 100.0, 1.0, 100.0, 2.0]
    labels = dict.fromkeys([*xray.LABELS, "mean"], 0.5)
    report = pd.DataFrame(dict.fromkeys(["AUROC", "low", "high", "threshold"], labels))
    run._seconds["ingest"] = 1.0
    assert run._result(report, {}, 0)["train"]["images_per_second"] == pytest.approx(3 / 4)


def test_files_of_the_users_stay(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train(model, monkeypatch, [0.5, 0.9])
    names = (
        "checkpoint-notes.txt", "my-checkpoint-1.weights.h5", "checkpoint-1.weights.h5.bak",
        "checkpoint-01.weights.h5", "checkpoint-1 (copy).weights.h5", "checkpoint-best.weights.h5",
    )  # fmt: skip
    mine = [Path("mine", name) for name in names]
    for path in mine:
        path.write_text("mine")
    Path("mine/checkpoint-old").mkdir()
    train(model, monkeypatch, [0.5, 0.9, 0.8], "--resume")
    assert all(path.read_text() == "mine" for path in mine)
    assert Path("mine/checkpoint-old").is_dir()


def test_a_limit_of_file_sizes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like a full disk: HDF5 might crash."""
    train(model, monkeypatch, [0.5])
    before = contents(Path("mine"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large.*checkpoint-2.weights.h5"):
            train(model, monkeypatch, [0.5, 0.9], "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = contents(Path("mine"))
    assert after.keys() == before.keys()
    train(model, monkeypatch, [0.5, 0.9], "--resume")


def test_a_picture_that_fails_is_a_warning(
    model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = train(model, monkeypatch, [0.5])
    run.history["seconds"] = [1.0]
    run._seconds["ingest"] = 1.0
    labels = dict.fromkeys([*xray.LABELS, "mean"], 0.5)
    report = pd.DataFrame(dict.fromkeys(["AUROC", "low", "high", "threshold"], labels))

    def draw(*_: Any) -> None:
        raise RuntimeError("latex could not be found")

    monkeypatch.setattr(xray, "draw_report", draw)
    run.finish(report, {}, 0)
    screen = capsys.readouterr()
    assert "warning: no report.png (latex could not be found)" in screen.err
    assert json.loads(screen.out.splitlines()[-1]) == json.loads(
        Path("mine/metrics.json").read_text()
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


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
    """Keras only warns when it reads this, and Adam would start from scratch."""
    train(model, monkeypatch, [0.9, 0.5])
    with h5py.File("mine/checkpoint-2.weights.h5", "a") as file:
        del file["optimizer"]["vars"]
    with pytest.raises(xray.UserError, match=r"checkpoint-2.weights.h5 in mine is damaged"):
        train(model, monkeypatch, [0.9, 0.5, 0.5], "--resume")


def test_no_damage_of_a_checkpoint_is_a_traceback(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HDF5 has no checksums: a changed number is accepted, anything else is a one-line error."""
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


# ---- what a resumed run must share with the original ----


@pytest.mark.parametrize(
    ("name", "had", "wanted"),
    [("precision", "mixed_float16", "float32"), ("replicas", 2, 1), ("replicas", 1, 4)],
)
def test_resume_on_a_machine_that_computes_otherwise(
    home: Path, name: str, had: Any, wanted: Any
) -> None:
    target = {"precision": "float32", "replicas": 1}
    begin("--output", "mine", target={**target, name: had})
    before = contents(home / "mine")
    run = new_run("--output", "mine", "--resume")
    with pytest.raises(xray.UserError, match=f"had {name} {had}, not {wanted}"):
        run.check(TABLE, {**target, name: wanted})
    assert contents(home / "mine") == before
    run.check(TABLE, {**target, name: had})


def test_resume_with_and_without_flip() -> None:
    begin("--output", "mine")
    with pytest.raises(xray.UserError, match="had --flip False, not True"):
        begin("--output", "mine", "--resume", "--flip")


def test_images_with_and_without_a_slash_are_the_same_option() -> None:
    begin("--output", "mine", "--images", "images")
    begin("--output", "mine", "--images", "images/", "--resume")


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"arguments": 1, "script": 1, "data": 1}', "null", "what"]
)
def test_a_config_that_is_damaged(text: str) -> None:
    begin("--output", "mine")
    Path("mine/config.json").write_text(text)
    with pytest.raises(xray.UserError, match="config.json of the run in mine is damaged"):
        begin("--output", "mine", "--resume")
