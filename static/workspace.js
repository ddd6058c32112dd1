// The open workspace: its head, what went wrong with it, and what it uses.

import { byId, bytes, complain, on, sparkline } from './page.js';
import { api, workspacePath } from './api.js';
import { offers } from './offers.js';
import { neverRan, onChange, state, take } from './store.js';
import { buildWords, currentBuild } from './build.js';
import { log } from './log.js';
import { isWeb } from './facts.js';
import { RETRY, openRetry } from './forms.js';

function showWorkspace() {
  const item = state.workspaces.get(state.open);
  if (!item) return;
  const more = state.details.get(item.id) ?? {};
  showHead(item, more);
  showError(item, more);
}

function showHead(item, more) {
  const running = item.status === 'running';
  document.title = `${item.name} · Agent Backend`;
  byId('ws-name').textContent = item.name;
  byId('ws-id').textContent = item.id;
  byId('ws-status').textContent = item.status;
  byId('ws-status').dataset.status = item.status;
  const url = running && isWeb(more.codeServerUrl) ? more.codeServerUrl : null;
  byId('ws-editor').hidden = !url;
  if (url) byId('ws-editor').href = url;
  byId('ws-start').hidden = !['stopped', 'error'].includes(item.status) || neverRan(item);
  byId('ws-stop').hidden = !running;
  byId('ws-restart').hidden = !running;
  byId('ws-delete').disabled = item.status === 'deleting';
}

/** Say why the status is error; its first line tells what failed, the others what a program said of it. */
function showError(item, more) {
  const failed = item.status === 'error' && Boolean(more.error);
  byId('ws-failed').hidden = !failed;
  if (!failed) return;
  if (neverRan(item)) log.explain('Its container is gone. What it printed last stands above.');
  const [first, ...words] = more.error.replace(/^(The clone failed): /, '$1.\n').split('\n');
  byId('ws-error-title').textContent = first;
  byId('ws-error').hidden = !words.length;
  byId('ws-error').textContent = words.join('\n');
  byId('ws-retry').hidden = !neverRan(item) || !offers('POST', RETRY);
}

/** Say above the log of a workspace that is being made how far its image is. */
function showBuilding() {
  const build = state.workspaces.get(state.open)?.status === 'creating' ? currentBuild() : null;
  byId('ws-building').hidden = !build;
  byId('ws-building').textContent = build ? `Building ${buildWords(build)}` : '';
}

export function showUsage(id) {
  if (id !== state.open) return;
  const history = state.usage.get(id) ?? [];
  const now = history.at(-1);
  const percents = history.map((item) => item.cpuPercent);
  byId('charts').hidden = !now;
  showChart('cpu', percents, Math.max(100, ...percents), now && `${now.cpuPercent.toFixed(1)} %`);
  showChart('memory', history.map((item) => item.memoryUsage), now?.memoryLimit || 1,
    now && `${bytes(now.memoryUsage)} of ${bytes(now.memoryLimit)}`);
}

function showChart(name, values, highest, text) {
  const chart = byId(`chart-${name}`);
  chart.querySelector('b').textContent = text || '–';
  sparkline(chart.querySelector('svg'), values, highest);
}

async function change(verb) {
  try {
    take(await api('POST', workspacePath(state.open, `/${verb}`)));
  } catch (error) { complain(error); }
}

onChange('workspace', showWorkspace);
onChange('usage', showUsage);
for (const what of ['build', 'health', 'workspace']) onChange(what, showBuilding);
setInterval(() => { if (!document.hidden && state.open) showBuilding(); }, 1000);
on('ws-retry', 'click', openRetry);
on('ws-start', 'click', () => change('start'));
on('ws-restart', 'click', () => change('restart'));
