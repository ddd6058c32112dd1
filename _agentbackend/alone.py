"""What an engine answers that is the only one, where several nodes have to be told apart."""
import socket

from _agentbackend.errors import EngineUnavailable, refusal


class Alone:
    """One machine, which has no name in records and is as the settings say. None of this costs anything."""

    def away(self, node):
        """Return since when and why a node does not answer, in words, or ''; never waits."""
        return ''

    def address(self, node):
        """Return where users reach the published ports of a node, '' for where the settings say."""
        return ''

    def reached(self, node):
        """Return the IP address to which the ports of a node are bound, '' for where the settings say."""
        return ''

    def is_bound(self, container, address):
        """Return whether the ports of a container are published where those of a new one would be, as far as
        that matters: one engine keeps what was made before the settings changed."""
        return True

    def health(self):
        """Return ({total, ready} of several nodes or None, what is wrong with them in words); never waits."""
        return None, []

    def nodes(self):
        """Return what is known of each node: {node, name, state, availability, address, memory, images,
        error}; `node` is what a record has."""
        found = {'node': '', 'name': socket.gethostname(), 'state': 'ready', 'availability': 'active',
                 'address': '', 'memory': 0, 'images': [], 'error': ''}
        try:
            return [found | {'memory': self.info()['memory'], 'images': self.image_names()}]
        except EngineUnavailable as error:
            return [found | {'state': 'down', 'error': str(error)}]

    def place(self, draft, workspaces, *, node, constraints):
        """Return the name of the node for a new workspace beside others; raise ValidationError when it asks
        for one that can't be, and NoRoom. It never waits."""
        for field in [name for name, value in (('node', node), ('constraints', constraints)) if value]:
            raise refusal(field, 'is for several nodes, and this server has one engine; see DOCKER_HOST')
        return ''

    def bring(self, image, node, on_line):
        """See that a node has an image that was made here; `on_line` is told how far that is."""
