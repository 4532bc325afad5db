-- Schedules: what publishes messages by the clock. Only the database's clock decides what is due.

-- name: schedule_exists
select exists (select from schedule where account_id = $1 and id = $2)

-- name: schedule_count
select count(*) from schedule where account_id = $1 and id <> $2

-- name: schedule_put
-- Where the expression stays the same, so does the next instant: one that has come may not have been fired yet.
insert into schedule (account_id, id, cron, destination, spec, body, queue, flow_key, labels, caller_ip, next_at)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
on conflict (account_id, id) do update set
  cron = excluded.cron, destination = excluded.destination, spec = excluded.spec, body = excluded.body,
  queue = excluded.queue, flow_key = excluded.flow_key, labels = excluded.labels, caller_ip = excluded.caller_ip,
  next_at = case when schedule.cron = excluded.cron and not schedule.is_paused and schedule.next_at is not null
                 then schedule.next_at else excluded.next_at end,
  is_paused = false, error = null

-- name: schedule_get
select id, created_at, cron, destination, spec, body, queue, labels, caller_ip, is_paused, next_at, last_at, last_ids, error
from schedule where account_id = $1 and id = $2

-- name: schedule_list
-- Bodies up to $2 bytes in all.
with s as materialized (
  select *, sum(octet_length(body)) over (order by created_at, id) as bytes from schedule where account_id = $1)
select id, created_at, cron, destination, spec, case when bytes <= $2::bigint then body end as body, queue, labels,
       caller_ip, is_paused, next_at, last_at, last_ids, error
from s order by created_at, id

-- name: schedule_messages
-- The messages of last firings that are still known, and how each ended: null where it has not yet.
select m.id, m.salt, (
  select max(e.state) from event e where e.message_id = m.id and e.state in (5, 6, 8)) as ended,
  exists (select from dead d where d.id = m.id) as is_dead
from message m where m.id = any($1::bigint[]) and m.account_id = $2

-- name: schedule_delete
delete from schedule where account_id = $1 and id = $2 returning id

-- name: schedule_pause
update schedule set is_paused = true where account_id = $1 and id = $2 returning id

-- name: schedule_lock
select cron, is_paused, now() as now from schedule where account_id = $1 and id = $2 for update

-- name: schedule_resume
update schedule set is_paused = false, next_at = $3 where account_id = $1 and id = $2

-- name: schedule_due_accounts
select distinct account_id as id from (
  select account_id from schedule where next_at <= now() and not is_paused order by next_at limit $1) s

-- name: schedule_due
-- Those that no other replica is firing, up to $3 bytes of bodies; one in any case.
with d as materialized (
  select * from schedule
  where next_at <= now() and not is_paused and account_id = any($2::bigint[])
  order by next_at limit $1 for update skip locked),
b as (
  select account_id, id, row_number() over w as n, sum(octet_length(body)) over w as bytes
  from d window w as (order by next_at, account_id, id))
select d.*, now() as now from d join b using (account_id, id)
where b.bytes <= $3::bigint or b.n = 1 order by next_at, account_id, id

-- name: schedule_due_one
select *, now() as now from schedule
where account_id = $1 and id = $2 and next_at <= now() and not is_paused for update skip locked

-- name: schedule_due_ids
select account_id, id from schedule
where next_at <= now() and not is_paused and account_id = any($2::bigint[]) order by next_at limit $1

-- name: schedule_fired
update schedule s set last_at = now(), last_ids = u.ids::bigint[], error = u.error, next_at = u.next_at
from unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::timestamptz[]) as u(account_id, id, ids, error, next_at)
where s.account_id = u.account_id and s.id = u.id

-- name: schedule_next
select extract(epoch from min(next_at) - clock_timestamp())::float8 from schedule where not is_paused
