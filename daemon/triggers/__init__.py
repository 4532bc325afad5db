"""Step 1 of 8, trigger: what starts work. A slot of the tick here; signed deliveries by QStash beside it."""
