-- name: resource_take
-- What a part of a listing says, noted and compared with what is stored, in one statement. Streams are locked, so the
-- values from before it are the newest.
with g as materialized (
  select distinct on (stream_id, id) * from unnest($1::bigint[], $2::text[], $3::text[], $4::bigint[]) with ordinality
    as u(stream_id, id, version, seq, n)
  order by stream_id, id, n desc
), open as materialized (
  select b.job_id from resource_batch b where b.stream_id in (select stream_id from g) and exists (
    select from ready where id = b.job_id union all select from due where id = b.job_id
    union all select from lease where id = b.job_id)
), noted as (
  insert into resource_fence as f (stream_id, id, listed_seq) select stream_id, id, seq from g order by stream_id, id
  on conflict (stream_id, id) do update set listed_seq = excluded.listed_seq
), told as (
  select g.*, f.listed_seq is distinct from g.seq as is_first, f.job_id in (select job_id from open) as is_open,
    coalesce(g.version = r.version and r.gone_at is null, false) as is_same
  from g left join resource_fence f using (stream_id, id) left join resource r using (stream_id, id)
)
select stream_id, count(*) filter (where is_first)::int as listed,
  count(*) filter (where is_first and is_same)::int as unchanged,
  coalesce(array_agg(id order by n) filter (where not is_same and is_open is not true), '{}') as ids,
  coalesce(array_agg(version order by n) filter (where not is_same and is_open is not true), '{}') as versions
from told group by stream_id

-- name: resource_hand_out
with batch as (
  insert into resource_batch (job_id, stream_id, seq, is_retry)
  select * from unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::boolean[])
  on conflict do nothing
), mine as materialized (
  select f.stream_id, f.id, u.job_id from unnest($5::bigint[], $6::text[], $7::bigint[]) as u(stream_id, id, job_id)
  join resource_fence f using (stream_id, id) order by f.stream_id, f.id for update of f
)
update resource_fence f set job_id = m.job_id from mine m where f.stream_id = m.stream_id and f.id = m.id

-- name: resource_begin_run
-- With the first word of a listing the figures of the one before are over.
insert into resource_run as r (stream_id, tenant_id, seq, is_whole)
select * from unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::boolean[])
on conflict (stream_id) do update set
  seq = excluded.seq, is_whole = excluded.is_whole, began_at = now(), ended_at = null, listed = 0, unchanged = 0,
  changed = 0, failed = 0, gone = 0, calls = 0, calls_saved = 0, batches = 0, batches_done = 0
where r.seq <> excluded.seq

-- name: resource_note_listed
update resource_run r set listed = r.listed + g.listed, unchanged = r.unchanged + g.unchanged,
  batches = r.batches + g.batches, calls_saved = r.calls_saved + g.calls_saved
from unnest($1::bigint[], $2::int[], $3::int[], $4::int[], $5::int[])
  as g(stream_id, listed, unchanged, batches, calls_saved)
where r.stream_id = g.stream_id

-- name: resource_ended
-- A listing without any item has noted nothing. What it was to hold, the settings tell.
select s.id as stream_id, s.tenant_id, c.settings ? 'list' as is_listed,
  case when r.seq = g.seq then r.is_whole
       else c.settings ? 'list' and c.settings #> '{list,since}' is null end as is_whole,
  coalesce(r.whole_seq, 0) as whole_seq
from unnest($1::bigint[], $2::bigint[]) as g(id, seq)
join stream s on s.id = g.id join connection c on c.id = s.connection_id left join resource_run r on r.stream_id = s.id
order by s.id

-- name: resource_missing
select count(*)::int as known, count(*) filter (where f.listed_seq < $2)::int as missing
from resource r join resource_fence f using (stream_id, id) where r.stream_id = $1 and r.gone_at is null

-- name: resource_go
-- Those which the listing of $2 or an older one was the last to lack are gone, unless they were read after $3 had begun.
with mine as materialized (
  select f.stream_id, f.id from resource_fence f join resource r using (stream_id, id)
  where f.stream_id = $1 and f.listed_seq < $2 and f.read_seq < $3 and r.gone_at is null
  order by f.id for update of f
), fenced as (
  update resource_fence f set read_seq = $3 from mine m where f.stream_id = m.stream_id and f.id = m.id
), gone as (
  update resource r set gone_at = now(), changed_at = now(), revision = r.revision + 1, poll_seq = $3
  from mine m where r.stream_id = m.stream_id and r.id = m.id returning 1
)
select count(*)::int from gone

-- name: resource_forget
-- Listed once, never read, and listed no more.
delete from resource_fence f where f.stream_id = $1 and f.listed_seq < $2 and f.read_seq < $2
  and not exists (select from resource r where r.stream_id = f.stream_id and r.id = f.id)

-- name: resource_tidy_batches
-- Of jobs that were cancelled, or died as a whole.
delete from resource_batch b where b.stream_id = any($1::bigint[]) and not exists (
  select from ready where id = b.job_id union all select from due where id = b.job_id
  union all select from lease where id = b.job_id)

-- name: resource_end_run
update resource_run set whole_seq = case when is_whole then seq else whole_seq end, ended_at = now(), gone = gone + $2,
  withheld = $3
where stream_id = $1

-- name: resource_stored_ids
-- What is stored and still there, where the API cannot list; the newest listing of ids did not name these.
select r.id from resource r join resource_fence f using (stream_id, id)
where r.stream_id = $1 and r.id > $3 and r.gone_at is null and f.listed_seq < $2 order by r.id limit $4

-- name: resource_connection
select connection_id from stream where id = $1

-- name: resource_streams
select s.id from stream s where s.connection_id = $1 and s.source = $2

-- name: resource_known
select f.id, f.read_seq, r.version, r.gone_at is not null as is_gone
from resource_fence f left join resource r using (stream_id, id) where f.stream_id = $1 and f.id = any($2::text[])

-- name: resource_lock_run
insert into resource_run as r (stream_id, tenant_id) values ($1, $2)
on conflict (stream_id) do update set tenant_id = excluded.tenant_id

-- name: resource_open_batch
-- A slot is taken for as long as the lease of its batch lasts. The run is locked, so that no two take the same.
with taken as (
  select b.slot from resource_batch b join lease l on l.id = b.job_id and l.token = b.token
  where b.stream_id = $2 and b.slot is not null and b.job_id <> $1
), free as (
  select min(n)::smallint as slot from generate_series(1, least($4, (select count(*) + 1 from taken))) n
  where n not in (select slot from taken)
)
insert into resource_batch as b (job_id, stream_id, seq, is_retry, token, slot)
select $1, $2, (select seq from resource_run where stream_id = $2), $5, $3, slot from free where slot is not null
on conflict (job_id) do update set token = excluded.token, slot = excluded.slot
returning slot

-- name: resource_waiting
select count(*)::int from resource_batch where stream_id = $1

-- name: resource_write
-- One statement for a batch: each resource's fence, and the content of what changed. An older attempt is refused, also
-- by a newer one that changed nothing.
with g as materialized (
  select * from unnest($2::text[], $3::text[], $4::text[], $5::boolean[], $6::bigint[]) as u(id, version, content, is_gone, dead_job)
), fenced as (
  insert into resource_fence as f (stream_id, id, read_seq, dead_job)
  select $1, id, $7, dead_job from g order by id
  on conflict (stream_id, id) do update set read_seq = excluded.read_seq, dead_job = excluded.dead_job
    where f.read_seq < excluded.read_seq
  returning f.id
), written as (
  insert into resource as r (stream_id, id, tenant_id, version, content, poll_seq)
  select $1, g.id, $8, g.version, g.content::jsonb, $7 from g join fenced using (id) where g.content is not null order by g.id
  on conflict (stream_id, id) do update set version = excluded.version, content = excluded.content,
    poll_seq = excluded.poll_seq, revision = r.revision + 1, changed_at = now(), gone_at = null
  returning 1
), gone as (
  update resource r set gone_at = now(), changed_at = now(), revision = r.revision + 1, poll_seq = $7
  from g join fenced using (id) where g.is_gone and r.stream_id = $1 and r.id = g.id and r.gone_at is null returning 1
)
select (select count(*) from written)::int as written, (select count(*) from gone)::int as gone,
  (select count(*) from g)::int - (select count(*) from fenced)::int as refused

-- name: resource_letters
select f.id, f.dead_job from resource_fence f join dead d on d.id = f.dead_job
where f.stream_id = $1 and f.id = any($2::text[])

-- name: resource_count
update resource_run r set changed = r.changed + $2, unchanged = r.unchanged + $3, failed = r.failed + $4, gone = r.gone + $5,
  calls = r.calls + $6, calls_saved = r.calls_saved + $7, batches_done = r.batches_done + $8
from resource_batch b where b.job_id = $1 and r.stream_id = b.stream_id and r.seq = b.seq

-- name: resource_close_batch
delete from resource_batch where job_id = $1

-- name: resource_batch_seq
select coalesce((select seq from resource_batch where job_id = $1), 0)

-- name: resource_open_batches
-- Those that run, or wait for a worker or a slot; a retry that waits for its time is not among them.
select b.job_id from resource_batch b join stream s on s.id = b.stream_id join connection c on c.id = s.connection_id
where c.id = any($1::bigint[]) and c.state = 'active' and (
  exists (select from ready where id = b.job_id union all select from lease where id = b.job_id)
  or exists (select from due where id = b.job_id and (run_at <= now() or not b.is_retry)))

-- name: resource_runs
select c.id as connection_id, t.name as tenant, c.name, c.base_url, c.state, (c.settings ->> 'every_s')::int as every_s,
  r.seq, r.began_at, r.ended_at, r.listed, r.unchanged, r.changed, r.failed, r.gone, r.withheld, r.calls, r.calls_saved,
  r.batches, r.batches_done,
  (select count(*) from resource x where x.stream_id = s.id and x.gone_at is null)::int as stored,
  (select count(*) from resource x where x.stream_id = s.id and x.gone_at is not null)::int as stored_gone
from connection c join tenant t on t.id = c.tenant_id
left join stream s on s.connection_id = c.id and s.source = $4 left join resource_run r on r.stream_id = s.id
where c.provider = $1 and c.state <> 'archived' and ($2::text is null or t.name = $2) and ($3::text is null or c.name = $3)
order by t.name, c.name
