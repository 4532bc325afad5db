"""Tenants, their connections to providers, and the streams read from each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NewType

from daemon.domain.record import Grain, GrainId, Totals
from daemon.domain.window import Window

TenantId = NewType("TenantId", int)
ConnectionId = NewType("ConnectionId", int)
StreamId = NewType("StreamId", int)
ConnectionState = Literal["active", "paused", "parked", "archived"]


class Secret:
    """A text that prints as `***`; `reveal()` at the one place that sends it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


@dataclass(frozen=True, slots=True)
class Target:
    """What a poller needs to know about a connection in order to ask its provider.

    Attributes:
        base_url: stands for what the provider's documents give, without a trailing slash.
        settings: the connection's own, such as {"api": "analytics"} or {"group_by": {"completions": ["model"]}}.
    """

    provider: str
    base_url: str
    credential: Secret
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a credential belongs to, as far as the provider tells."""

    org_id: str | None
    org_name: str | None = None


@dataclass(frozen=True, slots=True)
class Connection:
    """One tenant's account at one provider.

    `sealed` is the credential as it was stored when it was loaded: another text since then means that it was replaced.
    """

    id: ConnectionId
    tenant_id: TenantId
    tenant: str
    name: str
    provider: str
    target: Target
    since: datetime
    state: ConnectionState
    org_id: str | None = None
    sealed: bytes | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        return f"{self.tenant}/{self.name}"


@dataclass(frozen=True, slots=True)
class Epoch:
    """From `start` on (until the next epoch), buckets of a stream are cut by `grain`."""

    start: datetime
    grain_id: GrainId
    grain: Grain


@dataclass(frozen=True, slots=True)
class Stream:
    """What the ledger knows about one source of one connection.

    Attributes:
        covered_from: history has been read back to here; None before the first read.
        covered_to: complete buckets before this instant have been read at least once.
        last_seq: the poll_seq of the newest answer taken, and `last_window` what it covered: the fence.
        last_pages: pages of the last grouped read, the requests which an unchanged probe saves.
        probe_digest: of a probe that cannot be compared with the ledger; None otherwise.
        floor: the provider refuses to look back before this instant.
        held: the totals stored for the youngest buckets, for comparing a probe; a missing bucket holds nothing.
        pending: buckets with a vanished row that awaits confirmation; they are read in full each time.
    """

    id: StreamId
    source: str
    epochs: tuple[Epoch, ...]
    covered_from: datetime | None
    covered_to: datetime | None
    last_seq: int
    last_window: Window | None
    last_pages: int
    probe_digest: bytes | None
    floor: datetime | None
    read_at: datetime | None
    hourly_at: datetime | None
    daily_at: datetime | None
    changed_at: datetime | None
    parked_reason: str | None
    is_open_elsewhere: bool = False
    held: Mapping[datetime, Totals] = field(default_factory=dict)
    pending: tuple[datetime, ...] = ()
