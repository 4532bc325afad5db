"""The alarm clock: it rings, and whatever the tick does, it rings again."""

from __future__ import annotations

import anyio
import pytest

from daemon.domain.errors import StorageUnavailableError
from daemon.triggers.schedule import run_schedule

pytestmark = pytest.mark.anyio


async def rings(count: int, *faults: Exception | None, tick_s: int = 1) -> list[Exception | None]:
    """The first `count` rings, whose ticks fail with `faults` in turn."""
    seen: list[Exception | None] = []
    left = list(faults)

    async with anyio.create_task_group() as group:

        async def make_tick() -> None:
            fault = left.pop(0) if left else None
            seen.append(fault)
            if len(seen) == count:
                group.cancel_scope.cancel()
            if fault is not None:
                raise fault

        with anyio.fail_after(15):
            await run_schedule(tick_s, make_tick)
    return seen


async def test_it_looks_at_once_and_then_at_each_slot() -> None:
    assert await rings(2) == [None, None]


async def test_a_long_slot_is_looked_for_in_between() -> None:
    """A replica that died in its tick costs seconds, not a slot."""
    assert await rings(2, tick_s=86_400) == [None, None]


async def test_it_outlives_an_outage_of_postgres() -> None:
    away = StorageUnavailableError("away")
    assert await rings(4, away, away, None) == [away, away, None, None]


async def test_any_other_failure_ends_it() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await rings(3, None, ZeroDivisionError("a defect"))
    assert caught.group_contains(ZeroDivisionError)


async def test_a_slow_tick_is_not_run_beside_itself() -> None:
    inside = 0
    most = 0
    done = 0

    async with anyio.create_task_group() as group:

        async def make_tick() -> None:
            nonlocal inside, most, done
            inside += 1
            most = max(most, inside)
            await anyio.sleep(1.3)  # longer than a slot, so that the bell rings meanwhile
            inside -= 1
            done += 1
            if done == 2:
                group.cancel_scope.cancel()

        with anyio.fail_after(15):
            await run_schedule(1, make_tick)
    assert most == 1
