"""Every exception that asyncpg can raise has a meaning that somebody decided."""

import inspect

import asyncpg
import pytest

from daemon.db.failures import is_known, translated, translating
from daemon.domain import errors


def exception_classes() -> list[type[Exception]]:
    return [
        item
        for _, item in inspect.getmembers(asyncpg.exceptions, inspect.isclass)
        if issubclass(item, Exception) and not issubclass(item, Warning)
    ]


@pytest.mark.parametrize("kind", exception_classes(), ids=lambda kind: kind.__name__)
def test_every_exception_of_the_driver_is_mapped(kind: type[Exception]) -> None:
    error = kind("detail")
    sqlstate = getattr(kind, "sqlstate", None)
    if issubclass(kind, asyncpg.PostgresError) and sqlstate is not None:
        assert is_known(sqlstate), f"decide what SQLSTATE {sqlstate} means in daemon/db/failures.py"
    with pytest.raises(errors.DaemonError), translating():
        raise error


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (asyncpg.ConnectionDoesNotExistError, errors.StorageUnavailableError),
        (asyncpg.AdminShutdownError, errors.StorageUnavailableError),
        (asyncpg.CannotConnectNowError, errors.StorageUnavailableError),
        (asyncpg.QueryCanceledError, errors.StorageUnavailableError),
        (asyncpg.TooManyConnectionsError, errors.StorageUnavailableError),
        (asyncpg.DiskFullError, errors.StorageUnavailableError),
        (asyncpg.LockNotAvailableError, errors.StorageUnavailableError),
        (asyncpg.IdleInTransactionSessionTimeoutError, errors.StorageUnavailableError),
        (asyncpg.ReadOnlySQLTransactionError, errors.StorageUnavailableError),
        (asyncpg.DeadlockDetectedError, errors.DeadlockError),
        (asyncpg.SerializationError, errors.DeadlockError),
        (asyncpg.CharacterNotInRepertoireError, errors.DataRejectedError),
        (asyncpg.NumericValueOutOfRangeError, errors.DataRejectedError),
        (asyncpg.CheckViolationError, errors.DataRejectedError),
        (asyncpg.NotNullViolationError, errors.DataRejectedError),
        (asyncpg.UniqueViolationError, errors.ConflictError),
        (asyncpg.ForeignKeyViolationError, errors.ConflictError),
        (asyncpg.UndefinedTableError, errors.PermanentError),
        (asyncpg.InvalidPasswordError, errors.PermanentError),
        (asyncpg.InvalidCachedStatementError, errors.StorageUnavailableError),
        (ConnectionRefusedError, errors.StorageUnavailableError),
        (TimeoutError, errors.StorageUnavailableError),
    ],
)
def test_failures_are_named_by_what_to_do(kind: type[Exception], expected: type[Exception]) -> None:
    assert type(translated(kind("detail"))) is expected


def test_closed_pool_is_transient_but_misuse_is_a_defect() -> None:
    assert isinstance(translated(asyncpg.InterfaceError("pool is closing")), errors.StorageUnavailableError)
    assert type(translated(asyncpg.InterfaceError("another operation is in progress"))) is errors.PermanentError


def test_unknown_sqlstate_is_permanent_and_named() -> None:
    error = asyncpg.PostgresError("odd")
    error.sqlstate = "ZZ999"
    assert type(translated(error)) is errors.PermanentError
    assert "ZZ999" in str(translated(error))
