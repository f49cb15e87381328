"""Name a Python to use, and exit with code 2, if this one has no TensorFlow; runs on any Python 3.

Without it, pip would say only that it found no matching distribution.
"""

import sys

if not (3, 10) <= sys.version_info < (3, 14):
    sys.stderr.write(
        "check_python.py: error: this is Python {}.{}, but the pinned TensorFlow needs 3.10 to 3.13: install"
        " python3.13 (Ubuntu: ppa:deadsnakes/ppa) and use it as python3; or `pipx install uv` and `uv venv --seed"
        " --python 3.13 .venv` instead of `python3 -m venv .venv`; or run in a container: `docker run -it --rm -v"
        ' "$PWD":/xray -w /xray python:3.13 bash`\n'.format(*sys.version_info)
    )
    sys.exit(2)
