import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";

import { claimsOf, connect, eventually, headOf, listen, refused, sha256, statesOf, unique } from "./kit.mjs";

describe("publish", () => {
  const client = connect();
  let receiver;
  before(async () => (receiver = await listen()));
  after(() => receiver.close());

  test("a JSON message arrives signed, with its headers, and stays readable", async () => {
    const url = `${receiver.origin}/json`;
    const { messageId, url: told } = await client.publishJSON({
      url,
      body: { hello: "wörld ✓" },
      headers: { "X-Trace": "t-1", "Upstash-Forward-X-Plain": "p" },
      label: ["first", "second"],
    });
    assert.equal(told, url);
    const delivery = await receiver.arrival("/json");
    assert.equal(delivery.method, "POST");
    assert.deepEqual(JSON.parse(delivery.body), { hello: "wörld ✓" });
    assert.equal(delivery.id, messageId);
    assert.equal(delivery.retried, "0");
    assert.equal(delivery.headers["content-type"], "application/json");
    assert.equal(delivery.headers["x-trace"], "t-1");
    assert.equal(delivery.headers["x-plain"], "p");
    assert.equal(delivery.headers["user-agent"], "Upstash-QStash");
    for (const name of Object.keys(delivery.headers)) assert.doesNotMatch(name, /authorization|upstash-(forward|telemetry|method)/);

    assert.deepEqual(await statesOf(client, messageId, "DELIVERED"), ["CREATED", "ACTIVE", "DELIVERED"]);
    const message = await client.messages.get(messageId);
    assert.equal(message.url, url);
    assert.equal(message.method, "POST");
    assert.equal(message.body, '{"hello":"wörld ✓"}');
    assert.deepEqual(message.header, { "Content-Type": ["application/json"], "X-Plain": ["p"], "X-Trace": ["t-1"] });
    assert.equal(message.maxRetries, 3);
    assert.equal(message.notBefore, message.createdAt);
    assert.equal(message.label, "first");
    assert.deepEqual(message.labels, ["first", "second"]);
  });

  test("the token is a JWT as documented", async () => {
    const url = `${receiver.origin}/claims`;
    await client.publish({ url, body: "abc" });
    const { signature } = await receiver.arrival("/claims");
    assert.deepEqual(headOf(signature), { alg: "HS256", typ: "JWT" });
    const claims = claimsOf(signature);
    assert.equal(claims.iss, "Upstash");
    assert.equal(claims.sub, url);
    assert.equal(claims.exp - claims.iat, 300);
    assert.ok(claims.nbf <= claims.iat);
    assert.equal(typeof claims.jti, "string");
    assert.equal(claims.body, Buffer.from(sha256("abc"), "hex").toString("base64").replaceAll("+", "-").replaceAll("/", "_"));
  });

  test("the destination keeps its path and query to the letter", async () => {
    const target = "/Deep//path/%2Fx/a:b@c/?q=1&list=[2]&empty=&plus=a+b&pct=%20%C3%BC";
    await client.publish({ url: receiver.origin + target, body: "x" });
    const delivery = await receiver.arrival("/Deep//path/%2Fx/a:b@c/");
    assert.equal(delivery.target, target);
  });

  for (const method of ["GET", "PUT", "PATCH", "DELETE"]) {
    test(`method ${method}`, async () => {
      await client.publish({ url: `${receiver.origin}/method-${method}`, method, body: "b" });
      const delivery = await receiver.arrival(`/method-${method}`);
      assert.equal(delivery.method, method);
      assert.equal(delivery.body, "b");
    });
  }

  test("bytes arrive as they are; an empty body has no content type of the server's", async () => {
    const bytes = Uint8Array.from({ length: 256 }, (_, index) => index);
    const sent = await client.publish({ url: `${receiver.origin}/bytes`, body: bytes, headers: { "Content-Type": "application/x-raw" } });
    const delivery = await receiver.arrival("/bytes");
    assert.deepEqual(new Uint8Array(delivery.bytes), bytes);
    assert.equal(delivery.headers["content-type"], "application/x-raw");
    const message = await client.messages.get(sent.messageId);
    assert.equal(message.body, undefined);
    assert.deepEqual(new Uint8Array(Buffer.from(message.bodyBase64, "base64")), bytes);

    const empty = await client.publish({ url: `${receiver.origin}/empty` });
    const bare = await receiver.arrival("/empty");
    assert.equal(bare.bytes.length, 0);
    assert.equal(bare.headers["content-type"], undefined);
    const stored = await client.messages.get(empty.messageId);
    assert.equal(stored.body, undefined);
    assert.equal(stored.bodyBase64, undefined);
  });

  test("delay and notBefore hold a message back", async () => {
    const [delayed, dated] = [Date.now() + 1500, Math.ceil(Date.now() / 1000) + 2];
    const first = await client.publish({ url: `${receiver.origin}/delay`, delay: 2 });
    const second = await client.publish({ url: `${receiver.origin}/not-before`, notBefore: dated, delay: "7d" });
    const message = await client.messages.get(first.messageId);
    assert.equal(message.notBefore - message.createdAt, 2000);
    assert.equal((await client.messages.get(second.messageId)).notBefore, dated * 1000);
    assert.ok((await receiver.arrival("/delay")).arrived >= delayed);
    assert.ok((await receiver.arrival("/not-before")).arrived >= dated * 1000 - 50);
  });

  test("a deduplication id counts once", async () => {
    const deduplicationId = unique("dedup");
    const send = () => client.publish({ url: `${receiver.origin}/dedup`, body: "x", deduplicationId });
    const first = await send();
    assert.ok(!first.deduplicated);
    await receiver.arrival("/dedup");
    const second = await send();
    assert.equal(second.messageId, first.messageId);
    assert.equal(second.deduplicated, true);
    await client.publish({ url: `${receiver.origin}/after-dedup` });
    await receiver.arrival("/after-dedup");
    assert.equal(receiver.at("/dedup").length, 1);
  });

  test("content-based deduplication tells bodies apart", async () => {
    const send = (body) => client.publishJSON({ url: `${receiver.origin}/content`, body, contentBasedDeduplication: true });
    const nonce = unique("n");
    const first = await send({ nonce, a: 1 });
    const again = await send({ nonce, a: 1 });
    const other = await send({ nonce, a: 2 });
    assert.equal(again.messageId, first.messageId);
    assert.equal(again.deduplicated, true);
    assert.notEqual(other.messageId, first.messageId);
    await receiver.arrivals("/content", 2);
  });

  test("what it cannot take it refuses with a reason", async () => {
    const url = `${receiver.origin}/never`;
    await refused(client.publish({ url: unique("nowhere") }), 400, /invalid destination url/);
    await refused(client.publish({ url, deduplicationId: "a:b" }), 400, /':'/);
    await refused(client.publish({ url, delay: "soon" }), 400);
    await refused(client.publish({ url, headers: { "Upstash-Retries": "-1" } }), 400);
    await refused(client.publish({ url, retryDelay: "import('fs')" }), 400);
    await refused(client.publish({ url, headers: { "Upstash-Flow-Control-Key": "k", "Upstash-Flow-Control-Value": "fast" } }), 400);
    await refused(client.publish({ url, callback: "nowhere" }), 400);
    await refused(connect({ token: "wrong" }).publish({ url }), 401, /invalid token/);
    assert.equal(receiver.at("/never").length, 0);
  });

  test("an unknown id and an unknown path are 404", async () => {
    await refused(client.messages.get(unique("msg")), 404);
    await refused(client.messages.cancel(unique("msg")), 404);
    await refused(client.http.request({ method: "GET", path: ["v2", "nothing-here"] }), 404);
  });
});

describe("batch", () => {
  const client = connect();
  let receiver;
  before(async () => (receiver = await listen()));
  after(() => receiver.close());

  test("answers in order, one element an item, an array for a group", async () => {
    const [group, queueName] = [unique("group"), unique("queue")];
    await client.urlGroups.addEndpoints({
      name: group,
      endpoints: [{ url: `${receiver.origin}/g1` }, { url: `${receiver.origin}/g2` }],
    });
    const result = await client.batchJSON([
      { url: `${receiver.origin}/b1`, body: { n: 1 }, headers: { "X-N": "1" }, label: "one" },
      { urlGroup: group, body: { n: 2 }, headers: { "X-N": "2" } },
      { url: `${receiver.origin}/b3`, body: { n: 3 }, queueName, method: "PUT" },
    ]);
    assert.equal(result.length, 3);
    assert.equal(result[1].length, 2);
    assert.deepEqual(result[1].map(({ url }) => url).sort(), [`${receiver.origin}/g1`, `${receiver.origin}/g2`]);

    const first = await receiver.arrival("/b1");
    assert.equal(first.id, result[0].messageId);
    assert.equal(first.headers["x-n"], "1");
    assert.deepEqual(JSON.parse(first.body), { n: 1 });
    assert.deepEqual([(await receiver.arrival("/g1")).headers["x-n"], (await receiver.arrival("/g2")).headers["x-n"]], ["2", "2"]);
    assert.equal((await receiver.arrival("/b3")).method, "PUT");
    assert.equal((await client.messages.get(result[0].messageId)).label, "one");
    assert.equal((await client.messages.get(result[2].messageId)).queueName, queueName);
    await client.queue({ queueName }).delete();
    await client.urlGroups.delete(group);
  });

  test("one bad item refuses the whole", async () => {
    await refused(client.batch([{ url: `${receiver.origin}/whole` }, { url: `${receiver.origin}/whole`, deduplicationId: "a:b" }]), 400);
    await client.publish({ url: `${receiver.origin}/after-whole` });
    await receiver.arrival("/after-whole");
    assert.equal(receiver.at("/whole").length, 0);
  });

  test("items deduplicate against each other", async () => {
    const deduplicationId = unique("dedup");
    const items = await client.batch([1, 2].map(() => ({ url: `${receiver.origin}/twice`, deduplicationId })));
    assert.equal(items[0].messageId, items[1].messageId);
    assert.equal(items[1].deduplicated, true);
  });
});

describe("cancel", () => {
  const client = connect();
  let receiver;
  before(async () => (receiver = await listen()));
  after(() => receiver.close());
  const later = (path, more = {}) => client.publish({ url: receiver.origin + path, delay: "7d", ...more });

  test("a cancelled message is not delivered", async () => {
    const { messageId } = await client.publish({ url: `${receiver.origin}/cancelled`, delay: 2 });
    assert.deepEqual(await client.messages.cancel(messageId), { cancelled: 1 });
    await client.publish({ url: `${receiver.origin}/after-cancelled`, delay: 3 });
    await receiver.arrival("/after-cancelled");
    assert.equal(receiver.at("/cancelled").length, 0);
    await statesOf(client, messageId, "CANCELED");
  });

  test("many by id: those that are there count, once", async () => {
    const ids = [(await later("/m")).messageId, (await later("/m")).messageId];
    assert.equal((await client.messages.cancel([...ids, unique("msg")])).cancelled, 2);
    assert.equal((await client.messages.cancel(ids)).cancelled, 0);
  });

  test("by filter: or within, and across, as many as asked", async () => {
    const [a, b, c] = [unique("a"), unique("b"), unique("c")];
    for (const label of [a, b, c]) await later(`/path-${label}`, { label, flowControl: { key: label, parallelism: 1 } });
    assert.equal((await client.messages.cancel({ filter: { label: [a, b], path: `/path-${c}` } })).cancelled, 0);
    assert.equal((await client.messages.cancel({ filter: { flowControlKey: [a, b] }, count: 1 })).cancelled, 1);
    assert.equal((await client.messages.cancel({ filter: { label: [a, b] } })).cancelled, 1);
    assert.equal((await client.messages.cancel({ filter: { path: [`/path-${c}`, "/none"] } })).cancelled, 1);
    await later("/by-url", { label: c });
    assert.equal((await client.messages.cancel({ filter: { url: `${receiver.origin}/by-url`, host: "elsewhere.test" } })).cancelled, 0);
    assert.equal((await client.messages.cancel({ filter: { url: `${receiver.origin}/by-url` } })).cancelled, 1);
  });

  test("one that is being delivered: the request is taken", async () => {
    let release;
    receiver.on("/busy", () => new Promise((resolve) => (release = () => resolve({ status: 500 }))));
    const { messageId } = await client.publish({ url: `${receiver.origin}/busy`, retries: 3, retryDelay: "100" });
    await receiver.arrival("/busy");
    await client.messages.cancel(messageId);
    release();
    await statesOf(client, messageId, "CANCELED");
    assert.equal(receiver.at("/busy").length, 1);
    await eventually(async () => (await client.dlq.listMessages({ filter: { messageId } })).messages.length === 0);
  });
});
