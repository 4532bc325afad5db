"""A request to `/v2` as its resource sees it, and what it answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, unquote_plus

import msgspec

from daemon.domain.account import Account, Limits
from daemon.domain.errors import DaemonError, UsageError

if TYPE_CHECKING:
    from daemon.web.v2.services import Services

FILTERS_MAX = 1_000
"""Values of one parameter."""
JSON_BYTES_MAX = 1 << 20
"""Of a body that is read as parameters."""

Shape = TypeVar("Shape")

TOKEN_PARAMETER = "qstash_token"  # noqa: S105 - the name of one
SETTING_PREFIX = "upstash-"


class Refusal(DaemonError):  # noqa: N818 - an answer, not an error of ours
    """An answer other than what was asked for."""

    def __init__(self, status: int, problem: str, headers: Mapping[str, str] | None = None) -> None:
        self.status = status
        self.headers = dict(headers or {})
        super().__init__(problem)


class NotFound(Refusal):
    """404, naming what there is not."""

    def __init__(self, what: str) -> None:
        super().__init__(404, f"{what} not found")


@dataclass(frozen=True, slots=True)
class Answer:
    """`body` is encoded as JSON; None is an empty body."""

    body: object = None
    status: int = 200


@dataclass(frozen=True, slots=True)
class Call:
    """One request.

    Attributes:
        rest: what of the path follows the resource's name, as it was sent: never decoded, no slash merged or dropped.
        query: the query as it was sent, without its question mark; None when the target had none.
        headers: names in lower case, values in the order in which they came.
        caller_ip: of whoever is connected, which may be a proxy.
        read: the body, at most so many bytes.
    """

    services: Services
    account: Account
    method: str
    rest: str
    query: str | None
    headers: Sequence[tuple[str, str]]
    caller_ip: str | None
    read: Callable[[int], Awaitable[bytes]]
    is_read_only: bool = False
    _parameters: dict[str, list[str]] = field(default_factory=dict)

    @property
    def limits(self) -> Limits:
        return self.account.limits

    @property
    def parameters(self) -> Mapping[str, list[str]]:
        """The query's parameters but the token, decoded, those of one name together."""
        if not self._parameters and self.query:
            for name, value in pairs(self.query):
                if name != TOKEN_PARAMETER:
                    self._parameters.setdefault(name, []).append(value)
        return self._parameters

    def check_parameters(self, known: frozenset[str]) -> None:
        """Raise UsageError for a parameter that nobody knows: a filter that is ignored would match too much."""
        for name in self.parameters:
            if name not in known:
                raise UsageError(name, "is no parameter here", f"choose of {', '.join(sorted(known))}")

    def values(self, *names: str) -> list[str]:
        """All values of a parameter (several spellings), comma-separated ones apart."""
        found = [part for name in names for value in self.parameters.get(name, ()) for part in value.split(",") if part]
        if len(found) > FILTERS_MAX:
            raise UsageError(names[0], f"has {len(found)} values", f"give at most {FILTERS_MAX}")
        return found

    def exact_values(self, *names: str) -> list[str]:
        """The same of what may hold a comma itself, such as a URL."""
        return [value for name in names for value in self.parameters.get(name, ()) if value]

    def value(self, name: str) -> str | None:
        """A parameter that is there once, if at all."""
        values = self.parameters.get(name, ())
        if len(values) > 1:
            raise UsageError(name, "is given more than once", "give it once")
        return values[0] if values and values[0] else None

    def number(self, name: str, low: int, high: int) -> int | None:
        """A whole number of a parameter."""
        text = self.value(name)
        if text is None:
            if name in self.parameters:
                raise UsageError(name, "is empty", "give a number, or leave it out")
            return None
        if not (text.isascii() and text.isdecimal() and len(text) < 19 and low <= int(text) <= high):
            raise UsageError(name, f"is {text[:50]!r}", f"give a whole number from {low} to {high}")
        return int(text)

    def flag(self, name: str) -> bool:
        """A parameter that is true or false; absent is false."""
        text = (self.value(name) or "false").lower()
        if text not in ("true", "false"):
            raise UsageError(name, f"is {text[:50]!r}", "write true or false")
        return text == "true"

    async def json(self, shape: type[Shape], bytes_max: int = JSON_BYTES_MAX) -> Shape:
        """The body as JSON of this shape; an empty one counts as `{}`."""
        return parsed(await self.read(bytes_max) or b"{}", shape)


def parsed(text: bytes, shape: type[Shape]) -> Shape:
    """JSON of this shape. Raises UsageError that names the field."""
    try:
        return msgspec.json.decode(text, type=shape)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at ")
        raise UsageError(place.strip("`") or "body", problem[:1].lower() + problem[1:]) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError("body", f"is no JSON: {error}") from error
    except RecursionError as error:
        raise UsageError("body", "is nested too deeply") from error


def pairs(query: str) -> list[tuple[str, str]]:
    """Names and values of a query, decoded."""
    found = []
    for part in query.split("&"):
        if part:
            name, _, value = part.partition("=")
            found.append((unquote_plus(name), unquote_plus(value)))
    return found


def segment(text: str, what: str) -> str:
    """One decoded piece of a path. Raises Refusal when it is empty, or more than one."""
    if not text or "/" in text:
        raise Refusal(400 if not text else 404, f"{what} is missing in the path" if not text else "not found")
    return decoded(text, what)


def decoded(text: str, what: str) -> str:
    """Percent-decoded UTF-8 without NUL. Raises UsageError."""
    try:
        clear = unquote(text, errors="strict")
    except UnicodeDecodeError as error:
        raise UsageError(what, "is no UTF-8", "percent-encode it") from error
    if "\0" in clear:
        raise UsageError(what, "holds a NUL character", "remove it")
    return clear
