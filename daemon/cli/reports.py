"""`tallyd usage`, `spend`, `overlaps` and `gaps`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.arguments import Json, Since, Until, parse_list, parse_span, parse_time
from daemon.cli.printing import note, print_json, print_table
from daemon.cli.session import with_app
from daemon.domain.errors import UsageError
from daemon.domain.window import rfc3339

if TYPE_CHECKING:
    from daemon.app import App, Gap, LeftOut, Question, Report, SpendLine, UsageLine

NOTES_MAX = 3
METRICS = ("input_tokens", "cache_read_tokens", "cache_write_tokens", "output_tokens", "requests")

AsOf = Annotated[str | None, typer.Option("--as-of", metavar="TIME", help="The answer as it was at this instant.")]
GroupBy = Annotated[
    str,
    typer.Option(
        help="Keys by comma: tenant, connection, provider, source, model, day, hour, month, project, workspace, team, "
        "api_key, user, service_tier, line_item, dim:<name>."
    ),
]


def register(app: typer.Typer) -> None:
    app.command()(usage)
    app.command()(spend)
    app.command()(overlaps)
    app.command()(gaps)


def usage(
    since: Since = None,
    until: Until = None,
    as_of: AsOf = None,
    group_by: GroupBy = "tenant,provider,model",
    json: Json = False,
) -> None:
    """Tokens and requests, from the usage reports; what a provider does not report is null."""
    span, instant = parse_span(since, until), parse_time("--as-of", as_of)

    async def work(a: App) -> Report[UsageLine]:
        return await a.insights.usage(_question(a, span, instant, group_by))

    report = with_app(work)
    _say_clamped(instant, report.as_of)
    _say_left_out(report.left_out)
    if json:
        print_json([{**dict(line.group), **dict(line.names), "metrics": dict(line.metrics)} for line in report.lines])
    else:
        columns, cells = _grouped(parse_list(group_by), report.lines)
        rows = [[*group, *(v for _, v in line.metrics)] for group, line in zip(cells, report.lines, strict=True)]
        print_table([*columns, *METRICS], rows, empty="no usage is booked for this")


def spend(
    since: Since = None,
    until: Until = None,
    as_of: AsOf = None,
    group_by: GroupBy = "tenant,provider",
    json: Json = False,
) -> None:
    """Money by currency and basis: "provider" as billed, "local" as priced by us; never to be added up."""
    span, instant = parse_span(since, until), parse_time("--as-of", as_of)

    async def work(a: App) -> tuple[Report[SpendLine], list[tuple[str | None, int]]]:
        question = _question(a, span, instant, group_by)
        return await a.insights.spend(question), await a.insights.unpriced(question)

    report, unpriced = with_app(work)
    _say_clamped(instant, report.as_of)
    _say_left_out(report.left_out)
    if unpriced:
        models = ", ".join(str(model) for model, _ in unpriced[:5]) + (", ..." if len(unpriced) > 5 else "")
        note(
            f"warning: {sum(rows for _, rows in unpriced)} rows have no known price and are in no local amount: {models}"
        )
    if json:
        print_json(
            [
                {
                    **dict(line.group),
                    **dict(line.names),
                    "amount": line.amount,
                    "currency": line.currency,
                    "basis": line.basis,
                }
                for line in report.lines
            ]
        )
    else:
        columns, cells = _grouped(parse_list(group_by), report.lines)
        rows = [
            [*group, line.amount, line.currency, line.basis] for group, line in zip(cells, report.lines, strict=True)
        ]
        print_table([*columns, "amount", "currency", "basis"], rows, empty="no spend is booked for this")


def overlaps(
    since: Since = None,
    until: Until = None,
    as_of: AsOf = None,
    by_tenant: Annotated[
        bool, typer.Option("--by-tenant", help="As reports by tenant judge: each tenant's connections by themselves.")
    ] = False,
    json: Json = False,
) -> None:
    """What usage and spend do not add, since another connection tells the same money: gateways, one account twice."""
    span, instant = parse_span(since, until), parse_time("--as-of", as_of)

    async def work(a: App) -> Report[LeftOut]:
        return await a.insights.overlaps(_question(a, span, instant, "tenant" if by_tenant else "provider"))

    report = with_app(work)
    _say_clamped(instant, report.as_of)
    columns = ("tenant", "connection", "source", "same_as", "amount", "currency", "basis", "rows", "reason")
    rows = [{column: getattr(line, column) for column in columns} for line in report.lines]
    if json:
        print_json(rows)
    else:
        print_table(columns, [[*row.values()] for row in rows], empty="nothing overlaps")


def gaps(
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    stale_hours: Annotated[int, typer.Option(min=1, help="Hours without a read that make a stream stale.")] = 48,
    json: Json = False,
) -> None:
    """What the ledger does not hold though it should: unread time, parked sources, stale streams."""

    async def work(a: App) -> list[Gap]:
        return await a.insights.gaps(tenant=tenant, stale=timedelta(hours=stale_hours))

    found = with_app(work)
    if json:
        print_json(
            [
                {
                    "tenant": gap.tenant,
                    "connection": gap.connection,
                    "provider": gap.provider,
                    "source": gap.source,
                    "kind": gap.kind,
                    "from": gap.from_at,
                    "to": gap.to_at,
                    "reason": gap.reason,
                }
                for gap in found
            ]
        )
    else:
        rows = [[g.tenant, g.connection, g.source, g.kind, g.from_at, g.to_at, g.reason] for g in found]
        print_table(("tenant", "connection", "source", "kind", "from", "to", "reason"), rows, empty="no gaps")


def _question(a: App, span: tuple[datetime | None, datetime | None], as_of: datetime | None, group_by: str) -> Question:
    from daemon.app import Question

    keys = parse_list(group_by)
    if not keys:
        raise UsageError("--group-by", "is empty", "name at least one key, such as tenant")
    return Question(span[0], span[1], keys, a.cost_sources(), as_of, a.gateways())


def _grouped(keys: Sequence[str], lines: Sequence[UsageLine | SpendLine]) -> tuple[list[str], list[list[str | None]]]:
    """The columns of the groups, and their cells line by line: a key whose ids have names has those beside it."""
    named = {key for line in lines for key, name in line.names if name is not None}
    columns = [column for key in keys for column in (key, f"{key}_name") if column in (key, *named)]
    cells = [[{**dict(line.group), **dict(line.names)}[column] for column in columns] for line in lines]
    return columns, cells


def _say_left_out(left_out: Sequence[LeftOut]) -> None:
    """How much is not in the sums, and whose it is, the largest amounts first."""
    shown = sorted(left_out, key=lambda line: abs(line.amount or Decimal(0)), reverse=True)
    for line in shown[:NOTES_MAX]:
        money = f"{format(line.amount, 'f')} {line.currency} ({line.basis})" if line.amount is not None else "no amount"
        why = "a gateway to it" if line.reason == "gateway" else "the same organisation"
        note(
            f"note: {line.rows} rows of {line.tenant}/{line.connection} {line.source}, {money}, are not added: "
            f"{line.same_as} has them too ({why})"
        )
    if len(shown) > NOTES_MAX:
        note(f"note: and {len(shown) - NOTES_MAX} more; see `tallyd overlaps`")


def _say_clamped(asked: datetime | None, answered: datetime | None) -> None:
    if asked is not None and answered is not None and answered < asked:
        note(f"note: later bookings are still under way; answered as of {rfc3339(answered)}")
