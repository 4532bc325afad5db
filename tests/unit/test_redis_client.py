"""Every exception of the libraries has a name of ours, and no name repeats a secret."""

import inspect

import pytest
import redis.asyncio.sentinel
import redis.exceptions
import upstash_redis.errors

from daemon.domain.errors import (
    CredentialError,
    DaemonError,
    ForbiddenError,
    PermanentError,
    RateLimitedError,
    UpstreamUnavailableError,
)
from daemon.redis_client import KINDS, as_ours

MODULES = (redis.exceptions, redis.asyncio.sentinel, upstash_redis.errors)
CLASSES = sorted(
    {
        kind
        for module in MODULES
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ in {m.__name__ for m in MODULES}
    },
    key=lambda kind: kind.__name__,
)


def made(kind: type[Exception]) -> Exception:
    """Some parse their text, so that they need one that they can."""
    return kind("3999 127.0.0.1:6381")


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_exception_class_is_mapped_by_itself(kind) -> None:
    """By itself and not through a base: a new kind of ConnectionError may well be a refusal."""
    assert kind in KINDS, f"redis_client does not map {kind.__name__}"
    error = as_ours(made(kind), "host:1")
    assert isinstance(error, DaemonError)
    assert str(error).startswith("host:1: ")


def test_walk_finds_the_classes() -> None:
    assert len(CLASSES) > 30
    assert set(KINDS) == {*CLASSES, OSError}


@pytest.mark.parametrize(
    ("reply", "ours"),
    [
        ("NOAUTH Authentication required.", CredentialError),
        ("WRONGPASS invalid username-password pair or user is disabled.", CredentialError),
        ("ERR invalid password", CredentialError),
        ("NOPERM User x has no permissions to run the 'scan' command", ForbiddenError),
        ("LOADING Valkey is loading the dataset in memory", UpstreamUnavailableError),
        ("BUSY Valkey is busy running a script.", UpstreamUnavailableError),
        ("TRYAGAIN Multiple keys request during rehashing of slot", UpstreamUnavailableError),
        ("CLUSTERDOWN The cluster is down", UpstreamUnavailableError),
        ("MASTERDOWN Link with MASTER is down", UpstreamUnavailableError),
        ("READONLY You can't write against a read only replica.", UpstreamUnavailableError),
        ("MISCONF Valkey is configured to save RDB snapshots", UpstreamUnavailableError),
        ("OOM command not allowed when used memory > 'maxmemory'.", UpstreamUnavailableError),
        ("ERR max number of clients reached", UpstreamUnavailableError),
        ("ERR DB index is out of range", PermanentError),
        ("ERR unknown command 'SCAN'", PermanentError),
    ],
)
def test_refusal_of_a_server_says_what_to_do(reply, ours) -> None:
    from redis._parsers.base import BaseParser

    assert type(as_ours(BaseParser.parse_error(reply), "host:1")) is ours
    if not reply.startswith("ERR"):
        assert type(as_ours(upstash_redis.errors.UpstashError(reply), "host")) is ours


def test_exhausted_plan_of_upstash_is_a_rate_limit() -> None:
    error = upstash_redis.errors.UpstashError("ERR max daily request limit exceeded. Limit: 10000, Usage: 10000.")
    assert type(as_ours(error, "host")) is RateLimitedError


def test_secret_is_taken_out_of_what_a_server_says() -> None:
    said = redis.exceptions.ResponseError("unknown command 'AUTH', with args beginning with: 'hunter2'")
    assert "hunter2" not in str(as_ours(said, "host:1", ["hunter2"]))
    assert "***" in str(as_ours(said, "host:1", ["hunter2"]))


def test_connection_that_never_was_open_sent_nothing() -> None:
    error = as_ours(redis.exceptions.ConnectionError("refused"), "host:1", maybe_sent=False)
    assert isinstance(error, UpstreamUnavailableError)
    assert not error.maybe_sent
