"""Every pin has a wheel where the docs say that the scripts run. Asks PyPI, downloads nothing to
keep.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, requirements
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

PAGES = ["xray_gpu.md", "aws.md"]


def check_wheels(pins: list[str], python: str, glibc: int, folder: Path) -> None:
    """Fail unless pip finds a wheel of each pin for x86_64 Linux with glibc 2.`glibc` and this
    Python.
    """
    # pip would apply a pin's marker to the Python that it runs on.
    lines = [Requirement(pin) for pin in pins]
    chosen = [
        f"{line.name}{line.specifier}"
        for line in lines
        if not line.marker or line.marker.evaluate({"python_version": python})
    ]
    platforms = [
        "manylinux1",
        "manylinux2010",
        "manylinux2014",
        *(f"manylinux_2_{minor}" for minor in range(5, glibc + 1)),
    ]
    how = [
        "--dry-run",
        "--ignore-installed",
        "--no-deps",
        "--only-binary=:all:",
        "--target",
        folder,
        "--implementation",
        "cp",
    ]
    words = [word for platform in platforms for word in ("--platform", f"{platform}_x86_64")]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        *how,
        "--python-version",
        python,
        *words,
        *chosen,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if re.search("Failed to establish a new connection|Max retries|Temporary failure", done.stderr):
        pytest.skip("PyPI is out of reach")
    assert done.returncode == 0, done.stderr


# glibc: EMR 7 and the AMI of Amazon Linux 2023 have 2.34, Ubuntu 22.04 has 2.35.
@pytest.mark.parametrize("python", ["3.9", "3.10", "3.11", "3.12"])
def test_every_pin_has_a_wheel(python: str, tmp_path: Path) -> None:
    pins = requirements(ROOT / "requirements.txt")
    # Spark is published as a source archive only; there is nothing to compile in it.
    check_wheels([pin for pin in pins if not pin.startswith("pyspark==")], python, 34, tmp_path)


def recipe(page: str) -> list[str]:
    """The commands of the page that install for g3s.xlarge."""
    text = (ROOT / "docs" / page).read_text()
    (commands,) = re.findall(
        r"(?m)^(sed .*requirements.txt.*)\n(pip install -r requirements-2.16.txt .*)$", text
    )
    return list(commands)


def test_the_pages_have_one_recipe() -> None:
    assert recipe(PAGES[0]) == recipe(PAGES[1])


def test_the_recipe_for_amazon_linux_2_has_wheels(tmp_path: Path) -> None:
    """glibc 2.26 and Python 3.10: the AMI that AWS lists for g3s.xlarge."""
    command, install = recipe("xray_gpu.md")
    (tmp_path / "requirements.txt").write_text((ROOT / "requirements.txt").read_text())
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    added = [word.strip('"').replace("[and-cuda]", "") for word in install.split()[4:]]
    pins = [*requirements(tmp_path / "requirements-2.16.txt"), *added]
    assert {"tensorflow==2.16.2", "pillow==11.3.0"} <= set(pins)
    check_wheels(pins, "3.10", 26, tmp_path / "target")
