"""What the resources of `/v2` work with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from daemon.db.accounts import AccountStore
from daemon.domain.account import Limits
from daemon.domain.destination import Destination
from daemon.domain.errors import DataRejectedError, UsageError
from daemon.queue.gates import Gates
from daemon.queue.groups import Groups
from daemon.queue.letters import Letters
from daemon.queue.logs import Logs
from daemon.queue.message import Publication, Published
from daemon.queue.pending import Pending
from daemon.queue.schedules import Schedules

Publish = Callable[[tuple[Limits, Sequence[Publication]]], Awaitable[list[Published] | UsageError | DataRejectedError]]


@dataclass(frozen=True, slots=True)
class Services:
    """One set for the process.

    Attributes:
        publish: stores what one call publishes, as a whole or not at all; calls that come together share a transaction.
        check: whether a destination may be reached at all.
    """

    accounts: AccountStore
    publish: Publish
    check: Callable[[Destination], Awaitable[None]]
    gates: Gates
    groups: Groups
    schedules: Schedules
    logs: Logs
    letters: Letters
    pending: Pending
