"""`/v2/schedules`: messages by the clock. Making one is in `publish.py`, since its path names a destination."""

from __future__ import annotations

import re

from daemon.queue.message import ms
from daemon.queue.schedules import Schedule
from daemon.web.v2.call import Answer, Call, NotFound, segment
from daemon.web.v2.drafts import check_name
from daemon.web.v2.publish import put_schedule
from daemon.web.v2.shapes import Shown, body_shown, labels_shown, present, redaction_of, spec_shown

_VERB = re.compile(r"([^/:]+)/(pause|resume)")


async def get(call: Call) -> Answer:
    """`GET /v2/schedules`, `GET /v2/schedules/{id}`."""
    schedules, account = call.services.schedules, call.account.id
    if not call.rest:
        return Answer([_shown(schedule) for schedule in await schedules.list(account)])
    id_ = _id(call.rest)
    schedule = await schedules.get(account, id_)
    if schedule is None:
        raise NotFound(f"schedule {id_}")
    return Answer(_shown(schedule))


async def delete(call: Call) -> Answer:
    """`DELETE /v2/schedules/{id}`: the messages that it has made go on."""
    id_ = _id(call.rest)
    if not await call.services.schedules.delete(call.account.id, id_):
        raise NotFound(f"schedule {id_}")
    return Answer()


async def patch(call: Call) -> Answer:
    """`PATCH /v2/schedules/{id}/pause` and `/resume`."""
    match = _VERB.fullmatch(call.rest)
    if match is None:
        raise NotFound("this path was")
    id_, schedules = _id(match[1]), call.services.schedules
    change = schedules.pause if match[2] == "pause" else schedules.resume
    if not await change(call.account.id, id_):
        raise NotFound(f"schedule {id_}")
    return Answer()


async def post(call: Call) -> Answer:
    """`POST /v2/schedules/{destination}`; and, as the documentation has them, the verbs of PATCH."""
    if _VERB.fullmatch(call.rest) is not None and not any(name == "upstash-cron" for name, _ in call.headers):
        return await patch(call)
    return await put_schedule(call)


def _id(text: str) -> str:
    return check_name("scheduleId", segment(text, "scheduleId"))


def _shown(schedule: Schedule) -> Shown:
    spec = schedule.spec
    redaction = redaction_of(spec)
    return {
        "scheduleId": schedule.id,
        "destination": schedule.destination,
        "cron": schedule.cron,
        "createdAt": ms(schedule.created_at),
        "method": spec.method,
        "retries": spec.retries,
        "isPaused": schedule.is_paused,
        **present(
            {
                "delay": spec.delay_s or None,
                "queueName": schedule.queue,
                "callerIP": schedule.caller_ip,
                "callerIp": schedule.caller_ip,
                "lastScheduleTime": None if schedule.last_at is None else ms(schedule.last_at),
                "nextScheduleTime": None if schedule.next_at is None else ms(schedule.next_at),
                "lastScheduleStates": {str(id_): state for id_, state in schedule.last_states.items()},
                "error": schedule.error,
            }
        ),
        **spec_shown(spec, redaction),
        **labels_shown(schedule.labels),
        **body_shown(redaction.of_body(schedule.body or b"")),
    }


METHODS = {"GET": get, "DELETE": delete, "PATCH": patch, "POST": post}
