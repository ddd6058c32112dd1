// What the API of this server has, as its own document says: the page offers nothing that would be refused.

import { api } from './api.js';

const paths = {};
let schemas = {};

/** Read the document. Where that fails, the page does with what every server has. */
export async function loadOffers() {
  const found = await api('GET', 'openapi.json').catch(() => ({}));
  schemas = found.components?.schemas ?? {};
  for (const [path, calls] of Object.entries(found.paths ?? {})) paths[plain(path)] = calls;
}

const plain = (path) => path.replace(/\{[^}]*\}/g, '{}');
const find = (method, path) => paths[plain(path)]?.[method.toLowerCase()];

export const offers = (method, path) => Boolean(find(method, path));

/** Return the names of the fields that the body of a call may have. */
export function fieldsOf(method, path) {
  const schema = find(method, path)?.requestBody?.content?.['application/json']?.schema ?? {};
  const named = schemas[schema.$ref?.split('/').pop()] ?? schema;
  return Object.keys(named.properties ?? {});
}
