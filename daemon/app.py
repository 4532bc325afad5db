"""The composition root: the only place that builds the database, the HTTP client, the stores and the engine.

`open_app` serves every command; `daemon.service` runs the daemon on it.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import anyio
import anyio.to_thread
import stamina
import structlog

from daemon import __version__, orchestrate
from daemon.config import Settings
from daemon.db import embedded, migrate, names, quota, resources, streams, ticks
from daemon.db.accounts import AccountStore
from daemon.db.activity import OUTCOMES, Activity, read_activity
from daemon.db.causes import Booking, Causes, Trace, TracedJob
from daemon.db.connections import ConnectionStore, NewConnection, Rotation
from daemon.db.figures import Figures, SourceFact
from daemon.db.insights import (
    Check,
    Gap,
    Insights,
    LeftOut,
    Question,
    Report,
    SpendLine,
    Status,
    Tick,
    UsageLine,
)
from daemon.db.names import NameSpan
from daemon.db.overlaps import Kin, kin_of, labels
from daemon.db.pool import Database
from daemon.db.quota import QuotaLine, QuotaStore
from daemon.db.resources import Run as ResourceRun
from daemon.db.secrets import (
    Keyring,
    add_key_to_file,
    drop_old_keys_from_file,
    load_or_create_key_file,
    new_key,
    parse_keys,
)
from daemon.db.streams import GrainOf
from daemon.db.tenants import TenantStore
from daemon.domain.account import Limits, SigningKeys
from daemon.domain.address import Address
from daemon.domain.connection import ConnectionId, Identity, Secret, Target
from daemon.domain.destination import check_url
from daemon.domain.errors import (
    ConfigError,
    DaemonError,
    PermanentError,
    TransientError,
    UpstreamUnavailableError,
    UsageError,
)
from daemon.domain.job import KEY_END, PUSH_KEY, Completed, Job, Lane, NewJob, Outcome, Summary, WorkerId
from daemon.domain.network import Guard, parse_allow
from daemon.domain.overlap import Gateway
from daemon.domain.ports import Answer, Poller
from daemon.domain.record import Rating
from daemon.domain.redis_url import parse_url
from daemon.domain.window import EPOCH
from daemon.pollers.registry import Pollers, check_settings, load_pollers
from daemon.queue.audit import Probe, probe
from daemon.queue.backlog import Addressed, Backlog, UnderWay
from daemon.queue.groups import Group, Groups
from daemon.queue.letters import Letter, Letters, NoSuchLetterError
from daemon.queue.logs import Logs
from daemon.queue.maintenance import DeadDetail, DeadLetter, QueueMaintenance, QueueStats
from daemon.queue.message import PUSH, MessageId, dead_name, parse_dead_name
from daemon.queue.messages import Messages
from daemon.queue.outbox import Outbox
from daemon.queue.pending import Pending
from daemon.queue.postgres import PostgresQueue
from daemon.queue.qstash import PUBLISH, Publisher, QStashSettings
from daemon.queue.schedules import Schedule, Schedules
from daemon.records.price import Pricer
from daemon.sinks.ledger import LedgerSink, Taker
from daemon.sinks.names import NameTaker
from daemon.sinks.quota import QuotaTaker
from daemon.worker.caller import RetrySettings
from daemon.worker.governor import Governor, GovernorSettings
from daemon.worker.ladder import Mode
from daemon.worker.local import LocalWorker
from daemon.worker.loop import WorkerLoop
from daemon.worker.poll import BUDGET_RATIO, POLL, POLL_ONE, PollDeps, PollOrder, PollSettings, grains_of, run_poll
from daemon.worker.quota import QUOTA_DRIFT, FollowUp, QuotaDeps, run_drift
from daemon.worker.run import Handler, run_job
from daemon.worker.seqs import SeqSource

if TYPE_CHECKING:
    from daemon.http_client import HttpClient, HttpSettings
    from daemon.http_push import PushClient, PushSettings
    from daemon.worker.push import Pusher

BY_HAND_TIMEOUT_S = 3_600.0
BACKFILL_BATCH = 10
WATCH_S = 0.2
RESOURCE_PROVIDER, RESOURCE_SOURCE = "http_resource", "resources"
SILENT_S = 60.0
"""A command rescues at once, without having watched beats itself. After an outage this may take a job from a worker that
is about to beat again: then the job runs twice, and the fences book it once."""

T = TypeVar("T")


@runtime_checkable
class SpeaksHttp(Protocol):
    """A poller whose provider is not asked through a `Caller` alone."""

    def take_http(self, http: Callable[[], HttpSettings]) -> None: ...


log = structlog.get_logger()

# The commands know this module alone; what they are handed has its names here.
__all__ = [
    "OUTCOMES",
    "PUSH",
    "Activity",
    "Addressed",
    "App",
    "BackfillReport",
    "Booking",
    "Check",
    "DatabaseStatus",
    "DeadDetail",
    "DeadLetter",
    "Gap",
    "Group",
    "Kin",
    "LeftOut",
    "Letter",
    "MessageId",
    "NameSpan",
    "NewConnection",
    "NoSuchLetterError",
    "Probe",
    "Question",
    "QueueStats",
    "QuotaLine",
    "Report",
    "ResourceRun",
    "Rotation",
    "Schedule",
    "SigningKeys",
    "SpendLine",
    "Status",
    "Tick",
    "TickReport",
    "Trace",
    "TracedJob",
    "UnderWay",
    "UsageLine",
    "database_status",
    "dead_name",
    "empty_database",
    "leave_database",
    "migrate_database",
    "new_key",
    "open_app",
    "parse_dead_name",
    "probe",
    "psql_command",
    "start_database",
    "stop_database",
]


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


@dataclass
class App:
    """What the commands work with. What only some of them need is made when it is first asked for."""

    settings: Settings
    db: Database
    keyring: Keyring
    tenants: TenantStore
    connections: ConnectionStore
    insights: Insights
    queue: QueueMaintenance
    jobs: PostgresQueue
    pollers: Pollers
    lets_dev_in: bool = False

    @cached_property
    def http(self) -> HttpClient:
        from daemon.http_client import HttpClient  # noqa: PLC0415 - takes 0.3 s to import

        return HttpClient(http_settings(self.settings))

    @cached_property
    def poll_deps(self) -> PollDeps:
        """What poll jobs work with in this process."""
        return poll_deps(self.settings, self.db, self.jobs, self.keyring, self.pollers, self.http, self._takers)

    @cached_property
    def _takers(self) -> Mapping[str, Taker]:
        """What writes the items of collections, by their kind."""
        from daemon.worker.resources import ResourceTaker  # noqa: PLC0415 - imports the client

        return {
            "names": NameTaker(),
            "quota": QuotaTaker(Outbox(self.messages, self.accounts), FollowUp(self.jobs)),
            "resource": ResourceTaker(self.jobs),
        }

    @cached_property
    def resource_deps(self) -> PollDeps:
        """What batches of resources work with: a governor of their own, so that polls do not wait for them."""
        from daemon.worker.resources import NO_BREAKER  # noqa: PLC0415 - imports the client

        limits = GovernorSettings(
            self.settings.poll_concurrency, self.settings.poll_concurrency_per_host, breaker_failures=NO_BREAKER
        )
        return replace(self.poll_deps, governor=Governor(limits, monotonic))

    async def resource_runs(self, tenant: str | None, name: str | None) -> list[ResourceRun]:
        """The REST collections of this scope, each with its newest listing and what came of it."""
        return await resources.runs(self.db, RESOURCE_PROVIDER, RESOURCE_SOURCE, tenant, name)

    @cached_property
    def quotas(self) -> QuotaStore:
        return QuotaStore(self.db)

    async def quota_connections(self, tenant: str | None, name: str | None) -> list[ConnectionId]:
        """The quota sources of this scope that are synced."""
        return await quota.connections(self.db, tenant, name)

    async def check_destination(self, field: str, url: str) -> None:
        """Raises UsageError for a URL that messages may not go to."""
        try:
            await self.push_client.check(check_url(url))
        except ValueError as error:
            raise UsageError(field, str(error), "give the URL of a receiver") from error
        except PermanentError as error:
            raise UsageError(field, str(error), "see push_allow") from error

    @cached_property
    def quota_deps(self) -> QuotaDeps:
        """What quota counters are compared and set with."""
        return QuotaDeps(
            self.db, self.keyring, self.insights, self.quotas, self.poll_deps, self.cost_sources(), self.gateways()
        )

    @cached_property
    def publisher(self) -> Publisher:
        return Publisher(self.db, self.jobs.waker, qstash_settings(self.settings))

    @cached_property
    def accounts(self) -> AccountStore:
        return AccountStore(self.db, self.keyring, account_limits(self.settings), lets_dev_in=self.lets_dev_in)

    @cached_property
    def messages(self) -> Messages:
        return Messages(self.db, self.jobs)

    @cached_property
    def groups(self) -> Groups:
        return Groups(self.db)

    @cached_property
    def schedules(self) -> Schedules:
        return Schedules(self.db, self.jobs, self.messages, self.accounts.limits_of)

    @cached_property
    def logs(self) -> Logs:
        return Logs(self.db)

    @cached_property
    def letters(self) -> Letters:
        return Letters(self.db, self.jobs, self.messages)

    @cached_property
    def pending(self) -> Pending:
        return Pending(self.db, self.jobs)

    @cached_property
    def backlog(self) -> Backlog:
        return Backlog(self.db)

    @cached_property
    def push_client(self) -> PushClient:
        from daemon.http_push import PushClient  # noqa: PLC0415 - takes 0.3 s to import

        return PushClient(push_settings(self.settings))

    @cached_property
    def pusher(self) -> Pusher:
        from daemon.worker.push import Pusher  # noqa: PLC0415 - imports the client

        return Pusher(self.messages, self.accounts, self.push_client, self.settings.push_bytes_max)

    @cached_property
    def causes(self) -> Causes:
        return Causes(self.db, self.settings.tick_complete_ratio)

    @cached_property
    def figures(self) -> Figures:
        """What `/metrics` tells of the database."""
        facts = [
            SourceFact(name, source.name, source.kind == "cost", source.ladder.daily)
            for name, poller in self.pollers.items()
            for source in poller.sources.values()
            if source.is_report and not source.is_level
        ]
        return Figures(self.db, facts, by_tenant=self.settings.metrics_by_tenant, gateways=self.gateways())

    async def aclose(self) -> None:
        """Close what was made on demand."""
        if "http" in self.__dict__:
            await self.http.aclose()
        if "publisher" in self.__dict__:
            await self.publisher.aclose()
        if "push_client" in self.__dict__:
            await self.push_client.aclose()

    async def activity(self) -> Activity:
        """What happens right now."""
        return await read_activity(self.db)

    async def labels_of(self, letters: Iterable[DeadLetter]) -> dict[ConnectionId, str]:
        """TENANT/NAME of the connections that dead letters are about."""
        return await labels(self.db, {id_ for letter in letters for id_ in letter.connections})

    def cost_sources(self) -> frozenset[tuple[str, str]]:
        """(provider, source) of every source that reports money itself."""
        return frozenset(
            (name, source.name)
            for name, poller in self.pollers.items()
            for source in poller.sources.values()
            if source.kind == "cost"
        )

    def check_settings(self, provider: str, settings: Mapping[str, Any]) -> None:
        """Raise UsageError for a setting that neither every connection nor this provider knows."""
        check_settings(self.pollers.named(provider), settings)

    def gateways(self) -> list[Gateway]:
        """The sources whose rows name the vendor who is paid, each with the reports of all other providers."""
        reports = [
            (name, source)
            for name, poller in self.pollers.items()
            for source in poller.sources.values()
            if source.is_report and not source.is_level
        ]
        return [
            Gateway(
                name,
                source.name,
                source.upstream,
                frozenset((p, s.name) for p, s in reports if p != name and s.kind == source.kind),
            )
            for name, source in reports
            if source.upstream is not None
        ]

    async def kin_of(self, connection: ConnectionId) -> list[Kin]:
        """Who else may hold the same money as this connection."""
        return await kin_of(self.db, connection, self.gateways())

    async def names(self, *, tenant: str | None, kind: str | None, with_history: bool) -> list[NameSpan]:
        """What the ids in the reports are called, or were."""
        return await names.listed(self.db, tenant=tenant, kind=kind, with_history=with_history)

    async def identify(self, provider: str, base_url: str, credential: Secret, settings: Mapping[str, Any]) -> Identity:
        """One request that proves the credential, and names its organisation where the provider tells.

        Raises:
            CredentialError, ForbiddenError: the provider refuses the key.  TransientError: no usable answer.
        """
        target = Target(provider, base_url, credential, dict(settings))
        with anyio.fail_after(self.settings.subjob_budget_s):
            return await self.pollers.named(provider).identify(target, _OnceCaller(self.http, base_url))

    async def mend(self) -> list[str]:
        """Mend what can be mended without a person's judgement. Returns a sentence for each thing done."""
        if not (await migrate.status(self.db)).is_current:
            return []
        mended = await streams.mend_sequences(self.db)
        return [f"{name} now stands at {newest}" for name, newest in mended.items()]

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
        credentials, keys = await self.connections.unopenable(), await self.accounts.unopenable()
        unopenable = [*credentials, *keys]
        ways = ["add the old key to TALLYD_SECRET_KEY", *(["set the credential again"] if credentials else [])]
        ways += ["replace an account's signing keys with `tallyd keys rotate --both`"] if keys else []
        checks += [
            await self.insights.clock_skew(),
            Check(
                "credentials open",
                not unopenable,
                "; ".join(unopenable[:5]) or "all",
                ", or ".join(ways) if unopenable else "",
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
            if base_url.startswith("http"):
                await self.http.get(base_url, "")
            else:
                await _knock(parse_url(base_url).hosts, self.settings.http_connect_timeout_s)
        except TransientError as error:
            return Check(f"reach {base_url}", False, str(error), "check network, proxy (http_proxy) and http_ca_bundle")
        except DaemonError:
            pass  # 401 and its like: someone is there
        return Check(f"reach {base_url}", True, "answers")

    async def rotate_key(self) -> Rotation:
        """Seal every credential, and every account's signing keys, under the first key; an embedded installation makes
        itself a new one first.
        """
        if self.settings.secret_key is not None:
            return await _reseal(self.connections, self.accounts)
        keyring = Keyring(parse_keys(add_key_to_file(self.settings.key_file).reveal()))
        rotation = await _reseal(
            ConnectionStore(self.db, keyring, cutter(self.pollers)), AccountStore(self.db, keyring)
        )  # fmt: skip
        if not rotation.failed:
            drop_old_keys_from_file(self.settings.key_file)
        return rotation

    async def poll(self, connections: Sequence[ConnectionId], *, full: bool) -> Summary:
        """Poll these connections now, in this process. Raises TransientError for what could not be finished."""
        await streams.check_sequences(self.db)
        mode = Mode.FULL if full else Mode.POLL
        orders = [PollOrder(ids, mode=mode) for ids in _batches(connections, self.settings.batch_size)]
        jobs = [NewJob(POLL, order.encode(), timeout_s=BY_HAND_TIMEOUT_S) for order in orders]
        return await self._run_here(lambda worker: self.jobs.enqueue_leased(jobs, worker))

    async def tick(self, slot: datetime | None, *, wait: bool) -> TickReport:
        """Make the tick of a slot (None: the current one) and, with `wait`, run its batches in this process.

        Where another process made the tick, `wait` helps with its batches until they are done. Then it works off what
        else waits: where ticks come from cron alone, nobody else would.
        """
        await streams.check_sequences(self.db)
        if not wait:
            made = await orchestrate.tick(self.db, self.jobs, tick_settings(self.settings), slot)
            await self.jobs.waker.flush()
            return TickReport(made.slot, made.created, made.connections, made.batches, None)
        made = orchestrate.Tick(EPOCH, created=False)

        async def lease(worker: WorkerId) -> Sequence[Job]:
            nonlocal made
            made = await orchestrate.tick(self.db, self.jobs, tick_settings(self.settings), slot, worker)
            return made.leased

        summary = await self._run_here(lease)
        if not made.created:
            await self._help_until_done(made.slot)
            _, summary = await ticks.summary_of(self.db, await ticks.jobs_of(self.db, made.slot))
        await self._work_off()
        return TickReport(made.slot, made.created, made.connections, made.batches, summary)

    async def _run_here(self, lease: Callable[[WorkerId], Awaitable[Sequence[Job]]]) -> Summary:
        worker = LocalWorker(self.jobs, self.run_job, self.settings.concurrency)
        ended = await worker.run(lease)
        failed = [outcome for _, outcome in ended if not isinstance(outcome, Completed)]
        if failed:
            raise TransientError(f"{len(failed)} of {len(ended)} batches did not finish: {failed[0].reason}")
        _, summary = await ticks.summary_of(self.db, [job.id for job, _ in ended])
        return summary

    async def _work_off(self) -> None:
        """Run what a killed command had leased, retries that have become due, and whatever else is ready."""
        await self.jobs.rescue(silent_s=SILENT_S)
        await self.jobs.promote()

        async def lease(worker: WorkerId) -> Sequence[Job]:
            return (await self.jobs.claim(worker, self.settings.concurrency, lane=lanes(self.settings)[0])).jobs

        while await LocalWorker(self.jobs, self.run_job, self.settings.concurrency).run(lease):
            pass

    async def _help_until_done(self, slot: datetime) -> None:
        left = await ticks.open_batches(self.db, slot)

        async def is_open() -> bool:
            nonlocal left
            left = await ticks.still_open(self.db, left)
            return bool(left)

        if left:
            await self.help_while(is_open)

    async def help_while(self, is_open: Callable[[], Awaitable[object]]) -> None:
        """Run what is ready, ours or not, as long as something is open."""
        loop = self.worker_loop()

        async def watch() -> None:
            while await is_open():  # noqa: ASYNC110 - what closes it may be another process
                await anyio.sleep(WATCH_S)
            loop.stop()

        async with anyio.create_task_group() as group:
            group.start_soon(loop.run)
            group.start_soon(watch)

    async def run_job(self, job: Job) -> Outcome:
        """The one worker function, with this process's parts."""
        return await run_job(job, self._handlers)

    @cached_property
    def _handlers(self) -> Mapping[str, Handler]:
        from daemon.worker.resources import RESOURCES  # noqa: PLC0415 - imports the client

        return {
            POLL: self._poll,
            POLL_ONE: self._poll,
            PUBLISH: self.publisher.run,
            PUSH: self._push,
            QUOTA_DRIFT: self._compare_quotas,
            RESOURCES: self._resources,
        }

    async def _resources(self, job: Job) -> Outcome:
        from daemon.worker.resources import run_resources  # noqa: PLC0415 - imports the client

        return await run_resources(job, self.resource_deps)

    async def _compare_quotas(self, job: Job) -> Outcome:
        return await run_drift(job, self.quota_deps)

    async def _push(self, job: Job) -> Outcome:
        return await self.pusher.run(job)

    async def _poll(self, job: Job) -> Outcome:
        return await run_poll(job, self.poll_deps)

    def worker_loop(self) -> WorkerLoop:
        """A claim loop of this process."""
        return WorkerLoop(
            self.jobs,
            self.run_job,
            lanes=lanes(self.settings),
            drain_s=self.settings.drain_s,
            info=f"tallyd {__version__} {self.settings.role} on {platform.node()} pid {os.getpid()}",
        )

    async def backfill(
        self, connections: Sequence[ConnectionId], start: datetime, end: datetime, *, dry_run: bool
    ) -> BackfillReport:
        """Enqueue the reading of every bucket in [start, end), behind the ticks' own work."""
        orders = [
            PollOrder(ids, mode=Mode.RANGE, start=start, end=end) for ids in _batches(connections, BACKFILL_BATCH)
        ]
        if not dry_run:
            jobs = [NewJob(POLL, order.encode(), prio=200, timeout_s=BY_HAND_TIMEOUT_S) for order in orders]
            await self.jobs.enqueue(jobs)
            await self.jobs.waker.flush()
        return BackfillReport(len(connections), len(orders), dry_run)

    async def regroup(self, tenant: str, name: str, settings: Mapping[str, Any]) -> None:
        """Replace a connection's settings; where they cut a source anew, a new grain owns its next buckets on.

        Raises:
            UsageError: a setting that the provider does not know.
        """
        connection = await self.connections.get(tenant, name)
        self.check_settings(connection.provider, settings)
        await self.connections.set_settings(tenant, name, settings)


async def _knock(hosts: Sequence[Address], timeout_s: float) -> None:
    """Raises UpstreamUnavailableError where none of the hosts takes a connection."""
    problem = ""
    for host in hosts:
        try:
            with anyio.fail_after(timeout_s):
                stream = await anyio.connect_tcp(host.host, host.port)
            await stream.aclose()
        except (OSError, TimeoutError) as error:
            problem = f"{host}: {str(error) or 'no answer in time'}"
        else:
            return
    raise UpstreamUnavailableError(problem)


async def _reseal(connections: ConnectionStore, accounts: AccountStore) -> Rotation:
    rotation = await connections.rotate()
    resealed, failed = await accounts.reseal()
    return Rotation(rotation.resealed + resealed, (*rotation.failed, *failed))


class _OnceCaller:
    """A caller for one request by a person: no retries."""

    def __init__(self, http: HttpClient, base_url: str) -> None:
        self._http = http
        self._base_url = base_url

    async def get(
        self, path: str, params: Sequence[tuple[str, str]] = (), headers: Mapping[str, str] | None = None
    ) -> Answer:
        return await self._http.get(self._base_url, path, params, headers)

    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str] | None = None, *, base_url: str | None = None
    ) -> Answer:
        return await self._http.post(base_url or self._base_url, path, body, headers)

    async def run(self, send: Callable[[], Awaitable[T]]) -> T:
        return await send()


def http_settings(settings: Settings) -> HttpSettings:
    from daemon.http_client import HttpSettings  # noqa: PLC0415 - takes 0.3 s to import

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
async def open_app(settings: Settings, *, is_migrating: bool = True, lets_dev_in: bool = False) -> AsyncIterator[App]:
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
        queue = PostgresQueue(db)
        secret = settings.secret_key or load_or_create_key_file(settings.key_file)
        keyring = Keyring(parse_keys(secret.reveal()))
        pollers = load_pollers(lambda poller: _set_up(poller, settings))
        app = App(
            settings,
            db,
            keyring,
            TenantStore(db),
            ConnectionStore(db, keyring, cutter(pollers)),
            Insights(db),
            QueueMaintenance(db),
            queue,
            pollers,
            lets_dev_in,
        )
        stack.push_async_callback(app.aclose)
        yield app


def _set_up(poller: Poller, settings: Settings) -> None:
    """A poller that has a door of its own knows this installation's time-outs, roots and proxy."""
    if isinstance(poller, SpeaksHttp):
        poller.take_http(lambda: http_settings(settings))


def cutter(pollers: Pollers) -> GrainOf:
    """How each connection's settings cut its sources."""
    return lambda connection: grains_of(pollers, connection)


def poll_deps(
    settings: Settings,
    db: Database,
    queue: PostgresQueue,
    keyring: Keyring,
    pollers: Pollers,
    http: HttpClient,
    takers: Mapping[str, Taker],
) -> PollDeps:
    """What poll jobs work with in this process."""
    pricer = Pricer()
    stamina.instrumentation.set_on_retry_hooks([])  # tries are counted with the requests; a failure is logged once

    def price(rating: Rating, at: datetime) -> tuple[Decimal | None, str]:
        priced = pricer.price(rating, at)
        return priced.amount, priced.rate_version + (" estimate" if priced.is_estimate else "")

    governor = GovernorSettings(total=settings.poll_concurrency, per_host=settings.poll_concurrency_per_host)
    return PollDeps(
        db=db,
        queue=queue,
        keyring=keyring,
        pollers=pollers,
        http=http,
        governor=Governor(governor, monotonic),
        sink=LedgerSink(db, takers),
        price=price,
        seqs=SeqSource(db),
        settings=PollSettings(
            retry=RetrySettings(tries=settings.subjob_tries, budget_s=settings.subjob_budget_s),
            keep=days(settings.retention_ledger_days),
        ),
        monotonic=monotonic,
    )


def tick_settings(settings: Settings) -> orchestrate.TickSettings:
    return orchestrate.TickSettings(
        settings.tick_seconds,
        settings.batch_size,
        batch_timeout_s=settings.batch_budget_s / BUDGET_RATIO,
        complete_s=settings.tick_complete_s,
        hand_over_s=settings.qstash_handover_s,
    )


def qstash_settings(settings: Settings) -> QStashSettings | None:
    """How to reach QStash; None where it is not configured that far."""
    if settings.qstash_token is None or settings.public_url is None:
        return None
    return QStashSettings(settings.qstash_token, settings.public_url, settings.qstash_url, settings.qstash_retries)


def lanes(settings: Settings) -> tuple[Lane, Lane]:
    """The work inside, and the messages on their way out: neither waits for the other's slots."""
    return (
        Lane("work", 0, PUSH_KEY, settings.concurrency),
        Lane("push", PUSH_KEY, KEY_END, settings.push_concurrency, settings.push_concurrency_per_host),
    )


def account_limits(settings: Settings) -> Limits:
    """What an account may ask for that has no limits of its own."""
    return Limits(
        message_bytes=settings.v2_message_bytes_max,
        batch_bytes=settings.v2_batch_bytes_max,
        delay_s=settings.v2_delay_s_max,
        timeout_s=settings.v2_timeout_s_max,
        retries=settings.v2_retries_max,
        schedules=settings.v2_schedules_max,
        queues=settings.v2_queues_max,
        groups=settings.v2_groups_max,
        endpoints=settings.v2_endpoints_max,
        parallelism_max=settings.v2_parallelism_max,
        dedup_s=settings.v2_dedup_s,
    )


def push_settings(settings: Settings) -> PushSettings:
    from daemon.http_client import ssl_context  # noqa: PLC0415 - takes 0.3 s to import
    from daemon.http_push import PushSettings  # noqa: PLC0415

    return PushSettings(
        Guard(parse_allow(settings.push_allow) if settings.push_allow else (), settings.push_allow_private),
        connect_timeout_s=settings.push_connect_timeout_s,
        response_bytes_max=settings.push_response_bytes_max,
        connections_max=settings.push_concurrency,
        ssl_context=ssl_context(http_settings(settings)),
    )


def days(count: int | None) -> timedelta | None:
    """A retention setting as a span; None keeps for ever."""
    return None if count is None else timedelta(days=count)


def _batches(connections: Sequence[ConnectionId], size: int) -> Iterator[list[int]]:
    for at in range(0, len(connections), size):
        yield [*connections[at : at + size]]


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


def empty_database(settings: Settings) -> bool:
    """Delete what the embedded database holds, for good. False, and nothing is done, while a process uses it."""
    _need_embedded(settings)
    return embedded.drop(settings.data_dir)


def leave_database(settings: Settings) -> None:
    """Let go of the embedded server before this process ends; where nobody else uses it, wait until it is down."""
    _need_embedded(settings)
    embedded.leave(settings.data_dir)


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
