-- Messages with a URL, as QStash has them, on the same queue: a message is a job of kind `push`, and what belongs to its
-- URL stands beside the job. Everything is added, so that replicas of the version before go on beside this one.

-- ── Who may publish ─────────────────────────────────────────────────────────────────────────────

create table account (
  id          bigint generated always as identity primary key,
  name        text not null unique check (name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$'),
  created_at  timestamptz not null default now(),
  is_dev      boolean not null default false,       -- its token is public: only `tallyd dev` lets it in
  limits      text not null default '{}',           -- JSON: where it differs from the settings
  key_id      text not null,                        -- of the secret key that seals the signing keys
  keys        bytea not null                        -- both signing keys, sealed
);

create table token (
  id           bigint generated always as identity primary key,
  account_id   bigint not null references account (id),
  name         text not null,
  hash         bytea not null unique,               -- SHA-256: the token itself is shown once and kept nowhere
  is_read_only boolean not null default false,
  created_at   timestamptz not null default now(),
  revoked_at   timestamptz,
  unique (account_id, name)
);

-- ── Limits: what may run at once, and how often ─────────────────────────────────────────────────

-- A gate lets jobs pass one by one: a FIFO queue, a flow-control key, or an account's parallelism as a whole.
create table gate (
  id               bigint generated always as identity primary key,
  account_id       bigint not null references account (id),
  kind             text not null check (kind in ('queue', 'flow', 'all')),
  name             text not null,
  parallelism      int check (parallelism > 0),     -- null: without a limit
  rate             int check (rate > 0),            -- attempts in a period; null: without a limit
  period_s         int not null default 1 check (period_s > 0),
  rate_start       timestamptz not null default now(),
  rate_count       int not null default 0,
  is_paused        boolean not null default false,
  pins_parallelism boolean not null default false,  -- messages no longer change it
  pins_rate        boolean not null default false,
  created_at       timestamptz not null default now(),
  updated_at       timestamptz not null default now(),
  unique (account_id, kind, name)
) with (fillfactor = 60);

-- A state like ready and due: jobs in front of a gate.
create table held (
  gate_id bigint not null,
  key_id  bigint not null,
  prio    smallint not null,
  id      bigint not null,
  attempt smallint not null,
  losses  smallint not null,
  token   bigint not null
);
create index held_gate on held (gate_id, id);
create index held_id on held (id);

-- Jobs that have passed a gate and still count there. A callback counts for its source: a FIFO lane is taken until both
-- are done.
create table slot (
  job_id   bigint not null,
  gate_id  bigint not null,
  owner_id bigint not null,
  is_kept  boolean not null,                        -- through retries: the lane of a FIFO queue
  primary key (job_id, gate_id)
);
create index slot_gate on slot (gate_id, owner_id);

alter table job add column gates bigint[];          -- to pass in this order; null: none
alter table due add column gate_id bigint;          -- where it waits next, once it is due; null: nowhere

-- ── Messages ────────────────────────────────────────────────────────────────────────────────────

create table message (
  id          bigint primary key,                   -- its job's; the row stays when the job has ended
  account_id  bigint not null,
  salt        bigint not null,                      -- makes its name unguessable, and new in a restored database
  url         text not null,
  host        text not null,
  method      text not null,
  spec        text not null,                        -- JSON: how to deliver it
  payload_id  bigint,                               -- null: without a body
  not_before  timestamptz not null,
  created_at  timestamptz not null default now(),
  source_id   bigint,                               -- a callback: of whose attempt it tells
  queue       text,
  flow_id     bigint,                               -- its gate of kind flow
  schedule_id text,
  topic       text,
  labels      text[],
  caller_ip   text
);
create index message_account on message (account_id, created_at);
create index message_flow on message (flow_id) where flow_id is not null;
create index message_payload on message (payload_id) where payload_id <> id;

-- A body, once for all messages of one publish to a group.
create table payload (
  id   bigint primary key,                          -- of the first message that has it
  body bytea not null
);
alter table payload alter column body set storage external;   -- read as often as written, and often compressed already

create sequence event_id_seq as bigint;
create table event (
  at              timestamptz not null default clock_timestamp(),
  id              bigint not null default nextval('event_id_seq'),
  account_id      bigint not null,
  message_id      bigint not null,
  state           smallint not null,                -- 1 created 2 active 3 error 4 retry 5 delivered 6 failed
                                                    -- 7 cancel requested 8 canceled
  retried         smallint not null default 0,
  next_at         timestamptz,
  status          int,
  error           text,
  response_header text,                             -- JSON: name to values
  response_body   bytea
) partition by range (at);
create index event_account on event (account_id, at, id);
create index event_message on event (message_id);
create table event_stray partition of event default;          -- should nobody have made the week's partition in time

-- ── Groups and schedules ────────────────────────────────────────────────────────────────────────

create table url_group (
  id         bigint generated always as identity primary key,
  account_id bigint not null references account (id),
  name       text not null,
  headers    text not null default '{}',            -- JSON: name to values, for every publish to the group
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  unique (account_id, name)
);

create table endpoint (
  group_id bigint not null references url_group (id) on delete cascade,
  key      text not null,                           -- its name, else its URL
  name     text,
  url      text not null,
  place    bigint generated always as identity,
  primary key (group_id, key)
);

create table schedule (
  account_id  bigint not null references account (id),
  id          text not null,
  created_at  timestamptz not null default now(),
  cron        text not null,                        -- as sent
  destination text not null,
  spec        text not null,                        -- JSON: the message that each firing publishes
  body        bytea not null default '',
  queue       text,
  flow_key    text,
  labels      text[],
  caller_ip   text,
  is_paused   boolean not null default false,
  next_at     timestamptz,                          -- null: never again
  last_at     timestamptz,
  last_ids    bigint[],                             -- the messages of the last firing
  error       text,                                 -- why the last firing made none
  primary key (account_id, id)
);
create index schedule_next on schedule (next_at) where not is_paused;

-- ── Weeks ───────────────────────────────────────────────────────────────────────────────────────

-- Partitions of a log, one a week (Monday, UTC), from the week of `from_at` through `weeks` more.
create function make_weeks(parent text, from_at timestamptz, weeks int) returns int language plpgsql as $$
declare
  monday timestamp;
  name   text;
  made   int := 0;
begin
  for monday in
    select date_trunc('week', from_at at time zone 'UTC') + w * interval '7 days' from generate_series(0, weeks) w
  loop
    name := parent || '_' || to_char(monday, 'YYYYMMDD');
    continue when to_regclass(name) is not null;
    perform pg_advisory_xact_lock(hashtext('tallyd.' || parent || '.partitions'));
    -- A query, for to_regclass may answer from a cache that does not know yet what the lock's last holder made.
    continue when exists (select from pg_class where relname = name and relnamespace = current_schema()::regnamespace);
    execute format('create table %I (like %I including defaults)', name, parent);
    execute format('alter table %I attach partition %I for values from (%L) to (%L)', parent, name,
                   monday at time zone 'UTC', (monday + interval '7 days') at time zone 'UTC');
    made := made + 1;
  end loop;
  return made;
end $$;

create or replace function attempt_make_partitions(from_at timestamptz, weeks int) returns int language plpgsql as $$
begin
  return make_weeks('attempt', from_at, weeks) + make_weeks('event', from_at, weeks);
end $$;
select attempt_make_partitions(now(), 4);

-- The names that people know (River's), over the state tables. A finished job has no row here: see `attempt`.
create or replace view job_state as
  select j.id, j.kind, j.key_id, 'available' as state, r.run_at, r.attempt from ready r join job j using (id)
  union all
  select j.id, j.kind, j.key_id, case when d.attempt = 0 then 'scheduled' else 'retryable' end, d.run_at, d.attempt
    from due d join job j using (id)
  union all
  select j.id, j.kind, j.key_id, 'running', l.claimed_at, l.attempt from lease l join job j using (id)
  union all
  select j.id, j.kind, j.key_id, 'discarded', x.at, x.attempt from dead x join job j using (id)
  union all
  select j.id, j.kind, j.key_id, 'pending', j.created_at, h.attempt from held h join job j using (id);
