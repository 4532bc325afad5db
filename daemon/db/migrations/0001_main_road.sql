-- The main road: tenants and their connections, the exact ledger, the ticks, and the one queue.
-- Why each table has its shape: docs/explanation/architecture.md and docs/reference/schema.md.

-- ── Tenants and connections ─────────────────────────────────────────────────────────────────────

create table tenant (
  id          bigint generated always as identity primary key,
  name        text not null unique check (name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$'),
  created_at  timestamptz not null default now(),
  removed_at  timestamptz
);

create table connection (
  id                bigint generated always as identity primary key,
  tenant_id         bigint not null references tenant,
  name              text not null check (name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$'),
  provider          text not null,
  base_url          text not null,
  settings          jsonb not null default '{}',
  credential        bytea not null,                 -- nonce, ciphertext and tag of AES-256-GCM
  credential_key_id text not null,                  -- which TALLYD_SECRET_KEY sealed it
  credential_print  bytea not null,                 -- a digest of the key: the same key means the same organisation
  org_id            text,                           -- the provider's own name for the organisation, if it tells
  since             timestamptz not null,
  state             text not null default 'active' check (state in ('active', 'paused', 'parked', 'archived')),
  state_reason      text,
  state_at          timestamptz not null default now(),
  created_at        timestamptz not null default now(),
  next_due_at       timestamptz not null default now(),
  changed_at        timestamptz not null default now(),   -- last time a poll booked something: the idle ladder's clock
  polled_at         timestamptz,
  open_job          bigint,                         -- the batch that is polling it: at most one is open
  unique (tenant_id, name)
) with (fillfactor = 80);
create index connection_due on connection (next_due_at) where state = 'active' and open_job is null;
create index connection_open on connection (open_job) where open_job is not null;
create index connection_org on connection (provider, org_id) where org_id is not null;

-- ── Streams: one source of one connection ───────────────────────────────────────────────────────

create table stream (
  id                bigint generated always as identity primary key,
  tenant_id         bigint not null references tenant,
  connection_id     bigint not null references connection,
  source            text not null,
  covered_from      timestamptz,
  covered_to        timestamptz,
  floor_at          timestamptz,                    -- the provider's history floor, once met
  last_seq          bigint not null default 0,      -- the fence: the newest answer taken,
  last_start        timestamptz,                    -- and the window that it covered
  last_end          timestamptz,
  last_pages        int not null default 1,
  probe_digest      bytea,
  read_at           timestamptz,
  hourly_at         timestamptz,
  daily_at          timestamptz,
  changed_at        timestamptz,
  open_job          bigint,                         -- a poll_one that is still waiting or running
  dead_job          bigint,                         -- its dead letter: the next failure updates it, adds none
  parked_reason     text,
  unique (connection_id, source)
) with (fillfactor = 70);
create index stream_open on stream (open_job) where open_job is not null;

create table grain_epoch (
  stream_id  bigint not null references stream,
  start_at   timestamptz not null,                  -- the Unix epoch for the first
  grain_id   text not null,
  api        text not null,
  width      text not null,
  group_by   text[] not null,
  primary key (stream_id, start_at)
);

create table bucket (
  stream_id      bigint not null references stream,
  bucket_start   timestamptz not null,
  last_seq       bigint not null,
  hash_version   smallint not null,
  digest         bytea not null,                    -- of what is stored, withheld tombstones included
  totals         bigint[] not null,                 -- input, cache read, cache write, output, requests
  total_quantity numeric not null default 0,
  total_amount   numeric not null default 0,        -- as the provider reported it
  pending_since  timestamptz,                       -- rows vanished from a read then,
  pending_keys   bytea[],                           -- these, and await a second witness
  changed_at     timestamptz not null default now(),
  primary key (stream_id, bucket_start)
) with (fillfactor = 70);
create index bucket_pending on bucket (stream_id, bucket_start) where pending_since is not null;

-- ── Rows and ledger ─────────────────────────────────────────────────────────────────────────────

create table usage_row (
  tenant_id          bigint not null,
  stream_id          bigint not null,
  bucket_start       timestamptz not null,
  row_key            bytea not null,
  revision           int not null,
  content_hash       bytea not null,
  is_tombstone       boolean not null default false,
  dims               jsonb not null,
  input_tokens       bigint,
  cache_read_tokens  bigint,
  cache_write_tokens bigint,
  output_tokens      bigint,
  requests           bigint,
  quantity           numeric,
  unit               text,
  amount             numeric,
  currency           text,
  basis              text check (basis in ('provider', 'local')),
  rate_version       text,                          -- of a local price; 'unpriced' when no price is known
  detail             jsonb not null,
  primary key (stream_id, bucket_start, row_key)
) with (fillfactor = 85);
create index usage_row_unpriced on usage_row (stream_id) where rate_version = 'unpriced';

create table ledger (
  tenant_id          bigint not null,
  bucket_start       timestamptz not null,
  row_key            bytea not null,
  revision           int not null,
  stream_id          bigint not null,
  poll_seq           bigint not null,
  booked_at          timestamptz not null default now(),
  kind               smallint not null,             -- 1 new, 2 restated, 3 vanished, 4 re-priced
  input_tokens       bigint,                        -- every value is a signed difference
  cache_read_tokens  bigint,
  cache_write_tokens bigint,
  output_tokens      bigint,
  requests           bigint,
  quantity           numeric,
  amount             numeric,
  primary key (tenant_id, bucket_start, row_key, revision)
) partition by range (bucket_start);
create index ledger_booked on ledger (booked_at);

create sequence poll_seq as bigint;

-- Makes sure that the months of `instants` have their partition. Built apart and attached, so that neither a long
-- report nor a flush waits for the other (ATTACH takes a lock which readers and writers share).
create function ledger_make_partitions(instants timestamptz[]) returns int language plpgsql as $$
declare
  month timestamp;
  name  text;
  made  int := 0;
begin
  for month in
    select distinct date_trunc('month', i at time zone 'UTC') from unnest(instants) i order by 1
  loop
    name := 'ledger_' || to_char(month, 'YYYYMM');
    continue when to_regclass(name) is not null;
    perform pg_advisory_xact_lock(hashtext('tallyd.ledger.partitions'));
    -- A query, for to_regclass may answer from a cache that does not know yet what the lock's last holder made.
    continue when exists (select from pg_class where relname = name and relnamespace = current_schema()::regnamespace);
    execute format('create table %I (like ledger including defaults including constraints)', name);
    execute format('alter table %I add check (bucket_start >= %L and bucket_start < %L)', name,
                   month at time zone 'UTC', (month + interval '1 month') at time zone 'UTC');
    execute format('alter table ledger attach partition %I for values from (%L) to (%L)', name,
                   month at time zone 'UTC', (month + interval '1 month') at time zone 'UTC');
    made := made + 1;
  end loop;
  return made;
end $$;

-- ── Ticks, summaries, shared pauses ─────────────────────────────────────────────────────────────

create table tick (
  slot_at      timestamptz primary key,
  created_at   timestamptz not null default now(),
  connections  int not null,
  batches      int not null,
  finished_at  timestamptz
);

create table batch_summary (
  job_id         bigint primary key,
  slot_at        timestamptz,
  kind           text not null,
  finished_at    timestamptz not null default now(),
  connections    int not null,
  unchanged      int not null,
  stored         int not null,
  restated       int not null,
  retried        int not null,
  dead           int not null,
  requests       int not null,
  requests_saved int not null,
  rows           int not null,
  duration_s     double precision not null
);
create index batch_summary_slot on batch_summary (slot_at);
create index batch_summary_finished on batch_summary (finished_at);

create table pause (
  host    text not null,
  org     text not null,                            -- '' means the whole host
  until   timestamptz not null,
  reason  text not null,
  primary key (host, org)
);

-- ── The queue: a job is one row in exactly one state table, its body apart ──────────────────────

create table job (
  id            bigint generated always as identity primary key,
  kind          text not null,
  key_id        bigint not null default 0,
  prio          smallint not null default 100,
  max_attempts  smallint not null default 5,
  timeout_s     real not null default 60,
  created_at    timestamptz not null default now(),
  body          bytea not null
);

create table ready (
  key_id  bigint not null,
  prio    smallint not null,
  run_at  timestamptz not null,
  id      bigint not null,
  attempt smallint not null,
  losses  smallint not null,
  token   bigint not null,
  born    xid8 not null default pg_current_xact_id()   -- the transaction that made it ready
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);
create index ready_key on ready (key_id, prio, born, id);
create index ready_id on ready (id);

-- One row: nothing in `ready` was born before `at`, or ever will be. Claims start there; see `raise_floor`.
create table ready_floor (
  at xid8 not null
);
create unique index ready_floor_one on ready_floor ((true));
insert into ready_floor values ('0');

create table due (
  run_at  timestamptz not null,
  key_id  bigint not null,
  prio    smallint not null,
  id      bigint not null,
  attempt smallint not null,
  losses  smallint not null,
  token   bigint not null
);
create index due_at on due (run_at);
create index due_id on due (id);

create table lease (
  id          bigint primary key,
  token       bigint not null,
  attempt     smallint not null,
  losses      smallint not null,
  worker      bigint not null,
  key_id      bigint not null,
  prio        smallint not null,
  claimed_at  timestamptz not null default now(),
  lease_until timestamptz not null
) with (fillfactor = 60, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
        autovacuum_vacuum_cost_delay = 0);

create table attempt (
  at       timestamptz not null default now(),
  id       bigint not null,
  attempt  smallint not null,
  worker   bigint,
  outcome  smallint not null,                       -- 1 done 2 retry 3 snooze 4 dead 5 cancelled 8 released 9 worker lost
  took_ms  int,
  note     text
) partition by range (at);
create index attempt_id on attempt (id);

create table dead (
  id       bigint primary key,
  at       timestamptz not null default now(),
  attempt  smallint not null,
  token    bigint not null,
  reason   text not null
);
create index dead_at on dead (at);

create table dedup (
  key        text primary key,
  job_id     bigint not null,
  expires_at timestamptz not null
);
create index dedup_expires on dedup (expires_at);

create table worker (
  id         bigint generated always as identity primary key,
  started_at timestamptz not null default now(),
  seen_at    timestamptz not null default now(),
  stopped_at timestamptz,
  info       text not null default ''
) with (fillfactor = 50);

-- The names that people know (River's), over the state tables. A finished job has no row here: see `attempt`.
create view job_state as
  select j.id, j.kind, j.key_id, 'available' as state, r.run_at, r.attempt from ready r join job j using (id)
  union all
  select j.id, j.kind, j.key_id, case when d.attempt = 0 then 'scheduled' else 'retryable' end, d.run_at, d.attempt
    from due d join job j using (id)
  union all
  select j.id, j.kind, j.key_id, 'running', l.claimed_at, l.attempt from lease l join job j using (id)
  union all
  select j.id, j.kind, j.key_id, 'discarded', x.at, x.attempt from dead x join job j using (id);

-- Partitions of the attempts log, one a week (Monday, UTC), from the week of `from_at` through `weeks` more.
create function attempt_make_partitions(from_at timestamptz, weeks int) returns int language plpgsql as $$
declare
  monday timestamp;
  name   text;
  made   int := 0;
begin
  for monday in
    select date_trunc('week', from_at at time zone 'UTC') + w * interval '7 days' from generate_series(0, weeks) w
  loop
    name := 'attempt_' || to_char(monday, 'YYYYMMDD');
    continue when to_regclass(name) is not null;
    perform pg_advisory_xact_lock(hashtext('tallyd.attempt.partitions'));
    -- A query, for to_regclass may answer from a cache that does not know yet what the lock's last holder made.
    continue when exists (select from pg_class where relname = name and relnamespace = current_schema()::regnamespace);
    execute format('create table %I (like attempt including defaults)', name);
    execute format('alter table attempt attach partition %I for values from (%L) to (%L)', name,
                   monday at time zone 'UTC', (monday + interval '7 days') at time zone 'UTC');
    made := made + 1;
  end loop;
  return made;
end $$;

select attempt_make_partitions(now(), 4);
select ledger_make_partitions(array[now() - interval '1 month', now(), now() + interval '1 month']);
