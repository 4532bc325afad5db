"""URL groups: one name for many endpoints. A message to a group is one message to each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import msgspec

from daemon.db.pool import Database, Executor, Record, Session, query
from daemon.domain.account import AccountId, Limits
from daemon.domain.errors import QuotaError
from daemon.queue.message import Headers

_OF = query("group_of")
_LIST = query("group_list")
_ACCOUNT_LOCK = query("account_lock")
_COUNT = query("group_count")
_LOCK = query("group_lock")
_ADD = query("group_add")
_TOUCH = query("group_touch")
_HEADERS = query("group_headers")
_DELETE = query("group_delete")
_DELETE_EMPTY = query("group_delete_empty")
_PUT = query("endpoint_put")
_ENDPOINT_COUNT = query("endpoint_count")
_REMOVE = query("endpoint_remove")

_encode = msgspec.json.Encoder().encode
_decode_headers = msgspec.json.Decoder(dict[str, list[str]]).decode


class Endpoint(NamedTuple):
    """Its key in the group is its name, or its URL where it has none."""

    url: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """A group with its endpoints in the order in which they were added.

    Attributes:
        headers: for every publish to the group that does not have them itself.
    """

    name: str
    endpoints: tuple[Endpoint, ...]
    headers: Headers
    created_at: datetime
    updated_at: datetime


class TooManyGroupsError(QuotaError):
    """The account has as many groups as it may."""

    def __init__(self, most: int) -> None:
        super().__init__("urlGroup", f"quota maxUrlGroups exceeded, current limit: {most}", "delete a group first")


class TooManyEndpointsError(QuotaError):
    """The group would have more endpoints than it may; none was added."""

    def __init__(self, most: int) -> None:
        super().__init__(
            "endpoints", f"quota maxEndpointsPerUrlGroup exceeded, current limit: {most}", "remove an endpoint first"
        )


class Groups:
    def __init__(self, db: Database) -> None:
        self._db = db

    async def get(self, account: AccountId, name: str) -> Group | None:
        return await endpoints_of(self._db, account, name)

    async def list(self, account: AccountId) -> list[Group]:
        """By name."""
        return [_group(row) for row in await self._db.fetch(_LIST, account)]

    async def upsert_endpoints(
        self, account: AccountId, name: str, endpoints: Sequence[Endpoint], limits: Limits
    ) -> None:
        """Add endpoints, or change those with the same keys, which keep their places. Makes the group if need be.

        Of several with one key the last one counts. Without any nothing happens.

        Raises:
            TooManyGroupsError, TooManyEndpointsError: nothing was done.
        """
        if not endpoints:
            return
        by_key = {endpoint.name or endpoint.url: endpoint for endpoint in endpoints}
        async with self._db.transaction() as tx:
            group = await self._made(tx, account, name, limits)
            names = [endpoint.name or None for endpoint in by_key.values()]
            await tx.execute(_PUT, group, [*by_key], names, [endpoint.url for endpoint in by_key.values()])
            if await tx.fetchval(_ENDPOINT_COUNT, group) > limits.endpoints:
                raise TooManyEndpointsError(limits.endpoints)
            await tx.execute(_TOUCH, group)

    async def remove_endpoints(
        self, account: AccountId, name: str, endpoints: Sequence[tuple[str | None, str | None]]
    ) -> bool:
        """Remove endpoints, and the group with its last one; those that it does not have are no error.

        Args:
            endpoints: (url, name). With a name, the one of that name; without, whichever has the URL.

        Returns:
            False when there is no such group.
        """
        async with self._db.transaction() as tx:
            group = await tx.fetchval(_LOCK, account, name)
            if group is None:
                return False
            await tx.execute(_REMOVE, group, [name or None for _, name in endpoints], [url for url, _ in endpoints])
            await tx.execute(_TOUCH, group)
            await tx.execute(_DELETE_EMPTY, group)
        return True

    async def set_headers(self, account: AccountId, name: str, headers: Headers) -> bool:
        """Replace the default headers. False when there is no such group."""
        return await self._db.fetchval(_HEADERS, account, name, _encode(headers).decode()) is not None

    async def delete(self, account: AccountId, name: str) -> bool:
        """False when there is no such group."""
        return await self._db.fetchval(_DELETE, account, name) is not None

    async def _made(self, tx: Session, account: AccountId, name: str, limits: Limits) -> int:
        """The group's id, locked."""
        group: int | None = await tx.fetchval(_LOCK, account, name)
        while group is None:
            await tx.fetchval(_ACCOUNT_LOCK, account)
            if await tx.fetchval(_COUNT, account, name) >= limits.groups:
                raise TooManyGroupsError(limits.groups)
            await tx.execute(_ADD, account, name)
            group = await tx.fetchval(_LOCK, account, name)
        return group


async def endpoints_of(db: Executor, account: AccountId, name: str) -> Group | None:
    """What a publish to a group needs, in the caller's transaction or by itself. None: there is no such group."""
    row = await db.fetchrow(_OF, account, name)
    return None if row is None else _group(row)


def _group(row: Record) -> Group:
    return Group(
        row["name"],
        tuple(Endpoint(url, name) for url, name in zip(row["urls"] or (), row["names"] or (), strict=True)),
        _decode_headers(row["headers"]),
        row["created_at"],
        row["updated_at"],
    )
