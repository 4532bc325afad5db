"""What becomes of quota counters in the books: epochs, history, write-backs under way, and the sum of what was used."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.db import ledger, quota
from daemon.db.insights import Insights
from daemon.db.pool import Database, Session
from daemon.db.quota import Kind, QuotaStore
from daemon.domain.collection import Collected, Counter, Item
from daemon.domain.connection import StreamId
from daemon.domain.errors import DataRejectedError
from daemon.domain.job import JobId
from daemon.sinks.ledger import Effect, Flush, LedgerSink, Lot
from daemon.sinks.quota import QuotaTaker
from tests.ledger_kit import Account, lock_nothing, make_account

pytestmark = pytest.mark.anyio


class Posted:
    """Keeps what the sink hands over; it is part of the transaction like the real outbox."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def post(self, tx: Session, url: str, lane: str, bodies: Sequence[bytes]) -> None:
        await tx.execute("select 1")
        self.bodies += bodies


class Quotas:
    def __init__(self, db: Database, account: Account) -> None:
        self.db = db
        self.account = account
        self.ended: list[StreamId] = []
        self.sink = LedgerSink(db, {"quota": QuotaTaker(Posted(), self._end)})

    async def _end(self, _tx: Session, streams: Sequence[StreamId]) -> None:
        self.ended += streams

    async def read(
        self,
        values: dict[str, Any],
        *,
        seq: int | None = None,
        is_restored: bool = False,
        sink: LedgerSink | None = None,
    ) -> Effect:
        """One reading: a counter for each user."""
        items: list[Item] = [counter(user, value) for user, value in values.items()]
        return await self.take(items, seq=seq, is_restored=is_restored, sink=sink)

    async def take(
        self,
        items: Sequence[Item],
        *,
        seq: int | None = None,
        is_restored: bool = False,
        sink: LedgerSink | None = None,
    ) -> Effect:
        seq = seq or await self.account.seq()
        lot = Lot(self.account.connection, self.account.stream, "quota", seq, Collected(items, None, is_restored))
        effects = await (sink or self.sink).book(Flush(JobId(1), lots=[lot]), lock_nothing)
        return effects[self.account.stream.id]

    async def rows(self) -> dict[str, tuple[Decimal, Decimal, int, int]]:
        """(value, used, epoch, revision) by user."""
        found = await self.db.fetch("select * from quota where stream_id = $1", self.account.stream.id)
        return {r["user_name"]: (r["value"], r["used"], r["epoch"], r["revision"]) for r in found}

    async def history(self, user: str = "u") -> list[tuple[Kind, int]]:
        changes = await QuotaStore(self.db).changes(None, None, user, 100)
        return [(change.kind, int(change.delta)) for change in reversed(changes)]


def counter(user: str, value: Any, detail: bytes = b"{}") -> Counter:
    return Counter(f"quota:{user}", user, None, None, Decimal(value), detail)


@pytest.fixture
async def quotas(db: Database) -> Quotas:
    return Quotas(db, await make_account(db, source="quota", kind="quota"))


async def assert_law(db: Database) -> None:
    checks = {check.name: check for check in await Insights(db).laws()}
    assert checks["quota history equals use"].is_ok, checks["quota history equals use"].detail


async def test_what_a_counter_grows_by_is_used(quotas: Quotas) -> None:
    first = await quotas.read({"u": 5, "v": 2})
    assert (first.new, first.restated, first.items) == (2, 0, 2)
    second = await quotas.read({"u": 8, "v": 2})
    assert (second.new, second.restated, second.items) == (0, 1, 2)
    assert await quotas.rows() == {"u": (8, 8, 1, 2), "v": (2, 2, 1, 1)}
    assert await quotas.history() == [(Kind.NEW, 5), (Kind.GROWN, 3)]
    await assert_law(quotas.db)


async def test_a_reading_without_news_writes_nothing(quotas: Quotas) -> None:
    await quotas.read({"u": 5, "v": 2})
    before = await quotas.db.fetch("select xmin::text, ctid::text, * from quota order by key")
    assert (await quotas.read({"u": 5, "v": 2})).rows == 0
    assert await quotas.db.fetch("select xmin::text, ctid::text, * from quota order by key") == before


async def test_a_reset_counts_what_it_shows_and_a_restore_nothing(quotas: Quotas) -> None:
    for value in (100, 7):
        await quotas.read({"u": value})
    await quotas.read({"u": 4}, is_restored=True)
    await quotas.read({"u": 9})
    assert await quotas.history() == [(Kind.NEW, 100), (Kind.RESET, 7), (Kind.RESTORED, 0), (Kind.GROWN, 5)]
    assert await quotas.rows() == {"u": (9, 112, 3, 4)}
    await assert_law(quotas.db)


async def test_what_grew_on_a_restored_server_was_used(quotas: Quotas) -> None:
    await quotas.read({"u": 100})
    await quotas.read({"u": 130}, is_restored=True)
    assert await quotas.history() == [(Kind.NEW, 100), (Kind.GROWN, 30)]


async def test_a_refund_counts_nothing_where_counters_may_be_taken_back(quotas: Quotas) -> None:
    await quotas.db.execute("select 1")
    quotas.account.connection.target.settings["falls"] = "refund"  # type: ignore[index]
    for value in (100, 90, 95):
        await quotas.read({"u": value})
    assert await quotas.history() == [(Kind.NEW, 100), (Kind.REFUNDED, 0), (Kind.GROWN, 5)]


async def test_a_negative_counter_is_no_use(quotas: Quotas) -> None:
    for value in (-5, -2, -9):
        await quotas.read({"u": value})
    assert await quotas.history() == [(Kind.NEW, 0), (Kind.GROWN, 3), (Kind.RESET, 0)]
    await assert_law(quotas.db)


async def test_a_key_that_comes_twice_counts_once_and_the_later_value_stands(quotas: Quotas) -> None:
    effect = await quotas.take([counter("u", 5), counter("v", 1), counter("u", 6)])
    assert (effect.new, effect.items) == (2, 2)
    await quotas.take([counter("u", 6)])
    assert await quotas.rows() == {"u": (6, 6, 1, 1), "v": (1, 1, 1, 1)}


async def test_a_value_that_comes_back_is_a_revision_of_its_own(quotas: Quotas) -> None:
    """A, B, A: the third state must not pass for a copy of the first."""
    for value in (5, 9, 5, 9):
        await quotas.read({"u": value})
    assert [kind for kind, _ in await quotas.history()] == [Kind.NEW, Kind.GROWN, Kind.RESET, Kind.GROWN]
    await assert_law(quotas.db)


async def test_detail_alone_changes_without_use(quotas: Quotas) -> None:
    await quotas.take([counter("u", 5, b'{"limit":"10"}')])
    await quotas.take([counter("u", 5, b'{"limit":"20"}')])
    await quotas.take([counter("u", 5, b'{"limit":"20"}')])
    assert await quotas.history() == [(Kind.NEW, 5), (Kind.DETAIL, 0)]


async def test_exact_at_any_size(quotas: Quotas) -> None:
    big = Decimal(9223372036854775807)
    for value in (big, big * 10, big * 10 + Decimal("1e-17")):
        await quotas.read({"u": value})
    assert (await quotas.rows())["u"][1] == big * 10 + Decimal("1e-17")


async def test_the_same_lot_three_times_at_once_counts_once(quotas: Quotas) -> None:
    seq = await quotas.account.seq()
    effects: list[Effect] = []

    async def book() -> None:
        effects.append(await quotas.read({f"u{n}": n for n in range(500)}, seq=seq))

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(book)
    assert sorted(effect.rows for effect in effects) == [0, 0, 500]
    assert await quotas.db.fetchval("select sum(used) from quota") == sum(range(500))
    await assert_law(quotas.db)


async def test_an_older_reading_is_refused_once_a_newer_one_has_begun(quotas: Quotas) -> None:
    """Even where the newer one changed nothing: its first item bars who began before."""
    await quotas.read({"u": 5})
    older, newer = await quotas.account.seq(), await quotas.account.seq()
    await quotas.read({"u": 5}, seq=newer)
    effect = await quotas.read({"u": 3}, seq=older)
    assert (effect.refused, effect.rows) == (1, 0)
    assert await quotas.rows() == {"u": (5, 5, 1, 1)}


async def test_bad_item_names_its_source_and_leaves_the_flush_unwritten(quotas: Quotas) -> None:
    items = [counter("u", 5), Counter("quota:\x00", "\x00", None, None, Decimal(1))]
    with pytest.raises(DataRejectedError):
        await quotas.take(items)
    assert await quotas.rows() == {}
    lot = Lot(quotas.account.connection, quotas.account.stream, "quota", 10, Collected(items))
    assert set(await quotas.sink.find_culprits(Flush(JobId(1), lots=[lot]), lock_nothing)) == {quotas.account.stream.id}


# ── A write-back under way ──────────────────────────────────────────────────────────────────────


async def mark(quotas: Quotas, value: int) -> int:
    seq = await quotas.account.seq()
    async with quotas.db.transaction() as tx:
        await ledger.lock_streams(tx, [quotas.account.stream.id])
        await ledger.raise_fences(tx, {quotas.account.stream.id: seq})
        await QuotaStore(quotas.db).mark(tx, quotas.account.stream.id, {"quota:u": Decimal(value)})
    return seq


async def confirm(quotas: Quotas, seq: int, value: int, *, gone: bool = False) -> None:
    """As a write-back does it: see `daemon.worker.quota`."""
    stream, after, values = quotas.account.stream.id, await quotas.account.seq(), {"quota:u": Decimal(value)}
    async with quotas.db.transaction() as tx:
        fence = (await ledger.lock_streams(tx, [stream]))[stream]
        await ledger.raise_fences(tx, {stream: after})
        if fence.last_seq == seq:
            await QuotaStore(quotas.db).written(tx, stream, seq, values, set() if gone else {*values})
        elif not gone:
            await QuotaStore(quotas.db).mark(tx, stream, values)


async def test_a_written_value_is_no_use(quotas: Quotas) -> None:
    await quotas.read({"u": 100})
    await confirm(quotas, await mark(quotas, 80), 80)
    await quotas.read({"u": 83})
    assert await quotas.history() == [(Kind.NEW, 100), (Kind.WRITTEN, 0), (Kind.GROWN, 3)]
    await assert_law(quotas.db)


@pytest.mark.parametrize(
    ("wanted", "met", "used"),
    [
        (80, 100, 0),
        (80, 80, 0),
        (80, 85, 5),  # it was set, or a fall: at least so much in either case
        (80, 120, 20),  # it was not set, or had grown by more
        (80, 7, 0),
        (130, 120, 20),  # not set yet
        (130, 130, 0),
        (130, 135, 5),
        (130, 7, 0),
    ],
)
async def test_a_crash_between_mark_and_confirmation_counts_nothing_twice(
    quotas: Quotas, wanted: int, met: int, used: int
) -> None:
    """Whichever value the next reading meets, it starts an epoch there, and counts what is certain."""
    await quotas.read({"u": 100})
    await mark(quotas, wanted)
    await quotas.read({"u": met})
    await quotas.read({"u": met + 1})
    assert await quotas.history() == [(Kind.NEW, 100), (Kind.WRITTEN, used), (Kind.GROWN, 1)]
    await assert_law(quotas.db)


@pytest.mark.parametrize(("falls", "is_restored"), [("refund", False), ("reset", True)])
async def test_what_may_have_fallen_under_a_mark_is_no_use(quotas: Quotas, falls: str, is_restored: bool) -> None:
    quotas.account.connection.target.settings["falls"] = falls  # type: ignore[index]
    await quotas.read({"u": 100})
    for wanted, met in ((80, 90), (120, 110)):
        await mark(quotas, wanted)
        await quotas.read({"u": met}, is_restored=is_restored)
    assert [delta for _, delta in await quotas.history()] == [100, 0, 0]


async def test_a_write_back_that_is_refused_each_time_loses_no_use(quotas: Quotas) -> None:
    """The server's user may lack the right to set."""
    for value in (100, 110, 125):
        await quotas.read({"u": value})
        await mark(quotas, 50)
    assert (await quotas.rows())["u"][:2] == (125, 125)


async def test_of_two_write_backs_in_the_dark_neither_is_believed(quotas: Quotas) -> None:
    """The first one's answer was lost, the second one never got through: it stands on what the first one set."""
    await quotas.read({"u": 40})
    await mark(quotas, 50)
    await mark(quotas, 60)
    await quotas.read({"u": 52})
    await quotas.read({"u": 53})
    assert await quotas.history() == [(Kind.NEW, 40), (Kind.WRITTEN, 0), (Kind.GROWN, 1)]


async def test_a_write_back_that_is_tried_again_stands(quotas: Quotas) -> None:
    await quotas.read({"u": 40})
    await mark(quotas, 50)
    await confirm(quotas, await mark(quotas, 60), 60)
    await quotas.read({"u": 63})
    assert await quotas.history() == [(Kind.NEW, 40), (Kind.WRITTEN, 0), (Kind.GROWN, 3)]


async def test_a_reading_that_began_before_the_confirmation_is_refused(quotas: Quotas) -> None:
    """It may have seen the counter as it was before it was set."""
    await quotas.read({"u": 100})
    before = await quotas.account.seq()
    seq = await mark(quotas, 80)
    between = await quotas.account.seq()
    await confirm(quotas, seq, 80)
    for began in (before, between):
        assert (await quotas.read({"u": 100}, seq=began)).refused == 1
    assert (await quotas.rows())["u"][:2] == (80, 100)


@pytest.mark.parametrize("wanted", [80, 130])
async def test_a_reading_between_mark_and_setting_counts_nothing_twice(quotas: Quotas, wanted: int) -> None:
    """It met the counter as it was; the next one meets what it was set to."""
    await quotas.read({"u": 100})
    seq = await mark(quotas, wanted)
    await quotas.read({"u": 101})
    await confirm(quotas, seq, wanted)
    await quotas.read({"u": wanted + 2})
    await quotas.read({"u": wanted + 3})
    assert (await quotas.rows())["u"][:2] == (wanted + 3, 104)
    await assert_law(quotas.db)


async def test_a_reading_between_setting_and_confirmation_counts_from_what_it_met(quotas: Quotas) -> None:
    await quotas.read({"u": 100})
    seq = await mark(quotas, 80)
    await quotas.read({"u": 81})
    await confirm(quotas, seq, 80)
    await quotas.read({"u": 83})
    assert [delta for _, delta in await quotas.history()] == [100, 1, 2]
    assert (await quotas.rows())["u"][:2] == (83, 103)


async def test_a_key_that_was_gone_keeps_its_figures(quotas: Quotas) -> None:
    await quotas.read({"u": 100})
    await confirm(quotas, await mark(quotas, 80), 80, gone=True)
    await quotas.read({"u": 101})
    assert await quotas.history() == [(Kind.NEW, 100), (Kind.GROWN, 1)]


# ── Any course of events ────────────────────────────────────────────────────────────────────────

steps = st.lists(
    st.tuples(st.sampled_from(["read", "restored", "mark", "confirm"]), st.integers(0, 20)), min_size=1, max_size=12
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(course=steps)
async def test_use_never_falls_and_is_what_history_adds_up_to(quotas: Quotas, course: list[tuple[str, int]]) -> None:
    await quotas.db.execute("truncate quota, quota_change")
    used, marked = Decimal(0), None
    for action, value in course:
        match action:
            case "mark":
                marked = await mark(quotas, value), value
            case "confirm":
                if marked is not None:
                    await confirm(quotas, *marked)
            case _:
                await quotas.read({"u": value}, is_restored=action == "restored")
        rows = await quotas.rows()
        if "u" in rows:
            assert rows["u"][1] >= used
            used = rows["u"][1]
        if action in ("read", "restored"):
            assert rows["u"][0] == value
    await assert_law(quotas.db)
    assert [kind for kind, delta in await quotas.history() if delta < 0] == []


async def test_events_tell_each_change_once_with_a_stable_name(quotas: Quotas) -> None:
    import msgspec

    posted = Posted()
    sink = LedgerSink(quotas.db, {"quota": QuotaTaker(posted, quotas._end)})
    quotas.account.connection.target.settings["events_url"] = "https://hooks.test/q"  # type: ignore[index]
    seq = await quotas.account.seq()
    for _ in range(2):
        await quotas.read({f"u{n:03}": n for n in range(250)}, seq=seq, sink=sink)
    batches = [msgspec.json.decode(body) for body in posted.bodies]
    assert [len(batch) for batch in batches] == [100, 100, 50]
    events = [event for batch in batches for event in batch]
    assert len({(event["source"], event["id"]) for event in events}) == 250
    assert events[7]["data"] == {
        "name": "one", "key": "quota:u007", "user": "u007", "tenant": None, "period": None, "value": "7", "delta": "7",
        "epoch": 1, "revision": 1, "kind": "new",
    }  # fmt: skip
    assert quota.Kind.NEW == 1
