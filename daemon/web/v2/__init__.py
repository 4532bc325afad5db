"""The QStash-compatible API under `/v2`: parse, call the queue, answer. One file per resource.

request ──> app ──────────> resource ──> queue
            who, may they,  what they    stores
            route, errors   ask for
"""
