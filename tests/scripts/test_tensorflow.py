"""The script as a process: what a run prints and leaves, and how it ends, resumes and refuses."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from helpers import (
    QUICK,
    SCRIPT,
    SECRETS,
    client_of,
    edited,
    parse,
    result_of,
    run_process,
    run_script,
)
from PIL import Image

import xray_tensorflow as xray

FILES = [
    "config.json",
    "history.csv",
    "metrics.json",
    "model.keras",
    "predictions.csv",
    "report.png",
    "skipped.csv",
]
METRICS = [
    "images",
    "auroc",
    "thresholds",
]  # two runs of the same command must agree in these to the last bit
LOSSES = ["loss", "validation_loss", "validation_auroc"]


def history(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "history.csv")


def test_run_folder_is_complete(run: Any) -> None:
    names = {path.name for path in run.folder.glob("[!.]*")}
    assert set(FILES) < names
    assert all("checkpoint" in name for name in names - set(FILES))


def test_result_line(run: Any) -> None:
    result = run.result
    assert result == json.loads((run.folder / "metrics.json").read_text())
    assert list(result) == [
        "script", "images", "ingest", "setup", "train", "evaluate", "auroc", "thresholds", "peak_memory_mb", "target",
        "versions",
    ]  # fmt: skip
    assert result["script"] == "xray_tensorflow.py"
    assert result["images"] == {"train": 271, "validation": 48, "test": 91, "skipped": 1}
    assert result["ingest"]["from_cache"] == 0
    assert list(result["ingest"]) == ["seconds", "images_per_second", "from_cache"]
    assert list(result["train"]) == [
        "seconds", "validation_seconds", "epochs", "images_per_second", "best_epoch", "validation_auroc",
    ]  # fmt: skip
    assert result["train"]["epochs"] == 3
    assert result["target"] == {"threads": 1, "pinned_to_cores": True}
    assert list(result["thresholds"]) == list(result["auroc"]["per_label"]) == xray.LABELS
    phases = sum(result[name]["seconds"] for name in ("ingest", "setup", "train", "evaluate"))
    assert 0 < phases + result["train"]["validation_seconds"] < run.finished.wall
    assert 200 < result["peak_memory_mb"]["driver"] < 8000
    assert result["versions"]["python"] == sys.version.split()[0]


def test_clock(run: Any) -> None:
    rows = history(run.folder)
    train = run.result["train"]
    assert train["seconds"] == pytest.approx(rows["seconds"].sum())
    assert train["validation_seconds"] == pytest.approx(rows["validation_seconds"].sum())
    assert train["images_per_second"] == pytest.approx(2 * 271 / rows["seconds"][1:].sum())
    assert rows["images_per_second"].to_numpy() == pytest.approx(271 / rows["seconds"].to_numpy())


def test_history_and_that_it_learns(run: Any) -> None:
    rows = history(run.folder)
    assert list(rows)[:6] == [
        "epoch",
        "loss",
        "validation_loss",
        "validation_auroc",
        "seconds",
        "images_per_second",
    ]
    assert list(rows["epoch"]) == [1, 2, 3]
    assert rows["loss"].is_monotonic_decreasing
    assert list(rows["traced"]) == [True, False, False]
    assert np.isfinite(rows.drop(columns="traced").to_numpy()).all()
    assert run.result["auroc"]["mean"] > 0.6


def test_predictions_give_the_metrics(run: Any, credentials: Path) -> None:
    frame = pd.read_csv(run.folder / "predictions.csv", dtype={"patient": str})
    truth, scores = (
        frame[[f"{kind} {label}" for label in xray.LABELS]] for kind in ("true", "probability")
    )
    assert list(frame) == ["image", "patient", *truth, *scores]
    table = xray.select_images(client_of(credentials), parse())
    test = table[table["split"] == "test"].reset_index()
    pd.testing.assert_frame_equal(frame[["image", "patient"]], test[["image", "patient"]])
    assert np.array_equal(truth, test[xray.LABELS])
    areas = [sklearn.metrics.roc_auc_score(truth.iloc[:, i], scores.iloc[:, i]) for i in range(15)]
    auroc = run.result["auroc"]
    assert list(auroc["per_label"].values()) == pytest.approx(areas, abs=1e-9)
    assert auroc["mean"] == pytest.approx(np.mean(areas))
    assert auroc["ci95"][0] < auroc["mean"] < auroc["ci95"][1]
    assert all(0 < threshold <= 1 for threshold in run.result["thresholds"].values())


def test_config_says_how_the_run_was_made(run: Any) -> None:
    config = json.loads((run.folder / "config.json").read_text())
    assert config["script"] == "xray_tensorflow"
    for name, value in {
        "seed": 0,
        "image_size": 32,
        "weights": "none",
        "learning_rate": 1e-3,
        "limit": None,
    }.items():
        assert config["arguments"][name] == value
    assert config["versions"] == run.result["versions"]


def test_report_is_a_picture(run: Any) -> None:
    with Image.open(run.folder / "report.png") as picture:
        picture.load()
        assert picture.size >= (800, 400)
        assert len(picture.convert("L").getcolors()) > 50


def test_screen(run: Any) -> None:
    lines = run.finished.stdout.splitlines()
    for label in [*xray.LABELS, "mean"]:
        assert [line for line in lines[:-1] if line.startswith(f"{label} ")], label
    assert any(f"runs/{run.folder.name}" in line for line in lines)
    assert "411 images have labels, 411 are in the bucket, 411 are in both" in lines
    assert "411/411" in run.finished.stderr  # the progress bar
    assert "Traceback" not in run.finished.stderr
    assert "arning" not in run.finished.stdout + run.finished.stderr


def test_one_thread_takes_one_core(run: Any) -> None:
    assert run.finished.cpu <= 1.1 * run.finished.wall


def test_no_secret_is_left_anywhere(run: Any) -> None:
    files = [*run.folder.rglob("*"), *(run.folder.parent.parent / "cache").rglob("*")]
    assert len(files) > len(FILES)
    texts = [path.read_bytes() for path in files] + [
        run.finished.stdout.encode(),
        run.finished.stderr.encode(),
    ]
    for secret in SECRETS.values():
        assert not any(secret.encode() in text for text in texts)


def test_model_file_needs_keras_alone(run: Any, credentials: Path, tmp_path: Path) -> None:
    frame = pd.read_csv(run.folder / "predictions.csv")
    client = client_of(credentials)
    images = [
        xray.fetch(client, "cs205-project-xray", f"images/{image}") for image in frame["image"]
    ]
    np.save(
        tmp_path / "pixels.npy",
        np.stack([xray.decode(data, 32) for data in images])[..., np.newaxis],
    )
    program = """
import sys, keras, numpy
model = keras.models.load_model(sys.argv[1])
assert "xray_tensorflow" not in sys.modules
assert not any(v.path.endswith("moving_mean") and not numpy.any(v.numpy()) for v in model.weights)
numpy.save(sys.argv[3], model.predict(numpy.load(sys.argv[2]), verbose=0))
"""
    files = [run.folder / "model.keras", tmp_path / "pixels.npy", tmp_path / "probabilities.npy"]
    loaded = run_process([sys.executable, "-c", program, *files], cwd=tmp_path)
    assert loaded.code == 0, loaded.stderr
    probabilities = frame[[f"probability {label}" for label in xray.LABELS]].to_numpy()
    assert np.load(files[2]) == pytest.approx(probabilities, abs=1e-5)


@pytest.fixture(scope="module")
def broken_off(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run killed after one epoch, resumed, and interrupted after its second."""
    folder = tmp_path_factory.mktemp("broken") / "output"
    command = [*run.options, "--output", folder]

    def epochs(count: int) -> Callable[[], bool]:
        return lambda: (folder / "history.csv").exists() and len(history(folder)) >= count

    killed = run_script(*command, stop=(epochs(1), signal.SIGKILL))
    assert killed.code == -signal.SIGKILL
    assert not (folder / "metrics.json").exists()
    assert len(history(folder)) == 1
    interrupted = run_script(*command, "--resume", stop=(epochs(2), signal.SIGINT))
    assert interrupted.code == 130, interrupted.stderr
    assert "Traceback" not in interrupted.stderr
    assert "--resume" in interrupted.stderr.splitlines()[-1]
    assert '"script"' not in interrupted.stdout
    assert len(history(folder)) == 2
    return folder


@pytest.mark.slow
def test_a_run_broken_off_twice_ends_as_an_unbroken_one(
    run: Any, broken_off: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "output"
    shutil.copytree(broken_off, folder)
    finished = run_script(*run.options, "--resume", "--output", folder)
    assert finished.code == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    assert [result[name] for name in METRICS] == [run.result[name] for name in METRICS]
    assert list(history(folder)["epoch"]) == [1, 2, 3]
    pd.testing.assert_frame_equal(
        history(folder)[LOSSES], history(run.folder)[LOSSES], check_exact=True
    )
    assert (folder / "predictions.csv").read_bytes() == (
        run.folder / "predictions.csv"
    ).read_bytes()
    assert {path.name for path in folder.iterdir()} == {path.name for path in run.folder.iterdir()}
    assert result["ingest"]["from_cache"] == 410
    assert result["train"]["seconds"] == pytest.approx(history(folder)["seconds"].sum())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def begun(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run for --resume to continue."""
    return shutil.copytree(run.folder, tmp_path_factory.mktemp("begun") / "output")


OTHER = {
    "--seed": "1", "--image-size": "48", "--batch-size": "4", "--learning-rate": "1e-4", "--weights": "imagenet",
    "--limit": "400", "--images": "", "--epochs": "1",
}  # fmt: skip


@pytest.mark.parametrize("option", OTHER)
def test_resume_with_other_options(run: Any, begun: Path, fails: Callable, option: str) -> None:
    before = contents(begun)
    error = fails(*run.options, "--resume", "--output", begun, option, OTHER[option])
    assert option in error
    assert contents(begun) == before


def test_resume_of_another_scripts_run(run: Any, fails: Callable, tmp_path: Path) -> None:
    folder = shutil.copytree(run.folder, tmp_path / "output")
    config = json.loads((folder / "config.json").read_text())
    del config["target"]["threads"]
    (folder / "config.json").write_text(json.dumps({**config, "script": "xray_gpu"}))
    error = fails(*run.options, "--resume", "--output", folder)
    assert "is of xray_gpu: use that script" in error


def test_resume_with_other_labels(
    run: Any, begun: Path, fails: Callable, credentials: Path
) -> None:
    client = client_of(credentials)
    where = {"Bucket": "cs205-project-xray", "Key": "Data_Entry_2017_v2020.csv"}
    before, data = contents(begun), client.get_object(**where)["Body"].read()
    client.put_object(**where, Body=data.replace(b",Hernia,", b",Mass,"))
    try:
        assert "other images or labels" in fails(*run.options, "--resume", "--output", begun)
    finally:
        client.put_object(**where, Body=data)
    assert contents(begun) == before


def test_resume_with_other_images(
    run: Any, begun: Path, fails: Callable, credentials: Path
) -> None:
    client, table = client_of(credentials), xray.select_images(client_of(credentials), parse())
    where = {"Bucket": "cs205-project-xray", "Key": table["key"][0]}
    before, data = contents(begun), client.get_object(**where)["Body"].read()
    with Image.open(io.BytesIO(data)) as image:
        changed = io.BytesIO()
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(changed, "PNG")
    client.put_object(**where, Body=changed.getvalue())
    try:
        assert "other images or labels" in fails(*run.options, "--resume", "--output", begun)
    finally:
        client.put_object(**where, Body=data)
    assert contents(begun) == before


def test_resume_of_nothing(run: Any, fails: Callable, tmp_path: Path) -> None:
    assert "--output" in fails(*run.options, "--resume")
    assert "--output" in fails(*run.options, "--resume", "--output", tmp_path / "absent")


def test_output_that_holds_a_run_is_kept(run: Any, fails: Callable) -> None:
    before = contents(run.folder)
    error = fails(*run.options, "--output", run.folder)
    assert "not empty" in error
    assert "--resume" in error
    assert contents(run.folder) == before


def test_output_that_is_a_file(run: Any, fails: Callable, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    assert str(path) in fails(*run.options, "--output", path)
    assert path.read_text() == "mine"


USAGE = [
    ["--no-such-option"], ["--epochs", "0"], ["--epochs", "1.5"], ["--batch-size", "0"], ["--image-size", "16"],
    ["--limit", "-1"], ["--learning-rate", "nan"], ["--learning-rate", "0"], ["--seed", "-1"], ["--max-skipped", "2"],
    ["--threads", "0"], ["--bucket"], ["surplus"], ["--cache", "s3://b/c"], ["--cache", "hdfs:c"],
]  # fmt: skip


@pytest.mark.parametrize("words", USAGE, ids=" ".join)
def test_usage(fails: Callable, words: list) -> None:
    assert words[0] in fails(*words)


def test_a_system_that_cannot_pin_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """macOS has neither system call."""
    monkeypatch.delattr(os, "sched_setaffinity")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert not xray.pin_to_cores(1)
    assert "cannot pin a process to a core" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_a_system_that_cannot_pin_processes(credentials: Path, tmp_path: Path) -> None:
    """The run prints one warning, and the result reports it."""
    program = """
import os, runpy, sys
del os.sched_setaffinity, os.sched_getaffinity
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    words = [*QUICK, "--credentials", credentials, "--epochs", 1, "--limit", 60]
    ended = run_process([sys.executable, "-c", program, SCRIPT, *words], cwd=tmp_path)
    assert result_of(ended)["target"] == {"threads": 1, "pinned_to_cores": False}
    (warning,) = (line for line in ended.stderr.splitlines() if line.startswith("warning:"))
    assert "cannot pin a process to a core" in warning


def test_more_threads_than_cores() -> None:
    ended = run_script("--threads", os.cpu_count() + 1)
    assert ended.code == 2
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith(f"xray_tensorflow.py: error: --threads {os.cpu_count() + 1} ")


def test_an_error_of_the_user_ends_the_process_with_2(credentials: Path, tmp_path: Path) -> None:
    ended = run_script(
        "--credentials", edited(credentials, tmp_path), "--bucket", "absent", cwd=tmp_path
    )
    assert ended.code == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "no bucket absent" in ended.stderr


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        xray.run_script(lambda: 1 / 0)


def test_a_label_without_both_classes_is_null_and_left_out_of_the_mean(
    run: Any, credentials: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """evaluate() on the shared run's test rows, without those with Hernia."""
    table = xray.select_images(client_of(credentials), parse())
    table = table[(table["Hernia"] == 0) & (table["split"] != "train")].reset_index(drop=True)
    truth = xray.labels_by_split(table)
    random = np.random.default_rng(0)

    class RandomTrainer:
        def predict(self, split: str) -> np.ndarray:
            return random.random(truth[split].shape)

    evaluated = xray.Run(parse("--output", tmp_path), {})
    evaluated.path = tmp_path
    evaluated.table = table
    evaluated.history = pd.DataFrame({"epoch": [1], "validation_auroc": [0.5]})
    report = xray.evaluate(RandomTrainer(), evaluated)
    hernia, mean = report.loc["Hernia"], report.loc["mean"]
    assert hernia["positives"] == 0
    assert hernia[["AUROC", "low", "high", "threshold"]].isna().all()
    assert mean["AUROC"] == pytest.approx(report["AUROC"][xray.LABELS].dropna().mean())
    assert not math.isnan(mean["low"])
    assert report["positives"].tolist() == [*truth["test"].sum(axis=0), len(truth["test"])]
