import assert from "node:assert/strict";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { after, before, test } from "node:test";
import { handle } from "./index.ts";

const server = createServer(handle);
let origin: string;

before(async () => {
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  origin = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
});

after(() => {
  server.close();
});

test("greets at the root", async () => {
  const response = await fetch(origin);
  assert.equal(response.status, 200);
  assert.deepEqual(await response.json(), { message: "Hello from Node" });
});

test("answers 404 elsewhere", async () => {
  const response = await fetch(`${origin}/missing`);
  assert.equal(response.status, 404);
  await response.body?.cancel();
});
