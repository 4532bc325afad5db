"""What every command needs: the settings of this call, and an app around its work."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from daemon.config import Settings, load
from daemon.domain.account import AccountId
from daemon.domain.errors import UsageError

if TYPE_CHECKING:
    from daemon.app import App

Result = TypeVar("Result")

FLAGS: ContextVar[dict[str, object]] = ContextVar("FLAGS")
CONFIG_FILE: ContextVar[Path | None] = ContextVar("CONFIG_FILE", default=None)


def settings(environment: Mapping[str, str] | None = None, /, **flags: object) -> Settings:
    """The settings of this call, checked; `flags` are those that only its command has.

    Args:
        environment: instead of the process's own.
    """
    return load({**FLAGS.get({}), **flags}, environment, toml_path=CONFIG_FILE.get())


def set_up_logs(chosen: Settings, *, is_service: bool = False) -> None:
    """A service logs as configured; a command that a person waits for only speaks up when something is wrong."""
    from daemon.telemetry.logs import configure

    is_quiet = not is_service and "log_level" not in chosen.origins
    configure(level="warning" if is_quiet else chosen.log_level, style=chosen.log_format, is_final=is_service)


def with_app(work: Callable[[App], Awaitable[Result]]) -> Result:
    """Open the app (database, stores, pollers), do the work, close it."""
    import anyio

    from daemon.app import open_app

    chosen = settings()
    set_up_logs(chosen)

    async def run() -> Result:
        async with open_app(chosen) as app:
            return await work(app)

    return anyio.run(run)


async def account_of(app: App, name: str) -> AccountId:
    """Raises UsageError when there is no such account."""
    try:
        return await app.accounts.named(name)
    except UsageError as error:
        raise UsageError("--account", error.problem, error.fix) from error


async def accounts_of(app: App, name: str | None) -> dict[str, AccountId]:
    """The account of this name, or all of them by name."""
    if name is not None:
        return {name: await account_of(app, name)}
    return {line.name: await app.accounts.named(line.name) for line in await app.accounts.accounts()}
