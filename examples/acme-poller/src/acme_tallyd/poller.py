"""Acme AI's admin API: tokens and costs by day.

Source: https://docs.acme.example/admin-api, read 2026-11-20: days are UTC and come oldest first, those without use
included; a cursor is bound to its question, and null on the last page; costs are dollars, as text.
"""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import msgspec

from daemon.domain.connection import Identity, Target
from daemon.domain.ports import Caller
from daemon.domain.record import Dims, Row
from daemon.pollers.chain import Fields, Page, decode, encode_detail, need_count, take_count
from daemon.pollers.kit import Question, Report, SimplePoller, cost_row, daily, day


class _Day(msgspec.Struct):
    date: date
    rows: list[Fields]


class _Page(msgspec.Struct):
    days: list[_Day]
    next_cursor: str | None


class _Organization(msgspec.Struct):
    id: str
    name: str | None = None


_page = msgspec.json.Decoder(_Page, float_hook=Decimal)
_organization = msgspec.json.Decoder(_Organization)


def _tokens(row: Fields, dims: Dims) -> Row:
    return Row(
        dims,
        input_tokens=need_count(row, "tokens_in"),
        cache_read_tokens=take_count(row, "tokens_in_cached"),
        output_tokens=need_count(row, "tokens_out"),
        requests=take_count(row, "calls"),
        detail=encode_detail(row),
    )


def _costs(row: Fields, dims: Dims) -> Row:
    return cost_row(dims, row.pop("amount", None), row.pop("currency", None), row)


class AcmePoller(SimplePoller):
    provider = "acme-ai"
    default_base_url = "https://api.acme.example/v1"
    reports = (
        Report(daily("tokens", "usage"), "/usage/daily", ("model", "project_id"), _tokens, may_send_empty=True),
        Report(daily("costs", "cost"), "/costs/daily", ("line_item", "project_id"), _costs, may_send_empty=True),
    )
    key_prefix = "acme-admin-"
    key_needed = "an admin key of Acme AI (acme-admin-...), from Settings, Admin keys"

    async def page(self, question: Question, cursor: str | None) -> Page:
        window = question.window
        query = [("from", f"{window.start:%Y-%m-%d}"), ("to", f"{window.end:%Y-%m-%d}"), ("limit", str(question.limit))]
        query += [("by", name) for name in question.group_by]
        query += [("cursor", cursor)] if cursor is not None else []
        answer = await question.call.get(question.report.path, query, self.headers(question.target))
        page = decode(_page, answer, question.report.spec.name)
        return question.page(answer, ((*day(sent.date), sent.rows) for sent in page.days), page.next_cursor)

    async def identify(self, target: Target, call: Caller) -> Identity:
        organization = decode(_organization, await call.get("/organization", (), self.headers(target)), "organization")
        return Identity(organization.id, organization.name)
