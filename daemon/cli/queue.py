"""`tallyd queue`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import typer

from daemon.cli.arguments import Json
from daemon.cli.printing import print_json, print_table
from daemon.cli.session import with_app

if TYPE_CHECKING:
    from daemon.app import App, QueueStats

app = typer.Typer(help="The durable queue in Postgres.", no_args_is_help=True)


@app.callback()
def _queue() -> None:
    """A group even while it has one command."""


@app.command()
def stats(json: Json = False) -> None:
    """Count the jobs by state; ages in seconds."""

    async def work(a: App) -> QueueStats:
        return await a.queue.stats()

    figures = dataclasses.asdict(with_app(work))
    if json:
        print_json(figures)
    else:
        print_table(("figure", "value"), list(figures.items()), empty="")
