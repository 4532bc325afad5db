"""The commands for accounts, messages, schedules, groups and their dead letters: what a script may rely on."""

import base64
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, TypeVar

import anyio
import pytest

from daemon.db.accounts import AccountStore
from daemon.db.pool import Database
from daemon.db.secrets import Keyring, parse_keys
from daemon.domain.account import Limits
from daemon.domain.job import JobId, NewJob
from daemon.queue.burial import bury
from daemon.queue.groups import Endpoint, Groups
from daemon.queue.message import Callback, MessageId, Spec
from daemon.queue.messages import Messages
from daemon.queue.postgres import PostgresQueue
from daemon.queue.schedules import Schedules
from tests.cli_kit import KEY, Tallyd
from tests.message_kit import Post

NEXT = base64.b64encode(b"n" * 32).decode()

Result = TypeVar("Result")
Act = Callable[[Callable[[Post], Awaitable[Result]]], Result]


@pytest.fixture
def within(tallyd: Tallyd, database_url: str) -> Act:
    """Acts as the account `default`, which is made if need be."""

    def run(act: Callable[[Post], Awaitable[Result]], account: str = "default") -> Result:
        async def work() -> Result:
            db = await Database.open(database_url)
            try:
                queue = PostgresQueue(db)
                id_ = await AccountStore(db, Keyring(parse_keys(KEY))).add(account)
                post = Post(db, queue, Messages(db, queue), id_, await queue.register_worker(), Limits())
                return await act(post)
            finally:
                await db.close()

        return anyio.run(work)

    return run


# ── Accounts, tokens, keys ──────────────────────────────────────────────────────────────────────


def test_token_is_shown_once(tallyd: Tallyd) -> None:
    made = tallyd("tokens", "add", "app", "--json")
    assert made.code == 0
    token = made.json["token"]
    assert made.json == {"account": "default", "name": "app", "token": token, "read_only": False}
    plain = tallyd("tokens", "add", "reader", "--account", "acme", "--read-only")
    assert plain.out.startswith("tly_")
    assert len(plain.out.splitlines()) == 1, "a script takes the output as the token"
    assert "not shown again" in plain.err
    again = tallyd("tokens", "add", "app")
    assert (again.code, again.out) == (2, "")
    assert again.err == "error: NAME: token app exists already; revoke it first, or choose another name\n"
    listed = tallyd("tokens", "list", "--json")
    assert [(row["account"], row["name"], row["read_only"]) for row in listed.json] == [
        ("acme", "reader", True),
        ("default", "app", False),
    ]
    assert set(listed.json[0]) == {"account", "name", "read_only", "limits", "created_at", "revoked_at"}
    assert token not in listed.out
    assert token not in tallyd("tokens", "list").out


def test_revoked_token_is_listed_only_on_request(tallyd: Tallyd) -> None:
    tallyd("tokens", "add", "app")
    assert tallyd("tokens", "revoke", "app", "--json").json == {"account": "default", "name": "app"}
    twice = tallyd("tokens", "revoke", "app")
    assert (twice.code, twice.out) == (2, "")
    assert "has no token 'app'" in twice.err
    assert tallyd("tokens", "list", "--json").json == []
    assert tallyd("tokens", "list", "--all", "--json").json[0]["revoked_at"] is not None
    assert tallyd("tokens", "add", "app").code == 0


def test_limits_are_set_with_a_token(tallyd: Tallyd) -> None:
    tallyd("tokens", "add", "one", "--limit", "retries=20", "--limit", "parallelism=3")
    tallyd("tokens", "add", "two")
    assert {row["name"]: row["limits"] for row in tallyd("tokens", "list", "--json").json} == {
        "one": {"retries": 20, "parallelism": 3},
        "two": {"retries": 20, "parallelism": 3},
    }
    tallyd("tokens", "add", "three", "--limit", "retries=7")
    assert tallyd("tokens", "list", "--json").json[0]["limits"] == {"retries": 7}
    for wrong in ("colour=1", "retries", "retries=-1", "retries=x", "parallelism=0", "queues=1e3", "message_bytes=0"):
        refused = tallyd("tokens", "add", "four", "--limit", wrong)
        assert (refused.code, refused.out) == (2, ""), wrong
        assert refused.err.startswith("error: --limit: "), wrong
    assert "four" not in [row["name"] for row in tallyd("tokens", "list", "--json").json]
    assert tallyd("tokens", "add", "x", "--account", "no spaces").err.startswith("error: --account: 'no spaces' is no")
    assert tallyd("tokens", "add", "").err.startswith("error: NAME: '' is no name; ")
    assert "no spaces" not in tallyd("tokens", "list").out


def test_limits_that_change_are_told(tallyd: Tallyd) -> None:
    """Others' tokens have them too, and what is not given again is gone."""
    first = tallyd("tokens", "add", "one", "--limit", "parallelism=3", "--limit", "retries=0")
    assert first.err.endswith("\nAccount default now has the limits parallelism=3, retries=0.\n")
    assert "now has" not in tallyd("tokens", "add", "two").err
    assert "now has" not in tallyd("tokens", "add", "three", "--limit", "retries=0", "--limit", "parallelism=3").err
    last = tallyd("tokens", "add", "four", "--limit", "retries=7", "--json")
    assert last.err == "Account default now has the limits retries=7, not retries=0, parallelism=3.\n"
    assert "now has" not in tallyd("tokens", "add", "four", "--limit", "retries=9").err, "the name is taken"
    assert tallyd("tokens", "list", "--json").json[0]["limits"] == {"retries": 7}


def test_keys_are_masked_and_rotate(tallyd: Tallyd) -> None:
    missing = tallyd("keys", "show")
    assert (missing.code, missing.out) == (2, "")
    assert missing.err.startswith("error: --account: there is no account 'default'; ")
    tallyd("tokens", "add", "app")
    masked = tallyd("keys", "show", "--json")
    assert masked.json == {"account": "default", "current": "***", "next": "***"}
    before = tallyd("keys", "show", "--reveal", "--json").json
    assert before["current"].startswith("sig_")
    rotated = tallyd("keys", "rotate", "--json")
    assert rotated.json["current"] == "***"
    assert "before the next rotation" in rotated.err
    after = tallyd("keys", "show", "--reveal", "--json").json
    assert after["current"] == before["next"]
    assert after["next"] not in before.values()
    assert "sig_" not in tallyd("keys", "show").out
    assert tallyd("keys", "show", "--reveal").out == (
        f"export QSTASH_CURRENT_SIGNING_KEY={after['current']}\nexport QSTASH_NEXT_SIGNING_KEY={after['next']}\n"
    )
    replaced = tallyd("keys", "rotate", "--both", "--reveal", "--json")
    assert replaced.json["current"] not in (*before.values(), *after.values())
    assert "refuse every message" in replaced.err


def test_key_rotation_reseals_signing_keys(tallyd: Tallyd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise no message could be signed any more once the old key is gone."""
    tallyd("tokens", "add", "app")
    keys = tallyd("keys", "show", "--reveal", "--json").json
    monkeypatch.setenv("TALLYD_SECRET_KEY", NEXT)
    lost = [check for check in tallyd("doctor", "--json").json if not check["ok"]]
    assert [check["check"] for check in lost] == ["credentials open"]
    assert "account default" in lost[0]["detail"]
    assert "tallyd keys rotate --both" in lost[0]["fix"]
    monkeypatch.setenv("TALLYD_SECRET_KEY", f"{NEXT},{KEY}")
    assert tallyd("db", "rotate-key", "--json").json == {"resealed": 1, "failed": []}
    monkeypatch.setenv("TALLYD_SECRET_KEY", NEXT)
    assert tallyd("doctor").code == 0
    assert tallyd("keys", "show", "--reveal", "--json").json == keys


def test_signing_keys_are_replaced_where_their_seal_is_lost(tallyd: Tallyd, monkeypatch: pytest.MonkeyPatch) -> None:
    tallyd("tokens", "add", "app")
    monkeypatch.setenv("TALLYD_SECRET_KEY", NEXT)
    assert tallyd("keys", "rotate").code == 2
    assert tallyd("keys", "rotate", "--both").code == 0
    assert tallyd("doctor").code == 0


# ── Messages and queues ─────────────────────────────────────────────────────────────────────────


def test_messages_under_way(tallyd: Tallyd, within: Act) -> None:
    async def publish(post: Post) -> list[MessageId]:
        first = await post.send()
        await post.claim()
        return [
            first,
            await post.send("https://user:secret@b.example:8443/x?token=secret"),
            *await post.publish(*[post.publication(queue="orders") for _ in range(3)]),
            await post.send(spec=Spec(delay_s=600, flow=("key", 1, None, 1))),
        ]

    ids = [str(id_) for id_ in within(publish)]
    within(lambda post: post.send(), "acme")
    stats = tallyd("queue", "stats", "--json").json
    assert {name: stats[name] for name in ("available", "scheduled", "pending", "running")} == {
        "available": 3,  # one of the queue is let through
        "scheduled": 1,
        "pending": 2,
        "running": 1,
    }
    listed = tallyd("queue", "messages", "--account", "default", "--json")
    assert set(listed.json[0]) == {
        "id", "account", "state", "host", "queue", "flow_key", "attempt", "next_at", "created_at",
    }  # fmt: skip
    assert {row["id"] for row in listed.json} == set(ids)
    assert [row["state"] for row in listed.json] == ["running", *["available"] * 2, *["pending"] * 2, "scheduled"]
    by_id = {row["id"]: row for row in listed.json}
    assert (by_id[ids[0]]["attempt"], by_id[ids[0]]["next_at"]) == (1, None)
    assert by_id[ids[1]]["host"] == "b.example"
    assert by_id[ids[2]]["queue"] == "orders"
    assert by_id[ids[5]]["flow_key"] == "key"
    assert by_id[ids[5]]["next_at"] is not None
    assert "secret" not in listed.out
    assert len(tallyd("queue", "messages", "--json").json) == 7
    assert [row["id"] for row in tallyd("queue", "messages", "--state", "scheduled", "--json").json] == [ids[5]]
    assert len(tallyd("queue", "messages", "--limit", "2", "--json").json) == 2
    assert tallyd("queue", "messages").code == 0
    assert tallyd("queue", "messages", "--state", "lost").code == 2
    assert tallyd("queue", "messages", "--account", "nobody").code == 2
    assert [
        (row["account"], row["queue"], row["lag"], row["running"], row["parallelism"], row["paused"])
        for row in tallyd("queue", "list", "--json").json
    ] == [("default", "orders", 3, 1, 1, False)]
    assert tallyd("queue", "list").code == 0


def test_messages_are_cancelled_by_their_ids(tallyd: Tallyd, within: Act) -> None:
    one, two = [str(id_) for id_ in within(lambda post: post.publish(post.publication(), post.publication()))]
    stranger = str(within(lambda post: post.send(), "acme"))
    planned = tallyd("queue", "cancel", one, two, "--dry-run", "--json")
    assert planned.json == {"cancelled": 2, "missing": [], "dry_run": True}
    assert len(tallyd("queue", "messages", "--account", "default", "--json").json) == 2
    done = tallyd("queue", "cancel", one, one, stranger, "--json")
    assert done.code == 2
    assert done.json == {"cancelled": 1, "missing": [stranger], "dry_run": False}
    assert [row["id"] for row in tallyd("queue", "messages", "--json").json] == [two, stranger]
    assert tallyd("queue", "cancel", one).code == 2
    assert tallyd("queue", "cancel", two, "7").err.startswith("error: MSG_ID: '7' is no id of a message")
    assert [row["id"] for row in tallyd("queue", "messages", "--json").json] == [two, stranger]
    assert tallyd("queue", "cancel").code == 2


def test_message_is_traced_by_its_id(tallyd: Tallyd, within: Act) -> None:
    """It is all that a publisher knows of it."""

    async def publish(post: Post) -> list[MessageId]:
        done = await post.send()
        await post.deliver()
        return [done, *await post.publish(*[post.publication(queue="orders") for _ in range(2)])]

    done, ready, held = within(publish)
    traced = tallyd("trace", str(done), "--json").json
    assert [(job["id"], job["kind"], job["state"]) for job in traced["jobs"]] == [(done.job, "push", "completed")]
    assert [(attempt["attempt"], attempt["outcome"]) for attempt in traced["attempts"]] == [(1, "done")]
    assert "a message" in tallyd("trace", str(done)).out
    states = [tallyd("trace", str(id_), "--json").json["jobs"][0]["state"] for id_ in (ready, held)]
    assert states == ["available", "pending"]
    guessed = tallyd("trace", str(MessageId(done.job, done.salt ^ 1)))
    assert (guessed.code, guessed.out) == (2, "")


# ── Schedules ───────────────────────────────────────────────────────────────────────────────────


def test_schedules_are_seen_and_stopped(tallyd: Tallyd, within: Act) -> None:
    async def put(post: Post) -> str:
        async def limits(_: object) -> Limits:
            return Limits()

        schedules = Schedules(post.db, post.queue, post.messages, limits)
        spec = Spec(header={"Authorization": ["secret"]}, callback=Callback("http://u:secret@b.example/?key=secret"))
        url = "https://me:secret@example.com/hook?token=secret&x=1"
        return await schedules.put(post.account, "nightly", "0 3 * * *", url, spec, Limits(), body=b"xyz")

    within(put)
    listed = tallyd("schedules", "list", "--json").json
    assert set(listed[0]) == {
        "account", "id", "cron", "destination", "queue", "paused", "created_at", "next_at", "last_at", "error",
    }  # fmt: skip
    assert [(row["account"], row["id"], row["paused"]) for row in listed] == [("default", "nightly", False)]
    assert listed[0]["destination"] == "https://me:***@example.com/hook?token=***&x=1"
    assert "secret" not in tallyd("schedules", "list").out
    shown = tallyd("schedules", "show", "nightly", "--json")
    assert (shown.json["cron"], shown.json["body_bytes"], shown.json["last_messages"]) == ("0 3 * * *", 3, {})
    assert shown.json["callback"] == "http://u:***@b.example/?key=***"
    assert "secret" not in shown.out
    told = tallyd("schedules", "show", "nightly")
    assert (told.code, "secret" in told.out) == (0, False)
    assert tallyd("schedules", "pause", "nightly", "--json").json["state"] == "paused"
    assert tallyd("schedules", "list", "--json").json[0]["next_at"] is None
    assert tallyd("schedules", "resume", "nightly", "--json").json["state"] == "active"
    assert tallyd("schedules", "list", "--json").json[0]["next_at"] is not None
    assert tallyd("schedules", "delete", "nightly", "--dry-run", "--json").json == {
        "account": "default", "id": "nightly", "deleted": False, "dry_run": True,
    }  # fmt: skip
    assert tallyd("schedules", "delete", "nightly", "--json").json["deleted"] is True
    assert tallyd("schedules", "list", "--json").json == []
    for verb in ("show", "pause", "resume", "delete"):
        refused = tallyd("schedules", verb, "nightly")
        assert (refused.code, refused.out) == (2, "")
        assert refused.err.startswith("error: ID: account default has no schedule 'nightly'; ")


# ── Groups ──────────────────────────────────────────────────────────────────────────────────────


class Handler(BaseHTTPRequestHandler):
    asked: ClassVar[list[tuple[str, str]]] = []

    def do_OPTIONS(self) -> None:
        self.asked.append((self.command, self.path))
        self.send_response({"/gone": 410, "/post-only": 405}.get(self.path, 204))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[str]:
    Handler.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_dead_endpoints_are_named(tallyd: Tallyd, within: Act, receiver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request to each endpoint, which no handler of messages takes for one."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/x"
    endpoints = [
        Endpoint(f"{receiver}/ok", "good"), Endpoint(f"{receiver}/post-only"), Endpoint(f"{receiver}/gone"),
        Endpoint(nobody.replace("://", "://me:secret@")),
    ]  # fmt: skip

    async def fill(post: Post) -> None:
        await Groups(post.db).upsert_endpoints(post.account, "all", endpoints, post.limits)
        await Groups(post.db).upsert_endpoints(post.account, "good", endpoints[:1], post.limits)

    within(fill)
    assert [(row["group"], row["endpoints"]) for row in tallyd("groups", "list", "--json").json] == [
        ("all", 4),
        ("good", 1),
    ]
    shown = tallyd("groups", "show", "good", "--json").json
    assert shown["endpoints"] == [{"name": "good", "url": f"{receiver}/ok"}]
    assert tallyd("groups", "show", "good").code == 0
    assert tallyd("groups", "show", "none").code == 2
    blocked = tallyd("groups", "audit", "good", "--json")
    assert (blocked.code, blocked.json[0]["problem"]) == (
        1,
        "endpoint resolves to a loopback address: 127.0.0.1",
    )
    assert Handler.asked == []

    monkeypatch.setenv("TALLYD_PUSH_ALLOW", "127.0.0.0/8")
    planned = tallyd("groups", "audit", "--dry-run", "--json")
    assert (planned.code, len(planned.json), Handler.asked) == (0, 5, [])
    audited = tallyd("groups", "audit", "--json")
    assert audited.code == 1
    assert set(audited.json[0]) == {"account", "group", "endpoint", "url", "ok", "status", "took_ms", "problem"}
    assert [(row["ok"], row["status"]) for row in audited.json] == [
        (True, 204),
        (True, 405),
        (False, 410),
        (False, None),
        (True, 204),
    ]
    assert sorted(Handler.asked) == [("OPTIONS", path) for path in ("/gone", "/ok", "/post-only")]
    assert "refused" in audited.json[3]["problem"]
    assert audited.json[3]["url"] == nobody.replace("://", "://me:***@")
    for words in (["audit"], ["audit", "--json"], ["show", "all"], ["show", "all", "--json"]):
        assert "secret" not in tallyd("groups", *words).out, words
    good = tallyd("groups", "audit", "good")
    assert good.code == 0
    assert "DEAD" in tallyd("groups", "audit").out
    assert tallyd("groups", "audit", "none").code == 2


# ── Dead letters ────────────────────────────────────────────────────────────────────────────────


def test_dead_message_from_list_to_replay(tallyd: Tallyd, within: Act) -> None:
    """A replay is a new message, for a receiver that remembers ids would take the old one for a copy."""

    async def die(post: Post) -> MessageId:
        url = "https://me:secret@example.com/x?y=1&api_key=secret"
        id_ = await post.send(url, Spec(redact="body"), body=b"secret")
        await post.kill()
        return id_

    dead = within(die)

    async def bury_a_job(post: Post) -> list[JobId]:
        async with post.db.transaction() as tx:
            return await bury(tx, [(NewJob("poll_one", b"{}"), "broken")])

    job = within(bury_a_job)[0]
    listed = tallyd("dlq", "list", "--json").json
    assert [(row["id"], row["kind"], row["message_id"], row["url"], row["account"]) for row in listed] == [
        (dead.job, "push", str(dead), "https://me:***@example.com/x?y=1&api_key=***", "default"),
        (job, "poll_one", None, None, None),
    ]
    told = tallyd("dlq", "list").out
    assert ("https://me:***@example.com/x" in told, "secret" in told) == (True, False)
    shown = tallyd("dlq", "show", str(dead.job), "--json")
    assert (shown.json["url"], shown.json["message_id"]) == (listed[0]["url"], str(dead))
    assert (shown.json["response_status"], shown.json["response_body"]) == (500, "no")
    assert "new" in shown.json["replay"] or "anew" in shown.json["replay"]
    assert "secret" not in shown.out
    assert tallyd("dlq", "show", shown.json["dlq_id"], "--json").json["id"] == dead.job
    told = tallyd("dlq", "show", str(dead.job))
    assert (told.code, "secret" in told.out) == (0, False)

    planned = tallyd("dlq", "replay", "--all", "--dry-run", "--json").json
    assert planned == {"replayed": [dead.job, job], "missing": [], "dry_run": True, "messages": {}}
    replayed = tallyd("dlq", "replay", str(dead.job), str(job), "--json").json
    assert replayed["replayed"] == [dead.job, job]
    new = replayed["messages"][str(dead.job)]
    assert new.startswith("msg_")
    assert new != str(dead)
    assert tallyd("dlq", "list", "--json").json == []
    under_way = tallyd("queue", "messages", "--json").json
    assert [(row["id"], row["attempt"]) for row in under_way] == [(new, 0)]


def test_dead_message_is_dropped(tallyd: Tallyd, within: Act) -> None:
    async def die(post: Post) -> list[MessageId]:
        ids = await post.publish(post.publication(), post.publication())
        await post.kill()
        return ids

    one, two = within(die)
    dropped = tallyd("dlq", "drop", str(one.job), "--json")
    assert dropped.json == {"dropped": [one.job], "missing": [], "dry_run": False}
    gone = tallyd("dlq", "replay", f"1795718845920-{one.job}")
    assert (gone.code, gone.err) == (
        2,
        f"error: ID: no dead letter 1795718845920-{one.job}; see `tallyd dlq list`\n",
    )
    assert tallyd("dlq", "drop", "--all", "--json").json["dropped"] == [two.job]
    assert tallyd("dlq", "drop", "nonsense").err.startswith("error: ID: 'nonsense' is no id of a dead letter")


# ── The schedule in QStash ──────────────────────────────────────────────────────────────────────


class Cloud(BaseHTTPRequestHandler):
    has_schedule: ClassVar[bool] = True
    deleted: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        schedule = {
            "scheduleId": "tallyd-poll", "cron": "*/5 * * * *", "createdAt": 1, "method": "POST", "retries": 3,
            "destination": "http://tallyd.internal/api/poll/orchestrate", "isPaused": False,
        }  # fmt: skip
        keys = {"current": "sig_theirs", "next": "sig_theirs_too"}
        self._answer([schedule] * self.has_schedule if self.path == "/v2/schedules" else keys)

    def do_DELETE(self) -> None:
        self.deleted.append(self.path)
        self._answer(None)

    def _answer(self, value: object) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Cloud]]:
    Cloud.has_schedule = True
    Cloud.deleted.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Cloud) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("QSTASH_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("QSTASH_TOKEN", "t")
        monkeypatch.setenv("QSTASH_CURRENT_SIGNING_KEY", "sig_ours")
        monkeypatch.setenv("QSTASH_NEXT_SIGNING_KEY", "sig_ours_too")
        monkeypatch.setenv("TALLYD_PUBLIC_URL", "http://tallyd.internal")
        yield Cloud
        server.shutdown()
        thread.join()


def test_removal_of_the_schedule_is_looked_up_first(tallyd: Tallyd, cloud: type[Cloud]) -> None:
    planned = tallyd("qstash", "remove", "--dry-run")
    assert (planned.code, planned.out) == (
        0,
        "schedule tallyd-poll (*/5 * * * *, http://tallyd.internal/api/poll/orchestrate) would be removed\n",
    )
    answer = {"schedule_id": "tallyd-poll", "removed": False, "dry_run": True, "found": True}
    assert tallyd("qstash", "remove", "--dry-run", "--json").json == answer
    assert cloud.deleted == []
    assert tallyd("qstash", "remove", "--json").json == {**answer, "removed": True, "dry_run": False}
    assert cloud.deleted == ["/v2/schedules/tallyd-poll"]
    cloud.has_schedule = False
    assert "nothing would be removed" in tallyd("qstash", "remove", "--dry-run").out


def test_set_up_with_other_keys_says_where_the_right_ones_are(tallyd: Tallyd, cloud: type[Cloud]) -> None:
    refused = tallyd("qstash", "setup")
    assert refused.code == 1
    assert "its console, or of `tallyd keys show --reveal`" in refused.err


def test_an_empty_installation_has_nothing_to_list(tallyd: Tallyd) -> None:
    for command in ("tokens list", "queue messages", "queue list", "schedules list", "groups list", "groups audit"):
        shown = tallyd(*command.split(), "--json")
        assert (shown.code, shown.json) == (0, []), command
        assert tallyd(*command.split()).code == 0, command
