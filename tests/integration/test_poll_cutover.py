"""Cutting a source anew: another generation of an API, other dimensions; each bucket is owned by one grain."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import anyio
import pytest

from daemon.app import NewConnection
from daemon.db import streams
from daemon.db.pool import Database, Record
from daemon.domain.connection import Connection, Secret
from daemon.domain.errors import UsageError
from daemon.domain.record import Grain, GrainId
from daemon.domain.window import rfc3339
from daemon.worker.poll import grains_of
from tests.books_kit import Books, credential, midnight, open_books, simulator_here, until

pytestmark = pytest.mark.anyio
HOUR = timedelta(hours=1)


@pytest.fixture
async def books(database_url: str) -> AsyncIterator[Books]:
    async with simulator_here() as sim, open_books(database_url, sim) as opened:
        yield opened


async def time_passes_until_the_cut(books: Books, hours: int) -> None:
    """The new grain begins `hours` ago instead of at the next boundary: tests do not wait for a full hour."""
    moved = await books.db.fetchval(
        """with moved as (update grain_epoch e set start_at = $1 from stream s
             where s.id = e.stream_id and e.start_at > now() and e.width = '1h' returning 1)
           select count(*) from moved""",
        datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - hours * HOUR,
    )
    assert moved


async def provider_lags(books: Books, hours: int) -> None:
    at = datetime.now(UTC).replace(minute=30, second=0, microsecond=0) - hours * HOUR
    await books.sim.control("POST", "freeze", {"now": rfc3339(at), "frozen": True})


async def provider_catches_up(books: Books) -> None:
    await books.sim.control("POST", "freeze", {"now": rfc3339(datetime.now(UTC)), "frozen": True})


@pytest.mark.parametrize(
    ("provider", "old", "new"),
    [
        ("anthropic", {}, {"api": "analytics"}),
        ("anthropic", {"api": "analytics"}, {"api": "reports"}),
        ("openai", {}, {"group_by": {"completions": ["model"]}}),
        ("openai", {"group_by": {"completions": ["project_id"]}}, {}),
    ],
)
async def test_a_new_grain_takes_over_at_a_boundary_without_doubling(
    books: Books, provider: str, old: dict[str, object], new: dict[str, object]
) -> None:
    await provider_lags(books, 2)
    await books.add("main", provider, settings=old, since=midnight(2), history_days=2, requests_per_hour=12, live=True)
    await books.poll()
    await books.assert_equal(by_dims=False)
    await books.app.regroup("acme", "main", new)
    await books.poll()
    await books.assert_equal(by_dims=False)
    await time_passes_until_the_cut(books, 1)
    await provider_catches_up(books)
    assert (await books.poll()).rows
    await books.assert_equal(by_dims=False)
    assert (await books.poll(full=True)).dead == 0
    await books.assert_equal(by_dims=False)
    source = "completions" if provider == "openai" else "messages"
    grains = await books.db.fetch(
        "select distinct r.bucket_start, r.dims ?& e.group_by as is_of_new from usage_row r join stream s"
        " on s.id = r.stream_id join grain_epoch e on e.stream_id = s.id and e.start_at > 'epoch'"
        " where s.source = $1 and not r.is_tombstone",
        source,
    )
    assert grains
    by_bucket = [row["bucket_start"] for row in grains]
    assert len(by_bucket) == len(set(by_bucket)), "a bucket holds rows of one grain"


async def test_corrections_before_the_cut_are_read_in_the_old_grain(books: Books) -> None:
    await provider_lags(books, 2)
    await books.add("main", requests_per_hour=12, live=True)
    await books.poll()
    await books.app.regroup("acme", "main", {"group_by": {"completions": ["model"]}})
    await time_passes_until_the_cut(books, 1)
    await provider_catches_up(books)
    await books.poll()
    for hours in (1, 3, 2):
        bucket = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - hours * HOUR
        await books.play("main", "correction_up", bucket=rfc3339(bucket))
        await books.poll()
        await books.assert_equal(by_dims=False)
    await books.assert_equal()


async def test_the_same_settings_cut_nothing_and_a_second_change_takes_the_place_of_the_first(books: Books) -> None:
    await books.add("main")
    await books.poll()
    await books.app.regroup("acme", "main", {})
    assert await books.db.fetchval("select count(*) from grain_epoch where start_at > 'epoch'") == 0
    await books.app.regroup("acme", "main", {"group_by": {"completions": ["model"]}})
    await books.app.regroup("acme", "main", {"group_by": {"completions": ["model"]}})
    await books.app.regroup("acme", "main", {"group_by": {"completions": ["project_id"]}})
    assert await books.db.fetchval("select count(*) from grain_epoch where start_at > 'epoch'") == 1
    with pytest.raises(UsageError, match="no dimension"):
        await books.app.regroup("acme", "main", {"group_by": {"completions": ["colour"]}})
    await books.poll()
    await books.assert_equal()


async def test_new_grain_begins_past_every_bucket_that_is_booked(books: Books) -> None:
    """The hour may begin between the choice of the boundary and the change, and a poll book its first moments."""
    await books.add("main", requests_per_hour=8)
    await books.poll()
    booked = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + 3 * HOUR
    stream = (await books.stream("main", "completions"))["id"]
    await books.db.execute(
        "insert into bucket (stream_id, bucket_start, last_seq, hash_version, digest, totals)"
        " values ($1, $2, 1, 1, '', '{0,0,0,0,0}')",
        stream,
        booked,
    )
    await books.app.regroup("acme", "main", {"group_by": {"completions": ["model"]}})
    starts = await books.db.fetch("select start_at from grain_epoch where stream_id = $1 order by 1", stream)
    assert [row["start_at"] for row in starts[1:]] == [booked + HOUR]


async def test_boundary_is_judged_after_a_flush_that_holds_the_stream(books: Books) -> None:
    """What it books counts, and neither the settings nor the cut are seen before."""
    await books.add("main", requests_per_hour=8)
    await books.poll()
    booked = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + 3 * HOUR
    stream = (await books.stream("main", "completions"))["id"]
    async with anyio.create_task_group() as group, books.db.transaction() as flush:
        await flush.execute("select from stream where id = $1 for update", stream)
        group.start_soon(books.app.regroup, "acme", "main", {"group_by": {"completions": ["model"]}})

        async def is_waiting() -> bool:
            return bool(await books.db.fetchval("select count(*) from pg_locks where not granted"))

        await until(is_waiting, "the change waits for the flush")
        await flush.execute(
            "insert into bucket (stream_id, bucket_start, last_seq, hash_version, digest, totals)"
            " values ($1, $2, 1, 1, '', '{0,0,0,0,0}')",
            stream,
            booked,
        )
        assert (await books.app.connections.list())[0].settings == {}
    assert (await books.app.connections.list())[0].settings
    newest = await books.db.fetchval("select max(start_at) from grain_epoch where stream_id = $1", stream)
    assert newest == booked + HOUR


async def test_settings_that_cannot_be_cut_by_are_not_stored(books: Books) -> None:
    """Settings and cuts commit together."""
    await books.add("main")
    await books.poll()
    bad = {"group_by": {"completions": 7}}
    with pytest.raises(TypeError):  # settings that nobody checked
        await books.app.connections.set_settings("acme", "main", bad)
    assert (await books.app.connections.list())[0].settings == {}


async def test_stream_is_not_made_by_settings_that_have_changed_since(books: Books) -> None:
    """A poll that read the old settings would give a new source their grain, for good."""
    await books.add("main")
    now = await books.db.now()

    def grains(connection: Connection) -> dict[str, tuple[GrainId, Grain]]:
        return grains_of(books.app.pollers, connection)

    class Between(Database):
        """The settings change after they were read, before the streams are made."""

        def __init__(self) -> None:
            self._is_first = True

        async def fetch(self, sql: str, *args: object, timeout_s: float | None = None) -> list[Record]:
            rows = await books.db.fetch(sql, *args, timeout_s=timeout_s)
            if self._is_first:
                self._is_first = False
                await books.app.regroup("acme", "main", {"group_by": {"completions": ["model"]}})
            return rows

        async def execute(self, sql: str, *args: object, timeout_s: float | None = None) -> str:
            return await books.db.execute(sql, *args, timeout_s=timeout_s)

        async def now(self) -> datetime:
            return now

    (loaded,), _ = await streams.load(Between(), books.app.keyring, [books.ids["main"]], grains, now)
    assert loaded.streams == {}
    (loaded,), _ = await streams.load(books.db, books.app.keyring, [books.ids["main"]], grains, now)
    assert loaded.streams["completions"].epochs[-1].grain.group_by == ("model",)


async def test_revived_connection_is_cut_by_its_new_settings(books: Books) -> None:
    """What is shown and what is done must not differ."""
    await books.add("main", "anthropic")
    await books.poll()
    await books.app.connections.remove("acme", "main")
    new = NewConnection(
        "acme", "main", "anthropic", books.sim.base_url("anthropic"), Secret(credential("anthropic", "main")),
        None, {"group_by": {"messages": ["model"]}},
    )  # fmt: skip
    assert (await books.app.connections.add(new)).is_revived
    newest = await books.db.fetchrow(
        """select group_by, start_at > now() as is_to_come from grain_epoch e join stream s on s.id = e.stream_id
           where s.source = 'messages' order by start_at desc limit 1"""
    )
    assert newest is not None
    assert dict(newest) == {"group_by": ["model"], "is_to_come": True}
    assert await books.db.fetchval("select count(*) from grain_epoch where start_at > 'epoch'") == 1
