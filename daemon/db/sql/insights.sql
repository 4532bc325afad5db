-- The reads that the command line, and later the web and the metrics, share. `usage` and `spend` are built in
-- insights.py, since their grouping is chosen by the caller.

-- name: insights_horizon
-- A flush books at the start of its transaction, so no past before the oldest open one can change any more. Those
-- that have written nothing for a minute are reports and dumps: a flush locks its lease at once, or gives up.
select least(clock_timestamp(), min(a.xact_start)) as horizon
from pg_stat_activity a
where a.datname = current_database() and a.pid <> pg_backend_pid() and a.backend_type = 'client backend'
  and a.xact_start is not null
  and (a.backend_xid is not null or a.xact_start > clock_timestamp() - interval '1 minute')

-- name: insights_unpriced
select coalesce(r.dims ->> 'model', r.detail ->> 'model') as model, count(*) as rows
from usage_row r
where r.rate_version = 'unpriced' and not r.is_tombstone
  and ($1::timestamptz is null or r.bucket_start >= $1) and ($2::timestamptz is null or r.bucket_start < $2)
group by 1 order by 2 desc

-- name: insights_gaps
-- What was never read (a connection without streams, history not reached yet), what is parked, what has grown old.
with s as (
  select t.name as tenant, c.name as connection, c.provider, st.source, c.state, c.state_reason, st.parked_reason,
    st.read_at, st.covered_from, st.covered_to, greatest(c.since, st.floor_at) as wanted_from, st.id
  from connection c join tenant t on t.id = c.tenant_id
  left join stream st on st.connection_id = c.id
  where c.state <> 'archived' and ($1::text is null or t.name = $1)
)
select tenant, connection, provider, source, 'parked' as kind, null::timestamptz as from_at, null::timestamptz as to_at,
  parked_reason as reason
from s where parked_reason is not null
union all
select distinct tenant, connection, provider, null, 'parked', null::timestamptz, null::timestamptz, state_reason
from s where state = 'parked'
union all
select tenant, connection, provider, source, case when state = 'paused' then 'paused' else 'never_read' end,
  wanted_from, date_trunc('hour', now(), 'UTC'), state_reason
from s where covered_from is null and parked_reason is null and state <> 'parked' and wanted_from < now()
union all
select tenant, connection, provider, source, 'history', wanted_from, covered_from, null
from s where covered_from > wanted_from
union all
select tenant, connection, provider, source, 'stale', covered_to, date_trunc('hour', now(), 'UTC'),
  coalesce(parked_reason, state_reason)
from s where covered_to < now() - $2::interval or (covered_to is not null and read_at < now() - $2::interval)
order by 1, 2, 4 nulls first, 5

-- name: insights_ticks
-- The newest, or the one of slot $2. A tick that no replica has judged yet is counted as it would be.
select t.slot_at, t.created_at, t.via, t.request_id, t.connections, t.batches, t.deadline_at, t.finished_at,
  b.done as batches_done, coalesce(t.done_in_time, case when t.deadline_at <= now() then b.in_time end) as done_in_time
from tick t cross join lateral (
  select count(*) as done, count(*) filter (where finished_at <= t.deadline_at) as in_time
  from batch_summary where slot_at = t.slot_at and kind = 'poll') b
where $2::timestamptz is null or t.slot_at = $2
order by t.slot_at desc limit $1

-- name: insights_handovers
-- A batch that nothing has released waits in `due` until its deadline, and then runs without QStash. One that ran and
-- waits for another attempt has been counted: see `attempt`.
select h.slot_at, count(*) as batches, count(h.message_id) as published,
  count(*) filter (where h.released_by = 'delivery') as delivery,
  count(*) filter (where h.released_by = 'failure') as failure,
  count(*) filter (where h.released_by = 'refusal') as refusal,
  count(*) filter (where h.released_at is null and d.waits) as waiting,
  count(*) filter (where h.released_at is null and not d.waits) as deadline
from handover h
cross join lateral (select exists (select from due where id = h.job_id and attempt = 0) as waits) d
where h.slot_at = any($1::timestamptz[])
group by 1 order by 1 desc

-- name: insights_status
select now() as now,
  (select count(*) from tenant where removed_at is null) as tenants,
  (select coalesce(json_object_agg(state, n), '{}')::text
     from (select state, count(*) as n from connection group by 1) x) as connections,
  (select count(*) from stream where parked_reason is not null) as parked_sources,
  (select count(*) from dead) as dead_letters,
  (select count(*) from usage_row where rate_version = 'unpriced') as unpriced_rows,
  (select extract(epoch from now() - min(greatest(polled_at, state_at)))::float8
     from connection where state = 'active' and next_due_at < now()) as lag_s,
  (select count(*) from connection where state = 'active' and next_due_at < now() and open_job is null) as due,
  (select count(*) from worker where stopped_at is null and seen_at > now() - interval '30 seconds') as replicas,
  (select extract(epoch from until - now())::float8 from pause where host = 'qstash' and org = '' and until > now())
    as qstash_paused_s,
  (select reason from pause where host = 'qstash' and org = '' and until > now()) as qstash_pause_reason

-- name: insights_replicas
-- Those that beat, and those that fell silent not long ago. Small tables: `worker` is pruned, a lease is a running job.
select w.id as worker, w.info, extract(epoch from now() - w.seen_at)::float8 as beat_s,
  extract(epoch from now() - w.started_at)::float8 as up_s, coalesce(l.jobs, 0) as running
from worker w left join (select worker, count(*) as jobs from lease group by 1) l on l.worker = w.id
where w.stopped_at is null and w.seen_at > now() - interval '10 minutes'
order by w.id limit $1

-- name: insights_running
-- Those that run longest. Only the body of a poll is read: it names connections by their ids, and holds no secret.
select l.id, j.kind, l.key_id, t.name as tenant, l.attempt, l.worker,
  extract(epoch from now() - l.claimed_at)::float8 as running_s,
  case when j.kind in ('poll', 'poll_one') then j.body end as body
from lease l join job j using (id) left join tenant t on t.id = l.key_id
order by l.claimed_at, l.id limit $1

-- name: insights_queue
-- At most $1 rows of each state table are looked at, since the kind stands in `job`, which is large when they are.
select j.kind, s.state, count(*) as jobs
from (
  (select id, 'available' as state from ready limit $1)
  union all (select id, case when attempt = 0 then 'scheduled' else 'retryable' end from due limit $1)
  union all (select id, 'running' from lease limit $1)
  union all (select id, 'discarded' from dead limit $1)) s
join job j using (id)
group by 1, 2 order by 1, 2

-- name: insights_settled
-- Attempts of the last $1, by whole minutes ago. The log has no index by time, which each settle would pay for: it is
-- only ever appended to, so its newest lines stand in the last $2 blocks of this week's partition, and, early on a
-- Monday, of last week's. `reached_at` is the oldest line in those of this week, null when they are all of it.
with w as materialized (
  select monday, greatest(0, pg_relation_size(to_regclass('attempt_' || to_char(monday at time zone 'UTC', 'YYYYMMDD')))
    / current_setting('block_size')::int - $2::int) as head
  from (values (date_trunc('week', now(), 'UTC')), (date_trunc('week', now() - interval '7 days', 'UTC'))) v(monday)),
a as (
  select at, worker, outcome from attempt
  where at >= greatest(now() - $1::interval, date_trunc('week', now(), 'UTC'))
    and at < date_trunc('week', now() + interval '7 days', 'UTC')
    and ctid >= (select format('(%s,0)', head)::tid from w order by monday desc limit 1)
  union all
  select at, worker, outcome from attempt
  where at >= now() - $1::interval and at < date_trunc('week', now(), 'UTC')
    and at >= date_trunc('week', now() - interval '7 days', 'UTC')
    and ctid >= (select format('(%s,0)', head)::tid from w order by monday limit 1))
select floor(extract(epoch from greatest(interval '0', now() - at)) / 60)::int as minutes_ago, worker, outcome,
  count(*) as jobs,
  (select at from attempt
   where at >= date_trunc('week', now(), 'UTC') and at < date_trunc('week', now() + interval '7 days', 'UTC')
     and (select head from w order by monday desc limit 1) > 0
     and ctid >= (select format('(%s,0)', head)::tid from w order by monday desc limit 1)
   limit 1) as reached_at
from a group by 1, 2, 3

-- name: insights_failures
-- Found as `insights_settled` finds its lines.
with w as materialized (
  select monday, greatest(0, pg_relation_size(to_regclass('attempt_' || to_char(monday at time zone 'UTC', 'YYYYMMDD')))
    / current_setting('block_size')::int - $2::int) as head
  from (values (date_trunc('week', now(), 'UTC')), (date_trunc('week', now() - interval '7 days', 'UTC'))) v(monday)),
a as (
  select at, id, attempt, worker, outcome, took_ms, note from attempt
  where at >= greatest(now() - $1::interval, date_trunc('week', now(), 'UTC')) and outcome in (2, 4, 9)
    and at < date_trunc('week', now() + interval '7 days', 'UTC')
    and ctid >= (select format('(%s,0)', head)::tid from w order by monday desc limit 1)
  union all
  select at, id, attempt, worker, outcome, took_ms, note from attempt
  where at >= now() - $1::interval and at < date_trunc('week', now(), 'UTC') and outcome in (2, 4, 9)
    and at >= date_trunc('week', now() - interval '7 days', 'UTC')
    and ctid >= (select format('(%s,0)', head)::tid from w order by monday limit 1)),
newest as materialized (select * from a order by at desc, id desc limit $3)
select n.at, n.id as job, coalesce(j.kind, b.kind) as kind, n.attempt, n.outcome, n.worker, n.took_ms, left(n.note, 500) as note
from newest n left join job j using (id) left join batch_summary b on b.job_id = n.id
order by n.at desc, n.id desc

-- name: insights_tick_of_request
-- No index: a table of one line a slot, and a question that a person asks.
select slot_at from tick where request_id = $1 order by slot_at desc limit 1

-- name: insights_slot_of_message
select slot_at from delivery where message_id = $1

-- name: insights_deliveries
-- The messages that asked for a slot; the first made its tick. Three days of them are kept, so there is no index.
select message_id, at from delivery where slot_at = $1 order by at, message_id limit $2

-- name: insights_batches
-- The jobs of a tick (slot $1, made at $2, for the request $3), or those named in $4; $5 at most, the oldest first.
-- Open ones are found by the instant that they share with their tick; `job` only holds what is not finished. Those that
-- a batch was split into belong to no slot, and are found by their request.
with ids as (
  select job_id as id from batch_summary where slot_at = $1::timestamptz
  union select job_id from handover where slot_at = $1::timestamptz
  union select id from job where created_at = $2::timestamptz and kind = 'poll'
  union select job_id from batch_summary
    where request_id = $3::text and finished_at >= $2::timestamptz and finished_at < $2::timestamptz + interval '1 day'
  union select id from unnest($4::bigint[]) as g(id)),
named as (
  select i.id from ids i
  where exists (select from job where id = i.id) or exists (select from batch_summary where job_id = i.id)
    or exists (select from booking where job_id = i.id) or exists (select from handover where job_id = i.id)
    or exists (select from attempt where id = i.id)),
chosen as materialized (select id, count(*) over () as total from named order by id limit $5)
select c.total, c.id, coalesce(j.kind, b.kind) as kind, coalesce(
    case when exists (select from ready where id = c.id) then 'available' end,
    (select case when attempt = 0 then 'scheduled' else 'retryable' end from due where id = c.id),
    case when exists (select from lease where id = c.id) then 'running' end,
    case when exists (select from dead where id = c.id) then 'discarded' end,
    case (select outcome from attempt where id = c.id order by at desc limit 1)
      when 5 then 'cancelled' when 1 then 'completed' end,
    case when b.job_id is not null then 'completed' else 'gone' end) as state,
  coalesce(b.slot_at, h.slot_at) as slot_at, b.request_id, case when j.kind in ('poll', 'poll_one') then j.body end as body,
  b.finished_at, b.connections, b.unchanged, b.stored, b.restated, b.retried, b.dead, b.requests, b.rows, b.duration_s,
  h.place, h.message_id, h.published_at, h.released_at, h.released_by, h.reported_at, h.reported_status
from chosen c left join job j using (id) left join batch_summary b on b.job_id = c.id
left join handover h on h.job_id = c.id
order by c.id

-- name: insights_attempts
select at, attempt, outcome, worker, took_ms, left(note, 500) as note from attempt where id = $1 order by at desc limit $2

-- name: insights_job_of_seq
select job_id from booking where poll_seq = $1

-- name: insights_reads
-- The reads that booked something, of these jobs or (with $2) that one alone. A read is booked in one flush or in a few
-- that follow it, all before its job ended; no job runs for more than an hour.
select count(*) over () as total, k.poll_seq, k.job_id, k.booked_at,
  least(case when exists (select from job where id = k.job_id) then now() else coalesce(b.finished_at, now()) end,
        k.booked_at + interval '1 hour') as until
from booking k left join batch_summary b on b.job_id = k.job_id
where k.job_id = any($1::bigint[]) and ($2::bigint is null or k.poll_seq = $2)
order by k.poll_seq limit $3

-- name: insights_bookings
-- What these reads booked. The ledger has no index by read, so it is found by when it was booked.
select l.poll_seq, t.name as tenant, c.name as connection, c.provider, s.source, r.currency, r.basis,
  count(*) filter (where l.kind = 1) as new, count(*) filter (where l.kind = 2) as restated,
  count(*) filter (where l.kind = 3) as vanished, count(*) filter (where l.kind = 4) as repriced,
  trim_scale(sum(l.amount)) as amount
from ledger l join usage_row r using (stream_id, bucket_start, row_key)
join stream s on s.id = l.stream_id join connection c on c.id = s.connection_id join tenant t on t.id = c.tenant_id
where l.booked_at >= $2 and l.booked_at <= $3 and l.poll_seq = any($1::bigint[])
group by l.poll_seq, t.name, c.name, c.provider, s.source, r.currency, r.basis
order by 1, 2, 3, 5, 6 nulls last, 7

-- name: law_ledger_equals_rows
-- One statement, hence one snapshot: two would show differences that are none. By-month pruning does not help here.
with l as (
  select stream_id, sum(input_tokens) as input_tokens, sum(cache_read_tokens) as cache_read_tokens,
    sum(cache_write_tokens) as cache_write_tokens, sum(output_tokens) as output_tokens, sum(requests) as requests,
    sum(quantity) as quantity, sum(amount) as amount
  from ledger group by 1
), r as (
  select stream_id, sum(input_tokens) as input_tokens, sum(cache_read_tokens) as cache_read_tokens,
    sum(cache_write_tokens) as cache_write_tokens, sum(output_tokens) as output_tokens, sum(requests) as requests,
    sum(quantity) as quantity, sum(amount) as amount
  from usage_row group by 1
)
select stream_id, m.metric, m.in_ledger, m.in_rows
from l full join r using (stream_id)
cross join lateral (values
  ('input_tokens', l.input_tokens, r.input_tokens), ('cache_read_tokens', l.cache_read_tokens, r.cache_read_tokens),
  ('cache_write_tokens', l.cache_write_tokens, r.cache_write_tokens),
  ('output_tokens', l.output_tokens, r.output_tokens), ('requests', l.requests, r.requests),
  ('quantity', l.quantity, r.quantity), ('amount', l.amount, r.amount)) as m(metric, in_ledger, in_rows)
where coalesce(m.in_ledger, 0) <> coalesce(m.in_rows, 0)
order by 1, 2 limit 20

-- name: law_revisions_contiguous
select stream_id, encode(row_key, 'hex') as row_key, bucket_start, l.revisions, l.newest, r.revision as current
from (
  select stream_id, bucket_start, row_key, count(*) as revisions, min(revision) as oldest, max(revision) as newest
  from ledger group by 1, 2, 3
) l full join usage_row r using (stream_id, bucket_start, row_key)
where l.oldest is distinct from 1 or l.newest is distinct from l.revisions or l.newest is distinct from r.revision
limit 20

-- name: law_bucket_totals
with r as (
  select stream_id, bucket_start,
    array[coalesce(sum(input_tokens), 0), coalesce(sum(cache_read_tokens), 0), coalesce(sum(cache_write_tokens), 0),
          coalesce(sum(output_tokens), 0), coalesce(sum(requests), 0)]::bigint[] as totals,
    coalesce(sum(quantity), 0) as quantity, coalesce(sum(amount) filter (where basis = 'provider'), 0) as amount
  from usage_row group by 1, 2
)
select stream_id, bucket_start, b.totals as in_bucket, r.totals as in_rows
from bucket b full join r using (stream_id, bucket_start)
where coalesce(b.totals, '{0,0,0,0,0}') <> coalesce(r.totals, '{0,0,0,0,0}')
  or coalesce(b.total_quantity, 0) <> coalesce(r.quantity, 0) or coalesce(b.total_amount, 0) <> coalesce(r.amount, 0)
  or b.stream_id is null
limit 20

-- name: law_grain_epochs
-- Every bucket lies on the grid of the epoch that owns it, and its living rows carry that epoch's dimensions. (Money
-- is cut by its currency besides, whatever was asked for.)
with owned as (
  select b.stream_id, b.bucket_start, e.group_by,
    case e.width when '1m' then 60 when '1h' then 3600 when '1d' then 86400 end as width_s
  from bucket b left join lateral (
    select * from grain_epoch e where e.stream_id = b.stream_id and e.start_at <= b.bucket_start
    order by e.start_at desc limit 1
  ) e on true
)
select o.stream_id, o.bucket_start
from owned o
where o.width_s is null or extract(epoch from o.bucket_start) % o.width_s <> 0
  or exists (
    select from usage_row r
    where r.stream_id = o.stream_id and r.bucket_start = o.bucket_start and not r.is_tombstone
      and (not r.dims ?& o.group_by
           or exists (select from jsonb_object_keys(r.dims) k where k <> all(o.group_by || 'currency'::text))))
limit 20

-- name: law_poll_seq
-- A copy of the database can lose a sequence; then every answer would look old and be refused.
select s.issued, m.newest
from (select case when is_called then last_value else last_value - 1 end as issued from poll_seq) s
cross join (select greatest((select max(last_seq) from stream), (select max(last_seq) from bucket)) as newest) m
where m.newest > s.issued

-- name: law_ids
-- The same for the numbers of rows: new ones would take those of old ones.
with m(name, newest) as (values
  ('tenant_id_seq', (select max(id) from tenant)),
  ('connection_id_seq', (select max(id) from connection)),
  ('stream_id_seq', (select max(id) from stream)),
  ('worker_id_seq', greatest((select max(id) from worker), (select max(worker) from lease))),
  ('job_id_seq', greatest(
    (select max(id) from job), (select max(id) from attempt), (select max(job_id) from batch_summary))))
select name as sequence, coalesce(pg_sequence_last_value(name::regclass), 0) as issued, newest from m
where newest > coalesce(pg_sequence_last_value(name::regclass), 0) order by 1

-- name: law_jobs_conserved
-- A job stands in exactly one state table, and nothing stands there without its job.
select id, coalesce(string_agg(state, ', ' order by state), 'nowhere') as states, j.id is not null as has_job
from job j full join (
  select id, 'ready' as state from ready union all select id, 'due' from due
  union all select id, 'lease' from lease union all select id, 'dead' from dead
) s using (id)
group by id, j.id
having count(s.state) <> 1 or j.id is null
limit 20

-- name: law_ready_floor
-- A row below the floor is never claimed. Only one that was copied here from another server can be there.
select id, born::text as born, at::text as floor from ready join ready_floor on born < at
where at <= pg_snapshot_xmin(pg_current_snapshot())
limit 20

-- name: law_partitions
select name from (values
  ('ledger_' || to_char(now() at time zone 'UTC', 'YYYYMM')),
  ('ledger_' || to_char(now() at time zone 'UTC' + interval '1 month', 'YYYYMM')),
  ('attempt_' || to_char(date_trunc('week', now() at time zone 'UTC'), 'YYYYMMDD')),
  ('attempt_' || to_char(date_trunc('week', now() at time zone 'UTC') + interval '7 days', 'YYYYMMDD'))) as p(name)
where to_regclass(name) is null

-- name: insights_stream_labels
select st.id, t.name || '/' || c.name || ' ' || st.source as label
from stream st join connection c on c.id = st.connection_id join tenant t on t.id = c.tenant_id
where st.id = any($1::bigint[])
