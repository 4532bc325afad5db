"""`tallyd run`, `demo` and `simulate`: the long-lived ones."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from daemon.cli.arguments import parse_time
from daemon.cli.session import set_up_logs, settings


def register(app: typer.Typer) -> None:
    app.command()(run)
    app.command()(demo)
    app.command()(simulate)


def run(
    role: Annotated[
        str | None, typer.Option(help="all, worker (all but the signed routes) or listener (HTTP alone).")
    ] = None,
) -> None:
    """Run the daemon until SIGTERM or SIGINT; a second signal forces it."""
    from daemon.service import run as serve

    chosen = settings(role=role)
    set_up_logs(chosen, is_service=True)
    raise typer.Exit(serve(chosen))


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running afterwards.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
) -> None:
    """Show the whole road against simulated providers; exit 0 if ledger equals provider."""
    from daemon.cli.demo import run_demo

    set_up_logs(settings())
    raise typer.Exit(run_demo(keep=keep, as_json=json))


def simulate(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 picks a free one.")] = 0,
    seed: Annotated[int, typer.Option(help="What all numbers follow from.")] = 1,
    now: Annotated[str | None, typer.Option(metavar="TIME", help="Where the simulated clock starts.")] = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="The clock moves only when told to.")] = False,
) -> None:
    """Run the provider simulator; it prints {"url", "pid"} and serves until SIGTERM."""
    parse_time("--now", now)
    command = [sys.executable, "-m", "daemon.simulator", "--host", host, "--port", str(port), "--seed", str(seed)]
    command += ["--now", now] if now else []
    command += ["--frozen"] if frozen else []
    sys.stdout.flush()
    os.execv(sys.executable, command)  # noqa: S606 -- this interpreter, no shell
