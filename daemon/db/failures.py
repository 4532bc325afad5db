"""The one place where asyncpg's exceptions become ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from daemon.domain.errors import (
    ConfigError,
    ConflictError,
    DaemonError,
    DataRejectedError,
    DeadlockError,
    PermanentError,
    StorageUnavailableError,
)

# Longest prefix wins. A code of five characters is one condition, of two a class of them.
# https://www.postgresql.org/docs/18/errcodes-appendix.html, read 2026-11-22.
_BY_SQLSTATE: dict[str, type[DaemonError]] = {
    **dict.fromkeys(("08", "53", "57", "58"), StorageUnavailableError),
    **dict.fromkeys(("55P03", "40003"), StorageUnavailableError),
    # The server ended our transaction or session, or turned into a standby under us.
    **dict.fromkeys(("25P03", "25P04", "25006"), StorageUnavailableError),
    "72": StorageUnavailableError,  # snapshot too old
    "40": DeadlockError,
    "22": DataRejectedError,
    **dict.fromkeys(
        ("23502", "23514", "54000"), DataRejectedError
    ),  # 54000: among others, a key too long for its index
    "23": ConflictError,
    **dict.fromkeys(
        [
            "03",
            "09",
            "0A",
            "0B",
            "0F",
            "0L",
            "0P",
            "0Z",
            "10",
            "20",
            "21",
            "24",
            "25",
            "26",
            "27",
            "28",
            "2B",
            "2D",
            "2F",
            "34",
            "38",
            "39",
            "3B",
            "3D",
            "3F",
            "42",
            "44",
            "54",
            "55",
            "F0",
            "HV",
            "P0",
            "XX",
        ],
        PermanentError,
    ),
}

_CLIENT_SIDE = (asyncpg.InterfaceError, asyncpg.InternalClientError)


def translated(error: Exception) -> DaemonError:
    """What `error` means to a caller. The server's own message is kept; values never travel in it."""
    match error:
        case asyncpg.InvalidCachedStatementError():
            # A migration changed a table under a prepared statement; asyncpg has forgotten it, so again is right.
            return StorageUnavailableError(f"database: {error}")
        case asyncpg.PostgresError():
            return _of_server(error)
        case asyncpg.ClientConfigurationError():
            return ConfigError([f"database URL: {error}"])
        case asyncpg.UnsupportedClientFeatureError() | asyncpg.UnsupportedServerFeatureError():
            return PermanentError(f"database: {error}")
        case asyncpg.InterfaceError() if isinstance(error, ValueError):
            # The driver cannot encode an argument: an integer out of range, half of a surrogate pair.
            return DataRejectedError(_first_line(error))
        case asyncpg.InterfaceError() if "clos" not in str(error) and "released" not in str(error):
            # Not about a closed connection or pool: we call the driver wrongly.
            return PermanentError(f"database driver: {error}")
        case TimeoutError():
            return StorageUnavailableError("database: no answer in time")
        case _:
            return StorageUnavailableError(f"database: {_first_line(error) or type(error).__name__}")


@contextmanager
def translating() -> Iterator[None]:
    """Raise our errors in place of those of asyncpg and the socket below it."""
    try:
        yield
    except (asyncpg.PostgresError, *_CLIENT_SIDE, OSError, TimeoutError) as error:
        raise translated(error) from error


def is_known(sqlstate: str) -> bool:
    """Whether somebody decided what this SQLSTATE means."""
    return _lookup(sqlstate) is not None


def _of_server(error: asyncpg.PostgresError) -> DaemonError:
    sqlstate = error.sqlstate or ""
    kind = _lookup(sqlstate) or PermanentError
    problem = f"database, SQLSTATE {sqlstate}: {_first_line(error)}"
    if kind is ConflictError:
        return ConflictError(problem, getattr(error, "constraint_name", None))
    return kind(problem)


def _lookup(sqlstate: str) -> type[DaemonError] | None:
    return _BY_SQLSTATE.get(sqlstate) or _BY_SQLSTATE.get(sqlstate[:2])


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
