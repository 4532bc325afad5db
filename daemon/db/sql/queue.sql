-- The durable queue. A job is in exactly one of ready, due, lease and dead; a move is one statement.
-- Every write about a running job matches (id, token). Only the database's clock decides what is due or expired.

-- name: queue_reserve
select nextval('job_id_seq') as id from generate_series(1, $1::int)

-- name: queue_enqueue
-- Ids come from the arrays when the caller has reserved them, so that a duplicate costs no row.
with n as materialized (
  select coalesce(u.reserved, nextval('job_id_seq')) as id, u.*
  from unnest($1::bigint[], $2::text[], $3::bigint[], $4::smallint[], $5::smallint[], $6::real[], $7::bytea[],
              $8::float8[])
    with ordinality as u(reserved, kind, key_id, prio, max_attempts, timeout_s, body, delay_s, place)),
j as (
  insert into job (id, kind, key_id, prio, max_attempts, timeout_s, body) overriding system value
  select id, kind, key_id, prio, max_attempts, timeout_s, body from n),
r as (
  insert into ready (key_id, prio, run_at, id, attempt, losses, token)
  select key_id, prio, now(), id, 0, 0, 0 from n where delay_s <= 0),
d as (
  insert into due (run_at, key_id, prio, id, attempt, losses, token)
  select now() + make_interval(secs => delay_s), key_id, prio, id, 0, 0, 0 from n where delay_s > 0)
select id from n order by place

-- name: queue_enqueue_leased
with n as materialized (
  select coalesce(u.reserved, nextval('job_id_seq')) as id, u.*
  from unnest($1::bigint[], $2::text[], $3::bigint[], $4::smallint[], $5::smallint[], $6::real[], $7::bytea[])
    with ordinality as u(reserved, kind, key_id, prio, max_attempts, timeout_s, body, place)),
j as (
  insert into job (id, kind, key_id, prio, max_attempts, timeout_s, body) overriding system value
  select id, kind, key_id, prio, max_attempts, timeout_s, body from n),
l as (
  insert into lease (id, token, attempt, losses, worker, key_id, prio, lease_until)
  select id, 1, 1, 0, $8::bigint, key_id, prio, now() + make_interval(secs => timeout_s + $9::float8) from n)
select id, 1::bigint as token, kind, body, key_id, 1::smallint as attempt, max_attempts, timeout_s,
       now() as created_at, 0::smallint as losses
from n order by place

-- name: dedup_take
-- The keys that nobody had.
insert into dedup (key, job_id, expires_at)
select key, job_id, now() + make_interval(secs => window_s)
from unnest($1::text[], $2::bigint[], $3::float8[]) as u(key, job_id, window_s) order by key
on conflict (key) do nothing
returning key

-- name: dedup_lock
select key, job_id, expires_at <= now() as is_expired from dedup where key = any($1::text[]) order by key for update

-- name: dedup_unclaimed_due
-- Locked until the caller commits: no claim may start the job before it can see what the caller wrote.
select id from due where id = any($1::bigint[]) order by id for share

-- name: dedup_unclaimed_ready
select id from ready where id = any($1::bigint[]) order by id for share

-- name: dedup_replace
update dedup d set job_id = u.job_id, expires_at = now() + make_interval(secs => u.window_s)
from unnest($1::text[], $2::bigint[], $3::float8[]) as u(key, job_id, window_s) where d.key = u.key

-- name: claim_fair
-- Up to $2 keys after the cursor $1 and before $5 by a loose index scan, and an equal share of the head of each, but no
-- more than it has room for: $8 for the keys $7, sorted for a binary search, and $6 for all others. A key without room is
-- stepped over and does not count. When nothing is taken, one row without a job tells how far the scan came. `array(...)`
-- and MATERIALIZED keep the planner from running a LIMIT twice. Nothing in `ready` lies in the future. Below the floor lie
-- only index entries of claimed jobs, which stay for as long as anybody holds a snapshot open. A floor that lies ahead
-- of the server's own transactions was copied here from another server, and says nothing.
with recursive f as materialized (
  select coalesce(
    (select at from ready_floor where at <= pg_snapshot_xmin(pg_current_snapshot()) limit 1), '0'::xid8) as at),
k(key_id, room, n) as (
  (select $1::bigint, null::int, 0)
  union all
  select q.key_id, q.room, k.n + (q.room > 0)::int from k cross join lateral (
    select key_id, case when ($7::bigint[])[width_bucket(key_id, $7)] = key_id
                     then ($8::int[])[width_bucket(key_id, $7)] else $6::int end as room
    from ready where key_id > k.key_id and key_id < $5::bigint and born >= (select at from f) order by key_id limit 1) q
  where k.n < $2::int),
v as materialized (
  select count(*) filter (where room > 0) as keys, max(key_id) as last_key,
         coalesce(bool_or(room = 0), false) as is_held_back
  from k),
h as materialized (
  select q.t from k cross join lateral (
    select ctid as t from ready r where r.key_id = k.key_id and r.born >= (select at from f)
    order by r.prio, r.born, r.id limit least(k.room, (select greatest(1, $2::int / greatest(1, keys)) from v))
    for update skip locked) q
  where k.room > 0),
x as (delete from ready where ctid = any(array(select t from h)) returning id, key_id, prio, attempt, losses, token),
w as materialized (
  select x.id, x.token + 1 as token, (x.attempt + 1)::smallint as attempt, x.losses, x.key_id, x.prio,
         j.kind, j.body, j.max_attempts, j.timeout_s, j.created_at
  from x join job j on j.id = x.id),
l as (
  insert into lease (id, token, attempt, losses, worker, key_id, prio, lease_until)
  select id, token, attempt, losses, $3::bigint, key_id, prio, now() + make_interval(secs => timeout_s + $4::float8)
  from w)
select id, token, kind, body, key_id, attempt, max_attempts, timeout_s, created_at, losses, keys, last_key, is_held_back
from v left join w on true

-- name: raise_floor
-- The oldest birth among the heads of all (key, prio), or the oldest transaction that still runs, which may yet commit
-- something: whatever an ended one left in `ready` is among what this snapshot sees. Lower is always right, so with more
-- than $1 heads it stays where it is: then few of the dead entries lie before each of them.
with recursive f as materialized (
  select coalesce(
    (select at from ready_floor where at <= pg_snapshot_xmin(pg_current_snapshot()) limit 1), '0'::xid8) as at),
k(key_id, prio, born, n) as (
  (select key_id, prio, born, 1 from ready where born >= (select at from f) order by key_id, prio, born limit 1)
  union all
  select h.key_id, h.prio, h.born, k.n + 1 from k cross join lateral (
    (select key_id, prio, born from ready
     where key_id = k.key_id and prio > k.prio and born >= (select at from f) order by prio, born limit 1)
    union all
    (select key_id, prio, born from ready
     where key_id > k.key_id and born >= (select at from f) order by key_id, prio, born limit 1)
    limit 1) h
  where k.n <= $1::int),
n as materialized (
  select case when (select count(*) from k) > $1 then f.at
    else least((select born from k order by born limit 1), pg_snapshot_xmin(pg_current_snapshot())) end as at
  from f)
update ready_floor set at = n.at from n where ready_floor.at <> n.at

-- name: settle
-- Outcomes: 1 done 2 retry 3 snooze 4 dead 5 cancelled. A finished job's row goes with its lease. A dead or cancelled
-- job no longer holds what it had opened. An attempt that has ended counts at no gate, but a FIFO lane stays taken until
-- its job is done or dead. Delays and notes may be left out: `unnest` fills up with nulls. From $7 on: lines for the log of
-- messages, of which those of a job that is not ours any more are left out. The answer names the gates with room now.
with i as (
  select id, token, outcome, took_ms, coalesce(delay_s, 0) as delay_s, note
  from unnest($1::bigint[], $2::bigint[], $3::smallint[], $4::int[], $5::float8[], $6::text[])
    as i(id, token, outcome, took_ms, delay_s, note)),
x as (
  delete from lease l using i where l.id = i.id and l.token = i.token
  returning l.id, l.token, l.attempt, l.worker, l.key_id, l.prio, i.outcome, i.took_ms, i.delay_s, i.note),
g as (
  insert into attempt (id, attempt, worker, outcome, took_ms, note)
  select id, attempt, worker, outcome, took_ms, note from x),
r as (
  insert into due (run_at, key_id, prio, id, attempt, losses, token, gate_id)
  select now() + make_interval(secs => delay_s), x.key_id, x.prio, x.id, x.attempt - (outcome = 3)::int, 0, token, (
    select g.id from unnest(j.gates) with ordinality as a(id, place) join gate g on g.id = a.id
    where not exists (select from slot s where s.job_id = x.id and s.gate_id = g.id and s.is_kept)
    order by place limit 1)
  from x join job j on j.id = x.id where outcome in (2, 3)),
t as (
  delete from slot where job_id = any(array(select id from x))
    and (not is_kept or job_id = any(array(select id from x where outcome not in (2, 3))))
  returning job_id, gate_id),
z as (
  insert into dead (id, attempt, token, reason) select id, attempt, token, coalesce(note, '') from x where outcome = 4),
f as (delete from job where id = any(array(select id from x where outcome in (1, 5)))),
c as (
  update connection set open_job = null where open_job = any(array(select id from x where outcome in (4, 5)))),
s as (update stream set open_job = null where open_job = any(array(select id from x where outcome in (4, 5)))),
e as (
  insert into event (account_id, message_id, state, retried, next_at, status, error, response_header, response_body)
  select account_id, message_id, state, retried, now() + make_interval(secs => next_s), status, error, header, body
  from unnest($7::bigint[], $8::bigint[], $9::smallint[], $10::smallint[], $11::float8[], $12::int[], $13::text[],
              $14::text[], $15::bytea[])
    with ordinality as u(account_id, message_id, state, retried, next_s, status, error, header, body, place)
  where message_id in (select id from x)
  order by place)
select id, array(select t.gate_id from t where t.job_id = x.id) as gates from x

-- name: lock_lease
select 1 from lease where id = $1 and token = $2 for update

-- name: lock_leases
select l.id from lease l join unnest($1::bigint[], $2::bigint[]) as i(id, token) on l.id = i.id and l.token = i.token
order by l.id for update of l

-- name: release
-- The attempt is given back and the token kept. Its place in the line is behind what is ready by now.
with i as (select * from unnest($1::bigint[], $2::bigint[]) as i(id, token)),
x as (delete from lease l using i where l.id = i.id and l.token = i.token returning l.*),
g as (insert into attempt (id, attempt, worker, outcome) select id, attempt, worker, 8 from x),
r as (
  insert into ready (key_id, prio, run_at, id, attempt, losses, token)
  select key_id, prio, claimed_at, id, greatest(0, attempt - 1), losses, token from x)
select id from x

-- name: release_others
-- Leases of a worker that it does not know of: their claim was answered into a lost connection.
with x as (delete from lease where worker = $1 and id <> all($2::bigint[]) returning *),
g as (insert into attempt (id, attempt, worker, outcome) select id, attempt, worker, 8 from x),
r as (
  insert into ready (key_id, prio, run_at, id, attempt, losses, token)
  select key_id, prio, claimed_at, id, greatest(0, attempt - 1), losses, token from x)
select id from x

-- name: bring_forward
with x as (delete from due where id = any($1::bigint[]) returning *),
r as (
  insert into ready (key_id, prio, run_at, id, attempt, losses, token)
  select key_id, prio, now(), id, attempt, losses, token from x where gate_id is null),
h as (
  insert into held (gate_id, key_id, prio, id, attempt, losses, token)
  select gate_id, key_id, prio, id, attempt, losses, token from x where gate_id is not null)
select id from x

-- name: cancel
-- A running one loses its lease, so that whatever it still writes is refused.
with a as (delete from ready where id = any($1::bigint[]) returning id, attempt),
b as (delete from due where id = any($1::bigint[]) returning id, attempt),
e as (delete from lease where id = any($1::bigint[]) returning id, attempt),
h as (delete from held where id = any($1::bigint[]) returning id, attempt),
x as (select * from a union all select * from b union all select * from e union all select * from h),
g as (insert into attempt (id, attempt, outcome, note) select id, attempt, 5, $2::text from x),
t as (delete from slot where job_id = any(array(select id from x))),
f as (delete from job where id = any(array(select id from x))),
c as (update connection set open_job = null where open_job = any(array(select id from x))),
s as (update stream set open_job = null where open_job = any(array(select id from x)))
select id from x

-- name: promote
with h as materialized (
  select ctid as t from due where run_at <= now() order by run_at limit $1 for update skip locked),
x as (delete from due where ctid = any(array(select t from h)) returning *),
r as (
  insert into ready (key_id, prio, run_at, id, attempt, losses, token)
  select key_id, prio, run_at, id, attempt, losses, token from x where gate_id is null),
w as (
  insert into held (gate_id, key_id, prio, id, attempt, losses, token)
  select gate_id, key_id, prio, id, attempt, losses, token from x where gate_id is not null)
select (select count(*) from x) as moved,
       (select extract(epoch from min(run_at) - now())::float8 from due where run_at > now()) as next_s,
       exists (select from held) or exists (select from x where gate_id is not null) as is_held

-- name: rescue
-- A lost worker costs no attempt, but $1 losses on end are the job's own fault. The row lock looks at the newest version.
with e as materialized (
  select l.id, l.token, l.lease_until < now() as is_late from lease l
  where l.lease_until < now() or not exists (
    select from worker w where w.id = l.worker and w.stopped_at is null
      and w.seen_at > now() - make_interval(secs => $2::float8))
  order by l.id limit $3 for update of l skip locked),
x as (
  delete from lease l using e where l.id = e.id and l.token = e.token
  returning l.id, l.token, l.attempt, (l.losses + 1)::smallint as losses, l.worker, l.key_id, l.prio, l.claimed_at,
            e.is_late),
g as (
  insert into attempt (id, attempt, worker, outcome, note)
  select id, attempt, worker, 9, case when is_late then 'lease expired' else 'worker lost' end from x),
r as (
  insert into ready (key_id, prio, run_at, id, attempt, losses, token)
  select key_id, prio, claimed_at, id, greatest(0, attempt - 1), losses, token from x where losses < $1),
z as (insert into dead (id, attempt, token, reason) select id, attempt, token, 'worker lost' from x where losses >= $1),
t as (delete from slot where job_id = any(array(select id from x where losses >= $1))),
c as (update connection set open_job = null where open_job = any(array(select id from x where losses >= $1))),
s as (update stream set open_job = null where open_job = any(array(select id from x where losses >= $1)))
select id, losses >= $1 as is_dead from x

-- name: register_worker
insert into worker (info) values ($1) returning id

-- name: heartbeat
update worker set seen_at = now() where id = $1 and stopped_at is null returning id

-- name: stop_worker
update worker set stopped_at = now() where id = $1

-- name: attempt_partitions
select attempt_make_partitions(now(), 4)

-- name: dead_list
-- A message's body is its publisher's; another job's is ours, and says which connections it is about.
select d.id, d.at, d.attempt, d.reason, j.kind, j.key_id, case when j.kind <> 'push' then j.body end as order_
from dead d join job j using (id)
where d.id > $1 order by d.id limit $2

-- name: dead_show
select d.id, d.at, d.attempt, d.reason, j.kind, j.key_id, case when j.kind <> 'push' then j.body end as order_,
  j.body, j.max_attempts, j.created_at
from dead d join job j using (id) where d.id = $1

-- name: attempts_of
select at, attempt, outcome, took_ms, note from attempt where id = $1 order by at limit 100

-- name: dead_replay
-- The same id and a token that goes on growing: the identity of what it does stays the same. Its gate is locked against
-- deletion, so that it is not held at one that is gone; and places that a replica of a version without gates has left to
-- it go, so that it does not wait for itself.
with x as (delete from dead where id = any($1::bigint[]) returning id, token),
t as (delete from slot where job_id = any(array(select id from x))),
j as (
  select j.id, j.key_id, j.prio, x.token, (
    select a.id from unnest(j.gates) with ordinality as a(id, place) join gate g on g.id = a.id order by place limit 1
    for key share of g
  ) as gate_id
  from x join job j on j.id = x.id),
r as (
  insert into ready (key_id, prio, run_at, id, attempt, losses, token)
  select key_id, prio, now(), id, 0, 0, token from j where gate_id is null),
h as (
  insert into held (gate_id, key_id, prio, id, attempt, losses, token)
  select gate_id, key_id, prio, id, 0, 0, token from j where gate_id is not null)
select id from x

-- name: dead_drop
with x as (delete from dead where id = any($1::bigint[]) returning id, attempt),
g as (insert into attempt (id, attempt, outcome, note) select id, attempt, 5, 'dropped' from x),
f as (delete from job where id = any(array(select id from x))),
c as (update connection set open_job = null where open_job = any(array(select id from x))),
s as (update stream set open_job = null where open_job = any(array(select id from x)))
select id from x

-- name: old_dead
-- Messages have a time of their own: see `prune_old_letters`.
select d.id from dead d join job j on j.id = d.id
where d.at < now() - $1::interval and j.kind <> 'push' order by d.at limit 1000

-- name: queue_stats
select (select count(*) from ready) as available,
       (select count(*) from due where attempt = 0) as scheduled,
       (select count(*) from due where attempt > 0) as retryable,
       (select count(*) from held) as pending,
       (select count(*) from lease) as running,
       (select count(*) from dead) as discarded,
       (select extract(epoch from now() - min(run_at))::float8 from ready) as oldest_available_s,
       (select extract(epoch from now() - min(claimed_at))::float8 from lease) as oldest_running_s

-- name: queue_conservation
-- Jobs that are not in exactly one state, and states without a job. One statement, so one moment.
with s as (
  select id, 'ready' as state from ready union all select id, 'due' from due
  union all select id, 'lease' from lease union all select id, 'dead' from dead union all select id, 'held' from held)
select coalesce(j.id, s.id) as id, array_remove(array_agg(s.state), null) as states, bool_or(j.id is not null) as has_job
from job j full join s on s.id = j.id
group by 1 having count(s.id) <> 1 or not bool_or(j.id is not null) limit 100

-- name: prune_dedup
with e as materialized (
  select ctid as t from dedup where expires_at < now() order by expires_at limit $1 for update skip locked)
delete from dedup where ctid = any(array(select t from e))

-- name: prune_workers
with e as materialized (
  select id from worker w where greatest(seen_at, stopped_at) < now() - make_interval(secs => $2::float8)
    and not exists (select from lease l where l.worker = w.id)
  limit $1 for update skip locked)
delete from worker where id = any(array(select id from e))

-- name: attempt_partition_names
select c.relname::text as name from pg_inherits i join pg_class c on c.oid = i.inhrelid
where i.inhparent = 'attempt'::regclass and c.relname < 'attempt_' || to_char(
  date_trunc('week', (now() - make_interval(secs => $1::float8)) at time zone 'UTC'), 'YYYYMMDD')
order by 1

-- name: sweep_slots
-- Places that nobody will give back: a replica of a version without gates has ended their jobs.
with e as materialized (
  select s.ctid as t from slot s
  where not exists (select from job where id = s.job_id) or exists (select from dead where id = s.job_id)
  limit $1 for update skip locked)
delete from slot where ctid = any(array(select t from e))

-- name: sweep_connections
with e as materialized (
  select c.id from connection c where c.open_job is not null
    and not exists (
      select from ready where id = c.open_job union all select from due where id = c.open_job
      union all select from lease where id = c.open_job union all select from held where id = c.open_job)
  limit $1 for update skip locked)
update connection set open_job = null where id = any(array(select id from e))

-- name: sweep_streams
with e as materialized (
  select t.id from stream t where t.open_job is not null
    and not exists (
      select from ready where id = t.open_job union all select from due where id = t.open_job
      union all select from lease where id = t.open_job union all select from held where id = t.open_job)
  limit $1 for update skip locked)
update stream set open_job = null where id = any(array(select id from e))
