import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";

import { connect, eventually, listen, refused, statesOf, unique } from "./kit.mjs";

describe("queues", () => {
  const client = connect();
  let receiver;
  before(async () => (receiver = await listen()));
  after(() => receiver.close());

  test("upsert, get, list, pause, resume, delete", async () => {
    const queueName = unique("queue");
    const queue = client.queue({ queueName });
    await refused(queue.get(), 404);
    await queue.upsert({ parallelism: 2 });
    const made = await queue.get();
    assert.deepEqual([made.name, made.parallelism, made.lag, made.paused], [queueName, 2, 0, false]);
    assert.ok(made.createdAt > 1e12 && made.updatedAt >= made.createdAt);
    await queue.upsert({ parallelism: 3 });
    assert.equal((await queue.get()).parallelism, 3);
    await queue.pause();
    assert.equal((await queue.get()).paused, true);
    await queue.resume();
    assert.equal((await queue.get()).paused, false);
    await queue.upsert({ paused: true });
    assert.equal((await queue.get()).paused, true);
    assert.ok((await client.queue().list()).some(({ name }) => name === queueName));
    await queue.delete();
    await queue.delete();
    assert.ok(!(await client.queue().list()).some(({ name }) => name === queueName));
    await refused(client.queue({ queueName: "no spaces" }).upsert({ parallelism: 1 }), 400);
    await refused(queue.upsert({ parallelism: -1 }), 400);
  });

  test("one after the other in order, past a failure and its retry", async () => {
    const queue = client.queue({ queueName: unique("fifo") });
    receiver.on("/fifo", (delivery, before) => ({ status: before === 1 ? 500 : 200, afterMs: 60 }));
    const sent = [];
    for (const n of [1, 2, 3, 4]) sent.push(await queue.enqueueJSON({ url: `${receiver.origin}/fifo`, body: { n }, retries: 1, retryDelay: "200" }));
    const seen = await receiver.arrivals("/fifo", 5);
    assert.deepEqual(seen.map(({ body }) => JSON.parse(body).n), [1, 2, 2, 3, 4]);
    for (let index = 1; index < seen.length; index += 1) assert.ok(seen[index].arrived >= seen[index - 1].left, `no overlap at ${index}`);
    const message = await client.messages.get(sent[0].messageId);
    assert.match(message.queueName, /^fifo-/);
    await eventually(async () => (await queue.get()).lag === 0);
    await queue.delete();
  });

  test("a paused queue takes and keeps", async () => {
    const queue = client.queue({ queueName: unique("paused") });
    await queue.upsert({ parallelism: 1, paused: true });
    await queue.enqueue({ url: `${receiver.origin}/paused`, body: "x" });
    assert.equal((await queue.get()).lag, 1);
    await client.publish({ url: `${receiver.origin}/beside`, delay: 1 });
    await receiver.arrival("/beside");
    assert.equal(receiver.at("/paused").length, 0);
    await queue.resume();
    await receiver.arrival("/paused");
    await queue.delete();
  });

  test("parallelism is the number of lanes", async () => {
    const queue = client.queue({ queueName: unique("lanes") });
    await queue.upsert({ parallelism: 2, paused: true });
    receiver.on("/lanes", { afterMs: 300 });
    for (const n of [1, 2, 3, 4]) await queue.enqueue({ url: `${receiver.origin}/lanes`, body: `${n}` });
    await queue.resume();
    const seen = await receiver.arrivals("/lanes", 4);
    await eventually(() => seen.every(({ left }) => left));
    const most = Math.max(...seen.map((one) => seen.filter((other) => other.arrived <= one.arrived && one.arrived < other.left).length));
    assert.equal(most, 2);
    await queue.delete();
  });
});

describe("schedules", () => {
  const client = connect();
  let receiver;
  before(async () => (receiver = await listen()));
  after(() => receiver.close());

  test("create, get, list, replace, pause, resume, delete", async () => {
    const scheduleId = unique("schedule");
    const destination = "https://example.com/hook?x=1";
    const made = await client.schedules.create({
      scheduleId,
      destination,
      cron: "*/10 * * * *",
      body: JSON.stringify({ hello: "world" }),
      headers: { "test-header": "test-value" },
      method: "PUT",
      callback: "https://example.com/back",
      failureCallback: "https://example.com/fail",
      delay: 10,
      retries: 5,
      retryDelay: "1000 * retried",
      timeout: "30s",
      queueName: "sdk-tests-schedules",
      label: ["a", "b"],
      flowControl: { key: "sdk-tests", parallelism: 2, rate: 3, period: "1m" },
    });
    assert.equal(made.scheduleId, scheduleId);
    const got = await client.schedules.get(scheduleId);
    const expected = {
      scheduleId,
      destination,
      cron: "*/10 * * * *",
      method: "PUT",
      header: { "Content-Type": ["application/json"], "Test-Header": ["test-value"] },
      body: '{"hello":"world"}',
      callback: "https://example.com/back",
      failureCallback: "https://example.com/fail",
      delay: 10,
      retries: 5,
      retryDelayExpression: "1000 * retried",
      queueName: "sdk-tests-schedules",
      isPaused: false,
      label: "a",
      labels: ["a", "b"],
      flowControlKey: "sdk-tests",
      parallelism: 2,
      rate: 3,
      period: 60,
    };
    for (const [field, value] of Object.entries(expected)) assert.deepEqual(got[field], value, field);
    assert.ok(got.nextScheduleTime > Date.now());
    assert.ok(got.createdAt > 1e12);

    await client.schedules.create({ scheduleId, destination: "https://example.com", cron: "CRON_TZ=Europe/Berlin 5 4 * * *" });
    const replaced = await client.schedules.get(scheduleId);
    assert.equal(replaced.destination, "https://example.com");
    assert.equal(replaced.cron, "CRON_TZ=Europe/Berlin 5 4 * * *");
    for (const field of ["body", "callback", "delay", "queueName", "label", "flowControlKey"]) assert.equal(replaced[field], undefined, field);
    assert.equal(replaced.retries, 3);

    await client.schedules.pause({ schedule: scheduleId });
    assert.equal((await client.schedules.get(scheduleId)).isPaused, true);
    await client.schedules.resume({ schedule: scheduleId });
    assert.equal((await client.schedules.get(scheduleId)).isPaused, false);
    assert.equal((await client.schedules.list()).filter((one) => one.scheduleId === scheduleId).length, 1);
    await client.schedules.delete(scheduleId);
    assert.ok(!(await client.schedules.list()).some((one) => one.scheduleId === scheduleId));
    await refused(client.schedules.get(scheduleId), 404);
  });

  test("bad crons are refused", async () => {
    for (const cron of ["often", "61 * * * *", "CRON_TZ=Nowhere/Land * * * * *"]) {
      await refused(client.schedules.create({ destination: "https://example.com", cron }), 400, /cron/i);
    }
  });

  test("the minute makes a message that names its schedule", { timeout: 90_000 }, async () => {
    const { scheduleId } = await client.schedules.create({
      destination: `${receiver.origin}/tick`,
      cron: "* * * * *",
      body: "tick",
      headers: { "Content-Type": "text/plain", "X-Tick": "1" },
      label: "tick",
    });
    const delivery = await receiver.arrival("/tick", { within: 75_000, every: 250 });
    assert.equal(delivery.headers["upstash-schedule-id"], scheduleId);
    assert.equal(delivery.headers["x-tick"], "1");
    assert.equal(delivery.headers["content-type"], "text/plain");
    assert.equal(delivery.body, "tick");
    assert.equal((await client.messages.get(delivery.id)).scheduleId, scheduleId);
    await statesOf(client, delivery.id, "DELIVERED");
    const { logs } = await client.logs({ filter: { scheduleId, state: "DELIVERED" } });
    assert.equal(logs[0].messageId, delivery.id);
    const schedule = await client.schedules.get(scheduleId);
    assert.ok(schedule.lastScheduleTime > 0 && schedule.lastScheduleTime <= Date.now());
    assert.equal(schedule.lastScheduleStates?.[delivery.id], "SUCCESS");
    await client.schedules.delete(scheduleId);
  });
});

describe("URL groups", () => {
  const client = connect();
  let receiver;
  before(async () => (receiver = await listen()));
  after(() => receiver.close());

  test("endpoints come and go, and the group with the last of them", async () => {
    const name = unique("group");
    await client.urlGroups.delete(name);
    await refused(client.urlGroups.get(name), 404);
    const [one, two] = [{ name: "one", url: "https://example.com/1" }, { url: "https://example.com/2" }];
    await client.urlGroups.addEndpoints({ name, endpoints: [one] });
    await client.urlGroups.addEndpoints({ name, endpoints: [two] });
    const group = await client.urlGroups.get(name);
    assert.equal(group.name, name);
    assert.deepEqual(group.endpoints, [one, two]);
    await client.urlGroups.addEndpoints({ name, endpoints: [{ name: "one", url: "https://example.com/moved" }] });
    assert.deepEqual((await client.urlGroups.get(name)).endpoints.map(({ url }) => url).sort(), ["https://example.com/2", "https://example.com/moved"]);
    assert.ok((await client.urlGroups.list()).some((found) => found.name === name));
    await client.urlGroups.removeEndpoints({ name, endpoints: [{ name: "one" }] });
    await client.urlGroups.removeEndpoints({ name, endpoints: [{ url: two.url }] });
    await refused(client.urlGroups.get(name), 404);
  });

  test("a message to a group becomes one for each endpoint", async () => {
    const name = unique("fan");
    const endpoints = ["/fan-1", "/fan-2"].map((path) => ({ name: path.slice(1), url: receiver.origin + path }));
    await client.urlGroups.addEndpoints({ name, endpoints });
    const sent = await client.publishJSON({ urlGroup: name, body: { to: "all" } });
    assert.deepEqual(sent.map(({ url }) => url).sort(), endpoints.map(({ url }) => url));
    assert.notEqual(sent[0].messageId, sent[1].messageId);
    for (const endpoint of endpoints) {
      const delivery = await receiver.arrival(`/${endpoint.name}`);
      assert.equal(delivery.headers["upstash-topic-name"], name);
      assert.equal(delivery.id, sent.find(({ url }) => url === endpoint.url).messageId);
      const message = await client.messages.get(delivery.id);
      assert.deepEqual([message.urlGroup, message.endpointName], [name, endpoint.name]);
    }
    const { logs } = await client.logs({ filter: { urlGroup: name, state: "CREATED" } });
    assert.equal(logs.length, 2);
    await client.urlGroups.delete(name);
    await refused(client.publish({ urlGroup: name }), 400);
  });
});

describe("flow control", () => {
  const client = connect();
  let receiver;
  before(async () => (receiver = await listen()));
  after(() => receiver.close());

  test("the key is there at once, and what it says of itself", async () => {
    const key = unique("fc");
    const { messageId } = await client.publish({
      url: `${receiver.origin}/never`,
      delay: "7d",
      flowControl: { key, parallelism: 5, rate: 10, period: "1h30m3s" },
    });
    const message = await client.messages.get(messageId);
    assert.deepEqual([message.flowControlKey, message.parallelism, message.rate, message.period], [key, 5, 10, 5403]);
    const info = await client.flowControl.get(key);
    assert.deepEqual([info.flowControlKey, info.parallelismMax, info.rateMax, info.ratePeriod], [key, 5, 10, 5403]);
    assert.deepEqual([info.parallelismCount, info.rateCount, info.isPaused, info.isPinnedParallelism, info.isPinnedRate], [0, 0, false, false, false]);

    const only = await client.publish({ url: `${receiver.origin}/never`, delay: "7d", flowControl: { key, parallelism: 2 } });
    const second = await client.messages.get(only.messageId);
    assert.deepEqual([second.parallelism, second.rate, second.period], [2, undefined, 1]);
    assert.equal((await client.flowControl.get(key)).parallelismMax, 2);
    await client.messages.cancel([messageId, only.messageId]);
    await refused(client.flowControl.get(unique("fc")), 404);
    const global = await client.flowControl.getGlobalParallelism();
    assert.equal(typeof global.parallelismMax, "number");
    assert.equal(typeof global.parallelismCount, "number");
  });

  test("pin, unpin", async () => {
    const key = unique("fc/pin");
    const { messageId } = await client.publish({ url: `${receiver.origin}/never`, delay: "7d", flowControl: { key, parallelism: 5, rate: 10 } });
    await client.flowControl.pin(key, { parallelism: 3, rate: 20, period: 120 });
    const pinned = await client.flowControl.get(key);
    assert.deepEqual([pinned.parallelismMax, pinned.rateMax, pinned.ratePeriod], [3, 20, 120]);
    assert.deepEqual([pinned.isPinnedParallelism, pinned.isPinnedRate], [true, true]);
    const other = await client.publish({ url: `${receiver.origin}/never`, delay: "7d", flowControl: { key, parallelism: 9, rate: 9 } });
    assert.equal((await client.flowControl.get(key)).parallelismMax, 3);
    await client.flowControl.unpin(key, { parallelism: true });
    const half = await client.flowControl.get(key);
    assert.deepEqual([half.isPinnedParallelism, half.isPinnedRate, half.rateMax], [false, true, 20]);
    await client.flowControl.unpin(key, { rate: true });
    assert.equal((await client.flowControl.get(key)).isPinnedRate, false);
    await client.messages.cancel([messageId, other.messageId]);
  });

  test("pause keeps deliveries waiting, resume lets them go", async () => {
    const key = unique("fc-pause");
    const flowControl = { key, parallelism: 1 };
    const first = await client.publish({ url: `${receiver.origin}/never`, delay: "7d", flowControl });
    await client.flowControl.pause(key);
    assert.equal((await client.flowControl.get(key)).isPaused, true);
    await client.publish({ url: `${receiver.origin}/fc-paused`, flowControl });
    await eventually(async () => (await client.flowControl.get(key)).waitListSize === 1);
    await client.publish({ url: `${receiver.origin}/fc-beside`, delay: 1 });
    await receiver.arrival("/fc-beside");
    assert.equal(receiver.at("/fc-paused").length, 0);
    await client.flowControl.resume(key);
    await receiver.arrival("/fc-paused");
    await client.messages.cancel(first.messageId);
  });

  test("parallelism holds across destinations", async () => {
    const flowControl = { key: unique("fc-one"), parallelism: 1 };
    const paths = ["/one-a", "/one-b", "/one-c"];
    for (const path of paths) receiver.on(path, { afterMs: 150 });
    await client.batch(paths.map((path) => ({ url: receiver.origin + path, flowControl })));
    const seen = [];
    for (const path of paths) seen.push(await receiver.arrival(path));
    await eventually(() => seen.every(({ left }) => left));
    seen.sort((a, b) => a.arrived - b.arrived);
    for (let index = 1; index < seen.length; index += 1) assert.ok(seen[index].arrived >= seen[index - 1].left);
  });

  test("rate holds within its period, and resetRate forgets", async () => {
    const key = unique("fc-rate");
    const flowControl = { key, rate: 2, period: "1h" };
    await client.batch([1, 2, 3].map(() => ({ url: `${receiver.origin}/rate`, flowControl })));
    await receiver.arrivals("/rate", 2);
    await eventually(async () => (await client.flowControl.get(key)).waitListSize === 1);
    const info = await client.flowControl.get(key);
    assert.equal(info.rateCount, 2);
    assert.ok(Math.abs(info.ratePeriodStart - Date.now() / 1000) < 3600);
    assert.equal(receiver.at("/rate").length, 2);
    await client.flowControl.resetRate(key);
    await receiver.arrivals("/rate", 3);
    await eventually(async () => (await client.flowControl.get(key)).rateCount === 1);
  });
});
