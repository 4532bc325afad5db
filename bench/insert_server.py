"""The bare insert route: the daemon's own server, and behind it one row: `python -m bench.insert_server URL`.

Says its port, then answers `/v2/one` with a row in a commit of its own, `/v2/group` with one in a commit that it shares
with whoever comes while the last one is under way, and `/v2/bulk` with a row for each element of a JSON list.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import anyio
import asyncpg
import msgspec

from bench.stage import has_uvloop
from daemon.domain.address import Address
from daemon.queue.gather import Gatherer
from daemon.web.server import Listener, bind

TABLE = """
create table bare (
  id bigint generated always as identity primary key, at timestamptz not null default now(), header text, body bytea)
"""
_ONE = "insert into bare (header, body) values ($1, $2) returning id"
_MANY = "insert into bare (header, body) select * from unnest($1::text[], $2::bytea[]) returning id"
_HEADER = '{"Content-Type":["application/json"]}'


class _Item(msgspec.Struct):
    destination: str
    body: str


class _Bare:
    """An ASGI application with nothing in it."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._group = Gatherer(self._insert)

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        match scope["raw_path"]:
            case b"/v2/one":
                ids = [await self._pool.fetchval(_ONE, _HEADER, body)]
            case b"/v2/group":
                ids = [await self._group(body)]
            case _:
                items = msgspec.json.decode(body, type=list[_Item])
                ids = await self._insert([item.body.encode() for item in items])
        answer = msgspec.json.encode([{"messageId": str(id_)} for id_ in ids])
        headers = [(b"content-length", str(len(answer)).encode()), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _insert(self, bodies: Sequence[bytes]) -> list[int]:
        return [row["id"] for row in await self._pool.fetch(_MANY, [_HEADER] * len(bodies), [*bodies])]


async def _serve() -> None:
    async with asyncpg.create_pool(sys.argv[1], min_size=1, max_size=10) as pool:
        await pool.execute(TABLE)
        bound = bind("listen", Address("127.0.0.1", 0))
        listener = Listener(bound, [], _Bare(pool))  # type: ignore[arg-type]  # the same protocol
        print(bound.getsockname()[1], flush=True)
        await listener.run()


if __name__ == "__main__":
    anyio.run(_serve, backend_options={"use_uvloop": has_uvloop()})
