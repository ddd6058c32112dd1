"""What makes scripts short: waiting, asking twice without harm, and knowing what keeps a workspace alive."""
import contextlib
import json
import time

import pytest
from conftest import Served, concurrently, remove_objects
from streaming import connect


@pytest.fixture(scope='module')
def server(tmp_path_factory, templates_dir, docker_client):
    served = Served(tmp_path_factory.mktemp('scripting'), templates_dir).start()
    yield served
    served.stop()
    print(served.log.read_text()[-8000:])
    remove_objects(docker_client, served.instance)


def post(server, path, body=None, key=None, **headers):
    """Return the answer of a POST, with an Idempotency-Key if one is given."""
    return server.call('POST', path, body,
                       headers={**headers, **({'Idempotency-Key': key} if key else {})})


def status(answer):
    return answer.status_code, answer.json()['data']['status']


def test_creating_starting_and_stopping_answer_when_they_are_done(server):
    answer = post(server, '/api/workspaces?wait=running', {'name': 'waited'})
    assert status(answer) == (201, 'running') and answer.headers['Location']
    assert status(post(server, '/api/workspaces/waited/stop?wait=stopped')) == (202, 'stopped')
    assert status(post(server, '/api/workspaces/waited/start?wait=running,error&timeout=60')) == (
        202, 'running')
    assert status(post(server, '/api/workspaces/waited/restart?wait=running')) == (202, 'running')
    assert server.get('/api/workspaces/waited?wait=running&timeout=0')['status'] == 'running'


def test_a_preference_waits_too_and_never_fails(server):
    answer = post(server, '/api/workspaces', {'name': 'preferred', 'env': {'SLOW': '2'}}, Prefer='wait=1')
    assert status(answer) == (201, 'creating') and answer.headers['Preference-Applied'] == 'wait=1'
    server.wait_status('preferred', 'running')
    assert status(post(server, '/api/workspaces/preferred/stop', Prefer='respond-async, wait=60')) == (
        202, 'stopped')
    answer = post(server, '/api/workspaces', {'name': 'failing', 'env': {'CLONE_FAILS': 'no'}},
                  Prefer='wait=60')
    assert status(answer) == (201, 'error')


def test_what_cannot_come_is_said_at_once_with_the_reason(server):
    answer = post(server, '/api/workspaces?wait=running',
                  {'name': 'broken', 'env': {'CLONE_FAILS': 'no way'}})
    assert answer.status_code == 409 and answer.json()['code'] == 'WORKSPACE_NOT_RUNNING'
    assert 'no way' in answer.json()['error']
    answer = server.call('GET', '/api/workspaces/broken?wait=running')
    assert answer.status_code == 409 and 'no way' in answer.json()['error']
    assert server.get('/api/workspaces/broken?wait=running,error')['status'] == 'error'
    assert server.call('GET', '/api/workspaces/nowhere?wait=running').status_code == 404
    assert server.call('GET', '/api/workspaces/broken?wait=nonsense').status_code == 400


def test_what_does_not_come_in_time_is_a_timeout(server):
    server.create('slow', env={'SLOW': '5'})
    answer = server.call('GET', '/api/workspaces/slow?wait=running&timeout=1')
    assert answer.status_code == 504 and answer.json()['code'] == 'WAIT_TIMEOUT'
    assert answer.json()['details'] == [{'path': 'status', 'message': 'creating'}]


def test_one_that_is_deleted_meanwhile_ends_the_waiting(server):
    server.create('leaving', env={'SLOW': '30'})
    answers = concurrently(lambda: server.call('GET', '/api/workspaces/leaving?wait=running&timeout=50'),
                           lambda: (time.sleep(1), server.call('DELETE', '/api/workspaces/leaving')))
    assert answers[0].status_code == 404


def test_the_id_alone_is_there_for_a_shell(server):
    answer = post(server, '/api/workspaces', {'name': 'short'}, Accept='text/plain')
    assert answer.status_code == 201 and answer.headers['Content-Type'].startswith('text/plain')
    assert server.get(f'/api/workspaces/{answer.text.strip()}')['name'] == 'short'


def test_the_same_key_makes_one_workspace_also_over_a_restart(server):
    first = post(server, '/api/workspaces', {'name': 'once'}, key='key-1')
    again = post(server, '/api/workspaces', {'name': 'once'}, key='key-1')
    assert first.status_code == again.status_code == 201 and first.json() == again.json()
    assert again.headers['Idempotent-Replayed'] == 'true' and 'Idempotent-Replayed' not in first.headers
    assert again.headers['Location'] == first.headers['Location']
    server.kill()
    server.start()
    assert post(server, '/api/workspaces', {'name': 'once'}, key='key-1').json() == first.json()
    assert len([item for item in server.get('/api/workspaces') if item['name'] == 'once']) == 1
    other = post(server, '/api/workspaces', {'name': 'other'}, key='key-1')
    assert other.status_code == 422 and other.json()['code'] == 'IDEMPOTENCY_CONFLICT'


def test_what_failed_may_be_tried_again_with_its_key(server):
    assert post(server, '/api/workspaces', {'name': 'bad name!'}, key='key-2').status_code == 400
    assert post(server, '/api/workspaces', {'name': 'good-name'}, key='key-2').status_code == 201
    assert post(server, '/api/workspaces', {'name': 'x'}, key='k' * 300).status_code == 400


def test_of_many_with_one_key_at_once_one_is_done(server):
    answers = concurrently(*[lambda: post(server, '/api/workspaces?wait=running', {'name': 'crowd'},
                                          key='key-3') for _ in range(10)])
    codes = sorted(answer.status_code for answer in answers)
    assert set(codes) <= {201, 409} and 201 in codes
    assert {answer.json()['code'] for answer in answers if answer.status_code == 409} <= {
        'IDEMPOTENCY_CONFLICT'}


def test_a_ticket_is_given_once_for_a_key(server):
    first, again = (post(server, '/api/tickets', key='key-4').json()['data'] for _ in range(2))
    assert first == again


def test_a_client_that_leaves_does_not_wait_on(server):
    server.create('watched', env={'SLOW': '3'})
    with contextlib.closing(connect(server)) as sock:
        sock.sendall(f'GET /api/workspaces/watched?wait=running HTTP/1.1\r\nHost: localhost:{server.port}'
                     '\r\n\r\n'.encode())
        time.sleep(0.5)
    assert server.get('/health')['docker'] == 'connected'


def test_activity_tells_what_keeps_it_and_what_ends_it(server):
    server.running('idle', type='agent', ttl=3600)
    told = server.get('/api/workspaces/idle/activity')
    assert told['reasons'] == [] and told['endsBecause'] == 'idle' and told['expiresAt']
    server.running('timed', ttl=3600)
    assert server.get('/api/workspaces/timed/activity')['endsBecause'] == 'ttl'
    server.running('forever')
    told = server.get('/api/workspaces/forever/activity')
    assert told['endsBecause'] is None and told['expiresAt'] is None and told['lastActivityAt']
    assert server.call('GET', '/api/workspaces/nowhere/activity').status_code == 404


def test_the_frame_of_an_answer_is_kept_with_the_key(server):
    first = server.call('POST', '/api/tickets', headers={'Idempotency-Key': 'key-5'})
    assert json.loads(first.text) == server.call('POST', '/api/tickets',
                                                 headers={'Idempotency-Key': 'key-5'}).json()


def test_an_image_without_git_has_no_repository(server):
    server.running('gitless')
    assert server.get('/api/workspaces/gitless/git')['repository'] is False
