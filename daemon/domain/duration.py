"""Durations as QStash and the servers behind it write them, and how long to wait after a failure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

DAY_S = 86_400
DURATION_S_MAX = 10 * 365 * DAY_S
TEXT_LENGTH_MAX = 100

_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": DAY_S}
_DURATION = re.compile(r"[0-9]+|(?:[0-9]+[smhd])+")
_PART = re.compile(r"([0-9]+)([smhd]?)")
_FIX = "write whole numbers with s, m, h or d, such as 10s or 1d10h30m"

_GO_UNITS_S = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,  # the micro sign
    "μs": 1e-6,  # the Greek letter
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3_600.0,
}
_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_SECONDS = re.compile(_NUMBER)
_GO_PART = re.compile(rf"({_NUMBER})(ns|us|µs|μs|ms|s|m|h)")
_GO_DURATION = re.compile(rf"(?:{_GO_PART.pattern})+")

# The three forms of RFC 9110, and the zones that servers write instead of GMT. What passes, the parser takes or refuses
# with a ValueError; it does not answer every other text so calmly.
_CLOCK = r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})?"
_HTTP_DATE = re.compile(
    rf"[A-Za-z]{{3,9}}, ?[0-9]{{1,2}}[ -][A-Za-z]{{3}}[ -][0-9]{{2,4}} {_CLOCK} (?:GMT|UTC|[+-][01][0-9]{{3}})"
    rf"|[A-Za-z]{{3}} [A-Za-z]{{3}} {{1,2}}[0-9]{{1,2}} {_CLOCK} [0-9]{{4}}"
)
_ASKING = ("retry-after", "x-ratelimit-reset", "x-ratelimit-reset-requests", "x-ratelimit-reset-tokens")


def parse_duration(text: str) -> int:
    """Whole seconds: `10s`, `1d10h30m`, or without a unit `90`. Parts add up, in any order.

    Raises:
        ValueError: reads on from the field's name; anything else, or more than `DURATION_S_MAX` (ten years).
    """
    bare = text.strip()
    if len(bare) > TEXT_LENGTH_MAX:
        raise ValueError(f"has {len(bare)} characters; {_FIX}")
    if not _DURATION.fullmatch(bare):
        raise ValueError(f"is {bare!r}, which is no duration; {_FIX}")
    seconds = sum(int(number) * _UNITS_S[unit or "s"] for number, unit in _PART.findall(bare))
    if seconds > DURATION_S_MAX:
        raise ValueError(f"is {bare!r}, which is more than ten years; write at most {DURATION_S_MAX // DAY_S}d")
    return seconds


def parse_go_duration(text: str) -> float:
    """Seconds, 0 or more and finite: `6m5s`, `1.5h`, `250ms`, `0`. Units ns us µs ms s m h; no sign.

    Raises:
        ValueError: anything else, also a bare number other than 0.
    """
    if text == "0":
        return 0.0
    if len(text) > TEXT_LENGTH_MAX or not _GO_DURATION.fullmatch(text):
        raise ValueError(f"{text[:TEXT_LENGTH_MAX]!r} is no duration such as 6m5s or 250ms")
    return math.fsum(float(number) * _GO_UNITS_S[unit] for number, unit in _GO_PART.findall(text))


def asked_wait_s(headers: Mapping[str, str], now: datetime) -> float | None:
    """The wait that a failed response asks for, 0 (at once) to `DAY_S` seconds; None: it asks for none.

    `Retry-After` and `X-RateLimit-Reset`, `-Reset-Requests`, `-Reset-Tokens` are read alike: seconds, an HTTP date or a
    Go duration. The largest counts. A date that has passed means at once. More than a day is ignored, and so are the Unix
    timestamps that some send as `X-RateLimit-Reset`, whether in seconds or milliseconds; so is what is none of these.

    Args:
        headers: names in lower case.
        now: aware. A date counts from the response's own `Date` where there is one, so that neither clock needs to be right.
    """
    sent = _http_date(headers.get("date", "").strip()) or now
    waits = [_wait_s(headers[name].strip(), sent) for name in _ASKING if name in headers]
    return max((wait for wait in waits if wait is not None and wait <= DAY_S), default=None)


def backoff_s(n: int) -> float:
    """The wait before retry `n` = 1, 2, ... where nothing else says: e^(2.5 n) seconds, from the fifth on a day."""
    return min(float(DAY_S), math.exp(2.5 * min(n, 5)))


def _wait_s(text: str, sent: datetime) -> float | None:
    if len(text) > TEXT_LENGTH_MAX:
        return None
    if _SECONDS.fullmatch(text):
        return float(text)
    if date := _http_date(text):
        return max(0.0, (date - sent).total_seconds())
    try:
        return parse_go_duration(text)
    except ValueError:
        return None


def _http_date(text: str) -> datetime | None:
    if not _HTTP_DATE.fullmatch(text):
        return None
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
