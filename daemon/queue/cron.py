"""Cron expressions as QStash writes them: five fields, UTC, or another zone with `CRON_TZ=Area/City` in front.

cronsim evaluates them. It accepts more than QStash does (a sixth field, `L`, `#`), so that a text is checked here first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

TEXT_LENGTH_MAX = 500

_FIELD = re.compile(r"[0-9A-Za-z*/,-]+")
_PREFIX = re.compile(r"(?:CRON_TZ|TZ)=(\S+)\s+(.*)", re.DOTALL)
_FIX = "write five fields such as */5 * * * *, or CRON_TZ=Europe/Berlin 0 8 * * 1-5"


@cache
def _zones() -> set[str]:
    return available_timezones()  # walks folders: too slow for every request


def check_cron(text: str) -> str:
    """The expression, trimmed. Raises ValueError with what is wrong and how to mend it."""
    if len(text) > TEXT_LENGTH_MAX:
        raise ValueError(f"has {len(text)} characters; write at most {TEXT_LENGTH_MAX}")
    zone, fields = _split(text)
    if fields.startswith("@"):
        raise ValueError(f"is {text!r}: macros are not known; {_FIX}")
    parts = fields.split()
    if len(parts) != 5:
        raise ValueError(f"is {text!r}, which has {len(parts)} fields; {_FIX}")
    if not all(_FIELD.fullmatch(part) for part in parts) or "L" in fields.upper().replace("JUL", ""):
        raise ValueError(f"is {text!r}, which has a sign that QStash does not know; {_FIX}")
    if zone is not None and zone not in _zones():
        raise ValueError(f"names the unknown time zone {zone!r}; use one such as Europe/Berlin")
    try:
        CronSim(fields, datetime(2026, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        raise ValueError(f"is {text!r}: {error}; {_FIX}") from error
    return text.strip()


def upcoming(text: str, after: datetime) -> Iterator[datetime]:
    """The instants (UTC) at which a checked expression fires, all after `after`."""
    zone, fields = _split(text)
    start = after.astimezone(ZoneInfo(zone) if zone else UTC)
    for instant in CronSim(fields, start):
        yield instant.astimezone(UTC)


def cron_of(seconds: int) -> str | None:
    """The expression that fires every `seconds`, in step with the slots of that length; None where there is none."""
    minutes, rest = divmod(seconds, 60)
    if rest or not minutes:
        return None
    if minutes == 1:
        return "* * * * *"
    if minutes < 60 and 60 % minutes == 0:
        return f"*/{minutes} * * * *"
    hours, rest = divmod(minutes, 60)
    if rest or not hours or 24 % hours:
        return None
    return "0 0 * * *" if hours == 24 else "0 * * * *" if hours == 1 else f"0 */{hours} * * *"


def _split(text: str) -> tuple[str | None, str]:
    match = _PREFIX.fullmatch(text.strip())
    return (match[1], match[2].strip()) if match else (None, text.strip())
