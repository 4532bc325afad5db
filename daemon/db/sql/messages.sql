-- Messages with a URL. The job's own tables say in which state a message is; what stays when it has ended is here.

-- name: message_insert
-- Jobs of kind push with all that belongs to them, in one statement. A row without a body of its own may share another's.
with n as materialized (
  select u.*, nullif(array_remove(array[queue_gate, flow_gate, all_gate], null), '{}') as gates,
    greatest(now(), coalesce(to_timestamp(not_before), now() + make_interval(secs => delay_s))) as run_at
  from unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[], $5::int[], $6::float8[], $7::text[], $8::text[],
              $9::text[], $10::text[], $11::bigint[], $12::bytea[], $13::float8[], $14::float8[], $15::bigint[],
              $16::bigint[], $17::bigint[], $18::bigint[], $19::text[], $20::text[], $21::text[], $22::text[],
              $23::text[])
    as u(id, account_id, salt, key_id, max_attempts, timeout_s, url, host, method, spec, payload_id, body, not_before,
         delay_s, queue_gate, flow_gate, all_gate, source_id, queue, schedule_id, topic, labels, caller_ip)),
j as (
  insert into job (id, kind, key_id, max_attempts, timeout_s, body, gates) overriding system value
  select id, 'push', key_id, max_attempts, timeout_s, '', gates from n),
p as (insert into payload (id, body) select id, body from n where payload_id = id),
m as (
  insert into message (id, account_id, salt, url, host, method, spec, payload_id, not_before, source_id, queue, flow_id,
                       schedule_id, topic, labels, caller_ip)
  select id, account_id, salt, url, host, method, spec, payload_id, run_at, source_id, queue, flow_gate, schedule_id,
         topic, string_to_array(labels, ','), caller_ip from n),
e as (insert into event (account_id, message_id, state, next_at) select account_id, id, 1, run_at from n order by id),
r as (
  insert into ready (key_id, prio, run_at, id, attempt, losses, token)
  select key_id, 100, now(), id, 0, 0, 0 from n where run_at <= now() and gates is null),
h as (
  insert into held (gate_id, key_id, prio, id, attempt, losses, token)
  select gates[1], key_id, 100, id, 0, 0, 0 from n where run_at <= now() and gates is not null),
d as (
  insert into due (run_at, key_id, prio, id, attempt, losses, token, gate_id)
  select run_at, key_id, 100, id, 0, 0, 0, gates[1] from n where run_at > now())
select count(*) from n

-- name: message_names
select id, salt from message where id = any($1::bigint[])

-- name: message_load
-- What an attempt needs, and the note that it has begun. Of a job whose lease is not ours any more: nothing. Large bodies
-- are fetched one by one, so that many at once do not fill the memory.
with m as materialized (
  select m.id, l.attempt, m.account_id, m.salt, m.url, m.method, m.spec, m.payload_id, m.not_before, m.created_at,
         m.source_id, m.queue, m.schedule_id, m.topic, m.labels, m.caller_ip,
         a.key_id, a.keys, coalesce(octet_length(p.body), 0) as body_bytes,
         case when octet_length(p.body) <= $3::int then p.body end as body
  from unnest($1::bigint[], $2::bigint[]) as i(id, token)
  join lease l on l.id = i.id and l.token = i.token
  join message m on m.id = i.id
  join account a on a.id = m.account_id
  left join payload p on p.id = m.payload_id),
e as (
  insert into event (account_id, message_id, state, retried)
  select account_id, id, 2, attempt - 1 from m)
select * from m

-- name: message_body
select body from payload where id = $1

-- name: event_insert
insert into event (account_id, message_id, state, retried, next_at, status, error, response_header, response_body)
select account_id, message_id, state, retried, now() + make_interval(secs => next_s), status, error, header, body
from unnest($1::bigint[], $2::bigint[], $3::smallint[], $4::smallint[], $5::float8[], $6::int[], $7::text[], $8::text[],
            $9::bytea[])
  with ordinality as u(account_id, message_id, state, retried, next_s, status, error, header, body, place)
order by place

-- name: message_unmourned
-- Dead letters that nobody has told of: whoever had them was lost, or cut off.
select d.id, d.attempt, d.reason from dead d join message m on m.id = d.id
where d.at > now() - $2::interval and d.at < now() - make_interval(secs => $1::float8)
  and not exists (select from event e where e.message_id = d.id and e.state = 6 and e.at > d.at - interval '1 minute')
order by d.id limit 100

-- name: message_mourn
-- The row lock keeps two replicas from telling twice; the second one finds nothing to tell.
select d.id, d.at, d.attempt, d.reason, m.account_id, m.salt, m.url, m.method, m.spec, m.payload_id, m.not_before,
  m.created_at, m.source_id, m.queue, m.schedule_id, m.topic, m.labels, m.caller_ip, p.body
from dead d join message m on m.id = d.id left join payload p on p.id = m.payload_id
where d.id = any($1::bigint[]) order by d.id for update of d skip locked
