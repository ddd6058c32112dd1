// What the keyboard and the buttons of the frame do.

import { byId, debounced, keep, kept, on, say } from './page.js';
import { token } from './api.js';
import { state } from './store.js';
import { log } from './log.js';
import { move } from './list.js';
import { openCreate } from './forms.js';

const THEMES = ['', 'light', 'dark'];
export const TABS = ['logs', 'terminal', 'agent'];

function nextTheme() {
  const root = document.documentElement;
  const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? '') + 1) % THEMES.length];
  if (next) root.dataset.theme = next;
  else delete root.dataset.theme;
  keep('theme', next || null, { forGood: true });
  nameTheme();
  say(byId('theme-button').ariaLabel);
}

function nameTheme() {
  byId('theme-button').ariaLabel = `Colours: ${document.documentElement.dataset.theme ?? 'as the system'}`;
}

/** Say in the titles of buttons which keys do the same, as long as they do. */
function nameKeys() {
  for (const [id, key] of [['new-button', 'N'], ['theme-button', 'T'], ['help-button', 'H']]) {
    const title = byId(id).title.replace(/ \(Alt\+.\)$/, '');
    byId(id).title = shortcuts.checked ? `${title} (Alt+${key})` : title;
  }
  byId('filter-key').hidden = !shortcuts.checked;
}

function openHelp() {
  byId('token-forget').hidden = !token();
  byId('help-dialog').showModal();
}

function goTab(tab) {
  const session = tab === 'agent' && state.session ? `/${encodeURIComponent(state.session)}` : '';
  if (state.open) location.hash = `#/w/${state.open}/${tab}${session}`;
}

const inLog = () => state.open && state.tab === 'logs';
// With Alt, since a letter alone is what people dictate; and by where a key lies, since on a Mac Alt makes
// another letter of it.
const KEYS = {
  KeyN: openCreate,
  KeyT: nextTheme,
  KeyH: openHelp,
  KeyJ: () => move(1),
  KeyK: () => move(-1),
  KeyL: () => goTab('logs'),
  KeyS: () => goTab('terminal'),
  KeyA: () => goTab('agent'),
  KeyP: () => { if (inLog()) byId('log-pause').click(); },
  Slash: () => (inLog() ? byId('log-search') : byId('filter')).focus(),
};
// What Alt makes on a Mac belongs into a field; elsewhere it leaves the letter as it is.
const isWritten = (key) => !/^[a-z/-]$/i.test(key);
const shortcuts = byId('shortcuts');
shortcuts.checked = kept('shortcuts') !== 'off';

document.addEventListener('keydown', (event) => {
  if (document.querySelector('dialog[open]') || event.ctrlKey || event.metaKey) return;
  const typing = event.target.closest('input, textarea, select');
  if (event.key === 'Escape') {
    if (typing) typing.blur();
    else if (state.open) location.hash = '#/';
  } else if (event.altKey && shortcuts.checked && KEYS[event.code] && !(typing && isWritten(event.key))) {
    event.preventDefault();
    KEYS[event.code]();
  }
});

for (const tab of document.querySelectorAll('[role=tab]')) {
  tab.addEventListener('click', () => goTab(tab.dataset.tab));
  tab.addEventListener('keydown', (event) => {
    if (!['ArrowLeft', 'ArrowRight'].includes(event.key)) return;
    const step = event.key === 'ArrowLeft' ? -1 : 1;
    const other = TABS.at((TABS.indexOf(tab.dataset.tab) + step) % TABS.length);
    goTab(other);
    byId(`tab-${other}`).focus();
  });
}
on('theme-button', 'click', nextTheme);
on('help-button', 'click', openHelp);
on('shortcuts', 'change', () => {
  keep('shortcuts', shortcuts.checked ? null : 'off', { forGood: true });
  nameKeys();
});
on('token-forget', 'click', () => {
  keep('token', null);
  location.reload();
});
on('log-search', 'input', debounced(() => log.search(byId('log-search').value), 120));
on('log-pause', 'click', () => log.pause(!log.paused));
on('log-clear', 'click', () => {
  const { paused } = log;
  log.reset('Cleared.');
  log.pause(paused);
});
on('log-jump', 'click', () => log.toEnd());
on('log-wrap', 'change', () => { byId('log').classList.toggle('wrap', byId('log-wrap').checked); });
byId('log').classList.add('wrap');
nameKeys();
nameTheme();
