"""The user's machine: unread streams, terminals, system errors, settings, container memory."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, one_line, parse, run_process

import xray_tensorflow as xray

# A miniature run: it prints more than a pipe holds, writes a file and prints its result.
PROGRAM = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import xray_tensorflow as xray
from pathlib import Path
from tqdm import tqdm

def main():
    for epoch in tqdm(range(3000)):
        print("epoch", epoch, "of a run whose folder is " + sys.argv[1], sys.stdout.isatty())
    with Path("whole").open("w") as file:
        assert file.fileno() > 2
        file.write("all of it")
    print("result")

sys.exit(xray.run_script(main))
"""


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a shell command in which `run` is the program above."""
    (folder / "program.py").write_text(PROGRAM)
    run = f'run() {{ "{sys.executable}" program.py "$@"; }}; '
    return subprocess.run(
        ["bash", "-c", run + command], cwd=folder, capture_output=True, env=os.environ | environment
    )


@pytest.mark.parametrize(
    "streams",
    [
        pytest.param(">&-", marks=pytest.mark.slow),
        pytest.param("2>&-", marks=pytest.mark.slow),
        "<&- >&- 2>&-",
        pytest.param(">/dev/full 2>/dev/full", marks=pytest.mark.slow),
        "2>&1 | head -n 5",
        pytest.param("2> >(head -n 1 >&2) | true", marks=pytest.mark.slow),
    ],
)
def test_a_run_outlives_who_reads_it(streams: str, tmp_path: Path) -> None:
    ended = shell(f"set -o pipefail; run folder {streams}", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert b"Traceback" not in ended.stderr + ended.stdout
    assert b"BrokenPipe" not in ended.stderr + ended.stdout
    assert (tmp_path / "whole").read_text() == "all of it"


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize(
    "environment",
    [
        ASCII,
        pytest.param({"PYTHONIOENCODING": "ascii"}, marks=pytest.mark.slow),
        pytest.param({}, marks=pytest.mark.slow),
    ],
)
def test_text_that_the_terminal_cannot_show_is_escaped(environment: dict, tmp_path: Path) -> None:
    ended = shell(r"run $'Lunge-\xff-\u00e4\u80ba'", tmp_path, **environment)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert rb"Lunge-\udcff-" in lines[0]
    assert lines[-1] == b"result"


def test_an_error_line_escapes_what_cannot_be_printed() -> None:
    assert xray.one_line("a\n  b\x1b[2J \udcff ä") == r"a b\x1b[2J \udcff ä"


# ---- system errors ----


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(number, os.strerror(number)) for number in
          (errno.ENOLCK, errno.ENOSYS, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.ESTALE,
           errno.EIO, errno.ENOENT, errno.EMFILE, errno.EINVAL, errno.EDQUOT)),
        OSError("Unable to synchronously open file\n(truncated file)"),
        FileNotFoundError(errno.ENOENT, "No such file", "runs/mine/history.csv"),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_system_refuses_is_one_line(
    error: OSError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def main() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["xray_tensorflow.py"])
    problem = one_line(xray.run_script(main), capsys.readouterr().err)
    assert (error.filename or "") in problem
    assert (os.strerror(error.errno) if error.errno else "truncated file") in problem


def closed_file() -> None:
    os.close(os.open(os.devnull, os.O_RDONLY))
    os.fstat(987654)


@pytest.mark.parametrize("bug", [closed_file, lambda: io.BytesIO().fileno()])
def test_what_only_a_bug_does_is_a_traceback(bug: Any) -> None:
    with pytest.raises(OSError, match="Bad file|fileno"):
        xray.run_script(bug)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(xray.fcntl, "flock", refuse)
    run = xray.Run(parse("--output", tmp_path / "mine"), {})
    with pytest.raises(OSError, match=rf"{os.strerror(number)}: '.*mine/.lock'"):
        run._take_folder()
    run._lock.close()


# ---- user settings ----


def import_keras(folder: Path, program: str, **environment: str) -> Any:
    """Run a program after importing TensorFlow and Keras as the scripts do."""
    head = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'xray_tensorflow.py'\n"
    head += f"import xray_tensorflow as xray\ndef main():\n    xray.import_tensorflow()\n{program}"
    words = [f"{name}={text}" for name, text in environment.items()]
    command = ["env", *words, sys.executable, "-c", f"{head}\nsys.exit(xray.run_script(main))"]
    return run_process(command, cwd=folder)


@pytest.mark.slow
def test_keras_and_matplotlib_have_the_scripts_settings(tmp_path: Path) -> None:
    (tmp_path / "keras.json").write_text(
        '{"floatx": "float16", "image_data_format": "channels_first", "epsilon": 0.1, "backend": "jax"}'
    )
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nbackend: Qt5Agg\nno.such: 1\n")
    program = """
    import keras
    assert keras.backend.backend() == "tensorflow"
    assert keras.config.dtype_policy().name == keras.config.floatx() == "float32"
    assert (keras.config.image_data_format(), keras.config.epsilon()) == ("channels_last", 1e-7)
    keras.config.set_dtype_policy("mixed_float16")  # as xray_gpu.py does
    assert keras.layers.Dense(1).compute_dtype == "float16"
    import pandas
    labels = dict.fromkeys([*xray.LABELS, "mean"], 0.5)
    columns = ["positives", "AUROC", "low", "high"]
    names = ["epoch", "loss", "validation_loss", "validation_auroc"]
    history = pandas.DataFrame([[1, 0.5, 0.5, 0.5]], columns=names)
    xray.draw_report(xray.Path("report.png"), pandas.DataFrame(dict.fromkeys(columns, labels)), history)
"""
    environment = {"KERAS_HOME": str(tmp_path), "MPLBACKEND": "module://my_notebook.backend"}
    ended = import_keras(tmp_path, program, **environment)
    assert ended.code == 0, ended.stderr
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_settings_that_end_an_import_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "keras.json").write_text('{"floatx": "float12"}')
    ended = import_keras(tmp_path, "", KERAS_HOME=str(tmp_path))
    assert "keras.json" in one_line(ended.code, ended.stderr)


@pytest.mark.slow
def test_without_docstrings(tmp_path: Path) -> None:
    command = [sys.executable, "-OO", ROOT / "xray_tensorflow.py", "--help"]
    assert "--image-size PX" in run_process(command, cwd=tmp_path).stdout


# ---- memory ----

GROUPS = {
    "version 2": ("0::/a/b\n", {"a/memory.max": "900\n", "a/b/memory.max": "max\n"}),
    "version 2, seen as the root": ("0::/\n", {"memory.max": "900\n"}),
    "version 2, path of the host": ("0::/host/b\n", {"memory.max": "900\n"}),
    "version 1": (
        "5:cpu:/b\n4:memory:/a\n0::/\n",
        {"memory/memory.limit_in_bytes": f"{2**63}\n", "memory/a/memory.limit_in_bytes": "900\n"},
    ),
    "another's": ("5:cpu:/b\n4:memory:/a\n0::/\n", {"memory/b/memory.limit_in_bytes": "900\n"}),
    "none": ("", {}),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_memory_of_a_container(
    groups: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, files = GROUPS[groups]
    for name, limit in {"proc/self/cgroup": text, **files}.items():
        path = tmp_path / ("" if name.startswith("proc") else "sys/fs/cgroup") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(limit)
    monkeypatch.setattr(xray, "Path", lambda first, *more: Path(f"{tmp_path}{first}", *more))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert xray.memory_limit() == (physical if groups in ("another's", "none") else 900)
