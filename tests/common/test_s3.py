"""S3's errors, each of which must be one line.

Against moto, a closed port and a server that always fails.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from fault_proxy import fault_proxy
from helpers import client_of, edited, label_file, make_bucket, one_line, parse
from sample_bucket import BUCKET, connect, read_rows

import xray_tensorflow as xray


def test_missing_bucket(fails: Callable) -> None:
    assert "no bucket no-such-bucket" in fails("--bucket", "no-such-bucket")


def test_missing_labels(fails: Callable) -> None:
    assert "no absent.csv" in fails("--labels", "absent.csv")


def test_no_image_below_the_prefix(fails: Callable) -> None:
    assert "'elsewhere/'" in fails("--images", "elsewhere")


@pytest.mark.parametrize("bucket", ["Not A Bucket", "x" * 300, "a\nb"])
def test_impossible_bucket_name(fails: Callable, bucket: str) -> None:
    assert "--bucket" in fails("--bucket", bucket)


def test_no_overlap_of_labels_and_images(credentials: Path, fails: Callable) -> None:
    make_bucket(credentials, "apart", label_file(read_rows()[:9]), {"99999999_000.png": b""})
    assert fails("--bucket", "apart")


def test_wrong_labels_in_the_bucket(credentials: Path, fails: Callable) -> None:
    make_bucket(credentials, "wrong", "", {"00000001_000.png": b""})
    assert "Data_Entry_2017_v2020.csv" in fails("--bucket", "wrong")


@pytest.mark.parametrize("prefix", ["images", "images/", "images//"])
def test_prefix_with_and_without_slash(credentials: Path, prefix: str) -> None:
    assert len(xray.select_images(client_of(credentials), parse("--images", prefix))) == 411


@pytest.mark.slow
def test_more_images_than_a_page_of_the_list(credentials: Path) -> None:
    names = [f"{patient:08}_000.png" for patient in range(1, 1102)]
    make_bucket(
        credentials,
        "pages",
        label_file([(name, ["Mass"]) for name in names]),
        dict.fromkeys(names, b""),
    )
    assert (
        list(xray.select_images(client_of(credentials), parse("--bucket", "pages"))["image"])
        == names
    )


def test_retries_and_pool_are_set(credentials: Path) -> None:
    config = xray.s3_client(xray.read_credentials(str(credentials))).meta.config
    assert config.max_pool_connections >= xray.FETCH_THREADS
    assert config.retries["mode"] == "standard"
    assert config.retries["total_max_attempts"] == 10


class Failing(BaseHTTPRequestHandler):
    """Answers with the server's `status` and `body`; the first `breaks` times, stops halfway."""

    def do_GET(self) -> None:
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.server.breaks -= 1
        self.wfile.write(
            self.server.body[: len(self.server.body) // (2 if self.server.breaks >= 0 else 1)]
        )

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def failing(credentials: Path, tmp_path: Path) -> Iterator[tuple]:
    """A server that always fails, and the script's client for it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        server.status, server.body, server.breaks = 200, b"", 0
        threading.Thread(target=server.serve_forever).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        yield server, client_of(edited(credentials, tmp_path, endpoint_url=endpoint))
        server.shutdown()


def select(client: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """The script's error line when it lists the images."""
    monkeypatch.setattr("sys.argv", ["xray_tensorflow.py"])
    code = xray.run_script(lambda: xray.select_images(client, parse()))
    return one_line(code, capsys.readouterr().err)


# For each code: the HTTP status that AWS sends, and what the error line must mention.
CODES = {
    "NoSuchBucket": (404, f"no bucket {BUCKET}"),
    "AccessDenied": (403, "s3:ListBucket"),
    "InvalidAccessKeyId": (403, "aws_access_key_id"),
    "SignatureDoesNotMatch": (403, "aws_secret_key_id"),
    "ExpiredToken": (400, "session token"),
    "InvalidToken": (400, "session token"),
    "TokenRefreshRequired": (400, "session token"),
    "RequestTimeTooSkewed": (403, "clock"),
    "PermanentRedirect": (301, "region_name"),
    "AuthorizationHeaderMalformed": (400, "region_name"),
    "IllegalLocationConstraintException": (400, "IllegalLocationConstraintException"),
    "SlowDown": (503, "SlowDown"),
    "InternalError": (500, "InternalError"),
    "AllAccessDisabled": (403, "AllAccessDisabled"),
}


@pytest.mark.parametrize("code", CODES)
def test_error_codes(
    failing: tuple, code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    server, client = failing
    server.status, words = CODES[code]
    body = f"<Error><Code>{code}</Code><Message>S3's words,\nin two lines</Message><Region>eu-west-1</Region></Error>"
    server.body = body.encode()
    error = select(client, monkeypatch, capsys)
    assert words in error
    assert f"{code}, S3's words, in two lines" in error


def test_an_object_that_s3_refuses_is_named_with_s3s_words(failing: tuple) -> None:
    server, client = failing
    server.status = 403
    words = "The operation is not valid for the object's storage class"
    server.body = (
        f"<Error><Code>InvalidObjectState</Code><Message>{words}</Message></Error>".encode()
    )
    with pytest.raises(xray.UserError) as error:
        list(xray.fetch_images(client, BUCKET, {0: "images/a.png"}, 32))
    for part in ("images/a.png", BUCKET, words, "restore"):
        assert part in str(error.value)


PAGES = {
    "HTML": b"<!doctype html><html><body><br>Welcome</body></html>",
    "XHTML": b"<html><body><p>Welcome</p></body></html>",
    "another list": b"<ListAllMyBucketsResult><Buckets/></ListAllMyBucketsResult>",
    "JSON": b'{"status": "ok"}',
    "nothing": b"",
}


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("status", [200, 301, 302, 307, 308, 403, 404, 502])
def test_a_server_that_is_not_s3(
    failing: tuple,
    status: int,
    page: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    server, client = failing
    server.status, server.body = status, PAGES[page]
    error = select(client, monkeypatch, capsys)
    assert "is not S3: check endpoint_url" in error
    assert "recursion" not in error


def test_a_key_that_may_list_its_prefix_alone(credentials: Path, tmp_path: Path) -> None:
    """Every request lists only the prefix, the first one included."""
    with fault_proxy(yaml.safe_load(credentials.read_text())["endpoint_url"]) as proxy:
        proxy.choose = lambda method, path: (
            "denied" if "list-type" in path and "prefix=images%2F&" not in f"{path}&" else ""
        )
        keys = xray.read_credentials(str(edited(credentials, tmp_path, endpoint_url=proxy.url)))
        arguments = parse("--images", "images")
        assert len(xray.select_images(xray.connect(keys, arguments), arguments)) == 411
        assert not proxy.injected


def test_the_folders_of_the_pngs_are_named(
    credentials: Path, tmp_path: Path, fails: Callable
) -> None:
    rows = read_rows()[:9]
    images = {f"../images_00{part}/images/{name}": b"" for part, (name, _) in enumerate(rows[:2])}
    make_bucket(credentials, "nih", label_file(rows), {})
    s3 = connect(yaml.safe_load(credentials.read_text())["endpoint_url"])
    for key in images:
        s3.put_object(Bucket="nih", Key=key[len("../") :], Body=b"")
    for prefix in ("images", ""):  # with nothing below it, or nothing that has a row
        error = fails("--bucket", "nih", "--images", prefix)
        assert "check --images" in error
        assert "'images_000/images/', 'images_001/images/'" in error
    with fault_proxy(s3.meta.endpoint_url) as proxy:  # not allowed to list more than the prefix
        proxy.choose = lambda method, path: (
            "denied" if "list-type" in path and "prefix=" not in path else ""
        )
        keys = edited(credentials, tmp_path, endpoint_url=proxy.url)
        assert fails("--bucket", "nih", "--credentials", keys).endswith(": check --images")


def test_a_listing_without_etags(credentials: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = xray.list_objects

    def without(*where: object) -> list[dict]:
        return [
            {"Key": entry["Key"], "LastModified": entry["LastModified"]} for entry in listed(*where)
        ]

    monkeypatch.setattr(xray, "list_objects", without)
    etags = xray.select_images(client_of(credentials), parse())["etag"]
    assert etags.str.match("20[0-9]{2}-").all()  # the date instead


def test_unreachable(
    credentials: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    with socket.socket() as bound:  # a port nobody listens on or gets meanwhile
        bound.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{bound.getsockname()[1]}"
        client = client_of(edited(credentials, tmp_path, endpoint_url=endpoint))
        error = select(client, monkeypatch, capsys)
    assert "cannot be reached" in error
    assert endpoint in error


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "nonsense", "http://", "http://a b/"])
def test_endpoint_that_is_no_url(
    credentials: Path, tmp_path: Path, fails: Callable, endpoint: str
) -> None:
    assert fails("--credentials", edited(credentials, tmp_path, endpoint_url=endpoint))


def test_a_body_that_breaks_off_is_asked_for_again(failing: tuple) -> None:
    server, client = failing
    server.body, server.breaks = b"x" * 1000, 3
    assert xray.fetch(client, BUCKET, "images/a.png") == server.body


def test_a_body_that_always_breaks_off_is_an_error_of_s3_and_not_of_the_image(
    failing: tuple,
) -> None:
    server, client = failing
    server.body, server.breaks = b"x" * 1000, 100
    with pytest.raises(xray.UserError, match="S3"):
        list(xray.fetch_images(client, BUCKET, {0: "images/a.png"}, 32))
