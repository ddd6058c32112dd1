// What the page knows of workspaces, sessions and the server. Who shows a part of it listens for its changes.

import { HISTORY, debounced } from './page.js';
import { api, workspacePath } from './api.js';
import { offers } from './offers.js';

const USAGE = '/api/usage';

export const state = {
  workspaces: new Map(), // id -> as a list shows it
  details: new Map(), // id -> with everything
  usage: new Map(), // id -> the last measurements
  templates: [],
  health: null,
  sessions: [], // of the open workspace, or of all
  loaded: false,
  open: null, // id of the workspace that is shown
  tab: 'logs',
  session: undefined, // id of the session that is shown, null for a new one, undefined before any was
};

const changes = new EventTarget();

/** Call `show(detail)` after: list, workspace, usage, health, build, sessions, route; arrived or gone. */
export const onChange = (what, show) => changes.addEventListener(what, ({ detail }) => show(detail));
export const changed = (what, detail) => changes.dispatchEvent(new CustomEvent(what, { detail }));

// Workspaces

export async function loadList() {
  const found = await api('GET', 'api/workspaces');
  const known = new Set(found.map((item) => item.id));
  for (const id of [...state.workspaces.keys()]) if (!known.has(id)) forget(id);
  for (const item of found) state.workspaces.set(item.id, { ...state.workspaces.get(item.id), ...item });
  state.loaded = true;
  changed('list');
}

/** Load the list, and tell when it is there. */
export const loadAll = () => loadList().then(() => changed('arrived'), () => {});
const laterList = debounced(loadAll, 150);

export async function loadDetails(id) {
  try {
    takeDetails(await api('GET', workspacePath(id)));
  } catch (error) {
    if (error.code === 'WORKSPACE_NOT_FOUND') forget(id);
  }
}

/** Take note of all that is known of a workspace. */
export function takeDetails(found) {
  const { id, status, resources } = found;
  state.details.set(id, found);
  if (state.workspaces.has(id)) Object.assign(state.workspaces.get(id), { ...found, resources: undefined });
  if (status !== 'running') state.usage.delete(id);
  else if (resources && !offers('GET', USAGE)) keepUsage(id, resources);
  changed('usage', id);
  if (id === state.open) changed('workspace');
}

/** Look at what running workspaces use: at all at once if the server can tell it, else at each of these. */
export async function loadUsage(ids) {
  const running = [...state.workspaces.values()].filter((item) => item.status === 'running');
  if (!running.length) return;
  if (!offers('GET', USAGE)) {
    await Promise.all(running.filter((item) => ids.has(item.id)).map((item) => loadDetails(item.id)));
    return;
  }
  const [told] = await Promise.all([api('GET', 'api/usage').catch(() => ({})), loadOpen()]);
  for (const { id } of running) {
    if (!told[id]) continue;
    keepUsage(id, told[id]);
    changed('usage', id);
  }
}

const isRunning = (id) => state.workspaces.get(id)?.status === 'running';
const loadOpen = () => (isRunning(state.open) ? loadDetails(state.open) : null);

/** Tell of a workspace whose status is error whether there is nothing of it that could be started. */
export const neverRan = (item) => item.status === 'error' && item.codeServerPort === null;

function keepUsage(id, resources) {
  state.usage.set(id, [...state.usage.get(id) ?? [], resources].slice(-HISTORY));
}

/** Take note of a workspace as an answer has it. */
export function take(item) {
  state.workspaces.set(item.id, Object.assign(state.workspaces.get(item.id) ?? {}, item));
  changed('list');
  if (item.id === state.open) changed('workspace');
}

/** Take note of a status that was told. */
export function takeStatus(id, { status, name, deleted }) {
  const item = state.workspaces.get(id);
  if (deleted) { forget(id); return; }
  if (!item) { laterList(); return; }
  const differs = item.status !== status;
  Object.assign(item, { status }, name ? { name } : {});
  if (status !== 'running') state.usage.delete(id);
  changed('list');
  if (!differs) return;
  laterHealth();
  if (id !== state.open) return;
  loadDetails(id);
  changed('workspace');
  changed('usage', id);
}

function forget(id) {
  const item = state.workspaces.get(id);
  for (const map of [state.workspaces, state.details, state.usage]) map.delete(id);
  if (item) changed('gone', item);
  changed('list');
  laterHealth();
}

// Sessions

export async function loadSessions() {
  const id = state.open;
  const query = id ? `?workspaceId=${encodeURIComponent(id)}` : '';
  const found = await api('GET', `api/agent/sessions${query}`).catch(() => null);
  if (!found || id !== state.open) return;
  state.sessions = found;
  changed('sessions');
}

export const laterSessions = debounced(loadSessions, 200);

// The server

export async function loadTemplates() {
  state.templates = await api('GET', 'api/templates').catch(() => state.templates);
}

/** Ask the server how it is; on the home page also for what else that shows. */
export async function loadHealth({ brief = false } = {}) {
  try {
    state.health = await api('GET', 'health');
    if (!state.open && !brief) await Promise.all([loadTemplates(), loadSessions()]);
    changed('health');
  } catch (failure) {
    changed('health', failure);
  }
}

export const laterHealth = debounced(loadHealth, 400);

export const problems = () => state.health?.problems ?? [];

/** Return the templates with the state of their images as it was last told. */
export function templates() {
  const told = state.health?.templates ?? {};
  return state.templates.map((item) => ({ ...item, ...told[item.name] }));
}

/** Return [{name, ready, reason}] of the agents, nothing where the server does not say. */
export function agents() {
  return Object.entries(state.health?.agents ?? {}).map(([name, item]) => ({ name, ...item }));
}

export const defaultTemplate = () => templates().find((item) => item.default);

/** Return in words how an image is. A server that does not see its engine takes all of them for missing. */
export function imageWords(image) {
  if (image.state !== 'missing') return image.state;
  return state.health?.docker === 'disconnected' ? 'not known' : 'not built yet';
}
