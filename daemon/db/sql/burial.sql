-- name: bury
with new as (
  insert into job (kind, key_id, prio, max_attempts, timeout_s, body)
  select kind, key_id, prio, max_attempts, timeout_s, body
  from unnest($1::text[], $2::bigint[], $3::smallint[], $4::smallint[], $5::real[], $6::bytea[])
    with ordinality as g(kind, key_id, prio, max_attempts, timeout_s, body, n)
  order by n
  returning id
), numbered as (select id, row_number() over (order by id) as n from new),
logged as (
  insert into attempt (id, attempt, outcome, note)
  select b.id, 1, 4, g.reason from numbered b join unnest($7::text[]) with ordinality as g(reason, n) using (n)
)
insert into dead (id, attempt, token, reason)
select b.id, 1, 0, g.reason from numbered b join unnest($7::text[]) with ordinality as g(reason, n) using (n)
order by n
returning id

-- name: mourn
with given as (select * from unnest($1::bigint[], $2::text[]) as g(id, reason)),
logged as (
  insert into attempt (id, attempt, outcome, note) select g.id, least(d.attempt + 1, 32767), 4, g.reason from given g join dead d using (id)
)
update dead d set at = now(), attempt = least(d.attempt + 1, 32767), reason = g.reason from given g where d.id = g.id

-- name: letter_of
select min(d.id) from dead d join job j using (id) where j.kind = $1 and j.body = $2
