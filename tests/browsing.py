"""A real browser, and pages in it whose complaints fail a test."""
import contextlib
import re
import shutil

import playwright.sync_api
import pytest
from playwright.sync_api import expect

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
ARGUMENTS = ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking']
PATIENCE = 30_000  # ms
# Chromium gives up what it loads when an interface comes or goes, as with every container on this machine.
# The page has to get over that, and what the browser writes on the console of it is no complaint.
RESTLESS = 'ERR_NETWORK_CHANGED'
HERE = r'(https?|wss?)://(127\.0\.0\.1|localhost|dev\.example\.org)[:/]|data:|blob:'


expect.set_options(timeout=PATIENCE)


@contextlib.contextmanager
def opened_browser(*arguments, path=CHROMIUM):
    """Give a browser for the length of a block."""
    with playwright.sync_api.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=[*ARGUMENTS, *arguments])
        yield chromium
        chromium.close()


@pytest.fixture(scope='module')
def browser():
    with opened_browser() as chromium:
        yield chromium


@contextlib.contextmanager
def pages_of(browser):
    """Give a function that opens pages of their own; what they complain of on the console fails the test,
    unless it is told as `expected`."""
    contexts, complaints = [], []

    def make(*, expected='$^', **options):
        context = browser.new_context(**{'viewport': {'width': 1280, 'height': 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)

        def complain(text):
            if not re.search(f'{expected}|{RESTLESS}', text):
                complaints.append(text)
        page.on('console', lambda message: complain(message.text) if message.type == 'error' else None)
        page.on('pageerror', lambda error: complain(str(error)))
        page.on('request', lambda request: None if re.match(HERE, request.url)
                else complaints.append(f'it asked for {request.url}'))
        return page

    yield make
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def make_page(browser):
    with pages_of(browser) as make:
        yield make


def visit(page, url, server=None):
    """Open an address, of a server if one is given, again where the browser gave up on it."""
    url = f'http://127.0.0.1:{server.port}/{url}' if server else url
    for _ in range(5):
        try:
            return page.goto(url)
        except playwright.sync_api.Error as error:
            if RESTLESS not in str(error):
                raise
    raise AssertionError(f'{url} was given up each time')


def open_dashboard(page, server, place=''):
    """Open the dashboard, or a place in it, and wait until it is live."""
    visit(page, place, server)
    expect(page.locator('#link')).to_have_text('live')


def see(page, seen=True):
    """Let a page be seen, or not."""
    page.evaluate(f"""() => {{
        Object.defineProperty(document, 'hidden', {{value: {str(not seen).lower()}, configurable: true}});
        document.dispatchEvent(new Event('visibilitychange'));
    }}""")


def create(page, name):
    """Fill in the name in the form of a new workspace, and make it."""
    page.fill('#create-form [name=name]', name)
    page.click('#create-submit')
    expect(page.locator('#ws-name')).to_have_text(name)


def log_lines(page):
    """Return the lines that the log shows."""
    return page.locator('#log .line')
