-- URL groups: one name for many endpoints.

-- name: group_of
select g.name, g.headers, g.created_at, g.updated_at, e.urls, e.names
from url_group g cross join lateral (
  select array_agg(url order by place) as urls, array_agg(name order by place) as names
  from endpoint where group_id = g.id) e
where g.account_id = $1 and g.name = $2

-- name: group_list
select g.name, g.headers, g.created_at, g.updated_at, e.urls, e.names
from url_group g cross join lateral (
  select array_agg(url order by place) as urls, array_agg(name order by place) as names
  from endpoint where group_id = g.id) e
where g.account_id = $1 order by g.name

-- name: account_lock
-- One after the other, so that two cannot both find room for the last one.
select id from account where id = $1 for no key update

-- name: group_count
select count(*) from url_group where account_id = $1 and name <> $2

-- name: group_lock
select id from url_group where account_id = $1 and name = $2 for update

-- name: group_add
insert into url_group (account_id, name) values ($1, $2) on conflict (account_id, name) do nothing

-- name: group_touch
update url_group set updated_at = now() where id = $1

-- name: group_headers
update url_group set headers = $3, updated_at = now() where account_id = $1 and name = $2 returning id

-- name: group_delete
delete from url_group where account_id = $1 and name = $2 returning id

-- name: group_delete_empty
delete from url_group g where id = $1 and not exists (select from endpoint e where e.group_id = g.id)

-- name: endpoint_put
insert into endpoint (group_id, key, name, url)
select $1, key, name, url from unnest($2::text[], $3::text[], $4::text[]) with ordinality as u(key, name, url, place)
order by place
on conflict (group_id, key) do update set name = excluded.name, url = excluded.url

-- name: endpoint_count
select count(*) from endpoint where group_id = $1

-- name: endpoint_remove
-- By its name, or, where none is given, whichever has the URL.
delete from endpoint e using unnest($2::text[], $3::text[]) as u(name, url)
where e.group_id = $1 and case when u.name is null then e.url = u.url else e.name = u.name end
