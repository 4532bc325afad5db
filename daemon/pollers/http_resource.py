"""Any REST collection: which resources there are, whether each has changed, and the content of those that have.

The first call is cheap: a list that tells the versions, or a check of one resource or of many. The second one, for the
content, is made only where the version differs from what is stored (`daemon.worker.resources`).
"""

# ruff: noqa: ARG002 - arguments of the protocol for which a collection has no use

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from email.utils import format_datetime
from time import time
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, urljoin, urlsplit, urlunsplit

import anyio
import msgspec
import structlog

from daemon.domain.collection import Collected, Listed
from daemon.domain.connection import Identity, Target
from daemon.domain.duration import parse_duration
from daemon.domain.errors import BadRequestError, CredentialError, PermanentError, SchemaDriftError
from daemon.domain.ports import Answer, Caller, collection
from daemon.domain.record import Grain
from daemon.domain.window import Width, parse_rfc3339
from daemon.http_exits import Exits, Terms
from daemon.pollers._resource_spec import Cursor, Link, Listing, Offset, PageNumber, Spec, parse_settings
from daemon.pollers.chain import decode
from daemon.pollers.kit import CollectionsOnly

PROVIDER = "http_resource"
SOURCE = "resources"
PART_ITEMS = 1_000
"""Ids that are handed over at a time: a multiple of a batch, so that only a listing's last batch is short."""
PAGES_MAX = 100_000
ID_LENGTH_MAX = 500
VERSION_LENGTH_MAX = 1_000
GONE = frozenset({404, 410})
NOT_MODIFIED = 304

_LINK = re.compile(r"<([^<>]*)>([^<]*)")
_IS_NEXT = re.compile(r'\brel\s*=\s*(?:next\b|"[^"]*\bnext\b[^"]*")', re.IGNORECASE)
_JSON = msgspec.json.Decoder(float_hook=Decimal)
_encode = msgspec.json.Encoder(order="sorted", decimal_format="number").encode

Params = Sequence[tuple[str, str]]

log = structlog.get_logger()


class Reading(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a reading of the list leaves for the next one, as the digest of its collection.

    Attributes:
        is_whole: the list held all there is, so that what it does not hold is gone.
        since: the newest version seen, where the next one may begin.
        full_at: when the list was last read as a whole, by the clock of whoever read it, in Unix seconds.
    """

    is_whole: bool = True
    since: str | None = None
    full_at: float = 0.0

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, digest: bytes | None) -> Reading:
        """A text that is none of ours tells nothing: everything is read."""
        try:
            return msgspec.json.decode(digest or b"{}", type=cls)
        except msgspec.MsgspecError:
            return cls()


class Look(NamedTuple):
    """What a call told of one resource: that it is gone, that it is as it was, or its version and perhaps its content.

    `fields` are the content's own, at its first level.
    """

    version: str | None = None
    content: bytes | None = None
    is_same: bool = False
    is_gone: bool = False
    fields: Sequence[str] = ()


class Page(NamedTuple):
    """A page of the list. `refused` are ids that cannot be asked for."""

    items: Sequence[Listed]
    refused: Sequence[str]


class Reader:
    """The calls of one collection, as its settings declare them.

    Args:
        exits: by which the requests leave; None: by the process's own way.
    """

    def __init__(self, spec: Spec, target: Target, call: Caller, exits: Exits | None = None) -> None:
        self._spec = spec
        self._call = call
        self._base_url = target.base_url
        self._headers = auth_headers(spec, target)
        self._exits = exits

    async def _get(self, path: str, params: Params, headers: Mapping[str, str] | None = None) -> Answer:
        terms = Terms(
            {**self._headers, **(headers or {})}, exits=self._exits, body_bytes_max=self._spec.limits.body_bytes
        )
        return await self._call.get(path, params, terms)

    # The list

    async def pages(self, since: str | None = None) -> AsyncIterator[Page]:
        """The list from its first page to its last.

        Args:
            since: the newest version seen; what changed from it on is asked for.

        Raises:
            SchemaDriftError: a page breaks the contract of paging, or there are more items than the limit.
        """
        listing = self._spec.list
        assert listing is not None
        fixed = _pairs(listing.params)
        headers: dict[str, str] = {}
        if listing.since is not None and since is not None:
            wanted = _http_date(since) if listing.since.http_date else since
            if listing.since.param is not None:
                fixed = [*fixed, (listing.since.param, wanted)]
            elif _can_be_sent(wanted):
                headers = {"if-modified-since": wanted}
        path, params = listing.path, _first(listing, fixed)
        seen: set[int] = set()
        last: list[str] | None = None
        count = 0
        for _ in range(PAGES_MAX):
            place = hash((path, *params))
            if place in seen:
                raise SchemaDriftError("list.paging: a page leads back to a page that was read")
            seen.add(place)
            answer = await self._get(path, params, headers)
            if answer.status == NOT_MODIFIED:
                return
            body = _parse(answer, "list")
            items = _need_list(body, listing.items, answer, "list.items")
            page = _listed(items, listing, answer)
            ids = [item.id for item in page.items]
            if ids and ids == last:
                raise SchemaDriftError(
                    "list.paging: two pages hold the same, so the parameter has no effect", answer.body
                )
            last = ids
            count += len(items)
            if count > self._spec.limits.items_max:
                raise SchemaDriftError(f"limits.items_max: the list holds more than {self._spec.limits.items_max}")
            yield page
            if self._spec.rate.per_second is not None:
                await anyio.sleep(1 / self._spec.rate.per_second)
            following = self._next(listing, path, params, fixed, body, answer, count, len(items))
            if following is None:
                return
            path, params = following
        raise SchemaDriftError(f"list.paging: the list has no end after {PAGES_MAX} pages")

    def _next(
        self,
        listing: Listing,
        path: str,
        params: Params,
        fixed: Params,
        body: object,
        answer: Answer,
        count: int,
        held: int,
    ) -> tuple[str, Params] | None:
        paging = listing.paging
        match paging:
            case None:
                return None
            case Cursor(param=param, next=where):
                cursor = _text(_dig(body, where), where)
                return (path, [*fixed, (param, cursor)]) if cursor else None
            case PageNumber(param=param, more=more) | Offset(param=param, more=more):
                # How many items a page was asked to hold says nothing: servers hold fewer than that, and are not done.
                if not held or (more is not None and not _dig(body, more)):
                    return None
                if isinstance(paging, Offset):
                    return path, [*fixed, (param, str(count))]
                return path, [*fixed, (param, str(int(dict(params)[param]) + 1))]
            case Link(next=where):
                url = _link(answer) if where is None else _text(_dig(body, where), where)
                return self._within(url, path) if url else None

    def _within(self, url: str, path: str) -> tuple[str, Params]:
        """The path and parameters of a link. Our credential goes nowhere but to the base URL."""
        base = urlsplit(self._base_url)
        try:
            found = urlsplit(urljoin(self._base_url + path, url))
        except ValueError as error:
            raise SchemaDriftError("list.paging: the next link is no URL", url.encode()) from error
        prefix = base.path.rstrip("/")
        if (found.scheme, found.netloc) != (base.scheme, base.netloc) or not found.path.startswith(prefix + "/"):
            raise SchemaDriftError("list.paging: the next link leads away from the base URL", url.encode())
        return found.path.removeprefix(prefix), parse_qsl(found.query, keep_blank_values=True)

    # One resource, or some

    async def check(self, id_: str, known: str | None) -> Look:
        """The first call for one resource: its version.

        Args:
            known: the version that is stored.
        """
        check = self._spec.check
        assert check is not None
        assert check.path is not None
        try:
            answer = await self._get(_filled(check.path, id_), _pairs(check.params), self._condition(known))
        except BadRequestError as error:
            return _gone(error)
        if answer.status == NOT_MODIFIED:
            return Look(known, is_same=True)
        if check.version in ("etag", "last_modified"):
            return Look(_header_version(answer, check.version))
        body = _parse(answer, "check")
        if check.field is None:
            return Look(digest_of(_encode(body)))
        return Look(_need_version(_dig(body, check.field), check.field, answer))

    async def check_many(self, ids: Sequence[str]) -> Mapping[str, str]:
        """The first call for many at once: the versions of those that are in the answer."""
        check = self._spec.check
        assert check is not None
        assert check.path is not None
        assert check.ids_param is not None
        answer = await self._get(check.path, [*_pairs(check.params), (check.ids_param, ",".join(ids))])
        versions: dict[str, str] = {}
        for item in _need_list(_parse(answer, "check"), check.items, answer, "check.items"):
            id_ = _text(_dig(item, check.id), check.id)
            if id_ is None:
                raise SchemaDriftError(f"check.id: an item has no {check.id}", _encode(item))
            if check.field is None:
                versions[id_] = digest_of(_encode(item))
            else:
                versions[id_] = _need_version(_dig(item, check.field), check.field, answer)
        return versions

    async def read(self, id_: str, known: str | None = None) -> Look:
        """The second call: the content, and its version where it tells one.

        Args:
            known: the version that is stored, where the call may be conditional.
        """
        detail, check = self._spec.detail, self._spec.check
        is_alone = check is not None and check.path is None
        try:
            answer = await self._get(
                _filled(detail.path, id_), _pairs(detail.params), self._condition(known) if is_alone else None
            )
        except BadRequestError as error:
            return _gone(error)
        if answer.status == NOT_MODIFIED:
            return Look(known, is_same=True)
        item = _dig(_parse(answer, "detail"), detail.item)
        if not isinstance(item, dict):
            raise SchemaDriftError("detail.item: the answer holds no object there", answer.body)
        kept = _kept(item, detail.fields)
        version = None
        if detail.version is not None:
            version = _need_version(_dig(item, detail.version), detail.version, answer)
        elif is_alone:
            assert check is not None
            version = _header_version(answer, check.version)
        return Look(version, _encode(kept), fields=tuple(kept))

    def _condition(self, known: str | None) -> Mapping[str, str] | None:
        check = self._spec.check
        if check is None or not check.conditional or known is None:
            return None
        if not _can_be_sent(known):
            return None
        return {"if-none-match" if check.version == "etag" else "if-modified-since": known}


class HttpResourcePoller(CollectionsOnly):
    """A REST collection as a connection: its settings are the file of `tallyd resources add`."""

    provider = PROVIDER
    default_base_url = ""
    sources: Mapping[str, Any] = {SOURCE: collection(SOURCE, "resource", "tick")}

    def check_settings(self, settings: Mapping[str, object]) -> None:
        parse_settings(settings)

    def check_credential(self, credential: str) -> None:
        if not credential or not credential.isascii() or not credential.isprintable():
            raise CredentialError("the credential is empty, or holds characters that no header can carry")

    def grain(self, source: str, settings: Mapping[str, object]) -> Grain:
        return Grain("rest", Width.DAY, ())

    async def identify(self, target: Target, call: Caller) -> Identity:
        """The first page of the list, or the content of the first id. Neither names an organisation."""
        spec = parse_settings(target.settings)
        reader = Reader(spec, target, call, exits_of(spec))
        if spec.list is None:
            await reader.read(str(spec.ids[0]))
            return Identity(None)
        async for _ in reader.pages():
            break
        return Identity(None)

    async def collect(
        self,
        target: Target,
        source: str,
        known: bytes | None,
        call: Caller,
    ) -> AsyncIterator[Collected]:
        """The ids of the collection, with their versions where the list tells them."""
        spec = parse_settings(target.settings)
        if spec.list is None:
            ids = [str(id_) for id_ in spec.ids]
            for at in range(0, len(ids), PART_ITEMS):
                part = [Listed(id_, None) for id_ in ids[at : at + PART_ITEMS]]
                yield Collected(part, Reading(is_whole=False).encode())
            return
        before, now = Reading.decode(known), time()
        since = spec.list.since
        is_whole = since is None or before.since is None or now - before.full_at >= parse_duration(since.full_every)
        newest = before.since if since is not None else None
        full_at = now if is_whole else before.full_at
        waiting: list[Listed] = []
        refused: list[str] = []
        async for page in Reader(spec, target, call, exits_of(spec)).pages(None if is_whole else before.since):
            waiting += page.items
            refused += page.refused
            if since is not None:
                newest = _newest(newest, page.items)
            while len(waiting) >= PART_ITEMS:
                yield Collected(waiting[:PART_ITEMS], Reading(is_whole).encode())
                del waiting[:PART_ITEMS]
        if refused:
            log.warning("resources.ids_refused", ids=len(refused), example=refused[0])
        yield Collected(waiting, Reading(is_whole, newest, full_at).encode())


def auth_headers(spec: Spec, target: Target) -> dict[str, str]:
    """The header that carries the credential."""
    credential = target.credential.reveal()
    match spec.auth.kind:
        case "bearer":
            return {"authorization": f"Bearer {credential}"}
        case "header":
            return {spec.auth.header.lower(): spec.auth.prefix + credential}
        case "basic":
            return {"authorization": f"Basic {base64.b64encode(credential.encode()).decode()}"}


def exits_of(spec: Spec, environment: Mapping[str, str] | None = None) -> Exits | None:
    """The exits of a collection, with their credential.

    Args:
        environment: instead of the process's own.

    Raises:
        PermanentError: the variable that holds it is not set.
    """
    proxy = spec.proxy
    if proxy is None:
        return None
    urls = proxy.exits
    if proxy.credential_env is not None:
        credential = (os.environ if environment is None else environment).get(proxy.credential_env)
        if not credential:
            raise PermanentError(
                f"proxy.credential_env: the variable {proxy.credential_env} is not set; give it to each worker"
            )
        user, _, password = credential.partition(":")
        urls = [_with_credential(url, f"{quote(user, safe='')}:{quote(password, safe='')}") for url in urls]
    return Exits(urls, per_exit=spec.share.per_exit, rest_s=proxy.rest_s)


def _with_credential(url: str, credential: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{credential}@{parts.netloc}"))


def digest_of(content: bytes) -> str:
    """The version of what has no other."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


# ── Answers ─────────────────────────────────────────────────────────────────────────────────────


def _parse(answer: Answer, what: str) -> object:
    return decode(_JSON, answer, what)


def _dig(value: object, path: str) -> Any:
    """What stands at a dotted path; None where something on the way is not there."""
    for step in path.split(".") if path else ():
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _need_list(body: object, path: str, answer: Answer, field: str) -> list[Any]:
    items = _dig(body, path)
    if not isinstance(items, list):
        raise SchemaDriftError(f"{field}: the answer has no list at {path or 'its root'}", answer.body)
    return items


def _text(value: object, where: str) -> str | None:
    """A text, or a number as it is written."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        return str(value)
    raise SchemaDriftError(f"{where} is neither a text nor a number", _encode(value))


def _need_version(value: object, where: str, answer: Answer) -> str:
    version = _version(value, where)
    if version is None:
        raise SchemaDriftError(f"the answer tells no version at {where}", answer.body)
    return version


def _version(value: object, where: str) -> str | None:
    text = _text(value, where)
    return text if text is None or (len(text) <= VERSION_LENGTH_MAX and "\0" not in text) else digest_of(text.encode())


def _header_version(answer: Answer, kind: str) -> str:
    name = "etag" if kind == "etag" else "last-modified"
    text = answer.headers.get(name)
    if not text:
        raise SchemaDriftError(f"check.version: the answer has no {name}; use digest", answer.body)
    return text[:VERSION_LENGTH_MAX]


def _listed(items: Sequence[object], listing: Listing, answer: Answer) -> Page:
    listed: list[Listed] = []
    refused: list[str] = []
    for item in items:
        is_object = isinstance(item, dict)
        id_ = _text(_dig(item, listing.id) if is_object else item, listing.id)
        if id_ is None:
            raise SchemaDriftError(f"list.id: an item has no {listing.id}", answer.body)
        version = _version(_dig(item, listing.version), listing.version) if is_object and listing.version else None
        if can_ask_for(id_):
            listed.append(Listed(id_, version))
        else:
            refused.append(id_[:100])
    return Page(listed, refused)


def can_ask_for(id_: str) -> bool:
    """Whether an id can stand in a path and in a column; dots alone would be another path."""
    return 0 < len(id_) <= ID_LENGTH_MAX and id_.isprintable() and id_ not in (".", "..")


def _first(listing: Listing, fixed: Params) -> Params:
    match listing.paging:
        case PageNumber(param=param, first=first):
            return [*fixed, (param, str(first))]
        case Offset(param=param):
            return [*fixed, (param, "0")]
        case _:
            return fixed


def _link(answer: Answer) -> str | None:
    found = _LINK.findall(answer.headers.get("link", ""))
    return next((url for url, rest in found if _IS_NEXT.search(rest)), None)


def _newest(newest: str | None, items: Sequence[Listed]) -> str | None:
    versions = [item.version for item in items if item.version is not None]
    return max([*versions, *([newest] if newest else [])], key=_order, default=None)


def _order(version: str) -> tuple[int, str]:
    """Numbers by their size: a longer one is the greater one. Times of one format and zone by their text."""
    return (len(version), version) if version.isdecimal() else (0, version)


def _can_be_sent(version: str) -> bool:
    """Whether a header of ours can carry it; else all is read."""
    return version.isascii() and version.isprintable()


def _http_date(version: str) -> str:
    """The second that a version lies in: of ISO 8601, or a Unix time."""
    try:
        instant = datetime.fromtimestamp(int(version), UTC) if version.isdecimal() else parse_rfc3339(version)
    except (ValueError, OverflowError, OSError) as error:
        raise SchemaDriftError(
            "list.since.http_date: the newest version is no time; leave it out", version.encode()
        ) from error
    return format_datetime(instant, usegmt=True)


def _kept(item: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    if not fields:
        return item
    kept: dict[str, Any] = {}
    for field in fields:
        value = _dig(item, field)
        if value is None:
            continue
        *path, last = field.split(".")
        place = kept
        for step in path:
            place = place.setdefault(step, {})
        place[last] = value
    return kept


def _gone(error: BadRequestError) -> Look:
    if error.status not in GONE:
        raise error
    return Look(is_gone=True)


def _filled(path: str, id_: str) -> str:
    return path.replace("{id}", quote(id_, safe=""))


def _pairs(params: Mapping[str, str | int | bool]) -> list[tuple[str, str]]:
    return [(name, str(value).lower() if isinstance(value, bool) else str(value)) for name, value in params.items()]
