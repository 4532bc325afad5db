"""The pool against a real server: time-outs, cancellation, lost connections, LISTEN."""

import anyio
import pytest

from daemon.db.pool import Database
from daemon.domain.errors import (
    ConfigError,
    ConflictError,
    DataRejectedError,
    DeadlockError,
    PermanentError,
    StorageUnavailableError,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
async def table(db: Database) -> Database:
    await db.execute("create table thing (id int primary key, name text not null check (name <> 'bad'))")
    return db


TERMINATE_OTHERS = """
    select pg_terminate_backend(pid) from pg_stat_activity
    where datname = current_database() and pid <> pg_backend_pid()
"""


async def test_block_commits_when_it_ends_and_not_when_it_raises(table: Database) -> None:
    async with table.transaction() as tx:
        await tx.execute("insert into thing values (1, 'kept')")
    with pytest.raises(LookupError):  # noqa: PT012
        async with table.transaction() as tx:
            await tx.execute("insert into thing values (2, 'lost')")
            raise LookupError
    assert await table.fetchval("select array_agg(id) from thing") == [1]


async def test_time_outs_are_local_to_the_transaction(db: Database) -> None:
    names = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout", "transaction_isolation")
    sql = "select " + ", ".join(f"current_setting('{name}')" for name in names)
    async with db.transaction(lock_timeout_ms=1234, statement_timeout_ms=4321) as tx:
        assert tuple(await tx.fetchrow(sql) or ()) == ("1234ms", "4321ms", "5s", "read committed")
    assert tuple(await db.fetchrow(sql) or ()) == ("0", "0", "0", "read committed")


async def test_cancelled_transaction_is_rolled_back_and_its_connection_usable(database_url: str) -> None:
    """A transaction left open would hold its locks until the idle time-out."""
    db = await Database.open(database_url, pool_max=1)
    await db.execute("create table thing (id int primary key)")
    started = anyio.Event()

    async def work() -> None:
        async with db.transaction() as tx:
            await tx.execute("insert into thing values (1)")
            started.set()
            await tx.execute("select pg_sleep(60)")

    async with anyio.create_task_group() as group:
        group.start_soon(work)
        await started.wait()
        group.cancel_scope.cancel()
    assert await db.fetchval("select count(*) from thing") == 0
    assert (
        await db.fetchval(
            "select count(*) from pg_stat_activity where datname = current_database() and state like 'idle in%'"
        )
        == 0
    )
    await db.close()


async def test_swallowed_error_inside_a_transaction_does_not_pass_for_a_commit(table: Database) -> None:
    with pytest.raises(PermanentError, match="could not be committed"):  # noqa: PT012
        async with table.transaction() as tx:
            await tx.execute("insert into thing values (1, 'a')")
            with pytest.raises(ConflictError):
                await tx.execute("insert into thing values (1, 'b')")
    assert await table.fetchval("select count(*) from thing") == 0


@pytest.mark.parametrize(
    ("sql", "args", "expected"),
    [
        ("insert into thing values (1, $1)", ("nul\x00",), DataRejectedError),
        ("insert into thing values (1, $1)", ("\ud800",), DataRejectedError),
        ("insert into thing values ($1, 'a')", (2**40,), DataRejectedError),
        ("insert into thing values (1, 'bad')", (), DataRejectedError),
        ("insert into thing values (1, null)", (), DataRejectedError),
        ("insert into thing values (1, 'a'), (1, 'b')", (), ConflictError),
        ("selec 1", (), PermanentError),
        ("select * from nowhere", (), PermanentError),
        ("select $1::int", (), PermanentError),
    ],
)
async def test_refused_statements_say_what_to_do(table: Database, sql: str, args: tuple, expected: type) -> None:
    with pytest.raises(expected) as caught:
        await table.execute(sql, *args)
    assert type(caught.value) is expected


async def test_conflict_names_its_constraint(table: Database) -> None:
    await table.execute("insert into thing values (1, 'a')")
    with pytest.raises(ConflictError) as caught:
        await table.execute("insert into thing values (1, 'a')")
    assert caught.value.constraint == "thing_pkey"


async def test_slow_statement_is_given_up(db: Database) -> None:
    with pytest.raises(StorageUnavailableError):
        await db.execute("select pg_sleep(60)", timeout_s=0.05)
    with pytest.raises(StorageUnavailableError, match="57014"):
        async with db.transaction(statement_timeout_ms=50) as tx:
            await tx.execute("select pg_sleep(60)")
    assert await db.fetchval("select 1") == 1


async def test_lock_that_is_not_granted_in_time_is_transient(table: Database) -> None:
    async with table.transaction() as holder:
        await holder.execute("lock table thing")
        with pytest.raises(StorageUnavailableError, match="55P03"):
            async with table.transaction(lock_timeout_ms=20) as tx:
                await tx.execute("insert into thing values (1, 'a')")


async def test_deadlock_asks_for_the_transaction_again(table: Database) -> None:
    await table.execute("insert into thing values (1, 'a'), (2, 'b')")
    await table.execute(
        "do $$ begin execute format('alter database %I set deadlock_timeout = ''20ms''', current_database()); end $$"
    )
    both = [anyio.Event(), anyio.Event()]
    failures = []

    async def update(first: int, second: int, mine: anyio.Event, other: anyio.Event) -> None:
        try:
            async with table.transaction() as tx:
                await tx.execute("update thing set name = 'x' where id = $1", first)
                mine.set()
                await other.wait()
                await tx.execute("update thing set name = 'x' where id = $1", second)
        except DeadlockError as error:
            failures.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(update, 1, 2, both[0], both[1])
        group.start_soon(update, 2, 1, both[1], both[0])
    assert len(failures) == 1


async def test_terminated_connections_are_replaced(db: Database, database_url: str) -> None:
    async with db.dedicated() as admin:
        await db.fetchval("select 1")
        with pytest.raises(StorageUnavailableError):  # noqa: PT012
            async with db.transaction() as tx:
                await admin.execute(TERMINATE_OTHERS)
                await tx.execute("select 1")
        assert await db.fetchval("select 2") == 2


async def test_starved_pool_is_transient(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.db.pool.ACQUIRE_TIMEOUT_S", 0.05)
    db = await Database.open(database_url, pool_max=1)
    async with db.transaction():
        with pytest.raises(StorageUnavailableError):
            await db.fetchval("select 1")
    await db.close()


async def test_close_does_not_wait_for_ever(database_url: str) -> None:
    db = await Database.open(database_url)
    await db.close()
    with pytest.raises(StorageUnavailableError):
        await db.fetchval("select 1")


async def test_listener_hears_and_learns_that_it_went_deaf(db: Database) -> None:
    async with db.listen("news") as news:
        await db.execute("select pg_notify('news', 'one')")
        assert await news.receive() == "one"
        async with db.dedicated() as admin:
            await admin.execute(TERMINATE_OTHERS)
        with pytest.raises(StorageUnavailableError, match="LISTEN"):
            await news.receive()


async def test_deaf_listener_does_not_grow(db: Database) -> None:
    async with db.listen("news") as news:
        await db.execute("select pg_notify('news', i::text) from generate_series(1, 500) i")
        await db.execute("select pg_notify('other', '')")
        assert await news.receive() == "1"


async def test_json_travels_as_text(db: Database) -> None:
    assert await db.fetchval("select $1::jsonb", '{"a": 1}') == '{"a": 1}'


@pytest.mark.parametrize("url", ["nonsense", "mysql://host/db", "postgresql://u@127.0.0.1:notaport/db"])
async def test_unusable_url_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigError, match="database URL"):
        await Database.open(url)


async def test_missing_database_is_a_configuration_error(database_url: str) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        await Database.open(database_url.replace("/tallyd_test_", "/no_"))


async def test_absent_server_is_transient() -> None:
    with pytest.raises(StorageUnavailableError):
        await Database.open("postgresql://u@127.0.0.1:1/db")


async def test_statement_cache_can_be_off_for_pgbouncer(database_url: str) -> None:
    db = await Database.open(database_url, statement_cache_size=0)
    async with db.transaction() as tx:
        assert await tx.fetchval("select $1::int", 5) == 5
    assert await db.fetchval("select count(*) from pg_prepared_statements") == 0
    await db.close()
