"""`tallyd status` and `doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.arguments import Json
from daemon.cli.printing import note, print_json, print_table
from daemon.cli.session import set_up_logs, settings, with_app
from daemon.domain.errors import DaemonError

if TYPE_CHECKING:
    from daemon.app import App, Check, QueueStats, Status


def register(app: typer.Typer) -> None:
    app.command()(status)
    app.command()(doctor)
    app.command()(healthcheck)


def status(json: Json = False) -> None:
    """What is going on: ticks, connections by state, queue, dead letters, lag."""

    async def work(a: App) -> tuple[Status, QueueStats]:
        return await a.insights.status(), await a.queue.stats()

    found, queue = with_app(work)
    if json:
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
                "ticks": found.ticks,
            }
        )
        return
    rows: list[tuple[str, object]] = [
        ("tenants", found.tenants),
        *((f"connections {state}", count) for state, count in sorted(found.connections.items())),
        ("parked sources", found.parked_sources),
        ("dead letters", found.dead_letters),
        ("unpriced rows", found.unpriced_rows),
        ("due now", found.due),
        ("lag", None if found.lag_s is None else f"{found.lag_s:.0f} s"),
        ("replicas", found.replicas),
        ("jobs waiting", queue.available + queue.scheduled + queue.retryable),
        ("jobs running", queue.running),
    ]
    print_table(("figure", "value"), rows, empty="")
    ticks = [[t.slot_at, t.connections, f"{t.batches_done}/{t.batches}", t.finished_at] for t in found.ticks]
    print_table(("slot", "connections", "batches", "finished"), ticks, empty="no tick yet")


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
