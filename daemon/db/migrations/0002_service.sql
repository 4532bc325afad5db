-- The service: what asked for a tick and by when it has to be done, batches handed over to QStash, deliveries that were
-- taken, and which job booked what. Everything is added, so that replicas of the version before go on beside this one.

alter table tick
  add column via text not null default 'internal' check (via in ('internal', 'fallback', 'qstash', 'command')),
  add column request_id   text,                     -- of the delivery that asked for it
  add column deadline_at  timestamptz,              -- by when its batches ought to be done
  add column done_in_time int;                      -- how many were; set once the deadline has passed
create index tick_unjudged on tick (deadline_at) where done_in_time is null;

alter table batch_summary add column request_id text;

-- A batch that QStash was asked to trigger. It is a row of our queue from the start, and waits in `due` meanwhile.
create table handover (
  job_id          bigint primary key,
  slot_at         timestamptz not null,
  place           int not null,                     -- with the slot, the deduplication id
  message_id      text,                             -- QStash's, once it has accepted
  published_at    timestamptz,
  released_at     timestamptz,                      -- set once: what comes later has no effect
  released_by     text check (released_by in ('delivery', 'failure', 'refusal')),
  reported_at     timestamptz,                      -- by a callback: an attempt to deliver was made
  reported_status int
);
create index handover_slot on handover (slot_at);
create index handover_message on handover (message_id) where message_id is not null;

-- Messages of QStash that asked for a tick: each counts once, however often it is delivered.
create table delivery (
  message_id text primary key,
  slot_at    timestamptz not null,
  at         timestamptz not null default now()
);
create index delivery_at on delivery (at);

-- Which job booked the revisions of a poll_seq: from a line of the ledger to its batch, tick and delivery.
create table booking (
  poll_seq  bigint primary key,
  job_id    bigint not null,
  booked_at timestamptz not null default now()
);
create index booking_job on booking (job_id);
