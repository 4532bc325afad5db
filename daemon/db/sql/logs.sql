-- The log of messages: what happened to them, newest first.

-- name: log_of_account
select at, id as place, message_id, state, retried, next_at, status, error, response_header, response_body
from event
where account_id = $1 and at >= $13 and at < $14 and at <= $15 and (at, id) < ($15::timestamptz, $16::bigint)
order by at desc, id desc limit $17

-- name: log_of_messages
-- The join looks whose they are.
select at, id as place, message_id, state, retried, next_at, status, error, response_header, response_body
from event
where message_id = any($2::bigint[]) and at >= $13 and at < $14 and at <= $15
  and (at, id) < ($15::timestamptz, $16::bigint)
order by at desc, id desc limit $17

-- name: log_lines
-- Of one stretch the first $18 lines that match, up to so many bytes: $20 of each message's body at most (null: all of
-- it), and $21 in all, though one line in any case where $22 says so. The first row tells how far the stretch went, even
-- where nothing matches.
with e as materialized ({rows}),
f as materialized (
  select e.*, m.* from e join message m on m.id = e.message_id
  where {matches} and ($19::smallint[] is null or e.state = any($19::smallint[]))
  order by at desc, place desc limit $18),
b as materialized (
  select at, place, row_number() over w as n,
    sum(coalesce(octet_length(response_body), 0) + coalesce(least(octet_length(p.body), $20::int), 0)) over w as bytes
  from f left join payload p on p.id = f.payload_id window w as (order by at desc, place desc))
select s.*, l.at as end_at, l.place as end_id, f.*, substring(p.body from 1 for coalesce($20, 2147483647)) as body
from (select count(*) as walked, (select count(*) from f) as matched from e) s
left join (select at, place from e order by at, place limit 1) l on true
left join (f join b using (at, place)) on b.bytes <= $21::bigint or (b.n = 1 and $22)
left join payload p on p.id = f.payload_id and $20 is distinct from 0
order by f.at desc nulls last, f.place desc

-- name: log_groups
-- Of one stretch the first $18 messages, each at its newest matching line among those up to the place ($20, $21).
with e as materialized ({rows}),
f as materialized (
  select e.at, e.place, m.id, m.salt
  from e join message m on m.id = e.message_id
  where {matches} and ($19::smallint[] is null or e.state = any($19::smallint[])) and not exists (
    select from event n
    where n.message_id = e.message_id and n.at >= $13 and n.at < $14 and (n.at, n.id) > (e.at, e.place)
      and (n.at, n.id) <= ($20::timestamptz, $21::bigint)
      and ($19::smallint[] is null or n.state = any($19::smallint[])))
  order by at desc, place desc limit $18)
select s.*, l.at as end_at, l.place as end_id, f.*
from (select count(*) as walked, (select count(*) from f) as matched from e) s
left join (select at, place from e order by at, place limit 1) l on true
left join f on true
order by f.at desc nulls last, f.place desc
