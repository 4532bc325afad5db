"""`tallyd status`, `doctor`, `healthcheck` and `trace`."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli import live
from daemon.cli.arguments import Json
from daemon.cli.live import Every, check_terminal, clock_time, section, show, span, watch
from daemon.cli.printing import cell, note, print_json, print_table, visible
from daemon.cli.session import set_up_logs, settings, with_app
from daemon.domain.errors import DaemonError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from daemon.app import App, Booking, Check, QueueStats, Status, Tick, Trace, TracedJob

NARROW = 100
ID_MAX = 2**63 - 1
FORMS = (
    "give a request id, a job id, a message's id, the start of a slot (2026-11-22T10:00:00Z), or seq:N of a read that "
    "booked something"
)
HANDOVER = ("published", "delivery", "failure", "refusal", "waiting", "deadline")


def register(app: typer.Typer) -> None:
    app.command()(status)
    app.command()(doctor)
    app.command()(healthcheck)
    live.register(app)
    app.command()(trace)


def status(
    watched: Annotated[bool, typer.Option("--watch", help="Show it anew every few seconds, until Ctrl-C.")] = False,
    every: Every = 2.0,
    json: Json = False,
) -> None:
    """What is going on: ticks, connections by state, queue, dead letters, lag, hand-over to QStash."""

    async def read(a: App) -> tuple[Status, QueueStats]:
        ratio = a.settings.tick_complete_ratio
        return await a.insights.status(complete_ratio=ratio), await a.queue.stats()

    if watched:
        if json:
            raise UsageError("--watch", "and --json exclude each other", "call `tallyd status --json` again and again")
        check_terminal("--watch", "leave it out, or call `tallyd status --json` again and again")
        watch(read, draw_status, title="tallyd status", every_s=every, is_kept=True)
        return
    found, queue = with_app(read)
    if not json:
        show(draw_status((found, queue), live.terminal_width(), None))
        return
    print_json(
        {
            "now": found.now,
            "tenants": found.tenants,
            "connections": found.connections,
            "parked_sources": found.parked_sources,
            "dead_letters": found.dead_letters,
            "unpriced_rows": found.unpriced_rows,
            "lag_s": found.lag_s,
            "due": found.due,
            "replicas": found.replicas,
            "queue": queue,
            "ticks": [_tick_fields(tick) for tick in found.ticks],
            "handovers": found.handovers,
            "qstash_paused_s": found.qstash_paused_s,
        }
    )


def _tick_fields(tick: Tick) -> dict[str, object]:
    return {
        "slot_at": tick.slot_at,
        "created_at": tick.created_at,
        "connections": tick.connections,
        "batches": tick.batches,
        "batches_done": tick.batches_done,
        "finished_at": tick.finished_at,
        "via": tick.via,
        "request_id": tick.request_id,
        "deadline_at": tick.deadline_at,
        "done_in_time": tick.done_in_time,
        "expected": tick.batches,
        "done": tick.batches_done,
        "complete": tick.is_complete,
    }


def draw_status(found: tuple[Status, QueueStats], width: int, height: int | None) -> RenderableType:
    """The figures, the newest ticks, and what QStash did with their batches."""
    from rich.console import Group
    from rich.text import Text

    told, queue = found
    is_narrow = width < NARROW
    spacing = 1 if is_narrow else 2
    ticks: list[list[object]] = [
        [
            clock_time(t.slot_at, with_day=True) if is_narrow else t.slot_at,
            t.via,
            t.connections,
            f"{t.batches_done}/{t.batches}",
            "-" if t.done_in_time is None else f"{t.done_in_time}/{t.batches}",
            clock_time(t.deadline_at),
            clock_time(t.finished_at),
            _verdict(t),
        ]
        for t in told.ticks
    ]
    columns = ("slot", "via", "connections", "done", "in time", "by", "finished", "complete")
    parts: list[RenderableType] = [
        _figures(told, queue, with_now=height is None),
        Text(""),
        section(columns, ticks, empty="no tick yet", spacing=spacing),
    ]
    if told.handovers:
        rows: list[list[object]] = [
            [
                clock_time(h.slot_at, with_day=True) if is_narrow else h.slot_at,
                h.batches,
                *(getattr(h, name) for name in HANDOVER),
            ]
            for h in told.handovers
        ]
        table = section(("to QStash", "batches", *HANDOVER), rows, empty="", spacing=spacing)
        parts += [Text(""), table]
    if height is not None:
        head = Text.assemble(("tallyd status", "bold"), f"  {cell(told.now)} UTC", ("  q ends", "dim"))
        parts = [head, Text(""), *parts]
    return Group(*parts)


def _verdict(tick: Tick) -> Text:
    from rich.text import Text

    match tick.is_complete:
        case None:
            return Text("open", style="dim")
        case True:
            return Text("yes", style="green")
        case _:
            return Text("no", style="bold red")


def _figures(told: Status, queue: QueueStats, *, with_now: bool) -> RenderableType:
    """The figures as one sentence a line: what needs a person is red."""
    from rich.table import Table
    from rich.text import Text

    states = ", ".join(f"{count:,} {state}" for state, count in sorted(told.connections.items())) or "none"
    jobs = f"{queue.available:,} available, {queue.scheduled:,} scheduled, {queue.retryable:,} retryable, {queue.running:,} running"
    jobs += f", {queue.pending:,} held by a limit" if queue.pending else ""
    ages = [
        f"the oldest {verb} {span(age)}"
        for verb, age in (("has waited", queue.oldest_available_s), ("has run", queue.oldest_running_s))
        if age is not None
    ]
    qstash = ""
    if told.qstash_paused_s is not None:
        qstash = f"paused for another {span(told.qstash_paused_s)}: {told.qstash_pause_reason}"
    lines: list[tuple[str, str, str]] = [
        ("now", f"{cell(told.now)} UTC" if with_now else "", ""),
        ("tenants", f"{told.tenants:,}", ""),
        ("connections", states, "red" if told.connections.get("parked") else ""),
        ("parked sources", f"{told.parked_sources:,}", "red" if told.parked_sources else ""),
        ("polls", f"{told.due:,} due" + ("" if told.lag_s is None else f", lag {span(told.lag_s)}"), ""),
        ("replicas", f"{told.replicas:,}", "" if told.replicas else "red"),
        ("queue", "; ".join([jobs, *ages]), ""),
        ("dead letters", f"{told.dead_letters:,}", "red" if told.dead_letters else ""),
        ("unpriced rows", f"{told.unpriced_rows:,}", "yellow" if told.unpriced_rows else ""),
        ("QStash", qstash, "red"),
    ]
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text, style in lines:
        if text:
            grid.add_row(Text(name, style="bold"), Text(visible(text), style=style))
    return grid


def doctor(
    reach: Annotated[bool, typer.Option("--reach", help="Also ask whether each provider's host answers.")] = False,
    fix: Annotated[bool, typer.Option("--fix", help="First mend a sequence that a copy of the database lost.")] = False,
    json: Json = False,
) -> None:
    """Check the installation and the laws of the ledger; exit 1 if anything fails."""
    import anyio

    from daemon.app import Check, open_app

    chosen = settings()
    set_up_logs(chosen)

    async def examine() -> list[Check]:
        # As found: doctor applies no migrations.
        async with open_app(chosen, is_migrating=False) as a:
            for done in await a.mend() if fix else ():
                note(f"mended: {done}")
            return await a.doctor(reach=reach)

    try:
        checks = anyio.run(examine)
    except DaemonError as error:
        checks = [Check("database", False, str(error), "check TALLYD_DATABASE_URL and the server")]
    if json:
        print_json([{"check": c.name, "ok": c.is_ok, "detail": c.detail, "fix": c.fix or None} for c in checks])
    else:
        rows = [["ok" if c.is_ok else "FAILED", c.name, c.detail, None if c.is_ok else c.fix] for c in checks]
        print_table(("", "check", "found", "fix"), rows, empty="")
    if not all(check.is_ok for check in checks):
        raise typer.Exit(1)


def healthcheck(
    ready: Annotated[bool, typer.Option("--ready", help="Ask whether it can work, not only whether it lives.")] = False,
    url: Annotated[str | None, typer.Option(help="Ask there, not where the settings say that it listens.")] = None,
    json: Json = False,
) -> None:
    """Ask the daemon of this machine how it is; exit 0 if well, 1 if not."""
    import http.client
    from urllib.parse import urlsplit

    from daemon.domain.errors import ConfigError, UpstreamUnavailableError, UsageError

    if url is None:
        chosen = settings()
        address = chosen.listen_private or chosen.listen
        if address is None:
            raise ConfigError(["listen: none, so there is nobody to ask; give --url"])
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104 - asked, not bound
        port: int | None = address.port
    else:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise UsageError("--url", f"{url!r} is no http:// address", "write it as http://127.0.0.1:8080")
        host, port = parts.hostname, parts.port
    path = "/readyz" if ready else "/healthz"
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        status, body = answer.status, answer.read(65_536).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise UpstreamUnavailableError(f"nobody answers at {host}:{port}{path}: {error}") from error
    finally:
        connection.close()
    if json:
        print_json({"status": status, "body": body})
    else:
        print(body)
    if status != 200:
        raise typer.Exit(1)


# ── From a cause to its bookings, and back ──────────────────────────────────────────────────────


def trace(
    what: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="A request id, a job id, a message's id, a slot's start, or seq:N of the ledger."
        ),
    ],
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many jobs, and so many reads.")] = 50,
    json: Json = False,
) -> None:
    """Follow a delivery, tick or job to what it booked, or a booking back to its cause."""

    async def work(a: App) -> Trace | None:
        return await _found(a, what, limit)

    found = with_app(work)
    if found is None:
        raise UsageError("ID", f"nothing is known of {what!r}", FORMS)
    if json:
        print_json(_trace_fields(found))
        return
    show(draw_trace(found))
    for name, shown, total in (
        ("jobs", len(found.jobs), found.jobs_total),
        ("reads of these", len({b.poll_seq for b in found.bookings}), found.reads_total),
    ):
        if shown < total:
            note(f"note: {shown:,} of {total:,} {name} are shown; --limit shows more")


async def _found(a: App, what: str, limit: int) -> Trace | None:
    from daemon.app import MessageId

    kind, number = ("seq", what[4:]) if what.startswith("seq:") else ("job", what)
    if number.isascii() and number.isdecimal() and len(number) < 20 and int(number) <= ID_MAX:
        if kind == "seq":
            return await a.causes.trace_seq(int(number), limit=limit)
        if trace := await a.causes.trace_job(int(number), limit=limit):
            return trace
    elif kind == "seq":
        return None
    slot = _instant(what)
    if slot is not None:
        return await a.causes.trace_slot(slot, limit=limit)
    if not (what.isascii() and what.isprintable()):  # no request id has ever been like that
        return None
    if trace := await a.causes.trace_request(what, limit=limit):
        return trace
    message = MessageId.parse(what)
    return None if message is None else await a.causes.trace_message(message.job, message.salt, limit=limit)


def _instant(text: str) -> datetime | None:
    from daemon.domain.window import parse_rfc3339

    try:
        return parse_rfc3339(text) if "T" in text.upper() else None
    except (ValueError, OverflowError):
        return None


def _trace_fields(found: Trace) -> dict[str, object]:
    return {
        "tick": None if found.tick is None else _tick_fields(found.tick),
        "deliveries": found.deliveries,
        "jobs": found.jobs,
        "jobs_total": found.jobs_total,
        "attempts": found.attempts,
        "bookings": found.bookings,
        "reads_total": found.reads_total,
    }


def draw_trace(found: Trace) -> RenderableType:
    """The cause, its jobs, and what they booked."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 2, 0, 0))
    head.add_column(no_wrap=True)
    head.add_column(overflow="fold")
    for name, text in _cause_lines(found):
        head.add_row(Text(name, style="bold"), Text(visible(text)))
    jobs: list[list[object]] = [_jobcells(job) for job in found.jobs]
    parts: list[RenderableType] = [
        head,
        section(
            ("job", "kind", "state", "finished", "conns", "unchanged", "stored", "restated", "retried", "dead", "rows"),
            jobs,
            empty="no job of it is known",
            spacing=1,
        ),
    ]
    if any(job.handover for job in found.jobs):
        rows = [[str(job.id), *_handovercells(job)] for job in found.jobs if job.handover]
        columns = ("to QStash", "place", "published", "released", "by", "reported", "status", "message")
        parts.append(section(columns, rows, empty="", spacing=1))
    if found.attempts:
        names = ("attempted", "attempt", "outcome", "worker", "took ms", "note")
        parts.append(
            section(
                names, [[a.at, a.attempt, a.outcome, a.worker, a.took_ms, a.note] for a in found.attempts], empty=""
            )
        )
    booked: list[list[object]] = [
        [
            f"{b.tenant}/{b.connection} {b.source}",
            str(b.poll_seq),
            str(b.job),
            clock_time(b.booked_at),
            *_revisions(b),
            _money(b),
        ]
        for b in found.bookings
    ]
    columns = ("booked", "seq", "job", "at", "new", "restated", "vanished", "amount")
    parts.append(section(columns, booked, empty="nothing", spacing=1))
    return Group(*(item for i, part in enumerate(parts) for item in ([Text("")] if i else []) + [part]))


def _cause_lines(found: Trace) -> list[tuple[str, str]]:
    tick = found.tick
    if tick is None:
        if any(job.kind == "push" for job in found.jobs):
            return [("tick", "none: a message")]
        return [("tick", "none: by hand, a backfill, a part of a split batch, or older than what is kept")]
    verdict = {None: "open", True: "complete", False: "incomplete"}[tick.is_complete]
    in_time = "" if tick.done_in_time is None else f", {tick.done_in_time} by {clock_time(tick.deadline_at)}"
    lines = [
        ("tick", f"{cell(tick.slot_at)} UTC via {tick.via}, made {clock_time(tick.created_at)}"),
        ("batches", f"{tick.batches_done} of {tick.batches} done{in_time}: {verdict}"),
        ("connections", f"{tick.connections:,}"),
    ]
    if tick.request_id is not None:
        lines.append(("request", tick.request_id))
    for d in found.deliveries:
        did = "made the tick" if d.is_maker else "came when it was made"
        lines.append(("delivery", f"{d.message_id} at {cell(d.at)}: {did}"))
    return lines


def _jobcells(job: TracedJob) -> list[object]:
    s = job.summary
    if s is None:
        return [str(job.id), job.kind, job.state, *[None] * 8]
    counts = (s.connections, s.unchanged, s.stored, s.restated, s.retried, s.dead, s.rows)
    return [str(job.id), job.kind, job.state, clock_time(s.finished_at), *counts]


def _handovercells(job: TracedJob) -> list[object]:
    h = job.handover
    assert h is not None
    by = h.released_by or ("nothing yet" if job.state == "scheduled" else "deadline")
    return [
        h.place,
        clock_time(h.published_at),
        clock_time(h.released_at),
        by,
        clock_time(h.reported_at),
        h.reported_status,
        h.message_id,
    ]


def _revisions(booking: Booking) -> tuple[int, int, int]:
    return booking.new, booking.restated, booking.vanished


def _money(booking: Booking) -> str:
    """Each currency and basis by itself: they are never added up."""
    return "; ".join(f"{cell(s.amount)} {s.currency} {s.basis}" for s in booking.sums) or "-"
