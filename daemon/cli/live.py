"""`tallyd top`, and what every view that follows the database on a terminal needs."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from daemon.cli.arguments import Json
from daemon.cli.printing import cell, print_json, visible
from daemon.cli.session import with_app
from daemon.domain.errors import TransientError, UsageError

if TYPE_CHECKING:
    import anyio
    from rich.console import Console, RenderableType
    from rich.table import Table

    from daemon.app import Activity, App, QueueStats

READ_S = 10.0
"""What takes longer is shown as an absence, and asked for again."""
SILENT_S = 15.0
"""A replica that has not beaten for that long is taken for lost by the others; `status` counts it for 30 s."""
ALIVE_S = 30.0
WIDE = 120
STATES = ("available", "scheduled", "retryable", "running", "discarded")
HELD = "pending"
"""Shown where there is any: what a limit holds."""
WINDOWS = (1, 5, 15)
_NUMBER = re.compile(r"-|[0-9][0-9,.]*\+?")
USUAL_OUTCOMES = ("done", "retry", "dead", "worker lost")
BAD_OUTCOMES = {"retry": "yellow", "dead": "red", "worker lost": "red"}

Found = TypeVar("Found")
Every = Annotated[float, typer.Option("--every", min=0.2, max=3600, help="Seconds between two looks.")]
Draw = Callable[[Found, int, int | None], "RenderableType"]
"""Draws what was found for so many columns and lines; None lines: as many as there are."""


def register(app: typer.Typer) -> None:
    app.command()(top)


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one frame as plain tables, and end.")] = False,
    every: Every = 2.0,
    json: Json = False,
) -> None:
    """What happens right now, live: replicas, running jobs, queue, throughput, last failures."""

    async def read(a: App) -> tuple[Activity, QueueStats]:
        return await a.activity(), await a.queue.stats()

    if not once and not json:
        check_terminal("top", "pass --once for one frame, or --json")
        watch(read, draw_top, title="tallyd top", every_s=every)
        return
    activity, queue = with_app(read)
    if json:
        print_json(
            {
                "now": activity.now,
                "replicas": activity.replicas,
                "running": activity.running,
                "running_total": activity.running_total,
                "queue": queue,
                "kinds": activity.kinds,
                "minutes": activity.minutes,
                "settled_for_s": round(activity.settled_for_s, 3),
                "failures": activity.failures,
            }
        )
    else:
        show(draw_top((activity, queue), 0, None))


# ── Following ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Away:
    """The database has not answered for so long, and why."""

    seconds: float
    problem: str


def check_terminal(field: str, fix: str) -> None:
    """Raises UsageError naming `fix` where nothing can be redrawn."""
    if not sys.stdout.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        raise UsageError(field, "needs a terminal on stdout, one that can be redrawn", fix)


def watch(
    read: Callable[[App], Awaitable[Found]], draw: Draw[Found], *, title: str, every_s: float, is_kept: bool = False
) -> None:
    """Show what `read` finds on the whole screen, again and again, until Ctrl-C, SIGTERM or a `q`: a normal end.

    Args:
        is_kept: leave the last frame on the terminal.
    """

    async def follow_app(a: App) -> Found | None:
        import anyio
        from rich.console import Console
        from rich.live import Live

        console = Console()
        last: Found | None = None

        def show_frame(found: Found | None, away: Away | None) -> None:
            nonlocal last
            last = found
            live.update(framed(draw, found, away, console.width, console.height, title=title), refresh=True)

        with _keys() as stdin, Live(console=console, screen=True, auto_refresh=False) as live:
            async with anyio.create_task_group() as group:
                group.start_soon(_stop_by_signal, group.cancel_scope)
                if stdin is not None:
                    group.start_soon(_stop_by_key, group.cancel_scope, stdin)
                await follow(lambda: read(a), show_frame, lambda: anyio.sleep(every_s))
        return last

    found = with_app(follow_app)
    if is_kept and found is not None:
        show(draw(found, terminal_width(), None))


async def follow(
    read: Callable[[], Awaitable[Found]],
    show_frame: Callable[[Found | None, Away | None], None],
    pause: Callable[[], Awaitable[None]],
    clock: Callable[[], float] = monotonic,
) -> None:
    """Read, show and pause, until cancelled. While the database is away, what was found last is shown with the reason."""
    import anyio

    last: Found | None = None
    good_at = clock()
    while True:
        away = None
        try:
            with anyio.fail_after(READ_S):
                last = await read()
            good_at = clock()
        except (TransientError, TimeoutError) as error:
            away = Away(clock() - good_at, str(error) or "database: no answer in time")
        show_frame(last, away)
        await pause()


def framed(
    draw: Draw[Found], found: Found | None, away: Away | None, width: int, height: int, *, title: str
) -> RenderableType:
    """One frame, with a line above that says for how long the database has been away."""
    from rich.console import Group
    from rich.text import Text

    if away is None and found is not None:
        return draw(found, width, height)
    problem = "no answer yet" if away is None else f"no answer for {span(away.seconds)}: {away.problem}"
    line = Text(
        visible(f" {title}: {problem}; trying on "), style="bold white on red", no_wrap=True, overflow="ellipsis"
    )
    return line if found is None else Group(line, draw(found, width, height - 1))


async def _stop_by_signal(scope: anyio.CancelScope) -> None:
    import anyio

    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()
            return


async def _stop_by_key(scope: anyio.CancelScope, stdin: int) -> None:
    import anyio

    while True:
        await anyio.wait_readable(stdin)
        pressed = os.read(stdin, 64)
        if b"q" in pressed.lower():
            scope.cancel()
        if not pressed or b"q" in pressed.lower():
            return


@contextmanager
def _keys() -> Iterator[int | None]:
    """Keys as they are pressed, and not echoed into the frame. None where stdin is no terminal."""
    import termios
    import tty

    if not sys.stdin.isatty():
        yield None
        return
    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)
    tty.setcbreak(stdin)
    try:
        yield stdin
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


# ── Drawing ─────────────────────────────────────────────────────────────────────────────────────


def show(what: RenderableType) -> None:
    """Print to stdout; a pipe has no width, so nothing is folded there."""
    plain_console().print(what)


def plain_console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=10_000)


def terminal_width() -> int:
    return plain_console().width


def span(seconds: float) -> str:
    """A length of time for a person: `4.2 s`, `3 min`, `2 h 05 min`, `3 d 4 h`."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def clock_time(instant: datetime | None, *, with_day: bool = False) -> str:
    return "-" if instant is None else instant.astimezone(UTC).strftime("%m-%d %H:%M:%S" if with_day else "%H:%M:%S")


def section(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    empty: str,
    lines: int | None = None,
    left_out: int = 0,
    is_live: bool = False,
    spacing: int = 2,
) -> Table:
    """A table whose header names its section.

    Args:
        rows: cells as `print_table` takes them, or a Text that is safe already.
        lines: cut it to so many, the last of which says how many are left out.
        left_out: rows that the caller has left out already.
        is_live: one line a row, over the whole width.
    """
    from rich.table import Table
    from rich.text import Text

    kept = list(rows)
    if lines is not None and (len(kept) > lines or (left_out and len(kept) == lines)):
        kept = kept[: max(0, lines - 1)]
    left_out += len(rows) - len(kept)
    head = "reverse" if is_live else "bold"
    table = Table(box=None, pad_edge=False, header_style=head, expand=is_live, padding=(0, spacing, 0, 0))
    for i, column in enumerate(columns):
        is_number = bool(rows) and all(_is_number(row[i]) for row in rows)
        takes_rest = is_live and i == len(columns) - 1 and not is_number
        table.add_column(
            Text(column),
            justify="right" if is_number else "left",
            no_wrap=is_live,
            overflow="ellipsis" if is_live else "fold",
            ratio=1 if takes_rest else None,
        )
    if is_live and not takes_rest:
        table.add_column(ratio=1)
    for row in kept:
        table.add_row(*(value if isinstance(value, Text) else Text(cell(value)) for value in row))
    if left_out:
        table.add_row(*[""] * (len(columns) - 1), Text(f"... and {left_out:,} more", style="dim"))
    elif not rows:
        table.add_row(Text(empty, style="dim"))
    return table


def _is_number(value: object) -> bool:
    return isinstance(value, int | None) or (isinstance(value, str) and _NUMBER.fullmatch(value) is not None)


def share(lines: int, wanted: Sequence[int]) -> list[int]:
    """Divide lines among sections: one each, then one after the other in turn until all have what they want."""
    given = [min(1, want) for want in wanted]
    left = lines - sum(given)
    while left > 0 and given != list(wanted):
        for i, want in enumerate(wanted):
            if left > 0 and given[i] < want:
                given[i] += 1
                left -= 1
    return given


def draw_top(found: tuple[Activity, QueueStats], width: int, height: int | None) -> RenderableType:
    """The frame of `top`, for so many columns and lines."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    activity, queue = found
    is_live = height is not None
    is_wide = is_live and width >= WIDE
    parts = _top_parts(activity, with_day=not is_live)
    wanted = [max(1, len(rows) + (1 if left_out else 0)) for _, rows, _, left_out in parts]
    given: Sequence[int | None] = [None] * len(parts)
    if height is not None:
        room = height - 1 - len(parts)
        if is_wide:  # queue and throughput stand side by side, as long as the longer one
            room += 1 + min(wanted[2], wanted[3])
        given = share(max(len(parts), room), wanted)
    tables = [
        section(columns, rows, empty=empty, lines=lines, left_out=left_out, is_live=is_live)
        for (columns, rows, empty, left_out), lines in zip(parts, given, strict=True)
    ]
    if is_wide:
        pair = Table.grid(expand=True, padding=(0, 2, 0, 0))
        pair.add_column(ratio=1)
        pair.add_column(ratio=1)
        pair.add_row(tables[2], tables[3])
        ordered: list[RenderableType] = [tables[0], tables[1], pair, tables[4]]
    else:
        ordered = list(tables)
    waits = "" if queue.oldest_available_s is None else f" for {span(queue.oldest_available_s)}"
    alive = sum(replica.beat_s < ALIVE_S for replica in activity.replicas)
    now = clock_time(activity.now) if is_live else cell(activity.now)
    head = Text.assemble(
        ("tallyd top", "bold"),
        f"  {now} UTC  {counted(alive, 'replica')}, {queue.running:,} running, ",
        (f"{queue.discarded:,} dead", "red" if queue.discarded else ""),
        f", {queue.available:,} waiting{waits}",
        ("  q ends" if is_live else "", "dim"),
        no_wrap=is_live,
        overflow="ellipsis",
    )
    if height is not None and sum(wanted) + 2 * len(parts) + 1 > height:  # no room for blank lines
        return Group(head, *ordered)
    return Group(head, *(item for table in ordered for item in (Text(""), table)))


Part = tuple[tuple[str, ...], list[list[object]], str, int]
"""Columns, rows, what is said when there are none, and how many more there are."""


def _top_parts(activity: Activity, *, with_day: bool) -> list[Part]:
    from rich.text import Text

    replicas: list[list[object]] = [
        [
            r.worker,
            Text(span(r.beat_s), style="red" if r.beat_s >= SILENT_S else ""),
            span(r.up_s),
            r.running,
            _outcomes(r.settled),
            r.info,
        ]
        for r in activity.replicas
    ]
    running: list[list[object]] = [
        [
            str(j.id),
            j.kind,
            j.tenant or "system",
            j.attempt,
            span(j.running_s),
            j.worker,
            _what(j.slot_at, j.connections, j.source),
        ]
        for j in activity.running
    ]
    failures: list[list[object]] = [
        [
            clock_time(f.at, with_day=with_day),
            str(f.job),
            f.kind,
            f.attempt,
            Text(f.outcome, style=BAD_OUTCOMES.get(f.outcome, "")),
            f.worker,
            (f.note or "").strip(),
        ]
        for f in activity.failures
    ]
    more = activity.running_total - len(activity.running)
    return [
        (("REPLICA", "beat", "up", "running", "last minute", "info"), replicas, "none", 0),
        (("RUNNING", "kind", "tenant", "attempt", "for", "worker", "what"), running, "none", max(0, more)),
        _queue_part(activity),
        _settled_part(activity),
        (("FAILURE", "job", "kind", "attempt", "outcome", "worker", "note"), failures, "none", 0),
    ]


def _queue_part(activity: Activity) -> Part:
    counts: dict[str, dict[str, object]] = {}
    for c in activity.kinds:
        counts.setdefault(c.kind, {})[c.state] = f"{c.jobs:,}+" if c.is_cut else c.jobs
    shown = (HELD, *STATES) if any(HELD in states for states in counts.values()) else STATES
    rows: list[list[object]] = [[kind, *(states.get(state, 0) for state in shown)] for kind, states in counts.items()]
    return ("QUEUE", *shown), rows, "none", 0


def _settled_part(activity: Activity) -> Part:
    seen = {name for minute in activity.minutes for name in minute.settled}
    names = [*USUAL_OUTCOMES, *sorted(seen - set(USUAL_OUTCOMES))]
    rows: list[list[object]] = []
    for minutes in WINDOWS:
        seconds = min(minutes * 60.0, activity.settled_for_s)
        is_short = seconds < minutes * 60.0
        counts = {n: sum(m.settled.get(n, 0) for m in activity.minutes if m.ago < minutes) for n in names}
        rate = sum(counts.values()) / max(seconds, 1.0)
        rows.append([f"last {span(seconds) if is_short else f'{minutes} min'}", *counts.values(), f"{rate:,.1f}"])
        if is_short:  # the log is read no further back
            break
    return ("SETTLED", *names, "a second"), rows, "none", 0


def _outcomes(settled: dict[str, int]) -> str:
    return ", ".join(f"{jobs:,} {name}" for name, jobs in settled.items()) or "-"


def _what(slot: datetime | None, connections: int | None, source: str | None) -> str:
    parts = [
        "" if slot is None else f"slot {clock_time(slot)}",
        "" if connections is None else counted(connections, "connection"),
        source or "",
    ]
    return ", ".join(part for part in parts if part)
