"""Dead letters of messages: found, dropped, and published anew."""

import anyio
import pytest

from daemon.db.pool import Database
from daemon.domain.account import Limits
from daemon.domain.errors import UsageError
from daemon.domain.job import Completed, Discarded
from daemon.queue import letters as module
from daemon.queue import listing
from daemon.queue.gates import TooManyQueuesError
from daemon.queue.letters import LetterFilter, Letters, NoSuchLetterError
from daemon.queue.listing import Filter
from daemon.queue.maintenance import QueueMaintenance
from daemon.queue.message import Attempted, Callback, MessageId, Spec, dead_name, parse_dead_name
from tests.message_kit import BROKEN, OK, Post, jobs_of

pytestmark = pytest.mark.anyio


@pytest.fixture
async def post(db: Database) -> Post:
    return await Post.open(db)


@pytest.fixture
def letters(post: Post) -> Letters:
    return make(post)


def make(post: Post) -> Letters:
    return Letters(post.db, post.queue, post.messages)


def of(**fields) -> LetterFilter:
    return LetterFilter(Filter(**fields))


async def bury(post: Post, *urls: str, **fields) -> list[MessageId]:
    """Dead letters, each in a transaction of its own."""
    ids = []
    for url in urls:
        ids.append(await post.send(url, **fields))
        await post.kill()
    return ids


async def names(letters: Letters, post: Post, wanted: LetterFilter | None = None) -> list[str]:
    page, cursor = await letters.page(post.account, wanted or LetterFilter())
    assert cursor is None
    return [letter.id for letter in page]


async def consistent(db: Database) -> bool:
    return await QueueMaintenance(db).conservation() == []


def test_name_of_a_letter_is_read_strictly() -> None:
    assert parse_dead_name("1725323658779-12") == 12
    for text in (
        "",
        "-",
        "1-",
        "-1",
        "1-0",
        "0-1",
        "1-01",
        "01-1",
        "1-1 ",
        " 1-1",
        "1-1-1",
        "1--1",
        "+1-1",
        "a-1",
        "¹-1",
        "1-1\n",
    ):
        assert parse_dead_name(text) is None, text
    assert parse_dead_name(f"1-{(1 << 63) - 1}") == (1 << 63) - 1
    assert parse_dead_name(f"1-{1 << 63}") is None
    assert parse_dead_name("1-" + "9" * 5_000) is None


async def test_letter_tells_what_the_last_attempt_met(letters, post) -> None:
    [id_] = await bury(post, "https://x.example/a", body=b"\x00body", labels=("l",))
    [letter], cursor = await letters.page(post.account, LetterFilter())
    assert cursor is None
    assert letter.message.id == id_
    assert (letter.status, letter.response_body, letter.error) == (500, b"no", BROKEN.error)
    assert letter.response_header == {"X-Why": ["a", "b"]}
    assert (letter.body, letter.message.labels) == (b"\x00body", ("l",))
    assert letter.id == dead_name(letter.at, id_.job)
    assert await letters.get(post.account, letter.id) == letter


async def test_letter_that_nobody_told_of_has_its_reason(letters, post, db) -> None:
    """Its worker was lost too often: no attempt has ended."""
    await post.send()
    for _ in range(5):
        await post.queue.claim(post.worker, 1)
        await db.execute("update worker set seen_at = '-infinity'")
        await post.queue.rescue()
        post.worker = await post.queue.register_worker()
    [letter], _ = await letters.page(post.account, LetterFilter())
    assert (letter.status, letter.error, letter.response_header, letter.body) == (0, "worker lost", {}, b"")


async def test_filters(letters, post) -> None:
    [a] = await bury(post, "https://a.example/x", labels=("l1", "l2"), caller_ip="10.0.0.1", queue="q")
    b = await post.send("https://b.example", topic="t", schedule="s", spec=Spec(flow=("k", 1, None, 1)))
    await post.end(await post.claim(), Discarded("no route"), Attempted(error="no route"))
    [letter_b, letter_a], _ = await letters.page(post.account, LetterFilter())
    assert (letter_a.message.id, letter_b.message.id) == (a, b)
    at_ms = int(letter_b.id.partition("-")[0])
    for wanted in (
        of(urls=("https://a.example/x",)), of(labels=("l2", "no")), of(caller_ips=("10.0.0.1",)), of(queues=("q",)),
        of(ids=(a,)), LetterFilter(statuses=(500, 404)), of(to_ms=at_ms - 1),
    ):  # fmt: skip
        assert await names(letters, post, wanted) == [letter_a.id], wanted
    for wanted in (
        of(topics=("t",)), of(schedules=("s",)), of(flow_keys=("k",)), LetterFilter(statuses=(0,)),
        LetterFilter(Filter(topics=("t",)), (0,)),
    ):  # fmt: skip
        assert await names(letters, post, wanted) == [letter_b.id], wanted
    for wanted in (of(ids=()), LetterFilter(Filter(topics=("t",)), (500,)), of(labels=("l1",), topics=("t",))):
        assert await names(letters, post, wanted) == [], wanted


async def test_pages_newest_first_hold_each_letter_once(letters, post, db) -> None:
    ids = await bury(post, *(f"https://{number}.example" for number in range(5)))
    await db.execute("update dead set at = '2026-11-26 12:00+00' where id <= $1", ids[3].job)
    found, cursor = [], None
    while True:
        page, cursor = await letters.page(post.account, LetterFilter(), cursor, 2)
        found.append([letter.message.id for letter in page])
        if cursor is None:
            break
        await bury(post, "https://new.example")
    assert found == [[ids[4], ids[3]], [ids[2], ids[1]], [ids[0]]]
    for cursor in ("log_1_2", "x", "", "dlq_1_2_3_4"):
        with pytest.raises(UsageError, match="cursor"):
            await letters.page(post.account, LetterFilter(), cursor)


async def test_letters_of_many_others_lie_between(letters, post, db, monkeypatch) -> None:
    monkeypatch.setattr(listing, "STRETCH", 2)
    monkeypatch.setattr(listing, "STRETCH_MAX", 2)
    other = await Post.open(db, "b")
    [mine] = await bury(post, "https://mine.example")
    await bury(other, *(f"https://{number}.example" for number in range(7)))
    page, cursor = await letters.page(post.account, LetterFilter(), None, 1)
    assert ([letter.message.id for letter in page], cursor) == ([mine], None)


async def test_page_ends_where_its_bodies_are_large(letters, post, monkeypatch) -> None:
    monkeypatch.setattr(module, "PAGE_BYTES_MAX", 2_500)
    for size in (9_000, 1_000, 1_000, 1_000):
        await bury(post, "https://x.example", body=b"x" * size)
    sizes, cursor = [], None
    while True:
        page, cursor = await letters.page(post.account, LetterFilter(), cursor)
        sizes.append([len(letter.body) for letter in page])
        if cursor is None:
            break
    assert sizes == [[1_000, 1_000], [1_000], [9_000]]
    assert (await letters.drop_matching(post.account, LetterFilter()))[0] == 4, "which needs no bodies"


# ── Dropping ────────────────────────────────────────────────────────────────────────────────────


async def test_dropped_letter_leaves_its_message_and_log(letters, post, db) -> None:
    ids = await bury(post, "https://a.example", "https://b.example")
    newest, oldest = await names(letters, post)
    assert await letters.drop(post.account, [newest, newest, "1-999", "junk"]) == 1
    assert await names(letters, post) == [oldest]
    assert await letters.drop(post.account, [newest]) == 0
    assert await letters.get(post.account, newest) is None
    assert await db.fetchval("select count(*) from message") == 2
    assert await db.fetchval("select count(*) from event where message_id = $1", ids[1].job) == 4
    assert await db.fetchval("select count(*) from job") == 1
    assert await consistent(db)


async def test_matching_ones_are_dropped_page_by_page(letters, post) -> None:
    await bury(post, *(f"https://{number}.example" for number in range(4)), labels=("l",))
    await bury(post, "https://other.example")
    deleted, cursor = await letters.drop_matching(post.account, of(labels=("l",)), count=3)
    assert deleted == 3
    assert await letters.drop_matching(post.account, of(labels=("l",)), cursor, 3) == (1, None)
    assert len(await names(letters, post)) == 1


async def test_letter_that_died_again_has_another_name(letters, post, db) -> None:
    [id_] = await bury(post, "https://x.example")
    [name] = await names(letters, post)
    await db.execute("update dead set at = at - interval '1 hour'")
    assert await letters.get(post.account, name) is None
    assert await letters.drop(post.account, [name]) == 0
    with pytest.raises(NoSuchLetterError):
        await letters.retry(post.account, [name], Limits())
    [name] = await names(letters, post)
    assert (await letters.get(post.account, name)).message.id == id_


# ── Retrying ────────────────────────────────────────────────────────────────────────────────────


async def test_retried_letter_is_a_new_message_like_the_old_one(letters, post, db) -> None:
    spec = Spec(
        method="PUT", header={"X-A": ["1", "2"]}, retries=4, retry_delay="1000", timeout_s=9, delay_s=3600,
        callback=Callback("https://c.example"), redact="body", flow=("k", 2, 5, 60), endpoint="e",
    )  # fmt: skip
    fields = {"topic": "t", "schedule": "s", "labels": ("l",), "caller_ip": "10.0.0.1", "body": b"\x00body"}
    old = await post.send("https://x.example:81/a?b", spec, not_before=0.0, queue="q", **fields)
    await post.kill()
    await post.deliver()  # its callback
    [name] = await names(letters, post)
    [published] = await letters.retry(post.account, [name], Limits())
    assert published.id != old
    assert not published.is_copy
    assert await names(letters, post) == []
    assert await db.fetchval("select count(*) from job") == 1
    [job] = await post.claim()
    assert (job.id, job.attempt, job.max_attempts) == (published.id.job, 1, 5)
    [load] = await post.messages.load([job])
    message = load.message
    assert (message.url, message.spec, load.body) == ("https://x.example:81/a?b", spec, b"\x00body")
    assert (message.topic, message.schedule, message.labels) == ("t", "s", ("l",))
    assert (message.caller_ip, message.queue, message.source) == ("10.0.0.1", "q", None)
    row = await db.fetchrow("select host, payload_id, flow_id from message where id = $1", job.id)
    assert (row["host"], row["payload_id"]) == ("x.example", job.id)
    assert row["flow_id"] is not None
    assert await consistent(db)


async def test_changes_hold_for_the_new_message(letters, post, db) -> None:
    await bury(post, "https://x.example")
    [name] = await names(letters, post)
    [published] = await letters.retry(post.account, [name], Limits(), {"retries": 0, "delay_s": 60, "method": "PATCH"})
    row = await db.fetchrow(
        "select method, not_before - created_at as delay, spec from message where id = $1", published.id.job
    )
    assert (row["method"], row["delay"].total_seconds()) == ("PATCH", 60)
    assert await db.fetchval("select max_attempts from job where id = $1", published.id.job) == 1


async def test_several_are_retried_in_the_order_given_or_not_at_all(letters, post, db, monkeypatch) -> None:
    for number in range(4):
        await bury(post, f"https://{number}.example", body=b"%d" % number * 1_000)
    found = await names(letters, post)
    before = await db.fetchval("select count(*) from message")
    with pytest.raises(NoSuchLetterError, match="1-999") as caught:
        await letters.retry(post.account, [*found, "1-999", "junk"], Limits())
    assert caught.value.names == ("1-999", "junk")
    assert await db.fetchval("select count(*) from message") == before
    assert await names(letters, post) == found
    monkeypatch.setattr(module, "PAGE_BYTES_MAX", 2_500)  # in parts, all in one transaction
    order = [found[2], found[0], found[3], found[1], found[0]]
    published = await letters.retry(post.account, order, Limits())
    assert [one.url for one in published] == [f"https://{number}.example" for number in (1, 3, 0, 2)]
    jobs = await post.claim()
    assert {job.id for job in jobs} == set(jobs_of(published))
    bodies = {load.message.url[8:9]: load.body for load in await post.messages.load(jobs)}
    assert bodies == {str(number): b"%d" % number * 1_000 for number in range(4)}


async def test_matching_ones_are_retried_page_by_page(letters, post) -> None:
    await bury(post, *(f"https://{number}.example" for number in range(3)), labels=("l",))
    await bury(post, "https://other.example")
    first, cursor = await letters.retry_matching(post.account, of(labels=("l",)), Limits(), None, 2)
    second, end = await letters.retry_matching(post.account, of(labels=("l",)), Limits(), cursor, 2)
    assert ([one.url for one in first + second], end) == ([f"https://{number}.example" for number in (2, 1, 0)], None)
    assert len(await names(letters, post)) == 1


async def test_letter_that_two_retry_at_once_is_published_once(letters, post, db) -> None:
    await bury(post, *(f"https://{number}.example" for number in range(3)))
    found = await names(letters, post)
    published, refused = [], []

    async def retry(order: list[str]) -> None:
        try:
            published.append(await letters.retry(post.account, order, Limits()))
        except NoSuchLetterError as error:
            refused.append(error)

    async with anyio.create_task_group() as tasks:
        for number in range(4):
            tasks.start_soon(retry, found[:: -1 if number % 2 else 1])
    assert ([len(one) for one in published], len(refused)) == ([3], 3)
    assert len(await post.live()) == 3
    assert await consistent(db)


async def test_limit_of_the_account_leaves_the_letter_where_it_is(letters, post, db) -> None:
    await bury(post, "https://x.example", queue="q")
    await db.execute("delete from gate")
    found = await names(letters, post)
    with pytest.raises(TooManyQueuesError):
        await letters.retry(post.account, found, Limits(queues=0))
    assert await names(letters, post) == found
    assert len(await letters.retry(post.account, found, Limits())) == 1
    assert len(await post.claim()) == 1


async def test_retried_callback_calls_nobody_back(letters, post, db) -> None:
    await post.send(spec=Spec(failure_callback=Callback("https://c.example")))
    await post.kill()
    await post.kill()
    [callback, source], _ = await letters.page(post.account, LetterFilter())
    assert callback.message.source == source.message.id.job
    await letters.retry(post.account, [callback.id], Limits())
    [job] = await post.claim()
    await post.end([job], Completed(), OK)
    assert await post.live() == []
    assert await names(letters, post) == [source.id]


async def test_account_has_nothing_of_another_ones(letters, post, db) -> None:
    other = await Post.open(db, "b")
    await bury(other, "https://x.example")
    [name] = await names(make(other), other)
    assert await names(letters, post) == []
    assert await letters.get(post.account, name) is None
    assert await letters.drop(post.account, [name]) == 0
    with pytest.raises(NoSuchLetterError):
        await letters.retry(post.account, [name], Limits())
    assert await letters.drop_matching(post.account, LetterFilter()) == (0, None)
    assert await letters.retry_matching(post.account, LetterFilter(), Limits()) == ([], None)
    assert await names(make(other), other) == [name]
