"""The dashboard's first hour, in a real browser: the first image, a clone that fails, a missing key, the
token, and whatever keeps the page from coming up."""
import re

import pytest
from browsing import create, open_dashboard, visit
from helpers import PUBLIC_KEY
from playwright.sync_api import expect

# The first hour


def test_three_steps_lead_to_the_first_workspace(make_server, make_page, own_templates):
    folder, add = own_templates
    add('unused')
    add('fresh', *[f'RUN echo the-build-says-{number} && sleep 2' for number in range(4)])
    server = make_server(TEMPLATES_DIR=str(folder), DEFAULT_TEMPLATE='fresh', PREBUILD='fresh')
    page = make_page()
    open_dashboard(page, server)
    engine, image, last = (page.locator(f'#first-{name}') for name in ('engine', 'image', 'create'))
    expect(engine).to_have_attribute('data-state', 'done')
    expect(image).to_have_attribute('data-state', 'now')
    expect(page.locator('#build-words')).to_have_text(re.compile(r'^fresh · step \d of 12 · 0:\d\d$'))
    expect(page.locator('#build-lines')).to_be_hidden()
    page.click('#build-log summary')
    expect(page.locator('#build-lines')).to_contain_text('the-build-says-0')
    expect(page.locator('#templates tr', has_text='unused')).to_contain_text('not built yet')
    page.click('#first-button')
    create(page, 'first')
    building = re.compile(r'^Building fresh · step \d of 12 · 0:\d\d$')
    expect(page.locator('#ws-building')).to_have_text(building)
    page.click('.brand')
    expect(last).to_contain_text('first is being made')
    expect(page.locator('#build-lines')).to_contain_text('the-build-says-2')
    lines = page.locator('#build-lines').inner_text().splitlines()
    assert len(lines) == len(set(lines)), 'it is told from its beginning, and once'
    expect(image).to_have_attribute('data-state', 'done')
    expect(last).to_contain_text('first is running')
    last.locator('a').click()
    expect(page.locator('#ws-status')).to_have_text('running')
    page.click('.brand')
    expect(page.locator('#home')).to_be_visible()
    expect(page.locator('#first')).to_be_hidden()


def test_an_image_that_could_not_be_built_can_be_tried_again(make_server, make_page, own_templates):
    folder, add = own_templates
    add('fresh', 'RUN echo this-is-why; exit 3')
    server = make_server(TEMPLATES_DIR=str(folder), DEFAULT_TEMPLATE='fresh', PREBUILD='fresh')
    page = make_page()
    open_dashboard(page, server)
    step, again = page.locator('#first-image'), page.locator('#first-again')
    expect(step).to_contain_text('this-is-why')
    again.click()
    create(page, 'first')
    page.click('.brand')
    expect(page.locator('#workspaces .dot')).to_have_attribute('data-status', 'error')
    with page.expect_response('**/api/workspaces/*/retry'):  # not a form for one more
        again.click()
    server.wait_status('first', 'error')
    page.reload()  # nothing is being built when it looks
    expect(again).to_be_visible()
    add('fresh', 'RUN sleep 2')
    again.click()
    expect(step).to_have_attribute('data-state', 'now')
    expect(again).to_be_hidden()
    expect(page.locator('#first-create')).to_contain_text('first is running')


def test_why_the_engine_is_away_stands_above_everything(make_server, make_page):
    server = make_server(connected=False, DOCKER_HOST='tcp://127.0.0.1:9')
    page = make_page()
    open_dashboard(page, server)
    expect(page.locator('#banners')).to_contain_text('Docker does not answer at tcp://127.0.0.1:9')
    expect(page.locator('#first-engine')).to_have_attribute('data-state', 'wrong')
    expect(page.locator('#templates tr', has_text='tiny')).to_contain_text('not known')
    expect(page.locator('#home')).not_to_contain_text('missing')
    sign, title = (page.locator(f'#first-create {part}').bounding_box() for part in ('.sign', 'b'))
    assert abs(sign['y'] + sign['height'] / 2 - title['y'] - title['height'] / 2) < 2  # on one line


# A clone that fails, and a key that is missing


@pytest.fixture
def cloneless(make_server):
    """A server with the workspace `broken`, whose clone failed, and would fail again elsewhere."""
    server = make_server()
    server.create('broken', gitUrl='https://git.invalid/nothing.git', gitBranch='main',
                  labels={'team': 'web'},
                  env={'CLONE_FAILS': 'repository not found at the far end of a rather long line'})
    server.wait_status('broken', 'error')
    return server


def test_a_failed_clone_is_told_to_its_last_word_and_tried_again(cloneless, make_page):
    identity = cloneless.get('/api/workspaces/broken')['id']
    for width in (1440, 390):
        page = make_page(viewport={'width': width, 'height': 844})
        open_dashboard(page, cloneless, f'#/w/{identity}')
        expect(page.locator('#ws-error-title')).to_have_text('The clone failed.')
        expect(page.locator('#ws-error')).to_contain_text('at the far end of a rather long line')
        assert page.locator('#ws-error').evaluate('box => box.scrollHeight <= box.clientHeight && '
                                                  'box.scrollWidth <= box.clientWidth')
        expect(page.locator('#ws-start')).to_be_hidden()
    page.click('#ws-retry')
    form = page.locator('#create-form')
    expect(form.locator('[name=gitUrl]')).to_be_focused()
    shown = {'gitUrl': 'https://git.invalid/nothing.git', 'gitBranch': 'main', 'template': 'tiny',
             'labels': 'team=web', 'name': 'broken'}
    for name, value in shown.items():
        expect(form.locator(f'[name={name}]')).to_have_value(value)
    expect(form.locator('[name=name]')).to_be_disabled()
    page.fill('#create-form [name=gitUrl]', 'https://git.invalid/something.git')
    page.fill('#create-form [name=gitBranch]', '')
    page.click('#create-submit')
    expect(page.locator('#create-dialog')).to_be_hidden()
    found = cloneless.wait_status('broken', 'error')
    assert (found['gitUrl'], found['gitBranch']) == ('https://git.invalid/something.git', None)
    expect(page.locator('#ws-status')).to_have_text('error')
    page.click('.back')
    page.click('#new-button')
    expect(form.locator('[name=name]')).to_be_enabled()
    expect(form.locator('[name=gitUrl]')).to_have_value('')


def test_the_form_of_a_workspace_is_not_lost_with_its_failure(make_page, server):
    page = make_page()
    open_dashboard(page, server)
    page.click('#new-button')
    page.fill('#create-form [name=gitUrl]', 'https://user:secret@git.invalid/nothing.git')
    page.click('#create-form summary')
    page.fill('#create-form [name=env]', 'CLONE_FAILS=no access')
    create(page, 'secretive')
    page.click('#ws-retry')
    url = page.locator('#create-form [name=gitUrl]')
    expect(url).to_have_value('https://user:secret@git.invalid/nothing.git')
    expect(page.locator('#create-form [name=env]')).to_have_value('CLONE_FAILS=no access')


def test_a_key_is_asked_for_in_the_place_of_an_ssh_line_that_cannot_work(make_page, server):
    server.running('keyless')
    page = make_page(expected='status of 400')
    open_dashboard(page, server, '#/w/' + server.get('/api/workspaces/keyless')['id'])
    form = page.locator('#key-form')
    expect(form).to_be_visible()
    expect(page.locator('#facts')).not_to_contain_text('ssh -p')
    form.locator('button').click()
    expect(form.locator('.wrong')).to_contain_text('A public key is one line')
    form.locator('textarea').fill('nonsense')
    form.locator('button').click()
    expect(form.locator('.wrong')).to_contain_text('is no public key: that is all of a line of')
    form.locator('textarea').fill(f'{PUBLIC_KEY}\n')
    form.locator('button').click()
    expect(form).to_be_hidden()
    expect(page.locator('#facts')).to_contain_text('ssh -p')
    assert server.get('/api/workspaces/keyless')['sshKeys'] == 1


def test_no_key_is_asked_for_where_one_may_log_in_everywhere(make_server, make_page, tmp_path):
    (tmp_path / 'keys').write_text(f'{PUBLIC_KEY}\n')
    server = make_server(SSH_AUTHORIZED_KEYS=str(tmp_path / 'keys'))
    page = make_page()
    open_dashboard(page, server, '#/w/' + server.running('keyed')['id'])
    expect(page.locator('#facts')).to_contain_text('ssh -p')
    expect(page.locator('#key-form')).to_be_hidden()


# The token


def test_a_token_is_asked_for_and_kept_in_the_tab(guarded, make_page):
    server = guarded
    server.create('guarded', env={'PRINT': 'echo behind the token'})
    page = make_page(expected='status of 401')
    visit(page, '', server)
    expect(page.locator('#token-dialog')).to_contain_text('API_TOKEN that the server was started with')
    assert not page.locator('.top, .app').locator('visible=true').count(), 'nothing is drawn before it'
    for _ in range(3):
        page.keyboard.press('Escape')
    expect(page.locator('#token-dialog')).to_be_visible()
    page.fill('#token-form [name=token]', 'wrong')
    page.keyboard.press('Enter')
    expect(page.locator('#token-form .trouble')).to_contain_text('UNAUTHORIZED')
    expect(page.locator('#banners')).to_be_empty()
    page.fill('#token-form [name=token]', 'open sesame')
    page.click('#token-submit')
    expect(page.locator('#link')).to_have_text('live')
    page.click('#workspaces a')
    expect(page.locator('#log')).to_contain_text('behind the token')
    assert page.evaluate("[sessionStorage.getItem('token'), localStorage.length]") == ['open sesame', 0]
    page.reload()
    expect(page.locator('#link')).to_have_text('live')
    expect(page.locator('#token-dialog')).to_be_hidden()
    other = page.context.new_page()
    visit(other, '', server)
    expect(other.locator('#token-dialog')).to_be_visible()


def test_a_token_is_remembered_on_the_device_when_that_is_asked_for(guarded, make_page):
    page = make_page(expected='status of 401')
    visit(page, '', guarded)
    page.fill('#token-form [name=token]', 'open sesame')
    page.check('#token-form [name=remember]')
    page.click('#token-submit')
    expect(page.locator('#link')).to_have_text('live')
    page.close()
    other = page.context.new_page()
    open_dashboard(other, guarded)
    expect(other.locator('#token-dialog')).to_be_hidden()
    other.click('#help-button')
    other.click('#token-forget')
    expect(other.locator('#token-dialog')).to_be_visible()
    assert other.evaluate('localStorage.token ?? sessionStorage.token ?? null') is None


# What keeps the page from coming up


def as_a_stranger(route):
    """Send a request as a page of another origin would: the server itself refuses it."""
    headers = {**route.request.headers, 'origin': 'https://stranger.example'}
    route.fulfill(response=route.fetch(headers=headers))


@pytest.mark.parametrize('refused', [r'/static/(?!start)\w+\.js', '/api/'], ids=['modules', 'calls'])
def test_a_refusal_stands_on_the_page_in_the_words_of_the_server(make_page, server, refused):
    page = make_page(expected='status of 403|CORS')
    page.route(re.compile(refused), as_a_stranger)
    page.route('**/health', as_a_stranger)
    visit(page, '', server)
    failure = page.locator('#failure')
    expect(failure).to_contain_text('The server refuses this page')
    expect(failure).to_contain_text("Origin 'https://stranger.example' is not allowed here")
    expect(failure).to_contain_text('FORBIDDEN')
    assert not page.locator('.top, .app').locator('visible=true').count()


def test_a_server_that_does_not_answer_is_told_and_waited_for(make_page, server):
    page = make_page(expected='ERR_FAILED')
    page.route('**/api/workspaces', lambda route: route.abort())
    visit(page, '', server)
    expect(page.locator('#failure')).to_contain_text('The server does not answer')
    page.unroute('**/api/workspaces')
    expect(page.locator('#link')).to_have_text('live')
    expect(page.locator('#failure')).to_be_hidden()


def test_a_server_that_is_gone_before_the_scripts_came_is_told(make_page, server):
    page = make_page(expected='ERR_FAILED')
    page.route('**/app.js', lambda route: route.abort())
    page.route('**/health', lambda route: route.abort())
    visit(page, '', server)
    expect(page.locator('#failure')).to_contain_text('The server does not answer')


def test_a_script_that_fails_is_told(make_page, server):
    page = make_page(expected='made to fail')
    complained = 'throw new Error("made to fail")'
    page.route('**/home.js', lambda route: route.fulfill(body=complained, content_type='text/javascript'))
    visit(page, '', server)
    expect(page.locator('#failure')).to_contain_text('made to fail (home.js, line 1)')


def test_a_script_that_the_browser_gave_up_is_loaded_again(make_page, server):
    """Chromium does so when a network interface comes or goes, and each container makes one."""
    page = make_page(expected='ERR_FAILED')
    page.route('**/app.js', lambda route: route.abort(), times=3)
    open_dashboard(page, server)


def test_a_server_that_takes_long_is_told(make_page, server):
    page = make_page()
    page.route('**/api/workspaces', lambda route: None)
    visit(page, '', server)
    expect(page.locator('#failure')).to_contain_text('Loading')


def test_what_a_websocket_that_does_not_open_means_is_told(make_page, server):
    page = make_page()
    page.route_web_socket('**/agent/ws', lambda socket: socket.close())
    visit(page, '', server)
    expect(page.locator('#banners')).to_contain_text('the WebSocket agent/ws does not open')
    expect(page.locator('#home')).to_be_visible()
