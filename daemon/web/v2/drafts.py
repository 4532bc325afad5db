"""From the headers of a publish to a message: every `Upstash-*` value, checked, with errors that name it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from time import time
from urllib.parse import unquote_plus

from daemon.domain.account import Limits
from daemon.domain.destination import Destination, check_url
from daemon.domain.duration import parse_duration
from daemon.domain.errors import UsageError
from daemon.domain.expression import parse_delay
from daemon.domain.flow import FlowControl, parse_flow
from daemon.domain.headers import NO_VALUE, OF_CONNECTION, TOKEN, joined
from daemon.domain.redaction import parse_redaction
from daemon.queue.cron import check_cron
from daemon.queue.message import Callback, Headers, Spec
from daemon.web.v2.call import SETTING_PREFIX, TOKEN_PARAMETER

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
NAME = re.compile(r"[A-Za-z0-9._-]{1,200}", re.ASCII)
"""Of a queue, a schedule, a group."""
LABELS_MAX = 20
LABEL_CHARS_MAX = 200
DEDUP_CHARS_MAX = 1_000
FIELD_CHARS_MAX = 8_192

_FORWARD = "upstash-forward-"
_NOT_FORWARDED_WHOLE = OF_CONNECTION | {"authorization", "content-type", "proxy-authorization"}
_CALLBACK_SETTINGS = frozenset(
    {"method", "timeout", "retries", "retry-delay", "delay", "not-before", "label", "redact-fields", "deduplication-id",
     "content-based-deduplication", "flow-control-key", "flow-control-value", "forward-"}
)  # fmt: skip
"""Of a callback, by what follows its prefix; those that tallyd does not heed are no headers either."""
_FLOW_FIX = "Upstash-Flow-Control-Key and Upstash-Flow-Control-Value go together"

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Draft:
    """What the headers of one message say. `urls` are where callbacks go, by header: to be judged
    before it is stored.
    """

    spec: Spec
    not_before: float | None = None
    dedup_id: str | None = None
    is_content_based: bool = False
    labels: tuple[str, ...] = ()
    cron: str | None = None
    schedule_id: str | None = None
    queue: str | None = None
    urls: tuple[tuple[str, Destination], ...] = ()

    def dedup(self, url: str, body: bytes, endpoint: str = "") -> str | None:
        """What marks a copy of this message; None: nothing does.

        Args:
            endpoint: its key in the group that the message goes to: each endpoint counts by itself.
        """
        of_group = [endpoint.encode()] if endpoint else []
        if self.dedup_id is not None:
            return _digest(b"id", self.dedup_id.encode(), *of_group)
        if self.is_content_based:
            header = [part.encode() for name, values in sorted(self.spec.header.items()) for part in (name, *values)]
            return _digest(b"content", url.encode(), body, *header, b"endpoint", *of_group)
        return None


def read_draft(
    headers: Pairs, query: Pairs, limits: Limits, defaults: Mapping[str, Sequence[str]] | None = None
) -> Draft:
    """What a publish asks for.

    Args:
        headers: of the request, names in lower case.
        query: the same values as parameters, names in lower case too, for those who cannot set headers; a header counts for more.
        defaults: of the URL group, which count for less than both.

    Raises:
        UsageError: names the header, what is wrong and how to mend it.
    """
    given = _Given(headers, query, defaults or {})
    flow = _flow(given, limits)
    urls: list[tuple[str, Destination]] = []
    spec = Spec(
        method=_method(given, "upstash-method"),
        header=_header(given),
        retries=_retries(given, "upstash-retries", limits) if given.has("upstash-retries") else min(3, limits.retries),
        retry_delay=_retry_delay(given, "upstash-retry-delay"),
        timeout_s=_timeout(given, "upstash-timeout", limits),
        delay_s=_delay(given, "upstash-delay", limits) or 0,
        redact=_parsed(given, "upstash-redact-fields", lambda text: parse_redaction(text).text),
        flow=None if flow is None else (flow.key, flow.parallelism, flow.rate, flow.period_s),
        callback=_callback(given, "upstash-callback", limits, urls),
        failure_callback=_callback(given, "upstash-failure-callback", limits, urls),
    )
    return Draft(
        spec,
        not_before=_not_before(given, limits),
        dedup_id=_dedup_id(given),
        is_content_based=_flag(given, "upstash-content-based-deduplication"),
        labels=_labels(given),
        cron=_parsed(given, "upstash-cron", check_cron),
        schedule_id=_name(given, "upstash-schedule-id"),
        queue=_name(given, "upstash-queue-name"),
        urls=tuple(urls),
    )


_checked = lru_cache(1_000)(check_url)  # publishers send to few URLs


def destination(url: str) -> Destination:
    """A checked URL. Raises UsageError in QStash's words."""
    try:
        return _checked(url)
    except ValueError as error:
        raise UsageError("invalid destination url", str(error)) from error


def check_name(field_name: str, text: str) -> str:
    """A name of a queue, schedule or group. Raises UsageError."""
    if not NAME.fullmatch(text):
        raise UsageError(field_name, f"is {text[:80]!r}", "use 1 to 200 letters, digits, dots, dashes and underscores")
    return text


class _Given:
    """Values by lower-case name, of the strongest source that has the name; and what is to be forwarded."""

    def __init__(self, headers: Pairs, query: Pairs, defaults: Mapping[str, Sequence[str]]) -> None:
        self._found: dict[str, list[str]] = {}
        for name, value in headers:
            self._found.setdefault(name, []).append(value)
        if query:
            self._add((name, value) for name, value in query if name.startswith(SETTING_PREFIX))
        if defaults:
            self._add((name.lower(), value) for name, values in defaults.items() for value in values)

    def _add(self, weaker: Iterable[tuple[str, str]]) -> None:
        """What has no value yet."""
        values: dict[str, list[str]] = {}
        for name, value in weaker:
            if name not in self._found:
                values.setdefault(name, []).append(value)
        self._found.update(values)

    def has(self, name: str) -> bool:
        return bool(self.get(name))

    def get(self, name: str) -> str | None:
        """The value of a header that is there once, trimmed; the same value twice is once. Empty is absent."""
        values = self._found.get(name)
        if not values:
            return None
        text = values[-1].strip()
        if any(value.strip() != text for value in values):
            raise UsageError(spelled(name), f"is given {len(values)} times, and not the same", "give it once")
        if len(text) > FIELD_CHARS_MAX:
            raise UsageError(spelled(name), f"has {len(text)} characters", f"write at most {FIELD_CHARS_MAX}")
        return text or None

    def listed(self, name: str) -> list[str]:
        return self._found.get(name, [])

    def prefixed(self, prefix: str) -> Iterable[tuple[str, str]]:
        """(name without the prefix, value) of what is there to be forwarded."""
        for name, values in self._found.items():
            if name.startswith(prefix) and len(name) > len(prefix):
                for value in values:
                    yield name[len(prefix) :], value

    def others(self) -> Iterable[tuple[str, str]]:
        """What goes along with `Upstash-Header-Forward`: all that is neither ours, nor the connection's, nor there twice."""
        hops = {hop.strip().lower() for value in self.listed("connection") for hop in value.split(",")}
        for name, values in self._found.items():
            if not (
                name.startswith(SETTING_PREFIX)
                or name in _NOT_FORWARDED_WHOLE
                or name in hops
                or _FORWARD + name in self._found
            ):
                for value in values:
                    yield name, value


def spelled(name: str) -> str:
    """A header's name as it is written."""
    return "-".join(part.capitalize() for part in name.split("-"))


def _header(given: _Given) -> Headers:
    pairs = [("Content-Type", value) for value in given.listed("content-type")[-1:]]
    if given.listed(f"{_FORWARD}content-type"):
        pairs.clear()  # a message has one type, and this one was meant for it alone
    if _flag(given, "upstash-header-forward"):
        pairs += given.others()
    pairs += given.prefixed(_FORWARD)
    return _checked_header(pairs, "Upstash-Forward-")


def _checked_header(pairs: Iterable[tuple[str, str]], prefix: str) -> Headers:
    found: list[tuple[str, str]] = []
    for name, value in pairs:
        if not TOKEN.fullmatch(name):
            raise UsageError(f"{prefix}{name[:80]}", "is no name of a header", "use letters, digits and dashes")
        if NO_VALUE.search(value):
            raise UsageError(f"{prefix}{spelled(name)}", "holds a line break or another control character", "remove it")
        found.append((spelled(name), value))
    return joined(found)


def _callback(given: _Given, prefix: str, limits: Limits, urls: list[tuple[str, Destination]]) -> Callback | None:
    url = given.get(prefix)
    if url is None:
        return None
    try:
        urls.append((spelled(prefix), _checked(url)))
    except ValueError as error:
        raise UsageError(spelled(prefix), f"is no URL: {error}") from error
    retries = f"{prefix}-retries"
    return Callback(
        url,
        method=_method(given, f"{prefix}-method"),
        header=_checked_header(_forwarded(given, prefix), f"{spelled(prefix)}-Forward-"),
        retries=_retries(given, retries, limits) if given.has(retries) else None,
        retry_delay=_retry_delay(given, f"{prefix}-retry-delay"),
        timeout_s=_timeout(given, f"{prefix}-timeout", limits),
        delay_s=_delay(given, f"{prefix}-delay", limits) or 0,
    )


def _forwarded(given: _Given, prefix: str) -> Iterable[tuple[str, str]]:
    """What a callback carries: as documented with `-Forward-` before its name, or as the Python SDK sends it, without."""
    for name, value in given.prefixed(f"{prefix}-"):
        bare = name.removeprefix("forward-")
        if bare and (bare != name or name not in _CALLBACK_SETTINGS):
            yield bare, value


def _method(given: _Given, name: str) -> str:
    method = (given.get(name) or "POST").upper()
    if method not in METHODS:
        raise UsageError(spelled(name), f"is {method[:40]!r}", f"choose of {', '.join(METHODS)}")
    return method


def _retries(given: _Given, name: str, limits: Limits) -> int:
    text = given.get(name) or ""
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise UsageError(spelled(name), f"is {text[:40]!r}", f"give a whole number from 0 to {limits.retries}")
    if int(text) > limits.retries:
        raise UsageError(spelled(name), f"quota maxRetries exceeded, current limit: {limits.retries}")
    return int(text)


def _parsed(given: _Given, name: str, parse: Callable[[str], str]) -> str | None:
    text = given.get(name)
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError as error:
        raise UsageError(spelled(name), str(error)) from error


def _retry_delay(given: _Given, name: str) -> str | None:
    return _parsed(given, name, lambda text: parse_delay(text).text)


def _duration(given: _Given, name: str) -> int | None:
    text = given.get(name)
    if text is None:
        return None
    try:
        return parse_duration(text)
    except ValueError as error:
        raise UsageError(spelled(name), str(error)) from error


def _timeout(given: _Given, name: str, limits: Limits) -> int | None:
    seconds = _duration(given, name)
    if seconds is None:
        return None
    if seconds < 1:
        raise UsageError(spelled(name), "is 0", "give at least 1s")
    return min(seconds, limits.timeout_s)  # it can only shorten what the plan allows


def _delay(given: _Given, name: str, limits: Limits) -> int | None:
    seconds = _duration(given, name)
    if seconds is not None and seconds > limits.delay_s:
        raise UsageError(spelled(name), f"quota maxDelay exceeded, current limit: {limits.delay_s}")
    return seconds


def _not_before(given: _Given, limits: Limits) -> float | None:
    text = given.get("upstash-not-before")
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise UsageError("Upstash-Not-Before", f"is {text[:40]!r}", "give Unix time in seconds")
    if int(text) > time() + limits.delay_s:
        raise UsageError(
            "Upstash-Not-Before",
            f"quota maxDelay exceeded, current limit: {limits.delay_s}",
            "give Unix time in seconds",
        )
    return float(text)


def _dedup_id(given: _Given) -> str | None:
    text = given.get("upstash-deduplication-id")
    if text is None:
        return None
    if ":" in text:
        raise UsageError("Upstash-Deduplication-Id", "DeduplicationId cannot contain ':'")
    if len(text) > DEDUP_CHARS_MAX:
        raise UsageError("Upstash-Deduplication-Id", f"has {len(text)} characters", f"write at most {DEDUP_CHARS_MAX}")
    return text


def _flag(given: _Given, name: str) -> bool:
    text = (given.get(name) or "false").lower()
    if text not in ("true", "false", "1", "0"):
        raise UsageError(spelled(name), f"is {text[:40]!r}", "write true or false")
    return text in ("true", "1")


def _labels(given: _Given) -> tuple[str, ...]:
    labels = tuple(
        dict.fromkeys(
            part.strip() for value in given.listed("upstash-label") for part in value.split(",") if part.strip()
        )
    )
    if len(labels) > LABELS_MAX or any(len(label) > LABEL_CHARS_MAX or not label.isprintable() for label in labels):
        raise UsageError(
            "Upstash-Label",
            "has too many labels, or one too long",
            f"give at most {LABELS_MAX} of {LABEL_CHARS_MAX} characters",
        )
    return labels


def _name(given: _Given, name: str) -> str | None:
    text = given.get(name)
    return None if text is None else check_name(spelled(name), text)


def _flow(given: _Given, limits: Limits) -> FlowControl | None:
    key, value = given.get("upstash-flow-control-key"), given.get("upstash-flow-control-value")
    if key is None and value is None:
        return None
    if key is None or value is None:
        missing = "Key" if key is None else "Value"
        raise UsageError(f"Upstash-Flow-Control-{missing}", "is missing", _FLOW_FIX)
    try:
        return parse_flow(key, value, parallelism_max=limits.parallelism_max)
    except ValueError as error:
        raise UsageError("flow control", str(error)) from error


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def without_settings(query: str | None) -> str | None:
    """The part of a query that belongs to the destination, verbatim; None when there was no question mark."""
    if query is None:
        return None
    kept = [part for part in query.split("&") if not _is_setting(part)]
    return "&".join(kept) if kept or not query else None


def _is_setting(part: str) -> bool:
    name = unquote_plus(part.partition("=")[0]).lower()  # as it is read: a token is a token however it is written
    return name == TOKEN_PARAMETER or name.startswith(SETTING_PREFIX)


def read_changes(headers: Pairs, limits: Limits) -> dict[str, object]:
    """What the retry of a dead letter asks to be different: fields of its Spec."""
    given = _Given(headers, (), {})
    has_retries, has_method = given.has("upstash-retries"), given.has("upstash-method")
    changes: dict[str, object] = {
        "retries": _retries(given, "upstash-retries", limits) if has_retries else None,
        "retry_delay": _retry_delay(given, "upstash-retry-delay"),
        "timeout_s": _timeout(given, "upstash-timeout", limits),
        "delay_s": _delay(given, "upstash-delay", limits),
        "method": _method(given, "upstash-method") if has_method else None,
    }
    return {name: value for name, value in changes.items() if value is not None}
