"""tallyd: what many tenants spend on AI APIs, booked in Postgres exactly once.

The road a unit of work travels, one room a step:

    trigger ─> orchestrate ─> queue ─> worker ─> poller ─> records ─> sinks ─> alerts
    tick or    which jobs     store,   run_job   fetch     check,     hand     judge,
    QStash     are due        claim,   (one for  pages     price,     over a   tell a
    delivery   (pure)         lease    all)                key        batch    person

Nouns live in `domain/`, verbs in the rooms; imports go down this list and never climb:

    cli > service > app > config > web > triggers > orchestrate > worker
        > queue | pollers | sinks | alerts  >  db | http_client | records | telemetry  >  domain
"""

__version__ = "0.1.0"
