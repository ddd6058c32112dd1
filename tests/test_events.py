"""Topics, their rings, and readers of every speed."""
import gc
import json

import gevent
import pytest

from _agentbackend import events as events_module
from _agentbackend.events import EVERYTHING, RING_BYTES, Batch, Events
from _agentbackend.positions import LAST_LINE, Cursor, LogPosition
from _agentbackend.records import PERSISTENT, Run, Workspace
from _agentbackend.state import EVENTS_KEPT, State

RUN = Run(id='run-1', task='t', started_at=1.0, timeout=1, boot='', session_id='s1', workspace_id='ws-a',
          number=1, serial=3)


class Reader:
    """A position in a topic, from its end on."""

    def __init__(self, events, name):
        self.topic, self.woken = events.topic(name), 0
        self.topic.attach(self)
        self.index = self.topic.end

    def wake(self):
        self.woken += 1

    def take(self):
        """Return what came, as JSON objects; None when the ring has overtaken it."""
        found = self.topic.after(self.index)
        if found is None:
            return None
        self.index += len(found)
        return [json.loads(text) for batch in found for _, text in batch.rows()]


def workspace_of(name):
    return Workspace(id=name, name=name, folder=name, type=PERSISTENT, template='t', created_at=1.0)


@pytest.fixture
def state():
    made = State(None, {})
    for name in ('ws-a', 'ws-b'):
        made.adopt(workspace_of(name))
    return made


@pytest.fixture
def events(state):
    return Events(state)


def numbers(found):
    return [event['data']['n'] for event in found]


def publish(events, count, topic='ws-a', kind='log', **data):
    for number in range(count):
        events.publish(kind, topic, {'n': number, **data})


def test_events_with_lists_are_kept_by_their_size(events):
    for number in range(2000):
        events.publish_steps(RUN, [((1, number, 0), 'progress', {'list': [1] * 2000}, None)])
    assert 1 < len(events.held('ws-a')) < 300


def test_an_event_tells_what_where_and_when(events):
    workspace, session = Reader(events, 'ws-a'), Reader(events, ('session', 's1'))
    events.publish_steps(RUN, [((1, 7, 0), 'progress', {'n': 1}, 1.5)])
    told = {'type': 'progress', 'workspaceId': 'ws-a', 'sessionId': 's1', 'data': {'n': 1},
            'timestamp': '1970-01-01T00:00:01.500Z'}
    assert workspace.take() == [told | {'id': '0.0.~3.7.0'}] and session.take() == [told | {'id': '1-7-0'}]
    assert workspace.topic.cursor.marks == {1: (-1, 0), 2: (-1, 0), 3: (7, 0)}


def test_the_last_event_of_a_task_takes_its_mark_away(events):
    reader = Reader(events, 'ws-a')
    events.topic('ws-a').cursor.begun = 2
    events.publish_steps(RUN, [((1, 7, 0), 'progress', {}, None)])
    events.publish_steps(RUN, [((1, LAST_LINE, 0), 'result', {}, None)])
    assert [event['id'] for event in reader.take()] == ['0.2.~3.7.0', '0.3.']


def test_an_event_goes_to_its_workspace_its_session_and_if_it_is_a_status_to_everybody(events):
    readers = [Reader(events, name) for name in ('ws-a', ('session', 's1'), EVERYTHING, 'ws-b')]
    events.publish_steps(RUN, [((1, 0, 0), 'log', {'n': 1}, None)])
    events.publish('status', 'ws-a', {'n': 2})
    assert [numbers(reader.take()) for reader in readers] == [[1, 2], [1], [2], []]


def test_lines_are_told_without_what_was_read_before(events):
    topic, reader = events.topic('ws-a'), Reader(events, 'ws-a')
    topic.cursor.log = position = LogPosition()
    lines = [(1, '2026-11-23T20:56:17.000000001Z', 'one'),
             (2, '2026-11-23T20:56:17.000000002Z', 'workspace: setup: 1/3 npm')]
    events.publish_lines('ws-a', topic, lines)
    topic.cursor.log = position = position.copy()  # from which reading begins again
    events.publish_lines('ws-a', topic, lines)
    first, second = reader.take()
    assert first['data'] == {'stream': 'stdout', 'message': 'one'}
    assert first['timestamp'] == '2026-11-23T20:56:17.000Z'
    assert (second['type'], second['data']['step'], second['data']['total']) == ('progress', 1, 3)
    assert str(Cursor.parse(second['id']).log) == str(position)


def test_numbers_go_on_behind_what_is_kept(events, state):
    publish(events, 3)
    events = Events(state)
    reader = Reader(events, 'ws-a')
    publish(events, 1)
    assert [event['id'] for event in reader.take()] == ['4.0.']
    assert [event[4]['n'] for event in state.events('ws-a', after=2)[1]] == [2, 0]


def test_the_last_events_of_a_workspace_are_kept_and_it_is_told_how_many_are_not(events, state):
    publish(events, EVENTS_KEPT + 5)
    lost, kept = state.events('ws-a', after=2)
    assert lost == 3 and [event[4]['n'] for event in kept] == list(range(5, EVENTS_KEPT + 5))
    assert state.events('ws-a', after=5)[0] == 0 and state.events('ws-b') == (0, [])
    state.remove('ws-a')
    assert state.events('ws-a') == (0, []) and not state._events and 'ws-a' not in state._told


def test_events_are_kept_over_the_end_of_a_process_and_none_of_their_numbers_comes_again(tmp_path):
    def opened():
        made = State(tmp_path / 'state.sqlite', {})
        made.open()
        return made
    state = opened()
    state.adopt(workspace_of('ws-a'))
    publish(Events(state), EVENTS_KEPT + 2)
    state.close()
    state = opened()
    assert [event[4]['n'] for event in state.events('ws-a')[1]] == list(range(2, EVENTS_KEPT + 2))
    publish(Events(state), 1)
    assert state.told('ws-a') > EVENTS_KEPT + 3
    state.remove('ws-a')
    state.close()
    state = opened()
    assert state.events('ws-a') == (0, []) and not state._events
    state.close()


def test_a_reader_begins_with_what_is_published_after_it(events):
    first = Reader(events, 'ws-a')
    publish(events, 3)
    assert Reader(events, 'ws-a').take() == [] and numbers(first.take()) == [0, 1, 2]


def test_a_ring_has_its_bound_and_whoever_was_overtaken_is_told_so(events):
    slow, keen = Reader(events, 'ws-a'), Reader(events, 'ws-a')
    for _ in range(50):
        publish(events, 100, text='x' * 1000)
        assert len(keen.take()) == 100
    assert slow.take() is None and slow.topic._bytes <= RING_BYTES
    slow.index = slow.topic.end
    publish(events, 1)
    assert numbers(slow.take()) == [0]


def test_one_batch_that_is_larger_than_the_ring_is_told(events):
    reader = Reader(events, 'ws-a')
    publish(events, 2, text='x' * RING_BYTES)
    assert reader.take() is None
    reader.index = reader.topic.end - 1
    assert numbers(reader.take()) == [1]


def test_a_batch_is_encoded_once(events, monkeypatch):
    readers = [Reader(events, 'ws-a') for _ in range(3)]
    publish(events, 1)
    batches = [reader.topic.after(reader.index)[0] for reader in readers]
    texts = [batch.sse for batch in batches]
    assert texts[0] is texts[1] is texts[2] and batches[0].frames is batches[1].frames


def test_another_source_sends_everybody_to_the_archive(events):
    reader = Reader(events, 'ws-a')
    reader.topic.begin_anew()
    assert reader.take() is None and reader.woken == 1


def test_a_reader_that_never_reads_holds_up_neither_the_publisher_nor_another_reader(events):
    others = []
    lazy, keen = Reader(events, 'ws-a'), Reader(events, 'ws-a')
    switches = gevent.spawn(lambda: others.append('ran'))
    publish(events, 1000)
    assert not others, 'publishing let others run'
    assert len(keen.take()) == 1000 and lazy.woken == 1000
    switches.join()


def test_a_topic_that_is_forgotten_goes_behind_its_last_reader(events, monkeypatch):
    monkeypatch.setattr(events_module, 'LINGER', 0.05)
    session, reader = Reader(events, ('session', 's1')), Reader(events, 'ws-a')
    events.publish_steps(RUN, [((1, 1, 0), 'log', {'n': 0}, None)])
    events.detach(('session', 's1'), session)
    assert events.topic(('session', 's1')) is session.topic, 'its task runs'
    session.topic.attach(session)
    events.publish_steps(RUN, [((1, LAST_LINE, 0), 'result', {'n': 0}, None)])
    events.forget('ws-a')
    events.publish('status', 'ws-a', {'n': 1})
    assert numbers(reader.take()) == [0, 0, 1]
    events.detach('ws-a', reader)
    events.detach(('session', 's1'), session)
    events.forget('ws-b')
    events.topic(('session', 'yet to come')).attach(session)
    events.detach(('session', 'yet to come'), session)
    assert events.topic(('session', 's1')) is session.topic, 'it may come back'
    gevent.sleep(0.1)
    assert set(events._topics) <= {EVERYTHING}


def test_events_that_nobody_holds_are_freed(events):
    class Marked(Batch):
        pass

    reader = Reader(events, 'ws-a')
    publish(events, 1)
    event = reader.topic.after(0)[0].events[0]
    for _ in range(10):
        batch = Marked(event)
        batch.size = RING_BYTES // 3
        reader.topic.put(batch)
    del batch
    gc.collect()
    assert sum(isinstance(item, Marked) for item in gc.get_objects()) == 3
