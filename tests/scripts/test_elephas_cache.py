"""The pixel cache of xray_elephas.py: what a failed run leaves to the next, and unusable caches."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import fault_proxy
from helpers import QUICK, SECRETS, edited, error_line, result_of, submit, write_yaml
from sample_bucket import draw_radiograph
from static_s3 import static_s3

xray = pytest.importorskip("xray_elephas")

pytestmark = pytest.mark.slow
ONE_EPOCH = ["--epochs", 1]


def from_cache(finished: Any) -> int:
    return result_of(finished)["ingest"]["from_cache"]


def endpoint_of(credentials: Path) -> str:
    return xray.read_credentials(str(credentials))["endpoint_url"]


def test_a_token_that_expires_loses_nothing_that_came(credentials: Path, tmp_path: Path) -> None:
    with fault_proxy(endpoint_of(credentials), expire_after=200) as proxy:
        first = edited(credentials, tmp_path, endpoint_url=proxy.url)
        problem = error_line(submit(tmp_path, "--credentials", first))
        assert "session token is expired" in problem
        fresh = edited(
            credentials,
            tmp_path,
            endpoint_url=proxy.url,
            aws_session_token=SECRETS["aws_session_token"][::-1],
        )
        # A few of the 200 requests were for the list and the labels; those in flight are lost.
        assert 100 < from_cache(submit(tmp_path, "--credentials", fresh, *ONE_EPOCH)) < 200


def test_too_many_unreadable_images_lose_nothing_that_came(
    credentials: Path, tmp_path: Path
) -> None:
    assert "unreadable" in error_line(
        submit(tmp_path, "--credentials", credentials, "--max-skipped", 0)
    )
    assert from_cache(submit(tmp_path, "--credentials", credentials, *ONE_EPOCH)) == 410


def test_a_damaged_file_is_fetched_again(credentials: Path, tmp_path: Path) -> None:
    whole = result_of(submit(tmp_path, "--credentials", credentials, *ONE_EPOCH))
    files = sorted((tmp_path / "cache").rglob("part-*"), key=lambda path: path.stat().st_size)
    assert len(files) == 2
    data = files[-1].read_bytes()
    files[-1].write_bytes(data[: len(data) // 2])
    files[-1].with_name(f".{files[-1].name}.crc").unlink()  # or Hadoop's checksum would notice
    again = result_of(submit(tmp_path, "--credentials", credentials, *ONE_EPOCH))
    assert 0 < again["ingest"]["from_cache"] < 410
    assert again["auroc"] == whole["auroc"]


@pytest.mark.parametrize(
    "cache", ["hdfs:cache", "", "nonsense://host/cache", "s3a://bucket/cache", "c[1]"]
)
def test_a_cache_that_cannot_be_used_is_one_line(
    credentials: Path, tmp_path: Path, cache: str
) -> None:
    assert "--cache" in error_line(submit(tmp_path, "--credentials", credentials, "--cache", cache))


def test_a_killed_driver_loses_the_tasks_in_hand_alone(tmp_path: Path) -> None:
    films = [
        draw_radiograph("00000001_000.png", [], 64),
        draw_radiograph("00000002_000.png", ["Mass"], 64),
    ]
    count = 3 * xray.ROUND
    names = [f"{number:08}_000.png" for number in range(1, count + 1)]
    lines = [
        f"{name},{['No Finding', 'Mass'][number % 2]},{number}"
        for number, name in enumerate(names, 1)
    ]
    labels = "\n".join(["Image Index,Finding Labels,Patient ID", *lines, ""])
    objects = {f"images/{name}": films[number % 2] for number, name in enumerate(names, 1)}
    objects["Data_Entry_2017_v2020.csv"] = labels.encode()
    with static_s3(objects, 0) as endpoint:
        keys = {
            "aws_access_key_id": "sample",
            **SECRETS,
            "endpoint_url": endpoint,
            "region_name": "us-east-1",
        }
        credentials = write_yaml(tmp_path / "credentials.yml", keys)
        words = ["--credentials", credentials, *QUICK, *ONE_EPOCH, "--batch-size", 256]

        def stored() -> int:
            return len(list((tmp_path / "cache").glob("*/*/part-*")))

        killed = submit(tmp_path, *words, stop=(lambda: stored() >= 3, signal.SIGKILL))
        assert killed.code == -signal.SIGKILL
        assert not list((tmp_path / "cache").rglob("_SUCCESS"))  # the first round had not finished
        assert from_cache(submit(tmp_path, *words)) >= 3 * xray.TASK
