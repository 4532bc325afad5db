"""The promise: kill what you like, when you like; nothing is lost and nothing is booked twice.

Three replicas tick, three more processes poll everything at once beside them, a tenth of all answers breaks, the
provider changes history, and every few seconds a replica gets SIGKILL. Beside it stands the literal scheme of a
well-known blog post: a table keyed by hash(timestamp, provider, amount), filled with ON CONFLICT DO NOTHING.

`TALLYD_TEST_CHAOS_CONNECTIONS`, `_KILLS` and `_SEED` make a longer run, or the same one again.
"""

from __future__ import annotations

import json
import os
import random
import signal
from decimal import Decimal
from hashlib import sha256
from pathlib import Path

import anyio
import httpx
import pytest

from daemon.db.pool import Database
from daemon.domain.connection import ConnectionId
from daemon.domain.window import rfc3339, to_epoch
from tests.books_kit import COST_SOURCES, Sim, assert_books_equal_truth, credential, midnight, until
from tests.e2e.conftest import Tallyd

pytestmark = pytest.mark.anyio

CONNECTIONS = int(os.environ.get("TALLYD_TEST_CHAOS_CONNECTIONS", "60"))
KILLS = int(os.environ.get("TALLYD_TEST_CHAOS_KILLS", "5"))
SEED = int(os.environ.get("TALLYD_TEST_CHAOS_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
REPLICAS = 3
FAULT_RATE = 0.1
EVENTS_OF_ALARM = ("job.crashed", "source.crashed")
# What costs a round sum is left out: there the foil's identity, which is the amount, merges one tenant's row with
# another's, so that its two faults hide each other.
SOURCES = {
    "openai": ["completions", "completions", "completions", "embeddings", "moderations", "audio_transcriptions",
               "vector_stores", "web_search_calls"],
    "anthropic": ["messages"],
}  # fmt: skip
CORRECTIONS = ("late_arrival", "correction_up", "correction_down", "equal_amounts", "relabel_model", "vanish_row",
               "attribute", "restore")  # fmt: skip
Named = tuple[str, str]
"""Provider and connection name."""


class Foil:
    """The scheme of the blog post: identity is the number."""

    def __init__(self, db: Database, sim: Sim) -> None:
        self._db = db
        self._sim = sim
        self.polls = 0

    async def make(self) -> None:
        await self._db.execute("create table foil (hash bytea primary key, amount numeric not null)")

    async def poll(self, named: Named) -> None:
        """What the cost report says now; a broken answer is left for the next time."""
        provider, name = named
        start = midnight(days_ago=1)
        if provider == "openai":
            path, query = "/v1/organization/costs", [("start_time", str(to_epoch(start))), ("limit", "31")]
            query += [("group_by", dim) for dim in ("project_id", "line_item", "api_key_id")]
        else:
            path, query = "/v1/organizations/cost_report", [("starting_at", rfc3339(start)), ("limit", "31")]
            query += [("group_by[]", dim) for dim in ("workspace_id", "description")]
        try:
            answer = await self._sim.answer(provider, name, path, query)
            buckets = json.loads(answer.content, parse_float=Decimal)["data"] if answer.status_code == 200 else []
        except (httpx.HTTPError, ValueError):
            return
        rows = []
        for bucket in buckets:
            at = bucket.get("start_time", bucket.get("starting_at"))
            for row in bucket["results"]:
                money = row["amount"]
                amount = Decimal(money["value"]) if isinstance(money, dict) else Decimal(money) / 100
                rows.append((sha256(f"{at}|{provider}|{amount}".encode()).digest(), amount))
        await self._db.executemany("insert into foil values ($1, $2) on conflict do nothing", sorted(rows))
        self.polls += 1

    async def total(self) -> Decimal:
        return Decimal(await self._db.fetchval("select coalesce(sum(amount), 0) from foil"))


class Chaos:
    """Everything that goes on at once. `stop` ends it."""

    def __init__(self, tallyd: Tallyd, sim: Sim, db: Database, names: list[Named], foil: Foil) -> None:
        self._tallyd = tallyd
        self._sim = sim
        self._db = db
        self._names = names
        self._foil = foil
        self._rng = random.Random(SEED)
        self._stopped = anyio.Event()
        self.kills = 0
        self.hand_polls = 0
        self.edits = 0

    def stop(self) -> None:
        self._stopped.set()

    async def _pause(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            await self._stopped.wait()

    async def kill_replicas(self) -> None:
        while not self._stopped.is_set():
            await self._pause(self._rng.uniform(1.5, 4.0))
            living = [replica for replica in self._tallyd.replicas if replica.process.poll() is None]
            victim = self._rng.choice(living)
            victim.signal(signal.SIGKILL)
            assert await victim.ended() == -signal.SIGKILL, "it ended by itself before it was killed"
            self.kills += 1
            self._tallyd.run(TALLYD_BATCH_SIZE="10", TALLYD_CONCURRENCY="2", TALLYD_HTTP_READ_TIMEOUT_S="2")

    async def poll_by_hand(self) -> None:
        """The same orders, delivered three times over at the same moment; sometimes the hand lets go."""
        while not self._stopped.is_set():
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(self._poll)

    async def _poll(self) -> None:
        done = await self._tallyd("poll", "--all", "--json")
        assert done.code in (0, 1), done.err
        assert "Traceback" not in done.err, done.err
        self.hand_polls += 1

    async def change_history(self) -> None:
        while not self._stopped.is_set():
            for provider, name in self._rng.sample(self._names, k=max(1, len(self._names) // 3)):
                await self._sim.grow(provider, name, self._rng.randint(1, 4))
            for _ in range(3):
                provider, name = self._rng.choice(self._names)
                body = {"provider": provider, "key": credential(provider, name)}
                self.edits += await self._sim.attempt("scenario", body | {"action": self._rng.choice(CORRECTIONS)})
            await self._pause(0.4)

    async def feed_foil(self) -> None:
        """A poll a tick, like the daemon's own."""
        places = anyio.CapacityLimiter(8)

        async def poll(named: Named) -> None:
            async with places:
                await self._foil.poll(named)

        while not self._stopped.is_set():
            async with anyio.create_task_group() as group:
                for named in self._names:
                    group.start_soon(poll, named)
            await self._pause(2.0)


@pytest.mark.timeout(int(os.environ.get("TALLYD_TEST_E2E_TIMEOUT", "300")))
async def test_nothing_is_lost_and_nothing_is_booked_twice(
    tallyd: Tallyd, sim: Sim, database_url: str, tmp_path: Path
) -> None:
    print(f"\nchaos: seed {SEED}, {CONNECTIONS} connections")  # noqa: T201 - to run the same again
    names: list[Named] = [("anthropic" if n % 2 else "openai", f"c{n}") for n in range(CONNECTIONS)]
    profile = {"history_days": 0, "requests_per_hour": 1, "keys": 1, "projects": 1, "live": False}
    for provider, name in names:
        models = ["gpt-4o-mini-2024-07-18"] if provider == "openai" else ["claude-haiku-4-5-20251001"]
        await sim.set_up(provider, name, **profile, models=models, sources=SOURCES[provider])
    lines = [
        {
            "tenant": f"t{n % 7}", "provider": provider, "name": name, "credential": credential(provider, name),
            "base_url": sim.base_url(provider), "since": rfc3339(midnight(days_ago=1)),
        }
        for n, (provider, name) in enumerate(names)
    ]  # fmt: skip
    path = tmp_path / "connections.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    done = await tallyd.here("connections", "import", str(path), "--json")
    assert done.code == 0, done.err

    db = await Database.open(database_url, pool_max=4)
    try:
        foil = Foil(db, sim)
        await foil.make()
        chaos = Chaos(tallyd, sim, db, names, foil)
        await sim.control(
            "POST", "faults", {"rate": FAULT_RATE, "seed": SEED, "hold_s": 0.5, "retry_after_s": 0.2, "drip_s": 0.005}
        )
        for _ in range(REPLICAS):
            tallyd.run(TALLYD_BATCH_SIZE="10", TALLYD_CONCURRENCY="2", TALLYD_HTTP_READ_TIMEOUT_S="2")
        async with anyio.create_task_group() as group:
            group.start_soon(chaos.kill_replicas)
            group.start_soon(chaos.poll_by_hand)
            group.start_soon(chaos.change_history)
            group.start_soon(chaos.feed_foil)

            async def enough() -> bool:
                ticks = await db.fetchval("select count(*) from tick where finished_at is not null")
                return chaos.kills >= KILLS and chaos.hand_polls >= 3 and ticks >= 3 and foil.polls >= 6 * CONNECTIONS

            await until(enough, f"{KILLS} kills, and ticks and polls between them", wait_s=90 + 15 * KILLS)
            chaos.stop()
        faults = (await sim.control("GET", "stats"))["faults"]
        requests = sum((await sim.control("GET", "stats"))["requests"].values())
        await sim.control("DELETE", "faults")

        async def is_quiet() -> bool:
            # The retry queue's waits are cut short; what killed workers held is rescued by the living.
            await db.execute("update due set run_at = now() where run_at > now()")
            await db.execute("delete from pause")
            open_jobs = await db.fetch("select state, kind, attempt, run_at from job_state")
            open_ticks = await db.fetch("select * from tick where finished_at is null and created_at < $1", quiet_from)
            left[:] = [str(dict(row)) for row in (*open_jobs, *open_ticks)]
            return not left

        left: list[str] = []
        quiet_from = await db.now()
        try:
            await until(is_quiet, "every job is done", wait_s=60)
        except AssertionError as error:
            error.add_note("\n".join(left))
            raise
        living = [replica for replica in tallyd.replicas if replica.process.poll() is None]
        for replica in living:
            replica.signal(signal.SIGTERM)
        assert [await replica.ended() for replica in living] == [0] * len(living)
        await db.execute("delete from pause")
        full = await tallyd.here("poll", "--all", "--full", "--json")
        assert full.code == 0, full.out + full.err

        ids = [ConnectionId(row["id"]) for row in await db.fetch("select id from connection order by id")]
        assert len(ids) == CONNECTIONS
        await assert_books_equal_truth(db, sim, ids)
        doctor = await tallyd.here("doctor", "--json")
        assert doctor.code == 0, [check for check in doctor.json if not check["ok"]]
        assert not await db.fetchval("select count(*) from job"), "dead letters, or jobs that nobody has"
        assert not await db.fetchval("select count(*) from connection where open_job is not null or state <> 'active'")
        assert not await db.fetchval("select count(*) from stream where open_job is not null")
        assert not await db.fetchval(
            """select count(*) from tick t where batches <>
                 (select count(*) from batch_summary b where b.slot_at = t.slot_at and b.kind = 'poll')"""
        ), "a tick whose batches are not all summed up"
        alarms = [line for replica in tallyd.replicas for line in replica.log() if line["event"] in EVENTS_OF_ALARM]
        assert not alarms, alarms[:3]

        truth = await db.fetchval(
            """select sum(l.amount) from ledger l join stream s on s.id = l.stream_id where s.source = any($1::text[])""",
            list(COST_SOURCES),
        )
        wrong = await foil.total()
        batches = await db.fetchrow("select count(*) as n, sum(rows) as rows from batch_summary")
        assert batches is not None
        table = {
            "kills": chaos.kills,
            "polls by hand, three at once": chaos.hand_polls,
            "polls of the foil": foil.polls,
            "edits of history": chaos.edits,
            "faults served": f"{sum(faults.values())} ({', '.join(f'{k} {n}' for k, n in sorted(faults.items()))})",
            "requests answered": requests,
            "ticks": await db.fetchval("select count(*) from tick"),
            "batches": batches["n"],
            "revisions booked": batches["rows"],
            "jobs of lost workers": await db.fetchval("select count(*) from attempt where outcome = 9"),
            "ledger = truth, USD": truth,
            "hash(timestamp, provider, amount), USD": f"{wrong} ({wrong / truth:.2f} x)",
        }
        print("\n".join(f"  {name:40} {value}" for name, value in table.items()))  # noqa: T201
        # By how much is a matter of how often it looked between two changes, which is the machine's.
        assert wrong > truth, "the number as identity books every intermediate state"
    finally:
        await db.close()
