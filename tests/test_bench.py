"""What must not become slower, as ratios to what the server stands on: each pair in turn in the same run, and
of each the quicker quarter, so that a busy machine does not matter. `./run.sh bench` has the figures."""
import pytest

from bench import nodes
from bench.common import Bench, Http, Plain, ms, percentile, turn_about
from bench.creates import Creates
from bench.rest import bare

PATHS = ('/api/workspaces', '/api/workspaces/work')


@pytest.fixture
def bench(docker_client, templates_dir):
    made = Bench(templates_dir)
    yield made
    made.close()


def test_reading_and_creating_take_about_what_lies_below_them_takes(bench):
    with bench.served() as server, bare() as port:
        create, plain = Creates(server, 'tiny'), Plain(bench, server, 'tiny')
        create.http.running('work', template='tiny')
        below = Http(port)
        for path in PATHS:
            check(6, *turn_about(200, lambda path=path: ms(create.http.raw, 'GET', path),
                                 lambda: ms(below.raw, 'GET', '/')))
        plain.docker_py()
        check(2.5, *turn_about(4, create, plain.docker_py))


def test_engines_that_are_played_answer_what_the_server_asks(bench):
    with nodes.doubles(bench) as (server, clients):
        http = nodes.There(server)
        for name in ('first', 'second', 'third'):
            nodes.create(http, name, type='agent')
        assert {item['node'] for item in http('GET', '/api/workspaces')} == clients.keys()
        assert nodes.told(server, http, clients) > 0 and http.restart() > 0
        assert [item['status'] for item in http('GET', '/api/workspaces')] == ['running'] * 3
        for item in http('GET', '/api/workspaces'):
            assert http('DELETE', f"/api/workspaces/{item['id']}")['deleted']
        assert not any(client.api.containers(all=True) for client in clients.values())
        assert 'Traceback' not in server.log.read_text()


def check(times, ours, theirs):
    """See that ours take at most so many times as long as theirs."""
    assert percentile(ours, 0.25) < times * percentile(theirs, 0.25), (sorted(ours), sorted(theirs))
