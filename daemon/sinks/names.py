"""Step 7 of 8, sinks: the names of projects, keys and people, each with the time in which it was one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from daemon.db import names as store
from daemon.db.names import NameRow
from daemon.db.pool import Session
from daemon.db.text import storable
from daemon.domain.collection import Name
from daemon.domain.connection import ConnectionId, StreamId
from daemon.sinks.ledger import Effect, Lot


class NameTaker:
    """Takes names. A connection has at most one source of them: what that one no longer holds is gone."""

    async def take(self, tx: Session, lots: Sequence[Lot]) -> Mapping[StreamId, Effect]:
        """Open what is new or called otherwise. Names beyond what a note may hold are cut."""
        rows: dict[tuple[ConnectionId, str, str], NameRow] = {}
        streams: dict[ConnectionId, StreamId] = {}
        effects: dict[StreamId, Effect] = {}
        unread: set[tuple[ConnectionId, str, int]] = set()
        for lot in lots:
            connection = lot.connection
            streams[connection.id] = lot.stream.id
            effects[lot.stream.id] = effects.get(lot.stream.id, Effect()) + Effect(items=lot.rows)
            unread |= {(connection.id, kind, lot.seq) for kind in lot.part.unread}
            for item in cast("Sequence[Name]", lot.part.items):
                id_ = storable(item.id)
                # A reading that tells an id twice means the later one.
                rows[connection.id, item.kind, id_] = NameRow(
                    connection.tenant_id, connection.id, item.kind, id_, storable(item.name), lot.seq
                )
        # In one order, so that two flushes never wait for each other's rows.
        for connection_id, (first, later) in (await store.take(tx, [rows[key] for key in sorted(rows)])).items():
            effects[streams[connection_id]] += Effect(new=first, restated=later)
        await store.keep(tx, unread)
        return effects

    async def end(self, tx: Session, ends: Mapping[StreamId, int]) -> Mapping[StreamId, Effect]:
        """Close what the reading did not hold; it opens again when it comes back."""
        return {stream: Effect(vanished=gone) for stream, gone in (await store.close(tx, ends)).items()}
