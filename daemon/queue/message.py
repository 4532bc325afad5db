"""A message with a URL, as QStash has it: what is published, what is stored of it, and its name outside."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from daemon.db.pool import Record
from daemon.domain.account import AccountId
from daemon.domain.flow import FlowControl
from daemon.domain.job import JobId

PUSH = "push"
"""The kind of job that delivers a message."""

Headers = Mapping[str, list[str]]
"""Header names in the case in which they are delivered, each with its values in order."""

_DIGITS = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_VALUES = {digit: value for value, digit in enumerate(_DIGITS)}
_PREFIX = "msg_"
_ID_CHARS_MAX = 40
_DEAD_NAME = re.compile(r"[1-9][0-9]{0,15}-([1-9][0-9]{0,18})")


class Callback(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where, and how, the result of an attempt is reported. What is None follows the message itself."""

    url: str
    method: str = "POST"
    header: Headers = {}
    retries: int | None = None
    retry_delay: str | None = None
    timeout_s: int | None = None
    delay_s: int = 0


class Spec(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a message is delivered: what is stored of a publish besides the columns that can be searched.

    Attributes:
        header: Content-Type and what is forwarded.
        retries: tries after the first one.
        retry_delay: an expression of `domain.expression`.
        timeout_s: of one attempt; None: the account's maximum.
        redact: as `domain.redaction` writes it.
        flow: (key, parallelism, rate, period in seconds) as published.
        endpoint: the endpoint's name in its group.
    """

    method: str = "POST"
    header: Headers = {}
    retries: int = 3
    retry_delay: str | None = None
    timeout_s: int | None = None
    delay_s: int = 0
    callback: Callback | None = None
    failure_callback: Callback | None = None
    redact: str | None = None
    flow: tuple[str, int | None, int | None, int] | None = None
    endpoint: str | None = None

    @property
    def flow_control(self) -> FlowControl | None:
        return None if self.flow is None else FlowControl(*self.flow)


@dataclass(frozen=True, slots=True)
class Publication:
    """One message to store.

    Attributes:
        url: exactly as published.
        not_before: Unix seconds, as the publisher's clock has them; None: now, or after `spec.delay_s`.
        body_of: the place, in the same call, of the publication whose body this one shares.
        dedup: what marks a second one as a copy of this; None: nothing does.
        queue: the FIFO queue that it waits in.
        source: of a callback: the message of whose attempt it tells.
    """

    account: AccountId
    url: str
    spec: Spec
    body: bytes = b""
    body_of: int | None = None
    not_before: float | None = None
    dedup: str | None = None
    queue: str | None = None
    topic: str | None = None
    schedule: str | None = None
    labels: tuple[str, ...] = ()
    caller_ip: str | None = None
    source: JobId | None = None


class MessageId(NamedTuple):
    """The job's id, and a number that only this message has: nobody guesses it, and no restored database repeats it."""

    job: JobId
    salt: int

    def __str__(self) -> str:
        number, text = (self.job << 63) | self.salt, ""
        while number:
            number, rest = divmod(number, 58)
            text = _DIGITS[rest] + text
        return _PREFIX + text

    @classmethod
    def parse(cls, text: str) -> MessageId | None:
        """None for what is no name of a message."""
        if not text.startswith(_PREFIX) or not len(_PREFIX) < len(text) <= _ID_CHARS_MAX:
            return None
        number = 0
        for digit in text[len(_PREFIX) :]:
            if digit not in _VALUES:
                return None
            number = number * 58 + _VALUES[digit]
        job, salt = divmod(number, 1 << 63)
        return cls(JobId(job), salt) if job < 1 << 63 else None


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a publication. A copy has the id of the first."""

    id: MessageId
    url: str
    is_copy: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """A stored message, without its body.

    Attributes:
        payload: where the body lies; None: it has none.
        source: of a callback: the message of whose attempt it tells.
    """

    id: MessageId
    account: AccountId
    url: str
    spec: Spec
    payload: int | None
    not_before: datetime
    created_at: datetime
    source: JobId | None
    queue: str | None
    schedule: str | None
    topic: str | None
    labels: tuple[str, ...]
    caller_ip: str | None


_decode_spec = msgspec.json.Decoder(Spec).decode


def message_of(row: Record) -> Message:
    """The message of a row with all columns of its table."""
    return Message(
        MessageId(JobId(row["id"]), row["salt"]), AccountId(row["account_id"]), row["url"], _decode_spec(row["spec"]),
        row["payload_id"], row["not_before"], row["created_at"], row["source_id"], row["queue"], row["schedule_id"],
        row["topic"], tuple(row["labels"] or ()), row["caller_ip"],
    )  # fmt: skip


def authority_of(url: str) -> str:
    """Host and port of a checked URL, as written, in lower case."""
    return url.split("/", 3)[2].split("?", 1)[0].rpartition("@")[2].lower()


def host_of(url: str) -> str:
    """The host of a checked URL without its port, in lower case: what lists are searched by."""
    return urlsplit(url).hostname or ""


def new_salt() -> int:
    """63 random bits."""
    return secrets.randbits(63)


def ms(at: datetime) -> int:
    """Unix milliseconds, as everything outside has them."""
    return round(at.timestamp() * 1000)


def dead_name(at: datetime, job: JobId) -> str:
    """How a dead letter is called outside: milliseconds of its death and its job."""
    return f"{ms(at)}-{job}"


def parse_dead_name(text: str) -> JobId | None:
    """The job in a dead letter's name, whose time is the caller's to compare; None for what is no such name."""
    match = _DEAD_NAME.fullmatch(text)
    return JobId(int(match[1])) if match and int(match[1]) < 1 << 63 else None


@dataclass(slots=True)
class Attempted:
    """How one attempt to deliver ended, for the log, for callbacks and for the dead letters.

    Attributes:
        status: 0 where no response came.
        body: of the response, at most as much as is captured.
        error: why it failed; None: it did not.
    """

    status: int = 0
    header: Headers = field(default_factory=dict)
    body: bytes = b""
    error: str | None = None
