"""Requests that are sent again: what bears the same Idempotency-Key is done once, and answered alike."""
import hashlib
import json
import logging
import re
import time

from _agentbackend.errors import IdempotencyConflict, KeyReused, refusal
from _agentbackend.store import ANSWER

log = logging.getLogger('agentbackend')

KEPT_FOR = 86400  # seconds
MAX_ANSWER = 65536  # bytes of one that is kept
KEY = re.compile(r'[!-~]{1,255}')
STREAMED = ('The first answer to this Idempotency-Key was a stream, or too long to be kept. What it began is '
            'not begun again{where}.')


class Repeats:
    """Keeps the answers that succeeded for a day, in the state file; what failed may be tried again."""

    def __init__(self, state):
        self._state = state
        self._at_work = set()

    def once(self, key, request, make):
        """Return (status, headers, data) that `make` returns, or what it returned for the same key.

        `request` are the bytes by which one request is told from another. `data` is None for a stream, of
        which `make` keeps the rest to itself.
        """
        if not KEY.fullmatch(key):
            raise refusal('Idempotency-Key', 'has to be 1 to 255 visible characters')
        if key in self._at_work:
            raise IdempotencyConflict('A request with this Idempotency-Key is at work just now; retry later.',
                                      headers={'Retry-After': '1'})
        self._at_work.add(key)
        try:
            known, print_ = self._kept(key), hashlib.sha256(request).hexdigest()
            if known is not None and known['at'] > time.time() - KEPT_FOR:
                return self._replayed(known, print_)
            status, headers, data = make()
            if status < 300:
                self._keep(key, {'at': time.time(), 'print': print_, 'status': status,
                                 'headers': headers, 'data': data})
            return status, headers, data
        finally:
            self._at_work.discard(key)

    def _kept(self, key):
        store = self._state.store
        return next(iter(store.read(ANSWER, key)), None) if store else None

    def _keep(self, key, answer):
        """Keep an answer, and no more those of more than a day ago. A disk that refuses is no reason to say
        that the request has failed."""
        try:
            if self._state.store:
                text = json.dumps(answer)
                text = text if len(text) <= MAX_ANSWER else json.dumps({**answer, 'data': None})
                self._state.store.write([('answers before', (answer['at'] - KEPT_FOR,), None),
                                         ('answer', (key,), (answer['at'], text))])
        except Exception as error:
            log.warning('An answer could not be kept for its Idempotency-Key: %s', error)

    @staticmethod
    def _replayed(known, print_):
        if known['print'] != print_:
            raise KeyReused('This Idempotency-Key came with another request before; choose a new one.')
        if known['data'] is None:
            where = f"; it is {known['headers']['Location']}" if 'Location' in known['headers'] else ''
            raise IdempotencyConflict(STREAMED.format(where=where))
        return known['status'], {**known['headers'], 'Idempotent-Replayed': 'true'}, known['data']
