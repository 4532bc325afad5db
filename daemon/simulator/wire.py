"""What the wire formats share: requests, replies, queries, cursors, and faithful JSON."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from daemon.simulator.traffic import Vendor
from daemon.simulator.world import Org, World

_ENCODER = msgspec.json.Encoder(decimal_format="number")
Json = dict[str, Any]
Headers = list[tuple[str, str]]
Keep = Callable[[tuple[str | None, ...]], bool] | None
"""A filter on dimensions; None lets everything pass."""


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request; header names are lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(slots=True)
class Page:
    """One page of a report before it is encoded, so that a fault can bend it.

    Attributes:
        position: what the page starts at, in the provider's own units; `end`, what the next one would start at.
        cursor: an opaque cursor for a position of this same query; None where pages have numbers, or there is but one.
    """

    org: Org
    body: Json
    position: int = 0
    end: int = 0
    cursor: Callable[[int], str] | None = None

    @property
    def has_more(self) -> bool:
        if "total_pages" in self.body:
            return bool(self.body["page"] < self.body["total_pages"])
        return bool(self.body.get("has_more"))

    def end_here(self) -> None:
        """Say that this is the last page, and leave no trace of what is missing."""
        if "total_pages" in self.body:
            self.body["total_pages"] = self.body["page"]
            self.body["total"] = (self.body["page"] - 1) * self.body["page_size"] + len(self.body["data"])
        else:
            self.body |= {"has_more": False, "next_page": None}


@dataclass(slots=True)
class Breakage:
    """How an answer goes wrong on its way.

    Attributes:
        hold_s: nothing is sent for so long; then the connection closes.
        cut: the body stops half-way under a Content-Length of the whole.
        reset: the connection is reset right after the headers.
        drip_s: the body comes in small pieces with such pauses.
        skew_s: added to the `Date` header.
    """

    hold_s: float = 0.0
    cut: bool = False
    reset: bool = False
    drip_s: float = 0.0
    skew_s: int = 0


@dataclass(slots=True)
class Reply:
    """What goes out, unless a fault breaks it. Exactly one of `page` and `body` is meant."""

    status: int = 200
    body: bytes = b""
    headers: Headers = field(default_factory=list)
    page: Page | None = None
    breakage: Breakage | None = None
    content_type: str = "application/json"

    def encoded(self) -> bytes:
        return self.body if self.page is None else encode(self.page.body)


class RefusedError(Exception):
    """The provider answers with an error of its own format."""

    def __init__(
        self, status: int, kind: str, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param
        self.code = code
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Service:
    """One provider as the simulator serves it.

    Attributes:
        prefixes: what the paths of its API begin with.
        answer: one request below them; it adds the headers that each answer has to those that it is given.
        error_body: an error as this provider writes it.
    """

    vendor: Vendor
    prefixes: tuple[str, ...]
    answer: Callable[[World, Request, Headers], Reply]
    error_body: Callable[[RefusedError, Reply], bytes]

    def respond(self, world: World, request: Request) -> Reply:
        headers: Headers = []
        try:
            return self.answer(world, request, headers)
        except RefusedError as refused:
            reply = Reply(refused.status, headers=headers)
            reply.body = self.error_body(refused, reply)
            return reply


def encode(body: object) -> bytes:
    """JSON with decimals as numbers, digit for digit."""
    return _ENCODER.encode(body)


class Query:
    """A query string: repeated keys, with or without brackets, in any order."""

    def __init__(self, raw: str) -> None:
        self.values: dict[str, list[str]] = {}
        for name, value in parse_qsl(raw, keep_blank_values=True):
            self.values.setdefault(name.removesuffix("[]"), []).append(value)

    def one(self, name: str) -> str | None:
        values = self.values.get(name)
        if not values:
            return None
        if len(values) > 1:
            raise RefusedError(400, "invalid_request_error", f"'{name}' was given more than once.", param=name)
        return values[0]

    def many(self, name: str) -> list[str]:
        return self.values.get(name, [])

    def whole(self, name: str) -> int | None:
        text = self.one(name)
        if text is None:
            return None
        try:
            return int(text)
        except ValueError:
            raise RefusedError(
                400, "invalid_request_error", f"Invalid type for '{name}': expected an integer.", param=name
            ) from None

    def only(self, known: Sequence[str]) -> None:
        """A filter that is silently ignored would be the worst answer, so unknown names are refused."""
        for name in self.values:
            if name not in known:
                raise RefusedError(
                    400, "invalid_request_error", f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter"
                )

    def fingerprint(self, *scope: str) -> bytes:
        """Of everything but the page: a cursor belongs to one query."""
        parts = [f"{name}={sorted(values)}" for name, values in sorted(self.values.items()) if name != "page"]
        return hashlib.sha256("&".join([*scope, *parts]).encode()).digest()[:8]


def write_cursor(fingerprint: bytes, position: int) -> str:
    return "page_" + base64.urlsafe_b64encode(fingerprint + struct.pack(">q", position)).decode()


def read_cursor(cursor: str, fingerprint: bytes) -> int:
    try:
        raw = base64.b64decode(cursor.removeprefix("page_").encode(), altchars=b"-_", validate=True)
        position: int = struct.unpack(">q", raw[8:])[0]
    except (ValueError, struct.error):
        raw, position = b"", 0
    if raw[:8] != fingerprint:
        raise RefusedError(
            400, "invalid_request_error", "Invalid 'page': it does not belong to this query.", param="page"
        )
    return position


def bearer(request: Request) -> str:
    scheme, _, credential = request.headers.get("authorization", "").partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else ""


def matcher(places: Sequence[tuple[int, frozenset[str | None]]]) -> Keep:
    if not places:
        return None
    return lambda dims: all(dims[place] in wanted for place, wanted in places)


def money(value: Decimal, style: str) -> str | msgspec.Raw:
    """Dollars as a string of many digits, or as a number in exponent form."""
    match style:
        case "string":
            return format(value, ".40f")
        case "exponent":
            return msgspec.Raw(format(value, "e").encode())
        case _:
            raise ValueError(f"no such money format: {style}")


def halves(row: Json) -> tuple[Json, Json]:
    """The same dimensions twice, whose counts and money add up to `row`."""
    first, second = dict(row), dict(row)
    for name, value in row.items():
        if isinstance(value, dict):
            first[name], second[name] = halves(value)
        elif isinstance(value, Decimal):
            first[name], second[name] = value / 2, value - value / 2
        elif isinstance(value, int) and not isinstance(value, bool):
            first[name], second[name] = value // 2, value - value // 2
    return first, second
