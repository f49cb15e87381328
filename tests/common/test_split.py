"""The split by patient, --limit and --test-list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import client_of, label_file, make_bucket, parse
from sample_bucket import BUCKET, connect, read_rows

import xray_tensorflow as xray


@pytest.fixture(scope="module")
def client(credentials: Path) -> object:
    return client_of(credentials)


def made_up(patients: range) -> pd.DataFrame:
    """Two images of each patient."""
    ids = [f"{patient:08}" for patient in patients]
    return pd.DataFrame(
        [(f"{patient}_{i:03}.png", patient) for patient in ids for i in (0, 1)],
        columns=["image", "patient"],
    )


def by_patient(table: pd.DataFrame) -> dict[str, str]:
    """The split of each patient; fails if a patient is in two."""
    assert (table.groupby("patient")["split"].nunique() == 1).all()
    return dict(zip(table["patient"], table["split"]))


@pytest.mark.parametrize("seed", [0, 1])
def test_shares_and_no_patient_in_two_splits(seed: int) -> None:
    table = made_up(range(1, 30001))
    table["split"] = xray.assign_splits(table, seed)
    by_patient(table)
    shares = table["split"].value_counts(normalize=True)
    # Three standard deviations of the largest share among 30,000 draws are 0.008.
    assert shares.to_dict() == pytest.approx(
        {"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.008
    )


def test_split_follows_from_seed_and_patient_alone() -> None:
    few, more = made_up(range(1, 1001)), made_up(range(1, 2001)).sample(frac=1, random_state=0)
    few["split"], more["split"] = xray.assign_splits(few, 0), xray.assign_splits(more, 0)
    assert by_patient(few).items() <= by_patient(more).items()
    other = few.assign(split=xray.assign_splits(few, 1))
    assert by_patient(other) != by_patient(few)


def test_split_is_the_same_on_every_machine() -> None:
    # Fails if the hash changes: earlier runs could then be neither compared nor resumed.
    table = made_up(range(1, 21))
    splits = xray.assign_splits(table, 0)[::2]
    assert [xray.SPLITS.index(split) for split in splits] == [
        0,
        2,
        0,
        2,
        *[0] * 3,
        2,
        *[0] * 9,
        1,
        0,
        0,
    ]


def test_limit_is_drawn_by_seed_nested_and_moves_no_patient(client: object) -> None:
    tables = {limit: xray.select_images(client, parse("--limit", limit)) for limit in (60, 120)}
    whole = xray.select_images(client, parse())
    assert len(whole) == 411
    assert [len(table) for table in tables.values()] == [60, 120]
    assert set(tables[60]["image"]) < set(tables[120]["image"]) < set(whole["image"])
    assert set(tables[60]["image"]) != set(whole["image"].sort_values()[:60])
    for table in tables.values():
        assert by_patient(table).items() <= by_patient(whole).items()
    other = xray.select_images(client, parse("--limit", 60, "--seed", 1))
    assert set(other["image"]) != set(tables[60]["image"])
    assert len(xray.select_images(client, parse("--limit", 10**6))) == 411


def test_counts_of_labels_bucket_and_both_are_said(
    credentials: Path, client: object, capsys: pytest.CaptureFixture
) -> None:
    rows = read_rows()
    images = dict.fromkeys([name for name, _ in rows[:100]] + ["99999999_000.png"], b"")
    make_bucket(credentials, "part", label_file(rows[:150]), images)
    table = xray.select_images(client, parse("--bucket", "part", "--batch-size", 8))
    said = capsys.readouterr().out
    assert "150 images have labels, 101 are in the bucket, 100 are in both" in said
    assert set(table["image"]) == {name for name, _ in rows[:100]}
    assert f"train {(table['split'] == 'train').sum()}," in said
    pd.testing.assert_series_equal(table["image"], table["image"].sort_values(), check_index=False)


def put(client: object, key: str, names: list[str]) -> None:
    connect(client.meta.endpoint_url).put_object(
        Bucket=BUCKET, Key=key, Body="\r\n".join(names).encode()
    )


def test_test_list(client: object, capsys: pytest.CaptureFixture) -> None:
    whole = xray.select_images(client, parse())
    patients = sorted(set(whole["patient"]))[::5]
    names = list(whole["image"][whole["patient"].isin(patients)])
    put(client, "test_list.txt", [*names, "99999999_000.png"])
    table = xray.select_images(client, parse("--test-list", "test_list.txt"))
    assert list(table["image"][table["split"] == "test"]) == names
    shares = np.unique(table["split"][table["split"] != "test"], return_counts=True)[1]
    assert shares[0] / shares.sum() == pytest.approx(7 / 8, abs=0.06)
    by_patient(table)
    assert (
        f"{len(names) + 1} images in test_list.txt: {len(names)} are in both, 1 have no labels"
        in capsys.readouterr().out
    )


FORMS = {
    "byte-order mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "CRLF and a comma": lambda text: text.replace("\n", ",\r\n").encode(),
    "quotes": lambda text: "\n".join(f'"{name}"' for name in text.split()).encode(),
    "semicolons": lambda text: ";".join(text.split()).encode(),
    "a header": lambda text: f"Image Index\n{text}".encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_test_lists_of_other_programs(client: object, form: str) -> None:
    whole = xray.select_images(client, parse())
    patients = sorted(set(whole["patient"]))[::5]
    names = list(whole["image"][whole["patient"].isin(patients)])
    s3 = connect(client.meta.endpoint_url)
    s3.put_object(Bucket=BUCKET, Key="form.txt", Body=FORMS[form]("\n".join(names)))
    table = xray.select_images(client, parse("--test-list", "form.txt"))
    assert list(table["image"][table["split"] == "test"]) == names


def test_names_of_the_test_list_without_a_row_are_counted_or_refused(
    client: object, fails: object, capsys: pytest.CaptureFixture
) -> None:
    table = xray.select_images(client, parse())
    patients = sorted(set(table["patient"]))[::5]
    names = list(table["image"][table["patient"].isin(patients)])
    put(client, "some.txt", [*names, "a.png", "b.png"])
    xray.select_images(client, parse("--test-list", "some.txt"))
    assert " 2 have no labels" in capsys.readouterr().out
    put(client, "most.txt", [names[0], *(f"images/{name}" for name in names)])
    error = fails("--test-list", "most.txt")
    assert f"{len(names)} of {len(names) + 1} images in most.txt, such as images/" in error
    assert f"images/{names[0]}" in error


def test_test_list_with_a_patient_on_both_sides(client: object, fails: object) -> None:
    table = xray.select_images(client, parse())
    patient = table["patient"].value_counts().index[0]
    put(client, "half_list.txt", list(table["image"][table["patient"] == patient][:1]))
    error = fails("--test-list", "half_list.txt")
    assert patient in error
    assert "--test-list" in error


def test_test_list_with_no_image_of_the_bucket(client: object, fails: object) -> None:
    put(client, "other_list.txt", ["99999999_000.png"])
    assert "99999999_000.png" in fails("--test-list", "other_list.txt")
    assert "absent_list.txt" in fails("--test-list", "absent_list.txt")


def test_a_split_left_empty(fails: object) -> None:
    assert "split" in fails("--limit", 2, "--batch-size", 1)


def test_a_batch_larger_than_the_training_split(fails: object) -> None:
    error = fails("--batch-size", 273)
    assert "--batch-size 273" in error
    assert "272" in error
