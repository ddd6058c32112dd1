// What comes by itself: the events of a session over SSE, and those of workspaces over the one WebSocket.

import { complain, sleep } from './page.js';
import { askToken, isAsking, request, token } from './api.js';

const SILENCE = 45000; // ms after which a connection is given up
export const LOG_TAIL = 2000; // old lines asked for

/** Milliseconds to wait before the next try: longer each time, and not the same for all. */
export const pause = (tries) => Math.min(15000, 500 * 2 ** Math.min(tries, 6)) * (0.7 + 0.6 * Math.random());

/** Yield the events of an SSE stream until it ends. */
async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ''; ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split('\n\n');
    text = parts.pop();
    for (const part of parts) {
      const data = part.split('\n').filter((line) => line.startsWith('data:')).map((line) => line.slice(5));
      if (data.length) yield JSON.parse(data.join('\n'));
    }
  }
}

/** Yield the events of an address until its stream ends. */
export async function* readEvents(path, signal) {
  yield* eventsOf(await request('GET', path, { signal, accept: 'text/event-stream' }));
}

/** Wait until the page is seen. */
const seen = () => new Promise((resolve) => {
  const look = () => {
    if (document.hidden) return;
    document.removeEventListener('visibilitychange', look);
    resolve();
  };
  document.addEventListener('visibilitychange', look);
  look();
});

/** Follow the events of a session over SSE, whatever happens to the connection. */
export async function followSession(id, onEvent, signal) {
  let after = '';
  for (let tries = 0; !signal.aborted; tries += 1) {
    await seen(); // over HTTP/1.1 a browser has six connections for all its tabs
    const unseen = new AbortController();
    const leave = () => { if (document.hidden) unseen.abort(); };
    document.addEventListener('visibilitychange', leave);
    try {
      const query = after ? `?after=${encodeURIComponent(after)}` : '';
      const path = `agent/sse/${encodeURIComponent(id)}${query}`;
      for await (const event of readEvents(path, AbortSignal.any([signal, unseen.signal]))) {
        tries = 0;
        after = event.id ?? after;
        onEvent(event);
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.status >= 400 && error.status < 500 && error.status !== 429) { complain(error); return; }
    } finally { document.removeEventListener('visibilitychange', leave); }
    if (!unseen.signal.aborted) await sleep(pause(tries));
  }
}

/** The one WebSocket: it comes back by itself, and goes on where it was. */
export class Link {
  constructor(onEvent, onState) {
    this.onEvent = onEvent;
    this.onState = onState;
    this.wanted = new Map([['*', {}]]); // topic -> {after}
    this.tries = 0;
    this.state = '';
    this.wasLive = false;
  }

  open() {
    clearTimeout(this.timer);
    const url = new URL('agent/ws', document.baseURI);
    url.protocol = url.protocol.replace('http', 'ws');
    const socket = new WebSocket(url);
    const shown = token();
    this.socket = socket;
    socket.onopen = () => {
      if (shown) this.send({ type: 'auth', token: shown });
      for (const [workspaceId, topic] of this.wanted) {
        topic.stale = false;
        this.subscribe(workspaceId, topic.after);
      }
      this.send({ type: 'ping' });
      this.heard = Date.now();
    };
    socket.onmessage = (message) => {
      if (socket !== this.socket) return;
      this.heard = Date.now();
      this.take(JSON.parse(message.data));
    };
    socket.onclose = async (event) => {
      if (socket !== this.socket) return;
      this.show('reconnecting');
      if (event.code === 1008 && shown === token()) await askToken();
      this.timer = setTimeout(() => this.open(), event.code === 1008 ? 0 : pause(this.tries++));
    };
  }

  take(event) {
    if (event.type === 'pong') {
      for (const topic of this.wanted.values()) topic.stale = false;
      this.tries = 0;
      this.wasLive = true;
      this.show('live');
      return;
    }
    const topic = this.wanted.get(event.workspaceId);
    if (topic?.stale && event.type !== 'status') return;
    // A status comes for all workspaces too, and its id then knows nothing of the log.
    if (topic && event.id && event.type !== 'status') topic.after = event.id;
    this.onEvent(event);
  }

  show(to) {
    const from = this.state;
    this.state = to;
    if (from !== to) this.onState(to, from);
  }

  send(message) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  subscribe(workspaceId, after) {
    const tail = workspaceId === '*' ? undefined : LOG_TAIL;
    this.send({ type: 'subscribe', workspaceId, tail, after });
  }

  /** Have the events of a workspace anew; what still comes of an earlier subscription is left out. */
  watch(workspaceId) {
    this.wanted.set(workspaceId, { stale: true });
    this.send({ type: 'ping' });
    this.subscribe(workspaceId);
  }

  unwatch(workspaceId) {
    if (this.wanted.delete(workspaceId)) this.send({ type: 'unsubscribe', workspaceId });
  }

  /** Ask for a sign of life; a connection that gives none for long is given up. */
  check() {
    if (this.socket?.readyState !== WebSocket.OPEN) return;
    if (Date.now() - this.heard > SILENCE) {
      const old = this.socket;
      this.socket = null;
      old.close();
      this.show('reconnecting');
      this.open();
    } else this.send({ type: 'ping' });
  }

  /** Go on after a time in which nothing was asked, and so nothing need have been heard. */
  wake() {
    this.heard = Date.now();
    this.check();
    this.hurry();
  }

  hurry() {
    const closed = !this.socket || this.socket.readyState === WebSocket.CLOSED;
    if (this.state === 'reconnecting' && closed && !isAsking()) this.open();
  }
}
