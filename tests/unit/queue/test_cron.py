"""Cron expressions as QStash takes them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.domain.window import EPOCH, floor_to
from daemon.queue.cron import check_cron, cron_of, upcoming

START = datetime(2026, 11, 26, 10, 2, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    "text",
    [
        "*/5 * * * *", "0 0 1 1 *", "1,2,3 1-5 * * 0", "0 8 * * MON-FRI", "0 8 * JUL *", "CRON_TZ=Europe/Berlin 0 8 * * *",
        "CRON_TZ=UTC   */2 * * * *",
    ],
)  # fmt: skip
def test_what_qstash_takes_is_taken(text: str) -> None:
    assert check_cron(f"  {text} ") == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "0 fields"),
        ("* * * *", "4 fields"),
        ("* * * * * *", "6 fields"),
        ("@hourly", "macros"),
        ("0 0 L * *", "does not know"),
        ("0 0 * * 5#3", "does not know"),
        ("0 0 ? * *", "does not know"),
        ("60 * * * *", "60"),
        ("* 24 * * *", "24"),
        ("*/0 * * * *", "*/0"),
        ("a b c d e", "a b c d e"),
        ("CRON_TZ=Mars/Olympus * * * * *", "Mars/Olympus"),
        ("CRON_TZ= * * * * *", "6 fields"),
        ("0 0 31 2 *", "31 2"),
    ],
)
def test_what_it_does_not_take_is_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"(?s).*") as caught:
        check_cron(text)
    assert says in str(caught.value)


@given(st.text(alphabet="0123456789*/,-LW#? @abcMON=_", max_size=30))
def test_any_text_is_taken_or_refused_in_words(text: str) -> None:
    try:
        taken = check_cron(text)
    except ValueError:
        return
    assert next(upcoming(taken, START), START) >= START


@pytest.mark.parametrize("seconds", [60, 120, 300, 900, 1800, 3600, 7200, 21_600, 86_400])
def test_the_schedule_fires_once_in_each_slot(seconds: int) -> None:
    """So that a tick is asked for in every slot, and at its start."""
    text = cron_of(seconds)
    assert text is not None
    assert check_cron(text) == text
    fired = list(islice(upcoming(text, START), 40))
    assert fired == [floor_to(START, seconds) + timedelta(seconds=seconds * n) for n in range(1, 41)]
    assert all((at - EPOCH) % timedelta(seconds=seconds) == timedelta(0) for at in fired)


@pytest.mark.parametrize("seconds", [1, 30, 90, 2_700, 25_200 + 60])
def test_a_tick_without_an_expression_is_told(seconds: int) -> None:
    assert cron_of(seconds) is None


def test_a_zone_is_kept_through_its_change_of_clocks() -> None:
    fired = list(islice(upcoming("CRON_TZ=Europe/Berlin 30 2 * * *", datetime(2026, 10, 23, 12, tzinfo=UTC)), 4))
    assert [at.date().day for at in fired] == [24, 25, 26, 27]
    assert [at.hour for at in fired] == [0, 0, 1, 1], "2:30 stays 2:30 there, though UTC moves"
