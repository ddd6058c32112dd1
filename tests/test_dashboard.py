"""The dashboard and the reference, in a real browser, against a real server and a real engine."""
import re
import shlex
import shutil
import socket
import time

import pytest
from conftest import Served, objects_of, remove_objects
from playwright.sync_api import expect, sync_playwright

from agentbackend import ROUTES

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
ARGUMENTS = ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking']
PATIENCE = 30_000  # ms

# It does what its task says: `plan` has three steps, `wander` tells no total and goes on until it is
# cancelled, `nasty` tries to break the page.
AGENT = r'''
read -r task
say() { printf '%s\n' "$1"; }
case $task in
plan*)
    say "I do this: $task"
    for step in 1 2 3; do
        say "{\"type\":\"progress\",\"data\":{\"step\":$step,\"total\":3,\"message\":\"Creating file$step.ts\"}}"
        say "{\"type\":\"log\",\"data\":{\"stream\":\"tool\",\"tool\":\"Write\",\"status\":\"started\",\"message\":\"file$step.ts\"}}"
        sleep 1
        say "{\"type\":\"log\",\"data\":{\"stream\":\"tool\",\"tool\":\"Write\",\"status\":\"completed\",\"message\":\"file$step.ts\"}}"
    done
    say '{"type":"result","data":{"message":"All three files are there."}}' ;;
wander*)
    step=0
    while :; do
        step=$((step + 1))
        say "{\"type\":\"progress\",\"data\":{\"step\":$step,\"total\":null,\"message\":\"Looking around\"}}"
        sleep 0.3
    done ;;
*)
    say '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
    say '{"type":"progress","data":{"step":1,"total":2,"message":"<b onclick=hack()>bold</b>"}}'
    say '{"type":"result","data":{"message":"<img src=x onerror=window.hacked=1>"}}' ;;
esac
'''  # noqa: E501


@pytest.fixture(scope='module')
def browser():
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def make_page(browser):
    """A function that opens pages of their own; what they complain of on the console fails the test, unless
    it is told as `expected`."""
    # Chromium breaks off requests, and says so, whenever the engine gives this machine a network interface.
    contexts, complaints = [], []

    def make(*, expected='$^', **options):
        expected = f'{expected}|ERR_NETWORK_CHANGED'
        context = browser.new_context(**{'viewport': {'width': 1280, 'height': 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on('console', lambda message: complaints.append(message.text) if message.type == 'error'
                and not re.search(expected, message.text) else None)
        page.on('pageerror', lambda error: complaints.append(str(error)))
        page.on('request',
                lambda request: None if re.match(r'(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|data:|blob:',
                                                 request.url)
                else complaints.append(f'it asked for {request.url}'))
        return page

    yield make
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope='module')
def agent_server(tmp_path_factory, templates_dir, docker_client):
    """A server whose agent is a script, with one workspace `lab` of the template `blank`."""
    served = Served(tmp_path_factory.mktemp('served'), templates_dir,
                    AGENT_COMMAND=shlex.join(['sh', '-c', AGENT]), DEFAULT_AGENT='command').start()
    try:
        served.create('lab', template='blank')
        served.wait_status('lab', 'running', timeout=1500)
        yield served
    finally:
        served.stop()
        print(f'--- log of {served.instance}\n' + served.log.read_text()[-8000:])
        remove_objects(docker_client, served.instance)


def open_dashboard(page, server, place=''):
    page.goto(f'http://127.0.0.1:{server.port}/{place}')
    expect(page.locator('#link')).to_have_text('live', timeout=PATIENCE)


def log_lines(page):
    return page.locator('#log .line')


def free_port():
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


# A workspace's life


def test_a_workspace_lives_its_life_in_the_browser(make_server, make_page, own_templates, docker_client):
    folder, add = own_templates
    add('fresh', 'RUN echo the-build-says-this && sleep 2')
    server = make_server(TEMPLATES_DIR=str(folder))
    page = make_page(permissions=['clipboard-read', 'clipboard-write'])
    open_dashboard(page, server)
    expect(page.locator('#no-workspaces')).to_contain_text('No workspace yet')
    page.keyboard.press('n')
    page.fill('#create-form [name=name]', 'first')
    page.select_option('#create-form [name=template]', 'fresh')
    page.click('#create-form summary')
    page.fill('#create-form [name=ports]', '3000')
    page.fill('#create-form [name=labels]', 'team=web')
    page.fill('#create-form [name=env]', 'PRINT=echo apple; echo pear; echo pineapple')
    page.click('#create-submit')
    expect(page.locator('#ws-name')).to_have_text('first')
    expect(page.locator('#log')).to_contain_text('the-build-says-this', timeout=PATIENCE)
    expect(page.locator('#ws-status')).to_have_text('running', timeout=PATIENCE)
    expect(page.locator('#log')).to_contain_text('pineapple')
    shown = server.get('/api/workspaces/first')
    expect(page.locator('#ws-editor')).to_have_attribute('href', shown['codeServerUrl'])
    expect(page.locator('#facts')).to_contain_text('team=web')
    expect(page.locator('#facts a', has_text='3000')).to_have_attribute('href',
                                                                        re.compile(f":{shown['ports']['3000']}/$"))
    page.click('[title="Copy SSH line"]')
    assert page.evaluate('navigator.clipboard.readText()') == shown['sshCommand']
    expect(page.locator('#facts')).not_to_contain_text(shown['codeServerPassword'])
    page.click('[title="Copy password"]')
    assert page.evaluate('navigator.clipboard.readText()') == shown['codeServerPassword']
    page.click('[title=Show]')
    expect(page.locator('#facts')).to_contain_text(shown['codeServerPassword'])
    expect(page.locator('#chart-memory b')).to_contain_text('of', timeout=PATIENCE)
    expect(page.locator('#workspaces .spark')).to_contain_text('%')

    page.keyboard.press('/')
    page.keyboard.type('apple')
    expect(page.locator('#log-count')).to_contain_text('2 of')
    assert page.locator('#log mark').all_inner_texts() == ['apple', 'apple']
    page.fill('#log-search', '')
    page.click('#log-clear')
    expect(page.locator('#log-count')).to_contain_text('0 lines')

    page.click('#ws-stop')
    page.click('#stop-submit')
    expect(page.locator('#ws-status')).to_have_text('stopped', timeout=PATIENCE)
    expect(page.locator('#ws-editor')).to_be_hidden()
    page.click('#ws-start')
    expect(page.locator('#ws-status')).to_have_text('running', timeout=PATIENCE)
    page.click('#ws-restart')
    server.wait_status('first', 'running')
    expect(page.locator('#ws-status')).to_have_text('running', timeout=PATIENCE)

    page.click('#ws-delete')
    expect(page.locator('#delete-submit')).to_be_disabled()
    page.fill('#delete-form [name=confirmation]', 'firs')
    expect(page.locator('#delete-submit')).to_be_disabled()
    page.keyboard.press('Escape')
    expect(page.locator('#delete-dialog')).to_be_hidden()
    page.click('#ws-delete')
    page.fill('#delete-form [name=confirmation]', 'first')
    page.click('#delete-submit')
    expect(page.locator('#no-workspaces')).to_contain_text('No workspace yet', timeout=PATIENCE)
    expect(page.locator('#home')).to_be_visible()
    assert objects_of(docker_client, server.instance) == []


def test_what_others_do_shows_at_once(make_page, server):
    page = make_page()
    open_dashboard(page, server)
    server.running('elsewhere')
    expect(page.locator('#workspaces li',
                        has_text='elsewhere').locator('.dot')).to_have_attribute('data-status', 'running')
    assert server.call('DELETE', '/api/workspaces/elsewhere').status_code == 200
    expect(page.locator('#workspaces li', has_text='elsewhere')).to_have_count(0)


def test_errors_stand_at_their_fields_in_the_words_of_the_contract(make_page, server):
    page = make_page(expected='status of 40')
    open_dashboard(page, server)
    server.create('taken')
    page.click('#new-button')
    page.fill('#create-form [name=name]', 'a b')
    page.click('#create-form summary')
    page.fill('#create-form [name=ports]', '80 99999')
    page.fill('#create-form [name=ttl]', 'soon')
    page.click('#create-submit')
    expect(page.locator('[data-for=name]').first).to_contain_text("'a b' does not fit")
    expect(page.locator('[data-for=ports]')).to_contain_text('ports.1')
    expect(page.locator('[data-for=ttl]')).to_contain_text("'soon'")
    expect(page.locator('#create-form [name=name]')).to_be_focused()
    page.fill('#create-form [name=name]', 'taken')
    page.fill('#create-form [name=ports]', '')
    page.fill('#create-form [name=ttl]', '')
    page.click('#create-submit')
    expect(page.locator('#create-form .trouble')).to_contain_text('WORKSPACE_ALREADY_EXISTS')
    expect(page.locator('[data-for=name]').first).to_be_hidden()


# What containers print


def test_hostile_output_is_only_text(make_page, server):
    # busybox printf understands \033; the names would end the test's own console without complaint if they
    # ran
    nasty = r"""echo '<img src=x onerror="window.hacked=1">'; printf '\033[31mred\033[0m \033[1;38;5;208mbold\033[0m \033]0;title\007\033[2J\033[10;10Hmoved\n'; """  # noqa: E501
    nasty += r"""printf '10%%\r50%%\rdone\n'; echo '<script>window.hacked=1</script>'; printf '\033]8;;javascript:alert(1)\007link\033]8;;\007\n'"""  # noqa: E501
    server.running('nasty', env={'PRINT': nasty})
    page = make_page()
    open_dashboard(page, server, '#/w/' + server.get('/api/workspaces/nasty')['id'])
    log = page.locator('#log')
    expect(log).to_contain_text('<img src=x onerror="window.hacked=1">')
    expect(log).to_contain_text('<script>window.hacked=1</script>')
    expect(log.locator('.line', has_text='moved').locator('span').first).to_have_text('red bold moved')
    expect(log.locator('.f1')).to_have_text('red')
    assert log.locator('.bold').evaluate('node => getComputedStyle(node).color') == 'rgb(255, 135, 0)'
    expect(log.locator('.line', has_text='done').locator('> span')).to_have_text('done')
    expect(log.locator('.line', has_text='link').locator('> span')).to_have_text('link')
    assert page.evaluate('window.hacked') is None and log.locator('img, script, a').count() == 0


def test_a_log_of_many_lines_stays_quick(make_page, server):
    """The view holds 10,000 lines and drops the oldest; no task of the page takes long enough to be felt."""
    server.running('flood',
                   env={'PRINT': 'while [ ! -e /go ]; do sleep 0.1; done; i=0; while [ $i -lt 12000 ]; do '
                                 'i=$((i+1)); echo "line $i of the flood"; done; echo the end'})
    page = make_page()
    open_dashboard(page, server, '#/w/' + server.get('/api/workspaces/flood')['id'])
    expect(page.locator('#log')).to_contain_text('tiny is up')
    page.evaluate("""() => { window.longest = 0;
        new PerformanceObserver((list) => { for (const entry of list.getEntries()) window.longest = Math.max(window.longest, entry.duration); }).observe({entryTypes: ['longtask']}); }""")  # noqa: E501
    container = server.get('/api/workspaces/flood')['containerId']
    server_side = __import__('docker').from_env()
    server_side.containers.get(container).exec_run(['touch', '/go'])
    server_side.close()
    expect(log_lines(page).last).to_contain_text('the end', timeout=PATIENCE)
    count = page.evaluate("document.querySelectorAll('#log .line').length")
    assert 1000 < count <= 10_250
    assert page.evaluate('window.longest') < 1000, 'of two cores that others use too'
    assert page.locator('#log').evaluate('box => box.scrollHeight - box.scrollTop - box.clientHeight') < 40
    took = page.evaluate("""async () => { const view = document.getElementById('log-search'); const start = performance.now();
        view.value = '99 of'; view.dispatchEvent(new Event('input'));
        while (!document.getElementById('log-count').textContent.includes(' of ')) await new Promise(requestAnimationFrame);
        return performance.now() - start; }""")  # noqa: E501
    assert took < 3000
    expect(page.locator('#log mark').last).to_have_text('99 of')


def test_a_paused_log_waits_and_loses_nothing(make_page, server):
    server.running('ticking', env={'PRINT': 'i=0; while :; do i=$((i+1)); echo "tick $i."; sleep 0.1; done'})
    page = make_page()
    open_dashboard(page, server, '#/w/' + server.get('/api/workspaces/ticking')['id'])
    expect(page.locator('#log')).to_contain_text('tick 5.')
    page.keyboard.press('p')
    expect(page.locator('#log-pause')).to_have_attribute('aria-pressed', 'true')
    before = log_lines(page).count()
    expect(page.locator('#log-count')).to_contain_text(re.compile(r'paused, \d\d new'))
    assert log_lines(page).count() == before
    page.keyboard.press('p')
    page.wait_for_function(f"document.querySelectorAll('#log .line').length > {before + 5}")
    numbers = [int(number) for number in re.findall(r'tick (\d+)\.', page.locator('#log').inner_text())]
    assert numbers == list(range(1, len(numbers) + 1))
    server.call('DELETE', '/api/workspaces/ticking')


# Agents


def test_a_task_runs_to_its_end_and_another_is_cancelled(make_page, agent_server):
    page = make_page()
    open_dashboard(page, agent_server, '#/w/' + agent_server.get('/api/workspaces/lab')['id'])
    expect(page.locator('#ws-editor')).to_be_visible()
    page.keyboard.press('a')
    page.fill('textarea[name=task]', 'plan three files')
    page.keyboard.press('Control+Enter')
    track = page.locator('#progress .track')
    expect(track).to_have_attribute('aria-valuetext', re.compile('^2 of 3 · Creating file2.ts'),
                                    timeout=PATIENCE)
    expect(track).to_have_attribute('aria-valuemax', '3')
    expect(page.locator('.task-text')).to_have_text('plan three files')
    expect(page.locator('#agent-count')).to_have_text('1')
    expect(page.locator('.end')).to_contain_text('All three files are there.', timeout=PATIENCE)
    expect(page.locator('.said')).to_have_text('I do this: plan three files')
    assert page.locator('.did').evaluate_all('all => all.map((node) => node.dataset.status)') == ['completed'] * 3  # noqa: E501
    expect(page.locator('#sessions li')).to_have_count(1)
    expect(page.locator('#sessions li')).to_contain_text('completed')

    page.click('#session-new')
    expect(page.locator('.end')).to_have_count(0)
    page.fill('textarea[name=task]', 'wander about')
    page.click('#task-run')
    expect(page.locator('#progress .track.unknown')).to_be_visible(timeout=PATIENCE)
    expect(track).to_have_attribute('aria-valuetext', re.compile(r'\d done so far · Looking around'))
    assert track.get_attribute('aria-valuenow') is None
    page.click('#task-cancel')
    expect(page.locator('.end.failed')).to_contain_text('AGENT_CANCELLED', timeout=PATIENCE)
    expect(page.locator('#task-run')).to_be_enabled()
    expect(page.locator('#sessions li').first).to_contain_text('cancelled')

    page.fill('textarea[name=task]', 'plan again, in the same session')
    page.click('#task-run')
    expect(page.locator('.end')).to_have_count(2, timeout=PATIENCE)
    assert page.locator('.task-text').all_inner_texts() == ['wander about', 'plan again, in the same session']
    expect(page.locator('#sessions li')).to_have_count(2)
    page.reload()
    expect(page.locator('.end')).to_have_count(2, timeout=PATIENCE)
    assert page.locator('.task-text').all_inner_texts() == ['wander about', 'plan again, in the same session']


def test_what_an_agent_says_is_only_text(make_page, agent_server):
    page = make_page()
    open_dashboard(page, agent_server, '#/w/' + agent_server.get('/api/workspaces/lab')['id'] + '/agent')
    page.fill('textarea[name=task]', 'be nasty')
    page.click('#task-run')
    expect(page.locator('.end')).to_contain_text('<img src=x onerror=window.hacked=1>', timeout=PATIENCE)
    expect(page.locator('#transcript')).to_contain_text('<script>window.hacked=1</script>')
    assert page.evaluate('window.hacked') is None
    assert page.locator('#transcript img, #transcript script').count() == 0


def test_the_editor_opens(make_page, agent_server):
    page = make_page(expected='.')  # the editor's own words are its own affair
    open_dashboard(page, agent_server, '#/w/' + agent_server.get('/api/workspaces/lab')['id'])
    with page.context.expect_page() as opened:
        page.click('#ws-editor')
    editor = opened.value
    editor.fill('input[type=password]', agent_server.get('/api/workspaces/lab')['codeServerPassword'])
    editor.keyboard.press('Enter')
    expect(editor.locator('.monaco-workbench')).to_be_visible(timeout=60_000)


# The connection


def test_the_page_comes_back_with_the_server(make_server, make_page):
    server = make_server(PORT=str(free_port()))
    server.running('steady', env={'PRINT': 'i=0; while :; do i=$((i+1)); echo "tick $i."; sleep 0.2; done'})
    page = make_page(expected='ERR_CONNECTION_REFUSED|WebSocket|ERR_EMPTY_RESPONSE|ERR_CONNECTION_RESET')
    open_dashboard(page, server, '#/w/' + server.get('/api/workspaces/steady')['id'])
    expect(page.locator('#log')).to_contain_text('tick 3.')
    server.kill()
    expect(page.locator('#banner')).to_contain_text('Reconnecting')
    expect(page.locator('#link')).to_have_text('reconnecting')
    time.sleep(2)
    server.start()
    expect(page.locator('#link')).to_have_text('live', timeout=PATIENCE)
    expect(page.locator('#banner')).to_be_hidden()
    last = max(int(number) for number in re.findall(r'tick (\d+)\.', page.locator('#log').inner_text()))
    expect(page.locator('#log')).to_contain_text(f'tick {last + 15}.', timeout=PATIENCE)
    numbers = [int(number) for number in re.findall(r'tick (\d+)\.', page.locator('#log').inner_text())]
    assert numbers == list(range(1, len(numbers) + 1))
    expect(page.locator('#ws-status')).to_have_text('running')


def test_a_token_is_asked_for_and_kept_in_the_tab(make_server, make_page):
    server = make_server(API_TOKEN='open sesame')
    server.headers['Authorization'] = 'Bearer open sesame'
    server.create('guarded', env={'PRINT': 'echo behind the token'})
    page = make_page(expected='status of 401')
    page.goto(f'http://127.0.0.1:{server.port}/')
    expect(page.locator('#token-dialog')).to_be_visible()
    page.fill('#token-form [name=token]', 'wrong')
    page.keyboard.press('Enter')
    expect(page.locator('#token-form .trouble')).to_contain_text('UNAUTHORIZED')
    page.fill('#token-form [name=token]', 'open sesame')
    page.click('#token-submit')
    expect(page.locator('#link')).to_have_text('live')
    page.click('#workspaces a')
    expect(page.locator('#log')).to_contain_text('behind the token')
    assert page.evaluate("[sessionStorage.getItem('token'), localStorage.length]") == ['open sesame', 0]
    page.reload()
    expect(page.locator('#link')).to_have_text('live')
    expect(page.locator('#token-dialog')).to_be_hidden()


# Forms of the page


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_nothing_sticks_out_on_a_phone(make_page, server, scheme):
    server.running(f'pocket-{scheme}', ports=[3000],
                   labels={'a-rather-long-label': 'with-a-value-that-is-long-as-well'})
    page = make_page(viewport={'width': 360, 'height': 640}, color_scheme=scheme, has_touch=True)
    open_dashboard(page, server)
    place = '#/w/' + server.get(f'/api/workspaces/pocket-{scheme}')['id']
    for here in ('#/', place, f'{place}/agent'):
        page.goto(f'http://127.0.0.1:{server.port}/{here}')
        page.wait_for_timeout(300)
        assert page.evaluate('document.documentElement.scrollWidth') == 360
        assert page.evaluate("document.querySelector('.app').scrollWidth") <= 360
    page.click('.back')
    expect(page.locator('#workspaces')).to_be_visible()
    page.click('#new-button')
    assert page.locator('#create-dialog').evaluate('dialog => dialog.scrollWidth <= dialog.clientWidth')


def test_the_keyboard_is_enough(make_page, server):
    names = ['keys-one', 'keys-two']
    for name in names:
        server.running(name)
    page = make_page()
    open_dashboard(page, server)
    page.keyboard.press('/')
    page.keyboard.type('keys-')
    page.keyboard.press('Escape')
    page.keyboard.press('j')
    expect(page.locator('#ws-name')).to_have_text('keys-two')
    page.keyboard.press('j')
    expect(page.locator('#ws-name')).to_have_text('keys-one')
    page.keyboard.press('k')
    expect(page.locator('#ws-name')).to_have_text('keys-two')
    page.keyboard.press('a')
    expect(page.locator('#agent-panel')).to_be_visible()
    page.keyboard.press('l')
    expect(page.locator('#logs-panel')).to_be_visible()
    page.keyboard.press('?')
    expect(page.locator('#help-dialog')).to_be_visible()
    page.keyboard.press('Escape')
    expect(page.locator('#help-dialog')).to_be_hidden()
    for _ in range(4):
        page.keyboard.press('Tab')
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != 'none'
    page.keyboard.press('Escape')
    page.keyboard.press('Escape')
    expect(page.locator('#home')).to_be_visible()


def test_the_colours_follow_the_system_until_they_are_chosen(make_page, server):
    page = make_page(color_scheme='dark')
    open_dashboard(page, server)

    def background():
        return page.evaluate('getComputedStyle(document.body).backgroundColor')
    dark = background()
    page.keyboard.press('t')
    light = background()
    assert light != dark
    page.reload()
    assert background() == light
    page.keyboard.press('t')
    assert background() == dark


# The reference


def test_the_reference_lists_every_route_and_sends_a_request(make_page, server):
    page = make_page(viewport={'width': 1400, 'height': 900})
    page.goto(f'http://127.0.0.1:{server.port}/openapi')
    for route in ROUTES:
        shown = re.sub('<([^>:]+)(:[^>]*)?>', r'{\1}', route.path)
        expect(page.locator('button', has_text=f'({route.method.lower()} {shown})')).to_have_count(1,
                                                                                                   timeout=PATIENCE)
    page.locator('button', has_text='(get /health)').click()
    with page.expect_response(lambda response: response.url.endswith('/health')) as answered:
        page.locator('button', has_text='Send').locator('visible=true').last.click()
    assert answered.value.json()['docker'] == 'connected'
    expect(page.locator('body')).to_contain_text('200')
