-- Gates: FIFO queues, flow-control keys, an account's parallelism. Jobs wait in `held` in front of one, and pass in the
-- order of their ids. A job that must pass several takes them one after the other, in the order of `job.gates`.
--
-- How many may pass is exact: the gate's row is locked in one statement, and the slots are counted in the next, whose
-- snapshot is younger than the lock. Publishing holds a gate only so far that it cannot be deleted.

-- name: gate_find
-- Locked against deletion, so that no job is ever held at a gate that is gone.
select account_id, kind, name, id, parallelism, rate, period_s, is_paused, pins_parallelism, pins_rate
from gate where (account_id, kind, name) in (
  select * from unnest($1::bigint[], $2::text[], $3::text[]))
order by id for key share

-- name: gate_add
insert into gate (account_id, kind, name, parallelism, rate, period_s)
select * from unnest($1::bigint[], $2::text[], $3::text[], $4::int[], $5::int[], $6::int[]) order by 1, 2, 3
on conflict (account_id, kind, name) do nothing

-- name: gate_configure
-- The newest message of a flow-control key says how it flows, unless that is pinned.
update gate g set
  parallelism = case when pins_parallelism then g.parallelism else u.parallelism end,
  rate = case when pins_rate then g.rate else u.rate end,
  period_s = case when pins_rate then g.period_s else u.period_s end,
  updated_at = now()
from (select * from unnest($1::bigint[], $2::int[], $3::int[], $4::int[]) as u(id, parallelism, rate, period_s)
      order by id) u
where g.id = u.id

-- name: gate_count
select count(*) from gate where account_id = $1 and kind = $2

-- name: admit_lock
-- Up to $2 gates after $1 with jobs in front of them, but those that others are just serving, and those that are shut as
-- far as this snapshot knows: one that opened since is found by whoever opened it, or in the next round.
with recursive k(id) as (
  (select gate_id from held where gate_id > $1::bigint order by gate_id limit 1)
  union all
  select (select h.gate_id from held h where h.gate_id > k.id order by h.gate_id limit 1) from k where k.id is not null)
select g.id from gate g
where g.id = any(array(select id from k where id is not null)) and not g.is_paused
  and (g.rate is null or g.rate_count < g.rate or g.rate_start + make_interval(secs => g.period_s) <= clock_timestamp())
  and (g.parallelism is null
       or g.parallelism > (select count(distinct owner_id) from slot s where s.gate_id = g.id))
order by g.id limit $2 for no key update skip locked

-- name: admit_lock_these
select id from gate where id = any($1::bigint[]) order by id for no key update

-- name: admit
-- Through each of the locked gates $1 as many as may pass, at most $2 each. Then the gates behind are to be looked at, and
-- those at which more than that may pass. A place that a replica of a version without gates has left behind counts on.
with c as materialized (select clock_timestamp() as at),
g as materialized (
  select g.id, g.kind = 'queue' as is_kept, g.rate, at,
    g.rate_start + make_interval(secs => g.period_s) <= at as is_over,
    least($2::bigint,
      g.parallelism - (select count(distinct owner_id) from slot s where s.gate_id = g.id),
      g.rate - case when g.rate_start + make_interval(secs => g.period_s) <= at then 0 else g.rate_count end) as free
  from gate g cross join c where g.id = any($1::bigint[]) and not g.is_paused),
h as materialized (
  select q.t from g cross join lateral (
    select ctid as t from held where held.gate_id = g.id order by held.id limit greatest(0, g.free)
    for update skip locked) q),
x as (delete from held where ctid = any(array(select t from h)) returning *),
s as (
  insert into slot (job_id, gate_id, owner_id, is_kept)
  select x.id, x.gate_id, x.id, g.is_kept from x join g on g.id = x.gate_id
  on conflict (job_id, gate_id) do nothing),
n as materialized (
  select x.*, j.gates[array_position(j.gates, x.gate_id) + 1] as next_id from x join job j on j.id = x.id),
r as (
  insert into ready (key_id, prio, run_at, id, attempt, losses, token)
  select key_id, prio, now(), id, attempt, losses, token from n where next_id is null),
w as (
  insert into held (gate_id, key_id, prio, id, attempt, losses, token)
  select next_id, key_id, prio, id, attempt, losses, token from n where next_id is not null),
u as (
  update gate set
    rate_start = case when g.is_over then g.at else gate.rate_start end,
    rate_count = case when g.is_over then 0 else gate.rate_count end + p.passed
  from g join (select gate_id, count(*)::int as passed from x group by 1) p on p.gate_id = g.id
  where gate.id = g.id and g.rate is not null)
select (select count(*) from n where next_id is null) as ready, coalesce((
  select array_agg(id) from (
    select next_id as id from n where next_id is not null
    union select gate_id from x group by 1 having count(*) = $2) b), '{}') as next_ids

-- name: admit_next
-- In how many seconds the next window of a gate opens that holds somebody up by its rate. Where the window is over, it is
-- something else that holds them up.
select extract(epoch from min(g.rate_start + make_interval(secs => g.period_s)) - clock_timestamp())::float8 as next_s
from gate g where g.rate_count >= g.rate and not g.is_paused and exists (select from held h where h.gate_id = g.id)
  and g.rate_start + make_interval(secs => g.period_s) > clock_timestamp()

-- name: slot_gates
-- The gates at which these jobs still count, or would have waited.
select distinct gate_id as id from slot where job_id = any($1::bigint[])

-- name: slot_share
-- A callback counts at the FIFO lane of its source for as long as it is not done.
insert into slot (job_id, gate_id, owner_id, is_kept)
select u.id, s.gate_id, s.owner_id, true
from unnest($1::bigint[], $2::bigint[]) as u(id, source_id) join slot s on s.job_id = u.source_id and s.is_kept

-- name: gate_show
select g.*, (select count(*) from held h where h.gate_id = g.id) as waiting,
  (select count(distinct owner_id) from slot s where s.gate_id = g.id) as running,
  clock_timestamp() >= g.rate_start + make_interval(secs => g.period_s) as is_over
from gate g where account_id = $1 and kind = $2 and name = $3

-- name: gate_list
select g.*, (select count(*) from held h where h.gate_id = g.id) as waiting,
  (select count(distinct owner_id) from slot s where s.gate_id = g.id) as running,
  clock_timestamp() >= g.rate_start + make_interval(secs => g.period_s) as is_over
from gate g where account_id = $1 and kind = $2 and ($3::text is null or position($3 in name) > 0)
order by name limit $4

-- name: queue_set
insert into gate (account_id, kind, name, parallelism, is_paused) values ($1, 'queue', $2, $3, coalesce($4, false))
on conflict (account_id, kind, name) do update set
  parallelism = excluded.parallelism, is_paused = coalesce($4, gate.is_paused), updated_at = now()
returning id

-- name: gate_pause
update gate set is_paused = $4, updated_at = now() where account_id = $1 and kind = $2 and name = $3 returning id

-- name: gate_pin
update gate set
  parallelism = coalesce($3, parallelism), pins_parallelism = pins_parallelism or $3::int is not null,
  rate = coalesce($4, rate), period_s = coalesce($5, period_s),
  pins_rate = pins_rate or $4::int is not null or $5::int is not null,
  rate_start = clock_timestamp(), rate_count = 0, updated_at = now()
where account_id = $1 and kind = 'flow' and name = $2 returning id

-- name: gate_unpin
update gate set pins_parallelism = pins_parallelism and not $3, pins_rate = pins_rate and not $4, updated_at = now()
where account_id = $1 and kind = 'flow' and name = $2 returning id

-- name: gate_reset
update gate set rate_start = clock_timestamp(), rate_count = 0, updated_at = now()
where account_id = $1 and kind = 'flow' and name = $2 returning id

-- name: gate_delete
delete from gate where account_id = $1 and kind = $2 and name = $3 returning id

-- name: queue_jobs
-- What waits for, or holds, a lane of a queue, what is scheduled for it included.
select id from held where gate_id = $1 union select job_id from slot where gate_id = $1
union select id from due where gate_id = $1
