-- name: quota_take
-- Counters as they were read, under their stream's lock: what differs from what is stored, and its line of history.
--   1 new       it counts from the first unit on
--   2 grown     what it grew by was used
--   3 reset     it began again at zero: all that it shows was used since
--   4 restored  its server was started from a snapshot: what it lost was counted before, and is not counted again
--   5 refunded  it may fall without having begun again: nothing was used
--   6 written   we set it, or were about to: of what it showed and what it was set to, it counts from the higher one that
--               it has passed, and nothing where that could be a fall
--   7 detail    the same count, with something else beside it
with given as (
  select * from unnest($5::text[], $6::text[], $7::text[], $8::text[], $9::numeric[], $10::text[])
    as g(key, user_name, tenant_name, period, value, detail)
), paired as materialized (
  select g.*, coalesce(q.used, 0) as used, coalesce(q.epoch, 1) as epoch, coalesce(q.revision, 0) as revision,
    q.value as former, q.pending,
    case when q.key is null then 1
         when q.pending is not null then 6
         when g.value > q.value then 2
         when g.value = q.value then case when q.detail <> g.detail::jsonb then 7 end
         when $11 then 4
         when $12 then 5
         else 3 end as kind
  from given g left join lateral (
    -- LIMIT keeps this a look-up by key: a hash join would read the whole table as long as it is small.
    select * from quota q where q.stream_id = $1 and q.key = g.key limit 1
  ) q on true
), changed as materialized (
  select key, user_name, tenant_name, period, value, detail, kind, revision + 1 as revision,
    epoch + case when kind between 3 and 6 then 1 else 0 end as epoch,
    case kind when 1 then greatest(value, 0) when 2 then value - former when 3 then greatest(value, 0)
      when 6 then case
        when pending = 'NaN' or value < least(former, pending) then 0
        when value >= greatest(former, pending) then value - greatest(former, pending)
        when $11 or $12 then 0
        else value - least(former, pending) end
      else 0 end as delta,
    used
  from paired where kind is not null
), noted as (
  insert into quota_change (stream_id, key, revision, epoch, kind, delta, value, poll_seq)
  select $1, key, revision, epoch, kind, delta, value, $3 from changed
), written as (
  insert into quota (stream_id, key, tenant_id, user_name, tenant_name, period, value, used, epoch, revision, detail)
  select $1, key, $2, user_name, tenant_name, period, value, used + delta, epoch, revision, detail::jsonb from changed
  on conflict (stream_id, key) do update set
    user_name = excluded.user_name, tenant_name = excluded.tenant_name, period = excluded.period,
    value = excluded.value, used = excluded.used, epoch = excluded.epoch, revision = excluded.revision,
    detail = excluded.detail, pending = null, updated_at = now()
  where quota.revision < excluded.revision
)
select now() as at, count(*) filter (where kind = 1) as new, count(*) filter (where kind > 1) as changed,
  case when $4 then json_agg(json_build_object(
    'key', key, 'user', user_name, 'tenant', tenant_name, 'period', period, 'value', value::text,
    'delta', delta::text, 'epoch', epoch, 'revision', revision, 'kind', kind) order by key)::text end as told
from changed

-- name: quota_list
select t.name as tenant, c.name, q.key, q.user_name as "user", q.tenant_name as key_tenant, q.period, q.value, q.used,
  q.epoch, q.revision, q.updated_at
from quota q join stream s on s.id = q.stream_id join connection c on c.id = s.connection_id
join tenant t on t.id = c.tenant_id
where ($1::text is null or t.name = $1) and ($2::text is null or c.name = $2) and ($3::text is null or q.user_name = $3)
  and (t.name, c.name, q.key) > ($4, $5, $6)
order by t.name, c.name, q.key limit $7

-- name: quota_changes
select h.at, t.name as tenant, c.name, q.user_name as "user", q.period, h.key, h.revision, h.epoch, h.kind, h.delta,
  h.value
from quota_change h join stream s on s.id = h.stream_id join connection c on c.id = s.connection_id
join tenant t on t.id = c.tenant_id join quota q on q.stream_id = h.stream_id and q.key = h.key
where ($1::text is null or t.name = $1) and ($2::text is null or c.name = $2) and ($3::text is null or q.user_name = $3)
order by h.at desc, h.key, h.revision desc limit $4

-- name: quota_counters
-- Of one stream, page by page: what is compared with the ledger.
select q.key, q.user_name, coalesce(q.tenant_name, t.name) as tenant, q.period, q.value, q.updated_at
from quota q join tenant t on t.id = q.tenant_id
where q.stream_id = $1 and q.user_name is not null and q.key > $2 order by q.key limit $3

-- name: quota_stream
select s.id from stream s where s.connection_id = $1 and s.source = 'quota'

-- name: quota_connections
select c.id from connection c join tenant t on t.id = c.tenant_id
where c.provider = 'redis_quota' and c.state in ('active', 'parked')
  and ($1::text is null or t.name = $1) and ($2::text is null or c.name = $2)
order by c.id

-- name: quota_has_source
select exists (select from connection c join tenant t on t.id = c.tenant_id
               where c.provider = 'redis_quota' and t.name = $1 and ($2::text is null or c.name = $2))

-- name: quota_mark
-- Before counters are set: until it is known whether that came to pass, either value may be met. NaN: one of several,
-- since what they were to be set to before is open still.
update quota q set pending = case when q.pending is null or q.pending = g.value then g.value else 'NaN' end
from unnest($2::text[], $3::numeric[]) as g(key, value)
where q.stream_id = $1 and q.key = g.key

-- name: quota_written
-- They were set, or not there any more, and nobody else has read or set counters of this stream since they were marked.
with given as (
  select * from unnest($2::text[], $3::numeric[], $4::boolean[]) as g(key, value, is_set)
), gone as (
  update quota q set pending = null from given g where q.stream_id = $1 and q.key = g.key and not g.is_set
), mine as (
  update quota q set value = g.value, pending = null, epoch = q.epoch + 1, revision = q.revision + 1,
    updated_at = now()
  from given g where q.stream_id = $1 and q.key = g.key and g.is_set
  returning q.key, q.revision, q.epoch, q.value
)
insert into quota_change (stream_id, key, revision, epoch, kind, delta, value, poll_seq)
select $1, key, revision, epoch, 6, 0, value, $5 from mine

-- name: quota_note_drift
insert into quota_drift (stream_id, counters, counted, booked, drift) values ($1, $2, $3, $4, $5)
on conflict (stream_id) do update set at = now(), counters = excluded.counters, counted = excluded.counted,
  booked = excluded.booked, drift = excluded.drift

-- name: law_quota_used
-- What a counter's history adds up to, as far as it is kept whole.
select h.stream_id, h.key, h.used as in_history, q.used, h.newest, q.revision
from (
  select stream_id, key, sum(delta) as used, min(revision) as oldest, max(revision) as newest, count(*) as lines
  from quota_change group by 1, 2
) h join quota q using (stream_id, key)
where h.newest <> q.revision or (h.oldest = 1 and (h.used <> q.used or h.lines <> h.newest))
limit 20

-- name: prune_quota_changes
select c.relname as name from pg_inherits i join pg_class c on c.oid = i.inhrelid
where i.inhparent = 'quota_change'::regclass
  and (to_date(right(c.relname, 8), 'YYYYMMDD') + interval '7 days') at time zone 'UTC'
    < now() - make_interval(secs => $1)
order by 1
