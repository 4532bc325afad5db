-- Reports, the status and the laws. `usage` and `spend` are built in insights.py, since their grouping is chosen by the
-- caller.

-- name: insights_horizon
-- A flush books at the start of its transaction, so no past before the oldest open one can change any more. Those
-- that have written nothing for a minute are reports and dumps: a flush locks its lease at once, or gives up.
select least(clock_timestamp(), min(a.xact_start)) as horizon
from pg_stat_activity a
where a.datname = current_database() and a.pid <> pg_backend_pid() and a.backend_type = 'client backend'
  and a.xact_start is not null
  and (a.backend_xid is not null or a.xact_start > clock_timestamp() - interval '1 minute')

-- name: insights_unpriced
-- $3 to $8 are the shadows: what another connection tells too is in no sum, priced or not.
select coalesce(r.dims ->> 'model', r.detail ->> 'model') as model, count(*) as rows
from usage_row r
where r.rate_version = 'unpriced' and not r.is_tombstone
  and ($1::timestamptz is null or r.bucket_start >= $1) and ($2::timestamptz is null or r.bucket_start < $2)
  and not exists (
    select from unnest($3::bigint[], $4::timestamptz[], $5::timestamptz[], $6::bigint[], $7::text[], $8::text[])
      as o(stream_id, start_at, end_at, by_id, dimension, vendor)
    where o.stream_id = r.stream_id and r.bucket_start >= o.start_at and r.bucket_start < o.end_at
      and (o.vendor is null or r.dims ->> o.dimension = o.vendor))
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
cross join (select greatest(
  (select max(last_seq) from stream), (select max(last_seq) from bucket), (select max(read_seq) from resource_fence)
) as newest) m
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
  union all select id, 'held' from held
) s using (id)
group by id, j.id
having count(s.state) <> 1 or j.id is null
limit 20

-- name: law_messages
-- A job that pushes has its message, whoever waits at a gate has that gate, and who holds a place there is under way.
select 'job ' || j.id || ' has no message' as problem from job j
where j.kind = 'push' and not exists (select from message m where m.id = j.id)
union all
select 'job ' || h.id || ' waits at gate ' || h.gate_id || ', which is not there' from held h
where not exists (select from gate g where g.id = h.gate_id)
union all
select 'job ' || s.job_id || ' is gone, and holds a place at gate ' || s.gate_id from slot s
where not exists (select from job j where j.id = s.job_id)
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
  ('attempt_' || to_char(date_trunc('week', now() at time zone 'UTC') + interval '7 days', 'YYYYMMDD')),
  ('event_' || to_char(date_trunc('week', now() at time zone 'UTC'), 'YYYYMMDD')),
  ('event_' || to_char(date_trunc('week', now() at time zone 'UTC') + interval '7 days', 'YYYYMMDD')),
  ('quota_change_' || to_char(date_trunc('week', now() at time zone 'UTC'), 'YYYYMMDD')),
  ('quota_change_' || to_char(date_trunc('week', now() at time zone 'UTC') + interval '7 days', 'YYYYMMDD'))) as p(name)
where to_regclass(name) is null

-- name: insights_stream_labels
select st.id, t.name || '/' || c.name || ' ' || st.source as label
from stream st join connection c on c.id = st.connection_id join tenant t on t.id = c.tenant_id
where st.id = any($1::bigint[])
