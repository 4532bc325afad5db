"""Batches handed over to QStash and back: published once, and run whatever becomes of QStash."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from io import StringIO
from typing import Any

import anyio
import msgspec
import pytest

from daemon.db import handovers
from daemon.db.pool import Database
from daemon.domain.connection import Secret
from daemon.domain.job import Completed, Job, JobId
from daemon.orchestrate import Occasion, TickSettings, tick
from daemon.queue.postgres import PostgresQueue
from daemon.queue.qstash import (
    PUBLISH,
    PUBLISH_MAX,
    Publisher,
    PublishOrder,
    QStashSettings,
    deduplication_id,
    publish_jobs,
)
from daemon.telemetry.logs import configure
from daemon.telemetry.metrics import REGISTRY
from tests.qstash_stand_in import StandIn, open_stand_in
from tests.web_kit import CALLBACK, FAILURE, WORKER, open_web

pytestmark = pytest.mark.anyio

BATCHES = 3


@pytest.fixture
async def qstash() -> AsyncIterator[StandIn]:
    async with open_stand_in() as opened:
        yield opened


@dataclass
class Road:
    """A tick whose batches wait, the listener that QStash reaches, and what runs `publish` jobs."""

    db: Database
    queue: PostgresQueue
    publisher: Publisher
    batches: list[JobId]
    slot: Any

    async def publish(self) -> Completed:
        """Run the `publish` jobs as a worker does."""
        worker = await self.queue.register_worker("test")
        found = [job for job in (await self.queue.claim(worker, 50)).jobs if job.kind == PUBLISH]
        assert found
        return await self.run(found[0])

    async def run(self, job: Job) -> Completed:
        outcome = await self.publisher.run(job)
        assert isinstance(outcome, Completed)
        return outcome

    async def ready(self) -> set[int]:
        return {row["id"] for row in await self.db.fetch("select id from ready")}

    async def released_by(self) -> list[str | None]:
        return [row["released_by"] for row in await self.db.fetch("select released_by from handover order by place")]


@pytest.fixture
async def road(db: Database, qstash: StandIn) -> AsyncIterator[Road]:
    await db.execute("insert into tenant (name) values ('acme')")
    await db.execute(
        """insert into connection (tenant_id, name, provider, base_url, credential, credential_key_id,
             credential_print, since)
           select t.id, 'c' || n, 'openai', 'https://x.test', '', '', '', now() from tenant t, generate_series(1, 25) n"""
    )
    settings = TickSettings(tick_s=86_400, batch_size=10, hand_over_s=3_600)
    given = {"": (Secret(qstash.current_key), Secret(qstash.next_key))}
    async with open_web(db, given=given, is_direct=True, tick=settings) as web:
        queue, public_url = web.queue, web.url
        made = await tick(db, queue, settings, occasion=Occasion(via="qstash", request_id="msg_0", hands_over=True))
        assert made.batches == BATCHES
        batches = [JobId(row["job_id"]) for row in await db.fetch("select job_id from handover order by place")]
        reach = QStashSettings(Secret(qstash.token), public_url, qstash.url, retries=2)
        publisher = Publisher(db, queue.waker, reach)
        yield Road(db, queue, publisher, batches, made.slot)
        await publisher.aclose()


def counted(outcome: str) -> float:
    return REGISTRY.get_sample_value("tallyd_qstash_messages_total", {"outcome": outcome}) or 0.0


@pytest.fixture
def log() -> StringIO:
    stream = StringIO()
    configure(level="info", style="json", stream=stream)
    return stream


def refusals(log: StringIO) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in log.getvalue().splitlines()]
    return [line for line in found if line["event"] == "publish.refused"]


async def test_a_tick_leaves_its_batches_waiting_with_the_order_to_publish_them(road: Road, db: Database) -> None:
    assert await db.fetchval("select count(*) from due") == BATCHES
    assert await db.fetchval("select count(*) from ready r join job j using (id) where j.kind = $1", PUBLISH) == 1
    assert await db.fetchval("select count(*) from connection where open_job = any($1)", road.batches) == 25
    left = await db.fetchval("select min(extract(epoch from run_at - now())) from due")
    assert 3_500 < left <= 3_600, "at their deadline they run without QStash"


async def test_batches_are_published_delivered_and_released_once(road: Road, qstash: StandIn) -> None:
    before = counted("published")
    assert (await road.publish()).note is None
    assert counted("published") == before + BATCHES
    await qstash.idle()
    assert [message.json for message in qstash.messages] == [{"batch": batch} for batch in road.batches]
    assert [m.dedup_id for m in qstash.messages] == [deduplication_id(road.slot, n) for n in (1, 2, 3)]
    assert {message.url.removeprefix(road_url(road)) for message in qstash.messages} == {WORKER}
    assert {message.retries for message in qstash.messages} == {2}
    assert await road.ready() == set(road.batches)
    assert await road.released_by() == ["delivery"] * BATCHES
    assert {callback.url.removeprefix(road_url(road)) for callback in qstash.callbacks} == {CALLBACK}
    rows = await road.db.fetch("select message_id, reported_status from handover order by place")
    assert [(r["message_id"], r["reported_status"]) for r in rows] == [(m.id, 200) for m in qstash.messages]
    for message in qstash.messages:
        assert await qstash.deliver(message, times=3, concurrently=True) == [200] * 3
    assert await road.ready() == set(road.batches), "and no row is there twice"


def road_url(road: Road) -> str:
    assert road.publisher._settings is not None
    return road.publisher._settings.public_url


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("daily", "daily_limit"),
        ("burst", "burst_limit"),
        ("quota", "refused"),
        ("server", "refused"),
        ("unauthorized", "refused"),
        ("malformed", "malformed"),
        ("accept_then_cut", "unreachable"),
        ("hang", "unreachable"),
        ("dead", "unreachable"),
    ],
)
async def test_what_qstash_refuses_runs_here_at_once(
    road: Road, qstash: StandIn, log: StringIO, monkeypatch: pytest.MonkeyPatch, kind: str, reason: str
) -> None:
    """Told apart by what a person would do about it; never lost, and never run twice."""
    monkeypatch.setattr("daemon.queue.qstash.CALL_S", 0.3 if kind == "hang" else 15.0)
    if kind == "dead":
        qstash.die()
    else:
        qstash.refuse(kind)  # type: ignore[arg-type]
    qstash.hold()
    before = counted(reason)
    assert (await road.publish()).note == f"refused: {reason}"
    assert counted(reason) == before + BATCHES
    assert await road.ready() == set(road.batches)
    assert await road.released_by() == ["refusal"] * BATCHES
    (line,) = refusals(log)
    assert (line["reason"], line["batches"], line["released"], line["level"]) == (reason, BATCHES, BATCHES, "warning")
    assert qstash.token not in log.getvalue()
    if kind == "accept_then_cut":  # it had taken them all the same, and delivers late
        assert len(qstash.messages) == BATCHES
        qstash.clear()
        qstash.hold(False)
        await qstash.idle()
        assert [message.state for message in qstash.messages] == ["delivered"] * BATCHES
        assert await road.ready() == set(road.batches)
        assert await road.released_by() == ["refusal"] * BATCHES


async def test_a_spent_day_is_not_asked_again_before_its_reset(road: Road, qstash: StandIn, log: StringIO) -> None:
    """By no replica: the pause is a row. It ends by itself."""
    qstash.refuse("daily")
    await road.publish()
    assert await road.db.fetchval("select until > now() from pause where host = 'qstash'")
    asked = qstash.refused
    qstash.clear()
    await wait_again(road)
    job = await published_again(road)
    assert (await road.run(job)).note == "refused: paused"
    assert (qstash.refused, len(qstash.messages)) == (asked, 0)
    assert refusals(log)[-1]["level"] == "info", "a fault is told when it begins"
    await road.db.execute("update pause set until = now()")
    await wait_again(road)
    assert (await road.run(await published_again(road))).note is None
    assert len(qstash.messages) == BATCHES


async def wait_again(road: Road) -> None:
    """As if the batches had not been released."""
    await road.db.execute("update handover set released_at = null, released_by = null")
    await road.db.execute(
        """with x as (delete from ready where id = any($1::bigint[]) returning *)
           insert into due (run_at, key_id, prio, id, attempt, losses, token)
           select now() + interval '1 hour', key_id, prio, id, 0, 0, 0 from x""",
        road.batches,
    )


async def published_again(road: Road) -> Job:
    """The same order once more, as after a lost worker."""
    async with road.db.transaction() as tx:
        await road.queue.enqueue(publish_jobs(road.slot, road.batches, 60, None, None), tx)
    worker = await road.queue.register_worker("test")
    return next(job for job in (await road.queue.claim(worker, 50)).jobs if job.kind == PUBLISH)


async def test_a_crash_between_publishing_and_noting_it_publishes_nothing_twice(
    road: Road, qstash: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run sends the same deduplication ids, and QStash answers with the first messages."""

    class Crash(BaseException):
        pass

    async def crash(*_: object) -> None:
        raise Crash

    qstash.hold()
    with monkeypatch.context() as patch:
        patch.setattr(handovers, "mark_published", crash)
        with pytest.raises(Crash):
            await road.publish()
    assert (await road.run(await published_again(road))).note is None
    assert len(qstash.messages) == BATCHES
    rows = await road.db.fetch("select message_id from handover order by place")
    assert [row["message_id"] for row in rows] == [message.id for message in qstash.messages]
    assert (await road.run(await published_again(road))).note == "nothing left to publish"


async def test_only_what_is_left_is_published(road: Road, qstash: StandIn) -> None:
    qstash.hold()
    await handovers.release(road.db, road.batches[:1], "delivery")
    await handovers.mark_published(road.db, {road.batches[1]: "msg_before"})
    await road.publish()
    assert [message.json["batch"] for message in qstash.messages] == road.batches[2:]


async def test_a_delivery_that_never_succeeds_comes_back_as_a_failure(
    road: Road, qstash: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands before the listener answers 503 to the worker's route, but lets callbacks through."""
    real = handovers.release

    async def broken(db: Any, jobs: Any, by: str) -> Any:
        if by == "delivery":
            raise RuntimeError("a defect in the way")
        return await real(db, jobs, by)  # type: ignore[arg-type]

    monkeypatch.setattr(handovers, "release", broken)
    await road.publish()
    await qstash.idle()
    assert [message.state for message in qstash.messages] == ["failed"] * BATCHES
    assert [len(message.attempts) for message in qstash.messages] == [3] * BATCHES
    assert await road.released_by() == ["failure"] * BATCHES
    assert await road.ready() == set(road.batches)
    assert {m.url.removeprefix(road_url(road)) for m in qstash.callbacks} == {CALLBACK, FAILURE}


async def test_at_the_deadline_batches_run_without_qstash(road: Road, qstash: StandIn) -> None:
    """It took them and is silent: a message that is lost costs a wait, and a late one does nothing."""
    qstash.hold()
    await road.publish()
    await road.db.execute("update due set run_at = now()")
    await road.queue.promote()
    assert await road.ready() == set(road.batches)
    worker = await road.queue.register_worker("test")
    jobs = (await road.queue.claim(worker, 50)).jobs
    assert {job.id for job in jobs} == set(road.batches)
    qstash.hold(False)
    await qstash.idle()
    assert [message.state for message in qstash.messages] == ["delivered"] * BATCHES
    assert not await road.ready()


async def test_what_its_deadline_let_go_is_not_published_any_more(road: Road, qstash: StandIn) -> None:
    """All slots were busy until then: a message each would be paid for nothing."""
    await road.db.execute("update due set run_at = now()")
    await road.queue.promote()
    assert (await road.publish()).note == "nothing left to publish"
    assert not qstash.messages


async def test_a_replica_without_a_token_lets_the_batches_run(road: Road, log: StringIO) -> None:
    """In a fleet whose settings differ, any replica may claim the order to publish."""
    road.publisher = Publisher(road.db, road.queue.waker, None)
    assert (await road.publish()).note == "refused: not_configured"
    assert await road.ready() == set(road.batches)
    assert refusals(log)[0]["reason"] == "not_configured"


async def test_racing_publishers_publish_each_batch_once(road: Road, qstash: StandIn) -> None:
    """A worker that was taken for lost may still be publishing."""
    qstash.hold()
    jobs = [await published_again(road) for _ in range(3)]
    async with anyio.create_task_group() as group:
        for job in jobs:
            group.start_soon(road.run, job)
    assert sorted(message.json["batch"] for message in qstash.messages) == road.batches


def test_a_large_tick_is_published_in_pieces_that_qstash_takes() -> None:
    slot = datetime(2026, 11, 26, 10, 5, tzinfo=UTC)
    jobs = publish_jobs(slot, [JobId(n) for n in range(1, 2 * PUBLISH_MAX + 2)], 30, "msg_1", None)
    orders = [msgspec.json.decode(job.body, type=PublishOrder) for job in jobs]
    assert [len(order.batches) for order in orders] == [PUBLISH_MAX, PUBLISH_MAX, 1]
    assert [id_ for order in orders for id_ in order.batches] == list(range(1, 2 * PUBLISH_MAX + 2))
    assert deduplication_id(slot, 7) == "poll-20261126T100500Z-7"
    assert ":" not in deduplication_id(slot, 7)
