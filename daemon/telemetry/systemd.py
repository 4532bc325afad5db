"""What the service manager is told: READY, STATUS, WATCHDOG, STOPPING, as datagrams to `NOTIFY_SOCKET`.

The protocol is a line of text on a Unix socket (sd_notify(3), systemd 252). The packages that wrap it block, or have
not been released for years.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import structlog

log = structlog.get_logger()


class ServiceManager:
    """Says nothing where nobody listens: outside of a unit of `Type=notify`."""

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        env = os.environ if env is None else env
        path = env.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        is_ours = env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        microseconds = env.get("WATCHDOG_USEC", "")
        self.watchdog_s: float | None = None
        """The longest silence that is taken for life, where somebody watches."""
        if self._address and is_ours and microseconds.isdecimal() and int(microseconds):
            self.watchdog_s = int(microseconds) / 1e6

    def ready(self, status: str) -> None:
        self._say(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        self._say(f"STATUS={status}")

    def alive(self) -> None:
        self._say("WATCHDOG=1")

    def stopping(self, status: str) -> None:
        self._say(f"STOPPING=1\nSTATUS={status}")

    def _say(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as datagrams:
                datagrams.sendto(message.replace("\0", "").encode(), self._address)
        except OSError as error:
            log.debug("systemd.unreachable", problem=str(error))
