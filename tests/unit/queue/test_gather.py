"""Calls that come together share a round, and none of them loses its answer, whatever happens to the others."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest

from daemon.queue.gather import Gatherer

pytestmark = pytest.mark.anyio


class Rounds:
    """An act that can be held up; it remembers what each round was given."""

    def __init__(self) -> None:
        self.taken: list[list[int]] = []
        self.gate = anyio.Event()
        self.begun = anyio.Event()
        self.error: Exception | None = None

    async def __call__(self, items: Sequence[int]) -> list[int]:
        self.taken.append(list(items))
        self.begun.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return [item * 10 for item in items]


@pytest.fixture
def rounds() -> Rounds:
    return Rounds()


async def test_one_call_alone_is_a_round(rounds: Rounds) -> None:
    rounds.gate.set()
    gather = Gatherer(rounds)
    assert [await gather(item) for item in (1, 2)] == [10, 20]
    assert rounds.taken == [[1], [2]]


async def test_what_comes_during_a_round_shares_the_next(rounds: Rounds) -> None:
    gather, answers = Gatherer(rounds, most=3), dict[int, int]()

    async def ask(item: int) -> None:
        answers[item] = await gather(item)

    async with anyio.create_task_group() as group:
        group.start_soon(ask, 0)
        await rounds.begun.wait()
        for item in range(1, 6):
            group.start_soon(ask, item)
        await anyio.wait_all_tasks_blocked()
        rounds.gate.set()
    assert rounds.taken == [[0], [1, 2, 3], [4, 5]]
    assert answers == {item: item * 10 for item in range(6)}


async def test_a_failed_round_fails_its_own_calls_and_no_others(rounds: Rounds) -> None:
    gather, ended = Gatherer(rounds), dict[int, object]()

    async def ask(item: int) -> None:
        try:
            ended[item] = await gather(item)
        except OSError as error:
            ended[item] = error

    async with anyio.create_task_group() as group:
        group.start_soon(ask, 0)
        await rounds.begun.wait()
        for item in (1, 2):
            group.start_soon(ask, item)
        await anyio.wait_all_tasks_blocked()
        rounds.error = OSError("away")
        rounds.gate.set()
    assert [type(ended[item]) for item in (0, 1, 2)] == [OSError] * 3
    rounds.error = None
    await ask(3)
    assert ended[3] == 30


async def test_a_result_too_few_is_an_error_and_not_another_ones_answer() -> None:
    async def short(_items: Sequence[int]) -> list[int]:
        return []

    with pytest.raises(ValueError, match="shorter"):
        await Gatherer(short)(1)


@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_a_cancelled_call_costs_the_others_nothing(rounds: Rounds, victim: int) -> None:
    """The one that leads a round, the one that is to lead the next, or one of the crowd."""
    gather, answers = Gatherer(rounds), dict[int, int]()
    scopes = {item: anyio.CancelScope() for item in range(4)}

    async def ask(item: int) -> None:
        with scopes[item]:
            answers[item] = await gather(item)

    async with anyio.create_task_group() as group:
        group.start_soon(ask, 0)
        await rounds.begun.wait()
        for item in (1, 2, 3):
            group.start_soon(ask, item)
            await anyio.wait_all_tasks_blocked()
        scopes[victim].cancel()
        await anyio.wait_all_tasks_blocked()
        rounds.gate.set()
    assert {item: answers.get(item) for item in range(4) if item != victim} == {
        item: item * 10 for item in range(4) if item != victim
    }
    assert await gather(9) == 90, "and it goes on afterwards"


async def test_a_leader_that_is_cancelled_as_it_is_appointed_hands_on(rounds: Rounds) -> None:
    gather, answers = Gatherer(rounds), dict[int, int]()
    scopes = {item: anyio.CancelScope() for item in range(3)}

    async def ask(item: int) -> None:
        with scopes[item]:
            answers[item] = await gather(item)

    async with anyio.create_task_group() as group:
        group.start_soon(ask, 0)
        await rounds.begun.wait()
        for item in (1, 2):
            group.start_soon(ask, item)
            await anyio.wait_all_tasks_blocked()
        rounds.gate.set()
        scopes[1].cancel()  # in the same turn of the loop in which it becomes the leader
    assert answers[2] == 20
    assert await gather(9) == 90


async def test_a_round_that_is_torn_down_gives_nobody_an_answer_that_is_none() -> None:
    """A server that shuts down cancels tasks by force, which no scope holds off."""
    import asyncio

    begun = anyio.Event()

    async def act(items: Sequence[int]) -> list[int]:
        begun.set()
        await anyio.sleep_forever()
        return list(items)

    gather = Gatherer(act)
    leader = asyncio.create_task(gather(1))
    await begun.wait()
    first_round = gather._is_led
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leader
    assert first_round
    assert not gather._is_led, "the next call leads"
