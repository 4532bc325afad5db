"""`/v2/flowControl` and `/v2/globalParallelism`: how fast the messages of a key, or of an account, may go."""

from __future__ import annotations

import re

from daemon.domain.errors import UsageError
from daemon.domain.flow import KEY_LENGTH_MAX, PERIOD_S_MAX, RATE_MAX
from daemon.queue.gates import Gate
from daemon.web.v2.call import Answer, Call, NotFound, decoded

# Greedy: a slash in the key is not escaped by the SDKs.
_VERB = re.compile(r"(.+)/(pause|resume|pin|unpin|resetRate|reset)")


async def get(call: Call) -> Answer:
    """`GET /v2/flowControl?search=`, `GET /v2/flowControl/{key}`."""
    gates = call.services.gates
    if not call.rest:
        return Answer([_shown(gate) for gate in await gates.find_all(call.account.id, "flow", call.value("search"))])
    key = _key(call.rest)
    gate = await gates.show(call.account.id, "flow", key)
    if gate is None:
        raise NotFound(f"flow control key {key}")
    return Answer(_shown(gate))


async def post(call: Call) -> Answer:
    """`POST /v2/flowControl/{key}/{verb}`. Pausing or pinning a key that nobody has used yet makes it."""
    match = _VERB.fullmatch(call.rest)
    if match is None:
        if not call.rest or call.rest.startswith("/"):
            raise UsageError("flowControlKey", "is missing in the path", "write /v2/flowControl/KEY/pause")
        raise NotFound("this path was")
    key, account, gates = _key(match[1]), call.account.id, call.services.gates
    is_known = True
    match match[2]:
        case "pause":
            await gates.pause_flow(account, key)
        case "resume":
            is_known = await gates.pause(account, "flow", key, is_paused=False)
        case "pin":
            await _pin(call, key)
        case "unpin":
            is_known = await gates.unpin(account, key, parallelism=call.flag("parallelism"), rate=call.flag("rate"))
        case _:
            is_known = await gates.reset(account, key)
    if not is_known:
        raise NotFound(f"flow control key {key}")
    return Answer()


def _key(text: str) -> str:
    key = decoded(text, "flowControlKey")
    if len(key) > KEY_LENGTH_MAX or not key.isprintable():
        raise UsageError("flowControlKey", "is no key", f"use 1 to {KEY_LENGTH_MAX} printable characters")
    return key


async def _pin(call: Call, key: str) -> None:
    parallelism = call.number("parallelism", 1, call.limits.parallelism_max)
    rate = call.number("rate", 1, RATE_MAX)
    period_s = call.number("period", 1, PERIOD_S_MAX)
    if parallelism is None and rate is None and period_s is None:
        raise UsageError("pin", "fixes nothing", "give parallelism, rate or period")
    await call.services.gates.pin(call.account.id, key, parallelism, rate, period_s)


async def whole(call: Call) -> Answer:
    """`GET /v2/globalParallelism`: of the account; 0 at most means without a limit."""
    if call.rest:
        raise NotFound("this path was")
    gate = await call.services.gates.show(call.account.id, "all", "")
    return Answer(
        {
            "parallelismMax": call.limits.parallelism or 0,
            "parallelismCount": 0 if gate is None else gate.running,
        }
    )


def _shown(gate: Gate) -> dict[str, object]:
    return {
        "flowControlKey": gate.name,
        "waitListSize": gate.waiting,
        "parallelismMax": gate.parallelism or 0,
        "parallelismCount": gate.running,
        "rateMax": gate.rate or 0,
        "rateCount": gate.rate_count,
        "ratePeriod": gate.period_s,
        "ratePeriodStart": int(gate.rate_start.timestamp()),
        "isPaused": gate.is_paused,
        "isPinnedParallelism": gate.pins_parallelism,
        "isPinnedRate": gate.pins_rate,
    }


METHODS = {"GET": get, "POST": post}
