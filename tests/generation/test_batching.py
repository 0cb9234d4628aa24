"""Rows that begin and end at different times: bit by bit what they are alone, and what other decoders give."""
from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor
from served import IMAGES

from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.batching import LAST, BatchDecoder
from mindformers_ixc.generation.store import Store

PIECE, POSITIONS = 64, 512


@pytest.fixture(scope="module")
def assistant():
    return Assistant.from_directory("starter")


@pytest.fixture(scope="module")
def decoder(assistant):
    return BatchDecoder(assistant.engine, 4, POSITIONS, PIECE)


@pytest.fixture(scope="module")
def samples(assistant):
    asked = [("What is shown in the picture?", ["cat.jpg"]), ("Hello", []), ("Say more. " * 40, []),
             ("<ImageHere>and<ImageHere>which is older?", ["coins.jpg", "rocket.jpg"]),
             ("Which colour is it? " * 9, ["coffee.jpg"])]
    return [assistant.encode({"query": text, "images": [str(IMAGES / name) for name in names]})
            for text, names in asked]


@pytest.fixture(autouse=True)
def nothing_is_left(decoder, assistant):
    assistant.engine.reuse.store.clear()
    yield
    assert len(decoder._free) == decoder.most


def prefilled(decoder, sample, mode="base", new_tokens=20):
    """A row whose prompt is computed, with the logits of its next token."""
    row = decoder.open(decoder.prepare(sample), mode, new_tokens)
    while True:
        logits = decoder.advance(row)
        if logits is not None:
            return row, logits


def alone(decoder, sample, count=8, mode="base"):
    """Logits of each token of a greedy answer without neighbours."""
    row, logits = prefilled(decoder, sample, mode)
    found = [logits]
    while len(found) < count:
        found += decoder.step([row], [int(found[-1].argmax())])
    decoder.close(row)
    return np.stack(found)


class TestTokens:
    def test_they_are_those_of_other_decoders(self, assistant, decoder, samples):
        for sample in samples:
            engine = assistant.engine
            other = engine.decoder([sample], 8)
            want = [other.prefill()[0]]
            while len(want) < 8:
                want.append(other.step(np.array([want[-1].argmax()], np.int32))[0])
            other.close()
            np.testing.assert_allclose(alone(decoder, sample), np.stack(want), rtol=1e-4, atol=1e-3)

    def test_rows_that_begin_between_the_steps_of_others_have_the_bits_that_they_have_alone(self, decoder, samples):
        want = [alone(decoder, sample, 12) for sample in samples]
        decoder.engine.reuse.store.clear()
        rows, found = {}, {number: [] for number in range(len(samples))}
        for tick in range(60):
            if tick % 3 == 0 and tick // 3 < len(samples) and len(rows) < decoder.most:
                number = tick // 3
                rows[number], logits = prefilled(decoder, samples[number])
                found[number].append(logits)
            going = [number for number in rows if len(found[number]) < 12]
            if going:
                new = decoder.step([rows[number] for number in going],
                                   [int(found[number][-1].argmax()) for number in going])
                for number, logits in zip(going, new):
                    found[number].append(logits)
            for number in [number for number in rows if len(found[number]) == 12]:
                decoder.close(rows.pop(number))
        begun = [number for number in found if found[number]]
        assert len(begun) >= 4
        for number in begun:
            np.testing.assert_array_equal(np.stack(found[number]), want[number])

    def test_what_is_taken_over_changes_no_bit(self, decoder, samples):
        for sample in samples[2:]:
            decoder.engine.reuse.store.clear()
            first = alone(decoder, sample)
            row, logits = prefilled(decoder, sample)
            decoder.close(row)
            assert row.known == (len(sample.input_ids) - 1) // PIECE * PIECE > 0
            np.testing.assert_array_equal(logits, first[0])
            np.testing.assert_array_equal(alone(decoder, sample), first)

    def test_modes_go_their_own_ways(self, decoder, samples):
        assert not np.array_equal(alone(decoder, samples[0], 3), alone(decoder, samples[0], 3, "web"))
        np.testing.assert_array_equal(alone(decoder, samples[0], 3, "web"), alone(decoder, samples[0], 3, "web"))

    def test_a_fork_goes_on_from_the_same_prompt_by_itself(self, decoder, samples):
        want = alone(decoder, samples[0], 3)
        row, logits = prefilled(decoder, samples[0])
        other = decoder.fork(row)
        token = int(logits.argmax())
        decoder.step([row], [token + 1])
        (found,) = decoder.step([other], [token])
        np.testing.assert_array_equal(found, want[1])
        decoder.close(row)
        decoder.close(other)


    def test_more_rows_than_a_graph_takes_are_computed_in_parts(self, decoder, samples, monkeypatch):
        want = [alone(decoder, sample, 2) for sample in samples[:3]]
        monkeypatch.setattr(decoder, "_writing", decoder._writing[:2])
        rows = [prefilled(decoder, sample) for sample in samples[:3]]
        found = decoder.step([row for row, _ in rows], [int(logits.argmax()) for _, logits in rows])
        for (row, _), logits, one in zip(rows, found, want):
            np.testing.assert_array_equal(logits, one[1])
            decoder.close(row)


class TestPieces:
    def test_a_prompt_is_half_the_layers_of_a_piece_a_call_and_its_pictures_some_tiles(self, decoder, samples):
        sample = samples[2]
        row = decoder.open(decoder.prepare(sample), "base", 5)
        rests = []
        while decoder.advance(row) is None:
            rests.append(decoder.rest(row))
        decoder.close(row)
        length = len(sample.input_ids)
        assert rests == [rest for rest in range(length, 0, -PIECE) for _ in range(2)][1:]
        row = decoder.open(decoder.prepare(samples[3]), "base", 5)
        decoder.advance(row)
        assert decoder.rest(row) == len(samples[3].input_ids)       # a picture first
        decoder.close(row)

    def test_prompts_that_are_computed_in_turns_have_the_bits_that_they_have_alone(self, decoder, samples):
        want = [alone(decoder, sample, 1)[0] for sample in samples[:4]]
        decoder.engine.reuse.store.clear()
        rows = [decoder.open(decoder.prepare(sample), "base", 5) for sample in samples[:4]]
        found: dict[int, np.ndarray] = {}
        while len(found) < len(rows):
            for number, row in enumerate(rows):
                logits = None if number in found else decoder.advance(row)
                if logits is not None:
                    found[number] = logits
        for number, row in enumerate(rows):
            np.testing.assert_array_equal(found[number], want[number])
            decoder.close(row)

    def test_a_row_that_is_closed_before_its_prompt_is_there_leaves_nothing(self, decoder, samples):
        want = alone(decoder, samples[1], 2)
        row = decoder.open(decoder.prepare(samples[2]), "base", 5)
        decoder.advance(row)
        decoder.close(row)
        np.testing.assert_array_equal(alone(decoder, samples[1], 2), want)

    def test_a_row_whose_prompt_is_there_keeps_no_pixels(self, decoder, samples):
        row, _ = prefilled(decoder, samples[0])
        assert samples[0].tiles > 0 == row.prompt.sample.tiles
        assert (len(row.prompt), decoder.rest(row)) == (len(samples[0].input_ids), 0)
        decoder.close(row)

    def test_of_other_weights_nothing_is_taken_over(self, decoder, samples):
        weight = decoder.engine.model.model.layers[1].attention_norm.weight
        kept, want = weight.asnumpy().copy(), alone(decoder, samples[2])
        changed = kept.copy()
        changed[3] += 1.0           # one number of one parameter
        for values in (changed, kept):
            weight.set_data(Tensor(values))
            row, _ = prefilled(decoder, samples[2])
            assert row.known == 0
            decoder.close(row)
        row, _ = prefilled(decoder, samples[2])
        assert row.known > 0
        decoder.close(row)
        np.testing.assert_array_equal(alone(decoder, samples[2]), want)

    def test_without_a_store_nothing_is_taken_over_and_answers_are_the_same(self, decoder, samples, monkeypatch):
        want = alone(decoder, samples[3], 2)
        monkeypatch.setattr(decoder.engine.reuse, "store", Store(0))
        np.testing.assert_array_equal(alone(decoder, samples[3], 2), want)
        row, _ = prefilled(decoder, samples[3])
        assert row.known == 0
        decoder.close(row)

    def test_the_size_of_a_piece_by_its_time(self, decoder, monkeypatch):
        monkeypatch.setattr(decoder, "piece", 128)
        assert decoder.choose_piece((64, 128), 100.0) <= 100.0 and decoder.piece == 128
        assert decoder.choose_piece((64, 128), 0.0) > 0 and decoder.piece == 64

    def test_warming_up_compiles_all_that_a_request_needs(self, decoder, samples):
        decoder.warm_up("write")
        pieces, steps = set(decoder._pieces), set(decoder._steps)
        for sample in samples:
            alone(decoder, sample, 2, "write")
        assert set(decoder._pieces) == pieces and set(decoder._steps) == steps
        assert ("write", LAST, False) in pieces and ("write", 4) in steps
