"""`Upstash-Flow-Control-Value`: what is taken, and that a refusal gives the rule and the reason."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.domain.flow import KEY_LENGTH_MAX, PERIOD_S_MAX, RATE_MAX, FlowControl, parse_flow

RULE = "Upstash-Flow-Control-Value should be either rate=X or parallelism=Y, or both as comma-separated values"


@pytest.mark.parametrize(
    ("value", "parallelism", "rate", "period_s"),
    [
        ("parallelism=3, rate=4, period=2s", 3, 4, 2),
        ("parallelism=3,rate=4,period=2s", 3, 4, 2),
        ("rate=4", None, 4, 1),
        ("parallelism=1", 1, None, 1),
        ("rate=4,period=60", None, 4, 60),
        ("rate=4, period=1m", None, 4, 60),
        ("rate=4, period=1d", None, 4, 86_400),
        ("rate=4, period=1d12h", None, 4, 129_600),
        ("rate=4, period=7d", None, 4, PERIOD_S_MAX),
        ("parallelism=3, period=2s", 3, None, 2),
        (" rate = 4 ,  parallelism = 10 ", 10, 4, 1),
        (f"rate={RATE_MAX}", None, RATE_MAX, 1),
    ],
)
def test_limits_are_read(value: str, parallelism: int | None, rate: int | None, period_s: int) -> None:
    assert parse_flow("a key", value, parallelism_max=10) == FlowControl("a key", parallelism, rate, period_s)


def test_the_order_is_free() -> None:
    parts = ["rate=4", "period=2s", "parallelism=3"]
    assert {parse_flow("k", ",".join(some), parallelism_max=10) for some in permutations(parts)} == {
        FlowControl("k", 3, 4, 2)
    }


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "'' is no name=value"),
        ("4", "'4' is no name=value"),
        ("rate=4,", "'' is no name=value"),
        ("rate=4 period=2s", "rate is '4 period=2s'"),
        ("rate=4; parallelism=3", "rate is '4; parallelism=3'"),
        ("rate=", "rate is '' and should be a whole number from 1 to 1000000000"),
        ("rate=0", "rate is '0'"),
        ("rate=-1", "rate is '-1'"),
        ("rate=+1", "rate is '+1'"),
        ("rate=1.5", "rate is '1.5'"),
        ("rate=1000000001", "rate is '1000000001'"),
        ("rate=" + "9" * 100, "rate is '999"),
        ("rate=\N{ARABIC-INDIC DIGIT THREE}", "rate is"),
        ("rate=None", "rate is 'None'"),
        ("rate==4", "rate is '=4'"),
        ("parallelism=0", "parallelism is '0' and should be a whole number from 1 to 10"),
        ("parallelism=11", "parallelism is '11' and should be a whole number from 1 to 10"),
        ("rate=1,rate=1", "rate is given twice"),
        ("period=1,rate=1,period=1", "period is given twice"),
        ("period=5s", "a period alone limits nothing"),
        ("rate=1,period=0", "period is '0' and should be from 1s to 7d"),
        ("rate=1,period=7d1s", "period is '7d1s' and should be from 1s to 7d"),
        ("rate=1,period=9999d", "period is '9999d', which is more than ten years"),
        ("rate=1,period=2x", "period is '2x', which is no duration"),
        ("rate=1,burst=3", "'burst' is unknown"),
        ("Rate=1", "'Rate' is unknown; the names are parallelism, rate and period, in lower case"),
        ("=1", "'' is unknown"),
        ("rate=1".ljust(201), "201 characters"),
    ],
)
def test_a_refusal_gives_the_rule_and_what_breaks_it(value: str, says: str) -> None:
    with pytest.raises(ValueError, match=RULE) as caught:
        parse_flow("k", value, parallelism_max=10)
    assert says in str(caught.value)


@pytest.mark.parametrize("key", ["", "a\0b", "a\nb", "\ud800", "k" * (KEY_LENGTH_MAX + 1)])
def test_a_key_that_cannot_be_stored_or_shown_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="Upstash-Flow-Control-Key should have 1 to 512 printable characters"):
        parse_flow(key, "rate=1", parallelism_max=10)


@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(["rate", "parallelism", "period", "=", ",", " ", "0", "1", "9", "7d", "s"]), max_size=20
    ).map("".join)
)
def test_any_value_is_a_limit_or_refused_with_the_rule(value: str) -> None:
    try:
        flow = parse_flow("k", value, parallelism_max=99)
    except ValueError as error:
        assert str(error).startswith(RULE + "; ")  # noqa: PT017  # one test for both ends
        return
    assert flow.parallelism is None or 1 <= flow.parallelism <= 99
    assert flow.rate is None or 1 <= flow.rate <= RATE_MAX
    assert flow.parallelism or flow.rate
    assert 1 <= flow.period_s <= PERIOD_S_MAX
