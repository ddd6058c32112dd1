import { expect, test } from "bun:test";
import { handle } from "./index.ts";

test("greets at the root", async () => {
  const response = handle(new Request("http://localhost/"));
  expect(response.status).toBe(200);
  expect(await response.json()).toEqual({ message: "Hello from Bun" });
});

test("answers 404 elsewhere", () => {
  expect(handle(new Request("http://localhost/missing")).status).toBe(404);
});
