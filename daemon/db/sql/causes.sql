-- From a cause to its bookings, and back.

-- name: causes_tick_of_request
-- No index: a table of one line a slot, and a question that a person asks.
select slot_at from tick where request_id = $1 order by slot_at desc limit 1

-- name: causes_slot_of_message
select slot_at from delivery where message_id = $1

-- name: causes_deliveries
-- The messages that asked for a slot; the first made its tick. Three days of them are kept, so there is no index.
select message_id, at from delivery where slot_at = $1 order by at, message_id limit $2

-- name: causes_jobs
-- The jobs of a tick (slot $1, made at $2, for the request $3), or those named in $4; $5 at most, the oldest first.
-- Open ones are found by the instant that they share with their tick; `job` only holds what is not finished. Those that
-- a batch was split into belong to no slot, and are found by their request.
with ids as (
  select job_id as id from batch_summary where slot_at = $1::timestamptz
  union select job_id from handover where slot_at = $1::timestamptz
  union select id from job where created_at = $2::timestamptz and kind = 'poll'
  union select job_id from batch_summary
    where request_id = $3::text and finished_at >= $2::timestamptz and finished_at < $2::timestamptz + interval '1 day'
  union select id from unnest($4::bigint[]) as g(id)),
named as (
  select i.id from ids i
  where exists (select from job where id = i.id) or exists (select from batch_summary where job_id = i.id)
    or exists (select from booking where job_id = i.id) or exists (select from handover where job_id = i.id)
    or exists (select from attempt where id = i.id) or exists (select from message where id = i.id)),
chosen as materialized (select id, count(*) over () as total from named order by id limit $5)
select c.total, c.id, coalesce(j.kind, b.kind, case when m.id is not null then 'push' end) as kind,
  coalesce(
    case when exists (select from ready where id = c.id) then 'available' end,
    (select case when attempt = 0 then 'scheduled' else 'retryable' end from due where id = c.id),
    case when exists (select from held where id = c.id) then 'pending' end,
    case when exists (select from lease where id = c.id) then 'running' end,
    case when exists (select from dead where id = c.id) then 'discarded' end,
    case (select outcome from attempt where id = c.id order by at desc limit 1)
      when 5 then 'cancelled' when 1 then 'completed' end,
    case when b.job_id is not null then 'completed' else 'gone' end) as state,
  coalesce(b.slot_at, h.slot_at) as slot_at, b.request_id, case when j.kind in ('poll', 'poll_one') then j.body end as body,
  b.finished_at, b.connections, b.unchanged, b.stored, b.restated, b.retried, b.dead, b.requests, b.rows, b.duration_s,
  h.place, h.message_id, h.published_at, h.released_at, h.released_by, h.reported_at, h.reported_status
from chosen c left join job j using (id) left join batch_summary b on b.job_id = c.id
left join handover h on h.job_id = c.id
left join message m on m.id = c.id
order by c.id

-- name: causes_attempts
select at, attempt, outcome, worker, took_ms, left(note, 500) as note from attempt where id = $1 order by at desc limit $2

-- name: causes_message
select id from message where id = $1 and salt = $2

-- name: causes_job_of_seq
select job_id from booking where poll_seq = $1

-- name: causes_reads
-- The reads that booked something, of these jobs or (with $2) that one alone. A read is booked in one flush or in a few
-- that follow it, all before its job ended; no job runs for more than an hour.
select count(*) over () as total, k.poll_seq, k.job_id, k.booked_at,
  least(case when exists (select from job where id = k.job_id) then now() else coalesce(b.finished_at, now()) end,
        k.booked_at + interval '1 hour') as until
from booking k left join batch_summary b on b.job_id = k.job_id
where k.job_id = any($1::bigint[]) and ($2::bigint is null or k.poll_seq = $2)
order by k.poll_seq limit $3

-- name: causes_bookings
-- What these reads booked. The ledger has no index by read, so it is found by when it was booked.
select l.poll_seq, t.name as tenant, c.name as connection, c.provider, s.source, r.currency, r.basis,
  count(*) filter (where l.kind = 1) as new, count(*) filter (where l.kind = 2) as restated,
  count(*) filter (where l.kind = 3) as vanished, count(*) filter (where l.kind = 4) as repriced,
  trim_scale(sum(l.amount)) as amount
from ledger l join usage_row r using (stream_id, bucket_start, row_key)
join stream s on s.id = l.stream_id join connection c on c.id = s.connection_id join tenant t on t.id = c.tenant_id
where l.booked_at >= $2 and l.booked_at <= $3 and l.poll_seq = any($1::bigint[])
group by l.poll_seq, t.name, c.name, c.provider, s.source, r.currency, r.basis
order by 1, 2, 3, 5, 6 nulls last, 7
