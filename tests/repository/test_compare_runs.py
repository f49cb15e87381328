"""tests/tools/compare_runs.py on handwritten run folders and on a real one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_runs import draw_learning, main, read_run
from matplotlib.figure import Figure
from PIL import Image

ARGUMENTS = {
    "seed": 0,
    "test_list": None,
    "limit": None,
    "image_size": 128,
    "weights": "imagenet",
    "epochs": 5,
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Call to write a run folder with this name, images/s, target, data digest and arguments."""

    def write(
        name: str, speed: float, target: dict[str, Any], data: str = "abc", **arguments: object
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = {
            "script": "any",
            "arguments": {**ARGUMENTS, **arguments},
            "data": data,
            "versions": {},
        }
        metrics = {
            "ingest": {"seconds": 10.04},
            "setup": {"seconds": 2.0},
            "train": {"seconds": 1000 / speed, "epochs": 5, "images_per_second": speed},
            "evaluate": {"seconds": 3.0},
            "auroc": {"mean": 0.8126, "ci95": [0.7994, 0.8251]},
            "target": target,
        }
        history = "epoch,validation_auroc,seconds,validation_seconds,traced\n"
        history += (
            f"1,0.6,{2000 / speed},{100 / speed},True\n2,,{1000 / speed},{100 / speed},False\n"
        )
        history += f"3,0.8,{1000 / speed},{100 / speed},False\n"
        (folder / "history.csv").write_text(history)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "metrics.json").write_text(json.dumps(metrics))
        return folder

    return write


SPARK = {
    "mode": "synchronous",
    "master": "yarn",
    "executors": 2,
    "workers": 8,
    "cores_per_worker": 1,
}
GPU = {"gpus": ["Tesla T4"], "replicas": 1, "precision": "mixed_float16", "xla": True}


def test_the_table_and_the_chart(
    make: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [
        make("a", 240, SPARK),
        make("b", 50, {"threads": 1, "pinned_to_cores": True}),
        make("c", 1000, GPU),
        make("d", 80, {"threads": 2, "pinned_to_cores": True}),
    ]
    assert main([str(folder) for folder in folders]) == 0
    lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:3] == ["target", "images/s", "speed-up"]
    scores = ["0.813", "0.799 to 0.825", "5", "10.0", "2.0"]
    assert lines[1:] == [
        ["Spark, 2 executors, 8 workers, synchronous", "240.0", "4.80", *scores, "4.2", "3.0"],
        ["1 CPU thread", "50.0", "1.00", *scores, "20.0", "3.0"],
        ["1 × Tesla T4", "1000.0", "20.00", *scores, "1.0", "3.0"],
        ["2 CPU threads", "80.0", "1.60", *scores, "12.5", "3.0"],
    ]
    with Image.open("comparison.png") as chart:
        assert chart.size == (1080, 990)


def test_learning_is_drawn_against_epochs_and_seconds(make: Callable[..., Path]) -> None:
    runs = [read_run(make("a", 50, {"threads": 1})), read_run(make("b", 1000, GPU))]
    by_epoch, by_second = Figure().subplots(1, 2)
    draw_learning(by_epoch, by_second, runs)
    labels = ["1 CPU thread: a", "1 × Tesla T4: b"]
    for axes, ends in ((by_epoch, [3, 3]), (by_second, [4300 / 50, 4300 / 1000])):
        assert [line.get_label() for line in axes.lines] == labels
        assert [line.get_xdata()[-1] for line in axes.lines] == pytest.approx(ends)
        for line in axes.lines:  # an epoch without AUROC is a gap
            np.testing.assert_allclose(line.get_ydata(), [0.6, np.nan, 0.8])
    assert by_second.lines[0].get_xdata()[0] == pytest.approx(2100 / 50)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"seed": 1}, r"different split: \S+a has --seed 0, \S+b 1"),
        (
            {"test_list": "test_list.txt"},
            r"different split: \S+a has --test-list None, \S+b test_list.txt",
        ),
        ({"image_size": 64}, r"different CNN: \S+a has --image-size 128, \S+b 64"),
        ({"weights": "none"}, r"different CNN: \S+a has --weights imagenet, \S+b none"),
        ({"data": "def"}, r"different data: \S+a and \S+b do not have the same images and labels"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    other: dict,
    problem: str,
    make: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    chart = tmp_path / "chart.png"
    folders = [make("a", 50, {"threads": 1, "pinned_to_cores": True}), make("b", 90, GPU, **other)]
    assert main([*map(str, folders), "--chart", str(chart)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(f"compare_runs.py: error: {problem}\n", printed.err)
    assert not chart.exists()


def test_no_sequential_run_or_no_finished_run_is_an_error(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(make("a", 90, GPU))]) == 2
    assert "none of the runs is sequential" in capsys.readouterr().err
    for name in ("history.csv", "metrics.json"):
        (tmp_path / "a" / name).unlink()
        assert main([str(tmp_path / "a")]) == 2
        problem = f"a has no {name}: it is not the folder of a finished run"
        assert problem in capsys.readouterr().err


def test_a_real_run(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(run.folder), "--chart", str(tmp_path / "chart.png")]) == 0
    assert (
        f"1 CPU thread  {run.result['train']['images_per_second']:8.1f}      1.00"
        in capsys.readouterr().out
    )
