"""tests/tools/contact_sheet.py: what it says of an image, and a sheet of a real run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from contact_sheet import choose, findings, main
from PIL import Image


def test_findings_are_told_apart() -> None:
    row = pd.Series(
        {
            **{
                "true Mass": 1,
                "true Edema": 1,
                "true Hernia": 0,
                "true Nodule": 0,
                "true Effusion": 1,
            },
            **{"probability Mass": 0.5, "probability Edema": 0.2, "probability Hernia": 0.9},
            **{"probability Nodule": 0.1, "probability Effusion": 0.9},
        }
    )
    thresholds = {"Mass": 0.5, "Edema": 0.3, "Hernia": 0.8, "Nodule": 0.2, "Effusion": None}
    assert findings(row, thresholds) == [
        ("found", "Mass 0.500 ≥ 0.500"),
        ("missed", "Effusion 0.900"),  # no threshold: never predicted
        ("missed", "Edema 0.200 < 0.300"),
        ("false alarm", "Hernia 0.900 ≥ 0.800"),
    ]


def test_each_label_has_an_image_and_no_image_comes_twice() -> None:
    frame = pd.DataFrame(
        {"true Mass": [1, 1, 0, 0], "true Edema": [1, 0, 0, 0], "true Hernia": [0, 0, 0, 0]}
    )
    assert sorted(choose(frame, ["Edema", "Mass", "Hernia"]).index) == [0, 1]


def test_a_sheet_of_a_real_run(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sheet, cache = tmp_path / "sheet.png", run.folder.parent.parent / "cache"
    command = [str(run.folder), "--cache", str(cache), "--output", str(sheet)]
    assert main(command) == 0
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert image.width == 1035
    # Something was found, and something missed.
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (pixels == colour).all(axis=1).any()

    assert main([*command, "--cache", str(tmp_path)]) == 2
    assert f"error: no {tmp_path}/pixels.sqlite: name the run's --cache" in capsys.readouterr().err
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["arguments"]["image_size"] = 64
    (copy / "config.json").write_text(json.dumps(config))
    assert main([str(copy), *command[1:]]) == 2
    assert "png of 64 pixels a side: name the run's --cache" in capsys.readouterr().err
    (copy / "metrics.json").unlink()
    assert main([str(copy), *command[1:]]) == 2
    assert "run has no metrics.json" in capsys.readouterr().err
