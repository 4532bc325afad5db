"""tallyd: what many tenants spend on AI APIs, booked in Postgres exactly once.

The road a unit of work travels, one room a step:

    trigger ─> orchestrate ─> queue ─> worker ─> poller ─> records ─> sinks
    tick or    which jobs     store,   run_job   fetch     check,     book
    QStash     are due        claim,   (one for  pages,    price,     what
    delivery   (pure)         lease    all)      items     key        differs

Nouns live in `domain/`, verbs in the rooms; imports go down this list and never climb:

    cli > service | by_hand > app > config > web > triggers > orchestrate > worker
        > queue | pollers | sinks  >  redis_client  >  db | http_client | http_push | records | telemetry  >  domain

`testing` stands above them all: the suite by which third parties prove their pollers.
"""

__version__ = "0.1.0"
