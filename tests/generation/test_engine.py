"""The cached graphs: equal to the whole sequence computed anew, batches equal to single prompts, no recompilation."""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Tensor
from parity_device import sample_of

from mindformers_ixc import native
from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.errors import GenerationError
from mindformers_ixc.generation import caches as cache
from mindformers_ixc.generation import slots
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.cache_pool import CACHE_BYTES
from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.generation.engine import bucket
from mindformers_ixc.generation.loading import load_model
from mindformers_ixc.generation.options import GenerationOptions
from mindformers_ixc.processing.encoded import EncodedSample

NEW = 6


@given(st.integers(1, 10**6))
def test_buckets_hold_what_they_are_for_and_waste_a_third_at_most(length):
    size = bucket(length)
    assert length <= size
    assert size == 128 or 3 * length > 2 * size
    assert size & (size - 1) == 0 or (2 * size // 3) & (2 * size // 3 - 1) == 0
    assert bucket(size) == size


@pytest.fixture(scope="module")
def model(goldens):
    return load_model(goldens / "t1", IXC25ForCausalLM, seq_length=64, max_tiles=6)


@pytest.fixture(scope="module")
def assistant(model) -> Assistant:
    """Its graphs serve all tests."""
    return Assistant(model, None)


@pytest.fixture
def engine(assistant):
    """The same, with no caches and their usual limit."""
    assistant.engine.caches.clear()
    assistant.engine.caches.limit = CACHE_BYTES
    return assistant.engine


def prompt(model, length: int, images: int, seed: int) -> EncodedSample:
    """A prompt of random text with pictures of 1 x 2 tiles in it."""
    rng = np.random.default_rng(seed)
    side = model.config.vision_config.image_size
    parts = [sample_of(np.array([-1] * 17), rng.standard_normal((3, side, 2 * side)).astype(np.float32), model.config)
             for _ in range(images)]
    ids, mask = [rng.integers(3, 400, length)], [np.zeros(length, np.int32)]
    for part in parts:
        ids += [part.input_ids, rng.integers(3, 400, 2)]
        mask += [part.image_mask, np.zeros(2, np.int32)]
    ids, mask = np.concatenate(ids).astype(np.int32), np.concatenate(mask).astype(np.int32)
    nothing = np.zeros((0, 3, side, side), np.float32)
    pixels = np.concatenate([nothing, *(part.pixel_values for part in parts)])
    return EncodedSample(ids, np.full_like(ids, -100), mask, [part.grids[0] for part in parts], pixels, 2)


def whole_logits(model, sample: EncodedSample) -> np.ndarray:
    """Logits after the last position, from the model's own construct over the whole sequence."""
    batch = sample.pad(64, 6, 6, 2)
    columns = [None if name == "labels" else Tensor(batch[name][None]) for name in BATCH_COLUMNS]
    logits = model(*columns).asnumpy()
    return logits[0, len(sample.input_ids) - 1]


def extended(sample: EncodedSample, tokens: list[int]) -> EncodedSample:
    extra = np.array(tokens, np.int32)
    return EncodedSample(np.append(sample.input_ids, extra), np.append(sample.labels, extra),
                         np.append(sample.image_mask, 0 * extra), sample.grids, sample.pixel_values, 2)


def test_cached_steps_equal_the_whole_sequence(model, engine):
    samples = [prompt(model, 9, 1, 0), prompt(model, 20, 0, 1)]
    decoder = engine.decoder(samples, NEW)
    logits, tokens = decoder.prefill(), [[], []]
    for _ in range(NEW):
        for row, sample in enumerate(samples):
            np.testing.assert_allclose(logits[row], whole_logits(model, extended(sample, tokens[row])), atol=2e-5)
            tokens[row].append(int(logits[row].argmax()))
        logits = decoder.step(np.array([row[-1] for row in tokens]))


@pytest.mark.parametrize("kernels", ["1", "0"], ids=["native", "composed"])
def test_long_prompts_go_in_chunks(goldens, monkeypatch, kernels):
    monkeypatch.setenv(native.SWITCH, kernels)
    monkeypatch.setattr(cache, "CHUNK", 48)      # of the bucket's 128 positions: chunks of 48, 48 and 32
    model = load_model(goldens / "t1", IXC25ForCausalLM, seq_length=64, max_tiles=6)
    samples = [prompt(model, 5, 2, 0), prompt(model, 60, 0, 1)]
    decoder = Assistant(model, None).engine.decoder(samples, NEW)
    logits = decoder.prefill()
    for row, sample in enumerate(samples):
        np.testing.assert_allclose(logits[row], whole_logits(model, sample), atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 4}],
                         ids=["greedy", "beams", "sampling"])
def test_a_mixed_batch_equals_the_prompts_alone(model, assistant, options):
    options = GenerationOptions(max_new_tokens=NEW, stop_token_ids=(2,), **options)
    samples = [prompt(model, 5, 0, 0), prompt(model, 3, 2, 1), prompt(model, 11, 1, 2), prompt(model, 30, 0, 3)]
    together = assistant.generate(samples, options)
    assert together == [assistant.generate([sample], options)[0] for sample in samples]


def test_reordering_rows_moves_their_past(model, engine):
    samples = [prompt(model, 8, 0, 5), prompt(model, 12, 0, 6)]
    decoder = engine.decoder(samples, NEW)
    decoder.prefill()
    decoder.reorder(np.array([1, 1]))
    logits = decoder.step(np.array([7, 7]))
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-6)
    np.testing.assert_allclose(logits[0], whole_logits(model, extended(samples[1], [7])), atol=2e-5)


def test_caches_that_can_be_cut_hold_the_same(model, monkeypatch):
    samples, found = [prompt(model, 9, 1, 0), prompt(model, 20, 0, 1)], []
    for slot in (slots.ContiguousSlot, slots.ShardedSlot):
        monkeypatch.setattr(slots, "ContiguousSlot", slot)
        decoder = Assistant(model, None).engine.decoder(samples, NEW)
        assert isinstance(decoder.slot, slot)
        steps = [decoder.prefill(), decoder.step(np.array([5, 6]))]
        decoder.reorder(np.array([1, 1]))
        found.append(np.stack([*steps, decoder.step(np.array([7, 7])), decoder.step(np.array([8, 9]))]))
    np.testing.assert_allclose(found[1], found[0], atol=2e-5)
    np.testing.assert_allclose(found[1][2][0], found[1][2][1], atol=1e-6)


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """Names of the graphs that are compiled."""
    from mindspore.common import api

    names: list[str] = []
    real = api._cell_graph_executor.compile
    monkeypatch.setattr(api._cell_graph_executor, "compile",
                        lambda cell, *args, **kwargs: counted(names, cell, real(cell, *args, **kwargs)))
    return names


def test_nothing_is_compiled_while_decoding_or_for_another_request_of_a_known_bucket(model, compiled):
    assistant = Assistant(model, None)
    options = GenerationOptions(max_new_tokens=NEW, stop_token_ids=())
    assistant.generate([prompt(model, 9, 1, 0)], options)
    assert sorted(compiled) == ["DecodeGraph", "PrefillGraph", "VisionGraph"]
    assistant.generate([prompt(model, 31, 2, 1)], options)
    assistant.generate([prompt(model, 4, 0, 2)], options)
    assert len(compiled) == 3
    two, long = [prompt(model, 5, 0, 3), prompt(model, 6, 0, 4)], [prompt(model, 150, 0, 5)]
    beams = GenerationOptions(max_new_tokens=NEW, stop_token_ids=(), num_beams=2)
    first = [assistant.generate(two, options), assistant.generate(long, options), assistant.generate(two[:1], beams)]
    assert len(compiled) == 3 + 2 + 2 + 1       # of the beams the reordering is new
    assistant.engine.caches.limit = 0           # memory of one cache at a time: graphs stay all the same
    assistant.engine.caches.clear()
    again = [assistant.generate(two, options), assistant.generate(long, options), assistant.generate(two[:1], beams)]
    assistant.generate([prompt(model, 9, 1, 0)], options)
    assert again == first
    assert len(compiled) == 8
    assert len(assistant.engine.caches._held) == 1


def steps(decoder):
    logits = decoder.prefill()
    for _ in range(NEW):
        yield logits
        logits = decoder.step(logits.argmax(-1))
    yield logits


@pytest.mark.parametrize("limit", [2**30, 0], ids=["room for all", "room for one"])
def test_answers_in_the_making_do_not_see_one_another(model, engine, limit):
    samples = [prompt(model, 9, 1, 0), prompt(model, 20, 0, 1), prompt(model, 7, 0, 2)]
    expected = [list(steps(engine.decoder([sample], NEW))) for sample in samples]
    engine.caches.clear()
    engine.caches.limit = limit
    abandoned = steps(engine.decoder([prompt(model, 12, 0, 7)], NEW))
    next(abandoned)
    found = zip(*(steps(engine.decoder([sample], NEW)) for sample in samples))      # a step of each in turn
    for step, logits in enumerate(found):
        for row, expectation in zip(logits, expected):
            np.testing.assert_array_equal(row, expectation[step])


def test_beams_that_lost_their_cache_find_back(model, engine):
    samples, found = [prompt(model, 8, 0, 5), prompt(model, 12, 0, 6)], []
    for limit in (2**30, 0):
        engine.caches.clear()
        engine.caches.limit = limit
        decoder, other = engine.decoder(samples, NEW), engine.decoder(samples[::-1], NEW)
        decoder.prefill()
        decoder.step(np.array([3, 4]))
        decoder.reorder(np.array([1, 1]))
        other.prefill()
        found.append(decoder.step(np.array([7, 8])))
    np.testing.assert_array_equal(found[0], found[1])


def test_threads_share_a_model(model, assistant, engine):
    samples = [prompt(model, 9, 1, 0), prompt(model, 20, 0, 1), prompt(model, 11, 0, 2), prompt(model, 30, 2, 3)]
    options = GenerationOptions(max_new_tokens=NEW, stop_token_ids=())
    expected = [assistant.generate([sample], options) for sample in samples]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: assistant.generate([samples[i % 4]], options), range(32)))
    assert found == expected * 8


def test_more_rows_than_the_machine_can_hold_are_refused(model):
    with pytest.raises(GenerationError, match=r"1000000000 rows \(prompts x beams or samples\).*GiB"):
        Assistant(model, None).generate([prompt(model, 9, 0, 0)], GenerationOptions(num_beams=10**9))


def test_an_answer_that_was_ended_or_reset_is_not_continued(model, engine):
    closed, reset = (engine.decoder([prompt(model, 9, 0, 0)], NEW) for _ in range(2))
    closed.prefill()
    reset.prefill()
    closed.close()
    with pytest.raises(GenerationError, match="was ended and cannot go on"):
        closed.step(np.array([3]))
    engine.reset()
    with pytest.raises(GenerationError, match="reset while this answer was in the making"):
        reset.step(np.array([3]))
    assert engine.caches.bytes == 0      # its graphs are gone too: this test is the last


def counted(compiled: list[str], cell, result):
    """Remembers a cell that was really compiled: the executor's second result says so."""
    if result[1]:
        compiled.append(type(cell).__name__)
    return result
