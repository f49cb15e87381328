"""A cheap, slow-answering S3 server: any number of keys in a bucket of any name, few objects.

moto's server uses several milliseconds of a core per image, too many to measure two workers'
decoding next to it, and takes minutes to fill with 112,120 keys. This one supports two requests,
listing a bucket and getting an object, and checks no signature.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

PAGE = 1000  # keys per answer of S3


def list_keys(keys: list[str], query: dict[str, list[str]]) -> bytes:
    """A page of keys, from the token on.

    docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html
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
    keys: list[str],
    seconds: float,
    served: Any,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Answer one connection's requests, each after `seconds`, and count the objects sent."""
    while not reader.at_eof():
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):  # the client has gone
            break
        place = urlsplit(head.split(b" ", 2)[1].decode())
        bucket, _, key = unquote(place.path)[1:].partition("/")
        if key:
            body = objects[key]
        elif bucket:
            body = list_keys(keys, parse_qs(place.query))
        else:
            body = str(served.value).encode()
        await asyncio.sleep(seconds)
        writer.write(
            f"HTTP/1.1 200 OK\r\nETag: {etag(key)}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        if key:
            with served:
                served.value += 1
        await writer.drain()
    writer.close()


def serve_objects(
    objects: dict[str, bytes],
    seconds: float,
    host: str,
    port: int,
    served: Any,
    started: Connection,
) -> None:
    """Serve until the process is killed; send the port to `started`."""
    keys = sorted(objects)

    async def run() -> None:
        async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await answer(objects, keys, seconds, served, reader, writer)

        server = await asyncio.start_server(client, host, port, reuse_port=True)
        started.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


@contextmanager
def static_s3(
    objects: dict[str, bytes], seconds: float, host: str = "127.0.0.1", processes: int = 1
) -> Iterator[str]:
    """Processes that serve `objects` by key in a bucket of any name; yields their endpoint URL.

    Each answer takes `seconds`. `host` is an address of this machine. The URL itself answers with
    the number of objects sent.
    """
    context = multiprocessing.get_context("spawn")
    served = context.Value("q")
    ours, its = context.Pipe()
    servers: list[Any] = []
    port = 0
    try:
        for _ in range(processes):  # the kernel divides connections among them
            work = (objects, seconds, host, port, served, its)
            servers.append(context.Process(target=serve_objects, args=work))
            servers[-1].start()
            port = ours.recv()
        yield f"http://{host}:{port}"
    finally:
        for server in servers:
            server.kill()
            server.join()
