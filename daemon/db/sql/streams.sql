-- name: connections_for_poll
select c.id, c.tenant_id, t.name as tenant, c.name, c.provider, c.base_url, c.settings, c.credential,
  c.credential_key_id, c.since, c.state, c.org_id
from connection c join tenant t on t.id = c.tenant_id
where c.id = any($1::bigint[]) order by c.id

-- name: add_streams
with new as (
  insert into stream (tenant_id, connection_id, source)
  select * from unnest($1::bigint[], $2::bigint[], $3::text[])
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

-- name: regroup
-- A new grain owns the buckets from `start_at` on. Refused (no row) while a later epoch exists.
insert into grain_epoch (stream_id, start_at, grain_id, api, width, group_by)
select $1, $2, $3, $4, $5, $6
where not exists (select from grain_epoch e where e.stream_id = $1 and e.start_at > $2)
on conflict (stream_id, start_at) do update
  set grain_id = excluded.grain_id, api = excluded.api, width = excluded.width, group_by = excluded.group_by
returning stream_id

-- name: lock_stream
select id from stream where id = $1 for update

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
