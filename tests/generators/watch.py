"""Makes, watches, changes and deletes a workspace with the client that openapi-python-client makes."""
import json
import sys

from client import Client
from client.api.workspaces import create_workspace, delete_workspace, update_workspace
from client.models import Event, EventType, WorkspaceCreate, WorkspaceStatus, WorkspaceUpdate

with Client(base_url=sys.argv[1]) as client:
    made = create_workspace.sync(client=client, body=WorkspaceCreate(name='generated')).data
    print(made.name, made.status)
    with client.get_httpx_client().stream('GET', f'/api/workspaces/{made.id}/events') as stream:
        for line in stream.iter_lines():
            if line.startswith('data: '):
                event = Event.from_dict(json.loads(line[6:]))
                if event.type_ is EventType.STATUS and event.data['status'] == WorkspaceStatus.RUNNING:
                    break
    changed = update_workspace.sync(made.id, client=client, body=WorkspaceUpdate(ttl=3600)).data
    print(changed.status, changed.ttl, changed.expires_at > changed.created_at)
    print(delete_workspace.sync(made.id, client=client).data.deleted)
    print(delete_workspace.sync(made.id, client=client).code)
