"""Says in one line which Python to use, where this one has no TensorFlow: pip would only say that it
found no matching distribution. Runs on any Python 3.
"""

import sys

if not (3, 10) <= sys.version_info < (3, 14):
    sys.exit(
        "check_python.py: error: this is Python {}.{}, TensorFlow's pinned versions are for 3.10 to 3.13: install"
        " python3.13 (Ubuntu: ppa:deadsnakes/ppa) and write it for python3; or `pipx install uv`, and `uv venv --seed"
        " --python 3.13 .venv` for `python3 -m venv .venv`; or run in a container: `docker run -it --rm -v"
        ' "$PWD":/xray -w /xray python:3.13 bash`'.format(*sys.version_info)
    )
