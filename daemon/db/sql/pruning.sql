-- Housekeeping of messages: what is over and old enough goes.

-- name: prune_lock
-- One at a time: two who each delete one of the last two messages of a body would both leave the body.
select pg_try_advisory_xact_lock(hashtext('tallyd.messages.prune'))

-- name: prune_old_letters
select d.id from dead d join job j on j.id = d.id
where j.kind = 'push' and d.at < now() - make_interval(secs => $1) order by d.at limit 1000

-- name: prune_messages
-- Of the next 1,000 messages after $1 those that are over: old, without a job, and with nothing in the log since. The
-- answer is how far it came and what it deleted; `is_young` where all that follow will be too.
with e as materialized (
  select id, payload_id, created_at < now() - make_interval(secs => $2) as is_old
  from message where id > $1 order by id limit 1000),
x as (
  delete from message m using e
  where m.id = e.id and e.is_old and not exists (select from job j where j.id = m.id)
    and not exists (
      select from event v where v.message_id = m.id and v.at >= now() - make_interval(secs => $2))
  returning m.payload_id)
select (select count(*) from e) as walked, (select max(id) from e) as last_id,
       not coalesce((select bool_or(is_old) from e), false) as is_young,
       (select count(*) from x) as deleted,
       array(select distinct payload_id from x where payload_id is not null) as payloads

-- name: prune_payloads
-- Bodies that no message has any more; the first one's id is the body's own.
delete from payload p where p.id = any($1::bigint[])
  and not exists (select from message m where m.id = p.id)
  and not exists (select from message m where m.payload_id = p.id and m.payload_id <> m.id)

-- name: prune_event_partitions
select c.relname::text as name from pg_inherits i join pg_class c on c.oid = i.inhrelid
where i.inhparent = 'event'::regclass and c.relname < 'event_' || to_char(
  date_trunc('week', (now() - make_interval(secs => $1)) at time zone 'UTC'), 'YYYYMMDD')
order by 1

-- name: prune_event_strays
with e as materialized (
  select ctid as t from event_stray where at < now() - make_interval(secs => $2) limit $1 for update skip locked)
delete from event_stray where ctid = any(array(select t from e))

-- name: prune_gates_lock
-- Flow-control keys that may be out of use. Whoever publishes for one holds it, so that what it is used for shows in the
-- statement that follows, whose snapshot is younger than the lock.
select id from gate g where id > $1 and kind = 'flow' and not is_paused and not pins_parallelism and not pins_rate
  and updated_at < now() - make_interval(secs => $2)
  and not exists (select from message m where m.flow_id = g.id)
order by id limit 1000 for update skip locked

-- name: prune_gates_delete
delete from gate g where id = any($1::bigint[]) and not exists (select from message m where m.flow_id = g.id)
