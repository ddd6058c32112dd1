// What a program does with the types that openapi-typescript makes; only the compiler runs it.
import type { components, paths } from './types';

type Schemas = components['schemas'];
type Created = paths['/api/workspaces']['post']['responses'][201]['content']['application/json'];

export const body: Schemas['WorkspaceCreate'] = { name: 'myproject', memory: '4g' };
export const change: Schemas['WorkspaceUpdate'] = { ttl: null, labels: { team: 'web', old: null } };
export const message: Schemas['WebSocketMessage'] = { type: 'subscribe', workspaceId: 'ws-abc123' };
export const port = (created: Created): number | null => created.data.codeServerPort;
export const password = (details: Schemas['WorkspaceDetails']): string => `${details.name}: ${details.codeServerPassword}`;

export function say(event: Schemas['AnyEvent']): string {
  switch (event.type) {
    case 'status': return event.data.status;
    case 'progress': return `${event.data.step} of ${event.data.total ?? '?'}`;
    case 'error': return event.data.code;
    case 'result': return event.data.runId ?? event.timestamp;
    default: return event.type;
  }
}

// @ts-expect-error: a misspelt status is found out
export const wrong: Schemas['WorkspaceStatus'] = 'runing';
