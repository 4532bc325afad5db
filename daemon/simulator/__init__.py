"""Provider simulators as a process of their own, in the providers' wire formats, with their ground truth on request.

`python -m daemon.simulator` prints `{"url": …, "pid": …}` and serves until SIGTERM. Everything follows from the seed
and the clock, so the same calls get the same bytes. `control.py` documents the control interface under `/_sim/`.

    server.py     HTTP on the socket, with every way of breaking an answer
    faults.py     which answer breaks, and how
    control.py    /_sim/: clock, growth, scenarios, faults, truth
    registry.py   the providers there are
    openai.py     OpenAI's wire format        anthropic.py  Anthropic's
    openrouter.py OpenRouter's                litellm.py    LiteLLM's
    scenarios.py  what providers do to history: restate, vanish, attribute, relabel
    world.py      organisations and their events, aggregated on demand
    traffic.py    seeded events: who uses what, and when
    catalogue.py  sources, dimensions, prices
"""
