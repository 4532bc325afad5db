"""How a REST collection is read, as its TOML file declares it and its connection's settings keep it.

The structs are the one source: the parser, the JSON Schema in the docs and the fixes that errors name come from them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from daemon.domain.duration import parse_duration
from daemon.domain.errors import UsageError
from daemon.pollers.chain import COMMON

EVERY_S_MIN = 60
EXIT_CREDENTIAL = re.compile(r"TALLYD_EXIT_[A-Z0-9_]+")
"""The only variables that a file may name: another one's value must not be sent to a proxy that the file chooses."""

Dotted = Annotated[str, Meta(pattern=r"^[^.\s]+(\.[^.\s]+)*$", description="a dotted path, such as meta.next")]
Whole = Annotated[str, Meta(pattern=r"^([^.\s]+(\.[^.\s]+)*)?$", description='a dotted path, or "" for all of it')]
_PATH = r"^(/(?!\.{1,2}(/|$))[^/?#\s]*)+$"
"""No step of it leads up: a path is below the base URL."""
UrlPath = Annotated[str, Meta(pattern=_PATH, description="a path below base_url, such as /orders")]
Word = Annotated[str, Meta(min_length=1, max_length=200, description="the name of a parameter or header")]
Params = Annotated[
    dict[str, str | int | bool], Meta(description="parameters of the query; here belongs what asks for few fields")
]
Lasting = Annotated[str, Meta(description="a duration, such as 1h or 15m")]


class _Table(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class Auth(_Table, frozen=True):
    """How the credential is sent. It is never in the file."""

    kind: Annotated[
        Literal["bearer", "header", "basic"],
        Meta(description="bearer; header, the credential as it is; or basic, the credential being user:password"),
    ] = "bearer"
    header: Annotated[str, Meta(pattern=r"^[A-Za-z0-9-]+$", description="with kind header: the header's name")] = (
        "Authorization"
    )
    prefix: Annotated[str, Meta(max_length=50, description="with kind header: what stands before the credential")] = ""


class Cursor(_Table, tag_field="kind", tag="cursor", frozen=True):
    """The answer holds what to ask for next, and nothing on the last page."""

    param: Word
    next: Dotted


class PageNumber(_Table, tag_field="kind", tag="page", frozen=True):
    """Pages have numbers. The list ends where `more` says so, else with an empty page."""

    param: Word
    first: Annotated[int, Meta(ge=0, description="the number of the first page")] = 1
    more: Dotted | None = None


class Offset(_Table, tag_field="kind", tag="offset", frozen=True):
    """Pages begin at an item. The list ends where `more` says so, else with an empty page."""

    param: Word
    more: Dotted | None = None


class Link(_Table, tag_field="kind", tag="link", frozen=True):
    """The answer holds the next page's URL: at `next` in the body, else in a Link header with rel="next"."""

    next: Dotted | None = None


class Since(_Table, frozen=True):
    """The list can be asked for what changed since the newest version that was seen; a 304 says that nothing did."""

    param: Word | None = None
    header: Annotated[
        Literal["If-Modified-Since"] | None, Meta(description="the header that takes the version, in place of param")
    ] = None
    http_date: Annotated[bool, Meta(description="send the version, a time, as HTTP writes times")] = False
    full_every: Lasting = "1d"

    def __post_init__(self) -> None:
        if (self.param is None) == (self.header is None):
            raise ValueError("param: is needed, or header, and not both; say which one takes the version")
        _seconds("full_every", self.full_every)


class Listing(_Table, frozen=True):
    """The first call for the whole collection: which ids there are, and each one's version where it tells."""

    path: UrlPath
    params: Params = {}
    items: Whole = ""
    id: Dotted = "id"
    version: Dotted | None = None
    paging: Cursor | PageNumber | Offset | Link | None = None
    since: Since | None = None

    def __post_init__(self) -> None:
        if self.since is not None and self.version is None:
            raise ValueError("since: has no version to begin at; say in list.version where an item has it")


class Check(_Table, kw_only=True, frozen=True):
    """The first call where the list does not tell the version: of one resource, or of many at once."""

    path: (
        Annotated[
            str,
            Meta(
                pattern=r"^/[^?#\s]*$",
                description="the path, with {id} in it; without it the second call is conditional",
            ),
        ]
        | None
    ) = None
    params: Params = {}
    version: Annotated[
        Literal["field", "etag", "last_modified", "digest"], Meta(description="what is compared with what is stored")
    ]
    field: Dotted | None = None
    conditional: Annotated[bool, Meta(description="send If-None-Match or If-Modified-Since, so that 304 is enough")] = (
        False
    )
    ids_param: Annotated[str, Meta(min_length=1, description="the parameter that takes many ids at once")] | None = None
    ids_size: Annotated[int, Meta(ge=1, le=100, description="ids in one call at the most")] = 100
    items: Whole = ""
    id: Dotted = "id"

    def __post_init__(self) -> None:
        if (self.version == "field") != (self.field is not None):
            raise ValueError('field: goes with version = "field", and only with it; say where the version stands')
        if self.conditional and self.version not in ("etag", "last_modified"):
            raise ValueError("conditional: needs a version that HTTP knows; use etag or last_modified")
        if self.ids_param is not None:
            if self.path is None or "{id}" in self.path:
                raise ValueError("path: is asked for many ids at once; give a path without {id}")
            if self.conditional or self.version not in ("field", "digest"):
                raise ValueError("version: one answer holds many resources; use field or digest, not conditional")
        elif self.path is None:
            if not self.conditional:
                raise ValueError("path: is missing; give one with {id}, or set conditional for the second call itself")
        elif "{id}" not in self.path:
            raise ValueError("path: names no resource; put {id} where the id belongs, or set ids_param")


class Detail(_Table, frozen=True):
    """The second call: the content of one resource."""

    path: Annotated[str, Meta(pattern=_PATH, description="the path, with {id} in it")]
    params: Params = {}
    item: Whole = ""
    fields: Annotated[list[Dotted], Meta(max_length=500, description="what to keep; all of it by default")] = []
    version: Dotted | None = None

    def __post_init__(self) -> None:
        if "{id}" not in self.path:
            raise ValueError("path: names no resource; put {id} where the id belongs")


class Rate(_Table, frozen=True):
    """How hard the API may be pressed, over all replicas together; `concurrency` is one batch's."""

    per_second: Annotated[float, Meta(gt=0, le=10_000, description="requests a second")] | None = None
    concurrency: Annotated[int, Meta(ge=1, le=100, description="requests in flight for one batch")] = 10
    in_all: Annotated[int, Meta(ge=1, le=10_000, description="requests in flight for all batches")] | None = None


class Proxy(_Table, frozen=True):
    """By which exits requests leave, and how many at once. A rotating proxy is one exit with a total."""

    exits: Annotated[
        list[str], Meta(min_length=1, max_length=1_000, description="URLs of HTTP proxies, such as http://proxy:3128")
    ]
    credential_env: (
        Annotated[
            str,
            Meta(
                pattern=rf"^{EXIT_CREDENTIAL.pattern}$",
                description="the variable TALLYD_EXIT_... of the workers that holds user:password for the exits",
            ),
        ]
        | None
    ) = None
    per_exit: Annotated[int, Meta(ge=1, le=10_000, description="requests in flight by one exit")] | None = None
    total: Annotated[int, Meta(ge=1, le=10_000, description="requests in flight by all exits")] | None = None
    rest_s: Annotated[int, Meta(ge=1, le=3_600, description="seconds for which a failing exit is left alone")] = 60

    def __post_init__(self) -> None:
        for url in self.exits:
            try:
                parts = urlsplit(url)
                is_good = parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/")
                is_good = is_good and not parts.query and not parts.fragment and parts.port != 0
            except ValueError:
                is_good = False
                parts = urlsplit("")
            if parts.username is not None or parts.password is not None:
                raise ValueError("exits: one holds a user or password; name a variable with credential_env")
            if not is_good:
                raise ValueError("exits: one is no URL of an HTTP proxy; write it as http://host:port")
        if len(set(self.exits)) != len(self.exits):
            raise ValueError("exits: one is named twice; name each once")


class Limits(_Table, frozen=True):
    """What is beyond is an error, not cut."""

    items_max: Annotated[int, Meta(ge=1, le=10_000_000, description="resources in the collection")] = 1_000_000
    body_bytes: Annotated[int, Meta(ge=1_024, le=33_554_432, description="bytes of one answer")] = 8_388_608


class _Common(_Table, kw_only=True, frozen=True):
    auth: Auth = Auth()
    list: Listing | None = None
    check: Check | None = None
    detail: Detail
    rate: Rate = Rate()
    proxy: Proxy | None = None
    limits: Limits = Limits()
    ids: Annotated[
        Sequence[str | int], Meta(max_length=100_000, description="ids to read where the API cannot list them")
    ] = ()


class Share(NamedTuple):
    """What one batch may do, so that all batches of all replicas together keep the limits.

    Attributes:
        batches: of the collection that may run at once, wherever; None: any number.
        concurrency: requests in flight.
        per_exit: requests in flight by each exit; None: any number.
        per_second: requests a second; None: as they come.
    """

    batches: int | None
    concurrency: int
    per_exit: int | None
    per_second: float | None


class Spec(_Common, kw_only=True, frozen=True):
    """A collection as its connection's settings keep it."""

    every_s: Annotated[int, Meta(ge=EVERY_S_MIN, description="seconds from listing to listing")] = 3_600

    def __post_init__(self) -> None:
        if self.list is None and not self.ids:
            raise ValueError("list: is missing; say how the API lists the collection, or give ids")

    @property
    def calls_each(self) -> int:
        """Calls that a program makes for each resource which goes one by one: whether it changed, then its content."""
        return 1 if self.check is None and (self.list is None or self.list.version is None) else 2

    @property
    def share(self) -> Share:
        concurrency, rate, proxy = self.rate.concurrency, self.rate, self.proxy
        bounds = [rate.in_all]
        if proxy is not None:
            bounds += [proxy.total, None if proxy.per_exit is None else proxy.per_exit * len(proxy.exits)]
        in_all = min((bound for bound in bounds if bound is not None), default=None)
        if in_all is None:
            if rate.per_second is None:
                return Share(None, concurrency, None, None)
            in_all = concurrency  # a pace is kept by one batch at a time, unless it is said how many share it
        concurrency = min(concurrency, in_all)
        batches, per_exit = in_all // concurrency, None
        if proxy is not None and proxy.per_exit is not None:
            batches = min(batches, proxy.per_exit)
            per_exit = proxy.per_exit // batches
            concurrency = min(concurrency, per_exit * len(proxy.exits))
        return Share(batches, concurrency, per_exit, None if rate.per_second is None else rate.per_second / batches)


class Document(_Common, kw_only=True, frozen=True):
    """A file that declares a collection."""

    name: Annotated[
        str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="the connection's name in its tenant")
    ]
    base_url: Annotated[str, Meta(min_length=1, description="the API's URL, such as https://api.example.com/v1")]
    every: Lasting = "1h"
    ids_file: (
        Annotated[str, Meta(min_length=1, description="a file beside this one with an id on each line")] | None
    ) = None

    def __post_init__(self) -> None:
        if _seconds("every", self.every) < EVERY_S_MIN:
            raise ValueError(f"every: {self.every} is too often; write at least {EVERY_S_MIN}s")
        if self.list is None and not self.ids and self.ids_file is None:
            raise ValueError("list: is missing; say how the API lists the collection, or give ids or ids_file")

    def settings(self, more_ids: Sequence[str] = ()) -> dict[str, Any]:
        """As the connection keeps it, with the ids of the file."""
        ids = tuple(dict.fromkeys([*map(str, self.ids), *more_ids]))
        shared = {name: getattr(self, name) for name in _Common.__struct_fields__} | {"ids": ids}
        # Through the parser, so that the ids of a file are held to the same rules.
        return _plain(_convert(msgspec.to_builtins(Spec(**shared, every_s=parse_duration(self.every))), Spec, ""))


def parse_document(text: str) -> Document:
    """The file's content, checked. Raises UsageError naming the field and the fix."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError("FILE", f"is no TOML: {error}", "mend that line") from error
    document: Document = _convert(data, Document, "")
    return document


def parse_settings(settings: Mapping[str, object]) -> Spec:
    """The settings of a connection, checked. Raises UsageError naming the setting and the fix."""
    own = {name: value for name, value in settings.items() if name not in COMMON}
    spec: Spec = _convert(own, Spec, "settings.")
    return spec


def schema() -> dict[str, Any]:
    """The JSON Schema of the file."""
    (reference,), definitions = msgspec.json.schema_components([Document], ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A collection for tallyd resources",
        **reference,
        "$defs": definitions,
    }


_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
_MISSING = re.compile(r"Object missing required field `(.*)`")
_PLACE = re.compile(r"^(.*?)(?: - at `(?:key in )?\$(.*)`)?$", re.DOTALL)
_OWN = re.compile(r"^([a-z_]+): (.*); (.*)$", re.DOTALL)


def _convert(data: object, kind: type[Any], prefix: str) -> Any:
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise _told(str(error), kind, prefix) from error


def _told(text: str, kind: type[Any], prefix: str) -> UsageError:
    found = _PLACE.match(text)
    assert found is not None
    problem, path = found[1], (found[2] or "").replace("[...]", "").strip(".")
    steps = path.split(".") if path else []

    def field(*names: str) -> str:
        return prefix + ".".join([*steps, *names])

    if own := _OWN.match(problem):
        return UsageError(field(own[1]), own[2], own[3])
    if unknown := _UNKNOWN.match(problem):
        known = ", ".join(sorted(_properties(kind, steps)))
        return UsageError(field(unknown[1]), "no such key", f"use one of {known}" if known else "leave it out")
    if missing := _MISSING.match(problem):
        return UsageError(field(missing[1]), "is missing", f"give {_meaning(kind, [*steps, missing[1]])}")
    return UsageError(field() or "FILE", problem[:1].lower() + problem[1:], f"give {_meaning(kind, steps)}")


def _nodes(kind: type[Any], steps: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What the schema says about the place at the end of the steps, each of its alternatives."""
    (root,), definitions = msgspec.json.schema_components([kind], ref_template="{name}")

    def opened(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if "$ref" in node:
            yield from opened(definitions[node["$ref"]])
        yield node
        for one in node.get("anyOf", ()):
            yield from opened(one)

    places = list(opened(root))
    for step in steps:
        places = [
            found
            for place in places
            if isinstance(child := place.get("properties", {}).get(step) or place.get("additionalProperties"), dict)
            for found in opened(child)
        ]
    yield from places


def _properties(kind: type[Any], steps: Sequence[str]) -> set[str]:
    return {name for node in _nodes(kind, steps) for name in node.get("properties", ())}


def _meaning(kind: type[Any], steps: Sequence[str]) -> str:
    nodes = list(_nodes(kind, steps))
    choices = dict.fromkeys(str(choice) for node in nodes for choice in node.get("enum", ()))
    told: str | None = next((node["description"] for node in nodes if "description" in node), None)
    if told is None:
        return f"one of {', '.join(choices)}" if choices else "what docs/reference/resources.md says"
    return (told[0].lower() + told[1:] if told[1].islower() else told).rstrip(".")


def _seconds(field: str, text: str) -> int:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ValueError(f"{field}: {str(error).replace(';', ',', 1)}; write a duration such as 1h") from error


def _plain(spec: Spec) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(spec)
    return plain | {"every_s": spec.every_s}
