"""How hard tallyd may press a provider: concurrency, pace and pauses.

Pace and breaker belong to one organisation at one host: one tenant's 429s slow nobody else. Only when several
organisations of a host fail is the whole host given a rest. Pauses that other replicas should know are rows in
Postgres; everything else is local and may be forgotten.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio

from daemon.db.pauses import Pause
from daemon.domain.errors import CircuitOpenError, RateLimitedError, UpstreamUnavailableError


@dataclass(frozen=True, slots=True)
class GovernorSettings:
    """Limits of one process towards providers.

    Attributes:
        total: requests in flight in all.
        per_host: requests in flight to one host.
        breaker_failures: failures in a row of one organisation that open its circuit.
        breaker_s: how long an open circuit rests before one request may try again.
        host_orgs: that many organisations with an open circuit rest the whole host.
        interval_s_max: the slowest pace that 429s lead to, as seconds between two requests of an organisation.
    """

    total: int = 100
    per_host: int = 64
    breaker_failures: int = 5
    breaker_s: float = 30.0
    host_orgs: int = 3
    interval_s_max: float = 10.0


INTERVAL_S_FIRST = 0.5
RATE_STEP = 0.5
"""Requests a second that each good answer adds to a slowed pace; a 429 halves it."""
RATE_FREE = 20.0
"""From this pace on an organisation is not held back at all."""


@dataclass(slots=True)
class _Org:
    interval_s: float = 0.0
    next_at: float = 0.0
    failures: int = 0
    paused_until: float = 0.0
    reason: str = ""


@dataclass(slots=True)
class _Host:
    limiter: anyio.CapacityLimiter
    orgs: dict[str, _Org] = field(default_factory=dict)
    paused_until: float = 0.0
    reason: str = ""


class Governor:
    """One per process. Times are the local monotonic clock's; what is shared is a number of seconds from now."""

    def __init__(self, settings: GovernorSettings, monotonic: Callable[[], float]) -> None:
        self._settings = settings
        self._now = monotonic
        self._total = anyio.CapacityLimiter(settings.total)
        self._hosts: dict[str, _Host] = {}
        self._news: dict[tuple[str, str], tuple[float, str]] = {}

    def _host(self, name: str) -> _Host:
        if name not in self._hosts:
            self._hosts[name] = _Host(anyio.CapacityLimiter(self._settings.per_host))
        return self._hosts[name]

    @asynccontextmanager
    async def request(self, host: str, org: str) -> AsyncIterator[None]:
        """Hold a place for one request, and learn from how it ends.

        Raises:
            CircuitOpenError: the organisation or the host is in a pause; the request must not be made.
        """
        place = self._host(host)
        account = place.orgs.setdefault(org, _Org())
        if account.interval_s:  # before taking a place: a slow organisation must not hold one while it waits
            now = self._now()
            start = max(now, account.next_at)
            account.next_at = start + account.interval_s
            await anyio.sleep(start - now)
        async with self._total, place.limiter:
            now = self._now()
            for until, reason in ((place.paused_until, place.reason), (account.paused_until, account.reason)):
                if until > now:
                    raise CircuitOpenError(f"{host} is paused: {reason}", retry_after_s=until - now)
            try:
                yield
            except RateLimitedError as error:
                account.interval_s = min(self._settings.interval_s_max, max(INTERVAL_S_FIRST, account.interval_s * 2))
                if error.retry_after_s:
                    self._pause(host, org, error.retry_after_s, "the provider asked to wait")
                else:
                    self._fail(host, org, error)
                raise
            except UpstreamUnavailableError as error:
                self._fail(host, org, error)
                raise
            except Exception:
                account.failures = 0  # an answer, if not a welcome one
                raise
            account.failures = 0
            if account.interval_s:
                rate = 1 / account.interval_s + RATE_STEP
                account.interval_s = 1 / rate if rate < RATE_FREE else 0.0

    def _fail(self, host: str, org: str, error: Exception) -> None:
        account = self._host(host).orgs[org]
        account.failures += 1
        if account.failures >= self._settings.breaker_failures:
            self._pause(host, org, self._settings.breaker_s, str(error))

    def _pause(self, host: str, org: str, seconds: float, reason: str) -> None:
        place, until = self._host(host), self._now() + seconds
        account = place.orgs[org]
        account.paused_until, account.reason = max(account.paused_until, until), reason
        self._news[host, org] = (until, reason)
        broken = sum(
            other.failures >= self._settings.breaker_failures and other.paused_until > self._now()
            for other in place.orgs.values()
        )
        if broken >= self._settings.host_orgs:
            place.paused_until = self._now() + self._settings.breaker_s
            place.reason = f"{broken} organisations fail at once, the last with: {reason}"
            self._news[host, ""] = (place.paused_until, place.reason)

    def learn(self, pauses: Iterable[Pause]) -> None:
        """Take over the pauses that other replicas have stored."""
        for pause in pauses:
            place, until = self._host(pause.host), self._now() + pause.seconds
            target = place.orgs.setdefault(pause.org, _Org()) if pause.org else place
            if until > target.paused_until:
                target.paused_until, target.reason = until, pause.reason

    def take_news(self) -> list[Pause]:
        """The pauses that began since the last call, for storing."""
        now = self._now()
        news = [Pause(*place, until - now, reason) for place, (until, reason) in self._news.items() if until > now]
        self._news.clear()
        return news
