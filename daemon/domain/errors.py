"""Errors, named by what the caller should do.

    DaemonError
    ├── ConfigError                startup only: every problem at once, exit 2
    ├── UsageError                 a caller of the CLI or API asked for something that cannot be: exit 2
    │   └── QuotaError             one more than its account may have
    ├── ImportRefusedError         lines of a file that cannot be; nothing of it was stored: exit 2
    ├── TransientError             try again; carries retry_after_s
    │   ├── RateLimitedError       the provider said 429
    │   ├── UpstreamUnavailableError   5xx, 408, 409, 425, time-out, reset, truncated body
    │   ├── CircuitOpenError       not even tried: this host is known to be down, or told us to wait
    │   ├── StorageUnavailableError    Postgres is away, or took too long
    │   └── DeadlockError          Postgres undid this transaction so that another could go on: repeat it
    ├── PermanentError             do not try again
    │   ├── CredentialError        401, or a key of the wrong kind: park the connection, tell a person
    │   ├── ForbiddenError         403: park the source, tell a person
    │   ├── BadRequestError        400, 404, 422: carries the provider's code and param
    │   │   └── HistoryFloorError  the provider does not look back so far; carries the earliest start
    │   └── SchemaDriftError       the payload breaks its contract; carries the raw body
    ├── RecordRejectedError        skip this record, count it, keep it for inspection, go on
    ├── LeaseLostError             another replica owns the job now: roll back, say nothing
    ├── DataRejectedError          Postgres refuses the data itself: bisect the flush
    ├── ConflictError              the row is there already, or names one that is not: the caller decides
    └── SignatureError             an HTTP caller that is not QStash: 401

An exception takes data, builds its own message, and never carries a secret.
"""

from __future__ import annotations

from datetime import datetime

BODY_EXCERPT_BYTES = 2_000


class DaemonError(Exception):
    """Root of every error that tallyd raises on purpose."""


class ConfigError(DaemonError):
    """Settings that cannot work. `problems` holds one sentence each: the field, what is wrong, the fix."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


class UsageError(DaemonError):
    """A request that names something impossible: `field` is at fault, `fix` says what to do."""

    def __init__(self, field: str, problem: str, fix: str = "") -> None:
        self.field = field
        self.problem = problem
        self.fix = fix
        super().__init__(f"{field}: {problem}" + (f"; {fix}" if fix else ""))


class QuotaError(UsageError):
    """The request is one too many, or too large, for what its account may ask for."""


class ImportRefusedError(DaemonError):
    """A file with bad lines. `problems` holds one sentence each: the line, the field, what is wrong, the fix."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


class TransientError(DaemonError):
    """Try again, not before `retry_after_s` seconds when that is known."""

    def __init__(self, problem: str, *, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(problem)


class RateLimitedError(TransientError):
    """The provider answered 429."""


class UpstreamUnavailableError(TransientError):
    """No usable answer: a server error, a time-out, a cut connection, a body that ends early.

    `maybe_sent` is true when the request may have reached the other side.
    """

    def __init__(
        self,
        problem: str,
        *,
        retry_after_s: float | None = None,
        maybe_sent: bool = True,
        status: int | None = None,
    ) -> None:
        self.maybe_sent = maybe_sent
        self.status = status
        super().__init__(problem, retry_after_s=retry_after_s)


class CircuitOpenError(TransientError):
    """The request was not made: its host or organisation is in a pause that is still running."""


class StorageUnavailableError(TransientError):
    """Postgres cannot be reached, or gave up on a statement."""


class DeadlockError(TransientError):
    """Postgres undid the transaction in favour of another (40P01, 40001): repeat the whole of it."""


class PermanentError(DaemonError):
    """Trying again changes nothing; a person or a release has to act."""


class CredentialError(PermanentError):
    """The provider refuses the key (401), or the key is of the wrong kind."""


class ForbiddenError(PermanentError):
    """The key is good but lacks the right to this source (403)."""


class BadRequestError(PermanentError):
    """The provider refuses the request (400, 404, 422). Match on `code` and `param`, never on the text."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        self.status = status
        self.code = code
        self.param = param
        detail = "".join(f", {name} {value}" for name, value in (("code", code), ("param", param)) if value)
        super().__init__(f"refused with {status}{detail}: {message[:300]}")


class HistoryFloorError(BadRequestError):
    """The window begins before the provider's history; `earliest` is the first start worth asking for."""

    def __init__(self, earliest: datetime, message: str) -> None:
        self.earliest = earliest
        super().__init__(400, message, param="start_time")


class SchemaDriftError(PermanentError):
    """The answer breaks the contract that we know; `body` keeps its first bytes for inspection."""

    def __init__(self, problem: str, body: bytes = b"") -> None:
        self.body = body[:BODY_EXCERPT_BYTES]
        super().__init__(problem)


class RecordRejectedError(DaemonError):
    """One record cannot be used; the others can."""


class LeaseLostError(DaemonError):
    """The lease is no longer ours: whoever holds it does the work."""


class DataRejectedError(DaemonError):
    """Postgres refuses the data itself (a NUL in a text, a number out of range)."""


class ConflictError(DaemonError):
    """A unique or foreign key refuses the write; `constraint` names which, where Postgres says so."""

    def __init__(self, problem: str, constraint: str | None = None) -> None:
        self.constraint = constraint
        super().__init__(problem)


class SignatureError(DaemonError):
    """The caller could not prove that it is QStash."""
