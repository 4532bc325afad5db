"""What starts ticks makes no difference to the books: the schedule, QStash, or both while QStash dies and comes back."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest

from daemon.db.pool import Database
from daemon.domain.window import floor_to, rfc3339
from tests.books_kit import Sim, assert_books_equal_truth, open_sim, until
from tests.conftest import in_database
from tests.e2e.conftest import Replica, Tallyd
from tests.e2e.test_daemon import EACH_TICK, add, connections
from tests.http_kit import local_client
from tests.ledger_kit import assert_laws
from tests.qstash_stand_in import StandIn, open_stand_in

pytestmark = pytest.mark.anyio

STEPS = 6
DIES_AFTER, COMES_BACK_AFTER = 2, 4
TICK_S, GRACE_S = 3, 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def same_simulator(now: datetime) -> AsyncIterator[Sim]:
    """One whose numbers follow from the requests made of it alone: the same seed, and a clock that stands."""
    arguments = ["--port", "0", "--seed", "7", "--now", rfc3339(now), "--frozen"]
    process = subprocess.Popen(  # noqa: ASYNC220 - it is started, not waited for
        [sys.executable, "-m", "daemon.simulator", *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        line = await anyio.to_thread.run_sync(process.stdout.readline)
        async with open_sim(json.loads(line)["url"]) as sim:
            yield sim
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@dataclass
class Installation:
    """One tallyd with a database, a simulator, and a QStash of its own."""

    name: str
    tallyd: Tallyd
    sim: Sim
    qstash: StandIn
    db: Database
    environment: dict[str, str]
    history: list[tuple[Decimal, ...]] = field(default_factory=list)
    marks: list[datetime] = field(default_factory=list)
    """Newest ticks when QStash was set up, when it died, and when it came back."""

    async def mark(self) -> None:
        self.marks.append(await self.db.fetchval("select coalesce(max(slot_at), 'epoch') from tick"))

    async def ticks_since(self, slot: datetime | None) -> list[Any]:
        """Finished ticks after `slot`."""
        return await self.db.fetch(
            """select slot_at, via, batches, (select count(*) from batch_summary b where b.slot_at = t.slot_at) as done
               from tick t where finished_at is not null and ($1::timestamptz is null or slot_at > $1) order by 1""",
            slot,
        )

    async def step(self) -> None:
        """The usage grows; the next tick that begins then books it."""
        await self.sim.grow("openai", "o", 5)
        newest = await self.db.fetchval("select max(slot_at) from tick")

        async def is_over() -> bool:
            # A tick in which the one before still polls the connection has no batch, and books nothing.
            return any(tick["batches"] for tick in await self.ticks_since(newest))

        await until(is_over, f"{self.name}: a tick after {newest}", wait_s=60)
        row = await self.db.fetchrow(
            """select sum(l.input_tokens), sum(l.output_tokens), sum(l.requests) from ledger l
               join stream s on s.id = l.stream_id where s.source = 'completions'"""
        )
        assert row is not None
        self.history.append(tuple(row.values()))


@asynccontextmanager
async def installed(
    server_url: str, template: str, name: str, folder: Path, now: datetime
) -> AsyncIterator[Installation]:
    database = f"tallyd_test_{name}_{folder.name[-8:]}".lower().replace("-", "_")
    admin = await asyncpg.connect(server_url)
    await admin.execute(f"create database {database} template {template}")
    async with AsyncExitStack() as stack:
        stack.push_async_callback(admin.close)
        stack.push_async_callback(admin.execute, f"drop database {database} with (force)")
        url = in_database(server_url, database)
        home = folder / name
        home.mkdir()
        tallyd = Tallyd(url, home)
        db = await Database.open(url, pool_max=3)
        stack.push_async_callback(db.close)
        sim = await stack.enter_async_context(same_simulator(now))
        qstash = await stack.enter_async_context(open_stand_in(retry_delay_s=0.2))
        port = free_port()
        environment = {
            "TALLYD_TRIGGER": "qstash" if name == "own" else name,
            "TALLYD_TICK_SECONDS": str(TICK_S),
            "TALLYD_FALLBACK_GRACE_S": str(GRACE_S),
            "TALLYD_QSTASH_HANDOVER_S": "20",
            "TALLYD_QSTASH_CRON": "* * * * *",
            "TALLYD_LISTEN": f"127.0.0.1:{port}",
            "TALLYD_PUBLIC_URL": f"http://127.0.0.1:{port}",
            "QSTASH_URL": qstash.url,
            "QSTASH_TOKEN": qstash.token,
            "QSTASH_CURRENT_SIGNING_KEY": qstash.current_key,
            "QSTASH_NEXT_SIGNING_KEY": qstash.next_key,
        }
        if name == "own":
            environment |= await its_own_qstash(tallyd, port)
        await add(tallyd, sim, "openai", "o", sources=EACH_TICK)
        stack.callback(lambda: [replica.kill() for replica in tallyd.replicas])
        yield Installation(name, tallyd, sim, qstash, db, environment)


async def its_own_qstash(tallyd: Tallyd, port: int) -> dict[str, str]:
    """What makes a tallyd the QStash of itself, as a person would set it up."""
    token = (await tallyd.here("tokens", "add", "self", "--json")).json["token"]
    keys = (await tallyd.here("keys", "show", "--reveal", "--json")).json
    return {
        "QSTASH_URL": f"http://127.0.0.1:{port}",
        "QSTASH_TOKEN": token,
        "QSTASH_CURRENT_SIGNING_KEY": keys["current"],
        "QSTASH_NEXT_SIGNING_KEY": keys["next"],
        "TALLYD_PUSH_ALLOW": "127.0.0.1",
    }


@asynccontextmanager
async def hurrying(here: Installation) -> AsyncIterator[None]:
    """A minute is long: let the schedule of its own QStash be due all the time."""

    async def hurry() -> None:
        while True:
            await here.db.execute("update schedule set next_at = least(next_at, now())")
            await anyio.sleep(0.3)

    async with anyio.create_task_group() as group:
        if here.name == "own":
            group.start_soon(hurry)
        yield
        group.cancel_scope.cancel()


@pytest.mark.timeout(300)  # four daemons at once
async def test_the_ledger_is_the_same_tick_by_tick_whatever_triggers_it(
    server_url: str, template: str, tmp_path: Path
) -> None:
    now = floor_to(datetime.now(UTC), 60)
    async with AsyncExitStack() as stack:
        made = [
            await stack.enter_async_context(installed(server_url, template, name, tmp_path, now))
            for name in ("internal", "qstash", "both", "own")
        ]
        async with anyio.create_task_group() as group:
            for installation in made:
                group.start_soon(live, installation)
        internal, by_qstash, both, own = made
        assert len(internal.history) == STEPS
        assert len(set(internal.history)) == STEPS, "every step books something"
        assert internal.history == by_qstash.history == both.history == own.history


async def live(here: Installation) -> None:
    replica = here.tallyd.run(**here.environment)
    await replica.has_logged("daemon.started")
    if here.name != "internal":
        set_up = await here.tallyd("qstash", "setup", "--json", **here.environment)
        assert set_up.code == 0, set_up.err
        assert set_up.json["created"] is True
        again = await here.tallyd.here("qstash", "setup", "--json", **here.environment)
        assert again.json["created"] is False, "what is there is brought up to date"
        await here.mark()
        here.qstash.on_schedule_every(0.3)
    async with hurrying(here):
        await take_steps(here)
    here.qstash.on_schedule_every(None)
    replica.signal(signal.SIGTERM)
    assert await replica.ended() == 0
    await check(here, replica)


async def take_steps(here: Installation) -> None:
    for step in range(STEPS):
        if here.name == "both" and step == DIES_AFTER:
            here.qstash.die()
            await here.mark()
        if here.name == "both" and step == COMES_BACK_AFTER:
            await here.mark()
            await here.qstash.revive()
            here.qstash.on_schedule_every(0.3)
        await here.step()


async def check(here: Installation, replica: Replica) -> None:
    """Nothing twice and nothing lost, and each tick by whom it should have been made."""
    db = here.db
    await assert_books_equal_truth(db, here.sim, await connections(db), but=["costs"])
    await assert_laws(db)
    ticks = await here.ticks_since(None)
    assert all(tick["done"] == tick["batches"] for tick in ticks)
    assert not await db.fetchval("select count(*) from dead")
    lost = "select count(*) from attempt a join batch_summary b on b.job_id = a.id where a.outcome not in (1, 8)"
    assert not await db.fetchval(lost), "no batch failed or was taken over"
    twice = "select 1 from attempt where outcome = 1 group by id having count(*) > 1"
    assert not await db.fetch(twice), "no batch ran twice"
    made_by = [tick["via"] for tick in ticks]
    released = {row["released_by"] for row in await db.fetch("select released_by from handover")}
    crashes = [
        line for line in replica.log() if "Traceback" in str(line["event"]) or line["event"].endswith(".crashed")
    ]
    assert not crashes
    match here.name:
        case "internal":
            assert set(made_by) == {"internal"}
            assert not await db.fetchval("select count(*) from handover")
        case "qstash":
            assert set(made_by) == {"qstash"}
            assert released == {"delivery"}
            assert len(here.qstash.messages) > await db.fetchval("select count(*) from handover"), "and the schedule's"
            assert {m.state for m in here.qstash.messages if m.schedule_id is None} == {"delivered"}
        case "own":
            assert set(made_by) == {"qstash"}
            assert released == {"delivery"}
            assert not here.qstash.messages, "nobody else was asked"
            handed_over = await db.fetchval("select count(*) from handover")
            to_workers = "select count(*) from message where url like '%/api/poll/worker' and source_id is null"
            assert await db.fetchval(to_workers) == handed_over
            callbacks = "select count(*) from message where source_id is not null"
            assert await db.fetchval(callbacks) >= handed_over
            assert not await db.fetchval("select count(*) from event where state in (3, 6)"), "every delivery was taken"
        case "both":
            set_up, died, back = here.marks
            assert "qstash" in {tick["via"] for tick in ticks if set_up < tick["slot_at"] <= died}
            assert {tick["via"] for tick in ticks if died < tick["slot_at"] <= back} == {"fallback"}
            assert "qstash" in {tick["via"] for tick in ticks if tick["slot_at"] > back}, "it came back"
            assert released <= {"delivery", "refusal", "failure", None}
            assert "delivery" in released


# ── Roles ───────────────────────────────────────────────────────────────────────────────────────


async def url_of(replica: Replica) -> str:
    await replica.has_logged("daemon.started")
    (line,) = replica.events("daemon.started")
    return str(line["listens"]["listen"])


async def test_listener_and_worker_can_be_two_processes(tallyd: Tallyd, sim: Sim, database_url: str) -> None:
    """The listener takes deliveries and runs nothing; the worker runs what it took, and takes none."""
    async with open_stand_in() as qstash, local_client() as client:
        port = free_port()
        keys = {"QSTASH_CURRENT_SIGNING_KEY": qstash.current_key, "QSTASH_NEXT_SIGNING_KEY": qstash.next_key}
        listener_at = {"TALLYD_LISTEN": f"127.0.0.1:{port}", "TALLYD_PUBLIC_URL": f"http://127.0.0.1:{port}"}
        trigger = {"TALLYD_TRIGGER": "qstash", "QSTASH_URL": qstash.url, "TALLYD_TICK_SECONDS": "86400"}
        await add(tallyd, sim, "openai", "o", sources=EACH_TICK)
        listener = tallyd.run(TALLYD_ROLE="listener", **keys, **listener_at, **trigger)
        where = await url_of(listener)
        path = "/api/poll/orchestrate"
        token = qstash.sign(where + path, b"{}")
        answer = await client.post(where + path, content=b"{}", headers={"upstash-signature": token})
        assert answer.status_code == 200, answer.text
        assert answer.json()["batches"] == 1
        db = await Database.open(database_url, pool_max=2)
        assert await db.fetchval("select count(*) from ready") == 1
        assert (await client.get(f"{where}/readyz")).json()["checks"].keys() == {"service", "database", "migrations"}

        worker = tallyd.run(TALLYD_ROLE="worker", TALLYD_PUBLIC_URL=where, **keys, **trigger)
        elsewhere = await url_of(worker)
        assert (await client.post(elsewhere + path, content=b"{}")).status_code == 404
        assert (await client.get(f"{elsewhere}/readyz")).status_code == 200

        async def is_done() -> bool:
            return bool(await db.fetchval("select count(*) from batch_summary"))

        await until(is_done, "the worker runs the listener's batch")
        await assert_books_equal_truth(db, sim, await connections(db))
        for replica in (listener, worker):
            replica.signal(signal.SIGTERM)
            assert await replica.ended() == 0
        await db.close()


async def test_metrics_are_private_and_health_can_have_a_port_of_its_own(tallyd: Tallyd) -> None:
    open_port, private_port = free_port(), free_port()
    replica = tallyd.run(
        TALLYD_LISTEN=f"0.0.0.0:{open_port}", TALLYD_LISTEN_PRIVATE=f"127.0.0.1:{private_port}",
    )  # fmt: skip
    await replica.has_logged("daemon.started")
    async with local_client() as client:
        public, private = f"http://127.0.0.1:{open_port}", f"http://127.0.0.1:{private_port}"
        assert (await client.get(f"{public}/metrics")).status_code == 404
        assert (await client.post(f"{public}/api/poll/worker")).status_code == 503
        assert (await client.post(f"{private}/api/poll/worker")).status_code == 404
        scraped = await client.get(f"{private}/metrics")
        assert 'tallyd_build_info{version="' in scraped.text
    replica.kill()
    guarded = tallyd.run(TALLYD_LISTEN=f"0.0.0.0:{open_port}")
    await guarded.has_logged("daemon.started")
    async with local_client() as client:
        assert (await client.get(f"{public}/metrics")).status_code == 403
        assert (await client.get(f"{public}/healthz")).status_code == 200
    guarded.kill()
    named = tallyd.run(TALLYD_LISTEN=f"0.0.0.0:{open_port}", TALLYD_METRICS_TOKEN="let-me-in")
    await named.has_logged("daemon.started")
    async with local_client() as client:
        assert (await client.get(f"{public}/metrics")).status_code == 401
        headers = {"authorization": "Bearer let-me-out"}
        assert (await client.get(f"{public}/metrics", headers=headers)).status_code == 401
        headers = {"authorization": "Bearer let-me-in"}
        assert (await client.get(f"{public}/metrics", headers=headers)).status_code == 200
    check = await tallyd("healthcheck", "--ready", "--url", public)
    assert (check.code, json.loads(check.out)["ready"]) == (0, True)
    named.kill()
    assert (await tallyd("healthcheck", "--url", public)).code == 1


async def test_a_service_manager_is_told(tallyd: Tallyd, tmp_path: Path) -> None:
    """READY once it serves, WATCHDOG while it lives, STOPPING when it drains."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(30)
        replica = tallyd.run(NOTIFY_SOCKET=str(path), WATCHDOG_USEC="300000")
        assert (await anyio.to_thread.run_sync(manager.recv, 4096)).startswith(b"READY=1\nSTATUS=all")
        assert replica.events("daemon.started")
        assert await anyio.to_thread.run_sync(manager.recv, 4096) == b"WATCHDOG=1"
        replica.signal(signal.SIGTERM)
        told = b""
        while not told.startswith(b"STOPPING=1"):
            told = await anyio.to_thread.run_sync(manager.recv, 4096)
        assert await replica.ended() == 0


async def test_a_signal_while_it_starts_ends_it(tallyd: Tallyd, database_url: str) -> None:
    """Also as process 1 of a container, which the system protects from signals that it does not handle."""
    db = await Database.open(database_url, pool_max=2)
    async with db.transaction() as tx:
        await tx.execute("set local idle_in_transaction_session_timeout = 0")
        await tx.fetch("select pg_advisory_xact_lock($1)", 0x7461_6C6C_7964)
        replica = tallyd.run()
        await replica.has_logged("migration.waiting")
        replica.signal(signal.SIGTERM)
        assert await replica.ended() == 128 + signal.SIGTERM
    await db.close()


# ── What cannot work is named at the start ──────────────────────────────────────────────────────


async def test_what_cannot_work_is_named_at_the_start(tallyd: Tallyd) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for environment, says in (
            ({"TALLYD_LISTEN": f"127.0.0.1:{port}"}, f"listen: 127.0.0.1:{port} is in use"),
            ({"TALLYD_LISTEN": "203.0.113.9:0"}, "listen: 203.0.113.9:0 cannot be opened"),
            ({"TALLYD_TRIGGER": "qstash"}, "qstash_current_signing_key: not set"),
            ({"TALLYD_TRIGGER": "both"}, "public_url: not set"),
            ({"QSTASH_NEXT_SIGNING_KEY": "sig_x"}, "qstash_current_signing_key: not set"),
            ({"TALLYD_QSTASH_CRON": "61 * * * *"}, "qstash_cron: is '61 * * * *'"),
            ({"TALLYD_TRACES": "zipkin"}, "traces: is 'zipkin'"),
        ):
            replica = tallyd.run(**environment)
            assert await replica.ended() == 2, environment
            text = "\n".join(str(line["event"]) for line in replica.log())
            assert says in text, text
            assert "Traceback" not in text
