"""Rows over one paged cache, with Ascend's operators composed for the CPU: what the slot cache gives, whoever comes."""
from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor
from paged_operators import stand_in
from random_model import SIZES
from served import IMAGES

from mindformers_ixc import InternLM2Tokenizer, IXC25Config, IXC25ForCausalLM, IXC25ImageProcessor, IXC25Processor
from mindformers_ixc.demo import demo_path
from mindformers_ixc.generation import paged_batching
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.batching import BatchDecoder
from mindformers_ixc.generation.paged_batching import PagedBatchDecoder

PIECE, POSITIONS, BLOCK = 64, 256, 32


@pytest.fixture(scope="module")
def assistant():
    tokenizer = InternLM2Tokenizer(str(demo_path("tokenizer.model")))
    config = IXC25Config(**{**SIZES, "vocab_size": 1024, "num_hidden_layers": 2, "block_size": BLOCK,
                            "initializer_range": 0.2})
    return Assistant(IXC25ForCausalLM(config), IXC25Processor(IXC25ImageProcessor(28), tokenizer))


@pytest.fixture(scope="module")
def slots(assistant):
    return BatchDecoder(assistant.engine, 4, POSITIONS, PIECE)


@pytest.fixture(scope="module")
def decoder(assistant):
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        patch.setattr(paged_batching, "SEEN", 64)
        return PagedBatchDecoder(assistant.engine, 4, POSITIONS, PIECE)


@pytest.fixture(scope="module")
def samples(assistant):
    asked = [("What is shown in the picture?", ["cat.jpg"]), ("Hello", []), ("Say more. " * 50, []),
             ("<ImageHere>and<ImageHere>which is older? " + "Say more. " * 40, ["coins.jpg", "rocket.jpg"]),
             ("Which colour is it? " * 9, ["coffee.jpg"])]
    return [assistant.encode({"query": text, "images": [str(IMAGES / name) for name in names]})
            for text, names in asked]


@pytest.fixture(autouse=True)
def nothing_is_left(decoder):
    decoder.pool.forget()
    yield
    assert decoder.pool.used == decoder.pool.promised == 0


def prefilled(decoder, sample, new_tokens=20, answers=1):
    row = decoder.open(decoder.prepare(sample), "base", new_tokens, answers)
    while True:
        logits = decoder.advance(row)
        if logits is not None:
            return row, logits


def alone(decoder, sample, count=5):
    """Logits of each token of a greedy answer without neighbours."""
    row, logits = prefilled(decoder, sample)
    found = [logits]
    while len(found) < count:
        found += decoder.step([row], [int(found[-1].argmax())])
    decoder.close(row)
    return np.stack(found)


def same(found, want):
    """Equal to rounding: products of one row and of several are not the same ones."""
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=2e-4)


def test_a_piece_sees_a_fourth_of_the_blocks_where_that_is_enough(decoder):
    assert decoder.reaches == [64, 256]
    assert decoder.sizes == [1, 2, 4]
    assert decoder.pool.count == 4 * POSITIONS // BLOCK + 1


def test_logits_are_those_of_the_slot_cache(decoder, slots, samples):
    assert max(len(sample.input_ids) for sample in samples) > 2 * PIECE
    for sample in samples:
        found, want = alone(decoder, sample), alone(slots, sample)
        same(found, want)
        assert (found.argmax(1) == want.argmax(1)).all()


def test_rows_that_begin_and_end_between_the_steps_of_others_are_as_they_are_alone(decoder, samples):
    want = [alone(decoder, sample, 8) for sample in samples]
    decoder.pool.forget()
    rows, found, tables = {}, {number: [] for number in range(len(samples))}, set()
    for tick in range(40):
        number = tick // 2
        if tick % 2 == 0 and number < len(samples) and len(rows) < decoder.most:
            rows[number], logits = prefilled(decoder, samples[number])
            found[number].append(logits)
        going = [one for one in rows if len(found[one]) < 8]
        if going:
            tables.add(len(going))
            new = decoder.step([rows[one] for one in going], [int(found[one][-1].argmax()) for one in going])
            for one, logits in zip(going, new):
                found[one].append(logits)
        for one in [one for one in rows if len(found[one]) == 8]:
            decoder.close(rows.pop(one))
    assert tables >= {1, 3, 4}
    for number, logits in found.items():
        same(np.stack(logits), want[number])


def test_a_request_whose_prompt_begins_alike_takes_blocks_over(decoder, samples):
    sample = samples[3]
    want = alone(decoder, sample)
    first, _ = prefilled(decoder, sample)
    second, logits = prefilled(decoder, sample)
    whole = (len(sample.input_ids) - 1) // PIECE * PIECE
    assert first.known == second.known == whole > 0     # of one that has ended, and of one that goes on
    assert first.contents.table[:whole // BLOCK] == second.contents.table[:whole // BLOCK]
    assert not set(first.contents.table[whole // BLOCK:]) & set(second.contents.table[whole // BLOCK:])
    np.testing.assert_array_equal(logits, want[0])
    decoder.close(first)
    found = decoder.step([second], [int(logits.argmax())])
    np.testing.assert_array_equal(found[0], want[1])
    decoder.close(second)
    other, _ = prefilled(decoder, samples[4])
    assert other.known == 0
    decoder.close(other)


def test_other_weights_find_nothing_of_before(decoder, samples):
    alone(decoder, samples[2])
    decoder.engine.reset()
    row, _ = prefilled(decoder, samples[2])
    assert row.known == 0
    decoder.close(row)


def test_forks_share_the_prompt_and_go_on_by_themselves(decoder, samples):
    sample = samples[2]
    want, length = alone(decoder, sample, 3), len(sample.input_ids)
    assert length % BLOCK
    row, logits = prefilled(decoder, sample, 20, 3)
    used, promised = decoder.pool.used, decoder.pool.promised
    others = [decoder.fork(row), decoder.fork(row)]
    assert decoder.pool.used == used + promised and decoder.pool.promised == 0
    token = int(logits.argmax())
    decoder.step([row, others[0]], [token + 1, token + 2])
    found = decoder.step([others[1]], [token])
    same(found[0], want[1])
    decoder.close(row)
    found = decoder.step([others[1], others[0]], [int(want[1].argmax()), 5])
    same(found[0], want[2])
    for other in others:
        decoder.close(other)


def test_a_row_that_is_closed_before_its_prompt_is_there_gives_all_back(decoder, samples):
    row = decoder.open(decoder.prepare(samples[2]), "base", 20, 3)
    decoder.advance(row)
    assert decoder.pool.used and decoder.pool.promised
    decoder.close(row)
    assert decoder.pool.used == decoder.pool.promised == 0


def test_what_runs_for_nobody_writes_to_nobodys_block(decoder, samples):
    want = alone(decoder, samples[1], 3)
    row, logits = prefilled(decoder, samples[1])
    decoder._try_piece("base", PIECE, False)
    decoder._try_step("base", 1)
    found = decoder.step([row], [int(logits.argmax())])
    np.testing.assert_array_equal(found[0], want[1])
    decoder.close(row)


def test_what_is_no_number_does_not_stay_in_the_blocks(decoder, assistant, samples):
    long, short = samples[2], samples[4]        # what the long one writes last lies behind the short one
    want, table = alone(decoder, short, 3), assistant.model.model.tok_embeddings.weight
    assert PIECE < len(short.input_ids) < len(long.input_ids) // BLOCK * BLOCK < POSITIONS - BLOCK
    decoder.pool.forget()
    good, numbers = table.asnumpy().copy(), table.asnumpy().copy()
    never = next(one for one in range(1000, 0, -1) if not any(one in sample.input_ids for sample in samples))
    numbers[never] = np.nan
    bad, _ = prefilled(decoder, long, 20)
    table.set_data(Tensor(numbers))
    (logits,) = decoder.step([bad], [never])
    table.set_data(Tensor(good))
    assert np.isnan(logits).all()
    place = len(long.input_ids) // BLOCK
    written = bad.contents.table[place]
    decoder.close(bad)
    decoder.pool.forget()
    again, logits = prefilled(decoder, short, POSITIONS - len(short.input_ids))
    assert written in again.contents.table[place:]
    same(logits, want[0])
    decoder.close(again)


def test_warming_up_compiles_all_that_a_request_needs(decoder):
    decoder.warm_up("base")
    assert set(decoder._steps) >= {("base", 1), ("base", 2), ("base", 4)}
    assert set(decoder._pieces) >= {("base", PIECE, True), ("base", PIECE, False)}
