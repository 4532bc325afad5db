"""Stops the embedded server when the last process that holds it is gone. A program: `embedded.py` starts it.

Arguments: the server's folder, the user and group to become for the stop (-1: stay), the command that stops it.
"""

import fcntl
import os
import subprocess
import sys
from pathlib import Path


def main(folder: str, user: str, group: str, *stop: str) -> int:
    if os.fork():
        return 0  # whoever started us need not wait for us, nor be our parent
    os.setsid()
    users = os.open(Path(folder, "users.lock"), os.O_RDWR)
    fcntl.flock(users, fcntl.LOCK_EX)  # granted when no process is left that holds it shared
    if Path(folder, "keep").exists():
        return 0
    # Held until the server is down: whoever comes now waits, then starts it again.
    as_other = {} if user == "-1" else {"user": int(user), "group": int(group), "extra_groups": []}
    return subprocess.run(stop, check=False, cwd=folder, **as_other).returncode  # type: ignore[call-overload,no-any-return]  # noqa: S603


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
