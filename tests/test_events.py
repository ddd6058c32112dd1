"""Topics, their rings, and readers of every speed."""
import gc
import time

import gevent
import pytest

from _agentbackend.events import QUEUE_SIZE, RING_SIZE, Events, Subscription
from _agentbackend.records import Run

RUN = Run(id='run-1', task='t', started_at=1.0, timeout=1, boot='', session_id='s1', workspace_id='ws-a',
          number=1, serial=3)


@pytest.fixture
def events():
    return Events()


def numbers(found):
    return [event.data['n'] for event in found]


def attached(events, topic, size=QUEUE_SIZE):
    """Return a reader that has what is published to a topic from now on."""
    reader = Subscription(size)
    events.attach(topic, reader)
    return reader


def publish(events, count, topic='ws-a', **options):
    return [events.publish('log', topic, {'n': number}, **options) for number in range(count)]


def test_the_ring_keeps_the_last_events_of_a_topic_in_order(events):
    publish(events, RING_SIZE + 5)
    assert numbers(events.recent('ws-a')) == list(range(5, RING_SIZE + 5))
    assert events.recent('ws-b') == []


def test_an_event_tells_what_where_and_when(events):
    before = time.time()
    event = events.publish('progress', 'ws-a', {'n': 1}, run=RUN, place=(1, 7, 0))
    assert (event.type, event.workspace_id, event.session_id) == ('progress', 'ws-a', 's1')
    assert event.data == {'n': 1}
    assert (event.place, events.recent('s1')[0].id) == ((3, 7, 0), '1-7-0')
    assert before <= event.timestamp <= time.time()


def test_ids_are_unique_and_differ_between_processes(events, monkeypatch):
    ids = [event.id for event in publish(events, 50)] + [event.id for event in publish(events, 50, 'ws-b')]
    assert len(set(ids)) == 100
    now = time.time()
    monkeypatch.setattr(time, 'time', lambda: now + 2)
    assert not set(ids) & {event.id for event in publish(Events(), 100)}


def test_an_event_goes_to_its_workspace_its_session_and_if_it_is_a_status_to_everybody(events):
    workspace, session, everything, other = (attached(events, topic) for topic in ('ws-a', 's1', '*', 'ws-b'))
    events.publish('log', 'ws-a', {'n': 1}, run=RUN, place=(1, 0, 0))
    events.publish('status', 'ws-a', {'n': 2})
    assert numbers(workspace.take(0)[1]) == [1, 2]
    assert numbers(session.take(0)[1]) == [1]
    assert numbers(everything.take(0)[1]) == [2]
    assert numbers(other.take(0)[1]) == []
    assert numbers(events.recent('s1')) == [1] and numbers(events.recent('*')) == [2]


def test_a_reader_of_a_workspace_and_of_everything_has_a_status_once(events):
    reader = attached(events, 'ws-a')
    events.attach('*', reader)
    events.publish('status', 'ws-a', {'n': 1})
    assert numbers(reader.take(0)[1]) == [1]


def test_a_subscription_begins_with_what_is_published_after_it(events):
    publish(events, 3)
    assert attached(events, 'ws-a').take(0) == (0, [])


def test_a_full_queue_loses_the_oldest_and_counts_them_once(events):
    reader = attached(events, 'ws-a', 10)
    publish(events, 25)
    lost, found = reader.take(0)
    assert lost == 15 and numbers(found) == list(range(15, 25))
    publish(events, 10)
    lost, found = reader.take(0)
    assert lost == 0 and numbers(found) == list(range(10))


def test_a_queue_has_its_bound_without_being_told(events):
    reader = Subscription()
    events.attach('ws-a', reader)
    publish(events, QUEUE_SIZE + 1)
    lost, found = reader.take(0)
    assert (lost, len(found)) == (1, QUEUE_SIZE)


def test_take_waits_for_an_event_and_no_longer_than_told(events):
    reader, begun = attached(events, 'ws-a'), time.monotonic()
    assert reader.take(0.02) == (0, [])
    assert time.monotonic() - begun >= 0.015
    taking = gevent.spawn(reader.take, 5)
    gevent.sleep(0)
    assert not taking.ready()
    publish(events, 1)
    assert numbers(taking.get(timeout=1)[1]) == [0]


def test_close_wakes_a_reader_that_waits_and_what_was_put_before_is_not_lost():
    reader = Subscription()
    reader.put(Events().publish('log', 'ws-a', {'n': 1}))
    reader.close()
    assert reader.closed and numbers(reader.take(5)[1]) == [1]
    other = Subscription()
    taking = gevent.spawn(other.take)
    gevent.sleep(0)
    other.close()
    assert taking.get(timeout=1) == (0, []) and other.closed


def test_a_closed_subscription_never_waits_again():
    reader = Subscription()
    reader.close()
    with gevent.Timeout(1):
        assert reader.take() == reader.take() == (0, [])


def test_a_full_queue_can_be_closed(events):
    reader = attached(events, 'ws-a', 3)
    publish(events, 3)
    reader.close()
    assert reader.closed and numbers(reader.take(0)[1]) == [0, 1, 2]


def test_a_reader_that_never_reads_holds_up_neither_the_publisher_nor_another_reader(events):
    others, lazy, keen = [], attached(events, 'ws-a'), attached(events, 'ws-a', 100_000)
    switches = gevent.spawn(lambda: others.append('ran'))
    publish(events, 10_000)
    assert not others, 'publishing let others run'
    assert len(keen.take(0)[1]) == 10_000
    assert lazy.take(0)[0] == 10_000 - QUEUE_SIZE
    switches.join()


def test_a_subscription_that_ends_leaves_nothing_behind(events):
    first, second = attached(events, 'ws-a'), attached(events, 'ws-a')
    events.detach('ws-a', second)
    events.detach('ws-a', second)  # twice is fine
    publish(events, 1)
    assert second.take(0) == (0, []) and numbers(first.take(0)[1]) == [0]
    events.detach('ws-a', first)
    assert not events._readers


def test_asking_for_a_topic_that_never_was_leaves_nothing_behind(events):
    events.recent('ws-a')
    events.forget('ws-a')
    assert not events._rings and not events._readers


def test_a_forgotten_topic_leaves_nothing_behind(events):
    publish(events, 3, run=RUN, place=(1, 0, 0))
    events.forget('ws-a')
    events.forget('s1')
    assert not events._rings and events.recent('ws-a') == []


def test_events_that_nobody_holds_are_freed(events):
    class Marker(dict):
        pass

    for _ in range(RING_SIZE + 50):
        events.publish('log', 'ws-a', Marker(n=1))
    gc.collect()
    assert sum(isinstance(item, Marker) for item in gc.get_objects()) == RING_SIZE


def test_readers_may_come_and_go_while_events_are_published(events):
    def come_and_go(count):
        for _ in range(count):
            reader = attached(events, 'ws-a')
            gevent.sleep(0)
            assert len(reader.take(0)[1]) >= 1
            events.detach('ws-a', reader)

    def publisher():
        while not done.ready():
            publish(events, 1)
            gevent.sleep(0)

    readers = [gevent.spawn(come_and_go, 20) for _ in range(20)]
    done = gevent.spawn(gevent.joinall, readers, raise_error=True)
    publishing = gevent.spawn(publisher)
    done.get(timeout=5)
    publishing.get(timeout=5)
    assert not events._readers
