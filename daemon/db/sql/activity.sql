-- What happens right now.

-- name: activity_replicas
-- Those that beat, and those that fell silent not long ago. Small tables: `worker` is pruned, a lease is a running job.
select w.id as worker, w.info, extract(epoch from now() - w.seen_at)::float8 as beat_s,
  extract(epoch from now() - w.started_at)::float8 as up_s, coalesce(l.jobs, 0) as running
from worker w left join (select worker, count(*) as jobs from lease group by 1) l on l.worker = w.id
where w.stopped_at is null and w.seen_at > now() - interval '10 minutes'
order by w.id limit $1

-- name: activity_running
-- Those that run longest; the key 0 is the system's own, which mixes tenants. Only the body of a poll is read: it names
-- connections by their ids, and holds no secret.
select l.id, j.kind, coalesce(t.name, 'tenant ' || nullif(l.key_id, 0)) as tenant, l.attempt, l.worker,
  extract(epoch from now() - l.claimed_at)::float8 as running_s,
  case when j.kind in ('poll', 'poll_one') then j.body end as body
from lease l join job j using (id) left join tenant t on t.id = l.key_id
order by l.claimed_at, l.id limit $1

-- name: activity_queue
-- At most $1 rows of each state table are looked at, since the kind stands in `job`, which is large when they are.
select j.kind, s.state, count(*) as jobs
from (
  (select id, 'available' as state from ready limit $1)
  union all (select id, case when attempt = 0 then 'scheduled' else 'retryable' end from due limit $1)
  union all (select id, 'pending' from held limit $1)
  union all (select id, 'running' from lease limit $1)
  union all (select id, 'discarded' from dead limit $1)) s
join job j using (id)
group by 1, 2 order by 1, 2

-- name: activity_log
-- How `activity_settled` and `activity_failures` begin: attempts of the last $1. The log has no index by time, which each
-- settle would pay for: it is only ever appended to, so its newest lines stand in the last $2 blocks of this week's
-- partition, and, early on a Monday, of last week's.
with w as materialized (
  select monday, greatest(0, pg_relation_size(to_regclass('attempt_' || to_char(monday at time zone 'UTC', 'YYYYMMDD')))
    / current_setting('block_size')::int - $2::int) as head
  from (values (date_trunc('week', now(), 'UTC')), (date_trunc('week', now() - interval '7 days', 'UTC'))) v(monday)),
a as (
  select at, id, attempt, worker, outcome, took_ms, note from attempt
  where at >= greatest(now() - $1::interval, date_trunc('week', now(), 'UTC'))
    and at < date_trunc('week', now() + interval '7 days', 'UTC')
    and ctid >= (select format('(%s,0)', head)::tid from w order by monday desc limit 1)
  union all
  select at, id, attempt, worker, outcome, took_ms, note from attempt
  where at >= now() - $1::interval and at < date_trunc('week', now(), 'UTC')
    and at >= date_trunc('week', now() - interval '7 days', 'UTC')
    and ctid >= (select format('(%s,0)', head)::tid from w order by monday limit 1))

-- name: activity_settled
-- By whole minutes ago. `reached_at` is the oldest line in the blocks of this week, null when they are all of it.
select floor(extract(epoch from greatest(interval '0', now() - at)) / 60)::int as minutes_ago, worker, outcome,
  count(*) as jobs,
  (select at from attempt
   where at >= date_trunc('week', now(), 'UTC') and at < date_trunc('week', now() + interval '7 days', 'UTC')
     and (select head from w order by monday desc limit 1) > 0
     and ctid >= (select format('(%s,0)', head)::tid from w order by monday desc limit 1)
   limit 1) as reached_at
from a group by 1, 2, 3

-- name: activity_failures
select n.at, n.id as job, coalesce(j.kind, b.kind) as kind, n.attempt, n.outcome, n.worker, n.took_ms, left(n.note, 500) as note
from (select * from a where outcome in (2, 4, 9) order by at desc, id desc limit $3) n
left join job j using (id) left join batch_summary b on b.job_id = n.id
order by n.at desc, n.id desc
