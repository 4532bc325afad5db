"""Joining calls that come at the same time into one statement: a commit costs as much for fifty as for one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import anyio

from daemon.domain.errors import UpstreamUnavailableError

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Call(Generic[Item, Result]):
    def __init__(self, item: Item) -> None:
        self.item = item
        self.woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # half the cost of an anyio.Event
        self.leads = False
        self.is_over = False
        self.results: list[Result] = []
        self.error: Exception | None = None

    def wake(self) -> None:
        if not self.woken.done():
            self.woken.set_result(None)


class Gatherer(Generic[Item, Result]):
    """While one round is under way, the next one gathers; a call alone waits for nobody.

    A round is led by one of its own calls, so there is no task to own, and nobody works on for others once it has its
    own answer. A caller that is cancelled takes nothing from the rest of its round.

    Args:
        act: one round: a result for each item, in the order given. What it raises, every call of the round raises.
        most: items in a round at the most; the others wait for the next.
    """

    def __init__(self, act: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]], most: int = 200) -> None:
        self._act = act
        self._most = most
        self._waiting: deque[_Call[Item, Result]] = deque()
        self._is_led = False

    async def __call__(self, item: Item) -> Result:
        call: _Call[Item, Result] = _Call(item)
        self._waiting.append(call)
        if self._is_led:
            try:
                await call.woken
            except BaseException:
                if call in self._waiting:
                    self._waiting.remove(call)
                if call.leads:
                    self._appoint()
                raise
        else:
            self._is_led = call.leads = True
        if not call.is_over:
            await self._lead()
        if call.error is not None:
            raise call.error
        return call.results[0]

    async def _lead(self) -> None:
        taken = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
        try:
            with anyio.CancelScope(shield=True):  # the others' answers do not depend on the one who leads
                results = await self._act([call.item for call in taken])
            for call, result in zip(taken, results, strict=True):
                call.results.append(result)
        except Exception as error:  # noqa: BLE001 - raised again in each call of the round
            for call in taken:
                call.error = error
        except BaseException:
            for call in taken:
                call.error = UpstreamUnavailableError("the round was cut short")
            raise
        finally:
            for call in taken:
                call.is_over = True
                call.wake()
            self._appoint()

    def _appoint(self) -> None:
        """Let the next call in line lead the next round."""
        self._is_led = bool(self._waiting)
        if self._waiting:
            self._waiting[0].leads = True
            self._waiting[0].wake()
