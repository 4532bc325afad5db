"""What a retention setting removes, and what must stay."""

from __future__ import annotations

from datetime import timedelta

import pytest

from daemon.db import ledger
from daemon.db.pool import Database
from daemon.domain.job import NewJob
from daemon.queue.burial import bury
from daemon.queue.maintenance import QueueMaintenance
from tests.ledger_kit import assert_laws, make_account, row

pytestmark = pytest.mark.anyio


async def test_old_months_go_with_their_rows_and_the_sums_stay_equal(db: Database) -> None:
    account = await make_account(db)
    now = (await db.now()).replace(minute=0, second=0, microsecond=0)
    await account.read({now - timedelta(days=200): (row(tokens=7),)})
    await account.read({now: (row(tokens=5),)})
    dropped = await ledger.drop_months(db, timedelta(days=100))
    assert f"ledger_{now - timedelta(days=200):%Y%m}" in dropped
    assert await account.tokens() == 5
    assert await db.fetchval("select count(*) from bucket") == 1
    await assert_laws(db)
    assert await ledger.drop_months(db, timedelta(days=100)) == []


async def test_month_that_is_not_over_stays_whole(db: Database) -> None:
    account = await make_account(db)
    month = (await db.now()).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    await account.read({month: (row(tokens=7),)})
    assert f"ledger_{month:%Y%m}" not in await ledger.drop_months(db, timedelta(days=1))
    assert await account.tokens() == 7


async def test_dead_letters_are_kept_for_ever_unless_told_otherwise(db: Database) -> None:
    maintenance = QueueMaintenance(db)
    async with db.transaction() as tx:
        old, young = await bury(tx, [(NewJob("poll_one"), "old"), (NewJob("poll_one"), "young")])
    await db.execute("update dead set at = at - interval '40 days' where id = $1", old)
    await maintenance.prune()
    assert {letter.id for letter in await maintenance.dead_list()} == {old, young}
    await maintenance.prune(dead_kept=timedelta(days=30))
    assert {letter.id for letter in await maintenance.dead_list()} == {young}
    assert await maintenance.conservation() == []
