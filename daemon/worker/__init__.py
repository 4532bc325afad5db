"""Step 4 of 8, worker: claim a job, run it, settle it. `run_job` is the only worker code for every trigger."""
