"""--flip: which images are mirrored, that mirrors are exact, and that resuming repeats them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import victim
from helpers import QUICK, parse

import xray_tensorflow as xray

xray_elephas = pytest.importorskip("xray_elephas")

COUNT = 2000


def draws(epoch: int, *options: Any, count: int = COUNT) -> np.ndarray:
    flips = xray.draw_flips(parse("--flip", *options), epoch, count)
    assert flips is not None
    return flips


def test_it_is_off_by_default() -> None:
    assert not parse().flip
    assert xray.draw_flips(parse(), 1, COUNT) is None


def test_seed_and_epoch_decide_each_row() -> None:
    one = draws(1)
    assert one.dtype == bool
    assert 0.45 < one.mean() < 0.55
    assert np.array_equal(one, draws(1))
    for other in (draws(2), draws(1, "--seed", 1)):
        assert 0.45 < (one != other).mean() < 0.55


@pytest.mark.usefixtures("keras")
class TestBatches:
    @pytest.fixture
    def pixels(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (40, 9, 9), np.uint8)

    def images(self, pixels: np.ndarray, rows: np.ndarray, flips: np.ndarray | None) -> np.ndarray:
        labels = np.zeros((len(pixels), 15), np.float32)
        data = xray.batches(pixels, labels, rows, 7, flips)
        return np.concatenate([image for image, _ in data.as_numpy_iterator()])[..., 0]

    def test_a_mirrored_image_is_the_exact_mirror(self, pixels: np.ndarray) -> None:
        before = pixels.copy()
        rows = np.random.default_rng(1).permutation(40)[:33]
        flips = draws(1, count=40)
        found = self.images(pixels, rows, flips)
        for image, row in zip(found, rows):
            assert np.array_equal(image, before[row, :, ::-1] if flips[row] else before[row])
        assert np.array_equal(pixels, before), (
            "the pixels in memory are those of validation and of later epochs too"
        )

    def test_without_flips_nothing_is_mirrored(self, pixels: np.ndarray) -> None:
        rows = np.arange(40)
        assert np.array_equal(self.images(pixels, rows, None), pixels)

    def test_training_alone_is_mirrored(self) -> None:
        split = ["train"] * 20 + ["validation"] * 10 + ["test"] * 10
        table = pd.DataFrame(0.0, range(40), xray.LABELS).assign(split=split)
        asked: list[tuple[np.ndarray, np.ndarray | None]] = []

        def feed(rows: np.ndarray, flips: np.ndarray | None = None) -> None:
            asked.append((rows, flips))

        class Model:
            def get_layer(self, name: str) -> Any:
                return self

            seed_generator = state = property(lambda self: self)

            def assign(self, seeds: list[int]) -> None:
                assert seeds == [0, 2]

            def fit(self, data: Any, **how: Any) -> Any:
                return type("History", (), {"history": {"loss": [1.0]}})

            def predict(self, data: Any, verbose: int) -> list:
                return []

        arguments = parse("--flip", "--batch-size", 4)
        trainer = xray.KerasTrainer(Model(), feed, table, arguments)
        trainer.fit_epoch(2)
        trainer.predict("validation")
        trainer.predict("test")
        training, *others = asked
        assert set(training[0]) == set(range(20))
        assert np.array_equal(training[1], draws(2, count=40))
        assert [set(rows) for rows, _ in others] == [set(range(20, 30)), set(range(30, 40))]
        assert all(flips is None for _, flips in others)


@pytest.mark.usefixtures("keras")
def test_elephas_workers_draw_as_one_machine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers draw flips by the table's rows, whichever rows they have.

    They train in two parts, each image once.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (30, 9, 9), np.uint8)
    labels = np.zeros((30, 15), np.float32)
    labels[:, 0] = range(30)  # identifies an image's row
    flips = draws(2, count=30)
    arguments = parse("--flip", "--batch-size", 4)
    arguments.image_size = 9
    arguments.workers = 3
    sent = SimpleNamespace(value=pickle.dumps(labels))
    job = SimpleNamespace(labels=sent, images=30, partitions=6, arguments=arguments)
    seen: list[int] = []
    sizes: list[int] = []

    def fit(data: Any, **how: Any) -> Any:
        for images, found in data.as_numpy_iterator():
            sizes.append(len(images))
            for image, row in zip(images[..., 0], found[:, 0].astype(int)):
                assert np.array_equal(image, pixels[row, :, ::-1] if flips[row] else pixels[row])
                seen.append(row)
        return SimpleNamespace(history={})

    state = SimpleNamespace(assign=lambda seeds: None)
    layer = SimpleNamespace(seed_generator=SimpleNamespace(state=state))
    model = SimpleNamespace(get_layer=lambda name: layer, fit=fit)
    order = np.random.default_rng(1).permutation(30)
    chunks = dict(xray_elephas.sent([(np.arange(30), pixels)], order, job.partitions))
    assert sorted(chunks) == list(range(6))
    for number, chunk in sorted(chunks.items()):
        task = SimpleNamespace(partitionId=lambda number=number: number)
        monkeypatch.setattr(
            xray_elephas, "TaskContext", SimpleNamespace(get=lambda task=task: task)
        )
        xray_elephas.Share(iter([chunk]), job).fit(model, 2)
    assert sorted(seen) == list(range(30))
    assert sizes == [4, 1] * 6


@pytest.mark.slow
def test_a_resumed_run_draws_what_an_unbroken_one_draws(credentials: Path, tmp_path: Path) -> None:
    """Compares whole runs; also checks that flips change something."""
    options = ["--credentials", credentials, *QUICK, "--cache", tmp_path / "cache"]
    results = {}
    for name, more in [
        ("plain", [["--epochs", 3]]),
        ("flip", [["--epochs", 3]]),
        ("resumed", [["--epochs", 1], ["--epochs", 3]]),
    ]:
        for part, epochs in enumerate(more):
            flip = ["--flip"] * (name != "plain")
            resume = ["--resume"] * part
            ended = victim.run(
                [*options, *flip, *resume, *epochs, "--output", tmp_path / name],
                tmp_path / f"{name}{part}",
            )
            assert ended.code == 0, ended.stderr
        results[name] = json.loads(ended.stdout.splitlines()[-1])
    files = {name: (tmp_path / name / "predictions.csv").read_bytes() for name in results}
    assert files["resumed"] == files["flip"] != files["plain"]
    assert results["resumed"]["auroc"] == results["flip"]["auroc"]
    assert json.loads((tmp_path / "flip" / "config.json").read_text())["arguments"]["flip"] is True
