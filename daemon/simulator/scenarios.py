"""What providers do to history: late, corrected, vanished, attributed, relabelled, restored; and odd wire formats."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec

from daemon.domain.window import from_epoch, parse_rfc3339, rfc3339, to_epoch
from daemon.simulator.catalogue import DAY, HOUR, PICO, Provider, Source
from daemon.simulator.traffic import Event, token
from daemon.simulator.world import Cells, Dims, Edit, Org, truth_rows

_CREDITED = ("amount", "list_amount")
_WIRE_FLAGS = ("duplicate_rows", "missing_optional_fields", "unknown_fields", "clamp_limit", "refuse_future_end")


class Scenario(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One action on one organisation.

    Attributes:
        source: default the provider's main one. An edit of a usage source moves its cost too; an edit of the cost
            source moves nothing else.
        bucket: RFC 3339 start of the hour (day for a cost source); default the newest closed one that fits.
        where: dimensions that the row must have, null included.
        set: dimensions that a new event gets, over those of the row it is modelled on.
        dim, value: what `attribute` and `relabel_model` write, the text of `hostile_text`, the new name of `rename`.
        id: what `rename` and `delete` are about; default the first API key.
        format: of `money_format`: number, string or exponent.
        enabled: False takes a wire format back.
        tokens: size of a new event's first count; default seeded.
        amount: of `negative_credit`, in whole dollars.
        edit: which edit `restore` undoes; default the newest.
    """

    provider: Provider
    key: str
    action: str
    source: str | None = None
    bucket: str | None = None
    where: dict[str, str | None] = {}
    set: dict[str, str | None] = {}
    dim: str | None = None
    value: str | None = None
    id: str | None = None
    format: str = "number"
    enabled: bool = True
    tokens: int | None = None
    amount: int = 5
    edit: str | None = None


class _Row(NamedTuple):
    source: Source
    start: int
    step: int
    dims: Dims
    counts: tuple[int, ...]

    @property
    def hours(self) -> frozenset[int]:
        return frozenset(range(self.start, self.start + self.step, HOUR))


def play(org: Org, asked: Scenario) -> dict[str, object]:
    """Do it, and say what changed: the rows of the touched buckets that are gone (`before`) and new (`after`).

    Raises:
        ValueError: no such action, or nothing in the organisation that it fits.
    """
    if asked.action in _WIRE_FLAGS:
        setattr(org.wire, asked.action, asked.enabled)
        return {"action": asked.action, "enabled": asked.enabled}
    if asked.action == "money_format":
        if asked.format not in {"number", "string", "exponent"}:
            raise ValueError(f"no such money format: {asked.format}")
        org.wire.money_format = asked.format
        return {"action": asked.action, "format": asked.format}
    if asked.action in {"rename", "delete"}:
        return _renamed(org, asked)
    if asked.action == "restore":
        edit = next((edit for edit in reversed(org.edits) if asked.edit in {None, edit.id}), None)
        if edit is None:
            raise ValueError("nothing to restore")
        return _reported(org, edit, asked.action, undo=True)
    return _reported(org, _edit(org, asked), asked.action, undo=False)


def _renamed(org: Org, asked: Scenario) -> dict[str, object]:
    """A project, key or person goes by another name, or is gone; their usage stays."""
    subject = asked.id or org.cast.keys[0].id
    known = {*org.cast.projects, *(key.id for key in org.cast.keys), *(key.user for key in org.cast.keys)}
    if subject is None or subject not in known:
        raise ValueError(f"no such project, key or person: {subject}")
    if asked.action == "delete":
        org.gone.add(subject)
    else:
        org.renamed[subject] = asked.value or f"renamed {len(org.renamed)}"
    return {"action": asked.action, "id": subject, "name": org.renamed.get(subject)}


def _edit(org: Org, asked: Scenario) -> Edit:
    """The edit, not yet made."""
    match asked.action:
        case "late_arrival":
            return _arrival(org, asked, {})
        case "new_enum_value":
            return _arrival(org, asked, _chosen(org.vendor.novel, asked))
        case "unpriced_model":
            return _arrival(org, asked, _chosen(org.vendor.unpriced, asked))
        case "hostile_text":
            return _arrival(org, asked, {"model": "gpt\x00'\"\\-\u202e" if asked.value is None else asked.value})
        case "equal_amounts":
            return _equal_amounts(org, asked)
        case "correction_up":
            row = _pick(org, asked)
            return _addition(org, asked, row, tuple(count // 2 + (count > 0) for count in row.counts))
        case "correction_down":
            row = _pick(org, asked)
            less = tuple(-(count // 2) for count in row.counts)
            return _addition(org, asked, row, less if any(less) else tuple(-count for count in row.counts))
        case "vanish_row":
            row = _pick(org, asked)
            return _mapping(org, asked, row, row.hours, lambda event: None if event.dims == row.dims else event)
        case "vanish_bucket":
            row = _pick(org, asked)
            return _mapping(org, asked, row, row.hours, lambda _: None)
        case "attribute":
            return _attribute(org, asked)
        case "relabel_model":
            return _relabel(org, asked)
        case "negative_credit":
            return _credit(org, asked)
        case _:
            raise ValueError(f"no such action: {asked.action}")


def _chosen(written: Mapping[str, str], asked: Scenario) -> dict[str, str | None]:
    """What a scenario writes into an event; `value` takes the place of the first of it."""
    first = next(iter(written))
    return {**written, first: asked.value or written[first]}


def _reported(org: Org, edit: Edit, action: str, *, undo: bool) -> dict[str, object]:
    bill = org.vendor.bill
    shown = [bill] if edit.source in {bill, "unreported"} else [edit.source, bill]
    low, high = min(edit.hours), max(edit.hours) + HOUR

    def rows() -> list[dict[str, object]]:
        return [{"source": name, **row} for name in shown for row in truth_rows(org, name, low, high)]

    before = rows()
    if undo:
        org.undo(edit)
    else:
        org.edit(edit)
    after = rows()
    return {
        "action": action,
        "edit": edit.id,
        "source": edit.source,
        "bucket_start": rfc3339(from_epoch(low)),
        "before": [row for row in before if row not in after],
        "after": [row for row in after if row not in before],
    }


def _candidates(org: Org, asked: Scenario, source: Source) -> Iterable[tuple[int, int, Cells]]:
    step = source.step
    if asked.bucket is not None:
        at = to_epoch(parse_rfc3339(asked.bucket))
        yield at - at % step, step, org.cells(source.name, at - at % step, at - at % step + step)
        return
    now = org.clock.now()
    for start in reversed(org.starts(source, org.first_hour(), now // step * step)):
        yield start, step, org.cells(source.name, start, start + step)


def _pick(org: Org, asked: Scenario, fits: dict[str, str | None] | None = None) -> _Row:
    """The largest row that fits, in the newest closed bucket that has one."""
    source = _source(org, asked)
    wanted = {source.at(_dim(source, dim)): value for dim, value in {**asked.where, **(fits or {})}.items()}
    for start, step, cells in _candidates(org, asked, source):
        rows = [
            (counts, tuple(value or "" for value in dims), dims)
            for dims, counts in cells.items()
            if all(dims[place] == value for place, value in wanted.items())
        ]
        if rows:
            counts, _, dims = max(rows)
            return _Row(source, start, step, dims, counts)
    raise ValueError(f"no row of {source.name} fits {asked.where or 'anything'} in the buckets asked for")


def _source(org: Org, asked: Scenario) -> Source:
    name = asked.source or org.vendor.main
    if name not in org.sources:
        raise ValueError(f"no such source: {name}")
    return org.sources[name]


def _dim(source: Source, dim: str) -> str:
    if dim not in source.dims:
        raise ValueError(f"{source.name} has no dimension {dim}")
    return dim


def _new(org: Org, asked: Scenario, action_set: dict[str, str | None]) -> tuple[Source, Event]:
    """One more event of a closed bucket (the newest by default), visible from now on."""
    source = _source(org, asked)
    now = org.clock.now()
    step = HOUR if source.is_cost else source.step
    at = to_epoch(parse_rfc3339(asked.bucket)) if asked.bucket else now // step * step - HOUR
    made = org.make(1, at - at % HOUR, HOUR, sources=(source.name if not source.is_cost else "unreported",))
    event = made[0][1]
    dims = list(event.dims)
    for dim, value in {**action_set, **asked.set}.items():
        dims[source.at(_dim(source, dim))] = value
    counts = event.counts if asked.tokens is None else (asked.tokens, *event.counts[1:])
    return source, Event(event.at, max(now, event.at), tuple(dims), counts)


def _arrival(org: Org, asked: Scenario, action_set: dict[str, str | None]) -> Edit:
    source, event = _new(org, asked, action_set)
    return org.addition("unreported" if source.is_cost else source.name, [event], asked.action)


def _equal_amounts(org: Org, asked: Scenario) -> Edit:
    """Two rows of one bucket that differ in their key alone, and in that from every other row."""
    source, event = _new(org, asked, {})
    places = [source.at(_dim(source, dim)) for dim in (org.vendor.key_dim, source.serial) if dim is not None]
    twins = []
    for n in range(2):
        dims = list(event.dims)
        for place in places:
            dims[place] = org.vendor.identify("key", token(org.key, org.serial, n, length=64))
        twins.append(event._replace(dims=tuple(dims)))
    return org.addition(source.name, twins, asked.action)


def _addition(org: Org, asked: Scenario, row: _Row, delta: tuple[int, ...]) -> Edit:
    """A difference that shows from now on; of a level, the new level."""
    now = org.clock.now()
    named = zip(row.source.counts, delta, strict=True)
    delta = tuple([0 if name in row.source.fixed else count for name, count in named])
    if row.source.is_level:
        delta = tuple(map(operator.add, row.counts, delta))
    return org.addition(row.source.name, [Event(row.start, max(now, row.start), row.dims, delta)], asked.action)


def _mapping(
    org: Org, asked: Scenario, row: _Row, hours: frozenset[int], change: Callable[[Event], Event | None]
) -> Edit:
    """Every event of those hours becomes what `change` makes of it; None drops it."""

    def apply(_: int, events: list[Event]) -> list[Event]:
        return [changed for event in events if (changed := change(event)) is not None]

    return Edit(f"edit-{org.next_serial()}", asked.action, row.source.name, hours, apply)


def _attribute(org: Org, asked: Scenario) -> Edit:
    source = _source(org, asked)
    dim = _dim(source, asked.dim or org.vendor.key_dim)
    place = source.at(dim)
    row = _pick(org, asked, {dim: None})
    value = asked.value or org.cast.keys[0].id

    def change(event: Event) -> Event:
        if event.dims != row.dims:
            return event
        return event._replace(dims=(*event.dims[:place], value, *event.dims[place + 1 :]))

    return _mapping(org, asked, row, row.hours, change)


def _relabel(org: Org, asked: Scenario) -> Edit:
    """One model's name changes, in one bucket or in all of history."""
    source = _source(org, asked)
    place = source.at(_dim(source, asked.dim or "model"))
    row = _pick(org, asked)
    old, new = row.dims[place], asked.value or f"{row.dims[place]}-relabelled"
    hours = row.hours
    if asked.bucket is None:
        hours = frozenset(range(org.first_hour(), org.clock.now() + 1, HOUR))

    def change(event: Event) -> Event:
        if event.dims[place] != old:
            return event
        return event._replace(dims=(*event.dims[:place], new, *event.dims[place + 1 :]))

    return _mapping(org, asked, row, hours, change)


def _credit(org: Org, asked: Scenario) -> Edit:
    """Money back, which no usage explains."""
    now = org.clock.now()
    at = to_epoch(parse_rfc3339(asked.bucket)) if asked.bucket else now // DAY * DAY - DAY
    source = org.sources["unreported"]
    named: dict[str, str | None] = {**org.vendor.credit, **asked.set}
    dims = tuple(named.get(dim) for dim in source.dims)
    counts = tuple(-asked.amount * PICO if name in _CREDITED else 0 for name in source.counts)
    return org.addition("unreported", [Event(at, max(now, at), dims, counts)], asked.action)
