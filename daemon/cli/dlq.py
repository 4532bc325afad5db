"""`tallyd dlq`: the dead letters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.arguments import Json
from daemon.cli.printing import print_json, print_table
from daemon.cli.session import with_app
from daemon.domain.errors import UsageError
from daemon.domain.job import JobId

if TYPE_CHECKING:
    from daemon.app import App, DeadDetail, DeadLetter

app = typer.Typer(help="Dead letters: jobs that trying again could not mend.", no_args_is_help=True)
PAGE = 1_000
Ids = Annotated[list[int] | None, typer.Argument(metavar="ID...", help="Ids of dead jobs.")]
All = Annotated[bool, typer.Option("--all", help="Every dead letter there is now.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Name them, and do nothing.")]


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=PAGE, help="At most so many.")] = 100,
    after: Annotated[int, typer.Option(min=0, help="Only ids above this one.")] = 0,
    json: Json = False,
) -> None:
    """List dead letters by id."""

    async def work(a: App) -> list[DeadLetter]:
        return await a.queue.dead_list(limit=limit, after=after)

    letters = with_app(work)
    if json:
        print_json([_shown(letter) for letter in letters])
    else:
        rows = [[str(x.id), x.at, x.kind, x.attempt, x.reason] for x in letters]
        print_table(("id", "died_at", "kind", "attempts", "reason"), rows, empty="no dead letters")


@app.command()
def show(job_id: Annotated[int, typer.Argument(metavar="ID", help="Id of a dead job.")], json: Json = False) -> None:
    """Show one dead letter: its payload, every attempt's error, and what a replay would do."""

    async def work(a: App) -> DeadDetail | None:
        return await a.queue.dead_show(JobId(job_id))

    detail = with_app(work)
    if detail is None:
        raise UsageError("ID", f"there is no dead letter {job_id}", "see `tallyd dlq list`")
    shown: dict[str, Any] = {
        **_shown(detail.letter),
        "created_at": detail.created_at,
        "body": detail.body.decode("utf-8", "replace"),
        "attempts_log": [
            {"at": x.at, "attempt": x.attempt, "outcome": x.outcome, "took_ms": x.took_ms, "note": x.note}
            for x in detail.attempts
        ],
        "replay": f"runs again as job {job_id} with {detail.max_attempts} attempts; what was booked stays unchanged",
    }
    if json:
        print_json(shown)
        return
    log = shown.pop("attempts_log")
    print_table(("field", "value"), [[key, str(value)] for key, value in shown.items()], empty="")
    print_table(
        ("at", "attempt", "outcome", "note"), [[x["at"], x["attempt"], x["outcome"], x["note"]] for x in log], empty=""
    )


@app.command()
def replay(ids: Ids = None, is_all: All = False, dry_run: DryRun = False, json: Json = False) -> None:
    """Run dead jobs again under their own ids; what was booked is not booked twice."""
    _act(ids, is_all=is_all, dry_run=dry_run, json=json, verb="replayed")


@app.command()
def drop(ids: Ids = None, is_all: All = False, dry_run: DryRun = False, json: Json = False) -> None:
    """Delete dead jobs for good."""
    _act(ids, is_all=is_all, dry_run=dry_run, json=json, verb="dropped")


def _act(ids: list[int] | None, *, is_all: bool, dry_run: bool, json: bool, verb: str) -> None:
    if bool(ids) == is_all:
        raise UsageError("ID", "is to be given, or --all", "name ids, or pass --all")

    async def work(a: App) -> tuple[set[JobId], set[JobId]]:
        wanted = {JobId(one) for one in ids or ()}
        there: set[JobId] = set()
        after = 0
        while page := await a.queue.dead_list(limit=PAGE, after=after):
            there.update(letter.id for letter in page)
            after = page[-1].id
        chosen = there if is_all else wanted & there
        if not dry_run:
            chosen = await (a.queue.dead_replay(chosen) if verb == "replayed" else a.queue.dead_drop(chosen))
        return chosen, wanted - there

    done, missing = with_app(work)
    if json:
        print_json({verb: sorted(done), "missing": sorted(missing), "dry_run": dry_run})
    else:
        print(f"{len(done)} {'would be ' if dry_run else ''}{verb}")
    if missing:
        raise UsageError("ID", f"no dead letter {', '.join(map(str, sorted(missing)))}", "see `tallyd dlq list`")


def _shown(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "died_at": letter.at,
        "kind": letter.kind,
        "key": letter.key,
        "attempts": letter.attempt,
        "reason": letter.reason,
    }
