"""Images on their way from one node to another: whole, or by way of a registry, where only the layers travel
that are not there yet."""
import contextlib
import json
import logging
import re
import time

import gevent.lock

from _agentbackend.errors import DockerError, EngineUnavailable
from _agentbackend.timing import cooperatively

log = logging.getLogger('agentbackend')

TELL_PAUSE = 3  # seconds between two lines about an image on its way
SILENCE = 45  # seconds that a registry may say nothing: one with a store far away takes its time over a layer
TRAVELS = ('Pushing', 'Downloading')  # what the engine says of a layer that is sent just now
ADVICE = (  # words of the engine, and what is to be done then; the last holds for all else
    ('HTTP response to HTTPS client', 'It speaks plain http: name {host} in "insecure-registries" of '
                                      '/etc/docker/daemon.json on {node} and restart Docker there, or give '
                                      'it a certificate.'),
    ('x509|certificate', 'Put the certificate of its authority into /etc/docker/certs.d/{host}/ca.crt on '
                         '{node}.'),
    ('auth|denied|forbidden', 'See that the user of this server may use it: docker login {host}.'),
    ('', 'See that a registry listens there, and that {node} reaches it.'))


class Unusable(DockerError):
    """A registry does not do what is asked of it."""


class Distribution:
    """The ways that images take."""

    def __init__(self, registry):
        self._registry = registry  # host:port, or with a prefix; '' for none
        self._pushing = gevent.lock.BoundedSemaphore(1)  # a second one would lose the name that it gave

    def bring(self, image, source, node, on_line):
        """See that a node has an image of another one; `on_line` is told how far that is.

        A registry saves time, and no more: where it is of no use, that is told, by the remark of the node
        that can't use it too, and the whole image is sent.
        """
        if self._registry:
            try:
                with self._remarked(source, 'push an image to'):
                    pushed = self._push(image, source, on_line)
                with self._remarked(node, 'pull an image from'):
                    self._pull(image, pushed, node, on_line)
                return
            except Unusable as error:
                log.warning('%s', error)
                on_line(str(error))
        self._send(image, source, node, on_line)

    @contextlib.contextmanager
    def _remarked(self, node, what):
        """See that a node has a remark while it can't use the registry, which raises Unusable then."""
        try:
            yield
            node.remark = ''
        except EngineUnavailable:  # not the registry's fault
            raise
        except DockerError as error:
            said, host = str(error).strip().rstrip('.'), self._registry.partition('/')[0]
            advice = next(text for words, text in ADVICE if re.search(words, said, re.IGNORECASE))
            node.remark = (f'Node {node.name} can not {what} REGISTRY={self._registry} ({said}), so the '
                           f'whole image was sent. {advice.format(host=host, node=node.name)}')
            raise Unusable(node.remark) from error

    def _push(self, image, source, on_line):
        """Push an image, and return the name by which exactly this one is pulled, whoever pushes another with
        its tag."""
        repository, _, tag = f'{self._registry}/{image}'.rpartition(':')
        api, digest = source.client.api, None
        with self._pushing, source.client.errors():
            api.tag(image, repository, tag)
            try:
                for item in self._told(f'Pushing image {image} from node {source.name}', source, on_line,
                                       lambda: api.push(repository, tag=tag, stream=True, decode=True)):
                    digest = (item.get('aux') or {}).get('Digest', digest)
            finally:
                forget(source, f'{repository}:{tag}')
        if not digest:
            raise DockerError('it says nothing of what it was given')
        return f'{repository}@{digest}'

    def _pull(self, image, pushed, node, on_line):
        api = node.client.api
        with node.client.errors():
            for _ in self._told(f'Pulling image {image} to node {node.name}', node, on_line,
                                lambda: api.pull(pushed, stream=True, decode=True)):
                pass
            api.tag(pushed, *image.rsplit(':', 1))
        forget(node, pushed)

    def _told(self, what, node, on_line, begin):
        """Yield what the engine says of a push or a pull; tell now and then how far that is."""
        sent, told_at = {}, 0
        late = DockerError(f'it says nothing for {SILENCE} s')
        for item in node.client.progress(begin, SILENCE, late):
            if item.get('status') in TRAVELS:
                sent[item.get('id')] = (item.get('progressDetail') or {}).get('current') or 0
            if time.monotonic() - told_at > TELL_PAUSE:
                told_at = time.monotonic()
                on_line(f'{what} by way of {self._registry}: {sum(sent.values()) / 1e6:.0f} MB so far')
            yield item

    @staticmethod
    def _send(image, source, node, on_line):
        with source.client.errors():
            size, sent, told_at = source.client.api.inspect_image(image)['Size'], 0, 0
            # An engine packs a large image for minutes before its first byte comes.
            packed = source.client.get('/images/{0}/get', image, None, timeout=None)
            with packed as answer, node.client.errors():
                def pieces():
                    nonlocal sent, told_at
                    for piece in cooperatively(source.client.pieces(answer)):
                        sent += len(piece)
                        if time.monotonic() - told_at > TELL_PAUSE:
                            told_at = time.monotonic()
                            on_line(f'Bringing image {image} from node {source.name} to {node.name}: '
                                    f'{sent / 1e6:.0f} of {size / 1e6:.0f} MB')
                        yield piece
                for said in node.client.api.load_image(pieces()):
                    if 'error' in said:
                        raise DockerError(f'Node {node.name} does not take the image {image}: '
                                          f'{json.dumps(said["error"])}')


def forget(node, name):
    """Take one of its names from an image, which stays under the others: whoever removes those would find it
    there still."""
    with contextlib.suppress(DockerError), node.client.errors():
        node.client.api.remove_image(name)
