"""Messages on their way to a real endpoint: what arrives, what is tried again, what is reported, and what is left behind."""

import base64
import json
from collections import Counter

import anyio
import pytest
from qstash import Receiver

from daemon.db.accounts import AccountStore
from daemon.db.pool import Database, Session
from daemon.db.secrets import Keyring
from daemon.domain.errors import StorageUnavailableError
from daemon.domain.job import Discarded
from daemon.domain.network import Guard
from daemon.queue.message import Attempted, Callback, Spec, dead_name
from daemon.queue.messages import Messages
from daemon.queue.postgres import PostgresQueue
from daemon.worker.push import Pusher
from tests.books_kit import until
from tests.message_kit import Post
from tests.push_kit import Arrived, Endpoint, Pushing, Reply, open_endpoint, open_pushing

pytestmark = pytest.mark.anyio


def verify(pushing: Pushing, one: Arrived, url: str) -> None:
    """As a receiver of the official SDK does."""
    receiver = Receiver(current_signing_key=pushing.keys.next, next_signing_key=pushing.keys.current)
    receiver.verify(signature=one.headers["upstash-signature"], body=one.body.decode(), url=url)


# ── What arrives ────────────────────────────────────────────────────────────────────────────────


async def test_a_message_arrives_as_it_was_published_and_is_signed(pushing: Pushing, endpoint: Endpoint) -> None:
    url = f"{endpoint.url}/a//b/%7E;x='1'?y=[2]&z=%2F"
    publication = pushing.publication(
        url,
        b'{"a": "\xc3\xa9"}',
        method="PUT",
        header={"Content-Type": ["application/json"], "X-Two": ["1", "2"], "Upstash-Message-Id": ["forged"]},
        labels=("one", "two"),
        caller_ip="192.0.2.1",
    )
    async with pushing.working():
        (made,) = await pushing.publish(publication)
        (one,) = await endpoint.has(1)
        await pushing.logs(made, "DELIVERED")
    assert (one.method, one.target, one.body) == ("PUT", url.removeprefix(endpoint.url), b'{"a": "\xc3\xa9"}')
    verify(pushing, one, url)
    assert [value for name, value in one.lines if name == "X-Two"] == ["1", "2"]
    assert {name: one.headers.get(name) for name in ("user-agent", "content-type", "upstash-retried")} == {
        "user-agent": "Upstash-QStash", "content-type": "application/json", "upstash-retried": "0",
    }  # fmt: skip
    assert (one.message_id, one.headers["upstash-label"], one.headers["upstash-caller-ip"]) == (
        str(made.id), "one,two", "192.0.2.1",
    )  # fmt: skip
    assert not {"accept", "accept-encoding"} & one.headers.keys()
    assert await pushing.states(made) == ["CREATED", "ACTIVE", "DELIVERED"]
    await pushing.is_quiet()


@pytest.mark.parametrize("body", [b"", bytes(range(256)), b"x" * 3_000_000], ids=["none", "binary", "large"])
async def test_any_body_arrives_whole_and_without_a_type_of_ours(
    pushing: Pushing, endpoint: Endpoint, body: bytes
) -> None:
    async with pushing.working():
        await pushing.publish(pushing.publication(f"{endpoint.url}/", body))
        (one,) = await endpoint.has(1)
    assert one.body == body
    assert "content-type" not in one.headers


async def test_each_attempt_is_signed_anew_with_the_current_key(pushing: Pushing, endpoint: Endpoint) -> None:
    endpoint.judge = lambda one: Reply(500 if one.retried == 0 else 200)
    async with pushing.working():
        (made,) = await pushing.publish(pushing.publication(f"{endpoint.url}/", retry_delay="3600000"))
        await pushing.logs(made, "RETRY")
        rotated = await pushing.accounts.rotate_keys(pushing.account)
        await pushing.queue.bring_forward([made.id.job])
        first, second = await endpoint.has(2)
    assert first.headers["upstash-signature"] != second.headers["upstash-signature"]
    verify(pushing, first, f"{endpoint.url}/")
    assert rotated.current == pushing.keys.next
    pushing.keys = rotated
    verify(pushing, second, f"{endpoint.url}/")
    assert first.message_id == second.message_id


# ── What is tried again ─────────────────────────────────────────────────────────────────────────


async def next_s(pushing: Pushing) -> float:
    """Seconds until the only waiting job is due."""
    return float(await pushing.db.fetchval("select extract(epoch from run_at - now()) from due"))


@pytest.mark.parametrize(
    ("fields", "reply", "wait_s"),
    [
        ({}, Reply(500), 12.18),
        ({"retry_delay": "1000 * (1 + retried) * 100"}, Reply(404), 100),
        ({"retry_delay": "1000"}, Reply(429, {"Retry-After": "77"}), 77),
        ({}, Reply(503, {"X-RateLimit-Reset-Requests": "1m30s", "Retry-After": "2"}), 90),
        ({}, Reply(302, {"Location": "http://127.0.0.1:1/"}), 12.18),
        ({}, None, 12.18),
    ],
    ids=["backoff", "expression", "retry-after", "reset", "redirect", "hung-up"],
)
async def test_a_failed_attempt_waits_as_it_is_told(
    pushing: Pushing, endpoint: Endpoint, fields: dict, reply: Reply | None, wait_s: float
) -> None:
    endpoint.judge = lambda _one: reply
    async with pushing.working():
        (made,) = await pushing.publish(pushing.publication(f"{endpoint.url}/", **fields))
        await pushing.logs(made, "RETRY")
        assert wait_s - 5 < await next_s(pushing) <= wait_s
    assert await pushing.states(made) == ["CREATED", "ACTIVE", "ERROR", "RETRY"]


async def test_after_the_last_attempt_it_is_a_dead_letter_with_what_was_answered(
    pushing: Pushing, endpoint: Endpoint
) -> None:
    endpoint.judge = lambda one: Reply(500, {"X-Why": "because"}, b"no" if one.retried else b"not yet")
    async with pushing.working():
        (made,) = await pushing.publish(pushing.publication(f"{endpoint.url}/", retries=1, retry_delay="0"))
        await pushing.logs(made, "FAILED")
    assert await pushing.states(made) == ["CREATED", "ACTIVE", "ERROR", "RETRY", "ACTIVE", "ERROR", "FAILED"]
    row = await pushing.db.fetchrow("select * from event where state = 6")
    assert (row["status"], row["response_body"], json.loads(row["response_header"])["X-Why"]) == (
        500,
        b"no",
        ["because"],
    )
    assert await pushing.db.fetchval("select reason from dead") == "the endpoint answered 500"
    assert [one.retried for one in endpoint.arrived] == [0, 1]


@pytest.mark.parametrize("status", [489, 400])
async def test_an_endpoint_can_ask_to_be_spared(pushing: Pushing, endpoint: Endpoint, status: int) -> None:
    endpoint.judge = lambda _one: Reply(status, {"Upstash-NonRetryable-Error": "true"})
    async with pushing.working():
        (made,) = await pushing.publish(pushing.publication(f"{endpoint.url}/"))
        await pushing.logs(made, "FAILED")
    assert len(endpoint.arrived) == 1


async def test_a_bare_489_is_a_failure_like_any_other(pushing: Pushing, endpoint: Endpoint) -> None:
    endpoint.judge = lambda _one: Reply(489)
    async with pushing.working():
        (made,) = await pushing.publish(pushing.publication(f"{endpoint.url}/"))
        await pushing.logs(made, "RETRY")


async def test_an_endpoint_that_says_nothing_in_time_has_failed(pushing: Pushing, endpoint: Endpoint) -> None:
    never = anyio.Event()

    async def judge(_one: Arrived) -> Reply:
        await never.wait()
        return Reply()

    endpoint.judge = judge
    async with pushing.working():
        (made,) = await pushing.publish(pushing.publication(f"{endpoint.url}/", timeout_s=1))
        await pushing.logs(made, "RETRY")
    assert "timed out" in await pushing.db.fetchval("select error from event where state = 3")


async def test_a_blocked_address_is_given_up_at_once_and_never_asked(database_url: str, endpoint: Endpoint) -> None:
    async with open_pushing(database_url, guard=Guard((), allows_all=False)) as pushing, pushing.working():
        (made,) = await pushing.publish(pushing.publication(f"{endpoint.url}/"))
        await pushing.logs(made, "FAILED")
        assert await pushing.states(made) == ["CREATED", "ACTIVE", "ERROR", "FAILED"]
        assert "loopback" in await pushing.db.fetchval("select error from event where state = 6")
    assert endpoint.connections == 0


# ── What is reported ────────────────────────────────────────────────────────────────────────────


async def test_each_attempt_is_reported_and_the_last_failure_too(pushing: Pushing, endpoint: Endpoint) -> None:
    endpoint.judge = lambda one: Reply(500, {"X-A": "b"}, b"\xff\x00") if one.target == "/work" else Reply()
    spec = {
        "callback": Callback(f"{endpoint.url}/cb?x=1", header={"X-Mine": ["1"]}),
        "failure_callback": Callback(f"{endpoint.url}/failed", method="PUT"),
        "redact": "header[x-secret]",
        "header": {"X-Secret": ["s3cret"], "X-Open": ["o"]},
    }
    async with pushing.working():
        (made,) = await pushing.publish(
            pushing.publication(f"{endpoint.url}/work", b"source", retries=1, retry_delay="0", **spec)
        )
        reports = await endpoint.has(2, "/cb")
        (failure,) = await endpoint.has(1, "/failed")
        await pushing.logs(made, "FAILED")

        async def is_done() -> bool:
            return not await pushing.db.fetchval("select count(*) from lease")

        await until(is_done, "the reports are settled")
    died_at = await pushing.db.fetchval("select at from dead")
    told = [json.loads(one.body) for one in reports]
    assert [report.get("retried") for report in told] == [None, 1]
    last = told[1]
    assert (last["status"], base64.b64decode(last["body"]), last["header"]["X-A"]) == (500, b"\xff\x00", ["b"])
    assert (last["sourceMessageId"], last["url"], last["maxRetries"]) == (str(made.id), f"{endpoint.url}/work", 1)
    assert base64.b64decode(last["sourceBody"]) == b"source"
    assert last["sourceHeader"]["X-Open"] == ["o"]
    assert last["sourceHeader"]["X-Secret"][0].startswith("REDACTED:")
    assert "dlqId" not in last
    assert json.loads(failure.body)["dlqId"] == dead_name(died_at, made.id.job)
    assert (failure.method, reports[0].headers["x-mine"], reports[0].headers["content-type"]) == (
        "PUT", "1", "application/json",
    )  # fmt: skip
    verify(pushing, reports[0], f"{endpoint.url}/cb?x=1")
    assert endpoint.at("/work")[0].headers["x-secret"] == "s3cret"  # delivered in clear
    assert len({one.message_id for one in [*reports, failure]}) == 3


async def test_a_failing_callback_makes_no_callback(pushing: Pushing, endpoint: Endpoint) -> None:
    endpoint.judge = lambda one: Reply(200 if one.target == "/work" else 500)
    callback = Callback(f"{endpoint.url}/cb", retries=0)
    async with pushing.working():
        await pushing.publish(pushing.publication(f"{endpoint.url}/work", callback=callback, failure_callback=callback))
        await endpoint.has(1, "/cb")

        async def is_dead() -> bool:
            return bool(await pushing.db.fetchval("select count(*) from dead"))

        await until(is_dead, "the callback is a dead letter")
    assert await pushing.db.fetchval("select count(*) from message") == 2


# ── What is lost, and is not ────────────────────────────────────────────────────────────────────


async def test_a_message_that_died_with_its_worker_is_reported_once(pushing: Pushing, endpoint: Endpoint) -> None:
    """Five workers in a row are lost with it; two replicas then look for whom nobody has told of."""
    callback = Callback(f"{endpoint.url}/failed")
    (made,) = await pushing.publish(pushing.publication(f"{endpoint.url}/work", failure_callback=callback))
    for _ in range(5):
        worker = await pushing.queue.register_worker("lost")
        assert (await pushing.queue.claim(worker, 1)).jobs
        await pushing.db.execute("update worker set seen_at = now() - interval '1 minute'")
        await pushing.queue.rescue()
    await pushing.db.execute("update dead set at = at - interval '1 minute'")
    others = Messages(pushing.db, PostgresQueue(pushing.db))
    told: list[int] = []

    async def mourn(messages: Messages) -> None:
        told.append(await messages.mourn())

    async with anyio.create_task_group() as group:
        for messages in (pushing.messages, others):
            group.start_soon(mourn, messages)
    assert sum(told) == 1
    assert await pushing.messages.mourn() == 0
    assert (await pushing.states(made))[-1] == "FAILED"
    async with pushing.working():
        (report,) = await endpoint.has(1, "/failed")
    assert json.loads(report.body)["sourceMessageId"] == str(made.id)


async def test_an_attempt_whose_job_was_cancelled_writes_nothing(pushing: Pushing, endpoint: Endpoint) -> None:
    arrived, go_on = anyio.Event(), anyio.Event()

    async def judge(_one: Arrived) -> Reply:
        arrived.set()
        await go_on.wait()
        return Reply()

    endpoint.judge = judge
    callback = Callback(f"{endpoint.url}/cb")
    async with pushing.working():
        (made,) = await pushing.publish(pushing.publication(f"{endpoint.url}/", callback=callback))
        await arrived.wait()
        assert await pushing.queue.cancel([made.id.job]) == {made.id.job}
        go_on.set()
        await pushing.is_quiet()
    assert "DELIVERED" not in await pushing.states(made)
    assert not endpoint.at("/cb")


async def test_one_dead_host_holds_up_nobody(pushing: Pushing, endpoint: Endpoint) -> None:
    never = anyio.Event()

    async def judge(_one: Arrived) -> Reply:
        await never.wait()
        return Reply()

    async with open_endpoint() as hung:
        hung.judge = judge
        async with pushing.working():
            await pushing.publish(*[pushing.publication(f"{hung.url}/{n}", timeout_s=60) for n in range(300)])
            await hung.has(32)
            await pushing.publish(*[pushing.publication(f"{endpoint.url}/{n}") for n in range(200)])
            await endpoint.has(200)
            assert hung.running_most == 32
            assert len(hung.arrived) == 32


async def test_many_messages_each_arrive_once(pushing: Pushing, endpoint: Endpoint) -> None:
    loops = [pushing.worker() for _ in range(3)]
    async with pushing.working(*loops):
        for _ in range(5):
            await pushing.publish(*[pushing.publication(f"{endpoint.url}/m") for _ in range(100)])
        await endpoint.has(500)
        await pushing.is_quiet()
    assert Counter(Counter(one.message_id for one in endpoint.arrived).values()) == {1: 500}
    assert endpoint.connections <= 3 * 64


async def test_an_outage_between_answer_and_commit_is_waited_out(pushing: Pushing, endpoint: Endpoint) -> None:
    """The endpoint has the message: to forget that would mean to send it again."""
    arrived = anyio.Event()
    failures = iter([True, True, False])
    settle = pushing.messages.settle

    async def settle_late(ends):
        from daemon.domain.errors import StorageUnavailableError

        if next(failures, False):
            raise StorageUnavailableError("away")
        return await settle(ends)

    pushing.messages.settle = settle_late  # the outage, at the one place where it matters
    endpoint.judge = lambda _one: (arrived.set(), Reply())[1]
    async with pushing.working():
        (made,) = await pushing.publish(pushing.publication(f"{endpoint.url}/"))
        await pushing.logs(made, "DELIVERED")
    assert len(endpoint.arrived) == 1


async def test_who_cannot_sign_leaves_the_message_alone(pushing: Pushing, endpoint: Endpoint) -> None:
    """A replica without the secret key, as in the middle of a rotation: no attempt is spent, nothing is sent."""
    stranger = AccountStore(pushing.db, Keyring([b"another key, and of 32 bytes too"]))
    loop = pushing.worker(Pusher(pushing.messages, stranger, pushing.client))
    async with pushing.working(loop):
        (made,) = await pushing.publish(pushing.publication(f"{endpoint.url}/"))

        async def is_put_off() -> bool:
            return await pushing.db.fetchval("select attempt from due") == 0

        await until(is_put_off, "the message is put off")
    assert not endpoint.arrived
    await pushing.queue.bring_forward([made.id.job])
    async with pushing.working():
        (one,) = await endpoint.has(1)
    assert one.retried == 0


async def test_a_message_with_a_single_attempt_does_not_lose_it_to_an_outage(
    pushing: Pushing, endpoint: Endpoint
) -> None:
    """Nothing was sent, so nothing was tried: without retries it would be dead, and nobody would have been asked."""
    failures = iter([True])
    load = pushing.messages.load

    async def load_late(jobs):
        if next(failures, False):
            raise StorageUnavailableError("away")
        return await load(jobs)

    pushing.messages.load = load_late
    async with pushing.working():
        (made,) = await pushing.publish(pushing.publication(f"{endpoint.url}/", retries=0))
        await pushing.logs(made, "DELIVERED")
    assert [one.retried for one in endpoint.arrived] == [0]


async def test_a_large_body_that_finds_no_room_spends_no_attempt(
    pushing: Pushing, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.worker.push.ROOM_S", 0.1, raising=False)
    never = anyio.Event()

    async def judge(one: Arrived) -> Reply:
        if one.target == "/slow":
            await never.wait()
        return Reply()

    endpoint.judge = judge
    pusher = Pusher(pushing.messages, pushing.accounts, pushing.client, 1 << 20)
    async with pushing.working(pushing.worker(pusher)):
        await pushing.publish(pushing.publication(f"{endpoint.url}/slow", b"x" * (1 << 20)))
        await endpoint.has(1)
        (made,) = await pushing.publish(pushing.publication(f"{endpoint.url}/", b"x" * (1 << 20), retries=0))

        async def is_put_off() -> bool:
            return await pushing.db.fetchval("select attempt from due where id = $1", made.id.job) == 0

        await until(is_put_off, "the message is put off")
        never.set()
        await pushing.logs(made, "DELIVERED")


# ── One that cannot be stored ───────────────────────────────────────────────────────────────────


async def test_a_response_that_postgres_refuses_spoils_no_other_end(pushing: Pushing, endpoint: Endpoint) -> None:
    await pushing.db.execute("alter table event add check (response_body is distinct from 'poison')")
    endpoint.judge = lambda one: Reply(500, {"X-Why": "x"}, b"poison" if one.target == "/7" else b"no")
    jobs = [pushing.publication(f"{endpoint.url}/{n}", retries=0) for n in range(20)]
    async with pushing.working():
        made = await pushing.publish(*jobs)
        for one in made:
            await pushing.logs(one, "FAILED")
    assert len(endpoint.arrived) == 20
    for one in made:
        assert await pushing.states(one) == ["CREATED", "ACTIVE", "ERROR", "FAILED"]
    rows = await pushing.db.fetch("select response_body, error from event where state = 6")
    assert Counter(row["response_body"] for row in rows) == {b"no": 19, None: 1}
    assert {row["error"] for row in rows} == {"the endpoint answered 500"}


async def test_a_callback_that_postgres_refuses_does_not_undo_the_delivery(
    pushing: Pushing, endpoint: Endpoint
) -> None:
    await pushing.db.execute("alter table message add check (host <> 'refused.example')")
    async with pushing.working():
        made = await pushing.publish(
            *[pushing.publication(f"{endpoint.url}/{n}", callback=Callback(f"{endpoint.url}/cb")) for n in range(5)],
            pushing.publication(f"{endpoint.url}/x", callback=Callback("https://refused.example/cb")),
        )
        for one in made:
            await pushing.logs(one, "DELIVERED")
        await endpoint.has(5, "/cb")
        await pushing.is_quiet()
    assert len(endpoint.arrived) == 11


async def test_a_failure_that_cannot_be_reported_does_not_keep_others_from_being_mourned(
    pushing: Pushing, endpoint: Endpoint
) -> None:
    good, bad = Callback(f"{endpoint.url}/failed"), Callback("https://refused.example/cb")
    made = await pushing.publish(
        *[pushing.publication(f"{endpoint.url}/", failure_callback=each) for each in (good, bad, good)]
    )
    await pushing.db.execute("alter table message add check (host <> 'refused.example')")
    await pushing.db.execute(
        "with x as (delete from ready returning id)"
        " insert into dead select id, now() - interval '1 minute', 1, 1, 'worker lost' from x"
    )
    assert await pushing.messages.mourn() == 3
    assert await pushing.messages.mourn() == 0
    for one in made:
        assert await pushing.states(one) == ["CREATED", "FAILED"]
    assert await pushing.db.fetchval("select count(*) from ready") == 2


async def test_a_message_that_this_version_cannot_read_is_left_to_another(pushing: Pushing, endpoint: Endpoint) -> None:
    made = await pushing.publish(*[pushing.publication(f"{endpoint.url}/{n}") for n in range(5)])
    await pushing.db.execute("update message set spec = '{\"retries\": []}' where id = $1", made[2].id.job)
    async with pushing.working():
        await endpoint.has(4)

        async def is_put_off() -> bool:
            return await pushing.db.fetchval("select attempt from due") == 0

        await until(is_put_off, "the message is put off")
    for one in (*made[:2], *made[3:]):
        assert await pushing.states(one) == ["CREATED", "ACTIVE", "DELIVERED"]


async def test_many_large_responses_are_written_in_portions(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each failure tells of its response twice, and each callback carries it as base64."""
    post = await Post.open(db)
    spec = Spec(callback=Callback("https://example.com/cb"))
    await post.publish(*[post.publication(spec=spec) for _ in range(30)])
    sizes: list[int] = []
    execute, fetch = Session.execute, Session.fetch

    def note(arguments: tuple[object, ...]) -> None:
        columns = [column for column in arguments if isinstance(column, list)]
        sizes.append(sum(len(value) for column in columns for value in column if isinstance(value, bytes)))

    async def noted_execute(session, sql, *arguments, **options):
        note(arguments)
        return await execute(session, sql, *arguments, **options)

    async def noted_fetch(session, sql, *arguments, **options):
        note(arguments)
        return await fetch(session, sql, *arguments, **options)

    monkeypatch.setattr(Session, "execute", noted_execute)
    monkeypatch.setattr(Session, "fetch", noted_fetch)
    assert all(await post.end(await post.claim(), Discarded("no"), Attempted(500, {}, bytes(1 << 20), "no")))
    assert max(sizes) <= 16 << 20
    assert sum(sizes) > 90 << 20
