-- name: claim_tick
insert into tick (slot_at, connections, batches) values ($1, 0, 0) on conflict do nothing returning slot_at

-- name: due_connections
select id, changed_at from connection
where state = 'active' and open_job is null and next_due_at < $1
order by next_due_at, id for update skip locked

-- name: advance_connections
update connection c set next_due_at = g.next_due_at, open_job = g.job
from unnest($1::bigint[], $2::timestamptz[], $3::bigint[]) as g(id, next_due_at, job) where c.id = g.id

-- name: hand_over_connections
update connection c set open_job = g.job
from unnest($2::bigint[], $3::bigint[]) as g(id, job) where c.id = g.id and c.open_job = $1

-- name: finish_tick
update tick set connections = $2, batches = $3, finished_at = case when $3 = 0 then now() end where slot_at = $1

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
  coalesce(sum(rows), 0)::int as rows, coalesce(max(duration_s), 0) as duration_s
from batch_summary where job_id = any($1::bigint[])

-- name: jobs_of_tick
select job_id from batch_summary where slot_at = $1 and kind = 'poll'

-- name: prune_ticks
delete from tick where slot_at in (select slot_at from tick where slot_at < now() - $1::interval order by 1 limit 1000)

-- name: prune_summaries
delete from batch_summary where job_id in (
  select job_id from batch_summary where finished_at < now() - $1::interval order by 1 limit 1000)
