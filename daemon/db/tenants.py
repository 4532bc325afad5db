"""The tenants."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from daemon.db.pool import Database, query
from daemon.domain.connection import TenantId
from daemon.domain.errors import ConflictError, DataRejectedError, UsageError

_ADD = query("tenant_add")
_LIST = query("tenant_list")
_REMOVE = query("tenant_remove")
_ARCHIVE_CONNECTIONS = query("tenant_archive_connections")

NAME_RULE = "use 1 to 100 letters, digits, dots, dashes and underscores, a letter or digit first"


@dataclass(frozen=True, slots=True)
class Tenant:
    id: TenantId
    name: str
    created_at: datetime
    removed_at: datetime | None
    connections: int


class TenantStore:
    def __init__(self, db: Database) -> None:
        self._db = db

    async def add(self, name: str) -> TenantId:
        """Add a tenant, or bring a removed one back under its old id.

        Raises:
            ConflictError: the name is taken.  UsageError: it is no name.
        """
        try:
            tenant_id: int | None = await self._db.fetchval(_ADD, name)
        except DataRejectedError as error:
            raise UsageError("NAME", f"{name!r} is no name for a tenant", NAME_RULE) from error
        if tenant_id is None:
            raise ConflictError(f"NAME: tenant {name} exists already; choose another name")
        return TenantId(tenant_id)

    async def list(self, *, with_removed: bool = False) -> list[Tenant]:
        """By name, each with the number of its connections that are not archived."""
        return [Tenant(**row) for row in await self._db.fetch(_LIST, with_removed)]

    async def remove(self, name: str) -> TenantId:
        """Archive the tenant and its connections; what was booked stays."""
        async with self._db.transaction() as tx:
            tenant_id: int | None = await tx.fetchval(_REMOVE, name)
            if tenant_id is None:
                raise UsageError("NAME", f"there is no tenant {name!r}", "see `tallyd tenants list`")
            await tx.execute(_ARCHIVE_CONNECTIONS, tenant_id)
        return TenantId(tenant_id)
