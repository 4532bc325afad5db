-- What people call the ids in the reports, with the time from which and until which they did. A name is closed and
-- another one opened; none is ever changed. The instant is the database's clock,
-- read under the lock of the stream.

-- name: names_seen
-- Keeps what is called as before, closes what is not. An instant never comes twice for one id, whatever the clock does.
update name n set seq = g.seq,
  until = case when n.name <> g.name then greatest($6::timestamptz, n.since + interval '1 microsecond') end
from unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::bigint[]) as g(connection_id, kind, id, name, seq)
where n.connection_id = g.connection_id and n.kind = g.kind and n.id = g.id and n.until is null
  and (n.seq < g.seq or n.name <> g.name)

-- name: names_open
-- What has no current name gets one. `is_new`: it never had one.
insert into name (tenant_id, connection_id, kind, id, since, name, seq)
select g.tenant_id, g.connection_id, g.kind, g.id, greatest($7::timestamptz, o.until), g.name, g.seq
from unnest($1::bigint[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::bigint[])
  as g(tenant_id, connection_id, kind, id, name, seq)
left join lateral (
  select max(n.until) as until, bool_or(n.until is null) as is_current from name n
  where n.connection_id = g.connection_id and n.kind = g.kind and n.id = g.id
) o on true
where o.is_current is not true
returning connection_id, not exists (
  select from name n where n.connection_id = name.connection_id and n.kind = name.kind and n.id = name.id) as is_new

-- name: names_keep
update name n set seq = g.seq from unnest($1::bigint[], $2::text[], $3::bigint[]) as g(connection_id, kind, seq)
where n.connection_id = g.connection_id and n.kind = g.kind and n.until is null and n.seq < g.seq

-- name: names_gone
-- What a whole reading did not see is gone, and its name stays.
update name n set until = greatest($3::timestamptz, n.since + interval '1 microsecond')
from unnest($1::bigint[], $2::bigint[]) as e(stream_id, seq) join stream s on s.id = e.stream_id
where n.connection_id = s.connection_id and n.until is null and n.seq < e.seq
returning e.stream_id

-- name: names_look_up
-- The newest name of each in each connection, also of what is gone.
select distinct on (n.connection_id, n.kind, n.id)
  n.kind, n.id, n.name, n.since, t.name as tenant, c.name as connection, c.provider
from connection c join tenant t on t.id = c.tenant_id
join name n on n.connection_id = c.id
join unnest($1::text[], $2::text[]) as g(kind, id) on g.kind = n.kind and g.id = n.id
order by n.connection_id, n.kind, n.id, n.since desc

-- name: names_list
select t.name as tenant, c.name as connection, n.kind, n.id, n.name, n.since, n.until
from name n join connection c on c.id = n.connection_id join tenant t on t.id = c.tenant_id
where ($1::text is null or t.name = $1) and ($2::text is null or n.kind = $2)
  and ($3 or not exists (
    select from name later
    where later.connection_id = n.connection_id and later.kind = n.kind and later.id = n.id and later.since > n.since))
order by t.name, c.name, n.kind, n.id, n.since
