"""How long after a message is due it arrives, in a queue with nothing else in it, and with many that are due later."""

from __future__ import annotations

import random
from statistics import median, quantiles
from time import time

from bench.mail import Endpoint, Mail, body, endpoint, settings, worker
from bench.report import Line, Target
from bench.stage import Stage

WAITING = """
with n as materialized (
  select nextval('job_id_seq') as id, clock_timestamp() + interval '1 hour' + i * interval '1 ms' as run_at
  from generate_series(1, $1) i),
j as (
  insert into job (id, kind, key_id, max_attempts, timeout_s, body) overriding system value
  select id, 'push', (1::bigint << 62) + id % 1000, 4, 90, '' from n),
p as (insert into payload (id, body) select id, '{}' from n),
m as (
  insert into message (id, account_id, salt, url, host, method, spec, payload_id, not_before)
  select id, $2, id, 'http://127.0.0.1:1/', '127.0.0.1', 'POST', '{}', id, run_at from n),
e as (insert into event (account_id, message_id, state, next_at) select $2, id, 1, run_at from n),
d as (
  insert into due (run_at, key_id, prio, id, attempt, losses, token)
  select run_at, (1::bigint << 62) + id % 1000, 100, id, 0, 0, 0 from n)
select count(*) from n
"""
"""$1 messages of the account $2 that are due later, to a thousand hosts."""

LATE_MS_MAX = 50.0


async def delays(stage: Stage) -> list[Line]:
    """The sample's messages are due at random moments; one `tallyd run --role worker` delivers them."""
    async with (
        stage.database() as url,
        endpoint() as there,
        Mail.open(stage, url) as mail,
        worker(settings(stage, url), stage.folder / "delays.log"),
    ):
        await _late_ms(stage, mail, there, stage.size(50, 10))
        idle = await _late_ms(stage, mail, there, stage.size(400, 30))
        count = stage.size(100_000, 1_000)
        await mail.watch.execute(WAITING, count, mail.account, timeout=300)
        await mail.watch.execute("vacuum analyze")
        crowded = await _late_ms(stage, mail, there, stage.size(400, 30))
    return [
        _line("delayed messages, from due to arrived, p99", idle),
        _line(f"the same with {count:,} messages waiting for later", crowded),
    ]


def _line(name: str, late_ms: list[float]) -> Line:
    p99 = quantiles(late_ms, n=100)[98]
    note = f"p50 {median(late_ms):.1f} ms, earliest {min(late_ms):.1f} ms, latest {max(late_ms):.1f} ms"
    return Line(name, p99, "ms", target=Target("≤", LATE_MS_MAX, "ours"), note=note)


async def _late_ms(stage: Stage, mail: Mail, there: Endpoint, count: int) -> list[float]:
    seconds = stage.size(6, 2)
    await there.reset(count)
    start = time() + 1.0
    due = [start + random.uniform(0, seconds) for _ in range(count)]
    await mail.publish(
        [mail.publications(f"{there.url}/in", [body(number)], not_before=at)[0] for number, at in enumerate(due)]
    )
    assert time() < start
    await there.until_all(count, every_s=0.25)
    late_ms = [(at - wanted) * 1000 for at, wanted in zip(await there.times(), due, strict=True)]
    assert min(late_ms) >= -0.01, min(late_ms)  # never early; one clock for both, to the microsecond
    return late_ms
