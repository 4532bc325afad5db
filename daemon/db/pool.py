"""Connections to Postgres: a pool, short transactions, one-shot statements, LISTEN.

Nothing outside `daemon.db` sees asyncpg: its records are mappings, and its exceptions become ours (`failures.py`).
`json` and `jsonb` travel as text; callers encode and decode with msgspec. Only settings that are LOCAL to a
transaction are used, so PgBouncer in transaction mode may stand between (with `statement_cache_size=0`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import anyio
import asyncpg
from asyncpg import Record
from asyncpg.pool import PoolConnectionProxy

from daemon.db.failures import translating
from daemon.domain.errors import ConfigError, PermanentError, StorageUnavailableError

__all__ = ["Database", "Executor", "Record", "Session", "Subscription", "query"]

CONNECT_TIMEOUT_S = 10.0
ACQUIRE_TIMEOUT_S = 10.0
STATEMENT_TIMEOUT_S = 30.0
CLEANUP_TIMEOUT_S = 2.0
IDLE_IN_TRANSACTION_MS = 5_000
PING_S = 30.0
MARGIN_S = 2.0  # the server's own time-out should win, since it says why

_SQL = Path(__file__).with_name("sql")
_MARK = "-- name: "


@cache
def _queries() -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(_SQL.glob("*.sql")):
        for block in path.read_text("utf-8").split(_MARK)[1:]:
            name, _, text = block.partition("\n")
            if name.strip() in found:
                raise ValueError(f"{path.name}: a second query is named {name.strip()}")
            found[name.strip()] = text.strip()
    return found


def query(name: str) -> str:
    """The text of a `-- name: ...` block of `daemon/db/sql/*.sql`. Fetch it at import, so that a typo shows at once."""
    return _queries()[name]


class Executor(Protocol):
    """Where a statement can go: a transaction, a dedicated connection, or the database for a single statement."""

    async def fetch(self, sql: str, *args: object, timeout_s: float | None = None) -> list[Record]: ...
    async def fetchrow(self, sql: str, *args: object, timeout_s: float | None = None) -> Record | None: ...
    async def fetchval(self, sql: str, *args: object, timeout_s: float | None = None) -> Any: ...
    async def execute(self, sql: str, *args: object, timeout_s: float | None = None) -> str: ...
    async def executemany(
        self, sql: str, args: Iterable[Sequence[object]], *, timeout_s: float | None = None
    ) -> None: ...


class _Connection(asyncpg.Connection):
    # Nothing that a session keeps is ever set on a pooled connection, so there is nothing to reset: it saves a
    # round trip on each release.
    def get_reset_query(self) -> str:
        return ""


_Anyone = _Connection | PoolConnectionProxy


class Session:
    """Statements on one connection: inside a transaction, or on a connection of one's own."""

    def __init__(self, connection: _Anyone, timeout_s: float = STATEMENT_TIMEOUT_S) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._then: list[Callable[[], None]] = []

    async def fetch(self, sql: str, *args: object, timeout_s: float | None = None) -> list[Record]:
        with translating():
            return await self._connection.fetch(sql, *args, timeout=timeout_s or self._timeout_s)

    async def fetchrow(self, sql: str, *args: object, timeout_s: float | None = None) -> Record | None:
        with translating():
            return await self._connection.fetchrow(sql, *args, timeout=timeout_s or self._timeout_s)

    async def fetchval(self, sql: str, *args: object, timeout_s: float | None = None) -> Any:
        with translating():
            return await self._connection.fetchval(sql, *args, timeout=timeout_s or self._timeout_s)

    async def execute(self, sql: str, *args: object, timeout_s: float | None = None) -> str:
        """Run `sql`; without arguments it may hold several statements. Returns the command tag."""
        with translating():
            return await self._connection.execute(sql, *args, timeout=timeout_s or self._timeout_s)

    async def executemany(self, sql: str, args: Iterable[Sequence[object]], *, timeout_s: float | None = None) -> None:
        with translating():
            await self._connection.executemany(sql, args, timeout=timeout_s or self._timeout_s)

    def on_commit(self, then: Callable[[], None]) -> None:
        """Call `then` once the transaction is committed, and never if it is not."""
        self._then.append(then)

    def committed(self) -> None:
        for then in self._then:
            then()


class Subscription:
    """Notifications of one channel. A hint, not a log: those beyond 100 unread are dropped."""

    def __init__(self, connection: _Connection, channel: str) -> None:
        self._connection = connection
        self._channel = channel
        self._send, self._receive = anyio.create_memory_object_stream[str](100)

    def _on_notify(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        with suppress(anyio.WouldBlock, anyio.ClosedResourceError):
            self._send.send_nowait(str(payload))

    def _on_termination(self, _connection: object) -> None:
        self._send.close()

    async def receive(self) -> str:
        """The next payload. Pings the server while it is quiet.

        Raises:
            StorageUnavailableError: the connection is gone; what was notified meanwhile is lost, so look for yourself.
        """
        while True:
            with anyio.move_on_after(PING_S):
                try:
                    return await self._receive.receive()
                except anyio.EndOfStream:
                    raise StorageUnavailableError("database: the LISTEN connection was lost") from None
            with translating():
                await self._connection.execute("select 1", timeout=CLEANUP_TIMEOUT_S)

    async def _start(self) -> None:
        self._connection.add_termination_listener(self._on_termination)
        with translating():
            await self._connection.add_listener(self._channel, self._on_notify)

    def _stop(self) -> None:
        self._connection.remove_termination_listener(self._on_termination)
        self._send.close()
        self._receive.close()


class Database:
    """One Postgres database. Statements on it borrow a pooled connection for just that statement."""

    def __init__(self, pool: asyncpg.Pool, url: str, options: dict[str, Any]) -> None:
        self._pool = pool
        self._url = url
        self._options = options

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        pool_min: int = 1,
        pool_max: int = 10,
        statement_cache_size: int = 100,
        application_name: str = "tallyd",
    ) -> Database:
        """Connect. `statement_cache_size` must be 0 behind PgBouncer in transaction mode.

        Raises:
            ConfigError: the URL, the password or the database's name is wrong.
            StorageUnavailableError: the server does not answer.
        """
        options: dict[str, Any] = {
            "statement_cache_size": statement_cache_size,
            "server_settings": {"application_name": application_name},
            "timeout": CONNECT_TIMEOUT_S,
        }
        try:
            with translating():
                pool = asyncpg.create_pool(
                    url, min_size=pool_min, max_size=pool_max, connection_class=_Connection, **options
                )
                await pool
        except PermanentError as error:
            raise ConfigError([f"database URL: {error}; check user, password and database name"]) from error
        except ValueError as error:
            raise ConfigError(
                [f"database URL: {error}; write it as postgresql://user:password@host:5432/name"]
            ) from error
        return cls(pool, url, options)

    async def close(self) -> None:
        """Give every connection back to the server; those that are still busy after 5 s are cut."""
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(5), translating():
                await self._pool.close()
                return
            self._pool.terminate()

    @asynccontextmanager
    async def transaction(
        self, *, lock_timeout_ms: int = 5_000, statement_timeout_ms: int = 30_000
    ) -> AsyncIterator[Session]:
        """A READ COMMITTED transaction: committed when the block ends, rolled back when it raises or is cancelled.

        Settings of the session would not survive PgBouncer, so the time-outs are set for this transaction, in the
        round trip that begins it.
        """
        begin = (
            "begin isolation level read committed; "
            f"select set_config('idle_in_transaction_session_timeout', '{IDLE_IN_TRANSACTION_MS:d}', true), "
            f"set_config('lock_timeout', '{lock_timeout_ms:d}', true), "
            f"set_config('statement_timeout', '{statement_timeout_ms:d}', true)"
        )
        timeout_s = statement_timeout_ms / 1000 + MARGIN_S
        async with self._borrowed() as connection:
            try:
                with translating():
                    await connection.execute(begin, timeout=timeout_s)
                session = Session(connection, timeout_s)
                yield session
                with translating():
                    tag = await connection.execute("commit", timeout=timeout_s)
                if tag != "COMMIT":  # an error was caught inside the block, and Postgres rolled back instead
                    raise PermanentError("database: the transaction had failed and could not be committed")
            except BaseException:
                await _roll_back(connection)
                raise
        session.committed()

    @asynccontextmanager
    async def dedicated(self) -> AsyncIterator[Session]:
        """A connection of one's own, outside the pool, for what must not wait for it (heartbeats)."""
        connection = await self._connect()
        try:
            yield Session(connection)
        finally:
            await _close(connection)

    @asynccontextmanager
    async def listen(self, channel: str) -> AsyncIterator[Subscription]:
        """LISTEN on a connection of its own. Does not work through PgBouncer in transaction mode."""
        connection = await self._connect()
        subscription = Subscription(connection, channel)
        try:
            await subscription._start()  # noqa: SLF001 (one class in two halves)
            yield subscription
        finally:
            subscription._stop()  # noqa: SLF001
            await _close(connection)

    async def fetch(self, sql: str, *args: object, timeout_s: float | None = None) -> list[Record]:
        async with self._borrowed() as connection:
            return await Session(connection).fetch(sql, *args, timeout_s=timeout_s)

    async def fetchrow(self, sql: str, *args: object, timeout_s: float | None = None) -> Record | None:
        async with self._borrowed() as connection:
            return await Session(connection).fetchrow(sql, *args, timeout_s=timeout_s)

    async def fetchval(self, sql: str, *args: object, timeout_s: float | None = None) -> Any:
        async with self._borrowed() as connection:
            return await Session(connection).fetchval(sql, *args, timeout_s=timeout_s)

    async def execute(self, sql: str, *args: object, timeout_s: float | None = None) -> str:
        async with self._borrowed() as connection:
            return await Session(connection).execute(sql, *args, timeout_s=timeout_s)

    async def executemany(self, sql: str, args: Iterable[Sequence[object]], *, timeout_s: float | None = None) -> None:
        async with self._borrowed() as connection:
            await Session(connection).executemany(sql, args, timeout_s=timeout_s)

    async def now(self) -> datetime:
        """The database's clock, the only one that decides what is due."""
        instant: datetime = await self.fetchval("select clock_timestamp()")
        return instant

    @asynccontextmanager
    async def _borrowed(self) -> AsyncIterator[PoolConnectionProxy]:
        with translating():
            connection = await self._pool.acquire(timeout=ACQUIRE_TIMEOUT_S)
        try:
            yield connection
        finally:
            with anyio.CancelScope(shield=True), translating():
                await self._pool.release(connection, timeout=CLEANUP_TIMEOUT_S)

    async def _connect(self) -> _Connection:
        with translating():
            connection: _Connection = await asyncpg.connect(self._url, connection_class=_Connection, **self._options)
        return connection


async def _roll_back(connection: PoolConnectionProxy) -> None:
    """End the transaction whatever cancels us; a connection that cannot even do that is cut."""
    with anyio.CancelScope(shield=True):
        try:
            # Always: when BEGIN itself was cut off, the driver does not know yet whether it took place.
            await connection.execute("rollback", timeout=CLEANUP_TIMEOUT_S)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError):
            with suppress(asyncpg.InterfaceError):  # the driver has cut and forgotten it already
                connection.terminate()


async def _close(connection: _Connection) -> None:
    with anyio.CancelScope(shield=True):
        try:
            await connection.close(timeout=CLEANUP_TIMEOUT_S)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError):
            connection.terminate()
