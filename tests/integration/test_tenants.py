import pytest

from daemon.db.connections import ConnectionStore, NewConnection
from daemon.db.pool import Database
from daemon.db.secrets import Keyring
from daemon.db.tenants import TenantStore
from daemon.domain.connection import Secret
from daemon.domain.errors import ConflictError, UsageError

pytestmark = pytest.mark.anyio


async def test_taken_name_is_refused(db: Database) -> None:
    tenants = TenantStore(db)
    await tenants.add("acme")
    with pytest.raises(ConflictError, match="tenant acme exists already"):
        await tenants.add("acme")


@pytest.mark.parametrize("name", ["", " acme", "a/b", "x" * 101, "-a", "a\0b", "a\n"])
async def test_name_that_cannot_be_is_refused(db: Database, name: str) -> None:
    with pytest.raises(UsageError, match="is no name for a tenant"):
        await TenantStore(db).add(name)


async def test_removed_tenant_takes_its_connections_along_and_comes_back_as_itself(db: Database) -> None:
    tenants, connections = TenantStore(db), ConnectionStore(db, Keyring([b"k" * 32]), lambda _: {})
    first = await tenants.add("acme")
    new = NewConnection("acme", "main", "openai", "https://api.openai.com/v1", Secret("sk-1"))
    added = await connections.add(new)
    await tenants.remove("acme")
    assert await tenants.list() == []
    assert [t.name for t in await tenants.list(with_removed=True)] == ["acme"]
    with pytest.raises(UsageError, match="no tenant 'acme'"):
        await connections.add(new)
    with pytest.raises(UsageError, match="no tenant 'acme'"):
        await tenants.remove("acme")
    assert await tenants.add("acme") == first
    again = await connections.add(new)
    assert (again.id, again.is_revived) == (added.id, True)
    assert [(t.name, t.connections) for t in await tenants.list()] == [("acme", 1)]
