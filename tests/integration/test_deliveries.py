"""Signed deliveries over a socket: who is let in, what each does, and that it does it once."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from io import StringIO
from time import time
from typing import Any

import anyio
import httpx
import jwt
import pytest

from daemon.db import handovers
from daemon.db.pool import Database
from daemon.domain.job import JobId, NewJob, Retryable, Settlement
from daemon.domain.window import floor_to, rfc3339
from daemon.queue.postgres import PostgresQueue
from daemon.telemetry.logs import configure
from daemon.worker.poll import POLL
from tests.qstash_stand_in import signature
from tests.web_kit import (
    CALLBACK,
    CURRENT,
    FAILURE,
    NEXT,
    ORCHESTRATE,
    PUBLIC_URL,
    QUOTA,
    QUOTA_ALIAS,
    ROUTES,
    WORKER,
    Web,
    keys,
    open_web,
    relay_to,
)
from tests.web_kit import DeliverySettings as Limits

pytestmark = pytest.mark.anyio

NOTHING = dict.fromkeys(("tick", "delivery", "handover", "job", "ready", "due"), 0)
DAY = timedelta(days=1)


@pytest.fixture
async def web(db: Database) -> AsyncIterator[Web]:
    async with open_web(db) as opened:
        yield opened


@pytest.fixture
def log() -> StringIO:
    stream = StringIO()
    configure(level="info", style="json", stream=stream)
    return stream


def lines(log: StringIO, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in log.getvalue().splitlines()]
    return [line for line in found if line["event"] == event]


def deep_token(iat: str) -> str:
    """A token whose claims nobody has signed, with something odd for a time."""
    claims = base64.urlsafe_b64encode(f'{{"iat":{iat}'.encode()).decode().rstrip("=")
    return f"e30.{claims}.e30"


async def add_connections(db: Database, count: int) -> None:
    await db.execute("insert into tenant (name) values ('acme')")
    await db.execute(
        """insert into connection (tenant_id, name, provider, base_url, credential, credential_key_id,
             credential_print, since)
           select t.id, 'c' || n, 'openai', 'https://x.test', '', '', '', now()
           from tenant t, generate_series(1, $1::int) n""",
        count,
    )


async def hand_over(web: Web, count: int = 1) -> list[JobId]:
    """Batches as a tick leaves them: rows that wait for QStash."""
    jobs = [NewJob(POLL, b'{"connections":[]}', delay=timedelta(hours=1)) for _ in range(count)]
    async with web.db.transaction() as tx:
        ids = await web.queue.enqueue(jobs, tx)
        await handovers.hand_over(tx, ids, floor_to(await web.db.now(), 300))
    return ids


async def at_once(count: int, send: Any) -> list[httpx.Response]:
    answers: list[httpx.Response] = []

    async def one() -> None:
        answers.append(await send())

    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(one)
    return answers


# ── Who is let in ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "fault",
    [
        {"headers": {"upstash-signature": ""}},
        {"headers": {"upstash-signature": "no.jwt"}},
        {"headers": {"upstash-signature": "a.b.c"}},
        {"key": "sig_of_somebody_else000000000000"},
        {"signed_body": b'{"batch":2}'},
        {"signed_url": "https://other.example/api/poll/worker"},
        {"signed_url": "http://127.0.0.1"},
        {"exp": int(time()) - 1},
        {"nbf": int(time()) + 3600},
        {"iat": int(time()) + 3600},
        {"iss": "Somebody"},
        {"body": None},
        {"body": 5},
        {"sub": None},
        {"body_bytes": b"\xff\xfe{}"},
        {"headers": {"upstash-signature": deep_token("[" * 3_000)}},
        {"headers": {"upstash-signature": deep_token("1" + "0" * 400)}},
    ],
    ids=lambda fault: ",".join(f"{name}" for name in fault),
)
async def test_whoever_cannot_prove_to_be_qstash_changes_nothing(
    web: Web, log: StringIO, fault: dict[str, Any]
) -> None:
    """One line in the log, and nothing of the body in it."""
    told = dict(fault)
    body = told.pop("body_bytes", b'{"batch":1,"note":"hush"}')
    for path in ROUTES:
        answer = await web.deliver(path, body, **told)
        assert answer.status_code == 401, answer.text
        assert set(answer.json()) == {"error"}
        line = lines(log, "delivery.refused")[-1]
        assert (line["status"], line["route"], line["request_id"]) == (401, path, "msg_1")
    assert len(lines(log, "delivery.refused")) == len(ROUTES)
    assert await web.counts() == NOTHING
    assert "hush" not in log.getvalue()
    assert CURRENT not in log.getvalue()


async def test_other_algorithms_are_refused(web: Web) -> None:
    """A token without a signature, or signed by another scheme, is the classic hole of such checks."""
    claims = jwt.decode(signature(PUBLIC_URL + ORCHESTRATE, b"{}", key=CURRENT), options={"verify_signature": False})
    for algorithm, key in (("none", None), ("HS512", CURRENT.ljust(64, "0"))):
        token = jwt.encode(claims, key, algorithm=algorithm)
        answer = await web.deliver(ORCHESTRATE, headers={"upstash-signature": token})
        assert answer.status_code == 401
    assert await web.counts() == NOTHING


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"exp": int(time()) - 1}, "expired"),
        ({"signed_url": "https://other.example/api"}, "https://other.example/api"),
        ({"signed_body": b"[]"}, "body hash"),
        ({"key": "sig_of_somebody_else".ljust(32, "0")}, "Signature verification failed"),
    ],
)
async def test_the_reason_of_a_refusal_is_told(web: Web, fault: dict[str, Any], says: str) -> None:
    """A wrong public URL must look different from a wrong key, or nobody finds it."""
    for key in (CURRENT, NEXT):
        answer = await web.deliver(ORCHESTRATE, **{"key": key, **fault})
        assert says in answer.json()["error"], answer.text


async def test_an_id_as_long_as_a_book_is_no_trouble(web: Web) -> None:
    """It is not signed."""
    long = {"upstash-message-id": "abcdefgh" * 2_500}
    assert (await web.deliver(ORCHESTRATE, headers=long)).json()["created"] is True
    assert await web.db.fetchval("select length(message_id) from delivery") == 64


async def test_a_body_that_announces_its_size_is_refused_at_once(web: Web) -> None:
    head = f"POST {ORCHESTRATE} HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n".encode()
    with anyio.fail_after(5):
        assert (await web.raw(head)).startswith(b"HTTP/1.1 413 ")


async def test_both_keys_are_good_so_that_they_can_be_rotated(web: Web) -> None:
    assert (await web.deliver(ORCHESTRATE, key=CURRENT)).status_code == 200
    assert (await web.deliver(ORCHESTRATE, key=NEXT, message="msg_2")).status_code == 200


async def test_each_region_has_its_own_keys(db: Database) -> None:
    given = {
        "eu_central_1": keys("sig_eu_1000000000000000000000000", "sig_eu_2000000000000000000000000"),
        "us_east_1": keys("sig_us_1000000000000000000000000", "sig_us_2000000000000000000000000"),
    }
    async with open_web(db, given=given) as web:
        for region, key, status in (
            ("EU-CENTRAL-1", "sig_eu_2000000000000000000000000", 200),
            ("US-EAST-1", "sig_us_1000000000000000000000000", 200),
            ("US-EAST-1", "sig_eu_1000000000000000000000000", 401),
            ("MARS-1", "sig_eu_1000000000000000000000000", 401),
            ("", "sig_eu_1000000000000000000000000", 401),
        ):
            answer = await web.deliver(ORCHESTRATE, key=key, headers={"upstash-region": region})
            assert answer.status_code == status, (region, key, answer.text)
    given[""] = keys()
    async with open_web(db, given=given) as web:
        assert (await web.deliver(ORCHESTRATE, headers={"upstash-region": "MARS-1"})).status_code == 200
        assert (await web.deliver(ORCHESTRATE, headers={"upstash-region": "EU-CENTRAL-1"})).status_code == 401


async def test_the_public_url_is_ours_and_never_what_a_request_claims(web: Web) -> None:
    """Behind a proxy `Host` and its kin name somebody else, or whatever an attacker wants."""
    lies = {"host": "tallyd.example", "x-forwarded-host": "evil.example", "x-forwarded-proto": "https"}
    assert (await web.deliver(ORCHESTRATE, headers=lies)).status_code == 200
    signed = "https://evil.example" + ORCHESTRATE
    lies = {"host": "evil.example", "x-forwarded-host": "evil.example", "x-forwarded-proto": "https"}
    assert (await web.deliver(ORCHESTRATE, signed_url=signed, headers=lies)).status_code == 401


async def test_a_clock_that_is_a_little_behind_waits_instead_of_refusing(web: Web) -> None:
    """The SDK refuses what was signed in its future, and each retry of QStash would be as far ahead again."""
    answer = await web.deliver(ORCHESTRATE, iat=int(time()) + 1)
    assert answer.status_code == 200
    assert len(web.slept) == 1
    assert 0 < web.slept[0] <= 1
    assert (await web.deliver(ORCHESTRATE, iat=int(time()) + 60)).status_code == 401
    assert len(web.slept) == 1, "nobody waits for a minute"


async def test_without_keys_nobody_is_let_in(db: Database) -> None:
    for given, public_url in (({}, PUBLIC_URL), (None, None)):
        async with open_web(db, given=given, public_url=public_url) as web:
            for path in ROUTES:
                answer = await web.deliver(path, {"batch": 1})
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "300")
                assert "QSTASH_CURRENT_SIGNING_KEY" in answer.json()["error"]
            assert await web.counts() == NOTHING


# ── What a body may be ──────────────────────────────────────────────────────────────────────────


OTHER_FORMS = (
    (ORCHESTRATE, b"not json", "body"),
    (ORCHESTRATE, b"[]", "object"),
    (ORCHESTRATE, b'{"slot": 5}', "$.slot"),
    (ORCHESTRATE, b'{"slot": "2026-11-26T10:00:00"}', "timezone"),
    (ORCHESTRATE, b'{"slots": "2026-11-26T10:00:00Z"}', "slots"),
    (ORCHESTRATE, b'{"slot": "2199-01-01T00:00:00Z"}', "future"),
    (ORCHESTRATE, b'{"slot": "2026-11-26T10:00:01Z"}', "no start of a"),
    (ORCHESTRATE, b'{"slot": "0001-01-01T00:00:00+23:59"}', "calendar"),
    (WORKER, b"", "body"),
    (WORKER, b"{}", "batch"),
    (WORKER, b'{"batch": "1"}', "$.batch"),
    (WORKER, b'{"batch": 0}', "$.batch"),
    (WORKER, b'{"batch": 9223372036854775808}', "$.batch"),
    (WORKER, b'{"batch": 1, "connections": [7]}', "connections"),
    (CALLBACK, b"null", "body"),
    (FAILURE, b"{", "body"),
    (WORKER, b"[" * 100_000, "body"),
)


async def test_a_signed_body_of_another_form_is_refused_for_good(web: Web) -> None:
    """QStash need not try again: the header says so."""
    for path, body, says in OTHER_FORMS:
        answer = await web.deliver(path, body)
        assert answer.status_code == 400, answer.text
        assert says in answer.json()["error"], (body, answer.text)
        assert answer.headers["upstash-nonretryable-error"] == "true"
    assert await web.counts() == NOTHING


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_over_the_limit_is_refused_and_its_sender_told(db: Database, is_chunked: bool) -> None:
    async with open_web(db, limits=Limits(body_bytes_max=1_000)) as web:
        fits = b" " * 998 + b"{}"
        assert (await web.deliver(ORCHESTRATE, fits)).status_code == 200
        token = signature(PUBLIC_URL + ORCHESTRATE, fits + b" ", key=CURRENT)

        async def chunks() -> AsyncIterator[bytes]:
            yield fits
            yield b" "

        content = chunks() if is_chunked else fits + b" "
        answer = await web.client.post(ORCHESTRATE, content=content, headers={"upstash-signature": token})
        assert answer.status_code == 413
        assert answer.headers["upstash-nonretryable-error"] == "true"
        assert (await web.counts())["tick"] == 1


async def test_a_body_without_end_is_cut(db: Database) -> None:
    async with open_web(db, limits=Limits(body_bytes_max=1_000)) as web:
        head = f"POST {ORCHESTRATE} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\n".encode()
        answer = await web.raw(head, b" " * 20_000)
        assert answer.startswith(b"HTTP/1.1 413 ")


async def test_a_body_that_does_not_arrive_ends_in_408(db: Database) -> None:
    async with open_web(db, limits=Limits(body_s=0.05)) as web:
        head = f"POST {ORCHESTRATE} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n".encode()
        assert (await web.raw(head, b"{")).startswith(b"HTTP/1.1 408 ")
        assert await web.counts() == NOTHING


async def test_a_head_that_does_not_arrive_ends_in_408(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn itself waits for ever: a thousand such connections would shut everybody out."""
    monkeypatch.setattr("daemon.web.server.HEAD_S", 0.05)
    async with open_web(db) as web:
        assert (await web.raw(b"POST /api/po")).startswith(b"HTTP/1.1 408 ")
        assert (await web.raw()).startswith(b"HTTP/1.1 408 ")


async def test_a_head_without_end_is_cut(web: Web) -> None:
    """Many headers, one long one, or trailers: nobody's memory is ours to fill."""
    start = f"POST {ORCHESTRATE} HTTP/1.1\r\nhost: x\r\n".encode()
    for head in (
        start + b"x: y\r\n" * 20_000,
        start + b"x: " + b"y" * 100_000,
        b"GET /" + b"a" * 100_000,
    ):
        pieces = [head[at : at + 4_096] for at in range(0, len(head), 4_096)]
        with anyio.fail_after(5):  # well before the time for heads is over
            assert (await web.raw(*pieces))[:13] in (b"", b"HTTP/1.1 431 "), head[:60]
    chunked = start + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: y\r\n"
    assert (await web.raw(chunked + b"\r\n")).startswith(b"HTTP/1.1 400 ")
    endless = [b"z" * 65_536] * 1_000
    with anyio.fail_after(5):
        assert (await web.raw(chunked[:-6] + b"x: ", *endless))[:13] in (b"", b"HTTP/1.1 413 ")
    assert await web.counts() == NOTHING


async def test_a_connection_that_says_nothing_is_closed_whatever_it_did_before(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 of them would shut everybody else out."""
    monkeypatch.setattr("daemon.web.server.HEAD_S", 0.05)
    monkeypatch.setattr("daemon.web.server.LINGER_S", 0.2)
    async with await anyio.connect_tcp("127.0.0.1", int(web.url.rpartition(":")[2])) as stream:
        await stream.send(b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b" 404 " in await stream.receive()
        await stream.send(b"\r\n")  # begins no request, and stops the timer for silent connections
        with anyio.fail_after(5):
            assert b" 408 " in await stream.receive()
    unread = b"POST /nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"
    assert b" 404 " in await web.raw(unread, b"z")


async def test_more_connections_than_are_bearable_are_told_at_once(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.web.server.CONNECTIONS_MAX", 3)
    port = int(web.url.rpartition(":")[2])
    streams = [await anyio.connect_tcp("127.0.0.1", port) for _ in range(3)]
    assert (await web.raw()).startswith(b"HTTP/1.1 503 ")
    for stream in streams:
        await stream.aclose()
    with anyio.fail_after(5):
        while (await web.client.get("/nothing")).status_code != 404:
            await anyio.lowlevel.checkpoint()


async def test_nobody_is_sent_to_another_host(web: Web) -> None:
    answer = await web.client.post(f"{WORKER}/", headers={"host": "evil.example"})
    assert answer.status_code == 404
    assert "location" not in answer.headers


async def test_a_sender_that_goes_away_leaves_nothing(web: Web, log: StringIO) -> None:
    head = f"POST {ORCHESTRATE} HTTP/1.1\r\nhost: x\r\ncontent-length: 200\r\n\r\n{{".encode()
    async with await anyio.connect_tcp("127.0.0.1", int(web.url.rpartition(":")[2])) as stream:
        await stream.send(head)
    with anyio.fail_after(5):
        while not lines(log, "delivery.refused"):
            await anyio.lowlevel.checkpoint()
    assert await web.counts() == NOTHING


async def test_what_is_not_there_is_json_too(web: Web) -> None:
    assert (await web.client.get("/api/poll/worker")).status_code == 405
    answer = await web.client.post("/api/nothing")
    assert (answer.status_code, answer.json()) == (404, {"error": "not found"})
    assert "server" not in answer.headers


# ── Without a database ──────────────────────────────────────────────────────────────────────────


async def test_a_database_that_hangs_is_503_in_time(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.web.delivery.ANSWER_S", 0.1)
    monkeypatch.setattr("daemon.web.delivery.SKEW_S", 0.0)
    (batch,) = await hand_over(web)
    async with web.db.transaction() as tx:
        await tx.fetch("select from handover for update")
        answer = await web.deliver(FAILURE, failure_of(batch))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "15")
    assert (await web.deliver(FAILURE, failure_of(batch))).json()["released"] is True


async def test_postgres_away_is_503_and_passes(database_url: str) -> None:
    """QStash keeps the message and comes again; the listener stays up."""
    async with relay_to(database_url) as relay:
        db = await Database.open(relay.url, pool_max=2)
        async with open_web(db) as web:
            (batch,) = await hand_over(web)
            await relay.cut()
            told = failure_of(batch)
            for path, body in ((ORCHESTRATE, {}), (WORKER, {"batch": batch}), (CALLBACK, told), (FAILURE, told)):
                answer = await web.deliver(path, body)
                assert answer.status_code == 503, (path, answer.text)
                assert int(answer.headers["retry-after"]) > 0
            relay.mend()
            assert (await web.deliver(WORKER, {"batch": batch})).json() == {"batch": batch, "released": True}
            assert (await web.deliver(ORCHESTRATE)).json()["created"] is True
        await db.close()


# ── Ticks ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_tick_is_made_once_however_often_it_is_asked_for(web: Web) -> None:
    await add_connections(web.db, 25)
    today = rfc3339(floor_to(await web.db.now(), 86_400))
    answers = await at_once(3, lambda: web.deliver(ORCHESTRATE, b""))
    assert sorted(a.json()["created"] for a in answers) == [False, False, True]
    (made,) = [a.json() for a in answers if a.json()["created"]]
    assert made == {"slot": today, "created": True, "batches": 3, "connections": 25}
    other = await web.deliver(ORCHESTRATE, {"slot": today}, message="msg_2")
    assert other.json() == {"slot": today, "created": False, "batches": 0, "connections": 0}
    old = rfc3339(floor_to(await web.db.now(), 86_400) - DAY)
    late = await web.deliver(ORCHESTRATE, {"slot": old}, message="msg_3")
    assert (late.status_code, late.json()["created"], late.json()["slot"]) == (200, False, old)
    assert await web.db.fetchval("select count(*) from job where kind = 'poll'") == 3
    assert await web.db.fetchrow("select via, request_id from tick") == ("qstash", "msg_1")


async def test_a_message_that_comes_again_in_a_later_slot_makes_no_second_tick(web: Web) -> None:
    """QStash delivers at least once: a copy of yesterday's message is no order for today."""
    first = (await web.deliver(ORCHESTRATE)).json()
    assert first["created"] is True
    await web.db.execute("update tick set slot_at = slot_at - interval '1 day'")
    again = (await web.deliver(ORCHESTRATE)).json()
    assert (again["created"], again["slot"]) == (False, first["slot"])
    assert await web.db.fetchval("select count(*) from tick") == 1
    assert (await web.deliver(ORCHESTRATE, message="msg_of_today")).json()["created"] is True


async def test_a_message_counts_only_once_its_tick_is_committed(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marked as seen, then crashed, it would be lost: mark and tick are one transaction."""

    async def crash(*_: object) -> None:
        raise RuntimeError("the process dies here")

    with monkeypatch.context() as patch:
        patch.setattr("daemon.db.ticks.finish", crash)
        assert (await web.deliver(ORCHESTRATE)).status_code == 500
    assert await web.counts() == NOTHING
    assert (await web.deliver(ORCHESTRATE)).json()["created"] is True


async def test_batches_wait_for_qstash_only_where_it_can_be_asked(db: Database) -> None:
    await add_connections(db, 5)
    async with open_web(db, hands_over=False) as web:
        assert (await web.deliver(ORCHESTRATE)).json()["batches"] == 1
    assert await db.fetchval("select count(*) from ready") == 1
    assert not await db.fetchval("select (select count(*) from handover) + (select count(*) from due)")


# ── Releases ────────────────────────────────────────────────────────────────────────────────────


async def test_a_batch_is_released_once(web: Web) -> None:
    one, two = await hand_over(web, 2)
    answers = await at_once(3, lambda: web.deliver(WORKER, {"batch": one}))
    assert {a.status_code for a in answers} == {200}
    assert sorted(a.json()["released"] for a in answers) == [False, False, True]
    assert {a.json()["batch"] for a in answers} == {one}
    assert [r["id"] for r in await web.db.fetch("select id from ready")] == [one]
    assert [r["id"] for r in await web.db.fetch("select id from due")] == [two]
    assert await web.db.fetchval("select released_by from handover where job_id = $1", one) == "delivery"


async def test_a_batch_that_runs_or_is_done_is_left_alone(web: Web) -> None:
    (batch,) = await hand_over(web)
    await web.deliver(WORKER, {"batch": batch})
    worker = await web.queue.register_worker("test")
    (job,) = (await web.queue.claim(worker, 5)).jobs
    assert (await web.deliver(WORKER, {"batch": batch})).json()["released"] is False
    await web.queue.settle([Settlement(job, Retryable("for now", 3600), 1)])
    assert (await web.deliver(WORKER, {"batch": batch})).json()["released"] is False
    assert await web.db.fetchval("select count(*) from due where attempt = 1") == 1, "its wait is not cut short"
    assert (await web.deliver(WORKER, {"batch": 999_999})).json() == {"batch": 999_999, "released": False}


async def test_a_late_first_delivery_does_not_cut_a_retry_short(web: Web) -> None:
    """The deadline had let the batch run, it failed, and waits: only then QStash delivers for the first time."""
    (batch,) = await hand_over(web)
    await web.db.execute("update due set run_at = now()")
    await web.queue.promote()
    worker = await web.queue.register_worker("test")
    (job,) = (await web.queue.claim(worker, 5)).jobs
    await web.queue.settle([Settlement(job, Retryable("for now", 3600), 1)])
    assert (await web.deliver(WORKER, {"batch": batch})).json()["released"] is False
    assert (await web.deliver(FAILURE, failure_of(batch))).json()["released"] is False
    assert await web.db.fetchval("select count(*) from due where attempt = 1") == 1


async def test_only_batches_that_were_handed_over_can_be_released(web: Web) -> None:
    """A signature is no licence to run any job that waits."""
    (other,) = await web.queue.enqueue([NewJob(POLL, b"{}", delay=timedelta(hours=1))])
    assert (await web.deliver(WORKER, {"batch": other})).json()["released"] is False
    assert await web.db.fetchval("select count(*) from due") == 1


async def test_a_release_wakes_a_worker_that_sleeps(web: Web, database_url: str) -> None:
    (batch,) = await hand_over(web)
    heard = anyio.Event()
    async with anyio.create_task_group() as group:
        listening = anyio.Event()

        def on_wake() -> None:
            if listening.is_set():
                heard.set()
            listening.set()

        group.start_soon(web.queue.waker.run)
        group.start_soon(PostgresQueue(web.db).waker.listen, on_wake)
        await listening.wait()
        await web.deliver(WORKER, {"batch": batch})
        with anyio.fail_after(5):
            await heard.wait()
        group.cancel_scope.cancel()


# ── Callbacks ───────────────────────────────────────────────────────────────────────────────────


def failure_of(batch: int, **more: Any) -> dict[str, Any]:
    source = base64.b64encode(json.dumps({"batch": batch}).encode()).decode()
    return {"status": 503, "sourceMessageId": "msg_published", "sourceBody": source, "url": PUBLIC_URL, **more}


async def test_a_callback_only_records(web: Web) -> None:
    """It follows every attempt, and means no more than that a delivery was accepted."""
    (batch,) = await hand_over(web)
    answer = await web.deliver(CALLBACK, failure_of(batch, status=200))
    assert answer.json() == {"recorded": True, "status": 200}
    row = await web.db.fetchrow("select reported_status, released_at from handover")
    assert row == (200, None)
    assert await web.db.fetchval("select count(*) from due") == 1


async def test_a_failure_brings_its_batch_forward_once(web: Web) -> None:
    (batch,) = await hand_over(web)
    answers = await at_once(3, lambda: web.deliver(FAILURE, failure_of(batch)))
    assert sorted(a.json()["released"] for a in answers) == [False, False, True]
    assert await web.db.fetchrow("select released_by, reported_status from handover") == ("failure", 503)
    assert await web.db.fetchval("select count(*) from ready") == 1
    assert (await web.deliver(WORKER, {"batch": batch})).json()["released"] is False


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"status": "503", "sourceMessageId": 7, "sourceBody": "###"},
        {"status": [1], "sourceMessageId": None, "sourceBody": 5},
        {"status": 200, "sourceBody": "\u00e4\u00f6"},
        {"status": 10**30, "sourceBody": base64.b64encode(b"{}").decode()},
        {"status": -1, "sourceMessageId": "msg\u0000", "sourceBody": base64.b64encode(b'{"batch":"x"}').decode()},
        {"sourceHeader": {"a": ["b"]}, "notBefore": "1", "createdAt": 1, "unheard": {"of": 1}},
    ],
)  # fmt: skip
async def test_callbacks_about_nothing_of_ours_are_taken_and_do_nothing(web: Web, told: dict[str, Any]) -> None:
    (batch,) = await hand_over(web)
    for path in (CALLBACK, FAILURE):
        answer = await web.deliver(path, told)
        assert answer.status_code == 200, answer.text
        assert answer.json()["recorded"] is False
    assert await web.db.fetchval("select count(*) from due where id = $1", batch) == 1


async def test_a_callback_is_found_by_its_message_where_the_body_is_redacted(web: Web) -> None:
    (batch,) = await hand_over(web)
    await handovers.mark_published(web.db, {batch: "msg_published"})
    told = {"status": 200, "sourceMessageId": "msg_published", "sourceBody": base64.b64encode(b"REDACTED:ab").decode()}
    assert (await web.deliver(CALLBACK, told)).json()["recorded"] is True


# ── Being found again ───────────────────────────────────────────────────────────────────────────


async def test_the_request_id_is_the_messages_and_comes_back(web: Web, log: StringIO) -> None:
    answer = await web.deliver(ORCHESTRATE, message="msg_7")
    assert answer.headers["x-request-id"] == "msg_7"
    (line,) = lines(log, "delivery.accepted")
    assert (line["request_id"], line["route"], line["created"]) == ("msg_7", ORCHESTRATE, True)
    hostile = await web.deliver(ORCHESTRATE, headers={"upstash-message-id": "x" * 300})
    assert hostile.headers["x-request-id"] != "x" * 300


# ── Quotas ──────────────────────────────────────────────────────────────────────────────────────


async def add_quota_sources(db: Database, count: int, *, tenant: str = "acme", state: str = "active") -> list[int]:
    await db.execute("insert into tenant (name) values ($1) on conflict do nothing", tenant)
    rows = await db.fetch(
        """insert into connection (tenant_id, name, provider, base_url, credential, credential_key_id,
             credential_print, since, state)
           select t.id, $3 || n, 'redis_quota', 'redis://x.test', '', '', '', now(), $3
           from tenant t, generate_series(1, $1::int) n where t.name = $2 returning id""",
        count,
        tenant,
        state,
    )
    return sorted(row["id"] for row in rows)


async def polled(db: Database) -> list[list[int]]:
    """The connections of each poll that waits, batch by batch."""
    rows = await db.fetch("select body from job j join ready r using (id) order by id")
    bodies = [json.loads(row["body"]) for row in rows]
    assert all(body["mode"] == "poll" for body in bodies)
    return [body["connections"] for body in bodies]


@pytest.mark.parametrize("route", [QUOTA, QUOTA_ALIAS])
@pytest.mark.parametrize("body", [b"", b"{}"])
async def test_quota_sync_enqueues_every_source_that_is_synced(web: Web, route: str, body: bytes) -> None:
    ids = await add_quota_sources(web.db, 12)
    await add_quota_sources(web.db, 1, state="paused")
    await add_quota_sources(web.db, 1, state="archived")
    await add_connections_beside(web.db)
    answer = await web.deliver(route, body)
    assert (answer.status_code, answer.json()) == (200, {"created": True, "connections": 12, "batches": 12})
    assert await polled(web.db) == [[id_] for id_ in ids]


async def add_connections_beside(db: Database) -> None:
    await db.execute(
        """insert into connection (tenant_id, name, provider, base_url, credential, credential_key_id,
             credential_print, since) select id, 'openai', 'openai', 'https://x.test', '', '', '', now() from tenant"""
    )


async def test_quota_sync_of_one_tenant_and_of_one_source(web: Web) -> None:
    ids = await add_quota_sources(web.db, 2)
    await add_quota_sources(web.db, 2, tenant="other")
    assert (await web.deliver(QUOTA, {"tenant": "acme", "name": "active2"}, message="a")).json()["connections"] == 1
    assert await polled(web.db) == [[ids[1]]]
    assert (await web.deliver(QUOTA, {"tenant": "acme"}, message="b")).json()["connections"] == 2
    assert await polled(web.db) == [[ids[1]], [ids[0]]]


async def test_the_same_message_three_times_at_once_syncs_once(web: Web) -> None:
    await add_quota_sources(web.db, 3)
    answers = await at_once(3, lambda: web.deliver(QUOTA))
    assert sorted(answer.json()["created"] for answer in answers) == [False, False, True]
    assert len(await polled(web.db)) == 3


async def test_a_sync_that_waits_is_enough_for_those_who_ask_meanwhile(web: Web) -> None:
    """While no worker runs, or all of them are behind, a cron of every minute leaves one poll and not a thousand."""
    ids = await add_quota_sources(web.db, 3)
    for message in "abc":
        answer = await web.deliver(QUOTA, message=message)
        assert answer.json() == {"created": True, "connections": 3, "batches": 3}
    assert await polled(web.db) == [[id_] for id_ in ids]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"tenant": "nobody"}, "tenant"),
        ({"tenant": "acme", "name": "nothing"}, "name"),
        ({"name": "active1"}, "tenant"),
        ({"colour": "red"}, "colour"),
        ({"tenant": 7}, "tenant"),
        (b"[]", "body"),
        (b"{", "body"),
    ],
)
async def test_a_sync_of_nothing_that_exists_is_refused_for_good(web: Web, body: object, named: str) -> None:
    await add_quota_sources(web.db, 1)
    answer = await web.deliver(QUOTA, body)
    assert answer.status_code == 400
    assert named in answer.json()["error"]
    assert answer.headers["upstash-nonretryable-error"] == "true"
    assert await polled(web.db) == []
