"""The reads, on rows written by hand: what they sum, what stays null, and that doctor sees each broken law."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from daemon.db.connections import ConnectionStore, NewConnection
from daemon.db.insights import Handovers, Insights, Question
from daemon.db.pool import Database
from daemon.db.secrets import Keyring
from daemon.db.tenants import TenantStore
from daemon.domain.connection import Secret
from daemon.domain.errors import UsageError
from tests.tick_kit import SLOT, summarise

pytestmark = pytest.mark.anyio

HOUR = datetime(2026, 11, 20, 10, tzinfo=UTC)
DAY = datetime(2026, 11, 20, tzinfo=UTC)
FIRST = datetime(2026, 11, 20, 10, 5, tzinfo=UTC)
SECOND = datetime(2026, 11, 20, 10, 10, tzinfo=UTC)
THIRD = datetime(2026, 11, 20, 11, tzinfo=UTC)

EVERYTHING = Question(None, None, ("tenant",), {("openai", "costs")})


@pytest.fixture
async def insights(db: Database) -> Insights:
    """acme/main: one usage row that grew and was corrected, one that vanished, an unpriced one; and a cost row."""
    await db.execute("select ledger_make_partitions(array['2026-11-20'::timestamptz])")
    await TenantStore(db).add("acme")
    store = ConnectionStore(db, Keyring([b"k" * 32]), lambda _: {})
    await store.add(
        NewConnection("acme", "main", "openai", "https://x.example", Secret("sk-1"), datetime(2026, 11, 1, tzinfo=UTC))
    )
    await db.execute("""
      insert into stream (tenant_id, connection_id, source, last_seq, covered_from, covered_to, read_at)
        select c.tenant_id, c.id, s, 9, c.since, now(), now()
        from connection c, unnest(array['completions', 'costs']) s;
      insert into grain_epoch select id, '-infinity', 'g', 'v1', case source when 'costs' then '1d' else '1h' end,
        case source when 'costs' then array['line_item'] else array['model', 'project_id'] end from stream;
      select setval('poll_seq', 9);
    """)
    usage = "completions", HOUR, {"model": "gpt-5", "project_id": "p1"}
    await book(db, usage, b"a", [(FIRST, 1, 100, 7, "0.10"), (SECOND, 2, 50, 3, "0.05"), (THIRD, 2, -20, -1, "-0.02")])
    vanished = "completions", HOUR, {"model": "gone", "project_id": None}
    await book(db, vanished, b"b", [(FIRST, 1, 11, 1, "1"), (THIRD, 3, -11, -1, "-1")])
    unpriced = "completions", HOUR + timedelta(hours=1), {"model": "gpt-9", "project_id": "p1"}
    await book(db, unpriced, b"c", [(THIRD, 1, 5, 1, None)])
    await book(db, ("costs", DAY, {"line_item": "gpt-5, input"}), b"d", [(FIRST, 1, None, None, "0.1300")])
    await db.execute("""
      insert into bucket (stream_id, bucket_start, last_seq, hash_version, digest, totals, total_amount)
      select stream_id, bucket_start, 9, 1, '',
        array[coalesce(sum(input_tokens), 0), 0, 0, 0, coalesce(sum(requests), 0)],
        coalesce(sum(amount) filter (where basis = 'provider'), 0)
      from usage_row group by 1, 2
    """)
    return Insights(db)


async def book(
    db: Database,
    row: tuple[str, datetime, dict[str, str | None]],
    key: bytes,
    revisions: Sequence[tuple[datetime, int, int | None, int | None, str | None]],
) -> None:
    source, start, dims = row
    stream = await db.fetchrow("select id, tenant_id from stream where source = $1", source)
    assert stream is not None
    for n, (at, kind, tokens, requests, amount) in enumerate(revisions, start=1):
        await db.execute(
            "insert into ledger (tenant_id, bucket_start, row_key, revision, stream_id, poll_seq, booked_at, kind, "
            "input_tokens, requests, amount) values ($1, $2, $3, $4, $5, $4::int, $6, $7, $8, $9, $10)",
            stream["tenant_id"],
            start,
            key,
            n,
            stream["id"],
            at,
            kind,
            tokens,
            requests,
            None if amount is None else Decimal(amount),
        )
    basis = "provider" if source == "costs" else "local"
    await db.execute(
        "insert into usage_row (tenant_id, stream_id, bucket_start, row_key, revision, content_hash, is_tombstone, dims,"
        " input_tokens, requests, amount, currency, basis, rate_version, detail) "
        "select tenant_id, stream_id, bucket_start, row_key, count(*), '', bool_or(kind = 3), $1::text::jsonb, "
        "sum(input_tokens), sum(requests), sum(amount), case when sum(amount) is not null then 'USD' end, $2, "
        "case when $2 = 'local' then case when sum(amount) is null then 'unpriced' else 'v1' end end, '{}' "
        "from ledger where row_key = $3 group by 1, 2, 3, 4",
        json.dumps(dims),
        basis,
        key,
    )


async def test_usage_sums_usage_reports_only_and_keeps_null(insights: Insights) -> None:
    report = await insights.usage(replace(EVERYTHING, group_by=("tenant", "connection", "model", "day")))
    assert [(dict(line.group), dict(line.metrics)) for line in report.lines] == [
        (
            {"tenant": "acme", "connection": "main", "model": model, "day": "2026-11-20"},
            {
                "input_tokens": tokens,
                "cache_read_tokens": None,
                "cache_write_tokens": None,
                "output_tokens": None,
                "requests": requests,
            },
        )
        for model, tokens, requests in (("gpt-5", 130, 9), ("gpt-9", 5, 1))
    ]


@pytest.mark.parametrize(
    ("as_of", "tokens"),
    [
        (FIRST - timedelta(microseconds=1), []),
        (FIRST, [("gone", 11), ("gpt-5", 100)]),
        (SECOND, [("gone", 11), ("gpt-5", 150)]),
        (THIRD, [("gpt-5", 130), ("gpt-9", 5)]),
    ],
)
async def test_as_of_reproduces_each_past_answer(
    insights: Insights, as_of: datetime, tokens: list[tuple[str, int]]
) -> None:
    report = await insights.usage(replace(EVERYTHING, group_by=("model",), as_of=as_of))
    assert [(line.group[0][1], line.metrics[0][1]) for line in report.lines] == tokens
    assert report.as_of == as_of


async def test_as_of_now_equals_the_current_rows(insights: Insights) -> None:
    for keys in ((), ("model",), ("hour", "project"), ("source", "line_item", "month")):
        question = replace(EVERYTHING, group_by=keys)
        later = replace(question, as_of=datetime(2030, 1, 1, tzinfo=UTC))
        assert (await insights.usage(question)).lines == (await insights.usage(later)).lines
        assert (await insights.spend(question)).lines == (await insights.spend(later)).lines


async def test_as_of_never_passes_the_oldest_open_flush(insights: Insights, db: Database) -> None:
    """What that flush commits later is booked at its start: an answer past it would change."""
    asked = datetime(2030, 1, 1, tzinfo=UTC)
    async with db.transaction() as tx:
        began = await tx.fetchval("select now()")
        inside = await insights.usage(replace(EVERYTHING, as_of=asked))
    after = await insights.usage(replace(EVERYTHING, as_of=asked))
    assert inside.as_of is not None
    assert after.as_of is not None
    assert inside.as_of < began < after.as_of < asked


async def test_spend_splits_by_basis_and_leaves_unpriced_out(insights: Insights) -> None:
    report = await insights.spend(EVERYTHING)
    assert [(format(line.amount, "f"), line.currency, line.basis) for line in report.lines] == [
        ("0.13", "USD", "local"),
        ("0.13", "USD", "provider"),
    ]
    assert await insights.unpriced(EVERYTHING) == [("gpt-9", 1)]


async def test_bounds_are_half_open(insights: Insights) -> None:
    upto = await insights.usage(replace(EVERYTHING, since=HOUR, until=HOUR + timedelta(hours=1)))
    assert [line.metrics[0] for line in upto.lines] == [("input_tokens", 130)]
    behind = await insights.usage(replace(EVERYTHING, since=HOUR + timedelta(hours=1), until=None))
    assert [line.metrics[0] for line in behind.lines] == [("input_tokens", 5)]
    assert (await insights.usage(replace(EVERYTHING, group_by=(), until=FIRST - timedelta(days=1)))).lines == ()


async def test_own_dimension_and_bad_keys(insights: Insights) -> None:
    report = await insights.usage(replace(EVERYTHING, group_by=("dim:project_id",)))
    assert [line.group for line in report.lines] == [(("dim:project_id", "p1"),)]
    for key in ("dim:x'; drop table tenant", "colour", "dim:"):
        with pytest.raises(UsageError, match="--group-by: unknown key"):
            await insights.usage(replace(EVERYTHING, group_by=(key,)))
    with pytest.raises(UsageError, match="twice"):
        await insights.usage(replace(EVERYTHING, group_by=("model", "model")))


async def test_gaps_name_what_is_missing(insights: Insights, db: Database) -> None:
    assert await insights.gaps() == []
    await db.execute("""
      update stream set covered_from = '2026-11-10Z' where source = 'completions';
      update stream set parked_reason = 'forbidden', covered_to = now() - interval '3 days' where source = 'costs';
      insert into connection (tenant_id, name, provider, base_url, credential, credential_key_id, credential_print, since)
        select id, 'fresh', 'anthropic', 'https://x.example', '', '', '', now() - interval '1 day' from tenant
    """)
    found = [(gap.connection, gap.source, gap.kind, gap.reason) for gap in await insights.gaps()]
    assert found == [
        ("fresh", None, "never_read", None),
        ("main", "completions", "history", None),
        ("main", "costs", "parked", "forbidden"),
        ("main", "costs", "stale", "forbidden"),
    ]
    assert await insights.gaps(tenant="nobody") == []


async def test_status_counts(insights: Insights, db: Database) -> None:
    await db.execute("insert into tick (slot_at, connections, batches) values ('2026-11-20T10:00Z', 1, 1)")
    status = await insights.status()
    assert (status.tenants, status.connections, status.unpriced_rows, status.dead_letters) == (1, {"active": 1}, 1, 0)
    assert [(tick.batches, tick.batches_done) for tick in status.ticks] == [(1, 0)]


@pytest.mark.parametrize(
    ("columns", "summaries", "done_in_time", "is_complete"),
    [
        # The deadline is ahead: open until all are done.
        ("deadline_at = now() + interval '1 h'", [], None, None),
        ("deadline_at = now() + interval '1 h', finished_at = now()", ["0", "0"], None, True),
        # It has passed, and no replica has judged the tick: counted here, as it would be.
        ("deadline_at = now() - interval '1 min'", ["2 min", "0"], 1, False),
        ("deadline_at = now() - interval '1 min', finished_at = now()", ["2 min", "3 min"], 2, True),
        # Judged: what was stored then holds, whatever is done since.
        ("deadline_at = now() - interval '1 min', done_in_time = 1, finished_at = now()", ["2 min", "3 min"], 1, False),
        # A tick of the version before.
        ("deadline_at = null, finished_at = now()", ["0", "0"], None, True),
        ("deadline_at = null", ["0"], None, None),
    ],
)
async def test_tick_is_complete_by_what_was_done_until_its_deadline(
    insights: Insights,
    db: Database,
    columns: str,
    summaries: list[str],
    done_in_time: int | None,
    is_complete: bool | None,
) -> None:
    await db.execute("insert into tick (slot_at, connections, batches, via) values ($1, 2, 2, 'fallback')", SLOT)
    await db.execute(f"update tick set {columns}")
    for job, ago in enumerate(summaries, start=1):
        await summarise(db, job, slot=SLOT, ago=ago)
    await summarise(db, 90, slot=SLOT, kind="poll_one")  # a retry is no batch
    (tick,) = (await insights.status()).ticks
    assert (tick.via, tick.batches, tick.batches_done) == ("fallback", 2, len(summaries))
    assert (tick.done_in_time, tick.is_complete) == (done_in_time, is_complete)


async def test_tick_is_complete_from_the_configured_ratio_on(insights: Insights, db: Database) -> None:
    await db.execute(
        "insert into tick (slot_at, connections, batches, deadline_at, done_in_time) values ($1, 9, 20, now(), 19)",
        SLOT,
    )
    for ratio, verdict in ((0.95, True), (0.96, False)):
        assert (await insights.status(complete_ratio=ratio)).ticks[0].is_complete is verdict


async def test_handed_over_batches_are_told_apart_by_what_released_them(insights: Insights, db: Database) -> None:
    await db.execute("insert into tick (slot_at, connections, batches) values ($1, 1, 6)", SLOT)
    await db.execute(
        """
        insert into handover (job_id, slot_at, place, message_id, published_at, released_at, released_by) values
          (1, $1, 1, 'm1', now(), now(), 'delivery'), (2, $1, 2, 'm2', now(), now(), 'delivery'),
          (3, $1, 3, 'm3', now(), now(), 'failure'), (4, $1, 4, null, null, now(), 'refusal'),
          (5, $1, 5, 'm5', now(), null, null), (6, $1, 6, null, null, null, null), (7, $1, 7, 'm7', now(), null, null),
          (8, $1 - interval '1 day', 1, 'old', now(), null, null)
        """,
        SLOT,
    )
    # 5 still waits for its first attempt; 6 is over; 7 ran at its deadline, and waits for another attempt.
    await db.execute("insert into due values (now() + interval '1 min', 0, 50, 5, 0, 0, 0), (now(), 0, 50, 7, 1, 0, 1)")
    status = await insights.status()
    assert status.handovers == (
        Handovers(SLOT, batches=7, published=5, delivery=2, failure=1, refusal=1, waiting=1, deadline=2),
    )


@pytest.mark.parametrize(("until", "is_paused"), [("1 hour", True), ("-1 second", False)])
async def test_running_pause_of_qstash_is_told(insights: Insights, db: Database, until: str, is_paused: bool) -> None:
    await db.execute(
        "insert into pause values ('qstash', '', now() + $1::text::interval, 'spent'), ('x', '', now() + interval '1 d', '')",
        until,
    )
    status = await insights.status()
    assert status.qstash_pause_reason == ("spent" if is_paused else None)
    assert (status.qstash_paused_s is not None and 3_500 < status.qstash_paused_s <= 3_600) is is_paused


async def test_every_law_holds_on_sound_rows(insights: Insights, db: Database) -> None:
    await db.execute("select ledger_make_partitions(array[now(), now() + interval '1 month'])")
    assert [(check.name, check.detail) for check in await insights.laws() if not check.is_ok] == []
    assert (await insights.clock_skew()).is_ok


@pytest.mark.parametrize(
    ("sql", "law", "detail"),
    [
        (
            "update usage_row set input_tokens = input_tokens + 1 where row_key = 'a'",
            "ledger equals rows",
            "acme/main completions: metric input_tokens, in_ledger 135, in_rows 136",
        ),
        ("update ledger set amount = 0.2 where row_key = 'd'", "ledger equals rows", "in_ledger 0.2, in_rows 0.1300"),
        ("delete from ledger where row_key = 'a' and revision = 2", "revisions contiguous", "row_key 61"),
        ("update usage_row set revision = 7 where row_key = 'c'", "revisions contiguous", "current 7"),
        ("delete from usage_row where row_key = 'b'", "revisions contiguous", "current None"),
        ("update bucket set totals[1] = 1", "bucket totals equal rows", "acme/main completions"),
        ("update bucket set total_amount = 1", "bucket totals equal rows", "acme/main costs"),
        ("delete from bucket", "bucket totals equal rows", "in_bucket None"),
        ("update grain_epoch set width = '1d'", "buckets within their grain", "bucket_start 2026-11-20T10:00:00Z"),
        ("update grain_epoch set start_at = '2026-11-21Z'", "buckets within their grain", "bucket_start"),
        ("update grain_epoch set group_by = array['model', 'user_id']", "buckets within their grain", "bucket_start"),
        ("update grain_epoch set group_by = array['model']", "buckets within their grain", "bucket_start"),
        ("select setval('poll_seq', 8)", "poll_seq ahead of every fence", "newest 9"),
        ("insert into job (kind, body) values ('poll', '')", "jobs in one state each", "states nowhere"),
        (
            "insert into due select now(), 0, 1, 77, 0, 0, 1",
            "jobs in one state each",
            "id 77, states due, has_job False",
        ),
        (
            """with j as (insert into job (kind, body) values ('poll', '') returning id),
               d as (insert into due select now(), 0, 1, id, 0, 0, 1 from j)
               insert into ready select 0, 1, now(), id, 0, 0, 1 from j""",
            "jobs in one state each",
            "states due, ready",
        ),
        (
            """with j as (insert into job (kind, body) values ('poll', '') returning id),
               f as (update ready_floor set at = '2')
               insert into ready select 0, 1, now(), id, 0, 0, 1, '1' from j""",
            "ready jobs above the floor",
            "born 1, floor 2",
        ),
        (
            "do $$ begin execute 'drop table ledger_' || to_char(now() at time zone 'UTC' + interval '1 month', 'YYYYMM'); end $$",
            "partitions made ahead",
            "name ledger_",
        ),
    ],
)
async def test_broken_law_is_named(insights: Insights, db: Database, sql: str, law: str, detail: str) -> None:
    await db.execute("select ledger_make_partitions(array[now(), now() + interval '1 month'])")
    await db.execute(sql)
    broken = {check.name: check for check in await insights.laws() if not check.is_ok}
    assert law in broken
    assert detail in broken[law].detail
    assert broken[law].fix
