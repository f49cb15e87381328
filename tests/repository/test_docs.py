"""README and docs: links resolve, commands exist, README's snippet scores a radiograph."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers import ROOT
from sample_bucket import draw_radiograph, read_rows

import xray_tensorflow as xray

DOCS = sorted((ROOT / "docs").glob("*.md"))
TEST_PAGES = [ROOT / "tests" / "README.md", ROOT / "tests" / "FAULTS.md"]
PAGES = [ROOT / "README.md", *TEST_PAGES, *DOCS]
# Options of other programs that the pages mention in their text.
FOREIGN = {
    "--files", "--executor-cores", "--deploy-mode", "--num-executors", "--driver-memory", "--cli-input-json", "--write",
}  # fmt: skip


def text_and_code(page: Path) -> tuple[str, list[str]]:
    """A page's text without its fenced blocks, and the blocks."""
    fence = r"(?ms)^```[^\n]*\n(.*?)^```$"
    return re.sub(fence, "", page.read_text()), re.findall(fence, page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", text_and_code(page)[0])
    plain = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def options(script: Path) -> set[str]:
    """A script's own options; all of xray_*.py declare those of the common block."""
    return set(re.findall(r'"(--[a-z-]+)"', script.read_text())) | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_and_code(page)[0]):
        if re.match("https?:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_readme_links_every_page() -> None:
    linked = set(re.findall(r"\]\(docs/([^)#]+\.md)\b", (ROOT / "README.md").read_text()))
    assert {page.name for page in DOCS} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_name_scripts_and_options_that_exist(page: Path) -> None:
    for line in "\n".join(text_and_code(page)[1]).replace("\\\n", " ").splitlines():
        if not re.match(r"(nohup )?(\S*/)?(python3?|spark-submit) ", line.lstrip("$ ")):
            continue
        words = shlex.split(line, comments=True)
        scripts = [word for word in words if word.endswith(".py")]
        for script in scripts:
            assert (ROOT / script).is_file(), f"{page.name}: {line}"
        own = words[words.index(scripts[0]) + 1 :] if scripts else []
        declared = set().union(*(options(ROOT / script) for script in scripts))
        assert {word for word in own if word.startswith("--")} <= declared | {"--write"}, (
            f"{page.name}: {line}"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_options_in_the_text_exist(page: Path) -> None:
    declared = set().union(
        *(options(script) for script in [*ROOT.glob("xray_*.py"), *ROOT.glob("tests/**/*.py")])
    )
    named = set(re.findall(r"`(--[a-z-]+)", text_and_code(page)[0]))
    assert named <= declared | FOREIGN, page.name


def test_readmes_table_has_the_options_and_their_defaults() -> None:
    rows = re.findall(
        r"(?m)^\| `(--[a-z-]+)[^`]*` \|\s*(.*?)\s*\|", (ROOT / "README.md").read_text()
    )
    actions = {action.option_strings[-1]: action for action in xray.common_parser("")._actions}
    del actions["--help"]
    assert [name for name, _ in rows] == list(actions)
    for name, shown in rows:
        default = actions[name].default
        if default is None or default is False:
            assert shown in ("", "all", "`runs/<script>-<UTC time>`"), name
        elif isinstance(default, str):
            assert shown.strip("`/") == default.strip("/"), name
        else:
            assert float(shown) == default, name


def test_readmes_snippet_scores_a_radiograph(
    run: Any,
    keras: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (snippet,) = re.findall(r"(?ms)^```python\n(.*?)^```$", (ROOT / "README.md").read_text())
    assert len(snippet.splitlines()) <= 11
    predictions = pd.read_csv(run.folder / "predictions.csv", index_col="image")
    image = predictions.index[0]
    (folder,) = re.findall('run = "(.*)/"', snippet)
    (tmp_path / folder).parent.mkdir()
    (tmp_path / folder).symlink_to(run.folder)
    (tmp_path / "radiograph.png").write_bytes(draw_radiograph(image, dict(read_rows())[image], 64))
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    scores = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    expected = {}
    for label, threshold in json.loads((run.folder / "metrics.json").read_text())[
        "thresholds"
    ].items():
        probability = predictions.loc[image, f"probability {label}"]
        if threshold is not None and probability >= threshold:
            expected[label] = probability
    assert expected
    assert scores == pytest.approx(expected, abs=1e-5)
    assert np.isfinite(list(scores.values())).all()


def test_pre_commit_has_the_same_ruff_and_a_hook_for_the_common_blocks() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    ruff, local = config["repos"]
    assert (
        f"ruff=={ruff['rev'][1:]}" in (ROOT / "tests" / "requirements.txt").read_text().splitlines()
    )
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]
    (hook,) = local["hooks"]
    assert hook["entry"] == "python tests/repository/sync_common.py"
    assert [
        bool(re.search(hook["files"], name)) for name in ("xray_gpu.py", "tests/xray_gpu.py")
    ] == [
        True,
        False,
    ]
