"""What a server of 1, 28 and 100 running workspaces takes, each against one; their image is tiny, so that it
is the server that grows."""
import gevent

from .common import cpu_of, memory_of, ms, percentile, turn_about
from .creates import Creates

TITLE = 'As workspaces add up'
COUNTS = (1, 28, 100)
TURNS = 5
ASKED = 50  # times each GET
WATCHED = 3  # seconds for which the idle server is looked at


def measure(bench, section):
    grown, first = {}, {}
    with bench.served() as server:
        create, more = Creates(server, 'tiny'), Creates(server, 'tiny', 'more')
        create.http.running('first', template='tiny')
        for count in COUNTS:
            if missing := count - 1 - len(create.names):
                create.at_once(missing)
                gevent.sleep(3)
            found = figures(section, server, more, count)
            for what, (values, unit) in found.items():
                theirs = first.setdefault(what, values)
                grown.setdefault(what, {})[count] = percentile(values, 0.5)
                section.compare(f'{what}, {count} running', values, 'one workspace', theirs, unit=unit,
                                head=count == COUNTS[-1] and what in ('create', 'server, RSS'))
    section.picture('growth', 'As workspaces add up', 'running workspaces', 'ms, p50',
                    {what: grown[what] for what in ('create', 'list', 'by id')}, log=False)
    section.picture('growth-memory', 'Memory of the server', 'running workspaces', 'MB',
                    {'RSS': grown['server, RSS']}, log=False)


def figures(section, server, create, count):
    """Return {what: (values, unit)} beside so many workspaces."""
    http = create.http
    used = cpu_of(server)
    gevent.sleep(WATCHED)
    used = (cpu_of(server) - used) / WATCHED * 100
    with section.watching(server, f'creates, {count} running'):
        made, = turn_about(TURNS, create, rest=0.3)
    create.delete()
    return {'create': (made, 'ms'),
            'list': ([ms(http, 'GET', '/api/workspaces') for _ in range(ASKED)], 'ms'),
            'by id': ([ms(http, 'GET', '/api/workspaces/first') for _ in range(ASKED)], 'ms'),
            'server, RSS': ([memory_of(server)], 'MB'), 'server, CPU while idle': ([used], '% of a core')}
