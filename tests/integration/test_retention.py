"""What a retention setting removes, and what must stay."""

from __future__ import annotations

from datetime import timedelta
from typing import cast

import anyio
import pytest

from daemon.app import open_app
from daemon.config import load
from daemon.db import ledger
from daemon.db.pool import Database
from daemon.domain.job import NewJob
from daemon.queue.burial import bury
from daemon.queue.maintenance import QueueMaintenance
from daemon.service import keep_house
from tests.books_kit import SECRET_KEY
from tests.ledger_kit import T0, assert_laws, make_account, row

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


async def test_two_replicas_may_drop_the_same_month(db: Database) -> None:
    account = await make_account(db)
    await account.read({T0 - timedelta(days=400): (row(),)})
    looked, have_both = 0, anyio.Event()

    class Replica:
        """Both look which months are old before either drops one."""

        transaction = staticmethod(db.transaction)

        async def fetch(self, sql: str, *args: object) -> object:
            nonlocal looked
            rows = await db.fetch(sql, *args)
            looked += 1
            if looked == 2:
                have_both.set()
            await have_both.wait()
            return rows

    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(ledger.drop_months, cast(Database, Replica()), timedelta(days=200))
    assert await account.tokens() == 0
    await assert_laws(db)


async def test_chore_that_fails_for_good_is_told_and_holds_up_no_other(
    database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It must not end the daemon: the next round, or a release, may succeed. A programming error does end it."""
    async with open_app(load({"database_url": database_url, "secret_key": SECRET_KEY}, {})) as app:
        await app.db.execute("drop table dedup")
        await app.db.execute("insert into pause values ('h', '', now() - interval '1 day', '')")
        await keep_house(app)
        assert "maintenance.failed" in capsys.readouterr().out
        assert await app.db.fetchval("select count(*) from pause") == 0
        app.queue = cast(QueueMaintenance, None)
        with pytest.raises(AttributeError):
            await keep_house(app)


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
