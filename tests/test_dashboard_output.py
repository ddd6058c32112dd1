"""What containers print and agents do, as the dashboard shows it in a real browser."""
import re
import shlex

import pytest
from browsing import PATIENCE, log_lines, open_dashboard, see, visit
from conftest import Served, remove_objects
from playwright.sync_api import expect

# It does what its task says: `plan` has three steps of two calls at a time, `wander` tells no total and goes
# on until it is cancelled, `nasty` tries to break the page.
AGENT = r'''
read -r task
say() { printf '%s\n' "$1"; }
case $task in
plan*)
    say "I do this: $task"
    for step in 1 2 3; do
        say '{"type":"progress","data":{"step":'$step',"total":3,"message":"Creating file'$step'.ts"}}'
        data='{"stream":"tool","message":"file'$step'.ts","tool":'
        for tool in Write Read; do say '{"type":"log","data":'"$data"'"'$tool'","status":"started"}}'; done
        sleep 1
        for tool in Write Read; do say '{"type":"log","data":'"$data"'"'$tool'","status":"completed"}}'; done
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
'''


@pytest.fixture(scope='module')
def agent_server(tmp_path_factory, templates_dir, docker_client, base_image):
    """A server whose agent is a script, with one workspace `lab` of the template `blank`, and one `elsewhere`
    that has printed much."""
    served = Served(tmp_path_factory.mktemp('served'), templates_dir,
                    AGENT_COMMAND=shlex.join(['sh', '-c', AGENT]), DEFAULT_AGENT='command').start()
    try:
        served.create('elsewhere', env={'PRINT': 'seq 400; echo the end'})
        served.create('lab', template='blank')
        served.wait_status('lab', 'running', timeout=1500)
        yield served
    finally:
        served.stop()
        print(f'--- log of {served.instance}\n' + served.log.read_text()[-8000:])
        remove_objects(docker_client, served.instance)


# What containers print


def test_hostile_output_is_only_text(make_page, server):
    # busybox printf understands \033; the names would end the test's own console without complaint if they
    # ran
    nasty = '; '.join([
        r"""echo '<img src=x onerror="window.hacked=1">'""",
        r"""printf '\033[31mred\033[0m \033[1;38;5;208mbold\033[0m '""",
        r"""printf '\033]0;title\007\033[2J\033[10;10Hmoved\n'""",
        r"""printf '10%%\r50%%\rdone\n'; echo '<script>window.hacked=1</script>'""",
        r"""printf '\033]8;;javascript:alert(1)\007link\033]8;;\007\n'"""])
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


def test_a_log_of_many_lines_stays_quick(make_page, server, docker_client):
    """The view holds 10,000 lines and drops the oldest; no task of the page takes long enough to be felt."""
    server.running('flood',
                   env={'PRINT': 'while [ ! -e /go ]; do sleep 0.1; done; i=0; while [ $i -lt 12000 ]; do '
                                 'i=$((i+1)); echo "line $i of the flood"; done; echo the end'})
    page = make_page()
    open_dashboard(page, server, '#/w/' + server.get('/api/workspaces/flood')['id'])
    expect(page.locator('#log')).to_contain_text('workspace: started in tiny')
    page.evaluate("""() => { window.longest = 0;
        new PerformanceObserver((list) => {
            for (const entry of list.getEntries()) window.longest = Math.max(window.longest, entry.duration);
        }).observe({entryTypes: ['longtask']}); }""")
    container = server.get('/api/workspaces/flood')['containerId']
    docker_client.containers.get(container).exec_run(['touch', '/go'])
    expect(log_lines(page).last).to_contain_text('the end', timeout=PATIENCE)
    count = page.evaluate("document.querySelectorAll('#log .line').length")
    assert 1000 < count <= 10_250
    assert page.evaluate('window.longest') < 1000, 'of two cores that others use too'
    assert page.locator('#log').evaluate('box => box.scrollHeight - box.scrollTop - box.clientHeight') < 40
    took = page.evaluate("""async () => {
        const view = document.getElementById('log-search'), count = document.getElementById('log-count');
        const start = performance.now();
        view.value = '99 of'; view.dispatchEvent(new Event('input'));
        while (!count.textContent.includes(' of ')) await new Promise(requestAnimationFrame);
        return performance.now() - start; }""")
    assert took < 3000
    expect(page.locator('#log mark').last).to_have_text('99 of')


@pytest.fixture(params=['server', 'guarded'])
def served(request, docker_client):
    """A server, without a token and with one."""
    return request.getfixturevalue(request.param)


def test_older_lines_are_loaded_and_the_whole_log_is_downloaded(served, make_page):
    served.running('long', env={'PRINT': 'i=0; while [ $i -lt 5012 ]; do i=$((i+1)); echo "line $i"; done'})
    served.until(lambda: 'line 5012' in served.call('GET', '/api/workspaces/long/logs?tail=9').text)
    page = make_page(expected='status of 401')
    visit(page, '#/w/' + served.get('/api/workspaces/long')['id'], served)
    if served.headers:
        page.fill('#token-form [name=token]', 'open sesame')
        page.click('#token-submit')
    expect(page.locator('#log-count')).to_have_text('last 2,000 lines')
    expect(log_lines(page).first).to_contain_text('line 3013')
    page.click('#log-older')
    expect(page.locator('#log-count')).to_have_text('5,013 lines')
    expect(page.locator('#log-older')).to_be_hidden()
    shown = page.locator('#log .line > span').all_text_contents()
    assert shown == ['workspace: started in tiny', *[f'line {number}' for number in range(1, 5013)]]
    with page.expect_download() as downloaded:
        page.click('#log-download')
    assert downloaded.value.suggested_filename == 'long.log'
    with open(downloaded.value.path()) as file:
        assert file.read() == served.call('GET', '/api/workspaces/long/logs').text


def test_a_paused_log_waits_and_loses_nothing(make_page, server):
    server.running('ticking', env={'PRINT': 'i=0; while :; do i=$((i+1)); echo "tick $i."; sleep 0.1; done'})
    page = make_page()
    open_dashboard(page, server, '#/w/' + server.get('/api/workspaces/ticking')['id'])
    expect(page.locator('#log')).to_contain_text('tick 5.')
    page.keyboard.press('Alt+KeyP')
    expect(page.locator('#log-pause')).to_have_attribute('aria-pressed', 'true')
    before = log_lines(page).count()
    expect(page.locator('#log-count')).to_contain_text(re.compile(r'paused, \d\d new'))
    assert log_lines(page).count() == before
    page.keyboard.press('Alt+KeyP')
    page.wait_for_function(f"document.querySelectorAll('#log .line').length > {before + 5}")
    numbers = [int(number) for number in re.findall(r'tick (\d+)\.', page.locator('#log').inner_text())]
    assert numbers == list(range(1, len(numbers) + 1))
    server.call('DELETE', '/api/workspaces/ticking')


# Agents


def test_a_task_runs_to_its_end_and_another_is_cancelled(make_page, agent_server):
    page = make_page()
    open_dashboard(page, agent_server, '#/w/' + agent_server.get('/api/workspaces/lab')['id'])
    expect(page.locator('#ws-editor')).to_be_visible()
    page.keyboard.press('Alt+KeyA')
    page.fill('textarea[name=task]', 'plan three files')
    page.keyboard.press('Control+Enter')
    track = page.locator('#progress .track')
    expect(track).to_have_attribute('aria-valuetext', re.compile('^2 of 3 · Creating file2.ts'))
    expect(track).to_have_attribute('aria-valuemax', '3')
    expect(page.locator('.task-text')).to_have_text('plan three files')
    expect(page.locator('#agent-count')).to_have_text('1')
    # A page that is not seen leaves its connection to others, and misses nothing.
    with page.expect_event('requestfailed', lambda request: '/agent/sse/' in request.url):
        see(page, False)
    expect(page.locator('#sessions li')).to_contain_text('completed')
    see(page)
    expect(page.locator('.end')).to_contain_text('All three files are there.')
    expect(page.locator('.said')).to_have_text('I do this: plan three files')
    expect(page.locator('.step b')).to_have_text([f'Step {number} of 3' for number in (1, 2, 3)])
    done = page.locator('.did').evaluate_all('all => all.map((node) => node.dataset.status)')
    assert done == ['completed'] * 6
    expect(page.locator('#sessions li')).to_have_count(1)

    page.click('#session-new')
    expect(page.locator('.end')).to_have_count(0)
    page.fill('textarea[name=task]', 'wander about')
    page.click('#task-run')
    expect(page.locator('#progress .track.unknown')).to_be_visible()
    expect(track).to_have_attribute('aria-valuetext', re.compile(r'\d done so far · Looking around'))
    assert track.get_attribute('aria-valuenow') is None
    page.click('#task-cancel')
    expect(page.locator('.end.failed')).to_contain_text('AGENT_CANCELLED')
    expect(page.locator('#progress .words')).to_have_text('Cancelled')  # why stands above, once
    expect(page.locator('#task-run')).to_be_enabled()
    expect(page.locator('#sessions li').first).to_contain_text('cancelled')

    page.fill('textarea[name=task]', 'plan again, in the same session')
    page.click('#task-run')
    expect(page.locator('.end')).to_have_count(2)
    assert page.locator('.task-text').all_inner_texts() == ['wander about', 'plan again, in the same session']
    expect(page.locator('#sessions li')).to_have_count(2)
    page.reload()
    expect(page.locator('.end')).to_have_count(2)
    expect(page.locator('.task-text')).to_have_text(['wander about', 'plan again, in the same session'])


def test_a_task_is_given_once_and_nothing_of_it_shows_elsewhere(make_page, agent_server):
    page = make_page(expected='status of 40')
    identity = agent_server.get('/api/workspaces/elsewhere')['id']
    open_dashboard(page, agent_server, f'#/w/{identity}/agent/no-session')
    agent, wrong = (page.locator(f'#composer {part}') for part in ('[name=agent]', '[data-for=task]'))
    expect(agent).to_be_disabled()
    page.click('#task-run')
    expect(wrong).to_be_visible()

    def go(name):
        page.locator('#workspaces a', has_text=name).click()
        expect(page.locator('#ws-name')).to_have_text(name)
        page.click('#tab-agent')
    go('lab')
    expect(wrong).to_be_hidden()
    expect(agent).to_be_enabled()

    given = []
    page.route('**/api/agent/execute', lambda route: given.append(route))
    page.fill('textarea[name=task]', 'be nasty')
    with page.expect_request('**/api/agent/execute'):
        page.keyboard.press('Control+Enter')
    page.keyboard.press('Control+Enter')
    go('elsewhere')
    assert len(given) == 1
    given[0].continue_()
    expect(page.locator('textarea[name=task]')).to_have_value('')
    assert identity in page.url


def test_what_an_agent_says_is_only_text(make_page, agent_server):
    page = make_page()
    open_dashboard(page, agent_server, '#/w/' + agent_server.get('/api/workspaces/lab')['id'] + '/agent')
    page.fill('textarea[name=task]', 'be nasty')
    page.click('#task-run')
    expect(page.locator('.end')).to_contain_text('<img src=x onerror=window.hacked=1>')
    expect(page.locator('#transcript')).to_contain_text('<script>window.hacked=1</script>')
    assert page.evaluate('window.hacked') is None
    assert page.locator('#transcript img, #transcript script').count() == 0


def test_what_others_make_moves_neither_the_log_nor_the_focus(make_page, agent_server):
    def another(name):
        agent_server.create(name, template='tiny')
        expect(page.locator('#workspaces li', has_text=name)).to_be_visible()
    page = make_page()
    open_dashboard(page, agent_server, '#/w/' + agent_server.get('/api/workspaces/elsewhere')['id'])
    expect(page.locator('#log')).to_contain_text('the end')
    page.hover('#log')
    page.mouse.wheel(0, -2000)
    expect(page.locator('#log-jump')).to_be_visible()
    another('newcomer')
    expect(page.locator('#log-jump')).to_be_visible()
    visit(page, '#/w/' + agent_server.get('/api/workspaces/lab')['id'] + '/terminal', agent_server)
    rows = page.frame_locator('#terminal-panel iframe').locator('.xterm-rows')
    expect(rows).to_contain_text('$')
    page.keyboard.press('Control+F6')  # the other keys are the program's
    expect(page.locator('#tab-terminal')).to_be_focused()
    another('latecomer')
    expect(page.locator('#tab-terminal')).to_be_focused()


def test_a_terminal_outlives_the_page_and_the_server(make_page, agent_server):
    page = make_page(expected='status of (40|502)|ERR_CONNECTION_REFUSED|WebSocket')
    lab = agent_server.get('/api/workspaces/lab')
    open_dashboard(page, agent_server, f"#/w/{lab['id']}")
    page.click('#tab-terminal')
    rows = page.frame_locator('#terminal-panel iframe').locator('.xterm-rows')
    expect(rows).to_contain_text('$')
    page.keyboard.type('export KEPT=here; echo $((40 + 2))!\n')
    expect(rows).to_contain_text('42!')
    agent_server.settings['PORT'] = str(agent_server.port)
    page.route('**/api/**', lambda route: route.fulfill(status=502))  # as a proxy does in its place
    with page.expect_response(lambda answer: answer.frame != page.main_frame):
        agent_server.kill()
    expect(rows).to_contain_text('The connection is lost. Reconnecting')
    page.unroute('**/api/**')
    agent_server.start()
    expect(rows).not_to_contain_text('Reconnecting')
    expect(rows).to_contain_text('42!')
    rows.click()  # what the dashboard does when its server is back may take the focus
    page.keyboard.type('echo still $KEPT\n')
    expect(rows).to_contain_text('still here')
    page.set_viewport_size({'width': 900, 'height': 700})
    rows.click()
    page.keyboard.type('exit 3\n')
    expect(rows).to_contain_text('It ended with status 3. Press Enter to begin again.')


def test_what_is_nowhere_else_is_told_before_a_delete(make_page, agent_server):
    page, lab = make_page(), agent_server.get('/api/workspaces/lab')
    answer = agent_server.call('PUT', '/api/workspaces/lab/files/only-here.txt', data=b'x',
                               headers={'Content-Type': 'application/octet-stream'})
    assert answer.status_code == 201, answer.text
    changed = len(agent_server.get('/api/workspaces/lab/git')['changes'])
    open_dashboard(page, agent_server, f"#/w/{lab['id']}")
    page.click('#ws-delete')
    expect(page.locator('#delete-loss')).to_contain_text(f'{changed} changed file')
    expect(page.locator('#delete-loss')).not_to_contain_text('commit')  # but for the template's own
    page.keyboard.press('Escape')
    expect(page.locator('#delete-dialog')).to_be_hidden()
    made = agent_server.call('POST', '/api/workspaces/lab/exec',
                             {'command': 'git commit -q --allow-empty -m mine'})
    assert made.json()['data']['exitCode'] == 0
    page.click('#ws-delete')
    expect(page.locator('#delete-loss')).to_contain_text('2 commits on no remote')
    page.keyboard.press('Escape')


def test_a_terminal_fills_its_place_and_nothing_else_scrolls(make_page, agent_server):
    page = make_page()
    lab = agent_server.get('/api/workspaces/lab')['id']
    for number, height in enumerate((400, 507, 733, 844, 901)):
        page.set_viewport_size({'width': 390 + 211 * number, 'height': height})
        visit(page, f'terminal#{lab}/sized', agent_server)
        expect(page.locator('.xterm-rows')).to_contain_text('$')
        page.wait_for_timeout(200)  # until it was fitted
        for box in ('#terminal', '.xterm', ':root'):
            assert page.locator(box).evaluate('box => box.scrollWidth <= box.clientWidth && '
                                              'box.scrollHeight <= box.clientHeight'), (box, height)
        rows = page.locator('.xterm-screen').bounding_box()
        assert height - 30 < rows['y'] + rows['height'] <= height
    assert page.locator('.xterm-viewport').evaluate('box => getComputedStyle(box).colorScheme') == 'dark'
    assert agent_server.call('DELETE', '/api/workspaces/lab/terminals/sized').status_code == 200


def test_the_editor_opens(make_page, agent_server):
    page = make_page(expected='.')  # the editor's own words are its own affair
    open_dashboard(page, agent_server, '#/w/' + agent_server.get('/api/workspaces/lab')['id'])
    with page.context.expect_page() as opened:
        page.click('#ws-editor')
    editor = opened.value
    editor.fill('input[type=password]', agent_server.get('/api/workspaces/lab')['codeServerPassword'])
    editor.keyboard.press('Enter')
    expect(editor.locator('.monaco-workbench')).to_be_visible(timeout=60_000)
