"""Continuous batching as host logic: whatever comes in whatever order, answers are those without neighbours."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standin_decoder import StandInDecoder, alone

from mindformers_ixc.serving.scheduling import PATIENCE, Ended, Job, Refused, Scheduler


class Greedy:
    """A writer that takes the likeliest token, so many times."""

    def __init__(self, count: int):
        self.count, self.ids, self.finished = count, [], ""

    def take(self, scores):
        self.ids.append(int(np.argmax(scores)))
        if len(self.ids) == self.count:
            self.finished = "length"
        return self.ids[-1]

    def take_all(self, ids):
        self.ids, self.finished = list(ids), "length"


class Asked:
    """A request and how it ended."""

    def __init__(self, ids, count=5, answers=1, client="a", mode="base", is_whole=False, deadline=None):
        self.prompt, self.ends = ids, []
        self.writers = [Greedy(count) for _ in range(answers)]
        self.job = Job(ids, mode, count, self.writers, client, self.ends.append, is_whole, deadline)

    @property
    def answers(self):
        return [writer.ids for writer in self.writers]


def run(scheduler, ticks=10_000):
    while scheduler.tick():
        ticks -= 1
        assert ticks, "it does not come to an end"


def submit(scheduler, asked, wait, cancel):
    """Asks, lets some ticks go by, and leaves where `cancel` is a small number."""
    scheduler.submit(asked.job)
    for _ in range(wait):
        scheduler.tick()
    if cancel is not None and cancel < 5:
        scheduler.cancel(asked.job)


requests = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9), st.integers(1, 3), st.sampled_from("abc"),
                              st.sampled_from(["base", "web"]), st.booleans(), st.integers(0, 12),
                              st.one_of(st.none(), st.integers(0, 20))), min_size=1, max_size=12)


class TestAnyOrder:
    @settings(max_examples=150, deadline=None)
    @given(requests)
    def test_every_answer_is_the_one_without_neighbours_and_every_row_is_freed(self, asked):
        decoder = StandInDecoder(most=4)
        scheduler = Scheduler(decoder)
        all_of = []
        for number, (length, count, answers, client, mode, whole, wait, cancel) in enumerate(asked):
            one = Asked([number * 31 + place for place in range(length)], count, 1 if whole else answers, client, mode,
                        whole)
            all_of.append((one, cancel))
            submit(scheduler, one, wait, cancel)
        run(scheduler)
        assert scheduler.is_idle and not decoder.rows and not scheduler.open_rows
        for one, _ in all_of:
            assert len(one.ends) == 1
            if one.ends[0] is None:
                assert one.answers == [alone(one.prompt, one.writers[0].count)] * len(one.writers)
            else:
                assert isinstance(one.ends[0], Ended) and one.job.is_cancelled
        counts = scheduler.counts.requests
        assert counts["done"] + counts["cancelled"] == len(all_of)


class TestMemory:
    @settings(max_examples=150, deadline=None)
    @given(requests, st.integers(20, 120))
    def test_who_finds_none_waits_for_others_to_end(self, asked, memory):
        decoder = StandInDecoder(most=4, memory=memory)
        scheduler = Scheduler(decoder)
        all_of = []
        for length, count, answers, client, mode, _, wait, cancel in asked:
            one = Asked(list(range(length)), count, answers, client, mode)
            all_of.append(one)
            submit(scheduler, one, wait, cancel)
        run(scheduler)
        assert scheduler.is_idle and not decoder.rows
        for one in all_of:
            (end,) = one.ends
            needed = len(one.answers) * (len(one.prompt) + one.writers[0].count)
            if end is None:
                assert needed <= memory and one.answers == [alone(one.prompt, one.writers[0].count)] * len(one.answers)
            else:
                assert (isinstance(end, MemoryError) and needed > memory) or one.job.is_cancelled

    def test_one_that_needs_much_gets_it_though_small_ones_keep_coming(self):
        decoder = StandInDecoder(most=8, memory=60)
        scheduler, large = Scheduler(decoder), Asked(list(range(40)), 5, client="large")
        scheduler.submit(Asked([1], 30, client="first").job)
        scheduler.tick()
        scheduler.submit(large.job)
        for number in range(100):
            scheduler.submit(Asked([number], 5, client=str(number)).job)
            scheduler.tick()
        assert large.ends == [None]


class TestTheNextPiece:
    def test_running_answers_get_a_token_between_two_pieces_of_a_prompt(self):
        decoder = StandInDecoder(piece=4)
        scheduler, running, long = Scheduler(decoder), Asked([1, 2], 30), Asked(list(range(40)), 2)
        scheduler.submit(running.job)
        scheduler.tick()
        scheduler.submit(long.job)
        for _ in range(10):
            before = len(running.answers[0])
            scheduler.tick()
            assert len(running.answers[0]) == before + 1
        assert len(long.answers[0]) == 2        # the tenth piece was its last, and its first step came with it

    def test_a_short_prompt_goes_before_the_rest_of_a_long_one(self):
        scheduler = Scheduler(StandInDecoder(piece=4))
        long, short = Asked(list(range(40)), 2), Asked([7, 8], 1)
        scheduler.submit(long.job)
        scheduler.tick()
        scheduler.submit(short.job)
        scheduler.tick()
        assert short.ends == [None] and not long.ends

    def test_short_prompts_without_end_do_not_stop_a_long_one(self):
        scheduler = Scheduler(StandInDecoder(piece=4))
        long = Asked(list(range(12)), 1)
        scheduler.submit(long.job)
        for number in range(3 * (PATIENCE + 2)):
            scheduler.submit(Asked([number], 1, client=str(number)).job)
            scheduler.tick()
        assert long.ends == [None]

    def test_clients_take_turns(self):
        scheduler = Scheduler(StandInDecoder(most=1))
        many, one = [Asked([number], 2, client="many") for number in range(6)], Asked([99], 2, client="one")
        for asked in [*many, one]:
            scheduler.submit(asked.job)
        while not one.ends:
            scheduler.tick()
        assert sum(bool(asked.ends) for asked in many) <= 2

    def test_a_request_for_many_rows_is_not_passed_over_for_ever(self):
        scheduler, wide = Scheduler(StandInDecoder(most=4)), Asked([5], 3, answers=4, client="wide")
        for number in range(3):
            scheduler.submit(Asked([number], 6, client=f"{number}").job)
            scheduler.tick()
        scheduler.submit(wide.job)
        for number in range(80):
            scheduler.submit(Asked([number], 6, client="narrow").job)
            scheduler.tick()
            if wide.ends:
                break
        assert wide.ends == [None]

    def test_others_go_on_between_the_steps_of_a_whole_answer(self):
        scheduler, whole, other = Scheduler(StandInDecoder()), Asked([3], 12, is_whole=True), Asked([4], 6, client="b")
        scheduler.submit(whole.job)
        scheduler.submit(other.job)
        seen = []
        whole.job.on_end = lambda error: seen.append((error, list(other.ends)))
        scheduler.tick()
        assert seen == [(None, [None])]
        assert whole.answers == [alone([3], 12)] and other.answers == [alone([4], 6)]


    def test_the_longest_wait_is_that_for_a_step_of_a_whole_answer_and_not_for_all_of_it(self):
        now = [0.0]

        class Slow(StandInDecoder):
            def step(self, rows, tokens):
                now[0] += 0.25
                return super().step(rows, tokens)

            def whole(self, prompt, job, between):
                def after_a_step():
                    now[0] += 1.0
                    between()

                return super().whole(prompt, job, after_a_step)

        scheduler = Scheduler(Slow(), clock=lambda: now[0])
        whole, other = Asked([3], 12, is_whole=True), Asked([4], 6, client="b")
        scheduler.submit(other.job)
        scheduler.submit(whole.job)
        run(scheduler)
        assert whole.ends == other.ends == [None] and now[0] > 12
        assert scheduler.counts.longest_tick == 1.25


class TestEnds:
    def test_a_cancelled_request_frees_its_rows_with_the_next_tick(self):
        decoder = StandInDecoder()
        scheduler, asked = Scheduler(decoder), Asked([1, 2, 3], 100, answers=2)
        scheduler.submit(asked.job)
        for _ in range(4):
            scheduler.tick()
        assert len(decoder.rows) == 2
        scheduler.cancel(asked.job)
        scheduler.tick()
        assert not decoder.rows and isinstance(asked.ends[0], Ended)

    def test_a_whole_answer_ends_when_it_is_cancelled_between_steps(self):
        scheduler, asked = Scheduler(StandInDecoder()), Asked([1], 1000, is_whole=True)
        scheduler.submit(asked.job)
        scheduler.after_tick = lambda: scheduler.cancel(asked.job)
        scheduler.tick()
        assert isinstance(asked.ends[0], Ended) and scheduler.is_idle

    @pytest.mark.parametrize("is_whole", [False, True])
    def test_one_that_is_late_is_refused_with_a_sentence(self, is_whole):
        clock = iter(range(10_000))
        scheduler = Scheduler(StandInDecoder(), clock=lambda: float(next(clock)))
        asked = Asked([1], 1000, deadline=40.0, is_whole=is_whole)
        scheduler.submit(asked.job)
        run(scheduler)
        assert isinstance(asked.ends[0], Refused) and asked.ends[0].status == 504
        assert "most that a request may take" in str(asked.ends[0])

    def test_an_error_of_the_decoder_ends_its_requests_and_no_others(self):
        decoder = StandInDecoder()
        scheduler, asked = Scheduler(decoder), Asked([1], 9)
        scheduler.submit(asked.job)
        scheduler.tick()
        decoder.fails = ValueError("The device is lost.")
        scheduler.tick()
        assert str(asked.ends[0]) == "The device is lost." and not decoder.rows
        decoder.fails, again = None, Asked([1], 9)
        scheduler.submit(again.job)
        run(scheduler)
        assert again.ends == [None]

    def test_scores_that_are_no_numbers_end_one_request(self):
        class Spoilt(StandInDecoder):
            def step(self, rows, tokens):
                return [ValueError("row") if row.ids[0] == 1 else scores
                        for row, scores in zip(rows, super().step(rows, tokens))]

        scheduler, bad, good = Scheduler(Spoilt()), Asked([1], 5), Asked([2], 5)
        scheduler.submit(bad.job)
        scheduler.submit(good.job)
        run(scheduler)
        assert str(bad.ends[0]) == "row" and good.ends == [None] and good.answers == [alone([2], 5)]


class TestTheQueue:
    def test_too_many_of_one_client_and_of_all_are_refused_with_what_http_says(self):
        scheduler = Scheduler(StandInDecoder(), queue=3, queue_each=2)
        for client in "aab":
            scheduler.submit(Asked([1], client=client).job)
        with pytest.raises(Refused, match="2 of your requests") as mine:
            scheduler.submit(Asked([1], client="a").job)
        with pytest.raises(Refused, match="3 requests are waiting") as everybodys:
            scheduler.submit(Asked([1], client="c").job)
        assert (mine.value.status, everybodys.value.status) == (429, 503)
        assert scheduler.counts.requests["refused"] == 2

    def test_one_that_drains_ends_what_it_has_and_takes_no_more(self):
        scheduler, asked = Scheduler(StandInDecoder()), Asked([1], 5)
        scheduler.submit(asked.job)
        scheduler.is_draining = True
        with pytest.raises(Refused, match="shutting down") as refused:
            scheduler.submit(Asked([2]).job)
        run(scheduler)
        assert refused.value.status == 503 and asked.ends == [None]
