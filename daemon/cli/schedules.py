"""`tallyd schedules`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.arguments import Account, AnyAccount, DryRun, Json
from daemon.cli.printing import masked, print_json, print_table
from daemon.cli.session import account_of, accounts_of, with_app
from daemon.domain.account import AccountId
from daemon.domain.errors import UsageError

if TYPE_CHECKING:
    from daemon.app import App, Schedule

app = typer.Typer(help="Schedules: messages that are published by the clock.", no_args_is_help=True)
Id = Annotated[str, typer.Argument(metavar="ID", help="The schedule's id.")]


@app.command("list")
def list_(account: AnyAccount = None, json: Json = False) -> None:
    """List the schedules, the oldest first."""

    async def work(a: App) -> list[dict[str, object]]:
        return [
            _line(name, schedule)
            for name, id_ in (await accounts_of(a, account)).items()
            for schedule in await a.schedules.list(id_)
        ]

    rows = with_app(work)
    if json:
        print_json(rows)
    else:
        columns = ("account", "id", "cron", "destination", "paused", "next_at", "last_at", "error")
        print_table(columns, [[row[c] for c in columns] for row in rows], empty="no schedules")


@app.command()
def show(schedule_id: Id, account: Account = "default", json: Json = False) -> None:
    """Show one schedule, and what became of its last messages; headers and body are not shown."""

    async def work(a: App) -> Schedule | None:
        return await a.schedules.get(await account_of(a, account), schedule_id)

    found = with_app(work)
    if found is None:
        raise _missing(account, schedule_id)
    spec = found.spec
    shown = {
        **_line(account, found),
        "method": spec.method,
        "retries": spec.retries,
        "delay_s": spec.delay_s,
        "timeout_s": spec.timeout_s,
        "flow_key": None if spec.flow is None else spec.flow[0],
        "callback": spec.callback and masked(spec.callback.url),
        "failure_callback": spec.failure_callback and masked(spec.failure_callback.url),
        "labels": list(found.labels),
        "body_bytes": len(found.body or b""),
        "last_messages": {str(id_): state for id_, state in found.last_states.items()},
    }
    if json:
        print_json(shown)
    else:
        last = ", ".join(f"{id_} {state}" for id_, state in found.last_states.items())
        told = {**shown, "labels": ", ".join(found.labels) or None, "last_messages": last or None}
        print_table(("field", "value"), list(told.items()), empty="")


@app.command()
def pause(schedule_id: Id, account: Account = "default", json: Json = False) -> None:
    """Fire no more until it is resumed."""
    _change(lambda a, id_: a.schedules.pause(id_, schedule_id), schedule_id, account, "paused", json=json)


@app.command()
def resume(schedule_id: Id, account: Account = "default", json: Json = False) -> None:
    """Fire again from now on; what was missed meanwhile is not made up for."""
    _change(lambda a, id_: a.schedules.resume(id_, schedule_id), schedule_id, account, "active", json=json)


@app.command()
def delete(schedule_id: Id, account: Account = "default", dry_run: DryRun = False, json: Json = False) -> None:
    """Delete a schedule; the messages that it has made go on."""

    async def work(a: App) -> bool:
        id_ = await account_of(a, account)
        if dry_run:
            return await a.schedules.get(id_, schedule_id) is not None
        return await a.schedules.delete(id_, schedule_id)

    if not with_app(work):
        raise _missing(account, schedule_id)
    if json:
        print_json({"account": account, "id": schedule_id, "deleted": not dry_run, "dry_run": dry_run})
    else:
        print(f"schedule {schedule_id} {'would be deleted' if dry_run else 'deleted'}")


def _change(
    change: Callable[[App, AccountId], Awaitable[bool]], schedule_id: str, account: str, state: str, *, json: bool
) -> None:
    async def work(a: App) -> bool:
        return await change(a, await account_of(a, account))

    if not with_app(work):
        raise _missing(account, schedule_id)
    if json:
        print_json({"account": account, "id": schedule_id, "state": state})
    else:
        print(f"schedule {schedule_id} is {state}")


def _missing(account: str, schedule_id: str) -> UsageError:
    return UsageError("ID", f"account {account} has no schedule {schedule_id!r}", "see `tallyd schedules list`")


def _line(account: str, schedule: Schedule) -> dict[str, object]:
    return {
        "account": account,
        "id": schedule.id,
        "cron": schedule.cron,
        "destination": masked(schedule.destination),
        "queue": schedule.queue,
        "paused": schedule.is_paused,
        "created_at": schedule.created_at,
        "next_at": None if schedule.is_paused else schedule.next_at,
        "last_at": schedule.last_at,
        "error": schedule.error and masked(schedule.error),
    }
