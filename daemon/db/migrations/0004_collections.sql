-- Collections beside the reports: what people call the ids in a report, quota counters, and resources of any API.
-- Everything is added, so that replicas of the version before go on beside this one.

alter table batch_summary add column items int not null default 0;   -- what collections held

-- ── Names ───────────────────────────────────────────────────────────────────────────────────────

-- What something was called, from when to when: a key that was deleted still has its name in an old bill.
create table name (
  tenant_id     bigint not null,
  connection_id bigint not null,
  kind          text not null,                      -- project, workspace, team, api_key or user
  id            text not null,                      -- as the reports' dimensions have it
  since         timestamptz not null default now(), -- first seen under this name
  until         timestamptz,                        -- renamed or gone by then; null: current
  name          text not null,
  seq           bigint not null,                    -- the newest reading that saw it
  primary key (connection_id, kind, id, since)
);
create unique index name_current on name (connection_id, kind, id) where until is null;

-- ── Quotas ──────────────────────────────────────────────────────────────────────────────────────

create table quota (
  stream_id   bigint not null,
  key         text not null,
  tenant_id   bigint not null,
  user_name   text,                                 -- the named parts of the key
  tenant_name text,
  period      text,
  value       numeric not null,                     -- the counter as it was last read
  used        numeric not null,                     -- what was used in all: never falls
  epoch       int not null default 1,               -- a new one with each reset, restore, refund and write-back
  revision    int not null default 1,
  detail      jsonb not null default '{}',
  pending     numeric,                              -- a write-back that is under way: which of both values comes, is open
  updated_at  timestamptz not null default now(),
  primary key (stream_id, key)
) with (fillfactor = 80);
create index quota_user on quota (tenant_id, user_name);

create table quota_change (
  at        timestamptz not null default now(),
  stream_id bigint not null,
  key       text not null,
  revision  int not null,
  epoch     int not null,
  kind      smallint not null,                      -- 1 new 2 grown 3 reset 4 restored 5 refunded 6 written back 7 detail
  delta     numeric not null,                       -- what was used; never negative
  value     numeric not null,
  poll_seq  bigint not null
) partition by range (at);
create index quota_change_key on quota_change (stream_id, key, revision);

-- How far the counters of one source stood from the ledger when they were last compared.
create table quota_drift (
  stream_id bigint primary key,
  at        timestamptz not null default now(),
  counters  int not null,                           -- those that could be compared
  counted   numeric not null,                       -- what they show in all
  booked    numeric not null,                       -- what the ledger holds of the same
  drift     numeric not null                        -- counted less booked
);

create or replace function attempt_make_partitions(from_at timestamptz, weeks int) returns int language plpgsql as $$
begin
  return make_weeks('attempt', from_at, weeks) + make_weeks('event', from_at, weeks)
    + make_weeks('quota_change', from_at, weeks);
end $$;
select attempt_make_partitions(now(), 4);

-- ── Resources ───────────────────────────────────────────────────────────────────────────────────

-- What was read of each resource of a REST collection.
create table resource (
  stream_id  bigint not null,
  id         text not null,
  tenant_id  bigint not null,
  version    text not null,                         -- as the list or the check told it before the content was read
  content    jsonb not null,
  revision   int not null default 1,
  poll_seq   bigint not null,                       -- the reading that saw it so
  changed_at timestamptz not null default now(),
  gone_at    timestamptz,                           -- its API no longer has it
  primary key (stream_id, id)
);

-- Beside it, since each listing writes all of these and hardly any content.
create table resource_fence (
  stream_id  bigint not null,
  id         text not null,
  listed_seq bigint not null default 0,             -- the newest listing that held it
  read_seq   bigint not null default 0,             -- the newest attempt that asked for it, also one that changed nothing
  job_id     bigint,                                -- what has it in hand, while that is open
  dead_job   bigint,                                -- its dead letter
  primary key (stream_id, id)
) with (fillfactor = 60);

-- The newest listing of each collection, and what has come of it so far.
create table resource_run (
  stream_id    bigint primary key,
  tenant_id    bigint not null,
  seq          bigint not null default 0,
  is_whole     boolean not null default true,       -- it was to hold all there is
  whole_seq    bigint not null default 0,           -- the newest whole listing that came to its end
  began_at     timestamptz not null default now(),
  ended_at     timestamptz,                         -- of the listing; its batches may run on
  listed       int not null default 0,
  unchanged    int not null default 0,
  changed      int not null default 0,
  failed       int not null default 0,
  gone         int not null default 0,
  withheld     int not null default 0,              -- missing, and too many to be believed at once
  calls        int not null default 0,              -- of the batches
  calls_saved  int not null default 0,              -- against a program that makes every call for every resource
  batches      int not null default 0,
  batches_done int not null default 0
);

-- Batches that wait or run.
create table resource_batch (
  job_id    bigint primary key,
  stream_id bigint not null,
  seq       bigint not null,                        -- the listing that it is of
  is_retry  boolean not null,                       -- of what has failed before
  token     bigint,                                 -- of the lease that holds a slot
  slot      smallint                                -- one of those that the collection's limits allow
);
create index resource_batch_stream on resource_batch (stream_id);
