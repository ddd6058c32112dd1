// The log of a workspace: capped, laid out in chunks, and put into the page once per frame.

import { byId, el, nextFrame, plural, speak } from './page.js';
import { ansi, lastState, marked } from './ansi.js';
import { LOG_TAIL } from './streams.js';

const CAP = 10000; // lines kept, beside older ones that were asked for
const MOST = 50000; // lines kept at most
const CHUNK = 250; // lines that are laid out, and dropped, together
const LONGEST = 8000; // characters of a line that are shown
const OWN = ['', 'stderr']; // kinds of lines that the container prints
const PER_FRAME = 3000; // lines put into the page per frame

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
      // It was moved up, and not only the lines below grew.
      else if (this.box.scrollTop < this.top) this.stick = false;
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
    this.cap = CAP;
    this.isCut = false; // whether there are older lines than those that are kept
    this.body.replaceChildren(el('p', { className: 'empty' }, empty));
    this.tell();
  }

  /** Say in the place of lines why there are none. */
  explain(empty) {
    this.body.querySelector('.empty')?.replaceChildren(empty);
  }

  add(line) {
    this.queue.push(line);
    if (this.queue.length > CAP) { this.queue.shift(); this.missed += 1; }
    if (this.planned) return;
    this.planned = true;
    nextFrame(() => this.flush());
  }

  flush() {
    this.planned = false;
    if (this.paused) { this.tell(); return; }
    const left = `${plural(this.missed, 'line')} came too fast to be shown.`;
    if (this.missed) this.put([{ kind: 'note', text: left }]);
    this.missed = 0;
    this.put(this.queue.splice(0, PER_FRAME));
    if (this.queue.length) { this.planned = true; nextFrame(() => this.flush()); }
  }

  put(lines) {
    if (!lines.length) return;
    if (!this.chunks.length) this.body.replaceChildren();
    this.fill(this.chunks, lines, (node) => this.body.append(node));
    this.dropOldest();
    if (this.stick) this.toEnd();
    this.tell();
  }

  /** Put lines into the last of some chunks, and into new ones behind it. */
  fill(chunks, lines, place) {
    for (const line of lines) {
      let chunk = chunks.at(-1);
      if (!chunk || chunk.lines.length >= CHUNK) {
        chunk = { lines: [], node: el('div', { className: 'chunk' }) };
        chunks.push(chunk);
        place(chunk.node);
      }
      chunk.lines.push(line);
      this.count += 1;
      this.render(chunk, line);
    }
  }

  /** Put older lines above the others, which stay where they are to the eye. */
  prepend(lines, { more }) {
    const chunks = [];
    const nodes = document.createDocumentFragment();
    const below = this.box.scrollHeight - this.box.scrollTop;
    this.fill(chunks, lines, (node) => nodes.append(node));
    this.body.prepend(nodes);
    this.chunks.unshift(...chunks);
    this.cap += lines.length;
    this.isCut = more;
    this.box.scrollTop = this.box.scrollHeight - below;
    this.tell();
  }

  /** Return the lines that are shown and are the container's own. */
  ownLines() {
    return this.chunks.flatMap((chunk) => chunk.lines).filter((line) => OWN.includes(line.kind));
  }

  dropOldest() {
    while (this.count - this.chunks[0].lines.length >= this.cap) {
      this.isCut = true;
      const dropped = this.chunks.shift();
      this.count -= dropped.lines.length;
      if (this.pattern) this.found -= dropped.node.childElementCount;
      dropped.node.remove();
    }
  }

  render(chunk, line) {
    line.parts ??= ansi(lastState(shortened(line.text)));
    const plain = this.pattern && line.parts.map((part) => part.text).join('');
    const found = this.pattern ? [...plain.matchAll(this.pattern)] : [];
    if (this.pattern && !found.length) return;
    this.found += this.pattern ? 1 : 0;
    const text = el('span');
    text.append(...marked(line.parts, found.map((match) => [match.index, match.index + match[0].length])));
    const row = el('div', { className: line.kind ? `line ${line.kind}` : 'line' });
    if (line.time) {
      row.append(el('time', { dateTime: line.time }, new Date(line.time).toTimeString().slice(0, 8)));
    }
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
    if (text) speak(byId('log-count').textContent);
  }

  pause(paused) {
    this.paused = paused;
    if (!paused) this.flush();
    this.tell();
  }

  toEnd() {
    this.box.scrollTop = this.box.scrollHeight;
    this.top = this.box.scrollTop;
    this.stick = true;
    byId('log-jump').hidden = true;
  }

  tell() {
    const all = `${this.isCut ? 'last ' : ''}${plural(this.count, 'line')}`;
    const words = [this.pattern ? `${this.found} of ${all}` : all];
    byId('log-older').hidden = !this.isCut || this.count >= MOST;
    if (this.paused) words.push(`paused, ${this.queue.length + this.missed} new`);
    byId('log-count').textContent = words.join(' · ');
    byId('log-pause').textContent = this.paused ? 'Go on' : 'Pause';
    byId('log-pause').setAttribute('aria-pressed', String(this.paused));
  }
}

const shortened = (text) => (
  text.length > LONGEST ? `${text.slice(0, LONGEST)} … ${text.length - LONGEST} more characters` : text);

const isLine = ({ type, sessionId }) => type === 'log' && !sessionId;

function lineOf({ data, timestamp }) {
  const kind = { stderr: 'stderr', build: 'build' }[data.stream] ?? '';
  return { time: timestamp, kind, text: String(data.message ?? '') };
}

/** Yield the lines of the container that are among events, as the view shows them. */
export async function* linesOf(events) {
  for await (const event of events) {
    const line = lineOf(event);
    if (isLine(event) && OWN.includes(line.kind)) yield line;
  }
}

export const log = new LogView();

let told = 0; // lines that were old when the log was begun
let begun = ''; // when that was

/** Begin with another log, or with none. */
export function beginLog(empty) {
  log.pattern = null;
  log.reset(empty);
  told = 0;
  begun = '';
}

/** Show an event of the open workspace that belongs into its log. The first of all is a status. */
export function logEvent(event) {
  const { type, data, timestamp } = event;
  if (type === 'status') begun ||= timestamp;
  else if (type === 'error') {
    log.add({ time: timestamp, kind: 'failure', text: `${data.code}: ${data.message}` });
  } else if (isLine(event)) {
    const line = lineOf(event);
    if (timestamp <= begun && OWN.includes(line.kind)) told += 1;
    if (told === LOG_TAIL) log.isCut = true;
    log.add(line);
  }
}
