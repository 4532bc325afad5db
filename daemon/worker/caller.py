"""One connection's door to its provider: tier 1 of the failure model, under the governor, with every request counted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import stamina

from daemon.domain.connection import Target
from daemon.domain.errors import (
    BadRequestError,
    CredentialError,
    DaemonError,
    ForbiddenError,
    RateLimitedError,
    TransientError,
    UpstreamUnavailableError,
)
from daemon.domain.ports import Answer
from daemon.telemetry import metrics
from daemon.telemetry.traces import span
from daemon.worker.governor import Governor

T = TypeVar("T")


class Http(Protocol):
    """The one door out (`daemon.http_client`)."""

    async def get(
        self,
        base_url: str,
        path: str,
        params: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One GET, tried once."""
        ...

    async def post(self, base_url: str, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Answer:
        """One POST, tried once."""
        ...


@dataclass(frozen=True, slots=True)
class RetrySettings:
    """Tier 1: transient failures are retried at once, with full-jitter backoff.

    Attributes:
        tries: requests made for one page at the most.
        budget_s: no try begins later than this after the first; a longer `Retry-After`, or a longer pause that is
            running already, goes to the retry queue.
    """

    tries: int = 3
    budget_s: float = 20.0
    wait_initial_s: float = 0.25
    wait_max_s: float = 5.0


class CountingCaller:
    """A `Caller` for one connection during one job. `requests` counts what went out, tries included."""

    def __init__(self, http: Http, governor: Governor, target: Target, org: str, settings: RetrySettings) -> None:
        self._http = http
        self._governor = governor
        self._target = target
        self._host = _host(target.base_url)
        self._org = org
        self._settings = settings
        self.requests = 0
        self.answers = 0

    async def get(
        self, path: str, params: Sequence[tuple[str, str]] = (), headers: Mapping[str, str] | None = None
    ) -> Answer:
        async def send() -> Answer:
            return await self._http.get(self._target.base_url, path, params, headers)

        return await self._tried(lambda: self._counted(send, "GET"))

    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str] | None = None, *, base_url: str | None = None
    ) -> Answer:
        url = base_url or self._target.base_url

        async def send() -> Answer:
            return await self._http.post(url, path, body, headers)

        return await self._tried(lambda: self._counted(send, "POST", _host(url)))

    async def run(self, send: Callable[[], Awaitable[T]]) -> T:
        return await self._tried(lambda: self._counted(send))

    async def _tried(self, send: Callable[[], Awaitable[T]]) -> T:
        # stamina costs half as much as a request, so it is asked only once a try has failed: that one is its first.
        began = monotonic()
        try:
            return await send()
        except TransientError as error:
            failed: TransientError | None = error
        settings = self._settings
        async for attempt in stamina.retry_context(
            on=self._wait,
            attempts=settings.tries,
            timeout=max(0.001, settings.budget_s - (monotonic() - began)),
            wait_initial=settings.wait_initial_s,
            wait_max=settings.wait_max_s,
            wait_jitter=settings.wait_initial_s * 2,
        ):
            with attempt:
                if failed is not None:
                    first, failed = failed, None
                    raise first
                answer = await send()
        return answer

    async def _counted(self, send: Callable[[], Awaitable[T]], method: str | None = None, host: str | None = None) -> T:
        """One try. What is no HTTP request and succeeds counts as a 200."""
        host = host or self._host
        async with self._governor.request(host, self._org):
            self.requests += 1
            began = monotonic()
            code = "none"
            name = "http.request" if method else "request"
            with span(name, kind="client", server__address=host, http__request__method=method) as trace:
                try:
                    answer = await send()
                    code = str(answer.status) if isinstance(answer, Answer) else "200"
                except DaemonError as error:
                    code = _code(error)
                    raise
                finally:
                    trace.set(http__response__status_code=int(code) if method and code.isdecimal() else None)
                    metrics.PROVIDER_REQUESTS.labels(self._target.provider, code).inc()
                    metrics.PROVIDER_SECONDS.labels(self._target.provider).observe(monotonic() - began)
        self.answers += 1
        return answer

    def _wait(self, error: Exception) -> bool | float:
        if not isinstance(error, TransientError):
            return False
        if error.retry_after_s is None:
            return True
        return error.retry_after_s if error.retry_after_s <= self._settings.budget_s else False


def _host(base_url: str) -> str:
    return urlsplit(base_url).netloc.rpartition("@")[2]


def _code(error: DaemonError) -> str:
    """The status that was answered; `none` where there was no answer."""
    match error:
        case RateLimitedError():
            return "429"
        case CredentialError():
            return "401"
        case ForbiddenError():
            return "403"
        case BadRequestError(status=status) | UpstreamUnavailableError(status=int() as status):
            return str(status)
        case _:
            return "none"
