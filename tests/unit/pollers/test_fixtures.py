"""The documented payloads, read to the last digit."""

from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from daemon.domain.window import Window, from_epoch, parse_rfc3339
from tests.conformance.poller_cases import ANALYTICS, ANTHROPIC, OPENAI, OURS, Script

pytestmark = pytest.mark.anyio
FIXTURES = Path(__file__).parents[2] / "fixtures"
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


async def rows_of(poller, source, name, start, length, settings=None):
    (case,) = [
        case for case in OURS if (case.poller, case.source, dict(case.settings)) == (poller, source, settings or {})
    ]
    script = Script((FIXTURES / name).read_bytes())
    snapshot = await poller.fetch(case.target, source, case.grain, Window(start, start + length), script)
    return [row for bucket in snapshot.buckets for row in bucket.rows]


async def test_openai_completions():
    first, second = await rows_of(
        OPENAI, "completions", "openai/usage_completions.json", from_epoch(1795273200), 2 * HOUR
    )
    assert first.dims == (
        ("api_key_id", "key_9fA"),
        ("batch", "false"),
        ("model", "gpt-5-2025-08-07"),
        ("project_id", "proj_Q1w2"),
        ("service_tier", "default"),
        ("user_id", None),
    )
    assert first[1:6] == (184203, 96256, 0, 20117, 143)
    assert dict(first.rating.counts) == {"input": 87947, "cache_read": 96256, "output": 20117}
    assert second[1:6] == (5120, None, None, 640, 4)
    assert second.rating.context == (("processing", "batch"),)
    assert second.detail == b"{}"


async def test_openai_costs_are_dollars():
    first, second = await rows_of(OPENAI, "costs", "openai/costs.json", from_epoch(1795132800), DAY)
    assert (first.amount, first.currency) == (Decimal("1.2750384"), "USD")
    assert second.amount == Decimal("0.0000025000000000000000000000000001")
    assert ("line_item", None) in second.dims


async def test_anthropic_messages():
    start = parse_rfc3339("2026-11-21T10:00:00Z")
    (row,) = await rows_of(ANTHROPIC, "messages", "anthropic/usage_report_messages.json", start, HOUR)
    assert row[1:8] == (15230 + 391204 + 48210, 391204, 48210, 9120, None, Decimal(3), "searches")
    assert row.rating.is_long is False
    assert row.detail == b"{}"


async def test_anthropic_costs_are_cents():
    start = parse_rfc3339("2026-11-20T00:00:00Z")
    (row,) = await rows_of(ANTHROPIC, "cost", "anthropic/cost_report.json", start, DAY)
    assert (row.amount, row.currency) == (Decimal("15.234075"), "USD")


async def test_anthropic_analytics():
    start = parse_rfc3339("2026-11-21T10:00:00Z")
    (row,) = await rows_of(ANTHROPIC, "messages", "anthropic/analytics_usage.json", start, HOUR, ANALYTICS)
    assert row[1:8] == (454644, 391204, 48210, 9120, 212, Decimal(3), "searches")
    assert row.detail == b"{}"
