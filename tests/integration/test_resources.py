"""Collections over sockets: which calls are made, what is written, and what becomes of failures and crashes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import anyio
import msgspec
import pytest

from daemon.app import App, NewConnection, open_app
from daemon.by_hand import SyncReport, sync_resources
from daemon.config import load
from daemon.db import resources as store
from daemon.db.pool import Database
from daemon.domain.connection import ConnectionId, Secret, TenantId
from daemon.domain.errors import LeaseLostError, PermanentError, StorageUnavailableError
from daemon.domain.job import Cancelled, Completed, Discarded, Job, NewJob, Outcome, Retryable, Settlement, Snoozed
from daemon.pollers.http_resource import PROVIDER
from daemon.worker.caller import RetrySettings
from daemon.worker.poll import PollSettings
from daemon.worker.resources import OUTAGE_IDS, RESOURCES, ResourceOrder, run_resources
from tests.books_kit import SECRET_KEY, with_deps
from tests.resource_stand_in import SECRET, Answer, Api, Ask, Server, exiting, serving

pytestmark = pytest.mark.anyio

LIST = {
    "path": "/orders",
    "params": {"fields": "id,updated_at", "limit": 500},
    "items": "data",
    "version": "updated_at",
    "paging": {"kind": "cursor", "param": "cursor", "next": "meta.next"},
}
UNVERSIONED = {**LIST, "params": {"fields": "id", "limit": 500}, "version": None}
DETAIL = {"path": "/orders/{id}"}
CHECK = {"path": "/orders/{id}", "params": {"fields": "updated_at"}, "version": "field", "field": "updated_at"}
MANY = {
    "path": "/orders", "params": {"fields": "id,updated_at"}, "ids_param": "ids", "items": "data",
    "version": "field", "field": "updated_at",
}  # fmt: skip


@dataclass
class Place:
    """An app in this process beside an API on a socket, with one collection."""

    app: App
    server: Server
    settings: dict[str, Any]
    connection: ConnectionId

    @property
    def api(self) -> Api:
        return self.server.api

    @property
    def db(self) -> Database:
        return self.app.db

    async def sync(self) -> SyncReport:
        return await sync_resources(self.app, None, None)

    async def list_only(self) -> list[Job]:
        """List, and claim what that leaves to be read."""
        await self.app.poll([self.connection], full=False)
        return await self.claim()

    async def claim(self, worker: int | None = None) -> list[Job]:
        worker = await self.app.jobs.register_worker("test")
        jobs: list[Job] = []
        while found := (await self.app.jobs.claim(worker, 1_000)).jobs:
            jobs += found
        return jobs

    async def run(self, job: Job) -> Outcome:
        return await run_resources(job, self.app.resource_deps)

    async def due_now(self) -> list[Job]:
        """What waits for its time, as if that had come."""
        await self.db.execute("update due set run_at = now()")
        await self.app.jobs.promote()
        return await self.claim()

    async def set(self, **changes: Any) -> None:
        self.settings = {**self.settings, **changes}
        await self.db.execute("update connection set settings = $1::jsonb", msgspec.json.encode(self.settings).decode())

    async def stored(self) -> dict[str, tuple[str, dict[str, Any], bool]]:
        rows = await self.db.fetch("select id, version, content, gone_at is not null as is_gone from resource")
        return {row["id"]: (row["version"], msgspec.json.decode(row["content"]), row["is_gone"]) for row in rows}

    async def assert_equal(self, *, but: frozenset[str] = frozenset()) -> None:
        """What is stored and there, is what the API has."""
        held = {id_: content for id_, (_, content, is_gone) in (await self.stored()).items() if not is_gone}
        truth = {id_: self.api.resource(id_) for id_ in self.api.versions if id_ not in but}
        assert {id_: content for id_, content in held.items() if id_ not in but} == truth

    async def letters(self) -> list[str]:
        return [row["reason"] for row in await self.db.fetch("select reason from dead order by id")]


@asynccontextmanager
async def a_place(database_url: str, server: Server, settings: Mapping[str, Any], **flags: Any) -> AsyncIterator[Place]:
    chosen = load({"database_url": database_url, "secret_key": SECRET_KEY, "http_read_timeout_s": 5, **flags}, {})
    async with open_app(chosen) as app:
        retry = RetrySettings(tries=3, budget_s=20.0, wait_initial_s=0.01, wait_max_s=0.02)
        await app.tenants.add("acme")
        own = msgspec.json.decode(msgspec.json.encode({"every_s": 3_600, "detail": DETAIL, **settings}))
        app.check_settings(PROVIDER, own)
        new = NewConnection("acme", "orders", PROVIDER, server.url, Secret(SECRET), None, own)
        added = await app.connections.add(new)
        yield Place(with_deps(app, settings=PollSettings(retry=retry)), server, own, added.id)


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests wait for the end of a sync, some several times."""
    monkeypatch.setattr("daemon.app.WATCH_S", 0.02)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving(Api(250)) as opened:
        yield opened


@pytest.fixture
async def place(database_url: str, server: Server) -> AsyncIterator[Place]:
    async with a_place(database_url, server, {"list": LIST}) as opened:
        yield opened


# ── Which calls are made ────────────────────────────────────────────────────────────────────────


async def test_what_the_list_tells_unchanged_is_not_asked_for(place: Place) -> None:
    first = await place.sync()
    assert (first.resources, first.changed, first.unchanged, first.batches) == (250, 250, 0, 3)
    assert dict(place.api.asked) == {"list": 1, "detail": 250}
    await place.assert_equal()
    place.api.change("r7", "r201")
    place.api.forget_counts()
    second = await place.sync()
    assert (second.changed, second.unchanged, second.failed, second.gone) == (2, 248, 0, 0)
    assert (second.calls, second.calls_saved) == (3, 497)
    assert dict(place.api.asked) == {"list": 1, "detail": 2}
    assert place.api.by_id.keys() == {"r7", "r201"}
    await place.assert_equal()


@pytest.mark.parametrize(
    ("server_pages", "paging", "lists"),
    [
        ("cursor", {"kind": "cursor", "param": "cursor", "next": "meta.next"}, 3),
        ("none", {"kind": "page", "param": "page"}, 4),
        ("none", {"kind": "offset", "param": "offset"}, 4),
        ("link", {"kind": "link"}, 3),
        ("url", {"kind": "link", "next": "meta.next"}, 3),
    ],
    ids=["cursor", "page", "offset", "link header", "link in the body"],
)
async def test_every_kind_of_paging_is_read_to_its_end(
    database_url: str, server: Server, server_pages: str, paging: dict[str, Any], lists: int
) -> None:
    server.api.paging = server_pages
    listing = {**LIST, "params": {"fields": "id,updated_at", "limit": 100}, "paging": paging}
    async with a_place(database_url, server, {"list": listing}) as place:
        assert (await place.sync()).changed == 250
        assert place.api.asked["list"] == lists
        await place.assert_equal()


WAYS_PAGE = 200
WAYS = {
    "listed": ({"list": LIST}, lambda n, changed: {"list": -(-n // WAYS_PAGE), "detail": changed}),
    "one by one": (
        {"list": UNVERSIONED, "check": CHECK},
        lambda n, changed: {"list": -(-n // WAYS_PAGE), "check": n, "detail": changed},
    ),
    "many at once": (
        {"list": UNVERSIONED, "check": MANY},
        lambda n, changed: {"list": -(-n // WAYS_PAGE), "ids": -(-n // 100), "detail": changed},
    ),
    "conditional by etag": (
        {"list": UNVERSIONED, "check": {"version": "etag", "conditional": True}},
        lambda n, _: {"list": -(-n // WAYS_PAGE), "detail": n},
    ),
    "conditional by date": (
        {"list": UNVERSIONED, "check": {"version": "last_modified", "conditional": True}},
        lambda n, _: {"list": -(-n // WAYS_PAGE), "detail": n},
    ),
    "conditional check": (
        {"list": UNVERSIONED, "check": {"path": "/orders/{id}", "params": {"fields": "id"}, "version": "etag", "conditional": True}},
        lambda n, changed: {"list": -(-n // WAYS_PAGE), "check": n, "detail": changed},
    ),
    "digest of a check": (
        {"list": UNVERSIONED, "check": {"path": "/orders/{id}", "params": {"fields": "total"}, "version": "digest"}},
        lambda n, changed: {"list": -(-n // WAYS_PAGE), "check": n, "detail": changed},
    ),
    "digest of the content": ({"list": UNVERSIONED}, lambda n, _: {"list": -(-n // WAYS_PAGE), "detail": n}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
async def test_calls_of_a_second_run_with_73_percent_unchanged(database_url: str, way: str) -> None:
    """The published case at a hundredth of its size: 300 resources, for which the naive program makes 600 calls."""
    count = 300
    changed = count * 27 // 100
    settings, calls = WAYS[way]
    listing = settings["list"]
    settings = {**settings, "list": {**listing, "params": {**listing["params"], "limit": WAYS_PAGE}}}
    async with serving(Api(count)) as server, a_place(database_url, server, settings) as place:
        first = await place.sync()
        assert (first.resources, first.changed, first.failed, first.batches) == (count, count, 0, count // 100)
        await place.assert_equal()
        place.api.change(*(f"r{n}" for n in range(count) if n % 100 < 27))
        place.api.forget_counts()
        second = await place.sync()
        assert (second.resources, second.changed, second.unchanged) == (count, changed, count - changed)
        assert dict(place.api.asked) == calls(count, changed)
        assert second.calls == place.api.calls
        each = 1 if way == "digest of the content" else 2
        assert second.calls_saved == max(0, each * count - second.calls)
        if way.startswith("conditional by"):
            assert place.api.bodies == changed
        await place.assert_equal()
        assert await place.db.fetchval("select count(*) from resource where revision = 2") == changed


async def test_ten_batches_write_a_thousand_rows_in_ten_statements(database_url: str) -> None:
    async with serving(Api(1_000)) as server, a_place(database_url, server, {"list": LIST}) as place:
        await place.app.poll([place.connection], full=False)
        written: list[int] = []
        write = store.write

        async def counting(*arguments: Any) -> store.Written:
            written.append(len(arguments[4]))
            return await write(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "write", counting)
            for job in await place.claim():
                assert await place.run(job) == Completed(is_settled=True)
        assert written == [100] * 10
        await place.assert_equal()


async def test_only_declared_fields_are_kept_and_numbers_stay_exact(database_url: str, server: Server) -> None:
    server.api.contents["r0"] = {"price": 0, "meta": {"a": 1, "b": 2}}
    server.api.faults.append(
        lambda ask: (
            Answer(200, raw=b'{"price": 0.10000000000000000005, "big": 123456789012345678901234567890}')
            if ask.path == "/orders/r1"
            else None
        )
    )
    detail = {**DETAIL, "fields": ["id", "meta.a", "price", "big"]}
    async with a_place(database_url, server, {"list": LIST, "detail": detail}) as place:
        await place.sync()
        assert (await place.stored())["r0"][1] == {"id": "r0", "meta": {"a": 1}, "price": 0}
        text = await place.db.fetchval("select content::text from resource where id = 'r1'")
        assert text == '{"big": 123456789012345678901234567890, "price": 0.10000000000000000005}'


async def test_ids_of_any_kind_are_asked_for_as_they_are_and_dots_not_at_all(place: Place) -> None:
    odd = ["a/b", "ä ö", "100%", "x?y#z", "..", ".", "", "\u0007", "a" * 501, "-", "~", "[2]", "%2e%2e"]
    place.api.versions = dict.fromkeys(odd, 1)
    report = await place.sync()
    assert report.changed == len(odd) - 5
    assert set(await place.stored()) == set(odd) - {"..", ".", "", "\u0007", "a" * 501}


# ── What is gone ────────────────────────────────────────────────────────────────────────────────


async def test_what_a_whole_listing_does_not_hold_is_gone_and_may_come_back(place: Place) -> None:
    await place.sync()
    version = place.api.versions.pop("r9")
    report = await place.sync()
    assert (report.gone, report.changed, report.failed) == (1, 0, 0)
    assert (await place.stored())["r9"][2]
    assert (await place.sync()).gone == 0
    place.api.versions["r9"] = version
    assert (await place.sync()).changed == 1
    await place.assert_equal()


@pytest.mark.parametrize("left", [0, 100])
async def test_a_list_that_lost_most_is_believed_at_the_second_time(place: Place, left: int) -> None:
    await place.sync()
    whole = dict(place.api.versions)
    place.api.versions = dict(list(whole.items())[:left])
    assert (await place.sync()).gone == 0
    (run,) = await place.app.resource_runs(None, None)
    assert run.withheld == 250 - left
    place.api.versions = dict(whole)
    assert (await place.sync()).changed == 0, "nothing had happened"
    place.api.versions = dict(list(whole.items())[:left])
    assert (await place.sync()).gone == 0
    assert (await place.sync()).gone == 250 - left
    await place.assert_equal()


@pytest.mark.parametrize("status", [404, 410])
async def test_a_resource_that_is_not_found_is_gone_and_no_error(place: Place, status: int) -> None:
    await place.sync()
    place.api.change("r3")
    place.api.faults.append(lambda ask: Answer(status) if ask.path == "/orders/r3" else None)
    report = await place.sync()
    assert (report.gone, report.failed) == (1, 0)
    assert [id_ for id_, (_, _, is_gone) in (await place.stored()).items() if is_gone] == ["r3"]


async def test_a_path_under_which_nothing_is_found_makes_nothing_gone_at_once(place: Place) -> None:
    await place.sync()
    place.api.change(*place.api.versions)
    place.api.faults.append(lambda ask: Answer(404) if ask.path.startswith("/orders/") else None)
    report = await place.sync()
    assert (report.gone, report.failed) == (0, 250)
    place.api.faults.clear()
    for job in await place.due_now():
        await place.run(job)
    await place.assert_equal()


async def test_a_resource_read_after_the_listing_began_is_not_gone_on_its_word(place: Place) -> None:
    """Its page had been passed when it was made; a batch of another run has read it meanwhile."""
    await place.sync()
    (job,) = await place.app.jobs.enqueue_leased(
        [NewJob(RESOURCES, ResourceOrder(place.connection, ["late"]).encode())],
        await place.app.jobs.register_worker("test"),
    )
    place.api.gate.clear()
    place.api.wanted = 1
    async with anyio.create_task_group() as group:
        group.start_soon(place.sync)
        await place.api.filled.wait()  # the listing has its number
        place.api.gate.set()
        listed = dict(place.api.versions)
        place.api.faults.append(
            lambda ask: (
                Answer(200, {"data": [{"id": id_, "updated_at": 1} for id_ in listed]})
                if ask.path == "/orders"
                else None
            )
        )
        place.api.versions["late"] = 1
        await place.run(job)
    assert not (await place.stored())["late"][2]


# ── Incremental lists, and APIs without one ─────────────────────────────────────────────────────


async def test_since_asks_for_what_changed_and_takes_nothing_for_gone(database_url: str, server: Server) -> None:
    listing = {**LIST, "since": {"param": "since"}}
    async with a_place(database_url, server, {"list": listing}) as place:
        await place.sync()
        place.api.change("r5")
        del place.api.versions["r6"]
        place.api.forget_counts()
        place.api.keeps_asks = True
        report = await place.sync()
        assert (report.changed, report.gone) == (1, 0)
        assert [ask.query.get("since") for ask in place.api.asks if ask.path == "/orders"] == ["1790000001"]
        place.api.asks.clear()
        assert (await place.sync()).resources == 1
        assert [ask.query.get("since") for ask in place.api.asks if ask.path == "/orders"] == ["1790000002"]
        place.api.versions.clear()
        assert (await place.sync()).gone == 0, "an empty answer to since says nothing"
        await place.set(list={**listing, "since": {"param": "since", "full_every": "0s"}})
        place.api.versions = {f"r{n}": 1 for n in range(250) if n != 6} | {"r5": 2}
        report = await place.sync()
        assert (report.resources, report.gone) == (249, 1)


@pytest.mark.parametrize("page", [2, 500])
async def test_since_in_a_header_is_a_conditional_call_for_the_whole_list(
    database_url: str, server: Server, page: int
) -> None:
    listing = {**LIST, "params": {**LIST["params"], "limit": page}}
    listing["since"] = {"header": "If-Modified-Since", "http_date": True}
    server.api.versions = {f"r{n}": 1 for n in range(7)}
    async with a_place(database_url, server, {"list": listing}) as place:
        place.api.keeps_asks = True
        assert (await place.sync()).resources == 7
        assert not [ask for ask in place.api.asks if "if-modified-since" in ask.headers], "nothing was seen before"
        place.api.change("r1", "r2", "r5")
        place.api.forget_counts()
        report = await place.sync()
        assert (report.changed, report.gone) == (3, 0)
        asked = {ask.headers.get("if-modified-since") for ask in place.api.asks if ask.path == "/orders"}
        assert asked == {"Mon, 21 Sep 2026 14:13:21 GMT"}, "each page is asked for under the condition"
        for id_ in place.api.versions:
            place.api.versions[id_] = 0  # nothing is as new as what was seen: a 304
        place.api.forget_counts()
        report = await place.sync()
        assert (report.resources, report.changed, report.gone, place.api.calls) == (0, 0, 0, 1)


async def test_without_a_list_ids_come_from_the_file_and_from_what_is_stored(database_url: str, server: Server) -> None:
    ids = [f"r{n}" for n in range(150)]
    check = {**CHECK}
    async with a_place(database_url, server, {"ids": ids, "check": check}) as place:
        report = await place.sync()
        assert (report.resources, report.changed, report.batches) == (150, 150, 2)
        await place.set(ids=["r1", "r200"])
        place.api.change("r99")
        place.api.forget_counts()
        report = await place.sync()
        assert (report.resources, report.changed, report.unchanged) == (151, 2, 149)
        assert dict(place.api.asked) == {"check": 151, "detail": 2}


# ── Failures ────────────────────────────────────────────────────────────────────────────────────


def broken(*ids: str, status: int = 500, **answer: Any) -> Callable[[Ask], Answer | None]:
    def fault(ask: Ask) -> Answer | None:
        return Answer(status, **answer) if ask.path.rpartition("/")[2] in ids else None

    return fault


async def test_one_bad_resource_in_each_batch_never_holds_up_the_others(place: Place) -> None:
    bad = frozenset({"r5", "r105", "r205"})
    place.api.faults.append(broken(*bad))
    report = await place.sync()
    assert (report.changed, report.failed) == (247, 3)
    await place.assert_equal(but=bad)
    rows = await place.db.fetch("select j.body from due d join job j using (id)")
    orders = [msgspec.json.decode(row["body"], type=ResourceOrder) for row in rows]
    assert sorted((order.ids, order.tries) for order in orders) == [(["r105"], 1), (["r205"], 1), (["r5"], 1)]
    place.api.faults.clear()
    for job in await place.due_now():
        await place.run(job)
    await place.assert_equal()
    (run,) = await place.app.resource_runs(None, None)
    assert (run.changed, run.failed) == (250, 0)


async def test_an_api_that_is_down_is_left_alone_and_no_id_is_lost(place: Place) -> None:
    job, *_ = await place.list_only()
    place.api.faults.append(lambda ask: Answer(503) if ask.path.startswith("/orders/") else None)
    place.api.forget_counts()
    assert await place.run(job) == Completed(is_settled=True)
    assert place.api.calls <= (OUTAGE_IDS + 10) * 3
    row = await place.db.fetchrow("select j.body from due d join job j using (id)")
    order = msgspec.json.decode(row["body"], type=ResourceOrder)
    assert (len(order.ids), order.tries) == (100, 1)
    assert await place.db.fetchval("select count(*) from pause") == 0, "the list may be asked all the same"
    place.api.faults.clear()
    for retry in await place.due_now():
        await place.run(retry)
    assert len(await place.stored()) == 100


async def test_what_keeps_failing_is_a_dead_letter_after_its_own_attempts_and_a_replay_reads_it(place: Place) -> None:
    place.api.faults.append(broken("r5"))
    await place.sync()
    tries = 0
    while jobs := await place.due_now():
        for job in jobs:
            await place.run(job)
        tries += 1
    assert tries == 4
    (reason,) = await place.letters()
    assert reason.startswith("1 resource: r5: ")
    assert "500" in reason
    place.api.faults.clear()
    (letter,) = await place.app.queue.dead_list()
    await place.app.queue.dead_replay([letter.id])
    for job in await place.claim():
        await place.run(job)
    await place.assert_equal()
    assert await place.letters() == []


async def test_what_trying_again_cannot_mend_is_buried_once_with_ids_and_reason(place: Place) -> None:
    place.api.faults.append(broken("r5", "r6", status=400, body={"error": {"message": "never"}}))
    report = await place.sync()
    assert (report.changed, report.failed) == (248, 2)
    (reason,) = await place.letters()
    assert reason == "2 resources: r5: refused with 400: never; r6: refused with 400: never"
    assert place.api.by_id.keys() == place.api.versions.keys() - {"r5", "r6"}
    await place.sync()
    assert len(await place.letters()) == 1, "the same failure joins the letter that lies there"
    place.api.faults.clear()
    assert (await place.sync()).changed == 2
    await place.assert_equal()


@pytest.mark.parametrize(
    "raw",
    [b'{"id": "r5", "name": "a\\u0000b"}', b'{"id": "r5", "n": 1e999999}', b"<html>", b"[]", b'"\\ud800"', b"\xff"],
)
async def test_a_content_that_cannot_be_stored_costs_the_others_nothing(place: Place, raw: bytes) -> None:
    place.api.faults.append(broken("r5", status=200, raw=raw))
    report = await place.sync()
    assert (report.changed, report.failed) == (249, 1)
    await place.assert_equal(but=frozenset({"r5"}))
    (reason,) = await place.letters()
    assert reason.startswith("1 resource: r5: ")


async def test_an_answer_beyond_the_limit_is_refused_before_it_is_read(database_url: str, server: Server) -> None:
    server.api.faults.append(broken("r5", status=200, raw=b'{"x": "' + b"y" * 40_000 + b'"}'))
    async with a_place(database_url, server, {"list": LIST, "limits": {"body_bytes": 32_768}}) as place:
        report = await place.sync()
        assert (report.changed, report.failed) == (249, 1)
        assert "larger than the limit of 32768" in (await place.letters())[0]


async def test_an_answer_that_is_cut_is_read_again(place: Place) -> None:
    cuts = iter([True])

    def fault(ask: Ask) -> Answer | None:
        is_cut = ask.path == "/orders/r5" and next(cuts, False)
        return Answer(200, place.api.resource("r5"), cuts=True) if is_cut else None

    place.api.faults.append(fault)
    assert (await place.sync()).failed == 0
    await place.assert_equal()


async def test_one_id_that_a_check_of_many_refuses_costs_the_others_nothing(database_url: str, server: Server) -> None:
    server.api.faults.append(lambda ask: Answer(400) if "r42" in ask.query.get("ids", "").split(",") else None)
    async with a_place(database_url, server, {"list": UNVERSIONED, "check": MANY}) as place:
        report = await place.sync()
        assert (report.changed, report.failed) == (249, 1)
        assert "r42: refused with 400" in (await place.letters())[0]


async def test_a_refused_key_parks_the_connection_and_loses_no_id(place: Place) -> None:
    jobs = await place.list_only()
    answered = iter(range(30))
    place.api.faults.append(
        lambda ask: Answer(401, {"error": {"message": "revoked"}}) if next(answered, None) is None else None
    )
    for job in jobs:
        await place.run(job)
    assert await place.db.fetchval("select state from connection") == "parked"
    assert 0 < len(await place.stored()) <= 30
    (waiting, *_) = await place.due_now()
    assert isinstance(await place.run(waiting), Snoozed)
    place.api.faults.clear()
    await place.db.execute("update connection set state = 'active'")
    await place.db.execute("update lease set lease_until = now() - interval '1 s'")
    await place.app.jobs.rescue()
    while jobs := [*await place.claim(), *await place.due_now()]:
        for job in jobs:
            await place.run(job)
    await place.assert_equal()


@pytest.mark.parametrize(("state", "ending"), [("paused", Snoozed), ("archived", Cancelled)])
async def test_batches_of_a_connection_that_stopped_wait_or_end(place: Place, state: str, ending: type) -> None:
    job, *_ = await place.list_only()
    await place.db.execute("update connection set state = $1", state)
    assert isinstance(await place.run(job), ending)
    assert place.api.asked["detail"] == 0


async def test_what_a_batch_has_no_time_for_goes_on_in_another_one(place: Place) -> None:
    job, *_ = await place.list_only()
    place.api.faults.append(lambda ask: held(ask) if ask.path == "/orders/r50" else None)

    def held(_ask: Ask) -> None:
        place.api.gate.clear()  # from now on nobody is answered

    assert await place.run(replace(job, timeout_s=0.5)) == Completed(is_settled=True)
    read = len(await place.stored())
    assert 0 < read < 100
    place.api.faults.clear()
    place.api.gate.set()
    for follow_up in await place.due_now() + await place.claim():
        await place.run(follow_up)
    assert len(await place.stored()) == 100


async def test_a_batch_that_loses_its_workers_is_split(place: Place) -> None:
    job, *_ = await place.list_only()
    assert await place.run(replace(job, losses=2)) == Completed(is_settled=True)
    singles = await place.claim()
    assert len(singles) == 100
    for single in singles:
        await place.run(single)
    assert len(await place.stored()) == 100


# ── Once, whatever happens ──────────────────────────────────────────────────────────────────────


async def test_a_batch_that_waits_is_not_enqueued_again(place: Place) -> None:
    for _ in range(3):
        await place.app.poll([place.connection], full=False)
    assert await place.db.fetchval("select count(*) from job where kind = 'resources'") == 3
    place.api.versions |= {"new": 1}
    await place.app.poll([place.connection], full=False)
    jobs = await place.claim()
    assert sorted(len(msgspec.json.decode(job.body, type=ResourceOrder).ids) for job in jobs) == [1, 50, 100, 100]
    await place.app.poll([place.connection], full=False)
    assert await place.claim() == [], "running ones count as well"


async def test_listings_at_the_same_time_leave_each_id_to_one_batch(place: Place) -> None:
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(lambda: place.app.poll([place.connection], full=False))
    ids = [id_ for job in await place.claim() for id_ in msgspec.json.decode(job.body, type=ResourceOrder).ids]
    assert sorted(ids) == sorted(place.api.versions)


async def test_the_same_batch_three_times_at_once_is_written_once(place: Place) -> None:
    job, *_ = await place.list_only()
    outcomes: list[Outcome | None] = []

    async def run() -> None:
        try:
            outcomes.append(await place.run(job))
        except LeaseLostError:
            outcomes.append(None)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(run)
    assert sorted(outcomes, key=str) == [Completed(is_settled=True), None, None]
    assert await place.db.fetchval("select count(*) from resource where revision = 1") == 100
    assert await place.db.fetchval("select count(*) from resource") == 100


class Dying:
    """The database, which dies with a transaction at a point that the test chooses."""

    def __init__(self, db: Database, *, after_commit: bool) -> None:
        self._db = db
        self._after = after_commit
        self.deaths = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    @asynccontextmanager
    async def transaction(self, **limits: Any) -> AsyncIterator[Any]:
        async with self._db.transaction(**limits) as tx:
            yield tx
            dies = await tx.fetchval("select exists (select from resource where poll_seq > 0)")
            if dies and not self._after:
                self.deaths += 1
                raise KeyboardInterrupt
        if dies and self._after:
            self.deaths += 1
            raise StorageUnavailableError("the reply to the commit was lost")


async def test_a_crash_between_the_write_and_the_settling_leaves_neither(place: Place) -> None:
    job, *_ = await place.list_only()
    dying = Dying(place.db, after_commit=False)
    with pytest.raises(KeyboardInterrupt):
        await run_resources(job, replace(place.app.resource_deps, db=dying))  # type: ignore[arg-type]
    assert dying.deaths == 1
    assert await place.stored() == {}
    assert await place.db.fetchval("select count(*) from lease where id = $1", job.id) == 1
    await place.app.jobs.release([job])
    (again,) = await place.claim()
    assert await place.run(again) == Completed(is_settled=True)
    assert len(await place.stored()) == 100


async def test_a_lost_reply_to_the_commit_writes_nothing_twice(place: Place) -> None:
    job, *_ = await place.list_only()
    dying = Dying(place.db, after_commit=True)
    with pytest.raises(LeaseLostError):
        await run_resources(job, replace(place.app.resource_deps, db=dying))  # type: ignore[arg-type]
    assert dying.deaths == 1
    assert await place.db.fetchval("select count(*) from resource where revision = 1") == 100
    (run,) = await place.app.resource_runs(None, None)
    assert run.changed == 100


async def test_a_crash_between_listing_and_batch_loses_and_doubles_nothing(place: Place) -> None:
    jobs = await place.list_only()  # leased to a worker that is never heard of again
    await place.db.execute("update worker set seen_at = now() - interval '1 hour'")
    await place.app.jobs.rescue()
    report = await place.sync()
    assert report.batches == 0, "the batches of the first listing are still there"
    await place.assert_equal()
    assert place.api.asked["detail"] == 250
    assert len(jobs) == 3


async def test_an_older_attempt_is_refused_also_by_a_newer_one_that_changed_nothing(place: Place) -> None:
    """The zombie has read the content of version 2; by the time it writes, a newer attempt has seen version 1 again."""
    await place.sync()
    order = ResourceOrder(place.connection, ["r1"]).encode()
    worker = await place.app.jobs.register_worker("test")
    old, new = await place.app.jobs.enqueue_leased([NewJob(RESOURCES, order)] * 2, worker)
    before = place.api.resource("r1")
    held = Held(place.db)
    async with anyio.create_task_group() as group:
        place.api.change("r1")
        group.start_soon(lambda: run_resources(old, replace(place.app.resource_deps, db=held)))  # type: ignore[arg-type]
        await held.reached.wait()
        place.api.versions["r1"] = 1
        await place.set(list=UNVERSIONED, check=CHECK)
        await place.run(new)
        held.opened.set()
    assert (await place.stored())["r1"][1] == before


class Held(Dying):
    """The database, whose second transaction waits until it is let go: the first one opens the batch."""

    def __init__(self, db: Database) -> None:
        super().__init__(db, after_commit=False)
        self._count = 0
        self.reached = anyio.Event()
        self.opened = anyio.Event()

    @asynccontextmanager
    async def transaction(self, **limits: Any) -> AsyncIterator[Any]:
        self._count += 1
        if self._count == 2:
            self.reached.set()
            await self.opened.wait()
        async with self._db.transaction(**limits) as tx:
            yield tx


async def test_two_replicas_share_the_batches_and_read_each_resource_once(database_url: str, place: Place) -> None:
    other_db = await Database.open(database_url, pool_max=5)
    try:
        await place.app.poll([place.connection], full=False)
        other = replace(place.app, db=other_db, jobs=type(place.app.jobs)(other_db))
        other.http, other.poll_deps = place.app.http, replace(place.app.poll_deps, db=other_db, queue=other.jobs)

        async def replica(app: App) -> None:
            worker = await app.jobs.register_worker("test")
            while jobs := (await app.jobs.claim(worker, 1)).jobs:
                for job in jobs:
                    await run_resources(job, app.resource_deps)

        async with anyio.create_task_group() as group:
            group.start_soon(replica, place.app)
            group.start_soon(replica, other)
        await place.assert_equal()
        assert {counts["detail"] for counts in place.api.by_id.values()} == {1}
    finally:
        await other_db.close()


# ── Limits ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_batch_never_has_more_than_ten_requests_in_flight(place: Place) -> None:
    job, *_ = await place.list_only()
    place.api.forget_counts()
    place.api.gate.clear()
    place.api.wanted = 10
    async with anyio.create_task_group() as group:
        group.start_soon(place.run, job)
        await place.api.filled.wait()
        place.api.gate.set()
    assert place.api.in_flight_max == 10


async def test_a_limit_in_all_holds_over_all_batches_and_replicas(database_url: str, server: Server) -> None:
    settings = {"list": LIST, "rate": {"concurrency": 5, "in_all": 10}}
    async with a_place(database_url, server, settings) as place:
        jobs = await place.list_only()
        assert len(jobs) == 3
        place.api.forget_counts()
        place.api.gate.clear()
        place.api.wanted = 10
        outcomes: list[Outcome] = []

        async def run(job: Job) -> None:
            outcomes.append(await place.run(job))

        async with anyio.create_task_group() as group:
            for job in jobs:  # that one process runs them makes no difference: the slots are rows
                group.start_soon(run, job)
            await place.api.filled.wait()
            place.api.gate.set()
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Completed", "Completed", "Snoozed"]
        assert place.api.in_flight_max == 10
        (late,) = [job for job in jobs if await place.db.fetchval("select count(*) from lease where id = $1", job.id)]
        assert await place.run(late) == Completed(is_settled=True)
        await place.assert_equal()


async def test_a_slot_of_a_lost_worker_is_free_again(database_url: str, server: Server) -> None:
    async with a_place(database_url, server, {"list": LIST, "rate": {"in_all": 10}}) as place:
        first, second, _ = await place.list_only()
        async with place.db.transaction() as tx:
            assert await store.open_batch(
                tx, first.id, first.token, await a_stream(place), TenantId(1), 1, is_retry=False
            )
        assert isinstance(await place.run(second), Snoozed)
        await place.app.jobs.release([first])
        assert await place.run(second) == Completed(is_settled=True)


async def a_stream(place: Place) -> Any:
    return await place.db.fetchval("select id from stream where source = 'resources'")


async def test_exits_share_the_requests_within_their_limits(
    database_url: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "TALLYD_EXIT_TEST", "user:p@ss:word")
    async with exiting() as one, exiting() as two:
        proxy = {"exits": [one.url, two.url], "credential_env": "TALLYD_EXIT_TEST", "per_exit": 3}
        async with a_place(database_url, server, {"list": LIST, "proxy": proxy}) as place:
            assert (await place.sync()).failed == 0
            await place.assert_equal()
            assert one.asked + two.asked == place.api.calls
            assert min(one.asked, two.asked) > 50
            assert max(one.in_flight_max, two.in_flight_max) <= 3
            assert one.credential == two.credential == "user:p@ss:word"


@pytest.mark.parametrize("fault", ["refuses", "is away"])
async def test_an_exit_that_fails_rests_and_the_other_one_has_its_requests(
    database_url: str, server: Server, fault: str
) -> None:
    async with exiting() as good, exiting() as bad:
        bad.is_down = fault == "refuses"
        url = bad.url if fault == "refuses" else "http://127.0.0.1:1"
        async with a_place(database_url, server, {"list": LIST, "proxy": {"exits": [url, good.url]}}) as place:
            report = await place.sync()
            assert (report.changed, report.failed) == (250, 0)
            assert good.asked == place.api.calls
            await place.assert_equal()


async def test_without_any_exit_nothing_leaves_and_all_is_tried_again(database_url: str, server: Server) -> None:
    proxy = {"exits": ["http://127.0.0.1:1"], "rest_s": 600}
    async with a_place(database_url, server, {"list": LIST}) as place:
        job, *_ = await place.list_only()
        await place.set(proxy=proxy)
        place.api.forget_counts()
        await place.run(job)
        assert place.api.calls == 0
        (order,) = [
            msgspec.json.decode(row["body"], type=ResourceOrder)
            for row in await place.db.fetch("select j.body from due d join job j using (id)")
        ]
        assert len(order.ids) == 100


# ── Lists that break their contract ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer(200, {"data": [{"id": "r0"}], "meta": {"next": "0"}}), "leads back|hold the same"),
        (Answer(200, {"data": {}}), "list.items"),
        (Answer(200, {"data": [{"nr": 1}]}), "list.id"),
        (Answer(200, {"data": [{"id": {}}]}), "neither a text nor a number"),
        (Answer(200, raw=b"<html>"), "is not JSON"),
        (Answer(302, headers={"location": "https://elsewhere.example"}), "redirects are not followed"),
    ],
    ids=["for ever", "no list", "no id", "id of another kind", "no JSON", "redirect"],
)
async def test_a_broken_list_changes_nothing_and_is_told(place: Place, answer: Answer, says: str) -> None:
    await place.sync()
    before = await place.stored()
    place.api.faults.append(lambda ask: answer if ask.path == "/orders" else None)
    report = await place.sync()
    assert report.failed == 1
    assert await place.stored() == before
    (reason,) = await place.letters()
    assert any(part in reason for part in says.split("|")), reason


@pytest.mark.parametrize("url", ["https://elsewhere.example/orders?cursor=9", "//elsewhere.example/orders", "/../x"])
async def test_a_next_link_elsewhere_never_gets_the_credential(database_url: str, server: Server, url: str) -> None:
    listing = {**LIST, "paging": {"kind": "link", "next": "meta.next"}}
    server.api.faults.append(
        lambda ask: (
            Answer(200, {"data": [{"id": "r0", "updated_at": 1}], "meta": {"next": url}})
            if ask.path == "/orders"
            else None
        )
    )
    server.url += "/v1"
    server.api.faults.insert(0, lambda ask: setattr(ask, "path", ask.path.removeprefix("/v1")))
    async with a_place(database_url, server, {"list": listing}) as place:
        assert (await place.sync()).failed == 1
        assert "leads away from the base URL" in (await place.letters())[0]


async def test_more_items_than_the_limit_are_an_error_and_not_cut(database_url: str, server: Server) -> None:
    async with a_place(database_url, server, {"list": LIST, "limits": {"items_max": 100}}) as place:
        assert (await place.sync()).failed == 1
        assert "limits.items_max" in (await place.letters())[0]


async def test_a_sync_works_off_what_waits_for_a_slot(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three batches, of which one runs at a time: what another replica would do later, the command waits for."""
    monkeypatch.setattr("daemon.worker.resources.SLOT_WAIT_S", 0.1)
    monkeypatch.setattr("daemon.worker.resources.SLOT_LOOKS", 20.0)
    async with serving(Api(250)) as server:
        settings = {"list": LIST, "rate": {"in_all": 10}}
        async with a_place(database_url, server, settings) as place:
            report = await place.sync()
            assert (report.changed, report.batches, report.failed) == (250, 3, 0)
            assert place.api.in_flight_max <= 10


async def test_a_pace_spreads_the_calls_of_a_batch(database_url: str, server: Server) -> None:
    """Not how fast it is, but that no call begins before its turn, by the clock that the batch itself uses."""
    at: list[float] = []
    server.api.faults.append(lambda _ask: at.append(anyio.current_time()))
    settings = {"list": LIST, "rate": {"per_second": 200}}
    server.api.versions = {f"r{n}": 1 for n in range(20)}
    async with a_place(database_url, server, settings) as place:
        assert (await place.sync()).changed == 20
    calls = at[1:]
    assert calls[-1] - calls[0] >= 19 / 200 * 0.9


async def test_a_sequence_that_fell_behind_is_told_and_not_worked_around(place: Place) -> None:
    """A restored copy that lost its sequences: every answer would look old, and none be written."""
    await place.sync()
    place.api.change("r1")
    await place.app.poll([place.connection], full=False)
    (job,) = await place.claim()
    await place.db.execute("update resource_fence set read_seq = read_seq + 1000000")
    with pytest.raises(PermanentError, match="fallen behind"):
        await place.run(job)


async def test_a_tag_that_no_header_can_carry_is_not_sent_back(database_url: str, server: Server) -> None:
    server.api.faults.append(
        lambda ask: Answer(200, {"id": "r1"}, {"etag": '"\xe4"'}) if ask.path == "/orders/r1" else None
    )
    check = {"version": "etag", "conditional": True}
    async with a_place(database_url, server, {"list": UNVERSIONED, "check": check}) as place:
        await place.sync()
        report = await place.sync()
        assert (report.changed, report.unchanged, report.failed) == (0, 250, 0)
        assert await place.db.fetchval("select state from connection") == "active"


async def test_a_worker_without_the_credential_of_the_exits_leaves_the_batch_to_others(place: Place) -> None:
    """The variable may be set on another replica, or be set here soon: that is no reason for a dead letter."""
    (job, *_) = await place.list_only()
    await place.set(proxy={"exits": ["http://127.0.0.1:1"], "credential_env": "TALLYD_EXIT_NOWHERE"})
    outcome = await place.run(job)
    assert isinstance(outcome, Retryable)
    assert "TALLYD_EXIT_NOWHERE" in outcome.reason
    assert await place.letters() == []
    assert await place.stored() == {}


async def test_a_sync_tells_of_batches_that_came_to_no_end(place: Place) -> None:
    jobs = await place.list_only()
    await place.app.jobs.settle([Settlement(job, Discarded("lost for good"), 0) for job in jobs[1:]])
    await place.app.jobs.release(jobs[:1])
    await place.db.execute("update connection set open_job = null")
    await place.app.help_while(lambda: store.open_batches(place.app.db, [place.connection]))
    runs = await place.app.resource_runs(None, None)
    assert [(run.batches, run.batches_done) for run in runs] == [(len(jobs), 1)]
