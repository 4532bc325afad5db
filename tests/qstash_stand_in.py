"""A small QStash to test against over real sockets: it accepts, deduplicates, delivers, signs, retries, calls back, and dies.

What it left out it refuses: URL groups and queues. Flow control, retry delays and labels are stored with a message and not
acted upon; a failed attempt is followed by the next after `retry_delay_s`, whatever `Retry-After` asks for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import socket
import time
from asyncio import Server, create_task, get_running_loop
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any, Literal, NamedTuple, NoReturn, cast, get_args

import aiohttp
import anyio
import httpx
import jwt
import yarl
from aiohttp import web
from anyio.abc import TaskGroup
from multidict import CIMultiDict

State = Literal["created", "active", "retry", "delivered", "failed"]
Role = Literal["message", "callback", "failure_callback"]
Refusal = Literal["daily", "burst", "quota", "server", "unauthorized", "hang", "accept_then_cut", "malformed"]

HOST = "127.0.0.1"
CALL_BYTES_MAX = 100 * 2**20
NAME = r"[A-Za-z0-9._-]+"
RETRIES = 3
UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
PREFIX = {"callback": "upstash-callback-", "failure_callback": "upstash-failure-callback-"}
FORWARD = "upstash-forward-"
SCHEDULE_STATE = {"delivered": "SUCCESS", "failed": "FAIL"}


class RefusedError(Exception):
    """The API's answer to a request that it does not take."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Call(NamedTuple):
    """One request to the API; the path is the raw target."""

    method: str
    path: str


class Attempt(NamedTuple):
    """One delivery that came to an end; the status is 0 when there was no answer."""

    status: int
    at: datetime


class Answer(NamedTuple):
    """What a destination answered."""

    status: int
    headers: httpx.Headers
    body: bytes


@dataclass(eq=False, kw_only=True)
class Message:
    """One message as accepted, and what became of it."""

    url: str
    body: bytes = field(repr=False)
    sent: httpx.Headers = field(repr=False)
    """The publisher's own headers, less Authorization: what is not a field here is read from there."""
    headers: httpx.Headers = field(repr=False)
    """What the destination gets besides the system headers: Content-Type and the forwarded ones."""
    method: str = "POST"
    retries: int = RETRIES
    timeout_s: int | None = None
    dedup_id: str | None = None
    callback: str | None = None
    failure_callback: str | None = None
    label: str | None = None
    schedule_id: str | None = None
    role: Role = "message"
    source: Message | None = field(default=None, repr=False)
    """The message that a callback is about."""
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    not_before: datetime = field(default_factory=lambda: datetime.now(UTC))
    id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(16)}")
    state: State = "created"
    attempts: list[Attempt] = field(default_factory=list)
    answers: list[Answer | None] = field(default_factory=list, repr=False)
    """The destination's answers, one for each attempt."""
    cut: int = 0
    """Deliveries that a death interrupted; the destination may have seen them, and they are no attempts."""

    @classmethod
    def of(
        cls,
        url: str,
        body: bytes,
        sent: httpx.Headers,
        *,
        role: Role = "message",
        source: Message | None = None,
        schedule_id: str | None = None,
    ) -> Message:
        """Read a publish.

        Raises:
            RefusedError: what it asks for cannot be.
        """
        message = cls(
            url=destination(url),
            body=body,
            sent=sent,
            headers=httpx.Headers(
                [(name, value) for name, value in sent.raw if name.lower() == b"content-type"]
                + [
                    (name[len(FORWARD) :], value)
                    for name, value in sent.raw
                    if name.lower().startswith(FORWARD.encode())
                ]
            ),
            method=sent.get("upstash-method", "POST").upper(),
            retries=number(sent, "upstash-retries", RETRIES),
            timeout_s=duration_s(sent, "upstash-timeout"),
            label=sent.get("upstash-label"),
            role=role,
            source=source,
            schedule_id=schedule_id,
        )
        message.not_before = message.created_at + timedelta(seconds=duration_s(sent, "upstash-delay") or 0)
        if "upstash-not-before" in sent:
            message.not_before = datetime.fromtimestamp(number(sent, "upstash-not-before", 0), UTC)
        if role == "message":
            message.dedup_id = sent.get("upstash-deduplication-id")
            message.callback = sent.get("upstash-callback")
            message.failure_callback = sent.get("upstash-failure-callback")
            message.called_back("callback", b"")  # so that what it cannot be is found now
            message.called_back("failure_callback", b"")
        if ":" in (message.dedup_id or ""):
            raise RefusedError(400, "DeduplicationId cannot contain ':'")
        return message

    @property
    def is_finished(self) -> bool:
        return self.state in {"delivered", "failed"}

    @property
    def failures(self) -> int:
        return sum(not is_success(attempt.status) for attempt in self.attempts)

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)

    @property
    def dedup_key(self) -> str | None:
        if self.dedup_id is None and self.sent.get("upstash-content-based-deduplication", "").lower() == "true":
            content = repr((self.url, self.body, sorted(self.headers.multi_items())))
            return f"content:{hashlib.sha256(content.encode()).hexdigest()}"  # no given id has a colon
        return self.dedup_id

    def called_back(self, role: Literal["callback", "failure_callback"], body: bytes) -> Message | None:
        """The callback with this body: its settings are the source's headers behind a prefix, its retries the source's own."""
        url = self.callback if role == "callback" else self.failure_callback
        if url is None:
            return None
        sent = httpx.Headers({"Content-Type": "application/json", "Upstash-Retries": str(self.retries)})
        prefix = PREFIX[role].encode()
        sent.update(
            [
                (b"Upstash-" + name[len(prefix) :], value)
                for name, value in self.sent.raw
                if name.lower().startswith(prefix)
            ]
        )
        return Message.of(url, body, sent, role=role, source=self)


@dataclass(eq=False, kw_only=True)
class Schedule:
    """What the stand-in fires: each time a message from the same destination, headers and body."""

    id: str
    cron: str
    destination: str
    body: bytes
    sent: httpx.Headers = field(repr=False)
    template: Message = field(repr=False)
    created_at: datetime
    is_paused: bool = False
    messages: list[Message] = field(default_factory=list, repr=False)
    """What it has made, oldest first."""

    @property
    def headers(self) -> httpx.Headers:
        return self.template.headers

    @property
    def method(self) -> str:
        return self.template.method

    @property
    def retries(self) -> int:
        return self.template.retries

    def view(self) -> dict[str, Any]:
        """As the API shows it, without what is empty."""
        shown: dict[str, Any] = {
            "header": header_map(self.headers),
            "callback": self.template.callback,
            "failureCallback": self.template.failure_callback,
            "delay": duration_s(self.sent, "upstash-delay"),
            "timeout": self.template.timeout_s,
            "label": self.template.label,
            "isPaused": self.is_paused,
        }
        try:
            shown["body"] = self.body.decode()
        except UnicodeDecodeError:
            shown["bodyBase64"] = base64.b64encode(self.body).decode()
        if self.messages:
            last = self.messages[-1]
            shown["lastScheduleTime"] = ms(last.created_at)
            shown["lastScheduleStates"] = {last.id: SCHEDULE_STATE.get(last.state, "IN_PROGRESS")}
        return {
            "scheduleId": self.id,
            "destination": self.destination,
            "cron": self.cron,
            "createdAt": ms(self.created_at),
            "method": self.method,
            "retries": self.retries,
            "callerIP": HOST,
        } | {name: value for name, value in shown.items() if value}


class StandIn:
    """One QStash of one tenant. It belongs to the event loop that opened it."""

    def __init__(
        self, *, retry_delay_s: float, dedup_window_s: float, delivery_s_max: float, body_bytes_max: int
    ) -> None:
        self.retry_delay_s = retry_delay_s
        self.dedup_window_s = dedup_window_s
        self.delivery_s_max = delivery_s_max
        self.body_bytes_max = body_bytes_max
        self.network_error_status: int | None = None
        """What a callback's `status` says when the destination did not answer; None leaves the field out."""
        self.token = secrets.token_urlsafe(24)
        self.current_key = new_key()
        self.next_key = new_key()
        self.messages: list[Message] = []
        self.callbacks: list[Message] = []
        self.schedules: dict[str, Schedule] = {}
        self.requests: list[Call] = []
        self.refused = 0
        """Writes that `refuse` has met, so far."""
        self._refusal: tuple[Refusal, int | None] | None = None
        self._known: dict[str, tuple[str, float]] = {}
        self._is_held = False
        self._carried: dict[str, anyio.CancelScope] = {}
        self._delayed: set[str] = set()
        self._by_hand: set[anyio.CancelScope] = set()
        self._clock: anyio.CancelScope | None = None
        self._changed = anyio.Event()
        self._tasks: TaskGroup
        self._client: aiohttp.ClientSession
        self._server: Server | None = None
        self._web = web.Server(
            self._handle,
            handler_cancellation=True,
            access_log=None,
            request_factory=lambda message, payload, protocol, writer, task: web.BaseRequest(
                message, payload, protocol, writer, task, get_running_loop(), client_max_size=CALL_BYTES_MAX
            ),
        )
        # Bound and never listening: it keeps the port from everybody else while this QStash is dead.
        self._port_holder = socket.socket()
        self._port_holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._port_holder.bind((HOST, 0))
        self.url = f"http://{HOST}:{self._port_holder.getsockname()[1]}"

    @property
    def is_alive(self) -> bool:
        return self._server is not None

    # What a test does to it.

    def sign(self, url: str, body: bytes, /, *, key: str | None = None, **claims: Any) -> str:
        return signature(url, body, key=key or self.current_key, **claims)

    def rotate(self) -> None:
        """The next key becomes the current one, with which everything is signed from now on."""
        self.current_key, self.next_key = self.next_key, new_key()

    def refuse(self, kind: Refusal, count: int | None = None) -> None:
        """Answer the next writes (all until `clear`, if count is None) with this failure. Replaces an earlier one.

        Only "accept_then_cut" stores what it was sent. "hang" is ended by the client, by `die` or by the end of the test.
        """
        if kind not in get_args(Refusal):
            raise ValueError(f"{kind!r} is none of {get_args(Refusal)}")
        self._refusal = (kind, count)

    def clear(self) -> None:
        self._refusal = None

    def hold(self, on: bool = True) -> None:
        """Accept without delivering, until False releases what has been held. A delivery on its way goes on."""
        self._is_held = on
        self._release()

    def die(self) -> None:
        """Refuse connections and cut those that are open, of callers and of deliveries; what was accepted stays."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        self.on_schedule_every(None)
        for connection in self._web.connections:
            if connection.transport is not None:
                cast("Any", connection.transport).abort()
        for scope in [*self._carried.values(), *self._by_hand]:
            scope.cancel()
        self._notify()

    async def revive(self) -> None:
        """Listen on the same port again, and deliver what is not finished, also what the death interrupted."""
        if self._server is not None:
            return
        await self.until(lambda: not self._carried and not self._by_hand)
        await self._listen()
        self._release()

    async def deliver(self, message: Message, times: int = 1, concurrently: bool = False) -> list[int]:
        """Make attempts by hand, also while held and also again when it was delivered: the same id, signed afresh.

        Each is one attempt, with its callback; what fails is not retried by itself. Returns their statuses, 0 for no answer.
        """
        self._must_live()
        statuses = [0] * times

        async def attempt(at: int) -> None:
            statuses[at] = await self._attempt(message)

        with anyio.CancelScope() as scope:
            self._by_hand.add(scope)
            try:
                if concurrently:
                    async with anyio.create_task_group() as group:
                        for at in range(times):
                            group.start_soon(attempt, at)
                else:
                    for at in range(times):
                        await attempt(at)
            finally:
                self._by_hand.discard(scope)
                self._notify()
        return statuses

    async def fire(self, schedule_id: str) -> Message:
        """Make the schedule's next message now, and return when it is finished, held, delayed, or cut off by a death."""
        self._must_live()
        schedule = self.schedules[schedule_id]
        if schedule.is_paused:
            raise RuntimeError(f"schedule {schedule_id} is paused")
        message = self._fire(schedule)
        await self.until(lambda: not self._is_busy(message), deadline_s=None)
        return message

    def on_schedule_every(self, seconds: float | None) -> None:
        """Fire every schedule that is not paused each so many seconds, until `die` or None."""
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
        if seconds is not None:
            self._must_live()
            self._clock = anyio.CancelScope()
            self._tasks.start_soon(self._tick, seconds, self._clock)

    async def idle(self, deadline_s: float = 10.0) -> None:
        """Wait until nothing is being delivered or retried. What is held or not yet due does not count."""
        await self.until(lambda: len(self._carried) == len(self._delayed) and not self._by_hand, deadline_s=deadline_s)

    async def until(self, is_so: Callable[[], bool], deadline_s: float | None = 10.0) -> None:
        """Wait for something to become true of this object; it is looked at after each change."""
        try:
            with anyio.fail_after(deadline_s):
                while not is_so():
                    await self._changed.wait()
        except TimeoutError:
            unfinished = [message for message in [*self.messages, *self.callbacks] if not message.is_finished]
            raise TimeoutError(
                f"not within {deadline_s} s; {len(unfinished)} unfinished, the first: {unfinished[:1]}"
            ) from None

    def find(self, message_id: str) -> Message:
        return {message.id: message for message in [*self.messages, *self.callbacks]}[message_id]

    # Deliveries.

    def _is_busy(self, message: Message) -> bool:
        return message.id in self._carried and message.id not in self._delayed

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _must_live(self) -> None:
        if self._server is None:
            raise RuntimeError("this QStash is dead")

    def _release(self) -> None:
        for message in [*self.messages, *self.callbacks]:
            self._start(message)

    def _store(self, message: Message) -> None:
        (self.messages if message.role == "message" else self.callbacks).append(message)
        self._start(message)
        self._notify()

    def _start(self, message: Message) -> None:
        if self._is_held or not self.is_alive or message.is_finished or message.id in self._carried:
            return
        self._carried[message.id] = scope = anyio.CancelScope()
        if message.not_before > datetime.now(UTC):
            self._delayed.add(message.id)
        self._tasks.start_soon(self._carry, message, scope)

    async def _carry(self, message: Message, scope: anyio.CancelScope) -> None:
        """Deliver one message until it is finished; leave it as it is when held, or cancelled by a death."""
        try:
            with scope:
                await anyio.sleep(max(0.0, (message.not_before - datetime.now(UTC)).total_seconds()))
                self._delayed.discard(message.id)
                while not self._is_held and not message.is_finished:
                    await self._attempt(message)
                    if not message.is_finished:
                        await anyio.sleep(self.retry_delay_s)
        finally:
            self._delayed.discard(message.id)
            del self._carried[message.id]
            self._notify()

    async def _attempt(self, message: Message) -> int:
        retried = min(message.failures, message.retries)
        if not message.is_finished:
            message.state = "active"
        self._notify()
        try:
            answer = await self._send(message, retried)
        except anyio.get_cancelled_exc_class():
            message.cut += 1
            if message.state == "active":
                message.state = "retry" if message.attempts else "created"
            raise
        status = answer.status if answer is not None else 0
        message.attempts.append(Attempt(status, datetime.now(UTC)))
        message.answers.append(answer)
        before = message.state
        if is_success(status):
            message.state = "delivered"
        elif not message.is_finished:
            is_final = answer is not None and answer.headers.get("upstash-nonretryable-error", "").lower() == "true"
            message.state = "failed" if is_final or message.failures > message.retries else "retry"
        self._call_back(message, "callback", answer, retried)
        if message.state == "failed" != before:
            self._call_back(message, "failure_callback", answer, retried)
        self._notify()
        return status

    async def _send(self, message: Message, retried: int) -> Answer | None:
        system = {
            "User-Agent": "Upstash-QStash",
            "Upstash-Message-Id": message.id,
            "Upstash-Retried": str(retried),
            "Upstash-Signature": self.sign(message.url, message.body),
            "Upstash-Caller-Ip": HOST,
        }
        if message.schedule_id is not None:
            system["Upstash-Schedule-Id"] = message.schedule_id
        if message.label is not None:
            system["Upstash-Label"] = message.label
        headers = CIMultiDict(message.headers.multi_items())
        headers.update(system)
        try:
            async with self._client.request(
                message.method,
                yarl.URL(message.url, encoded=True),
                data=message.body,
                headers=headers,
                skip_auto_headers=("Accept", "Content-Type"),
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(min(self.delivery_s_max, message.timeout_s or self.delivery_s_max)),
            ) as answer:
                return Answer(answer.status, httpx.Headers(answer.raw_headers), await answer.read())
        except (aiohttp.ClientError, OSError):  # OSError is also the timeout's
            return None

    def _call_back(
        self,
        message: Message,
        role: Literal["callback", "failure_callback"],
        answer: Answer | None,
        retried: int,
    ) -> None:
        payload = {
            "status": answer.status if answer is not None else self.network_error_status,
            "header": header_map(answer.headers) if answer is not None else None,
            "body": base64.b64encode(answer.body[: self.body_bytes_max]).decode() or None
            if answer is not None
            else None,
            "retried": retried or None,
            "maxRetries": message.retries or None,
            "dlqId": f"{ms(datetime.now(UTC))}-{len(self.callbacks)}" if role == "failure_callback" else None,
            "sourceMessageId": message.id,
            "scheduleId": message.schedule_id,
            "url": message.url,
            "method": message.method,
            "sourceHeader": header_map(message.headers) or None,
            "sourceBody": base64.b64encode(message.body).decode() or None,
            "notBefore": ms(message.not_before),
            "createdAt": ms(message.created_at),
            "callerIP": HOST,
        }
        # What is empty is left out, as the real one does; an explicit status 0 is the test's own wish.
        body = json.dumps({name: value for name, value in payload.items() if value is not None}).encode()
        if (callback := message.called_back(role, body)) is not None:
            self._store(callback)

    def _fire(self, schedule: Schedule) -> Message:
        message = Message.of(schedule.destination, schedule.body, schedule.sent, schedule_id=schedule.id)
        schedule.messages.append(message)
        self._store(message)
        return message

    async def _tick(self, seconds: float, scope: anyio.CancelScope) -> None:
        with scope:
            while True:
                await anyio.sleep(seconds)
                for schedule in list(self.schedules.values()):
                    if not schedule.is_paused:
                        self._fire(schedule)

    # The API.

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append(Call(request.method, request.raw_path))
        self._notify()
        body = await request.read()
        if not self.is_alive:
            await cut(request)
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return error(401, "unable to authenticate: invalid token")
        kind = self._refusal_of(request.method)
        if kind == "hang":
            await anyio.sleep_forever()
        if kind is not None and kind != "accept_then_cut":
            return refusal(kind)
        sent = httpx.Headers([pair for pair in request.raw_headers if pair[0].lower() != b"authorization"])
        answer = self._answer(request.method, request.raw_path, sent, body)
        if kind == "accept_then_cut":
            await cut(request)
        return answer

    def _refusal_of(self, method: str) -> Refusal | None:
        if self._refusal is None or method == "GET":
            return None
        kind, left = self._refusal
        if left is not None:
            left -= 1
            self._refusal = (kind, left) if left > 0 else None
        self.refused += 1
        self._notify()
        return kind

    def _answer(self, method: str, path: str, sent: httpx.Headers, body: bytes) -> web.Response:
        try:
            for methods, pattern, act in ROUTES:
                if re.fullmatch(methods, method) and (found := re.fullmatch(pattern, path)):
                    return act(self, sent, body, *found.groups())
        except RefusedError as refused:
            return error(refused.status, str(refused))
        finally:
            self._notify()
        return error(404, f"{method} {path} not found")

    def _draft(self, url: str, body: bytes, sent: httpx.Headers) -> Message:
        if len(body) > self.body_bytes_max:
            raise RefusedError(400, "quota maxMessageSize exceeded")
        return Message.of(url, body, sent)

    def _accept(self, draft: Message) -> dict[str, Any]:
        now = time.monotonic()
        if (key := draft.dedup_key) is not None:
            first, at = self._known.get(key, ("", float("-inf")))
            if now - at < self.dedup_window_s:
                return {"messageId": first, "deduplicated": True}
            self._known[key] = (draft.id, now)
        self._store(draft)
        return {"messageId": draft.id, "url": draft.url}

    def _publish(self, sent: httpx.Headers, body: bytes, url: str) -> web.Response:
        accepted = self._accept(self._draft(url, body, sent))
        return web.json_response(accepted, status=202 if "deduplicated" in accepted else 200)

    def _batch(self, _sent: httpx.Headers, body: bytes) -> web.Response:
        """All or nothing: each item is read before the first is stored."""
        try:
            items = [
                (
                    item["destination"],
                    (item.get("body") or "").encode(),
                    httpx.Headers(item.get("headers")),
                    item.get("queue"),
                )
                for item in json.loads(body)
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as wrong:
            raise RefusedError(400, f"invalid batch request: {wrong!r}") from wrong
        if any(queue for *_, queue in items):
            raise RefusedError(400, "this stand-in has no queues")
        drafts = [self._draft(url, content, sent) for url, content, sent, _ in items]
        return web.json_response([self._accept(draft) for draft in drafts])

    def _schedule(self, sent: httpx.Headers, body: bytes, url: str) -> web.Response:
        cron = sent.get("upstash-cron", "").strip()
        if not re.fullmatch(r"(CRON_TZ=\S+\s+)?(\S+(\s+\S+){4}|@[a-z]+)", cron):
            raise RefusedError(400, f"invalid cron expression: {cron!r}")
        schedule_id = sent.get("upstash-schedule-id", f"scd_{secrets.token_hex(14)}")
        if not re.fullmatch(NAME, schedule_id):
            raise RefusedError(400, f"invalid schedule id: {schedule_id!r}")
        before = self.schedules.get(schedule_id)
        self.schedules[schedule_id] = schedule = Schedule(
            id=schedule_id,
            cron=cron,
            destination=url,
            body=body,
            sent=sent,
            template=self._draft(url, body, sent),
            created_at=datetime.now(UTC),
        )
        if before is not None:  # whether an update ends a pause is written nowhere; here it does not
            schedule.created_at, schedule.is_paused, schedule.messages = (
                before.created_at,
                before.is_paused,
                before.messages,
            )
        return web.json_response({"scheduleId": schedule_id})

    def _find_schedule(self, schedule_id: str) -> Schedule:
        try:
            return self.schedules[schedule_id]
        except KeyError:
            raise RefusedError(404, f"schedule {schedule_id} not found") from None

    def _list_schedules(self, _sent: httpx.Headers, _body: bytes) -> web.Response:
        return web.json_response([schedule.view() for schedule in self.schedules.values()])

    def _get_schedule(self, _sent: httpx.Headers, _body: bytes, schedule_id: str) -> web.Response:
        return web.json_response(self._find_schedule(schedule_id).view())

    def _delete_schedule(self, _sent: httpx.Headers, _body: bytes, schedule_id: str) -> web.Response:
        del self.schedules[self._find_schedule(schedule_id).id]
        return web.Response()

    def _pause(self, _sent: httpx.Headers, _body: bytes, schedule_id: str, verb: str) -> web.Response:
        self._find_schedule(schedule_id).is_paused = verb == "pause"
        return web.Response()

    def _keys(self, _sent: httpx.Headers, _body: bytes) -> web.Response:
        return web.json_response({"current": self.current_key, "next": self.next_key})

    def _rotate(self, sent: httpx.Headers, body: bytes) -> web.Response:
        self.rotate()
        return self._keys(sent, body)

    # Its life.

    async def _listen(self) -> None:
        _, port = self._port_holder.getsockname()
        self._server = await get_running_loop().create_server(self._web, HOST, port, reuse_port=True, backlog=1024)
        self._notify()

    async def _run(self, is_up: anyio.Event) -> None:
        # Without a limit, so that no slow destination holds up another; a connection for each delivery, so that none fails
        # because the destination had just let go of an idle one. (httpx's pool is quadratic in what is on its way.)
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=True), cookie_jar=aiohttp.DummyCookieJar()
            ) as self._client,
            anyio.create_task_group() as self._tasks,
        ):
            is_up.set()
            await anyio.sleep_forever()


# By method and raw path. A schedule's id has no colon and a destination has one.
ROUTES: tuple[tuple[str, str, Callable[..., web.Response]], ...] = (
    ("POST", r"/v2/publish/(.+)", StandIn._publish),
    ("POST", r"/v2/batch", StandIn._batch),
    ("PATCH|POST", rf"/v2/schedules/({NAME})/(pause|resume)", StandIn._pause),
    ("POST", r"/v2/schedules/(.+)", StandIn._schedule),
    ("GET", r"/v2/schedules", StandIn._list_schedules),
    ("GET", rf"/v2/schedules/({NAME})", StandIn._get_schedule),
    ("DELETE", rf"/v2/schedules/({NAME})", StandIn._delete_schedule),
    ("GET", r"/v2/keys", StandIn._keys),
    ("POST", r"/v2/keys/rotate", StandIn._rotate),
)


@asynccontextmanager
async def open_stand_in(
    *,
    retry_delay_s: float = 0.05,
    dedup_window_s: float = 600.0,
    delivery_s_max: float = 30.0,
    body_bytes_max: int = 1_000_000,
) -> AsyncIterator[StandIn]:
    """A QStash on a free port of the loopback address, until the block ends.

    Args:
        retry_delay_s: between a failed attempt and the next.
        delivery_s_max: how long a destination may take; `Upstash-Timeout` can only shorten it.
        body_bytes_max: of one message; above it the answer is the quota's.
    """
    qstash = StandIn(
        retry_delay_s=retry_delay_s,
        dedup_window_s=dedup_window_s,
        delivery_s_max=delivery_s_max,
        body_bytes_max=body_bytes_max,
    )
    # A task of its own, so that a failure of the test does not arrive wrapped in the task group's.
    is_up = anyio.Event()
    running = create_task(qstash._run(is_up))
    try:
        await is_up.wait()
        await qstash._listen()
        yield qstash
    finally:
        with anyio.CancelScope(shield=True):
            qstash.die()
            qstash._web.pre_shutdown()  # idle connections end at once
            await qstash._web.shutdown(1.0)
            qstash._port_holder.close()
            running.cancel()
            with suppress(anyio.get_cancelled_exc_class()):
                await running


def signature(url: str, body: bytes, /, *, key: str, **claims: Any) -> str:
    """The JWT of a delivery; each claim can be replaced, and None leaves it out."""
    now = int(time.time())
    all_claims = {
        "iss": "Upstash",
        "sub": url,
        "exp": now + 300,
        "nbf": 0,
        "iat": now,
        "jti": f"jwt_{secrets.token_hex(16)}",
        "body": base64.urlsafe_b64encode(hashlib.sha256(body).digest()).decode(),
    } | claims
    return jwt.encode({name: value for name, value in all_claims.items() if value is not None}, key, algorithm="HS256")


def new_key() -> str:
    return f"sig_{secrets.token_hex(14)}"


def ms(at: datetime) -> int:
    return round(at.timestamp() * 1000)


def is_success(status: int) -> bool:
    return 200 <= status < 300


def header_map(headers: httpx.Headers) -> dict[str, list[str]]:
    """Name in its canonical case to values."""
    return {"-".join(map(str.capitalize, name.split("-"))): headers.get_list(name) for name in headers}


def number(sent: httpx.Headers, name: str, default: int) -> int:
    value = sent.get(name)
    if value is None:
        return default
    if not value.isdecimal():
        raise RefusedError(400, f"invalid {name}: {value!r}")
    return int(value)


def duration_s(sent: httpx.Headers, name: str) -> int | None:
    value = sent.get(name)
    if value is None:
        return None
    if value.isdecimal():
        return int(value)
    if not re.fullmatch(r"(\d+[smhd])+", value):
        raise RefusedError(400, f"invalid {name}: {value!r}")
    return sum(int(count) * UNIT_S[unit] for count, unit in re.findall(r"(\d+)([smhd])", value))


def destination(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise RefusedError(400, "invalid destination url: endpoint has invalid scheme, add http:// or https://")
    try:
        httpx.URL(url)
    except httpx.InvalidURL as wrong:
        raise RefusedError(400, f"invalid destination url: {wrong}") from wrong
    return url


def error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


def refusal(kind: Refusal) -> web.Response:
    reset = str(int(time.time()) + 3600)
    match kind:
        case "daily":
            answer = error(429, "exceeded daily message limit")
            answer.headers.update({"RateLimit-Limit": "1000", "RateLimit-Remaining": "0", "RateLimit-Reset": reset})
        case "burst":
            answer = error(429, "exceeded burst rate limit")
            answer.headers.update(
                {"Burst-RateLimit-Limit": "100", "Burst-RateLimit-Remaining": "0", "Burst-RateLimit-Reset": reset}
            )
        case "quota":
            answer = error(400, "quota maxMessageSize exceeded")
        case "unauthorized":
            answer = error(401, "unable to authenticate: invalid token")
        case "malformed":
            answer = web.Response(text='{"messageId": "msg_', content_type="application/json")
        case _:
            answer = error(500, HTTPStatus.INTERNAL_SERVER_ERROR.phrase)
    return answer


async def cut(request: web.BaseRequest) -> NoReturn:
    """End the connection without an answer; losing it cancels the handler, which waits here for that."""
    if request.transport is not None:
        cast("Any", request.transport).abort()
    await anyio.sleep_forever()
    raise AssertionError
