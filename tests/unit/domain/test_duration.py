"""Durations of the two habits, and what a failed response asks for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.domain.duration import DAY_S, DURATION_S_MAX, asked_wait_s, backoff_s, parse_duration, parse_go_duration

NOW = datetime(2026, 11, 26, 10, 2, 30, tzinfo=UTC)
ASKING = ["retry-after", "x-ratelimit-reset", "x-ratelimit-reset-requests", "x-ratelimit-reset-tokens"]


def http_date(wait_s: float, since: datetime = NOW) -> str:
    return format_datetime(since + timedelta(seconds=wait_s), usegmt=True)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10s", 10), ("0", 0), ("0s", 0), ("90", 90), (" 5m\t", 300), ("2h", 7200), ("1d", 86_400), ("1d10h30m", 124_200),
        ("1d1h30m", 91_800), ("30m1d", 88_200), ("1h1h", 7200), ("007s", 7), ("3650d", DURATION_S_MAX),
    ],
)  # fmt: skip
def test_durations_are_whole_seconds(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is ''"),
        ("s", "is 's'"),
        ("-5s", "no duration"),
        ("+5", "no duration"),
        ("1.5h", "whole numbers"),
        ("10S", "s, m, h or d"),
        ("10ms", "no duration"),
        ("1w", "no duration"),
        ("1h30", "no duration"),
        ("1h 30m", "no duration"),
        ("1_0s", "no duration"),
        ("\N{ARABIC-INDIC DIGIT THREE}s", "no duration"),
        ("5\N{SUPERSCRIPT TWO}", "no duration"),
        ("5s\n5s", "no duration"),
        ("3650d1s", "ten years"),
        ("9" * 100, "ten years"),
        ("9" * 101, "101 characters"),
        ("9" * 5000 + "d", "5001 characters"),
    ],
)
def test_what_is_no_duration_is_refused_with_the_fix(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"(?s).*") as caught:
        parse_duration(text)
    assert says in str(caught.value)
    assert "write" in str(caught.value)


@given(st.integers(0, 3000), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_parts_add_up(d: int, h: int, m: int, s: int) -> None:
    assert parse_duration(f"{d}d{h}h{m}m{s}s") == timedelta(days=d, hours=h, minutes=m, seconds=s) / timedelta(
        seconds=1
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0), ("6m5s", 365), ("1h", 3600), ("1.5h", 5400), (".5s", 0.5), ("2.s", 2), ("250ms", 0.25), ("1s500ms", 1.5),
        ("1000us", 0.001), ("1000\N{MICRO SIGN}s", 0.001), ("1000\N{GREEK SMALL LETTER MU}s", 0.001), ("5000ns", 5e-6),
        ("1h2m3s", 3723), ("0s", 0), ("1m6ms", 60.006),
    ],
)  # fmt: skip
def test_go_durations_are_seconds(text: str, seconds: float) -> None:
    assert parse_go_duration(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    ["", "5", "-1s", "+1s", "1d", "s", ".s", "1", "1 s", " 1s", "1S", "1.5.5s", "1s5", "infs", "1e3s", "9" * 100 + "s"],
)
def test_what_go_does_not_write_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        parse_go_duration(text)


@pytest.mark.parametrize("name", ASKING)
@pytest.mark.parametrize(
    ("text", "wait_s"),
    [
        ("0", 0),
        ("120", 120),
        (" 120 ", 120),
        ("0.25", 0.25),
        ("6m5s", 365),
        ("20ms", 0.02),
        ("24h", DAY_S),
        ("86400", DAY_S),
        (http_date(90), 90),
        (http_date(DAY_S), DAY_S),
        (http_date(-5), 0),
        ("Thursday, 26-Nov-26 10:03:00 GMT", 30),
        ("Thu Nov 26 10:03:00 2026", 30),
        ("Thu, 26 Nov 2026 11:03:00 +0100", 30),
    ],
)
def test_each_header_is_read_in_each_form(name: str, text: str, wait_s: float) -> None:
    assert asked_wait_s({name: text, "content-type": "text/plain"}, NOW) == wait_s


@pytest.mark.parametrize("name", ASKING)
@pytest.mark.parametrize(
    "text",
    [
        "", "soon", "-1", "-5s", "86401", "24h1ms", "1e3", "nan", "inf", "9" * 400, str(int(NOW.timestamp()) + 60),
        str(int(NOW.timestamp() * 1000)), http_date(DAY_S + 1), "1, 2", "\N{ARABIC-INDIC DIGIT THREE}", "1d",
        "Thu, 32 Nov 2026 10:03:00 GMT", "Thu, 26 Foo 2026 10:03:00 GMT", "Thu, 26 Nov 2026 25:03:00 GMT",
        "2026-11-26T10:03:00Z",
    ],
)  # fmt: skip
def test_garbage_timestamps_and_more_than_a_day_ask_for_nothing(name: str, text: str) -> None:
    assert asked_wait_s({name: text}, NOW) is None
    others = {other: "7" for other in ASKING if other != name}
    assert asked_wait_s({name: text} | others, NOW) == 7, "and leave the others alone"


def test_the_largest_counts() -> None:
    headers = {"retry-after": "3", "x-ratelimit-reset-requests": "1m", "x-ratelimit-reset-tokens": "20ms"}
    assert asked_wait_s(headers, NOW) == 60
    assert asked_wait_s(headers | {"x-ratelimit-reset": "61"}, NOW) == 61


def test_nothing_asked() -> None:
    assert asked_wait_s({}, NOW) is None
    assert asked_wait_s({"date": http_date(0), "x-ratelimit-remaining": "0"}, NOW) is None


def test_a_date_counts_from_the_response_not_from_our_clock() -> None:
    theirs = NOW - timedelta(days=300)
    headers = {"date": http_date(0, theirs), "retry-after": http_date(45, theirs)}
    assert asked_wait_s(headers, NOW) == 45
    assert asked_wait_s({"retry-after": headers["retry-after"]}, NOW) == 0
    assert asked_wait_s({"date": "never", "retry-after": http_date(45)}, NOW) == 45
    assert asked_wait_s({"retry-after": http_date(45)}, NOW.astimezone(timezone(timedelta(hours=9)))) == 45


def test_the_backoff_is_that_of_the_service() -> None:
    waits = [backoff_s(n) for n in range(1, 7)]
    assert [round(wait, 1) for wait in waits[:4]] == [12.2, 148.4, 1808.0, 22026.5]
    assert waits[4:] == [DAY_S, DAY_S]
    assert backoff_s(10**9) == DAY_S


@given(st.text(max_size=200) | st.text(alphabet="0123456789smhd ", max_size=20))
def test_any_text_is_a_bounded_duration_or_refused_in_words(text: str) -> None:
    try:
        assert 0 <= parse_duration(text) <= DURATION_S_MAX
    except ValueError as error:
        assert str(error).startswith(("has ", "is "))  # noqa: PT017  # one test for both ends


DATES = st.builds(
    "{}, {} {} {:04} {:02}:{:02}:{:02} {}".format,
    st.sampled_from(["Thu", "Mon", "Foo"]),
    st.integers(0, 99),
    st.sampled_from(["Jan", "Feb", "nov", "dec", "pm"]),
    st.integers(0, 9999),
    st.integers(0, 99),
    st.integers(0, 99),
    st.integers(0, 99),
    st.sampled_from(["GMT", "UTC", "+1959", "-1999", "-0000"]),
)
VALUES = st.text(max_size=120) | st.text(alphabet="0123456789.smhunµ:,GMT ", max_size=30) | DATES


@given(st.dictionaries(st.sampled_from([*ASKING, "date"]), VALUES))
def test_whatever_a_server_answers_the_wait_is_none_or_within_a_day(headers: dict[str, str]) -> None:
    wait_s = asked_wait_s(headers, NOW)
    assert wait_s is None or 0 <= wait_s <= DAY_S
