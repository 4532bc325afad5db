"""Whether this process is ready for work, as `/readyz` and the service manager are told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from time import monotonic

import anyio
import structlog

from daemon.domain.errors import DaemonError

CHECK_S = 2.0
FAILED = "failed; the log says why"
FRESH_S = 1.0

log = structlog.get_logger()

Check = Callable[[], Awaitable[str | None]]
"""What is wrong, in a sentence; None when all is well."""


class Health:
    """The checks by name. An answer holds for a second, so that asking often costs nothing."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.is_draining = False
        self._checks: dict[str, Check] = {}
        self._clock = clock
        self._lock = anyio.Lock()
        self._found: dict[str, str | None] = {}
        self._found_at = -FRESH_S

    def add(self, name: str, check: Check) -> None:
        self._checks[name] = check

    async def problems(self) -> dict[str, str | None]:
        """By check, what is wrong with it, or None. Never raises, and takes a few seconds at the most."""
        async with self._lock:
            if self._clock() - self._found_at >= FRESH_S:
                self._found = {name: await self._ask(name, check) for name, check in self._checks.items()}
                self._found_at = self._clock()
            drain = {"service": "it is draining"} if self.is_draining else {"service": None}
            return drain | self._found

    async def _ask(self, name: str, check: Check) -> str | None:
        """Strangers may read the answer, so the reason of a failure goes to the log alone, as it begins and as it ends."""
        reason = None
        try:
            with anyio.fail_after(CHECK_S):
                found = await check()
        except DaemonError as error:
            found, reason = FAILED, str(error)
        except TimeoutError:
            found, reason = FAILED, f"no answer within {CHECK_S:g} s"
        if reason is not None and self._found.get(name) != FAILED:
            log.warning("health.check_failed", check=name, reason=reason)
        if reason is None and self._found.get(name) == FAILED:
            log.info("health.check_recovered", check=name)
        return found
