"""A copy of the database is a whole tallyd: restored elsewhere it goes on, and books nothing twice."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from daemon.app import open_app
from daemon.config import load
from daemon.db.embedded import Cluster
from daemon.db.pool import Database
from daemon.domain.window import rfc3339
from tests.books_kit import SECRET_KEY, Books, Sim, credential, midnight, open_books, until
from tests.conftest import FAST, in_database, run_sql
from tests.e2e.conftest import Tallyd
from tests.e2e.test_daemon import EACH_TICK, more_ticks
from tests.ledger_kit import assert_laws

pytestmark = pytest.mark.anyio

BURNT = 20_000
"""Transactions that the first server is ahead of the second one, whose own begin anew."""
AWAY = timedelta(days=3)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Cluster]:
    """A server of its own, with few transactions behind it; its folder also has the client programs."""
    folder = Path(tempfile.mkdtemp(prefix="tallyd-restored-"))
    folder.chmod(0o755)  # as root the server runs as another user
    cluster = Cluster(folder)
    try:
        cluster.create(sync=False)
        cluster.start(FAST)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture
def target_url(elsewhere: Cluster) -> Iterator[str]:
    """An empty database there."""
    name = "restored"
    run_sql(elsewhere.url(), f"create database {name}")
    yield in_database(elsewhere.url(), name)
    run_sql(elsewhere.url(), f"drop database {name} with (force)")


@pytest.fixture
def restored(target_url: str, tmp_path: Path) -> Iterator[Tallyd]:
    """tallyd on the copy."""
    folder = tmp_path / "restored"
    folder.mkdir()
    made = Tallyd(target_url, folder)
    yield made
    for replica in made.replicas:
        replica.kill()


async def run(cluster: Cluster, program: str, *arguments: str) -> str:
    done = await anyio.run_process(cluster.command(program, *arguments), check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


async def dump(cluster: Cluster, url: str, file: Path) -> None:
    await run(cluster, "pg_dump", "--format", "custom", "--file", str(file), "--dbname", url)


async def restore(cluster: Cluster, url: str, file: Path, *options: str) -> None:
    await run(cluster, "pg_restore", "--no-owner", "--exit-on-error", *options, "--dbname", url, str(file))


async def failed_checks(tallyd: Tallyd) -> list[str]:
    return [check["check"] for check in (await tallyd.here("doctor", "--json")).json if not check["ok"]]


async def rows(db: Database) -> dict[tuple[Any, ...], tuple[int, tuple[Any, ...]]]:
    """(revision, values) of each current row."""
    found = await db.fetch(
        """select stream_id, bucket_start, row_key, revision, input_tokens, output_tokens, requests, quantity, amount,
             is_tombstone from usage_row"""
    )
    return {tuple(row[:3]): (row[3], tuple(row[4:])) for row in map(tuple, found)}


async def test_a_dump_under_load_is_restored_and_goes_on(
    tallyd: Tallyd, restored: Tallyd, sim: Sim, database_url: str, target_url: str, elsewhere: Cluster, tmp_path: Path
) -> None:
    file = tmp_path / "tallyd.dump"
    async with open_books(database_url, sim) as books:
        await books.add("o", sources=EACH_TICK)
        await books.add("a", "anthropic")
        await books.add("slow", sources=EACH_TICK)
        await burn_transactions(books.db)
        for _ in range(2):
            tallyd.run(TALLYD_BATCH_SIZE="1", TALLYD_HTTP_READ_TIMEOUT_S="60")
        await until(lambda: are_booked(books), "each is booked, and read again")
        await books.fault("slow", "timeout", hold_s=40)
        async with anyio.create_task_group() as load:
            load.start_soon(grow, sim)
            await until(lambda: is_leased(books), "a batch runs that does not end")
            await dump(elsewhere, database_url, file)
            await anyio.sleep(1)
            load.cancel_scope.cancel()
        for replica in tallyd.replicas:
            replica.kill()  # the machine and its server are lost
    await sim.control("DELETE", "faults")
    await restore(elsewhere, target_url, file)

    assert await failed_checks(restored) == []
    async with reopened(target_url, sim, books) as copy:
        assert await copy.db.fetchval("select at > pg_snapshot_xmin(pg_current_snapshot()) from ready_floor")
        leased = [row["id"] for row in await copy.db.fetch("select id from lease")]
        assert leased
        before = await rows(copy.db)
        replica = restored.run(TALLYD_BATCH_SIZE="1")

        async def is_taken_over() -> bool:
            return not await copy.db.fetchval("select count(*) from job where id = any($1::bigint[])", leased)

        await until(is_taken_over, "what was leased at the time of the dump runs again")
        await more_ticks(copy.db, 2)
        for job in leased:
            endings = await copy.db.fetch("select outcome from attempt where id = $1 order by at", job)
            assert [row["outcome"] for row in endings] == [9, 1], "lost with its worker, then done, once"
        await copy.assert_equal(but=["costs", "cost"])  # what is asked for once an hour
        full = await restored.here("poll", "--all", "--full", "--json")
        assert full.code == 0, full.err
        await copy.assert_equal()
        after = await rows(copy.db)
        assert before.keys() <= after.keys()
        again = [
            key for key, (revision, values) in before.items() if after[key][1] == values and after[key][0] != revision
        ]
        assert again == [], "what did not change was not booked again"
        assert sum(after[key] == before[key] for key in before) > 20
        assert (await restored.here("poll", "--all", "--full", "--json")).json["rows"] == 0
        replica.signal(signal.SIGTERM)
        assert await replica.ended() == 0
        assert not [line for line in replica.log() if line["level"] in ("error", "raw")]
        assert await failed_checks(restored) == []


async def grow(sim: Sim) -> None:
    while True:
        await sim.grow("openai", "o", 3)
        await anyio.sleep(0.1)


async def are_booked(books: Books) -> bool:
    return int(await books.db.fetchval("select count(*) from batch_summary")) >= 2 * len(books.ids)


async def is_leased(books: Books) -> bool:
    return bool(
        await books.db.fetchval(
            "select count(*) from connection c join lease l on l.id = c.open_job where c.id = $1", books.ids["slow"]
        )
    )


async def burn_transactions(db: Database) -> None:
    await db.execute(
        f"""do $$ begin
              for i in 1..{BURNT} loop perform pg_current_xact_id(); commit; end loop;
            end $$"""
    )


@asynccontextmanager
async def reopened(url: str, sim: Sim, books: Books) -> AsyncIterator[Books]:
    """The same connections in a copy."""
    async with open_app(load({"database_url": url, "secret_key": SECRET_KEY}, {})) as app:
        yield Books(app, sim, books.ids, books.providers)


async def test_an_older_backup_catches_up_with_the_provider(
    restored: Tallyd, sim: Sim, database_url: str, target_url: str, elsewhere: Cluster, tmp_path: Path
) -> None:
    """What was booked after the backup is lost, and read again: the provider still has it."""
    file = tmp_path / "old.dump"
    async with open_books(database_url, sim) as books:
        await books.add("o", since=midnight(12), history_days=12, sources=["completions"])
        await books.poll(full=True)
        await dump(elsewhere, database_url, file)
        await books.sim.grow("openai", "o", 30)
        await books.play("o", "correction_down", bucket=rfc3339(midnight(2)))
        await books.play("o", "late_arrival", bucket=rfc3339(midnight(1)))
        await books.play("o", "correction_up", bucket=rfc3339(midnight(10)))
        await books.poll(full=True)
        sums = await books.assert_equal()
    await restore(elsewhere, target_url, file)

    async with reopened(target_url, sim, books) as copy:
        await copy.age(AWAY)
        await copy.db.execute("update connection set next_due_at = next_due_at - $1::interval", AWAY)
        assert await failed_checks(restored) == []
        done = await restored("tick", "--wait", "--json", TALLYD_TICK_SECONDS="86400")
        assert done.code == 0, done.err
        assert done.json["rows"] > 0
        with pytest.raises(AssertionError, match=r"^1 differences: o \('completions'"):
            await copy.assert_equal()  # a correction that is older than the ladder reaches
        full = await restored.here("poll", "--all", "--full", "--json")
        assert (full.code, full.json["rows"]) == (0, 1)
        assert await copy.assert_equal() == sums
        assert await failed_checks(restored) == []


async def test_a_copy_without_its_sequences_is_refused_until_they_are_mended(
    restored: Tallyd, sim: Sim, database_url: str, target_url: str, elsewhere: Cluster, tmp_path: Path
) -> None:
    """What logical replication leaves behind."""
    file, contents = tmp_path / "tallyd.dump", tmp_path / "contents"
    async with open_books(database_url, sim) as books:
        await books.add("o", sources=EACH_TICK)
        await books.poll()
        await dump(elsewhere, database_url, file)
        sequences = "select sequencename, last_value from pg_sequences where last_value is not null order by 1"
        issued = {row["sequencename"]: row["last_value"] for row in await books.db.fetch(sequences)}
    listed = (await run(elsewhere, "pg_restore", "--list", str(file))).splitlines()
    assert any("SEQUENCE SET" in line for line in listed)
    contents.write_text("\n".join(line for line in listed if "SEQUENCE SET" not in line))
    await restore(elsewhere, target_url, file, "--use-list", str(contents))

    assert {"poll_seq ahead of every fence", "ids ahead of every row"} <= set(await failed_checks(restored))
    refused = restored.run()
    assert await refused.ended() == 2
    async with reopened(target_url, sim, books) as copy:
        mended = await restored.here("doctor", "--fix", "--json")
        assert mended.code == 0, mended.out
        found = {row["sequencename"]: row["last_value"] for row in await copy.db.fetch(sequences)}
        assert found.keys() == issued.keys(), "every sequence is mended"
        assert all(found[name] >= issued[name] for name in issued if name not in ("poll_seq", "worker_id_seq"))
        await copy.sim.grow("openai", "o", 20)
        replica = restored.run()
        await replica.has_logged("batch.finished")
        await until(lambda: equals(copy, but=["costs"]), "the copy goes on")
        await assert_laws(copy.db)


async def equals(books: Books, **options: Any) -> bool:
    try:
        await books.assert_equal(**options)
    except AssertionError:
        return False
    return True


async def test_a_copied_folder_of_the_embedded_database_goes_on(sim: Sim, tmp_path: Path) -> None:
    """Stopped, then copied: database and key are in one folder."""
    folder = Path(tempfile.mkdtemp(prefix="tallyd-folder-"))
    folder.chmod(0o755)  # as root the server runs as another user  # noqa: ASYNC240 - one quick call
    first, second = (Tallyd("", folder / name) for name in ("first", "second"))
    for tallyd in (first, second):
        for name in ("TALLYD_DATABASE_URL", "TALLYD_SECRET_KEY"):
            del tallyd.environment[name]
    (folder / "first").mkdir()
    try:
        await sim.set_up("openai", "o", history_days=1, live=False, sources=EACH_TICK)
        line = {
            "tenant": "acme", "provider": "openai", "name": "o", "credential": credential("openai", "o"),
            "base_url": sim.base_url("openai"), "since": rfc3339(midnight(1)),
        }  # fmt: skip
        imported = await first.here("connections", "import", "-", stdin=json.dumps(line))
        assert imported.code == 0, imported.err
        polled = (await first.here("poll", "--all", "--json")).json
        assert polled["rows"] > 0
        assert (await first.here("db", "stop")).code == 0
        await anyio.run_process(["cp", "-a", str(folder / "first"), str(folder / "second")])
        again = (await second.here("poll", "--all", "--full", "--json")).json
        assert (again["connections"], again["rows"], again["dead"]) == (1, 0, 0)
        assert await failed_checks(second) == []
    finally:
        await first.here("db", "stop")
        await second.here("db", "stop")
        shutil.rmtree(folder)
