"""Connections: one name, one organisation, one row, whatever people add, remove and add again."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime

import anyio
import pytest

from daemon.db.connections import Added, ConnectionStore, NewConnection
from daemon.db.pool import Database
from daemon.db.secrets import Keyring, Place, Sealed, credential_print
from daemon.db.tenants import TenantStore
from daemon.domain.connection import ConnectionId, Secret, TenantId
from daemon.domain.errors import ConfigError, ConflictError, CredentialError, ImportRefusedError, UsageError
from tests.books_kit import until

pytestmark = pytest.mark.anyio

OLD, NEW = b"o" * 32, b"n" * 32
URL = "https://api.openai.com/v1"


def connection(name: str = "main", key: str = "sk-admin-1", **more: object) -> NewConnection:
    given = {"tenant": "acme", "provider": "openai", "base_url": URL, **more}
    return NewConnection(name=name, credential=Secret(key), **given)  # type: ignore[arg-type]


@pytest.fixture
async def store(db: Database) -> ConnectionStore:
    await TenantStore(db).add("acme")
    return ConnectionStore(db, Keyring([OLD]), lambda _: {})


async def test_added_connection_opens_to_what_was_stored(store: ConnectionStore, db: Database) -> None:
    since = datetime(2026, 1, 2, tzinfo=UTC)
    added = await store.add(connection(settings={"api": "analytics"}, since=since, org_id="org-1"))
    stored = await store.get("acme", "main")
    assert (stored.id, stored.org_id, stored.since, stored.state) == (added.id, "org-1", since, "active")
    assert stored.target.credential == Secret("sk-admin-1")
    assert stored.target.settings == {"api": "analytics"}
    assert b"sk-admin-1" not in await db.fetchval("select credential from connection")


async def test_since_defaults_to_the_start_of_the_day_30_days_ago(store: ConnectionStore, db: Database) -> None:
    await store.add(connection())
    assert await db.fetchval("select since = date_trunc('day', now() - interval '30 days', 'UTC') from connection")


async def test_taken_name_is_refused(store: ConnectionStore) -> None:
    await store.add(connection())
    with pytest.raises(ConflictError, match=r"acme/main exists already; choose another name"):
        await store.add(connection(key="sk-admin-2"))


async def test_second_connection_to_one_organisation_is_refused_naming_the_first(store: ConnectionStore) -> None:
    await store.add(connection(org_id="org-1"))
    with pytest.raises(ConflictError, match=r"acme/main reads the same already.*--allow-duplicate"):
        await store.add(connection("other", "sk-admin-2", org_id="org-1"))
    assert (await store.add(connection("third", "sk-admin-3", org_id="org-2"))).is_revived is False
    await store.add(connection("other", "sk-admin-2", org_id="org-1"), allow_duplicate=True)


async def test_same_key_is_the_same_organisation_when_none_is_known(store: ConnectionStore) -> None:
    await store.add(connection())
    with pytest.raises(ConflictError, match="reads the same already"):
        await store.add(connection("other"))
    await store.add(connection("gateway", base_url="https://gateway.example/v1"))


@pytest.mark.parametrize(
    ("before", "again"),
    [
        pytest.param({"org_id": "org-1"}, {"name": "renamed", "key": "sk-2", "org_id": "org-1"}, id="organisation"),
        pytest.param({}, {"name": "renamed", "org_id": "org-1"}, id="key"),
    ],
)
async def test_archived_connection_is_revived_under_its_id(
    store: ConnectionStore, db: Database, before: dict[str, str], again: dict[str, str]
) -> None:
    """A second row would book everything a second time."""
    first = await store.add(connection(**before, settings={"api": "analytics"}))
    await db.execute(
        "insert into stream (tenant_id, connection_id, source, parked_reason) "
        "select tenant_id, id, 'costs', 'forbidden' from connection"
    )
    await store.remove("acme", "main")
    second = await store.add(connection(**again))
    assert (second.id, second.is_revived) == (first.id, True)
    revived = await store.get("acme", again.get("name", "main"))
    assert revived.target.credential == Secret(again.get("key", "sk-admin-1"))
    assert (revived.org_id, revived.state) == ("org-1", "active")
    assert revived.target.settings == {"api": "analytics"}
    assert await db.fetchval("select parked_reason from stream") is None


@pytest.mark.parametrize(("before", "again"), [({}, {}), ({"org_id": "org-1"}, {}), ({}, {"org_id": "org-1"})])
async def test_name_alone_revives_only_when_asked_to(
    store: ConnectionStore, before: dict[str, str], again: dict[str, str]
) -> None:
    """A stranger's answers would book what the first organisation has spent down to zero."""
    first = await store.add(connection(**before))
    await store.remove("acme", "main")
    new = connection(key="sk-2", **again)
    with pytest.raises(ConflictError, match=r"neither key nor organisation shows.*pass --revive if it is the same"):
        await store.add(new)
    with pytest.raises(ImportRefusedError, match=r"line 7: name: .*--revive"):
        await store.add_many([replace(new, line=7)])
    assert await store.add(new, revive=True) == Added(first.id, is_revived=True)


async def test_revival_that_is_asked_for_needs_the_name_and_no_other_organisation(store: ConnectionStore) -> None:
    await store.add(connection(org_id="org-1"))
    await store.remove("acme", "main")
    assert not (await store.add(connection("other", "sk-2"), revive=True)).is_revived
    for new in (connection(key="sk-3", org_id="org-2"), connection(key="sk-3", provider="anthropic")):
        with pytest.raises(ConflictError, match=r"archived connection of another account.*choose another name"):
            await store.add(new, revive=True)


async def test_name_of_another_archived_organisation_stays_with_its_bookings(store: ConnectionStore) -> None:
    await store.add(connection(org_id="org-1"))
    await store.remove("acme", "main")
    with pytest.raises(ConflictError, match="archived connection of another account"):
        await store.add(connection(key="sk-2", org_id="org-2"))


async def test_concurrent_adds_of_one_account_make_one_connection(store: ConnectionStore, db: Database) -> None:
    outcomes: list[str] = []

    async def add(name: str) -> None:
        try:
            await store.add(connection(name))
            outcomes.append("added")
        except ConflictError:
            outcomes.append("refused")

    async with anyio.create_task_group() as tasks:
        for n in range(6):
            tasks.start_soon(add, f"c{n}")
    assert sorted(outcomes) == ["added", *["refused"] * 5]
    assert await db.fetchval("select count(*) from connection") == 1


async def test_unknown_tenant_and_connection_are_named(store: ConnectionStore) -> None:
    with pytest.raises(UsageError, match=r"no tenant 'nobody'.*tallyd tenants add nobody"):
        await store.add(connection(tenant="nobody"))
    for act in (store.pause, store.resume, store.remove, store.get):
        with pytest.raises(UsageError, match="no connection acme/ghost"):
            await act("acme", "ghost")


async def test_pause_and_resume(store: ConnectionStore) -> None:
    await store.add(connection())
    await store.pause("acme", "main")
    assert [(c.state, c.state_reason) for c in await store.list()] == [("paused", "paused by an operator")]
    await store.resume("acme", "main")
    assert [(c.state, c.state_reason) for c in await store.list()] == [("active", None)]
    await store.remove("acme", "main")
    assert await store.list() == []
    assert [c.state for c in await store.list(with_archived=True)] == ["archived"]


async def test_new_credential_unparks_but_does_not_unpause(store: ConnectionStore, db: Database) -> None:
    await store.add(connection(org_id="org-1"))
    await db.execute("update connection set state = 'parked', state_reason = 'refused with 401'")
    await store.set_credential("acme", "main", Secret("sk-9"))
    assert [(c.state, c.state_reason) for c in await store.list()] == [("active", None)]
    await store.pause("acme", "main")
    await store.set_credential("acme", "main", Secret("sk-10"), org_id="org-1")
    stored = await store.get("acme", "main")
    assert (stored.state, stored.target.credential) == ("paused", Secret("sk-10"))
    with pytest.raises(ConflictError, match="organisation org-2"):
        await store.set_credential("acme", "main", Secret("sk-11"), org_id="org-2")


@pytest.mark.parametrize("change", ["resume", "set_credential", "set_settings"])
async def test_change_waits_for_a_flush_and_neither_blocks_the_other(
    store: ConnectionStore, db: Database, change: str
) -> None:
    """A flush locks streams, then connections: a change that went the other way round would meet it in the middle."""
    await store.add(connection())
    await db.execute(
        "insert into stream (tenant_id, connection_id, source, parked_reason)"
        " select tenant_id, id, 'costs', 'forbidden' from connection"
    )
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "resume": lambda: store.resume("acme", "main"),
        "set_credential": lambda: store.set_credential("acme", "main", Secret("sk-9")),
        "set_settings": lambda: store.set_settings("acme", "main", {"api": "analytics"}),
    }

    async def is_waiting() -> bool:
        return bool(await db.fetchval("select count(*) from pg_locks where not granted"))

    async with anyio.create_task_group() as tasks, db.transaction() as flush:
        await flush.execute("select from stream for update")
        tasks.start_soon(calls[change])
        await until(is_waiting, "the change waits for the flush")
        await flush.execute("select from connection for update")


async def test_ciphertext_swapped_between_rows_does_not_open(store: ConnectionStore, db: Database) -> None:
    await store.add(connection("a", "sk-a"))
    await store.add(connection("b", "sk-b"))
    await db.execute(
        "update connection set credential = (select credential from connection where name = 'a') where name = 'b'"
    )
    with pytest.raises(CredentialError, match="altered or belongs to another row"):
        await store.get("acme", "b")
    assert len(await store.unopenable()) == 1


async def test_rotation_reseals_everything_and_can_be_run_again(store: ConnectionStore, db: Database) -> None:
    for n in range(5):
        await store.add(connection(f"c{n}", f"sk-{n}"))
    await store.remove("acme", "c4")
    await db.execute("update connection set credential = '\\x00' where name = 'c2'")
    rotated = ConnectionStore(db, Keyring([NEW, OLD]), lambda _: {})
    report = await rotated.rotate(batch=2)
    assert report.resealed == 4
    assert len(report.failed) == 1
    assert "altered" in report.failed[0]
    assert (await rotated.rotate()).resealed == 0
    only_new = ConnectionStore(db, Keyring([NEW]), lambda _: {})
    assert (await only_new.get("acme", "c1")).target.credential == Secret("sk-1")
    with pytest.raises(ConfigError, match="add that key back"):
        await only_new.get("acme", "c2")
    archived = await db.fetchrow("select * from connection where name = 'c4'")
    assert archived is not None
    place = Place(TenantId(archived["tenant_id"]), ConnectionId(archived["id"]), "openai")
    assert Keyring([NEW]).open(Sealed(archived["credential_key_id"], archived["credential"]), place) == Secret("sk-4")


async def test_import_adds_thousands_with_their_tenants(store: ConnectionStore, db: Database) -> None:
    await store.add(connection("old", "sk-old"))
    await store.remove("acme", "old")
    news = [connection(f"c{n}", f"sk-{n}", tenant=f"t{n % 50}", line=n + 1) for n in range(3_000)]
    report = await store.add_many([*news, connection("old", "sk-old", line=3_001)])
    assert (report.added, report.revived) == (3_000, 1)
    assert await db.fetchval("select count(*) from tenant") == 51
    assert (await store.get("t7", "c2957")).target.credential == Secret("sk-2957")
    assert await db.fetchval("select count(distinct credential_print) from connection") == 3_001


async def test_import_with_bad_lines_stores_nothing_and_names_each(store: ConnectionStore, db: Database) -> None:
    await store.add(connection())
    before = await db.fetchval("select count(*) from connection")
    good = connection("fine", "sk-5", tenant="fresh", line=1)
    bad = [
        connection(key="sk-6", line=2),
        replace(good, name="a b", line=3),
        replace(good, line=4),
        replace(good, name="twin", line=5),
    ]
    with pytest.raises(ImportRefusedError) as caught:
        await store.add_many([good, *bad])
    assert [problem.split(":")[:2] for problem in caught.value.problems] == [
        ["line 2", " name"],
        ["line 3", " name"],
        ["line 4", " name"],
        ["line 5", " credential"],
    ]
    assert "fresh/fine (line 1) reads the same already" in caught.value.problems[3]
    assert await db.fetchval("select count(*) from connection") == before
    assert await db.fetchval("select count(*) from tenant where name = 'fresh'") == 0
    with pytest.raises(ImportRefusedError, match="line 9: tenant"):
        await store.add_many([replace(good, tenant="no/good", line=9)])


def test_print_is_of_provider_and_key() -> None:
    assert credential_print("openai", Secret("x")) != credential_print("anthropic", Secret("x"))
