// Lines as programs print them: their colours understood, all else that steers a terminal taken out.

import { el } from './page.js';

const ESCAPES = new RegExp([
  /\x1b\[([0-9;:]*)m/, // colours and the like, the only ones that are obeyed
  /\x1b\[[0-?]*[ -/]*[@-~]/, // all others that begin so
  /\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?/, // titles, links
  /\x1b[ -/]*[0-~]?/,
  /[\x00-\x08\x0b-\x1f\x7f-\x9f]/,
].map((part) => part.source).join('|'), 'g');
const KINDS = { 1: 'bold', 2: 'faint', 3: 'italic', 4: 'under', 7: 'inverse', 9: 'struck' };
const ENDS = { 22: ['bold', 'faint'], 23: ['italic'], 24: ['under'], 27: ['inverse'], 29: ['struck'] };

/** Return a line as [{text, classes, colour}]. */
export function ansi(text) {
  const parts = [];
  let style = {};
  let last = 0;
  const push = (piece) => { if (piece) parts.push({ text: piece, ...dress(style) }); };
  for (const match of text.matchAll(ESCAPES)) {
    push(text.slice(last, match.index));
    last = match.index + match[0].length;
    if (match[1] !== undefined) style = paint(style, match[1].split(/[;:]/).map(Number));
  }
  push(text.slice(last));
  return parts;
}

function paint(style, codes) {
  let next = { ...style };
  for (let at = 0; at < codes.length; at += 1) {
    const code = codes[at];
    if (code === 0) next = {};
    else if (KINDS[code]) next[KINDS[code]] = true;
    else if (ENDS[code]) for (const kind of ENDS[code]) next[kind] = false;
    else if (code >= 30 && code <= 37) next.colour = code - 30;
    else if (code >= 90 && code <= 97) next.colour = code - 82;
    else if (code === 39) delete next.colour;
    else if (code === 38 || code === 48) {
      const [colour, used] = furtherColour(codes.slice(at + 1));
      if (code === 38 && colour !== undefined) next.colour = colour;
      at += used;
    }
  }
  return next;
}

/** Return the colour that codes behind a 38 or 48 name, and how many of them do. */
function furtherColour(codes) {
  if (codes[0] === 5) return [indexedColour(codes[1]), 2];
  if (codes[0] === 2) return [codes.slice(1, 4), 4];
  return [undefined, codes.length];
}

function indexedColour(number) {
  if (!(number >= 0 && number <= 255)) return undefined;
  if (number < 16) return number;
  if (number >= 232) return Array(3).fill(8 + (number - 232) * 10);
  const level = (part) => (part ? 55 + part * 40 : 0);
  return [Math.floor((number - 16) / 36), Math.floor((number - 16) / 6) % 6, (number - 16) % 6].map(level);
}

function dress(style) {
  const classes = Object.values(KINDS).filter((kind) => style[kind]);
  if (typeof style.colour === 'number') classes.push(`f${style.colour}`);
  return { classes: classes.join(' '), colour: Array.isArray(style.colour) ? style.colour : null };
}

/** What is left of a line that was written over and over, as progress bars do. */
export const lastState = (text) => (
  text.includes('\r') ? text.split('\r').findLast((part) => part) ?? '' : text);

const rgb = (levels) => `rgb(${levels.map((level) => Math.min(255, level | 0)).join(' ')})`;

/** Yield the nodes of a line's parts, with the ranges of its text in <mark>. */
export function* marked(parts, ranges) {
  let start = 0;
  let at = 0;
  for (const part of parts) {
    const holder = part.classes || part.colour ? el('span', { className: part.classes })
      : document.createDocumentFragment();
    if (part.colour) holder.style.color = rgb(part.colour);
    let from = 0;
    while (at < ranges.length && ranges[at][0] < start + part.text.length) {
      const begin = Math.max(0, ranges[at][0] - start);
      const end = Math.min(part.text.length, ranges[at][1] - start);
      holder.append(part.text.slice(from, begin), el('mark', {}, part.text.slice(begin, end)));
      from = end;
      if (ranges[at][1] > start + part.text.length) break;
      at += 1;
    }
    holder.append(part.text.slice(from));
    start += part.text.length;
    yield holder;
  }
}

/** Return the nodes of what an agent says, which may be anything. */
export const plainParts = (said) => (
  marked(ansi(typeof said === 'string' ? said : JSON.stringify(said) ?? ''), []));
