"""`tallyd demo`: the whole road in a minute, with real parts, and a verdict that the simulator's truth decides.

Own processes: an embedded PostgreSQL in a throw-away folder, the provider simulator, and two replicas of the daemon.
What happens to them is what happens in life: usage grows, the provider corrects a closed hour, answers 429 for a while,
and a replica dies by kill -9 in the middle of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from daemon.app import App, NewConnection, Question, open_app
from daemon.cli.printing import print_json
from daemon.config import load
from daemon.db import embedded
from daemon.domain.connection import Secret
from daemon.domain.errors import PermanentError, TransientError
from daemon.domain.window import Width, parse_rfc3339, rfc3339

TICK_S = 2
STEP_S = 40.0
LIMIT_S = 115.0
HISTORY = timedelta(days=2)
PROBED = ("completions", "messages")
CELL = ("tenant", "provider", "source")
METRICS = ("input_tokens", "cache_read_tokens", "cache_write_tokens", "output_tokens", "requests")


class Account(NamedTuple):
    """A connection of the demo, and the organisation of the simulator behind it."""

    tenant: str
    provider: str
    key: str

    @property
    def name(self) -> str:
        return f"{self.provider}-main"

    @property
    def at(self) -> dict[str, str]:
        """How the simulator's control interface addresses it."""
        return {"provider": self.provider, "key": self.key}


ACCOUNTS = (
    Account("acme", "openai", "sk-admin-acme"),
    Account("acme", "anthropic", "sk-ant-admin01-acme"),
    Account("globex", "openai", "sk-admin-globex"),
    Account("initech", "anthropic", "sk-ant-admin01-initech"),
)

Cells = dict[tuple[str, str, str, datetime], tuple[object, ...]]
"""(tenant, provider, source, bucket start) to the bucket's sums; for a cost source its amount alone."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the ledger and the provider say of the same buckets; `differing` shows the first few that disagree."""

    ledger_equals_provider: bool
    buckets: int
    differing: tuple[str, ...]
    laws_broken: tuple[str, ...]
    provider_total: Decimal
    ledger_total: Decimal
    spend: tuple[dict[str, object], ...]
    replicas_killed: int
    requests_refused: int


class Simulator:
    """The simulator's control interface."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def ask(self, method: str, path: str, body: object = None) -> Any:
        def send() -> Any:
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)  # noqa: S310 - the URL is our own process's
            with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
                return json.load(answer)

        return await anyio.to_thread.run_sync(send)

    async def truth(self, account: Account, since: datetime) -> Cells:
        """What the provider would report now, summed per bucket."""
        path = f"/_sim/truth?provider={account.provider}&key={account.key}&since={rfc3339(since)}&group_by="
        sources = (await self.ask("GET", path))["sources"]
        cells: Cells = {}
        for source, rows in sources.items():
            for row in rows:
                is_cost = row["amount"] is not None
                sums = (Decimal(row["amount"]),) if is_cost else tuple(row[name] for name in METRICS)
                if any(value is not None for value in sums):
                    start = parse_rfc3339(row["bucket_start"])
                    cells[account.tenant, account.provider, source, start] = sums
        return cells


def run_demo(*, keep: bool, as_json: bool) -> int:
    """Run the demo and print its verdict. Returns 0 when the ledger equals the provider, else 1."""
    console = Console(stderr=as_json)
    folder = Path(tempfile.mkdtemp(prefix="tallyd-demo-"))
    folder.chmod(0o755)  # as root the database server runs as another user
    try:
        verdict = anyio.run(_play, folder, console, keep)
    except TimeoutError as error:
        raise TransientError(f"the demo did not end within {LIMIT_S:.0f} s on this machine") from error
    finally:
        embedded.stop(folder)
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print_json(verdict)
    return 0 if verdict.ledger_equals_provider else 1


async def _play(folder: Path, console: Console, keep: bool) -> Verdict:
    settings = load(env={"TALLYD_DATA_DIR": str(folder), "TALLYD_TICK_SECONDS": str(TICK_S)})
    async with AsyncExitStack() as stack:
        progress = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console)
        with anyio.fail_after(LIMIT_S), progress:
            stage = _stages(progress)
            with stage("an embedded PostgreSQL starts"):
                app = await stack.enter_async_context(open_app(settings))
            with stage("a simulator of OpenAI and Anthropic starts"):
                simulator = Simulator(await stack.enter_async_context(_simulator(folder)))
            verdict = await _act(app, simulator, folder, stage, stack)
        _show(console, verdict)
        if keep:
            await _stay(console, simulator, folder)
    return verdict


async def _act(app: App, simulator: Simulator, folder: Path, stage: Stage, stack: AsyncExitStack) -> Verdict:
    since = Width.DAY.floor(datetime.now(UTC) - HISTORY)
    recent = Width.HOUR.floor(datetime.now(UTC)) - timedelta(hours=2)

    async def is_booked() -> bool:
        """Whether the sources that each tick probes hold what the provider says, for the hours that a tick re-reads."""
        held, truth = await _both(app, simulator, recent)
        probed = {key for key in truth.keys() | held.keys() if key[2] in PROBED}
        return all(held.get(key) == truth.get(key) for key in probed)

    with stage("three tenants connect four accounts"):
        for account in ACCOUNTS:
            if account.tenant not in {tenant.name for tenant in await app.tenants.list()}:
                await app.tenants.add(account.tenant)
            base = simulator.url + ("/v1" if account.provider == "openai" else "")
            await app.connections.add(
                NewConnection(account.tenant, account.name, account.provider, base, Secret(account.key), since)
            )
    replicas = _Replicas(folder)
    stack.push_async_callback(replicas.stop)
    with stage("two replicas of the daemon read the history"):
        replicas.start()
        replicas.start()
        await _until(is_booked)
    with stage("usage grows, tick after tick"):
        for _ in range(3):
            for account in ACCOUNTS:
                await simulator.ask("POST", "/_sim/grow", {**account.at, "requests": 25})
            await _until(is_booked)
    with stage("the providers answer 429, and a replica dies by kill -9"):
        storm = {"rate": 0.6, "kinds": ["429"], "retry_after_s": 1, "seed": 1}
        await simulator.ask("POST", "/_sim/faults", storm)
        for account in ACCOUNTS:
            await simulator.ask("POST", "/_sim/grow", {**account.at, "requests": 25})
        await _until(lambda: _has_refused(simulator, 6))
        replicas.kill()
        replicas.start()
        refused = (await simulator.ask("GET", "/_sim/stats"))["faults"].get("429", 0)
        await simulator.ask("DELETE", "/_sim/faults")
    with stage("the providers correct a closed hour, down and up"):
        for account in ACCOUNTS:
            for action in ("correction_down", "late_arrival"):
                await simulator.ask("POST", "/_sim/scenario", {**account.at, "action": action})
    with stage("everything is read once more, and compared bucket by bucket"):
        ids = [connection.id for connection in await app.connections.list()]

        async def is_read() -> bool:
            summary = await app.poll(ids, full=True)
            return not summary.retried and not summary.dead

        await _until(is_read)
        return await _judge(app, simulator, since, replicas.killed, refused)


async def _both(app: App, simulator: Simulator, since: datetime) -> tuple[Cells, Cells]:
    """The buckets since then: as the ledger holds them, and as the provider would report them."""
    truth: Cells = {}
    for account in ACCOUNTS:
        truth |= await simulator.truth(account, since)
    costs = app.cost_sources()
    held: Cells = {}
    usage = await app.insights.usage(Question(since, None, (*CELL, "hour"), costs))
    for line in usage.lines:
        values = dict(line.metrics)
        sums = tuple(values[name] for name in METRICS)
        if any(value is not None for value in sums):
            held[_cell(line.group)] = sums
    spend = await app.insights.spend(Question(since, None, (*CELL, "day"), costs))
    held |= {_cell(line.group): (line.amount,) for line in spend.lines if line.basis == "provider"}
    return held, truth


def _cell(group: tuple[tuple[str, str | None], ...]) -> tuple[str, str, str, datetime]:
    tenant, provider, source, start = (value or "" for _, value in group)
    instant = start if "T" in start else f"{start}T00:00:00Z"
    return tenant, provider, source, parse_rfc3339(instant)


async def _judge(app: App, simulator: Simulator, since: datetime, killed: int, refused: int) -> Verdict:
    held, truth = await _both(app, simulator, since)
    zero = {key for key, sums in held.items() if key not in truth and not any(sums)}  # booked down to nothing
    keys = (held.keys() | truth.keys()) - zero
    differing = sorted(key for key in keys if held.get(key) != truth.get(key))
    spend = await app.insights.spend(Question(since, None, ("tenant", "provider", "model"), app.cost_sources()))
    checks = await app.insights.laws()
    return Verdict(
        ledger_equals_provider=not differing and all(check.is_ok for check in checks),
        buckets=len(keys),
        differing=tuple(
            f"{'/'.join(key[:3])} {rfc3339(key[3])}: ledger {held.get(key)}, provider {truth.get(key)}"
            for key in differing[:5]
        ),
        laws_broken=tuple(f"{check.name}: {check.detail}" for check in checks if not check.is_ok),
        provider_total=sum((sums[0] for sums in truth.values() if isinstance(sums[0], Decimal)), Decimal(0)),
        ledger_total=sum((line.amount for line in spend.lines if line.basis == "provider"), Decimal(0)),
        spend=tuple(
            {**dict(line.group), "amount": line.amount, "currency": line.currency, "basis": line.basis}
            for line in spend.lines
        ),
        replicas_killed=killed,
        requests_refused=refused,
    )


def _show(console: Console, verdict: Verdict) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, side in (
        ("tenant", "left"),
        ("provider", "left"),
        ("model", "left"),
        ("estimated", "right"),
        ("billed", "right"),
    ):
        table.add_column(name, justify=side)  # type: ignore[arg-type]  # a literal, seen as str
    lines: dict[tuple[object, object, object], dict[object, Decimal]] = {}
    for line in verdict.spend:
        group = (line["tenant"], line["provider"], line["model"])
        lines.setdefault(group, {})[line["basis"]] = line["amount"]  # type: ignore[assignment]  # Decimal by construction
    for group, amounts in sorted(lines.items(), key=lambda item: tuple(str(part or "") for part in item[0])):
        cells = [f"{amounts[basis]:,.4f} USD" if basis in amounts else "" for basis in ("local", "provider")]
        table.add_row(str(group[0]), str(group[1]), str(group[2] or "(no model named)"), *cells)
    console.print()
    console.print(table)
    console.print()
    for problem in (*verdict.differing, *verdict.laws_broken):
        console.print(f"[red]{problem}")
    console.print(
        f"{verdict.buckets} buckets compared; {verdict.replicas_killed} replica killed, "
        f"{verdict.requests_refused} requests answered 429; "
        f"provider {verdict.provider_total:,.6f} USD, ledger {verdict.ledger_total:,.6f} USD"
    )
    answer = "[bold green]yes" if verdict.ledger_equals_provider else "[bold red]no"
    console.print(f"ledger equals provider: {answer}")


async def _stay(console: Console, simulator: Simulator, folder: Path) -> None:
    console.print(f"\nStill running; look around with\n  export TALLYD_DATA_DIR={folder}\n  tallyd status")
    console.print(f"The simulator's truth: {simulator.url}/_sim/truth?totals=1\nCtrl-C ends it and removes everything.")
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            return


class _Replicas:
    """The daemon's processes. Their logs go to a file in the demo's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[subprocess.Popen[bytes]] = []
        self.killed = 0

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TALLYD_")}
        environment |= {"TALLYD_DATA_DIR": str(self._folder), "TALLYD_TICK_SECONDS": str(TICK_S)}
        with (self._folder / "daemon.log").open("ab") as log:
            command = [sys.executable, "-m", "daemon", "run"]
            self._running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))  # noqa: S603

    def kill(self) -> None:
        """The oldest one, without a word of warning."""
        victim = self._running.pop(0)
        victim.kill()
        victim.wait()
        self.killed += 1

    async def stop(self) -> None:
        for process in self._running:
            process.terminate()
        for process in self._running:
            await anyio.to_thread.run_sync(process.wait)


@asynccontextmanager
async def _simulator(folder: Path) -> AsyncIterator[str]:
    """The simulator's process; its URL."""
    with (folder / "simulator.log").open("ab") as log:
        process = subprocess.Popen(  # noqa: ASYNC220 - starting it takes no time, and the command is ours
            [sys.executable, "-m", "daemon.simulator", "--port", "0"], stdout=subprocess.PIPE, stderr=log
        )
    try:
        assert process.stdout is not None
        line = await anyio.to_thread.run_sync(process.stdout.readline)
        if not line:
            raise PermanentError(f"the simulator did not start; see {folder / 'simulator.log'}")
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(process.wait)


async def _has_refused(simulator: Simulator, count: int) -> bool:
    return bool((await simulator.ask("GET", "/_sim/stats"))["faults"].get("429", 0) >= count)


async def _until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait for other processes to bring something about."""
    with anyio.move_on_after(STEP_S):
        while not await holds():  # noqa: ASYNC110 - no event reaches us from there
            await anyio.sleep(0.2)
        return
    raise TransientError(f"the demo's daemon did not get this step done within {STEP_S:.0f} s on this machine")


Stage = Callable[[str], AbstractContextManager[None]]


def _stages(progress: Progress) -> Stage:
    @contextmanager
    def stage(text: str) -> Iterator[None]:
        task = progress.add_task(text, total=1)
        yield
        progress.update(task, completed=1, description=f"[green]✓[/] {text}")

    return stage
