"""Loading what a poll needs to know, and changing how a stream is cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import NamedTuple

import msgspec

from daemon.db.pool import Database, Executor, Record, query
from daemon.db.secrets import Keyring, Place, Sealed
from daemon.domain.connection import Connection, ConnectionId, Epoch, Secret, Stream, StreamId, Target, TenantId
from daemon.domain.errors import ConfigError, CredentialError
from daemon.domain.record import Grain, GrainId, Totals
from daemon.domain.window import Width, Window

_CONNECTIONS = query("connections_for_poll")
_ADD_STREAMS = query("add_streams")
_STREAMS = query("streams_for_poll")
_EPOCHS_OF = query("epochs_of")
_HELD = query("held_totals")
_LOST_SEQUENCES = query("lost_sequences")
_MEND_SEQUENCES = query("mend_sequences")
_SETTINGS_OF = query("settings_of_streams")
_LOCK_OF = query("lock_streams_of")
_CUTS_OF = query("cuts_of")
_ADD_EPOCHS = query("add_epochs")

_SCAN_TIMEOUT_S = 600.0

GrainOf = Callable[[Connection], Mapping[str, tuple[GrainId, Grain]]]
"""The sources of a connection's provider, each with the grain that its settings ask for."""


class Loaded(NamedTuple):
    """A connection and its streams by source.

    `problem` when its credential cannot be opened: a CredentialError is the connection's own, and parks it; a
    ConfigError (a key that this replica lacks) is the operator's, and passes.
    """

    connection: Connection
    streams: Mapping[str, Stream]
    problem: CredentialError | ConfigError | None = None


async def load(
    db: Database, keyring: Keyring, ids: Sequence[ConnectionId], grains_of: GrainOf, held_since: datetime
) -> tuple[list[Loaded], datetime]:
    """Load connections for a poll; streams of sources that are new are made, owned by the grain of today's settings.

    Args:
        held_since: totals of the buckets from here on are loaded, for comparing probes.

    Returns:
        The connections in the order of their ids, and the database's now. Those that no longer exist are left out.
    """
    connections: dict[ConnectionId, Connection] = {}
    problems: dict[ConnectionId, CredentialError | ConfigError] = {}
    settings: dict[ConnectionId, str] = {}
    for row in await db.fetch(_CONNECTIONS, list(ids)):
        connection = _connection(row)
        place = Place(connection.tenant_id, connection.id, connection.provider)
        try:
            secret = keyring.open(Sealed(row["credential_key_id"], row["credential"]), place)
            connection = replace(connection, target=replace(connection.target, credential=secret))
        except (CredentialError, ConfigError) as error:
            problems[connection.id] = error
        connections[connection.id] = connection
        settings[connection.id] = row["settings"]
    rows = await db.fetch(_STREAMS, list(connections))
    known: dict[ConnectionId, set[str]] = defaultdict(set)
    for row in rows:
        known[row["connection_id"]].add(row["source"])
    wanted = [
        (connection, source, name, grain)
        for connection in connections.values()
        for source, (name, grain) in grains_of(connection).items()
        if source not in known[connection.id]
    ]
    if wanted:
        await db.execute(
            _ADD_STREAMS,
            [c.tenant_id for c, *_ in wanted],
            [c.id for c, *_ in wanted],
            [source for _, source, _, _ in wanted],
            [name for *_, name, _ in wanted],
            [grain.api for *_, grain in wanted],
            [grain.width.value for *_, grain in wanted],
            [",".join(grain.group_by) for *_, grain in wanted],
            [settings[c.id] for c, *_ in wanted],
        )
        rows = await db.fetch(_STREAMS, list(connections))
    epochs = await _epochs(db, [row["id"] for row in rows])
    held = await _held(db, [row["id"] for row in rows], held_since)
    streams: dict[ConnectionId, dict[str, Stream]] = defaultdict(dict)
    for row in rows:
        streams[row["connection_id"]][row["source"]] = _stream(row, epochs[row["id"]], held.get(row["id"], {}))
    now = rows[0]["now"] if rows else await db.now()
    return [Loaded(c, streams[c.id], problems.get(c.id)) for c in connections.values()], now


async def check_sequences(db: Executor) -> None:
    """Refuse to work where a copy of the database lost its sequences: every answer would look old, and none be booked.

    Raises:
        ConfigError: one is behind what was taken.
    """
    problems = [
        f"database: the sequence {lost['name']} stands at {lost['issued']}, behind {lost['newest']}, which is in use"
        + (", so that every answer of a provider would look old" if lost["name"] == "poll_seq" else "")
        + "; a copy that lost it may have lost more: run `tallyd doctor`, then `tallyd doctor --fix`"
        for lost in await db.fetch(_LOST_SEQUENCES)
    ]
    if problems:
        raise ConfigError(problems)


async def mend_sequences(db: Executor) -> dict[str, int]:
    """Set each sequence that is behind to the newest number in use. Returns those, with their new positions."""
    return {row["name"]: row["newest"] for row in await db.fetch(_MEND_SEQUENCES, timeout_s=_SCAN_TIMEOUT_S)}


async def settings_of(
    tx: Executor, found: Sequence[StreamId]
) -> list[tuple[TenantId, ConnectionId, Mapping[str, object]]]:
    """Tenant, connection and settings of each stream."""
    rows = await tx.fetch(_SETTINGS_OF, list(found))
    return [(TenantId(r["tenant_id"]), ConnectionId(r["id"]), msgspec.json.decode(r["settings"])) for r in rows]


async def lock_of(tx: Executor, connections: Sequence[ConnectionId]) -> None:
    """Hold the connections' streams. A flush locks streams before connections: so must whoever needs both."""
    await tx.execute(_LOCK_OF, list(connections))


async def recut(tx: Executor, connections: Sequence[ConnectionId], grains_of: GrainOf) -> None:
    """Let the grains that the stored settings ask for own the next buckets, where others own them now.

    The boundary is judged under the streams' locks (`lock_of`, before the settings are changed), by a clock that is
    read after them. It lies past every bucket that is booked, so that none has rows of two grains; a cut that is still
    to come is replaced.
    """
    wanted = {row["id"]: grains_of(_connection(row)) for row in await tx.fetch(_CONNECTIONS, list(connections))}
    cuts = []
    for row in await tx.fetch(_CUTS_OF, list(wanted)):
        name, grain = wanted[row["connection_id"]].get(row["source"], (row["grain_id"], None))
        if grain is None or name == row["grain_id"]:
            continue
        old = Width(row["width"])
        booked_to = row["newest"] + old.delta if row["newest"] is not None else row["start_at"]
        coarser = max(old, grain.width, key=lambda width: width.seconds)
        boundary = coarser.ceil(max(row["now"], row["start_at"], booked_to))
        cuts.append((row["id"], boundary, name, grain.api, grain.width.value, ",".join(grain.group_by)))
    if cuts:
        await tx.execute(_ADD_EPOCHS, *map(list, zip(*cuts, strict=True)))


def _connection(row: Record) -> Connection:
    return Connection(
        id=ConnectionId(row["id"]),
        tenant_id=TenantId(row["tenant_id"]),
        tenant=row["tenant"],
        name=row["name"],
        provider=row["provider"],
        target=Target(row["provider"], row["base_url"], Secret(""), msgspec.json.decode(row["settings"])),
        since=row["since"],
        state=row["state"],
        org_id=row["org_id"],
        sealed=row["credential"],
    )


def _stream(row: Record, epochs: tuple[Epoch, ...], held: Mapping[datetime, Totals]) -> Stream:
    return Stream(
        id=StreamId(row["id"]),
        source=row["source"],
        epochs=epochs,
        covered_from=row["covered_from"],
        covered_to=row["covered_to"],
        last_seq=row["last_seq"],
        last_window=Window(row["last_start"], row["last_end"]) if row["last_start"] is not None else None,
        last_pages=row["last_pages"],
        probe_digest=row["probe_digest"],
        floor=row["floor_at"],
        read_at=row["read_at"],
        hourly_at=row["hourly_at"],
        daily_at=row["daily_at"],
        changed_at=row["changed_at"],
        parked_reason=row["parked_reason"],
        is_open_elsewhere=row["open_job"] is not None,
        held=held,
        pending=tuple(row["pending"]),
    )


async def _epochs(db: Executor, streams: Iterable[StreamId]) -> dict[StreamId, tuple[Epoch, ...]]:
    found: dict[StreamId, list[Epoch]] = defaultdict(list)
    for row in await db.fetch(_EPOCHS_OF, list(streams)):
        grain = Grain(row["api"], Width(row["width"]), tuple(row["group_by"]))
        found[row["stream_id"]].append(Epoch(row["start_at"], GrainId(row["grain_id"]), grain))
    return {stream: tuple(epochs) for stream, epochs in found.items()}


async def _held(db: Executor, streams: Sequence[StreamId], since: datetime) -> dict[StreamId, dict[datetime, Totals]]:
    found: dict[StreamId, dict[datetime, Totals]] = defaultdict(dict)
    for row in await db.fetch(_HELD, list(streams), [since] * len(streams)):
        tokens = dict(zip(Totals._fields, row["totals"], strict=False))
        found[row["stream_id"]][row["bucket_start"]] = Totals(
            **tokens, quantity=row["total_quantity"], amount=row["total_amount"]
        )
    return found
