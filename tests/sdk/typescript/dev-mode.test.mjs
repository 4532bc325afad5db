// `devMode: true` looks for a server at http://127.0.0.1:$QSTASH_DEV_PORT, and downloads and starts one if none answers with the
// well-known keys. Ours must be taken for it: nothing is downloaded, nothing started.
import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import { Client, Receiver } from "@upstash/qstash";

import { IS_DEV, URL_OF_SERVER, listen } from "./kit.mjs";

test("dev mode finds the running server", { skip: !IS_DEV && "needs `tallyd dev`" }, async (context) => {
  process.env.QSTASH_DEV_PORT = new URL(URL_OF_SERVER).port;
  delete process.env.NODE_ENV;
  const downloads = join(homedir(), ".cache", "upstash", "qstash-dev");
  const before = existsSync(downloads);
  const lines = [];
  context.mock.method(console, "log", (line) => lines.push(line));
  // Whatever else is configured, dev mode goes to the local server with the local keys.
  const client = new Client({ devMode: true, token: "ignored", baseUrl: "https://ignored.invalid" });
  const receiver = await listen(new Receiver({ devMode: true, currentSigningKey: "ignored", nextSigningKey: "ignored" }));
  try {
    const { messageId } = await client.publishJSON({ url: `${receiver.origin}/dev`, body: { dev: true } });
    const delivery = await receiver.arrival("/dev");
    assert.equal(delivery.id, messageId);
    const [queued] = await client.batchJSON([{ url: `${receiver.origin}/dev-batch`, body: {}, queueName: "dev-mode" }]);
    assert.equal((await receiver.arrival("/dev-batch")).id, queued.messageId);
    await client.queue({ queueName: "dev-mode" }).delete();
    assert.match(lines.join("\n"), /Server already running at http:\/\/127\.0\.0\.1:/);
    assert.equal(existsSync(downloads), before, "nothing was downloaded");
  } finally {
    await receiver.close();
  }
});
