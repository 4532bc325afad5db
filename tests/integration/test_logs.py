"""The log of messages: its filters, its pages, and that a page is quick however long the log."""

from datetime import timedelta
from itertools import chain
from time import perf_counter

import pytest

from daemon.db.pool import Database
from daemon.domain.errors import UsageError
from daemon.domain.job import Completed, Retryable
from daemon.queue import listing
from daemon.queue import logs as module
from daemon.queue.listing import NEWEST, Filter, Place, cursor_of, places_of
from daemon.queue.logs import IN_PROGRESS, LogFilter, Logs
from daemon.queue.message import MessageId, Spec
from daemon.queue.messages import State
from tests.message_kit import BROKEN, OK, Post

pytestmark = pytest.mark.anyio


@pytest.fixture
async def post(db: Database) -> Post:
    return await Post.open(db)


@pytest.fixture
def logs(db: Database) -> Logs:
    return Logs(db)


def of(**fields) -> LogFilter:
    return LogFilter(Filter(**fields))


async def told(logs: Logs, post: Post, wanted: LogFilter | None = None) -> list[tuple[int, str]]:
    lines, cursor = await logs.page(post.account, wanted or LogFilter(), count=1000)
    assert cursor is None
    return [(line.message.id.job, line.state.name) for line in lines]


async def test_lines_of_a_message_newest_first(logs, post) -> None:
    id_ = await post.send(spec=Spec(retries=1), body=b"hello")
    await post.end(await post.claim(), Retryable("again", delay_s=0), BROKEN)
    await post.queue.promote()
    await post.end(await post.claim(), Retryable("again", delay_s=0), BROKEN)
    lines, cursor = await logs.page(post.account, LogFilter(), body_bytes=None)
    assert cursor is None
    assert [line.state.name for line in lines] == [
        "FAILED", "ERROR", "ACTIVE", "RETRY", "ERROR", "ACTIVE", "CREATED"
    ]  # fmt: skip
    assert {line.message.id for line in lines} == {id_}
    failed, created, retry = lines[0], lines[-1], lines[3]
    assert (failed.status, failed.error, failed.response_body) == (500, BROKEN.error, b"no")
    assert failed.response_header == {"X-Why": ["a", "b"]}
    assert (failed.retried, created.retried) == (1, 0)
    assert created.next_at == created.message.not_before
    assert retry.next_at is not None
    assert [line.body for line in lines] == [b"hello"] * 7
    assert [line.at for line in lines] == sorted((line.at for line in lines), reverse=True)


async def test_body_comes_as_far_as_it_is_asked_for(logs, post) -> None:
    await post.send(body=b"hello")
    bodies = [
        (await logs.page(post.account, LogFilter(), body_bytes=wanted))[0][0].body
        for wanted in (0, 2, 99, None)
    ]  # fmt: skip
    assert bodies == [b"", b"he", b"hello", b"hello"]


async def test_filters(logs, post) -> None:
    """Of one field any value counts, and every field that is given must match."""
    a = await post.send("https://A.example:81/x/y?q=1", labels=("l1", "l2"), caller_ip="10.0.0.1", queue="q")
    b = await post.send("http://b.example", topic="t", labels=("l2",), spec=Spec(flow=("k", 1, None, 1)))
    c = await post.send("https://a.example/z#f", schedule="s", caller_ip="10.0.0.2")
    cases = {
        a: [
            {"urls": ("https://A.example:81/x/y?q=1",)}, {"paths": ("/x/y",)}, {"paths": ("x/y", "/no")},
            {"labels": ("l1",)}, {"caller_ips": ("10.0.0.1",)}, {"queues": ("q", "r")}, {"ids": (a,)},
            {"hosts": ("a.example",), "labels": ("l2",)},
        ],
        b: [
            {"hosts": ("B.example",)}, {"topics": ("t",)}, {"flow_keys": ("k", "other")}, {"paths": ("/",)},
            {"urls": ("http://b.example",)},
        ],
        c: [{"schedules": ("s",)}, {"paths": ("/z",)}, {"hosts": ("a.example",), "caller_ips": ("10.0.0.2",)}],
    }  # fmt: skip
    for id_, filters in cases.items():
        for fields in filters:
            assert await told(logs, post, of(**fields)) == [(id_.job, "CREATED")], fields
    both = await told(logs, post, of(labels=("l1", "l2")))
    assert {job for job, _ in both} == {a.job, b.job}
    for nothing in ({"ids": ()}, {"flow_keys": ("none",)}, {"labels": ("l1",), "topics": ("t",)}, {"paths": ("/x",)}):
        assert await told(logs, post, of(**nothing)) == [], nothing


async def test_states(logs, post) -> None:
    await post.send("https://1.example")
    await post.deliver()
    await post.send("https://2.example")
    await post.kill()
    states = {State[name] for _, name in await told(logs, post, LogFilter(states=IN_PROGRESS))}
    assert states == {State.ACTIVE, State.ERROR}
    assert [name for _, name in await told(logs, post, LogFilter(states=(State.DELIVERED, State.FAILED)))] == [
        "FAILED", "DELIVERED"
    ]  # fmt: skip


@pytest.mark.parametrize("us", [122_500, 122_501, 123_000, 123_499])
async def test_times_are_inclusive_milliseconds_as_they_are_shown(logs, post, db, us) -> None:
    """Rounded, so that the time of a line finds the line."""
    await post.send()
    await db.execute("update event set at = '2026-11-26 12:00+00'::timestamptz + $1 * interval '1 microsecond'", us)
    at_ms = 1_795_694_400_123
    if us == 122_500:  # in the middle it counts for both
        at_ms = 1_795_694_400_122
        assert len(await told(logs, post, of(from_ms=at_ms + 1))) == 1
        return
    for fields, count in (
        ({"from_ms": at_ms}, 1), ({"from_ms": at_ms + 1}, 0), ({"to_ms": at_ms}, 1), ({"to_ms": at_ms - 1}, 0),
        ({"from_ms": at_ms, "to_ms": at_ms}, 1), ({"from_ms": -(10**30), "to_ms": 10**30}, 1),
    ):  # fmt: skip
        assert len(await told(logs, post, of(**fields))) == count, fields


async def test_another_accounts_ids_and_guessed_ones_give_nothing(logs, post, db) -> None:
    other = await Post.open(db, "b")
    id_ = await other.send()
    await post.send()
    for wanted in (id_, MessageId(id_.job, id_.salt ^ 1)):
        assert await told(logs, post, of(ids=(wanted,))) == []
        assert await logs.grouped(post.account, of(ids=(wanted,))) == ([], None)
    assert await told(logs, other, of(ids=(MessageId(id_.job, id_.salt ^ 1),))) == []
    assert await told(logs, other) == [(id_.job, "CREATED")]


# ── Pages ───────────────────────────────────────────────────────────────────────────────────────


async def pages(logs: Logs, post: Post, wanted: LogFilter, count: int, between=None) -> list[list[int]]:
    found, cursor = [], None
    while True:
        lines, cursor = await logs.page(post.account, wanted, cursor, count)
        found.append([line.message.id.job for line in lines])
        if cursor is None:
            return found
        if between:
            await between()


@pytest.mark.parametrize("wanted", [LogFilter(), of(labels=("l",)), LogFilter(states=(State.CREATED,))])
async def test_pages_hold_each_line_once_while_others_write(logs, post, wanted) -> None:
    ids = [await post.send(labels=("l",)) for _ in range(10)]

    async def write() -> None:
        await post.send(labels=("l",))

    found = await pages(logs, post, wanted, 4, write)
    assert [len(page) for page in found] == [4, 4, 2]
    assert [*chain(*found)] == [id_.job for id_ in reversed(ids)]


async def test_last_page_that_is_full_is_known_to_be_the_last(logs, post) -> None:
    for _ in range(4):
        await post.send(labels=("l",))
    for wanted in (LogFilter(), of(labels=("l",))):
        assert [len(page) for page in await pages(logs, post, wanted, 2)] == [2, 2]


async def test_rare_match_is_found_behind_many_others(logs, post, monkeypatch) -> None:
    monkeypatch.setattr(listing, "STRETCH", 3)
    monkeypatch.setattr(listing, "STRETCH_MAX", 5)
    first = await post.send(labels=("rare",))
    for _ in range(20):
        await post.send()
    second = await post.send(labels=("rare",))
    assert await pages(logs, post, of(labels=("rare",)), 2) == [[second.job, first.job]]
    assert await pages(logs, post, of(labels=("rare",)), 1) == [[second.job], [first.job]]
    monkeypatch.setattr(listing, "WALK_MAX", 8)
    assert [*chain(*await pages(logs, post, of(labels=("rare",)), 1))] == [second.job, first.job]


async def test_page_ends_where_its_bodies_are_large(logs, post, monkeypatch) -> None:
    monkeypatch.setattr(module, "PAGE_BYTES_MAX", 2_500)
    ids = [await post.send(body=b"x" * size) for size in (10, 9_000, 1_000, 1_000, 1_000)]
    found, cursor = [], None
    while True:
        lines, cursor = await logs.page(post.account, LogFilter(), cursor, body_bytes=None)
        found.append([line.message.id.job for line in lines])
        assert all(line.body for line in lines)
        if cursor is None:
            break
    assert [len(page) for page in found] == [2, 1, 1, 1]
    assert [*chain(*found)] == [id_.job for id_ in reversed(ids)]
    assert len(await told(logs, post)) == 5, "without bodies there is room"


@pytest.mark.parametrize(
    "cursor",
    [
        "", "x", "log", "log_1", "log_1_2_3", "log_1_2_3_4", "log_-1_2", "log_01_2", "log_1_2 ", "dlq_1_2", "logs_1_2_3_4",
        "log_9999999999999999999_1", "log_1_9999999999999999999", "log_1_9223372036854775808", "log_¹_2", "null",
        "log_253370764800000001_1", "log_1_2\n",
    ],
)  # fmt: skip
async def test_cursor_of_another_list_or_none_at_all_is_refused(logs, post, cursor) -> None:
    with pytest.raises(UsageError, match="cursor"):
        await logs.page(post.account, LogFilter(), cursor)
    if not cursor.startswith("logs_"):
        with pytest.raises(UsageError, match="cursor"):
            await logs.grouped(post.account, LogFilter(), cursor)


def test_cursor_keeps_the_microsecond() -> None:
    place = Place(NEWEST.at - timedelta(microseconds=1), NEWEST.id)
    assert places_of("a", cursor_of("a", place)) == [place]
    assert places_of("a", cursor_of("a", NEWEST, place), 2) == [NEWEST, place]


# ── Groups ──────────────────────────────────────────────────────────────────────────────────────


async def test_groups_are_by_message_the_newest_line_first(logs, post) -> None:
    first = await post.send("https://1.example")
    second = await post.send("https://2.example")
    jobs = await post.claim()
    await post.end([job for job in jobs if job.id == first.job], Completed(), OK)
    groups, cursor = await logs.grouped(post.account, LogFilter())
    assert cursor is None
    assert [group.id for group in groups] == [first, second]
    assert [[line.state.name for line in group.lines] for group in groups] == [
        ["DELIVERED", "ACTIVE", "CREATED"], ["CREATED"]
    ]  # fmt: skip
    groups, _ = await logs.grouped(post.account, LogFilter(states=(State.CREATED,)))
    assert [group.id for group in groups] == [second, first]
    assert [len(group.lines) for group in groups] == [1, 1]
    groups, _ = await logs.grouped(post.account, of(ids=(first,)), body_bytes=None)
    assert [group.id for group in groups] == [first]


async def test_message_that_moves_on_between_two_pages_is_on_one_of_them(logs, post) -> None:
    ids = [await post.send(f"https://{number}.example") for number in range(5)]
    seen, cursor = [], None
    while True:
        groups, cursor = await logs.grouped(post.account, LogFilter(), cursor, 2)
        seen += [group.id for group in groups]
        if cursor is None:
            break
        await post.end(await post.claim(), Completed(), OK)  # all of them get new lines
        await post.send("https://new.example")
    assert seen == ids[::-1]


async def test_groups_end_where_their_bodies_are_large(logs, post, monkeypatch) -> None:
    monkeypatch.setattr(module, "PAGE_BYTES_MAX", 2_500)
    ids = [await post.send(body=b"x" * size) for size in (1_000, 1_000, 1_000, 1_000)]
    seen, cursor, sizes = [], None, []
    while True:
        groups, cursor = await logs.grouped(post.account, LogFilter(), cursor, body_bytes=None)
        seen += [group.id for group in groups]
        sizes.append(len(groups))
        if cursor is None:
            break
    assert seen == ids[::-1]
    assert max(sizes) == 2
    await post.kill()
    groups, _ = await logs.grouped(post.account, of(ids=(ids[0],)), body_bytes=None)
    assert [len(group.lines) for group in groups] == [4], "too much even for one: its lines come without"
    assert {line.body for line in groups[0].lines} == {b""}


async def test_empty_log(logs, post) -> None:
    assert await logs.page(post.account, LogFilter()) == ([], None)
    assert await logs.grouped(post.account, LogFilter()) == ([], None)


# ── Cost ────────────────────────────────────────────────────────────────────────────────────────

MANY = 200_000


@pytest.fixture
async def busy(post: Post, db: Database) -> MessageId:
    """200,000 lines of 50,000 messages of this account and another; returns one message in the middle."""
    await db.execute("select make_weeks('event', now() - interval '14 days', 2)")
    await db.execute("insert into account (name, key_id, keys) values ('b', 'k', 'x')", timeout_s=60)
    await db.execute(
        "insert into message (id, account_id, salt, url, host, method, spec, not_before, labels) "
        "select n, 1 + n % 2, n, 'https://x.example/' || n % 7, 'x.example', 'POST', '{}', now(), "
        "case when n % 10000 = 0 then array['rare'] end from generate_series(1, $1::int) n",
        MANY // 4, timeout_s=60,
    )  # fmt: skip
    await db.execute(
        "insert into event (at, account_id, message_id, state) "
        "select now() - make_interval(secs => (12 * 86400.0) * ($1 - n) / $1), 1 + (n / 4 + 1) % 2, n / 4 + 1, 1 + n % 2 "
        "from generate_series(0, $1::int - 1) n",
        MANY, timeout_s=60,
    )  # fmt: skip
    await db.execute("analyze message", timeout_s=60)
    await db.execute("analyze event", timeout_s=60)
    assert post.account == 1
    return MessageId(30_000, 30_000)


@pytest.mark.timeout(120)
async def test_page_costs_the_same_however_long_the_log(logs, post, busy, db) -> None:
    """Seven runs, so that the plan that serves all arguments alike is in use."""
    cases = {
        "newest": LogFilter(),
        "a message": of(ids=(busy,)),
        "a label": of(labels=("rare",)),
        "a state": LogFilter(states=(State.ACTIVE,)),
        "a time": of(to_ms=round((await db.now()).timestamp() * 1000) - 6 * 86_400_000),
    }
    for name, wanted in cases.items():
        took = []
        for _ in range(7):
            start = perf_counter()
            lines, _ = await logs.page(post.account, wanted, count=10 if name == "a label" else 100)
            took.append(perf_counter() - start)
        assert lines or name == "a message"
        # A rare label is looked for in all that there is; the others touch a page.
        assert min(took) < (2.0 if name == "a label" else 0.1), (name, took)
    for mode in ("force_generic_plan", "force_custom_plan"):
        await check_plans(post, db, busy, mode)


async def check_plans(post: Post, db: Database, busy: MessageId, mode: str) -> None:
    kinds = (
        "bigint, bigint[], bigint[], text[], text[], text[], text[], text[], text[], text[], text[], text[], timestamptz, "
        "timestamptz, timestamptz, bigint, bigint, bigint, smallint[], int, bigint, boolean"
    )
    for sql, ids, index in (
        (module._LINES, None, "account_id_at_id_idx"),
        (module._LINES_OF, (busy,), "message_id_idx"),
    ):
        arguments = [*Filter(ids=ids).arguments(post.account), *NEWEST, 101, 101, None, 0, 1 << 20, True]
        literals = ", ".join(
            "null" if a is None else f"'{{{','.join(map(str, a))}}}'" if isinstance(a, list) else f"'{a}'"
            for a in arguments
        )
        async with db.transaction() as tx:
            await tx.execute(f"set local plan_cache_mode = {mode}")
            await tx.execute(f"prepare q ({kinds}) as {sql}")
            rows = await tx.fetch(f"explain (analyze, costs off, timing off) execute q ({literals})")
            await tx.execute("deallocate q")
        plan = "\n".join(row[0] for row in rows)
        assert index in plan, plan
        # Weeks without a line are not worth an index, and cost nothing either.
        read = [line for line in plan.splitlines() if "Seq Scan on" in line and "actual rows=0" not in line]
        assert not [line for line in read if "never executed" not in line], plan
