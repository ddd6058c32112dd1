// The dashboard. It talks to the API as any other client does, and to nothing else.
// All text that comes from the server, a container or an agent enters the page as text nodes, never as HTML.

const POLL = 2500; // ms between looks at the resources of workspaces
const HEALTH_POLL = 10000;
const HISTORY = 72; // samples of a chart
const LOG_CAP = 10000; // lines kept
const LOG_CHUNK = 250; // lines that are laid out, and dropped, together
const LOG_TAIL = 2000; // old lines asked for
const LONGEST = 8000; // characters of a line that are shown
const FRAME_LINES = 3000; // lines put into the page per frame
const SVG = 'http://www.w3.org/2000/svg';

const byId = (id) => document.getElementById(id);
const state = { workspaces: new Map(), details: new Map(), usage: new Map(), templates: [], health: null, sessions: [], open: null, tab: 'logs', session: null };

// ------------------------------------------------------------------------------------------ page

/** Make an element; `fields` are properties, `data` goes to the dataset, children are nodes or text. */
function el(name, fields = {}, ...children) {
  const { data, attributes, ...properties } = fields;
  const made = Object.assign(document.createElement(name), properties);
  Object.assign(made.dataset, data);
  for (const [key, value] of Object.entries(attributes ?? {})) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function icon(name) {
  const svg = document.createElementNS(SVG, 'svg');
  const use = document.createElementNS(SVG, 'use');
  use.setAttribute('href', `#i-${name}`);
  svg.append(use);
  return svg;
}

function say(text, { bad = false, code = '' } = {}) {
  const toast = el('div', { className: bad ? 'toast bad' : 'toast' }, code ? el('code', {}, code) : null, text);
  byId('toasts').append(toast);
  setTimeout(() => toast.remove(), bad ? 9000 : 3500);
}

const complain = (error) => say(error.message, { bad: true, code: error.code });

function ago(time) {
  if (!time) return '–';
  const seconds = (Date.now() - Date.parse(time)) / 1000;
  return seconds >= 0 ? `${span(seconds)} ago` : `in ${span(-seconds)}`;
}

function span(seconds) {
  for (const [size, unit] of [[86400, 'd'], [3600, 'h'], [60, 'min']]) if (seconds >= size) return `${Math.floor(seconds / size)} ${unit}`;
  return `${Math.max(0, Math.floor(seconds))} s`;
}

function bytes(number) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let at = 0;
  while (number >= 1024 && at < units.length - 1) { number /= 1024; at += 1; }
  return `${number >= 100 || at === 0 ? Math.round(number) : number.toFixed(1)} ${units[at]}`;
}

const money = (dollars) => `$${dollars.toFixed(dollars < 0.1 ? 4 : 2)}`;

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = el('textarea', { value: text });
    (document.querySelector('dialog[open]') ?? document.body).append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
  }
  say(`${what} copied`);
}

// ------------------------------------------------------------------------------------------- api

class ApiError extends Error {
  constructor(status, body) {
    super(body.error ?? `The server answered ${status}.`);
    this.status = status;
    this.code = body.code ?? '';
    this.details = body.details ?? [];
  }
}

let asking = null;

/** Ask for the API token, once for all who need it. */
function askToken() {
  asking ??= new Promise((resolve) => {
    const dialog = byId('token-dialog');
    const form = byId('token-form');
    trouble(form, sessionStorage.getItem('token') ? new ApiError(401, { error: 'This token was not accepted.', code: 'UNAUTHORIZED' }) : null);
    form.onsubmit = (event) => {
      event.preventDefault();
      if (!form.token.value) return;
      sessionStorage.setItem('token', form.token.value);
      form.reset();
      dialog.close();
      asking = null;
      resolve();
    };
    dialog.oncancel = (event) => event.preventDefault(); // there is nothing to see without it
    dialog.showModal();
  });
  return asking;
}

async function request(method, path, { body, signal, accept = 'application/json' } = {}) {
  for (;;) {
    const headers = { Accept: accept };
    const token = sessionStorage.getItem('token');
    if (token) headers.Authorization = `Bearer ${token}`;
    if (body !== undefined) headers['Content-Type'] = 'application/json';
    let answer;
    try {
      answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ApiError(0, { error: 'The server does not answer.', code: 'UNREACHABLE' });
    }
    if (answer.ok) return answer;
    const told = await answer.json().catch(() => ({}));
    if (answer.status !== 401) throw new ApiError(answer.status, told);
    if (token === sessionStorage.getItem('token')) await askToken();
  }
}

async function api(method, path, body) {
  const told = await (await request(method, path, { body })).json();
  return 'success' in told ? told.data : told;
}

const workspacePath = (id, more = '') => `api/workspaces/${encodeURIComponent(id)}${more}`;
const sessionPath = (id, more = '') => `api/agent/sessions/${encodeURIComponent(id)}${more}`;

/** Follow the events of a session over SSE, from `after` on, whatever happens to the connection. */
async function followSession(id, onEvent, signal) {
  let after = '';
  for (let tries = 0; !signal.aborted; tries += 1) {
    try {
      const answer = await request('GET', `agent/sse/${encodeURIComponent(id)}${after ? `?after=${encodeURIComponent(after)}` : ''}`, { signal, accept: 'text/event-stream' });
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let text = ''; ;) {
        const { done, value } = await reader.read();
        if (done) break;
        tries = 0;
        const parts = (text + value).split('\n\n');
        text = parts.pop();
        for (const part of parts) {
          const data = part.split('\n').filter((line) => line.startsWith('data:')).map((line) => line.slice(5)).join('\n');
          if (!data) continue;
          const event = JSON.parse(data);
          after = event.id ?? after;
          onEvent(event);
        }
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.status >= 400 && error.status < 500 && error.status !== 429) { complain(error); return; }
    }
    await new Promise((resolve) => setTimeout(resolve, pause(tries)));
  }
}

/** Milliseconds to wait before the next try: longer each time, and not the same for all. */
const pause = (tries) => Math.min(15000, 500 * 2 ** Math.min(tries, 6)) * (0.7 + 0.6 * Math.random());

/** The one WebSocket: it comes back by itself, and goes on where it was. */
class Link {
  constructor(onEvent, onState) {
    this.onEvent = onEvent;
    this.onState = onState;
    this.wanted = new Map([['*', {}]]); // topic -> {after}
    this.tries = 0;
    this.state = '';
  }

  open() {
    clearTimeout(this.timer);
    const url = new URL('agent/ws', document.baseURI);
    url.protocol = url.protocol.replace('http', 'ws');
    const socket = new WebSocket(url);
    const shown = sessionStorage.getItem('token');
    this.socket = socket;
    socket.onopen = () => {
      if (shown) this.send({ type: 'auth', token: shown });
      for (const [workspaceId, { after }] of this.wanted) this.subscribe(workspaceId, after);
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
      if (event.code === 1008 && shown === sessionStorage.getItem('token')) await askToken();
      this.timer = setTimeout(() => this.open(), event.code === 1008 ? 0 : pause(this.tries++));
    };
  }

  take(event) {
    if (event.type === 'pong') {
      this.tries = 0;
      this.show('live');
      return;
    }
    const topic = this.wanted.get(event.workspaceId);
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
    this.send({ type: 'subscribe', workspaceId, ...(workspaceId === '*' ? {} : { tail: LOG_TAIL }), ...(after ? { after } : {}) });
  }

  watch(workspaceId) {
    this.wanted.set(workspaceId, {});
    this.subscribe(workspaceId);
  }

  unwatch(workspaceId) {
    if (this.wanted.delete(workspaceId)) this.send({ type: 'unsubscribe', workspaceId });
  }

  /** Ask for a sign of life; a connection that gives none for long is given up. */
  check() {
    if (this.socket?.readyState !== WebSocket.OPEN) return;
    if (Date.now() - this.heard > 45000) {
      const old = this.socket;
      this.socket = null;
      old.close();
      this.show('reconnecting');
      this.open();
    } else this.send({ type: 'ping' });
  }

  hurry() {
    if (this.state === 'reconnecting' && (!this.socket || this.socket.readyState === WebSocket.CLOSED) && !asking) this.open();
  }
}

// ------------------------------------------------------------------------------------------ ansi

const ESCAPES = /\x1b\[([0-9;:]*)m|\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?|[\x00-\x08\x0b-\x1f\x7f-\x9f]/g;

/** Return a line as [{text, classes, colour}], its colours understood, all else that steers a terminal taken out. */
function ansi(text) {
  const parts = [];
  let style = {};
  let last = 0;
  const push = (piece) => { if (piece) parts.push({ text: piece, ...dress(style) }); };
  for (const match of text.matchAll(ESCAPES)) {
    push(text.slice(last, match.index));
    last = match.index + match[0].length;
    if (match[1] !== undefined) style = paint(style, match[1].split(/[;:]/).map(Number));
  }
  push(text.slice(last));
  return parts;
}

function paint(style, codes) {
  const next = { ...style };
  for (let at = 0; at < codes.length; at += 1) {
    const code = codes[at];
    if (code === 0) for (const key of Object.keys(next)) delete next[key];
    else if (code === 1) next.bold = true;
    else if (code === 2) next.faint = true;
    else if (code === 3) next.italic = true;
    else if (code === 4) next.under = true;
    else if (code === 7) next.inverse = true;
    else if (code === 9) next.struck = true;
    else if (code === 22) next.bold = next.faint = false;
    else if (code === 23) next.italic = false;
    else if (code === 24) next.under = false;
    else if (code === 27) next.inverse = false;
    else if (code === 29) next.struck = false;
    else if (code >= 30 && code <= 37) next.colour = code - 30;
    else if (code >= 90 && code <= 97) next.colour = code - 82;
    else if (code === 39) delete next.colour;
    else if (code === 38 || code === 48) {
      const indexed = codes[at + 1] === 5;
      const colour = indexed ? indexedColour(codes[at + 2]) : codes[at + 1] === 2 ? codes.slice(at + 2, at + 5) : undefined;
      if (code === 38 && colour !== undefined) next.colour = colour;
      at += indexed ? 2 : codes[at + 1] === 2 ? 4 : codes.length;
    }
  }
  return next;
}

function indexedColour(number) {
  if (!(number >= 0 && number <= 255)) return undefined;
  if (number < 16) return number;
  if (number >= 232) return Array(3).fill(8 + (number - 232) * 10);
  const level = (part) => (part ? 55 + part * 40 : 0);
  return [level(Math.floor((number - 16) / 36)), level(Math.floor(((number - 16) % 36) / 6)), level((number - 16) % 6)];
}

function dress(style) {
  const classes = ['bold', 'faint', 'italic', 'under', 'inverse', 'struck'].filter((key) => style[key]);
  if (typeof style.colour === 'number') classes.push(`f${style.colour}`);
  return { classes: classes.join(' '), colour: Array.isArray(style.colour) ? style.colour : null };
}

/** What is left of a line that was written over and over, as progress bars do. */
const lastState = (text) => (text.includes('\r') ? text.split('\r').findLast((part) => part) ?? '' : text);

// ------------------------------------------------------------------------------------------- log

/** The lines of a log: capped, laid out in chunks, and put into the page once per frame. */
class LogView {
  constructor() {
    this.box = byId('log');
    this.body = el('div');
    this.box.append(this.body);
    this.pattern = null;
    this.top = 0;
    this.reset('');
    this.box.addEventListener('scroll', () => {
      const atEnd = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < 30;
      if (atEnd) this.stick = true;
      else if (this.box.scrollTop < this.top) this.stick = false; // it was moved up, and not only the lines below grew
      this.top = this.box.scrollTop;
      byId('log-jump').hidden = this.stick;
    }, { passive: true });
    // Chunks that come into view turn out larger or smaller than was thought.
    new ResizeObserver(() => { if (this.stick) this.toEnd(); }).observe(this.body);
  }

  reset(empty) {
    this.chunks = []; // {lines, node}
    this.queue = [];
    this.count = 0;
    this.found = 0;
    this.paused = false;
    this.stick = true;
    this.missed = 0;
    this.body.replaceChildren(el('p', { className: 'empty' }, empty));
    this.tell();
  }

  add(line) {
    this.queue.push(line);
    if (this.queue.length > LOG_CAP) { this.queue.shift(); this.missed += 1; }
    if (!this.planned) {
      this.planned = true;
      // A page that is not seen gets no frames.
      if (document.hidden) setTimeout(() => this.flush(), 300);
      else requestAnimationFrame(() => this.flush());
    }
  }

  flush() {
    this.planned = false;
    if (this.paused) { this.tell(); return; }
    if (this.missed) this.put([{ kind: 'note', text: `${this.missed} lines came too fast and are left out.` }]);
    this.missed = 0;
    this.put(this.queue.splice(0, FRAME_LINES));
    if (this.queue.length) { this.planned = true; requestAnimationFrame(() => this.flush()); }
  }

  put(lines) {
    if (!lines.length) return;
    if (!this.chunks.length) this.body.replaceChildren();
    for (const line of lines) {
      let chunk = this.chunks.at(-1);
      if (!chunk || chunk.lines.length >= LOG_CHUNK) {
        chunk = { lines: [], node: el('div', { className: 'chunk' }) };
        this.chunks.push(chunk);
        this.body.append(chunk.node);
      }
      chunk.lines.push(line);
      this.count += 1;
      this.render(chunk, line);
    }
    while (this.count - this.chunks[0].lines.length >= LOG_CAP) {
      const dropped = this.chunks.shift();
      this.count -= dropped.lines.length;
      if (this.pattern) this.found -= dropped.node.childElementCount;
      dropped.node.remove();
    }
    if (this.stick) this.toEnd();
    this.tell();
  }

  render(chunk, line) {
    line.parts ??= ansi(lastState(line.text.length > LONGEST ? `${line.text.slice(0, LONGEST)} … ${line.text.length - LONGEST} more characters` : line.text));
    const plain = this.pattern && line.parts.map((part) => part.text).join('');
    const ranges = this.pattern ? [...plain.matchAll(this.pattern)].map((match) => [match.index, match.index + match[0].length]) : [];
    if (this.pattern && !ranges.length) return;
    this.found += this.pattern ? 1 : 0;
    const text = document.createElement('span');
    text.append(...marked(line.parts, ranges));
    const row = el('div', { className: line.kind ? `line ${line.kind}` : 'line' });
    if (line.time) row.append(el('time', { dateTime: line.time }, new Date(line.time).toTimeString().slice(0, 8)));
    row.append(text);
    chunk.node.append(row);
  }

  search(text) {
    this.pattern = text ? new RegExp(text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&'), 'giu') : null;
    this.found = 0;
    for (const chunk of this.chunks) {
      chunk.node.replaceChildren();
      for (const line of chunk.lines) this.render(chunk, line);
    }
    this.toEnd();
    this.tell();
  }

  pause(on) {
    this.paused = on;
    if (!on) this.flush();
    this.tell();
  }

  toEnd() {
    this.box.scrollTop = this.box.scrollHeight;
    this.top = this.box.scrollTop;
    this.stick = true;
    byId('log-jump').hidden = true;
  }

  tell() {
    const words = [this.pattern ? `${this.found} of ${this.count} lines` : `${this.count} lines`];
    if (this.paused) words.push(`paused, ${this.queue.length + this.missed} new`);
    byId('log-count').textContent = words.join(' · ');
    byId('log-pause').textContent = this.paused ? 'Go on' : 'Pause';
    byId('log-pause').setAttribute('aria-pressed', String(this.paused));
  }
}

/** Yield the nodes of a line, with the ranges of its text in <mark>. */
function* marked(parts, ranges) {
  let start = 0;
  let at = 0;
  for (const part of parts) {
    const holder = part.classes || part.colour ? el('span', { className: part.classes }) : document.createDocumentFragment();
    if (part.colour) holder.style.color = `rgb(${part.colour.map((level) => Math.min(255, level | 0)).join(' ')})`;
    let from = 0;
    while (at < ranges.length && ranges[at][0] < start + part.text.length) {
      const begin = Math.max(0, ranges[at][0] - start);
      const end = Math.min(part.text.length, ranges[at][1] - start);
      holder.append(part.text.slice(from, begin), el('mark', {}, part.text.slice(begin, end)));
      from = end;
      if (ranges[at][1] > start + part.text.length) break;
      at += 1;
    }
    holder.append(part.text.slice(from));
    start += part.text.length;
    yield holder;
  }
}

// ------------------------------------------------------------------------------------------ task

/** What an agent says and does in a session, and how far it is. */
class TaskView {
  constructor() {
    this.box = byId('transcript');
    this.leave();
  }

  leave() {
    this.aborter?.abort();
    this.id = null;
    this.running = false;
    this.runs = new Map();
    this.box.replaceChildren(el('p', { className: 'empty' }, 'Give an agent a task below. It works inside this workspace, goes on when you leave, and is found here again.'));
    this.show();
    byId('progress').hidden = true;
  }

  follow(id) {
    this.leave();
    this.id = id;
    this.box.replaceChildren();
    this.aborter = new AbortController();
    this.queue = [];
    followSession(id, (event) => this.take(event), this.aborter.signal);
  }

  take(event) {
    this.queue.push(event);
    if (this.planned) return;
    this.planned = true;
    const go = () => {
      this.planned = false;
      const stick = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < 60;
      const events = this.queue.splice(0);
      const fresh = document.createDocumentFragment();
      for (const item of events) { const node = this.render(item); if (node) fresh.append(node); }
      this.box.append(fresh);
      while (this.box.childElementCount > 3000) this.box.firstElementChild.remove();
      if (stick) this.box.scrollTop = this.box.scrollHeight;
      this.show();
    };
    if (document.hidden) setTimeout(go, 200);
    else requestAnimationFrame(go);
  }

  render({ type, data, sessionId }) {
    if (sessionId !== this.id) return null;
    if (type === 'log' && data.runId) return this.begin(data);
    if (type === 'progress') {
      this.bar(data.step, data.total, data.message);
      const words = el('div', { className: 'step' }, el('b', {}, data.total ? `Step ${data.step} of ${data.total}` : `Step ${data.step}`), data.message ? ` · ${data.message}` : '');
      return words;
    }
    if (type === 'message') return el('div', { className: 'said' }, ...plainParts(data.message));
    if (type === 'log') return this.did(data);
    if (type === 'result' || type === 'error') return this.end(type, data);
    return null;
  }

  begin(data) {
    this.running = true;
    this.bar(0, null, 'Starting…');
    const task = el('div', { className: 'task-text', data: { run: data.runId } }, '…');
    this.runs.set(data.runId, task);
    this.nameTasks();
    return task;
  }

  /** The events don't carry the tasks; the session does. */
  async nameTasks() {
    const id = this.id;
    const session = await api('GET', sessionPath(id)).catch(() => null);
    if (!session || id !== this.id) return;
    for (const run of session.runs) this.runs.get(run.id)?.replaceChildren(run.task);
  }

  did(data) {
    const known = data.tool && data.status !== 'started' && this.tool?.dataset.title === data.message ? this.tool : null;
    if (known) { known.dataset.status = data.status; this.tool = null; return null; }
    const row = el('div', { className: 'did', data: { status: data.status ?? '', title: String(data.message ?? '') } }, ...plainParts(data.tool ? `${data.tool}  ${data.message}` : data.message));
    if (data.tool) this.tool = row;
    return row;
  }

  end(type, data) {
    if (type === 'error' && !data.runId) return el('div', { className: 'end failed' }, el('code', {}, String(data.code)), ` ${data.message}`);
    this.running = false;
    const failed = type === 'error';
    this.bar(1, 1, failed ? data.message : 'Done', failed);
    const figures = [data.turns ? `${data.turns} turns` : '', data.durationMs ? span(data.durationMs / 1000) : '', typeof data.costUsd === 'number' ? money(data.costUsd) : ''].filter(Boolean);
    loadSessions();
    return el('div', { className: failed ? 'end failed' : 'end' }, failed ? el('code', {}, `${data.code} `) : null, ...plainParts(data.message || 'Done.'),
      el('small', {}, figures.join(' · ')));
  }

  bar(step, total, words, failed = false) {
    byId('progress').hidden = false;
    const track = byId('progress').querySelector('.track');
    const known = typeof total === 'number' && total > 0;
    track.className = `track${known ? '' : ' unknown'}${failed ? ' failed' : ''}`;
    track.firstElementChild.style.width = known ? `${Math.min(100, Math.max(0, (step / total) * 100))}%` : '';
    if (known) {
      track.setAttribute('aria-valuemin', 0);
      track.setAttribute('aria-valuemax', total);
      track.setAttribute('aria-valuenow', step);
    } else for (const name of ['aria-valuemin', 'aria-valuemax', 'aria-valuenow']) track.removeAttribute(name);
    const count = known ? (this.running ? `${step} of ${total} · ` : '') : step ? `${step} done so far · ` : '';
    const text = `${count}${words ?? ''}`;
    track.setAttribute('aria-valuetext', text);
    byId('progress').querySelector('.words').textContent = text;
  }

  show() {
    byId('task-cancel').hidden = !this.running;
    byId('task-run').disabled = this.running;
  }
}

const plainParts = (text) => marked(ansi(typeof text === 'string' ? text : JSON.stringify(text) ?? ''), []);

// ------------------------------------------------------------------------------------------ list

const rows = new Map(); // id -> its nodes in the list
const visible = new Set();
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) visible[entry.isIntersecting ? 'add' : 'delete'](entry.target.dataset.id);
});

function sparkline(node, values, highest) {
  const width = node.viewBox.baseVal.width;
  const height = node.viewBox.baseVal.height;
  const points = values.map((value, at) => `${(width - (values.length - 1 - at) * (width / (HISTORY - 1))).toFixed(1)},${(height - 1 - (value / highest) * (height - 3)).toFixed(1)}`);
  node.querySelector('polyline').setAttribute('points', points.join(' '));
  const area = node.querySelector('polygon');
  if (area && points.length) area.setAttribute('points', `${points[0].split(',')[0]},${height} ${points.join(' ')} ${width},${height}`);
  else area?.setAttribute('points', '');
}

function makeRow(id) {
  const svg = document.createElementNS(SVG, 'svg');
  svg.setAttribute('viewBox', '0 0 100 18');
  svg.setAttribute('preserveAspectRatio', 'none');
  svg.setAttribute('aria-hidden', 'true');
  svg.append(document.createElementNS(SVG, 'polyline'));
  const parts = { dot: el('i', { className: 'dot' }), name: el('span', { className: 'name' }), about: el('span', { className: 'about' }), figure: el('span'), svg };
  const link = el('a', { href: `#/w/${id}` }, parts.dot, parts.name, parts.about, el('span', { className: 'spark' }, svg, parts.figure));
  const row = { ...parts, link, item: el('li', { data: { id } }, link) };
  watcher.observe(row.item);
  rows.set(id, row);
  return row;
}

function showList() {
  const wanted = byId('filter').value.trim().toLowerCase();
  const all = [...state.workspaces.values()].sort((a, b) => Date.parse(b.createdAt) - Date.parse(a.createdAt));
  const shown = all.filter((item) => [item.name, item.status, item.type, item.template, item.id].join(' ').toLowerCase().includes(wanted));
  for (const [id, row] of rows) if (!state.workspaces.has(id)) { watcher.unobserve(row.item); row.item.remove(); rows.delete(id); visible.delete(id); }
  const list = byId('workspaces');
  shown.forEach((item, at) => {
    const row = rows.get(item.id) ?? makeRow(item.id);
    row.dot.dataset.status = item.status;
    row.name.textContent = item.name;
    const expiry = item.expiresAt ? ` · ends ${ago(item.expiresAt)}` : '';
    row.about.textContent = item.status === 'running' ? `${item.type} · ${item.template} · ${ago(item.createdAt)}${expiry}` : `${item.status} · ${item.type} · ${item.template}${expiry}`;
    row.link.title = `${item.name}: ${item.status}, ${item.type}, ${item.template}`;
    row.svg.style.visibility = item.status === 'running' ? '' : 'hidden';
    if (item.status !== 'running') row.figure.textContent = '';
    if (item.id === state.open) row.link.setAttribute('aria-current', 'page');
    else row.link.removeAttribute('aria-current');
    if (list.children[at] !== row.item) list.insertBefore(row.item, list.children[at] ?? null);
  });
  while (list.children.length > shown.length) list.lastElementChild.remove();
  const empty = byId('no-workspaces');
  empty.hidden = shown.length > 0;
  empty.textContent = all.length ? 'No workspace fits.' : state.loaded ? 'No workspace yet. Press n to make the first one.' : 'Loading…';
}

function showUsage(id) {
  const history = state.usage.get(id);
  const now = history?.at(-1);
  const row = rows.get(id);
  if (row && now) {
    sparkline(row.svg, history.map((item) => item.cpuPercent), Math.max(100, ...history.map((item) => item.cpuPercent)));
    row.figure.textContent = `${Math.round(now.cpuPercent)} % · ${bytes(now.memoryUsage)}`;
    row.figure.title = 'CPU, in percent of one core, and memory';
  }
  if (id !== state.open) return;
  for (const [name, key, text, highest] of [
    ['cpu', 'cpuPercent', now && `${now.cpuPercent.toFixed(1)} %`, Math.max(100, ...(history ?? []).map((item) => item.cpuPercent))],
    ['memory', 'memoryUsage', now && `${bytes(now.memoryUsage)} of ${bytes(now.memoryLimit)}`, now?.memoryLimit || 1],
  ]) {
    const chart = byId(`chart-${name}`);
    chart.querySelector('b').textContent = text || '–';
    sparkline(chart.querySelector('svg'), (history ?? []).map((item) => item[key]), highest);
  }
}

// ------------------------------------------------------------------------------------- workspace

const fact = (name, ...content) => el('div', {}, el('dt', {}, name), el('dd', {}, ...content));
const wide = (node) => { node.classList.add('long'); return node; };

/** Return a link if the address is one of the web, and plain text else. */
function webLink(url, text) {
  return /^https?:\/\//i.test(url ?? '') ? el('a', { href: url, target: '_blank', rel: 'noopener noreferrer' }, text) : el('span', {}, text);
}

function copyButton(text, what) {
  return el('button', { type: 'button', title: `Copy ${what}`, ariaLabel: `Copy ${what}`, onclick: () => copy(text, what) }, icon('copy'));
}

function secret(text) {
  const hidden = '••••••••••';
  const shown = el('code', {}, hidden);
  const eye = el('button', { type: 'button', title: 'Show', ariaLabel: 'Show the password', onclick: () => { shown.textContent = shown.textContent === hidden ? text : hidden; } }, icon('eye'));
  return [shown, eye, copyButton(text, 'password')];
}

function showWorkspace() {
  const item = state.workspaces.get(state.open);
  if (!item) return;
  const more = state.details.get(item.id) ?? {};
  byId('ws-name').textContent = item.name;
  byId('ws-id').textContent = item.id;
  byId('ws-status').textContent = item.status;
  byId('ws-status').dataset.status = item.status;
  document.title = `${item.name} · Agent Backend`;
  byId('ws-error').hidden = !(more.error && item.status === 'error');
  byId('ws-error').textContent = more.error ?? '';
  const running = item.status === 'running';
  const editor = byId('ws-editor');
  const url = running && /^https?:\/\//i.test(more.codeServerUrl ?? '') ? more.codeServerUrl : null;
  editor.hidden = !url;
  if (url) editor.href = url;
  byId('ws-start').hidden = !['stopped', 'error'].includes(item.status);
  byId('ws-stop').hidden = !running;
  byId('ws-restart').hidden = !running;
  byId('ws-delete').disabled = item.status === 'deleting';
  const ports = Object.entries(item.ports);
  // Built anew only when something has changed, so that a selection or a shown password stays.
  const key = JSON.stringify([item, more.containerId, more.codeServerUrl, more.codeServerPassword, more.sshCommand, more.gitUrl, more.gitBranch, more.labels]);
  if (byId('facts').dataset.key === key) return tick();
  byId('facts').dataset.key = key;
  byId('facts').replaceChildren(...[
    fact('Type', item.type), fact('Template', item.template),
    fact('Created', el('time', { dateTime: item.createdAt, title: item.createdAt, data: { ago: item.createdAt } })),
    fact('Expires', item.expiresAt ? el('time', { dateTime: item.expiresAt, title: item.expiresAt, data: { ago: item.expiresAt } }) : 'never'),
    fact('Ports', el('span', {}, [item.codeServerPort && `editor ${item.codeServerPort}`, item.sshPort && `SSH ${item.sshPort}`].filter(Boolean).join(', ') || 'none')),
    more.containerId ? fact('Container', el('code', {}, more.containerId)) : null,
    ports.length ? fact('Published', ...ports.map(([inside, outside]) => webLink(`http://${hostOf(more.codeServerUrl)}:${outside}/`, `${inside} → ${outside}`))) : null,
    more.codeServerPassword && item.codeServerPort ? fact("Editor's password", ...secret(more.codeServerPassword)) : null,
    Object.keys(more.labels ?? {}).length ? fact('Labels', ...Object.entries(more.labels).map(([name, value]) => el('code', {}, value ? `${name}=${value}` : name))) : null,
    more.gitUrl ? wide(fact('Git', webLink(more.gitUrl, more.gitUrl), more.gitBranch ? el('code', {}, more.gitBranch) : null)) : null,
    more.sshCommand ? wide(fact('SSH', el('code', {}, more.sshCommand), copyButton(more.sshCommand, 'SSH line'))) : null,
  ].filter(Boolean));
  tick();
}

const hostOf = (url) => { try { return new URL(url).hostname; } catch { return location.hostname; } };

function tick() {
  for (const node of document.querySelectorAll('[data-ago]')) node.textContent = ago(node.dataset.ago);
}

async function loadDetails(id) {
  try {
    const found = await api('GET', workspacePath(id));
    state.details.set(id, found);
    if (state.workspaces.has(id)) Object.assign(state.workspaces.get(id), { ...found, resources: undefined });
    if (found.resources) {
      const history = state.usage.get(id) ?? [];
      state.usage.set(id, [...history, found.resources].slice(-HISTORY));
    } else if (found.status !== 'running') state.usage.delete(id);
    showUsage(id);
    if (id === state.open) showWorkspace();
  } catch (error) {
    if (error.code === 'WORKSPACE_NOT_FOUND') forget(id);
  }
}

function forget(id) {
  const item = state.workspaces.get(id);
  for (const map of [state.workspaces, state.details, state.usage]) map.delete(id);
  if (item && state.open === id) { say(`${item.name} is deleted`); location.hash = '#/'; }
  showList();
  laterHealth();
}

async function loadList() {
  const found = await api('GET', 'api/workspaces');
  const known = new Set(found.map((item) => item.id));
  for (const id of [...state.workspaces.keys()]) if (!known.has(id)) forget(id);
  for (const item of found) state.workspaces.set(item.id, { ...state.workspaces.get(item.id), ...item });
  state.loaded = true;
  showList();
}

const laterList = debounced(() => loadList().then(route, () => {}), 150);
const laterHealth = debounced(() => loadHealth(), 400);

function debounced(call, ms) {
  let timer;
  return (...all) => { clearTimeout(timer); timer = setTimeout(call, ms, ...all); };
}

async function change(verb) {
  const id = state.open;
  try {
    const told = await api('POST', workspacePath(id, `/${verb}`));
    Object.assign(state.workspaces.get(id) ?? {}, told);
    showList();
    showWorkspace();
  } catch (error) { complain(error); }
}

// -------------------------------------------------------------------------------------- sessions

async function loadSessions() {
  const id = state.open;
  if (!id) {
    state.sessions = await api('GET', 'api/agent/sessions').catch(() => state.sessions);
    if (!state.open) showHome();
    return;
  }
  const found = await api('GET', `api/agent/sessions?workspaceId=${encodeURIComponent(id)}`).catch(() => null);
  if (!found || id !== state.open) return;
  state.sessions = found;
  const list = found.slice().reverse().map((item) => {
    const button = el('button', { type: 'button', title: item.id, onclick: () => { location.hash = `#/w/${id}/agent/${encodeURIComponent(item.id)}`; } },
      el('i', { className: 'dot task', data: { status: item.state } }), el('span', {}, item.id), el('small', {}, `${item.agent} · ${item.state} · ${ago(item.lastActivityAt)}`));
    if (item.id === state.session) button.setAttribute('aria-current', 'true');
    return el('li', {}, button);
  });
  byId('sessions').replaceChildren(...list);
  const running = found.filter((item) => item.state === 'running').length;
  byId('agent-count').hidden = !running;
  byId('agent-count').textContent = running;
}

const laterSessions = debounced(() => loadSessions(), 200);

async function runTask() {
  const form = byId('composer');
  const body = { workspaceId: state.open, task: form.task.value };
  if (state.session) body.sessionId = state.session;
  else if (form.agent.value.trim()) body.agent = form.agent.value.trim();
  if (form.timeout.value.trim()) body.timeout = Number(form.timeout.value.trim());
  try {
    byId('task-run').disabled = true;
    const told = await api('POST', 'api/agent/execute', body);
    trouble(form, null);
    form.task.value = '';
    if (told.sessionId === state.session && tasks.id === state.session) laterSessions();
    else location.hash = `#/w/${told.workspaceId}/agent/${encodeURIComponent(told.sessionId)}`;
  } catch (error) {
    trouble(form, error);
    tasks.show();
  }
}

// ------------------------------------------------------------------------------------------ home

const card = (name, value) => el('div', { className: 'card' }, el('small', {}, name), el('b', {}, value));

async function loadHealth() {
  try {
    state.health = await api('GET', 'health');
    if (!state.open) [state.templates, state.sessions] = await Promise.all([api('GET', 'api/templates'), api('GET', 'api/agent/sessions')]);
    showHome();
  } catch {
    byId('engine').dataset.state = 'unknown';
  }
}

function showHome() {
  const health = state.health;
  if (!health) return;
  const chip = byId('engine');
  chip.dataset.state = health.docker;
  chip.lastElementChild.textContent = health.docker === 'connected' ? 'Docker' : 'Docker disconnected';
  chip.title = `Docker is ${health.docker}; ${health.status}`;
  if (state.open) return;
  const counts = health.workspaces ?? {};
  byId('cards').replaceChildren(card('Status', health.status), card('Docker', health.docker), card('Uptime', span(health.uptime)), card('Version', health.version),
    ...Object.entries(counts).filter(([name, count]) => name === 'total' || count).map(([name, count]) => card(name === 'total' ? 'Workspaces' : name, String(count))));
  const names = { codeServer: 'Editors', ssh: 'SSH', custom: 'Others' };
  byId('port-meters').replaceChildren(...Object.entries(health.ports ?? {}).map(([kind, { used, total }]) => {
    const fill = el('i');
    fill.style.width = `${(used / total) * 100}%`;
    return el('div', { className: 'meter' }, `${names[kind] ?? kind}: ${used} of ${total} in use`, el('div', { className: 'track' }, fill));
  }));
  byId('templates').replaceChildren(...state.templates.map((item) => el('tr', {},
    el('td', { className: 'nowrap' }, el('b', {}, item.name), item.default ? el('small', {}, ' default') : null),
    el('td', { className: 'nowrap' }, el('span', { className: 'badge', title: item.image, data: { status: item.state } }, item.state),
      item.buildingSince ? el('small', {}, ` since ${ago(item.buildingSince)}`) : null),
    el('td', {}, item.description, item.error ? el('small', {}, ` ${item.error}`) : null))));
  const recent = state.sessions.slice(-20).reverse();
  byId('no-sessions').hidden = recent.length > 0;
  byId('all-sessions').closest('.scroll').hidden = !recent.length;
  byId('all-sessions').replaceChildren(...recent.map((item) => el('tr', {},
    el('td', {}, el('a', { href: `#/w/${item.workspaceId}/agent/${encodeURIComponent(item.id)}` }, item.id)),
    el('td', {}, state.workspaces.get(item.workspaceId)?.name ?? item.workspaceId), el('td', {}, item.agent),
    el('td', {}, el('span', { className: 'badge task', data: { status: item.state } }, item.state)), el('td', { className: 'nowrap' }, ago(item.lastActivityAt)))));
}

// ------------------------------------------------------------------------------------------ forms

/** Show an error in a form, in the contract's words: each detail at its field, the rest on top; null takes all away. */
function trouble(form, error) {
  const fields = new Map([...form.querySelectorAll('.wrong')].map((node) => [node.dataset.for, node]));
  for (const [name, node] of fields) { node.textContent = ''; form.elements[name]?.removeAttribute?.('aria-invalid'); }
  const rest = [];
  for (const { path, message } of error?.details ?? []) {
    const name = path.split('.')[0];
    if (!fields.has(name)) { rest.push(path ? `${path}: ${message}` : message); continue; }
    fields.get(name).textContent += `${fields.get(name).textContent ? '\n' : ''}${path === name ? '' : `${path}: `}${message}`;
    form.elements[name]?.setAttribute?.('aria-invalid', 'true');
    form.elements[name]?.closest?.('details')?.setAttribute('open', '');
  }
  const box = form.querySelector('.trouble');
  const whole = error && (!error.details.length || rest.length) ? [el('code', {}, error.code), ` ${rest.length ? rest.join('\n') : error.message}`] : [];
  box.replaceChildren(...whole);
  box.hidden = !whole.length;
  form.querySelector('[aria-invalid]')?.focus();
}

const lines = (text) => text.split('\n').map((line) => line.trim()).filter(Boolean);
const number = (text) => (text.trim() === '' || Number.isNaN(Number(text)) ? text : Number(text));
const pairs = (text) => Object.fromEntries(lines(text).map((line) => { const at = line.indexOf('='); return at < 0 ? [line, ''] : [line.slice(0, at), line.slice(at + 1)]; }));

function createBody(form) {
  const body = { name: form.name.value.trim(), type: form.elements.type.value };
  const take = (name, value) => { if (form.elements[name].value.trim()) body[name] = value(form.elements[name].value); };
  for (const name of ['template', 'gitUrl', 'gitBranch']) take(name, (text) => text.trim());
  for (const name of ['ttl', 'cpus']) take(name, number);
  take('memory', (text) => (Number(text) > 0 ? Math.round(Number(text) * 2 ** 20) : text));
  take('ports', (text) => text.trim().split(/[\s,]+/).map(number));
  for (const name of ['env', 'labels']) take(name, pairs);
  take('sshPublicKeys', lines);
  if (!form.ssh.checked) body.ssh = false;
  return body;
}

async function openCreate() {
  const form = byId('create-form');
  trouble(form, null);
  byId('create-dialog').showModal();
  form.elements.name.focus();
  state.templates = await api('GET', 'api/templates').catch(() => state.templates);
  const chosen = form.template.value || state.templates.find((item) => item.default)?.name;
  form.template.replaceChildren(...state.templates.map((item) => el('option', { value: item.name }, item.state === 'ready' ? item.name : `${item.name} (image ${item.state})`)));
  if (chosen) form.template.value = chosen;
}

/** Let a form do something, with its button off meanwhile. */
function onSubmit(id, act) {
  const form = byId(`${id}-form`);
  form.addEventListener('submit', async (event) => {
    event.preventDefault();
    const button = byId(`${id}-submit`);
    if (button.disabled) return;
    button.disabled = true;
    try {
      await act(form);
      byId(`${id}-dialog`).close();
    } catch (error) {
      trouble(form, error);
    } finally { button.disabled = false; }
  });
}

onSubmit('create', async (form) => {
  const made = await api('POST', 'api/workspaces', createBody(form));
  state.workspaces.set(made.id, made);
  form.reset();
  location.hash = `#/w/${made.id}`;
  showList();
});

onSubmit('delete', async (form) => {
  const item = state.workspaces.get(form.dataset.id);
  if (item && form.confirmation.value !== item.name) return;
  await api('DELETE', workspacePath(form.dataset.id)).catch((error) => { if (error.code !== 'WORKSPACE_NOT_FOUND') throw error; });
});

onSubmit('stop', async (form) => {
  await api('POST', workspacePath(form.dataset.id, '/stop'));
});

function openDelete() {
  const item = state.workspaces.get(state.open);
  const form = byId('delete-form');
  form.reset();
  trouble(form, null);
  form.dataset.id = item.id;
  form.querySelector('[data-name]').textContent = item.name;
  byId('delete-submit').disabled = true;
  form.confirmation.oninput = () => { byId('delete-submit').disabled = form.confirmation.value !== item.name; };
  byId('delete-dialog').showModal();
}

function openStop() {
  const item = state.workspaces.get(state.open);
  const form = byId('stop-form');
  trouble(form, null);
  form.dataset.id = item.id;
  form.querySelector('[data-name]').textContent = item.name;
  form.querySelector('[data-words]').textContent = item.type === 'temporary' ? 'It is temporary: stopping deletes it with all of its data.' : 'What runs in it ends. Its files stay, and it can be started again.';
  byId('stop-submit').textContent = item.type === 'temporary' ? 'Stop and delete' : 'Stop';
  byId('stop-dialog').showModal();
}

// ----------------------------------------------------------------------------------------- routes

const log = new LogView();
const tasks = new TaskView();

/** Show what the address says: #/ or #/w/<id>[/logs|/agent[/<session>]]. */
function route() {
  const [, place, id, tab, session] = location.hash.split('/').map(decodeURIComponent);
  const wanted = place === 'w' && id ? id : null;
  if (wanted && state.loaded && !state.workspaces.has(wanted)) {
    say('There is no such workspace.', { bad: true, code: 'WORKSPACE_NOT_FOUND' });
    location.replace('#/');
    return;
  }
  if (wanted !== state.open) {
    if (state.open) link.unwatch(state.open);
    state.open = wanted;
    state.session = null;
    state.sessions = [];
    tasks.leave();
    byId('log-search').value = '';
    log.pattern = null;
    log.reset(wanted ? 'Nothing was printed yet.' : '');
    byId('facts').dataset.key = '';
    byId('sessions').replaceChildren();
    if (wanted) { link.watch(wanted); loadDetails(wanted); loadSessions(); }
    byId('main').scrollTop = 0;
    document.querySelector('.app').scrollTop = 0;
  }
  document.body.dataset.view = wanted ? 'workspace' : 'home';
  byId('home').hidden = Boolean(wanted);
  byId('workspace').hidden = !wanted;
  if (wanted) {
    showTab(tab === 'agent' ? 'agent' : 'logs', session || null);
    showWorkspace();
    showUsage(wanted);
  } else {
    document.title = 'Agent Backend';
    loadHealth();
  }
  showList();
}

function showTab(tab, session) {
  state.tab = tab;
  for (const name of ['logs', 'agent']) {
    byId(`tab-${name}`).setAttribute('aria-selected', String(name === tab));
    byId(`tab-${name}`).tabIndex = name === tab ? 0 : -1;
    byId(`${name}-panel`).hidden = name !== tab;
  }
  if (tab === 'logs') log.toEnd();
  if (tab !== 'agent' || session === state.session) return;
  state.session = session;
  byId('composer').elements.agent.disabled = Boolean(session);
  trouble(byId('composer'), null);
  if (session) tasks.follow(session);
  else tasks.leave();
  loadSessions();
}

// ----------------------------------------------------------------------------------------- events

function onEvent(event) {
  const { type, workspaceId, data, sessionId, timestamp } = event;
  if (type === 'status') return onStatus(workspaceId, data);
  if (type === 'error' && data.code === 'UNAUTHORIZED') return undefined; // the connection ends, and asks for the token
  if (type === 'error' && data.code === 'EVENTS_DROPPED') return log.add({ kind: 'note', text: data.message });
  if (workspaceId !== state.open) return undefined;
  if (sessionId) {
    if (type === 'result' || type === 'error' || data.runId || !state.sessions.some((item) => item.id === sessionId)) laterSessions();
    return undefined;
  }
  if (type === 'log') {
    return log.add({ time: timestamp, kind: { stderr: 'stderr', build: 'build' }[data.stream] ?? '', text: String(data.message ?? '') });
  }
  if (type === 'error') {
    log.add({ time: timestamp, kind: 'failure', text: `${data.code}: ${data.message}` });
    loadDetails(workspaceId);
  }
  return undefined;
}

function onStatus(id, data) {
  if (data.deleted) return forget(id);
  const item = state.workspaces.get(id);
  if (!item) return laterList();
  const changed = item.status !== data.status;
  Object.assign(item, { status: data.status }, data.name ? { name: data.name } : {});
  if (data.status !== 'running') state.usage.delete(id);
  showList();
  if (id === state.open && changed) { loadDetails(id); showWorkspace(); showUsage(id); }
  if (changed) laterHealth();
  return undefined;
}

function onLink(to, from) {
  const chip = byId('link');
  chip.dataset.state = to;
  chip.lastElementChild.textContent = to;
  byId('banner').hidden = to !== 'reconnecting';
  byId('banner').textContent = 'The connection to the server is lost. Reconnecting…';
  if (to !== 'live') return;
  loadList().then(route, () => {});
  loadHealth();
  if (from === 'reconnecting' && state.open) { loadDetails(state.open); loadSessions(); }
}

const link = new Link(onEvent, onLink);

async function poll() {
  if (!document.hidden && link.state === 'live') {
    const narrow = document.body.dataset.view === 'workspace' && matchMedia('(max-width: 760px)').matches;
    const ids = new Set(narrow ? [] : [...visible].slice(0, 30));
    if (state.open) ids.add(state.open);
    await Promise.all([...ids].filter((id) => state.workspaces.get(id)?.status === 'running').map(loadDetails));
  }
  setTimeout(poll, POLL);
}

// ------------------------------------------------------------------------------------------ input

function nextTheme() {
  const order = ['', 'light', 'dark'];
  const next = order[(order.indexOf(document.documentElement.dataset.theme ?? '') + 1) % order.length];
  if (next) { document.documentElement.dataset.theme = next; localStorage.setItem('theme', next); }
  else { delete document.documentElement.dataset.theme; localStorage.removeItem('theme'); }
  nameTheme();
  say(byId('theme-button').ariaLabel);
}

function nameTheme() {
  byId('theme-button').ariaLabel = `Colours: ${document.documentElement.dataset.theme ?? 'as the system'}`;
}

function move(by) {
  const all = [...byId('workspaces').querySelectorAll('a')];
  if (!all.length) return;
  const at = all.findIndex((node) => node.getAttribute('aria-current'));
  const next = all[at < 0 ? 0 : Math.min(all.length - 1, Math.max(0, at + by))];
  next.focus();
  location.hash = next.getAttribute('href');
}

const goTab = (tab) => { if (state.open) location.hash = `#/w/${state.open}/${tab}${tab === 'agent' && state.session ? `/${encodeURIComponent(state.session)}` : ''}`; };

const KEYS = {
  n: openCreate, t: nextTheme, '?': () => byId('help-dialog').showModal(), j: () => move(1), k: () => move(-1),
  l: () => goTab('logs'), a: () => goTab('agent'), p: () => { if (state.open && state.tab === 'logs') byId('log-pause').click(); },
  '/': () => (state.open && state.tab === 'logs' ? byId('log-search') : byId('filter')).focus(),
};

document.addEventListener('keydown', (event) => {
  if (document.querySelector('dialog[open]') || event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest('input, textarea, select');
  if (event.key === 'Escape') {
    if (typing) typing.blur();
    else if (state.open) location.hash = '#/';
  } else if (!typing && KEYS[event.key]) {
    event.preventDefault();
    KEYS[event.key]();
  }
});

for (const dialog of document.querySelectorAll('dialog')) {
  for (const button of dialog.querySelectorAll('[data-close]')) button.addEventListener('click', () => dialog.close());
}
for (const tab of document.querySelectorAll('[role=tab]')) {
  tab.addEventListener('click', () => goTab(tab.dataset.tab));
  tab.addEventListener('keydown', (event) => {
    if (!['ArrowLeft', 'ArrowRight'].includes(event.key)) return;
    const other = tab.dataset.tab === 'logs' ? 'agent' : 'logs';
    goTab(other);
    byId(`tab-${other}`).focus();
  });
}
const on = (id, event, call) => byId(id).addEventListener(event, call);
on('new-button', 'click', openCreate);
on('theme-button', 'click', nextTheme);
on('help-button', 'click', () => byId('help-dialog').showModal());
on('filter', 'input', showList);
on('ws-start', 'click', () => change('start'));
on('ws-restart', 'click', () => change('restart'));
on('ws-stop', 'click', openStop);
on('ws-delete', 'click', openDelete);
on('log-search', 'input', debounced(() => log.search(byId('log-search').value), 120));
on('log-pause', 'click', () => log.pause(!log.paused));
on('log-clear', 'click', () => { const { paused } = log; log.reset('Cleared.'); log.pause(paused); });
on('log-jump', 'click', () => log.toEnd());
on('log-wrap', 'change', () => { byId('log').classList.toggle('wrap', byId('log-wrap').checked); });
on('session-new', 'click', () => { location.hash = `#/w/${state.open}/agent`; byId('composer').task.focus(); });
on('composer', 'submit', (event) => { event.preventDefault(); runTask(); });
on('composer', 'keydown', (event) => { if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) { event.preventDefault(); runTask(); } });
on('task-cancel', 'click', () => api('POST', sessionPath(tasks.id, '/cancel')).then(() => say('The task is being cancelled'), complain));
window.addEventListener('hashchange', route);
window.addEventListener('online', () => link.hurry());
document.addEventListener('visibilitychange', () => { if (!document.hidden) link.hurry(); });

byId('log').classList.add('wrap');
nameTheme();
link.show('connecting');
link.open();
loadList().then(route, () => {});
setInterval(() => link.check(), 15000);
setInterval(() => { tick(); showList(); }, 10000);
setInterval(() => { if (!document.hidden && link.state === 'live') loadHealth(); }, HEALTH_POLL);
poll();
