"""An S3 server that lists any number of keys fast, under any name, and sends one body for each of them."""

from __future__ import annotations

import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENTRY = "<Contents><Key>{}</Key><LastModified>2020-01-01T00:00:00.000Z</LastModified><ETag>{}</ETag></Contents>"
LIST = (
    "<ListBucketResult><EncodingType>url</EncodingType><IsTruncated>{}</IsTruncated>"
    "<NextContinuationToken>{}</NextContinuationToken>{}</ListBucketResult>"
)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if "list-type" in query:
            body = self.server.page(int(query.get("continuation-token", 0))).encode()
        else:
            key = urllib.parse.unquote(url.path).split("/", 2)[2]
            body = self.server.objects.get(key, self.server.image)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def page(self, start: int) -> str:
        """1,000 keys of the list, as S3 has it: docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html."""
        keys = self.keys[start : start + 1000]
        entries = "".join(ENTRY.format(urllib.parse.quote(key), f"&quot;{hash(key)}&quot;") for key in keys)
        return LIST.format(str(start + 1000 < len(self.keys)).lower(), start + 1000, entries)


@contextmanager
def serve(labels: bytes, names: list[str], image: bytes) -> Iterator[str]:
    """Yields the endpoint of a server, each bucket of which has the label file and the names below images/."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.keys = [f"images/{name}" for name in names]
        server.objects, server.image = {"Data_Entry_2017_v2020.csv": labels}, image
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
