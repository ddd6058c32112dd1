"""POST to ready, which is when editor and SSH both answer: cold and warm against `docker run` of the same
image, and many at once.

The half of `docker run` begins when it is called, and is probed when it has returned; a cold create is asked
with `wait=running`, and is probed when that is answered, since who probes a container that starts slows it.
Of one that was made ahead, sshd answers a moment before it knows its owner's key, so the time until `running`
is measured beside.
All are deleted at the end: a delete slows the create after it.
"""
import itertools
import time

import gevent

from .common import Http, Plain, percentile, turn_about, wait_ready

TITLE = 'From POST to a ready workspace'
TEMPLATES = ('blank', 'bun-typescript')
REST = 1.0  # seconds between two of them
COLD, ROUNDS, CLAIMS, MEMBERS = 10, 6, 8, 8
AT_ONCE = {2: 2, 4: 2, 8: 1}  # claims at once: how often
MANY = 50


def measure(bench, section):
    cold(bench, section)
    warm(bench, section)
    many(bench, section)


class Creates:
    """Creates workspaces of a template, each under a name of its own."""

    def __init__(self, server, template, prefix='made', *, waits=True, probes=True):
        self.http, self._server, self._template, self._prefix = Http(server.port), server, template, prefix
        self._path, self._probes = '/api/workspaces' + '?wait=running' * waits, probes
        self._numbers, self.names = itertools.count(), []
        self.asked = self.cold = 0  # how many there were, and how many did not come from the pool

    def __call__(self, http=None, pause=0.005):
        """Return the ms from POST until editor and SSH answer, or until it is answered itself."""
        self.names.append(name := f'{self._prefix}-{next(self._numbers)}')
        begun = time.perf_counter()
        http = http or self.http
        made = http('POST', self._path, {'name': name, 'template': self._template})
        if self._probes:
            wait_ready(made['codeServerPort'], made['sshPort'], pause=pause)
        self.asked += 1
        self.cold += not made.get('warm')
        return (time.perf_counter() - begun) * 1000

    def at_once(self, count, pause=0.02):
        """Return the ms that each of several took that were asked for at the same time."""
        jobs = [gevent.spawn(self, Http(self._server.port), pause) for _ in range(count)]
        gevent.joinall(jobs, raise_error=True)
        return [job.value for job in jobs]

    def delete(self):
        """Delete all that were made, and wait until they are gone."""
        for name in self.names:
            self.http('DELETE', f'/api/workspaces/{name}')
        while {item['name'] for item in self.http('GET', '/api/workspaces')} & set(self.names):
            gevent.sleep(0.1)
        self.names.clear()


def cold(bench, section):
    for template in TEMPLATES:
        with bench.served() as server:
            create, plain = Creates(server, template), Plain(bench, server, template)
            create.http.running('first', template=template)  # builds the image, if it is not there
            plain.docker_run()
            with section.watching(server, f'creates of {template}'):
                ours, theirs = turn_about(COLD, create, plain.docker_run, rest=REST)
            section.compare(f'create, cold, {template}', ours, 'docker run', theirs, head=True)


def warm(bench, section):
    for template in TEMPLATES:
        with bench.served(WARM_POOL=f'{template}:{MEMBERS}') as server:
            create = Creates(server, template, waits=False)
            running = Creates(server, template, 'told', probes=False)
            plain = Plain(bench, server, template)
            if template not in (create.http('GET', '/health').get('pool') or {}):
                section.remark(f'Warm creates of {template} were not measured: this server has no pool.')
                continue
            create.http.running('first', template=template, ssh=False)
            ours, told, theirs = [], [], []
            with section.watching(server, f'claims of {template}'):
                for _ in range(ROUNDS):
                    wait_full(server, create.http, template)
                    theirs.append(plain.docker_run())
                    gevent.sleep(REST)
                    for _ in range(CLAIMS // 2):
                        ours.append(create())
                        gevent.sleep(0.3)  # the refill begins later
                        told.append(running())
                        gevent.sleep(0.3)
                    for made in (create, running):  # as docker_run does, so that both meet the same load
                        made.delete()
            section.compare(f'create, warm, {template}', ours, 'docker run', theirs, head=True)
            section.compare(f'create, warm, {template}, until running', told, 'docker run', theirs, head=True)
            if template == TEMPLATES[0]:
                claims_at_once(section, server, create, template, ours)
            missed, asked = create.cold + running.cold, create.asked + running.asked
            if missed:
                section.remark(f'{missed} of {asked} warm creates of {template} found no member, and were '
                               'cold.')


def claims_at_once(section, server, create, template, alone):
    grown = {1: percentile(alone, 0.5)}
    for count, turns in AT_ONCE.items():
        found = []
        for _ in range(turns):
            wait_full(server, create.http, template)
            gevent.sleep(REST)
            found += create.at_once(count, pause=0.005)
        section.tell(f'{count} warm creates of {template} at once', found, head=count == max(AT_ONCE))
        grown[count] = percentile(found, 0.5)
    section.picture('claims', 'Warm creates at once', 'at once', 'ms to editor and SSH, p50',
                    {template: grown}, log=False)


def wait_full(server, http, template):
    """Wait until the pool has all its members."""
    def is_full():
        pool = http('GET', '/health')['pool'][template]
        return pool['ready'] >= pool['wanted']
    server.until(is_full, 300)


def many(bench, section):
    with bench.served() as server:
        create, plain = Creates(server, 'tiny'), Plain(bench, server, 'tiny')
        create.http.running('first', template='tiny')
        ours, theirs = turn_about(10, create, plain.docker_py, rest=0.3)
        section.compare('create, cold, a tiny image', ours, 'docker-py', theirs)
        create.delete()
        bench.remove_plain()
        with section.watching(server, f'{MANY} creates at once'):
            ours = create.at_once(MANY)
        create.delete()
        jobs = [gevent.spawn(plain.docker_py, 0.02) for _ in range(MANY)]
        gevent.joinall(jobs, raise_error=True)
        section.compare(f'{MANY} creates at once, a tiny image', ours, f'{MANY} by docker-py at once',
                        [job.value for job in jobs], head=True)
