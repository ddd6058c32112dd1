// The facts of the open workspace: what it is, where it is reached, and with which key.

import { byId, copy, el, icon, on, say, tick } from './page.js';
import { lines, trouble } from './fields.js';
import { ApiError, api, workspacePath } from './api.js';
import { onChange, state, takeDetails } from './store.js';

// What the facts depend on. They are built anew only when one has changed, so that a selection, a shown
// password and the focus stay.
const SHOWN = ['id', 'status', 'type', 'template', 'createdAt', 'expiresAt', 'labels', 'gitUrl', 'gitBranch',
  'node', 'codeServerPort', 'sshPort', 'ports', 'containerId', 'codeServerUrl', 'codeServerPassword',
  'sshCommand', 'sshKeys'];
const NO_KEY = { path: 'key', message: 'A public key is one line that begins with ssh-ed25519, ssh-rsa …' };

export const isWeb = (url) => /^https?:\/\//i.test(url ?? '');
const hostOf = (url) => { try { return new URL(url).hostname; } catch { return location.hostname; } };

const fact = (name, ...content) => el('div', {}, el('dt', {}, name), el('dd', {}, ...content));
const longFact = (name, ...content) => {
  const made = fact(name, ...content);
  made.classList.add('long');
  return made;
};
/** Make a fact whose buttons stay behind what they are about. */
const together = (made) => {
  made.classList.add('together');
  return made;
};
const time = (text) => el('time', { dateTime: text, title: text, data: { ago: text } });
const whole = (text) => el('span', { className: 'nowrap' }, text);

/** Return a link if the address is one of the web, and plain text else. */
function webLink(url, text) {
  const properties = { href: url, target: '_blank', rel: 'noopener noreferrer' };
  return isWeb(url) ? el('a', properties, text) : el('span', {}, text);
}

function iconButton(name, title, ariaLabel, onclick) {
  return el('button', { type: 'button', title, ariaLabel, onclick }, icon(name));
}

function copyButton(text, what) {
  return iconButton('copy', `Copy ${what}`, `Copy ${what}`, () => copy(text, what));
}

function secret(text) {
  const hidden = '••••••••••';
  const shown = el('code', {}, hidden);
  const turn = () => { shown.textContent = shown.textContent === hidden ? text : hidden; };
  return [shown, iconButton('eye', 'Show', 'Show the password', turn), copyButton(text, 'password')];
}

function showFacts() {
  const item = { ...state.details.get(state.open), ...state.workspaces.get(state.open) };
  if (!item.id) return;
  const key = JSON.stringify(SHOWN.map((name) => item[name]));
  if (byId('facts').dataset.key !== key) {
    byId('facts').dataset.key = key;
    byId('facts').replaceChildren(...facts(item).filter(Boolean));
    showKeyForm(item);
  }
  tick();
}

function facts(item) {
  const running = item.status === 'running';
  const own = [item.codeServerPort && `editor ${item.codeServerPort}`, item.sshPort && `SSH ${item.sshPort}`];
  const ports = own.filter(Boolean).map(whole);
  const published = Object.entries(item.ports).map(([inside, outside]) => (
    webLink(`http://${hostOf(item.codeServerUrl)}:${outside}/`, `${inside} → ${outside}`)));
  const labels = Object.entries(item.labels ?? {}).map(([name, value]) => (
    el('code', {}, value ? `${name}=${value}` : name)));
  const branch = item.gitBranch ? el('code', {}, item.gitBranch) : null;
  const ssh = running && item.sshCommand && item.sshKeys !== 0;
  return [
    fact('Type', item.type), fact('Template', item.template), fact('Created', time(item.createdAt)),
    fact('Expires', item.expiresAt ? time(item.expiresAt) : 'never'),
    ports.length > 0 && fact('Ports', ...ports),
    item.node && fact('Node', item.node),
    item.containerId && fact('Container', el('code', {}, item.containerId)),
    running && published.length > 0 && fact('Published', ...published),
    item.codeServerPassword && item.codeServerPort
      && together(fact("Editor's password", ...secret(item.codeServerPassword))),
    labels.length > 0 && fact('Labels', ...labels),
    item.gitUrl && longFact('Git', webLink(item.gitUrl, item.gitUrl), branch),
    ssh && together(
      longFact('SSH', el('code', {}, item.sshCommand), copyButton(item.sshCommand, 'SSH line'))),
  ];
}

/** Where no key may log in, the page asks for one in the place of a line that could not work. */
function showKeyForm(item) {
  byId('key-form').hidden = !(item.sshKeys === 0 && item.sshPort && item.status === 'running');
}

async function addKey(form) {
  const id = state.open;
  try {
    const keys = lines(form.key.value);
    if (!keys.length) throw new ApiError(0, { details: [NO_KEY] });
    takeDetails(await api('PATCH', workspacePath(id), { sshPublicKeys: keys }));
    trouble(form, null);
    form.reset();
    say('The key may log in');
  } catch (error) {
    // The form has one field, which has another name in the API.
    for (const detail of error.details) detail.path = detail.path.replace(/^sshPublicKeys(\.\d+)?/, 'key');
    trouble(form, error);
  }
}

onChange('workspace', showFacts);
on('key-form', 'submit', (event) => { event.preventDefault(); addKey(event.target); });
