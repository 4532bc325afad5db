"""For those who write pollers: what every poller must do, as tests that run on theirs (`pip install 'tallyd[testing]'`).

Nothing else in tallyd imports this room. How to use it: docs/how-to/write-a-poller.md.
"""

import pytest

pytest.register_assert_rewrite("daemon.testing.poller_suite")
