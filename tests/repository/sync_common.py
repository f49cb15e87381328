"""Check that blocks shared by several scripts are identical; with --write, copy them.

    python tests/repository/sync_common.py            exit code 1 and a diff if they differ
    python tests/repository/sync_common.py --write    copy the blocks of xray_tensorflow.py to the other scripts

A block is between `# ---- common to NAME: begin ----` and `# ---- common to NAME: end ----`; text
after the second dashes is free. One block is in all three scripts, another in those for one
machine.
"""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = "xray_tensorflow.py"
BLOCKS = {
    "the three scripts": ["xray_tensorflow.py", "xray_gpu.py", "xray_elephas.py"],
    "the scripts of one machine": ["xray_tensorflow.py", "xray_gpu.py"],
}


def find_block(text: str, name: str) -> tuple[int, int]:
    """Start and end of the block `name` in `text`. Raises ValueError if it is not there once."""
    begins, ends = (
        [
            match.start()
            for match in re.finditer(rf"^# ---- common to {name}: {word} ----", text, re.MULTILINE)
        ]
        for word in ("begin", "end")
    )
    if len(begins) != 1 or len(ends) != 1 or begins > ends:
        raise ValueError(
            f"{len(begins)} begin and {len(ends)} end markers of 'common to {name}', not one pair"
        )
    return begins[0], ends[0]


def sync(root: Path = ROOT, write: bool = False) -> list[str]:
    """Differences between the scripts in `root`, as lines; with `write`, none: they are fixed."""
    home = (root / HOME).read_text(encoding="utf-8")
    lines = []
    for name, scripts in BLOCKS.items():
        begin, end = find_block(home, name)
        wanted = home[begin:end]
        for script in (root / script for script in scripts if (root / script).exists()):
            text = script.read_text(encoding="utf-8")
            begin, end = find_block(text, name)
            if text[begin:end] == wanted:
                continue
            if write:
                script.write_text(text[:begin] + wanted + text[end:], encoding="utf-8")
                print(f"copied the block of {name} to {script.name}")
            else:
                lines += difflib.unified_diff(
                    wanted.splitlines(),
                    text[begin:end].splitlines(),
                    HOME,
                    script.name,
                    lineterm="",
                )
    return lines


if __name__ == "__main__":
    differences = sync(write="--write" in sys.argv[1:])
    if differences:
        print(*differences, "fix: python tests/repository/sync_common.py --write", sep="\n")
        sys.exit(1)
