"""`tallyd run` behind a real PgBouncer in transaction mode: nothing of it may lean on a session."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import anyio
import pytest

from daemon.db.migrate import migrate
from daemon.db.pool import Database
from daemon.domain.job import NewJob
from daemon.queue.postgres import PostgresQueue
from daemon.queue.wake import CHANNEL
from tests.books_kit import Books, Sim, open_books, until
from tests.e2e.conftest import Tallyd
from tests.e2e.test_backup import equals
from tests.e2e.test_daemon import EACH_TICK, more_ticks

pytestmark = pytest.mark.anyio

POOL_SIZE = 4
"""Connections to Postgres for all of a test's processes: two replicas alone have more clients than that."""
DEAF_S = 1.0
FOUND_S = 5.0
"""A replica looks every 0.5 to 2 s; the rest is for a machine that is busy."""


def binary() -> str:
    found = shutil.which(
        "pgbouncer", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
    )
    if found is None:
        assert not os.environ.get("CI"), "pgbouncer is not installed; in CI these tests must run"
        pytest.skip("pgbouncer is not installed")
    return found


class Bouncer:
    """One PgBouncer before one server, ended by its own pid. It keeps its port, so that clients find it again."""

    def __init__(self, server_url: str, folder: Path, *, pool_size: int = POOL_SIZE) -> None:
        self._binary = binary()
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        parts = urlsplit(server_url)
        host = parse_qs(parts.query).get("host", [parts.hostname or "127.0.0.1"])[0]
        server = {"host": host, "port": str(parts.port or 5432), "user": unquote(parts.username or "postgres")}
        if parts.password:
            server["password"] = unquote(parts.password)
        self._account = _account(host)
        self._config = folder / "pgbouncer.ini"
        self._config.write_text(
            f"""[databases]
* = {" ".join(f"{name}='{value}'" for name, value in server.items())}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {self.port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 200
"""
        )

    def url(self, server_url: str) -> str:
        """The same database, through here."""
        return f"postgresql://anyone@127.0.0.1:{self.port}{urlsplit(server_url).path}"

    async def start(self) -> None:
        as_user = ["-u", self._account] if self._account else []
        with (self._folder / "pgbouncer.log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - it is started, not waited for
                [self._binary, *as_user, str(self._config)], stdout=log, stderr=log
            )

        async def answers() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, (self._folder / "pgbouncer.log").read_text()
            try:
                await (await anyio.connect_tcp("127.0.0.1", self.port)).aclose()
            except OSError:
                return False
            return True

        await until(answers, "pgbouncer listens")

    def logins(self) -> int:
        """Clients that came so far."""
        return (self._folder / "pgbouncer.log").read_text().count("login attempt")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _account(host: str) -> str | None:
    """PgBouncer refuses to run as root: then it runs as the user who may open the server's socket."""
    if os.geteuid() != 0:
        return None
    owner = pwd.getpwuid(Path(host).stat().st_uid).pw_name if host.startswith("/") else "nobody"
    return "nobody" if owner == "root" else owner


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where another user may read the configuration."""
    made = Path(tempfile.mkdtemp(prefix="tallyd-pgbouncer-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
async def bouncer(server_url: str, folder: Path) -> AsyncIterator[Bouncer]:
    made = Bouncer(server_url, folder)
    await made.start()
    yield made
    made.kill()


@pytest.fixture
def tallyd(bouncer: Bouncer, empty_database_url: str, tmp_path: Path) -> Iterator[Tallyd]:
    """Knows the way through PgBouncer alone; its database has no schema yet."""
    made = Tallyd(bouncer.url(empty_database_url), tmp_path)
    made.environment["TALLYD_STATEMENT_CACHE_SIZE"] = "0"
    yield made
    for replica in made.replicas:
        replica.kill()


@pytest.fixture
async def db(empty_database_url: str) -> AsyncIterator[Database]:
    """The same database, not through PgBouncer, with its schema."""
    opened = await Database.open(empty_database_url, pool_max=2, application_name="test")
    await migrate(opened)
    yield opened
    await opened.close()


async def test_two_replicas_migrate_tick_and_book(tallyd: Tallyd, sim: Sim, empty_database_url: str) -> None:
    """Both start at once before an empty database, so that the lock of the migrations is tried too."""
    for _ in range(2):
        tallyd.run()
    for replica in tallyd.replicas:
        await replica.has_logged("daemon.started")
    async with open_books(empty_database_url, sim) as books:
        await add_two(books)
        await until(lambda: equals(books), "all is booked")
        await books.sim.grow("openai", "o", 20)
        await until(lambda: equals(books, but=["costs"]), "what has grown is booked")
        await more_ticks(books.db, 2)

        checks = (await tallyd.here("doctor", "--json")).json
        assert [check for check in checks if not check["ok"]] == []
        assert not await books.db.fetchval("select count(*) from pg_locks where locktype = 'advisory'")
        for replica in tallyd.replicas:
            replica.signal(signal.SIGTERM)
        assert [await replica.ended() for replica in tallyd.replicas] == [0, 0]
        assert not await books.db.fetchval("select count(*) from lease")
        await books.assert_equal(but=["costs"])
    made = [line["slot"] for replica in tallyd.replicas for line in replica.events("tick.created")]
    assert len(made) == len(set(made)) >= 3
    assert {line["level"] for replica in tallyd.replicas for line in replica.log()} <= {"info", "debug"}


async def test_clients_share_few_connections(tallyd: Tallyd, empty_database_url: str, bouncer: Bouncer) -> None:
    """Two replicas have five clients each at the least; Postgres sees `default_pool_size`."""
    for _ in range(2):
        tallyd.run(TALLYD_DATABASE_POOL_MIN="3")
    for replica in tallyd.replicas:
        await replica.has_logged("worker.started")
    db = await Database.open(empty_database_url, pool_max=2, application_name="test")

    async def has_ticked() -> bool:
        return bool(await db.fetchval("select count(*) >= 2 from tick"))

    try:
        await until(has_ticked, "two ticks")
        shown = (
            "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'tallyd'"
        )
        assert 0 < await db.fetchval(shown) <= POOL_SIZE
        assert bouncer.logins() >= 2 * 5
    finally:
        await db.close()


async def test_nobody_is_notified_and_work_is_found_all_the_same(
    tallyd: Tallyd, bouncer: Bouncer, empty_database_url: str, db: Database
) -> None:
    """LISTEN is taken there and reaches nobody, so that only polling finds the work."""
    replica = tallyd.run(TALLYD_TICK_SECONDS="86400")
    await replica.has_logged("worker.started")
    through = await Database.open(bouncer.url(empty_database_url), pool_max=2, statement_cache_size=0)
    try:
        async with through.listen(CHANNEL) as notices:
            with anyio.move_on_after(DEAF_S) as deaf:
                await db.execute("select pg_notify($1, '')", CHANNEL)
                await notices.receive()
            assert deaf.cancelled_caught
    finally:
        await through.close()
    queue = PostgresQueue(db)
    waited = []
    for _ in range(5):
        (job,) = await queue.enqueue([NewJob("of a newer version")])
        await queue.waker.flush()
        ended = (
            "select extract(epoch from a.at - j.created_at)::float8 from attempt a join job j using (id) where id = $1"
        )
        await until(partial(db.fetchval, ended, job), "the job is found", wait_s=15)
        waited.append(await db.fetchval(ended, job))
    assert max(waited) < FOUND_S, waited


async def test_pgbouncer_that_dies_and_returns_is_met_again(
    tallyd: Tallyd, sim: Sim, bouncer: Bouncer, empty_database_url: str
) -> None:
    async with open_books(empty_database_url, sim) as books:
        await add_two(books)
        for _ in range(2):
            tallyd.run()
        await until(lambda: equals(books), "all is booked")
        for _ in range(2):
            goals = [len(replica.events("tick.postponed")) + 1 for replica in tallyd.replicas]
            bouncer.kill()
            await until(lambda: have_postponed(tallyd, goals), "both replicas find it gone")  # noqa: B023 - awaited here
            await books.sim.grow("openai", "o", 10)
            await bouncer.start()
            await more_ticks(books.db, 2, wait_s=45)

        async def is_booked() -> bool:
            # A batch that lost its database waits for its next attempt before its connections are due again.
            await books.db.execute("update due set run_at = now()")
            return await equals(books, but=["costs"])

        await until(is_booked, "the books are equal again")
    assert [replica.process.poll() for replica in tallyd.replicas] == [None, None]
    assert not [line for replica in tallyd.replicas for line in replica.log() if line["level"] == "raw"]


async def add_two(books: Books) -> None:
    await books.add("o", sources=EACH_TICK)
    await books.add("a", "anthropic")


async def have_postponed(tallyd: Tallyd, goals: list[int]) -> bool:
    return all(len(r.events("tick.postponed")) >= goal for r, goal in zip(tallyd.replicas, goals, strict=True))


async def test_time_outs_end_with_their_transaction(server_url: str, empty_database_url: str, folder: Path) -> None:
    """All clients share one connection to the server, so that whatever one of them left there meets the next one."""
    bouncer = Bouncer(server_url, folder, pool_size=1)
    await bouncer.start()
    names = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout", "transaction_isolation")
    sql = "select pg_backend_pid(), " + ", ".join(f"current_setting('{name}')" for name in names)
    url = bouncer.url(empty_database_url)
    one, other = [await Database.open(url, pool_max=2, statement_cache_size=0) for _ in range(2)]
    try:
        pid, *at_rest = tuple(await other.fetchrow(sql) or ())
        async with one.transaction(lock_timeout_ms=1234, statement_timeout_ms=4321) as tx:
            assert tuple(await tx.fetchrow(sql) or ()) == (pid, "1234ms", "4321ms", "5s", "read committed")
        assert tuple(await other.fetchrow(sql) or ()) == (pid, *at_rest)
        started = anyio.Event()

        async def is_cut_off() -> None:
            async with one.transaction(lock_timeout_ms=1234, statement_timeout_ms=60_000) as tx:
                started.set()
                await tx.execute("select pg_sleep(60)")

        async with anyio.create_task_group() as group:
            group.start_soon(is_cut_off)
            await started.wait()
            group.cancel_scope.cancel()
        async with other.transaction() as tx:
            assert tuple(await tx.fetchrow(sql) or ())[1:] == ("5s", "30s", "5s", "read committed")
        assert tuple(await other.fetchrow(sql) or ())[1:] == tuple(at_rest)
    finally:
        await one.close()
        await other.close()
        bouncer.kill()
