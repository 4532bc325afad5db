"""Tier 1 of the failure model: what is tried again at once, how often, and what is not."""

from collections.abc import Mapping, Sequence
from time import monotonic

import pytest

from daemon.domain.connection import Secret, Target
from daemon.domain.errors import DaemonError, ForbiddenError, RateLimitedError, TransientError, UpstreamUnavailableError
from daemon.domain.ports import Answer
from daemon.worker.caller import CountingCaller, RetrySettings
from daemon.worker.governor import Governor, GovernorSettings

pytestmark = pytest.mark.anyio

ANSWER = Answer(200, {}, b"{}")
AT_ONCE = RetrySettings(tries=3, budget_s=5, wait_initial_s=0.0, wait_max_s=0.001)


class Script:
    """A provider that plays its replies in order."""

    def __init__(self, *replies: Answer | DaemonError) -> None:
        self._replies = list(replies)
        self.posted: list[tuple[str, str, bytes]] = []

    async def get(
        self,
        base_url: str,
        path: str,
        params: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        reply = self._replies.pop(0)
        if isinstance(reply, DaemonError):
            raise reply
        return reply

    async def post(self, base_url: str, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Answer:
        self.posted.append((base_url, path, body))
        return await self.get(base_url, path)


def caller(*replies: Answer | DaemonError) -> CountingCaller:
    target = Target("openai", "https://x.test/v1", Secret("sk-admin-test"))
    return CountingCaller(Script(*replies), Governor(GovernorSettings(), monotonic), target, "org-1", AT_ONCE)


def away(number: int) -> UpstreamUnavailableError:
    return UpstreamUnavailableError(f"failure {number}")


async def test_first_answer_is_one_request() -> None:
    asked = caller(ANSWER)
    assert await asked.get("/x") is ANSWER
    assert (asked.requests, asked.answers) == (1, 1)


async def test_passing_failures_are_tried_again_and_each_try_is_counted() -> None:
    asked = caller(away(1), away(2), ANSWER)
    assert await asked.get("/x") is ANSWER
    assert (asked.requests, asked.answers) == (3, 1)


async def test_last_failure_is_raised_after_the_last_try() -> None:
    asked = caller(away(1), away(2), away(3), ANSWER)
    with pytest.raises(UpstreamUnavailableError, match="failure 3"):
        await asked.get("/x")
    assert (asked.requests, asked.answers) == (3, 0)


async def test_wait_beyond_the_budget_goes_to_the_retry_queue_at_once() -> None:
    asked = caller(RateLimitedError("slow down", retry_after_s=60.0), ANSWER)
    with pytest.raises(RateLimitedError):
        await asked.get("/x")
    assert asked.requests == 1


async def test_refusal_is_never_tried_again() -> None:
    asked = caller(ForbiddenError("no"), ANSWER)
    with pytest.raises(ForbiddenError):
        await asked.get("/x")
    assert (asked.requests, asked.answers) == (1, 0)


async def test_a_question_in_a_body_is_tried_again_and_counted_too() -> None:
    asked = caller(away(1), ANSWER)
    assert await asked.post("/query", b"{}") is ANSWER
    assert (asked.requests, asked.answers) == (2, 1)
    assert asked._http.posted == [("https://x.test/v1", "/query", b"{}")] * 2


async def test_another_host_of_the_provider_has_limits_of_its_own() -> None:
    """A token service that is down must not stop the reports, nor the other way round."""
    governor = Governor(GovernorSettings(breaker_failures=1), monotonic)
    script = Script(away(1), ANSWER)
    once = RetrySettings(tries=1, budget_s=5)
    asked = CountingCaller(script, governor, Target("azure", "https://x.test", Secret("k")), "org-1", once)
    with pytest.raises(UpstreamUnavailableError):
        await asked.post("/token", b"a=b", base_url="https://login.test")
    with pytest.raises(TransientError, match=r"login\.test is paused"):
        await asked.post("/token", b"a=b", base_url="https://login.test")
    assert await asked.get("/report") is ANSWER
    assert script.posted == [("https://login.test", "/token", b"a=b")]


async def test_what_is_no_http_request_is_limited_tried_and_counted_like_one() -> None:
    asked, replies = caller(), [away(1), "an answer"]

    async def send() -> str:
        reply = replies.pop(0)
        if isinstance(reply, DaemonError):
            raise reply
        return str(reply)

    assert await asked.run(send) == "an answer"
    assert (asked.requests, asked.answers) == (2, 1)
