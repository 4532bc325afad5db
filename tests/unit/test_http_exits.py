"""Exits and the terms of a request, over a transport that never leaves the process."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import httpx
import pytest

from daemon.domain.errors import BadRequestError, SchemaDriftError, UpstreamUnavailableError
from daemon.http_client import HttpClient
from daemon.http_exits import Exits, Terms

pytestmark = pytest.mark.anyio

BASE = "https://api.example.com"
A, B = "http://user:secret@a.example:3128", "http://b.example:3128"


def client(answer: Callable[[httpx.Request], httpx.Response]) -> HttpClient:
    return HttpClient(transport=httpx.MockTransport(answer))


def way(request: httpx.Request) -> str | None:
    found: str | None = request.extensions.get("tallyd.proxy")
    return found


async def test_a_304_is_an_answer_where_the_request_asked_for_one_alone() -> None:
    async with client(lambda _: httpx.Response(304, headers={"etag": '"1"'})) as http:
        answer = await http.get(BASE, "/x", (), {"if-none-match": '"1"'})
        assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", '"1"')
        with pytest.raises(BadRequestError, match="redirects are not followed"):
            await http.get(BASE, "/x")


async def test_a_request_may_have_a_smaller_limit_than_the_client_and_no_larger_one() -> None:
    async with client(lambda _: httpx.Response(200, content=b"x" * 100)) as http:
        assert (await http.get(BASE, "/x", (), Terms({}, body_bytes_max=100))).body == b"x" * 100
        with pytest.raises(SchemaDriftError, match="limit of 99 bytes"):
            await http.get(BASE, "/x", (), Terms({}, body_bytes_max=99))


async def test_terms_are_headers_and_nothing_more_goes_out() -> None:
    seen: list[httpx.Headers] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers)
        return httpx.Response(200)

    async with client(answer) as http:
        await http.get(BASE, "/x", (), Terms({"x-key": "k"}, exits=Exits([A])))
    assert seen[0]["x-key"] == "k"
    assert "secret" not in str(seen)


async def test_the_least_busy_exit_is_taken_and_none_beyond_its_limit() -> None:
    waiting: list[str | None] = []
    go_on = anyio.Event()
    all_out = anyio.Event()

    class Holding(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            waiting.append(way(request))
            if len(waiting) == 4:
                all_out.set()
            await go_on.wait()
            return httpx.Response(200)

    exits = Exits([A, B], per_exit=2)
    async with HttpClient(transport=Holding()) as http, anyio.create_task_group() as group:
        for _ in range(7):
            group.start_soon(http.get, BASE, "/x", (), Terms({}, exits=exits))
        await all_out.wait()
        await anyio.wait_all_tasks_blocked()
        assert sorted(map(str, waiting)) == sorted([A, A, B, B])
        go_on.set()
    assert len(waiting) == 7


async def test_an_exit_that_fails_rests_for_every_request_and_the_next_one_is_taken() -> None:
    asked: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(way(request))
        if way(request) == A:
            raise httpx.ProxyError("refused")
        return httpx.Response(200)

    async with client(answer) as http:
        for _ in range(3):
            await http.get(BASE, "/x", (), Terms({}, exits=Exits([A, B])))
    assert asked == [A, B, B, B]


async def test_a_rest_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("daemon.http_exits.monotonic", lambda: now)
    is_down = True

    def answer(_request: httpx.Request) -> httpx.Response:
        if is_down:
            raise httpx.ProxyError("refused")
        return httpx.Response(200)

    async with client(answer) as http:
        terms = Terms({}, exits=Exits([A], rest_s=60))
        with pytest.raises(UpstreamUnavailableError, match=r"exit a\.example:3128 fails") as caught:
            await http.get(BASE, "/x", (), terms)
        assert not caught.value.maybe_sent
        assert "secret" not in str(caught.value)
        is_down = False
        with pytest.raises(UpstreamUnavailableError, match="rests") as resting:
            await http.get(BASE, "/x", (), terms)
        assert resting.value.retry_after_s == 60
        now += 61
        assert (await http.get(BASE, "/x", (), terms)).status == 200


async def test_a_failure_behind_the_exit_is_not_the_exits() -> None:
    asked: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(way(request))
        return httpx.Response(503)

    async with client(answer) as http:
        for _ in range(2):
            with pytest.raises(UpstreamUnavailableError, match="503"):
                await http.get(BASE, "/x", (), Terms({}, exits=Exits([A, B])))
    assert asked == [A, A], "neither rests, and nothing was sent twice"


async def test_a_407_rests_the_exit() -> None:
    async with client(lambda r: httpx.Response(407 if way(r) == A else 200)) as http:
        assert (await http.get(BASE, "/x", (), Terms({}, exits=Exits([A, B])))).status == 200
