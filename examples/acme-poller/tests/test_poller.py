"""tallyd's own suite on the poller of Acme AI, source by source, and what is special to it."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

import pytest
from acme_tallyd.poller import AcmePoller

from daemon.domain.errors import CredentialError
from daemon.domain.record import Row
from daemon.testing.poller_cases import Bucket, Case, Script, Wire
from daemon.testing.poller_suite import *  # noqa: F403 - takes in the tests, and the hook that hands them CASES

ACME = AcmePoller()


def page(buckets: Sequence[Bucket], has_more: bool, cursor: str | None) -> Wire:
    days = [{"date": f"{start:%Y-%m-%d}", "rows": rows} for start, _, rows in buckets]
    return {"days": days, "next_cursor": cursor if has_more else None}


def error(code: str) -> Wire:
    return {"error": {"code": code, "message": "refused"}}


TOKENS = Case(
    "acme-ai-tokens",
    ACME,
    "tokens",
    row=lambda n: {
        "model": "acme-large", "project_id": f"p{n}", "tokens_in": 100, "tokens_in_cached": 40, "tokens_out": 7, "calls": 3,
    },
    means=lambda n: Row(
        (("model", "acme-large"), ("project_id", f"p{n}")),
        input_tokens=100, cache_read_tokens=40, output_tokens=7, requests=3,
    ),
    page=page,
    error=error,
    required="tokens_out",
    optional="tokens_in_cached",
    envelope=("days",),
    paging="cursor",
    cursor_param="cursor",
    group_param="by",
    has_empty_buckets=True,
    is_dated=True,
)  # fmt: skip

COSTS = Case(
    "acme-ai-costs",
    ACME,
    "costs",
    row=lambda n: {"line_item": "acme-large, input", "project_id": f"p{n}", "amount": "1.25", "currency": "usd"},
    means=lambda n: Row(
        (("currency", "USD"), ("line_item", "acme-large, input"), ("project_id", f"p{n}")),
        amount=Decimal("1.25"), currency="USD",
    ),
    page=page,
    error=error,
    required="amount",
    set_amount=lambda row, amount: {**row, "amount": amount},
    envelope=("days",),
    paging="cursor",
    cursor_param="cursor",
    group_param="by",
    has_empty_buckets=True,
    is_dated=True,
)  # fmt: skip

CASES = (TOKENS, COSTS)


async def test_days_are_asked_for_by_their_dates() -> None:
    script = Script(page([], False, None))
    await ACME.fetch(TOKENS.target, "tokens", TOKENS.grain, TOKENS.window(3), script)
    assert script.query(0) == [
        ("from", "2026-11-19"), ("to", "2026-11-22"), ("limit", "3"), ("by", "model"), ("by", "project_id"),
    ]  # fmt: skip


async def test_organization_is_named() -> None:
    identity = await ACME.identify(TOKENS.target, Script({"id": "org-7", "name": "Acme Users Ltd"}))
    assert (identity.org_id, identity.org_name) == ("org-7", "Acme Users Ltd")


def test_key_of_another_kind_is_refused() -> None:
    with pytest.raises(CredentialError, match="acme-admin-"):
        ACME.check_credential("sk-proj-0123456789")
