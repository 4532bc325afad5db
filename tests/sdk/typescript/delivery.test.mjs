import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";

import { claimsOf, connect, deadLetter, fromBase64, listen, statesOf, unique } from "./kit.mjs";

describe("attempts", () => {
  const client = connect();
  let receiver;
  before(async () => (receiver = await listen()));
  after(() => receiver.close());

  test("a failing destination is tried again until it succeeds, each attempt signed anew", async () => {
    receiver.on("/third", (_, before) => ({ status: before < 2 ? 500 : 200, body: `answer ${before}` }));
    const { messageId } = await client.publish({ url: `${receiver.origin}/third`, body: "x", retries: 3, retryDelay: "100 * (1 + retried)" });
    const tries = await receiver.arrivals("/third", 3);
    assert.deepEqual(tries.map(({ retried }) => retried), ["0", "1", "2"]);
    assert.deepEqual(new Set(tries.map(({ id }) => id)), new Set([messageId]));
    assert.equal(new Set(tries.map(({ signature }) => claimsOf(signature).jti)).size, 3);
    const states = await statesOf(client, messageId, "DELIVERED");
    assert.deepEqual(states, ["CREATED", "ACTIVE", "ERROR", "RETRY", "ACTIVE", "ERROR", "RETRY", "ACTIVE", "DELIVERED"]);
    assert.equal((await client.messages.get(messageId)).retryDelayExpression, "100 * (1 + retried)");
  });

  test("Retry-After decides the wait", async () => {
    receiver.on("/later", (_, before) => (before === 0 ? { status: 503, headers: { "Retry-After": "1" } } : {}));
    await client.publish({ url: `${receiver.origin}/later`, retries: 1, retryDelay: "600000" });
    const [first, second] = await receiver.arrivals("/later", 2);
    assert.ok(second.arrived - first.left >= 900, `${second.arrived - first.left} ms`);
  });

  test("489 with Upstash-NonRetryable-Error is final", async () => {
    receiver.on("/poison", { status: 489, headers: { "Upstash-NonRetryable-Error": "true" }, body: "no" });
    const { messageId } = await client.publish({ url: `${receiver.origin}/poison`, retries: 3, retryDelay: "1" });
    assert.equal((await deadLetter(client, messageId)).responseStatus, 489);
    assert.equal(receiver.at("/poison").length, 1);
  });

  test("a timeout is a failed attempt", async () => {
    receiver.on("/slow", { afterMs: 60_000 });
    const { messageId } = await client.publish({ url: `${receiver.origin}/slow`, retries: 0, timeout: 1 });
    const entry = await deadLetter(client, messageId);
    assert.ok(!entry.responseStatus);
    assert.ok((await statesOf(client, messageId, "FAILED")).includes("ERROR"));
  });

  test("what ends in the DLQ shows the last answer", async () => {
    receiver.on("/broken", { status: 502, headers: { "X-Reason": "tired" }, body: "out of order" });
    const { messageId } = await client.publish({ url: `${receiver.origin}/broken`, body: "payload", retries: 1, retryDelay: "50 * retried" });
    const entry = await deadLetter(client, messageId);
    assert.equal(entry.messageId, messageId);
    assert.equal(entry.responseStatus, 502);
    assert.equal(entry.responseBody, "out of order");
    assert.deepEqual(entry.responseHeader["X-Reason"], ["tired"]);
    assert.equal(entry.body, "payload");
    assert.equal(entry.maxRetries, 1);
    assert.equal(entry.retryDelayExpression, "50 * retried");
    assert.equal(receiver.at("/broken").length, 2);
    await client.dlq.delete(entry.dlqId);
  });

  test("nobody listening is a failed attempt too", async () => {
    const gone = await listen();
    await gone.close();
    const { messageId } = await client.publish({ url: `${gone.origin}/x`, retries: 0 });
    assert.ok(!(await deadLetter(client, messageId)).responseStatus);
  });
});

describe("callbacks", () => {
  const client = connect();
  let receiver;
  before(async () => (receiver = await listen()));
  after(() => receiver.close());

  test("a callback tells the answer, signed for its own URL", async () => {
    receiver.on("/work", { status: 201, headers: { "X-Answer": "yes" }, body: "done ✓" });
    const { messageId } = await client.publishJSON({
      url: `${receiver.origin}/work`,
      body: { job: 1 },
      headers: { "X-Source": "s", "Upstash-Callback-Forward-X-Back": "b", "Upstash-Callback-Method": "PUT" },
      callback: `${receiver.origin}/back?id=7`,
    });
    const delivery = await receiver.arrival("/back");
    assert.equal(delivery.target, "/back?id=7");
    assert.equal(delivery.method, "PUT");
    assert.equal(delivery.headers["x-back"], "b");
    assert.equal(delivery.headers["content-type"], "application/json");
    assert.notEqual(delivery.id, messageId);
    const told = JSON.parse(delivery.body);
    assert.equal(told.status, 201);
    assert.equal(fromBase64(told.body), "done ✓");
    assert.deepEqual(told.header["X-Answer"], ["yes"]);
    assert.equal(told.retried ?? 0, 0);
    assert.equal(told.maxRetries, 3);
    assert.equal(told.sourceMessageId, messageId);
    assert.equal(told.url, `${receiver.origin}/work`);
    assert.equal(told.method, "POST");
    assert.deepEqual(told.sourceHeader["X-Source"], ["s"]);
    assert.equal(fromBase64(told.sourceBody), '{"job":1}');
    assert.equal(typeof told.createdAt, "number");
    assert.equal(told.dlqId, undefined);
    await statesOf(client, delivery.id, "DELIVERED");
  });

  test("a failure callback comes once, with the DLQ entry, after the last attempt", async () => {
    receiver.on("/fails", { status: 500, body: "no" });
    const { messageId } = await client.publish({
      url: `${receiver.origin}/fails`,
      body: "x",
      retries: 1,
      retryDelay: "50",
      callback: `${receiver.origin}/each`,
      failureCallback: `${receiver.origin}/end`,
    });
    const delivery = await receiver.arrival("/end");
    const told = JSON.parse(delivery.body);
    assert.equal(told.status, 500);
    assert.equal(fromBase64(told.body), "no");
    assert.equal(told.retried, 1);
    assert.equal(told.maxRetries, 1);
    assert.equal(told.sourceMessageId, messageId);
    assert.equal(told.dlqId, (await deadLetter(client, messageId)).dlqId);
    const each = await receiver.arrivals("/each", 2);
    assert.deepEqual(each.map(({ body }) => JSON.parse(body).retried ?? 0).sort(), [0, 1]);
    assert.equal(receiver.at("/end").length, 1);
    await client.dlq.delete(told.dlqId);
  });

  test("a callback that fails ends in the DLQ itself and calls nobody back", async () => {
    receiver.on("/deaf", { status: 500 });
    const { messageId } = await client.publish({
      url: `${receiver.origin}/fine`,
      callback: `${receiver.origin}/deaf`,
      headers: { "Upstash-Callback-Retries": "0" },
      failureCallback: `${receiver.origin}/not-called`,
      label: unique("deaf"),
    });
    const { id } = await receiver.arrival("/deaf");
    const entry = await deadLetter(client, id);
    assert.equal(entry.url, `${receiver.origin}/deaf`);
    assert.equal(receiver.at("/not-called").length, 0);
    await statesOf(client, messageId, "DELIVERED");
    await client.dlq.delete(entry.dlqId);
  });
});
