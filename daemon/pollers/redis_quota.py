"""Quota counters that an application keeps in Redis, Valkey or Upstash.

Source: the commands' pages of Valkey 9 and Redis 8, and Upstash's page on its REST API, as of 2026-11-26. SCAN returns
a key that is there from its beginning to its end at least once; one that comes or goes meanwhile once, twice or never.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Literal, cast
from urllib.parse import urlsplit

import msgspec
import structlog

from daemon.domain.collection import Collected, Counter
from daemon.domain.connection import Identity, Target
from daemon.domain.errors import CredentialError, SchemaDriftError, UsageError
from daemon.domain.ports import Caller, SourceSpec, collection
from daemon.domain.record import Grain
from daemon.domain.redis import Command, Node, Reply, Store, WrongType, digest_of
from daemon.domain.redis_url import parse_url
from daemon.domain.window import Width
from daemon.pollers._quota_pattern import Pattern, compile_pattern
from daemon.pollers.chain import check_known
from daemon.pollers.kit import CollectionsOnly

if TYPE_CHECKING:
    from daemon.http_client import HttpSettings

COUNT = 1_000
COUNT_MAX = 10_000
EVERY_S = 3_600
EVERY_S_MIN, EVERY_S_MAX = 60, 7 * 86_400
KEY_BYTES_MAX = 1_000
"""An index of Postgres holds keys of some 2,700 bytes."""
NUMBER_BYTES_MAX = 64
NUMBER_ADJUSTED_MAX = 30
DETAIL_FIELDS_MAX = 32
DETAIL_BYTES_MAX = 256
EXAMPLE_CHARS_MAX = 80
MEASURES = ("amount", "input_tokens", "output_tokens", "total_tokens", "requests")
_NUMBER = re.compile(rb"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_encode = msgspec.json.Encoder(order="sorted").encode

SET_FIELD = """\
if redis.call('TYPE', KEYS[1]).ok ~= 'hash' or redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
"""
"""HSET alone would make the key, or the field, that is gone since it was read."""

Kind = Literal["string", "hash"]
Falls = Literal["reset", "refund"]
Span = Literal["day", "month", "all"]

log = structlog.get_logger()


# ── Settings ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class QuotaSettings:
    """The settings of one connection.

    Attributes:
        count: keys that the server looks at for one step of a SCAN, and keys whose values are read at once.
        field: of a hash, the one that holds its counter; without it hashes are skipped.
        type: only keys of this one are read; None: of both.
        falls: what a counter that fell means: it was "reset" and what it shows was used since, or it is a "refund".
        measure, dimension, unit, window: where the ledger holds what the counters count: what that is, the dimension of
            the reports that their user is, what one of a counter is in the ledger's terms, and how far back a counter
            without a period counts.
    """

    pattern: Pattern
    count: int = COUNT
    field: str | None = None
    type: Kind | None = None
    every_s: int = EVERY_S
    falls: Falls = "reset"
    measure: str | None = None
    dimension: str | None = None
    unit: Decimal = Decimal(1)
    window: Span = "month"
    write_back: bool = False
    events_url: str | None = None
    ca_bundle: str | None = None


SETTINGS = tuple(QuotaSettings.__dataclass_fields__)


def read_settings(settings: Mapping[str, object]) -> QuotaSettings:
    """Parse a connection's settings. Raises UsageError, naming the one that is wrong and the choices."""
    check_known(settings, SETTINGS)
    pattern = _text(settings, "pattern")
    if pattern is None:
        raise UsageError(
            "settings.pattern", "is missing", "write the keys with their named parts, such as quota:{user}"
        )
    dimension, events_url = _text(settings, "dimension"), _text(settings, "events_url")
    if dimension is not None and not _NAME.fullmatch(dimension):
        raise UsageError(
            "settings.dimension", f"{dimension!r} is no dimension", "write one such as user_id or api_key_id"
        )
    if events_url is not None and not _is_web(events_url):
        raise UsageError("settings.events_url", "is no http(s) URL without a user", "write https://host/path")
    measure = _choice(settings, "measure", MEASURES)
    if measure is not None and dimension is None:
        raise UsageError(
            "settings.dimension", "is missing", "name the dimension that the user of a key is in the reports"
        )
    write_back = settings.get("write_back", False)
    if not isinstance(write_back, bool):
        raise UsageError("settings.write_back", f"is {write_back!r}", "use true or false")
    if write_back and measure is None:
        raise UsageError("settings.measure", "is missing", "say what the counters count, or leave write_back out")
    kind = cast("Kind | None", _choice(settings, "type", ("string", "hash")))
    name = _text(settings, "field")
    if kind == "hash" and name is None:
        raise UsageError("settings.field", "is missing", "name the field of the hash that holds the counter")
    if kind == "string" and name is not None:
        raise UsageError("settings.field", "is for hashes", "leave it out, or set type to hash")
    return QuotaSettings(
        pattern=compile_pattern(pattern),
        count=_whole(settings, "count", COUNT, 1, COUNT_MAX),
        field=name,
        type=kind,
        every_s=_whole(settings, "every_s", EVERY_S, EVERY_S_MIN, EVERY_S_MAX),
        falls=cast("Falls", _choice(settings, "falls", ("reset", "refund")) or "reset"),
        measure=measure,
        dimension=dimension,
        unit=_unit(settings),
        window=cast("Span", _choice(settings, "window", ("day", "month", "all")) or "month"),
        write_back=write_back,
        events_url=events_url,
        ca_bundle=_text(settings, "ca_bundle"),
    )


def _text(settings: Mapping[str, object], name: str) -> str | None:
    value = settings.get(name)
    if value is not None and (not isinstance(value, str) or not value or "\x00" in value):
        raise UsageError(f"settings.{name}", "is no text", f"write {name}=TEXT")
    return value


def _choice(settings: Mapping[str, object], name: str, choices: Sequence[str]) -> str | None:
    value = settings.get(name)
    if value is not None and value not in choices:
        raise UsageError(f"settings.{name}", f"is {value!r}", f"use one of {', '.join(choices)}")
    return cast("str | None", value)


def _whole(settings: Mapping[str, object], name: str, default: int, least: int, most: int) -> int:
    value = settings.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise UsageError(f"settings.{name}", f"is {value!r}", f"use a whole number from {least} to {most}")
    return value


def _unit(settings: Mapping[str, object]) -> Decimal:
    value = settings.get("unit", 1)
    number = exact(str(value).encode()) if type(value) in (int, float, str) else None
    if number is None or number <= 0:
        raise UsageError("settings.unit", f"is {value!r}", "use a number above 0, such as 0.01 for counters of cents")
    return number


def _is_web(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
    except ValueError:
        return False


# ── Keys and values ─────────────────────────────────────────────────────────────────────────────


def exact(text: bytes) -> Decimal | None:
    """A counter's value, as INCR and INCRBYFLOAT write it or a client may; None for everything else."""
    if len(text) > NUMBER_BYTES_MAX or not _NUMBER.fullmatch(text):
        return None
    value = Decimal(text.decode())
    if not value:
        return Decimal(0)
    return value if abs(value.adjusted()) <= NUMBER_ADJUSTED_MAX else None


def written(value: Decimal) -> str:
    """A value as INCR takes it, where it is whole."""
    return str(int(value)) if value == value.to_integral_value() else format(value, "f").rstrip("0")


@dataclass(slots=True)
class _Skipped:
    """What could not be read: how much of it, and one case with its reason."""

    count: int = 0
    example: str = ""

    def add(self, key: bytes, reason: str) -> None:
        self.count += 1
        if not self.example:
            self.example = f"{key.decode('utf-8', 'backslashreplace')[:EXAMPLE_CHARS_MAX]}: {reason}"


@dataclass(slots=True)
class _Part:
    """The keys of one part, by the bytes in which they came, and what they turned out to hold."""

    settings: QuotaSettings
    skipped: _Skipped
    keys: dict[bytes, tuple[str, dict[str, str]]] = field(default_factory=dict)
    found: dict[bytes, Counter] = field(default_factory=dict)

    def take(self, keys: Sequence[bytes]) -> None:
        """Keep the keys that are of the pattern."""
        for key in keys:
            if len(key) > KEY_BYTES_MAX:
                self.skipped.add(key, f"the key has more than {KEY_BYTES_MAX} bytes")
                continue
            try:
                text = key.decode()
            except UnicodeDecodeError:
                self.skipped.add(key, "the key is not UTF-8")
                continue
            names = self.settings.pattern.take_apart(text)
            if names is None or "\x00" in text:
                self.skipped.add(key, f"the key is not of the pattern {self.settings.pattern.text}")
            else:
                self.keys[key] = text, names

    def put(self, key: bytes, value: object, fields: Mapping[bytes, bytes] | None = None) -> None:
        number = exact(value) if isinstance(value, bytes) else None
        if number is None:
            self.skipped.add(key, "it holds no number" if fields is None else "its field holds no number")
            return
        text, names = self.keys[key]
        rest = {name: names[name] for name in self.settings.pattern.others}
        if fields:
            rest = dict(_readable(fields)) | rest
        detail = _encode(rest) if rest else b"{}"
        self.found[key] = Counter(text, names.get("user"), names.get("tenant"), names.get("period"), number, detail)


def _readable(fields: Mapping[bytes, bytes]) -> Iterator[tuple[str, str]]:
    """The first fields by name, of those that a JSON text can hold."""
    for name in sorted(fields)[:DETAIL_FIELDS_MAX]:
        value = fields[name]
        if len(name) <= DETAIL_BYTES_MAX and len(value) <= DETAIL_BYTES_MAX and b"\x00" not in name + value:
            try:
                yield name.decode(), value.decode()
            except UnicodeDecodeError:
                continue


# ── One reading ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Reading:
    """The keys of one node, part by part."""

    node: Node
    settings: QuotaSettings
    call: Caller
    skipped: _Skipped

    async def parts(self) -> AsyncIterator[_Part]:
        """A part's values and the next step of the SCAN travel together: two commands, one round trip.

        A pattern that few keys have gives short steps; their keys are collected until there are enough to ask for, and
        one that was returned twice meanwhile is one.
        """
        cursor: bytes | None = b"0"
        keys: dict[bytes, None] = {}
        while True:
            part = _Part(self.settings, self.skipped)
            if cursor is None or len(keys) >= self.settings.count:
                part.take(list(keys))
                keys = {}
            commands = self._values(part)
            if cursor is not None:
                commands.append(_scan(self.settings, cursor))
            if commands:
                replies = await self._ask(commands)
                if cursor is not None:
                    cursor, news = _step(replies.pop(), cursor)
                    keys.update(dict.fromkeys(news))
                await self._fill(part, replies)
            if part.found or part.keys:
                yield part
            if cursor is None and not keys:
                return

    def _values(self, part: _Part) -> list[Command]:
        keys = list(part.keys)
        if self.settings.type == "hash":
            return [("HGETALL", key) for key in keys]
        return [("MGET", *group) for group in self.node.groups(keys)]

    async def _fill(self, part: _Part, replies: Sequence[Reply]) -> None:
        keys = list(part.keys)
        if self.settings.type == "hash":
            self._fill_hashes(part, keys, replies)
            return
        rest: list[bytes] = []
        for group, reply in zip(self.node.groups(keys), replies, strict=True):
            if not isinstance(reply, list) or len(reply) != len(group):
                raise SchemaDriftError("MGET was not answered with a value for each key")
            for key, value in zip(group, reply, strict=True):
                if value is None:  # gone since the SCAN, or of another type
                    rest.append(key)
                else:
                    part.put(key, value)
        if not rest or self.settings.type == "string":
            return
        if self.settings.field is not None:
            self._fill_hashes(part, rest, await self._ask([("HGETALL", key) for key in rest]))
            return
        for key, kind in zip(rest, await self._ask([("TYPE", key) for key in rest]), strict=True):
            if kind == b"hash":
                self.skipped.add(key, "it is a hash, and settings.field does not name its counter")
            elif kind != b"none":
                self.skipped.add(key, "it is neither a string nor a hash")

    def _fill_hashes(self, part: _Part, keys: Sequence[bytes], replies: Sequence[Reply]) -> None:
        name = (self.settings.field or "").encode()
        for key, reply in zip(keys, replies, strict=True):
            if isinstance(reply, WrongType):
                self.skipped.add(key, "it is neither a string nor a hash")
                continue
            if not isinstance(reply, list) or len(reply) % 2:
                raise SchemaDriftError("HGETALL was not answered with fields and values")
            if not reply:  # gone since the SCAN
                continue
            pairs = cast("list[bytes]", reply)
            fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
            part.put(key, fields.pop(name, None), fields)

    async def _ask(self, commands: Sequence[Command]) -> list[Reply]:
        return await self.call.run(_bound(self.node.ask, commands))


def _scan(settings: QuotaSettings, cursor: bytes) -> Command:
    kind = () if settings.type is None else ("TYPE", settings.type)
    return "SCAN", cursor, "MATCH", settings.pattern.glob, "COUNT", settings.count, *kind


def _step(reply: Reply, sent: bytes) -> tuple[bytes | None, list[bytes]]:
    """The next cursor, None at the end, and the keys of one step of a SCAN."""
    match reply:
        case [cursor, [*keys]] if all(isinstance(key, bytes) for key in keys):
            following = str(cursor).encode() if isinstance(cursor, int) else cursor
            if isinstance(following, bytes) and following.isdigit() and (following != sent or following == b"0"):
                return None if following == b"0" else following, cast("list[bytes]", keys)
    raise SchemaDriftError("SCAN was not answered with a new cursor and keys")


# ── The poller ──────────────────────────────────────────────────────────────────────────────────


class RedisQuotaPoller(CollectionsOnly):
    """Counters that stand in a Redis, Valkey or Upstash, each under a key of its own."""

    provider = "redis_quota"
    default_base_url = "redis://127.0.0.1:6379/0"
    sources: Mapping[str, SourceSpec] = {"quota": collection("quota", "quota", "tick")}

    def __init__(self) -> None:
        self._http: Callable[[], HttpSettings] | None = None

    def take_http(self, http: Callable[[], HttpSettings]) -> None:
        """Time-outs, roots of TLS, and for Upstash the proxy, as this installation has them."""
        self._http = http

    def check_settings(self, settings: Mapping[str, object]) -> None:
        read_settings(settings)

    def check_credential(self, credential: str) -> None:
        if not credential.isprintable():
            raise CredentialError("the password holds a line break or another character that cannot be printed")

    def grain(self, source: str, settings: Mapping[str, object]) -> Grain:  # noqa: ARG002 -- a counter is not cut
        return Grain("v1", Width.DAY, ())

    async def identify(self, target: Target, call: Caller) -> Identity:
        """The servers answer, and let us ask who they are."""
        settings = read_settings(target.settings)
        async with self._store(target, settings) as store:
            first, *_ = await call.run(store.connect)
            await call.run(_bound(first.ask, [_scan(settings, b"0")]))
        return self.identity_of(target.base_url, target.settings)

    def identity_of(self, base_url: str, given: Mapping[str, object]) -> Identity:
        """The servers' names, their database and the keys: what is read by one connection of a tenant alone."""
        settings = read_settings(given)
        where = str(parse_url(base_url)).partition("://")[2]
        kind = f" type {settings.type}" if settings.type else ""
        name = f"{where} {settings.pattern.glob.decode()}{kind}" + (f" {settings.field}" if settings.field else "")
        return Identity(name, where)

    async def collect(
        self, target: Target, source: str, known: bytes | None, call: Caller  # noqa: ARG002 - there is one source
    ) -> AsyncIterator[Collected]:  # fmt: skip
        """Raises SchemaDriftError for a server that answers what Redis does not; other failures are the client's."""
        settings = read_settings(target.settings)
        skipped = _Skipped()
        async with self._store(target, settings) as store:
            nodes = await call.run(store.connect)
            digest = digest_of(nodes)
            is_restored = known is not None and digest is not None and known != digest
            told = 0
            for node in nodes:
                async for part in _Reading(node, settings, call, skipped).parts():
                    yield Collected(tuple(part.found.values()), digest, is_restored, skipped=skipped.count - told)
                    told = skipped.count
            if told < skipped.count or not told:
                yield Collected((), digest, is_restored, skipped=skipped.count - told)
        if skipped.count:
            log.warning("quota.skipped", server=target.base_url, skipped=skipped.count, example=skipped.example)

    async def write(self, target: Target, values: Mapping[str, Decimal], call: Caller) -> set[str]:
        """Set counters that are there: nothing is added, no key or field is made, and its time to live stays.

        Returns:
            Those that were there. One that is of another type now is not.
        """
        settings = read_settings(target.settings)
        there: set[str] = set()
        keys = list(values)
        async with self._store(target, settings) as store:
            for start in range(0, len(keys), settings.count):
                rest = keys[start : start + settings.count]
                if settings.type != "hash":
                    replies = await call.run(_bound(store.ask, [_set(key, values[key]) for key in rest]))
                    there |= {key for key, reply in zip(rest, replies, strict=True) if isinstance(reply, bytes)}
                    rest = [key for key, reply in zip(rest, replies, strict=True) if isinstance(reply, WrongType)]
                if rest and settings.field is not None and settings.type != "string":
                    scripts = [_set_field(key, settings.field, values[key]) for key in rest]
                    replies = await call.run(_bound(store.ask, scripts))
                    there |= {key for key, reply in zip(rest, replies, strict=True) if reply == 1}
        return there

    def _store(self, target: Target, settings: QuotaSettings) -> Store:
        from daemon.http_client import HttpSettings  # noqa: PLC0415 - the clients take a second to import
        from daemon.redis_client import open_store  # noqa: PLC0415

        http = HttpSettings() if self._http is None else self._http()
        if settings.ca_bundle is not None:
            http = replace(http, ca_bundle=settings.ca_bundle)
        return open_store(parse_url(target.base_url), target.credential, http)


def _bound(
    ask: Callable[[Sequence[Command]], Awaitable[list[Reply]]], commands: Sequence[Command]
) -> Callable[[], Awaitable[list[Reply]]]:
    return lambda: ask(commands)


def _set(key: str, value: Decimal) -> Command:
    """With GET, since SET alone would overwrite a key of any type."""
    return "SET", key, written(value), "XX", "GET", "KEEPTTL"


def _set_field(key: str, name: str, value: Decimal) -> Command:
    return "EVAL", SET_FIELD, 1, key, name, written(value)


__all__ = ["MEASURES", "QuotaSettings", "RedisQuotaPoller", "exact", "read_settings", "written"]
