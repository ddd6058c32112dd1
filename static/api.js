// Calls of the API, as any other client makes them, and the token that they may need.

import { byId, keep, kept, sleep } from './page.js';
import { trouble } from './fields.js';

export class ApiError extends Error {
  constructor(status, body) {
    super(body.error ?? `The server answered ${status}.`);
    this.status = status;
    this.code = body.code ?? '';
    this.details = body.details ?? [];
  }
}

const RETRY_PAUSE = 300; // ms
const TRIES = 4;
const REPEATABLE = ['GET', 'PATCH', 'DELETE']; // they do the same when they are done twice

let asking = null;

export const token = () => kept('token');
export const isAsking = () => asking !== null;

/** Ask for the API token, once for all who need it. */
export function askToken() {
  asking ??= new Promise((resolve) => {
    const dialog = byId('token-dialog');
    const form = byId('token-form');
    const refused = { error: 'This is not the API_TOKEN of the server.', code: 'UNAUTHORIZED' };
    trouble(form, token() ? new ApiError(401, refused) : null);
    form.onsubmit = (event) => {
      event.preventDefault();
      if (!form.token.value) return;
      keep('token', form.token.value, { forGood: form.remember.checked });
      form.reset();
      dialog.close();
      asking = null;
      resolve();
    };
    dialog.oncancel = (event) => event.preventDefault(); // there is nothing to see without it
    dialog.onclose = () => { if (asking && !dialog.open) dialog.showModal(); }; // a second Escape closes it
    dialog.showModal();
  });
  return asking;
}

async function ask(path, options) {
  for (let tries = REPEATABLE.includes(options.method) ? TRIES : 1; ; tries -= 1) {
    try {
      return await fetch(path, options);
    } catch (error) {
      if (options.signal?.aborted) throw error;
      if (tries === 1) throw new ApiError(0, { error: 'The server does not answer.', code: 'UNREACHABLE' });
    }
    // Chromium gives up what it asks for when a network interface comes or goes, as with every container.
    await sleep(RETRY_PAUSE);
  }
}

/** Return the good answer of a call; raise ApiError for any other. The token is asked for if need be. */
export async function request(method, path, { body, signal, accept = 'application/json' } = {}) {
  for (;;) {
    const headers = { Accept: accept };
    const shown = token();
    if (shown) headers.Authorization = `Bearer ${shown}`;
    if (body !== undefined) headers['Content-Type'] = 'application/json';
    const answer = await ask(path, { method, headers, signal, body: body && JSON.stringify(body) });
    if (answer.ok) return answer;
    const told = await answer.json().catch(() => ({}));
    if (answer.status !== 401) throw new ApiError(answer.status, told);
    if (shown === token()) await askToken();
  }
}

/** Return the data of an answer, without its envelope if it has one. */
export async function api(method, path, body) {
  const told = await (await request(method, path, { body })).json();
  return 'success' in told ? told.data : told;
}

export const workspacePath = (id, more = '') => `api/workspaces/${encodeURIComponent(id)}${more}`;
export const sessionPath = (id, more = '') => `api/agent/sessions/${encodeURIComponent(id)}${more}`;
