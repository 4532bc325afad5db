-- What people look at by hand.

-- name: backlog_under_way
-- Messages that wait or run, at most $3 of each state, of the account $1 and in the state $2 where these are given.
with l as (
  select l.id, 'running' as state, l.attempt, null::timestamptz as next_at from lease l join message m using (id)
  where ($1::bigint is null or account_id = $1) and coalesce($2::text, 'running') = 'running' order by id limit $3::int),
a as (
  select r.id, 'available', r.attempt, null::timestamptz from ready r join message m using (id)
  where ($1::bigint is null or account_id = $1) and coalesce($2::text, 'available') = 'available' limit $3::int),
h as (
  select h.id, 'pending', h.attempt, null::timestamptz from held h join message m using (id)
  where ($1::bigint is null or account_id = $1) and coalesce($2::text, 'pending') = 'pending' order by h.id
  limit $3::int),
r as (
  select d.id, 'retryable', d.attempt, d.run_at from due d join message m using (id)
  where ($1::bigint is null or account_id = $1) and attempt > 0 and coalesce($2::text, 'retryable') = 'retryable'
  order by run_at limit $3::int),
s as (
  select d.id, 'scheduled', d.attempt, d.run_at from due d join message m using (id)
  where ($1::bigint is null or account_id = $1) and attempt = 0 and coalesce($2::text, 'scheduled') = 'scheduled'
  order by run_at limit $3::int),
w as (
  select 1 as place, * from l union all select 2, * from a union all select 3, * from h
  union all select 4, * from r union all select 4, * from s)
select w.id, m.salt, a.name as account, w.state, m.host, m.queue, g.name as flow_key, w.attempt, w.next_at, m.created_at
from w join message m using (id) join account a on a.id = m.account_id left join gate g on g.id = m.flow_id
order by place, next_at, w.id limit $3::int

-- name: backlog_of_jobs
select m.id, m.salt, m.account_id, a.name as account, m.url
from message m join account a on a.id = m.account_id where m.id = any($1::bigint[])
