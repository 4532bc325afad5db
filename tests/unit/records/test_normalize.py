"""Rows of equal dimensions become one: exactly, in any order, or not at all."""

from __future__ import annotations

from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.domain.errors import SchemaDriftError
from daemon.domain.record import Rating, Row, Totals, totals_of
from daemon.records.normalize import merge

DIMS = (("model", "gpt-5"),)
LONG = Decimal("1." + "0" * 97 + "1")

amounts = st.decimals(-(10**30), 10**30, allow_nan=False, allow_infinity=False, places=60)
counts = st.none() | st.integers(0, 10**9)
details = st.dictionaries(
    st.sampled_from("abc"),
    st.none() | st.booleans() | st.integers() | amounts | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
)
ratings = st.builds(
    lambda number, is_long: Rating("openai", "gpt-5", (), (("input", number),), is_long),
    st.integers(1, 9),
    st.sampled_from([None, True, False]),
)
rows = st.builds(
    Row,
    st.sampled_from([DIMS, (("model", None),)]),
    input_tokens=counts,
    requests=counts,
    quantity=st.none() | amounts,
    unit=st.just("images"),
    amount=st.none() | amounts,
    currency=st.just("USD"),
    detail=details.map(msgspec.json.Encoder(decimal_format="number").encode),
    rating=st.none() | ratings,
)


@given(st.lists(rows, max_size=6).flatmap(lambda given: st.tuples(st.just(given), st.permutations(given))))
def test_order_never_matters_and_nothing_is_lost(both: tuple[list[Row], list[Row]]) -> None:
    there, back = ({row.dims: row for row in merge(given)} for given in both)
    assert there == back
    assert totals_of(tuple(both[0])) == totals_of(tuple(there.values()))


def test_rows_of_their_own_are_left_as_they_are() -> None:
    alone = (Row(DIMS, detail=b'{"a": 1.50}'), Row((("model", None),), unit="images"))
    assert merge(alone) == alone


def test_long_amounts_keep_every_digit() -> None:
    row = Row(DIMS, quantity=LONG, unit="bytes", amount=LONG, currency="USD")
    (merged,) = merge([row] * 3)
    exact = "3." + "0" * 97 + "3"
    assert (str(merged.quantity), str(merged.amount)) == (exact, exact)
    totals = totals_of((row,) * 3)
    assert (str(totals.quantity), str(totals.amount)) == (exact, exact)


def test_totals_of_nothing_are_nothing() -> None:
    assert totals_of(()) == Totals() == totals_of((Row(DIMS),))


@pytest.mark.parametrize(
    ("given", "merged"),
    [
        ([b"{}", b"{}"], b"{}"),
        ([b'{"a": 1}', b'{"b": 2}'], b'{"a":1,"b":2}'),
        ([b'{"a": 9007199254740993}', b'{"a": 1}'], b'{"a":9007199254740994}'),
        ([b'{"a": 0.1}', b'{"a": 0.2}', b'{"a": 1}'], b'{"a":1.3}'),
        ([b'{"a": 9007199254740993.25}', b'{"a": 0.50}'], b'{"a":9007199254740993.75}'),
        ([b'{"a": 1}', b'{"a": [2]}', b'{"a": 4}'], b'{"a":1}'),
        ([b'{"a": true}', b'{"a": true}'], b'{"a":true}'),
        ([b'{"a": null}', b'{"a": {}}'], b'{"a":{}}'),
        ([b'{"a": "y"}', b'{"a": "x"}'], b'{"a":"x"}'),
    ],
)
def test_details_add_up_where_all_are_numbers(given: list[bytes], merged: bytes) -> None:
    for rows in (given, given[::-1]):
        assert merge([Row(DIMS, detail=detail) for detail in rows])[0].detail == merged


@pytest.mark.parametrize(
    "row",
    [
        Row(DIMS, amount=Decimal(1), currency="EUR"),
        Row(DIMS, quantity=Decimal(1), unit="seconds"),
        Row(DIMS, amount=Decimal("1e-300"), currency="USD"),
        Row(DIMS, detail=b'{"a": 1e-300}'),
        Row(DIMS, detail=b'{"a": 1e99999999}'),
    ],
)
def test_what_has_no_exact_sum_is_drift(row: Row) -> None:
    other = Row(DIMS, quantity=Decimal(1), unit="images", amount=Decimal(1), currency="USD", detail=b'{"a": 1}')
    with pytest.raises(SchemaDriftError):
        merge([row, other])


def test_rows_that_cost_differently_have_no_price_together() -> None:
    def price(*contexts: tuple[tuple[str, str], ...]) -> Rating | None:
        given = [Row(DIMS, rating=Rating("openai", "gpt-5", context, (("input", 2),), True)) for context in contexts]
        return merge(given)[0].rating

    assert price((), ()) == Rating("openai", "gpt-5", (), (("input", 4),), True)
    assert price((), (("processing", "batch"),)) is None
