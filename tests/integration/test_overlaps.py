"""The same money through two connections is in the books twice and in the sums once, with nothing missing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import pytest

from daemon.app import open_app
from daemon.config import load
from daemon.db import ledger, streams
from daemon.db.figures import Figures, SourceFact
from daemon.db.insights import Insights, Question
from daemon.db.pool import Database
from daemon.db.secrets import Place
from daemon.domain.connection import ConnectionId, Secret, TenantId
from daemon.domain.overlap import Gateway
from daemon.domain.ports import Ladder, SourceSpec
from daemon.domain.record import Grain, Row
from daemon.domain.window import Width, Window
from daemon.pollers.openai import OpenAIPoller
from daemon.records.identity import grain_id
from daemon.sinks.ledger import LedgerSink
from tests.books_kit import SECRET_KEY
from tests.cli_kit import Tallyd
from tests.ledger_kit import KEYRING, Account, assert_laws

pytestmark = pytest.mark.anyio

HOUR = timedelta(hours=1)
T0 = datetime(2026, 11, 1, tzinfo=UTC)
VENDOR = Grain("reports", Width.HOUR, ("model",))
GATEWAY = Grain("reports", Width.HOUR, ("model", "upstream"))
COSTS = {
    ("openai", "costs"),
    ("anthropic", "cost"),
    ("openrouter", "activity"),
    ("litellm", "spend"),
    ("toygate", "spend"),
}
GATEWAYS = (
    Gateway("litellm", "spend", "upstream", frozenset({("openai", "costs"), ("anthropic", "cost"), ("openrouter", "activity")})),
    Gateway("litellm", "logs", "upstream", frozenset({("openai", "completions")})),
    Gateway("openrouter", "activity", "upstream", frozenset({("openai", "costs"), ("anthropic", "cost")})),
)  # fmt: skip
ASKED = Question(None, None, ("tenant",), COSTS, gateways=GATEWAYS)
COST_OF = {"openai": "costs", "anthropic": "cost", "openrouter": "activity", "litellm": "spend", "toygate": "spend"}


class Ledgers:
    """Connections whose reports are booked by hand, through the sink."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.insights = Insights(db)

    async def connect(
        self,
        name: str,
        provider: str = "openai",
        *,
        tenant: str = "acme",
        org: str | None = None,
        key: str | None = None,
        source: str | None = None,
        base_url: str = "https://x.test",
        width: Width = Width.HOUR,
    ) -> Booked:
        tenant_id = await self.db.fetchval(
            "insert into tenant (name) values ($1) on conflict (name) do update set name = $1 returning id", tenant
        )
        id_ = await self.db.fetchval(
            """insert into connection (tenant_id, name, provider, base_url, credential, credential_key_id,
                 credential_print, org_id, since) values ($1, $2, $3, $4, '', '', $5, $6, $7)
               on conflict (tenant_id, name) do update set name = excluded.name returning id""",
            tenant_id,
            name,
            provider,
            base_url,
            (key or f"{tenant}/{name}").encode(),
            org,
            T0,
        )
        sealed = KEYRING.seal(Secret("sk-x"), Place(TenantId(tenant_id), ConnectionId(id_), provider))
        await self.db.execute(
            "update connection set credential = $2, credential_key_id = $3 where id = $1",
            id_,
            sealed.blob,
            sealed.key_id,
        )
        source = source or COST_OF[provider]
        grain = replace(GATEWAY if provider in ("litellm", "openrouter", "toygate") else VENDOR, width=width)
        loaded, _ = await streams.load(
            self.db, KEYRING, [ConnectionId(id_)], lambda _c: {source: (grain_id(grain), grain)}, T0
        )
        kind = "cost" if (provider, source) in COSTS else "usage"
        account = Account(self.db, LedgerSink(self.db), loaded[0].connection, loaded[0].streams[source], kind)
        return Booked(account, grain)

    async def archive(self, *booked: Booked) -> None:
        await self.db.execute(
            "update connection set state = 'archived' where id = any($1::bigint[])",
            [b.account.connection.id for b in booked],
        )

    async def spend(self, *keys: str, as_of: datetime | None = None) -> dict[tuple[str | None, ...], str]:
        """Amounts of the cost reports by the values of the keys; what was left out must tell the rest of the books."""
        question = replace(ASKED, group_by=keys, as_of=as_of)
        report = await self.insights.spend(question)
        assert {line.basis for line in report.lines} <= {"provider", "local"}
        return {
            tuple(value for _, value in line.group): format(line.amount, "f")
            for line in report.lines
            if line.basis == "provider"
        }

    async def left_out(self, *keys: str, as_of: datetime | None = None) -> list[tuple[str, str, str, int]]:
        """(connection, same as, amount, rows); what `spend` tells by the way, and `overlaps`, are the same."""
        question = replace(ASKED, group_by=keys, as_of=as_of)
        told = (await self.insights.overlaps(question)).lines
        assert (await self.insights.spend(question)).left_out == tuple(line for line in told if line.amount is not None)
        return [(f"{n.tenant}/{n.connection}", n.same_as, str(n.amount), n.rows) for n in told]


class Booked:
    """One report of one connection."""

    def __init__(self, account: Account, grain: Grain) -> None:
        self.account = account
        self.grain = grain

    async def book(
        self, hours: Mapping[int, str | Sequence[tuple[str | None, str]]], *, covers: tuple[int, int] | None = None
    ) -> None:
        """Rows by hour: an amount, or (upstream, amount) each; and what the read has covered."""
        step = self.grain.width.delta
        buckets = {T0 + hour * HOUR: self._rows(rows) for hour, rows in hours.items()}
        seq = await self.account.seq()
        if covers is not None:
            window = Window(T0 + covers[0] * HOUR, T0 + covers[1] * HOUR)
        else:
            window = Window(min(buckets), max(buckets) + step)
        # A snapshot vouches for its whole window, so every bucket is a read of its own: the rest stays as it was.
        for start, rows in buckets.items():
            piece = self.account.piece(seq, {start: rows}, grain=self.grain, window=Window(start, start + step))
            await self.account.book(piece)
        end = ledger.StreamEnd(
            self.account.stream.id, await self.account.seq(), window, window.start, window.end, None, 1, None,
            is_hourly=True, is_daily=True,
        )  # fmt: skip
        await self.account.book(ends=(end,))

    def _rows(self, rows: str | Sequence[tuple[str | None, str]]) -> tuple[Row, ...]:
        if isinstance(rows, str):
            return (self._row((("model", "m"),), rows),)
        return tuple(self._row((("model", f"m{n}"), ("upstream", up)), amount) for n, (up, amount) in enumerate(rows))

    def _row(self, dims: tuple[tuple[str, str | None], ...], amount: str) -> Row:
        if self.account.kind == "cost":
            return Row(dims, amount=Decimal(amount), currency="USD")
        return Row(dims, input_tokens=int(amount))


@pytest.fixture
def books(db: Database) -> Ledgers:
    return Ledgers(db)


async def test_gateway_adds_only_what_no_connected_vendor_reports(books: Ledgers, db: Database) -> None:
    openai = await books.connect("openai")
    litellm = await books.connect("litellm", "litellm")
    await openai.book({0: "10", 1: "20"})
    await litellm.book({0: [("openai", "9.5"), ("mistral", "3"), (None, "0.25")], 1: [("openai", "19"), ("groq", "1")]})
    assert await books.spend("tenant") == {("acme",): "34.25"}
    assert await books.spend("provider") == {("openai",): "30", ("litellm",): "4.25"}
    assert await books.left_out("tenant") == [("acme/litellm", "acme/openai", "28.5", 2)]
    assert await db.fetchval("select sum(amount) from usage_row") == Decimal("62.75"), "the books keep both"
    await assert_laws(db)


async def test_before_the_vendor_is_covered_the_gateway_counts(books: Ledgers) -> None:
    litellm = await books.connect("litellm", "litellm")
    await litellm.book({hour: [("openai", "1")] for hour in range(6)})
    assert await books.spend("tenant") == {("acme",): "6"}
    openai = await books.connect("openai")
    await openai.book({5: "1.1"}, covers=(3, 6))
    # Hours 3 and 4 are covered, and hold nothing: the vendor's word counts.
    assert await books.spend("tenant") == {("acme",): "4.1"}
    await openai.book({1: "1.2", 2: "1.2"}, covers=(1, 6))
    assert await books.spend("tenant") == {("acme",): "4.5"}


async def test_when_the_vendor_was_archived_the_gateway_counts_on(books: Ledgers) -> None:
    openai, litellm = await books.connect("openai"), await books.connect("litellm", "litellm")
    await openai.book({0: "1.1", 1: "1.1"})
    await litellm.book({hour: [("openai", "1")] for hour in range(4)})
    await books.archive(openai)
    assert await books.spend("tenant") == {("acme",): "4.2"}


async def test_open_bucket_that_the_vendor_has_begun_is_the_vendors(books: Ledgers, db: Database) -> None:
    """Complete buckets end at `covered_to`; the one that is open has been read too."""
    openai, litellm = await books.connect("openai"), await books.connect("litellm", "litellm")
    await openai.book({0: "1", 1: "0.5"}, covers=(0, 2))
    await db.execute("update stream set covered_to = $1, last_end = $1 where source = 'costs'", T0 + HOUR)
    await litellm.book({hour: [("openai", "1")] for hour in range(3)})
    assert await books.spend("tenant") == {("acme",): "2.5"}


async def test_own_keys_through_openrouter_are_the_vendors_and_its_credits_are_not(books: Ledgers) -> None:
    openai, router = await books.connect("openai"), await books.connect("router", "openrouter")
    await openai.book({0: "7"})
    await router.book({0: [("openai", "6.9"), (None, "2"), ("anthropic", "4"), ("unheard of", "0.5")]})
    assert await books.spend("provider") == {("openai",): "7", ("openrouter",): "6.5"}


async def test_chain_of_gateways_counts_once(books: Ledgers) -> None:
    """LiteLLM calls OpenRouter, which calls OpenAI with the customer's own key."""
    openai = await books.connect("openai")
    router = await books.connect("router", "openrouter")
    litellm = await books.connect("litellm", "litellm")
    await openai.book({0: "7"})
    await router.book({0: [("openai", "7"), (None, "2")]})
    await litellm.book({0: [("openrouter", "9"), ("groq", "1")]})
    assert await books.spend("provider") == {("openai",): "7", ("openrouter",): "2", ("litellm",): "1"}


async def test_tokens_follow_usage_reports_and_money_follows_cost_reports(books: Ledgers) -> None:
    """A vendor of whom only the costs are read leaves the gateway's tokens alone, and the other way round."""
    costs, logs = await books.connect("openai"), await books.connect("litellm", "litellm", source="logs")
    await costs.book({0: "5"})
    await logs.book({0: [("openai", "100"), ("groq", "10")]})
    before = await books.insights.usage(ASKED)
    assert [(line.metrics[0], before.left_out) for line in before.lines] == [(("input_tokens", 110), ())]
    completions = await books.connect("openai", source="completions")
    await completions.book({0: "101"})
    after = await books.insights.usage(ASKED)
    assert [line.metrics[0] for line in after.lines] == [("input_tokens", 111)]
    assert [(n.connection, n.rows, n.reason) for n in after.left_out] == [("litellm", 1, "gateway")]


async def test_corrections_below_nothing_are_left_out_with_the_rest(books: Ledgers) -> None:
    openai, litellm = await books.connect("openai"), await books.connect("litellm", "litellm")
    await openai.book({0: "5", 1: "-2"})
    await litellm.book({0: [("openai", "5"), ("groq", "-1")], 1: [("openai", "-2.5")]})
    assert await books.spend("tenant") == {("acme",): "2"}
    assert await books.left_out("tenant") == [("acme/litellm", "acme/openai", "2.5", 2)]


async def test_organisation_in_two_tenants_is_each_ones_and_once_in_all(books: Ledgers) -> None:
    mine = await books.connect("main", tenant="acme", org="org-1")
    theirs = await books.connect("main", tenant="beta", org="org-1")
    await mine.book({0: "1", 1: "1", 2: "1"})
    await theirs.book({1: "1", 2: "1", 3: "1"})
    assert await books.spend("tenant") == {("acme",): "3", ("beta",): "3"}
    assert await books.spend("provider") == {("openai",): "4"}
    assert await books.spend() == {(): "4"}
    assert await books.spend("connection", "tenant") == {("main", "acme"): "3", ("main", "beta"): "3"}
    assert await books.left_out("tenant") == []
    assert await books.left_out("provider") == [("beta/main", "acme/main", "2", 2)]


async def test_three_of_one_organisation_count_once(books: Ledgers) -> None:
    for number in (1, 2, 3):
        await (await books.connect(f"c{number}", org="org-1")).book(dict.fromkeys(range(number - 1, 5), "1"))
    assert await books.spend("connection") == {("c1",): "5"}
    assert [(n, by, amount) for n, by, amount, _ in await books.left_out("tenant")] == [
        ("acme/c2", "acme/c1", "4"),
        ("acme/c3", "acme/c1", "3"),
    ]


async def test_archived_connection_and_its_successor_make_the_whole_history(books: Ledgers) -> None:
    """The old one was archived within its last hour, and lacks what came after."""
    old = await books.connect("old", org="org-1")
    await old.book({0: "1", 1: "1", 2: "1", 3: "0.4"})
    await books.archive(old)
    new = await books.connect("new", org="org-1")
    await new.book({2: "1", 3: "1", 4: "1"})
    assert await books.spend("connection") == {("old",): "2", ("new",): "3"}
    assert await books.spend("tenant") == {("acme",): "5"}


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        ({"org": "o1"}, {"org": "o1", "base_url": "https://proxy.test"}, True),
        ({"org": "o1", "key": "k"}, {"org": None, "key": "k"}, True),
        ({"org": None, "key": "k"}, {"org": None, "key": "k"}, True),
        ({"org": "o1"}, {"org": "o2"}, False),
        ({"org": "o1", "key": "k"}, {"org": "o2", "key": "k"}, False),
        ({"org": None, "key": "k1"}, {"org": None, "key": "k2"}, False),
        # Two proxies of one's own, both with the key of the manual.
        ({"org": None, "key": "sk-1234"}, {"org": None, "key": "sk-1234", "base_url": "https://proxy.test"}, False),
    ],
)
async def test_organisation_is_known_by_its_id_or_by_the_key(
    books: Ledgers, first: dict[str, Any], second: dict[str, Any], is_same: bool
) -> None:
    await (await books.connect("a", **first)).book({0: "1"})
    await (await books.connect("b", **second)).book({0: "1"})
    assert await books.spend("tenant") == {("acme",): "1" if is_same else "2"}


async def test_what_was_read_before_the_start_counts_once_too(books: Ledgers, db: Database) -> None:
    """A backfill may begin before the connection does, and moves no cursor: its buckets speak for themselves."""
    first, second = await books.connect("first", org="org-1"), await books.connect("second", org="org-1")
    litellm = await books.connect("litellm", "litellm")
    for twin in (first, second):
        await twin.book({0: "1", 1: "1", 9: "1"}, covers=(8, 10))
    await litellm.book({hour: [("openai", "0.5")] for hour in range(10)})
    assert await db.fetchval("select min(covered_from) from stream") == T0, "the gateway's"
    # Hours 0 and 1 are the vendor's word; 2 to 7 nobody has read there; of 8 it says that there was nothing.
    assert await books.spend("provider") == {("openai",): "3", ("litellm",): "3"}
    assert await books.left_out("provider") == [
        ("acme/litellm", "acme/first", "2", 4),
        ("acme/second", "acme/first", "3", 3),
    ]
    assert await books.spend("provider", as_of=await db.now()) == {("openai",): "3"}, (
        "then by the oldest and the newest"
    )


async def test_what_is_read_before_any_turn_has_ended_counts_once(books: Ledgers, db: Database) -> None:
    """A long history is booked piece by piece, and the cursors move when the turn is over."""
    openai, litellm = await books.connect("openai"), await books.connect("litellm", "litellm")
    await openai.book({1: "1"})
    await litellm.book({hour: [("openai", "0.5")] for hour in range(3)})
    await db.execute("update stream set covered_from = null, covered_to = null where source = 'costs'")
    assert await books.spend("provider") == {("openai",): "1", ("litellm",): "1"}


async def test_days_are_those_of_utc_whatever_the_zone_of_the_database(database_url: str) -> None:
    """In Berlin a day of October has 25 hours."""
    admin = await Database.open(database_url, pool_max=1)
    name = await admin.fetchval("select current_database()")
    await admin.execute(f"alter database {name} set timezone = 'Europe/Berlin'")
    await admin.close()
    db = await Database.open(database_url, pool_max=4)
    try:
        books = Ledgers(db)
        last = -8 * 24  # 24 October, UTC
        openai = await books.connect("openai", width=Width.DAY)
        litellm = await books.connect("litellm", "litellm", width=Width.DAY)
        await openai.book({last: "10"})
        await litellm.book({last: [("openai", "9")], last + 24: [("openai", "2")]})
        assert await books.spend("provider") == {("openai",): "10", ("litellm",): "2"}
    finally:
        await db.close()


async def test_rows_that_are_left_out_are_missed_in_no_price(books: Ledgers, db: Database) -> None:
    """Who looks for a price of them would change no sum."""
    vendor = await books.connect("openai", source="completions")
    logs = await books.connect("litellm", "litellm", source="logs")
    await vendor.book({0: "100"})
    await logs.book({0: [("openai", "100"), ("groq", "10")], 1: [("openai", "7")]})
    await db.execute("update usage_row set rate_version = 'unpriced'")
    assert await books.insights.unpriced(ASKED) == [("m", 1), ("m0", 1), ("m1", 1)]
    assert await books.insights.unpriced(replace(ASKED, gateways=())) == [("m0", 2), ("m", 1), ("m1", 1)]
    assert await books.insights.unpriced(replace(ASKED, since=T0 + HOUR)) == [("m0", 1)]


async def test_daily_and_hourly_cuts_of_one_organisation_never_share_a_day(books: Ledgers) -> None:
    hourly = await books.connect("hourly", org="org-1")
    daily = await books.connect("daily", org="org-1", width=Width.DAY)
    await hourly.book(dict.fromkeys(range(10, 30), "1"))
    await daily.book({0: "20", 24: "6"}, covers=(0, 48))
    assert await books.spend("connection", "day") == {("daily", "2026-11-01"): "20", ("hourly", "2026-11-02"): "6"}


async def test_past_answer_stays_whatever_is_connected_later(books: Ledgers, db: Database) -> None:
    litellm = await books.connect("litellm", "litellm")
    await litellm.book({hour: [("openai", "1")] for hour in range(4)})
    alone = await db.now()
    openai = await books.connect("openai", org="org-1")
    await openai.book({2: "1.1", 3: "1.1"})
    both = await db.now()
    assert await books.spend("tenant", as_of=alone) == {("acme",): "4"}
    assert await books.spend("tenant", as_of=both) == {("acme",): "4.2"} == await books.spend("tenant")
    assert await books.left_out("tenant", as_of=both) == [("acme/litellm", "acme/openai", "2", 2)]
    await openai.book({0: "1.1", 1: "1.1"}, covers=(0, 4))
    await books.archive(openai)
    twin = await books.connect("twin", org="org-1")
    await twin.book(dict.fromkeys(range(6), "1.1"))
    assert await books.spend("tenant", as_of=alone) == {("acme",): "4"}
    assert await books.spend("tenant", as_of=both) == {("acme",): "4.2"}
    assert await books.spend("tenant", as_of=await db.now()) == {("acme",): "6.6"} == await books.spend("tenant")


async def test_setting_says_that_a_connection_is_nobody_elses(books: Ledgers, db: Database) -> None:
    openai, litellm = await books.connect("openai"), await books.connect("litellm", "litellm")
    await openai.book({0: "5"})
    await litellm.book({0: [("openai", "4")]})
    assert await books.spend("tenant") == {("acme",): "5"}
    await db.execute("""update connection set settings = '{"overlap": "add"}' where name = 'litellm'""")
    assert await books.spend("tenant") == {("acme",): "9"}


async def test_vanished_rows_are_neither_counted_nor_told(books: Ledgers) -> None:
    openai, litellm = await books.connect("openai"), await books.connect("litellm", "litellm")
    await openai.book({0: "5"})
    await litellm.book({0: [("openai", "4"), ("groq", "1")]})
    gone = litellm.account.piece(
        await litellm.account.seq(), {T0: ()}, witness="full", grain=litellm.grain, window=Window(T0, T0 + HOUR)
    )
    await litellm.account.book(gone)
    assert await books.spend("tenant") == {("acme",): "5"}
    assert await books.left_out("tenant") == []


async def test_report_never_sees_a_vendor_between_its_rows_and_its_coverage(books: Ledgers) -> None:
    """A flush of the vendor commits while reports are made: each of them is the books of one moment."""
    openai, litellm = await books.connect("openai"), await books.connect("litellm", "litellm")
    await litellm.book({hour: [("openai", "1")] for hour in range(30)})
    seen: set[str] = set()
    is_over = anyio.Event()

    async def report() -> None:
        while not is_over.is_set():
            seen.update((await books.spend("tenant")).values())

    async with anyio.create_task_group() as group:
        group.start_soon(report)
        for hour in reversed(range(30)):
            start = T0 + hour * HOUR
            seq = await openai.account.seq()
            window = Window(start, start + HOUR)
            piece = openai.account.piece(seq, {start: openai._rows("1")}, grain=openai.grain, window=window)
            await openai.account.book(piece, ends=(openai.account.end(seq, window),))
        is_over.set()
    assert seen == {"30"}


async def test_gauges_leave_out_what_is_told_twice(books: Ledgers, db: Database) -> None:
    facts = [SourceFact(p, s, True, timedelta(days=35)) for p, s in sorted(COSTS)]
    facts += [SourceFact("openai", "completions", False, timedelta(days=35)), SourceFact("litellm", "logs", False, timedelta(days=35))]  # fmt: skip
    month = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    first = int((month - T0) / HOUR)
    for tenant in ("acme", "beta"):
        for source, amounts in (("costs", "5"), ("completions", "100")):
            await (await books.connect("openai", tenant=tenant, org="org-1", source=source)).book({first: amounts})
        for source, rows in (("spend", [("openai", "4"), ("groq", "1")]), ("logs", [("openai", "90"), ("groq", "7")])):
            await (await books.connect("litellm", "litellm", tenant=tenant, source=source)).book({first: rows})

    async def told(*, by_tenant: bool) -> tuple[float, float]:
        gauges = {g.name: g for g in await Figures(db, facts, by_tenant=by_tenant, gateways=GATEWAYS).gauges()}
        spend = [v or 0 for labels, v in gauges["tallyd_spend"].values if "month" in labels and "provider" in labels]
        tokens = [v or 0 for labels, v in gauges["tallyd_tokens"].values if "month" in labels and "input" in labels]
        return sum(spend), sum(tokens)

    assert await told(by_tenant=False) == (7, 114)
    assert await told(by_tenant=True) == (12, 214)


# ── The commands ────────────────────────────────────────────────────────────────────────────────


class ToyGateway(OpenAIPoller):
    """A poller whose costs name the vendor who is paid."""

    provider = "toygate"
    sources = {  # noqa: RUF012 - as its parent has it
        "spend": SourceSpec(
            "spend", "cost", "daily", Ladder(timedelta(days=1), timedelta(days=2), timedelta(days=3)), 7,
            upstream="upstream",
        )
    }  # fmt: skip


@pytest.fixture
def tallyd(tallyd: Tallyd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tallyd:
    """In an installation where another package brings the poller of a gateway."""
    package = tmp_path / "site" / "toygate-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: toygate\nVersion: 1\n")
    (package / "entry_points.txt").write_text(f"[tallyd.pollers]\ntoygate = {__name__}:ToyGateway\n")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("KEY", "sk-admin-overlap")
    monkeypatch.setenv("OTHER", "sk-admin-other")
    return tallyd


@asynccontextmanager
async def _opened(database_url: str) -> AsyncIterator[Database]:
    db = await Database.open(database_url)
    yield db
    await db.close()


async def _book_both(database_url: str) -> None:
    async with _opened(database_url) as db:
        books = Ledgers(db)
        openai = await books.connect("openai")
        gate = await books.connect("gate", "toygate")
        await openai.book({0: "10"})
        await gate.book({0: [("openai", "9.5"), ("mistral", "3")]})


def test_commands_tell_what_they_leave_out(tallyd: Tallyd, database_url: str) -> None:
    anyio.run(_book_both, database_url)
    code, out, err = tallyd("spend", "--json", "--group-by", "provider")
    assert code == 0
    assert {line["provider"]: line["amount"] for line in json.loads(out)} == {"openai": "10", "toygate": "3"}
    assert set(json.loads(out)[0]) == {"provider", "amount", "currency", "basis"}
    note = "note: 1 rows of acme/gate spend, 9.5 USD (provider), are not added: acme/openai has them too"
    assert note in err
    code, out, err = tallyd("overlaps", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == [
        {
            "tenant": "acme", "connection": "gate", "source": "spend", "same_as": "acme/openai", "amount": "9.5",
            "currency": "USD", "basis": "provider", "rows": 1, "reason": "gateway",
        }
    ]  # fmt: skip
    assert tallyd("overlaps", "--until", "2026-10-01", "--json")[1] == "[]\n"
    assert "nothing overlaps" in tallyd("overlaps", "--by-tenant", "--until", "2026-10-01")[2]
    code, _, err = tallyd("connections", "set", "acme/gate", "overlap=both")
    assert (code, err) == (2, "error: settings.overlap: 'both' is no way to count; use auto or add\n")
    assert tallyd("connections", "set", "acme/gate", "overlap=add")[0] == 0
    code, out, err = tallyd("spend", "--json", "--group-by", "provider")
    assert {line["provider"]: line["amount"] for line in json.loads(out)} == {"openai": "10", "toygate": "12.5"}
    assert err == ""


def test_adding_a_connection_says_whose_money_it_may_tell_again(tallyd: Tallyd) -> None:
    def add(tenant: str, name: str, provider: str, key: str, *more: str) -> str:
        code, _, err = tallyd(
            "connections", "add", "--tenant", tenant, "--name", name, "--provider", provider, "--credential-env", key,
            "--no-check", *more,
        )  # fmt: skip
        assert code == 0, err
        return err

    for tenant in ("acme", "beta"):
        tallyd("tenants", "add", tenant)
    assert add("acme", "main", "openai", "KEY") == ""
    assert "acme/main (openai) may tell the same money" in add("acme", "gate", "toygate", "OTHER")
    told = add("beta", "copy", "openai", "KEY")
    assert "note: acme/main reads the same organisation as beta/copy" in told
    again = add("acme", "copy", "openai", "KEY", "--allow-duplicate")
    assert "note: acme/main, beta/copy reads the same organisation" in again
    assert "acme/gate (toygate) may tell the same money" in again


def test_sources_that_name_a_vendor_are_gateways_to_all_other_providers(
    tallyd: Tallyd,
    database_url: str,
) -> None:
    """Money beside costs, tokens beside usage; never to oneself."""

    async def gateways() -> list[Gateway]:
        async with open_app(load({"database_url": database_url, "secret_key": SECRET_KEY}, {})) as app:
            return app.gateways()

    (gateway,) = [g for g in anyio.run(gateways) if g.provider == "toygate"]
    assert {("openai", "costs"), ("anthropic", "cost")} <= gateway.vendors
    assert not {vendor for vendor in gateway.vendors if vendor[0] == "toygate" or vendor[1] == "completions"}
