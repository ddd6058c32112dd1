// The dialogs that make, stop and delete a workspace.

import { byId, el, on, plural } from './page.js';
import { lines, number, onSubmit, pairs, trouble } from './fields.js';
import { api, workspacePath } from './api.js';
import { fieldsOf, offers } from './offers.js';
import { defaultTemplate, imageWords, loadTemplates, onChange, state, take, templates } from './store.js';

export const RETRY = '/api/workspaces/{}/retry';
const GIT = '/api/workspaces/{}/git';
const MIB = 2 ** 20;
const STOPPING = 'What runs in it ends. Its files stay, and it can be started again.';
const STOPPING_TEMPORARY = 'It is temporary: stopping deletes it with all of its data.';

// Id -> what its form had. The server does not tell all of it again: not its variables, nor a URL's password.
const sent = new Map();

/** Return the body that a form asks for; what is left empty is left out. */
function createBody(form) {
  const body = { name: form.name.value.trim(), type: form.elements.type.value };
  const put = (name, value) => {
    const text = form.elements[name].value;
    if (text.trim()) body[name] = value(text);
  };
  for (const name of ['template', 'gitUrl', 'gitBranch', 'gitToken']) put(name, (text) => text.trim());
  for (const name of ['ttl', 'cpus']) put(name, number);
  put('memory', (text) => (Number(text) > 0 ? Math.round(Number(text) * MIB) : text));
  put('ports', (text) => text.trim().split(/[\s,]+/).map(number));
  for (const name of ['env', 'labels']) put(name, pairs);
  put('sshPublicKeys', lines);
  if (!form.ssh.checked) body.ssh = false;
  return body;
}

/** Return the body of another try: what it may change. With a URL, what is left out is taken away. */
function retryBody(form) {
  const made = createBody(form);
  const names = retryFields().filter((name) => made[name] !== undefined);
  return Object.fromEntries(names.map((name) => [name, made[name]]));
}

const retryFields = () => {
  const fields = fieldsOf('POST', RETRY);
  return fields.length ? fields : ['gitUrl', 'gitBranch'];
};

/** Open the form for a new workspace. */
export async function openCreate() {
  await openForm(null);
}

/** Open the form with what a workspace was to be, so that it can be tried again. */
export async function openRetry() {
  await openForm({ ...state.details.get(state.open), ...state.workspaces.get(state.open) });
}

async function openForm(before) {
  const form = byId('create-form');
  if (before || form.dataset.id) form.reset();
  form.dataset.id = before?.id ?? '';
  byId('create-title').textContent = before ? `Try ${before.name} again` : 'New workspace';
  byId('create-submit').textContent = before ? 'Try again' : 'Create';
  trouble(form, null);
  for (const field of form.querySelectorAll('input, select, textarea')) {
    field.disabled = Boolean(before) && !retryFields().includes(field.name);
  }
  form.querySelector('details').hidden = !form.querySelector('details :enabled');
  byId('create-dialog').showModal();
  form.elements[before ? 'gitUrl' : 'name'].focus();
  await fillTemplates(form);
  if (before) fill(form, sent.get(before.id) ?? formOf(before));
}

/** Return what a form would have had for a workspace that is known. */
function formOf(item) {
  const text = { name: item.name, template: item.template, type: item.type, gitUrl: item.gitUrl };
  const labels = Object.entries(item.labels ?? {}).map(([name, value]) => `${name}=${value}`).join('\n');
  return { ...text, gitBranch: item.gitBranch, ttl: item.ttl, labels };
}

function fill(form, values) {
  for (const [name, value] of Object.entries(values)) form.elements[name].value = value ?? '';
}

async function fillTemplates(form) {
  await loadTemplates();
  const chosen = form.template.value || defaultTemplate()?.name;
  form.template.replaceChildren(...templates().map((item) => {
    const more = item.state === 'ready' ? '' : ` (${imageWords(item)})`;
    return el('option', { value: item.name }, item.name + more);
  }));
  if (chosen) form.template.value = chosen;
}

/** Return the form of a dialog about the open workspace, made ready for it. */
function formAbout(id, item) {
  const form = byId(`${id}-form`);
  form.reset();
  trouble(form, null);
  form.dataset.id = item.id;
  form.querySelector('[data-name]').textContent = item.name;
  return form;
}

function openDelete() {
  const item = state.workspaces.get(state.open);
  const form = formAbout('delete', item);
  const button = byId('delete-submit');
  button.disabled = true;
  form.confirmation.oninput = () => { button.disabled = form.confirmation.value !== item.name; };
  byId('delete-dialog').showModal();
  tellLoss(form);
}

/** Say what of the project's repository is nowhere else. */
async function tellLoss(form) {
  const { id } = form.dataset;
  byId('delete-loss').textContent = '';
  if (!offers('GET', GIT) || !['running', 'stopped'].includes(state.workspaces.get(id)?.status)) return;
  const git = await api('GET', workspacePath(id, '/git')).catch(() => null);
  if (!git || form.dataset.id !== id) return;
  const more = git.truncated ? 'more than ' : '';
  const untouched = git.unpushed === 1 && !git.remote; // no more than the commit that a template begins with
  const lost = [git.unpushed && !untouched ? `${plural(git.unpushed, 'commit')} on no remote` : '',
    git.changes.length ? `${more}${plural(git.changes.length, 'changed file')}` : ''].filter(Boolean);
  if (lost.length) byId('delete-loss').textContent = `Only here: ${lost.join(', ')}.`;
}

function openStop() {
  const item = state.workspaces.get(state.open);
  const temporary = item.type === 'temporary';
  const form = formAbout('stop', item);
  form.querySelector('[data-words]').textContent = temporary ? STOPPING_TEMPORARY : STOPPING;
  byId('stop-submit').textContent = temporary ? 'Stop and delete' : 'Stop';
  byId('stop-dialog').showModal();
}

onSubmit('create', async (form) => {
  const { id } = form.dataset;
  const values = Object.fromEntries(new FormData(form));
  if (id) {
    take(await api('POST', workspacePath(id, '/retry'), retryBody(form)));
    sent.set(id, { ...sent.get(id), ...values });
  } else {
    const made = await api('POST', 'api/workspaces', createBody(form));
    sent.set(made.id, values);
    form.reset();
    take(made);
    location.hash = `#/w/${made.id}`;
  }
});
onSubmit('delete', async (form) => {
  const item = state.workspaces.get(form.dataset.id);
  if (item && form.confirmation.value !== item.name) return;
  await api('DELETE', workspacePath(form.dataset.id)).catch((error) => {
    if (error.code !== 'WORKSPACE_NOT_FOUND') throw error;
  });
});
onSubmit('stop', async (form) => {
  await api('POST', workspacePath(form.dataset.id, '/stop'));
});
// Whoever else deletes a workspace answers what its dialogs ask.
onChange('gone', ({ id }) => {
  for (const dialog of document.querySelectorAll('dialog[open]')) {
    if (dialog.querySelector('form').dataset.id === id) dialog.close();
  }
});
for (const button of document.querySelectorAll('[data-close]')) {
  button.addEventListener('click', () => button.closest('dialog').close());
}
on('new-button', 'click', openCreate);
on('ws-stop', 'click', openStop);
on('ws-delete', 'click', openDelete);
