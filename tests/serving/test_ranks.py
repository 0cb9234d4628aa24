"""A server over several ranks: they do the same in the same order, and part in a sentence."""
from __future__ import annotations

import threading
from multiprocessing.connection import Pipe

import numpy as np
import pytest
from standin_decoder import StandInDecoder, alone

from mindformers_ixc.decoding_options import GenerationOptions
from mindformers_ixc.errors import GenerationError, RanksError
from mindformers_ixc.serving.ranks import END, Following, Leading, Rows, accept, connect, outcome
from mindformers_ixc.serving.scheduling import Job, Scheduler


class Writer:
    """Takes the likeliest token until there are so many."""

    def __init__(self, count):
        self.ids, self.count, self.finished = [], count, ""

    def take(self, scores):
        self.ids.append(int(scores.argmax()))
        self.finished = "length" if len(self.ids) == self.count else ""
        return self.ids[-1]

    def take_all(self, ids):
        self.ids, self.finished = list(ids), "length"


class Recording(StandInDecoder):
    """Notes what it is told, and what it computes."""

    def __init__(self, **options):
        super().__init__(**options)
        self.told, self.fails_at = [], None

    def open(self, prompt, mode, new_tokens, *more):
        self._note("open", prompt, mode, new_tokens, *more)
        return super().open(prompt, mode, new_tokens, *more)

    def advance(self, row):
        self._note("advance", row.ids, row.done)
        return super().advance(row)

    def step(self, rows, tokens):
        self._note("step", [list(row.ids) for row in rows], list(tokens))
        return super().step(rows, tokens)

    def close(self, row):
        self._note("close", row.ids)
        super().close(row)

    def whole(self, prompt, job, between):
        self._note("whole", prompt, job.mode, job.details.seed)
        try:
            return super().whole(prompt, job, between)
        finally:
            self._note("whole ended")

    def _note(self, *what):
        self.told.append(repr(what))
        if self.fails_at == len(self.told):
            raise MemoryError("no more")


class Lost(Exception):
    """In place of the end of the process."""


def lose(sentence):
    raise Lost(sentence)


class Ranks:
    """Rank 0 and one that follows, in threads."""

    def __init__(self):
        self.decoders = [Recording(most=3), Recording(most=3)]
        ours, theirs = Pipe()
        self.ours, self.theirs, self.error = ours, theirs, None
        self.leading = Leading(self.decoders[0], [ours], lose)
        self.scheduler = Scheduler(self.leading)
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self):
        try:
            Following(self.decoders[1], self.theirs).run()
        except RanksError as error:
            self.error = error

    def ask(self, prompt, count=5, answers=1, is_whole=False, client="a"):
        ends = []
        options = GenerationOptions(max_new_tokens=count, do_sample=True) if is_whole else None
        job = Job(prompt, "base", count, [Writer(count) for _ in range(answers)], client, ends.append, is_whole,
                  None, options)
        job.ends, job.asked = ends, prompt
        self.scheduler.submit(job)
        return job

    def run(self):
        while self.scheduler.tick():
            pass

    def end(self):
        self.leading.end()
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture
def ranks():
    found = Ranks()
    yield found
    found.end()


def test_all_ranks_do_the_same_in_the_same_order(ranks):
    jobs = [ranks.ask([number, 7, 8] * (1 + 2 * number), client=str(number % 2)) for number in range(5)]
    several = ranks.ask([9, 9], answers=3)
    ranks.run()
    for job in (*jobs, several):
        assert job.ends == [None]
        assert [writer.ids for writer in job.writers] == [alone(job.asked, 5)] * len(job.writers)
    assert ranks.decoders[0].told == ranks.decoders[1].told
    assert ranks.decoders[1].rows == [] and ranks.leading.own.rows == {}


def test_between_the_steps_of_a_search_all_ranks_go_on_with_the_others(ranks):
    search, other = ranks.ask([1, 2], is_whole=True), ranks.ask([3, 4], count=3)
    ranks.run()
    assert search.writers[0].ids == alone([1, 2], 5) and other.writers[0].ids == alone([3, 4], 3)
    told = ranks.decoders[1].told
    assert told == ranks.decoders[0].told
    begun, ended = (next(i for i, one in enumerate(told) if one.startswith(f"('whole{what}'"))
                    for what in ("", " ended"))
    assert any("step" in one for one in told[begun:ended])
    assert "None" not in told[begun]            # all draw by the same seed


def test_a_search_whose_client_goes_away_ends_on_all_ranks(ranks):
    search, other = ranks.ask([1, 2], count=50, is_whole=True), ranks.ask([3, 4], count=3)
    steps = []
    ranks.scheduler.after_tick = lambda: steps.append(1) or (len(steps) == 2 and ranks.scheduler.cancel(search))
    ranks.run()
    assert search.writers[0].ids == [] and str(search.ends[0]) == "cancelled"
    assert other.ends == [None]
    assert ranks.decoders[0].told == ranks.decoders[1].told
    later = ranks.ask([5, 6])
    ranks.run()
    assert later.writers[0].ids == alone([5, 6], 5)


def test_what_fails_on_all_ranks_alike_ends_its_request_alone(ranks):
    for decoder in ranks.decoders:
        decoder.fails_at = 1
    failed, good = ranks.ask([1, 2]), ranks.ask([3, 4], client="b")
    ranks.run()
    assert isinstance(failed.ends[0], MemoryError) and good.writers[0].ids == alone([3, 4], 5)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_on_one_rank_ends_the_server(ranks, rank):
    ranks.decoders[rank].fails_at = 1
    with pytest.raises(Lost, match=r"Rank 1 came to another end than rank 0 \(open: (MemoryError and done|done and "
                                   r"MemoryError)\)"):
        ranks.leading.open([1, 2], "base", 3)


def test_a_rank_that_is_gone_ends_the_server(ranks):
    row = ranks.leading.open([1, 2], "base", 3)
    ranks.leading.end()
    ranks.thread.join(60)
    ranks.theirs.close()
    with pytest.raises(Lost, match=r"Rank 1 has ended, so the server cannot go on"):
        ranks.leading.advance(row)


def test_without_rank_0_the_others_end():
    ranks = Ranks()
    ranks.leading.open([1, 2], "base", 3)
    ranks.ours.close()
    ranks.thread.join(60)
    assert "Rank 0 has ended" in str(ranks.error)


def test_ranks_meet_in_a_folder_in_their_order(tmp_path):
    connections, found = accept(tmp_path, 3), []
    threads = [threading.Thread(target=lambda rank=rank: found.append((rank, connect(tmp_path, rank))))
               for rank in (2, 1)]
    for thread in threads:
        thread.start()
    others = connections()
    for thread in threads:
        thread.join(60)
    for rank, other in enumerate(others, 1):
        other.send(END)
        assert dict(found)[rank].recv() == END


def test_outcomes():
    scores = np.zeros(3)
    assert outcome(None) == outcome(scores) == "done"
    assert outcome([3, 5]) == "3, 5"            # of a search: each rank has chosen them itself
    assert outcome([scores, GenerationError("x")]) == "scores, GenerationError"
    assert outcome(MemoryError()) == "MemoryError"


def test_a_decoder_without_graphs_needs_no_warm_up():
    assert Rows(StandInDecoder()).warm_up("base") is None
