// What every test here needs: a client, a receiver on a real socket that checks each signature, and waiting with a deadline.
//
// QSTASH_URL, QSTASH_TOKEN and the two signing keys come from the environment; without them, those of `tallyd dev`.
import assert from "node:assert/strict";
import { createHash, randomUUID } from "node:crypto";
import { createServer } from "node:http";

import { Client, Receiver } from "@upstash/qstash";

const DEV = {
  QSTASH_URL: "http://127.0.0.1:8080",
  QSTASH_TOKEN: "eyJVc2VySUQiOiJkZWZhdWx0VXNlciIsIlBhc3N3b3JkIjoiZGVmYXVsdFBhc3N3b3JkIn0=",
  QSTASH_CURRENT_SIGNING_KEY: "sig_7kYjw48mhY7kAjqNGcy6cr29RJ6r",
  QSTASH_NEXT_SIGNING_KEY: "sig_5ZB6DVzB1wjE8S6rZ7eenA8Pdnhs",
};
export const TEST_USER = {
  token: "eyJVc2VySUQiOiJ0ZXN0VXNlcjEiLCJQYXNzd29yZCI6InRlc3RQYXNzd29yZCJ9",
  current: "sig_7GVPjvuwsfqF65iC8fSrs1dfYruM",
};
for (const [name, value] of Object.entries(DEV)) process.env[name] ??= value;

// The SDK prints each refusal, and the tests ask for many.
const print = console.error;
console.error = (first, ...rest) => String(first).startsWith("[Upstash QStash]") || print(first, ...rest);

export const URL_OF_SERVER = process.env.QSTASH_URL;
export const TOKEN = process.env.QSTASH_TOKEN;
export const IS_DEV = TOKEN === DEV.QSTASH_TOKEN;
export const DEADLINE_MS = Number(process.env.SDK_TESTS_DEADLINE_MS ?? 20_000);

export const connect = (config = {}) => new Client({ baseUrl: URL_OF_SERVER, token: TOKEN, retry: false, ...config });

/** A name that no other test, file or run uses. */
export const unique = (stem) => `${stem}-${randomUUID().slice(0, 13)}`;

/** Calls `probe` until it neither throws nor answers undefined or false, and returns that answer. */
export async function eventually(probe, { within = DEADLINE_MS, every = 50 } = {}) {
  const deadline = performance.now() + within;
  for (;;) {
    let error;
    try {
      const found = await probe();
      if (found !== undefined && found !== false) return found;
    } catch (thrown) {
      error = thrown;
    }
    if (performance.now() >= deadline) {
      throw new Error(`not within ${within} ms: ${error?.message ?? probe}`, { cause: error });
    }
    await new Promise((resolve) => setTimeout(resolve, every));
  }
}

export const sha256 = (bytes, encoding = "hex") => createHash("sha256").update(bytes).digest(encoding);
export const claimsOf = (token) => JSON.parse(Buffer.from(token.split(".")[1], "base64url").toString());
export const headOf = (token) => JSON.parse(Buffer.from(token.split(".")[0], "base64url").toString());
export const fromBase64 = (text) => Buffer.from(text, "base64").toString();

/** Asserts that the server refuses, with this status and a JSON `error` that matches. */
export async function refused(promise, status, pattern = /./) {
  await assert.rejects(promise, (error) => {
    assert.equal(error.status, status, `${error.name}: ${error.message}`);
    assert.match(JSON.parse(error.message).error, pattern);
    return true;
  });
}

/**
 * A destination on a real socket. Each delivery is verified with the SDK's own `Receiver` against the URL it was sent to, and kept.
 *
 * A path answers 200 until `on(path, handler)` says otherwise; the handler gets the delivery and the number of those before it on
 * that path, and answers `{status, headers, body, afterMs}` or a promise of it.
 */
export async function listen(verifier = new Receiver()) {
  const deliveries = [];
  const handlers = new Map();
  const counts = new Map();
  const server = createServer(async (request, response) => {
    const arrived = Date.now();
    const chunks = [];
    for await (const chunk of request) chunks.push(chunk);
    const bytes = Buffer.concat(chunks);
    const path = request.url.split("?")[0];
    const delivery = {
      arrived,
      left: undefined,
      method: request.method,
      target: request.url,
      path,
      headers: request.headers,
      bytes,
      body: bytes.toString(),
      id: request.headers["upstash-message-id"],
      retried: request.headers["upstash-retried"],
      signature: request.headers["upstash-signature"],
      refusal: undefined,
    };
    const url = `http://${request.headers.host}${request.url}`;
    try {
      const isText = Buffer.from(delivery.body).equals(bytes);
      // The SDK hashes a body as UTF-8 text: of any other bytes it can check all but the hash.
      if (isText) await verifier.verify({ signature: delivery.signature, body: delivery.body, url });
      else assert.equal(claimsOf(delivery.signature).body.replace(/=+$/, ""), sha256(bytes, "base64url"));
    } catch (error) {
      delivery.refusal = `${url}: ${error.message}`;
    }
    const before = counts.get(path) ?? 0;
    counts.set(path, before + 1);
    deliveries.push(delivery);
    const { status = 200, headers = {}, body = "", afterMs = 0 } = (await handlers.get(path)?.(delivery, before)) ?? {};
    if (afterMs > 0) await new Promise((resolve) => setTimeout(resolve, afterMs).unref());
    delivery.left = Date.now();
    response.writeHead(status, headers).end(body);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  const origin = `http://127.0.0.1:${server.address().port}`;
  const at = (path) => deliveries.filter((delivery) => delivery.path === path);
  return {
    origin,
    at,
    on: (path, handler) => handlers.set(path, typeof handler === "function" ? handler : () => handler),
    /** The first `count` deliveries at a path, once there are so many; each must carry a good signature. */
    async arrivals(path, count = 1, options = {}) {
      const found = await eventually(() => at(path).length >= count && at(path).slice(0, count), options);
      for (const delivery of found) assert.equal(delivery.refusal, undefined);
      return found;
    },
    async arrival(path, options = {}) {
      return (await this.arrivals(path, 1, options))[0];
    },
    async close() {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

/** The states of a message, oldest first, once `last` is among them. */
export const statesOf = (client, messageId, last) =>
  eventually(async () => {
    const { logs } = await client.logs({ filter: { messageId } });
    const states = logs.map((log) => log.state).reverse();
    return states.includes(last) && states;
  });

/** The DLQ entry of a message, once it is there. */
export const deadLetter = (client, messageId) =>
  eventually(async () => (await client.dlq.listMessages({ filter: { messageId } })).messages[0]);
