"""Step 7 of 8, sinks: where checked records go. The Postgres ledger is the system of record."""
