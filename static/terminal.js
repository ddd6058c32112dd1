// A terminal of a workspace. It is held there, so it is found again with its program, whatever ends here.

import { FitAddon, Terminal } from './xterm.js';
import { byId, debounced, sleep } from './page.js';
import { api, token, workspacePath } from './api.js';
import { pause } from './streams.js';

const [id, name = 'main'] = location.hash.slice(1).split('/').map(decodeURIComponent);
const FONT = 'ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace';
const COLOURS = { background: '#121615', foreground: '#e4e9e6', cursor: '#5cc0a9' };

const terminal = new Terminal({ fontFamily: FONT, fontSize: 13, cursorBlink: true, theme: COLOURS });
const fit = new FitAddon();
const typed = new TextEncoder();
let socket = null;
let onEnter = null; // what Enter does while there is no connection

/** Write a line of ours among what the program prints. */
const tell = (text) => terminal.write(`\r\n\x1b[2m${text}\x1b[0m\r\n`);

/** Return where the terminal is. With a WebSocket a browser can't send the token: a ticket stands for it. */
async function address() {
  const url = new URL(workspacePath(id, '/terminal'), document.baseURI);
  url.protocol = url.protocol.replace('http', 'ws');
  url.search = new URLSearchParams({ name, cols: terminal.cols, rows: terminal.rows });
  const { name: workspace } = await api('GET', workspacePath(id));
  document.title = `${workspace} · terminal`;
  if (token()) url.searchParams.set('ticket', (await api('POST', 'api/tickets')).ticket);
  return url;
}

/** Say why not to try again, unless the server was not reached: a proxy then answers 502 or the like. */
const refused = ({ status, message }) => ({ last: status >= 400 && status < 500 ? message : '' });

/** Join the terminal, and come back to it by itself where the connection is lost. */
async function join() {
  onEnter = null;
  for (let tries = 0; ; tries += 1) {
    const end = await address().then(converse, refused);
    if (end.wasReady) tries = 0;
    if (end.last) {
      tell(`${end.last} Press Enter to begin again.`);
      onEnter = join;
      return;
    }
    if (tries === 0) tell('The connection is lost. Reconnecting…');
    await sleep(pause(tries));
  }
}

/** Talk until the connection ends, and return {last: why it should not be opened again, wasReady}. */
function converse(url) {
  const end = { last: '', wasReady: false };
  socket = new WebSocket(url);
  socket.binaryType = 'arraybuffer';
  socket.onmessage = ({ data }) => {
    if (typeof data !== 'string') {
      terminal.write(new Uint8Array(data));
      return;
    }
    const message = JSON.parse(data);
    if (message.type === 'ready') {
      terminal.reset(); // what was printed last comes again
      end.wasReady = true;
    } else if (message.type === 'exit') end.last = `It ended with status ${message.exitCode}.`;
    else if (message.type === 'error') end.last = message.message;
  };
  return new Promise((resolve) => { socket.onclose = () => resolve(end); });
}

function send(data) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(data);
  else if (onEnter && data.includes?.(13)) onEnter();
}

terminal.loadAddon(fit);
terminal.open(byId('terminal'));
// All keys are the program's but for this one, with which those who have no mouse leave it.
terminal.attachCustomKeyEventHandler((event) => {
  const tab = window.parent.document.getElementById('tab-terminal');
  if (!tab || event.key !== 'F6' || !event.ctrlKey) return true;
  event.preventDefault();
  if (event.type === 'keydown') tab.focus();
  return false;
});
terminal.onData((text) => send(typed.encode(text)));
terminal.onBinary((text) => send(Uint8Array.from(text, (letter) => letter.charCodeAt(0))));
terminal.onResize(({ cols, rows }) => {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ type: 'resize', cols, rows }));
});
window.addEventListener('focus', () => terminal.focus());
new ResizeObserver(debounced(() => fit.fit(), 50)).observe(byId('terminal'));
fit.fit();
terminal.focus();
join();
