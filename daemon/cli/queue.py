"""`tallyd queue`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from daemon.cli.arguments import Account, AnyAccount, DryRun, Json, parse_message_id
from daemon.cli.printing import print_json, print_table
from daemon.cli.session import account_of, accounts_of, with_app
from daemon.domain.errors import UsageError

if TYPE_CHECKING:
    from daemon.app import App, MessageId, QueueStats, UnderWay

app = typer.Typer(help="The durable queue in Postgres, and the messages in it.", no_args_is_help=True)
LIST_MAX = 10_000
WayState = Literal["running", "available", "pending", "retryable", "scheduled"]


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


@app.command()
def messages(
    account: AnyAccount = None,
    state: Annotated[WayState | None, typer.Option(help="Only in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=LIST_MAX, help="At most so many.")] = 100,
    json: Json = False,
) -> None:
    """List messages that wait or run: what runs first, then by the time of the next try."""

    async def work(a: App) -> list[UnderWay]:
        id_ = None if account is None else await account_of(a, account)
        return await a.backlog.under_way(id_, state, limit)

    rows = [
        {
            "id": str(found.id),
            "account": found.account,
            "state": found.state,
            "host": found.host,
            "queue": found.queue,
            "flow_key": found.flow_key,
            "attempt": found.attempt,
            "next_at": found.next_at,
            "created_at": found.created_at,
        }
        for found in with_app(work)
    ]
    if json:
        print_json(rows)
    else:
        columns = ("id", "account", "state", "host", "queue", "flow_key", "attempt", "next_at")
        print_table(columns, [[row[c] for c in columns] for row in rows], empty="no message waits or runs")


@app.command("list")
def list_(account: AnyAccount = None, json: Json = False) -> None:
    """List the FIFO queues; lag is how many messages are in one."""

    async def work(a: App) -> list[dict[str, object]]:
        return [
            {
                "account": name,
                "queue": queue.name,
                "parallelism": queue.parallelism,
                "lag": queue.waiting + queue.running,
                "running": queue.running,
                "paused": queue.is_paused,
                "created_at": queue.created_at,
                "updated_at": queue.updated_at,
            }
            for name, id_ in (await accounts_of(a, account)).items()
            for queue in await a.jobs.gates.find_all(id_, "queue", most=LIST_MAX)
        ]

    rows = with_app(work)
    if json:
        print_json(rows)
    else:
        columns = ("account", "queue", "parallelism", "lag", "running", "paused", "created_at")
        print_table(columns, [[row[c] for c in columns] for row in rows], empty="no FIFO queues")


@app.command()
def cancel(
    ids: Annotated[list[str], typer.Argument(metavar="MSG_ID...", help="Ids of messages.")],
    account: Account = "default",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Cancel messages, one that is being delivered too; their receivers may have got it."""
    wanted = [parse_message_id("MSG_ID", text) for text in dict.fromkeys(ids)]

    async def work(a: App) -> tuple[int, list[MessageId]]:
        id_ = await account_of(a, account)
        found = {message: await a.pending.get(id_, message) for message in wanted}
        alive = [message for message, stored in found.items() if stored is not None and stored.is_alive]
        missing = [message for message in wanted if message not in alive]
        return len(alive) if dry_run else await a.pending.cancel(id_, alive), missing

    cancelled, missing = with_app(work)
    if json:
        print_json({"cancelled": cancelled, "missing": [str(one) for one in missing], "dry_run": dry_run})
    else:
        print(f"{cancelled} {'would be ' if dry_run else ''}cancelled")
    if missing:
        raise UsageError(
            "MSG_ID",
            f"account {account} has no message under way named {', '.join(map(str, missing))}",
            "see `tallyd queue messages`",
        )
