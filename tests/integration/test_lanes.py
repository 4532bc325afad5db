"""What lanes cost: a claim reads as much as it takes, however much waits behind a limit."""

import json

import pytest

from daemon.db.pool import Database, query
from daemon.domain.job import KEY_END, PUSH_KEY, WorkerId
from daemon.queue.postgres import PostgresQueue

pytestmark = pytest.mark.anyio

FILL = """
    with j as (insert into job (kind, key_id, body)
      select 'x', $1, '' from generate_series(1, $2::int) returning id, key_id)
    insert into ready select key_id, 100, now(), id, 0, 0, 0 from j
"""


async def pages(db: Database, worker: WorkerId, full: list[int]) -> int:
    """Pages that a claim of 100 touches to find what it may take, which is then left there."""
    limits = (10, full, [0] * len(full))
    async with db.transaction() as tx:
        await tx.execute("set local plan_cache_mode = force_generic_plan; savepoint before")
        explain = "explain (analyze, buffers, format json) " + query("claim_fair")
        (row,) = await tx.fetch(explain, PUSH_KEY - 1, 100, worker, 15.0, KEY_END, *limits)
        await tx.execute("rollback to before")
    plan = json.loads(row[0])[0]["Plan"]
    found = [node for node in plan["Plans"] if node.get("Subplan Name") in {"CTE k", "CTE h"}]
    assert len(found) == 2
    return sum(node["Shared Hit Blocks"] + node["Shared Read Blocks"] for node in found)


@pytest.mark.parametrize("is_analysed", [False, True])
async def test_full_key_costs_a_claim_one_look_however_many_jobs_it_has(db: Database, is_analysed: bool) -> None:
    worker = await PostgresQueue(db).register_worker()
    for key in range(1, 11):
        await db.execute(FILL, PUSH_KEY + key, 10)
    before = await pages(db, worker, [PUSH_KEY])
    await db.execute(FILL, PUSH_KEY, 200_000)
    await db.execute("analyze ready" if is_analysed else "select 1")
    assert await pages(db, worker, [PUSH_KEY]) <= before + 110 * 2  # the index is two levels higher at most
    assert await pages(db, worker, [PUSH_KEY + key for key in range(11)]) < 100
