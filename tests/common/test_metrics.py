"""AUROC, its interval and the thresholds."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics

import xray_tensorflow as xray


@pytest.fixture
def predictions() -> tuple[np.ndarray, np.ndarray]:
    """400 rows with many tied scores; label 3 has no positive row, label 7 no negative one."""
    random = np.random.default_rng(0)
    truth = (random.random((400, 15)) < 0.3).astype(np.float32)
    truth[:, 3], truth[:, 7] = 0, 1
    scores = np.round(random.random((400, 15)) * 0.8 + truth * 0.2, 1).astype(np.float32)
    return truth, scores


def test_auroc_is_that_of_sklearn(predictions: tuple) -> None:
    truth, scores = predictions
    areas = xray.auroc(truth, scores)
    assert areas.shape == (15,)
    assert np.flatnonzero(np.isnan(areas)).tolist() == [3, 7]
    for label in set(range(15)) - {3, 7}:
        assert areas[label] == pytest.approx(
            sklearn.metrics.roc_auc_score(truth[:, label], scores[:, label]), abs=1e-12
        )


def test_auroc_of_as_many_rows_as_the_full_test_split() -> None:
    # The ranks of 25,000 rows add up to more than float32 holds exactly.
    random = np.random.default_rng(0)
    truth = (random.random((25000, 15)) < 0.1).astype(np.float32)
    scores = random.random((25000, 15), dtype=np.float32)
    assert xray.auroc(truth, scores)[4] == pytest.approx(
        sklearn.metrics.roc_auc_score(truth[:, 4], scores[:, 4]), abs=1e-9
    )


def test_the_bootstrap_draws_patients() -> None:
    # One patient has all positive images, one all negative: half of the samples of two patients
    # have only one class. Samples of images would never lack a class here.
    truth, scores = (
        np.repeat([[1.0] * 15, [0.0] * 15], 50, axis=0),
        np.random.default_rng(0).random((100, 15)),
    )
    samples = xray.bootstrap_auroc(
        truth, scores, pd.Series(np.repeat(["a", "b"], 50), index=range(7, 107)), seed=0
    )
    assert list(samples.columns) == xray.LABELS
    assert samples["Mass"].isna().mean() == pytest.approx(0.5, abs=0.06)
    assert samples["Mass"].dropna().to_numpy() == pytest.approx(xray.auroc(truth, scores)[9])


def test_the_bootstrap_interval(predictions: tuple) -> None:
    truth, scores = predictions
    every, pairs = pd.Series(np.arange(400)).astype(str), pd.Series(np.arange(400) // 8).astype(str)
    samples = xray.bootstrap_auroc(truth, scores, every, 0)
    area, mean, spread = (
        xray.auroc(truth, scores)[0],
        samples["Atelectasis"].mean(),
        samples["Atelectasis"].std(),
    )
    assert mean == pytest.approx(area, abs=0.01)
    # Hanley and McNeil's standard error of an area, for about 120 positive and 280 negative rows.
    positive, negative = truth[:, 0].sum(), (1 - truth[:, 0]).sum()
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (positive - 1) * (q1 - area**2) + (negative - 1) * (q2 - area**2)
    assert spread == pytest.approx(math.sqrt(variance / positive / negative), rel=0.15)
    pd.testing.assert_frame_equal(samples, xray.bootstrap_auroc(truth, scores, every, 0))
    assert not samples.equals(xray.bootstrap_auroc(truth, scores, every, 1))
    # Eight identical images of a patient tell no more than one.
    copies = np.repeat(np.arange(0, 400, 8), 8)
    wide = xray.bootstrap_auroc(truth[copies], scores[copies], pairs, 0)["Atelectasis"].std()
    assert wide > 2 * spread


@pytest.mark.parametrize(
    ("truth", "scores", "threshold"),
    [
        ([0, 0, 0, 1, 1], [0.1, 0.4, 0.2, 0.35, 0.8], 0.35),
        ([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.7], 0.6),
        ([0, 1, 0, 0, 1], [0.5, 0.5, 0.1, 0.2, 0.9], 0.5),
        ([1, 0], [0.2, 0.8], 1.0),
    ],
    ids=["one error", "none", "tie", "worse than chance"],
)
def test_threshold_of_the_best_youden_index(truth: list, scores: list, threshold: float) -> None:
    assert xray.best_threshold(np.array(truth), np.array(scores)) == pytest.approx(threshold)


@pytest.mark.parametrize("truth", [0, 1])
def test_no_threshold_for_a_label_of_one_class(truth: int) -> None:
    assert math.isnan(xray.best_threshold(np.full(5, truth), np.arange(5) / 5))


ALIVE = np.repeat([[0.2], [0.25], [0.21]], 15, axis=1)
BLIND = np.repeat([[0.2], [0.2004], [0.2008]], 15, axis=1)


@pytest.mark.parametrize(
    ("scores", "aurocs", "dead"),
    [
        (ALIVE, [0.6], False),
        (BLIND, [0.6], False),  # the first epoch
        (BLIND, [0.6, 0.55], True),
        (np.hstack([BLIND[:, :14], ALIVE[:, :1]]), [0.6, 0.6], False),  # one label still varies
        (ALIVE, [0.5], False),
        (ALIVE, [0.5, 0.5], True),
        (ALIVE, [0.6, 0.4999, 0.5001], True),
        (ALIVE, [0.5, 0.5, 0.6], False),
        (ALIVE, [0.48, 0.51], False),
        (ALIVE, [math.nan, math.nan], False),  # no label has both classes
        (ALIVE[:1], [math.nan], False),  # a single image proves nothing
    ],
)
def test_a_network_has_died_where_it_tells_no_image_from_another(
    scores: np.ndarray, aurocs: list[float], dead: bool, capsys: pytest.CaptureFixture
) -> None:
    assert xray.warn_if_dead(scores, pd.Series(aurocs)) == dead
    assert ("smaller --learning-rate" in capsys.readouterr().err) == dead
