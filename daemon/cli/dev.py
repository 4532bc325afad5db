"""`tallyd dev`: a QStash-compatible server for the machine of whoever develops against it."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from daemon.cli.printing import note, print_json
from daemon.cli.session import set_up_logs, settings
from daemon.config import Settings
from daemon.domain.address import Address
from daemon.domain.dev import DEV_ACCOUNTS
from daemon.domain.errors import ConfigError, UsageError

HOST = "127.0.0.1"
PORT = 8080
FOLDER = "dev"
DRAIN_S = 1.0
"""Whoever presses Ctrl-C waits for it; what did not end goes on with the next start."""


def register(app: typer.Typer) -> None:
    app.command()(dev)


def dev(
    port: Annotated[
        int | None,
        typer.Option(
            "--port", "-port", min=0, max=65_535, envvar="QSTASH_DEV_PORT", help="On 127.0.0.1; 0 picks a free one."
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what earlier runs have stored, then start.")] = False,
    data_dir: Annotated[Path | None, typer.Option(help="Folder in which it keeps its own, named dev.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print where it serves as JSON.")] = False,
) -> None:
    """Run a QStash-compatible server for development, with public tokens, on this machine alone; Ctrl-C ends it."""
    from daemon.app import empty_database, leave_database
    from daemon.service import run as serve

    chosen = _settings(port, data_dir)
    set_up_logs(chosen)
    if fresh and not empty_database(chosen):
        raise UsageError("--fresh", f"a process uses the database in {chosen.data_dir}", "stop it first")

    def tell(url: str) -> None:
        _tell(url, chosen.data_dir, json=json)

    if not json:
        note(f"starting; what is stored is kept in {chosen.data_dir}")
    try:
        code = serve(chosen, is_dev=True, on_ready=tell)
    finally:
        leave_database(chosen)
    raise typer.Exit(code)


def _settings(port: int | None, data_dir: Path | None) -> Settings:
    """What is configured, but for all that would let it out of this machine, or near a database of value."""
    from daemon.app import new_key

    # A shell that has been told to use this server holds its address and keys: they are for clients.
    environment = {name: value for name, value in os.environ.items() if "QSTASH" not in name}
    flags = {} if data_dir is None else {"data_dir": str(data_dir)}
    # The key keeps it from asking for one beside a database URL, which it would refuse next.
    chosen = settings(environment, role="all", trigger="internal", secret_key=new_key(), **flags)
    problems = []
    if chosen.database_url is not None:
        problems.append(
            f"database_url: is set (from {chosen.origins['database_url']}), and `tallyd dev` lets public tokens in, "
            "so it keeps to a database of its own; unset it for this command"
        )
    if chosen.listen is not None and not chosen.listen.is_loopback:
        problems.append(
            f"listen: {chosen.listen} (from {chosen.origins['listen']}) is open to others, and `tallyd dev` lets public "
            "tokens in; unset it for this command, or give a loopback address"
        )
    if problems:
        raise ConfigError(problems)
    if port is None:
        port = PORT if chosen.listen is None else chosen.listen.port
    return dataclasses.replace(
        chosen,
        data_dir=chosen.data_dir / FOLDER,
        secret_key=None,
        listen=Address(HOST, port),
        listen_private=None,
        public_url=None,
        push_allow_private=True,
        drain_s=chosen.drain_s if "drain_s" in chosen.origins else DRAIN_S,
    )


def _tell(url: str, folder: Path, *, json: bool) -> None:
    """The default user's credentials, so that a shell can be told of them by copying."""
    user = DEV_ACCOUNTS[0]
    if json:
        print_json(
            {
                "url": url,
                "token": user.token,
                "current_signing_key": user.keys.current,
                "next_signing_key": user.keys.next,
                "data_dir": str(folder),
            }
        )
    else:
        print(
            f"tallyd dev serves the QStash API at {url}\n\n"
            f"  export QSTASH_URL={url}\n"
            f"  export QSTASH_TOKEN={user.token}\n"
            f"  export QSTASH_CURRENT_SIGNING_KEY={user.keys.current}\n"
            f"  export QSTASH_NEXT_SIGNING_KEY={user.keys.next}\n"
        )
        note("Ctrl-C ends it; `tallyd dev --fresh` begins anew")
    sys.stdout.flush()
