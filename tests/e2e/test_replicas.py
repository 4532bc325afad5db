"""Several replicas on one database: fair shares, rolling restarts, and a schema one step ahead."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator
from datetime import timedelta
from itertools import pairwise

import pytest

from daemon.db.migrate import Migration, load, migrate
from daemon.db.pool import Database
from daemon.domain.window import rfc3339
from tests.books_kit import Sim, assert_books_equal_truth, credential, midnight, until
from tests.e2e.conftest import Tallyd
from tests.e2e.test_daemon import EACH_TICK, connections, more_ticks
from tests.ledger_kit import assert_laws

pytestmark = pytest.mark.anyio

CONNECTIONS = 30


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    opened = await Database.open(database_url, pool_max=4)
    yield opened
    await opened.close()


@pytest.fixture
async def fleet(tallyd: Tallyd, sim: Sim) -> Tallyd:
    """Thirty connections, each a batch of its own."""
    lines = []
    for number in range(CONNECTIONS):
        name = f"c{number}"
        await sim.set_up("openai", name, history_days=1, requests_per_hour=1, live=False, sources=EACH_TICK)
        line = {
            "tenant": "acme", "provider": "openai", "name": name, "base_url": sim.base_url("openai"),
            "since": rfc3339(midnight(1)), "credential": credential("openai", name),
        }  # fmt: skip
        lines.append(json.dumps(line))
    await tallyd.here("tenants", "add", "acme")
    added = await tallyd.here("connections", "import", "-", stdin="\n".join(lines))
    assert added.code == 0, added.err
    tallyd.environment |= {"TALLYD_BATCH_SIZE": "1", "TALLYD_CONCURRENCY": "2"}
    return tallyd


async def grow(sim: Sim) -> None:
    for number in range(0, CONNECTIONS, 5):
        await sim.grow("openai", f"c{number}", 3)


async def all_booked(db: Database, sim: Sim) -> None:
    async def is_so() -> bool:
        try:
            await assert_books_equal_truth(db, sim, await connections(db), but=["costs"])
        except AssertionError:
            return False
        return True

    await until(is_so, "books equal truth", wait_s=60)


async def batches_done(db: Database, count: int) -> None:
    async def is_so() -> bool:
        return bool(await db.fetchval("select count(*) >= $1 from batch_summary", count))

    await until(is_so, f"{count} batches", wait_s=90)


async def test_three_replicas_share_the_work_fairly(fleet: Tallyd, sim: Sim, db: Database) -> None:
    replicas = [fleet.run() for _ in range(3)]
    for replica in replicas:
        await replica.has_logged("worker.started")
    await batches_done(db, 3 * CONNECTIONS)
    shares = {
        row["worker"]: row["n"]
        for row in await db.fetch("select worker, count(*) as n from attempt where outcome = 1 group by 1")
    }
    assert len(shares) == 3
    assert min(shares.values()) >= sum(shares.values()) / 3 / 3, shares
    slots = [line["slot"] for replica in replicas for line in replica.events("tick.created")]
    assert len(slots) == len(set(slots)), "one tick a slot"
    for replica in replicas:
        replica.signal(signal.SIGTERM)
        assert await replica.ended() == 0
    await all_booked(db, sim)
    await assert_laws(db)


async def test_a_rolling_restart_under_load_loses_nothing_and_skips_no_tick(
    fleet: Tallyd, sim: Sim, db: Database
) -> None:
    """Each replica is drained and replaced in turn, as an upgrade does it."""
    fleet.environment["TALLYD_TICK_SECONDS"] = "5"
    running = [fleet.run() for _ in range(3)]
    await more_ticks(db, 1, wait_s=60)
    for old in list(running):
        await grow(sim)
        new = fleet.run()
        await new.has_logged("worker.started")
        old.signal(signal.SIGTERM)
        assert await old.ended(wait_s=60) == 0
        assert old.log()[-1]["event"] == "daemon.stopped"
        await more_ticks(db, 1, wait_s=60)
    slots = [row["slot_at"] for row in await db.fetch("select slot_at from tick order by 1")]
    assert {after - before for before, after in pairwise(slots)} == {timedelta(seconds=5)}, "no slot is left out"
    assert not await db.fetchval("select count(*) from attempt where outcome = 9"), "nobody was taken for lost"
    assert not await db.fetchval("select count(*) from attempt where outcome in (2, 4)"), "nothing failed"

    await all_booked(db, sim)
    await assert_laws(db)


async def test_versions_one_schema_step_apart_work_side_by_side(fleet: Tallyd, sim: Sim, db: Database) -> None:
    """A newer version has migrated the database under this one: it goes on, and starts again. Two steps are refused."""
    replica = fleet.run()
    await more_ticks(db, 1, wait_s=60)
    newest = len(load())
    of_tomorrow = """alter table connection add column of_tomorrow text;
                     alter table tick add column of_tomorrow int not null default 7;
                     alter table batch_summary add column of_tomorrow int;
                     create table of_tomorrow (id bigint primary key)"""
    await migrate(db, [*load(), Migration(newest + 1, "of_tomorrow", of_tomorrow)])
    await db.execute("insert into job (kind, body) values ('of_tomorrow', '')")
    await db.execute(
        """insert into ready (key_id, prio, run_at, id, attempt, losses, token)
           select key_id, prio, now(), id, 0, 0, 0 from job where kind = 'of_tomorrow'"""
    )
    await grow(sim)
    await all_booked(db, sim)
    beside = fleet.run()
    await beside.has_logged("worker.started")
    await grow(sim)
    await all_booked(db, sim)
    seen = "select a.outcome from attempt a join job j using (id) where j.kind = 'of_tomorrow'"
    assert {row["outcome"] for row in await db.fetch(seen)} == {3}, "a job of a newer kind is left for who knows it"
    for old in (replica, beside):
        old.signal(signal.SIGTERM)
        assert await old.ended() == 0
    step = "insert into schema_migration (version, name, sha256) values ($1, 'of_the_day_after', '')"
    await db.execute(step, newest + 2)
    refused = fleet.run()
    assert await refused.ended() == 2
    assert "upgrade tallyd" in str(refused.log()[-1]["event"])
