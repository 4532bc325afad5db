"""Which rows are the same money as others: loads what `daemon.domain.overlap` judges, and says it in SQL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from daemon.db.pool import Database, Executor, Session, query
from daemon.domain.connection import ConnectionId
from daemon.domain.overlap import Gateway, Shadow, View, shadows
from daemon.domain.window import Width

_VIEWS = query("overlap_views")
_LABELS = query("overlap_labels")
_KIN = query("overlap_kin")


class Kin(NamedTuple):
    """Another connection that may hold the same money: of the same organisation, or beyond a gateway."""

    label: str
    provider: str
    is_duplicate: bool


@dataclass(frozen=True, slots=True)
class Shade:
    """Shadows as arguments of a statement: it takes them by `unnest`, from its parameter `first` on."""

    shadows: Sequence[Shadow]

    @property
    def arguments(self) -> tuple[list[object], ...]:
        """Six columns, in the order of `relation`."""
        cast = self.shadows
        return (
            [shadow.stream_id for shadow in cast],
            [shadow.start for shadow in cast],
            [shadow.end for shadow in cast],
            [shadow.by for shadow in cast],
            [shadow.dimension for shadow in cast],
            [shadow.vendor for shadow in cast],
        )

    @staticmethod
    def relation(first: int) -> str:
        types = ("bigint", "timestamptz", "timestamptz", "bigint", "text", "text")
        arrays = ", ".join(f"${first + n}::{type_}[]" for n, type_ in enumerate(types))
        return f"unnest({arrays}) as o(stream_id, start_at, end_at, by_id, dimension, vendor)"

    @staticmethod
    def falls_on(row: str) -> str:
        """Whether a shadow `o` falls on a row that has stream_id, bucket_start and dims."""
        return (
            f"o.stream_id = {row}.stream_id and {row}.bucket_start >= o.start_at and {row}.bucket_start < o.end_at"
            f" and (o.vendor is null or {row}.dims ->> o.dimension = o.vendor)"
        )


@asynccontextmanager
async def one_moment(db: Database, timeout_s: float) -> AsyncIterator[Session]:
    """Statements that all see the same moment: what covers a bucket, and its rows, are committed together, and must be
    read together.
    """
    async with db.dedicated() as session:
        await session.execute(
            f"begin isolation level repeatable read read only; set local statement_timeout = {int(timeout_s * 1000):d}"
        )
        yield session
        await session.execute("commit")


async def cast_shadows(
    moment: Executor, gateways: Collection[Gateway], *, across: bool, as_of: datetime | None, timeout_s: float
) -> Shade:
    """What must not be added up, as of then. See `daemon.domain.overlap.shadows`."""
    providers = sorted({gateway.provider for gateway in gateways})
    rows = await moment.fetch(_VIEWS, providers, as_of, timeout_s=timeout_s)
    views = [
        View(
            row["stream_id"],
            row["tenant_id"],
            row["connection_id"],
            row["provider"],
            row["source"],
            row["account"],
            row["start_at"],
            row["end_at"],
            Width(row["width"]),
            row["is_ended"],
            row["adds"],
        )
        for row in rows
    ]
    return Shade(shadows(views, gateways, across=across))


async def labels(moment: Executor, connections: Collection[ConnectionId]) -> dict[ConnectionId, str]:
    """`TENANT/NAME` of each."""
    return {row["id"]: row["label"] for row in await moment.fetch(_LABELS, sorted(connections))}


async def kin_of(db: Executor, connection: ConnectionId, gateways: Collection[Gateway]) -> list[Kin]:
    """Who else may hold the money of this connection."""
    providers = sorted({gateway.provider for gateway in gateways})
    vendors = sorted({provider for gateway in gateways for provider, _ in gateway.vendors})
    rows = await db.fetch(_KIN, connection, providers, vendors)
    return [Kin(row["label"], row["provider"], row["is_duplicate"]) for row in rows]
