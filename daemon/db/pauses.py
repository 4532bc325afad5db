"""Pauses that every replica should keep: open circuits, and what `Retry-After` asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from daemon.db.pool import Executor, query

_PAUSES = query("pauses")
_STORE = query("store_pauses")
_PRUNE = query("prune_pauses")


class Pause(NamedTuple):
    """Leave an organisation (or, with an empty `org`, the whole host) alone for `seconds` from now."""

    host: str
    org: str
    seconds: float
    reason: str


async def load(db: Executor) -> list[Pause]:
    """The pauses that still run."""
    return [Pause(row["host"], row["org"], row["seconds"], row["reason"]) for row in await db.fetch(_PAUSES)]


async def store(db: Executor, pauses: Sequence[Pause]) -> None:
    """Add pauses; a longer one that is stored stays."""
    if pauses:
        await db.execute(_STORE, *[list(column) for column in zip(*pauses, strict=True)])


async def prune(db: Executor) -> None:
    """Forget those that ended an hour ago."""
    await db.execute(_PRUNE)
