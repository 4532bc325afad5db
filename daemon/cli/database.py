"""`tallyd db`."""

from __future__ import annotations

import signal
import subprocess
from typing import TYPE_CHECKING

import typer

from daemon.cli.arguments import Json
from daemon.cli.printing import note, print_json, print_table
from daemon.cli.session import set_up_logs, settings, with_app

if TYPE_CHECKING:
    from daemon.app import App, DatabaseStatus, Rotation

app = typer.Typer(help="The database: yours, or the embedded one.", no_args_is_help=True)


@app.command()
def start(json: Json = False) -> None:
    """Start the embedded server, and keep it until `db stop`."""
    from daemon.app import start_database

    url = start_database(settings())
    if json:
        print_json({"url": url})
    else:
        print(url)


@app.command()
def stop(json: Json = False) -> None:
    """Stop the embedded server, also while it is in use."""
    from daemon.app import stop_database

    was_running = stop_database(settings())
    if json:
        print_json({"stopped": was_running})
    else:
        print("stopped" if was_running else "it was not running")


@app.command()
def status(json: Json = False) -> None:
    """Say where the database stands; exit 1 when it does not run or its schema is behind."""
    import anyio

    from daemon.app import database_status

    _print_status(anyio.run(database_status, settings()), json=json)


@app.command()
def migrate(json: Json = False) -> None:
    """Bring the schema up to date."""
    import anyio

    from daemon.app import migrate_database

    chosen = settings()
    set_up_logs(chosen)
    _print_status(anyio.run(migrate_database, chosen), json=json)


def _print_status(found: DatabaseStatus, *, json: bool) -> None:
    shown = {
        "kind": found.kind,
        "running": found.is_running,
        "schema": found.schema,
        "target": found.target,
        "pending": found.pending,
        "folder": found.folder,
    }
    if json:
        print_json(shown)
    else:
        rows = [[key, ", ".join(value) if isinstance(value, tuple) else value] for key, value in shown.items()]
        print_table(("field", "value"), rows, empty="")
    if not found.is_running or found.pending:
        raise typer.Exit(1)


@app.command()
def psql() -> None:
    """Open psql on the database."""
    from daemon.app import psql_command

    chosen = settings()
    set_up_logs(chosen)
    # A child, not exec: the embedded server runs for as long as this process holds it.
    command = psql_command(chosen)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for psql, which sets its own handler
    try:
        psql_process = subprocess.run(command, check=False)  # noqa: S603 -- psql with the configured database, no shell
    finally:
        signal.signal(signal.SIGINT, before)
    raise typer.Exit(psql_process.returncode)


@app.command("rotate-key")
def rotate_key(json: Json = False) -> None:
    """Seal every credential under the first key (the embedded database makes itself a new one)."""

    async def work(a: App) -> Rotation:
        return await a.rotate_key()

    report = with_app(work)
    if json:
        print_json({"resealed": report.resealed, "failed": report.failed})
    else:
        print(f"{report.resealed} credentials sealed anew; restart the daemons that still hold the old key alone")
    for problem in report.failed:
        note(f"error: {problem}")
    if report.failed:
        raise typer.Exit(1)
