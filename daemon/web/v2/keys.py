"""`/v2/keys`: what deliveries are signed with, and its rotation."""

from __future__ import annotations

from daemon.web.v2.call import Answer, Call, NotFound, Refusal


async def show(call: Call) -> Answer:
    """`GET /v2/keys`."""
    if call.rest:
        raise NotFound("this path was")
    if call.is_read_only:
        raise Refusal(403, "this token may only read, and with the keys one could forge deliveries; use another one")
    keys = await call.services.accounts.keys(call.account.id)
    return Answer({"current": keys.current, "next": keys.next})


async def rotate(call: Call) -> Answer:
    """`POST /v2/keys/rotate`: the next key becomes the current one; the old one signs nothing any more."""
    if call.rest != "rotate":
        raise NotFound("this path was")
    keys = await call.services.accounts.rotate_keys(call.account.id)
    return Answer({"current": keys.current, "next": keys.next})


METHODS = {"GET": show, "POST": rotate}
