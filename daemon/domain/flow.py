"""Flow control: how many attempts of the messages with one key may run at once, and how many may start per period."""

from __future__ import annotations

import re
from dataclasses import dataclass

from daemon.domain.duration import parse_duration

PERIOD_S_MAX = 7 * 86_400
RATE_MAX = 1_000_000_000
KEY_LENGTH_MAX = 512
VALUE_LENGTH_MAX = 200

_COUNT = re.compile(r"[0-9]{1,10}")
_RULE = "Upstash-Flow-Control-Value should be either rate=X or parallelism=Y, or both as comma-separated values"
"""QStash's own words, which its users may look for."""


@dataclass(frozen=True, slots=True)
class FlowControl:
    """The limits of one key; at least one of them is set.

    Attributes:
        key: 1 to `KEY_LENGTH_MAX` printable characters.
        parallelism: attempts in flight at once, 1 or more; None: no such limit.
        rate: attempts started per period, 1 to `RATE_MAX`; None: no such limit.
        period_s: length of the rate's fixed window, 1 to `PERIOD_S_MAX`.
    """

    key: str
    parallelism: int | None
    rate: int | None
    period_s: int = 1


def parse_flow(key: str, value: str, *, parallelism_max: int) -> FlowControl:
    """Read `Upstash-Flow-Control-Key` and `-Value`, such as `parallelism=3, rate=4, period=2s`, in any order.

    Raises:
        ValueError: a whole sentence for the caller: the rule, and what breaks it.
    """
    if not key or len(key) > KEY_LENGTH_MAX or not key.isprintable():
        raise ValueError(f"Upstash-Flow-Control-Key should have 1 to {KEY_LENGTH_MAX} printable characters")
    try:
        return _parse(key, value, parallelism_max)
    except ValueError as error:
        raise ValueError(f"{_RULE}; {error}") from error


def _parse(key: str, value: str, parallelism_max: int) -> FlowControl:
    if len(value) > VALUE_LENGTH_MAX:
        raise ValueError(f"it has {len(value)} characters, and at most {VALUE_LENGTH_MAX} are read")
    found: dict[str, int] = {}
    for part in value.split(","):
        name, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"{part.strip()!r} is no name=value")
        if name in found:
            raise ValueError(f"{name} is given twice")
        match name:
            case "parallelism":
                found[name] = _count(name, text, parallelism_max)
            case "rate":
                found[name] = _count(name, text, RATE_MAX)
            case "period":
                found[name] = _period_s(text)
            case _:
                raise ValueError(f"{name!r} is unknown; the names are parallelism, rate and period, in lower case")
    if "rate" not in found and "parallelism" not in found:
        raise ValueError("a period alone limits nothing")
    return FlowControl(key, found.get("parallelism"), found.get("rate"), found.get("period", 1))


def _count(name: str, text: str, most: int) -> int:
    if not _COUNT.fullmatch(text) or not 1 <= int(text) <= most:
        raise ValueError(f"{name} is {text!r} and should be a whole number from 1 to {most}")
    return int(text)


def _period_s(text: str) -> int:
    try:
        period_s = parse_duration(text)
    except ValueError as error:
        raise ValueError(f"period {error}") from error
    if not 1 <= period_s <= PERIOD_S_MAX:
        raise ValueError(f"period is {text!r} and should be from 1s to {PERIOD_S_MAX // 86_400}d")
    return period_s
