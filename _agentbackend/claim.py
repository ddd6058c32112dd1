"""The claim of one server to an instance on an engine: two of them would delete each other's half-made
workspaces."""
import time

import gevent

from _agentbackend.errors import InstanceTaken

DEFEND_PAUSE = 2  # seconds between looks at the engine of a server that holds a claim
ANSWER_TIME = 3 * DEFEND_PAUSE  # seconds that such a server has to remove the claim of another


class Claim:
    """A volume on the engine that bears an owner's id, so that a server on another machine, or with another
    state, is found out too.

    Who holds the instance removes the claims of others. So one whose claim outlives ANSWER_TIME has nobody
    against it, and may remove what a crashed server left behind; and one whose claim is gone has lost.
    """

    def __init__(self, engine, owner):
        self._engine = engine
        self._owner = owner  # a function: the state file, which knows it, is read later
        self.held = False
        self.lost = False  # another server had it when we last looked
        self._defended_at = 0

    def take(self):
        """Claim the instance, or see that it is still held; raise InstanceTaken when another server has
        it."""
        if self.held:
            self.defend(pause=0)
            return
        others = self._engine.claims() - {self._owner()}
        self._engine.stake_claim(self._owner())
        deadline = time.monotonic() + ANSWER_TIME
        while others and time.monotonic() < deadline:
            gevent.sleep(0.2)
            self._see_that_it_stands()
        for other in others:
            self._engine.withdraw_claim(other)
        self.held, self.lost = True, False

    def defend(self, *, pause=DEFEND_PAUSE):
        """Remove the claims of others, at most once in `pause` seconds; raise InstanceTaken when our own is
        gone."""
        if time.monotonic() - self._defended_at < pause:
            return
        others = self._see_that_it_stands()
        for other in others:
            self._engine.withdraw_claim(other)
        self._defended_at = time.monotonic()

    def check(self):
        """Take the instance unless this server holds it; raise InstanceTaken when another server has it, or
        DockerError."""
        if self.lost:
            raise InstanceTaken(self._text())
        if not self.held:
            self.take()

    def release(self):
        """Give the instance up, at a proper end."""
        if self.held:
            self.held = False
            self._engine.withdraw_claim(self._owner())

    def _see_that_it_stands(self):
        claims = self._engine.claims()
        if self._owner() not in claims:
            self.held, self.lost = False, True
            raise InstanceTaken(self._text())
        return claims - {self._owner()}

    def _text(self):
        return (f'INSTANCE={self._engine.instance!r}: another server of that name is at work on this Docker '
                'engine, or was a moment ago; '
                'stop it, or choose another INSTANCE.')
