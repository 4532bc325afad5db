-- The flush: lock the streams, take the buckets, read what is stored, book the difference. One transaction, READ
-- COMMITTED, one statement after the other: a statement that waited for a lock still reads its old snapshot, so old
-- values are read in a later one.

-- name: old_ledger_months
select c.relname as name, (to_date(right(c.relname, 6), 'YYYYMM') + interval '1 month') at time zone 'UTC' as until
from pg_inherits i join pg_class c on c.oid = i.inhrelid
where i.inhparent = 'ledger'::regclass
  and (to_date(right(c.relname, 6), 'YYYYMM') + interval '1 month') at time zone 'UTC' <= now() - $1::interval
order by 1

-- name: delete_rows_before
delete from usage_row where bucket_start < $1

-- name: delete_buckets_before
delete from bucket where bucket_start < $1

-- name: next_seqs
select nextval('poll_seq') from generate_series(1, $1)

-- name: lock_streams
select id, last_seq, last_start, last_end, now() as now
from stream where id = any($1::bigint[]) order by id for update

-- name: epochs_of
select stream_id, start_at, grain_id, api, width, group_by
from grain_epoch where stream_id = any($1::bigint[]) order by stream_id, start_at

-- name: take_buckets
-- Locks and fences every bucket in order. What comes back is ours to judge: a bucket with an answer as new or newer, or
-- written by newer code, is left alone and not returned. An empty bucket that was never seen gets no row.
with asked as (
  select * from unnest($1::bigint[], $2::timestamptz[], $3::bigint[], $4::boolean[])
    as a(stream_id, bucket_start, seq, has_rows)
)
insert into bucket (stream_id, bucket_start, last_seq, hash_version, digest, totals)
select a.stream_id, a.bucket_start, a.seq, $5::smallint, ''::bytea, '{0,0,0,0,0}'
from asked a
where a.has_rows or exists (
  select from bucket b where b.stream_id = a.stream_id and b.bucket_start = a.bucket_start)
order by a.stream_id, a.bucket_start
on conflict (stream_id, bucket_start) do update set last_seq = excluded.last_seq
  where bucket.last_seq < excluded.last_seq and bucket.hash_version <= excluded.hash_version
returning stream_id, bucket_start, hash_version, digest, pending_since, pending_keys, (xmax = 0) as is_new

-- name: stored_rows
select r.stream_id, r.bucket_start, r.row_key, r.content_hash, r.is_tombstone
from unnest($1::bigint[], $2::timestamptz[]) as b(stream_id, bucket_start)
join usage_row r using (stream_id, bucket_start)

-- name: book_rows
with given as (
  select * from unnest(
    $1::bigint[], $2::bigint[], $3::timestamptz[], $4::bytea[], $5::bytea[], $6::text[], $7::bigint[], $8::bigint[],
    $9::bigint[], $10::bigint[], $11::bigint[], $12::numeric[], $13::text[], $14::numeric[], $15::text[], $16::text[],
    $17::text[], $18::text[], $19::smallint[], $20::bigint[])
    as g(tenant_id, stream_id, bucket_start, row_key, content_hash, dims, input_tokens, cache_read_tokens,
         cache_write_tokens, output_tokens, requests, quantity, unit, amount, currency, basis,
         rate_version, detail, kind, seq)
), paired as materialized (
  select g.*, coalesce(o.revision, 0) + 1 as revision, o.input_tokens as o_input, o.cache_read_tokens as o_cache_read,
    o.cache_write_tokens as o_cache_write, o.output_tokens as o_output, o.requests as o_requests,
    o.quantity as o_quantity, o.amount as o_amount
  from given g left join lateral (
    -- LIMIT keeps this a look-up by key: a hash join would read the whole table as long as it is small.
    select r.* from usage_row r
    where r.stream_id = g.stream_id and r.bucket_start = g.bucket_start and r.row_key = g.row_key limit 1
  ) o on true
), booked as (
  insert into ledger (tenant_id, bucket_start, row_key, revision, stream_id, poll_seq, kind, input_tokens,
    cache_read_tokens, cache_write_tokens, output_tokens, requests, quantity, amount)
  select tenant_id, bucket_start, row_key, revision, stream_id, seq, kind,
    case when num_nonnulls(input_tokens, o_input) > 0 then coalesce(input_tokens, 0) - coalesce(o_input, 0) end,
    case when num_nonnulls(cache_read_tokens, o_cache_read) > 0
      then coalesce(cache_read_tokens, 0) - coalesce(o_cache_read, 0) end,
    case when num_nonnulls(cache_write_tokens, o_cache_write) > 0
      then coalesce(cache_write_tokens, 0) - coalesce(o_cache_write, 0) end,
    case when num_nonnulls(output_tokens, o_output) > 0 then coalesce(output_tokens, 0) - coalesce(o_output, 0) end,
    case when num_nonnulls(requests, o_requests) > 0 then coalesce(requests, 0) - coalesce(o_requests, 0) end,
    case when num_nonnulls(quantity, o_quantity) > 0 then coalesce(quantity, 0) - coalesce(o_quantity, 0) end,
    case when num_nonnulls(amount, o_amount) > 0 then coalesce(amount, 0) - coalesce(o_amount, 0) end
  from paired
)
insert into usage_row (tenant_id, stream_id, bucket_start, row_key, revision, content_hash, dims, input_tokens,
  cache_read_tokens, cache_write_tokens, output_tokens, requests, quantity, unit, amount, currency, basis,
  rate_version, detail)
select tenant_id, stream_id, bucket_start, row_key, revision, content_hash, dims::jsonb, input_tokens,
  cache_read_tokens, cache_write_tokens, output_tokens, requests, quantity, unit, amount, currency, basis,
  rate_version, detail::jsonb
from paired
on conflict (stream_id, bucket_start, row_key) do update set
  revision = excluded.revision, content_hash = excluded.content_hash, is_tombstone = false,
  input_tokens = excluded.input_tokens, cache_read_tokens = excluded.cache_read_tokens,
  cache_write_tokens = excluded.cache_write_tokens, output_tokens = excluded.output_tokens,
  requests = excluded.requests, quantity = excluded.quantity, unit = excluded.unit, amount = excluded.amount,
  currency = excluded.currency, basis = excluded.basis, rate_version = excluded.rate_version, detail = excluded.detail

-- name: book_vanished
-- Books each key down to zero; what the provider never reported stays null.
with gone as (
  select r.* from unnest($1::bigint[], $2::timestamptz[], $3::bytea[]) as g(stream_id, bucket_start, row_key)
  join usage_row r using (stream_id, bucket_start, row_key) where not r.is_tombstone
), booked as (
  insert into ledger (tenant_id, bucket_start, row_key, revision, stream_id, poll_seq, kind, input_tokens,
    cache_read_tokens, cache_write_tokens, output_tokens, requests, quantity, amount)
  select tenant_id, bucket_start, row_key, revision + 1, stream_id, b.last_seq, 3, -input_tokens, -cache_read_tokens,
    -cache_write_tokens, -output_tokens, -requests, -quantity, -amount
  from gone join bucket b using (stream_id, bucket_start)
)
update usage_row r set revision = g.revision + 1, is_tombstone = true, content_hash = ''::bytea,
  input_tokens = g.input_tokens * 0, cache_read_tokens = g.cache_read_tokens * 0,
  cache_write_tokens = g.cache_write_tokens * 0, output_tokens = g.output_tokens * 0, requests = g.requests * 0,
  quantity = g.quantity * 0, amount = g.amount * 0
from gone g
where r.stream_id = g.stream_id and r.bucket_start = g.bucket_start and r.row_key = g.row_key

-- name: note_bookings
insert into booking (poll_seq, job_id) select unnest($1::bigint[]), $2 on conflict do nothing

-- name: write_buckets
update bucket b set digest = g.digest, hash_version = $13::smallint,
  totals = array[g.input_tokens, g.cache_read_tokens, g.cache_write_tokens, g.output_tokens, g.requests],
  total_quantity = g.quantity, total_amount = g.amount, pending_since = g.pending_since, changed_at = now(),
  pending_keys = case when g.pending_keys = '' then null else string_to_array(g.pending_keys, ',')::bytea[] end
from unnest($1::bigint[], $2::timestamptz[], $3::bytea[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[],
  $8::bigint[], $9::numeric[], $10::numeric[], $11::timestamptz[], $12::text[])
  as g(stream_id, bucket_start, digest, input_tokens, cache_read_tokens, cache_write_tokens, output_tokens, requests,
       quantity, amount, pending_since, pending_keys)
where b.stream_id = g.stream_id and b.bucket_start = g.bucket_start

-- name: sum_pending_buckets
-- A bucket that withholds rows sums what is stored, not what was read.
update bucket b set totals = s.totals, total_quantity = s.quantity, total_amount = s.amount
from (
  select r.stream_id, r.bucket_start,
    array[coalesce(sum(r.input_tokens), 0), coalesce(sum(r.cache_read_tokens), 0),
          coalesce(sum(r.cache_write_tokens), 0), coalesce(sum(r.output_tokens), 0),
          coalesce(sum(r.requests), 0)]::bigint[] as totals,
    coalesce(sum(r.quantity), 0) as quantity,
    coalesce(sum(r.amount) filter (where r.basis = 'provider'), 0) as amount
  from unnest($1::bigint[], $2::timestamptz[]) as g(stream_id, bucket_start)
  join usage_row r using (stream_id, bucket_start)
  group by 1, 2
) s
where b.stream_id = s.stream_id and b.bucket_start = s.bucket_start

-- name: end_streams
-- An attempt that is older than what the stream has taken leaves fence, cursors and stamps alone.
update stream s set
  last_seq = g.seq, last_start = g.last_start, last_end = g.last_end,
  covered_from = least(s.covered_from, g.covered_from), covered_to = greatest(s.covered_to, g.covered_to),
  floor_at = greatest(s.floor_at, g.floor_at), last_pages = coalesce(g.pages, s.last_pages),
  probe_digest = coalesce(g.probe_digest, s.probe_digest),
  read_at = now(), hourly_at = case when g.is_hourly then now() else s.hourly_at end,
  daily_at = case when g.is_daily then now() else s.daily_at end,
  parked_reason = null
from unnest($1::bigint[], $2::bigint[], $3::timestamptz[], $4::timestamptz[], $5::timestamptz[], $6::timestamptz[],
  $7::timestamptz[], $8::int[], $9::bytea[], $10::boolean[], $11::boolean[])
  as g(id, seq, last_start, last_end, covered_from, covered_to, floor_at, pages, probe_digest, is_hourly, is_daily)
where s.id = g.id and s.last_seq <= g.seq

-- name: raise_fences
update stream s set last_seq = g.seq from unnest($1::bigint[], $2::bigint[]) as g(id, seq)
where s.id = g.id and s.last_seq < g.seq

-- name: stamp_news
-- What changed wakes the followers of a cost report, and snaps its connection back to the first rung of the idle ladder,
-- where it is on that.
with news as (
  update stream set changed_at = now() where id = any($1::bigint[]) returning connection_id
), mine as materialized (
  select c.id from connection c where c.id in (select connection_id from news) order by c.id for update
)
update connection c set changed_at = now(),
  next_due_at = case when c.settings ? 'every_s' then c.next_due_at else least(c.next_due_at, now()) end
from mine m where m.id = c.id

-- name: close_streams
-- The poll_one that had the stream to itself is over.
update stream set open_job = null where open_job = $1

-- name: open_streams
update stream s set open_job = g.job from unnest($1::bigint[], $2::bigint[]) as g(id, job) where s.id = g.id

-- name: dead_letters_of
select s.id, s.dead_job from stream s join dead d on d.id = s.dead_job where s.id = any($1::bigint[])

-- name: remember_dead
update stream s set dead_job = g.job from unnest($1::bigint[], $2::bigint[]) as g(id, job) where s.id = g.id

-- name: park_streams
update stream s set parked_reason = g.reason, read_at = now()
from unnest($1::bigint[], $2::text[]) as g(id, reason) where s.id = g.id

-- name: end_connections
-- A 401 parks a connection; a turn with answers and without a 401 un-parks it. Neither says anything about a key that was
-- set meanwhile, nor about a pause. The state is judged in SET, which sees what was committed before we got the lock.
with mine as materialized (
  select c.id from connection c where c.id = any($1::bigint[]) order by c.id for update
), given as (
  select *, case when reason is not null then 'parked' when is_proven then 'active' end as told
  from unnest($1::bigint[], $2::boolean[], $3::text[], $4::bytea[]) as g(id, is_proven, reason, sealed)
)
update connection c set
  polled_at = now(), open_job = case when c.open_job = $5 then null else c.open_job end,
  state = case when c.state in ('active', 'parked') and coalesce(g.sealed = c.credential, true)
               then coalesce(g.told, c.state) else c.state end,
  state_reason = case when c.state in ('active', 'parked') and coalesce(g.sealed = c.credential, true)
                        and g.told is not null then g.reason else c.state_reason end,
  state_at = case when c.state in ('active', 'parked') and coalesce(g.sealed = c.credential, true)
                    and g.told <> c.state then now() else c.state_at end
from given g, mine m where g.id = c.id and m.id = c.id

-- name: make_partitions
select ledger_make_partitions($1::timestamptz[])

-- name: lock_tick
-- Two batches that end at once would else not see each other's summary, and neither would finish the tick.
select 1 from tick where slot_at = $1 for update

-- name: write_summary
with s as (
  insert into batch_summary (job_id, slot_at, kind, connections, unchanged, stored, restated, retried, dead, requests,
    requests_saved, rows, duration_s, request_id, items)
  values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
  on conflict (job_id) do update set finished_at = now(), unchanged = excluded.unchanged, stored = excluded.stored,
    restated = excluded.restated, retried = excluded.retried, dead = excluded.dead, requests = excluded.requests,
    requests_saved = excluded.requests_saved, rows = excluded.rows, duration_s = excluded.duration_s,
    items = excluded.items
)
update tick set finished_at = now()
where slot_at = $2 and $3 = 'poll' and finished_at is null
  and batches <= 1 + (select count(*) from batch_summary b where b.slot_at = $2 and b.kind = 'poll' and b.job_id <> $1)
