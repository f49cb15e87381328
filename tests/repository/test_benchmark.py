"""The parts of benchmark.py that need no idle machine."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, run_process
from PIL import Image
from static_s3 import static_s3

import xray_tensorflow as xray

benchmark = pytest.importorskip("benchmark")
peers = pytest.importorskip("peers")
gpu_peers = pytest.importorskip("gpu_peers")


def test_every_group_has_its_table() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    named = re.search(r"benchmark\.py([ \w]*)`", text[: text.index("machine: end")])
    measured = named and named[1].split() or benchmark.GROUPS
    for group in benchmark.GROUPS:
        between = re.search(f"<!-- {group}: begin -->(.*)<!-- {group}: end -->", text, re.DOTALL)
        assert between, group
        assert "|---" in between[1]
        assert f"benchmark.py {group}`" in between[1] or group in measured


def test_all_groups_in_one_go_have_one_line_of_machine_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "results.md"
    page.write_text((ROOT / "docs" / "results.md").read_text())
    monkeypatch.setattr(benchmark, "RESULTS", page)
    monkeypatch.setattr(benchmark, "GROUPS", dict.fromkeys(benchmark.GROUPS, lambda: "|a|"))
    monkeypatch.setattr(sys, "argv", ["benchmark.py"])
    benchmark.main()
    assert page.read_text().count("tensorflow 2.") == 1
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "steps"])
    benchmark.main()
    assert page.read_text().count("`python tests/benchmark/benchmark.py steps`") == 1

    def fails() -> str:
        raise SystemExit

    monkeypatch.setattr(benchmark, "GROUPS", dict.fromkeys(benchmark.GROUPS, fails))
    monkeypatch.setattr(sys, "argv", ["benchmark.py"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert page.read_text().count("Not measured.") == len(benchmark.GROUPS)


def test_the_made_up_bucket_is_one_for_the_scripts() -> None:
    objects = benchmark.made_up_bucket(1500, size=64, distinct=2)
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    with static_s3(objects, 0.001) as endpoint:
        client = xray.s3_client({**keys, "endpoint_url": endpoint})
        table = xray.select_images(client, benchmark.arguments_of("--limit", 1100))
        (row, pixels, problem) = next(xray.fetch_images(client, "any", {7: table["key"][7]}, 64))
    assert len(table) == 1100
    assert table["patient"].nunique() > 275
    assert (row, problem) == (7, "")
    assert pixels.shape == (64, 64)


def test_drawn_films_show_what_their_labels_say() -> None:
    objects = benchmark.drawn_bucket(20, size=64)
    lines = objects["Data_Entry_2017_v2020.csv"].decode().splitlines()[1:]
    for name, findings, _ in (line.split(",") for line in lines):
        film = benchmark.draw_radiograph(name, findings.split("|"), 64)
        assert objects[f"images/{name}"] == film


def test_the_chart_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "CHART", tmp_path / "workers.svg")
    runs = [
        pd.DataFrame({"validation_auroc": np.linspace(0.5, top, 5), "spent": range(10, 60, 10)})
        for top in (0.8, 0.9, 0.85)
    ]
    names = [learner.name for learner in benchmark.learners()]
    assert len(set(names)) == len(names)
    benchmark.draw_workers(dict.fromkeys(names, runs))
    shown = (tmp_path / "workers.svg").read_text()
    assert "<svg" in shown
    assert len(shown) < 100_000


def test_the_pngs_are_as_most_are() -> None:
    """They are grey and not compressed like the sample."""
    (png,) = {
        data
        for key, data in benchmark.made_up_bucket(3, size=64, distinct=1).items()
        if key.endswith("png")
    }
    image = Image.open(benchmark.io.BytesIO(png))
    assert (image.mode, image.size) == ("L", (64, 64))
    assert np.asarray(image).std() > 10


@pytest.mark.parametrize(
    ("ours", "theirs", "said"), [([20, 1, 21], [10], "2.00"), ([19], [10, 10], "1.90")]
)
def test_ratios_are_those_of_medians(ours: list[float], theirs: list[float], said: str) -> None:
    assert benchmark.times(ours, theirs) == said


SPEEDS = {
    "xray_tensorflow.py": [60.0],
    "stock Keras, default": [30.0],
    "PyTorch eager": [20.0, 25.0],
    "PyTorch eager, channels last": [40.0],
    "PyTorch `torch.compile`, channels last, bfloat16": [50.0, 48.0, 10.0],
}


def test_the_summary_names_the_best_of_each_kind() -> None:
    said = benchmark.summary(SPEEDS, [60.0], "ours").splitlines()
    assert said == [
        "- Best of PyTorch here: PyTorch `torch.compile`, channels last, bfloat16, 48.0 images a "
        "second. ours is 1.25 times as fast.",
        "- Best of PyTorch in float32 here: PyTorch eager, channels last, 40.0 images a second. "
        "ours is 1.50 times as fast.",
        "- Best of stock Keras here: stock Keras, default, 30.0 images a second. "
        "ours is 2.00 times as fast.",
    ]


def test_a_trainer_that_cannot_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "version_of", lambda package: "2.13.0")
    monkeypatch.setattr(benchmark, "CPU_FLAGS", set())
    monkeypatch.setattr(benchmark.shutil, "which", lambda name: None)
    lacking = {name: benchmark.what_lacks(name) for name in benchmark.TRAINERS}
    assert not lacking["PyTorch eager, channels last"]
    assert lacking["PyTorch `torch.compile`, channels last"] == "no C++ compiler (g++)"
    assert "instructions" in lacking["PyTorch eager, channels last, bfloat16"]
    monkeypatch.setattr(benchmark, "version_of", lambda package: "not installed")
    assert benchmark.what_lacks("PyTorch eager") == "PyTorch is not installed"


@pytest.fixture
def step() -> Any:
    """A step whose matrix products, 10 GFLOP, take 80 of its 100 ms."""
    parts = {"products": 80.0, "rest": 18.0}
    rates = {(2048, 2048, 2048): 150.0, (64, 32, 16): 120.0, (16, 32, 64): 90.0}
    return peers.StepParts(parts, {"products": 10.0}, 100.0, rates)


def test_the_profile_adds_up(step: Any) -> None:
    rows = [line.split(" | ") for line in benchmark.profile_table(step).splitlines()]
    cells = {row[0].strip("| "): row[1:] for row in rows if len(row) == 4}
    assert cells["products"][2].strip("| ") == "125"  # GFLOP/s
    shares = [int(row[1].split()[0]) for name, row in cells.items() if "%" in row[1]]
    assert sum(shares) == 200  # the parts and the whole
    assert "the best of their shapes, 64 x 32 x 16, reaches 120" in benchmark.profile_table(step)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"milliseconds": {"products": 60.0, "rest": 38.0}}, "167 GFLOP/s, more than the 150"),
        ({"whole": 110.0}, "12 ms off the step's 110"),
        ({"whole": 80.0}, "-18 ms off the step's 80"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(step: Any, change: dict, problem: str) -> None:
    with pytest.raises(SystemExit, match=problem):
        benchmark.profile_table(step._replace(**change))


def test_a_line_and_what_it_says_of_another_run() -> None:
    exact = {1.0: 5.0, 2.0: 7.0, 4.0: 11.0}
    assert benchmark.line(exact) == pytest.approx((2, 3))
    assert "+10.0 %" in benchmark.growth_table("x", "y", {1.0: 5.5}, (2, 3))

    def run(ingest: float, epoch: float) -> dict:
        history = pd.DataFrame({"seconds": [99.0, epoch]})
        images = {"train": 700, "validation": 100, "test": 200}
        return {"images": images, "ingest": {"seconds": ingest}, "history": history}

    per_image = 10.0  # ms, whatever its size
    lines = (0.0, per_image), (8.0, 1.0), (1.0, 0.5)
    said = benchmark.held_against(run(10, 7), run(10, 6), *lines)
    assert "| ingest, one core | 9.0 | 10.0 | -10 % |" in said
    assert "| an epoch, two workers | 6.0 | 6.0 | +0 % |" in said
    assert "differs" not in said
    far = benchmark.held_against(run(10, 7), run(10, 9), *lines)
    assert far.count("differs") == 1
    assert "(an epoch, two workers)" in far


TRAIN = """
import sys
sys.path[:0] = sys.argv[1:]
import benchmark, peers

arguments = benchmark.arguments_of("--weights", "none", "--image-size", 32, "--batch-size", 8, threads=1)
for name in ("our_training", "stock_keras"):
    getattr(peers, name)(arguments, 16)()
step = peers.step_parts(arguments)
assert all(spent > 0 for spent in step.milliseconds.values()), step
assert abs(step.gflop["first convolution"] - 4e-9 * 8 * 16 * 16 * 27 * 32) < 1e-9, step
"""


@pytest.mark.slow
def test_an_epoch_of_ours_and_of_a_peer_and_the_parts_of_a_step() -> None:
    trained = run_process(
        [sys.executable, "-c", TRAIN, ROOT, ROOT / "tests", ROOT / "tests" / "benchmark"]
    )
    assert trained.code == 0, trained.stderr


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def put_nvidia_smi(folder: Path, lines: str) -> None:
    """Write an nvidia-smi that runs these lines of Python."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\n{lines}\n")
    program.chmod(0o755)


@pytest.mark.parametrize("driver", [False, True], ids=["no driver", "no GPU"])
def test_without_a_gpu_its_group_is_one_line(
    path: Path, driver: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if driver:
        put_nvidia_smi(path, "raise SystemExit(6)")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "gpu"])
    before = (ROOT / "docs" / "results.md").read_bytes()
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2
    error = "benchmark.py: error: gpu needs an NVIDIA GPU: check nvidia-smi\n"
    assert capsys.readouterr() == ("", error)
    assert (ROOT / "docs" / "results.md").read_bytes() == before


def test_the_tables_of_a_gpu(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(path, "print('NVIDIA H200, 580.159.04, 143771 MiB')")
    page = tmp_path / "results.md"
    page.write_text((ROOT / "docs" / "results.md").read_text())
    asked = []

    def measure_once(peer: Any, arguments: Any) -> Any:
        asked.append(arguments.batch_size)
        if arguments.batch_size == 512:
            return None
        return gpu_peers.Figures(37739.4, 38.6, 79.2, 8851.4)

    monkeypatch.setattr(benchmark.peers, "measure_once", measure_once)
    monkeypatch.setattr(benchmark, "version_of", lambda package: "not installed")
    monkeypatch.setattr(benchmark.os, "environ", dict(benchmark.os.environ))
    monkeypatch.setattr(benchmark, "RESULTS", page)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "gpu"])
    benchmark.main()
    text = page.read_text().split("<!-- gpu: begin -->")[1].split("<!-- gpu: end -->")[0]
    ours = "| xray_gpu.py, mixed_float16, XLA, pixels on the GPU"
    assert text.count(f"{ours} | 37,739 | 38.6 | 79 % | 8,851 |") == 2
    assert f"{ours} | out of memory |  |  |  |" in text
    assert text.count("not measured: PyTorch is not installed") == 6
    assert "NVIDIA H200, 580.159.04, 143771 MiB. The best of three epochs" in text
    assert sorted(set(asked)) == [32, 128, 512]
    assert len(asked) == 3 * 10


def test_a_gpu_is_watched_while_a_peer_trains(path: Path) -> None:
    loop = "import time\nwhile True:\n    print(80, flush=True)\n    time.sleep(0.01)"
    put_nvidia_smi(path, loop)
    epochs = iter([0.5, 0.2, 0.1, 0.2])
    wait = gpu_peers.time.sleep

    def prepare(arguments: Any) -> Any:
        return lambda: wait(next(epochs)), lambda: 7 * 10**6

    found = gpu_peers.measure(gpu_peers.Namespace(prepare=prepare))
    assert found.images_per_second == pytest.approx(gpu_peers.IMAGES / 0.1, rel=0.2)
    assert found.first_step == pytest.approx(0.4, abs=0.1)
    assert (found.busy, found.peak_mb) == (80, 7)


@pytest.mark.parametrize(
    ("problem", "is_memory"),
    [
        ("OOM when allocating tensor with shape[512,64]", True),
        ("CUDA out of memory. Tried to allocate 2 GiB", True),
        ("Out of memory while trying to allocate 7 bytes", True),
        ("no kernel", False),
    ],
)
def test_only_too_little_memory_is_no_figure(problem: str, is_memory: bool) -> None:
    def prepare(arguments: Any) -> Any:
        raise RuntimeError(problem)

    arguments = gpu_peers.Namespace(prepare=prepare)
    if is_memory:
        assert gpu_peers.measure(arguments) is None
    else:
        with pytest.raises(RuntimeError, match=problem):
            gpu_peers.measure(arguments)


TRAIN_AS_ON_A_GPU = """
import sys
sys.path[:0] = sys.argv[1:]
import benchmark, gpu_peers
import xray_gpu

def set_up(precision):
    tf = xray_gpu.import_tensorflow()
    return tf.distribute.get_strategy(), {}

xray_gpu.set_up_gpus = set_up
xray_gpu.gpu_memory = lambda: 10**9
gpu_peers.IMAGES = 16
options = ["--weights", "none", "--image-size", 32, "--batch-size", 8]
for what in ({"xla": False, "host": False}, {"xla": False, "host": True}):
    arguments = benchmark.arguments_of(*options, precision="float32", **what)
    epoch, _ = gpu_peers.ours(arguments)
    epoch()
epoch, _ = gpu_peers.stock_keras(arguments)
epoch()
"""


@pytest.mark.slow
def test_an_epoch_of_what_trains_on_a_gpu() -> None:
    folders = [ROOT, ROOT / "tests", ROOT / "tests" / "benchmark"]
    trained = run_process([sys.executable, "-c", TRAIN_AS_ON_A_GPU, *folders])
    assert trained.code == 0, trained.stderr
