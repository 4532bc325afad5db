"""The suite that every poller passes, on OpenAI and Anthropic."""

from daemon.testing.poller_suite import *  # noqa: F403 - that is how it is used
from tests.conformance.poller_cases import OURS as CASES

__all__ = ["CASES"]
