"""What every poller must do, source by source: the whole of a window, exactly, or an error that says what to do.

A test module of your own takes all of it in, and names the cases to run it on:

    from daemon.testing.poller_suite import *
    CASES = (Case(...), ...)
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from typing import Any, TypeVar

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.domain.errors import (
    BadRequestError,
    CredentialError,
    DaemonError,
    ForbiddenError,
    RateLimitedError,
    SchemaDriftError,
    UpstreamUnavailableError,
    UsageError,
)
from daemon.domain.record import Row, Snapshot, Totals, totals_of
from daemon.domain.window import Window
from daemon.records.normalize import merge
from daemon.testing.poller_cases import Bucket, Case, Script, Wire

pytestmark = pytest.mark.anyio
Test = TypeVar("Test", bound=Callable[..., Any])


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


def only(wanted: Callable[[Case], object]) -> Callable[[Test], Test]:
    """Run a test on the cases that are so, and on no others."""

    def mark(test: Test) -> Test:
        test.wanted = wanted  # type: ignore[attr-defined]  # read by the hook below
        return test

    return mark


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test the cases of the module that took the suite in."""
    if "case" in metafunc.fixturenames:
        wanted = getattr(metafunc.function, "wanted", lambda _case: True)
        metafunc.parametrize("case", [case for case in metafunc.module.CASES if wanted(case)], ids=lambda case: case.id)


async def read(case: Case, window: Window, *answers: Any) -> Snapshot:
    return await case.poller.fetch(case.target, case.source, case.grain, window, Script(*answers))


def bare(row: Row) -> Row:
    """A row without what a provider may add freely."""
    return row._replace(detail=b"{}", rating=None)


def one_bucket(case: Case, *rows: Wire, shift: timedelta = timedelta(0), stretch: timedelta = timedelta(0)) -> Wire:
    start, end, _ = case.bucket(case.starts(1)[0], [])
    return case.page([(start + shift, end + shift + stretch, list(rows))], False, None)


async def one_row(case: Case, row: Wire) -> Row:
    snapshot = await read(case, case.window(1), one_bucket(case, row))
    return snapshot.buckets[0].rows[0]


def ending(case: Case, buckets: list[Bucket]) -> list[list[Wire]]:
    """The ways in which a chain of these buckets may come to its end."""
    ways = [[case.page(buckets, False, None)]]
    if is_paged(case):
        ways.append([case.page(buckets, True, "c1"), case.page([], True, "c2")])
    return ways


def is_paged(case: Case) -> bool:
    return case.paging != "whole"


def has_money(case: Case) -> bool:
    return case.set_amount is not None


def has_currency(case: Case) -> bool:
    return has_money(case) and case.currency is not None


# ── Chains ──────────────────────────────────────────────────────────────────────────────────────


async def test_complete_chain_is_the_whole_truth(case: Case) -> None:
    first, second, third = case.starts(3)
    buckets = [
        case.bucket(first, [case.row(1), case.row(2)]),
        case.bucket(second, [case.row(3)]),
        case.bucket(third, [case.row(1)]),
    ]
    cursors = ["c1", "c2", None] if is_paged(case) else [None]
    parts = [[bucket] for bucket in buckets] if is_paged(case) else [buckets]
    script = Script(*(case.page(part, cursor is not None, cursor) for part, cursor in zip(parts, cursors, strict=True)))
    snapshot = await case.poller.fetch(case.target, case.source, case.grain, case.window(3), script)
    assert snapshot.window == case.window(3)
    assert snapshot.grain == case.grain
    assert snapshot.pages == len(script.requests) == len(parts)
    assert [(bucket.start, sorted(map(bare, bucket.rows))) for bucket in snapshot.buckets] == [
        (first, [case.means(1), case.means(2)]),
        (second, [case.means(3)]),
        (third, [case.means(1)]),
    ]
    # The cursor is bound to its query: all else must be the same on each page.
    first_query, *rest = [script.query(n) for n in range(len(parts))]
    sent = [{(case.cursor_param, case.cursor_sent(n, cursor))} for n, cursor in enumerate(cursors) if cursor]
    assert [set(query) - set(first_query) for query in rest] == sent
    assert all(set(first_query) <= set(query) for query in rest)


async def test_nothing_used_is_an_empty_snapshot(case: Case) -> None:
    snapshot = await read(case, case.window(2), case.page([], False, None))
    assert snapshot.window == case.window(2)
    assert [bucket for bucket in snapshot.buckets if bucket.rows] == []


@only(lambda case: case.paging == "flagged")
async def test_more_pages_without_a_cursor_is_drift(case: Case) -> None:
    page = case.page([case.bucket(case.starts(2)[0], [case.row(1)])], True, None)
    with pytest.raises(SchemaDriftError, match="cursor"):
        await read(case, case.window(2), page)


@only(is_paged)
async def test_repeating_cursor_is_drift(case: Case) -> None:
    first, second = case.starts(2)
    pages = [case.page([case.bucket(start, [case.row(1)])], True, "same") for start in (first, second)]
    with pytest.raises(SchemaDriftError):
        await read(case, case.window(3), *pages)


@only(is_paged)
async def test_chain_without_an_end_is_drift_not_done(case: Case) -> None:
    starts = case.starts(2)
    count = 0

    def endless(_request: httpx.Request) -> httpx.Response:
        nonlocal count
        count += 1
        rows = [case.row(1)]
        return httpx.Response(200, json=case.page([case.bucket(starts[0], rows)], True, f"c{count}"))

    with pytest.raises(SchemaDriftError, match="no end"):
        await read(case, case.window(2), endless)


@only(is_paged)
async def test_empty_page_with_a_cursor_ends_the_chain(case: Case) -> None:
    page = case.page([case.bucket(case.starts(1)[0], [case.row(1)])], True, "c1")
    snapshot = await read(case, case.window(1), page, case.page([], True, "c2"), case.page([], True, "c3"))
    assert [bare(row) for bucket in snapshot.buckets for row in bucket.rows] == [case.means(1)]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (httpx.Response(500), UpstreamUnavailableError),
        (httpx.Response(529), UpstreamUnavailableError),
        (httpx.Response(429, headers={"retry-after": "3"}), RateLimitedError),
        (httpx.Response(401), CredentialError),
        (httpx.Response(403), ForbiddenError),
        (httpx.Response(200, content=b"<html>Bad gateway</html>"), SchemaDriftError),
        (httpx.Response(200, content=b'{"data": ['), SchemaDriftError),
        (httpx.Response(200, content=b""), SchemaDriftError),
        (httpx.Response(200, json=[]), SchemaDriftError),
    ],
)
async def test_bad_page_fails_the_whole_chain(case: Case, answer: httpx.Response, error: type[DaemonError]) -> None:
    fresh = httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)
    page = case.page([case.bucket(case.starts(2)[0], [case.row(1)])], True, "c1")
    with pytest.raises(error) as caught:
        await read(case, case.window(2), *([page] if is_paged(case) else []), fresh)
    if isinstance(caught.value, RateLimitedError):
        assert caught.value.retry_after_s == 3
    if isinstance(caught.value, SchemaDriftError):
        assert caught.value.body == answer.content


@pytest.mark.parametrize("is_null", [True, False], ids=["null", "absent"])
async def test_page_without_its_envelope_fails_the_whole_chain(case: Case, is_null: bool) -> None:
    page = case.page([case.bucket(case.starts(2)[0], [case.row(1)])], True, "c1")
    for name in case.envelope:
        broken = case.page([], False, None)
        del broken[name]
        with pytest.raises(SchemaDriftError):
            await read(
                case, case.window(2), *([page] if is_paged(case) else []), broken | ({name: None} if is_null else {})
            )


@only(lambda case: case.error)
async def test_refusal_carries_the_provider_s_code(case: Case) -> None:
    assert case.error is not None
    body = case.error("not_found_error")
    with pytest.raises(BadRequestError) as caught:
        await read(case, case.window(1), httpx.Response(404, json=body))
    assert (caught.value.status, caught.value.code) == (404, "not_found_error")


# ── Buckets ─────────────────────────────────────────────────────────────────────────────────────


@only(lambda case: not case.is_dated)
@pytest.mark.parametrize(
    ("shift", "stretch"),
    [
        (timedelta(minutes=1), timedelta(0)),
        (timedelta(minutes=1), -timedelta(minutes=1)),
        (timedelta(0), timedelta(seconds=1)),
    ],
    ids=["off the grid", "clipped", "stretched"],
)
async def test_bucket_off_the_grid_is_drift(case: Case, shift: timedelta, stretch: timedelta) -> None:
    with pytest.raises(SchemaDriftError, match="grid"):
        await read(case, case.window(1), one_bucket(case, case.row(1), shift=shift, stretch=stretch))


@only(lambda case: not case.is_flat)
async def test_buckets_out_of_order_are_drift(case: Case) -> None:
    first, second = case.starts(2)
    page = case.page([case.bucket(second, [case.row(1)]), case.bucket(first, [case.row(1)])], False, None)
    with pytest.raises(SchemaDriftError):
        await read(case, case.window(2), page)


@only(is_paged)
async def test_bucket_split_over_pages(case: Case) -> None:
    """Only a provider that pages by rows may end a page inside a bucket."""
    (start,) = case.starts(1)
    pages = [
        case.page([case.bucket(start, [case.row(1)])], True, "c1"),
        case.page([case.bucket(start, [case.row(2)])], False, None),
    ]
    if not case.is_row_paged:
        with pytest.raises(SchemaDriftError, match="repeated"):
            await read(case, case.window(1), *pages)
        return
    snapshot = await read(case, case.window(1), *pages)
    assert [bare(row) for row in snapshot.buckets[0].rows] == [case.means(1), case.means(2)]


@pytest.mark.parametrize(
    ("sent", "problem"),
    [((0, 1, 3), "hole"), ((0, 2, 3), "hole"), ((1, 3), "hole")],
    ids=str,
)
@only(lambda case: case.has_empty_buckets)
async def test_chain_that_lacks_a_bucket_is_no_whole(case: Case, sent: tuple[int, ...], problem: str) -> None:
    """A provider that sends an empty bucket sends all of them: what is missing is a lost page, not an idle hour."""
    starts = case.starts(4)
    empty, *others = [case.bucket(starts[n], []) for n in sent]
    rows = [case.bucket(start, [case.row(1)]) for start, _, _ in others]
    for answers in ending(case, [empty, *rows]):
        with pytest.raises(SchemaDriftError, match=problem):
            await read(case, case.window(4), *answers)


@pytest.mark.parametrize("sent", [(0, 1), (0,), (1, 2)], ids=str)
@only(lambda case: case.has_empty_buckets)
async def test_chain_that_ends_early_covers_no_more_than_it_says(case: Case, sent: tuple[int, ...]) -> None:
    """`has_more: false` too soon, or an empty page: the rest is not known to be empty, and no cursor may pass it."""
    starts = case.starts(4)
    empty, *others = [case.bucket(starts[n], []) for n in sent]
    rows = [case.bucket(start, [case.row(1)]) for start, _, _ in others]
    for answers in ending(case, [empty, *rows]):
        snapshot = await read(case, case.window(4), *answers)
        assert snapshot.window == Window(starts[0], starts[sent[-1]] + case.grain.width.delta)


@pytest.mark.parametrize("sent", [(1, 2), (0, 1), (0, 3), (2,)], ids=str)
async def test_gateway_may_leave_out_every_empty_bucket(case: Case, sent: tuple[int, ...]) -> None:
    starts = [case.starts(4)[n] for n in sent]
    page = case.page([case.bucket(start, [case.row(1)]) for start in starts], False, None)
    snapshot = await read(case, case.window(4), page)
    assert [bucket.start for bucket in snapshot.buckets] == starts
    assert snapshot.window == case.window(4)


async def test_window_is_exact_whatever_is_sent_beyond_it(case: Case) -> None:
    first, second, _ = case.starts(3)
    page = case.page([case.bucket(start, [case.row(1)]) for start in case.starts(3)], False, None)
    snapshot = await read(case, Window(first, first + case.grain.width.delta), page)
    assert [bucket.start for bucket in snapshot.buckets] == [first]
    if case.has_empty_buckets:
        with pytest.raises(SchemaDriftError, match="before the asked start"):
            await read(case, Window(second, second + case.grain.width.delta), page)


# ── Rows ────────────────────────────────────────────────────────────────────────────────────────


async def test_rows_with_equal_dimensions_are_summed(case: Case) -> None:
    page = one_bucket(case, case.row(1), case.row(2), case.row(1))
    snapshot = await read(case, case.window(1), page)
    rows = {row.dims: row for row in merge(snapshot.buckets[0].rows)}
    one, two = case.means(1), case.means(2)
    assert set(rows) == {one.dims, two.dims}
    assert totals_of((rows[one.dims],)) == totals_of((one, one))
    assert totals_of((rows[two.dims],)) == totals_of((two,))


async def test_order_of_duplicates_does_not_matter(case: Case) -> None:
    rows = [{**case.row(1), "extra": value} for value in ("b", "a", 3)]
    there = await read(case, case.window(1), one_bucket(case, *rows))
    back = await read(case, case.window(1), one_bucket(case, *reversed(rows)))
    assert merge(there.buckets[0].rows) == merge(back.buckets[0].rows)


async def test_missing_required_field_is_drift_with_something_to_look_at(case: Case) -> None:
    row = case.row(1)
    del row[case.required]
    with pytest.raises(SchemaDriftError) as caught:
        await read(case, case.window(1), one_bucket(case, row))
    assert caught.value.body


@pytest.mark.parametrize("value", [None, "many", True, [], {}, -1, 1.5, 2**63])
async def test_required_field_of_another_kind_is_drift(case: Case, value: Any) -> None:
    row = {**case.row(1), case.required: value}
    if case.set_amount is not None:
        if type(value) in {int, float}:
            return  # money may be any number
        row = case.priced(case.row(1), value)
    with pytest.raises(SchemaDriftError):
        await read(case, case.window(1), one_bucket(case, row))


@only(lambda case: case.optional is not None)
async def test_missing_optional_field_is_none_not_zero(case: Case) -> None:
    row = case.row(1)
    del row[str(case.optional)]
    full = bare(await one_row(case, case.row(1)))
    less = bare(await one_row(case, row))
    changed = {name for name in full._fields if getattr(full, name) != getattr(less, name)}
    assert changed
    assert all(getattr(less, name) is None for name in changed - {"input_tokens"})


async def test_unknown_field_is_kept_and_harms_nothing(case: Case) -> None:
    row = {**case.row(1), "zz_new_metric": 7, "aa_new_text": "x"}
    got = await one_row(case, row)
    assert bare(got) == case.means(1)
    detail = json.loads(got.detail)
    assert detail["zz_new_metric"] == 7
    assert detail["aa_new_text"] == "x"
    assert list(detail) == sorted(detail)


async def test_null_absent_and_empty_dimensions(case: Case) -> None:
    row = case.row(1)
    names = case.shown(row)
    rest = {name: value for name, value in row.items() if name not in {theirs for _, theirs in names}}
    null = {**rest, **dict.fromkeys(theirs for _, theirs in names)}
    empty = {**rest, **dict.fromkeys((theirs for _, theirs in names), "")}
    dims = [dict((await one_row(case, row)).dims) for row in (null, rest, empty)]
    assert dims[0] == dims[1] != dims[2]
    assert all(dims[0][ours] is None and dims[2][ours] == "" for ours, _ in names)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=5, unique=True))
async def test_dimension_values_arrive_unchanged_and_apart(case: Case, texts: list[str]) -> None:
    """Commas, colons, quotes, zero bytes: no two values may meet in one key."""
    ours, theirs = case.shown(case.row(1))[0]
    page = one_bucket(case, *({**case.row(1), theirs: text} for text in texts))
    snapshot = await read(case, case.window(1), page)
    assert [dict(row.dims)[ours] for row in snapshot.buckets[0].rows] == texts


# ── Money ───────────────────────────────────────────────────────────────────────────────────────

amounts = st.decimals(
    min_value=Decimal(-(10**12)), max_value=Decimal(10**12), allow_nan=False, allow_infinity=False
) | st.builds(
    lambda digits, places: Decimal(digits).scaleb(-places), st.integers(-(10**25), 10**25), st.integers(0, 40)
)


@settings(max_examples=150, deadline=None)
@given(amount=amounts)
@pytest.mark.parametrize("form", ["number", "string"])
@only(has_money)
async def test_money_is_exact_in_either_form(case: Case, form: str, amount: Any) -> None:
    text = str(amount) if form == "number" else f'"{amount}"'
    body = json.dumps(one_bucket(case, case.priced(case.row(1), "@"))).replace('"@"', text).encode()
    snapshot = await read(case, case.window(1), body)
    (row,) = snapshot.buckets[0].rows
    assert row.amount is not None
    got, factor = row.amount.as_tuple(), case.amount_scale.as_tuple()
    assert got.digits == amount.as_tuple().digits
    assert got.sign == amount.as_tuple().sign
    assert got.exponent == amount.as_tuple().exponent + factor.exponent
    assert row.currency == case.means(1).currency


@only(has_money)
async def test_sums_of_long_amounts_keep_every_digit(case: Case) -> None:
    rows = [case.priced(case.row(1), text) for text in ("1e20", "0.00000000000000000000000000000001", "-1e20")]
    got = await read(case, case.window(1), one_bucket(case, *rows))
    assert totals_of(got.buckets[0].rows).amount == Decimal("1e-32") * case.amount_scale
    assert merge(got.buckets[0].rows)[0].amount == Decimal("1e-32") * case.amount_scale


@pytest.mark.parametrize(
    "amount", ["NaN", "Infinity", "-inf", "", " 1", "1_000", "1,5", "$1", "٣", "1e400", "9" * 200, True, None, {}]
)
@only(has_money)
async def test_what_is_no_amount_is_drift(case: Case, amount: Any) -> None:
    with pytest.raises(SchemaDriftError):
        await one_row(case, case.priced(case.row(1), amount))


@only(has_money)
async def test_number_with_an_absurd_exponent_is_drift(case: Case) -> None:
    body = json.dumps(one_bucket(case, case.priced(case.row(1), "@")))
    for text in ("1e99999999999999999999", "1e-5000", "NaN"):
        with pytest.raises(SchemaDriftError):
            await read(case, case.window(1), body.replace('"@"', text).encode())


@only(has_currency)
async def test_currencies_are_apart(case: Case) -> None:
    euros = json.loads(json.dumps(case.row(1)).replace(f'"{case.currency}"', '"eur"'))
    snapshot = await read(case, case.window(1), one_bucket(case, case.row(1), euros))
    assert sorted(str(row.currency) for row in snapshot.buckets[0].rows) == ["EUR", "USD"]
    assert len({row.dims for row in snapshot.buckets[0].rows}) == 2


@pytest.mark.parametrize("currency", ["null", '""', '"dollars"', '"u$d"', "7", "[]"])
@only(has_currency)
async def test_amount_without_a_currency_is_drift(case: Case, currency: str) -> None:
    body = json.dumps(one_bucket(case, case.row(1))).replace(f'"{case.currency}"', currency).encode()
    with pytest.raises(SchemaDriftError, match="currency"):
        await read(case, case.window(1), body)


# ── Totals, settings, keys ──────────────────────────────────────────────────────────────────────


@only(lambda case: case.poller.sources[case.source].has_totals)
async def test_totals_equal_the_grouped_sums_and_ask_ungrouped(case: Case) -> None:
    first, second = case.starts(2)
    grouped = case.page(
        [case.bucket(first, [case.row(1), case.row(2)]), case.bucket(second, [case.row(1)])], False, None
    )
    snapshot = await read(case, case.window(2), grouped)
    script = Script(grouped)
    totals = await case.poller.totals(case.target, case.source, case.grain, case.window(2), script)
    assert totals == {bucket.start: totals_of(bucket.rows) for bucket in snapshot.buckets}
    assert Totals() not in totals.values()
    assert [name for name, _ in script.query(0) if name.startswith(case.group_param)] == []


@only(lambda case: case.poller.sources[case.source].can_probe)
async def test_probe_sees_what_a_fetch_would(case: Case) -> None:
    (start,) = case.starts(1)
    script = Script(case.probe or one_bucket(case, case.row(1)))
    probe = await case.poller.probe(case.target, case.source, case.grain, case.window(1), script)
    assert len(script.requests) == 1
    assert (probe.totals is None) != (probe.digest is None)
    if probe.totals is not None:
        assert probe.totals == {start: totals_of((case.means(1),))}


async def test_key_travels_in_a_header_alone(case: Case) -> None:
    script = Script(one_bucket(case, case.row(1)))
    await case.poller.fetch(case.target, case.source, case.grain, case.window(1), script)
    (request,) = script.requests
    secret = case.target.credential.reveal()
    assert secret not in str(request.url)
    sent = [value.split()[-1] for value in request.headers.values() if value.strip()]
    assert any(secret in text or b64encode(secret.encode())[:-4].decode() in text for text in sent)


def test_grain_is_sorted_and_follows_the_settings(case: Case) -> None:
    grain = case.grain
    assert list(grain.group_by) == sorted(set(grain.group_by))
    some = list(grain.group_by[:1])
    chosen = {**case.settings, "group_by": {case.source: some}}
    case.poller.check_settings(chosen)
    assert case.poller.grain(case.source, chosen).group_by == tuple(some)


@pytest.mark.parametrize(
    "setting",
    [
        {"colour": "red"},
        {"group_by": "model"},
        {"group_by": {"nothing": []}},
        {"group_by": {"@": ["colour"]}},
        {"group_by": {"@": "model"}},
        {"group_by": {"@": [7]}},
        {"group_by": {"@": [["model"]]}},
        {"group_by": {"@": None}},
    ],
)
def test_unknown_settings_are_named(case: Case, setting: dict[str, Any]) -> None:
    text = json.dumps({**case.settings, **setting}).replace("@", case.source)
    with pytest.raises(UsageError, match="settings"):
        case.poller.check_settings(json.loads(text))


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "umläut"])
def test_text_that_is_no_key_is_refused(case: Case, key: str) -> None:
    with pytest.raises(CredentialError):
        case.poller.check_credential(key)


def test_key_of_a_gateway_passes(case: Case) -> None:
    case.poller.check_credential("gw-0123456789")


__all__ = ["anyio_backend", "pytest_generate_tests", "pytestmark"]
__all__ += [name for name in globals() if name.startswith("test_")]
