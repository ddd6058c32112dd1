// What an agent says and does in a session, and how far it is.

import { byId, el, money, nextFrame, plural, span } from './page.js';
import { plainParts } from './ansi.js';
import { api, sessionPath } from './api.js';
import { followSession } from './streams.js';
import { loadSessions } from './store.js';

const ENDS = { '': 'Done', AGENT_CANCELLED: 'Cancelled' };
const LONGEST = 3000; // entries of a transcript that are shown
const NOTHING = 'Give an agent a task below. It works inside this workspace, goes on when you leave, '
  + 'and is found here again.';

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
    this.calls = [];
    this.box.replaceChildren(el('p', { className: 'empty' }, NOTHING));
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
    nextFrame(() => this.flush());
  }

  flush() {
    this.planned = false;
    const stick = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < 60;
    this.box.append(...this.queue.splice(0).map((event) => this.render(event)).filter(Boolean));
    while (this.box.childElementCount > LONGEST) this.box.firstElementChild.remove();
    if (stick) this.box.scrollTop = this.box.scrollHeight;
    this.show();
  }

  render({ type, data, sessionId }) {
    if (sessionId !== this.id) return null;
    if (type === 'log' && data.runId) return this.begin(data);
    if (type === 'progress') return this.step(data);
    if (type === 'message') return el('div', { className: 'said' }, ...plainParts(data.message));
    if (type === 'log') return this.did(data);
    if (type === 'result' || type === 'error') return this.end(type, data);
    return null;
  }

  begin(data) {
    this.running = true;
    this.calls = []; // rows of the calls of tools that have not ended, of which there may be several
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

  step({ step, total, message }) {
    this.bar(step, total, message);
    const words = el('b', {}, total ? `Step ${step} of ${total}` : `Step ${step}`);
    return el('div', { className: 'step' }, words, message ? ` · ${message}` : '');
  }

  did(data) {
    const words = data.tool ? `${data.tool}  ${data.message}` : data.message;
    const status = data.status ?? '';
    const begins = data.tool && status === 'started';
    const at = data.tool && !begins ? this.calls.findIndex((row) => row.dataset.title === words) : -1;
    if (at >= 0) {
      this.calls.splice(at, 1)[0].dataset.status = status;
      return null;
    }
    const row = el('div', { className: 'did', data: { status, title: words } }, ...plainParts(words));
    if (begins) this.calls.push(row);
    return row;
  }

  end(type, data) {
    if (type === 'error' && !data.runId) {
      return el('div', { className: 'end failed' }, el('code', {}, String(data.code)), ` ${data.message}`);
    }
    this.running = false;
    const failed = type === 'error';
    this.bar(1, 1, ENDS[failed ? data.code : ''] ?? 'Failed', failed); // why stands in the transcript
    loadSessions();
    const code = failed ? el('code', {}, `${data.code} `) : null;
    const words = plainParts(data.message || 'Done.');
    const className = failed ? 'end failed' : 'end';
    return el('div', { className }, code, ...words, el('small', {}, figures(data)));
  }

  bar(step, total, words, failed = false) {
    byId('progress').hidden = false;
    const track = byId('progress').querySelector('.track');
    const known = typeof total === 'number' && total > 0;
    track.className = `track${known ? '' : ' unknown'}${failed ? ' failed' : ''}`;
    track.firstElementChild.style.width = known ? `${Math.min(100, Math.max(0, (step / total) * 100))}%` : '';
    const values = { 'aria-valuemin': 0, 'aria-valuemax': total, 'aria-valuenow': step };
    for (const [name, value] of Object.entries(values)) {
      if (known) track.setAttribute(name, value);
      else track.removeAttribute(name);
    }
    const text = `${this.count(step, known ? total : null)}${words ?? ''}`;
    track.setAttribute('aria-valuetext', text);
    byId('progress').querySelector('.words').textContent = text;
  }

  count(step, total) {
    if (total) return this.running ? `${step} of ${total} · ` : '';
    return step ? `${step} done so far · ` : '';
  }

  show() {
    byId('task-cancel').hidden = !this.running;
    byId('task-run').disabled = this.running;
  }
}

/** Return what a task took, in words. */
function figures({ turns, durationMs, costUsd }) {
  return [turns ? plural(turns, 'turn') : '', durationMs ? span(durationMs / 1000) : '',
    typeof costUsd === 'number' ? money(costUsd) : ''].filter(Boolean).join(' · ');
}

export const tasks = new TaskView();
