"""Building blocks for tests of what follows ticks and jobs: rows written by hand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from daemon.db.pool import Database

SLOT = datetime(2026, 11, 20, 10, tzinfo=UTC)
MADE = datetime(2026, 11, 20, 10, 0, 1, tzinfo=UTC)


def after(seconds: float) -> datetime:
    return MADE + timedelta(seconds=seconds)


# Of one tick: batch 11 is done, 12 runs, 13 tries one source again, 14 came of a split batch. 20 is of another tick.
TICK = f"""
  insert into tenant (name) values ('acme');
  insert into connection (tenant_id, name, provider, base_url, credential, credential_key_id, credential_print, since)
    values (1, 'main', 'openai', '', '', '', '', now());
  insert into stream (tenant_id, connection_id, source) values (1, 1, 'completions'), (1, 1, 'costs');
  select ledger_make_partitions(array['2026-11-20'::timestamptz]);
  insert into tick (slot_at, created_at, connections, batches, via, request_id, deadline_at)
    values ('{SLOT}', '{MADE}', 9, 2, 'qstash', 'req-1', '{after(300)}');
  insert into delivery values ('msg-1', '{SLOT}', '{MADE}'), ('msg-2', '{SLOT}', '{after(2)}');
  insert into job (id, kind, created_at, body) overriding system value values (12, 'poll', '{MADE}', '{{"connections":[1]}}');
  insert into lease (id, token, attempt, losses, worker, key_id, prio, lease_until) values (12, 1, 1, 0, 1, 0, 1, now());
  insert into batch_summary (job_id, slot_at, kind, finished_at, connections, unchanged, stored, restated, retried, dead,
    requests, requests_saved, rows, duration_s, request_id) values
    (11, '{SLOT}', 'poll', '{after(10)}', 1, 0, 2, 0, 1, 0, 5, 0, 6, 9.5, 'req-1'),
    (13, '{SLOT}', 'poll_one', '{after(60)}', 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 'req-1'),
    (14, null, 'poll', '{after(90)}', 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 'req-1'),
    (20, '{SLOT}'::timestamptz - interval '5 min', 'poll', '{after(9)}', 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 'req-0');
  insert into handover values (11, '{SLOT}', 1, 'm-11', '{after(1)}', '{after(2)}', 'delivery', '{after(3)}', 200);
  insert into handover values (12, '{SLOT}', 2);
  insert into attempt (at, id, attempt, worker, outcome, took_ms, note) values
    (now() - interval '1 min', 11, 1, 3, 2, 50, 'first'), (now(), 11, 2, 3, 1, 60, null);
  insert into booking values (5, 11, '{after(5)}'), (6, 11, '{after(6)}'), (7, 12, '{after(6)}'), (8, 20, '{after(6)}');
  insert into ledger (tenant_id, bucket_start, row_key, revision, stream_id, poll_seq, booked_at, kind, amount) values
    (1, '{SLOT}', 'a', 1, 1, 5, '{after(5)}', 1, 0.10), (1, '{SLOT}', 'b', 1, 1, 5, '{after(5)}', 1, null),
    (1, '{SLOT}', 'c', 1, 1, 5, '{after(9)}', 1, 0.0230), (1, '{SLOT}', 'd', 3, 1, 5, '{after(9)}', 3, -0.02),
    (1, '{SLOT}', 'a', 2, 2, 6, '{after(6)}', 2, -1), (1, '{SLOT}', 'e', 1, 2, 6, '{after(6)}', 1, 7),
    (1, '{SLOT}', 'f', 1, 2, 6, '{after(6)}', 4, 0.5),
    (1, '{SLOT}', 'g', 1, 1, 7, '{after(6)}', 1, 3), (1, '{SLOT}', 'h', 1, 1, 8, '{after(6)}', 1, 100);
  insert into usage_row (tenant_id, stream_id, bucket_start, row_key, revision, content_hash, dims, amount, currency,
    basis, detail)
    select tenant_id, stream_id, bucket_start, row_key, 1, '', '{{}}', 0,
      case row_key when 'b' then null when 'e' then 'EUR' else 'USD' end,
      case when row_key = 'f' then 'local' when stream_id = 2 then 'provider' else 'local' end, '{{}}' from ledger;
"""


async def add_job(db: Database, kind: str = "poll", body: bytes = b"{}", key: int = 0) -> int:
    found: int = await db.fetchval(
        "insert into job (kind, key_id, body) values ($1, $3, $2) returning id", kind, body, key
    )
    return found


async def summarise(db: Database, job: int, *, slot: datetime | None, ago: str = "0", kind: str = "poll") -> None:
    await db.execute(
        "insert into batch_summary (job_id, slot_at, kind, finished_at, connections, unchanged, stored, restated, retried, "
        "dead, requests, requests_saved, rows, duration_s) values "
        "($1, $2, $3, now() - $4::text::interval, 1, 2, 3, 0, 0, 0, 4, 0, 0, 0.5)",
        job,
        slot,
        kind,
        ago,
    )
