"""What ten thousand connections cost while none of them is due."""

from __future__ import annotations

import anyio
import asyncpg

from bench.fleet import environment
from bench.replica import PostgresCpu, cpu_s, replica
from bench.report import Line, Target
from bench.stage import Stage
from bench.ticking import copied_provider

CPU_MAX = 0.05
WARM_S = 10

_NOT_DUE = """
with t as (insert into tenant (name) select 'tenant-' || i from generate_series(1, 100) i returning id)
insert into connection (tenant_id, name, provider, base_url, credential, credential_key_id, credential_print, since,
  next_due_at)
select id, 'connection-' || i, 'openai', $2, '', '', '', now(), now() + interval '1 day'
from t, generate_series(1, $1) i
"""


async def nothing_due(stage: Stage) -> list[Line]:
    """One `tallyd run` that does everything, its listener on, with a tick of nothing each 300 s."""
    count, seconds = stage.size(10_000, 400), stage.size(60, 3)
    async with stage.database() as url, copied_provider() as provider:
        watch: asyncpg.Connection = await asyncpg.connect(url)
        await watch.execute(_NOT_DUE, count // 100, f"{provider.url}/v1")
        await watch.execute("vacuum analyze")
        async with replica(environment(stage, url), stage.folder / "idle.log") as daemon:
            await anyio.sleep(stage.size(WARM_S, 1))
            postgres = await PostgresCpu.find(url)
            used, server = cpu_s(daemon.process), postgres.cpu_s()
            await anyio.sleep(seconds)
            used, server = cpu_s(daemon.process) - used, postgres.cpu_s() - server
            # It was alive, and had looked for work.
            assert b'"ready":true' in await daemon.get("/readyz")
            assert (
                await watch.fetchval("select count(*) from worker where seen_at > now() - interval '12 seconds'") == 1
            )
            ticks = [tuple(row) for row in await watch.fetch("select connections, batches from tick")]
            assert set(ticks) == {(0, 0)}, ticks
        asked = await provider.asked()
        assert asked == 0, asked
        await watch.close()
    return [
        Line(
            f"idle with {count:,} connections that are not due, processor time over {seconds} s",
            used / seconds * 100, "% of a core", target=Target("≤", CPU_MAX * 100, "ours"),
            note=f"Postgres {server / seconds * 100:.1f} %; {asked} requests to providers",
        )
    ]  # fmt: skip
