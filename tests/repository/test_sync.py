"""Blocks shared by several scripts are identical, and sync_common.py notices if not."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from helpers import ROOT, SCRIPT, run_process
from sync_common import BLOCKS, find_block, sync

SCRIPTS = BLOCKS["the three scripts"]


def test_blocks_of_the_scripts_are_equal() -> None:
    differences = sync()
    assert not differences, "\n".join(
        [*differences, "fix: python tests/repository/sync_common.py --write"]
    )


def test_every_script_has_a_home_for_what_it_shares() -> None:
    """No script redefines anything from a common block."""
    home = SCRIPT.read_text()
    for name, scripts in BLOCKS.items():
        begin, end = find_block(home, name)
        shared = {node.name for node in ast.parse(home[begin:end]).body if hasattr(node, "name")}
        assert shared
        for script in scripts:
            text = (ROOT / script).read_text()
            begin, end = find_block(text, name)
            own = ast.parse(text[:begin] + text[end:]).body
            assert not shared & {node.name for node in own if hasattr(node, "name")}, script


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """A folder with the script and a sibling that has other text around the same blocks."""
    text = SCRIPT.read_text()
    (tmp_path / SCRIPTS[0]).write_text(text)
    (tmp_path / SCRIPTS[1]).write_text(
        text.replace("---- target: one CPU thread ----", "---- target: GPUs ----")
    )
    return tmp_path


def test_only_what_stands_in_a_block_must_be_equal(copies: Path) -> None:
    assert sync(copies) == []


@pytest.mark.parametrize("line", ["SPLITS = ", "def open_cache("])
def test_a_difference_is_shown_and_fixed(copies: Path, line: str) -> None:
    copy = copies / SCRIPTS[1]
    text = copy.read_text()
    assert text.count(f"\n{line}") == 1
    copy.write_text(text.replace(f"\n{line}", f"\n# not so\n{line}"))
    assert "+# not so" in sync(copies)
    assert sync(copies, write=True) == []
    assert sync(copies) == []
    assert copy.read_text() == text
    assert (copies / SCRIPTS[0]).read_text() == SCRIPT.read_text()


@pytest.mark.parametrize("change", ["", "twice"])
def test_markers_missing_or_doubled(copies: Path, change: str) -> None:
    copy = copies / SCRIPTS[1]
    marker = next(
        line
        for line in copy.read_text().splitlines()
        if "common to the three scripts: begin" in line
    )
    copy.write_text(copy.read_text().replace(marker, f"{marker}\n{marker}" if change else ""))
    with pytest.raises(ValueError, match="markers"):
        sync(copies)


def test_the_command_says_that_all_is_equal() -> None:
    assert run_process([sys.executable, ROOT / "tests" / "repository" / "sync_common.py"]).code == 0


def test_no_script_imports_a_sibling() -> None:
    siblings = {Path(script).stem for script in SCRIPTS} | {
        path.stem for path in (ROOT / "tests").rglob("*.py")
    }
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not siblings & {name.split(".")[0] for name in names}, path
