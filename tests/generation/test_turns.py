"""Turns on the device, and whose keys and values stay in memory; no graph is made here."""
from __future__ import annotations

import gc
import threading
import time

import pytest

from mindformers_ixc.generation.cache_pool import CachePool
from mindformers_ixc.generation.slots import Contents
from mindformers_ixc.generation.turns import Turns


def test_threads_get_their_turns_one_at_a_time_in_order():
    turns, order, inside = Turns(), [], []

    def work(number: int) -> None:
        with turns, turns:                          # whoever has it may take it again
            inside.append(number)
            order.append(number)
            time.sleep(0.002)
            assert inside == [number]
            inside.clear()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    with turns:
        for waiting, thread in enumerate(threads, 1):
            thread.start()
            while len(turns._waiting) < waiting:
                time.sleep(0.001)
        assert order == []
    for thread in threads:
        thread.join(60)
    assert order == list(range(8))
    with turns:
        assert turns._depth == 1


def test_an_error_in_a_turn_ends_it():
    turns = Turns()
    with pytest.raises(KeyError), turns:
        raise KeyError
    other = threading.Thread(target=lambda: turns.__enter__())
    other.start()
    other.join(60)
    assert not other.is_alive()


class FakeSlot:
    """A slot of 10 bytes."""

    bytes, movable = 10, True

    def __init__(self):
        self.attached = None

    def new_contents(self) -> Contents:
        return Contents(self)

    def attach(self, contents) -> None:
        self.attached = contents


class Answer:
    closed = False


def test_each_answer_has_contents_of_its_own_and_gets_them_back():
    pool, slot, one, two = CachePool(100), FakeSlot(), Answer(), Answer()
    pool.begin(slot, one)
    first = slot.attached
    pool.begin(slot, two)
    assert slot.attached is not first
    assert pool.resume(one)
    assert slot.attached is first
    assert pool.bytes == 20


def test_what_a_closed_or_forgotten_answer_held_serves_the_next_one():
    pool, slot, one, two = CachePool(100), FakeSlot(), Answer(), Answer()
    pool.begin(slot, one)
    one.closed = True
    pool.begin(slot, two)
    assert not pool.resume(one)
    del two
    gc.collect()
    pool.begin(slot, Answer())
    assert pool.bytes == 10


def test_beyond_the_limit_the_least_recently_used_go_but_ended_ones_first():
    pool, slots, answers = CachePool(30), [FakeSlot() for _ in range(5)], [Answer() for _ in range(5)]
    for slot, answer in zip(slots[:3], answers):
        pool.begin(slot, answer)
    assert pool.resume(answers[0])
    answers[2].closed = True
    pool.begin(slots[3], answers[3])
    assert [pool.resume(answer) for answer in answers[:4]] == [True, True, False, True]
    pool.begin(slots[4], answers[4])
    assert [pool.resume(answer) for answer in answers] == [False, True, False, True, True]
    assert slots[0].attached is slots[2].attached is None      # their memory is free
    assert pool.bytes == 30
    pool.clear()
    assert pool.bytes == 0


def test_a_single_one_may_be_larger_than_the_limit():
    pool, slot, answer = CachePool(1), FakeSlot(), Answer()
    pool.begin(slot, answer)
    assert pool.resume(answer)


def test_contents_that_cannot_move_are_taken_over():
    pool, slot, one, two = CachePool(100), FakeSlot(), Answer(), Answer()
    slot.movable = False
    pool.begin(slot, one)
    pool.begin(slot, two)
    assert not pool.resume(one)
    assert pool.bytes == 10
