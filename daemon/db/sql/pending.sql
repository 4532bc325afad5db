-- Messages under way, and their cancellation.

-- name: pending_get
-- One that has ended stays for $4 seconds.
select m.*, p.body, s.is_alive from message m
left join payload p on p.id = m.payload_id
cross join lateral (
  select exists (select from job j where j.id = m.id) and not exists (select from dead d where d.id = m.id) as is_alive) s
where m.id = $1 and m.salt = $2 and m.account_id = $3 and (s.is_alive or coalesce(
    (select d.at from dead d where d.id = m.id),
    (select max(e.at) from event e where e.message_id = m.id and e.state in (5, 6, 8))
  ) > now() - make_interval(secs => $4))

-- name: pending_lock
-- Those that have not ended, or are dead. One cancellation of a message at a time, and each in the order of ids.
select m.id from unnest($2::bigint[], $3::bigint[]) as u(id, salt)
join message m on m.id = u.id and m.salt = u.salt
where m.account_id = $1 and exists (select from job j where j.id = m.id) order by m.id for no key update of m

-- name: pending_lock_leases
-- In the order in which a settle locks them.
select id from lease where id = any($1::bigint[]) order by id for update

-- name: pending_alive
select id from job j where id = any($1::bigint[]) and not exists (select from dead d where d.id = j.id)

-- name: pending_log
-- Both lines of a cancellation for each message.
insert into event (account_id, message_id, state)
select m.account_id, m.id, s.state from message m cross join (values (7::smallint), (8::smallint)) as s(state)
where m.id = any($1::bigint[]) order by m.id, s.state

-- name: pending_end
select coalesce(max(id), 0) from job

-- name: pending_stretch
select id as place from job where id > $15 and id <= $16 order by id limit $17

-- name: pending_these
select id as place from unnest($2::bigint[]) as u(id) where id > $15 and id <= $16 order by id limit $17

-- name: pending_matching
-- Of one stretch of jobs the first $18 messages that match and are alive. The first row tells how far the stretch went.
with e as materialized ({rows}),
f as materialized (
  select m.id, m.salt from e join message m on m.id = e.place
  where {matches} and m.created_at >= $13 and m.created_at < $14
    and exists (select from job j where j.id = m.id) and not exists (select from dead d where d.id = m.id)
  order by m.id limit $18)
select s.*, f.* from (select count(*) as walked, max(place) as end_id from e) s left join f on true order by f.id

-- name: pending_of_queue
-- Of jobs at the gate of a queue the messages that are in the queue themselves: a callback only counts there.
select m.id, m.salt from message m
where m.id = any($1::bigint[]) and m.account_id = $2 and m.queue = $3 order by m.id
