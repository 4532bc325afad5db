"""Concurrency, pace and pauses towards a provider, on a clock that the test moves."""

from __future__ import annotations

import anyio
import pytest

from daemon.db.pauses import Pause
from daemon.domain.errors import BadRequestError, CircuitOpenError, RateLimitedError, UpstreamUnavailableError
from daemon.worker.governor import Governor, GovernorSettings

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def governor(clock: Clock) -> Governor:
    return Governor(GovernorSettings(breaker_failures=3, breaker_s=30, host_orgs=2), clock)


async def fail(governor: Governor, org: str, error: Exception, times: int = 1) -> None:
    for _ in range(times):
        with pytest.raises(type(error)):
            async with governor.request("h", org):
                raise error


async def ask(governor: Governor, org: str = "a", host: str = "h") -> None:
    async with governor.request(host, org):
        pass


async def test_retry_after_pauses_one_organisation_and_is_told_to_others(governor: Governor, clock: Clock) -> None:
    await fail(governor, "a", RateLimitedError("429", retry_after_s=60))
    governor._hosts["h"].orgs["a"].interval_s = 0  # the pace is another matter
    with pytest.raises(CircuitOpenError) as caught:
        await ask(governor, "a")
    assert caught.value.retry_after_s == 60
    await ask(governor, "b")
    clock.now += 20
    assert governor.take_news() == [Pause("h", "a", 40.0, "the provider asked to wait")]
    assert governor.take_news() == []
    clock.now += 40
    await ask(governor, "a")


async def test_circuit_opens_after_failures_in_a_row_only(governor: Governor, clock: Clock) -> None:
    await fail(governor, "a", UpstreamUnavailableError("503"), times=2)
    await fail(governor, "a", BadRequestError(400, "an answer, if not a welcome one"))
    await fail(governor, "a", UpstreamUnavailableError("503"), times=2)
    await ask(governor, "a")
    await fail(governor, "a", UpstreamUnavailableError("503"), times=3)
    with pytest.raises(CircuitOpenError):
        await ask(governor, "a")
    clock.now += 30
    await ask(governor, "a")


async def test_host_rests_only_when_several_organisations_fail(governor: Governor) -> None:
    await fail(governor, "a", UpstreamUnavailableError("503"), times=3)
    await ask(governor, "c")
    await fail(governor, "b", UpstreamUnavailableError("503"), times=3)
    with pytest.raises(CircuitOpenError, match="2 organisations fail at once"):
        await ask(governor, "c")
    await ask(governor, "c", host="elsewhere")
    assert {(pause.host, pause.org) for pause in governor.take_news()} == {("h", "a"), ("h", "b"), ("h", "")}


async def test_pauses_of_other_replicas_are_kept_here(governor: Governor, clock: Clock) -> None:
    governor.learn([Pause("h", "a", 10.0, "open circuit"), Pause("g", "", 5.0, "down")])
    governor.learn([Pause("h", "a", 2.0, "an older word")])
    clock.now += 6
    with pytest.raises(CircuitOpenError, match="open circuit"):
        await ask(governor, "a")
    await ask(governor, "b")
    await ask(governor, "a", host="g")


async def test_429s_slow_the_pace_and_good_answers_mend_it(governor: Governor, clock: Clock) -> None:
    await fail(governor, "a", RateLimitedError("429"))
    account = governor._hosts["h"].orgs["a"]
    for _ in range(2):
        account.next_at, account.failures = clock.now, 0  # neither sleep the pace out, nor open the circuit
        await fail(governor, "a", RateLimitedError("429"))
    assert account.interval_s == 2.0
    paces = []
    while account.interval_s:
        account.next_at = clock.now
        await ask(governor, "a")
        paces.append(account.interval_s)
    assert paces == sorted(paces, reverse=True)
    assert len(paces) < 50


async def test_no_more_requests_to_a_host_than_it_has_places(clock: Clock) -> None:
    governor = Governor(GovernorSettings(total=10, per_host=3), clock)
    inside, most = 0, 0
    go_on = anyio.Event()

    async def request() -> None:
        nonlocal inside, most
        async with governor.request("h", "a"):
            inside += 1
            most = max(most, inside)
            await go_on.wait()
            inside -= 1

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(request)
        await anyio.wait_all_tasks_blocked()
        assert inside == 3
        go_on.set()
    assert most == 3
