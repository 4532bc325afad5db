"""The kit: what `SimplePoller` adds to the protocol, over the shapes of reports that the example does not have.

The whole suite runs here on flat rows in one answer, and on flat rows in pages that may end inside a bucket.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import msgspec
import pytest

from daemon.domain.collection import Collected, Name
from daemon.domain.connection import Identity, Target
from daemon.domain.errors import SchemaDriftError, UpstreamUnavailableError
from daemon.domain.ports import Caller, Collector, Poller, collection
from daemon.domain.record import Dims, Grain, Row
from daemon.domain.window import Width, Window, rfc3339
from daemon.pollers.chain import Fields, Page, decode, encode_detail, need_count
from daemon.pollers.kit import HOURLY, Question, Report, SimplePoller, by_day, cost_row, daily, day, hourly
from daemon.testing.poller_cases import NOW, Bucket, Case, Script, Wire
from daemon.testing.poller_suite import *  # noqa: F403 - takes in the tests, and the hook that hands them CASES

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "acme-poller"
PAGE = ROOT / "docs" / "how-to" / "write-a-poller.md"


# ── Two shapes ──────────────────────────────────────────────────────────────────────────────────


class _Lines(msgspec.Struct):
    items: list[Fields]


class _Part(msgspec.Struct):
    items: list[Fields]
    next: str | None


_lines = msgspec.json.Decoder(_Lines, float_hook=Decimal)
_part = msgspec.json.Decoder(_Part, float_hook=Decimal)


def _spend(row: Fields, dims: Dims) -> Row:
    return cost_row(dims, row.pop("cents", None), "usd", row, places=2)


def _seats(row: Fields, dims: Dims) -> Row:
    return Row(dims, quantity=Decimal(need_count(row, "seats")), unit="seats", detail=encode_detail(row))


class FlatPoller(SimplePoller):
    """Each row names its day; the cut is the provider's own; one report comes in one answer, the other in pages of so many rows."""

    provider = "flat"
    default_base_url = "https://flat.test"
    reports = (
        Report(
            daily("spend", "cost", upstream="vendor"), "/spend", ("user_id", "vendor"), _spend, wire={"user_id": "mail"}
        ),
        Report(daily("seats", "usage"), "/seats", ("team",), _seats, optional=("office",), is_row_paged=True),
    )
    collections = (collection("people", "names", "daily"),)
    key_needed = "any key of the flat service"
    own_settings = ("region",)

    def headers(self, target: Target) -> dict[str, str]:
        return {"x-api-key": target.credential.reveal()}

    async def page(self, question: Question, cursor: str | None) -> Page:
        window = question.window
        query = [("since", rfc3339(window.start)), ("until", rfc3339(window.end))]
        query += [("after", cursor)] if cursor else []
        answer = await question.call.get(question.report.path, query, self.headers(question.target))
        if not question.report.is_row_paged:
            return question.page(answer, by_day(decode(_lines, answer, "spend").items, "day"))
        part = decode(_part, answer, "seats")
        return question.page(answer, by_day(part.items, "day"), part.next)

    async def collect(self, target: Target, source: str, known: bytes | None, call: Caller) -> AsyncIterator[Collected]:
        people = decode(_lines, await call.get("/people", (), self.headers(target)), source).items
        yield Collected([Name("user", str(person["id"]), str(person["mail"])) for person in people])


def poller() -> FlatPoller:
    return FlatPoller(now=lambda: NOW)


def lines(buckets: Sequence[Bucket]) -> list[Wire]:
    return [{**row, "day": f"{start:%Y-%m-%d}"} for start, _, rows in buckets for row in rows]


SPEND = Case(
    "flat-spend",
    poller(),
    "spend",
    row=lambda n: {"mail": f"u{n}", "vendor": "openai", "cents": "125.00"},
    means=lambda n: Row(
        (("currency", "USD"), ("user_id", f"u{n}"), ("vendor", "openai")), amount=Decimal("1.2500"), currency="USD"
    ),
    page=lambda buckets, _has_more, _cursor: {"items": lines(buckets)},
    wire={"user_id": "mail"},
    required="cents",
    set_amount=lambda row, amount: {**row, "cents": amount},
    amount_scale=Decimal("0.01"),
    currency=None,
    envelope=("items",),
    paging="whole",
    is_dated=True,
    is_flat=True,
)
SEATS = Case(
    "flat-seats",
    poller(),
    "seats",
    row=lambda n: {"team": f"t{n}", "seats": 12, "office": "here"},
    means=lambda n: Row((("team", f"t{n}"),), quantity=Decimal(12), unit="seats"),
    page=lambda buckets, has_more, cursor: {"items": lines(buckets), "next": cursor if has_more else None},
    required="seats",
    envelope=("items",),
    paging="cursor",
    cursor_param="after",
    is_dated=True,
    is_flat=True,
    is_row_paged=True,
)
CASES = (SPEND, SEATS)


# ── What the kit adds ───────────────────────────────────────────────────────────────────────────


def test_simple_poller_is_a_poller_and_a_collector() -> None:
    made: Poller = poller()
    collector: Collector = poller()
    assert list(made.sources) == ["spend", "seats", "people"]
    assert made.sources["spend"].upstream == "vendor"
    assert not made.sources["people"].is_report
    assert collector


def test_poller_without_its_requests_cannot_be_made() -> None:
    """The registry calls the class: what is missing is told by `tallyd doctor`, not by the first poll."""

    class Unfinished(SimplePoller):
        provider = "unfinished"

    with pytest.raises(TypeError, match="page"):
        Unfinished()  # type: ignore[abstract]


async def test_collection_of_names_is_read_through_the_caller() -> None:
    script = Script({"items": [{"id": 7, "mail": "ada@example.com"}]})
    parts = [part async for part in poller().collect(SPEND.target, "people", None, script)]
    assert [list(part.items) for part in parts] == [[Name("user", "7", "ada@example.com")]]


async def test_identity_is_the_smallest_read_where_nothing_names_the_organization() -> None:
    script = Script({"items": []})
    assert await poller().identify(SPEND.target, script) == Identity(None)
    assert script.query(0) == [("since", "2026-11-21T00:00:00Z"), ("until", "2026-11-22T00:00:00Z")]


async def test_dimension_goes_by_our_name_and_is_asked_for_by_theirs() -> None:
    question = Question(SPEND.target, poller().reports[0], SPEND.grain, SPEND.window(1), Script({}))
    assert SPEND.grain.group_by == ("user_id", "vendor")
    assert question.group_by == ["mail", "vendor"]


async def test_dimension_that_is_not_asked_for_keeps_the_provider_s_name() -> None:
    made = poller()
    grain = made.grain("spend", {"group_by": {"spend": ["vendor"]}})
    (start,) = SPEND.starts(1)
    answer = {"items": lines([SPEND.bucket(start, [SPEND.row(1)])])}
    snapshot = await made.fetch(SPEND.target, "spend", grain, SPEND.window(1), Script(answer))
    assert snapshot.buckets[0].rows[0].detail == b'{"mail":"u1"}'


async def test_probe_tells_the_totals_of_one_read() -> None:
    (start,) = SPEND.starts(1)
    script = Script({"items": lines([SPEND.bucket(start, [SPEND.row(1), SPEND.row(2)])])})
    probe = await poller().probe(SPEND.target, "spend", SPEND.grain, SPEND.window(1), script)
    assert probe.totals is not None
    assert {when: totals.amount for when, totals in probe.totals.items()} == {start: Decimal("2.50")}


async def test_own_settings_are_known_and_others_are_not() -> None:
    poller().check_settings({"region": "eu", "group_by": {"seats": ["office"]}})


async def seats(*pages: list[Wire]) -> tuple[Row, ...]:
    answers = [{"items": rows, "next": f"c{n}" if n < len(pages) else None} for n, rows in enumerate(pages, 1)]
    snapshot = await poller().fetch(SEATS.target, "seats", SEATS.grain, SEATS.window(1), Script(*answers))
    assert snapshot.pages == len(pages)
    (bucket,) = snapshot.buckets
    return bucket.rows


def seat(team: str | None, office: str = "here") -> Wire:
    return {"team": team, "seats": 12, "office": office, "day": f"{SEATS.starts(1)[0]:%Y-%m-%d}"}


async def test_bucket_that_goes_on_on_the_next_page_is_one() -> None:
    rows = await seats([seat("a"), seat("b")], [seat("c")], [seat("a", "there"), seat(None)])
    assert [(dict(row.dims)["team"], row.detail) for row in rows] == [
        ("a", b'{"office":"here"}'),
        ("b", b'{"office":"here"}'),
        ("c", b'{"office":"here"}'),
        ("a", b'{"office":"there"}'),
        (None, b'{"office":"here"}'),
    ]


async def test_rows_in_no_order_are_read_to_the_end() -> None:
    """A row from beyond the window on the first page, or of a later day, ends nothing."""
    first, second = SEATS.starts(2)
    days = [[second + timedelta(days=3)], [second, first], [second + timedelta(days=1)], [first]]
    answers = [
        {
            "items": [{**seat(f"t{n}"), "day": f"{start:%Y-%m-%d}"} for start in starts],
            "next": f"c{n}" if n < len(days) - 1 else None,
        }
        for n, starts in enumerate(days)
    ]
    snapshot = await poller().fetch(SEATS.target, "seats", SEATS.grain, SEATS.window(2), Script(*answers))
    assert [(bucket.start, [dict(row.dims)["team"] for row in bucket.rows]) for bucket in snapshot.buckets] == [
        (first, ["t1", "t3"]),
        (second, ["t1"]),
    ]


async def test_row_that_moved_to_the_next_page_means_that_others_were_missed() -> None:
    """A row inserted before the second page is read pushes the last of the first one there."""
    with pytest.raises(UpstreamUnavailableError, match="moved"):
        await seats([seat("a"), seat("b")], [seat("b")])


async def test_equal_rows_on_one_page_are_a_sum() -> None:
    assert len(await seats([seat("a"), seat("a")])) == 2


async def test_rows_of_a_number_nobody_knows_have_an_end() -> None:
    asked = iter(range(10_000))

    def endless(_request: httpx.Request) -> httpx.Response:
        n = next(asked)
        return httpx.Response(200, json={"items": [seat(f"t{n}")], "next": f"c{n}"})

    with pytest.raises(SchemaDriftError, match="no end after 1000 pages"):
        await poller().fetch(SEATS.target, "seats", SEATS.grain, SEATS.window(1), Script(endless))


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("2026-11-22", datetime(2026, 11, 22, tzinfo=UTC)),
        (20261122, datetime(2026, 11, 22, tzinfo=UTC)),
        ("2026-11-22T00:00:00Z", datetime(2026, 11, 22, tzinfo=UTC)),
        ("2026-11-22T01:00:00+01:00", datetime(2026, 11, 22, tzinfo=UTC)),
    ],
)
def test_day_is_read_in_the_forms_that_providers_write(text: object, start: datetime) -> None:
    assert day(text) == (start, start + timedelta(days=1))


@pytest.mark.parametrize("text", [None, "", "yesterday", 7, 20261322, {}, True, "2026-11-22T00:00:00Q"])
def test_what_is_no_day_is_drift(text: object) -> None:
    with pytest.raises(SchemaDriftError, match="day"):
        day(text)


@pytest.mark.parametrize("text", ["2026-11-21T12:00:00Z", "2026-11-21T00:00:00-05:00"])
async def test_day_of_another_zone_is_off_the_grid(text: str) -> None:
    with pytest.raises(SchemaDriftError, match=r"spend: bucket .* is not on the 1d grid"):
        await poller().fetch(
            SPEND.target, "spend", SPEND.grain, SPEND.window(2), Script({"items": [{**SPEND.row(1), "day": text}]})
        )


async def test_day_beyond_reason_is_drift_with_the_source_and_the_answer() -> None:
    with pytest.raises(SchemaDriftError, match="spend: ") as caught:
        await poller().fetch(
            SPEND.target, "spend", SPEND.grain, SPEND.window(1), Script({"items": [{"day": "9999-12-31"}]})
        )
    assert b"9999" in caught.value.body


async def test_hourly_reports_ask_for_a_page_of_their_own_size() -> None:
    class HourPoller(FlatPoller):
        provider = "hours"
        reports = (Report(hourly("calls", "usage"), "/calls", (), _seats, width=Width.HOUR),)
        collections = ()

    made = HourPoller()
    assert list(made.sources) == ["calls"]
    assert list(FlatPoller.sources) == ["spend", "seats", "people"], "a class has its own"
    assert made.sources["calls"].ladder == HOURLY
    hours = Window(NOW.replace(minute=0) - timedelta(hours=300), NOW.replace(minute=0))
    question = Question(SPEND.target, made.reports[0], Grain("v1", Width.HOUR, ()), hours, Script({}))
    assert question.limit == 168


# ── The example, and the page about it ──────────────────────────────────────────────────────────


def test_the_example_is_short() -> None:
    lines = (EXAMPLE / "src/acme_tallyd/poller.py").read_text("utf-8").splitlines()
    assert len(lines) < 80


@pytest.mark.parametrize("name", ["pyproject.toml", "src/acme_tallyd/poller.py", "tests/test_poller.py"])
def test_the_page_shows_the_example_as_it_is(name: str) -> None:
    """Each file follows the sentence that names it, as a block of its own."""
    shown = re.findall(
        r"^`acme-poller/([\w./]+)`:\n\n```\w+\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert dict(shown).get(name) == (EXAMPLE / name).read_text("utf-8")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the blocks of Python in the page define, one after the other."""
    monkeypatch.syspath_prepend(EXAMPLE / "src")
    module = ModuleType("shown")
    monkeypatch.setitem(sys.modules, "shown", module)  # msgspec looks its annotations up there
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), vars(module))
    return vars(module)


async def test_the_flat_poller_of_the_page_reads_flat_rows(shown: dict[str, Any]) -> None:
    flat: Poller = shown["FlatPoller"]()
    (start,) = SPEND.starts(1)
    rows = [
        {"date": f"{start:%Y-%m-%d}", "model": "m", "project_id": None, "tokens_in": 3, "tokens_out": n} for n in (1, 2)
    ]
    script = Script({"days": [{"date": "2026-01-01", "rows": rows}], "next_cursor": None})
    snapshot = await flat.fetch(SPEND.target, "tokens", flat.grain("tokens", {}), SPEND.window(1), script)
    assert [row.output_tokens for row in snapshot.buckets[0].rows] == [1, 2]


async def test_the_collector_of_the_page_tells_names(shown: dict[str, Any]) -> None:
    collector: Collector = shown["NamingPoller"]()
    script = Script([{"id": "p1", "title": "Search"}])
    parts = [part async for part in collector.collect(SPEND.target, "names", None, script)]
    assert [list(part.items) for part in parts] == [[Name("project", "p1", "Search")]]


def test_the_gateway_of_the_page_names_who_is_paid(shown: dict[str, Any]) -> None:
    assert shown["GatewayPoller"].sources["costs"].upstream == "vendor"


def test_the_protocol_in_the_page_is_the_protocol(shown: dict[str, Any]) -> None:
    def methods(protocol: type) -> dict[str, list[str]]:
        found = {name: value for name, value in vars(protocol).items() if inspect.isfunction(value)}
        return {name: list(inspect.signature(value).parameters) for name, value in found.items() if name[0] != "_"}

    assert methods(shown["Poller"]) == methods(Poller)
    assert shown["Poller"].__annotations__.keys() == Poller.__annotations__.keys()
