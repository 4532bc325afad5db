-- name: connection_tenant_lock
-- Adds to one tenant happen one after the other: names, organisations and revivals are judged under this lock.
select id from tenant where name = $1 and removed_at is null for no key update

-- name: connections_of_tenants
select c.id, c.tenant_id, t.name as tenant, c.name, c.provider, c.base_url, c.credential_print, c.org_id, c.state,
  c.since
from connection c join tenant t on t.id = c.tenant_id
where c.tenant_id = any($1::bigint[])
order by c.id

-- name: connection_ids_reserve
select nextval(pg_get_serial_sequence('connection', 'id')) as id from generate_series(1, $1)

-- name: connections_insert
insert into connection (id, tenant_id, name, provider, base_url, settings, credential, credential_key_id,
  credential_print, org_id, since)
overriding system value
select id, tenant_id, name, provider, base_url, settings::jsonb, credential, key_id, print, org_id, since
from unnest($1::bigint[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::text[], $7::bytea[], $8::text[],
  $9::bytea[], $10::text[], $11::timestamptz[])
  as g(id, tenant_id, name, provider, base_url, settings, credential, key_id, print, org_id, since)

-- name: connections_revive
-- The same id, so that nothing is booked twice; due at once; settings and start are kept unless given.
update connection c set name = g.name, base_url = g.base_url, settings = coalesce(g.settings::jsonb, c.settings),
  credential = g.credential, credential_key_id = g.key_id, credential_print = g.print,
  org_id = coalesce(g.org_id, c.org_id), since = coalesce(g.since, c.since),
  state = 'active', state_reason = null, state_at = now(), next_due_at = now(), changed_at = now()
from unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::text[], $7::bytea[], $8::text[],
  $9::timestamptz[])
  as g(id, name, base_url, settings, credential, key_id, print, org_id, since)
where c.id = g.id

-- name: connections_unpark_streams
update stream set parked_reason = null where connection_id = any($1::bigint[]) and parked_reason is not null

-- name: connection_list
select c.id, t.name as tenant, c.name, c.provider, c.base_url, c.settings, c.org_id, c.since, c.state, c.state_reason,
  c.state_at, c.created_at, c.next_due_at, c.changed_at, c.polled_at, c.credential_key_id,
  (select array_agg(s.source order by s.source) from stream s where s.connection_id = c.id and s.parked_reason is not null)
    as parked_sources
from connection c join tenant t on t.id = c.tenant_id
where ($1::text is null or t.name = $1) and ($2::text is null or c.name = $2) and ($3 or c.state <> 'archived')
order by t.name, c.name

-- name: connection_sealed
select c.id, c.tenant_id, t.name as tenant, c.name, c.provider, c.base_url, c.settings, c.credential,
  c.credential_key_id, c.org_id, c.since, c.state
from connection c join tenant t on t.id = c.tenant_id
where t.name = $1 and c.name = $2 and c.state <> 'archived'
for no key update of c

-- name: connection_set_state
update connection c set state = $3, state_reason = $4, state_at = now(),
  next_due_at = case when $3 = 'active' then now() else c.next_due_at end,
  changed_at = case when $3 = 'active' then now() else c.changed_at end
from tenant t
where t.id = c.tenant_id and t.name = $1 and c.name = $2 and c.state <> 'archived'
returning c.id

-- name: connection_set_credential
-- A key that the provider refused had parked the connection; a new one deserves a new try. A pause stays a pause.
update connection set credential = $2, credential_key_id = $3, credential_print = $4, org_id = coalesce($5, org_id),
  state = case when state = 'parked' then 'active' else state end,
  state_reason = case when state = 'parked' then null else state_reason end,
  state_at = case when state = 'parked' then now() else state_at end,
  next_due_at = now(), changed_at = now()
where id = $1

-- name: connection_lock_streams
-- Streams before their connection, as a flush locks them.
select s.id from stream s join connection c on c.id = s.connection_id join tenant t on t.id = c.tenant_id
where t.name = $1 and c.name = $2 order by s.id for update of s

-- name: connection_set_settings
update connection set settings = $2::jsonb, next_due_at = now() where id = $1

-- name: connections_sealed_batch
select id, tenant_id, provider, credential, credential_key_id
from connection where id > $1 and ($2::text is null or credential_key_id <> $2)
order by id limit $3

-- name: connections_sealed_lock
select id, tenant_id, provider, credential, credential_key_id
from connection where id > $1 and credential_key_id <> $2
order by id limit $3 for no key update

-- name: connections_reseal
update connection c set credential = g.credential, credential_key_id = $3
from unnest($1::bigint[], $2::bytea[]) as g(id, credential)
where c.id = g.id
