// The server: how it is, its ports, its templates, and the last sessions of all workspaces.

import { ago, banner, byId, el, span } from './page.js';
import { agents, imageWords, onChange, problems, state, templates } from './store.js';

const LAST = 20; // sessions that are shown
const KINDS_OF_PORTS = { codeServer: 'Editors', ssh: 'SSH', custom: 'Others' };

const card = (name, value) => el('div', { className: 'card' }, el('small', {}, name), el('b', {}, value));
const cell = (...content) => el('td', {}, ...content);
const narrowCell = (...content) => el('td', { className: 'nowrap' }, ...content);

export function showHome() {
  if (!state.health) return;
  showEngine(state.health);
  if (state.open) return;
  byId('agents-part').hidden = !agents().length;
  byId('agent-list').replaceChildren(...agents().map(agentRow));
  byId('cards').replaceChildren(...cards(state.health));
  byId('port-meters').replaceChildren(...Object.entries(state.health.ports ?? {}).map(meter));
  byId('templates').replaceChildren(...templates().map(templateRow));
  showSessions();
}

function showEngine(health) {
  const chip = byId('engine');
  chip.dataset.state = health.docker;
  chip.lastElementChild.textContent = health.docker === 'connected' ? 'Docker' : 'Docker disconnected';
  chip.title = `Docker is ${health.docker}; ${health.status}`;
  banner('problems', problems().join('\n'));
}

function cards(health) {
  const counts = Object.entries(health.workspaces ?? {}).filter(([name, count]) => name === 'total' || count);
  return [card('Status', health.status), card('Docker', health.docker), card('Uptime', span(health.uptime)),
    card('Version', health.version),
    ...counts.map(([name, count]) => card(name === 'total' ? 'Workspaces' : name, String(count)))];
}

function meter([kind, { used, total }]) {
  const fill = el('i');
  fill.style.width = `${(used / total) * 100}%`;
  const words = `${KINDS_OF_PORTS[kind] ?? kind}: ${used} of ${total} in use`;
  return el('div', { className: 'meter' }, words, el('div', { className: 'track' }, fill));
}

function templateRow(item) {
  const data = { status: item.state };
  const badge = el('span', { className: 'badge', title: item.image, data }, imageWords(item));
  return el('tr', {}, narrowCell(el('b', {}, item.name), item.default ? el('small', {}, ' default') : null),
    narrowCell(badge, item.buildingSince ? el('small', {}, ` since ${ago(item.buildingSince)}`) : null),
    cell(item.description, item.error ? el('small', {}, ` ${item.error}`) : null));
}

function agentRow({ name, ready, reason }) {
  const data = { status: ready ? 'ready' : 'failed' };
  const badge = el('span', { className: 'badge', data }, ready ? 'ready' : 'not ready');
  return el('tr', {}, narrowCell(el('b', {}, name)), narrowCell(badge), cell(reason ?? ''));
}

function showSessions() {
  const recent = state.sessions.slice(-LAST).reverse();
  byId('no-sessions').hidden = recent.length > 0;
  byId('all-sessions').closest('.scroll').hidden = !recent.length;
  byId('all-sessions').replaceChildren(...recent.map((item) => {
    const href = `#/w/${item.workspaceId}/agent/${encodeURIComponent(item.id)}`;
    const badge = el('span', { className: 'badge task', data: { status: item.state } }, item.state);
    return el('tr', {}, cell(el('a', { href, title: item.id }, item.title)),
      cell(state.workspaces.get(item.workspaceId)?.name ?? item.workspaceId), cell(item.agent), cell(badge),
      narrowCell(ago(item.lastActivityAt)));
  }));
}

onChange('health', (failure) => {
  if (failure) byId('engine').dataset.state = 'unknown';
  else showHome();
});
onChange('sessions', showHome);
