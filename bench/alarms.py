"""Ten thousand schedules: what it costs to look which are due, and to fire those that are."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import anyio

from bench.mail import HEADER, Mail, endpoint, settings, worker
from bench.replica import PostgresCpu, cpu_s
from bench.report import Line, Target
from bench.stage import Stage
from daemon.queue.message import Spec
from daemon.queue.schedules import Schedules

PER_S = 10
BATCH = 100
IDLE_CPU_MAX = 0.05
_ADD = """
insert into schedule (account_id, id, cron, destination, spec, body, next_at)
select $1, 'scd_' || i, '0 0 1 1 *', $3, $4, convert_to('{"n":' || lpad((i - 1)::text, 8, '0') || ',"text":"' || repeat('x', 100)
       || '"}', 'utf8'), now() + interval '1 day' from generate_series(1, $2) i
"""
_DUE = "update schedule set next_at = now() - interval '1 s' where id in (select 'scd_' || i from generate_series(1, $1) i)"
_SPREAD = """
update schedule s set next_at = now() + interval '1 s' + i * interval '1 s' / $2::int from generate_series(1, $1::int) i
where s.id = 'scd_' || i
"""


async def schedules(stage: Stage) -> list[Line]:
    """The statements by themselves, then a `tallyd run --role worker` while none is due and while some are."""
    count, seconds = stage.size(10_000, 200), stage.size(10, 2)
    async with stage.database() as url, endpoint() as there, Mail.open(stage, url) as mail:
        table = Schedules(mail.db, mail.queue, mail.messages, mail.accounts.limits_of)
        empty_ms = await _looks_ms(table, stage.size(100, 3))
        from msgspec.json import encode

        spec = encode(Spec(header=HEADER)).decode()
        await mail.watch.execute(_ADD, mail.account, count, f"{there.url}/in", spec)
        await mail.watch.execute("vacuum analyze")
        look_ms = await _looks_ms(table, stage.size(100, 3))
        one_ms = [await _fire_ms(mail, table, 1) for _ in range(stage.size(20, 2))]
        many_ms = [await _fire_ms(mail, table, BATCH) / BATCH for _ in range(stage.size(5, 1))]
        await mail.clear()
        await mail.watch.execute("vacuum analyze")
        postgres = await PostgresCpu.find(url)
        async with worker(settings(stage, url), stage.folder / "alarms.log") as replica:
            await anyio.sleep(stage.size(3, 1))
            used, server = cpu_s(replica.process), postgres.cpu_s()
            await anyio.sleep(seconds)
            idle, idle_server = (cpu_s(replica.process) - used) / seconds, (postgres.cpu_s() - server) / seconds
            due = PER_S * seconds
            await there.reset(due)
            used, server = cpu_s(replica.process), postgres.cpu_s()
            await mail.watch.execute(_SPREAD, due, PER_S)
            await there.until_all(due, wait_s=seconds + 60, every_s=0.25)
            busy, busy_server = (cpu_s(replica.process) - used) / seconds, (postgres.cpu_s() - server) / seconds
    return [
        Line(
            f"look for due schedules, {count:,} of them", look_ms, "ms", empty_ms, "with none", look_ms / empty_ms,
            Target("≤", 1.5),
        ),
        Line(
            f"firing of a schedule, {BATCH} due at once", median(many_ms), "ms", median(one_ms), "one alone",
            median(many_ms) / median(one_ms),
        ),
        Line(
            f"idle with {count:,} schedules that are not due, processor time over {seconds} s", idle * 100,
            "% of a core", target=Target("≤", IDLE_CPU_MAX * 100, "ours"), note=f"Postgres {idle_server:.1%}",
        ),
        Line(
            f"{PER_S} of them due each second, fired and delivered", busy * 100, "% of a core",
            note=f"Postgres {busy_server:.1%}; each fired once, each message arrived once",
        ),
    ]  # fmt: skip


async def _looks_ms(table: Schedules, times: int) -> float:
    """Median of what the service does each second: fire what is due, which is nothing, and ask for the next."""
    took = []
    for _ in range(times):
        began = perf_counter()
        assert await table.fire_due() == 0
        await table.next_due_s()
        took.append((perf_counter() - began) * 1000)
    return median(took)


async def _fire_ms(mail: Mail, table: Schedules, count: int) -> float:
    await mail.watch.execute(_DUE, count)
    began = perf_counter()
    assert await table.fire_due() == count
    return (perf_counter() - began) * 1000
