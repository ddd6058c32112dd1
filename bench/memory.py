"""What the server and what stands on the engine use in memory."""

import gevent

from .common import Http, container_memory, cpu_of, memory_of
from .streams import Readers

TITLE = 'Memory'
STREAMS = 1000
SETTLE = 15  # seconds until an editor has done what it does when it starts
WATCHED = 10  # seconds for which an idle server is looked at


def measure(bench, section):
    with bench.served(MAX_STREAMS='5000') as server:
        gevent.sleep(3)
        used = cpu_of(server)
        gevent.sleep(WATCHED)
        section.tell('CPU of an idle server', (cpu_of(server) - used) / WATCHED * 100, unit='% of a core')
        for kind in ('Rss', 'Pss'):
            section.tell(f'idle server, {kind.upper()}', memory_of(server, kind), unit='MB',
                         head=kind == 'Rss')
        http = Http(server.port)
        http.running('idle', template='tiny')
        for kind in ('sse', 'ws'):
            before = memory_of(server)
            with Readers(server, kind, STREAMS, ['idle']):
                gevent.sleep(3)  # a writer that has nothing to write waits for a second
                section.tell(f'idle {kind.upper()} stream, of {STREAMS:,}',
                             (memory_of(server) - before) * 1024 / STREAMS, unit='KB', head=True)
            gevent.sleep(1)
        for template in ('blank', 'bun-typescript'):
            made = [http.running(f'{template}-{number}', template=template)['containerId']
                    for number in range(3)]
            gevent.sleep(SETTLE)
            section.tell(f'workspace of {template}, its container',
                         [container_memory(bench.client, item) for item in made], unit='MB', head=True)
    with bench.served(WARM_POOL='blank:3') as server:
        http = Http(server.port)
        if 'blank' not in (http('GET', '/health').get('pool') or {}):
            section.remark('Members of a pool were not measured: this server has none.')
            return
        server.until(lambda: http('GET', '/health')['pool']['blank']['ready'] == 3, 300)
        gevent.sleep(SETTLE)
        members = bench.client.api.containers(filters={'name': f'{server.instance}.pool.'})
        section.tell('member of the pool of blank, its container',
                     [container_memory(bench.client, item['Id']) for item in members], unit='MB', head=True)
