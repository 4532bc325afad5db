-- Dead letters of messages.

-- name: letter_stretch
select id as place, at, attempt, reason from dead
where at >= $13 and at < $14 and at <= $15 and (at, id) < ($15::timestamptz, $16::bigint)
order by at desc, id desc limit $17

-- name: letter_these
select id as place, at, attempt, reason from dead
where id = any($23::bigint[]) and at >= $13 and at < $14 and at <= $15 and (at, id) < ($15::timestamptz, $16::bigint)
order by at desc, id desc limit $17

-- name: letter_page
-- Of one stretch the first $18 letters that match, up to $20 bytes, though one in any case where $21 says so. Their
-- bodies come along where $22 says so. The first row tells how far the stretch went, even where nothing matches. What a
-- letter says of the response is what the message's last failure says.
with e as materialized ({rows}),
n as materialized (
  select e.place, e.at, e.attempt, e.reason, m.* from e join message m on m.id = e.place
  where {matches} order by e.at desc, e.place desc limit case when $19::int[] is null then $18::bigint end),
f as materialized (
  select n.*, v.status, v.error, v.response_header, v.response_body
  from n left join lateral (
    select status, error, response_header, response_body from event v
    where v.message_id = n.id and v.state in (3, 6) order by v.at desc, v.id desc limit 1) v on true
  where $19::int[] is null or coalesce(v.status, 0) = any($19::int[])
  order by n.at desc, n.place desc limit $18::bigint),
b as materialized (
  select place, row_number() over w as n,
    sum(coalesce(octet_length(response_body), 0) + coalesce(octet_length(p.body), 0)) over w as bytes
  from f left join payload p on p.id = f.payload_id and $22 window w as (order by at desc, place desc))
select s.*, l.at as end_at, l.place as end_id, f.*, p.body
from (select count(*) as walked, (select count(*) from f) as matched from e) s
left join (select at, place from e order by at, place limit 1) l on true
left join (f join b using (place)) on b.bytes <= $20::bigint or (b.n = 1 and $21)
left join payload p on p.id = f.payload_id and $22
order by f.at desc nulls last, f.place desc

-- name: letter_lock
-- Letters of an account, locked: whoever else wants them waits, and then finds what is left.
select d.id, d.at from dead d join message m on m.id = d.id
where d.id = any($1::bigint[]) and m.account_id = $2 order by d.id for update of d

-- name: letter_sizes
select m.id, coalesce(octet_length(p.body), 0) as bytes
from message m left join payload p on p.id = m.payload_id where m.id = any($1::bigint[])

-- name: letter_messages
select m.*, p.body from message m left join payload p on p.id = m.payload_id where m.id = any($1::bigint[])
