"""The providers there are. A new one is a wire module, what the catalogue says of it, and its name here."""

from __future__ import annotations

from daemon.simulator import anthropic, litellm, openai, openrouter
from daemon.simulator.catalogue import Provider
from daemon.simulator.wire import Service

SERVICES: dict[Provider, Service] = {
    module.SERVICE.vendor.provider: module.SERVICE for module in (openai, anthropic, openrouter, litellm)
}
