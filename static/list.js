// The list of workspaces.

import { ago, byId, bytes, el, on, sparkline, svg } from './page.js';
import { onChange, state } from './store.js';

const rows = new Map(); // id -> its nodes in the list

/** The ids of the rows that are in view. */
export const visible = new Set();
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) visible[entry.isIntersecting ? 'add' : 'delete'](entry.target.dataset.id);
});

function makeRow(id) {
  const box = { viewBox: '0 0 100 18', preserveAspectRatio: 'none', 'aria-hidden': 'true' };
  const graph = svg('svg', box, svg('polyline'));
  const parts = {
    dot: el('i', { className: 'dot' }), name: el('span', { className: 'name' }),
    about: el('span', { className: 'about' }), figure: el('span'), graph,
  };
  const spark = el('span', { className: 'spark' }, graph, parts.figure);
  const link = el('a', { href: `#/w/${id}` }, parts.dot, parts.name, parts.about, spark);
  const row = { ...parts, link, item: el('li', { data: { id } }, link) };
  watcher.observe(row.item);
  rows.set(id, row);
  return row;
}

function dropRow(id, row) {
  watcher.unobserve(row.item);
  row.item.remove();
  rows.delete(id);
  visible.delete(id);
}

function fillRow(row, item) {
  const running = item.status === 'running';
  const about = running ? [item.type, item.template, ago(item.createdAt)]
    : [item.status, item.type, item.template];
  if (item.node) about.push(item.node);
  if (item.expiresAt) about.push(`ends ${ago(item.expiresAt)}`);
  row.dot.dataset.status = item.status;
  row.name.textContent = item.name;
  row.about.textContent = about.join(' · ');
  row.link.title = `${item.name}: ${item.status}, ${item.type}, ${item.template}`;
  row.graph.style.visibility = running ? '' : 'hidden';
  if (!running) row.figure.textContent = '';
  if (item.id === state.open) row.link.setAttribute('aria-current', 'page');
  else row.link.removeAttribute('aria-current');
}

const age = (item) => -Date.parse(item.createdAt);
const words = (item) => (
  [item.name, item.status, item.type, item.template, item.node, item.id].join(' ').toLowerCase());

export function showList() {
  const wanted = byId('filter').value.trim().toLowerCase();
  const all = [...state.workspaces.values()].sort((a, b) => age(a) - age(b));
  const shown = all.filter((item) => words(item).includes(wanted));
  for (const [id, row] of rows) if (!state.workspaces.has(id)) dropRow(id, row);
  const list = byId('workspaces');
  shown.forEach((item, at) => {
    const row = rows.get(item.id) ?? makeRow(item.id);
    fillRow(row, item);
    if (list.children[at] !== row.item) list.insertBefore(row.item, list.children[at] ?? null);
  });
  while (list.children.length > shown.length) list.lastElementChild.remove();
  byId('filter').parentElement.hidden = !all.length;
  byId('no-workspaces').hidden = shown.length > 0;
  byId('no-workspaces').textContent = whyEmpty(all.length);
}

function whyEmpty(count) {
  if (count) return 'No workspace fits.';
  return state.loaded ? 'No workspace yet.' : 'Loading…';
}

function showUsage(id) {
  const history = state.usage.get(id);
  const row = rows.get(id);
  if (!row || !history) return;
  const percents = history.map((item) => item.cpuPercent);
  const now = history.at(-1);
  sparkline(row.graph, percents, Math.max(100, ...percents));
  row.figure.textContent = `${Math.round(now.cpuPercent)} % · ${bytes(now.memoryUsage)}`;
  row.figure.title = 'CPU, in percent of one core, and memory';
}

/** Open the workspace that stands so many rows below the open one. */
export function move(by) {
  const all = [...byId('workspaces').querySelectorAll('a')];
  if (!all.length) return;
  const at = all.findIndex((node) => node.getAttribute('aria-current'));
  const next = all[at < 0 ? 0 : Math.min(all.length - 1, Math.max(0, at + by))];
  next.focus();
  location.hash = next.getAttribute('href');
}

onChange('list', showList);
onChange('usage', showUsage);
on('filter', 'input', showList);
