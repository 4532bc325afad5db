"""The ledger against the schedules that broke an earlier design, on a real Postgres."""

from __future__ import annotations

import random
from datetime import datetime, timedelta
from decimal import Decimal

import anyio
import pytest

from daemon.db import streams
from daemon.db.pool import Database, Executor, Session
from daemon.domain.errors import DataRejectedError, LeaseLostError
from daemon.domain.job import JobId
from daemon.domain.window import Window
from daemon.records.identity import grain_id
from daemon.sinks.ledger import Effects, Flush
from tests.ledger_kit import (
    HOUR,
    OTHER_GRAIN,
    T0,
    Account,
    assert_laws,
    lock_nothing,
    make_account,
    row,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
async def account(db: Database) -> Account:
    return await make_account(db)


async def until_blocked(db: Database) -> None:
    """Wait until some session waits for a lock: the database says so itself."""
    while not await db.fetchval("select exists (select from pg_stat_activity where wait_event_type = 'Lock')"):
        await anyio.lowlevel.checkpoint()


async def test_growth_is_booked_as_its_difference(account: Account) -> None:
    """An open bucket that is polled again and again must not be booked again and again."""
    for tokens in (10, 14, 14, 25):
        await account.read({T0: (row(tokens=tokens),)})
    assert await account.ledger() == [(1, 10, 1), (2, 4, 2), (3, 11, 2)]
    assert await account.tokens() == 25


async def test_long_amounts_are_booked_to_their_last_digit(db: Database) -> None:
    """Law 8: a sum rounded to 28 digits differs from its rows, and a late digit is a restatement too."""
    account = await make_account(db, kind="cost")
    for last, twice in (("1", "2"), ("2", "4")):
        amount = Decimal("1." + "0" * 97 + last)
        await account.read({T0: tuple(row(f"m{n}", tokens=None, amount=amount, currency="USD") for n in range(2))})
        assert await db.fetchval("select sum(amount) from ledger") == Decimal("2." + "0" * 97 + twice)
        await assert_laws(db)


async def test_a_restored_value_is_a_revision_of_its_own(account: Account) -> None:
    """A hash of the value with DO NOTHING would swallow the third state of A, B, A."""
    for tokens in (10, 7, 10):
        await account.read({T0: (row(tokens=tokens),)})
    assert await account.ledger() == [(1, 10, 1), (2, -3, 2), (3, 3, 2)]
    await assert_laws(account.db)


async def test_the_same_answer_three_times_at_once_books_once(account: Account) -> None:
    piece = account.piece(await account.seq(), {T0: (row(tokens=500),)})
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(account.book, piece)
    assert await account.tokens() == 500
    assert len(await account.ledger()) == 1


async def test_flush_that_waited_for_another_reads_what_that_one_wrote(account: Account) -> None:
    """Schedule 1: a statement that waits for the lock and reads old values at once would book 140 upon 100."""
    first, second = await account.seq(), await account.seq()
    is_written, may_commit = anyio.Event(), anyio.Event()

    async def hold(_tx: Session, _effects: Effects) -> None:
        is_written.set()
        await may_commit.wait()

    slow = Flush(JobId(0), pieces=[account.piece(first, {T0: (row(tokens=100),)})], also=[hold])
    async with anyio.create_task_group() as group:
        group.start_soon(account.sink.book, slow, lock_nothing)
        await is_written.wait()
        group.start_soon(account.book, account.piece(second, {T0: (row(tokens=140),)}))
        await until_blocked(account.db)
        may_commit.set()
    assert await account.tokens() == 140
    assert await account.ledger() == [(1, 100, 1), (2, 40, 2)]


async def test_older_answer_is_refused_after_a_newer_one(account: Account) -> None:
    older, newer = await account.seq(), await account.seq()
    await account.book(account.piece(newer, {T0: (row(tokens=140),)}))
    effect = await account.book(account.piece(older, {T0: (row(tokens=100),)}))
    assert effect.refused == 1
    assert await account.tokens() == 140


async def test_older_answer_is_refused_after_a_newer_one_that_changed_nothing(account: Account) -> None:
    """A check on the usage row alone would let it through: the newer poll never touched that row."""
    await account.read({T0: (row(tokens=100),)})
    older, newer = await account.seq(), await account.seq()
    await account.book(account.piece(newer, {T0: (row(tokens=100),)}))
    await account.book(account.piece(older, {T0: (row(tokens=60),)}))
    assert await account.tokens() == 100


async def test_older_answer_is_refused_after_a_probe_that_read_nothing(account: Account) -> None:
    """Schedule 2: an unchanged probe writes its seq and window to the stream alone, and they fence."""
    await account.read({T0: (row(tokens=100),)})
    older, newer = await account.seq(), await account.seq()
    window = Window(T0, T0 + 3 * HOUR)
    await account.sink.book(Flush(JobId(0), ends=[account.end(newer, window)]), lock_nothing)
    stale = account.piece(older, {T0: (row(tokens=60),), T0 + HOUR: (row(tokens=5),), T0 - HOUR: (row(tokens=3),)})
    effect = await account.book(stale)
    assert effect.refused == 2
    assert await account.tokens() == 103  # the hour before the probed window was not looked at since


async def test_backfill_and_live_poll_do_not_fence_each_other_off(account: Account) -> None:
    backfill, live = await account.seq(), await account.seq()
    window = Window(T0, T0 + HOUR)
    await account.book(account.piece(live, {T0: (row(tokens=5),)}), ends=(account.end(live, window),))
    await account.book(account.piece(backfill, {T0 - 5 * HOUR: (row(tokens=7),)}))
    assert await account.tokens() == 12


async def test_late_attribution_moves_the_amount_when_the_total_stands(account: Account) -> None:
    await account.read({T0: (row(project=None, tokens=50), row("m2", tokens=1))})
    await account.read({T0: (row(project="p9", tokens=50), row("m2", tokens=1))}, witness="totals")
    assert await account.tokens() == 51
    assert sorted(await account.ledger()) == [(1, 1, 1), (1, 50, 1), (1, 50, 1), (2, -50, 3)]
    await assert_laws(account.db)


async def test_vanished_row_without_a_witness_waits_for_a_second_read(account: Account) -> None:
    """Schedule 8: three copies of one glitch within milliseconds are still one witness."""
    await account.read({T0: (row("m1", tokens=50), row("m2", tokens=1))})
    for _ in range(3):
        await account.read({T0: (row("m2", tokens=1),)})
    assert await account.tokens() == 51
    assert await account.db.fetchval("select pending_since is not null from bucket") is True
    await assert_laws(account.db)
    await account.db.execute("update bucket set pending_since = pending_since - interval '11 minutes'")
    await account.read({T0: (row("m2", tokens=1),)})
    assert await account.tokens() == 1
    assert await account.db.fetchval("select pending_since is null from bucket") is True
    await assert_laws(account.db)


async def test_glitch_that_heals_leaves_nothing_behind(account: Account) -> None:
    rows = (row("m1", tokens=50), row("m2", tokens=1))
    await account.read({T0: rows})
    await account.read({T0: rows[1:]})
    await account.read({T0: rows})
    assert len(await account.ledger()) == 2
    assert await account.db.fetchval("select pending_since is null from bucket") is True


async def test_another_key_missing_later_starts_its_own_wait(account: Account) -> None:
    """Ten minutes of one key's absence must not count for another's."""
    both = (row("m1", tokens=50), row("m2", tokens=1))
    await account.read({T0: both})
    await account.read({T0: both[1:]})
    await account.db.execute("update bucket set pending_since = pending_since - interval '11 minutes'")
    await account.read({T0: both[:1]})
    assert await account.tokens() == 51


async def test_bucket_that_drops_to_empty_is_not_believed_at_once(account: Account) -> None:
    """A provider's bad moment shows nothing in the grouped and in the ungrouped read alike."""
    await account.read({T0: (row(tokens=50),)})
    await account.read({T0: ()}, witness="totals")
    assert await account.tokens() == 50
    await account.read({T0: ()}, witness="full")
    assert await account.tokens() == 0
    await account.read({T0: (row(tokens=50),)})
    assert await account.ledger() == [(1, 50, 1), (2, -50, 3), (3, 50, 1)]
    await assert_laws(account.db)


async def regroup(db: Executor, account: Account, boundary: datetime) -> None:
    await db.execute(
        """insert into grain_epoch (stream_id, start_at, grain_id, api, width, group_by)
           values ($1, $2, $3, $4, $5, $6)""",
        account.stream.id,
        boundary,
        grain_id(OTHER_GRAIN),
        OTHER_GRAIN.api,
        OTHER_GRAIN.width.value,
        list(OTHER_GRAIN.group_by),
    )


async def test_flush_waits_for_a_regrouping_that_is_under_way(account: Account) -> None:
    """The epochs are read under the stream's lock: a moment earlier they would still name the old grain."""
    boundary = T0 + HOUR
    stale = account.piece(await account.seq(), {boundary: (row(tokens=100),)})
    refused = []

    async def book() -> None:
        refused.append((await account.book(stale)).refused)

    async with anyio.create_task_group() as group, account.db.transaction() as tx:
        await streams.lock_of(tx, [account.connection.id])
        await regroup(tx, account, boundary)
        group.start_soon(book)
        await until_blocked(account.db)
    assert refused == [1]
    assert await account.tokens() == 0


async def test_regrouped_bucket_refuses_a_stale_answer_of_the_old_grain(account: Account) -> None:
    """Schedule 7: the old grain has no fence row in a bucket that only the new one has."""
    boundary = T0 + HOUR
    await regroup(account.db, account, boundary)
    stale = account.piece(await account.seq(), {T0: (row(tokens=1),), boundary: (row(tokens=100),)})
    effect = await account.book(stale)
    assert effect.refused == 1
    new = row(tokens=100)._replace(dims=(("model", "m1"),))
    await account.book(account.piece(await account.seq(), {boundary: (new,)}, grain=OTHER_GRAIN))
    assert await account.tokens() == 101
    early = account.piece(await account.seq(), {T0: (new,)}, grain=OTHER_GRAIN)
    assert (await account.book(early)).refused == 1
    await assert_laws(account.db)


async def test_zombie_writes_nothing_at_all(account: Account) -> None:
    """Schedule 4: every flush is fenced by the lease, not only the last one."""

    async def lost(_tx: Session) -> None:
        raise LeaseLostError

    piece = account.piece(await account.seq(), {T0: (row(),)})
    with pytest.raises(LeaseLostError):
        await account.sink.book(Flush(JobId(0), pieces=[piece]), lost)
    assert await account.db.fetchval("select count(*) from bucket") == 0
    assert await account.tokens() == 0


async def test_flushes_over_the_same_streams_in_any_order_never_deadlock(db: Database) -> None:
    """Schedule 9: every flush takes its locks in one order, whatever the order of its pieces."""
    accounts = [await make_account(db, f"c{n}") for n in range(6)]
    dice = random.Random(3)

    async def poll(tokens: int) -> None:
        order = dice.sample(accounts, k=len(accounts))
        pieces = [
            a.piece(await a.seq(), {T0 + n * HOUR: (row(tokens=tokens + n),) for n in dice.sample(range(4), k=4)})
            for a in order
        ]
        await accounts[0].sink.book(Flush(JobId(0), pieces=pieces), lock_nothing)

    before = await db.fetchval("select deadlocks from pg_stat_database where datname = current_database()")
    async with anyio.create_task_group() as group:
        for n in range(24):
            group.start_soon(poll, n)
    await db.fetchval("select pg_stat_clear_snapshot()")
    after = await db.fetchval("select deadlocks from pg_stat_database where datname = current_database()")
    assert after == before
    for account in accounts:
        newest = await db.fetchval("select max(last_seq) from bucket where stream_id = $1", account.stream.id)
        assert newest is not None
        await account.tokens()
    await assert_laws(db)


async def test_data_that_postgres_refuses_is_found_among_the_good(db: Database) -> None:
    """Schedule 10: a NUL in one model name must not hold up the other connections."""
    accounts = [await make_account(db, f"c{n}") for n in range(5)]
    pieces = [a.piece(await a.seq(), {T0: (row(f"m{n}", tokens=10),)}) for n, a in enumerate(accounts)]
    bad = accounts[3]
    pieces[3] = bad.piece(pieces[3].seq, {T0: (row("evil\0model"),)})
    flush = Flush(JobId(0), pieces=pieces)
    with pytest.raises(DataRejectedError):
        await bad.sink.book(flush, lock_nothing)
    assert await db.fetchval("select count(*) from ledger") == 0
    culprits = await bad.sink.find_culprits(flush, lock_nothing)
    assert list(culprits) == [bad.stream.id]
    assert await db.fetchval("select count(*) from ledger") == 0
    flush.pieces = [piece for piece in pieces if piece.stream.id not in culprits]
    await bad.sink.book(flush, lock_nothing)
    assert await db.fetchval("select sum(input_tokens)::int from ledger") == 40


async def test_bucket_of_newer_code_is_left_alone(account: Account) -> None:
    """Schedule 13: with two versions of the hashes side by side, revisions would flap for ever."""
    await account.read({T0: (row(tokens=10),)})
    await account.db.execute("update bucket set hash_version = hash_version + 1")
    effect = await account.read({T0: (row(tokens=20),)})
    assert effect.refused == 1
    assert await account.tokens() == 10


async def test_new_month_gets_its_partition_while_a_long_report_reads(account: Account) -> None:
    """Schedule 13: `CREATE TABLE … PARTITION OF` would wait behind the report, and every flush behind that."""
    async with account.db.transaction() as report:
        await report.fetchval("select count(*) from ledger")
        with anyio.fail_after(10):
            await account.read({T0 - timedelta(days=400): (row(tokens=3),)})
    assert await account.tokens() == 3


async def test_flushes_make_the_same_partitions_at_once(db: Database) -> None:
    """Whoever waited for the lock must see what its last holder made, whatever its caches say."""
    accounts = [await make_account(db, f"c{n}") for n in range(8)]
    for months in range(12):
        async with anyio.create_task_group() as group:
            for account in accounts:
                group.start_soon(account.read, {T0 + timedelta(days=800 + 31 * months): (row(tokens=1),)})
    assert await db.fetchval("select sum(input_tokens)::int from ledger") == 96


async def test_money_of_two_currencies_stays_apart(db: Database) -> None:
    account = await make_account(db, source="costs", kind="cost")

    def cost(amount: str, currency: str):
        dims = (("currency", currency), ("line_item", "x, input: y|z"))
        return row()._replace(dims=dims, input_tokens=None, amount=Decimal(amount), currency=currency)

    await account.read({T0: (cost("0.1", "USD"), cost("-0.30", "EUR"))})
    await account.read({T0: (cost("0.10", "USD"), cost("-0.3", "EUR"))})
    rows = await db.fetch("select currency, basis, sum(amount) as amount from usage_row group by 1, 2 order by 1")
    assert [tuple(r) for r in rows] == [
        ("EUR", "provider", Decimal("-0.30")),
        ("USD", "provider", Decimal("0.1")),
    ]
    assert await db.fetchval("select count(*) from ledger") == 2  # 0.10 is 0.1: nothing was restated


async def test_what_is_not_reported_stays_null_through_every_revision(account: Account) -> None:
    await account.read({T0: (row(tokens=None, output_tokens=4),)})
    await account.read({T0: (row(tokens=None, output_tokens=9),)})
    await account.read({T0: ()}, witness="full")
    found = await account.db.fetchrow(
        "select count(input_tokens) as known, sum(output_tokens)::int as output from ledger"
    )
    assert tuple(found) == (0, 0)
    assert await account.db.fetchval("select input_tokens is null from usage_row") is True


async def test_duplicate_rows_of_one_answer_are_summed_whatever_their_order(account: Account) -> None:
    twins = (row(tokens=3), row(tokens=4), row("m2", tokens=1))
    await account.read({T0: twins})
    await account.read({T0: twins[::-1]})
    assert await account.tokens() == 8
    assert len(await account.ledger()) == 2


async def test_drift_is_never_seen_while_flushes_run(account: Account) -> None:
    """A check that reads ledger and rows in two statements would see a drift that is not there."""
    done = False

    async def grow() -> None:
        nonlocal done
        for tokens in range(1, 40):
            await account.read({T0: (row(tokens=tokens),)})
        done = True

    async with anyio.create_task_group() as group:
        group.start_soon(grow)
        while not done:
            await account.tokens()
