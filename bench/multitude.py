"""Whether the statements of a message's life stay flat while a million others wait, and many have ended."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import anyio
import asyncpg

from bench.mail import Mail, body
from bench.punctuality import WAITING
from bench.report import Line, Target
from bench.stage import Stage
from daemon.domain.job import KEY_END, PUSH_KEY, Completed, Lane, WorkerId
from daemon.queue.message import Attempted
from daemon.queue.messages import Ended
from daemon.queue.postgres import FIRST_KEY

LIMIT = 100
HOSTS = 20
FILLERS = 2
CHUNK = 100_000
_ENDED = """
with n as materialized (select nextval('job_id_seq') as id from generate_series(1, $1)),
p as (insert into payload (id, body) select id, '{}' from n),
m as (
  insert into message (id, account_id, salt, url, host, method, spec, payload_id, not_before)
  select id, $2, id, 'http://127.0.0.1:1/', '127.0.0.1', 'POST', '{}', id, now() from n)
insert into event (account_id, message_id, state) select $2, id, s from n, (values (1), (2), (5)) v(s)
"""
STEPS = ("publish", "claim", "load", "settle", "promote")


async def flatness(stage: Stage) -> list[Line]:
    """Each step on a hundred messages, in two databases in turn."""
    waiting, ended = stage.size(1_000_000, 5_000), stage.size(100_000, 1_000)
    async with (
        stage.database() as url,
        stage.database() as empty_url,
        Mail.open(stage, url) as full,
        Mail.open(stage, empty_url) as empty,
    ):
        async with anyio.create_task_group() as group:
            for _ in range(FILLERS):
                group.start_soon(_fill, url, full.account, waiting // FILLERS, ended // FILLERS)
        await full.watch.execute("vacuum analyze", timeout=300)
        await full.watch.execute("checkpoint", timeout=300)
        ours, theirs = await _Steps.open(full), await _Steps.open(empty)
        for number in range(stage.size(80, 4)):
            for steps in (ours, theirs) if number % 2 else (theirs, ours):
                await steps.go_round()
    return [
        Line(
            f"{step} of {LIMIT} with {waiting:,} messages due later and {ended:,} that have ended", mine, "ms", other,
            "in an empty database", mine / other, Target("≤", 1.5),
        )
        for step in STEPS
        for mine, other in [(median(ours.took_ms[step]), median(theirs.took_ms[step]))]
    ]  # fmt: skip


async def _fill(url: str, account: int, waiting: int, ended: int) -> None:
    connection: asyncpg.Connection = await asyncpg.connect(url)
    await connection.execute("set synchronous_commit = off")
    for at in range(0, waiting, CHUNK):
        await connection.execute(WAITING, min(CHUNK, waiting - at), account, timeout=300)
    await connection.execute(_ENDED, ended, account, timeout=300)
    await connection.close()


class _Steps:
    """One database, in which a hundred messages after another are published and delivered, but for the wire."""

    def __init__(self, mail: Mail, worker: WorkerId) -> None:
        self._mail = mail
        self._worker = worker
        self._lane = Lane("push", PUSH_KEY, KEY_END, LIMIT, LIMIT)
        self.took_ms: dict[str, list[float]] = {step: [] for step in STEPS}

    @classmethod
    async def open(cls, mail: Mail) -> _Steps:
        return cls(mail, await mail.queue.register_worker("bench"))

    async def go_round(self) -> None:
        mail = self._mail
        publications = [
            mail.publications(f"http://127.0.0.1:{number % HOSTS + 1}/", [body(number)])[0] for number in range(LIMIT)
        ]
        began = perf_counter()
        await mail.messages.publish([(await mail.accounts.limits_of(mail.account), publications)])
        began = self._note("publish", began)
        jobs = (await mail.queue.claim(self._worker, LIMIT, FIRST_KEY, self._lane)).jobs
        began = self._note("claim", began)
        loads = await mail.messages.load(jobs)
        began = self._note("load", began)
        ends = [
            Ended(job, load, load.body or b"", Completed(), Attempted(200), 1)
            for job, load in zip(jobs, loads, strict=True)
            if load is not None
        ]
        assert len(ends) == LIMIT, (len(jobs), len(ends))
        began = perf_counter()
        assert all(await mail.messages.settle(ends))
        began = self._note("settle", began)
        assert (await mail.queue.promote()).moved == 0
        self._note("promote", began)

    def _note(self, step: str, began: float) -> float:
        now = perf_counter()
        self.took_ms[step].append((now - began) * 1000)
        return now
