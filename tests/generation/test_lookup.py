"""Prompt lookup: the ids of greedy decoding one by one, whatever is proposed."""
from __future__ import annotations

import numpy as np
import pytest

from mindformers_ixc.config import ModelConfig
from mindformers_ixc.errors import GenerationError
from mindformers_ixc.generation.lookup import LONGEST_PAUSE, Proposals
from mindformers_ixc.generation.options import GenerationOptions, hugging_face_options
from mindformers_ixc.generation.search import decode_steps, greedy_or_sample

VOCABULARY, STOP = 12, 2


class Scripted:
    """A decoder whose scores depend on the last two ids of a row, so that what it says soon repeats itself."""

    def __init__(self, prompts: list[list[int]], seed: int, may_step: bool = True):
        self.prompt_ids, self.may_step = prompts, may_step
        self.rows = [list(ids) for ids in prompts]
        self.table = np.random.default_rng(seed).standard_normal((VOCABULARY, VOCABULARY, VOCABULARY)).astype(
            np.float32)
        self.passes, self.verified = 0, 0

    def scores(self, ids: list[int]) -> np.ndarray:
        return self.table[ids[-2], ids[-1]]

    def prefill(self) -> np.ndarray:
        return np.stack([self.scores(ids) for ids in self.rows])

    def step(self, tokens: np.ndarray) -> np.ndarray:
        assert self.may_step
        self.passes += 1
        for ids, token in zip(self.rows, tokens.tolist()):
            ids.append(token)
        return self.prefill()

    def verify(self, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
        self.passes += 1
        self.verified += 1
        found = np.full((*tokens.shape, VOCABULARY), np.nan, np.float32)    # of what is not real nobody may ask
        for row, (ids, new, count) in enumerate(zip(self.rows, tokens.tolist(), real)):
            for place in range(count):
                found[row, place] = self.scores(ids + new[:place + 1])
        return found

    def accept(self, tokens: np.ndarray, counts: np.ndarray) -> None:
        for ids, new, count in zip(self.rows, tokens.tolist(), counts):
            ids += new[:count]


def prompts(seed: int, rows: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, rng.integers(2, 30)).tolist() for _ in range(rows)]


@pytest.mark.parametrize("seed", range(60))
def test_the_ids_are_those_of_decoding_one_by_one(seed):
    rng = np.random.default_rng(1000 + seed)
    rows, most = int(rng.integers(1, 4)), int(rng.integers(1, 9))
    options = {"max_new_tokens": int(rng.integers(1, 60)), "stop_token_ids": (STOP,) if seed % 2 else (),
               "repetition_penalty": (1.0, 1.3)[seed % 3 == 0]}
    given = prompts(seed, rows)
    ended = (lambda ids: ids[-2:] == [5, 7]) if seed % 5 == 0 else None
    expected = greedy_or_sample(Scripted(given, seed), GenerationOptions(**options), rows, ended=ended)
    decoder = Scripted(given, seed, may_step=seed % 4 > 0)
    found = greedy_or_sample(decoder, GenerationOptions(**options, prompt_lookup=most), rows, ended=ended)
    assert found == expected
    for ids, prompt, new in zip(decoder.rows, given, expected):       # the last one is not fed any more
        assert ids[:len(prompt) + len(new) - 1] == prompt + new[:-1]


def test_what_repeats_itself_takes_fewer_passes():
    one_by_one, proposing = Scripted([[4, 5]], 3), Scripted([[4, 5]], 3)
    options = {"max_new_tokens": 200, "stop_token_ids": ()}
    expected = greedy_or_sample(one_by_one, GenerationOptions(**options), 1)
    assert greedy_or_sample(proposing, GenerationOptions(**options, prompt_lookup=7), 1) == expected
    assert one_by_one.passes == 199
    assert proposing.passes < 199 / 4


def test_whoever_stops_listening_stops_the_decoder():
    decoder = Scripted([[4, 5]], 3)
    steps = decode_steps(decoder, GenerationOptions(max_new_tokens=200, prompt_lookup=4), 1)
    next(steps)
    steps.close()
    assert decoder.passes == 0


def test_scores_that_are_no_numbers_are_refused_where_they_are():
    decoder = Scripted([[4, 5]], 3)
    healthy = greedy_or_sample(Scripted([[4, 5]], 3), GenerationOptions(max_new_tokens=50, stop_token_ids=()), 1)[0]
    decoder.table[healthy[39], healthy[40]] = np.nan
    with pytest.raises(GenerationError, match=r"scores of row 0 at new token .* are not numbers"):
        greedy_or_sample(decoder, GenerationOptions(max_new_tokens=50, stop_token_ids=(), prompt_lookup=4), 1)


class TestProposals:
    def test_the_longest_match_counts_and_of_equal_ones_the_last(self):
        proposals = Proposals([1, 2, 3, 9, 9, 2, 3, 8, 8, 1, 2, 3], 2)
        assert proposals.next(10) == [9, 9]             # behind 1 2 3, not behind the later 2 3
        assert Proposals([2, 3, 9, 7, 2, 3, 8, 6, 2, 3], 2).next(10) == [8, 6]

    def test_a_short_period_goes_on(self):
        assert Proposals([1, 2, 1, 2], 5).next(10) == [1, 2, 1, 2, 1]

    def test_no_more_than_there_is_room_for(self):
        assert Proposals([1, 2, 1, 2], 5).next(3) == [1, 2, 1]
        assert Proposals([1, 2, 1, 2], 5).next(0) == []

    def test_nothing_is_known_of_a_new_text_or_of_a_picture(self):
        assert Proposals([1, 2, 3, 4, 5], 4).next(10) == []
        assert Proposals([7, 8, -1, 9, 7, 8], 4).next(10) == []
        assert Proposals([7, 8, 5, -1, 9, 7, 8], 4).next(10) == [5]

    def test_pauses_grow_while_nothing_is_right(self):
        proposals, pauses = Proposals([1, 2, 1, 2], 4), []
        for _ in range(7):
            assert proposals.next(9)
            proposals.proved(0)
            pauses.append(0)
            while not proposals.next(9):
                pauses[-1] += 1
            # the one that ended the pause was looked at, not verified
        assert pauses == [1, 2, 4, 8, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]
        proposals.proved(3)
        assert proposals.next(9)


@pytest.mark.parametrize(("other", "sentence"), [
    ({"do_sample": True}, "prompt_lookup is 4 and do_sample is True; .* greedy decoding"),
    ({"num_beams": 2}, "prompt_lookup is 4 and num_beams is 2"),
    ({"prompt_lookup": -1}, "prompt_lookup is -1; it must be a whole number from 0 to 64"),
    ({"prompt_lookup": 65}, "prompt_lookup is 65"), ({"prompt_lookup": True}, "prompt_lookup is True")])
def test_what_it_cannot_be_together_with_is_refused(other, sentence):
    with pytest.raises(GenerationError, match=sentence):
        GenerationOptions(**{"prompt_lookup": 4, **other})


def test_hugging_faces_name_for_it_is_known():
    options = hugging_face_options({"prompt_lookup_num_tokens": 5}, {}, 3, ModelConfig())
    assert options.prompt_lookup == 5
    options = hugging_face_options({"prompt_lookup_num_tokens": None}, {"prompt_lookup": 2}, 3, ModelConfig())
    assert options.prompt_lookup == 2
    assert hugging_face_options(None, {"prompt_lookup_num_tokens": None}, 3, ModelConfig()).prompt_lookup == 0
