"""`/v2` as no SDK speaks to it: bytes on a socket, and what has to be refused without storing anything."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from hashlib import sha256
from urllib.parse import urlsplit

import anyio
import httpx
import pytest
import structlog

from daemon.domain.account import Limits
from daemon.domain.job import JobId
from daemon.queue.message import MessageId, Publication, Published
from daemon.web.v2 import app as v2_app
from tests.books_kit import until
from tests.conftest import in_database, run_sql
from tests.http_kit import local_client
from tests.push_kit import KEYRING, Endpoint
from tests.v2_kit import Api, open_api

pytestmark = pytest.mark.anyio

HERE = "http://127.0.0.1:9"
"""May be published to; nobody listens, and nobody tries."""


@pytest.fixture(scope="module")
def shared_url(server_url: str, template: str) -> Iterator[str]:
    """A database for all tests here: what they must not store would be seen, and what they store is each one's own."""
    name = f"tallyd_test_{secrets.token_hex(6)}"
    run_sql(server_url, f"create database {name} template {template}")
    yield in_database(server_url, name)
    run_sql(server_url, f"drop database {name} with (force)")


@pytest.fixture(scope="module")
async def api(shared_url: str) -> AsyncIterator[Api]:
    async with open_api(shared_url, bytes_max=v2_app.COPIES * 32 << 20) as opened:
        yield opened


class Wire:
    """One connection. Nothing is added to what is sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        with anyio.fail_after(15):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.rstrip("\r\n").split("\r\n")
            headers = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines}
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return int(first.split(" ")[1]), headers, body

    async def ends(self) -> bool:
        """Whether the other side says no more."""
        with anyio.fail_after(15):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True


@asynccontextmanager
async def wire_to(api: Api) -> AsyncIterator[Wire]:
    place = urlsplit(api.url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()


def head_of(api: Api, target: str, *lines: str, method: str = "POST", version: str = "1.1") -> bytes:
    text = [f"{method} {target} HTTP/{version}", "Host: x", f"Authorization: Bearer {api.token.reveal()}", *lines]
    return "\r\n".join([*text, "", ""]).encode("utf-8", "surrogateescape")


async def refuses(api: Api, status: int, head: str, body: bytes = b"") -> str:
    """The refusal, in JSON; and nothing is stored."""
    before = await api.stored()
    if body and "Transfer-Encoding" not in head:
        head += f"\r\nContent-Length: {len(body)}"
    got, text = await api.raw(head, body)
    error = json.loads(text)
    assert got == status, text
    assert [*error] == ["error"]
    assert error["error"]
    assert await api.stored() == before
    return str(error["error"])


def post(target: str, *lines: str) -> str:
    return "\r\n".join([f"POST {target} HTTP/1.1", *lines])


# ── Destinations ────────────────────────────────────────────────────────────────────────────────

KEPT = [  # behind the host; what is published is what arrives, is shown, and is signed
    "", "/", "//a//b", "/a?x=1&y=[2]", "/a?", "?x", "/%2F%2f/%7E", "/a/../b/./c", "/a/", "/a;b=1:2@3!$'()*+,=",
    "/a?b=http://c/?d=e&f=%26", "/a??b=1?", "/a?=&&x=1", "/a?x=1%20+2", "/v2/publish/http://x",
]  # fmt: skip


async def test_a_destination_arrives_byte_for_byte(database_url: str, endpoint: Endpoint) -> None:
    async with open_api(database_url) as api, api.pushing.working():
        shown: dict[str, str] = {}
        for suffix in KEPT:
            status, body = await api.raw(post(f"/v2/publish/{endpoint.url}{suffix}"))
            assert status == 200, (suffix, body)
            made = json.loads(body)
            assert made["url"] == endpoint.url + suffix
            assert (await api.client.get(f"/v2/messages/{made['messageId']}")).json()["url"] == endpoint.url + suffix
            shown[made["messageId"]] = suffix
        arrived = await endpoint.has(len(KEPT))
        for one in arrived:
            suffix = shown[one.message_id]
            assert one.target == (suffix if suffix.startswith("/") else f"/{suffix}")

        host = endpoint.url.removeprefix("http://")
        for target, url in {
            f"http:/{host}/merged": f"{endpoint.url}/merged",
            f"HTTP://{host}/upper": f"HTTP://{host}/upper",
            f"http://user:pass@{host}/a": f"http://user:pass@{host}/a",
            f"{endpoint.url}/a#fragment?": f"{endpoint.url}/a",
            f"{endpoint.url}/a?x=1&Upstash-Retries=2&y=2&qstash_token=t&upstash-delay=0s": f"{endpoint.url}/a?x=1&y=2",
            f"{endpoint.url}/a?upstash-retries=2": f"{endpoint.url}/a",
            f"{endpoint.url}/a?upstash%2Dretries=2&qstash%5Ftoken=t": f"{endpoint.url}/a",
            f"{endpoint.url}/a?x=upstash-retries": f"{endpoint.url}/a?x=upstash-retries",
        }.items():
            status, body = await api.raw(post(f"/v2/publish/{target}"))
            assert (status, json.loads(body).get("url")) == (200, url), body
            queued, body = await api.raw(post(f"/v2/enqueue/a.b_c-1/{target}"))
            assert (queued, json.loads(body).get("url")) == (200, url), body
        status, body = await api.raw(post(f"/v2/schedules/{endpoint.url}//a?x=1&Upstash-Cron=1+1+1+1+1"))
        assert status == 200
        id_ = json.loads(body)["scheduleId"]
        assert (await api.client.get(f"/v2/schedules/{id_}")).json()["destination"] == f"{endpoint.url}//a?x=1"


@pytest.mark.parametrize(
    "target",
    [
        "", "/", "//127.0.0.1:9", "127.0.0.1:9/a", "ftp://127.0.0.1", "http://", "http:///a", "http:127.0.0.1",
        "http%3A%2F%2F127.0.0.1", "http://127.0.0.1:99999/", "http://127.0.0.1:0", "http://a b", "http://[::1", "group",
        "http://10.0.0.1/", "http://169.254.169.254/", "http://0x7f.1.1.1.1.1/", "http://@/", "api/llm", "../keys",
        "http://ex%00ample.com/", "http://127.0.0.1:9/\\", "http://127.0.0.1@10.0.0.1/",
        "http://xn--\u00e4.example/", "http://127.0.0.1:9/\u00fc", "http://127.0.0.1:9/?\u00fc", "%", "http://%/",
        "http://" + "a" * 9_000,
    ],
)  # fmt: skip
async def test_a_hostile_destination_is_refused(api: Api, target: str) -> None:
    for prefix in ("/v2/publish/", "/v2/enqueue/q/"):
        await refuses(api, 400, post(f"{prefix}{target}"))
    await refuses(api, 400, post(f"/v2/schedules/{target}", "Upstash-Cron: 1 1 1 1 1"))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/nothing", 404), ("POST", "/v2/", 404), ("POST", "/v2//publish/http://127.0.0.1", 404),
        ("POST", "/v2/Publish/http://127.0.0.1", 404), ("GET", "/v2/keys/x", 404), ("POST", "/v2/keys", 404),
        ("GET", "/v2", 404), ("POST", "/v1/publish/http://127.0.0.1", 404), ("GET", "/", 404), ("GET", "/v2/..", 404),
        ("POST", "/v2/trigger/http://127.0.0.1", 404), ("GET", "/v2/waiters/a", 404), ("POST", "/v2/queues/q/no", 404),
        ("GET", "/v2/publish/http://127.0.0.1", 405), ("PUT", "/v2/queues", 405), ("PATCH", "/v2/batch", 405),
        ("OPTIONS", "/v2/keys", 405), ("DELETE", "/v2/events", 405), ("PROPFIND", "/v2/dlq", 405),
        ("DELETE", "/v2/messages/", 400), ("DELETE", "/v2/dlq/", 400), ("DELETE", "/v2/queues/", 400),
        ("DELETE", "/v2/schedules/", 400), ("DELETE", "/v2/topics/", 400), ("GET", "/v2/messages", 400),
        ("POST", "/v2/dlq/retry/", 400), ("POST", "/v2/flowControl//pause", 400), ("POST", "/v2/flowControl/", 400),
        ("GET", "/v2/messages/msg_%FF", 400), ("GET", "/v2/messages/msg_%00", 400), ("GET", "/v2/messages/a/b", 404),
        ("GET", "/v2/messages/msg_" + "z" * 400, 404), ("DELETE", "/v2/messages/%2e%2e", 404),
        ("GET", "/v2/queues/a%2Fb", 400), ("GET", "/v2/queues/a%20b", 400), ("DELETE", "/v2/schedules/a:b", 400),
        ("DELETE", "/v2/schedules/unknown", 404), ("GET", "/v2/topics/a/b", 400), ("GET", "/v2/dlq/1-1", 404),
        ("GET", "/v2/dlq/9999999999999999999-1", 404), ("GET", "/v2/dlq/1-99999999999999999999", 404),
        ("POST", "/v2/queues/unknown/pause", 404), ("PATCH", "/v2/schedules/unknown/pause", 404),
        ("PATCH", "/v2/topics/unknown", 404), ("GET", "/v2/flowControl/unknown", 404),
        ("POST", "/v2/flowControl/unknown/resume", 404), ("POST", "/v2/flowControl/a%0Ab/pause", 400),
        ("POST", "/v2/flowControl/" + "a" * 600 + "/pause", 400), ("POST", "/v2/flowControl/k/pin", 400),
        ("POST", "/v2/flowControl/k/pin?parallelism=0", 400), ("POST", "/v2/flowControl/k/pin?rate=x", 400),
        ("POST", "/v2/flowControl/k/pin?rate=1&rate=2", 400), ("POST", "/v2/flowControl/k/pin?period=604801", 400),
        ("POST", "/v2/flowControl/k/unpin?rate=maybe", 400),
    ],
)  # fmt: skip
async def test_a_path_that_there_is_not_is_refused_as_json(api: Api, method: str, path: str, status: int) -> None:
    body = b'{"headers": {}}' if method == "PATCH" and "topics" in path else b""
    await refuses(api, status, f"{method} {path} HTTP/1.1", body)


async def test_405_says_what_goes(api: Api) -> None:
    answer = await api.client.put("/v2/queues")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET, POST")


# ── Settings ────────────────────────────────────────────────────────────────────────────────────


async def shown(api: Api, answer: httpx.Response) -> dict:
    assert answer.status_code == 200, answer.text
    return (await api.client.get(f"/v2/messages/{answer.json()['messageId']}")).json()


async def test_settings_of_the_query_count_less_than_headers(api: Api) -> None:
    answer = await api.client.post(
        f"/v2/publish/{HERE}/a?Upstash-Retries=1&upstash-delay=100s&x=1&upstash-forward-x-a=b%20c&upstash-label=l",
        headers={"Upstash-Retries": "2"},
    )
    message = await shown(api, answer)
    assert (message["url"], message["maxRetries"], message["label"]) == (f"{HERE}/a?x=1", 2, "l")
    assert message["header"] == {"X-A": ["b c"]}
    assert message["notBefore"] - message["createdAt"] == 100_000


async def test_header_forward_takes_all_but_what_is_ours_and_the_connections(api: Api) -> None:
    head = post(
        f"/v2/publish/{HERE}/?upstash-header-forward=TRUE",
        "Connection: X-Hop", "X-Hop: 1", "X-One: 1", "x-one: 2", "Content-Type: a/b", "Cookie: c", "Expect:",
        "TE: trailers", "Upstash-Telemetry-Sdk: s", "Upstash-Forward-Cookie: d", "X-U: \u00fc",
    )  # fmt: skip
    status, body = await api.raw(head)
    assert status == 200, body
    message = (await api.client.get(f"/v2/messages/{json.loads(body)['messageId']}")).json()
    assert message["header"] == {
        "Content-Type": ["a/b"], "X-One": ["1", "2"], "Cookie": ["d"], "X-U": ["\u00fc"],
    }  # fmt: skip


async def test_a_message_has_one_content_type(api: Api) -> None:
    headers = {"Content-Type": "application/json", "Upstash-Forward-content-type": "application/vnd.x+json"}
    message = await shown(api, await api.client.post(f"/v2/publish/{HERE}/", headers=headers))
    assert message["header"] == {"Content-Type": ["application/vnd.x+json"]}


async def test_defaults_of_a_group_count_less_than_the_request(api: Api) -> None:
    client = api.client
    made = await client.post("/v2/topics/defaults/endpoints", json={"endpoints": [{"url": f"{HERE}/"}]})
    assert made.status_code == 200
    changed = await client.patch(
        "/v2/topics/defaults",
        json={"headers": {"Upstash-Retries": "1", "Upstash-Forward-X-A": ["1", "2"], "Upstash-Delay": "1m"}},
    )
    assert changed.status_code == 200
    answer = await client.post("/v2/publish/defaults?upstash-retries=2", headers={"Upstash-Delay": "1h"})
    (one,) = answer.json()
    message = (await client.get(f"/v2/messages/{one['messageId']}")).json()
    assert (message["maxRetries"], message["header"]) == (2, {"X-A": ["1", "2"]})
    assert message["notBefore"] - message["createdAt"] == 3_600_000
    id_ = (await client.post("/v2/schedules/defaults", headers={"Upstash-Cron": "1 1 1 1 1"})).json()["scheduleId"]
    schedule = (await client.get(f"/v2/schedules/{id_}")).json()
    assert (schedule["retries"], schedule["delay"], schedule["header"]) == (1, 60, {"X-A": ["1", "2"]})
    wrong = await client.patch("/v2/topics/defaults", json={"headers": {"Upstash-Retries": "many"}})
    assert wrong.status_code == 400


async def test_a_cron_on_publish_makes_a_schedule(api: Api) -> None:
    answer = await api.client.post(
        f"/v2/publish/{HERE}/x", headers={"Upstash-Cron": "CRON_TZ=Asia/Tokyo 0 8 * * *"}, content=b"b"
    )
    id_ = answer.json()["scheduleId"]
    schedule = (await api.client.get(f"/v2/schedules/{id_}")).json()
    assert (schedule["cron"], schedule["destination"], schedule["body"], schedule["isPaused"]) == (
        "CRON_TZ=Asia/Tokyo 0 8 * * *", f"{HERE}/x", "b", False,
    )  # fmt: skip
    assert (await api.client.post(f"/v2/publish/{HERE}/x?upstash-cron=1+1+1+1+1")).json().keys() == {"scheduleId"}
    status, body = await api.raw(
        post(f"/v2/schedules/{HERE}/", "Upstash-Cron: */10 * * * *  ", "Upstash-Schedule-Id: t")
    )
    assert (status, json.loads(body)) == (200, {"scheduleId": "t"})
    assert (await api.client.get("/v2/schedules/t")).json()["cron"] == "*/10 * * * *"


WRONG = [
    "Upstash-Method: HEAD", "Upstash-Method: \u00fc", "Upstash-Delay: -1s", "Upstash-Delay: 1w",
    "Upstash-Delay: 1.5s", "Upstash-Delay: 367d", "Upstash-Delay: " + "9" * 99 + "d", "Upstash-Not-Before: soon",
    "Upstash-Not-Before: -1", "Upstash-Not-Before: 99999999999", "Upstash-Not-Before: 1e3", "Upstash-Retries: 6",
    "Upstash-Retries: -1", "Upstash-Retries: 1.0", "Upstash-Retries: \u0661", "Upstash-Retries: 99999999999999999999",
    "Upstash-Timeout: 0s", "Upstash-Timeout: x", "Upstash-Deduplication-Id: a:b",
    "Upstash-Deduplication-Id: " + "a" * 1_001, "Upstash-Content-Based-Deduplication: maybe",
    "Upstash-Header-Forward: yes", "Upstash-Label: a\tb", "Upstash-Label: " + "a" * 201,
    "Upstash-Label: " + ",".join(f"l{n}" for n in range(21)), "Upstash-Flow-Control-Key: k",
    "Upstash-Flow-Control-Value: rate=1", "Upstash-Redact-Fields: everything", "Upstash-Redact-Fields: header[",
    "Upstash-Callback: ftp://x", "Upstash-Callback: http://10.0.0.1", "Upstash-Failure-Callback: nowhere",
    "Upstash-Callback: http://127.0.0.1\r\nUpstash-Callback-Retries: 9",
    "Upstash-Callback: http://127.0.0.1\r\nUpstash-Callback-Delay: 999d",
    "Upstash-Callback: http://127.0.0.1\r\nUpstash-Callback-Method: BREW",
    "Upstash-Forward-X-A: a\x01b", "Upstash-Forward-X-A: a\x7fb", "Upstash-Callback: http://127.0.0.1/\x00",
    "Upstash-Forward-X-A: \udcff", "Content-Type: \udcff", "Upstash-Label: \udcc3", "Upstash-Retry-Delay: retried % 2",
    "Upstash-Retry-Delay: __import__('os')", "Upstash-Retry-Delay: " + "(" * 200 + "1" + ")" * 200,
    "Upstash-Retry-Delay: " + "-" * 300 + "1", "Upstash-Retry-Delay: " + "1+" * 249 + "1",
    "Upstash-Retry-Delay: 1e999", "Upstash-Retry-Delay: 9**9**9**9", "Upstash-Retry-Delay: pow(1)",
    "Upstash-Retry-Delay: " + "1" * 501,
    *(f"Upstash-Cron: {cron}" for cron in (
        "* * * *", "* * * * * *", "@daily", "60 * * * *", "* 24 * * *", "*/0 * * * *", "a b c d e", "* * L * *",
        "* * * * 1#2", "CRON_TZ=Mars/Olympus * * * * *", "CRON_TZ=../../etc/passwd * * * * *", "1-0 * * * *", "\u0661 * * * *",
        "*" * 9_000, "1," * 4_000 + "1 * * * *", "* * 99999999999999999999 * *",
    )),
    "Upstash-Cron: * * * * *\r\nUpstash-Schedule-Id: a/b", "Upstash-Cron: * * * * *\r\nUpstash-Schedule-Id: a:b",
    "Upstash-Cron: * * * * *\r\nUpstash-Not-Before: 1", "Upstash-Cron: * * * * *\r\nUpstash-Queue-Name: a b",
    *(f"Upstash-Flow-Control-Key: k\r\nUpstash-Flow-Control-Value: {value}" for value in (
        "", "rate=0", "parallelism=0", "parallelism=201", "period=1s", "rate=1,rate=2", "rate=1,period=8d", "rate=1e3",
        "rate=1, burst=2", "rate=99999999999", "rate=1" + " " * 300 + "2", "=", ",",
    )),
]  # fmt: skip


@pytest.mark.parametrize("lines", WRONG, ids=range(len(WRONG)))
async def test_a_wrong_setting_is_refused_and_named(api: Api, lines: str) -> None:
    with anyio.fail_after(5):
        error = await refuses(api, 400, post(f"/v2/publish/{HERE}/", lines))
    name = lines.rpartition("\r\n")[2].partition(":")[0].lower()
    assert name in error.lower() or "flow-control" in error.lower() or "HTTP request" in error


async def test_what_cannot_be_read_as_a_head_is_refused(api: Api) -> None:
    before = await api.stored()
    for head in (
        b"POST /v2/publish/http://127.0.0.1 HTTP/1.1\r\nHost: x\r\nX A: b\r\n\r\n",
        b"POST /v2/publish/http://127.0.0.1 HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v2/publish/http://127.0.0.1 HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v2/publish/http://127.0.0.1 HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v2/publish/http://127.0.0.1 HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v2/publish/http://127.0.0.1/\x00 HTTP/1.1\r\n\r\n",
    ):
        async with wire_to(api) as wire:
            await wire.send(head)
            status, headers, body = await wire.answer()
            assert (status, headers["content-type"]) == (400, "application/json"), head
            assert json.loads(body)["error"]
            assert await wire.ends()
    assert await api.stored() == before


async def test_a_head_of_a_mebibyte_is_refused_and_the_answer_can_be_read(api: Api) -> None:
    async with wire_to(api) as wire:
        with anyio.fail_after(10):
            await wire.send(head_of(api, f"/v2/publish/{HERE}/", "X-Big: " + "a" * (1 << 20)))
        status, _, body = await wire.answer()
        assert status == 431
        assert "head" in json.loads(body)["error"]
        assert await wire.ends()


# ── Who may what ────────────────────────────────────────────────────────────────────────────────


async def test_who_may_what(api: Api) -> None:
    before = await api.stored()
    place = f"{api.url}/v2/publish/{HERE}/"
    reader = await api.token_of("acme", is_read_only=True)
    revoked = await api.token_of("revoked")
    await api.pushing.db.execute("update token set revoked_at = now() where account_id <> $1", api.pushing.account)
    async with local_client() as client:
        for authorization in (
            None, "", "Bearer", "Bearer wrong", f"Basic {api.token.reveal()}", api.token.reveal(),
            f"Bearer {api.token.reveal()}x", "Bearer a\tb", f"Bearer {revoked}", f"Bearer {'a' * 10_000}",
        ):  # fmt: skip
            headers = {} if authorization is None else {"Authorization": authorization}
            for method, path in (("POST", place), ("GET", f"{api.url}/v2/keys")):
                answer = await client.request(method, path, headers=headers)
                assert (answer.status_code, answer.json()) == (
                    401, {"error": "unable to authenticate: invalid token"},
                ), authorization  # fmt: skip
        may_read = {"Authorization": f"bearer {reader}"}
        for method, path in (
            ("POST", place), ("POST", f"{api.url}/v2/keys/rotate"), ("DELETE", f"{api.url}/v2/messages"),
            ("DELETE", f"{api.url}/v2/messages/msg_x"), ("PATCH", f"{api.url}/v2/schedules/a/pause"),
            ("POST", f"{api.url}/v2/batch"), ("POST", f"{api.url}/v2/dlq/retry"), ("POST", f"{api.url}/v2/queues"),
            ("POST", f"{api.url}/v2/flowControl/k/pause"), ("DELETE", f"{api.url}/v2/dlq"),
            ("POST", f"{api.url}/v2/topics/g/endpoints"), ("GET", f"{api.url}/v2/keys"),
        ):  # fmt: skip
            assert (await client.request(method, path, headers=may_read)).status_code == 403, path
        for path in ("queues", "schedules", "topics", "dlq", "events", "logs", "flowControl"):
            assert (await client.get(f"{api.url}/v2/{path}", headers=may_read)).status_code == 200
    assert await api.stored() == before


async def test_a_token_in_the_query_goes_no_further(api: Api, endpoint: Endpoint) -> None:
    """Neither to the endpoint, nor into what is stored, shown or logged."""
    token = await api.token_of("webhook")
    async with api.pushing.working(), local_client() as client:
        with structlog.testing.capture_logs() as lines:
            for name in ("qstash_token", "qstash%5ftoken"):
                answer = await client.post(
                    f"{api.url}/v2/publish/{endpoint.url}/hook?a=1&{name}={token}&upstash-header-forward=true",
                    headers={"X-Event": "push"},
                )
                assert answer.status_code == 200
                assert answer.json()["url"] == f"{endpoint.url}/hook?a=1"
            refused = await client.post(f"{api.url}/v2/publish/nobody?qstash_token={token}&upstash-retries=x")
            assert refused.status_code == 400
            filtered = await client.get(f"{api.url}/v2/events?qstash_token={token}&nothing=1")
            assert (filtered.status_code, token in filtered.text) == (400, False)
            one, _ = await endpoint.has(2)
    assert (one.target, one.headers["x-event"]) == ("/hook?a=1", "push")
    assert token not in repr(one)
    assert lines
    assert token not in repr(lines)
    listed = await client_of(api, token)
    assert listed.status_code == 200
    assert token not in listed.text
    wrong = await api.client.post(f"/v2/publish/{HERE}/?qstash_token=wrong")  # the header counts
    assert wrong.status_code == 200


async def client_of(api: Api, token: str) -> httpx.Response:
    async with local_client() as client:
        return await client.get(f"{api.url}/v2/events", params={"qstash_token": token})


async def test_what_belongs_to_another_account_is_not_there(database_url: str) -> None:
    async with open_api(database_url) as api:
        mine = (await api.client.post(f"/v2/enqueue/q/{HERE}/", headers={"Upstash-Label": "l"})).json()["messageId"]
        flow = {"Upstash-Flow-Control-Key": "k", "Upstash-Flow-Control-Value": "rate=1"}
        await api.client.post(f"/v2/publish/{HERE}/", headers={**flow, "Upstash-Deduplication-Id": "d"})
        await api.client.post("/v2/topics/g/endpoints", json={"endpoints": [{"url": HERE}]})
        cron = {"Upstash-Cron": "1 1 1 1 1", "Upstash-Schedule-Id": "s"}
        await api.client.post(f"/v2/schedules/{HERE}/", headers=cron)
        job = await api.pushing.db.fetchval("select id from message where labels is not null")
        before = await api.stored()
        token = await api.token_of("other")
        async with local_client(base_url=api.url, headers={"Authorization": f"Bearer {token}"}) as other:
            for method, path in (
                ("GET", f"messages/{mine}"), ("DELETE", f"messages/{mine}"), ("GET", "queues/q"),
                ("POST", "queues/q/pause"), ("GET", "schedules/s"), ("DELETE", "schedules/s"),
                ("PATCH", "schedules/s/pause"), ("GET", "topics/g"), ("DELETE", "topics/g/endpoints"),
                ("GET", "flowControl/k"), ("POST", "flowControl/k/resume"), ("POST", "flowControl/k/resetRate"),
                ("GET", f"dlq/1-{job}"), ("DELETE", f"dlq/1-{job}"), ("POST", f"dlq/retry/1-{job}"),
            ):  # fmt: skip
                body = b'{"endpoints": [{"url": "http://127.0.0.1:9"}]}' if path.endswith("endpoints") else b""
                answer = await other.request(method, f"/v2/{path}", content=body)
                assert answer.status_code == 404, (method, path, answer.text)
            assert (await other.post("/v2/publish/g")).status_code == 400
            cancelled = await other.delete("/v2/messages", params={"messageIds": mine})
            assert cancelled.json() == {"cancelled": 0}
            assert (await other.delete("/v2/messages")).json() == {"cancelled": 0}
            assert (await other.delete("/v2/queues/q")).status_code == 200
            assert (await other.delete("/v2/topics/g")).status_code == 200
            for path in ("queues", "schedules", "topics", "flowControl"):
                assert (await other.get(f"/v2/{path}")).json() == []
            assert (await other.get(f"/v2/events?messageId={mine}")).json() == {"events": []}
            assert (await other.get("/v2/events?label=l")).json() == {"events": []}
            assert (await other.get("/v2/dlq")).json() == {"messages": []}
            assert (await other.get("/v2/keys")).json() != (await api.client.get("/v2/keys")).json()
            assert await api.stored() == before
            # Names and deduplication ids are each account's own.
            answer = await other.post(f"/v2/publish/{HERE}/", headers={"Upstash-Deduplication-Id": "d"})
            assert answer.status_code == 200
            assert (await other.post(f"/v2/schedules/{HERE}/", headers=cron)).status_code == 200
        assert (await api.client.get(f"/v2/messages/{mine}")).json()["queueName"] == "q"
        assert (await api.client.get("/v2/topics/g")).status_code == 200


# ── Limits ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_body_too_large_is_refused_before_it_is_read(api: Api) -> None:
    most = Limits().message_bytes
    before = await api.stored()
    for path in (f"/v2/publish/{HERE}/", f"/v2/enqueue/q/{HERE}/", "/v2/queues", "/v2/topics/g/endpoints", "/v2/batch"):
        size = Limits().batch_bytes + 1 if path == "/v2/batch" else most + 1
        async with wire_to(api) as wire:
            await wire.send(head_of(api, path, f"Content-Length: {size}"))
            status, _, body = await wire.answer()
            assert (status, "maxMessageSize" in json.loads(body)["error"]) == (413, True), path
    async with wire_to(api) as wire:  # who cannot be told before, is told when it is too much
        await wire.send(head_of(api, f"/v2/publish/{HERE}/", "Transfer-Encoding: chunked"))
        for _ in range(11):
            await wire.send(b"100000\r\n" + b"a" * (1 << 20) + b"\r\n")
        assert (await wire.answer())[0] == 413
    answer = await api.client.post(f"/v2/publish/{HERE}/", content=b"a" * (most + 1))  # sends all of it, and then reads
    assert answer.status_code == 413
    too_large = json.dumps([{"destination": HERE, "body": "\u00fc" * (most // 2 + 1)}], ensure_ascii=False).encode()
    assert "[0].body" in await refuses(api, 413, post("/v2/batch"), too_large)
    assert await api.stored() == before
    assert api.v2.budget.held == 0


async def test_limits_of_an_account(database_url: str) -> None:
    async with open_api(database_url) as api:
        limits = {"queues": 1, "groups": 1, "endpoints": 2, "schedules": 1, "retries": 2, "parallelism_max": 3}
        await api.pushing.accounts.add("small", {**limits, "message_bytes": 5, "delay_s": 10, "timeout_s": 9})
        token = await api.token_of("small")
        async with local_client(base_url=api.url, headers={"Authorization": f"Bearer {token}"}) as client:

            async def answers(method: str, path: str, status: int, says: str = "", **request: object) -> None:
                before = await api.stored()
                answer = await client.request(method, f"/v2/{path}", **request)  # type: ignore[arg-type]
                assert answer.status_code == status, answer.text
                assert says in answer.text
                assert status == 200 or await api.stored() == before

            endpoints = [{"url": f"{HERE}/{n}"} for n in range(3)]
            cron = {"Upstash-Cron": "1 1 1 1 1"}
            await answers("POST", f"enqueue/one/{HERE}/", 200)
            await answers("POST", f"enqueue/two/{HERE}/", 412, "maxQueues")
            await answers("POST", "queues", 412, "maxQueues", json={"queueName": "two"})
            await answers("POST", "queues", 200, json={"queueName": "one", "parallelism": 3})
            await answers("POST", "queues", 400, "1 to 3", json={"queueName": "one", "parallelism": 4})
            await answers("POST", "topics/g/endpoints", 412, "maxEndpoints", json={"endpoints": endpoints})
            await answers("GET", "topics/g", 404)
            await answers("POST", "topics/g/endpoints", 200, json={"endpoints": endpoints[:2]})
            await answers("POST", "topics/g/endpoints", 412, "maxEndpoints", json={"endpoints": endpoints[2:]})
            await answers("POST", "topics/h/endpoints", 412, "maxUrlGroups", json={"endpoints": endpoints[:1]})
            await answers("POST", f"schedules/{HERE}/", 200, headers={**cron, "Upstash-Schedule-Id": "s"})
            await answers("POST", f"schedules/{HERE}/", 200, headers={**cron, "Upstash-Schedule-Id": "s"})
            await answers("POST", f"schedules/{HERE}/", 412, "maxSchedules", headers=cron)
            await answers("POST", f"publish/{HERE}/", 200, content=b"12345")
            await answers("POST", f"publish/{HERE}/", 413, "maxMessageSize", content=b"123456")
            await answers("POST", f"publish/{HERE}/", 400, "maxRetries", headers={"Upstash-Retries": "3"})
            await answers("POST", f"publish/{HERE}/", 400, "limit: 10", headers={"Upstash-Delay": "11s"})
            flow = {"Upstash-Flow-Control-Key": "k", "Upstash-Flow-Control-Value": "parallelism=4"}
            await answers("POST", f"publish/{HERE}/", 400, "1 to 3", headers=flow)
            await answers("POST", "flowControl/k/pin?parallelism=4", 400, "1 to 3")
            made = await client.post(f"/v2/publish/{HERE}/", headers={"Upstash-Timeout": "1h"})
            shown = (await client.get(f"/v2/messages/{made.json()['messageId']}")).json()
            assert (shown["timeout"], shown["maxRetries"]) == (9, 2)  # a time-out can only be shortened
            items = [{"destination": HERE}, {"destination": HERE, "queue": "two"}]
            await answers("POST", "batch", 412, "maxQueues", json=items)


# ── Deduplication and batches ───────────────────────────────────────────────────────────────────


async def test_of_publishes_at_the_same_time_one_is_stored(api: Api) -> None:
    before = await api.stored()
    headers = {"Upstash-Deduplication-Id": "at once"}
    answers: list[httpx.Response] = []

    async def publish(client: httpx.AsyncClient) -> None:
        answers.append(await client.post(f"/v2/publish/{HERE}/", headers=headers, content=b"x"))

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(publish, api.client)
    assert sorted(answer.status_code for answer in answers) == [200] + [202] * 19
    assert len({answer.json()["messageId"] for answer in answers}) == 1
    assert await api.stored() == before + 2  # a message and its job


async def test_items_of_a_batch_count_against_each_other_and_groups_by_endpoint(api: Api) -> None:
    client = api.client
    two = [{"url": f"{HERE}/", "name": "a"}, {"url": f"{HERE}/", "name": "b"}]
    await client.post("/v2/topics/dedup/endpoints", json={"endpoints": two})
    by_id = {"upstash-deduplication-id": "batch"}
    by_content = {"Upstash-Content-Based-Deduplication": "True"}
    answer = await client.post(
        "/v2/batch",
        json=[
            {"destination": HERE, "headers": by_id, "body": "1"},
            {"destination": HERE, "headers": by_id, "body": "2", "queue": None},
            {"destination": HERE, "headers": by_content, "body": "c"},
            {"destination": HERE, "headers": by_content, "body": "c"},
            {"destination": f"{HERE}/x", "headers": by_content, "body": "c"},
            {"destination": "dedup", "headers": by_id},
            {"destination": "dedup", "headers": by_content, "body": "c"},
            {"destination": "dedup", "headers": by_content, "body": "c"},
        ],
    )
    assert answer.status_code == 200
    one, again, kept, same, other, group, content, copies = answer.json()
    assert (again["messageId"], again["deduplicated"]) == (one["messageId"], True)
    assert (same["messageId"], same["deduplicated"]) == (kept["messageId"], True)
    assert "deduplicated" not in kept | other
    for pair in (group, content):
        assert len({item["messageId"] for item in pair}) == 2
        assert not any(item.get("deduplicated") for item in pair)
    assert [item["messageId"] for item in copies] == [item["messageId"] for item in content]
    assert (await client.get(f"/v2/messages/{one['messageId']}")).json()["body"] == "1"
    later = await client.post(f"/v2/publish/{HERE}/", headers={"Upstash-Deduplication-Id": "batch"})
    assert (later.status_code, later.json()["messageId"]) == (202, one["messageId"])


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"[", b"[1]", b"null", b'[{"destination": 1}]', b"[{}]", b'[{"destination": ""}]', b"\xff",
        b'[{"destination": "http://127.0.0.1"}, {"destination": "nobody"}]',
        b'[{"destination": "http://127.0.0.1"}, {"destination": "http://10.0.0.1"}]',
        b'[{"destination": "http://127.0.0.1"}, {"destination": "http://127.0.0.1", "queue": "a b"}]',
        b'[{"destination": "http://127.0.0.1"}, {"destination": "http://127.0.0.1", "headers": {"Upstash-Delay": "x"}}]',
        b'[{"destination": "http://127.0.0.1", "queue": "q", "headers": {"Upstash-Delay": "1s"}}]',
        b'[{"destination": "http://127.0.0.1", "headers": {"Upstash-Forward-A": "\\u0000"}}]',
        b'[{"destination": "http://127.0.0.1", "headers": {"Upstash-Forward-A\\r\\nB": "c"}}]',
        b'[{"destination": "http://127.0.0.1", "headers": {"Upstash-Forward-A": "\\ud800 "}}]',
        b'[{"destination": "http://127.0.0.1", "body": "\\ud800 "}]', b'[{"destination": "http://127.0.0.1\\u0000"}]',
        b'[{"destination": "http://127.0.0.1", "body": {}}]', b'[{"destination": "http://127.0.0.1", "headers": []}]',
        b"[" * 50_000, b'[{"destination": "http://127.0.0.1", "x": ' + b"[" * 50_000,
        b'[{"destination": "http://127.0.0.1", "headers": {"Upstash-Label": "\\u0000"}}]',
        b"[" + b",".join([b'{"destination": "http://127.0.0.1"}'] * 10_001) + b"]",
    ],
    ids=range(25),
)  # fmt: skip
async def test_a_batch_is_stored_whole_or_not_at_all(api: Api, body: bytes) -> None:
    await refuses(api, 400, post("/v2/batch"), body)


async def test_a_batch_to_groups_makes_so_many_messages_and_no_more(api: Api) -> None:
    endpoints = [{"url": f"{HERE}/{n}"} for n in range(100)]
    assert (await api.client.post("/v2/topics/wide/endpoints", json={"endpoints": endpoints})).status_code == 200
    items = [{"destination": "wide"}] * 101
    assert "10000" in await refuses(api, 400, post("/v2/batch"), json.dumps(items).encode())
    assert (await api.client.post("/v2/batch", json=[])).json() == []


# ── Lists ───────────────────────────────────────────────────────────────────────────────────────


async def test_filters_and_cursors_that_are_wrong(api: Api) -> None:
    client = api.client
    for _ in range(2):
        await client.post(f"/v2/publish/{HERE}/")
    log = (await client.get("/v2/events?count=1")).json()["cursor"]
    groups = (await client.get("/v2/events?count=1&groupBy=messageId")).json()["cursor"]
    before = await api.stored()
    for path in (
        "events?cursor=x", "events?cursor=12", "events?cursor=%00", f"events?cursor={groups}", f"dlq?cursor={log}",
        f"events?groupBy=messageId&cursor={log}", f"events?cursor={'9' * 300}", f"events?cursor={log}0000000000000000000",
        f"events?cursor={log}&cursor={log}", "events?count=0", "events?count=1001", "events?count=-1", "events?count=1e2",
        "events?count=", "events?count=\u0661".encode().decode("latin-1"), "events?state=SLEEPING", "events?groupBy=url",
        "events?fromDate=yesterday", "events?toDate=99999999999999999999", "events?trimBody=x", "events?unknown=1",
        "dlq?count=101", "dlq?host=a", "dlq?path=a", "dlq?responseStatus=abc", "dlq?labeel=x", "events?label=%00",
        f"events?{'&'.join('label=a' for _ in range(1_001))}",
    ):  # fmt: skip
        answer = await client.get(f"/v2/{path}")
        assert answer.status_code == 400, (path, answer.text)
        assert answer.json()["error"]
    everything = [
        "?label=", "?label=,", "?url=", "?fromDate=", "?count=", "?count=501", "?lable=x", "?callerIp=", "?topicName=&x=1",
    ]  # fmt: skip
    for query in everything:  # whoever means one of these does not mean all
        for path in ("messages", "dlq"):
            answer = await client.delete(f"/v2/{path}{query}")
            assert answer.status_code == 400, (path, query, answer.text)
        assert (await client.post(f"/v2/dlq/retry{query}")).status_code == 400, query
    for path, body in (
        ("messages", b"{}"), ("messages", b"[]"), ("messages", b'{"messageIds": "a"}'), ("messages", b'{"ids": ["a"]}'),
        ("messages", b'{"messageIds": null}'), ("dlq", b"{}"), ("dlq", b'{"dlqIds": [1]}'), ("dlq", b"nonsense"),
        ("messages", b'{"x":' + b"[" * 50_000),
    ):  # fmt: skip
        answer = await client.request("DELETE", f"/v2/{path}", content=body)
        assert answer.status_code == 400, (path, body[:40], answer.text)
    for query in ("?messageIds=", "?messageIds=x", "?messageIds=,,"):
        assert (await client.delete(f"/v2/messages{query}")).json() == {"cancelled": 0}
    assert await api.stored() == before


# ── The connection ──────────────────────────────────────────────────────────────────────────────


async def test_requests_in_a_row_are_answered_in_their_order(api: Api) -> None:
    async with wire_to(api) as wire:
        await wire.send(
            head_of(api, f"/v2/publish/{HERE}/1", "Content-Length: 2")
            + b"ab"
            + head_of(api, "/v2/nothing", method="GET")
            + head_of(api, "/v2/keys", "Content-Length: 3", method="GET")
            + b"xyz"
            + head_of(api, f"/v2/publish/{HERE}/2", "Transfer-Encoding: chunked")
            + b"1\r\nc\r\n0\r\n\r\n"
            + head_of(api, "/v2/keys", method="HEAD")
        )
        answers = [await wire.answer() for _ in range(4)]
        assert [status for status, _, _ in answers] == [200, 404, 200, 200]
        assert json.loads(answers[0][2])["url"] == f"{HERE}/1"
        assert json.loads(answers[3][2])["url"] == f"{HERE}/2"
        head = (await wire.reader.readuntil(b"\r\n\r\n")).decode()
        assert head.startswith("HTTP/1.1 405")
        await wire.send(head_of(api, "/v2/keys", method="GET"))  # and nothing of it was taken for a body
        assert (await wire.answer())[0] == 200


async def test_http_1_0_and_an_absolute_target_are_served(api: Api) -> None:
    async with wire_to(api) as wire:
        await wire.send(head_of(api, f"/v2/publish/{HERE}/old", "Content-Length: 1", version="1.0") + b"x")
        status, headers, body = await wire.answer()
        assert (status, headers["connection"], json.loads(body)["url"]) == (200, "close", f"{HERE}/old")
        assert await wire.ends()
    async with wire_to(api) as wire:
        await wire.send(head_of(api, f"http://proxy.example/v2/publish/{HERE}/x?y", "Content-Length: 7000000"))
        await wire.send(b"x" * 7_000_000)
        status, _, body = await wire.answer()
        assert (status, json.loads(body)["url"]) == (200, f"{HERE}/x?y")
    async with wire_to(api) as wire:
        upgrade = (
            "Connection: Upgrade, HTTP2-Settings",
            "Upgrade: h2c",
            "HTTP2-Settings: AAMAAABk",
            "Content-Length: 2",
        )
        await wire.send(head_of(api, f"/v2/publish/{HERE}/h2c", *upgrade) + b"ab")
        assert (await wire.answer())[0] == 200


async def test_a_body_is_asked_for_only_when_it_will_be_read(api: Api) -> None:
    async with wire_to(api) as wire:
        await wire.send(head_of(api, f"/v2/publish/{HERE}/", "Content-Length: 3", "Expect: 100-continue"))
        with anyio.fail_after(10):
            assert await wire.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await wire.send(b"abc")
        assert (await wire.answer())[0] == 200
        await wire.send(head_of(api, f"/v2/publish/{HERE}/", "Content-Length: 99999999", "Expect: 100-continue"))
        assert (await wire.answer())[0] == 413
    async with wire_to(api) as wire:
        await wire.send(head_of(api, "/v2/publish/nobody%", "Content-Length: 9", "Expect: 100-continue"))
        status, _, _ = await wire.answer()
        assert status in (100, 400)


async def test_after_a_refusal_the_connection_goes_on(api: Api) -> None:
    async with wire_to(api) as wire:
        for _ in range(3):
            await wire.send(head_of(api, f"/v2/publish/{HERE}/", "Upstash-Retries: x", "Content-Length: 2") + b"ab")
            assert (await wire.answer())[0] == 400
            await wire.send(head_of(api, "/v2/nothing", "Content-Length: 300000") + b"a" * 300_000)  # nobody reads it
            assert (await wire.answer())[0] == 404
        await wire.send(head_of(api, f"/v2/publish/{HERE}/", "Content-Length: 2") + b"ab")
        assert (await wire.answer())[0] == 200


async def test_a_body_that_does_not_come_is_given_up(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v2_app, "BODY_S", 0.2)
    before = await api.stored()
    async with wire_to(api) as wire:
        await wire.send(head_of(api, f"/v2/publish/{HERE}/", "Content-Length: 30000") + b"a" * 29_999)
        status, headers, _ = await wire.answer()
        assert (status, headers["connection"]) == (408, "close")
        assert await wire.ends()
    assert await api.stored() == before


async def test_who_leaves_in_the_middle_of_a_body_leaves_nothing(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    before = await api.stored()
    with structlog.testing.capture_logs() as lines:
        for framing in ("Content-Length: 100000", "Transfer-Encoding: chunked"):
            async with wire_to(api) as wire:
                body = b"a" * 50_000 if "Length" in framing else b"c350\r\n" + b"a" * 50_000 + b"\r\n"
                await wire.send(head_of(api, f"/v2/publish/{HERE}/", framing) + body)

                async def holds() -> bool:
                    return api.v2.budget.held > 0

                await until(holds, "the body is being read", wait_s=5)
                wire.writer.transport.abort()

            async def is_free() -> bool:
                return api.v2.budget.held == 0

            await until(is_free, "its room is given back", wait_s=5)
    assert [line["event"] for line in lines] == ["api.refused"] * 2
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
    assert await api.stored() == before


async def test_bodies_never_hold_more_than_their_budget(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 times 10 MiB through four times 32 MiB, since each is there four times: three at once, the others wait."""
    body = b"a" * (10 << 20)
    held: list[int] = []
    statuses: list[int] = []
    answered = anyio.Event()

    async def store(call: tuple[Limits, Sequence[Publication]]) -> list[Published]:
        held.append(api.v2.budget.held)
        if len(held) == 3:
            answered.set()
        await answered.wait()  # until as many have come as there is room for
        return [Published(MessageId(JobId(1), 1), one.url) for one in call[1] if len(one.body) == len(body)]

    monkeypatch.setattr(api.v2, "_services", replace(api.v2._services, publish=store))

    async def publish() -> None:
        async with wire_to(api) as wire:
            await wire.send(head_of(api, f"/v2/publish/{HERE}/large", f"Content-Length: {len(body)}"))
            await wire.send(body)
            statuses.append((await wire.answer())[0])

    async with anyio.create_task_group() as group:
        for _ in range(30):
            group.start_soon(publish)
    assert statuses == [200] * 30
    assert max(held) == v2_app.COPIES * 30 << 20
    assert api.v2.budget.held == 0


async def test_large_bodies_arrive_whole(api: Api) -> None:
    bodies = [secrets.token_bytes(10 << 20) for _ in range(2)]
    answers: list[httpx.Response] = []

    async def publish(body: bytes) -> None:
        answers.append(await api.client.post(f"/v2/publish/{HERE}/large", content=body))

    async with anyio.create_task_group() as group:
        for body in bodies:
            group.start_soon(publish, body)
    stored = await api.pushing.db.fetch(
        "select sha256(body) as digest from payload where octet_length(body) = 10 << 20"
    )
    assert {sha256(body).digest() for body in bodies} <= {row["digest"] for row in stored}


async def test_without_room_a_body_is_put_off(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v2_app, "ROOM_S", 0.1)
    before = await api.stored()
    async with api.v2.budget.hold(v2_app.COPIES * 32 << 20):
        small = await api.client.post(f"/v2/publish/{HERE}/", content=b"a" * 1_000)
        assert small.status_code == 200  # small ones need none
        large = await api.client.post(f"/v2/publish/{HERE}/", content=b"a" * 100_000)
        assert (large.status_code, large.headers["retry-after"]) == (503, "5")
    assert await api.stored() == before + 2
    assert (await api.client.post(f"/v2/publish/{HERE}/", content=b"a" * 100_000)).status_code == 200


async def test_an_answer_is_told_apart_by_its_id(api: Api) -> None:
    answers = [await api.client.get("/v2/keys") for _ in range(2)]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 2
    assert {answer.headers["cache-control"] for answer in answers} == {"no-store"}


@pytest.mark.parametrize("size", [70_000, 200_000])
async def test_a_head_that_comes_in_one_piece_is_bounded_too(api: Api, size: int) -> None:
    answer = await api.client.post(f"/v2/publish/{HERE}/", content=b"x", headers={"X-Large": "h" * size})
    assert answer.status_code == 431
    assert (await api.client.post(f"/v2/publish/{HERE}/", content=b"x", headers={"X-Large": "h" * 60_000})).is_success


async def test_a_setting_that_is_there_twice_must_be_the_same(api: Api) -> None:
    twice = [("Upstash-Retries", "1"), ("Upstash-Retries", "2")]
    before = await api.stored()
    answer = await api.client.post(f"/v2/publish/{HERE}/", content=b"x", headers=twice)
    assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (400, "Upstash-Retries")
    unknown = await api.client.post("/v2/batch", json=[{"destination": f"{HERE}/", "queueName": "q"}])
    assert (unknown.status_code, "queueName" in unknown.json()["error"]) == (400, True)
    nobody = await api.client.post("/v2/publish/nobody", content=b"x")
    assert "no URL group 'nobody'" in nobody.json()["error"]
    assert await api.stored() == before


async def test_who_cannot_open_the_keys_says_so(api: Api) -> None:
    await api.pushing.db.execute("update account set key_id = 'gone' where id = $1", api.pushing.account)
    api.pushing.accounts._opened.clear()
    try:
        answer = await api.client.get("/v2/keys")
        assert (answer.status_code, "secret key" in answer.json()["error"]) == (503, True)
    finally:
        key_id = await api.pushing.db.fetchval("select key_id from account where key_id <> 'gone' limit 1")
        await api.pushing.db.execute("update account set key_id = $1 where key_id = 'gone'", key_id or KEYRING.first)
