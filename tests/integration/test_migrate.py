"""Migrations on a real server: order, fences, concurrency, and the snapshot."""

import os
from pathlib import Path

import anyio
import pytest
import structlog

from daemon.db import migrate as module
from daemon.db.migrate import Migration, dump_schema, load, migrate, status
from daemon.db.pool import Database
from daemon.domain.errors import ConfigError
from tests.books_kit import until

pytestmark = pytest.mark.anyio

SNAPSHOT = Path(module.__file__).with_name("schema.sql")
ONE = Migration(1, "one", "create table one (id int)")
TWO = Migration(2, "two", "create table two (id int); insert into one values (2)")
THREE = Migration(3, "three", "create table three (id int)")


@pytest.fixture
async def empty(empty_database_url: str):
    db = await Database.open(empty_database_url)
    yield db
    await db.close()


async def test_empty_database_reports_what_is_pending_and_stays_empty(empty: Database) -> None:
    found = await status(empty, [ONE, TWO])
    assert (found.version, found.target, found.pending) == (0, 2, ("0001_one", "0002_two"))
    assert await empty.fetchval("select to_regclass('schema_migration')") is None


async def test_migrations_run_once_and_in_order(empty: Database) -> None:
    assert (await migrate(empty, [ONE])).version == 1
    assert (await migrate(empty, [ONE, TWO])).is_current
    assert (await migrate(empty, [ONE, TWO])).version == 2
    assert await empty.fetchval("select count(*) from one") == 1


async def test_processes_that_start_together_apply_each_migration_once(empty_database_url: str) -> None:
    async def start() -> None:
        db = await Database.open(empty_database_url, pool_max=1)
        assert (await migrate(db, [ONE, TWO, THREE])).is_current
        await db.close()

    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(start)
    db = await Database.open(empty_database_url)
    assert await db.fetchval("select count(*) from one") == 1
    assert [r["version"] for r in await db.fetch("select version from schema_migration order by 1")] == [1, 2, 3]
    await db.close()


async def test_a_migration_that_waits_lets_others_pass(empty_database_url: str, empty: Database) -> None:
    """Behind a dump it would otherwise stop every flush for as long: its lock request blocks whoever comes after."""
    await migrate(empty, [ONE])
    reader = await Database.open(empty_database_url, pool_max=1)
    other = await Database.open(empty_database_url, pool_max=1)
    wider = Migration(2, "wider", "alter table one add column more int")
    waits = anyio.Event()

    def told(_logger: object, _method: str, event: dict[str, object]) -> dict[str, object]:
        if event["event"] == "migration.waiting":
            waits.set()
        raise structlog.DropEvent

    structlog.configure(processors=[told])
    async with anyio.create_task_group() as group, reader.transaction() as tx:
        await tx.execute("set local idle_in_transaction_session_timeout = 0; select from one")
        group.start_soon(migrate, empty, [ONE, wider])
        with anyio.fail_after(15):
            await waits.wait()
        await other.execute("insert into one values (7)")
    assert await other.fetchval("select count(*) from one where more is null") == 1
    await reader.close()
    await other.close()


async def test_a_migration_that_deadlocks_with_a_replica_is_tried_again(
    empty_database_url: str, empty: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica of the version before takes the same tables in another order."""
    await migrate(empty, [ONE, TWO])
    monkeypatch.setattr(module, "_LOCK_TIMEOUT_MS", 60_000)
    name = await empty.fetchval("select current_database()")
    await empty.execute(f"alter database {name} set deadlock_timeout = '3s'")
    migrator = await Database.open(empty_database_url, pool_max=1)
    replica = await Database.open(empty_database_url, pool_max=1)
    wider = Migration(3, "wider", "alter table one add column more int; alter table two add column more int")
    reasons: list[str] = []

    def told(_logger: object, _method: str, event: dict[str, object]) -> dict[str, object]:
        if event["event"] == "migration.waiting":
            reasons.append(str(event["reason"]))
        raise structlog.DropEvent

    async def is_waiting() -> bool:
        return bool(await empty.fetchval("select count(*) from pg_locks where not granted"))

    structlog.configure(processors=[told])
    async with anyio.create_task_group() as group, replica.transaction(lock_timeout_ms=60_000) as tx:
        await tx.execute("set local deadlock_timeout = '1min'; select from two")
        group.start_soon(migrate, migrator, [ONE, TWO, wider])
        await until(is_waiting, "the migration has the first table, and waits for the second one")
        await tx.execute("select from one")
    assert ["deadlock" in reason for reason in reasons] == [True]
    assert await empty.fetch("select one.more, two.more from one, two") == []
    await migrator.close()
    await replica.close()


async def test_failing_migration_leaves_nothing_of_itself(empty: Database) -> None:
    broken = Migration(2, "broken", "create table half (id int); select 1 / 0")
    with pytest.raises(Exception, match="22012"):
        await migrate(empty, [ONE, broken])
    assert (await status(empty, [ONE])).version == 1
    assert await empty.fetchval("select to_regclass('half')") is None


async def test_edited_migration_is_refused(empty: Database) -> None:
    await migrate(empty, [ONE, TWO])
    edited = Migration(1, "one", "create table one (id bigint)")
    with pytest.raises(ConfigError, match=r"0001_one was changed after it had been applied"):
        await migrate(empty, [edited, TWO])


async def test_schema_one_step_newer_is_accepted_for_rolling_upgrades(empty: Database) -> None:
    await migrate(empty, [ONE, TWO])
    assert (await migrate(empty, [ONE])).is_current


async def test_schema_two_steps_newer_is_refused_with_the_way_out(empty: Database) -> None:
    await migrate(empty, [ONE, TWO, THREE])
    with pytest.raises(ConfigError, match=r"version 3, this tallyd knows version 1 .* upgrade tallyd"):
        await migrate(empty, [ONE])


async def test_hole_in_the_history_is_refused(empty: Database) -> None:
    await migrate(empty, [ONE, TWO])
    await empty.execute("delete from schema_migration where version = 1")
    with pytest.raises(ConfigError, match=r"0001_one is missing though a later one was applied"):
        await migrate(empty, [ONE, TWO])


def test_badly_numbered_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "0002_second.sql").write_text("select 1")
    with pytest.raises(ValueError, match="not numbered 1 to 1"):
        load(tmp_path)
    (tmp_path / "first.sql").write_text("select 1")
    with pytest.raises(ValueError, match=r"first\.sql is not named like"):
        load(tmp_path)


async def test_snapshot_and_migrations_build_the_same_catalogue(db: Database, empty: Database) -> None:
    """`schema.sql` is what people read and review, so it must be what the migrations really make."""
    made = await dump_schema(db)
    if "TALLYD_TEST_REGENERATE" in os.environ:
        SNAPSHOT.write_text(made, "utf-8")
    text = SNAPSHOT.read_text("utf-8")
    await empty.execute(text)
    assert await dump_schema(empty) == made
    assert made == text, "regenerate it: TALLYD_TEST_REGENERATE=1 pytest tests/integration/test_migrate.py"
    columns = """
        select table_name, column_name, ordinal_position, data_type, column_default, is_nullable, is_identity
        from information_schema.columns c join pg_class p on p.oid = format('%I', table_name)::regclass
        where table_schema = 'public' and not relispartition order by 1, 3
    """
    assert [tuple(r) for r in await empty.fetch(columns)] == [tuple(r) for r in await db.fetch(columns)]


async def test_dump_refuses_what_it_cannot_write(empty: Database) -> None:
    await empty.execute("create type mood as enum ('good')")
    with pytest.raises(ValueError, match="mood"):
        await dump_schema(empty)
