// The first hour: three steps in the middle of the home page that tick themselves off.

import { byId, complain, el, on, speak } from './page.js';
import { api, request, workspacePath } from './api.js';
import { offers } from './offers.js';
import { defaultTemplate, loadList, neverRan, onChange, problems, state, take } from './store.js';
import { buildWords, currentBuild } from './build.js';
import { RETRY, openCreate } from './forms.js';

const SIGNS = { done: '✓', now: '…', wrong: '!' };
const WORDS = { done: 'Done', now: 'Goes on', wrong: 'Does not work', next: 'Not yet' };
const LOG_OF_TEMPLATE = '/api/templates/{}/log';
const NO_NEED_TO_WAIT = 'You need not wait: it begins when the image is ready.';
const SECOND = 1000;

let stays = false; // whether the steps were there since the home page was opened

const isConnected = () => state.health?.docker === 'connected';

/** Show the steps as long as there is one to take, and those who saw them that the last one is done. */
function showFirst() {
  if (state.open) stays = false;
  if (!state.health || state.open) return;
  const build = currentBuild();
  stays ||= build !== null || [...state.workspaces.values()].every(neverRan);
  byId('first').hidden = !stays;
  if (!stays) return;
  showStep('engine', engineStep());
  showStep('image', imageStep(build));
  showStep('create', createStep(build));
  showBuild(build);
}

function showStep(name, [progress, title, more = '', link = '']) {
  const step = byId(`first-${name}`);
  const [sign, word, head, text] = step.querySelectorAll('.sign, .sr, b, p');
  if (step.dataset.state && step.dataset.state !== progress) speak(`${title}. ${more}`);
  step.dataset.state = progress;
  sign.textContent = SIGNS[progress] ?? step.dataset.number;
  word.textContent = `${WORDS[progress]}: `;
  if (head.textContent !== title) head.replaceChildren(link ? el('a', { href: link }, title) : title);
  if (text.textContent !== more) text.replaceChildren(more);
}

function engineStep() {
  if (isConnected()) return ['done', 'Docker answers'];
  return ['wrong', 'Docker does not answer', problems().join('\n')];
}

function imageStep(build) {
  const image = defaultTemplate();
  byId('first-again').hidden = Boolean(build) || image?.state !== 'failed' || !isConnected();
  if (build) return ['now', 'The image is being built', 'The first time this takes some five minutes.'];
  if (image?.state === 'ready') return ['done', `The image ${image.name} is ready`];
  if (!isConnected() || !image) return ['next', 'The image that workspaces are made from'];
  if (image.state === 'failed') return ['wrong', 'The image could not be built', image.error];
  return ['next', 'The image is not built yet', 'The first workspace builds it, in some five minutes.'];
}

/** Have the image that failed built again, which a workspace does: the one that it failed, or a new one. */
async function tryAgain() {
  const { name } = defaultTemplate();
  await loadList().catch(() => {}); // the status that told of a failure did not tell whether it ever ran
  const failed = [...state.workspaces.values()].find((item) => neverRan(item) && item.template === name);
  if (!failed || !offers('POST', RETRY)) openCreate();
  else await api('POST', workspacePath(failed.id, '/retry'), {}).then(take, complain);
}

function createStep(build) {
  const all = [...state.workspaces.values()];
  const running = all.find((item) => item.status === 'running');
  const made = all.find((item) => item.status === 'creating');
  byId('first-button').hidden = all.length > 0;
  if (running) return ['done', `${running.name} is running`, '', `#/w/${running.id}`];
  if (made) return ['now', `${made.name} is being made`, '', `#/w/${made.id}`];
  return ['next', 'Your first workspace', build ? NO_NEED_TO_WAIT : ''];
}

/** Show how far the build is; only its time changes by itself. */
function showBuild(build) {
  const fill = byId('build-track').firstElementChild;
  byId('build').hidden = !build;
  if (!build) return;
  byId('build-words').textContent = buildWords(build);
  byId('build-track').hidden = !build.steps;
  fill.style.width = build.steps ? `${(build.step / build.steps) * 100}%` : '';
  byId('build-log').hidden = !build.lines.length && !offers('GET', LOG_OF_TEMPLATE);
  if (byId('build-log').open) showLines(build);
}

async function showLines(build) {
  const box = byId('build-lines');
  const stick = box.scrollHeight - box.scrollTop - box.clientHeight < 30;
  const text = (build.lines.length > 1 ? null : await askForLog(build.template)) ?? build.lines.join('\n');
  if (box.textContent !== text) box.replaceChildren(text);
  if (stick) box.scrollTop = box.scrollHeight;
}

/** Return the log of a build that no workspace waits for, or null. */
async function askForLog(template) {
  if (!offers('GET', LOG_OF_TEMPLATE)) return null;
  const path = `api/templates/${encodeURIComponent(template)}/log`;
  return request('GET', path, { accept: 'text/plain' }).then((answer) => answer.text(), () => null);
}

for (const what of ['health', 'list', 'build', 'route']) onChange(what, showFirst);
on('first-button', 'click', openCreate);
on('first-again', 'click', tryAgain);
on('build-log', 'toggle', showFirst);
setInterval(() => { if (!document.hidden && !state.open) showBuild(currentBuild()); }, SECOND);
