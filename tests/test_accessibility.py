"""axe-core looks over each state of the page, wide and narrow, in both colours."""
import shlex
import shutil

import javascript
import pytest
from browsing import open_dashboard, visit
from conftest import Served, remove_objects
from helpers import PUBLIC_KEY
from playwright.sync_api import expect

AGENT = r'''read -r task
printf '%s\n' '{"type":"progress","data":{"step":1,"total":2,"message":"Half of it"}}'
printf '%s\n' '{"type":"log","data":{"stream":"tool","tool":"Write","status":"failed","message":"file.ts"}}'
case $task in wait*) sleep 60 ;; fail*) exit 3 ;; esac
echo "It is done."'''


@pytest.fixture(scope='module')
def axe():
    return (javascript.installed() / 'node_modules' / 'axe-core' / 'axe.min.js').read_text()


@pytest.fixture(scope='module')
def server(tmp_path_factory, templates_dir, agents_template, docker_client):
    """A server with a workspace in each state, and a task in each."""
    folder = tmp_path_factory.mktemp('templates')
    for template in (templates_dir / 'tiny', agents_template[0] / 'agents'):
        shutil.copytree(template, folder / template.name)
    served = Served(tmp_path_factory.mktemp('served'), folder, DEFAULT_TEMPLATE='agents',
                    AGENT_COMMAND=shlex.join(['sh', '-c', AGENT]), DEFAULT_AGENT='command').start()
    try:
        served.create('keyless', labels={'team': 'web'}, ports=[3000])
        served.create('keyed', sshPublicKeys=[PUBLIC_KEY], ttl=86400)
        served.create('broken', template='tiny', env={'CLONE_FAILS': 'no such repository'})
        served.create('idle')
        for name in ('keyless', 'keyed', 'idle'):
            served.wait_status(name, 'running')
        served.wait_status('broken', 'error')
        served.call('POST', '/api/workspaces/idle/stop')
        for number, task in enumerate(['do it', 'fail at it', 'wait for it']):
            body = {'workspaceId': 'keyed', 'task': task, 'sessionId': f'session-{number}'}
            served.call('POST', '/api/agent/execute', body, headers={'Accept': 'application/json'})
        served.wait_status('idle', 'stopped')
        yield served
    finally:
        served.stop()
        remove_objects(docker_client, served.instance)


def complaints(page, axe):
    """Return what axe-core finds wrong with what a page shows."""
    page.evaluate(f'() => {{ {axe} }}')
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")['violations']
    return [f"{item['id']}: {node['target']} {node['failureSummary']}"
            for item in found for node in item['nodes']]


@pytest.fixture(params=[(1440, 'light'), (390, 'dark')], ids=['wide and light', 'narrow and dark'])
def page(request, make_page):
    width, scheme = request.param
    return make_page(viewport={'width': width, 'height': 844}, color_scheme=scheme)


def test_nothing_is_found_in_any_state(server, page, axe):
    found = {}

    def look(state):
        if wrong := complaints(page, axe):
            found[state] = wrong

    open_dashboard(page, server)
    expect(page.locator('#templates tr').first).to_be_visible()
    look('home')
    page.click('#new-button')
    page.click('#create-form summary')
    look('create')
    page.keyboard.press('Escape')
    if page.locator('#help-button').is_visible():  # not on a phone, which has no keyboard
        page.click('#help-button')
        look('help')
        page.keyboard.press('Escape')
    ids = {item['name']: item['id'] for item in server.get('/api/workspaces')}
    for name, identity in ids.items():
        visit(page, f'#/w/{identity}', server)
        expect(page.locator('#ws-name')).to_have_text(name)
        expect(page.locator('#facts dt').first).to_be_visible()
        look(name)
    for dialog in ('stop', 'delete'):
        visit(page, f"#/w/{ids['keyed']}", server)
        page.click(f'#ws-{dialog}')
        look(dialog)
        page.keyboard.press('Escape')
    for number, words in enumerate(['It is done.', 'AGENT_FAILED', 'Half of it']):
        visit(page, f"#/w/{ids['keyed']}/agent/session-{number}", server)
        expect(page.locator('#transcript')).to_contain_text(words)
        look(f'task {number}')
    assert not found, '\n'.join(f'{state}: {text}' for state, texts in found.items() for text in texts)


def test_nothing_is_found_while_the_server_is_away_or_wants_its_token(guarded, make_page, axe):
    page = make_page(expected='status of 401|WebSocket|ERR_')
    visit(page, '', guarded)
    expect(page.locator('#token-dialog')).to_be_visible()
    assert complaints(page, axe) == []
    page.fill('#token-form [name=token]', 'open sesame')
    page.click('#token-submit')
    expect(page.locator('#link')).to_have_text('live')
    assert complaints(page, axe) == []
    guarded.stop()
    expect(page.locator('#banners')).to_contain_text('Reconnecting')
    assert complaints(page, axe) == []


def test_nothing_is_found_where_the_page_does_not_come_up(server, make_page, axe):
    page = make_page(expected='ERR_FAILED')
    page.route('**/api/workspaces', lambda route: route.abort())
    visit(page, '', server)
    expect(page.locator('#failure')).to_be_visible()
    assert complaints(page, axe) == []
