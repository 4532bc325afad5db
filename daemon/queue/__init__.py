"""Step 3 of 8, queue: one durable queue in Postgres: enqueue, claim, heartbeat, settle, rescue."""
