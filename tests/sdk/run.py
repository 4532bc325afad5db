"""Run the suite of the TypeScript SDK against a `tallyd dev` of its own: what `make test-sdks` does. Needs Node 20 and npm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SUITE = Path(__file__).with_name("typescript")
FAREWELL_S = 20


def main() -> int:
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        sys.stderr.write("Node.js with npm is not on the PATH: install it (20 or newer), then run this again\n")
        return 2
    subprocess.run([npm, "ci", "--silent"], cwd=SUITE, check=True)
    with tempfile.TemporaryDirectory(prefix="tallyd-sdks-") as folder:
        Path(folder).chmod(0o755)  # as root the server runs as another user
        foreign = ("TALLYD_", "QSTASH_")
        environment = {name: text for name, text in os.environ.items() if not name.startswith(foreign)}
        command = [sys.executable, "-m", "daemon", "dev", "--port", "0", "--json", "--data-dir", folder]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                served = json.loads("".join(iter(server.stdout.readline, "}\n")) + "}")
                environment |= {
                    "QSTASH_URL": served["url"],
                    "QSTASH_TOKEN": served["token"],
                    "QSTASH_CURRENT_SIGNING_KEY": served["current_signing_key"],
                    "QSTASH_NEXT_SIGNING_KEY": served["next_signing_key"],
                }
                return subprocess.run([node, "--test"], cwd=SUITE, env=environment, check=False).returncode
            finally:
                server.send_signal(signal.SIGINT)
                server.wait(FAREWELL_S)


if __name__ == "__main__":
    sys.exit(main())
