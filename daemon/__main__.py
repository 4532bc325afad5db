"""`tallyd` and `python -m daemon`."""

from __future__ import annotations

import sys


def main() -> None:
    from daemon.cli.main import main as run  # noqa: PLC0415 -- so that importing this module costs nothing

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
