"""Who publishes messages, and within which limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NewType

from daemon.domain.errors import UsageError

AccountId = NewType("AccountId", int)


@dataclass(frozen=True, slots=True)
class Limits:
    """What an account may ask for. The defaults are QStash's pay-as-you-go plan.

    Attributes:
        message_bytes, batch_bytes: of one body, and of a whole batch call.
        delay_s, timeout_s: of a message; of one attempt to deliver it.
        retries: after the first try.
        parallelism_max: of a queue or a flow-control key.
        parallelism: deliveries of the whole account in flight at once; None: without a limit.
        dedup_s: how long a deduplication id counts.
    """

    message_bytes: int = 10 << 20
    batch_bytes: int = 100 << 20
    delay_s: int = 366 * 86_400
    timeout_s: int = 7_200
    retries: int = 5
    schedules: int = 1_000
    queues: int = 100
    groups: int = 100
    endpoints: int = 100
    parallelism_max: int = 200
    parallelism: int | None = None
    dedup_s: int = 600


LIMIT_NAMES = tuple(field.name for field in dataclasses.fields(Limits))
_MAY_BE_NONE = frozenset({"delay_s", "retries", "schedules", "queues", "groups"})


def check_limits(limits: Mapping[str, int]) -> None:
    """Raises UsageError naming the first limit that is not known, or so low that nothing could be published."""
    for name, value in limits.items():
        if name not in LIMIT_NAMES:
            raise UsageError("limit", f"{name!r} is not known", f"choose of {', '.join(sorted(LIMIT_NAMES))}")
        least = 0 if name in _MAY_BE_NONE else 1
        if value < least:
            raise UsageError("limit", f"{name}={value} is too low", f"give at least {least}")


@dataclass(frozen=True, slots=True)
class Account:
    """A tenant of the queue: its ids, names and limits are its own."""

    id: AccountId
    name: str
    limits: Limits


@dataclass(frozen=True, slots=True)
class SigningKeys:
    """What deliveries are signed with, and what they will be signed with after a rotation."""

    current: str
    next: str
