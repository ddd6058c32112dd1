// What every part of the page is made with: elements, figures in words, notes to the reader.
// All text that comes from the server, a container or an agent enters the page as text nodes, never as HTML.

const SVG = 'http://www.w3.org/2000/svg';
const SPANS = [[86400, 'd'], [3600, 'h'], [60, 'min']];
const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];

export const HISTORY = 72; // samples of a chart

export const byId = (id) => document.getElementById(id);
export const on = (id, event, call) => byId(id).addEventListener(event, call);

/** Make an element; `fields` are properties, `data` goes to the dataset, children are nodes or text. */
export function el(name, fields = {}, ...children) {
  const { data, attributes, ...properties } = fields;
  const made = Object.assign(document.createElement(name), properties);
  Object.assign(made.dataset, data);
  for (const [key, value] of Object.entries(attributes ?? {})) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export const icon = (name) => svg('svg', {}, svg('use', { href: `#i-${name}` }));

/** Draw values, the newest at the right end, into an svg that has a polyline and maybe a polygon below it. */
export function sparkline(node, values, highest) {
  const { width, height } = node.viewBox.baseVal;
  const points = values.map((value, at) => {
    const x = width - (values.length - 1 - at) * (width / (HISTORY - 1));
    const y = height - 1 - (value / highest) * (height - 3);
    return `${x.toFixed(1)},${y.toFixed(1)}`;
  });
  node.querySelector('polyline').setAttribute('points', points.join(' '));
  const left = points[0]?.split(',')[0];
  const below = points.length ? [`${left},${height}`, ...points, `${width},${height}`] : [];
  node.querySelector('polygon')?.setAttribute('points', below.join(' '));
}

export function say(text, { bad = false, code = '' } = {}) {
  const name = bad ? 'toast bad' : 'toast';
  const toast = el('div', { className: name }, code ? el('code', {}, code) : null, text);
  byId('toasts').append(toast);
  setTimeout(() => toast.remove(), bad ? 9000 : 3500);
}

export const complain = (error) => say(error.message, { bad: true, code: error.code });

/** Have a screen reader say something that shows elsewhere. */
export function speak(text) {
  byId('spoken').textContent = text;
}

/** Put a sentence above everything; `about` says what it is about, and no sentence takes it away. */
export function banner(about, text) {
  const box = byId('banners');
  const there = box.querySelector(`[data-about=${about}]`);
  if (there?.textContent === text) return;
  there?.remove();
  if (text) box.append(el('p', { className: 'banner', data: { about } }, text));
}

/** Return what the browser keeps under a name, in the tab or for good. It may refuse to keep anything. */
export function kept(name) {
  try { return sessionStorage.getItem(name) ?? localStorage.getItem(name); } catch { return null; }
}

export function keep(name, value, { forGood = false } = {}) {
  try {
    sessionStorage.removeItem(name);
    localStorage.removeItem(name);
    if (value !== null) (forGood ? localStorage : sessionStorage).setItem(name, value);
  } catch { say('This browser keeps nothing for this page.'); }
}

/** Do something once with the next frame. A page that is not seen gets no frames. */
export function nextFrame(act) {
  if (document.hidden) setTimeout(act, 250);
  else requestAnimationFrame(act);
}

export function span(seconds) {
  for (const [size, unit] of SPANS) if (seconds >= size) return `${Math.floor(seconds / size)} ${unit}`;
  return `${Math.max(0, Math.floor(seconds))} s`;
}

export const sinceNow = (time) => (time ? (Date.now() - Date.parse(time)) / 1000 : 0);

/** Seconds as a clock shows them: 1:05. */
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, '0')}`;
}

export function ago(time) {
  if (!time) return '–';
  const seconds = sinceNow(time);
  return seconds >= 0 ? `${span(seconds)} ago` : `in ${span(-seconds)}`;
}

export function bytes(number) {
  let at = 0;
  while (number >= 1024 && at < UNITS.length - 1) { number /= 1024; at += 1; }
  return `${number >= 100 || at === 0 ? Math.round(number) : number.toFixed(1)} ${UNITS[at]}`;
}

/** Say how many there are: 1 line, 2,000 lines. */
export const plural = (count, word) => `${count.toLocaleString('en')} ${word}${count === 1 ? '' : 's'}`;

export const money = (dollars) => `$${dollars.toFixed(dollars < 0.1 ? 4 : 2)}`;

/** Say again how long ago it was, wherever the page does. */
export function tick() {
  for (const node of document.querySelectorAll('[data-ago]')) node.textContent = ago(node.dataset.ago);
}

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // the page is not on localhost, and has no certificate
    const area = el('textarea', { value: text });
    (document.querySelector('dialog[open]') ?? document.body).append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
  }
  say(`${what} copied`);
}

export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export function debounced(call, ms) {
  let timer;
  return (...all) => { clearTimeout(timer); timer = setTimeout(call, ms, ...all); };
}
