"""What must not become slower, as ratios to what the server stands on: each pair in turn in the same run, and
of each the quicker quarter, so that a busy machine does not matter. `./run.sh bench` has the figures."""
import pytest

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


def check(times, ours, theirs):
    """See that ours take at most so many times as long as theirs."""
    assert percentile(ours, 0.25) < times * percentile(theirs, 0.25), (sorted(ours), sorted(theirs))
