-- name: claim_tick
insert into tick (slot_at, connections, batches, via, request_id, deadline_at)
values ($1, 0, 0, $2, $3, now() + $4::interval) on conflict do nothing returning slot_at

-- name: take_delivery
-- A second copy of a message waits here for the first one's commit, and then finds it.
insert into delivery (message_id, slot_at) values ($1, $2) on conflict do nothing returning message_id

-- name: delivery_slot
select slot_at from delivery where message_id = $1

-- name: due_connections
-- A number that is none of seconds is whoever's settings it is in: it must not keep all the others from being polled.
select id, changed_at,
  case when jsonb_typeof(settings -> 'every_s') = 'number'
       then greatest(0, least((settings ->> 'every_s')::numeric, 31536000))::int end as every_s
from connection
where state = 'active' and open_job is null and next_due_at < $1
order by next_due_at, id for update skip locked

-- name: take_turn
with mine as materialized (
  select id, open_job from connection where id = any($2::bigint[]) order by id for update
)
update connection c set open_job = $1 from mine m
where c.id = m.id and not exists (select from mine where open_job <> $1)
returning c.id

-- name: advance_connections
update connection c set next_due_at = g.next_due_at, open_job = g.job
from unnest($1::bigint[], $2::timestamptz[], $3::bigint[]) as g(id, next_due_at, job) where c.id = g.id

-- name: hand_over_connections
update connection c set open_job = g.job
from unnest($2::bigint[], $3::bigint[]) as g(id, job) where c.id = g.id and c.open_job = $1

-- name: finish_tick
update tick set connections = $2, batches = $3, finished_at = case when $3 = 0 then now() end where slot_at = $1

-- name: judge_ticks
-- Each tick once, by whichever replica comes first: how many of its batches were done by its deadline.
with late as materialized (
  select slot_at from tick where done_in_time is null and deadline_at <= now() order by slot_at limit 100
  for update skip locked)
update tick t set done_in_time = (
  select count(*) from batch_summary b
  where b.slot_at = t.slot_at and b.kind = 'poll' and b.finished_at <= t.deadline_at)
from late where t.slot_at = late.slot_at
returning t.slot_at, t.batches, t.done_in_time, t.deadline_at

-- name: hand_over_batches
insert into handover (job_id, slot_at, place) select id, $2, place from unnest($1::bigint[]) with ordinality as u(id, place)

-- name: unpublished_batches
-- One that its deadline has let go already needs no message any more.
select job_id, place from handover h
where job_id = any($1::bigint[]) and message_id is null and released_at is null
  and exists (select from due d where d.id = h.job_id and d.attempt = 0)
order by place

-- name: mark_published
-- Locked in order, as a release does: deliveries may come before this.
with mine as materialized (
  select job_id from handover where job_id = any($1::bigint[]) order by job_id for update)
update handover h set message_id = u.message_id, published_at = now()
from unnest($1::bigint[], $2::text[]) as u(job_id, message_id) join mine using (job_id) where h.job_id = u.job_id

-- name: release_batches
-- Due to ready, once: a batch that runs, is done, or waits for another attempt is left alone.
with h as (
  update handover set released_at = now(), released_by = $2
  where job_id in (select job_id from handover where job_id = any($1::bigint[]) order by job_id for update)
    and released_at is null
  returning job_id),
x as (delete from due where id = any(array(select job_id from h)) and attempt = 0 returning *),
r as (
  insert into ready (key_id, prio, run_at, id, attempt, losses, token)
  select key_id, prio, now(), id, attempt, losses, token from x)
select id from x

-- name: report_delivery
update handover set reported_at = now(), reported_status = $2 where job_id = $1 returning job_id

-- name: report_message
update handover set reported_at = now(), reported_status = $2 where message_id = $1 returning job_id

-- name: prune_handovers
delete from handover where job_id in (
  select job_id from handover where slot_at < now() - $1::interval order by slot_at limit 1000)

-- name: prune_deliveries
delete from delivery where message_id in (
  select message_id from delivery where at < now() - interval '3 days' order by at limit 1000)

-- name: prune_bookings
-- The numbers grow with time, so the oldest need no index of their own, which each flush would have to pay for.
with oldest as (select poll_seq, booked_at from booking order by poll_seq limit 10000)
delete from booking where poll_seq in (select poll_seq from oldest where booked_at < now() - $1::interval)

-- name: has_tick
select exists (select from tick where slot_at = $1)

-- name: tick_open_batches
-- The tick and its batches were made in one transaction, hence at one now().
select j.id from tick t join job j on j.created_at = t.created_at and j.kind = 'poll'
where t.slot_at = $1 and exists (
  select from ready where id = j.id union all select from due where id = j.id
  union all select from lease where id = j.id)

-- name: jobs_still_open
select g.id from unnest($1::bigint[]) as g(id)
where exists (
  select from ready where id = g.id union all select from due where id = g.id
  union all select from lease where id = g.id)

-- name: summaries_of
select count(*) as batches, coalesce(sum(connections), 0)::int as connections, coalesce(sum(unchanged), 0)::int as unchanged,
  coalesce(sum(stored), 0)::int as stored, coalesce(sum(restated), 0)::int as restated,
  coalesce(sum(retried), 0)::int as retried, coalesce(sum(dead), 0)::int as dead,
  coalesce(sum(requests), 0)::int as requests, coalesce(sum(requests_saved), 0)::int as requests_saved,
  coalesce(sum(rows), 0)::int as rows, coalesce(max(duration_s), 0) as duration_s,
  coalesce(sum(items), 0)::int as items
from batch_summary where job_id = any($1::bigint[])

-- name: jobs_of_tick
select job_id from batch_summary where slot_at = $1 and kind = 'poll'

-- name: prune_ticks
delete from tick where slot_at in (select slot_at from tick where slot_at < now() - $1::interval order by 1 limit 1000)

-- name: prune_summaries
delete from batch_summary where job_id in (
  select job_id from batch_summary where finished_at < now() - $1::interval order by 1 limit 1000)
