// How far the image is that somebody waits for: as the log of a workspace that is being made tells it, or
// else as the server does.

import { clock, sinceNow } from './page.js';
import { changed, laterHealth, state } from './store.js';

const BEGINNING = /^Building image \S+ of template (\S+)\.$/;
const STEP = /^Step (\d+)\/(\d+) : /;
const MOST = 500; // lines kept

let heard = null; // {workspaceId, template, step, steps, since, lines}

/** Take a line of a build that a workspace waits for. */
export function takeBuildLine({ workspaceId, timestamp, data }) {
  const line = String(data.message ?? '');
  if (heard?.workspaceId !== workspaceId) heard = { workspaceId, since: timestamp, lines: [] };
  const beginning = BEGINNING.exec(line);
  const step = STEP.exec(line);
  if (beginning) Object.assign(heard, { template: beginning[1], step: null, steps: null });
  if (step) Object.assign(heard, { step: Number(step[1]), steps: Number(step[2]) });
  heard.lines.push(line);
  heard.lines.splice(0, heard.lines.length - MOST);
  if (beginning) laterHealth();
  changed('build');
}

/** Forget what was heard: it is told from its beginning to who listens anew. */
export function forgetBuild() {
  heard = null;
}

/** Return {template, step, steps, since, lines} of the build that goes on, or null; no step may be known. */
export function currentBuild() {
  const images = Object.entries(state.health?.templates ?? {});
  const building = images.filter(([, image]) => image.state === 'building');
  // Whichever stands on the base waits for it.
  const [template, image] = building.find(([name]) => name === 'base') ?? building[0] ?? [];
  if (!image) return null;
  const [since] = building.map(([, { buildingSince }]) => buildingSince).sort();
  const { step, steps, lastLine } = image;
  const told = { template, step, steps, lines: lastLine ? [lastLine] : [] };
  const waits = state.workspaces.get(heard?.workspaceId)?.status === 'creating';
  return { ...told, ...(waits ? heard : {}), since };
}

/** Return in words how far a build is. */
export function buildWords({ template, step, steps, since }) {
  const count = steps ? `step ${step} of ${steps} · ` : '';
  const what = template === 'base' ? 'the base of all images' : template;
  return `${what} · ${count}${clock(sinceNow(since))}`;
}
