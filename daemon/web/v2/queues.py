"""`/v2/queues`: FIFO queues."""

from __future__ import annotations

import msgspec

from daemon.domain.errors import UsageError
from daemon.queue.gates import Gate
from daemon.queue.message import ms
from daemon.web.v2.call import Answer, Call, NotFound, segment
from daemon.web.v2.drafts import check_name


class _Queue(msgspec.Struct, rename="camel"):
    queue_name: str
    parallelism: int = 1
    paused: bool | None = None


async def get(call: Call) -> Answer:
    """`GET /v2/queues`, `GET /v2/queues/{name}`."""
    if not call.rest:
        return Answer([_shown(queue) for queue in await call.services.gates.find_all(call.account.id, "queue")])
    name = check_name("queueName", segment(call.rest, "queueName"))
    queue = await call.services.gates.show(call.account.id, "queue", name)
    if queue is None:
        raise NotFound(f"queue {name}")
    return Answer(_shown(queue))


async def post(call: Call) -> Answer:
    """`POST /v2/queues` makes or changes one; `POST /v2/queues/{name}/pause` and `/resume` close and open it."""
    if call.rest:
        return await _pause(call)
    wanted = await call.json(_Queue)
    check_name("queueName", wanted.queue_name)
    most = call.limits.parallelism_max
    if not 1 <= wanted.parallelism <= most:
        raise UsageError("parallelism", f"is {wanted.parallelism}", f"give a whole number from 1 to {most}")
    await call.services.gates.set_queue(
        call.account.id, wanted.queue_name, wanted.parallelism, wanted.paused, call.limits.queues
    )
    return Answer()


async def delete(call: Call) -> Answer:
    """`DELETE /v2/queues/{name}`: its messages are cancelled. One that is not there is fine."""
    name = check_name("queueName", segment(call.rest, "queueName"))
    await call.services.pending.delete_queue(call.account.id, name)
    return Answer()


async def _pause(call: Call) -> Answer:
    name, _, verb = call.rest.partition("/")
    if verb not in ("pause", "resume"):
        raise NotFound("this path was")
    check_name("queueName", name)
    if not await call.services.gates.pause(call.account.id, "queue", name, is_paused=verb == "pause"):
        raise NotFound(f"queue {name}")
    return Answer()


def _shown(queue: Gate) -> dict[str, object]:
    return {
        "name": queue.name,
        "parallelism": queue.parallelism,
        "createdAt": ms(queue.created_at),
        "updatedAt": ms(queue.updated_at),
        "lag": queue.waiting + queue.running,
        "paused": queue.is_paused,
    }


METHODS = {"GET": get, "POST": post, "DELETE": delete}
