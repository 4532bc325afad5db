"""URL groups: what a publish to a name goes to."""

import anyio
import pytest

from daemon.db.pool import Database
from daemon.domain.account import AccountId, Limits
from daemon.queue.groups import Endpoint, Groups, TooManyEndpointsError, TooManyGroupsError, endpoints_of
from tests.message_kit import add_account

pytestmark = pytest.mark.anyio

A, B, C = (f"https://{name}.example/x" for name in "abc")


@pytest.fixture
async def account(db: Database) -> AccountId:
    return await add_account(db)


@pytest.fixture
def groups(db: Database) -> Groups:
    return Groups(db)


async def urls(groups: Groups, account: AccountId, name: str = "g") -> list[tuple[str, str | None]]:
    group = await groups.get(account, name)
    return [] if group is None else [tuple(endpoint) for endpoint in group.endpoints]


async def test_endpoints_keep_the_order_in_which_they_were_added(groups, account) -> None:
    await groups.upsert_endpoints(account, "g", [Endpoint(C), Endpoint(A, "first")], Limits())
    await groups.upsert_endpoints(account, "g", [Endpoint(B), Endpoint(C)], Limits())
    assert await urls(groups, account) == [(C, None), (A, "first"), (B, None)]


async def test_endpoint_is_known_by_its_name_and_else_by_its_url(groups, account) -> None:
    await groups.upsert_endpoints(account, "g", [Endpoint(A, "n"), Endpoint(B)], Limits())
    await groups.upsert_endpoints(account, "g", [Endpoint(C, "n"), Endpoint(B), Endpoint(B, "other")], Limits())
    assert await urls(groups, account) == [(C, "n"), (B, None), (B, "other")]


async def test_of_one_key_given_twice_the_last_counts(groups, account) -> None:
    await groups.upsert_endpoints(account, "g", [Endpoint(A, "n"), Endpoint(B, "n")], Limits())
    assert await urls(groups, account) == [(B, "n")]


async def test_nothing_to_add_makes_no_empty_group(groups, account) -> None:
    await groups.upsert_endpoints(account, "g", [], Limits())
    assert await groups.get(account, "g") is None


async def test_last_endpoint_takes_the_group_with_it(groups, account) -> None:
    await groups.upsert_endpoints(account, "g", [Endpoint(A, "n"), Endpoint(B), Endpoint(C, "c")], Limits())
    assert await groups.remove_endpoints(account, "g", [(None, "n"), ("https://unknown.example", None)])
    assert await urls(groups, account) == [(B, None), (C, "c")]
    assert await groups.remove_endpoints(account, "g", [(B, None), (C, None)]), "a URL finds a named one too"
    assert await groups.list(account) == []
    assert not await groups.remove_endpoints(account, "g", [(B, None)])


async def test_name_that_is_given_with_a_url_decides(groups, account) -> None:
    await groups.upsert_endpoints(account, "g", [Endpoint(A, "n"), Endpoint(A)], Limits())
    await groups.remove_endpoints(account, "g", [(A, "n")])
    assert await urls(groups, account) == [(A, None)]


async def test_headers_are_replaced_and_time_moves(groups, account) -> None:
    await groups.upsert_endpoints(account, "g", [Endpoint(A)], Limits())
    before = await groups.get(account, "g")
    assert await groups.set_headers(account, "g", {"X-A": ["1"], "X-B": ["2", "3"]})
    assert await groups.set_headers(account, "g", {"X-B": ["4"]})
    after = await groups.get(account, "g")
    assert after.headers == {"X-B": ["4"]}
    assert after.created_at == before.created_at
    assert after.updated_at > before.updated_at
    assert not await groups.set_headers(account, "none", {})


async def test_limits_refuse_the_whole_call(groups, account) -> None:
    limits = Limits(groups=1, endpoints=2)
    await groups.upsert_endpoints(account, "g", [Endpoint(A), Endpoint(B)], limits)
    with pytest.raises(TooManyEndpointsError, match="2"):
        await groups.upsert_endpoints(account, "g", [Endpoint(B, "new"), Endpoint(C)], limits)
    assert await urls(groups, account) == [(A, None), (B, None)]
    await groups.upsert_endpoints(account, "g", [Endpoint(A), Endpoint(B)], limits)
    with pytest.raises(TooManyGroupsError, match="1"):
        await groups.upsert_endpoints(account, "h", [Endpoint(A)], limits)


async def test_of_many_who_make_the_last_group_at_once_one_does(groups, account) -> None:
    made, refused = [], []

    async def make(name: str) -> None:
        try:
            await groups.upsert_endpoints(account, name, [Endpoint(A)], Limits(groups=1))
            made.append(name)
        except TooManyGroupsError:
            refused.append(name)

    async with anyio.create_task_group() as tasks:
        for number in range(6):
            tasks.start_soon(make, f"g{number}")
    assert (len(made), len(refused)) == (1, 5)


async def test_adding_and_removing_at_once_loses_no_endpoint(groups, account) -> None:
    """The group may vanish with its last endpoint between an adder's look and its insert."""

    async def add(number: int) -> None:
        await groups.upsert_endpoints(account, "g", [Endpoint(f"https://{number}.example")], Limits())

    async def remove() -> None:
        await groups.remove_endpoints(account, "g", [(A, None)])

    for _ in range(5):
        await groups.delete(account, "g")
        await groups.upsert_endpoints(account, "g", [Endpoint(A)], Limits())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(remove)
            tasks.start_soon(add, 1)
            tasks.start_soon(add, 2)
        assert sorted(await urls(groups, account)) == [("https://1.example", None), ("https://2.example", None)]


async def test_account_sees_only_its_own(groups, account, db) -> None:
    other = await add_account(db, "b")
    await groups.upsert_endpoints(account, "g", [Endpoint(A)], Limits())
    assert await groups.get(other, "g") is None
    assert await groups.list(other) == []
    assert not await groups.delete(other, "g")
    assert not await groups.set_headers(other, "g", {})
    assert not await groups.remove_endpoints(other, "g", [(A, None)])
    assert await endpoints_of(db, other, "g") is None
    assert await groups.delete(account, "g")
    assert not await groups.delete(account, "g")
    assert await db.fetchval("select count(*) from endpoint") == 0


async def test_publish_finds_the_group_in_its_own_transaction(groups, account, db) -> None:
    await groups.upsert_endpoints(account, "g", [Endpoint(A), Endpoint(B)], Limits())
    async with db.transaction() as tx:
        group = await endpoints_of(tx, account, "g")
    assert [endpoint.url for endpoint in group.endpoints] == [A, B]
