"""A whole tallyd against the provider simulator, and the comparison that every test ends with: books equal truth."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from time import monotonic
from typing import Any

import anyio
import httpx
import msgspec

from daemon.app import App, NewConnection, open_app
from daemon.config import load
from daemon.db.pool import Database
from daemon.domain.connection import ConnectionId, Secret
from daemon.domain.job import Summary
from daemon.domain.window import parse_rfc3339, rfc3339
from daemon.simulator.server import Simulator, serve
from daemon.simulator.world import Clock, World
from daemon.worker.caller import RetrySettings
from daemon.worker.governor import Governor, GovernorSettings
from daemon.worker.poll import PollSettings
from tests.http_kit import local_client
from tests.ledger_kit import assert_laws

SECRET_KEY = base64.b64encode(b"k" * 32).decode()
METRICS = (
    "input_tokens", "cache_read_tokens", "cache_write_tokens", "output_tokens", "requests", "quantity", "amount",
)  # fmt: skip
COST_SOURCES = ("costs", "cost")
KEYS = {"openai": "sk-admin-", "anthropic": "sk-ant-admin01-"}
WAIT_S = 60.0

Key = tuple[str, datetime, tuple[tuple[str, str | None], ...]]
"""Source, bucket, and dimensions sorted by name."""
Numbers = tuple[Decimal, ...]


def midnight(days_ago: int = 0) -> datetime:
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return today - timedelta(days=days_ago)


def credential(provider: str, name: str) -> str:
    return KEYS[provider] + name


async def until(is_so: Callable[[], Awaitable[object]], what: str, *, wait_s: float = WAIT_S) -> None:
    """Wait for a condition that another process makes true."""
    with anyio.move_on_after(wait_s):
        while not await is_so():  # noqa: ASYNC110 - it happens in another process
            await anyio.sleep(0.05)
        return
    raise AssertionError(f"waited {wait_s:g} s in vain: {what}")


class Sim:
    """The control interface of a simulator on a socket."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.url = str(client.base_url).rstrip("/")

    def base_url(self, provider: str) -> str:
        return f"{self.url}/v1" if provider == "openai" else self.url

    async def control(self, method: str, path: str, body: object = None, **params: Any) -> Any:
        content = None if body is None else msgspec.json.encode(body)
        answer = await self._client.request(method, f"/_sim/{path}", content=content, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def attempt(self, path: str, body: object) -> bool:
        """Post to the control interface; False where it finds nothing that fits."""
        answer = await self._client.post(f"/_sim/{path}", content=msgspec.json.encode(body))
        assert answer.status_code in (200, 400), answer.text
        return answer.status_code == 200

    async def set_up(self, provider: str, name: str, **profile: Any) -> None:
        key = credential(provider, name)
        await self.control("POST", "orgs", {"provider": provider, "key": key, "profile": profile})

    async def play(self, provider: str, name: str, action: str, **more: Any) -> Any:
        key = credential(provider, name)
        return await self.control("POST", "scenario", {"provider": provider, "key": key, "action": action, **more})

    async def grow(self, provider: str, name: str, requests: int) -> None:
        await self.control(
            "POST", "grow", {"provider": provider, "key": credential(provider, name), "requests": requests}
        )

    async def fault(self, kind: str, provider: str, name: str, **more: Any) -> None:
        await self.control(
            "POST", "faults/next", {"kind": kind, "provider": provider, "key": credential(provider, name), **more}
        )

    async def answer(self, provider: str, name: str, path: str, params: Sequence[tuple[str, str]]) -> httpx.Response:
        """What the provider itself says, as any client would ask."""
        key = credential(provider, name)
        headers = {"authorization": f"Bearer {key}"}
        if provider == "anthropic":
            headers = {"x-api-key": key, "anthropic-version": "2023-06-01"}
        return await self._client.get(path, params=list(params), headers=headers)


@asynccontextmanager
async def simulator_here(*, frozen: bool = False) -> AsyncIterator[Sim]:
    """A simulator on a socket of this process."""
    server, connections = await serve(Simulator(World(1, Clock(None, frozen=frozen))), "127.0.0.1", 0)
    try:
        async with open_sim(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as sim:
            yield sim
    finally:
        server.close()
        for connection in list(connections):
            connection.transport.abort()
        await server.wait_closed()


@asynccontextmanager
async def open_sim(url: str) -> AsyncIterator[Sim]:
    async with local_client(base_url=url, timeout=20) as client:
        yield Sim(client)


# ── Books and truth ─────────────────────────────────────────────────────────────────────────────

_STREAMS = """
select s.id, s.source, c.provider, c.name, c.since, s.floor_at, s.covered_from,
  (select json_agg(json_build_object('start', e.start_at, 'group_by', e.group_by, 'width', e.width) order by e.start_at)
   from grain_epoch e where e.stream_id = s.id)::text as epochs
from stream s join connection c on c.id = s.connection_id
where c.id = any($1::bigint[]) and s.source <> 'names' order by s.id
"""

_BOOKS = f"""
select s.id as stream_id, s.source, coalesce(r.bucket_start, l.bucket_start) as bucket_start, r.dims, r.is_tombstone,
  r.revision, l.entries, l.newest,
  {", ".join(f"coalesce(r.{metric}, 0)::numeric as r_{metric}" for metric in METRICS)},
  {", ".join(f"coalesce(l.{metric}, 0)::numeric as l_{metric}" for metric in METRICS)}
from usage_row r full join (
  select stream_id, bucket_start, row_key, count(*) as entries, max(revision) as newest,
    {", ".join(f"sum({metric}) as {metric}" for metric in METRICS)}
  from ledger group by 1, 2, 3
) l using (stream_id, bucket_start, row_key)
join stream s on s.id = coalesce(r.stream_id, l.stream_id)
where s.connection_id = any($1::bigint[])
"""


class _EpochRow(msgspec.Struct):
    start: datetime
    group_by: list[str]
    width: str


async def assert_books_equal_truth(
    db: Database, sim: Sim, connections: Collection[ConnectionId], *, but: Collection[str] = (), by_dims: bool = True
) -> Numbers:
    """Ledger, current rows and truth agree for every source, bucket and dimensions. Returns the sums.

    Args:
        but: sources left out.
        by_dims: False compares the sums of each bucket (the generations of an API name the same thing differently).
    """
    wanted = list(connections)
    books: dict[int, dict[Key, Numbers]] = {}
    wrong: list[str] = []
    for row in await db.fetch(_BOOKS, wanted):
        where = f"stream {row['stream_id']} {row['source']} {row['bucket_start']} {row['dims']}"
        if row["dims"] is None or not row["entries"] == row["newest"] == row["revision"]:
            wrong.append(f"{where}: {row['entries']} entries, newest {row['newest']}, row at {row['revision']}")
            continue
        current = tuple(row[f"r_{metric}"] for metric in METRICS)
        if current != tuple(row[f"l_{metric}"] for metric in METRICS):
            wrong.append(f"{where}: the ledger differs from the row {current}")
        if row["is_tombstone"]:
            if any(current):
                wrong.append(f"{where}: a tombstone of {current}")
            continue
        dims = msgspec.json.decode(row["dims"], type=dict[str, str | None])
        dims.pop("currency", None)
        key = (row["source"], row["bucket_start"], tuple(sorted(dims.items())) if by_dims else ())
        of_stream = books.setdefault(row["stream_id"], {})
        of_stream[key] = _plus(of_stream.get(key), _comparable(row["source"], current))
    sums: Numbers = (Decimal(0),) * len(METRICS)
    streams = await db.fetch(_STREAMS, wanted)
    assert streams, "nothing was ever polled"
    for stream in streams:
        if stream["source"] in but:
            continue
        truth = await _truth(sim, dict(stream), by_dims=by_dims)
        booked = books.get(stream["id"], {})
        wrong += [
            f"{stream['name']} {key}: booked {_shown(booked.get(key))}, true {_shown(truth.get(key))}"
            for key in booked.keys() | truth.keys()
            if booked.get(key) != truth.get(key)
        ]
        for numbers in truth.values():
            sums = _plus(sums, numbers)
    assert not wrong, f"{len(wrong)} differences: " + "\n".join(wrong[:12])
    return sums


async def _truth(sim: Sim, stream: Mapping[str, Any], *, by_dims: bool) -> dict[Key, Numbers]:
    found: dict[Key, Numbers] = {}
    epochs = msgspec.json.decode(stream["epochs"], type=list[_EpochRow])
    width = timedelta(days=1) if epochs[0].width == "1d" else timedelta(hours=1)
    since = stream["since"] if stream["floor_at"] is None else max(stream["since"], stream["covered_from"])
    first = midnight_of(since) if width.days else since.replace(minute=0, second=0, microsecond=0)
    for epoch, following in zip(epochs, [*epochs[1:], None], strict=True):
        start = max(epoch.start, first)
        answer = await sim.control(
            "GET", "truth", provider=stream["provider"], key=credential(stream["provider"], stream["name"]),
            source=stream["source"], since=rfc3339(start), group_by=epoch.group_by if by_dims else "",
            **({"until": rfc3339(following.start)} if following else {}),
        )  # fmt: skip
        for row in answer["sources"][stream["source"]]:
            numbers = tuple(Decimal(row[metric] or 0) for metric in METRICS)
            key = (stream["source"], parse_rfc3339(row["bucket_start"]), tuple(sorted(row["dims"].items())))
            found[key] = _plus(found.get(key), _comparable(stream["source"], numbers))
    return found


def midnight_of(instant: datetime) -> datetime:
    return instant.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _comparable(source: str, numbers: Numbers) -> Numbers:
    """Money is the cost reports' alone (of usage it is our estimate), and there the quantity has no one unit. Only one
    generation of Anthropic's API counts requests, and the truth has none.
    """
    *counts, requests, quantity, amount = numbers
    none = Decimal(0)
    if source in COST_SOURCES:
        return (*counts, requests, none, amount)
    return (*counts, none if source == "messages" else requests, quantity, none)


def _plus(a: Numbers | None, b: Numbers) -> Numbers:
    return b if a is None else tuple(x + y for x, y in zip(a, b, strict=True))


def _shown(numbers: Numbers | None) -> str:
    return "nothing" if numbers is None else ", ".join(f"{n} {x}" for n, x in zip(METRICS, numbers, strict=True) if x)


# ── A whole tallyd in this process ──────────────────────────────────────────────────────────────


@dataclass
class Books:
    """An app in this process beside a simulator; `ids` by connection name."""

    app: App
    sim: Sim
    ids: dict[str, ConnectionId]
    providers: dict[str, str]

    @property
    def db(self) -> Database:
        return self.app.db

    async def add(
        self,
        name: str,
        provider: str = "openai",
        *,
        since: datetime | None = None,
        settings: Mapping[str, Any] | None = None,
        **profile: Any,
    ) -> ConnectionId:
        """A connection whose organisation only moves when the test says so."""
        await self.sim.set_up(provider, name, **{"live": False, "history_days": 1, **profile})
        new = NewConnection(
            "acme", name, provider, self.sim.base_url(provider), Secret(credential(provider, name)),
            since or midnight(days_ago=1), settings,
        )  # fmt: skip
        self.ids[name] = (await self.app.connections.add(new)).id
        self.providers[name] = provider
        return self.ids[name]

    async def poll(self, *names: str, full: bool = False) -> Summary:
        return await self.app.poll([self.ids[name] for name in names or self.ids], full=full)

    async def tick(self) -> Summary:
        """One more tick, in which every active connection is due that no batch has open."""
        await self.db.execute("delete from tick")
        await self.db.execute("update connection set next_due_at = 'epoch'")
        report = await self.app.tick(None, wait=True)
        assert report.created
        assert report.summary is not None
        return report.summary

    async def run_queue(self) -> None:
        """Let a replica work off whatever waits, as if its time had come."""
        loop = self.app.worker_loop()

        async def is_idle() -> bool:
            await self.db.execute("update due set run_at = now() where run_at > now()")
            return not await self.db.fetchval(
                "select (select count(*) from ready) + (select count(*) from due) + (select count(*) from lease)"
            )

        async def stop_when_idle() -> None:
            await until(is_idle, "the queue is empty", wait_s=15)
            loop.stop()

        async with anyio.create_task_group() as group:
            group.start_soon(loop.run)
            group.start_soon(stop_when_idle)

    async def count(self, table: str) -> int:
        return int(await self.db.fetchval(f"select count(*) from {table}"))

    async def play(self, name: str, action: str, **more: Any) -> Any:
        return await self.sim.play(self.providers[name], name, action, **more)

    async def fault(self, name: str, kind: str, **more: Any) -> None:
        await self.sim.fault(kind, self.providers[name], name, **more)

    async def assert_equal(self, *names: str, but: Collection[str] = (), by_dims: bool = True) -> Numbers:
        """Books equal truth for these connections (default all), and every law holds."""
        await assert_laws(self.db)
        ids = [self.ids[name] for name in names or self.ids]
        return await assert_books_equal_truth(self.db, self.sim, ids, but=but, by_dims=by_dims)

    async def stream(self, name: str, source: str) -> Mapping[str, Any]:
        row = await self.db.fetchrow(
            "select * from stream where connection_id = $1 and source = $2", self.ids[name], source
        )
        assert row is not None
        return dict(row)

    async def state(self, name: str) -> str:
        return str(await self.db.fetchval("select state from connection where id = $1", self.ids[name]))

    async def forget_pauses(self) -> None:
        """As if the pauses that providers asked for had passed."""
        await self.db.execute("delete from pause")
        self.app.poll_deps.governor.__init__(  # type: ignore[misc]
            self.app.poll_deps.governor._settings, self.app.poll_deps.governor._now
        )

    async def age(self, by: timedelta, *names: str) -> None:
        """As if the last reads had happened `by` earlier; what is booked stays where it is."""
        await self.db.execute(
            """update stream set read_at = read_at - $1::interval, hourly_at = hourly_at - $1::interval,
                 daily_at = daily_at - $1::interval, covered_to = covered_to - $1::interval
               where connection_id = any($2::bigint[])""",
            by,
            [self.ids[name] for name in names or self.ids],
        )
        await self.db.execute("update bucket set pending_since = pending_since - $1::interval", by)


@asynccontextmanager
async def open_books(database_url: str, sim: Sim, **settings: object) -> AsyncIterator[Books]:
    """The app of the commands, with the waits of tier 1 and the pace after a 429 cut short."""
    flags = {"database_url": database_url, "secret_key": SECRET_KEY, "http_read_timeout_s": 0.4, **settings}
    async with open_app(load(flags, {})) as app:
        retry = RetrySettings(tries=3, budget_s=20.0, wait_initial_s=0.01, wait_max_s=0.02)
        limits = GovernorSettings(
            app.settings.poll_concurrency, app.settings.poll_concurrency_per_host, interval_s_max=0.06
        )
        governor = Governor(limits, monotonic)
        await app.tenants.add("acme")
        yield Books(with_deps(app, settings=PollSettings(retry=retry), governor=governor), sim, {}, {})


def with_deps(app: App, **changes: Any) -> App:
    """The same app, whose poll jobs work with other parts."""
    changed = replace(app)
    changed.http = app.http
    changed.poll_deps = replace(app.poll_deps, **changes)
    return changed


__all__ = [
    "COST_SOURCES",
    "SECRET_KEY",
    "Books",
    "Numbers",
    "Sim",
    "assert_books_equal_truth",
    "credential",
    "midnight",
    "open_books",
    "open_sim",
    "simulator_here",
    "until",
    "with_deps",
]
