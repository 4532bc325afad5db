"""The stand-in against the official SDK, over real sockets: what its tests rely on is what the SDK and a receiver see."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import httpx
import pytest
from aiohttp import web
from qstash import AsyncQStash, Receiver
from qstash.errors import (
    DailyMessageLimitExceededError,
    QStashError,
    RateLimitExceededError,
    SignatureError,
)

from tests.qstash_stand_in import StandIn, open_stand_in

pytestmark = pytest.mark.anyio

AT_ONCE = {"retries": 1, "backoff": lambda _: 0.0}


class Destination:
    """Answers 200, or as told, and keeps what it was sent."""

    def __init__(self) -> None:
        self.url = ""
        self.got: list[tuple[str, httpx.Headers, bytes]] = []
        self.answers: list[web.Response] = []
        self.gate: anyio.Event | None = None
        self.most = self._now = 0
        self._came = anyio.Event()

    async def handle(self, request: web.BaseRequest) -> web.Response:
        body = await request.read()
        self.got.append((request.raw_path, httpx.Headers(request.raw_headers), body))
        answer = self.answers.pop(0) if self.answers else web.Response(text="thanks")
        self._now += 1
        self.most = max(self.most, self._now)
        self._came.set()
        self._came = anyio.Event()
        try:
            if self.gate is not None:
                await self.gate.wait()
        finally:
            self._now -= 1
        return answer

    async def holds(self, count: int) -> None:
        """Wait until so many requests are here at the same time."""
        with anyio.fail_after(10):
            while self.most < count:
                await self._came.wait()

    def headers(self, path: str) -> list[httpx.Headers]:
        return [headers for got, headers, _ in self.got if got == path]


@pytest.fixture
async def there() -> AsyncIterator[Destination]:
    destination = Destination()
    server = web.Server(destination.handle, handler_cancellation=True, access_log=None)
    listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    destination.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    yield destination
    listening.close()
    server.pre_shutdown()
    await server.shutdown(1.0)


@pytest.fixture
async def qstash() -> AsyncIterator[StandIn]:
    async with open_stand_in(retry_delay_s=0.001) as opened:
        yield opened


@asynccontextmanager
async def client_of(qstash: StandIn, **settings) -> AsyncIterator[AsyncQStash]:
    client = AsyncQStash(settings.pop("token", qstash.token), base_url=qstash.url, **{"retry": False} | settings)
    yield client
    await client.http._client.aclose()


@pytest.fixture
async def sdk(qstash: StandIn) -> AsyncIterator[AsyncQStash]:
    async with client_of(qstash) as client:
        yield client


def verify(qstash: StandIn, url: str, headers: httpx.Headers, body: bytes) -> None:
    receiver = Receiver(qstash.current_key, qstash.next_key)
    receiver.verify(signature=headers["upstash-signature"], body=body.decode(), url=url)


async def test_a_publish_arrives_signed_with_its_path_its_headers_and_its_body_unchanged(qstash, sdk, there):
    url = f"{there.url}/a//b?x=1&y=%2F"
    sent = await sdk.message.publish_json(
        url=url, body={"é": 1}, headers={"X-Kind": "poll", "User-Agent": "mine"}, label="l"
    )
    await qstash.idle()
    ((path, headers, body),) = there.got
    verify(qstash, url, headers, body)
    assert path == "/a//b?x=1&y=%2F"
    assert json.loads(body) == {"é": 1}
    assert headers["content-type"] == "application/json"
    assert headers["x-kind"] == "poll"
    assert headers["user-agent"] == "Upstash-QStash"
    assert headers["upstash-message-id"] == sent.message_id == qstash.messages[0].id
    assert (headers["upstash-retried"], headers["upstash-label"]) == ("0", "l")
    assert (qstash.messages[0].state, [status for status, _ in qstash.messages[0].attempts]) == ("delivered", [200])
    assert qstash.requests == [("POST", f"/v2/publish/{url}")]


async def test_what_was_not_asked_for_is_absent(qstash, sdk, there):
    await sdk.message.publish(url=there.url, body=b"\x00\xff")
    await qstash.idle()
    ((path, headers, body),) = there.got
    assert (path, body) == ("/", b"\x00\xff")
    assert not {"content-type", "upstash-schedule-id", "upstash-label", "authorization"} & headers.keys()


async def test_a_signature_is_refused_for_another_body_url_key_or_time(qstash):
    url, body = "https://example.com/", b"{}"
    receiver = Receiver(qstash.current_key, qstash.next_key)
    receiver.verify(signature=qstash.sign(url, body, key=qstash.next_key), body="{}", url=url)
    for wrong in (
        qstash.sign(url, b"[]"),
        qstash.sign("https://example.com", body),
        qstash.sign(url, body, key="sig_" + "0" * 28),
        qstash.sign(url, body, exp=1),
        qstash.sign(url, body, iss="upstash"),
        qstash.sign(url, body, nbf=None),
        qstash.sign(url, body, body="bm8="),
    ):
        with pytest.raises(SignatureError):
            receiver.verify(signature=wrong, body="{}", url=url)


async def test_after_a_rotation_the_receiver_still_knows_the_key(qstash, sdk, there):
    before = await sdk.signing_key.get()
    assert (before.current, before.next) == (qstash.current_key, qstash.next_key)
    qstash.rotate()
    await sdk.message.publish_json(url=there.url, body=1)
    await qstash.idle()
    signature = there.got[0][1]["upstash-signature"]
    Receiver(before.current, before.next).verify(signature=signature, body="1", url=there.url)
    assert (await sdk.signing_key.rotate()).current != before.next


async def test_a_batch_deduplicates_against_itself_and_against_what_came_before(qstash, sdk, there):
    item = {"url": there.url, "body": 1, "callback": f"{there.url}/done", "failure_callback": f"{there.url}/failed"}
    first = await sdk.message.batch_json([item | {"deduplication_id": key} for key in ("a", "b", "a")])
    assert [answer.deduplicated for answer in first] == [False, False, True]
    assert first[2].message_id == first[0].message_id
    again = await sdk.message.publish_json(**item, deduplication_id="b")
    assert (again.deduplicated, again.message_id) == (True, first[1].message_id)
    await qstash.idle()
    assert [message.dedup_id for message in qstash.messages] == ["a", "b"]
    assert (len(there.headers("/")), len(there.headers("/done")), len(there.headers("/failed"))) == (2, 2, 0)
    qstash.dedup_window_s = 0.0
    assert not (await sdk.message.publish_json(**item, deduplication_id="b")).deduplicated
    await qstash.idle()


async def test_content_is_an_id_too(qstash, sdk, there):
    for body, expected in ((1, False), (1, True), (2, False)):
        sent = await sdk.message.publish_json(url=there.url, body=body, content_based_deduplication=True)
        assert sent.deduplicated is expected
    await qstash.idle()


async def test_a_batch_with_one_bad_item_stores_nothing(qstash, sdk, there):
    for bad in (
        {"deduplication_id": "a:b"},
        {"url": "no-such-group"},
        {"queue": "q"},
        {"retries": -1},
        {"delay": "soon"},
        {"callback": "here"},
        {"body": "x" * qstash.body_bytes_max},
    ):
        with pytest.raises(QStashError, match="status: 400"):
            await sdk.message.batch_json([{"url": there.url}, {"url": there.url} | bad])
    assert qstash.messages == []


async def test_a_failure_is_retried_and_each_attempt_called_back(qstash, sdk, there):
    there.answers = [web.Response(status=503, text="busy"), web.Response(status=200, text="done")]
    sent = await sdk.message.publish_json(
        url=f"{there.url}/job",
        body={"n": 1},
        headers={"X-Kind": "poll"},
        callback=f"{there.url}/callback",
        callback_headers={"Forward-X-Back": "yes", "Retries": "0"},
    )
    await qstash.idle()
    assert [headers["upstash-retried"] for headers in there.headers("/job")] == ["0", "1"]
    assert {headers["upstash-message-id"] for headers in there.headers("/job")} == {sent.message_id}
    signatures = {headers["upstash-signature"] for _, headers, _ in there.got}
    assert len(signatures) == len(there.got) == 4
    for path, headers, body in there.got:
        verify(qstash, there.url + path, headers, body)
    assert [headers["x-back"] for headers in there.headers("/callback")] == ["yes", "yes"]
    first, second = sorted((message.json for message in qstash.callbacks), key=lambda it: it["status"], reverse=True)
    assert (first["status"], base64.b64decode(first["body"]), first["maxRetries"]) == (503, b"busy", 3)
    assert (second["status"], second["retried"], "retried" in first) == (200, 1, False)
    assert (first["sourceMessageId"], base64.b64decode(first["sourceBody"])) == (sent.message_id, b'{"n": 1}')
    assert first["sourceHeader"] == {"Content-Type": ["application/json"], "X-Kind": ["poll"]}
    assert isinstance(first["createdAt"], int)
    assert [(message.retries, message.source.id) for message in qstash.callbacks] == [(0, sent.message_id)] * 2


@pytest.mark.parametrize(
    ("headers", "status", "attempts"),
    [({}, 500, 3), ({}, 489, 3), ({"Upstash-NonRetryable-Error": "true"}, 489, 1)],
)
async def test_a_final_failure_calls_the_failure_callback_once(qstash, sdk, there, headers, status, attempts):
    there.answers = [web.Response(status=status, headers=headers) for _ in range(attempts)]
    sent = await sdk.message.publish_json(url=there.url, failure_callback=f"{there.url}/failed", retries=2)
    await qstash.idle()
    (message,) = qstash.messages
    assert (message.state, len(message.attempts)) == ("failed", attempts)
    ((_, got, body),) = [got for got in there.got if got[0] == "/failed"]
    verify(qstash, f"{there.url}/failed", got, body)
    payload = json.loads(body)
    assert (payload["status"], payload.get("retried", 0)) == (status, attempts - 1)
    assert payload["sourceMessageId"] == sent.message_id
    assert payload["dlqId"]


async def test_nobody_there_is_a_failure_without_a_status(qstash, sdk, there):
    for expected in (None, 0):
        qstash.network_error_status = expected
        await sdk.message.publish_json(url="http://127.0.0.1:1", retries=0, failure_callback=there.url)
        await qstash.idle()
        assert json.loads(there.got[-1][2]).get("status") == expected
    assert [status for status, _ in qstash.messages[0].attempts] == [0]


async def test_a_replay_keeps_the_id_and_is_signed_afresh(qstash, sdk, there):
    sent = await sdk.message.publish_json(url=there.url, body=1)
    await qstash.idle()
    assert await qstash.deliver(qstash.messages[0]) == [200]
    there.gate = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(qstash.deliver, qstash.messages[0], 3, True)
        await there.holds(3)
        there.gate.set()
    assert {headers["upstash-message-id"] for headers in there.headers("/")} == {sent.message_id}
    assert len({headers["upstash-signature"] for headers in there.headers("/")}) == len(there.got) == 5
    assert len(qstash.messages) == 1


async def test_what_is_held_goes_out_by_hand_or_on_release(qstash, sdk, there):
    qstash.hold()
    await sdk.message.batch_json([{"url": there.url}, {"url": there.url}])
    await qstash.idle()
    assert there.got == []
    assert await qstash.deliver(qstash.messages[1]) == [200]
    qstash.hold(False)
    await qstash.idle()
    assert [headers["upstash-message-id"] for headers in there.headers("/")] == [
        qstash.messages[1].id,
        qstash.messages[0].id,
    ]


async def test_a_message_waits_for_its_time_and_nobody_waits_for_it(qstash, sdk, there):
    await sdk.message.publish_json(url=there.url, delay="1h30m")
    await sdk.message.publish_json(url=there.url, not_before=1)
    await qstash.idle()
    late, due = qstash.messages
    assert (late.state, due.state, len(there.got)) == ("created", "delivered", 1)
    assert (late.not_before - late.created_at).total_seconds() == 5400


async def test_a_slow_destination_holds_nobody_up(qstash, sdk, there):
    there.gate = anyio.Event()
    await sdk.message.batch_json([{"url": there.url}] * 50)
    await there.holds(50)
    there.gate.set()
    await qstash.idle()


async def test_a_schedule_is_replaced_whole_by_its_id(qstash, sdk, there):
    named = {"destination": f"{there.url}/tick", "schedule_id": "tallyd-tick"}
    assert await sdk.schedule.create_json(**named, cron="* * * * *", body=1, retries=7) == "tallyd-tick"
    await sdk.schedule.pause("tallyd-tick")
    assert await sdk.schedule.create(**named, cron="*/5 * * * *", headers={"X-Kind": "tick"}) == "tallyd-tick"
    (listed,) = await sdk.schedule.list()
    assert listed == await sdk.schedule.get("tallyd-tick")
    assert (listed.cron, listed.body, listed.retries, listed.paused) == ("*/5 * * * *", None, 3, True)
    assert listed.headers == {"X-Kind": ["tick"]}
    await sdk.schedule.resume("tallyd-tick")
    message = await qstash.fire("tallyd-tick")
    ((_, headers, body),) = there.got
    verify(qstash, named["destination"], headers, body)
    assert (message.state, headers["upstash-schedule-id"], headers["x-kind"]) == ("delivered", "tallyd-tick", "tick")
    assert (await qstash.fire("tallyd-tick")).id != message.id
    assert (await sdk.schedule.get("tallyd-tick")).last_schedule_states
    await sdk.schedule.delete("tallyd-tick")
    with pytest.raises(QStashError, match="404"):
        await sdk.schedule.get("tallyd-tick")
    with pytest.raises(QStashError, match="invalid cron"):
        await sdk.schedule.create(**named, cron="every minute")


async def test_the_clock_fires_what_is_not_paused_until_death(qstash, sdk, there):
    for name in ("on", "off"):
        await sdk.schedule.create(destination=f"{there.url}/{name}", cron="@hourly", schedule_id=name)
    await sdk.schedule.pause("off")
    qstash.on_schedule_every(0.001)
    await qstash.until(lambda: len(qstash.messages) >= 3)
    qstash.die()
    assert {message.schedule_id for message in qstash.messages} == {"on"}
    assert qstash._clock is None


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("daily", DailyMessageLimitExceededError),
        ("burst", RateLimitExceededError),
        ("quota", QStashError),
        ("server", QStashError),
        ("unauthorized", QStashError),
        ("malformed", json.JSONDecodeError),
        ("accept_then_cut", httpx.RemoteProtocolError),
    ],
)
async def test_a_refusal_is_the_error_that_the_sdk_has_for_it(qstash, sdk, there, kind, error):
    qstash.refuse(kind, count=1)
    with pytest.raises(error) as raised:
        await sdk.message.publish_json(url=there.url)
    assert type(raised.value) is error
    if kind in {"daily", "burst"}:
        assert (raised.value.remaining, int(raised.value.reset) > 0) == ("0", True)
    assert (qstash.refused, len(qstash.messages)) == (1, kind == "accept_then_cut")
    await sdk.message.publish_json(url=there.url)
    qstash.refuse(kind)
    for _ in range(2):
        with pytest.raises(error):
            await sdk.schedule.create(destination=there.url, cron="* * * * *")
    await sdk.signing_key.get()
    qstash.clear()
    await sdk.schedule.create(destination=there.url, cron="* * * * *")
    await qstash.idle()


async def test_a_caller_cut_off_after_the_write_finds_its_message_when_it_asks_again(qstash, there):
    qstash.refuse("accept_then_cut", count=1)
    async with client_of(qstash, retry=AT_ONCE) as sdk:
        (sent,) = await sdk.message.batch_json([{"url": there.url, "deduplication_id": "a"}])
    await qstash.idle()
    assert (sent.deduplicated, sent.message_id, len(there.got)) == (True, qstash.messages[0].id, 1)


async def test_a_request_that_hangs_ends_with_the_death(qstash, sdk, there):
    qstash.refuse("hang")
    async with anyio.create_task_group() as group:

        async def ask() -> None:
            with pytest.raises(httpx.RemoteProtocolError):
                await sdk.message.publish_json(url=there.url)

        group.start_soon(ask)
        await qstash.until(lambda: qstash.refused == 1)
        qstash.die()
    assert qstash.messages == []


async def test_a_wrong_token_is_refused(qstash, there):
    async with client_of(qstash, token="wrong") as sdk:
        with pytest.raises(QStashError, match=r"status: 401.*invalid token"):
            await sdk.message.publish_json(url=there.url)
    with pytest.raises(ValueError, match="no_such_kind"):
        qstash.refuse("no_such_kind")


async def test_a_death_cuts_everything_and_a_revival_on_the_same_port_delivers_what_was_accepted(qstash, sdk, there):
    there.gate = anyio.Event()
    sent = await sdk.message.publish_json(url=there.url)
    await there.holds(1)
    qstash.die()
    with pytest.raises(httpx.TransportError):  # the pooled connection was cut
        await sdk.signing_key.get()
    with pytest.raises(httpx.ConnectError):
        await sdk.signing_key.get()
    await qstash.idle()
    with pytest.raises(RuntimeError, match="dead"):
        await qstash.deliver(qstash.messages[0])
    there.gate.set()
    await qstash.revive()
    await qstash.idle()
    assert (await sdk.signing_key.get()).current == qstash.current_key
    (message,) = qstash.messages
    assert (message.id, message.state, message.cut, len(message.attempts)) == (sent.message_id, "delivered", 1, 1)
    assert [headers["upstash-retried"] for headers in there.headers("/")] == ["0", "0"]


async def test_a_failing_test_fails_with_its_own_error():
    with pytest.raises(ZeroDivisionError):
        async with open_stand_in():
            raise ZeroDivisionError
