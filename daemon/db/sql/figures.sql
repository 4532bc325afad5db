-- What a scrape of /metrics and the live views show. Short reads, each of one moment.

-- name: figures_now
select (select count(*) from ready) as available,
  (select count(*) from due where attempt = 0) as scheduled,
  (select count(*) from due where attempt > 0) as retryable,
  (select count(*) from held) as pending,
  (select count(*) from lease) as running,
  (select count(*) from dead) as discarded,
  (select extract(epoch from now() - min(run_at))::float8 from ready) as oldest_s,
  (select count(*) from worker where stopped_at is null and seen_at > now() - interval '30 seconds') as replicas,
  (select extract(epoch from now() - min(greatest(polled_at, state_at)))::float8
     from connection where state = 'active' and next_due_at < now()) as lag_s,
  (select extract(epoch from max(now() - xact_start))::float8 from pg_stat_activity
     where datname = current_database() and backend_type = 'client backend'
       and (backend_xmin is not null or backend_xid is not null)) as snapshot_s

-- name: figures_connections
select state, count(*) as n from connection group by 1

-- name: figures_drift
select t.name || '/' || c.name as quota, d.drift::float8 as drift
from quota_drift d join stream s on s.id = d.stream_id join connection c on c.id = s.connection_id
join tenant t on t.id = c.tenant_id
where c.state in ('active', 'parked') order by 1

-- name: figures_tick
select extract(epoch from slot_at)::float8 as slot, batches,
  (select count(*) from batch_summary b where b.slot_at = t.slot_at and b.kind = 'poll') as done,
  (select extract(epoch from f.finished_at - f.created_at)::float8 from tick f
     where f.finished_at is not null order by f.slot_at desc limit 1) as duration_s
from tick t order by slot_at desc limit 1

-- name: figures_polls
-- The connection that was polled longest ago, and the usage that ends longest ago, each of a provider.
select c.provider, case when $1 then t.name end as tenant,
  extract(epoch from min(c.polled_at))::float8 as polled_at,
  extract(epoch from now() - min(s.covered_to))::float8 as data_lag_s
from connection c join tenant t on t.id = c.tenant_id
left join lateral (
  select min(s.covered_to) as covered_to from stream s
  join unnest($2::text[], $3::text[]) as x(provider, source) on x.provider = c.provider and x.source = s.source
  where s.connection_id = c.id and s.parked_reason is null) s on true
where c.state = 'active' group by 1, 2

-- name: figures_spend
-- Since the start of the month and of the day (UTC). What is older than the reach of its source's ladder is settled. $6
-- to $11 are the shadows: what another connection tells too.
select c.provider, case when $1 then t.name end as tenant, r.currency, r.basis, p.period,
  case when r.bucket_start < now() - x.reach then 'settled' else 'provisional' end as state,
  sum(r.amount)::float8 as amount
from usage_row r join stream s on s.id = r.stream_id join connection c on c.id = s.connection_id
join tenant t on t.id = c.tenant_id
join unnest($2::text[], $3::text[], $4::boolean[], $5::interval[]) as x(provider, source, is_cost, reach)
  on x.provider = c.provider and x.source = s.source
join (values ('month', date_trunc('month', now(), 'UTC')), ('day', date_trunc('day', now(), 'UTC'))) as p(period, since)
  on r.bucket_start >= p.since
where r.bucket_start >= date_trunc('month', now(), 'UTC') and not r.is_tombstone and r.amount is not null
  and r.basis = case when x.is_cost then 'provider' else 'local' end
  and not exists (
    select from unnest($6::bigint[], $7::timestamptz[], $8::timestamptz[], $9::bigint[], $10::text[], $11::text[])
      as o(stream_id, start_at, end_at, by_id, dimension, vendor)
    where o.stream_id = r.stream_id and r.bucket_start >= o.start_at and r.bucket_start < o.end_at
      and (o.vendor is null or r.dims ->> o.dimension = o.vendor))
group by 1, 2, 3, 4, 5, 6

-- name: figures_tokens
select c.provider, case when $1 then t.name end as tenant, p.period, sum(r.input_tokens)::float8 as input,
  sum(r.cache_read_tokens)::float8 as cache_read, sum(r.cache_write_tokens)::float8 as cache_write,
  sum(r.output_tokens)::float8 as output
from usage_row r join stream s on s.id = r.stream_id join connection c on c.id = s.connection_id
join tenant t on t.id = c.tenant_id
join unnest($2::text[], $3::text[]) as x(provider, source) on x.provider = c.provider and x.source = s.source
join (values ('month', date_trunc('month', now(), 'UTC')), ('day', date_trunc('day', now(), 'UTC'))) as p(period, since)
  on r.bucket_start >= p.since
where r.bucket_start >= date_trunc('month', now(), 'UTC') and not r.is_tombstone
  and not exists (
    select from unnest($4::bigint[], $5::timestamptz[], $6::timestamptz[], $7::bigint[], $8::text[], $9::text[])
      as o(stream_id, start_at, end_at, by_id, dimension, vendor)
    where o.stream_id = r.stream_id and r.bucket_start >= o.start_at and r.bucket_start < o.end_at
      and (o.vendor is null or r.dims ->> o.dimension = o.vendor))
group by 1, 2, 3
