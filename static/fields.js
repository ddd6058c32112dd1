// Forms in general: what is wrong stands at its field, and what is typed becomes what the API takes.

import { byId, el } from './page.js';

/** Show an error in a form, in the contract's words: each detail at its field, the rest on top. */
export function trouble(form, error) {
  const fields = new Map([...form.querySelectorAll('.wrong')].map((node) => [node.dataset.for, node]));
  for (const [name, node] of fields) {
    node.textContent = '';
    form.elements[name]?.removeAttribute?.('aria-invalid');
  }
  const rest = (error?.details ?? []).filter((detail) => !markField(form, fields, detail));
  const onTop = error && (!error.details.length || rest.length > 0);
  const told = rest.map(({ message }) => message).join('\n');
  const box = form.querySelector('.trouble');
  box.replaceChildren(...onTop ? [el('code', {}, error.code), ` ${told || error.message}`] : []);
  box.hidden = !onTop;
  form.querySelector('[aria-invalid]')?.focus();
}

/** Show a detail of an error at its field; return whether there is one. */
function markField(form, fields, { path, message }) {
  const [name] = path.split('.');
  const node = fields.get(name);
  if (!node) return false;
  node.textContent += `${node.textContent ? '\n' : ''}${message}`;
  const field = form.elements[name];
  field?.setAttribute?.('aria-invalid', 'true');
  field?.closest?.('details')?.setAttribute('open', '');
  return true;
}

/** Let the form of a dialog do something, with its button off meanwhile. */
export function onSubmit(id, act) {
  const form = byId(`${id}-form`);
  form.addEventListener('submit', async (event) => {
    event.preventDefault();
    const button = byId(`${id}-submit`);
    if (button.disabled) return;
    button.disabled = true;
    try {
      await act(form);
      byId(`${id}-dialog`).close();
    } catch (error) {
      trouble(form, error);
    } finally { button.disabled = false; }
  });
}

export const lines = (text) => text.split('\n').map((line) => line.trim()).filter(Boolean);

export const number = (text) => (text.trim() === '' || Number.isNaN(Number(text)) ? text : Number(text));

export const pairs = (text) => Object.fromEntries(lines(text).map((line) => {
  const at = line.indexOf('=');
  return at < 0 ? [line, ''] : [line.slice(0, at), line.slice(at + 1)];
}));
