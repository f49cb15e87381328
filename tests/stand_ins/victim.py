"""xray_tensorflow.py in its own process, killed at a given moment or run to its end.

    victim.run(options, folder_for_screen, die=("event", 7))

A whole run takes about a second: processes fork from one with TensorFlow loaded but not started,
and the CNN is small. The rest is the script's own code. The moments:

    ("image", n)   SIGKILL as the n-th radiograph is decoded
    ("batch", n)   SIGKILL as the n-th batch is made, for training or validation
    ("event", n)   SIGKILL before the n-th opening for writing, renaming or removal of a file in the run folder
    ("change", n)  SIGKILL before the n-th write to S3 or deletion there
    ("byte", n)    the kernel kills the process as it writes byte n of a file, by the file size limit's signal

If n is math.inf nothing is killed, and the last line on stdout counts such moments in the run.
"""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import check_processes

import xray_tensorflow as xray

Moment = tuple[str, float]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    "KERAS_BACKEND": "tensorflow",
    "TF_ENABLE_ONEDNN_OPTS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class Ended(NamedTuple):
    """How a run ended. A negative code is the signal that ended it."""

    code: int
    stdout: str
    stderr: str


def start(
    options: list[Any], screen: Path, die: Moment | None = None, folder: Path | None = None
) -> Any:
    """Start a run in `folder`; its output goes to `screen`.out and `screen`.err."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["victim", "tensorflow", "keras", "matplotlib.figure"])
    words = [str(option) for option in options]
    process = context.Process(target=live, args=(words, screen, die, folder), daemon=True)
    with pytest.MonkeyPatch.context() as patch:  # inherited by the fork server
        for name, text in ENVIRONMENT.items():
            patch.setenv(name, text)
        process.start()
    return process


def end(process: Any, screen: Path) -> Ended:
    """Wait for the process. Fails if it hangs or a process shows a secret."""
    check_processes()
    process.join(200)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"the process hangs: {screen}")
    return Ended(
        process.exitcode, *(screen.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
    )


def run(
    options: list[Any], screen: Path, die: Moment | None = None, folder: Path | None = None
) -> Ended:
    return end(start(options, screen, die, folder), screen)


# ---- in the process ----


class Ticking(np.ndarray):
    """Pixels that count the batches taken from them."""

    def __getitem__(self, item: Any) -> np.ndarray:
        self.tick()
        return np.asarray(super().__getitem__(item))


def live(options: list[str], screen: Path, die: Moment | None, folder: Path | None) -> None:
    """Run the script's `main` with `options`, exit with its code, or die at the moment `die`."""
    for number, suffix in ((1, ".out"), (2, ".err")):
        with screen.with_suffix(suffix).open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["xray_tensorflow.py", *options]
    if folder:
        os.chdir(folder)
    xray.build_cnn = small_cnn
    xray.pin_to_cores = lambda threads: None  # it would also pin later forks of this process
    kind, count = die or ("", 0)
    counter = itertools.count(1)

    def tick() -> None:
        if next(counter) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    if kind == "image":
        xray.decode = functools.partial(lambda decode, *how: (tick(), decode(*how))[1], xray.decode)
    elif kind == "batch":
        Ticking.tick = staticmethod(tick)
        make = xray.batches
        xray.batches = lambda pixels, *rest, **how: make(pixels.view(Ticking), *rest, **how)
    elif kind == "event":
        output = options[options.index("--output") + 1]
        sys.addaudithook(lambda event, args: tick() if changes(output, event, args) else None)
    elif kind == "change":
        make_client = xray.s3_client

        def counted_client(*how: Any, **more: Any) -> Any:
            client = make_client(*how, **more)
            for operation in ("PutObject", "DeleteObject"):
                client.meta.events.register(f"before-send.s3.{operation}", lambda **_: tick())
            return client

        xray.s3_client = counted_client
    elif kind == "byte":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))
    code = xray.run_script(xray.main)
    if count == math.inf:
        print(next(counter) - 1)
    sys.exit(code)


def changes(folder: str, event: str, args: tuple) -> bool:
    """Whether an audit event changes a file below `folder`.

    https://docs.python.org/3/library/audit_events.html
    """
    if event not in ("open", "os.rename", "os.remove", "os.mkdir") or not str(args[0]).startswith(
        folder
    ):
        return False
    return event != "open" or bool(args[2] & (os.O_WRONLY | os.O_RDWR))


def small_cnn(arguments: Any, truth: np.ndarray) -> Any:
    """A network with a 6 MB checkpoint, instead of MobileNet."""
    import keras

    keras.utils.set_random_seed(arguments.seed)
    size = arguments.image_size
    inputs = keras.Input((size, size, 1), dtype="uint8", name="radiograph")
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs))
    x = keras.layers.Dense(512, activation="relu")(x)
    x = keras.layers.Dropout(0.2, name="dropout")(x)
    model = keras.Model(
        inputs, keras.layers.Dense(len(xray.LABELS), activation="sigmoid")(x), name="xray"
    )
    model.compile(
        keras.optimizers.Adam(arguments.learning_rate), "binary_crossentropy", jit_compile=False
    )
    return model
