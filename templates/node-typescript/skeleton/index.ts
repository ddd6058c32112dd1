import { createServer, type IncomingMessage, type ServerResponse } from "node:http";

export function handle(request: IncomingMessage, response: ServerResponse): void {
  const { pathname } = new URL(request.url ?? "/", "http://localhost");
  const found = pathname === "/";
  response.writeHead(found ? 200 : 404, { "content-type": "application/json" });
  response.end(JSON.stringify(found ? { message: "Hello from Node" } : { error: "Not found" }));
}

// The tests import this file too, and they start a server of their own.
if (import.meta.main) {
  const port = Number(process.env.PORT ?? 3000);
  createServer(handle).listen(port, () => console.log(`Listening on http://localhost:${port}/`));
}
