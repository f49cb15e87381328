"""The AWS kit: its JSON against AWS's models, its page's commands against moto and stubs."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import boto3
import botocore.session
import pytest
from botocore.validate import ParamValidator
from helpers import ROOT, shellcheck
from sample_bucket import serve

xray_elephas = pytest.importorskip("xray_elephas")

PAGE = ROOT / "docs" / "aws.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KEYS = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
# First on PATH, for what is not AWS's API: hosts to log in to, NIH's server, answers moto lacks.
STUBS = {
    "ssh": 'echo "ssh $*" >> calls',
    "scp": 'echo "scp $*" >> calls; ls $(tr " " "\\n" <<< "$*" | grep -E "^(xray|requirements|cred)") > /dev/null',
    "curl": """case "$*" in
        *checkip*) echo 192.0.2.1 ;;
        *https://nihcc.box.com/*.gz) cat "$(basename "${@: -1}")" ;;
        *) exit 22 ;;
    esac""",
    "aws": """case "$*" in
        "ssm get-parameter"*) echo ami-03cf127a ;;
        "service-quotas get-service-quota"* | "emr create-default-roles" | *"--group-id None"*) ;;
        *) exec "$REAL_AWS" "$@" ;;
    esac""",
}


def blocks(page: Path) -> list[str]:
    """The bash blocks of a page."""
    return re.findall(r"(?ms)^```bash\n(.*?)^```$", page.read_text())


def document(name: str) -> dict:
    return json.loads((ROOT / "docs" / name).read_text())


@pytest.fixture
def endpoint() -> Iterator[str]:
    """A moto server: all AWS services at one address."""
    with serve() as endpoint:
        yield endpoint


def test_the_cluster_is_one_that_emr_takes(endpoint: str) -> None:
    cluster = document("emr_cluster.json")
    model = botocore.session.get_session().get_service_model("emr").operation_model("RunJobFlow")
    errors = ParamValidator().validate(cluster, model.input_shape)
    assert not errors.has_errors(), errors.generate_report()
    emr = boto3.client("emr", endpoint_url=endpoint, **KEYS)
    made = emr.describe_cluster(ClusterId=emr.run_job_flow(**cluster)["JobFlowId"])["Cluster"]
    assert made["ReleaseLabel"] == "emr-7.12.0"
    assert made["Configurations"] == cluster["Configurations"]
    assert made["LogUri"].startswith("s3://my-xray-bucket/")


def test_an_executor_fits_a_node() -> None:
    """docs/aws.md: 12,288 MB a node, 896 of them for YARN's application master on one."""
    conf = {
        "spark.executor.cores": "4",
        "spark.executor.instances": "2",
    }  # as in the page's spark-submit
    settings = xray_elephas.spark_settings(xray_elephas.elephas_parser().parse_args([]), conf)
    overhead = int(settings["spark.executor.memoryOverhead"].rstrip("m"))
    (spark,) = document("emr_cluster.json")["Configurations"]
    assert spark["Properties"]["spark.executor.memory"] == "3g"
    executor = 3 * 1024 + overhead
    executor += -executor % 32
    assert executor + 512 + 384 <= 12288
    assert f"{executor:,} MB" in PAGE.read_text()


@pytest.mark.parametrize(
    ("name", "rights"),
    [
        (
            "iam_policy.json",
            {
                ("s3:ListBucket", "my-xray-bucket"),
                ("s3:GetObject", "my-xray-bucket/*"),
                ("s3:ListBucket", "my-xray-runs"),
                ("s3:GetObject", "my-xray-runs/run-*"),
                ("s3:PutObject", "my-xray-runs/run-*"),
                ("s3:DeleteObject", "my-xray-runs/run-*"),
            },
        ),
        (
            "iam_emr_policy.json",
            {
                ("s3:GetObject", "my-xray-bucket/elephas_libs.sh"),
                ("s3:PutObject", "my-xray-bucket/logs/*"),
            },
        ),
    ],
)
def test_a_policy_gives_these_rights_and_no_others(
    name: str, rights: set[tuple[str, str]], endpoint: str
) -> None:
    policy = document(name)
    assert policy["Version"] == "2012-10-17"
    assert {statement["Effect"] for statement in policy["Statement"]} == {"Allow"}
    given = set()
    for statement in policy["Statement"]:
        actions = statement["Action"]
        for action in actions if isinstance(actions, list) else [actions]:
            given.add((action, statement["Resource"].replace("arn:aws:s3:::", "", 1)))
        lists_runs = statement["Resource"] == "arn:aws:s3:::my-xray-runs"
        assert statement.get("Condition") == (
            {"StringLike": {"s3:prefix": "run-*"}} if lists_runs else None
        )
    assert given == rights
    iam = boto3.client("iam", endpoint_url=endpoint, **KEYS)
    # Like IAM, moto checks the grammar.
    iam.create_policy(PolicyName="xray", PolicyDocument=json.dumps(policy))
    with pytest.raises(iam.exceptions.MalformedPolicyDocumentException):
        iam.create_policy(
            PolicyName="bad", PolicyDocument=json.dumps(policy).replace("Allow", "Permit")
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_pages_commands_are_bash(page: Path) -> None:
    for block in blocks(page):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_shellcheck_of_the_pages_commands() -> None:
    script = "#!/usr/bin/env bash\n" + "\n".join(blocks(PAGE))
    assert shellcheck("-e", "SC1091", "-", text=script) == ""


@pytest.fixture
def desk(tmp_path: Path, endpoint: str) -> tuple[Path, dict[str, str]]:
    """A copy of the repository's and NIH's files, and an environment with moto and the stubs."""
    folder, stubs = tmp_path / "desk", tmp_path / "stubs"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "tests", "runs", "cache"))
    stubs.mkdir()
    for name, body in STUBS.items():
        (stubs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (stubs / name).chmod(0o755)
    for number in (1, 2):
        with tarfile.open(folder / f"images_00{number}.tar.gz", "w:gz") as archive:
            for image in range(3):
                entry = tarfile.TarInfo(f"images/0000000{number}_00{image}.png")
                entry.size = 5
                archive.addfile(entry, io.BytesIO(b"bytes"))
    (folder / "batch_download_zips.py").write_text(
        "links = [\n    'https://nihcc.box.com/shared/static/images_001.tar.gz',\n"
        "\t'https://nihcc.box.com/shared/static/images_002.tar.gz'\n]\n"
    )
    for name in ("Data_Entry_2017_v2020.csv", "test_list.txt"):
        (folder / name).touch()
    return folder, {
        "HOME": str(tmp_path),
        "PATH": f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "REAL_AWS": str(shutil.which("aws")),
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_PAGER": "",
    }


def names(endpoint: str) -> set[str]:
    """The keys in the page's bucket."""
    found = boto3.client("s3", endpoint_url=endpoint, **KEYS).list_objects_v2(
        Bucket="my-xray-bucket"
    )
    return {entry["Key"] for entry in found["Contents"]}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("aws"), reason="needs AWS CLI")
def test_the_page_from_top_to_bottom(desk: tuple[Path, dict[str, str]], endpoint: str) -> None:
    folder, environment = desk
    # Skip commands for an instance, and output that needs a cluster.
    here = [
        block for block in blocks(PAGE) if not re.search(r"pip install|spark-submit|yarn ", block)
    ]
    assert len(here) == len(blocks(PAGE)) - 6

    def run(commands: list[str]) -> str:
        script = (
            "set -euxo pipefail\n"
            + "\n".join(commands)
            + "\ndeclare -p AWS_DEFAULT_REGION BUCKET RUNS CLUSTER > state\n"
        )
        command = ["bash", "-c", script]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(here[:-2])
    images = {f"images/0000000{number}_00{image}.png" for number in (1, 2) for image in range(3)}
    assert names(endpoint) == images | {
        "Data_Entry_2017_v2020.csv",
        "test_list.txt",
        "elephas_libs.sh",
    }
    lines = dict(line.split(": ") for line in (folder / "credentials.yml").read_text().splitlines())
    assert set(lines) == {"aws_access_key_id", "aws_secret_key_id", "region_name"}
    assert (folder / "credentials.yml").stat().st_mode & 0o077 == 0
    emr = boto3.client("emr", endpoint_url=endpoint, **KEYS)
    ec2 = boto3.client("ec2", endpoint_url=endpoint, **KEYS)
    assert len(emr.list_clusters(ClusterStates=["WAITING"])["Clusters"]) == 1

    run([(folder / "state").read_text(), *here[-2:]])
    assert emr.list_clusters(ClusterStates=["WAITING"])["Clusters"] == []
    # moto does not terminate a cluster's instances.
    found = ec2.describe_instances(Filters=[{"Name": "key-name", "Values": ["xray"]}])[
        "Reservations"
    ]
    assert [reservation["Instances"][0]["State"]["Name"] for reservation in found] == [
        "terminated"
    ] * 3
    assert boto3.client("s3", endpoint_url=endpoint, **KEYS).list_buckets()["Buckets"] == []
    assert boto3.client("iam", endpoint_url=endpoint, **KEYS).list_users()["Users"] == []
    assert not list(folder.glob("*.pem")) + list(folder.glob("credentials.yml"))
