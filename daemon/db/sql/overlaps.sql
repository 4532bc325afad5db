-- Which connections may hold the same money: see daemon/domain/overlap.py for the judgement.

-- name: overlap_views
-- $1: the gateways among the providers. $2: as of. Who the organisation is, a key tells where the provider does not.
-- Without $2, what a stream covers is what it has read, and each run of buckets that were read before that: a backfill may
-- begin before the connection does, and a history is read newest first. With it, from its oldest to its newest bucket
-- that had been booked by then: the ledger alone does not forget.
with by_org as (
  select provider, org_id from connection where org_id is not null group by 1, 2 having count(*) > 1
), by_key as (
  select provider, base_url, credential_print, min(org_id) as org_id from connection group by 1, 2, 3 having count(*) > 1
), chosen as materialized (
  select c.id, c.tenant_id, c.provider, c.state, coalesce(c.settings ->> 'overlap', 'auto') = 'add' as adds,
    coalesce('org ' || coalesce(c.org_id, k.org_id), 'key ' || encode(c.credential_print, 'hex') || ' ' || c.base_url)
      as account
  from connection c
  left join by_key k using (provider, base_url, credential_print)
  left join by_org o on o.provider = c.provider and o.org_id = c.org_id
  where k.provider is not null or o.provider is not null
    or c.tenant_id in (select g.tenant_id from connection g where g.provider = any($1::text[]))
)
select s.id as stream_id, c.tenant_id, c.id as connection_id, c.provider, s.source, c.account, v.start_at, v.end_at,
  w.width, $2::timestamptz is null and (c.state <> 'active' or s.parked_reason is not null) as is_ended, c.adds
from chosen c join stream s on s.connection_id = c.id
join lateral (
  select width, case width when '1m' then interval '1 min' when '1h' then interval '1 h' else interval '24 h' end as span
  from grain_epoch where stream_id = s.id
  order by case width when '1d' then 1 when '1h' then 2 else 3 end limit 1
) w on true
join lateral (
  select s.covered_from as start_at, greatest(
    s.covered_to, s.last_end, (select max(b.bucket_start) + w.span from bucket b where b.stream_id = s.id)) as end_at
  where $2::timestamptz is null
  union all
  select min(b.bucket_start), max(b.bucket_start) + w.span
  from (
    select bucket_start, bucket_start - w.span * row_number() over (order by bucket_start) as run
    from bucket where stream_id = s.id and bucket_start < coalesce(s.covered_from, 'infinity')
  ) b
  where $2::timestamptz is null group by b.run
  union all
  select o.bucket_start, n.bucket_start + w.span
  from (
    select r.bucket_start from usage_row r join ledger l using (tenant_id, bucket_start, row_key)
    where r.stream_id = s.id and l.revision = 1 and l.booked_at <= $2 order by 1 limit 1
  ) o, (
    select r.bucket_start from usage_row r join ledger l using (tenant_id, bucket_start, row_key)
    where r.stream_id = s.id and l.revision = 1 and l.booked_at <= $2 order by 1 desc limit 1
  ) n
  where $2::timestamptz is not null
) v on v.start_at < v.end_at
order by c.id, s.id

-- name: overlap_labels
select c.id, t.name || '/' || c.name as label from connection c join tenant t on t.id = c.tenant_id
where c.id = any($1::bigint[])

-- name: overlap_kin
-- Who else may hold a connection's money: of the same organisation anywhere, or in its tenant on the other side of a
-- gateway. $2: the gateways among the providers, $3: the vendors.
with known as (
  select provider, base_url, credential_print, min(org_id) as org_id from connection group by 1, 2, 3
), named as (
  select c.id, c.tenant_id, c.name, c.provider, c.state,
    coalesce('org ' || coalesce(c.org_id, k.org_id), 'key ' || encode(c.credential_print, 'hex') || ' ' || c.base_url)
      as account
  from connection c join known k using (provider, base_url, credential_print)
)
select t.name || '/' || o.name as label, o.provider, o.provider = n.provider as is_duplicate
from named n join named o on o.id <> n.id and (
  (o.provider = n.provider and o.account = n.account)
  or (o.tenant_id = n.tenant_id and o.provider <> n.provider and o.state <> 'archived' and (
    (n.provider = any($2::text[]) and o.provider = any($3::text[]))
    or (o.provider = any($2::text[]) and n.provider = any($3::text[])))))
join tenant t on t.id = o.tenant_id
where n.id = $1
order by 1
