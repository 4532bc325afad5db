-- Generated from the migrations by tests/integration/test_migrate.py; do not edit. Partitions are left out.

create sequence event_id_seq as bigint start 1 increment 1;

create sequence poll_seq as bigint start 1 increment 1;

create table account (
  id bigint generated always as identity not null,
  name text not null,
  created_at timestamp with time zone default now() not null,
  is_dev boolean default false not null,
  limits text default '{}'::text not null,
  key_id text not null,
  keys bytea not null
);

create table attempt (
  at timestamp with time zone default now() not null,
  id bigint not null,
  attempt smallint not null,
  worker bigint,
  outcome smallint not null,
  took_ms integer,
  note text
) partition by RANGE (at);

create table batch_summary (
  job_id bigint not null,
  slot_at timestamp with time zone,
  kind text not null,
  finished_at timestamp with time zone default now() not null,
  connections integer not null,
  unchanged integer not null,
  stored integer not null,
  restated integer not null,
  retried integer not null,
  dead integer not null,
  requests integer not null,
  requests_saved integer not null,
  rows integer not null,
  duration_s double precision not null,
  request_id text,
  items integer default 0 not null
);

create table booking (
  poll_seq bigint not null,
  job_id bigint not null,
  booked_at timestamp with time zone default now() not null
);

create table bucket (
  stream_id bigint not null,
  bucket_start timestamp with time zone not null,
  last_seq bigint not null,
  hash_version smallint not null,
  digest bytea not null,
  totals bigint[] not null,
  total_quantity numeric default 0 not null,
  total_amount numeric default 0 not null,
  pending_since timestamp with time zone,
  pending_keys bytea[],
  changed_at timestamp with time zone default now() not null
) with (fillfactor=70);

create table connection (
  id bigint generated always as identity not null,
  tenant_id bigint not null,
  name text not null,
  provider text not null,
  base_url text not null,
  settings jsonb default '{}'::jsonb not null,
  credential bytea not null,
  credential_key_id text not null,
  credential_print bytea not null,
  org_id text,
  since timestamp with time zone not null,
  state text default 'active'::text not null,
  state_reason text,
  state_at timestamp with time zone default now() not null,
  created_at timestamp with time zone default now() not null,
  next_due_at timestamp with time zone default now() not null,
  changed_at timestamp with time zone default now() not null,
  polled_at timestamp with time zone,
  open_job bigint
) with (fillfactor=80);

create table dead (
  id bigint not null,
  at timestamp with time zone default now() not null,
  attempt smallint not null,
  token bigint not null,
  reason text not null
);

create table dedup (
  key text not null,
  job_id bigint not null,
  expires_at timestamp with time zone not null
);

create table delivery (
  message_id text not null,
  slot_at timestamp with time zone not null,
  at timestamp with time zone default now() not null
);

create table due (
  run_at timestamp with time zone not null,
  key_id bigint not null,
  prio smallint not null,
  id bigint not null,
  attempt smallint not null,
  losses smallint not null,
  token bigint not null,
  gate_id bigint
);

create table endpoint (
  group_id bigint not null,
  key text not null,
  name text,
  url text not null,
  place bigint generated always as identity not null
);

create table event (
  at timestamp with time zone default clock_timestamp() not null,
  id bigint default nextval('event_id_seq'::regclass) not null,
  account_id bigint not null,
  message_id bigint not null,
  state smallint not null,
  retried smallint default 0 not null,
  next_at timestamp with time zone,
  status integer,
  error text,
  response_header text,
  response_body bytea
) partition by RANGE (at);

create table gate (
  id bigint generated always as identity not null,
  account_id bigint not null,
  kind text not null,
  name text not null,
  parallelism integer,
  rate integer,
  period_s integer default 1 not null,
  rate_start timestamp with time zone default now() not null,
  rate_count integer default 0 not null,
  is_paused boolean default false not null,
  pins_parallelism boolean default false not null,
  pins_rate boolean default false not null,
  created_at timestamp with time zone default now() not null,
  updated_at timestamp with time zone default now() not null
) with (fillfactor=60);

create table grain_epoch (
  stream_id bigint not null,
  start_at timestamp with time zone not null,
  grain_id text not null,
  api text not null,
  width text not null,
  group_by text[] not null
);

create table handover (
  job_id bigint not null,
  slot_at timestamp with time zone not null,
  place integer not null,
  message_id text,
  published_at timestamp with time zone,
  released_at timestamp with time zone,
  released_by text,
  reported_at timestamp with time zone,
  reported_status integer
);

create table held (
  gate_id bigint not null,
  key_id bigint not null,
  prio smallint not null,
  id bigint not null,
  attempt smallint not null,
  losses smallint not null,
  token bigint not null
);

create table job (
  id bigint generated always as identity not null,
  kind text not null,
  key_id bigint default 0 not null,
  prio smallint default 100 not null,
  max_attempts smallint default 5 not null,
  timeout_s real default 60 not null,
  created_at timestamp with time zone default now() not null,
  body bytea not null,
  gates bigint[]
);

create table lease (
  id bigint not null,
  token bigint not null,
  attempt smallint not null,
  losses smallint not null,
  worker bigint not null,
  key_id bigint not null,
  prio smallint not null,
  claimed_at timestamp with time zone default now() not null,
  lease_until timestamp with time zone not null
) with (fillfactor=60, autovacuum_vacuum_scale_factor=0, autovacuum_vacuum_threshold=2000, autovacuum_vacuum_cost_delay=0);

create table ledger (
  tenant_id bigint not null,
  bucket_start timestamp with time zone not null,
  row_key bytea not null,
  revision integer not null,
  stream_id bigint not null,
  poll_seq bigint not null,
  booked_at timestamp with time zone default now() not null,
  kind smallint not null,
  input_tokens bigint,
  cache_read_tokens bigint,
  cache_write_tokens bigint,
  output_tokens bigint,
  requests bigint,
  quantity numeric,
  amount numeric
) partition by RANGE (bucket_start);

create table message (
  id bigint not null,
  account_id bigint not null,
  salt bigint not null,
  url text not null,
  host text not null,
  method text not null,
  spec text not null,
  payload_id bigint,
  not_before timestamp with time zone not null,
  created_at timestamp with time zone default now() not null,
  source_id bigint,
  queue text,
  flow_id bigint,
  schedule_id text,
  topic text,
  labels text[],
  caller_ip text
);

create table name (
  tenant_id bigint not null,
  connection_id bigint not null,
  kind text not null,
  id text not null,
  since timestamp with time zone default now() not null,
  until timestamp with time zone,
  name text not null,
  seq bigint not null
);

create table pause (
  host text not null,
  org text not null,
  until timestamp with time zone not null,
  reason text not null
);

create table payload (
  id bigint not null,
  body bytea not null
);

create table quota (
  stream_id bigint not null,
  key text not null,
  tenant_id bigint not null,
  user_name text,
  tenant_name text,
  period text,
  value numeric not null,
  used numeric not null,
  epoch integer default 1 not null,
  revision integer default 1 not null,
  detail jsonb default '{}'::jsonb not null,
  pending numeric,
  updated_at timestamp with time zone default now() not null
) with (fillfactor=80);

create table quota_change (
  at timestamp with time zone default now() not null,
  stream_id bigint not null,
  key text not null,
  revision integer not null,
  epoch integer not null,
  kind smallint not null,
  delta numeric not null,
  value numeric not null,
  poll_seq bigint not null
) partition by RANGE (at);

create table quota_drift (
  stream_id bigint not null,
  at timestamp with time zone default now() not null,
  counters integer not null,
  counted numeric not null,
  booked numeric not null,
  drift numeric not null
);

create table ready (
  key_id bigint not null,
  prio smallint not null,
  run_at timestamp with time zone not null,
  id bigint not null,
  attempt smallint not null,
  losses smallint not null,
  token bigint not null,
  born xid8 default pg_current_xact_id() not null
) with (autovacuum_vacuum_scale_factor=0, autovacuum_vacuum_threshold=2000, autovacuum_vacuum_cost_delay=0);

create table ready_floor (
  at xid8 not null
);

create table resource (
  stream_id bigint not null,
  id text not null,
  tenant_id bigint not null,
  version text not null,
  content jsonb not null,
  revision integer default 1 not null,
  poll_seq bigint not null,
  changed_at timestamp with time zone default now() not null,
  gone_at timestamp with time zone
);

create table resource_batch (
  job_id bigint not null,
  stream_id bigint not null,
  seq bigint not null,
  is_retry boolean not null,
  token bigint,
  slot smallint
);

create table resource_fence (
  stream_id bigint not null,
  id text not null,
  listed_seq bigint default 0 not null,
  read_seq bigint default 0 not null,
  job_id bigint,
  dead_job bigint
) with (fillfactor=60);

create table resource_run (
  stream_id bigint not null,
  tenant_id bigint not null,
  seq bigint default 0 not null,
  is_whole boolean default true not null,
  whole_seq bigint default 0 not null,
  began_at timestamp with time zone default now() not null,
  ended_at timestamp with time zone,
  listed integer default 0 not null,
  unchanged integer default 0 not null,
  changed integer default 0 not null,
  failed integer default 0 not null,
  gone integer default 0 not null,
  withheld integer default 0 not null,
  calls integer default 0 not null,
  calls_saved integer default 0 not null,
  batches integer default 0 not null,
  batches_done integer default 0 not null
);

create table schedule (
  account_id bigint not null,
  id text not null,
  created_at timestamp with time zone default now() not null,
  cron text not null,
  destination text not null,
  spec text not null,
  body bytea default '\x'::bytea not null,
  queue text,
  flow_key text,
  labels text[],
  caller_ip text,
  is_paused boolean default false not null,
  next_at timestamp with time zone,
  last_at timestamp with time zone,
  last_ids bigint[],
  error text
);

create table schema_migration (
  version integer not null,
  name text not null,
  sha256 text not null,
  applied_at timestamp with time zone default now() not null
);

create table slot (
  job_id bigint not null,
  gate_id bigint not null,
  owner_id bigint not null,
  is_kept boolean not null
);

create table stream (
  id bigint generated always as identity not null,
  tenant_id bigint not null,
  connection_id bigint not null,
  source text not null,
  covered_from timestamp with time zone,
  covered_to timestamp with time zone,
  floor_at timestamp with time zone,
  last_seq bigint default 0 not null,
  last_start timestamp with time zone,
  last_end timestamp with time zone,
  last_pages integer default 1 not null,
  probe_digest bytea,
  read_at timestamp with time zone,
  hourly_at timestamp with time zone,
  daily_at timestamp with time zone,
  changed_at timestamp with time zone,
  open_job bigint,
  dead_job bigint,
  parked_reason text
) with (fillfactor=70);

create table tenant (
  id bigint generated always as identity not null,
  name text not null,
  created_at timestamp with time zone default now() not null,
  removed_at timestamp with time zone
);

create table tick (
  slot_at timestamp with time zone not null,
  created_at timestamp with time zone default now() not null,
  connections integer not null,
  batches integer not null,
  finished_at timestamp with time zone,
  via text default 'internal'::text not null,
  request_id text,
  deadline_at timestamp with time zone,
  done_in_time integer
);

create table token (
  id bigint generated always as identity not null,
  account_id bigint not null,
  name text not null,
  hash bytea not null,
  is_read_only boolean default false not null,
  created_at timestamp with time zone default now() not null,
  revoked_at timestamp with time zone
);

create table url_group (
  id bigint generated always as identity not null,
  account_id bigint not null,
  name text not null,
  headers text default '{}'::text not null,
  created_at timestamp with time zone default now() not null,
  updated_at timestamp with time zone default now() not null
);

create table usage_row (
  tenant_id bigint not null,
  stream_id bigint not null,
  bucket_start timestamp with time zone not null,
  row_key bytea not null,
  revision integer not null,
  content_hash bytea not null,
  is_tombstone boolean default false not null,
  dims jsonb not null,
  input_tokens bigint,
  cache_read_tokens bigint,
  cache_write_tokens bigint,
  output_tokens bigint,
  requests bigint,
  quantity numeric,
  unit text,
  amount numeric,
  currency text,
  basis text,
  rate_version text,
  detail jsonb not null
) with (fillfactor=85);

create table worker (
  id bigint generated always as identity not null,
  started_at timestamp with time zone default now() not null,
  seen_at timestamp with time zone default now() not null,
  stopped_at timestamp with time zone,
  info text default ''::text not null
) with (fillfactor=50);

alter table account add constraint account_name_check CHECK ((name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$'::text));

alter table account add constraint account_name_key UNIQUE (name);

alter table account add constraint account_pkey PRIMARY KEY (id);

alter table batch_summary add constraint batch_summary_pkey PRIMARY KEY (job_id);

alter table booking add constraint booking_pkey PRIMARY KEY (poll_seq);

alter table bucket add constraint bucket_pkey PRIMARY KEY (stream_id, bucket_start);

alter table connection add constraint connection_name_check CHECK ((name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$'::text));

alter table connection add constraint connection_pkey PRIMARY KEY (id);

alter table connection add constraint connection_state_check CHECK ((state = ANY (ARRAY['active'::text, 'paused'::text, 'parked'::text, 'archived'::text])));

alter table connection add constraint connection_tenant_id_name_key UNIQUE (tenant_id, name);

alter table dead add constraint dead_pkey PRIMARY KEY (id);

alter table dedup add constraint dedup_pkey PRIMARY KEY (key);

alter table delivery add constraint delivery_pkey PRIMARY KEY (message_id);

alter table endpoint add constraint endpoint_pkey PRIMARY KEY (group_id, key);

alter table gate add constraint gate_account_id_kind_name_key UNIQUE (account_id, kind, name);

alter table gate add constraint gate_kind_check CHECK ((kind = ANY (ARRAY['queue'::text, 'flow'::text, 'all'::text])));

alter table gate add constraint gate_parallelism_check CHECK ((parallelism > 0));

alter table gate add constraint gate_period_s_check CHECK ((period_s > 0));

alter table gate add constraint gate_pkey PRIMARY KEY (id);

alter table gate add constraint gate_rate_check CHECK ((rate > 0));

alter table grain_epoch add constraint grain_epoch_pkey PRIMARY KEY (stream_id, start_at);

alter table handover add constraint handover_pkey PRIMARY KEY (job_id);

alter table handover add constraint handover_released_by_check CHECK ((released_by = ANY (ARRAY['delivery'::text, 'failure'::text, 'refusal'::text])));

alter table job add constraint job_pkey PRIMARY KEY (id);

alter table lease add constraint lease_pkey PRIMARY KEY (id);

alter table ledger add constraint ledger_pkey PRIMARY KEY (tenant_id, bucket_start, row_key, revision);

alter table message add constraint message_pkey PRIMARY KEY (id);

alter table name add constraint name_pkey PRIMARY KEY (connection_id, kind, id, since);

alter table pause add constraint pause_pkey PRIMARY KEY (host, org);

alter table payload add constraint payload_pkey PRIMARY KEY (id);

alter table quota add constraint quota_pkey PRIMARY KEY (stream_id, key);

alter table quota_drift add constraint quota_drift_pkey PRIMARY KEY (stream_id);

alter table resource add constraint resource_pkey PRIMARY KEY (stream_id, id);

alter table resource_batch add constraint resource_batch_pkey PRIMARY KEY (job_id);

alter table resource_fence add constraint resource_fence_pkey PRIMARY KEY (stream_id, id);

alter table resource_run add constraint resource_run_pkey PRIMARY KEY (stream_id);

alter table schedule add constraint schedule_pkey PRIMARY KEY (account_id, id);

alter table schema_migration add constraint schema_migration_pkey PRIMARY KEY (version);

alter table slot add constraint slot_pkey PRIMARY KEY (job_id, gate_id);

alter table stream add constraint stream_connection_id_source_key UNIQUE (connection_id, source);

alter table stream add constraint stream_pkey PRIMARY KEY (id);

alter table tenant add constraint tenant_name_check CHECK ((name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$'::text));

alter table tenant add constraint tenant_name_key UNIQUE (name);

alter table tenant add constraint tenant_pkey PRIMARY KEY (id);

alter table tick add constraint tick_pkey PRIMARY KEY (slot_at);

alter table tick add constraint tick_via_check CHECK ((via = ANY (ARRAY['internal'::text, 'fallback'::text, 'qstash'::text, 'command'::text])));

alter table token add constraint token_account_id_name_key UNIQUE (account_id, name);

alter table token add constraint token_hash_key UNIQUE (hash);

alter table token add constraint token_pkey PRIMARY KEY (id);

alter table url_group add constraint url_group_account_id_name_key UNIQUE (account_id, name);

alter table url_group add constraint url_group_pkey PRIMARY KEY (id);

alter table usage_row add constraint usage_row_basis_check CHECK ((basis = ANY (ARRAY['provider'::text, 'local'::text])));

alter table usage_row add constraint usage_row_pkey PRIMARY KEY (stream_id, bucket_start, row_key);

alter table worker add constraint worker_pkey PRIMARY KEY (id);

alter table bucket add constraint bucket_stream_id_fkey FOREIGN KEY (stream_id) REFERENCES stream(id);

alter table connection add constraint connection_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES tenant(id);

alter table endpoint add constraint endpoint_group_id_fkey FOREIGN KEY (group_id) REFERENCES url_group(id) ON DELETE CASCADE;

alter table gate add constraint gate_account_id_fkey FOREIGN KEY (account_id) REFERENCES account(id);

alter table grain_epoch add constraint grain_epoch_stream_id_fkey FOREIGN KEY (stream_id) REFERENCES stream(id);

alter table schedule add constraint schedule_account_id_fkey FOREIGN KEY (account_id) REFERENCES account(id);

alter table stream add constraint stream_connection_id_fkey FOREIGN KEY (connection_id) REFERENCES connection(id);

alter table stream add constraint stream_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES tenant(id);

alter table token add constraint token_account_id_fkey FOREIGN KEY (account_id) REFERENCES account(id);

alter table url_group add constraint url_group_account_id_fkey FOREIGN KEY (account_id) REFERENCES account(id);

CREATE INDEX attempt_id ON public.attempt USING btree (id);

CREATE INDEX batch_summary_finished ON public.batch_summary USING btree (finished_at);

CREATE INDEX batch_summary_slot ON public.batch_summary USING btree (slot_at);

CREATE INDEX booking_job ON public.booking USING btree (job_id);

CREATE INDEX bucket_pending ON public.bucket USING btree (stream_id, bucket_start) WHERE (pending_since IS NOT NULL);

CREATE INDEX connection_due ON public.connection USING btree (next_due_at) WHERE ((state = 'active'::text) AND (open_job IS NULL));

CREATE INDEX connection_open ON public.connection USING btree (open_job) WHERE (open_job IS NOT NULL);

CREATE INDEX connection_org ON public.connection USING btree (provider, org_id) WHERE (org_id IS NOT NULL);

CREATE INDEX dead_at ON public.dead USING btree (at);

CREATE INDEX dedup_expires ON public.dedup USING btree (expires_at);

CREATE INDEX delivery_at ON public.delivery USING btree (at);

CREATE INDEX due_at ON public.due USING btree (run_at);

CREATE INDEX due_id ON public.due USING btree (id);

CREATE INDEX event_account ON public.event USING btree (account_id, at, id);

CREATE INDEX event_message ON public.event USING btree (message_id);

CREATE INDEX handover_message ON public.handover USING btree (message_id) WHERE (message_id IS NOT NULL);

CREATE INDEX handover_slot ON public.handover USING btree (slot_at);

CREATE INDEX held_gate ON public.held USING btree (gate_id, id);

CREATE INDEX held_id ON public.held USING btree (id);

CREATE INDEX ledger_booked ON public.ledger USING btree (booked_at);

CREATE INDEX message_account ON public.message USING btree (account_id, created_at);

CREATE INDEX message_flow ON public.message USING btree (flow_id) WHERE (flow_id IS NOT NULL);

CREATE INDEX message_payload ON public.message USING btree (payload_id) WHERE (payload_id <> id);

CREATE UNIQUE INDEX name_current ON public.name USING btree (connection_id, kind, id) WHERE (until IS NULL);

CREATE INDEX quota_change_key ON public.quota_change USING btree (stream_id, key, revision);

CREATE INDEX quota_user ON public.quota USING btree (tenant_id, user_name);

CREATE UNIQUE INDEX ready_floor_one ON public.ready_floor USING btree ((true));

CREATE INDEX ready_id ON public.ready USING btree (id);

CREATE INDEX ready_key ON public.ready USING btree (key_id, prio, born, id);

CREATE INDEX resource_batch_stream ON public.resource_batch USING btree (stream_id);

CREATE INDEX schedule_next ON public.schedule USING btree (next_at) WHERE (NOT is_paused);

CREATE INDEX slot_gate ON public.slot USING btree (gate_id, owner_id);

CREATE INDEX stream_open ON public.stream USING btree (open_job) WHERE (open_job IS NOT NULL);

CREATE INDEX tick_unjudged ON public.tick USING btree (deadline_at) WHERE (done_in_time IS NULL);

CREATE INDEX usage_row_unpriced ON public.usage_row USING btree (stream_id) WHERE (rate_version = 'unpriced'::text);

create view job_state as
 SELECT j.id,
    j.kind,
    j.key_id,
    'available'::text AS state,
    r.run_at,
    r.attempt
   FROM ready r
     JOIN job j USING (id)
UNION ALL
 SELECT j.id,
    j.kind,
    j.key_id,
        CASE
            WHEN d.attempt = 0 THEN 'scheduled'::text
            ELSE 'retryable'::text
        END AS state,
    d.run_at,
    d.attempt
   FROM due d
     JOIN job j USING (id)
UNION ALL
 SELECT j.id,
    j.kind,
    j.key_id,
    'running'::text AS state,
    l.claimed_at AS run_at,
    l.attempt
   FROM lease l
     JOIN job j USING (id)
UNION ALL
 SELECT j.id,
    j.kind,
    j.key_id,
    'discarded'::text AS state,
    x.at AS run_at,
    x.attempt
   FROM dead x
     JOIN job j USING (id)
UNION ALL
 SELECT j.id,
    j.kind,
    j.key_id,
    'pending'::text AS state,
    j.created_at AS run_at,
    h.attempt
   FROM held h
     JOIN job j USING (id);

CREATE OR REPLACE FUNCTION public.attempt_make_partitions(from_at timestamp with time zone, weeks integer)
 RETURNS integer
 LANGUAGE plpgsql
AS $function$
begin
  return make_weeks('attempt', from_at, weeks) + make_weeks('event', from_at, weeks)
    + make_weeks('quota_change', from_at, weeks);
end $function$
;

CREATE OR REPLACE FUNCTION public.ledger_make_partitions(instants timestamp with time zone[])
 RETURNS integer
 LANGUAGE plpgsql
AS $function$
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
end $function$
;

CREATE OR REPLACE FUNCTION public.make_weeks(parent text, from_at timestamp with time zone, weeks integer)
 RETURNS integer
 LANGUAGE plpgsql
AS $function$
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
end $function$
;
