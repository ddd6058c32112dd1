// Tells, one JSON per line, how connections to the WebSocket of a server end. Runs under Bun, Node and with npm's ws.
// Arguments: port, 'native' or 'ws'.
const [port, kind] = process.argv.slice(2);
const Client = kind === 'ws' ? require('ws') : WebSocket;

function ending(act) {
  return new Promise((resolve) => {
    const socket = new Client(`ws://localhost:${port}/agent/ws`);
    socket.onopen = () => act(socket);
    socket.onmessage = (event) => { if (act.onmessage) act.onmessage(socket, event.data); };
    socket.onclose = (event) => resolve({ code: event.code, reason: event.reason, clean: event.wasClean });
    socket.onerror = () => {};
  });
}

async function main() {
  const pong = (socket) => socket.send('{"type": "ping"}');
  pong.onmessage = (socket) => socket.close(4001, 'bye');
  console.log(JSON.stringify(['4001', await ending(pong)]));
  console.log(JSON.stringify(['1000', await ending((socket) => socket.close(1000))]));
  console.log(JSON.stringify(['big', await ending((socket) => socket.send('x'.repeat(2 ** 20 + 1)))]));
  console.log(JSON.stringify(['ready']));
  console.log(JSON.stringify(['stop', await ending(() => console.log(JSON.stringify(['open'])))]));
}

main();
