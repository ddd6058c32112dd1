"""The pages that show the API, in a real browser."""
import contextlib
import re

import playwright.sync_api
import pytest
from browsing import pages_of, visit
from contract import FRAME
from playwright.sync_api import expect

from agentbackend import ROUTES


@pytest.fixture(scope='module')
def page(browser, server):
    """The reference. Its making takes a browser seconds, and a minute on a busy machine; a browser that has
    given up one of its files shows nothing."""
    with pages_of(browser) as make_page:
        page = make_page(viewport={'width': 1400, 'height': 900})
        for _ in range(3):
            visit(page, 'openapi', server)
            with contextlib.suppress(playwright.sync_api.Error):
                page.locator('button', has_text='(get /health)').wait_for(timeout=60_000)
                break
        yield page


def test_the_reference_lists_every_route_and_sends_a_request(page):
    for route in [route for route in ROUTES if route.tag]:
        shown = re.sub('<([^>:]+)(:[^>]*)?>', r'{\1}', route.path)
        expect(page.locator('button', has_text=f'({route.method.lower()} {shown})')).to_have_count(1)
    page.locator('button', has_text='(get /health)').click()
    with page.expect_response(lambda response: response.url.endswith('/health')) as answered:
        page.locator('button', has_text='Send').locator('visible=true').last.click()
    assert answered.value.json()['docker'] == 'connected'
    expect(page.locator('body')).to_contain_text('200')


def test_the_reference_offers_the_example_of_a_body(page):
    page.keyboard.press('Escape')  # the form of the call that was sent before
    page.route('**/api/workspaces', lambda route: route.fulfill(status=201, json={}))
    page.locator('button', has_text='(post /api/workspaces)').click()
    with page.expect_request(lambda request: request.url.endswith('/api/workspaces')) as asked:
        page.locator('button', has_text='Send').locator('visible=true').last.click()
    assert asked.value.post_data_json == FRAME['examples']['workspace-create']['simple']['value']
