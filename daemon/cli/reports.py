"""`tallyd usage`, `spend` and `gaps`."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.arguments import Json, Since, Until, parse_list, parse_span, parse_time
from daemon.cli.printing import note, print_json, print_table
from daemon.cli.session import with_app
from daemon.domain.errors import UsageError
from daemon.domain.window import rfc3339

if TYPE_CHECKING:
    from daemon.app import App, Gap, Question, Report, SpendLine, UsageLine

METRICS = ("input_tokens", "cache_read_tokens", "cache_write_tokens", "output_tokens", "requests")

AsOf = Annotated[str | None, typer.Option("--as-of", metavar="TIME", help="The answer as it was at this instant.")]
GroupBy = Annotated[
    str,
    typer.Option(
        help="Keys by comma: tenant, connection, provider, source, model, day, hour, month, project, api_key, user, "
        "service_tier, line_item, dim:<name>."
    ),
]


def register(app: typer.Typer) -> None:
    app.command()(usage)
    app.command()(spend)
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
    if json:
        print_json([{**dict(line.group), "metrics": dict(line.metrics)} for line in report.lines])
    else:
        rows = [[*(value for _, value in line.group), *(value for _, value in line.metrics)] for line in report.lines]
        print_table([*parse_list(group_by), *METRICS], rows, empty="no usage is booked for this")


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
        report = await a.insights.spend(_question(a, span, instant, group_by))
        return report, await a.insights.unpriced(since=span[0], until=span[1])

    report, unpriced = with_app(work)
    _say_clamped(instant, report.as_of)
    if unpriced:
        models = ", ".join(str(model) for model, _ in unpriced[:5]) + (", ..." if len(unpriced) > 5 else "")
        note(
            f"warning: {sum(rows for _, rows in unpriced)} rows have no known price and are in no local amount: {models}"
        )
    if json:
        print_json(
            [
                {**dict(line.group), "amount": line.amount, "currency": line.currency, "basis": line.basis}
                for line in report.lines
            ]
        )
    else:
        rows = [[*(v for _, v in line.group), line.amount, line.currency, line.basis] for line in report.lines]
        print_table([*parse_list(group_by), "amount", "currency", "basis"], rows, empty="no spend is booked for this")


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
    return Question(span[0], span[1], keys, a.cost_sources(), as_of)


def _say_clamped(asked: datetime | None, answered: datetime | None) -> None:
    if asked is not None and answered is not None and answered < asked:
        note(f"note: later bookings are still under way; answered as of {rfc3339(answered)}")
