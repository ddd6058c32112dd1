"""Engines that are none: a process that answers the calls of Docker's HTTP API which the server makes, keeps
what it is told in memory, and runs nothing. So a server can have more workspaces than a machine holds.

    python -m bench.double SOCKET...

Each container has an editor, which listens on its port, and a stream of measurements, a second between two of
them. What an engine takes is not in any figure that is measured over them.
"""
from gevent import monkey; monkey.patch_all()  # noqa: E702, I001 - before anything imports ssl

import json
import re
import secrets
import signal
import socket
import sys
import time
import urllib.parse

import gevent
import gevent.pywsgi
import gevent.queue
import gevent.server

MEMORY = 2**43  # bytes that each engine has
HEALTHY = b'HTTP/1.0 200 OK\r\n\r\n{"status":"alive","lastHeartbeat":0}'
NEVER = '0001-01-01T00:00:00Z'


def now():
    """Return the time as the engine writes it."""
    return time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime()) + f'.{time.time_ns() % 10**9:09d}Z'


class Refused(Exception):
    """An answer that is none of the good ones."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class Engine:
    """One of them, as a WSGI application."""

    def __init__(self, name):
        self.name = name
        self.containers, self.volumes, self.networks = {}, {}, {}
        self.editors, self.readers = {}, set()
        self.routes = [(method, re.compile(pattern), answer) for method, pattern, answer in (
            ('GET', '/_ping', lambda: 'OK'), ('GET', '/version', self.version), ('GET', '/info', self.info),
            ('GET', '/events', self.events), ('GET', '/containers/json', self.list_containers),
            ('POST', '/containers/create', self.create), ('GET', '/images/json', list),
            ('GET', '/images/(.+)/json', self.image), ('GET', '/containers/(.+)/json', self.find),
            ('GET', '/containers/(.+)/stats', self.stats), ('GET', '/containers/(.+)/logs', lambda name: ''),
            ('PUT', '/containers/(.+)/archive', lambda name: ''),
            ('POST', '/containers/(.+)/update', self.update), ('POST', '/containers/(.+)/start', self.start),
            ('POST', '/containers/(.+)/(stop|kill)', self.end), ('DELETE', '/containers/(.+)', self.remove),
            ('GET', '/volumes', self.list_volumes), ('POST', '/volumes/create', self.create_volume),
            ('GET', '/volumes/(.+)', self.find_volume), ('DELETE', '/volumes/(.+)', self.remove_volume),
            ('GET', '/networks', self.list_networks), ('POST', '/networks/create', self.create_network),
            ('GET', '/networks/(.+)', self.find_network), ('DELETE', '/networks/(.+)', self.remove_network))]

    def __call__(self, environ, start_response):
        path = re.sub(r'^/v\d+\.\d+', '', environ['PATH_INFO'])
        body = environ['wsgi.input'].read()
        self.query = {key: values[0] for key, values in
                      urllib.parse.parse_qs(environ['QUERY_STRING']).items()}
        self.body = json.loads(body) if environ.get('CONTENT_TYPE', '').startswith('application/json') else {}
        asked = environ['REQUEST_METHOD']
        try:
            answer, parts = next((answer, found.groups()) for method, pattern, answer in self.routes
                                 if method == asked and (found := pattern.fullmatch(path)))
            said = answer(*parts)
        except Refused as error:
            start_response(f'{error.status} No', [('Content-Type', 'application/json')])
            return [json.dumps({'message': str(error)}).encode()]
        start_response('204 Done' if said is None else '200 OK', [('Content-Type', 'application/json')])
        if hasattr(said, '__next__'):
            return (json.dumps(item).encode() + b'\n' for item in said)
        return [] if said is None else [said.encode() if isinstance(said, str) else json.dumps(said).encode()]

    def wanted(self, items):
        """Return those that bear the labels, and have the names, that the query asks for."""
        filters = json.loads(self.query.get('filters', '{}'))
        labels = [text.partition('=') for text in filters.get('label', ())]
        return [item for item in items
                if all(key in item['Labels'] and (not sign or item['Labels'][key] == value)
                       for key, sign, value in labels)
                and item.get('Name') in filters.get('name', [item.get('Name')])]

    def version(self):
        return {'Version': '20.10.24', 'ApiVersion': '1.41', 'MinAPIVersion': '1.12'}

    def info(self):
        return {'ID': self.name, 'Name': self.name, 'NCPU': 64, 'MemTotal': MEMORY, 'OSType': 'linux',
                'Architecture': 'x86_64', 'SystemTime': now(), 'Swarm': {}}

    def image(self, name):
        return {'Id': f'sha256:{name}', 'Size': 0, 'Config': {'Labels': {}}}

    def tell(self, action, container):
        """Tell all who follow the events."""
        event = {'Type': 'container', 'Action': action, 'time': int(time.time()), 'Actor': {
            'ID': container['Id'], 'Attributes': container['Labels']}}
        for reader in self.readers:
            reader.put(event)

    def events(self):
        self.readers.add(reader := gevent.queue.Queue())
        return iter(reader.get, None)

    # Containers

    def find(self, name):
        for item in [self.containers[name]] if name in self.containers else self.containers.values():
            if item['Id'].startswith(name) or item['Name'] == f'/{name}':
                return item
        raise Refused(404, f'No such container: {name}')

    def list_containers(self):
        return [{'Id': item['Id'], 'Names': [item['Name']], 'Labels': item['Labels'],
                 'State': item['State']['Status'], 'Ports': [
                     {'PublicPort': int(binding['HostPort'])} for bindings in
                     item['HostConfig']['PortBindings'].values() for binding in bindings]}
                for item in self.wanted(self.containers.values())]

    def create(self):
        name = f"/{self.query['name']}"
        if any(item['Name'] == name for item in self.containers.values()):
            raise Refused(409, f'The container name "{name}" is already in use.')
        key, config = secrets.token_hex(32), self.body
        self.containers[key] = {
            'Id': key, 'Name': name, 'Labels': config['Labels'], 'Created': now(), 'Image': config['Image'],
            'Config': {'Labels': config['Labels'], 'Env': config['Env'], 'Image': config['Image']},
            'HostConfig': config['HostConfig'],
            'Mounts': [{'Type': 'volume', 'Name': mount['Source'], 'Destination': mount['Target']}
                       for mount in config['HostConfig']['Mounts']],
            'State': {'Status': 'created', 'StartedAt': NEVER, 'ExitCode': 0, 'OOMKilled': False}}
        return {'Id': key, 'Warnings': []}

    def start(self, name):
        item = self.find(name)
        if item['State']['Status'] != 'running':
            address = item['HostConfig']['PortBindings']['8443/tcp'][0]
            editor = gevent.server.StreamServer((address['HostIp'], int(address['HostPort'])), greet)
            editor.start()
            self.editors[item['Id']] = editor
            item['State'] |= {'Status': 'running', 'StartedAt': now()}
            self.tell('start', item)

    def end(self, name, how):
        item = self.find(name)
        if item['State']['Status'] == 'running':
            self.editors.pop(item['Id']).stop(0)
            item['State'] |= {'Status': 'exited', 'ExitCode': 0 if how == 'stop' else 137}
            self.tell('die', item)

    def update(self, name):
        self.find(name)['HostConfig'] |= self.body
        return {'Warnings': []}

    def remove(self, name):
        self.end(name, 'kill')
        item = self.containers.pop(self.find(name)['Id'])
        self.tell('destroy', item)

    def stats(self, name):
        item, used = self.find(name), 0
        while item['State']['Status'] == 'running':
            used += 1_000_000
            cpu = {'cpu_usage': {'total_usage': used, 'percpu_usage': [used] * 2,
                                 'usage_in_kernelmode': 0, 'usage_in_usermode': used},
                   'system_cpu_usage': time.monotonic_ns(), 'online_cpus': 2,
                   'throttling_data': {'periods': 0, 'throttled_periods': 0, 'throttled_time': 0}}
            yield {'read': now(), 'name': item['Name'], 'id': item['Id'], 'cpu_stats': cpu,
                   'precpu_stats': cpu, 'memory_stats': {'usage': 2**20, 'limit': 2**32, 'stats': {
                       f'counter_{number}': number for number in range(34)}}}
            gevent.sleep(1)

    # Volumes and networks

    def list_volumes(self):
        return {'Volumes': self.wanted(self.volumes.values())}

    def create_volume(self):
        return self.volumes.setdefault(self.body['Name'], {
            'Name': self.body['Name'], 'Driver': 'local', 'Labels': self.body.get('Labels') or {}})

    def find_volume(self, name):
        return self._named(self.volumes, name)

    def remove_volume(self, name):
        self._named(self.volumes, name)
        del self.volumes[name]

    def list_networks(self):
        return self.wanted(self.networks.values())

    def create_network(self):
        name = self.body['Name']
        self.networks[name] = {'Id': name, 'Name': name, 'Labels': self.body.get('Labels') or {}}
        return self.networks[name]

    def find_network(self, name):
        return self._named(self.networks, name)

    def remove_network(self, name):
        self._named(self.networks, name)
        del self.networks[name]

    @staticmethod
    def _named(items, name):
        if name not in items:
            raise Refused(404, f'No such object: {name}')
        return items[name]


def greet(connection, _):
    """Answer as an editor does."""
    connection.recv(1000)
    connection.sendall(HEALTHY)
    connection.close()


def main():
    gevent.signal_handler(signal.SIGTERM, sys.exit)
    for number, path in enumerate(sys.argv[1:], 1):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(256)
        gevent.pywsgi.WSGIServer(listener, Engine(f'double-{number}'), log=None).start()
    print('there', flush=True)
    gevent.sleep(float('inf'))


if __name__ == '__main__':
    main()
