"""The bare verify route: the daemon's own server and door, and nothing behind them: `python -m bench.verify_server`.

Says its port, then answers 200 to each delivery that is signed for its route.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bench.sender import CURRENT_KEY, NEXT_KEY, PUBLIC_URL
from bench.stage import has_uvloop
from daemon.domain.address import Address
from daemon.domain.connection import Secret
from daemon.queue.qstash import WORKER_PATH
from daemon.triggers.qstash import ORCHESTRATE_PATH, Door
from daemon.web.delivery import json_response
from daemon.web.server import Listener, bind


async def _serve() -> None:
    door = Door({"": (Secret(CURRENT_KEY), Secret(NEXT_KEY))}, PUBLIC_URL)

    def verifying(path: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            await door.verify(path, await request.body(), request.headers)
            return json_response({"verified": True})

        return answer

    bound = bind("listen", Address("127.0.0.1", 0))
    paths = (ORCHESTRATE_PATH, WORKER_PATH)
    listener = Listener(bound, [Route(path, verifying(path), methods=["POST"]) for path in paths])
    print(bound.getsockname()[1], flush=True)
    await listener.run()


if __name__ == "__main__":
    anyio.run(_serve, backend_options={"use_uvloop": has_uvloop()})
