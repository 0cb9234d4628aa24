"""Greedy decoding, sampling and beam search: the reference outputs, exhaustive search, and made-up decoders."""
from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import GOLDENS, TASK_LORAS, ReferenceDecoder, ReferenceModel

from mindformers_ixc.errors import GenerationError
from mindformers_ixc.generation.options import GenerationOptions
from mindformers_ixc.generation.sampling import log_softmax
from mindformers_ixc.generation.search import Hypotheses, beam_search, greedy_or_sample

quick = settings(deadline=None, max_examples=40)


class TableDecoder:
    """Scores that are a function of a prompt's number and the ids after it.

    Args:
        scores: maps `(prompt, ids)` to scores `(V,)`.
        prompts: number of each prompt.
        beams: rows a prompt.
    """

    def __init__(self, scores, prompts, beams=1):
        self.scores, self.steps, self.fed = scores, 0, []
        self.rows = [(prompt, ()) for prompt in prompts for _ in range(beams)]

    def prefill(self):
        return np.array([self.scores(*row) for row in self.rows], np.float32)

    def step(self, tokens):
        self.steps += 1
        self.fed.append(tokens.tolist())
        self.rows = [(prompt, (*ids, int(token))) for (prompt, ids), token in zip(self.rows, tokens)]
        return self.prefill()

    def reorder(self, rows):
        self.rows = [self.rows[i] for i in rows]


def random_scores(seed, vocabulary, spread=2.0):
    """A random language model: scores depend on every id so far."""
    def scores(prompt, ids):
        return np.random.default_rng([seed, prompt, *(i + 1 for i in ids)]).normal(size=vocabulary) * spread
    return scores


def written_scores(table, vocabulary):
    """A language model written down: probabilities by ids so far; what is not written is equally likely."""
    def scores(_, ids):
        return np.log(table.get(ids, [1 / vocabulary] * vocabulary))
    return scores


def search(scores, options, prompts=(0,), **more):
    """New ids of each prompt, greedily, by sampling or by beams."""
    decoder = TableDecoder(scores, prompts, options.num_beams)
    if options.num_beams > 1:
        return beam_search(decoder, options, len(prompts), **more)
    return greedy_or_sample(decoder, options, len(prompts), **more)


def exhaustive(scores, vocabulary, options, stop=None):
    """The best of all answers, by trying each."""
    best, best_score = None, -np.inf
    for ids in product(range(vocabulary), repeat=options.max_new_tokens):
        if stop in ids:
            ids = ids[:ids.index(stop) + 1]
        total = sum(log_softmax(np.asarray(scores(0, ids[:i]), np.float64))[ids[i]] for i in range(len(ids)))
        score = total / len(ids) ** options.length_penalty
        if score > best_score + 1e-9:
            best, best_score = list(ids), score
    return best


# Reference outputs

CASES = {
    "greedy": {},
    "greedy_rep": {"repetition_penalty": 1.3},
    "beam3": {"num_beams": 3, "repetition_penalty": 1.005},
    "beam3_lp": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "beam4": {"num_beams": 4},
}


@lru_cache(maxsize=1)
def reference():
    return ReferenceModel(GOLDENS / "t1"), dict(np.load(GOLDENS / "t1" / "generate.npz"))


@pytest.mark.parametrize("mode", TASK_LORAS)
@pytest.mark.parametrize("case", CASES)
def test_reference_ids(case, mode):
    model, golden = reference()
    options = GenerationOptions(max_new_tokens=24, stop_token_ids=(2, 511), **CASES[case])
    decoder = ReferenceDecoder(model, [(golden[f"{mode}_ids"], golden[f"{mode}_image"][0])], mode, options.num_beams)
    run = beam_search if options.num_beams > 1 else greedy_or_sample
    assert run(decoder, options, 1) == [golden[f"{mode}_{case}"].tolist()]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"repetition_penalty": 1.3}, {"do_sample": True, "seed": 3}])
def test_a_batch_of_mixed_prompts_answers_as_each_alone(options):
    model, golden = reference()
    ids, image = golden["base_ids"], golden["base_image"][0]
    prompts = [(ids, image), (ids[-5:], None), (golden["web_ids"][:30], golden["web_image"][0]), (ids[:2], None)]
    options = GenerationOptions(max_new_tokens=8, stop_token_ids=(2, 511), **options)
    run = beam_search if options.num_beams > 1 else greedy_or_sample
    together = run(ReferenceDecoder(model, prompts, "base", options.num_beams), options, len(prompts))
    alone = [run(ReferenceDecoder(model, [prompt], "base", options.num_beams), options, 1)[0] for prompt in prompts]
    assert together == alone


# Properties of every decoder

@quick
@given(st.integers(0, 10 ** 6), st.sampled_from([(2, 4), (3, 3), (4, 2)]), st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]))
def test_enough_beams_find_the_best_of_all_answers(seed, sizes, length_penalty):
    vocabulary, length = sizes
    # only without a length penalty is the default criterion for being done not a guess
    early_stopping = "never" if length_penalty else False
    options = GenerationOptions(max_new_tokens=length, num_beams=vocabulary ** length, length_penalty=length_penalty,
                                stop_token_ids=(1,), early_stopping=early_stopping)
    scores = random_scores(seed, vocabulary)
    assert search(scores, options) == [exhaustive(scores, vocabulary, options, stop=1)]


@quick
@given(st.integers(0, 10 ** 6), st.sampled_from([True, False]), st.sampled_from([0.0, 1.0, 2.0]))
def test_one_beam_is_greedy(seed, early_stopping, length_penalty):
    options = GenerationOptions(max_new_tokens=10, stop_token_ids=(2,), early_stopping=early_stopping,
                                length_penalty=length_penalty)
    scores = random_scores(seed, 6)
    beam = beam_search(TableDecoder(scores, [0, 1]), options, 2)
    assert beam == greedy_or_sample(TableDecoder(scores, [0, 1]), options, 2)


@quick
@given(st.integers(0, 10 ** 6), st.sampled_from([1, 2, 4]), st.booleans(), st.sampled_from([True, False, "never"]))
def test_a_batch_answers_as_each_prompt_alone(seed, num_beams, do_sample, early_stopping):
    options = GenerationOptions(max_new_tokens=8, num_beams=num_beams, do_sample=do_sample, top_k=4, seed=seed,
                                repetition_penalty=1.2, early_stopping=early_stopping, stop_token_ids=(2, 4))
    scores, prompts = random_scores(seed, 7), (5, 3, 5, 8)
    together = search(scores, options, prompts)
    assert together == [search(scores, options, (prompt,))[0] for prompt in prompts]
    assert together[0] == together[2]


@quick
@given(st.integers(0, 10 ** 6), st.integers(2, 4), st.floats(0.1, 2))
def test_the_stricter_the_criterion_the_longer_the_search(seed, num_beams, length_penalty):
    steps = []
    for early_stopping in (True, False, "never"):
        options = GenerationOptions(max_new_tokens=12, num_beams=num_beams, early_stopping=early_stopping,
                                    length_penalty=length_penalty, stop_token_ids=(2,))
        decoder = TableDecoder(random_scores(seed, 5), [0], num_beams)
        beam_search(decoder, options, 1)
        steps.append(decoder.steps)
    assert steps == sorted(steps)


@quick
@given(st.integers(0, 10 ** 6), st.integers(1, 3))
def test_sampling_stays_within_top_k(seed, num_beams):
    options = GenerationOptions(max_new_tokens=8, do_sample=True, top_k=3, num_beams=num_beams, seed=seed)
    scores = random_scores(seed, 9)
    ids, = search(scores, options)
    assert len(ids) == 8
    for i, token in enumerate(ids):
        assert token in np.argsort(-scores(0, tuple(ids[:i])))[:3]


@quick
@given(st.integers(0, 10 ** 6))
def test_sampling_from_one_token_is_greedy(seed):
    scores = random_scores(seed, 6)
    greedy = GenerationOptions(max_new_tokens=8, stop_token_ids=(2,))
    sampled = GenerationOptions(max_new_tokens=8, stop_token_ids=(2,), do_sample=True, top_k=1)
    assert search(scores, sampled) == search(scores, greedy)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_seed_repeats_an_answer_and_another_changes_it(num_beams):
    def answer(seed):
        options = GenerationOptions(max_new_tokens=12, do_sample=True, num_beams=num_beams, seed=seed)
        return search(random_scores(0, 30, 0.5), options)

    assert answer(7) == answer(7)
    assert len({str(answer(seed)) for seed in range(5)}) > 1


# Ends

def test_greedy_keeps_the_stop_id_and_feeds_ended_rows_the_first_one():
    table = {(): [0.1, 0.1, 0.1, 0.6, 0.1], (3, 0): [0.1, 0.1, 0.1, 0.1, 0.6]}
    plain, ending = written_scores(table, 5), np.log([0.1, 0.1, 0.1, 0.1, 0.6])
    decoder = TableDecoder(lambda prompt, ids: plain(0, ids) if prompt == 0 else ending, [0, 1])
    options = GenerationOptions(max_new_tokens=6, stop_token_ids=(2, 4))
    assert greedy_or_sample(decoder, options, 2) == [[3, 0, 4], [4]]
    assert decoder.fed == [[3, 4], [0, 2]]


def test_beam_search_writes_the_first_stop_id_for_any():
    table = {(): [0.1, 0.1, 0.1, 0.6, 0.1], (3,): [0.02, 0.02, 0.02, 0.02, 0.92]}
    options = GenerationOptions(max_new_tokens=6, stop_token_ids=(2, 4), num_beams=2)
    assert search(written_scores(table, 5), options) == [[3, 2]]


def test_no_step_is_made_whose_scores_nobody_reads():
    for num_beams, run in ((1, greedy_or_sample), (3, beam_search)):
        decoder = TableDecoder(random_scores(0, 6), [0], num_beams)
        ids, = run(decoder, GenerationOptions(max_new_tokens=5, num_beams=num_beams), 1)
        assert len(ids) == 5 and decoder.steps == 4


def test_the_stop_id_counts_in_a_beams_length():
    # two beams end: [2] with log(0.4) / 1 = -0.92, [0, 2] with log(0.6 * 0.3) / 2 = -0.86, its stop id counted
    table = {(): [0.6, 1e-9, 0.4], (0,): [1e-9, 0.7, 0.3]}
    options = GenerationOptions(max_new_tokens=5, stop_token_ids=(2,), num_beams=2, early_stopping=True)
    assert search(written_scores(table, 3), options) == [[0, 2]]


def test_an_end_ranked_below_the_beams_is_not_taken():
    # [2] has probability 0.2 and nothing longer more than 0.5 x 0.34, but two other tokens come before it
    table = {(): [0.5, 0.3, 0.2], (0,): [0.33, 0.33, 0.34], (1,): [0.33, 0.33, 0.34]}
    options = GenerationOptions(max_new_tokens=2, stop_token_ids=(2,), num_beams=2, length_penalty=0.0)
    assert search(written_scores(table, 3), options) == [[0, 2]]


@pytest.mark.parametrize(("length_penalty", "expected"), [(0.0, [2]), (1.0, [0, 0, 0, 2])])
def test_length_penalty_favours_long_answers(length_penalty, expected):
    # [2]: log 0.4 = -0.92; [0, 0, 0, 2]: log(0.3) = -1.20 in all, -0.30 a token
    table = {(): [0.5, 0.1, 0.4], (0,): [0.85, 0.1, 0.05], (0, 0): [0.85, 0.1, 0.05], (0, 0, 0): [0.1, 0.07, 0.83]}
    options = GenerationOptions(max_new_tokens=6, stop_token_ids=(2,), num_beams=3, length_penalty=length_penalty)
    assert search(written_scores(table, 3), options) == [expected]


def test_early_stopping_takes_what_has_ended():
    # both first candidates of the second step end; the beam (0, 0) would have become much better
    table = {(): [0.5, 0.5, 1e-9], (0,): [0.3, 0.1, 0.6], (1,): [0.1, 0.1, 0.8], (0, 0): [0.01, 0.01, 0.98]}
    eager, patient = (GenerationOptions(max_new_tokens=8, stop_token_ids=(2,), num_beams=2, length_penalty=4.0,
                                        early_stopping=early_stopping) for early_stopping in (True, "never"))
    assert search(written_scores(table, 3), eager) == [[1, 2]]
    assert len(search(written_scores(table, 3), patient)[0]) > 2


def test_beams_go_on_though_every_likely_token_ends_them():
    options = GenerationOptions(max_new_tokens=4, stop_token_ids=(2, 3), num_beams=3, early_stopping="never",
                                length_penalty=20.0)
    ids, = search(lambda prompt, ids: np.log([0.01, 0.01, 0.49, 0.49]), options)
    assert len(ids) == 4
    sampled = GenerationOptions(max_new_tokens=4, stop_token_ids=(2, 3), num_beams=3, do_sample=True, top_k=1, seed=1,
                                early_stopping="never", length_penalty=20.0)
    assert len(search(lambda prompt, ids: np.log([0.001, 0.001, 0.499, 0.499]), sampled)[0]) == 4


def test_ties_among_ended_beams():
    ended = Hypotheses(GenerationOptions(num_beams=2, length_penalty=0.0))
    ended.add([5], -1.0)
    ended.add([6], -1.0)
    assert ended.best == [6]                     # of equally good ones the last
    ended.add([7], -1.0)                         # no better than the worst: not kept
    assert ended.best == [6]
    ended.add([8], -0.5)                         # the first of the equally bad goes
    assert [ids for _, ids in ended.beams] == [[6], [8]]


def test_the_penalty_acts_on_logits_in_greedy_and_on_log_probabilities_in_beam_search():
    def scores(prompt, ids):
        return np.array([0.4, 0.3])

    options = {"max_new_tokens": 2, "repetition_penalty": 1.2}
    # log-probabilities are -0.64 and -0.74: 1.2 x -0.64 = -0.77 falls behind; the logit 0.4 / 1.2 = 0.33 does not
    assert greedy_or_sample(TableDecoder(scores, [0]), GenerationOptions(**options), 1) == [[0, 0]]
    assert beam_search(TableDecoder(scores, [0]), GenerationOptions(**options), 1) == [[0, 1]]


# Streaming, stop strings, errors

def test_on_tokens_sees_every_step_and_can_end_it():
    table = {(): [0.1, 0.1, 0.1, 0.6, 0.1], (3,): [0.6, 0.1, 0.1, 0.1, 0.1]}
    plain, ending = written_scores(table, 5), np.log([0.2, 0.1, 0.5, 0.1, 0.1])
    decoder = TableDecoder(lambda prompt, ids: plain(0, ids) if prompt == 0 else ending, [0, 1])
    seen = []

    def on_tokens(tokens):
        seen.append(tokens)
        return len(seen) == 3

    ids = greedy_or_sample(decoder, GenerationOptions(max_new_tokens=9, stop_token_ids=(2,)), 2, on_tokens)
    assert ids == [[3, 0, 0], [2]]
    assert seen == [[3, 2], [0, None], [0, None]]


@quick
@given(st.integers(0, 10 ** 6))
def test_a_test_of_ids_ends_rows_and_beams_as_a_stop_id_does(seed):
    scores = random_scores(seed, 3)
    for num_beams in (1, 27):
        plain = {"max_new_tokens": 3, "num_beams": num_beams, "length_penalty": 0.0}
        by_test = search(scores, GenerationOptions(**plain), (0, 1), ended=lambda ids: ids[-1] == 1)
        assert by_test == search(scores, GenerationOptions(**plain, stop_token_ids=(1,)), (0, 1))


def test_beams_that_all_end_by_the_test_end_the_search():
    decoder = TableDecoder(random_scores(0, 5), [0], 3)
    options = GenerationOptions(max_new_tokens=50, num_beams=3, stop_token_ids=(4,))
    ids, = beam_search(decoder, options, 1, ended=lambda ids: len(ids) >= 2)
    assert len(ids) <= 2 and decoder.steps <= 3


@pytest.mark.parametrize("num_beams", [1, 2])
def test_scores_that_are_not_numbers_are_reported_with_row_and_step(num_beams):
    def scores(prompt, ids):
        return np.array([0.0, np.nan if prompt == 1 and len(ids) == 2 else 1.0, 0.5])

    options = GenerationOptions(max_new_tokens=5, num_beams=num_beams)
    with pytest.raises(GenerationError, match=f"row {num_beams} at new token 3"):
        search(scores, options, (0, 1))


def test_a_decoder_of_other_rows_is_reported():
    decoder = TableDecoder(random_scores(0, 5), [0, 1], 2)
    with pytest.raises(GenerationError, match="4 rows; prompts x num_beams are 6"):
        beam_search(decoder, GenerationOptions(num_beams=3), 2)


def test_a_vocabulary_of_stop_ids_only_is_reported():
    with pytest.raises(GenerationError, match=r"vocabulary has 2 token\(s\) and stop_token_ids names 2"):
        search(random_scores(0, 2), GenerationOptions(num_beams=2, stop_token_ids=(0, 1)))
