"""Quota counters, written as they are read: the difference to what is stored, its history, and its events.

A counter only ever adds to what was used. What falls begins a new epoch: after a reset all that it shows was used
since, after its server was restored, or a refund, nothing was.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Protocol

import msgspec

from daemon.db import quota
from daemon.db.pool import Session
from daemon.domain.collection import Counter
from daemon.domain.connection import Connection, StreamId
from daemon.domain.window import rfc3339
from daemon.sinks.ledger import Effect, Lot

EVENT_TYPE = "dev.tallyd.quota.changed.v1"
EVENTS_MAX = 100
"""Events in one message."""

_encode = msgspec.json.Encoder().encode


class Outbox(Protocol):
    """Hands messages to whoever delivers them, in the transaction of what they tell of."""

    async def post(self, tx: Session, url: str, lane: str, bodies: Sequence[bytes]) -> None:
        """Deliver these to `url`, one after the other of the same lane, at least once each."""
        ...


FollowUp = Callable[[Session, Sequence[StreamId]], Awaitable[None]]


class QuotaTaker:
    """Args:
    outbox: delivers the events of sources that have an `events_url`.
    follow_up: commits with the end of a reading; compares the counters with the ledger, where a source asks for that.
    """

    def __init__(self, outbox: Outbox, follow_up: FollowUp) -> None:
        self._outbox = outbox
        self._follow_up = follow_up

    async def take(self, tx: Session, lots: Sequence[Lot]) -> Mapping[StreamId, Effect]:
        effects: dict[StreamId, Effect] = {}
        for lot in lots:
            counters = {item.key: item for item in lot.part.items if isinstance(item, Counter)}  # the later one counts
            settings = lot.connection.target.settings
            url = settings.get("events_url")
            taken = await quota.take(
                tx,
                lot.stream.id,
                lot.connection.tenant_id,
                lot.seq,
                counters.values(),
                is_restored=lot.part.is_restored,
                may_refund=settings.get("falls") == "refund",
                tells=url is not None,
            )
            if taken.told and url is not None:
                await self._outbox.post(tx, url, f"quota-{lot.connection.id}", _bodies(lot, taken))
            effect = Effect(new=taken.new, restated=taken.changed, items=len(counters))
            effects[lot.stream.id] = effects.get(lot.stream.id, Effect()) + effect
        return effects

    async def end(self, tx: Session, ends: Mapping[StreamId, int]) -> Mapping[StreamId, Effect]:
        """A key that is gone stays as it was: it was deleted, or its period is over."""
        await self._follow_up(tx, list(ends))
        return {}


def _bodies(lot: Lot, taken: quota.Taken) -> list[bytes]:
    events = [_event(lot.connection, lot.stream.id, change, taken.at) for change in taken.told]
    return [_encode(events[at : at + EVENTS_MAX]) for at in range(0, len(events), EVENTS_MAX)]


def _event(connection: Connection, stream: StreamId, change: quota.Told, at: datetime) -> dict[str, object]:
    """A CloudEvent of version 1.0; (source, id) names this revision of this counter for ever."""
    return {
        "specversion": "1.0",
        "id": f"{stream}:{change.revision}:{change.key}",
        "source": f"/connections/{connection.id}",
        "type": EVENT_TYPE,
        "subject": connection.tenant,
        "time": rfc3339(at),
        "datacontenttype": "application/json",
        "data": {
            "name": connection.name,
            **msgspec.structs.asdict(change),
            "kind": change.kind.name.lower(),
        },
    }
