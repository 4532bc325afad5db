"""What the figures run on: a durable PostgreSQL with fresh databases, simulators, and rounds that alternate."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

import anyio
import asyncpg
import msgspec

from daemon.db.embedded import Cluster
from daemon.db.migrate import migrate
from daemon.db.pool import Database

URL_VARIABLE = "TALLYD_BENCH_DATABASE_URL"
DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}


def has_uvloop() -> bool:
    """tallyd runs on it where it exists, and so does everything here."""
    return importlib.util.find_spec("uvloop") is not None


class Rounds(NamedTuple):
    """Medians of both sides, and the median of the rounds' ratios."""

    ours: float
    reference: float
    ratio: float


Measure = Callable[[], Awaitable[float]]


async def alternate(rounds: int, ours: Measure, reference: Measure) -> Rounds:
    """Measure both sides in turn, each going first in every second round."""
    pairs: list[tuple[float, float]] = []
    for number in range(rounds):
        if number % 2:
            theirs, mine = await reference(), await ours()
        else:
            mine, theirs = await ours(), await reference()
        pairs.append((mine, theirs))
    return summarise(pairs)


def summarise(pairs: list[tuple[float, float]]) -> Rounds:
    return Rounds(
        median(mine for mine, _ in pairs),
        median(theirs for _, theirs in pairs),
        median(mine / theirs for mine, theirs in pairs),
    )


@dataclass
class Stage:
    """One run of the benchmarks.

    Attributes:
        server_url: a PostgreSQL on which databases can be made.
        folder: for files; gone at the end.
        is_quick: a smoke run of tiny sizes, whose numbers mean nothing.
    """

    server_url: str
    folder: Path
    is_quick: bool
    _templates: dict[str, str] = field(default_factory=dict)

    def size(self, full: int, quick: int) -> int:
        return quick if self.is_quick else full

    def url(self, database: str) -> str:
        return urlunsplit(urlsplit(self.server_url)._replace(path=f"/{database}"))

    @asynccontextmanager
    async def database(self, like: str = "tallyd") -> AsyncIterator[str]:
        """The URL of a fresh copy of a template (see `template`); dropped at the end."""
        if like not in self._templates and like == "tallyd":
            async with self.template("tallyd") as url:
                db = await Database.open(url)
                await migrate(db)
                await db.close()
        name = await self._create(self._templates[like])
        try:
            yield self.url(name)
        finally:
            await self._sql(f"drop database {name} with (force)")

    @asynccontextmanager
    async def template(self, name: str, like: str | None = None) -> AsyncIterator[str]:
        """Fill a database that `database(like=name)` will copy."""
        base = None
        if like is not None:
            async with self.database(like):
                base = self._templates[like]
        database = await self._create(base)
        yield self.url(database)
        await self._sql("checkpoint")
        self._templates[name] = database

    async def drop_templates(self) -> None:
        for database in self._templates.values():
            await self._sql(f"drop database {database} with (force)")

    async def settings(self) -> dict[str, str]:
        """The server's version and how durable it is."""
        connection = await asyncpg.connect(self.server_url)
        try:
            names = ("server_version", *DURABLE, "shared_buffers")
            return {name: await connection.fetchval("select current_setting($1)", name) for name in names}
        finally:
            await connection.close()

    async def _create(self, like: str | None) -> str:
        name = f"tallyd_bench_{secrets.token_hex(6)}"
        await self._sql(f"create database {name}" + (f" template {like}" if like else ""))
        return name

    async def _sql(self, statement: str) -> None:
        connection = await asyncpg.connect(self.server_url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


@contextmanager
def server() -> Iterator[tuple[str, Path]]:
    """The URL of a server, and a folder. Without `TALLYD_BENCH_DATABASE_URL` it is an embedded one of our own."""
    folder = Path(tempfile.mkdtemp(prefix="tallyd-bench-"))
    folder.chmod(0o755)  # as root the server runs as another user
    try:
        if url := os.environ.get(URL_VARIABLE):
            yield url, folder
            return
        cluster = Cluster(folder)
        cluster.create()
        cluster.start(DURABLE)
        try:
            yield cluster.url(), folder
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(folder)


@contextmanager
def process(*arguments: str, env: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[bytes], bytes]]:
    """A Python process that says one line once it is ready; ended at the end."""
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, env=env)
    try:
        assert child.stdout is not None
        yield child, child.stdout.readline()
    finally:
        child.terminate()
        child.wait(timeout=30)
        assert child.stdout is not None
        child.stdout.close()


@contextmanager
def simulator(*arguments: str) -> Iterator[str]:
    """The URL of a provider simulator in a process of its own."""
    with process("-m", "daemon.simulator", "--port", "0", *arguments) as (_, ready):
        yield msgspec.json.decode(ready)["url"]


def serve(protocol: Callable[[], asyncio.Protocol]) -> None:
    """The life of a server in a process of its own: tell the port on stdout, then answer until killed."""

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0, backlog=1_024)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    anyio.run(run, backend_options={"use_uvloop": has_uvloop()})
