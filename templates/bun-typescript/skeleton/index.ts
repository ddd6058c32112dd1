export function handle(request: Request): Response {
  const { pathname } = new URL(request.url);
  if (pathname === "/") {
    return Response.json({ message: "Hello from Bun" });
  }
  return Response.json({ error: "Not found" }, { status: 404 });
}

// The tests import this file too, and they need no server.
if (import.meta.main) {
  const server = Bun.serve({ port: process.env.PORT ?? 3000, fetch: handle });
  console.log(`Listening on ${server.url}`);
}
