"""The life of workspaces on the real engine, with a small image."""
from conftest import objects_of


def test_a_workspace_is_created_stopped_started_and_deleted(server, docker_client):
    created = server.create('life')
    assert created['status'] == 'creating' and created['codeServerPort']
    running = server.wait_status('life', 'running')
    assert running['id'] == created['id'] and running['containerId']
    assert server.call('POST', '/api/workspaces/life/stop').status_code == 202
    server.wait_status('life', 'stopped')
    assert server.call('POST', '/api/workspaces/life/start').status_code == 202
    again = server.wait_status('life', 'running')
    assert again['codeServerPort'] == created['codeServerPort'] and again['containerId'] == running['containerId']
    answer = server.call('DELETE', '/api/workspaces/life')
    assert answer.status_code == 200 and answer.json()['data']['deleted']
    assert not [name for name in objects_of(docker_client, server.instance) if created['id'] in name or 'life' in name]
    assert server.call('GET', '/api/workspaces/life').json() == {
        'success': False, 'error': 'Workspace not found', 'code': 'WORKSPACE_NOT_FOUND'}
