"""The dashboard in a real browser: the life of workspaces, and the page itself."""
import re
import time

import pytest
from browsing import open_dashboard, see, visit
from conftest import ROOT, objects_of
from helpers import PUBLIC_KEY, free_port
from playwright.sync_api import expect

# What the page is made of


STATIC = ROOT / 'static'
IMPORT = re.compile(r"^(?:import|export) (?:[^;]*? from )?'\./([a-z]+\.js)';", re.MULTILINE)


def imports_of(name):
    return set(IMPORT.findall((STATIC / name).read_text()))


def test_modules_are_short_and_import_only_downwards():
    modules = {path.name for path in STATIC.glob('*.js')} - {'start.js'}
    below = {name: imports_of(name) & modules for name in modules}
    while free := {name for name, needed in below.items() if not needed}:
        below = {name: needed - free for name, needed in below.items() if name not in free}
    assert not below, f'these import each other: {sorted(below)}'
    for name in modules:
        lines = (STATIC / name).read_text().splitlines()
        assert lines[0].startswith('// '), f'{name} says at its head what it holds'
        assert len(lines) <= 400 and max(map(len, lines)) <= 110, name


def test_every_module_is_loaded_and_none_late(make_page, server):
    modules = {path.name for path in STATIC.glob('*.js')} - {'terminal.js'}  # of a page of its own
    page, loaded = make_page(), []
    page.on('response', lambda answer: loaded.append((answer.url.rpartition('/')[2], answer.status)))
    open_dashboard(page, server)
    scripts = {name: status for name, status in loaded if name.endswith('.js')}
    # 304 where the browser had to begin again, since the network of this machine had changed.
    assert set(scripts) == modules and set(scripts.values()) <= {200, 304}, scripts
    preloaded = page.locator('link[rel=modulepreload]').evaluate_all(
        "all => all.map(link => link.getAttribute('href'))")
    assert sorted(preloaded) == sorted(f'static/{name}' for name in modules - {'app.js', 'start.js'})


# A workspace's life


def test_a_workspace_lives_its_life_in_the_browser(make_server, make_page, own_templates, docker_client):
    folder, add = own_templates
    add('fresh', 'RUN echo the-build-says-this && sleep 2')
    server = make_server(TEMPLATES_DIR=str(folder))
    page = make_page(permissions=['clipboard-read', 'clipboard-write'])
    open_dashboard(page, server)
    expect(page.locator('#no-workspaces')).to_contain_text('No workspace yet')
    page.click('#new-button')
    page.fill('#create-form [name=name]', 'first')
    page.select_option('#create-form [name=template]', 'fresh')
    page.click('#create-form summary')
    page.fill('#create-form [name=ports]', '3000')
    page.fill('#create-form [name=labels]', 'team=web')
    page.fill('#create-form [name=sshPublicKeys]', PUBLIC_KEY)
    page.fill('#create-form [name=env]', 'PRINT=echo apple; echo pear; echo pineapple')
    page.click('#create-submit')
    expect(page.locator('#ws-name')).to_have_text('first')
    expect(page.locator('#log')).to_contain_text('the-build-says-this')
    expect(page.locator('#ws-status')).to_have_text('running')
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
    expect(page.locator('#chart-memory b')).to_contain_text('of')
    expect(page.locator('#workspaces .spark')).to_contain_text('%')

    page.keyboard.press('Alt+Slash')
    page.keyboard.type('apple')
    expect(page.locator('#log-count')).to_contain_text('2 of')
    assert page.locator('#log mark').all_inner_texts() == ['apple', 'apple']
    page.fill('#log-search', '')
    page.click('#log-clear')
    expect(page.locator('#log-count')).to_contain_text('0 lines')

    page.click('#ws-stop')
    page.click('#stop-submit')
    expect(page.locator('#ws-status')).to_have_text('stopped')
    expect(page.locator('#ws-editor')).to_be_hidden()
    page.click('#ws-start')
    expect(page.locator('#ws-status')).to_have_text('running')
    page.click('#ws-restart')
    server.wait_status('first', 'running')
    expect(page.locator('#ws-status')).to_have_text('running')

    page.click('#ws-delete')
    expect(page.locator('#delete-submit')).to_be_disabled()
    page.fill('#delete-form [name=confirmation]', 'firs')
    expect(page.locator('#delete-submit')).to_be_disabled()
    page.keyboard.press('Escape')
    expect(page.locator('#delete-dialog')).to_be_hidden()
    page.click('#ws-delete')
    page.fill('#delete-form [name=confirmation]', 'first')
    page.click('#delete-submit')
    expect(page.locator('#no-workspaces')).to_contain_text('No workspace yet')
    expect(page.locator('#home')).to_be_visible()
    assert objects_of(docker_client, server.instance) == []


def test_what_others_do_shows_at_once(make_page, server):
    page = make_page()
    open_dashboard(page, server)
    expect(page.locator('#no-workspaces')).to_be_visible()
    assert page.locator('#no-workspaces').bounding_box()['y'] < 200, 'it stands where the list begins'
    server.running('elsewhere')
    expect(page.locator('#workspaces li',
                        has_text='elsewhere').locator('.dot')).to_have_attribute('data-status', 'running')
    page.locator('#workspaces a', has_text='elsewhere').click()
    page.click('#ws-delete')
    expect(page.locator('#delete-dialog')).to_be_visible()
    assert server.call('DELETE', '/api/workspaces/elsewhere').status_code == 200
    expect(page.locator('#workspaces li', has_text='elsewhere')).to_have_count(0)
    expect(page.locator('#delete-dialog')).to_be_hidden()


def test_why_an_agent_can_not_work_stands_beside_the_button(make_page, server):
    page = make_page()
    open_dashboard(page, server, '#/w/' + server.running('agentless')['id'] + '/agent')
    expect(page.locator('#agent-reason')).to_contain_text('claude is not ready: Claude has no key')
    page.fill('#composer [name=agent]', 'command')
    expect(page.locator('#agent-reason')).to_be_hidden()
    page.fill('#composer [name=agent]', 'claude')
    expect(page.locator('#agent-reason')).to_be_visible()


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
    expect(page.locator('[data-for=name]').first).to_contain_text('name is "a b", but a name has only')
    expect(page.locator('[data-for=ports]')).to_contain_text('ports.1')
    expect(page.locator('[data-for=ttl]')).to_contain_text('ttl is "soon", but has to be')
    expect(page.locator('#create-form [name=name]')).to_be_focused()
    page.fill('#create-form [name=name]', 'taken')
    page.fill('#create-form [name=ports]', '')
    page.fill('#create-form [name=ttl]', '')
    page.click('#create-submit')
    expect(page.locator('#create-form .trouble')).to_contain_text('WORKSPACE_ALREADY_EXISTS')
    expect(page.locator('[data-for=name]').first).to_be_hidden()


# What workspaces use


def asked_of(page, seconds, begin=lambda: None):
    """Return the paths that a page asks for within some seconds from what `begin()` does."""
    asked = []
    page.on('request', lambda request: asked.append(re.sub(r'ws-\w+', '<id>', request.url.split('/', 3)[3])))
    begin()
    page.wait_for_timeout(seconds * 1000)
    return asked


def test_the_usage_of_all_workspaces_comes_in_one_answer(make_page, server):
    names = ['busy-one', 'busy-two', 'busy-three']
    for name in names:
        server.create(name)
    for name in names:
        server.wait_status(name, 'running')
    page = make_page()
    open_dashboard(page, server)
    for name in names:
        shown = page.locator('#workspaces li', has_text=name)
        expect(shown).to_contain_text(re.compile(r'\d % · [\d.]+ [KM]iB'))
    asked = asked_of(page, 6)
    assert 'api/workspaces/<id>' not in asked and 1 < asked.count('api/usage') <= 3
    page.locator('#workspaces a', has_text='busy-two').click()
    expect(page.locator('#chart-cpu b')).to_have_text(re.compile(r'^\d+\.\d %$'))


def test_nothing_is_asked_for_while_nobody_looks(make_page, server):
    server.running('unseen')
    page = make_page()
    open_dashboard(page, server)
    expect(page.locator('#workspaces li', has_text='unseen')).to_contain_text('%')
    assert asked_of(page, 4)
    see(page, False)
    page.wait_for_timeout(1000)  # what was asked for before
    assert asked_of(page, 12) == []
    asked = asked_of(page, 1, lambda: see(page))
    assert 'health' in asked
    expect(page.locator('#link')).to_have_text('live')


# The connection


def test_the_page_comes_back_with_the_server(make_server, make_page):
    server = make_server(PORT=str(free_port()))
    server.running('steady', env={'PRINT': 'i=0; while :; do i=$((i+1)); echo "tick $i."; sleep 0.2; done'})
    page = make_page(expected='ERR_CONNECTION_REFUSED|WebSocket|ERR_EMPTY_RESPONSE|ERR_CONNECTION_RESET')
    open_dashboard(page, server, '#/w/' + server.get('/api/workspaces/steady')['id'])
    expect(page.locator('#log')).to_contain_text('tick 3.')
    server.kill()
    expect(page.locator('#banners')).to_contain_text('Reconnecting')
    expect(page.locator('#link')).to_have_text('reconnecting')
    time.sleep(2)
    server.start()
    expect(page.locator('#link')).to_have_text('live')
    expect(page.locator('#banners')).to_be_empty()
    last = max(int(number) for number in re.findall(r'tick (\d+)\.', page.locator('#log').inner_text()))
    expect(page.locator('#log')).to_contain_text(f'tick {last + 15}.')
    numbers = [int(number) for number in re.findall(r'tick (\d+)\.', page.locator('#log').inner_text())]
    assert numbers == list(range(1, len(numbers) + 1))
    expect(page.locator('#ws-status')).to_have_text('running')


# Forms of the page


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_nothing_sticks_out_on_a_phone(make_page, server, scheme):
    server.running(f'pocket-{scheme}', ports=[3000], sshPublicKeys=[PUBLIC_KEY],
                   labels={'a-rather-long-label': 'with-a-value-that-is-long-as-well'})
    page = make_page(viewport={'width': 360, 'height': 640}, color_scheme=scheme, has_touch=True)
    open_dashboard(page, server)
    place = '#/w/' + server.get(f'/api/workspaces/pocket-{scheme}')['id']
    for here in ('#/', place, f'{place}/agent'):
        visit(page, here, server)
        page.wait_for_timeout(300)
        assert page.evaluate('document.documentElement.scrollWidth') == 360
        assert page.evaluate("document.querySelector('.app').scrollWidth") <= 360
    visit(page, place, server)
    page.click('[title=Show]')
    for title in ('Copy SSH line', 'Copy password'):
        copy = page.locator(f'[title="{title}"]')
        text = copy.locator('xpath=preceding-sibling::code').bounding_box()
        assert text['y'] - 5 < copy.bounding_box()['y'] < text['y'] + text['height'], title
    page.click('.back')
    expect(page.locator('#workspaces')).to_be_visible()
    expect(page.locator('.filter kbd')).to_be_hidden()
    page.click('#new-button')
    assert page.locator('#create-dialog').evaluate('dialog => dialog.scrollWidth <= dialog.clientWidth')


def test_the_keyboard_is_enough(make_page, server):
    names = ['keys-one', 'keys-two']
    for name in names:
        server.running(name)
    page = make_page()
    open_dashboard(page, server)
    page.keyboard.press('Alt+Slash')
    page.keyboard.type('keys-')
    page.keyboard.press('Escape')
    page.keyboard.press('Alt+KeyJ')
    expect(page.locator('#ws-name')).to_have_text('keys-two')
    page.keyboard.press('Alt+KeyJ')
    expect(page.locator('#ws-name')).to_have_text('keys-one')
    page.keyboard.press('Alt+KeyK')
    expect(page.locator('#ws-name')).to_have_text('keys-two')
    page.keyboard.press('Alt+KeyA')
    expect(page.locator('#agent-panel')).to_be_visible()
    page.keyboard.press('Alt+KeyL')
    expect(page.locator('#logs-panel')).to_be_visible()
    page.keyboard.press('a')  # as who dictates says it
    expect(page.locator('#agent-panel')).to_be_hidden()
    here = page.url
    on_a_mac = {'code': 'KeyA', 'key': 'å', 'altKey': True, 'bubbles': True}
    page.dispatch_event('#log-search', 'keydown', on_a_mac)
    assert page.url == here
    page.keyboard.press('Alt+KeyH')
    expect(page.locator('#help-dialog')).to_be_visible()
    assert page.locator('#new-button').get_attribute('title') == 'New workspace (Alt+N)'
    page.uncheck('#shortcuts')
    assert page.locator('#new-button').get_attribute('title') == 'New workspace'
    page.keyboard.press('Escape')
    expect(page.locator('#help-dialog')).to_be_hidden()
    page.reload()
    expect(page.locator('#ws-name')).to_have_text('keys-two')
    page.keyboard.press('Alt+KeyA')
    expect(page.locator('#agent-panel')).to_be_hidden()
    page.click('#help-button')
    page.check('#shortcuts')
    page.keyboard.press('Escape')
    page.keyboard.press('Alt+KeyA')
    expect(page.locator('#agent-panel')).to_be_visible()
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
    page.keyboard.press('Alt+KeyT')
    light = background()
    assert light != dark
    page.reload()
    assert background() == light
    page.keyboard.press('Alt+KeyT')
    assert background() == dark
