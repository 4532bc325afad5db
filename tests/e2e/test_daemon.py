"""`tallyd run` and the commands that do its work by hand, as processes."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from decimal import Decimal
from functools import partial
from pathlib import Path

import anyio
import pytest

from daemon.db.embedded import Cluster
from daemon.db.pool import Database
from daemon.domain.connection import ConnectionId
from daemon.domain.window import floor_to, rfc3339
from tests.books_kit import Sim, assert_books_equal_truth, credential, midnight, until
from tests.cli_kit import Result
from tests.e2e.conftest import Replica, Tallyd
from tests.ledger_kit import assert_laws

pytestmark = pytest.mark.anyio

EACH_TICK = ("completions",)
"""What OpenAI's other reports hold is asked for when the costs, which are read once an hour, have moved."""
SUMMARY = {
    "connections", "unchanged", "stored", "restated", "retried", "dead", "requests", "requests_saved", "rows",
    "items", "duration_s",
}  # fmt: skip


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    opened = await Database.open(database_url, pool_max=4)
    yield opened
    await opened.close()


async def add(
    tallyd: Tallyd, sim: Sim, provider: str, name: str, tenant: str = "acme", sources: tuple[str, ...] = ()
) -> Result:
    await sim.set_up(provider, name, history_days=1, requests_per_hour=4, live=False, sources=sources)
    await tallyd.here("tenants", "add", tenant)
    added = await tallyd.here(
        "connections", "add", "--tenant", tenant, "--provider", provider, "--name", name, "--credential-stdin",
        "--base-url", sim.base_url(provider), "--since", rfc3339(midnight(1)), stdin=credential(provider, name),
    )  # fmt: skip
    assert added.code == 0, added.err
    return added


async def connections(db: Database) -> list[ConnectionId]:
    return [ConnectionId(row["id"]) for row in await db.fetch("select id from connection")]


async def ticks_done(db: Database) -> int:
    """Those with work in them: while a batch has every connection open, ticks are made that have none."""
    return int(await db.fetchval("select count(*) from tick where finished_at is not null and batches > 0"))


async def more_ticks(db: Database, count: int = 2, *, wait_s: float = 30) -> None:
    goal = await ticks_done(db) + count

    async def is_so() -> bool:
        return await ticks_done(db) >= goal

    await until(is_so, f"{count} more ticks", wait_s=wait_s)


async def hangs(sim: Sim) -> bool:
    """The request that gets no answer has come; whoever asks next gets one."""
    return bool((await sim.control("GET", "stats"))["faults"].get("timeout"))


# ── The daemon ──────────────────────────────────────────────────────────────────────────────────


async def test_run_ticks_books_and_drains(tallyd: Tallyd, sim: Sim, db: Database) -> None:
    await add(tallyd, sim, "openai", "o", sources=EACH_TICK)
    await add(tallyd, sim, "anthropic", "a")
    replica = tallyd.run()
    await more_ticks(db)
    await assert_books_equal_truth(db, sim, await connections(db))
    await sim.grow("openai", "o", 20)
    await more_ticks(db)
    await assert_books_equal_truth(db, sim, await connections(db), but=["costs"])
    status = (await tallyd.here("status", "--json")).json
    assert (status["replicas"], status["connections"], status["dead_letters"]) == (1, {"active": 2}, 0)
    replica.signal(signal.SIGTERM)
    assert await replica.ended() == 0
    assert [line["event"] for line in replica.log()][-1] == "daemon.stopped"
    assert not await db.fetchval("select count(*) from lease")
    assert not await db.fetchval("select count(*) from worker where stopped_at is null")
    assert (await tallyd.here("status", "--json")).json["replicas"] == 0
    await assert_laws(db)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_the_running_batch_end(
    tallyd: Tallyd, sim: Sim, db: Database, number: signal.Signals
) -> None:
    await add(tallyd, sim, "openai", "slow")
    await sim.fault("slow_drip", "openai", "slow", count=4, drip_s=0.03)
    replica = tallyd.run()

    async def is_leased() -> bool:
        return bool(await db.fetchval("select count(*) from lease"))

    await until(is_leased, "a batch runs")
    replica.signal(number)
    assert await replica.ended() == 0
    assert await db.fetchval("select count(*) from batch_summary") == 1
    assert not await db.fetchval("select (select count(*) from lease) + (select count(*) from ready)")
    await assert_books_equal_truth(db, sim, await connections(db))


async def test_a_second_signal_forces_the_end_and_another_replica_takes_over(
    tallyd: Tallyd, sim: Sim, db: Database
) -> None:
    await add(tallyd, sim, "openai", "hangs")
    await sim.fault("timeout", "openai", "hangs", hold_s=60)
    replica = tallyd.run(TALLYD_HTTP_READ_TIMEOUT_S="60")

    async def is_leased() -> bool:
        return bool(await db.fetchval("select count(*) from lease"))

    await until(partial(hangs, sim), "a batch runs")
    assert await is_leased()
    replica.signal(signal.SIGTERM)
    await replica.has_logged("daemon.draining")
    assert replica.process.poll() is None
    replica.signal(signal.SIGTERM)
    assert await replica.ended() == 1
    assert await is_leased(), "nobody said goodbye"
    tallyd.run()
    await more_ticks(db, 1, wait_s=60)

    async def is_rescued() -> bool:
        return bool(await db.fetchval("select count(*) from attempt where outcome = 9")) and not await is_leased()

    await until(is_rescued, "the batch of the dead replica runs elsewhere", wait_s=60)
    await more_ticks(db, 1)
    await assert_books_equal_truth(db, sim, await connections(db))
    await assert_laws(db)


async def test_a_service_that_crashes_ends_the_process(tallyd: Tallyd, db: Database) -> None:
    """Not an outage of Postgres, which every service outlives: a defect, here a table that is gone."""
    replica = tallyd.run()
    await replica.has_logged("daemon.started")
    await db.execute("alter table lease rename to lost")
    assert await replica.ended(wait_s=60) not in (0, None)


async def test_three_replicas_make_one_tick_a_slot(tallyd: Tallyd, sim: Sim, db: Database) -> None:
    await add(tallyd, sim, "openai", "o")
    for _ in range(3):
        tallyd.run()
    await more_ticks(db, 4, wait_s=60)
    made = [line["slot"] for replica in tallyd.replicas for line in replica.events("tick.created")]
    assert len(made) == len(set(made))
    assert {line["level"] for replica in tallyd.replicas for line in replica.log()} <= {"info", "debug"}
    await assert_books_equal_truth(db, sim, await connections(db))


# ── Without a database ──────────────────────────────────────────────────────────────────────────


async def test_a_database_that_drops_everyone_is_met_again(tallyd: Tallyd, sim: Sim, db: Database) -> None:
    await add(tallyd, sim, "openai", "o", sources=EACH_TICK)
    await add(tallyd, sim, "anthropic", "a")
    replica = tallyd.run()
    await more_ticks(db, 1)
    for _ in range(5):
        await sim.grow("openai", "o", 5)
        await db.execute(
            """select pg_terminate_backend(pid) from pg_stat_activity
               where datname = current_database() and pid <> pg_backend_pid()"""
        )
        await more_ticks(db, 1, wait_s=45)

    async def is_booked() -> bool:
        # A batch that lost its database waits for its next attempt before its connections are due again.
        await db.execute("update due set run_at = now()")
        try:
            await assert_books_equal_truth(db, sim, await connections(db), but=["costs"])
        except AssertionError:
            return False
        return True

    await until(is_booked, "the books are equal again")
    assert replica.process.poll() is None
    await assert_laws(db)


async def test_a_server_that_stops_and_starts_is_met_again(tmp_path: Path, sim: Sim) -> None:
    folder = Path(tempfile.mkdtemp(prefix="tallyd-e2e-"))
    folder.chmod(0o755)  # as root the server runs as another user  # noqa: ASYNC240 - one quick call
    cluster = Cluster(folder)
    cluster.create(sync=False)
    tallyd = Tallyd(cluster.url(), tmp_path)
    replica: Replica | None = None
    try:
        early = await tallyd("status", "--json")
        assert early.code == 1, "it is not there yet"
        assert "Traceback" not in early.err
        await anyio.to_thread.run_sync(cluster.start, {"fsync": "off"})
        await add(tallyd, sim, "openai", "o", sources=EACH_TICK)
        replica = tallyd.run()
        await replica.has_logged("batch.finished")
        await anyio.to_thread.run_sync(cluster.stop)
        await replica.has_logged("tick.postponed")
        await sim.grow("openai", "o", 20)
        await anyio.to_thread.run_sync(cluster.start, {"fsync": "off"})
        await replica.has_logged("tick.resumed")
        db = await Database.open(cluster.url(), pool_max=2)
        try:
            await more_ticks(db, 2, wait_s=60)
            await assert_books_equal_truth(db, sim, await connections(db), but=["costs"])
            await assert_laws(db)
        finally:
            await db.close()
        replica.signal(signal.SIGTERM)
        assert await replica.ended() == 0
    finally:
        if replica is not None:
            replica.kill()
        await anyio.to_thread.run_sync(cluster.stop)
        shutil.rmtree(folder)


async def test_a_start_without_a_database_fails_in_words(tallyd: Tallyd) -> None:
    """Whoever supervises it starts it again."""
    replica = tallyd.run(TALLYD_DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    assert await replica.ended(wait_s=60) == 1
    assert not [line for line in replica.log() if "Traceback" in line["event"]]


# ── The commands that do the work by hand ───────────────────────────────────────────────────────


async def test_a_tick_by_hand_runs_here_and_once(tallyd: Tallyd, sim: Sim, db: Database) -> None:
    """`--wait` prints what the work did; who comes second finds it made."""
    await add(tallyd, sim, "openai", "o")
    long = {"TALLYD_TICK_SECONDS": "86400"}
    first = await tallyd("tick", "--wait", "--json", **long)
    assert first.code == 0, first.err
    assert set(first.json) == SUMMARY
    assert (first.json["connections"], first.json["dead"]) == (1, 0)
    assert first.json["rows"] > 0
    second = await tallyd.here("tick", "--wait", "--json", **long)
    assert (second.code, second.json["rows"]) == (0, first.json["rows"]), "the tick's own figures"
    third = await tallyd.here("tick", "--json", **long)
    assert (third.json["created"], third.json["batches"]) == (False, 0)
    today = floor_to(await db.now(), 86400)
    assert third.json["slot"] == rfc3339(today)
    named = await tallyd.here("tick", "--slot", rfc3339(today), "--json", **long)
    assert named.json["created"] is False
    await assert_books_equal_truth(db, sim, await connections(db))


async def test_a_tick_without_wait_is_left_to_the_daemon(tallyd: Tallyd, sim: Sim, db: Database) -> None:
    await add(tallyd, sim, "openai", "o")
    long = {"TALLYD_TICK_SECONDS": "86400"}
    made = await tallyd.here("tick", "--json", **long)
    assert (made.json["created"], made.json["connections"], made.json["batches"]) == (True, 1, 1)
    assert await db.fetchval("select count(*) from ready") == 1
    helped = await tallyd("tick", "--wait", "--json", **long)
    assert helped.code == 0, helped.err
    assert helped.json["rows"] > 0, "it helps with the batches until they are done"
    await assert_books_equal_truth(db, sim, await connections(db))


async def test_polls_usage_and_spend_keep_their_contract(tallyd: Tallyd, sim: Sim, db: Database) -> None:
    await add(tallyd, sim, "openai", "o")
    await add(tallyd, sim, "anthropic", "a", tenant="globex")
    one = await tallyd("poll", "--tenant", "acme", "--json")
    assert (one.code, set(one.json), one.json["connections"]) == (0, SUMMARY, 1)
    rest = await tallyd.here("poll", "--connection", "globex/a", "--json")
    assert rest.json["connections"] == 1
    again = await tallyd.here("poll", "--all", "--json")
    assert (again.json["connections"], again.json["rows"]) == (2, 0)
    full = await tallyd.here("poll", "--all", "--full", "--json")
    assert (full.code, full.json["rows"]) == (0, 0)
    await assert_books_equal_truth(db, sim, await connections(db))

    usage = (await tallyd.here("usage", "--group-by", "tenant,connection,provider", "--json")).json
    assert [set(row) for row in usage] == [{"tenant", "connection", "provider", "metrics"}] * 2
    by_tenant = {row["tenant"]: row["metrics"] for row in usage}
    for tenant, provider, name, sources in (
        ("acme", "openai", "o", ("completions", "embeddings", "moderations")),
        ("globex", "anthropic", "a", ("messages",)),
    ):
        truth = await sim.control("GET", "truth", provider=provider, key=credential(provider, name), totals=1)
        told = truth["orgs"][0]["sources"]
        assert by_tenant[tenant]["input_tokens"] == sum(told[source]["input_tokens"] for source in sources)
        assert by_tenant[tenant]["output_tokens"] == sum(told[source]["output_tokens"] or 0 for source in sources)
    assert by_tenant["globex"]["requests"] is None, "what a provider does not report is null"
    assert isinstance(by_tenant["acme"]["requests"], int)

    spend = (await tallyd.here("spend", "--group-by", "tenant", "--json")).json
    assert all(set(row) == {"tenant", "amount", "currency", "basis"} for row in spend)
    provider_cost = {row["tenant"]: Decimal(row["amount"]) for row in spend if row["basis"] == "provider"}
    for tenant, provider, name, source in (("acme", "openai", "o", "costs"), ("globex", "anthropic", "a", "cost")):
        truth = await sim.control("GET", "truth", provider=provider, key=credential(provider, name), totals=1)
        assert provider_cost[tenant] == Decimal(truth["orgs"][0]["sources"][source]["amount"])
    assert {row["basis"] for row in spend} == {"provider", "local"}
    assert (await tallyd.here("usage", "--until", "2020-01-01", "--json")).json == []


async def test_work_that_failed_shows_in_the_exit_code(tallyd: Tallyd, sim: Sim, db: Database) -> None:
    await add(tallyd, sim, "openai", "o")
    await sim.fault("not_json", "openai", "o", count=100, path_contains="embeddings")
    failed = await tallyd("poll", "--all", "--json")
    assert (failed.code, failed.json["dead"], failed.json["retried"]) == (1, 1, 0)
    (letter,) = (await tallyd.here("dlq", "list", "--json")).json
    assert "embeddings" in letter["reason"]
    shown = (await tallyd.here("dlq", "show", str(letter["id"]), "--json")).json
    assert credential("openai", "o") not in str(shown)
    await sim.control("DELETE", "faults")
    assert (await tallyd.here("dlq", "replay", str(letter["id"]))).code == 0
    tallyd.run()

    async def is_done() -> bool:
        return not await db.fetchval("select count(*) from job where id = $1", letter["id"])

    await until(is_done, "the replay is done")
    await assert_books_equal_truth(db, sim, await connections(db))


async def test_bad_input_is_named_and_exits_two(tallyd: Tallyd, sim: Sim) -> None:
    await add(tallyd, sim, "openai", "o")
    for arguments, said in (
        (["poll", "--tenant", "nobody"], "nobody"),
        (["tick", "--slot", "soon"], "--slot"),
        (["frobnicate"], "frobnicate"),
    ):
        assert_is_refused(await tallyd(*arguments), said)
    for arguments, said in (
        (["poll"], "scope"),
        (["poll", "--all", "--tenant", "acme"], "scope"),
        (["poll", "--connection", "acme/none"], "acme/none"),
        (["poll", "--connection", "acme"], "TENANT/NAME"),
        (["tick", "--slot", "2026-11-22T10:00:00"], "--slot"),
        (["tick", "--slot", "2026-11-22T10:00:01Z"], "slot"),
        (["tick", "--slot", "2199-01-01T00:00:00Z"], "future"),
        (["usage", "--group-by", "colour"], "colour"),
        (["usage", "--since", "2026-01-02", "--until", "2026-01-01"], "--until"),
        (["backfill", "--from", "2026-01-02", "--to", "2026-01-01"], "--to"),
        (["dlq", "show", "999"], "999"),
    ):
        assert_is_refused(await tallyd.here(*arguments), said)
    wrong = await tallyd("status", TALLYD_TICK_SECONDS="7", TALLYD_NONSENSE="1", TALLYD_CONCURRENCY="many")
    assert wrong.code == 2
    assert all(name in wrong.err for name in ("tick_seconds", "TALLYD_NONSENSE", "concurrency")), "all at once"


def assert_is_refused(done: Result, said: str) -> None:
    assert (done.code, done.out) == (2, ""), (said, done)
    assert said in done.err
    assert "Traceback" not in done.err


async def test_a_killed_command_loses_no_work(tallyd: Tallyd, sim: Sim, db: Database) -> None:
    """What it had leased is rescued by a replica."""
    await add(tallyd, sim, "openai", "o")
    await sim.fault("timeout", "openai", "o", hold_s=60)
    process = await anyio.open_process(
        [*tallyd.command, "poll", "--all"], env=tallyd.environment | {"TALLYD_HTTP_READ_TIMEOUT_S": "60"}
    )

    await until(partial(hangs, sim), "the command works")
    assert await db.fetchval("select count(*) from lease")
    process.kill()
    await process.aclose()
    tallyd.run(TALLYD_TICK_SECONDS="86400")

    async def is_done() -> bool:
        return not await db.fetchval("select count(*) from job")

    await until(is_done, "a replica takes the work over", wait_s=60)
    await assert_books_equal_truth(db, sim, await connections(db))
