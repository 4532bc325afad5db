"""The composition root: the only place that builds the database, the HTTP client, the stores and the engine.

`open_app` serves the commands; `run` and `demo` are the long-lived ones.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from daemon.config import Settings
from daemon.db import embedded, migrate
from daemon.db.connections import ConnectionStore, NewConnection, Rotation
from daemon.db.insights import Check, Insights, Question
from daemon.db.pool import Database
from daemon.db.secrets import Keyring, add_key_to_file, drop_old_keys_from_file, load_or_create_key_file, parse_keys
from daemon.db.tenants import TenantStore
from daemon.domain.connection import ConnectionId, Identity, Secret, Target
from daemon.domain.errors import ConfigError, DaemonError, PermanentError, TransientError
from daemon.domain.job import Summary
from daemon.domain.ports import Answer
from daemon.http_client import HttpClient, HttpSettings
from daemon.pollers.registry import Pollers, load_pollers
from daemon.queue.maintenance import QueueMaintenance

__all__ = ["App", "Check", "NewConnection", "Question", "open_app"]


@dataclass(frozen=True, slots=True)
class TickReport:
    """What `tallyd tick` did; `summary` is there when it also ran the batches."""

    slot: datetime
    created: bool
    connections: int
    batches: int
    summary: Summary | None


@dataclass(frozen=True, slots=True)
class BackfillReport:
    """What a backfill enqueued, or would."""

    connections: int
    jobs: int
    is_dry_run: bool


@dataclass(frozen=True, slots=True)
class App:
    """What the commands work with."""

    settings: Settings
    db: Database
    keyring: Keyring
    tenants: TenantStore
    connections: ConnectionStore
    insights: Insights
    queue: QueueMaintenance
    pollers: Pollers
    http: HttpClient

    def cost_sources(self) -> frozenset[tuple[str, str]]:
        """(provider, source) of every source that reports money itself."""
        return frozenset(
            (name, source.name)
            for name, poller in self.pollers.items()
            for source in poller.sources.values()
            if source.kind == "cost"
        )

    async def identify(self, provider: str, base_url: str, credential: Secret, settings: Mapping[str, Any]) -> Identity:
        """One request that proves the credential, and names its organisation where the provider tells.

        Raises:
            CredentialError, ForbiddenError: the provider refuses the key.  TransientError: no usable answer.
        """
        target = Target(provider, base_url, credential, dict(settings))
        with anyio.fail_after(self.settings.subjob_budget_s):
            return await self.pollers.named(provider).identify(target, _OnceCaller(self.http, base_url))

    async def doctor(self, *, reach: bool) -> list[Check]:
        """Every check of this installation, the laws in SQL among them."""
        status = await migrate.status(self.db)
        checks = [
            Check(
                "database",
                True,
                str(await self.db.fetchval("select 'PostgreSQL ' || current_setting('server_version')")),
            ),
            Check(
                "migrations",
                status.is_current,
                f"schema {status.version} of {status.target}",
                "" if status.is_current else "tallyd db migrate",
            ),
        ]
        if not status.is_current:
            return checks
        unopenable = await self.connections.unopenable()
        checks += [
            await self.insights.clock_skew(),
            Check(
                "credentials open",
                not unopenable,
                "; ".join(unopenable[:5]) or "all",
                "add the old key to TALLYD_SECRET_KEY, or set the credential again" if unopenable else "",
            ),
            *await self.insights.laws(),
        ]
        list(self.pollers)  # loads them all, which finds those that do not
        problems = "; ".join(self.pollers.problems.values())
        checks.append(Check("pollers", not problems, problems or ", ".join(sorted(self.pollers)), "mend its package"))
        if reach:
            checks += [await self._reached(url) for url in await self._base_urls()]
        return checks

    async def _base_urls(self) -> list[str]:
        return sorted({c.base_url for c in await self.connections.list() if c.state in ("active", "parked")})

    async def _reached(self, base_url: str) -> Check:
        """Any answer proves the way, also a refusal: no key is sent."""
        try:
            await self.http.get(base_url, "")
        except TransientError as error:
            return Check(f"reach {base_url}", False, str(error), "check network, proxy (http_proxy) and http_ca_bundle")
        except DaemonError:
            pass  # 401 and its like: someone is there
        return Check(f"reach {base_url}", True, "answers")

    async def rotate_key(self) -> Rotation:
        """Seal every credential under the first key; an embedded installation makes itself a new one first."""
        if self.settings.secret_key is not None:
            return await self.connections.rotate()
        keys = parse_keys(add_key_to_file(self.settings.key_file).reveal())
        rotation = await ConnectionStore(self.db, Keyring(keys)).rotate()
        if not rotation.failed:
            drop_old_keys_from_file(self.settings.key_file)
        return rotation

    async def poll(self, connections: Sequence[ConnectionId], *, full: bool) -> Summary:
        """Poll these connections now, in this process."""
        raise NotImplementedError

    async def tick(self, slot: datetime | None, *, wait: bool) -> TickReport:
        """Make the tick of a slot (None: the current one) and, with `wait`, run its batches in this process."""
        raise NotImplementedError

    async def backfill(
        self, connections: Sequence[ConnectionId], start: datetime, end: datetime, *, dry_run: bool
    ) -> BackfillReport:
        """Enqueue the reading of every bucket in [start, end)."""
        raise NotImplementedError

    async def regroup(self, tenant: str, name: str, settings: Mapping[str, Any]) -> None:
        """Replace a connection's settings; where they cut its buckets anew, by a new grain epoch."""
        raise NotImplementedError


class _OnceCaller:
    """A caller for one request by a person: no retries."""

    def __init__(self, http: HttpClient, base_url: str) -> None:
        self._http = http
        self._base_url = base_url

    async def get(
        self, path: str, params: Sequence[tuple[str, str]] = (), headers: Mapping[str, str] | None = None
    ) -> Answer:
        return await self._http.get(self._base_url, path, params, headers)


def http_settings(settings: Settings) -> HttpSettings:
    return HttpSettings(
        connect_timeout_s=settings.http_connect_timeout_s,
        read_timeout_s=settings.http_read_timeout_s,
        body_bytes_max=settings.http_body_bytes_max,
        proxy_url=settings.http_proxy.reveal() if settings.http_proxy else None,
        ca_bundle=str(settings.http_ca_bundle) if settings.http_ca_bundle else None,
    )


async def database_url(settings: Settings) -> str:
    """The configured database, or the embedded one, started if need be."""
    if settings.database_url is not None:
        return settings.database_url.reveal()
    return await anyio.to_thread.run_sync(embedded.start, settings.data_dir)


@asynccontextmanager
async def open_app(settings: Settings, *, is_migrating: bool = True) -> AsyncIterator[App]:
    """Open the database (migrated), the stores and the HTTP client; close them in reverse."""
    async with AsyncExitStack() as stack:
        db = await Database.open(
            await database_url(settings),
            pool_min=settings.database_pool_min,
            pool_max=settings.database_pool_max,
            statement_cache_size=settings.statement_cache_size,
        )
        stack.push_async_callback(db.close)
        if is_migrating:
            await migrate.migrate(db)
        secret = settings.secret_key or load_or_create_key_file(settings.key_file)
        keyring = Keyring(parse_keys(secret.reveal()))
        http = await stack.enter_async_context(HttpClient(http_settings(settings)))
        yield App(
            settings,
            db,
            keyring,
            TenantStore(db),
            ConnectionStore(db, keyring),
            Insights(db),
            QueueMaintenance(db),
            load_pollers(),
            http,
        )


def run(settings: Settings) -> int:
    """The daemon, until SIGTERM or SIGINT. Returns the exit code."""
    raise NotImplementedError


def demo(settings: Settings, *, keep: bool) -> int:
    """The whole road in two minutes, with its verdict as the exit code."""
    raise NotImplementedError


@dataclass(frozen=True, slots=True)
class DatabaseStatus:
    """`kind` is embedded or external; `schema` is None where the server does not run."""

    kind: str
    is_running: bool
    schema: int | None
    target: int
    pending: tuple[str, ...]
    folder: str | None


def start_database(settings: Settings) -> str:
    """Start the embedded server so that it stays until it is stopped. Returns its URL."""
    _need_embedded(settings)
    return embedded.start(settings.data_dir, keep=True)


def stop_database(settings: Settings) -> bool:
    _need_embedded(settings)
    return embedded.stop(settings.data_dir)


def _need_embedded(settings: Settings) -> None:
    if settings.database_url is not None:
        raise ConfigError(
            ["database_url: is set, so the database is not ours to start or stop; unset it for the embedded one"]
        )


async def database_status(settings: Settings) -> DatabaseStatus:
    """Where the database stands; starts nothing."""
    target = len(migrate.load())
    if settings.database_url is None:
        found = embedded.status(settings.data_dir)
        if not found.is_running:
            return DatabaseStatus("embedded", False, None, target, (), str(found.folder))
        url, kind, folder = found.url, "embedded", str(found.folder)
    else:
        url, kind, folder = settings.database_url.reveal(), "external", None
    db = await Database.open(url, pool_max=2, statement_cache_size=settings.statement_cache_size)
    try:
        status = await migrate.status(db)
    finally:
        await db.close()
    return DatabaseStatus(kind, True, status.version, status.target, status.pending, folder)


async def migrate_database(settings: Settings) -> DatabaseStatus:
    """Bring the schema up to date."""
    async with open_app(settings):
        return await database_status(settings)


def psql_command(settings: Settings) -> list[str]:
    """The command that opens a prompt on the database.

    Raises:
        PermanentError: no psql is installed.
    """
    psql = shutil.which("psql")
    if psql is None and settings.database_url is None:
        bundled = Path(embedded.Cluster(embedded.status(settings.data_dir).folder).command("psql")[0])
        psql = str(bundled) if os.access(bundled, os.X_OK) else None
    if psql is None:
        raise PermanentError("psql: is not on the PATH; install the PostgreSQL client (postgresql-client)")
    url = anyio.run(database_url, settings)
    return [psql, url]
