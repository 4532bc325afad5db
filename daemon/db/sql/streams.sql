-- name: connections_for_poll
select c.id, c.tenant_id, t.name as tenant, c.name, c.provider, c.base_url, c.settings, c.credential,
  c.credential_key_id, c.since, c.state, c.org_id
from connection c join tenant t on t.id = c.tenant_id
where c.id = any($1::bigint[]) order by c.id

-- name: add_streams
-- Not where the settings have changed since they were read: the grain would be that of the old ones.
with same as materialized (
  select c.id from (select distinct * from unnest($2::bigint[], $8::text[]) as u(id, settings)) g
  join connection c on c.id = g.id where c.settings = g.settings::jsonb order by c.id for share of c
), new as (
  insert into stream (tenant_id, connection_id, source)
  select g.* from unnest($1::bigint[], $2::bigint[], $3::text[]) as g(tenant_id, connection_id, source)
  join same on same.id = g.connection_id
  on conflict (connection_id, source) do nothing
  returning id, connection_id, source
)
insert into grain_epoch (stream_id, start_at, grain_id, api, width, group_by)
select n.id, 'epoch', g.grain_id, g.api, g.width, string_to_array(g.group_by, ',')
from new n join unnest($2::bigint[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[])
  as g(connection_id, source, grain_id, api, width, group_by) using (connection_id, source)

-- name: streams_for_poll
select s.*, now() as now,
  array(select b.bucket_start from bucket b
        where b.stream_id = s.id and b.pending_since is not null order by 1) as pending
from stream s where s.connection_id = any($1::bigint[]) order by s.id

-- name: held_totals
select b.stream_id, b.bucket_start, b.totals, b.total_quantity, b.total_amount
from unnest($1::bigint[], $2::timestamptz[]) as g(stream_id, since)
join bucket b on b.stream_id = g.stream_id and b.bucket_start >= g.since

-- name: lost_sequences
-- What a copy of the database left of its sequences, where they are behind what was taken. Cheap, for each start: a
-- bucket is ahead of its stream by the reads of a few attempts at most, and of jobs the summaries tell enough.
with m(name, newest) as (values
  ('poll_seq', (select max(last_seq) from stream)),
  ('tenant_id_seq', (select max(id) from tenant)),
  ('connection_id_seq', (select max(id) from connection)),
  ('stream_id_seq', (select max(id) from stream)),
  ('worker_id_seq', (select max(id) from worker)),
  ('job_id_seq', greatest((select max(id) from job), (select max(job_id) from batch_summary))))
select name, coalesce(pg_sequence_last_value(name::regclass), 0) as issued, newest from m
where newest > coalesce(pg_sequence_last_value(name::regclass), 0) order by name = 'poll_seq' desc, name

-- name: mend_sequences
-- Every sequence that is behind what its numbers were used for. Jobs leave their table when they are done, so the logs
-- tell how far they got.
with m(name, newest) as (values
  ('poll_seq', greatest(
    (select max(last_seq) from stream), (select max(last_seq) from bucket), (select max(read_seq) from resource_fence))),
  ('tenant_id_seq', (select max(id) from tenant)),
  ('connection_id_seq', (select max(id) from connection)),
  ('stream_id_seq', (select max(id) from stream)),
  ('worker_id_seq', greatest((select max(id) from worker), (select max(worker) from lease))),
  ('job_id_seq', greatest(
    (select max(id) from job), (select max(id) from attempt), (select max(job_id) from batch_summary))))
select name, setval(name::regclass, newest) as newest from m
where newest > coalesce(pg_sequence_last_value(name::regclass), 0) order by name

-- name: lock_streams_of
select id from stream where connection_id = any($1::bigint[]) order by id for update

-- name: cuts_of
-- How each stream is cut from now on, and how far it is booked. After the lock: this needs a snapshot of its own.
select s.id, s.connection_id, s.source, e.start_at, e.grain_id, e.width, clock_timestamp() as now,
  (select max(b.bucket_start) from bucket b where b.stream_id = s.id) as newest
from stream s cross join lateral (
  select * from grain_epoch e where e.stream_id = s.id order by e.start_at desc limit 1) e
where s.connection_id = any($1::bigint[])

-- name: add_epochs
insert into grain_epoch (stream_id, start_at, grain_id, api, width, group_by)
select stream_id, start_at, grain_id, api, width, string_to_array(group_by, ',')
from unnest($1::bigint[], $2::timestamptz[], $3::text[], $4::text[], $5::text[], $6::text[])
  as g(stream_id, start_at, grain_id, api, width, group_by)
on conflict (stream_id, start_at) do update
  set grain_id = excluded.grain_id, api = excluded.api, width = excluded.width, group_by = excluded.group_by

-- name: pauses
select host, org, extract(epoch from until - now())::float8 as seconds, reason from pause where until > now()

-- name: store_pauses
insert into pause (host, org, until, reason)
select host, org, now() + make_interval(secs => seconds), reason
from unnest($1::text[], $2::text[], $3::float8[], $4::text[]) as g(host, org, seconds, reason)
order by host, org
on conflict (host, org) do update set until = greatest(pause.until, excluded.until), reason = excluded.reason

-- name: prune_pauses
delete from pause where until < now() - interval '1 hour'

-- name: settings_of_streams
select c.tenant_id, c.id, c.settings from stream s join connection c on c.id = s.connection_id
where s.id = any($1::bigint[]) order by c.id
