"""Run a script on a bucket with all of ChestX-ray14's names, served on loopback; print memory use.

    python tests/tools/full_bucket.py Data_Entry_2017_v2020.csv.gz COMMAND

COMMAND is `python xray_tensorflow.py --image-size 64`, or `spark-submit xray_elephas.py`.

The label file is NIH's. Its images are a few synthetic films of 64 x 64 pixels, repeated: the
number of images is real, the time is not. `--credentials` is appended to the command. The last
lines are each process' peak memory.
"""

from __future__ import annotations

import csv
import gzip
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "stand_ins")]

from sample_bucket import draw_radiograph, read_rows, write_credentials  # noqa: E402
from static_s3 import static_s3  # noqa: E402

FILMS = 16


def bucket_of(labels: Path) -> dict[str, bytes]:
    """The label file, and a film for each name in it."""
    data = labels.read_bytes()
    text = gzip.decompress(data) if labels.suffix == ".gz" else data
    names = [row["Image Index"] for row in csv.DictReader(text.decode("utf-8-sig").splitlines())]
    films = [draw_radiograph(name, findings, 64) for name, findings in read_rows()[:FILMS]]
    images = {f"images/{name}": films[number % FILMS] for number, name in enumerate(names)}
    return {"Data_Entry_2017_v2020.csv": text, **images}


def peak_memory(peaks: dict[str, int]) -> None:
    """Record the peak resident memory, in MB, of each descendant process, by name and number."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it has just ended
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    waiting = [int(Path("/proc/self").resolve().name)]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:
            continue
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        if "VmHWM" in fields:
            name = f"{fields['Name']} {process}"
            peaks[name] = max(peaks.get(name, 0), int(fields["VmHWM"].split()[0]) // 1024)


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__)
        return 2
    labels, *command = sys.argv[1:]
    # Several processes: a single server would be slower than the script under test.
    with (
        tempfile.TemporaryDirectory() as folder,
        static_s3(bucket_of(Path(labels)), 0, processes=4) as endpoint,
    ):
        credentials = write_credentials(Path(folder), endpoint)
        peaks: dict[str, int] = {}
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(1):
                peak_memory(peaks)

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.monotonic()
        code = subprocess.run([*command, "--credentials", str(credentials)], check=False).returncode
        ended.set()
        watcher.join()
    print(f"{time.monotonic() - start:.0f} s, exit code {code}")
    for name, megabytes in sorted(peaks.items(), key=lambda item: -item[1])[:12]:
        print(f"{megabytes:,} MB  {name}")
    return code


if __name__ == "__main__":
    sys.exit(main())
