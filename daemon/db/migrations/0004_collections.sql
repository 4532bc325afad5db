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

create or replace function attempt_make_partitions(from_at timestamptz, weeks int) returns int language plpgsql as $$
begin
  return make_weeks('attempt', from_at, weeks) + make_weeks('event', from_at, weeks)
    + make_weeks('quota_change', from_at, weeks);
end $$;
select attempt_make_partitions(now(), 4);
