"""`tallyd dlq`: the dead letters, of jobs and of messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.arguments import DryRun, Json
from daemon.cli.printing import masked, print_json, print_table
from daemon.cli.session import with_app
from daemon.domain.errors import UsageError
from daemon.domain.job import JobId
from daemon.domain.redaction import parse_redaction

if TYPE_CHECKING:
    from daemon.app import Addressed, App, DeadDetail, DeadLetter, Letter
    from daemon.domain.account import AccountId, Limits
    from daemon.domain.connection import ConnectionId

app = typer.Typer(
    help="Dead letters: jobs and messages that trying again could not mend.", no_args_is_help=True
)  # fmt: skip
PAGE = 1_000
RETRY_MAX = 500
"""Messages published anew in one transaction."""
Ids = Annotated[list[str] | None, typer.Argument(metavar="ID...", help="Ids of dead letters.")]
All = Annotated[bool, typer.Option("--all", help="Every dead letter there is now.")]


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=PAGE, help="At most so many.")] = 100,
    after: Annotated[int, typer.Option(min=0, help="Only ids above this one.")] = 0,
    json: Json = False,
) -> None:
    """List dead letters by id."""

    async def work(a: App) -> tuple[list[DeadLetter], Mapping[JobId, Addressed], Mapping[ConnectionId, str]]:
        letters = await a.queue.dead_list(limit=limit, after=after)
        return letters, await _addressed(a, letters), await a.labels_of(letters)

    letters, addressed, labels = with_app(work)
    shown = [_shown(letter, addressed.get(letter.id), labels) for letter in letters]
    if json:
        print_json(shown)
        return
    columns = ["id", "died_at", "kind", "attempts", "about", "reason"]
    rows = [[*(line[column] for column in columns[:4]), _about(line), line["reason"]] for line in shown]
    print_table(columns, rows, empty="no dead letters")


@app.command()
def show(job_id: Annotated[str, typer.Argument(metavar="ID", help="Id of a dead letter.")], json: Json = False) -> None:
    """Show one dead letter: its payload, every attempt's error, and what a replay would do."""
    from daemon.app import OUTCOMES

    id_ = _parse_id(job_id)

    async def work(a: App) -> tuple[DeadDetail, dict[str, Any], Letter | None]:
        from daemon.app import dead_name

        detail = await a.queue.dead_show(id_)
        if detail is None:
            raise UsageError("ID", f"there is no dead letter {job_id}", "see `tallyd dlq list`")
        addressed = (await _addressed(a, [detail.letter])).get(id_)
        shown = _shown(detail.letter, addressed, await a.labels_of([detail.letter]))
        if addressed is None:
            return detail, shown, None
        return detail, shown, await a.letters.get(addressed.account_id, dead_name(detail.letter.at, id_))

    detail, shown, letter = with_app(work)
    shown["created_at"] = detail.created_at
    if letter is None:
        shown["body"] = detail.body.decode("utf-8", "replace")
        replay = f"runs again as job {id_} with {detail.max_attempts} attempts; what was booked stays unchanged"
    else:
        shown |= _message_shown(letter)
        replay = f"is published anew under another id, with {letter.message.spec.retries} retries; this one is dropped"
    shown["attempts_log"] = [
        {
            "at": x.at,
            "attempt": x.attempt,
            "outcome": OUTCOMES[x.outcome],
            "took_ms": x.took_ms,
            "note": x.note and masked(x.note),
        }
        for x in detail.attempts
    ]
    shown["replay"] = replay
    if json:
        print_json(shown)
        return
    log = shown.pop("attempts_log")
    shown["connections"] = ", ".join(shown["connections"]) or None
    rows = [[key, str(value)] for key, value in shown.items() if value is not None]
    print_table(("field", "value"), rows, empty="")
    print_table(
        ("at", "attempt", "outcome", "note"), [[x["at"], x["attempt"], x["outcome"], x["note"]] for x in log], empty=""
    )


@app.command()
def replay(ids: Ids = None, is_all: All = False, dry_run: DryRun = False, json: Json = False) -> None:
    """Run dead jobs again under their own ids, and publish dead messages anew; what was booked is not booked twice."""
    _act(ids, is_all=is_all, dry_run=dry_run, json=json, verb="replayed")


@app.command()
def drop(ids: Ids = None, is_all: All = False, dry_run: DryRun = False, json: Json = False) -> None:
    """Delete dead letters for good."""
    _act(ids, is_all=is_all, dry_run=dry_run, json=json, verb="dropped")


@dataclass(slots=True)
class _Done:
    """`messages` are those published anew: the dead job's id to the new message's."""

    jobs: set[JobId] = field(default_factory=set)
    missing: set[JobId] = field(default_factory=set)
    messages: dict[JobId, str] = field(default_factory=dict)


def _act(ids: list[str] | None, *, is_all: bool, dry_run: bool, json: bool, verb: str) -> None:
    if bool(ids) == is_all:
        raise UsageError("ID", "is to be given, or --all", "name ids, or pass --all")
    wanted = {_parse_id(one): one for one in ids or ()}

    async def work(a: App) -> _Done:
        there = await _every(a) if is_all else await _these(a, wanted)
        done = _Done(set(there), wanted.keys() - there.keys())
        if not dry_run:
            if verb == "replayed":
                await _replay(a, there, done)
            else:
                done.jobs = await a.queue.dead_drop(there)
        return done

    done = with_app(work)
    if json:
        told = {verb: sorted(done.jobs), "missing": sorted(done.missing), "dry_run": dry_run}
        if verb == "replayed":
            told["messages"] = done.messages
        print_json(told)
    else:
        print(f"{len(done.jobs)} {'would be ' if dry_run else ''}{verb}")
        for job, message in done.messages.items():
            print(f"{job} is message {message} now")
    if done.missing:
        names = ", ".join(wanted[job] for job in sorted(done.missing))
        raise UsageError("ID", f"no dead letter {names}", "see `tallyd dlq list`")


async def _every(a: App) -> dict[JobId, DeadLetter]:
    there: dict[JobId, DeadLetter] = {}
    after = 0
    while page := await a.queue.dead_list(limit=PAGE, after=after):
        there.update((letter.id, letter) for letter in page)
        after = page[-1].id
    return there


async def _these(a: App, wanted: Iterable[JobId]) -> dict[JobId, DeadLetter]:
    there: dict[JobId, DeadLetter] = {}
    for id_ in sorted(wanted):
        there.update((x.id, x) for x in await a.queue.dead_list(limit=1, after=id_ - 1) if x.id == id_)
    return there


async def _replay(a: App, there: Mapping[JobId, DeadLetter], done: _Done) -> None:
    """A job runs again as it is. A message gets a new id, as when its account retries it, so that a receiver which
    remembers ids takes it.
    """
    from daemon.app import PUSH, dead_name

    done.jobs = await a.queue.dead_replay(job for job, letter in there.items() if letter.kind != PUSH)
    addressed = await _addressed(a, there.values())
    for account in sorted({message.account_id for message in addressed.values()}):
        jobs = sorted(job for job, message in addressed.items() if message.account_id == account)
        limits = await a.accounts.limits_of(account)
        for start in range(0, len(jobs), RETRY_MAX):
            names = {dead_name(there[job].at, job): job for job in jobs[start : start + RETRY_MAX]}
            done.messages |= await _retry(a, account, names, limits)
    done.jobs |= done.messages.keys()


async def _retry(a: App, account: AccountId, names: dict[str, JobId], limits: Limits) -> dict[JobId, str]:
    from daemon.app import NoSuchLetterError

    while names:
        try:
            published = await a.letters.retry(account, list(names), limits)
        except NoSuchLetterError as error:  # somebody else was faster with these
            names = {name: job for name, job in names.items() if name not in error.names}
        else:
            return {job: str(made.id) for job, made in zip(names.values(), published, strict=True)}
    return {}


async def _addressed(a: App, letters: Iterable[DeadLetter]) -> Mapping[JobId, Addressed]:
    """The messages among them."""
    from daemon.app import PUSH

    jobs = [letter.id for letter in letters if letter.kind == PUSH]
    return await a.backlog.of_jobs(jobs) if jobs else {}


def _parse_id(text: str) -> JobId:
    """A job's id, or the id that the API gives to the dead letter of a message."""
    from daemon.app import parse_dead_name

    if text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < 1 << 63:
        return JobId(int(text))
    if (job := parse_dead_name(text)) is None:
        raise UsageError("ID", f"{text!r} is no id of a dead letter", "see `tallyd dlq list`")
    return job


def _shown(letter: DeadLetter, message: Addressed | None, labels: Mapping[ConnectionId, str]) -> dict[str, Any]:
    return {
        "id": letter.id,
        "died_at": letter.at,
        "kind": letter.kind,
        "key": letter.key,
        "attempts": letter.attempt,
        "reason": masked(letter.reason),
        "connections": [labels[id_] for id_ in letter.connections if id_ in labels],
        "account": message and message.account,
        "message_id": message and str(message.id),
        "url": _url(message),
    }


def _about(line: Mapping[str, Any]) -> str | None:
    """What is dead: the address of a message, else the connection, or the first of many."""
    labels: list[str] = line["connections"]
    if not labels:
        url: str | None = line["url"]
        return url
    return labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"


def _url(message: Addressed | None) -> str | None:
    return None if message is None else masked(message.url)


def _message_shown(letter: Letter) -> dict[str, Any]:
    """What of a message may be shown, as its account sees it."""
    spec = letter.message.spec
    body = parse_redaction(spec.redact).of_body(letter.body) if spec.redact else letter.body
    return {
        "dlq_id": letter.id,
        "method": spec.method,
        "response_status": letter.status or None,
        "response_body": letter.response_body.decode("utf-8", "replace"),
        "body": body.decode("utf-8", "replace"),
    }
