"""By which proxies a request may leave, and the terms on which it is made: what the door out is told besides headers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from time import monotonic

import anyio

from daemon.domain.errors import UpstreamUnavailableError


class Exits:
    """The proxies by which some requests may leave, each with a limit of its own.

    Args:
        urls: of HTTP proxies, with their credentials.
        per_exit: requests in flight by each at the most; None: as many as there are.
        rest_s: how long one that fails is left alone.
    """

    def __init__(self, urls: Sequence[str], *, per_exit: int | None = None, rest_s: float = 60.0) -> None:
        self._busy = dict.fromkeys(urls, 0)
        self._per_exit = per_exit
        self._rest_s = rest_s
        self._freed = anyio.Condition()

    @contextlib.asynccontextmanager
    async def hold(self, rests: Mapping[str, float]) -> AsyncIterator[str]:
        """The least busy exit that does not rest, once one of them is free.

        Args:
            rests: until when the exits rest that have failed, by the monotonic clock.

        Raises:
            UpstreamUnavailableError: all of them rest; nothing was sent.
        """
        async with self._freed:
            while (url := self._free(rests)) is None:
                await self._freed.wait()
            self._busy[url] += 1
        try:
            yield url
        finally:
            self._busy[url] -= 1
            with anyio.CancelScope(shield=True):
                async with self._freed:
                    self._freed.notify_all()

    def _free(self, rests: Mapping[str, float]) -> str | None:
        now = monotonic()
        awake = [url for url in self._busy if rests.get(url, 0.0) <= now]
        if not awake:
            wait_s = min(rests[url] for url in self._busy) - now
            raise UpstreamUnavailableError("every exit has failed and rests", retry_after_s=wait_s, maybe_sent=False)
        url = min(awake, key=self._busy.__getitem__)
        return url if self._per_exit is None or self._busy[url] < self._per_exit else None

    def rest(self, url: str, rests: dict[str, float]) -> None:
        """Leave an exit that failed alone for a while."""
        rests[url] = monotonic() + self._rest_s

    def __len__(self) -> int:
        return len(self._busy)

    def __iter__(self) -> Iterator[str]:
        return iter(self._busy)


class Terms(dict[str, str]):
    """The headers of one request, with the terms on which it is made.

    Args:
        headers: names in lower case.
        exits: proxies in place of the client's own.
        body_bytes_max: of the answer, where that is less than the client's own limit.
    """

    def __init__(
        self, headers: Mapping[str, str], *, exits: Exits | None = None, body_bytes_max: int | None = None
    ) -> None:
        super().__init__(headers)
        self.exits = exits
        self.body_bytes_max = body_bytes_max


__all__ = ["Exits", "Terms"]
