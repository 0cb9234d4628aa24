"""Decoding options, the repetition penalty, the warpers and the draws."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mindformers_ixc.errors import GenerationError
from mindformers_ixc.generation.options import GenerationOptions
from mindformers_ixc.generation.sampling import (
    apply_repetition_penalty,
    apply_temperature,
    highest,
    keep_top_k,
    keep_top_p,
    log_softmax,
    row_generators,
    sample_distinct,
    sample_rows,
    softmax,
    warp,
)

quick = settings(deadline=None, max_examples=60)
# few different values, so that ties are common
scores_2d = arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=12),
                          elements=st.integers(-8, 8).map(lambda value: value / 2))


@pytest.mark.parametrize("option", [
    {"max_new_tokens": 0}, {"max_new_tokens": -3}, {"max_new_tokens": 1.5}, {"max_new_tokens": True},
    {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")},
    {"temperature": "1"}, {"top_k": -1}, {"top_k": 2.5}, {"top_p": 2}, {"top_p": -0.1}, {"top_p": float("nan")},
    {"repetition_penalty": 0}, {"repetition_penalty": None}, {"num_beams": 0}, {"num_beams": 1.0},
    {"length_penalty": float("inf")}, {"early_stopping": "always"}, {"early_stopping": 1}, {"do_sample": "yes"},
    {"stop_token_ids": (2, -1)}, {"stop_token_ids": ("</s>",)}, {"stop_token_ids": None}, {"stop_strings": ("",)},
    {"seed": -1}, {"seed": 0.5},
])
def test_a_value_out_of_range_is_named_with_its_range(option):
    (name, value), = option.items()
    with pytest.raises(GenerationError) as error:
        GenerationOptions(**option)
    message = str(error.value)
    assert message.startswith(f"{name} is ") and repr(value) in message and "it must be" in message
    assert isinstance(error.value, ValueError)


def test_values_at_the_edge_of_their_range_are_taken():
    options = GenerationOptions(max_new_tokens=np.int64(1), temperature=1e-3, top_k=0, top_p=0, num_beams=np.int32(1),
                                length_penalty=-2, early_stopping="never", stop_token_ids=2, stop_strings="END", seed=0)
    assert options.stop_token_ids == (2,) and options.stop_strings == ("END",)
    assert GenerationOptions(stop_token_ids=[2, 511], top_p=1.0).stop_token_ids == (2, 511)


def test_the_defaults_are_those_of_the_public_model_and_hugging_face():
    options = GenerationOptions()
    assert (options.max_new_tokens, options.top_k, options.top_p, options.num_beams) == (1024, 50, 1.0, 1)
    assert (options.do_sample, options.temperature, options.repetition_penalty) == (False, 1.0, 1.0)
    assert (options.length_penalty, options.early_stopping) == (1.0, False)


def test_repetition_penalty_lowers_generated_ids_once():
    scores = np.array([[2.0, -2.0, 1.0, 0.0], [2.0, -2.0, 1.0, 0.0]], np.float32)
    before = scores.copy()
    lowered = apply_repetition_penalty(scores, [[0, 1, 0, 0], []], 2.0)
    assert lowered.tolist() == [[1.0, -4.0, 1.0, 0.0], [2.0, -2.0, 1.0, 0.0]]
    assert np.array_equal(scores, before)
    assert np.array_equal(apply_repetition_penalty(scores, [[0, 1], [2]], 1.0), before)


def test_repetition_penalty_below_one_favours_repeats():
    assert apply_repetition_penalty(np.array([[2.0, -2.0]]), [[0, 1]], 0.5).tolist() == [[4.0, -1.0]]


@quick
@given(scores_2d, st.integers(1, 14), st.integers(1, 4))
def test_top_k_keeps_the_highest(scores, k, tokens_kept):
    kept = keep_top_k(scores, k, tokens_kept)
    width = scores.shape[1]
    for row, result in zip(scores, kept):
        alive = result > -np.inf
        assert alive.sum() >= min(max(k, tokens_kept), width)
        assert np.array_equal(result[alive], row[alive])
        # more than asked for only by ties with the lowest kept
        assert (row[alive] > row[alive].min()).sum() < max(k, tokens_kept)
        assert alive.all() or row[~alive].max() < row[alive].min()


@quick
@given(scores_2d, st.floats(0, 1), st.integers(1, 4))
def test_top_p_keeps_the_smallest_set_that_reaches_the_probability(scores, p, tokens_kept):
    kept = keep_top_p(scores, p, tokens_kept)
    for row, result in zip(scores, kept):
        alive, mass = result > -np.inf, softmax(row.astype(np.float64))
        assert alive.sum() >= min(tokens_kept, len(row))
        assert np.array_equal(result[alive], row[alive])
        assert mass[alive].sum() >= p - 1e-6
        assert alive.all() or mass[~alive].max() <= mass[alive].min() + 1e-12
        if alive.sum() > tokens_kept:
            assert mass[alive].sum() - mass[alive].min() <= p + 1e-6


def test_top_p_reached_exactly_needs_no_further_token():
    scores = np.log(np.array([[0.2, 0.8], [0.8, 0.2]], np.float32))
    assert (keep_top_p(scores, 0.8) > -np.inf).tolist() == [[False, True], [True, False]]


def test_top_p_zero_leaves_the_likeliest_token():
    assert (keep_top_p(np.array([[1.0, 3.0, 2.0]]), 0.0) > -np.inf).tolist() == [[False, True, False]]


def test_no_limit_changes_nothing():
    scores = np.array([[0.5, -1.0, 2.0]], np.float32)
    assert np.array_equal(warp(scores, GenerationOptions(top_k=0, top_p=1.0)), scores)


def test_temperature_acts_before_top_p():
    # probabilities 0.6, 0.3, 0.1; at temperature 0.5 they are 0.78, 0.20, 0.02, so 0.75 is reached by one token
    scores = np.log(np.array([[0.6, 0.3, 0.1]], np.float32))
    alive = warp(scores, GenerationOptions(temperature=0.5, top_p=0.75)) > -np.inf
    assert alive.tolist() == [[True, False, False]]
    assert np.allclose(apply_temperature(scores, 0.5), 2 * scores)


def test_top_k_acts_before_top_p():
    # of 0.4, 0.3, 0.2, 0.1 the first two hold 0.7; among themselves the first already has 0.57
    scores = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    assert (warp(scores, GenerationOptions(top_k=2, top_p=0.55)) > -np.inf).tolist() == [[True, False, False, False]]


def test_beams_keep_one_token_more_than_may_end_them():
    scores = np.log(np.array([[0.9, 0.05, 0.03, 0.02]], np.float32))
    options = GenerationOptions(do_sample=True, num_beams=2, top_k=1, top_p=0.1, stop_token_ids=(0, 1))
    assert (warp(scores, options) > -np.inf).tolist() == [[True, True, True, False]]
    assert GenerationOptions(num_beams=2).tokens_kept == 2
    assert GenerationOptions(stop_token_ids=(0, 1)).tokens_kept == 1


@quick
@given(scores_2d)
def test_log_softmax_is_the_log_of_the_softmax(scores):
    assert np.allclose(np.exp(log_softmax(scores)), softmax(scores), atol=1e-6)
    assert np.allclose(softmax(scores).sum(-1), 1, atol=1e-6)


@quick
@given(arrays.arrays(np.float32, st.integers(1, 40), elements=st.integers(-4, 4)), st.integers(1, 50))
def test_highest_is_the_head_of_a_stable_sort(scores, count):
    assert highest(scores, count).tolist() == np.argsort(-scores, kind="stable")[:count].tolist()


def test_draws_follow_the_probabilities():
    probabilities = np.array([0.5, 0.0, 0.3, 0.2])
    with np.errstate(divide="ignore"):
        scores = np.log(probabilities)[None]
    generator, draws = np.random.default_rng(0), 20000
    counts = np.bincount([sample_rows(scores, [generator])[0] for _ in range(draws)], minlength=4)
    deviation = np.sqrt(draws * probabilities * (1 - probabilities))
    assert counts[1] == 0
    assert (np.abs(counts - draws * probabilities) <= 4 * deviation).all()


@pytest.mark.parametrize("number", [0.0, 0.5, np.nextafter(1.0, 0.0)])
def test_what_is_ruled_out_is_not_drawn_at_the_ends_of_the_range(number):
    class Generator:
        def random(self):
            return number

    scores = np.array([[-np.inf, 1.0, -np.inf, 1.0, -np.inf]], np.float32)
    assert sample_rows(scores, [Generator()])[0] == (1 if number < 0.5 else 3)


def test_distinct_draws_follow_the_probabilities_left():
    probabilities, draws = np.array([0.5, 0.3, 0.2]), 20000
    generator, pairs = np.random.default_rng(0), np.zeros((3, 3))
    for _ in range(draws):
        first, second = sample_distinct(np.log(probabilities), 2, generator)
        pairs[first, second] += 1
    for first in range(3):
        for second in range(3):
            left = 0 if first == second else probabilities[second] / (1 - probabilities[first])
            expected = probabilities[first] * left
            assert abs(pairs[first, second] - draws * expected) <= 4 * np.sqrt(draws * expected * (1 - expected))


@quick
@given(scores_2d, st.integers(0, 1000))
def test_a_rows_draw_does_not_depend_on_its_neighbours(scores, seed):
    together = sample_rows(scores, row_generators(seed, len(scores)))
    alone = [sample_rows(row[None], row_generators(seed, 1))[0] for row in scores]
    assert together.tolist() == alone


def test_without_a_seed_rows_differ():
    numbers = [generator.random() for generator in row_generators(None, 4)]
    assert len(set(numbers)) == 4
