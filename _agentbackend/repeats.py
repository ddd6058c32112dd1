"""Requests that are sent again: what bears the same Idempotency-Key is done once, and answered alike."""
import hashlib
import logging
import re
import time

from _agentbackend.errors import IdempotencyConflict, KeyReused, refusal

log = logging.getLogger('agentbackend')

KEPT_FOR = 86400  # seconds
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
            known, print_ = self._state.answer(key), hashlib.sha256(request).hexdigest()
            if known is not None and known['at'] > time.time() - KEPT_FOR:
                return self._replayed(known, print_)
            status, headers, data = make()
            if status < 300:
                self._state.keep_answer(key, {'at': time.time(), 'print': print_, 'status': status,
                                              'headers': headers, 'data': data})
            return status, headers, data
        finally:
            self._at_work.discard(key)

    @staticmethod
    def _replayed(known, print_):
        if known['print'] != print_:
            raise KeyReused('This Idempotency-Key came with another request before; choose a new one.')
        if known['data'] is None:
            where = f"; it is {known['headers']['Location']}" if 'Location' in known['headers'] else ''
            raise IdempotencyConflict(STREAMED.format(where=where))
        return known['status'], {**known['headers'], 'Idempotent-Replayed': 'true'}, known['data']
