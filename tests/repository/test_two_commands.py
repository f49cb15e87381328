"""README's two commands in a new Debian with only python3 and python3-venv.

No Java, compiler, git or locale. Takes an hour each on two cores. Needs root and debootstrap, and
uses this machine's pip settings.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow

PIP = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
# What else a process in the root needs: its own /proc and a /dev/shm.
ENTER = """
mount -t proc proc "$0/proc"
mkdir -p "$0/dev/shm"
mount -t tmpfs tmpfs "$0/dev/shm"
exec chroot "$0" "$@"
"""


def commands() -> list[str]:
    """The two command lines."""
    blocks = re.findall(r"(?ms)^```bash\n(.*?)\n```$", (ROOT / "README.md").read_text())
    return [block for block in blocks if ".venv/bin/python" in block]


@pytest.fixture
def debian(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """The root folder of the new Debian, with the repository's files in /xray."""
    if not shutil.which("debootstrap") or os.geteuid():
        pytest.skip("needs root and Debian's debootstrap")
    root = tmp_path / "root"
    how = ["--variant=minbase", "--include=python3,python3-venv", request.param, root]
    subprocess.run(["debootstrap", *how], check=True, stdout=subprocess.DEVNULL)
    settings = ["/etc/hosts", "/etc/resolv.conf", "/etc/pip.conf", PIP.get("PIP_CERT", "")]
    for path in filter(os.path.isfile, settings):
        copy = root / path.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        copy = root / "xray" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    yield root
    shutil.rmtree(root)


@pytest.mark.parametrize("debian", ["bookworm", "trixie"], indirect=True)
def test_they_work_in_a_bare_debian(debian: Path) -> None:
    assert len(commands()) == 2
    for command in commands():
        words = ["env", "-i", "HOME=/root", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
        words += [f"{name}={value}" for name, value in PIP.items()]
        inside = [*words, "sh", "-c", f"cd /xray && {command}"]
        entered = ["unshare", "--mount", "--pid", "--fork", "sh", "-ec", ENTER, debian, *inside]
        done = subprocess.run(entered, capture_output=True, text=True, timeout=7200)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert " passed" in done.stdout
    # Java is PyPI's, and the Spark tests were not skipped for lack of one.
    assert "Spark needs Java" not in done.stdout
