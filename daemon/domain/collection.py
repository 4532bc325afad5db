"""What a source may hold besides reports of time: things that are there now, each under a key of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, NamedTuple

NameKind = Literal["project", "workspace", "team", "api_key", "user"]


class Name(NamedTuple):
    """What people call something whose id stands in a report's dimension of that kind.

    Attributes:
        id: exactly as the reports have it.
    """

    kind: NameKind
    id: str
    name: str


class Counter(NamedTuple):
    """One quota counter as it stands.

    Attributes:
        key: the whole key in its store.
        user, tenant, period: the named parts of the key, where its pattern has them.
        value: exact, as the store holds it.
        detail: canonical JSON of what else the key holds, such as a limit beside the count.
    """

    key: str
    user: str | None
    tenant: str | None
    period: str | None
    value: Decimal
    detail: bytes = b"{}"


class Listed(NamedTuple):
    """One resource as its collection lists it. `version` is None where the list does not tell."""

    id: str
    version: str | None


Item = Name | Counter | Listed


@dataclass(frozen=True, slots=True)
class Collected:
    """Some of a collection's items, in the order in which they came; the same key may come twice.

    Attributes:
        digest: of the collection as a whole, kept once it has been read to its end, and handed to the next reading.
        is_restored: what holds the collection is another one than at the last reading: a server that was started from
            a snapshot, or took over. What fell was not used up again.
        unread: kinds of names that were not read as a whole, because the provider does not show them to this key or
            does not have them: what is stored of them, and was not met, is not gone. It may come with no items at all.
        skipped: how many items beside these could not be read for what they are.
    """

    items: Sequence[Item]
    digest: bytes | None = None
    is_restored: bool = False
    unread: frozenset[NameKind] = frozenset()
    skipped: int = 0
