// The dashboard begins here: what the address says is shown, and what the server tells goes to who shows it.
// It talks to the API as any other client does, and to nothing else.

import { banner, byId, el, say, sleep, tick } from './page.js';
import { Link, pause } from './streams.js';
import * as store from './store.js';
import { beginLog, log, logEvent } from './log.js';
import './older.js';
import { tasks } from './tasks.js';
import { showSession } from './sessions.js';
import { showList, visible } from './list.js';
import { showUsage } from './workspace.js';
import './facts.js';
import { currentBuild, forgetBuild, takeBuildLine } from './build.js';
import { loadOffers } from './offers.js';
import './home.js';
import './first.js';
import { TABS } from './keys.js';

const POLL = 2500; // ms between looks at the resources of workspaces
const MOST = 30; // rows whose resources are looked at

const FAILURES = { 0: 'The server does not answer', 403: 'The server refuses this page' };
const LOST = 'The connection to the server is lost. Reconnecting…';
const NEVER_LIVE = 'What happens does not show by itself here, because the WebSocket agent/ws does not open. '
  + 'If there is a proxy in between, it must pass WebSockets.';

const { state } = store;

// What is shown

const decoded = (part) => { try { return decodeURIComponent(part); } catch { return part; } };

/** Show what the address says: #/ or #/w/<id>[/logs|/terminal|/agent[/<session>]]. */
function route() {
  const [, place, id, tab, session] = location.hash.split('/').map(decoded);
  const wanted = place === 'w' && id ? id : null;
  if (wanted && state.loaded && !state.workspaces.has(wanted)) {
    say('There is no such workspace.', { bad: true, code: 'WORKSPACE_NOT_FOUND' });
    location.replace('#/');
    return;
  }
  if (wanted !== state.open) open(wanted);
  document.body.dataset.view = wanted ? 'workspace' : 'home';
  byId('home').hidden = Boolean(wanted);
  byId('workspace').hidden = !wanted;
  if (wanted) {
    showTab(TABS.includes(tab) ? tab : 'logs', session || null);
    store.changed('workspace');
    showUsage(wanted);
  } else {
    document.title = 'Agent Backend';
    store.loadHealth();
  }
  showList();
  store.changed('route');
}

/** Leave the workspace that is shown, and begin with another, or with none. */
function open(wanted) {
  // With neither a tab nor a session, which both begin anew when they are shown.
  Object.assign(state, { open: wanted, tab: null, session: undefined, sessions: [] });
  tasks.leave();
  byId('log-search').value = '';
  beginLog(wanted ? 'Nothing was printed yet.' : '');
  byId('facts').dataset.key = '';
  byId('sessions').replaceChildren();
  byId('terminal-panel').replaceChildren();
  listen({ anew: true });
  if (wanted) {
    store.loadDetails(wanted);
    store.loadSessions();
  }
  byId('main').scrollTop = 0;
  document.querySelector('.app').scrollTop = 0;
}

/** Hear the events of the workspace that is shown, or on the home page of one that waits for its image. */
function listen({ anew = false } = {}) {
  const waiting = () => [...state.workspaces.values()].find((item) => item.status === 'creating');
  const wanted = state.open ?? waiting()?.id ?? null;
  if (wanted === listened && !anew) return;
  if (listened) link.unwatch(listened);
  forgetBuild();
  if (wanted) link.watch(wanted);
  listened = wanted;
}

function showTab(tab, session) {
  const isShown = tab === state.tab; // so only the list has come anew: neither scroll nor focus may move
  state.tab = tab;
  for (const name of TABS) {
    byId(`tab-${name}`).setAttribute('aria-selected', String(name === tab));
    byId(`tab-${name}`).tabIndex = name === tab ? 0 : -1;
    byId(`${name}-panel`).hidden = name !== tab;
  }
  if (tab === 'agent') showSession(session);
  else if (isShown) return;
  else if (tab === 'logs') log.toEnd();
  else showTerminal();
}

/** Show the terminal: a page of its own, since its styles need more leave than this one gives. */
function showTerminal() {
  const panel = byId('terminal-panel');
  if (panel.firstChild) panel.firstChild.focus();
  else panel.append(el('iframe', { src: `terminal#${state.open}`, title: 'Terminal; Ctrl+F6 leaves it' }));
}

// What comes

function onEvent(event) {
  const { type, workspaceId, data, sessionId } = event;
  if (type === 'status') onStatus(event);
  else if (type === 'error' && data.code === 'UNAUTHORIZED') return; // the connection ends, and asks for it
  else if (type === 'error' && data.code === 'EVENTS_DROPPED') log.add({ kind: 'note', text: data.message });
  else if (type === 'log' && data.stream === 'build') onBuildLine(event);
  else if (workspaceId !== state.open) return;
  else if (sessionId) onTaskEvent(event);
  else if (type === 'log' || type === 'error') {
    logEvent(event);
    if (type === 'error') store.loadDetails(workspaceId);
  }
}

function onStatus(event) {
  store.takeStatus(event.workspaceId, event.data);
  if (event.workspaceId === state.open) logEvent(event);
}

function onBuildLine(event) {
  takeBuildLine(event);
  if (event.workspaceId === state.open) logEvent(event);
}

function onTaskEvent({ type, data, sessionId }) {
  const known = state.sessions.some((item) => item.id === sessionId);
  if (type === 'result' || type === 'error' || data.runId || !known) store.laterSessions();
}

function onLink(to, from) {
  const chip = byId('link');
  chip.dataset.state = to;
  chip.lastElementChild.textContent = to;
  const lost = link.wasLive ? LOST : NEVER_LIVE;
  banner('link', to === 'reconnecting' ? lost : '');
  if (to !== 'live') return;
  store.loadAll();
  store.loadHealth();
  if (from === 'reconnecting' && state.open) {
    store.loadDetails(state.open);
    store.loadSessions();
  }
}

const link = new Link(onEvent, onLink);
let listened = null; // id of the workspace whose events are heard

function onGone(item) {
  if (state.open !== item.id) return;
  say(`${item.name} is deleted`);
  location.hash = '#/';
}

const isRestless = () => state.health?.docker === 'disconnected' || currentBuild() !== null;

async function poll() {
  if (!document.hidden && link.state === 'live') {
    const narrow = state.open && matchMedia('(max-width: 760px)').matches; // the list is not shown then
    const ids = new Set(narrow ? [] : [...visible].slice(0, MOST));
    if (state.open) ids.add(state.open);
    if (isRestless()) store.loadHealth({ brief: true });
    await store.loadUsage(ids);
  }
  setTimeout(poll, POLL);
}

/** Do something now and then, as long as the page is seen. */
const every = (ms, call) => setInterval(() => { if (!document.hidden) call(); }, ms);

function lookAgain() {
  store.loadHealth();
  if (link.state !== 'live') store.loadAll();
}

// The beginning

/** Nothing is drawn before the server has given the list: until then it may refuse, or want its token. */
async function start() {
  // Some of what shows depends on it, and nothing waits for it.
  loadOffers().then(() => ['workspace', 'health'].map((what) => store.changed(what)));
  for (let tries = 0; !state.loaded; tries += 1) {
    await store.loadList().catch((error) => {
      window.sayFailure(FAILURES[error.status] ?? 'The server fails', error.message, error.code);
      return sleep(pause(tries));
    });
  }
  byId('failure').hidden = true;
  route();
  link.show('connecting');
  link.open();
  every(15000, () => link.check());
  every(10000, () => { tick(); showList(); lookAgain(); });
  poll();
}

store.onChange('arrived', route);
store.onChange('list', () => listen());
store.onChange('gone', onGone);
window.addEventListener('hashchange', route);
window.addEventListener('online', () => link.hurry());
document.addEventListener('visibilitychange', () => {
  if (document.hidden || !state.loaded) return;
  link.wake();
  lookAgain();
});
start();
