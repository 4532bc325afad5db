"""`tallyd qstash`: the schedule in QStash that asks for our ticks."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.arguments import Json
from daemon.cli.printing import print_json, print_table
from daemon.cli.session import set_up_logs, settings
from daemon.domain.errors import ConfigError

if TYPE_CHECKING:
    from daemon.config import Settings
    from daemon.queue.qstash import QStashSettings
    from daemon.triggers.qstash import SetUp

app = typer.Typer(help="Upstash QStash as the trigger: its schedule.", no_args_is_help=True)


@app.command()
def setup(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
    json: Json = False,
) -> None:
    """Create the schedule in QStash that asks for a tick of every slot, or bring it up to date."""
    import anyio

    from daemon.domain.window import rfc3339
    from daemon.triggers.qstash import ORCHESTRATE_PATH, SCHEDULE_ID, chosen_cron, set_up_schedule

    chosen = settings()
    set_up_logs(chosen)
    reach = _reach(chosen)
    cron = chosen_cron(chosen.qstash_cron, chosen.tick_seconds)
    if dry_run:
        planned = {"schedule_id": SCHEDULE_ID, "destination": reach.public_url + ORCHESTRATE_PATH, "cron": cron}
        _show({**planned, "dry_run": True}, json=json)
        return
    keys = {(current.reveal(), following.reveal()) for current, following in chosen.signing_keys.values()}
    if not keys:
        raise ConfigError(
            ["qstash_current_signing_key: not set; set QSTASH_CURRENT_SIGNING_KEY and QSTASH_NEXT_SIGNING_KEY"]
        )
    made = anyio.run(set_up_schedule, reach, cron, _now(), keys)
    _show({**_fields(made), "created": made.created}, json=json)
    if chosen.trigger == "internal" and not json:
        print(
            f"TALLYD_TRIGGER is internal: set it to qstash or both for what comes at {rfc3339(made.next_at)} to count"
        )


@app.command()
def status(json: Json = False) -> None:
    """Show the schedule as QStash has it; exit 1 if there is none."""
    import anyio

    from daemon.triggers.qstash import schedule_of

    chosen = settings()
    set_up_logs(chosen)
    found = anyio.run(schedule_of, _reach(chosen), _now())
    if found is None:
        if json:
            print_json(None)
        else:
            print("QStash has no schedule of ours; `tallyd qstash setup` makes it")
        raise typer.Exit(1)
    _show(_fields(found), json=json)


@app.command()
def remove(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")] = False,
    json: Json = False,
) -> None:
    """Delete the schedule in QStash."""
    import anyio

    from daemon.triggers.qstash import SCHEDULE_ID, remove_schedule, schedule_of

    chosen = settings()
    set_up_logs(chosen)
    reach = _reach(chosen)
    if not dry_run:
        removed = anyio.run(remove_schedule, reach)
        _show({"schedule_id": SCHEDULE_ID, "removed": removed, "dry_run": False, "found": removed}, json=json)
        return
    found = anyio.run(schedule_of, reach, _now())
    if json:
        print_json({"schedule_id": SCHEDULE_ID, "removed": False, "dry_run": True, "found": found is not None})
    elif found is None:
        print("QStash has no schedule of ours; nothing would be removed")
    else:
        print(f"schedule {SCHEDULE_ID} ({found.cron}, {found.destination}) would be removed")


def _reach(chosen: Settings) -> QStashSettings:
    from daemon.app import qstash_settings

    found = qstash_settings(chosen)
    if found is None:
        problems = [] if chosen.qstash_token else ["qstash_token: not set; set QSTASH_TOKEN"]
        if chosen.public_url is None:
            problems.append("public_url: not set; set TALLYD_PUBLIC_URL to where QStash reaches this service")
        raise ConfigError(problems)
    return found


def _now() -> datetime:
    return datetime.now(UTC)


def _fields(found: SetUp) -> dict[str, object]:
    return {
        "schedule_id": found.schedule_id,
        "destination": found.destination,
        "cron": found.cron,
        "next_at": found.next_at,
    }


def _show(fields: dict[str, object], *, json: bool) -> None:
    if json:
        print_json(fields)
    else:
        print_table(("figure", "value"), list(fields.items()), empty="")
