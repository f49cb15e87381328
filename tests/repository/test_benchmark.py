"""benchmark.py's parts that need no idle machine."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
from helpers import ROOT, run_process
from PIL import Image
from static_s3 import static_s3

import xray_tensorflow as xray

benchmark = pytest.importorskip("benchmark")


def test_every_group_has_its_table() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    for group in benchmark.GROUPS:
        between = re.search(f"<!-- {group}: begin -->(.*)<!-- {group}: end -->", text, re.DOTALL)
        assert between, group
        assert "|---" in between[1]
        assert f"`python tests/benchmark/benchmark.py {group}`" in between[1]


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


def test_the_pngs_are_as_most_are() -> None:
    """Grey, and not of the sample's quick compression."""
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


TRAIN = """
import sys
sys.path[:0] = sys.argv[1:]
import benchmark, peers

arguments = benchmark.arguments_of("--weights", "none", "--image-size", 32, "--batch-size", 8, threads=1)
for name in ("our_training", "stock_keras"):
    getattr(peers, name)(arguments, 16)()
"""


@pytest.mark.slow
def test_an_epoch_of_ours_and_of_a_peer() -> None:
    trained = run_process(
        [sys.executable, "-c", TRAIN, ROOT, ROOT / "tests", ROOT / "tests" / "benchmark"]
    )
    assert trained.code == 0, trained.stderr
