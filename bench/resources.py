"""30,000 resources of a REST API, two calls each for a program that goes one by one: the calls that tallyd makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import aiohttp
import anyio
import anyio.to_thread
import asyncpg
import msgspec

from bench.fleet import TALLYD, Fleet
from bench.report import Line, Target
from bench.stage import Stage, process
from daemon.by_hand import read_resource_file

KEY = "resource-key"
CHANGED_PERCENT = 27
BATCH = 100
IN_FLIGHT = 10
JOBS = 4
DELAY_S = 0.005
"""An API far away: so that calls overlap."""

LISTED = """
[list]
path = "/orders"
params = { fields = "id,updated_at", limit = 500 }
items = "data"
version = "updated_at"
paging = { kind = "cursor", param = "cursor", next = "meta.next" }
"""
SINCE = LISTED + 'since = { header = "If-Modified-Since", http_date = true }\n'
UNVERSIONED = LISTED.replace("id,updated_at", "id").replace('version = "updated_at"\n', "")
ONE_BY_ONE = """
[check]
path = "/orders/{id}"
params = { fields = "updated_at" }
version = "field"
field = "updated_at"
"""
IDS = 'ids_file = "ids.txt"\n'
MANY = """
[check]
path = "/orders"
params = { fields = "id,updated_at" }
ids_param = "ids"
items = "data"
version = "field"
field = "updated_at"
"""
CONDITIONAL = """
[check]
version = "etag"
conditional = true
"""


@dataclass
class _Api:
    url: str

    async def control(self, **params: object) -> dict[str, int]:
        """Steer the API, and learn what it was asked since it last forgot."""

        def ask() -> bytes:
            with urlopen(f"{self.url}/_control?{urlencode(params)}", timeout=30) as answer:
                body: bytes = answer.read()
                return body

        counts: dict[str, int] = msgspec.json.decode(await anyio.to_thread.run_sync(ask))
        return counts


async def two_steps(stage: Stage) -> list[Line]:
    """The naive program, then `tallyd resources sync`: all new with a bad one in each batch, and 73 % unchanged by each way
    of the first call.
    """
    count = stage.size(30_000, 400)
    with process("-m", "tests.resource_stand_in") as (_, ready):
        api = _Api(ready.decode().strip())
        await api.control(count=count, delay_s=DELAY_S)
        naive_calls, naive_s = await _naive(stage, api, count)
        async with stage.database() as url:
            fleet = Fleet(stage, url, "")
            await fleet.run("tenants", "add", "acme", "--json")
            watch: asyncpg.Connection = await asyncpg.connect(url)
            try:
                (stage.folder / "ids.txt").write_text("\n".join(f"r{n}" for n in range(count)))
                lines = [await _all_new(fleet, api, watch, count, naive_calls, naive_s)]
                for name, checks, bound in (
                    ("ids known, first call one by one", IDS + ONE_BY_ONE, 38_100),
                    ("listed with a projection", LISTED, 22_000),
                    ("first call for 100 at once", UNVERSIONED + MANY, 22_000),
                    ("a conditional call for the list", SINCE, 22_000),
                    ("a conditional call for each", UNVERSIONED + CONDITIONAL, 30_060),
                ):
                    target = Target("≤", bound * count / 30_000, "ours")
                    lines += await _again(fleet, api, watch, count, name, checks, target, naive_calls, naive_s)
                return lines
            finally:
                await watch.close()


async def _naive(stage: Stage, api: _Api, count: int) -> tuple[int, float]:
    """Two calls and one row for each resource, ten at a time; no list, no fence, no retry."""
    async with stage.database() as url, aiohttp.ClientSession(headers={"authorization": f"Bearer {KEY}"}) as session:
        pool = await asyncpg.create_pool(url, min_size=IN_FLIGHT, max_size=IN_FLIGHT)
        await pool.execute("create table naive (id text primary key, content jsonb)")
        ids = iter([f"r{n}" for n in range(count)])

        async def work() -> None:
            for id_ in ids:
                async with session.get(f"{api.url}/orders/{id_}?fields=updated_at") as answer:
                    await answer.read()
                async with session.get(f"{api.url}/orders/{id_}") as answer:
                    content = (await answer.read()).decode()
                await pool.execute(
                    "insert into naive values ($1, $2) on conflict (id) do update set content = excluded.content",
                    id_,
                    content,
                )

        began = perf_counter()
        async with anyio.create_task_group() as group:
            for _ in range(IN_FLIGHT):
                group.start_soon(work)
        took_s = perf_counter() - began
        assert await pool.fetchval("select count(*) from naive") == count
        await pool.close()
    counts = await api.control(forget=1)
    assert counts["calls"] == 2 * count
    return counts["calls"], took_s


async def _all_new(
    fleet: Fleet, api: _Api, watch: asyncpg.Connection, count: int, naive_calls: int, naive_s: float
) -> Line:
    bad = [f"r{n}" for n in range(0, count, BATCH)]
    await api.control(bad=",".join(bad))
    await _declare(fleet, api, LISTED)
    report = await _sync(fleet, code=1)
    good, batches = count - len(bad), count // BATCH
    assert (report["changed"], report["failed"], report["batches"]) == (good, len(bad), batches), report
    assert await watch.fetchval("select count(*) from resource") == good
    assert await watch.fetchval("select count(distinct poll_seq) from resource") == batches, "one write for each batch"
    counts = await api.control(bad="none", forget=1)
    assert counts["in_flight_max"] <= JOBS * IN_FLIGHT, counts
    await watch.execute("update due set run_at = now()")
    mended = await _sync(fleet)
    assert (mended["failed"], await watch.fetchval("select count(*) from resource")) == (0, count), mended
    await api.control(forget=1)
    return Line(
        f"resources, {count:,} new ones, one bad in each batch", report["calls"], "calls", naive_calls, "one by one",
        report["calls"] / naive_calls,
        note=f"{good:,} rows in {batches:,} bulk writes, {len(bad)} left for their retries, all of them mended by these; "
        f"{report['duration_s']:.1f} s against {naive_s:.1f} s; at most {counts['in_flight_max']} calls in flight for "
        f"{JOBS} batches at a time",
    )  # fmt: skip


async def _again(
    fleet: Fleet, api: _Api, watch: asyncpg.Connection, count: int, name: str, declaration: str, target: Target,
    naive_calls: int, naive_s: float,
) -> Sequence[Line]:  # fmt: skip
    settings = await _settings(fleet, api, declaration)
    await watch.execute("update connection set settings = $1::jsonb", msgspec.json.encode(settings).decode())
    if declaration.endswith(CONDITIONAL):
        # The versions of another way, as this one would have stored them.
        await watch.execute(
            "update resource set version = format('\"%s-%s\"', id, version::bigint - $1)", 1_790_000_000
        )
    if declaration == SINCE:
        await _sync(fleet)  # all of it once, to know since when to ask
    revisions = await watch.fetchval("select sum(revision) from resource")
    await api.control(changed=CHANGED_PERCENT, forget=1)
    report = await _sync(fleet)
    counts = await api.control(forget=1)
    changed = count * CHANGED_PERCENT // 100
    unchanged = 0 if declaration == SINCE else count - changed  # what did not change is not even listed
    assert (report["changed"], report["unchanged"], report["failed"]) == (changed, unchanged, 0), report
    assert counts["calls"] == report["calls"], (counts, report)
    assert counts["in_flight_max"] <= JOBS * IN_FLIGHT, counts
    assert await watch.fetchval("select sum(revision) from resource") - revisions == changed
    bodies = f", {counts['bodies']:,} of them with a content" if declaration.endswith(CONDITIONAL) else ""
    return [
        Line(
            f"resources, {count:,} with 73 % unchanged, {name}", report["calls"], "calls", naive_calls, "one by one",
            report["calls"] / naive_calls, target,
            note=f"{report['calls_saved']:,} saved{bodies}; {changed:,} rows in {report['batches']:,} bulk writes; "
            f"{report['duration_s']:.1f} s against {naive_s:.1f} s; {fleet.peak_bytes / 2**20:.0f} MiB at most",
        )
    ]  # fmt: skip


def _file(fleet: Fleet, api: _Api, declaration: str) -> str:
    path = fleet._stage.folder / "orders.toml"
    path.write_text(f'name = "orders"\nbase_url = "{api.url}"\n{declaration}\n[detail]\npath = "/orders/{{id}}"\n')
    return str(path)


async def _declare(fleet: Fleet, api: _Api, declaration: str) -> None:
    fleet.env = {**fleet.env, "RESOURCE_KEY": KEY, "TALLYD_CONCURRENCY": str(JOBS)}
    file = _file(fleet, api, declaration)
    await fleet.run("resources", "add", file, "--tenant", "acme", "--credential-env", "RESOURCE_KEY", "--json")


async def _settings(fleet: Fleet, api: _Api, declaration: str) -> dict[str, Any]:
    return dict(read_resource_file(Path(_file(fleet, api, declaration))).settings)


async def _sync(fleet: Fleet, *, code: int = 0) -> dict[str, int]:
    if code == 0:
        return await fleet.summary("resources", "sync")
    done = await anyio.run_process([*TALLYD, "resources", "sync", "--json"], env=fleet.env, check=False)
    assert done.returncode == code, done
    report: dict[str, int] = msgspec.json.decode(done.stdout)
    return report
