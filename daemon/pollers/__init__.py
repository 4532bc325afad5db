"""Step 5 of 8, poller: one file per provider: its endpoints, paging and field names."""
