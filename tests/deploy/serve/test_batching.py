"""Batches, room, and who is not computed any more."""

import random
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import pytest

from deploy.serve.harness import Fake, picture
from vitrail.data.views.seen import Seen
from vitrail.deploy.predict import Shown
from vitrail.deploy.serve.admission import Admission
from vitrail.deploy.serve.batching import Batcher, Expired
from vitrail.deploy.serve.service import Served

FOREVER = float("inf")
POISON = 66


def view(number: int, width: int = 1) -> Shown:
    """An image that is told by its number."""
    return Shown(np.full((1, 1, width), number, np.uint8), Seen(np.eye(3), (1, width), (1, width)))


class Held:
    """A model that waits to be let go."""

    most: int | None = None

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.go = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)

    def answers(self, shown):
        self.begun.release()
        assert self.go.acquire(timeout=10)
        numbers = [int(one.pixels[0, 0, 0]) for one in shown]
        self.calls.append(numbers)
        if POISON in numbers:
            raise RuntimeError("poison")
        return [10 * number for number in numbers]


@pytest.fixture
def held():
    model = Held()
    yield model
    for _ in range(100):
        model.go.release()


def busy(batcher: Batcher, model: Held) -> Future:
    """The engine has an image, and whatever comes now has to wait."""
    first = batcher.put(model, view(0), FOREVER)
    assert model.begun.acquire(timeout=10)
    return first


def test_a_free_engine_takes_all_that_wait_up_to_a_number(held):
    batcher = Batcher(most=3)
    answers = [busy(batcher, held), *(batcher.put(held, view(i), FOREVER) for i in range(1, 6))]
    for _ in range(3):
        held.go.release()
    assert [one.result(10) for one in answers] == [0, 10, 20, 30, 40, 50]
    assert held.calls == [[0], [1, 2, 3], [4, 5]]
    batcher.close()


def test_two_models_never_share_a_call(held):
    other, batcher = Held(), Batcher(most=8)
    answers = [busy(batcher, held)]
    answers += [
        batcher.put(model, view(i), FOREVER) for i, model in enumerate((held, other, held), 1)
    ]
    for model in (held, other):
        for _ in range(4):
            model.go.release()
    assert [one.result(10) for one in answers] == [0, 10, 20, 30]
    assert (held.calls, other.calls) == ([[0], [1, 3]], [[2]])
    batcher.close()


def test_views_of_different_sizes_never_share_a_call(held):
    batcher = Batcher(most=8)
    widths = [1, 2, 1, 3, 2]
    answers = [busy(batcher, held)]
    answers += [batcher.put(held, view(i, w), FOREVER) for i, w in enumerate(widths, 1)]
    for _ in range(4):
        held.go.release()
    assert [one.result(10) for one in answers] == [0, 10, 20, 30, 40, 50]
    assert held.calls == [[0], [1, 3], [2, 5], [4]]
    batcher.close()


def test_nothing_is_computed_for_who_has_gone_or_is_too_late(held):
    late = []
    batcher = Batcher(most=8, expired=lambda: late.append(1))
    first = busy(batcher, held)
    gone, expired = (
        batcher.put(held, view(1), FOREVER),
        batcher.put(held, view(2), time.monotonic() + 0.01),
    )
    wanted = batcher.put(held, view(3), FOREVER)
    assert gone.cancel()
    time.sleep(0.02)
    held.go.release()
    held.go.release()
    assert (first.result(10), wanted.result(10)) == (0, 30)
    with pytest.raises(Expired):
        expired.result(10)
    assert held.calls == [[0], [3]] and len(late) == 2
    batcher.close()


def test_a_poisoned_image_fails_alone(held):
    batcher = Batcher(most=8)
    first = busy(batcher, held)
    answers = [batcher.put(held, view(i), FOREVER) for i in (1, POISON, 2)]
    for _ in range(5):
        held.go.release()
    assert first.result(10) == 0
    with pytest.raises(RuntimeError, match="poison"):
        answers[1].result(10)
    assert [answers[0].result(10), answers[2].result(10)] == [10, 20]
    batcher.close()


def test_an_engine_that_loses_an_answer_is_at_fault_and_no_answer_is_anothers():
    class Short:
        most = None

        def answers(self, shown):
            return [10 * int(one.pixels[0, 0, 0]) for one in shown][: max(1, len(shown) - 1)]

    batcher = Batcher(most=4, delay=0.2)
    answers = [batcher.put(Short(), view(1), FOREVER)]
    model = Short()
    answers += [batcher.put(model, view(i), FOREVER) for i in (2, 3)]
    assert [one.result(10) for one in answers] == [10, 20, 30]
    batcher.close()


def test_with_a_delay_a_batch_waits_to_be_full(held):
    calls = []
    batcher = Batcher(most=2, delay=5.0, called=calls.append)
    held.go.release()
    started = time.monotonic()
    one, two = batcher.put(held, view(1), FOREVER), batcher.put(held, view(2), FOREVER)
    assert [one.result(10), two.result(10)] == [10, 20]
    assert held.calls == [[1, 2]] and time.monotonic() - started < 4  # full: nobody waits longer
    batcher.close()
    assert [call.images for call in calls] == [2]


def test_an_engine_whose_answers_depend_on_their_neighbours_gets_one_at_a_time():
    model = Fake(coupled=True, seconds=0.02)
    served, batcher = Served.tried(model), Batcher(most=8)
    model.calls.clear()
    shown = model.show(picture(0))
    answers = [batcher.put(served, shown, FOREVER) for _ in range(6)]
    assert len({one.result(10).probability for one in answers}) == 1
    assert model.calls == [1] * 6
    batcher.close()


def test_room_is_what_keeps_the_wait_below_three_times_one_answer():
    for decode, engine in ((0.005, 0.050), (0.050, 0.010), (0.001, 0.001), (0.2, 0.05)):
        for decoders in (1, 2, 8):
            admission = Admission(decoders=decoders, decode=decode, engine=engine)
            alone, longest = decode + engine, admission.lasting_room / admission.rate
            assert longest <= 3 * alone or admission.lasting_room == 2


def test_room_grows_where_batches_are_quicker_than_their_images():
    admission = Admission(decoders=8, decode=0.002, engine=0.010)
    small = admission.lasting_room
    for _ in range(100):
        admission.computed(8, 0.012)  # as on a GPU: eight take hardly longer than one
    assert admission.lasting_room > 3 * small
    for _ in range(200):
        admission.computed(1, 0.010)
    assert admission.lasting_room == small


def test_a_burst_is_let_in_once_in_a_while():
    now = [0.0]
    admission = Admission(decoders=1, decode=0.001, engine=0.1, clock=lambda: now[0])
    for _ in range(2):
        assert [admission.enter(1) for _ in range(13)] == [True] * 12 + [False]
        admission.leave(11)
        assert [admission.enter(1) for _ in range(2)] == [True, False]
        admission.leave(2)
        now[0] += 3  # and nobody asks


class Trial(NamedTuple):
    """What became of those who asked."""

    turned_away: float
    goodput: float
    """Of what could be answered."""
    slowest: float
    """The 99th percentile, in what one takes alone."""


def trial(load: float, room: int | None = None) -> Trial:
    """Random arrivals at one engine of 50 ms, behind decoders of 20 ms."""
    rng, now, free = random.Random(0), 0.0, 0.0
    admission = Admission(decoders=2, decode=0.02, engine=0.05, room=room, clock=lambda: now)
    leaving: deque[float] = deque()
    waited = []
    asking = int(8_000 * max(1, load))
    for _ in range(asking):
        now += rng.expovariate(load / 0.05)
        while leaving and leaving[0] <= now:
            leaving.popleft()
            admission.leave(1)
        if admission.enter(1):
            free = max(free, now + 0.02) + 0.05
            leaving.append(free)
            waited.append(free - now)
    slowest = float(np.percentile(waited, 99)) / 0.07
    return Trial(1 - len(waited) / asking, len(waited) * 0.05 / now, slowest)


def test_who_is_turned_away_and_how_long_the_others_wait():
    calm, tight = trial(0.7), trial(0.7, room=2)
    assert calm.turned_away < 0.001 and tight.turned_away > 0.15
    for load in (2, 20):
        found = trial(load)
        assert found.goodput > 0.95 and found.slowest < 3


def test_an_idle_server_has_room_for_any_request():
    admission = Admission(decoders=1, decode=0.01, engine=0.01)
    assert admission.enter(100) and not admission.enter(1)
    admission.leave(100)
    assert admission.enter(1)
