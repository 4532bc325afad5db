-- name: tenant_add
-- A removed tenant of the name comes back as itself: what was booked for it stays its own.
insert into tenant (name) values ($1)
on conflict (name) do update set removed_at = null where tenant.removed_at is not null
returning id

-- name: tenant_list
select t.id, t.name, t.created_at, t.removed_at,
  count(c.id) filter (where c.state <> 'archived') as connections
from tenant t left join connection c on c.tenant_id = t.id
where $1 or t.removed_at is null
group by t.id
order by t.name

-- name: tenant_remove
update tenant set removed_at = now() where name = $1 and removed_at is null returning id

-- name: tenant_archive_connections
update connection set state = 'archived', state_reason = 'tenant removed', state_at = now()
where tenant_id = $1 and state <> 'archived'

-- name: tenants_ensure
-- Sorted, so that two imports at once lock in one order. Every row is written, so that each is locked until the commit.
insert into tenant (name) select n from unnest($1::text[]) n order by n
on conflict (name) do update set removed_at = null
returning id, name
