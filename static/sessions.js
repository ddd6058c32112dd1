// The sessions of the open workspace, and the form that gives an agent a task.

import { ago, byId, complain, el, on, say } from './page.js';
import { trouble } from './fields.js';
import { api, sessionPath } from './api.js';
import { agents, laterSessions, loadSessions, onChange, state } from './store.js';
import { tasks } from './tasks.js';

/** Show a session, or the place for a new one. */
export function showSession(session) {
  if (session === state.session) return;
  state.session = session;
  byId('composer').elements.agent.disabled = Boolean(session);
  trouble(byId('composer'), null);
  if (session) tasks.follow(session);
  else tasks.leave();
  loadSessions();
}

export const goSession = (workspaceId, id) => {
  location.hash = `#/w/${workspaceId}/agent/${encodeURIComponent(id)}`;
};

function showSessions() {
  if (!state.open) return;
  byId('sessions').replaceChildren(...state.sessions.slice().reverse().map((item) => {
    const onclick = () => goSession(state.open, item.id);
    const button = el('button', { type: 'button', title: item.id, onclick },
      el('i', { className: 'dot task', data: { status: item.state } }), el('span', {}, item.title),
      el('small', {}, `${item.agent} · ${item.state} · ${ago(item.lastActivityAt)}`));
    if (item.id === state.session) button.setAttribute('aria-current', 'true');
    return el('li', {}, button);
  }));
  const running = state.sessions.filter((item) => item.state === 'running').length;
  byId('agent-count').hidden = !running;
  byId('agent-count').textContent = running;
}

/** Say beside the button what keeps the chosen agent from working; where none is chosen, any that can't. */
function showReason() {
  const session = state.sessions.find((item) => item.id === state.session);
  const chosen = session?.agent ?? byId('composer').elements.agent.value.trim();
  const failing = agents().filter(({ name, ready }) => !ready && (!chosen || name === chosen));
  const words = failing.map(({ name, reason }) => `${name} is not ready${reason ? `: ${reason}` : '.'}`);
  byId('agent-reason').textContent = words.join('\n');
}

async function runTask() {
  if (byId('task-run').disabled) return; // the keys do what the button does
  const form = byId('composer');
  const place = location.hash;
  const body = { workspaceId: state.open, task: form.task.value };
  if (state.session) body.sessionId = state.session;
  else if (form.agent.value.trim()) body.agent = form.agent.value.trim();
  if (form.timeout.value.trim()) body.timeout = Number(form.timeout.value.trim());
  try {
    byId('task-run').disabled = true;
    const told = await api('POST', 'api/agent/execute', body);
    if (form.task.value === body.task) form.task.value = '';
    if (location.hash !== place) { tasks.show(); return; } // nobody is taken from where they went meanwhile
    trouble(form, null);
    if (told.sessionId === state.session && tasks.id === state.session) laterSessions();
    else goSession(told.workspaceId, told.sessionId);
  } catch (error) {
    if (location.hash === place) trouble(form, error);
    else complain(error);
    tasks.show();
  }
}

onChange('sessions', showSessions);
for (const what of ['health', 'route', 'sessions']) onChange(what, showReason);
byId('composer').elements.agent.addEventListener('input', showReason);
on('session-new', 'click', () => {
  location.hash = `#/w/${state.open}/agent`;
  byId('composer').task.focus();
});
on('composer', 'submit', (event) => { event.preventDefault(); runTask(); });
on('composer', 'keydown', (event) => {
  if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  runTask();
});
on('task-cancel', 'click', () => {
  api('POST', sessionPath(tasks.id, '/cancel')).then(() => say('The task is being cancelled'), complain);
});
