"""The control interface: JSON under `/_sim/`. Mistakes answer 400 with `{"error": {"message": …}}`.

GET  /_sim/health
    {"status": "ok", "now": RFC3339, "orgs": N}
GET  /_sim/truth?provider=openai&key=KEY[&since=&until=][&source=a&source=b][&width=1m|1h|1d][&group_by=a&group_by=b]
    What the provider would report now, at the finest grain:
    {"now", "provider", "key", "org_id", "sources": {NAME: [{"bucket_start", "width", "dims", "input_tokens",
    "cache_read_tokens", "cache_write_tokens", "output_tokens", "requests", "quantity", "amount"}]}}.
    Counts are integers, quantity and amount decimal strings (amount in dollars), null where the source has none.
    `since` and `until` bound bucket_start. A boolean dimension is "true" or "false". `group_by` may be empty
    (`group_by=`), which sums each bucket to one row. Cost sources have days, most others hours unless `width` says so.
    Sources: completions … web_search_calls and costs; Anthropic: messages (requests null) and cost; OpenRouter:
    activity and costs, both by the day; LiteLLM: logs and activity, its days.
GET  /_sim/truth?totals=1[&provider=][&key=][&since=&until=]
    {"now", "orgs": [{"provider", "key", "org_id", "sources": {NAME: {…sums…, "buckets": N}}}]}; without `key`, all
    organisations made so far. vector_stores is a level: its total is that of the newest bucket.
POST /_sim/advance   {"seconds": N}                        → {"now"}
POST /_sim/freeze    {"now"?: RFC3339, "frozen"?: true}    → {"now"}
POST /_sim/orgs      {"provider", "key"?, "profile": {…traffic.Profile…}}   → {"org_id"?, "profile"}
    Before the key's first use; without `key`, for every organisation of that provider made from now on.
POST /_sim/grow      {"provider", "key", "requests": N}    → {"added": {SOURCE: {…sums…}}}, in the open hour
POST /_sim/scenario  {"provider", "key", "action", …}      → {"edit", "before": [rows], "after": [rows]}; scenarios.py
POST /_sim/faults    {"rate": 0.1, "kinds": [..] | "all-transient", "seed", …}      random faults; faults.py
POST /_sim/faults/next  {"kind", "count"?, "skip"?, "provider"?, "key"?, "path_contains"?, …}      or a list of them
DELETE /_sim/faults  clears queued and random ones
GET  /_sim/stats     {"requests": {PATH: N}, "statuses": {"200": N}, "faults": {KIND: N}, "queued_faults": N}
DELETE /_sim/stats   sets them to zero
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from daemon.domain.window import from_epoch, parse_rfc3339, rfc3339, to_epoch
from daemon.simulator import scenarios
from daemon.simulator.catalogue import DAY, WIDTHS, Provider
from daemon.simulator.faults import Fault, RandomFaults
from daemon.simulator.registry import SERVICES
from daemon.simulator.traffic import Profile, Vendor
from daemon.simulator.wire import Query, RefusedError, Reply, Request, encode
from daemon.simulator.world import FOREVER, Org, World, totals_of, truth_rows, truth_totals

if TYPE_CHECKING:
    from daemon.simulator.server import Simulator


_T = TypeVar("_T")


class _Advance(msgspec.Struct, forbid_unknown_fields=True):
    seconds: int


class _Freeze(msgspec.Struct, forbid_unknown_fields=True):
    now: str | None = None
    frozen: bool = True


class _Setup(msgspec.Struct, forbid_unknown_fields=True):
    provider: Provider
    profile: dict[str, Any]
    key: str | None = None


class _Grow(msgspec.Struct, forbid_unknown_fields=True):
    provider: Provider
    key: str
    requests: int = 1


def answer(simulator: Simulator, request: Request) -> Reply:
    """One control request."""
    try:
        return Reply(body=encode(_answer(simulator, request)))
    except (ValueError, RefusedError) as error:  # msgspec's ValidationError is a ValueError
        return Reply(400, encode({"error": {"message": str(error)}}))
    except LookupError:
        return Reply(404, encode({"error": {"message": f"no control call {request.method} {request.path}"}}))


def _answer(simulator: Simulator, request: Request) -> object:
    world = simulator.world
    query = Query(request.query)
    match request.method, request.path.removeprefix("/_sim/"):
        case "GET", "health":
            return {"status": "ok", "now": _now(world), "orgs": len(world.orgs)}
        case "GET", "truth":
            return _totals(world, query) if query.one("totals") == "1" else _truth(world, query)
        case "POST", "advance":
            world.clock.advance(_body(request, _Advance).seconds)
            return {"now": _now(world)}
        case "POST", "freeze":
            freeze = _body(request, _Freeze)
            world.clock.freeze(parse_rfc3339(freeze.now) if freeze.now else None, frozen=freeze.frozen)
            return {"now": _now(world)}
        case "POST", "orgs":
            return _set_up(world, _body(request, _Setup))
        case "POST", "grow":
            grow = _body(request, _Grow)
            org = world.org(SERVICES[grow.provider].vendor, grow.key)
            now = world.clock.now()
            return {"added": totals_of(org, org.grow(grow.requests, now - now % 3600, now + 1))}
        case "POST", "scenario":
            asked = _body(request, scenarios.Scenario)
            return scenarios.play(world.org(SERVICES[asked.provider].vendor, asked.key), asked)
        case "POST", "faults":
            simulator.faults.set_random(_body(request, RandomFaults))
            return {}
        case "POST", "faults/next":
            faults = msgspec.json.decode(request.body, type=Fault | list[Fault])
            for fault in faults if isinstance(faults, list) else [faults]:
                simulator.faults.queue(fault)
            return {"queued_faults": len(simulator.faults.queued)}
        case "DELETE", "faults":
            simulator.faults.clear()
            return {}
        case "GET", "stats":
            return {
                "requests": dict(simulator.requests),
                "statuses": dict(simulator.statuses),
                "faults": dict(simulator.faults.served),
                "queued_faults": len(simulator.faults.queued),
            }
        case "DELETE", "stats":
            for counter in (simulator.requests, simulator.statuses, simulator.faults.served):
                counter.clear()
            return {}
        case _:
            raise LookupError(request.path)


def _body(request: Request, kind: type[_T]) -> _T:
    return msgspec.json.decode(request.body, type=kind)


def _now(world: World) -> str:
    return rfc3339(from_epoch(world.clock.now()))


def _set_up(world: World, setup: _Setup) -> object:
    profile = msgspec.convert(setup.profile, Profile)
    unknown = set(setup.profile) - set(Profile.__slots__)
    if unknown:
        raise ValueError(f"profile has no {', '.join(sorted(unknown))}")
    if (setup.provider, setup.key or "") in world.orgs:
        raise ValueError(f"{setup.key} is in use already: its profile stands")
    world.profiles[setup.provider, setup.key] = profile
    made = {"profile": msgspec.to_builtins(profile)}
    return (
        made
        if setup.key is None
        else {"org_id": world.org(SERVICES[setup.provider].vendor, setup.key).cast.org_id, **made}
    )


def _range(query: Query) -> tuple[int, int]:
    since, until = query.one("since"), query.one("until")
    return to_epoch(parse_rfc3339(since)) if since else 0, to_epoch(parse_rfc3339(until)) if until else FOREVER


def _vendor(query: Query) -> Vendor:
    named = query.one("provider")
    for provider, service in SERVICES.items():
        if provider == named:
            return service.vendor
    raise ValueError(f"provider: one of {', '.join(SERVICES)}")


def _names(org: Org, query: Query) -> list[str]:
    names = query.many("source") or [name for name in org.sources if name != "unreported"]
    for name in names:
        if name not in org.sources:
            raise ValueError(f"no such source: {name}")
    return names


def _truth(world: World, query: Query) -> object:
    org = world.org(_vendor(query), query.one("key") or "")
    since, until = _range(query)
    width = query.one("width")
    if width is not None and width not in WIDTHS:
        raise ValueError(f"width: one of {', '.join(WIDTHS)}")
    group_by = [dim for dim in query.many("group_by") if dim] if "group_by" in query.values else None
    sources = {
        name: truth_rows(
            org,
            name,
            since,
            until,
            width_s=None if width is None or org.sources[name].step == DAY else WIDTHS[width],
            group_by=None if group_by is None else [dim for dim in group_by if dim in org.sources[name].dims],
        )
        for name in _names(org, query)
    }
    return {
        "now": _now(world),
        "provider": org.provider,
        "key": org.key,
        "org_id": org.cast.org_id,
        "sources": sources,
    }


def _totals(world: World, query: Query) -> object:
    since, until = _range(query)
    key = query.one("key")
    named = query.one("provider")
    if key is not None:
        orgs = [world.org(_vendor(query), key)]
    else:
        orgs = [org for org in world.orgs.values() if named in {None, org.provider}]
    listed = []
    for org in orgs:
        sources = {name: truth_totals(org, name, since, until) for name in _names(org, query)}
        listed.append({"provider": org.provider, "key": org.key, "org_id": org.cast.org_id, "sources": sources})
        if key is None:
            org.forget()  # ten thousand of them would not fit
    return {"now": _now(world), "orgs": listed}
