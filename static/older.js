// What the log view does not hold: older lines, which are asked for, and the whole of it, to be downloaded.

import { byId, complain, on } from './page.js';
import { ApiError, api, token, workspacePath } from './api.js';
import { readEvents } from './streams.js';
import { neverRan, onChange, state } from './store.js';
import { linesOf, log } from './log.js';

const STEP = 5000; // lines asked for at a time
const MOST = 100000; // lines that the server gives at once
const MARK = 20; // lines by which the beginning of what is shown is known again
const PATIENCE = 15000; // ms

const keyOf = ({ time, kind, text }) => `${time} ${kind} ${text}`;

/** Return the lines of a workspace before those that are shown. */
async function linesBefore(id, shown, signal) {
  const tail = Math.min(MOST, shown.length + STEP);
  const mark = shown.slice(0, MARK).map(keyOf);
  const found = [];
  const keys = [];
  const isHere = () => mark.every((key, at) => key === keys.at(at - mark.length));
  for await (const line of linesOf(readEvents(workspacePath(id, `/events?tail=${tail}`), signal))) {
    found.push(line);
    keys.push(keyOf(line));
    if (keys.at(-1) === mark.at(-1) && isHere()) return found.slice(0, -mark.length);
    if (found.length > MOST) break;
  }
  return []; // the engine has thrown them away meanwhile
}

async function loadOlder() {
  const id = state.open;
  const shown = log.ownLines();
  const aborter = new AbortController();
  const late = setTimeout(() => aborter.abort(), PATIENCE);
  byId('log-older').disabled = true;
  try {
    const lines = await linesBefore(id, shown, aborter.signal);
    // Some are left out, and others may have come meanwhile; with far fewer than asked for, that was all.
    if (id === state.open) log.prepend(lines, { more: lines.length > 0.9 * STEP });
  } catch (error) {
    complain(aborter.signal.aborted ? new ApiError(0, { error: 'Older lines do not come.' }) : error);
  } finally {
    clearTimeout(late);
    aborter.abort();
    byId('log-older').disabled = false;
  }
}

function showDownload() {
  const item = state.workspaces.get(state.open);
  if (!item) return;
  byId('log-download').hidden = neverRan(item);
  byId('log-download').download = `${item.name}.log`;
  byId('log-download').href = workspacePath(item.id, '/logs');
}

/** A link sends no token: it takes a ticket instead. */
async function download(event) {
  if (!token()) return;
  event.preventDefault();
  try {
    const { ticket } = await api('POST', 'api/tickets');
    const link = byId('log-download').cloneNode();
    link.href = workspacePath(state.open, `/logs?ticket=${encodeURIComponent(ticket)}`);
    link.click();
  } catch (error) { complain(error); }
}

onChange('workspace', showDownload);
on('log-older', 'click', loadOlder);
on('log-download', 'click', download);
