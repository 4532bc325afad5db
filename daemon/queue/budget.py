"""Bounds on the bytes that are held in memory at once."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio

Item = TypeVar("Item")


class ByteBudget:
    """Whoever needs bytes waits until they are free, in the order of asking, so that a large one is not passed over for
    ever. All that somebody needs is taken at once: nobody waits while holding some.

    Args:
        most: a need that is larger waits until everything is free, and has all of it.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._free = most
        self._waiting: deque[tuple[int, anyio.Event]] = deque()

    @property
    def held(self) -> int:
        """Bytes that are taken now."""
        return self._most - self._free

    @asynccontextmanager
    async def hold(self, needed: int) -> AsyncIterator[None]:
        """Inside, `needed` bytes are ours."""
        needed = min(needed, self._most)
        if self._waiting or needed > self._free:
            turn = (needed, anyio.Event())
            self._waiting.append(turn)
            try:
                await turn[1].wait()
            except BaseException:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:
                    self._free += needed  # it was given in the same moment
                self._give()
                raise
        else:
            self._free -= needed
        try:
            yield
        finally:
            self._free += needed
            self._give()

    def _give(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            needed, event = self._waiting.popleft()
            self._free -= needed
            event.set()


def portions(items: Iterable[Item], bytes_of: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """In turn as many as have no more than `most` bytes together; one that has more comes alone."""
    portion: list[Item] = []
    filled = 0
    for item in items:
        needed = bytes_of(item)
        if portion and filled + needed > most:
            yield portion
            portion, filled = [], 0
        portion.append(item)
        filled += needed
    if portion:
        yield portion
