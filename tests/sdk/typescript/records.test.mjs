import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";

import { Receiver } from "@upstash/qstash";

import { IS_DEV, TEST_USER, claimsOf, connect, deadLetter, eventually, fromBase64, listen, refused, sha256, statesOf, unique } from "./kit.mjs";

describe("DLQ", () => {
  const client = connect();
  let receiver;
  before(async () => (receiver = await listen()));
  after(() => receiver.close());

  /** Fails as many messages with a label, and waits until all are there. */
  const fail = async (label, count, more = {}) => {
    receiver.on(`/${label}`, { status: 500 });
    for (let n = 0; n < count; n += 1) await client.publish({ url: `${receiver.origin}/${label}`, body: `${n}`, retries: 0, label, ...more });
    return eventually(async () => {
      const { messages } = await client.dlq.listMessages({ filter: { label } });
      return messages.length === count && messages;
    });
  };

  test("filters: each, or within, and across", async () => {
    const [a, b] = [unique("a"), unique("b")];
    const started = Date.now();
    const [first] = await fail(a, 1, { flowControl: { key: a, parallelism: 4, rate: 5, period: "1d" } });
    const [second] = await fail(b, 1);
    assert.deepEqual([first.flowControlKey, first.parallelism, first.rate, first.period], [a, 4, 5, 86_400]);
    const found = async (filter) => (await client.dlq.listMessages({ filter })).messages.map(({ dlqId }) => dlqId).sort();
    const [both, url] = [[first.dlqId, second.dlqId].sort(), (label) => `${receiver.origin}/${label}`];
    assert.deepEqual(await found({ label: [a, b] }), both);
    assert.deepEqual(await found({ url: [url(a), url(b)] }), both);
    assert.deepEqual(await found({ url: url(a), label: b }), []);
    assert.deepEqual(await found({ flowControlKey: a }), [first.dlqId]);
    assert.deepEqual(await found({ messageId: second.messageId }), [second.dlqId]);
    assert.deepEqual(await found({ label: [a, b], responseStatus: 500, fromDate: started - 1000, toDate: Date.now() + 1000 }), both);
    assert.deepEqual(await found({ label: [a, b], responseStatus: 404 }), []);
    assert.deepEqual(await found({ label: [a, b], toDate: new Date("2000-01-01") }), []);
    const byId = await client.dlq.listMessages({ dlqIds: both });
    assert.deepEqual(byId.messages.map(({ dlqId }) => dlqId).sort(), both);
    await refused(client.dlq.delete({ filter: { labeel: a } }), 400);
    assert.equal((await client.dlq.delete({ filter: { label: [a, b] } })).deleted, 2);
    const none = await client.dlq.listMessages({ filter: { label: [a, b] } });
    assert.deepEqual([none.messages, "cursor" in none && none.cursor !== undefined], [[], false]);
  });

  test("pages by cursor, deletes by count, id and ids", async () => {
    const label = unique("page");
    const all = (await fail(label, 5)).map(({ dlqId }) => dlqId);
    const first = await client.dlq.listMessages({ filter: { label }, count: 3 });
    assert.equal(first.messages.length, 3);
    const rest = await client.dlq.listMessages({ filter: { label }, count: 3, cursor: first.cursor });
    assert.equal(rest.messages.length, 2);
    assert.equal(rest.cursor, undefined);
    assert.deepEqual([...first.messages, ...rest.messages].map(({ dlqId }) => dlqId).sort(), all.sort());
    await client.dlq.delete(all[0]);
    await refused(client.dlq.delete(all[0]), 404);
    assert.equal((await client.dlq.delete([all[0], all[1], all[2]])).deleted, 2);
    assert.equal((await client.dlq.delete({ filter: { label }, count: 1 })).deleted, 1);
    assert.equal((await client.dlq.delete({ filter: { label } })).deleted, 1);
    const last = await client.dlq.delete({ filter: { label } });
    assert.deepEqual([last.deleted, last.cursor], [0, undefined]);
  });

  test("retry makes a new message of the old one and takes it out", async () => {
    const label = unique("again");
    const entries = await fail(label, 3, { headers: { "X-Keep": "k" } });
    receiver.on(`/${label}`, {});
    const one = await client.dlq.retry(entries[0].dlqId);
    assert.equal(one.responses.length, 1);
    assert.equal(one.cursor, undefined);
    const delivery = (await receiver.arrivals(`/${label}`, 4)).find(({ id }) => id === one.responses[0].messageId);
    assert.notEqual(delivery.id, entries[0].messageId);
    assert.equal(delivery.body, entries[0].body);
    assert.equal(delivery.headers["x-keep"], "k");
    await refused(client.dlq.delete(entries[0].dlqId), 404);
    assert.equal((await client.dlq.retry({ filter: { label }, count: 1 })).responses.length, 1);
    assert.equal((await client.dlq.retry({ filter: { label } })).responses.length, 1);
    await receiver.arrivals(`/${label}`, 6);
    assert.deepEqual(await client.dlq.retry({ filter: { label } }), { responses: [], cursor: undefined });
    await refused(client.dlq.retry([unique("1-1")]), 404);
  });
});

describe("logs", () => {
  const client = connect();
  let receiver;
  before(async () => (receiver = await listen()));
  after(() => receiver.close());

  test("filters and pages", async () => {
    const [a, b, c] = [unique("a"), unique("b"), unique("c")];
    const ids = [];
    for (const labels of [[a, b], [b, c], [c]]) {
      const { messageId } = await client.publish({ url: `${receiver.origin}/log-${labels[0]}`, body: "text", label: labels });
      await statesOf(client, messageId, "DELIVERED");
      ids.push(messageId);
    }
    const found = async (filter) => [...new Set((await client.logs({ filter })).logs.map(({ messageId }) => messageId))].sort();
    const expect = (...indexes) => indexes.map((index) => ids[index]).sort();
    assert.deepEqual(await found({ label: [a, b] }), expect(0, 1));
    assert.deepEqual(await found({ label: a }), expect(0));
    assert.deepEqual(await found({ path: [`/log-${a}`, `/log-${c}`] }), expect(0, 2));
    assert.deepEqual(await found({ url: `${receiver.origin}/log-${b}` }), expect(1));
    assert.deepEqual(await found({ host: new URL(receiver.origin).host, label: c }), expect(1, 2));
    assert.deepEqual(await found({ host: "elsewhere.test", label: c }), []);
    const one = await client.logs({ filter: { messageId: ids[0], state: "DELIVERED" } });
    assert.equal(one.logs.length, 1);
    assert.equal(one.cursor, undefined);
    const [log] = one.logs;
    assert.deepEqual([log.url, log.label, log.labels, fromBase64(log.body)], [`${receiver.origin}/log-${a}`, a, [a, b], "text"]);
    assert.ok(Math.abs(log.time - Date.now()) < 300_000);
    const several = await client.logs({ messageIds: [ids[0], ids[2]] });
    assert.deepEqual(new Set(several.logs.map(({ messageId }) => messageId)), new Set([ids[0], ids[2]]));

    const seen = [];
    let cursor;
    do {
      const page = await client.logs({ filter: { label: [a, b, c] }, count: 4, cursor });
      assert.ok(page.logs.length <= 4);
      seen.push(...page.logs);
      cursor = page.cursor;
    } while (cursor);
    assert.equal(seen.length, 9);
    for (let index = 1; index < seen.length; index += 1) assert.ok(seen[index].time <= seen[index - 1].time, "newest first");
    for (const id of ids) assert.equal(seen.filter((event) => event.messageId === id && event.state === "DELIVERED").length, 1);
  });
});

describe("redaction", () => {
  const client = connect();
  let receiver;
  before(async () => (receiver = await listen()));
  after(() => receiver.close());

  test("what is shown is a digest; what is delivered is the original, also after the DLQ", async () => {
    receiver.on("/secret", (_, before) => ({ status: before === 0 ? 500 : 200 }));
    const { messageId } = await client.publish({
      url: `${receiver.origin}/secret`,
      body: "top secret",
      headers: { "Content-Type": "text/plain", Authorization: "Bearer s3cret", "X-Open": "open" },
      redact: { body: true, header: ["Authorization"] },
      retries: 0,
    });
    const shown = `REDACTED:${sha256("top secret")}`;
    const entry = await deadLetter(client, messageId);
    const message = await client.messages.get(messageId);
    for (const view of [entry, message]) {
      assert.equal(view.body, shown);
      assert.deepEqual(view.header.Authorization, [`REDACTED:${sha256("Bearer s3cret")}`]);
      assert.deepEqual(view.header["X-Open"], ["open"]);
    }
    const { logs } = await client.logs({ filter: { messageId } });
    assert.ok(logs.length > 0);
    assert.doesNotMatch(JSON.stringify(logs), /s3cret|top secret/);
    assert.ok(logs.every((log) => log.body === undefined || !fromBase64(log.body).includes("top secret")));
    await client.dlq.retry(entry.dlqId);
    for (const delivery of await receiver.arrivals("/secret", 2)) {
      assert.equal(delivery.body, "top secret");
      assert.equal(delivery.headers.authorization, "Bearer s3cret");
    }
  });

  test("all headers", async () => {
    const { messageId } = await client.publish({
      url: `${receiver.origin}/all`,
      headers: { "X-One": "1", "X-Two": "2" },
      redact: { header: true },
    });
    const { headers } = await receiver.arrival("/all");
    assert.deepEqual([headers["x-one"], headers["x-two"]], ["1", "2"]);
    const { header } = await client.messages.get(messageId);
    for (const [value] of Object.values(header)) assert.match(value, /^REDACTED:[0-9a-f]{64}$/);
  });
});

describe("signing keys", () => {
  test("those of the tenant sign its deliveries", async () => {
    const keys = await connect().http.request({ method: "GET", path: ["v2", "keys"] });
    assert.deepEqual(keys, { current: process.env.QSTASH_CURRENT_SIGNING_KEY, next: process.env.QSTASH_NEXT_SIGNING_KEY });
  });

  test("rotation moves next to current, and another tenant keeps its own", { skip: !IS_DEV && "needs the second user of dev" }, async () => {
    const client = connect({ token: TEST_USER.token });
    const old = await client.http.request({ method: "GET", path: ["v2", "keys"] });
    const receiver = await listen(new Receiver({ currentSigningKey: old.current, nextSigningKey: old.next }));
    try {
      const rotated = await client.http.request({ method: "POST", path: ["v2", "keys", "rotate"] });
      assert.equal(rotated.current, old.next);
      assert.match(rotated.next, /^sig_/);
      assert.ok(![old.current, old.next].includes(rotated.next));
      assert.deepEqual(await client.http.request({ method: "GET", path: ["v2", "keys"] }), rotated);
      // A receiver that still holds the old pair goes on: what was its next key signs now.
      await client.publish({ url: `${receiver.origin}/rotated`, body: "x" });
      const { signature, body } = await receiver.arrival("/rotated");
      const strict = new Receiver({ currentSigningKey: rotated.current, nextSigningKey: rotated.current });
      assert.equal(await strict.verify({ signature, body, url: `${receiver.origin}/rotated` }), true);
      assert.equal(claimsOf(signature).sub, `${receiver.origin}/rotated`);
      const mine = await connect().http.request({ method: "GET", path: ["v2", "keys"] });
      assert.equal(mine.current, process.env.QSTASH_CURRENT_SIGNING_KEY);
    } finally {
      await receiver.close();
    }
  });

  test("tenants do not see each other", { skip: !IS_DEV && "needs the second user of dev" }, async () => {
    const [mine, theirs] = [connect(), connect({ token: TEST_USER.token })];
    const queueName = unique("mine");
    await mine.queue({ queueName }).upsert({ parallelism: 1 });
    const { messageId } = await mine.publish({ url: "https://example.com", delay: "7d", label: queueName });
    await refused(theirs.queue({ queueName }).get(), 404);
    await refused(theirs.messages.get(messageId), 404);
    await refused(theirs.messages.cancel(messageId), 404);
    assert.equal((await theirs.messages.cancel({ filter: { label: queueName } })).cancelled, 0);
    assert.deepEqual((await theirs.logs({ filter: { messageId } })).logs, []);
    assert.equal((await mine.messages.cancel(messageId)).cancelled, 1);
    await mine.queue({ queueName }).delete();
  });
});
