"""What projects, keys and people are called: dated, kept after they are gone, and shown in reports without a second row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import anyio
import pytest

from daemon.db import ledger, names
from daemon.db.insights import Insights, Question
from daemon.db.names import NameSpan
from daemon.db.pool import Database
from daemon.domain.collection import Collected, Name, NameKind
from daemon.domain.connection import StreamId
from daemon.domain.job import JobId
from daemon.domain.record import Grain, Rating, Row
from daemon.domain.window import Width, Window
from daemon.records.identity import grain_id
from daemon.sinks.ledger import Effect, Flush, LedgerSink, Lot
from daemon.sinks.names import NameTaker
from tests.cli_kit import Tallyd
from tests.ledger_kit import T0, Account, lock_nothing, make_account

pytestmark = pytest.mark.anyio

KEYS = Grain("reports", Width.HOUR, ("api_key_id", "project_id", "user_id"))
ASKED = Question(None, None, ("api_key",), {("openai", "costs")})


def key(id_: str, name: str) -> Name:
    return Name("api_key", id_, name)


class Directory:
    """A source of names of one connection."""

    def __init__(self, db: Database, account: Account) -> None:
        self.db = db
        self.account = account
        self.sink = LedgerSink(db, {"names": NameTaker()})

    @classmethod
    async def open(cls, db: Database, connection: str = "one") -> Directory:
        return cls(db, await make_account(db, connection, source="names"))

    @property
    def stream(self) -> StreamId:
        return self.account.stream.id

    async def seq(self) -> int:
        return await self.account.seq()

    async def take(self, seq: int, *parts: Sequence[Name]) -> Effect:
        lots = [Lot(self.account.connection, self.account.stream, "names", seq, Collected(part)) for part in parts]
        return (await self.sink.book(Flush(JobId(0), lots=lots), lock_nothing))[self.stream]

    async def end(self, seq: int) -> Effect:
        end = ledger.StreamEnd(
            self.stream, seq, Window(T0, T0), T0, T0, None, None, None, is_hourly=True, is_daily=True, kind="names"
        )
        return (await self.sink.book(Flush(JobId(0), ends=[end]), lock_nothing))[self.stream]

    async def read(self, *items: Name) -> Effect:
        """A whole reading."""
        seq = await self.seq()
        return await self.take(seq, items) + await self.end(seq)

    async def history(self) -> list[NameSpan]:
        return await names.listed(self.db, tenant=None, kind=None, with_history=True)

    async def called(self) -> dict[str, tuple[str, bool]]:
        """(newest name, whether it is there) by id."""
        found = await names.listed(self.db, tenant=None, kind=None, with_history=False)
        return {span.id: (span.name, span.until is None) for span in found}


@pytest.fixture
async def directory(db: Database) -> Directory:
    return await Directory.open(db)


async def test_first_names_are_new_and_the_same_again_writes_nothing(directory: Directory, db: Database) -> None:
    seq = await directory.seq()
    items = (key("k1", "ci"), Name("project", "p1", "search"))
    assert await directory.take(seq, items) == Effect(new=2, items=2)
    before = await db.fetch("select xmin::text, * from name order by id")
    assert await directory.take(seq, items) == Effect(items=2)
    assert await db.fetch("select xmin::text, * from name order by id") == before
    later = await directory.seq()
    assert await directory.take(later, items) == Effect(items=2)
    assert {row["seq"] for row in await db.fetch("select seq from name")} == {later}


async def test_renamed_and_back_keeps_three_dated_names(directory: Directory) -> None:
    assert await directory.read(key("k1", "A")) == Effect(new=1, items=1)
    assert await directory.read(key("k1", "B")) == Effect(restated=1, items=1)
    assert await directory.read(key("k1", "A")) == Effect(restated=1, items=1)
    first, second, third = await directory.history()
    assert [first.name, second.name, third.name] == ["A", "B", "A"]
    assert first.since < second.since == first.until < third.since == second.until
    assert third.until is None
    assert await directory.called() == {"k1": ("A", True)}


async def test_what_a_whole_reading_does_not_hold_is_gone_with_its_name_kept(directory: Directory) -> None:
    await directory.read(key("k1", "ci"), key("k2", "laptop"))
    assert await directory.read(key("k2", "laptop")) == Effect(vanished=1, items=1)
    assert await directory.called() == {"k1": ("ci", False), "k2": ("laptop", True)}
    assert await directory.read(key("k1", "ci"), key("k2", "laptop")) == Effect(restated=1, items=2)
    spans = [span for span in await directory.history() if span.id == "k1"]
    assert [(span.name, span.until is None) for span in spans] == [("ci", False), ("ci", True)]
    assert spans[0].until is not None
    assert spans[0].until < spans[1].since


async def test_reading_that_was_cut_short_closes_nothing(directory: Directory) -> None:
    await directory.read(key("k1", "ci"), key("k2", "laptop"))
    await directory.take(await directory.seq(), [key("k2", "desktop")])
    assert await directory.called() == {"k1": ("ci", True), "k2": ("desktop", True)}


async def test_older_reading_that_comes_late_changes_nothing(directory: Directory) -> None:
    old = await directory.seq()
    await directory.read(key("k1", "new"))
    assert await directory.take(old, [key("k1", "old"), key("k0", "long gone")]) == Effect(refused=1)
    await directory.end(old)
    assert await directory.called() == {"k1": ("new", True)}


async def test_kind_that_could_not_be_read_is_kept(directory: Directory) -> None:
    """Nothing in memory says so: the part that tells of it and the end may be flushes of two processes."""
    await directory.read(key("k1", "ci"), key("k2", "laptop"), Name("user", "u1", "Ada"), Name("team", "t1", "core"))
    seq = await directory.seq()
    part = Collected([key("k1", "ci")], unread=frozenset({"user", "team"}))
    for items in (part, replace(part, items=[])):
        lot = Lot(directory.account.connection, directory.account.stream, "names", seq, items)
        await directory.sink.book(Flush(JobId(0), lots=[lot]), lock_nothing)
    assert await directory.end(seq) == Effect(vanished=1)
    assert {id_ for id_, (_, is_there) in (await directory.called()).items() if is_there} == {"k1", "u1", "t1"}


async def test_whole_reading_of_nothing_ends_all(directory: Directory) -> None:
    await directory.read(key("k1", "ci"))
    assert await directory.read() == Effect(vanished=1)
    assert await directory.called() == {"k1": ("ci", False)}


async def test_same_lot_three_times_at_once_is_taken_once(directory: Directory, db: Database) -> None:
    await directory.read(key("k1", "A"), key("k2", "x"))
    seq = await directory.seq()
    effects: list[Effect] = []

    async def deliver() -> None:
        effects.append(await directory.take(seq, [key("k1", "B"), key("k3", "y")]))
        await directory.end(seq)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(deliver)
    assert sum(effect.rows for effect in effects) == 2
    assert [(span.id, span.name, span.until is None) for span in await directory.history()] == [
        ("k1", "A", False), ("k1", "B", True), ("k2", "x", False), ("k3", "y", True),
    ]  # fmt: skip
    assert await db.fetchval("select count(*) from name where until < since") == 0


async def test_an_id_that_is_told_twice_means_the_later_one(directory: Directory) -> None:
    seq = await directory.seq()
    await directory.take(seq, [key("k1", "A"), key("k1", "B")], [key("k1", "C")])
    assert [(span.name, span.until) for span in await directory.history()] == [("C", None)]


async def test_hostile_names_are_stored_safely_and_bounded(directory: Directory) -> None:
    nasty = {"nul": "a\x00b", "half": "\ud800x", "long": "é" * 50_000, "sql": "'); drop table name; --", "none": ""}
    await directory.read(*(key(id_, name) for id_, name in nasty.items()), key("i\x00d" + "x" * 9_000, "odd id"))
    called = await directory.called()
    assert called["nul"] == ("a\N{REPLACEMENT CHARACTER}b", True)
    assert called["half"] == ("?x", True)
    assert called["long"] == ("é" * 1_000, True)
    assert called["sql"][0] == nasty["sql"]
    assert len(called) == 6
    assert await directory.read(*(key(id_, name) for id_, name in nasty.items())) == Effect(vanished=1, items=5)


async def test_connections_do_not_touch_each_others_names(db: Database) -> None:
    one, two = await Directory.open(db, "one"), await Directory.open(db, "two")
    await one.read(key("k1", "mine"))
    await two.read(key("k1", "yours"), key("k2", "other"))
    await one.read()
    found = await names.listed(db, tenant="acme", kind="api_key", with_history=False)
    assert [(span.connection, span.id, span.until is None) for span in found] == [
        ("one", "k1", False), ("two", "k1", True), ("two", "k2", True),
    ]  # fmt: skip
    assert await names.listed(db, tenant="nobody", kind=None, with_history=True) == []
    assert await names.listed(db, tenant=None, kind="team", with_history=True) == []


async def test_clock_that_goes_back_never_makes_two_of_one_instant(directory: Directory, db: Database) -> None:
    """As if the first name had been seen by a server whose clock was ahead."""
    await directory.read(key("k1", "A"))
    await db.execute("update name set since = now() + interval '1 hour'")
    await directory.read(key("k1", "B"))
    await directory.read(key("k1", "A"))
    assert [span.name for span in await directory.history()] == ["A", "B", "A"]
    assert await db.fetchval("select count(*) from name where until <= since") == 0


# ── In reports ──────────────────────────────────────────────────────────────────────────────────


async def book(db: Database, connection: str, *, api_key: str | None, project: str | None, tokens: int) -> None:
    """A usage row of one key, beside what the connection's names are booked on."""
    account = await _keyed(db, connection)
    dims = (("api_key_id", api_key), ("project_id", project), ("user_id", None))
    row = Row(dims, input_tokens=tokens, rating=Rating("openai", "m", (), ()))
    await account.book(account.piece(await account.seq(), {T0: (row,)}, grain=KEYS))


async def _keyed(db: Database, connection: str) -> Account:
    account = await make_account(db, f"{connection}-rows")
    await db.execute(
        "update grain_epoch set grain_id = $2, group_by = $3 where stream_id = $1",
        account.stream.id, grain_id(KEYS), list(KEYS.group_by),
    )  # fmt: skip
    id_ = await db.fetchval("select id from connection where name = $1", connection)
    await db.execute("update stream set connection_id = $2 where id = $1", account.stream.id, id_)
    return account


async def test_reports_show_the_newest_name_also_of_what_is_gone(directory: Directory, db: Database) -> None:
    await book(db, "one", api_key="k1", project="p1", tokens=10)
    await directory.read(key("k1", "old"), Name("project", "p1", "search"))
    await directory.read(key("k1", "ci"))
    report = await Insights(db).usage(replace(ASKED, group_by=("project", "api_key", "user")))
    (line,) = report.lines
    assert line.group == (("project", "p1"), ("api_key", "k1"), ("user", None))
    assert line.names == (("project_name", "search"), ("api_key_name", "ci"), ("user_name", None))
    spend = await Insights(db).spend(replace(ASKED, group_by=("api_key",)))
    assert [line.names for line in spend.lines] == [(("api_key_name", "ci"),)]
    assert (await Insights(db).usage(replace(ASKED, group_by=("dim:api_key_id",)))).lines[0].names == ()


async def test_names_never_multiply_a_sum(db: Database) -> None:
    """Two connections know the same id, one of them by three names, and two kinds share it too."""
    one, two = await Directory.open(db, "one"), await Directory.open(db, "two")
    await db.execute("update connection set org_id = name")  # with one key they would be one organisation
    for connection, tokens in (("one", 10), ("two", 100)):
        await book(db, connection, api_key="k1", project="k1", tokens=tokens)
    for name in ("a", "b", "a"):
        await one.read(key("k1", name), Name("project", "k1", "p of one"), Name("workspace", "k1", "w of one"))
    await two.read(key("k1", "z"), Name("project", "k1", "p of two"))
    insights = Insights(db)
    together = (await insights.usage(replace(ASKED, group_by=("api_key",)))).lines
    assert [(dict(line.group), line.metrics[0][1], dict(line.names)) for line in together] == [
        ({"api_key": "k1"}, 110, {"api_key_name": "z"})
    ]
    apart = (await insights.usage(replace(ASKED, group_by=("connection", "api_key", "project")))).lines
    assert [(line.group[0][1], line.metrics[0][1], line.names) for line in apart] == [
        ("one", 10, (("api_key_name", "a"), ("project_name", "p of one"))),
        ("two", 100, (("api_key_name", "z"), ("project_name", "p of two"))),
    ]
    money = (await insights.spend(replace(ASKED, group_by=("api_key",)))).lines
    assert [(str(line.amount), line.basis) for line in money] == [("2", "local")]


@pytest.mark.parametrize(
    ("group_by", "dimension", "kind"),
    [("workspace", "workspace_id", "workspace"), ("team", "team_id", "team"), ("user", "actor", "user")],
)
async def test_workspaces_teams_and_users_have_names_too(
    directory: Directory, db: Database, group_by: str, dimension: str, kind: NameKind
) -> None:
    await book(db, "one", api_key="k1", project=None, tokens=10)
    await db.execute("update usage_row set dims = jsonb_build_object($1::text, 'x1')", dimension)
    await directory.read(Name(kind, "x1", "Ada"))
    (line,) = (await Insights(db).usage(replace(ASKED, group_by=(group_by,)))).lines
    assert (line.group, line.names) == (((group_by, "x1"),), ((f"{group_by}_name", "Ada"),))


# ── The commands ────────────────────────────────────────────────────────────────────────────────


async def _fill(database_url: str) -> None:
    db = await Database.open(database_url)
    directory = await Directory.open(db)
    await book(db, "one", api_key="k1", project="p1", tokens=10)
    await directory.read(key("k1", "old"))
    await directory.read(key("k1", "ci\x1b[31m"))
    await db.close()


def test_commands_show_names(tallyd: Tallyd, database_url: str) -> None:
    anyio.run(_fill, database_url)
    code, out, _ = tallyd("usage", "--group-by", "api_key,project", "--json")
    (line,) = json.loads(out)
    assert code == 0
    assert (line["api_key"], line["api_key_name"]) == ("k1", "ci\x1b[31m")
    assert (line["project"], line["project_name"]) == ("p1", None)
    table = tallyd("spend", "--group-by", "api_key,project")[1]
    assert table.split()[:6] == ["api_key", "api_key_name", "project", "amount", "currency", "basis"]
    assert "ci\\x1b[31m" in table
    (newest,) = json.loads(tallyd("names", "list", "--tenant", "acme", "--json")[1])
    assert newest["since"] is not None
    assert {k: v for k, v in newest.items() if k != "since"} == {
        "tenant": "acme", "connection": "one", "kind": "api_key", "id": "k1", "name": "ci\x1b[31m", "until": None,
    }  # fmt: skip
    both = json.loads(tallyd("names", "list", "--kind", "api_key", "--history", "--json")[1])
    assert [span["name"] for span in both] == ["old", "ci\x1b[31m"]
    assert both[0]["until"] == both[1]["since"]
    assert json.loads(tallyd("names", "list", "--kind", "user", "--json")[1]) == []
    code, _, err = tallyd("names", "list", "--kind", "colour")
    assert (code, "--kind: unknown kind 'colour'" in err) == (2, True)
