"""An S3 server of any number of keys, under any name, and of few objects: it costs little CPU, and
answers late.

moto's server takes several milliseconds of a core for each image, next to which two workers'
decoding could not be measured, and minutes to be filled with 112,120 keys. This one knows two
requests, the list of a bucket and an object, and checks no signature.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from urllib.parse import parse_qs, quote, unquote, urlsplit

PAGE = 1000  # keys in an answer of S3


def list_keys(keys: list[str], query: dict[str, list[str]]) -> bytes:
    """The keys from the token on:
    docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html.
    """
    keys = [key for key in keys if key.startswith(query.get("prefix", [""])[0])]
    first = int(query.get("continuation-token", ["0"])[0])
    last = first + min(PAGE, int(query.get("max-keys", [PAGE])[0]))
    more = f"<NextContinuationToken>{last}</NextContinuationToken>" if last < len(keys) else ""
    entries = (
        f"<Contents><Key>{quote(key)}</Key><ETag>{etag(key)}</ETag></Contents>"
        for key in keys[first:last]
    )
    flags = f"<EncodingType>url</EncodingType><IsTruncated>{str(bool(more)).lower()}</IsTruncated>"
    return f"<ListBucketResult>{flags}{more}{''.join(entries)}</ListBucketResult>".encode()


def etag(key: str) -> str:
    return f'"{zlib.crc32(key.encode()):08x}"'


async def answer(
    objects: dict[str, bytes],
    seconds: float,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Answer the requests of one connection, each after `seconds`."""
    keys = sorted(objects)
    while not reader.at_eof():
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            break
        place = urlsplit(head.split(b" ", 2)[1].decode())
        _, _, key = unquote(place.path)[1:].partition("/")
        body = objects[key] if key else list_keys(keys, parse_qs(place.query))
        await asyncio.sleep(seconds)
        writer.write(
            f"HTTP/1.1 200 OK\r\nETag: {etag(key)}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        await writer.drain()
    writer.close()


def serve_objects(
    objects: dict[str, bytes], seconds: float, host: str, started: Connection
) -> None:
    """Serve until the process is killed; the port is sent to `started`."""

    async def run() -> None:
        async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await answer(objects, seconds, reader, writer)

        server = await asyncio.start_server(client, host, 0)
        started.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


@contextmanager
def static_s3(objects: dict[str, bytes], seconds: float, host: str = "127.0.0.1") -> Iterator[str]:
    """A process that serves `objects` by key, in a bucket of any name, `seconds` late each, at an
    address `host` of this machine: yields its endpoint URL.
    """
    ours, its = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve_objects, args=(objects, seconds, host, its)
    )
    server.start()
    try:
        yield f"http://{host}:{ours.recv()}"
    finally:
        server.kill()
        server.join()
