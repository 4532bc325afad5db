"""Plug-ins that do not behave must not stop the daemon, and must not stay unnoticed."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from daemon.domain.errors import UsageError
from daemon.pollers import registry
from daemon.pollers.registry import GROUP, Pollers


def point(name, value):
    return EntryPoint(name, value, GROUP)


OPENAI = point("openai", "daemon.pollers.openai:OpenAIPoller")


def test_our_own_pollers_are_found():
    pollers = registry.load_pollers()
    assert {"anthropic", "openai"} <= set(pollers)
    assert not {"anthropic", "openai"} & set(pollers.problems)
    assert pollers.named("openai") is pollers["openai"]


def test_each_poller_is_set_up_once_when_it_is_first_looked_at():
    made = []
    pollers = Pollers({"openai": [OPENAI], "broken": [point("broken", "json:loads")]}, made.append)
    assert made == []
    assert [pollers["openai"], *pollers.values()] == made * 2


def test_unknown_provider_is_named_with_the_known_ones():
    with pytest.raises(UsageError, match=r"'gemini'.*anthropic, .*litellm, .*openai, .*openrouter"):
        registry.load_pollers().named("gemini")


@pytest.mark.parametrize("value", ["no_such_module_x:Poller", "daemon.pollers.openai:Nothing", "json:loads"])
def test_broken_plug_in_is_left_out_and_named(value):
    pollers = Pollers({"openai": [OPENAI], "broken": [point("broken", value)]})
    assert list(pollers) == ["openai"]
    assert value in pollers.problems["broken"]
    with pytest.raises(UsageError, match="does not load"):
        pollers.named("broken")


def test_poller_under_another_name_is_left_out():
    pollers = Pollers({"mine": [point("mine", OPENAI.value)]})
    assert list(pollers) == []
    assert "calls itself 'openai'" in pollers.problems["mine"]


def test_name_claimed_twice_is_reported_and_the_first_is_used():
    pollers = Pollers({"openai": [OPENAI, point("openai", "other:Poller")]})
    assert pollers["openai"].provider == "openai"
    assert "other:Poller" in pollers.problems["openai"]


def test_looking_at_the_registry_imports_no_poller_and_no_http():
    code = (
        "import sys; from daemon.pollers.registry import load_pollers; load_pollers();"
        "assert not {'daemon.pollers.openai', 'httpx', 'aiohttp', 'msgspec'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
