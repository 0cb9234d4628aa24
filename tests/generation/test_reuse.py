"""What requests take over from earlier ones: found by what they are made of, and the same logits as without."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mindspore import Tensor
from mindspore.common import api

from mindformers_ixc import native
from mindformers_ixc.errors import GenerationError
from mindformers_ixc.generation import assistant as assistants
from mindformers_ixc.generation import continuing, extending
from mindformers_ixc.generation import reuse as reusing
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.generation.engine import CachedDecoder
from mindformers_ixc.generation.extending import FEW_POSITIONS, MANY_POSITIONS, calls, pays
from mindformers_ixc.generation.loading import load_model
from mindformers_ixc.generation.options import GenerationOptions
from mindformers_ixc.generation.preparing import prepare
from mindformers_ixc.generation.reuse import BLOCK, Prompt, Reuse, pictures_of, without_others
from mindformers_ixc.generation.search import decode_steps
from mindformers_ixc.generation.store import Store
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.image import Grid, Tiles, cut_image, image_token_count

SIDE = 56       # of a tile of the reference model, which has 2 x 2 tokens


WIDE, SQUARE = Grid(1, 2), Grid(2, 2)


def picture(seed: int, grid: Grid = WIDE) -> tuple[Tiles, Grid]:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE * grid.rows, SIDE * grid.columns, 3))
    return cut_image(pixels.astype(np.uint8), SIDE), grid


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(100 + seed).integers(3, 400, length).tolist()


def sample(*parts) -> EncodedSample:
    """A prompt of texts (lists of ids) and pictures."""
    ids, mask, tiles, grids = [], [], [Tiles.none(SIDE)], []
    for part in parts:
        if isinstance(part, list):
            ids, mask = ids + part, mask + [0] * len(part)
            continue
        count = image_token_count(part[1], 2)
        ids, mask = ids + [2] * count, mask + [1] * count
        tiles.append(part[0])
        grids.append(part[1])
    ids = np.array(ids, np.int32)
    return EncodedSample(ids, np.full_like(ids, -100), np.array(mask, np.int32), grids, Tiles.joined(tiles), 2)


class TestCalls:
    def test_few_and_many(self):
        nothing = np.zeros(0)
        assert calls(1, nothing) == [FEW_POSITIONS]
        assert calls(3 * FEW_POSITIONS, nothing) == [FEW_POSITIONS] * 3
        assert calls(3 * FEW_POSITIONS + 1, nothing) == [MANY_POSITIONS]
        assert calls(MANY_POSITIONS + 70, nothing) == [MANY_POSITIONS, FEW_POSITIONS, FEW_POSITIONS]

    def test_pictures_go_with_the_many_only(self):
        assert calls(10, np.array([3])) == [MANY_POSITIONS]
        assert calls(10, np.array([-3])) == [FEW_POSITIONS]         # taken over
        assert calls(MANY_POSITIONS + 9, np.array([MANY_POSITIONS])) == [MANY_POSITIONS, MANY_POSITIONS]

    def test_pictures_go_with_any_where_both_take_them(self):
        assert calls(10, np.array([3]), by_any=True) == [FEW_POSITIONS]
        assert calls(MANY_POSITIONS + 9, np.arange(MANY_POSITIONS), by_any=True) == [MANY_POSITIONS, FEW_POSITIONS]

    def test_what_is_more_work_than_the_whole_does_not_pay(self):
        assert pays([FEW_POSITIONS], 128)
        assert not pays([FEW_POSITIONS] * 4, 128)
        assert not pays([MANY_POSITIONS], 192)


class TestKeys:
    config = IXC25Config(task_lora_ranks={})

    def keys(self, *parts, reuse=None, mode="base", base=1e6, more=()) -> list[bytes]:
        return (reuse or self.reuse).keys(Prompt.of(sample(*parts)), mode, base, more)

    @pytest.fixture(autouse=True)
    def _reuse(self):
        self.reuse = Reuse(Store(1 << 20), self.config)

    def test_a_prompt_begins_with_the_keys_of_its_beginning(self):
        short = self.keys(text(0, 20), picture(0), text(1, 9))
        longer = self.keys(text(0, 20), picture(0), text(1, 9), text(2, 40))
        assert len(short) == (20 + image_token_count(WIDE, 2) + 9) // BLOCK
        assert longer[:len(short)] == short
        assert len(set(longer)) == len(longer)

    def test_what_was_generated_counts_as_text(self):
        asked = [text(0, 20), picture(0), text(1, 9)]
        assert self.keys(*asked, more=text(2, 40)) == self.keys(*asked, text(2, 40))

    def test_one_token_more_in_front_makes_all_of_it_another(self):
        assert not set(self.keys(text(0, 40))) & set(self.keys([5], text(0, 40)))

    @pytest.mark.parametrize("other", [{"mode": "web"}, {"base": 1.1e6}], ids=str)
    def test_mode_and_rotary_base_tell_prompts_apart(self, other):
        assert not set(self.keys(text(0, 40))) & set(self.keys(text(0, 40), **other))

    def test_models_dtypes_and_changed_weights_tell_prompts_apart(self):
        there = set(self.keys(text(0, 40)))
        halves = Reuse(self.reuse.store, IXC25Config(task_lora_ranks={}, compute_dtype="float16"))
        halves.identity = self.reuse.identity
        assert not there & set(self.keys(text(0, 40), reuse=halves))
        assert not there & set(self.keys(text(0, 40), reuse=Reuse(self.reuse.store, self.config)))
        for key in there:
            self.reuse.store.put(key, np.zeros(3))
        self.reuse.renew()
        assert not there & set(self.keys(text(0, 40)))
        assert len(self.reuse.store) == 0

    def test_another_picture_is_another_prompt_from_its_block_on(self):
        one, other = (self.keys(text(0, 40), picture(seed), text(1, 9)) for seed in (0, 1))
        assert one[:40 // BLOCK] == other[:40 // BLOCK]
        assert not set(one[40 // BLOCK:]) & set(other[40 // BLOCK:])

    def test_one_pixel_and_the_partition_tell_pictures_apart(self):
        (tiles, grid), changed = picture(0), picture(0)[0]
        changed.local[2, 1, 55, 55] ^= 1
        tall, wide = (sample((Tiles(tiles.local, tiles.views, tiles.view_index), one)) for one in (Grid(2, 1), grid))
        digests = {pictures_of(one)[0].digest for one in (sample((tiles, grid)), sample((changed, grid)), tall, wide)}
        assert len(digests) == 3        # `wide` is the first one again

    def test_text_that_spells_the_padding_is_no_picture(self):
        count = image_token_count(WIDE, 2)
        assert not set(self.keys(text(0, 16), picture(0))) & set(self.keys(text(0, 16), [2] * count)[1:])

    def test_pictures_that_change_places_are_found_by_their_own_rows(self):
        both = sample(picture(0), text(0, 5), picture(1, SQUARE), text(1, 5))
        encoded = []

        def encode(part: EncodedSample) -> np.ndarray:
            encoded.append([one.digest for one in pictures_of(part)])
            # a row says which picture, and which of its positions it is
            numbers = [np.arange(one.rows[1] - one.rows[0]) for one in pictures_of(part)]
            return np.concatenate([np.stack((np.full(len(row), float(one.digest[0])), row), 1)
                                   for one, row in zip(pictures_of(part), numbers)])

        first, second = (one.digest for one in pictures_of(both))
        rows = self.reuse.image_rows(Prompt.of(both), 0, encode)
        counts = [image_token_count(grid, 2) for grid in both.grids]
        assert rows[:, 0].tolist() == [first[0]] * counts[0] + [second[0]] * counts[1]
        turned = sample(picture(1, SQUARE), text(0, 5), picture(2), text(1, 5), picture(0))
        again = self.reuse.image_rows(Prompt.of(turned), 0, encode)
        assert encoded == [[first, second], [pictures_of(turned)[1].digest]]
        assert again[:counts[1], 0].tolist() == [second[0]] * counts[1]
        assert again[-counts[0]:].tolist() == rows[:counts[0]].tolist()
        # from the middle of a picture on
        start = counts[1] + 5 + 7
        np.testing.assert_array_equal(self.reuse.image_rows(Prompt.of(turned), start, encode), again[counts[1] + 7:])

    def test_one_picture_of_several_alone_has_its_own_tiles(self):
        whole = sample(picture(0), picture(1, SQUARE), picture(2))
        alone = without_others(whole, [1], pictures_of(whole))
        np.testing.assert_array_equal(alone.pixel_values, whole.pixel_values[3:8])
        assert pictures_of(alone)[0].digest == pictures_of(whole)[1].digest


NEW = 6

# What all tests here ask first: 117 positions, 17 of them a picture's.
ASKED = [text(0, 20), picture(0), text(1, 80)]


@pytest.fixture(autouse=True)
def _graphs_are_made_at_once(monkeypatch):
    """Small models would hardly ever save what compiling takes."""
    monkeypatch.setattr(continuing, "COMPILING", 0)


@pytest.fixture(scope="module", params=["1", "0"], ids=["native", "composed"])
def model(request, goldens):
    """The reference model, trained on 256 positions and with dynamic NTK behind them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(native.SWITCH, request.param)
        yield load_model(goldens / "t1", IXC25ForCausalLM, seq_length=64, max_tiles=6)


# What does not depend on how the caches are extended is tried once; the rest, both ways, takes some time.
once = pytest.mark.parametrize("model", ["1"], indirect=True, ids=["native"])
both_slowly = pytest.mark.parametrize("model", ["1", pytest.param("0", marks=pytest.mark.slow)], indirect=True,
                                      ids=["native", "composed"])


@pytest.fixture(scope="module")
def kept(model) -> Assistant:
    """Its graphs serve all tests."""
    return Assistant(model, None)


@pytest.fixture
def engine(kept):
    kept.engine.settle()
    kept.engine.reuse.store.clear()
    return kept.engine


def answer(engine, samples, new: int = NEW, mode: str = "base", beams: int = 1) -> tuple[np.ndarray, list[list[int]]]:
    """Logits of every step of a greedy answer, `(steps, B, V)`, and the tokens of each row."""
    decoder = engine.decoder(samples, new, mode, beams)
    logits, rows = [decoder.prefill()], [[] for _ in range(len(samples) * beams)]
    for _ in range(new - 1):
        tokens = logits[-1].argmax(-1)
        for row, token in zip(rows, tokens.tolist()):
            row.append(token)
        logits.append(decoder.step(tokens))
    decoder.close()
    return np.stack(logits), rows


def check(engine, samples, *options, **named) -> list[list[int]]:
    """Answers with and without what is kept; the same, or the test fails. The tokens of each row."""
    logits, rows = answer(engine, samples, *options, **named)
    engine.settle()
    reuse, engine.reuse = engine.reuse, None
    try:
        expected, wanted = answer(engine, samples, *options, **named)
    finally:
        engine.reuse = reuse
    assert rows == wanted
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    return rows


@pytest.fixture
def computed(engine, monkeypatch) -> list[int]:
    """What answers that keep something compute: positions of each call of a graph, and, negative, tiles."""
    numbers: list[int] = []
    names = ("encode_images", "_prefill", "_rest")
    encode, prefill, rest = (getattr(one, name) for one, name in zip((engine, CachedDecoder, CachedDecoder), names))

    def note(engine, *what: int) -> None:
        numbers.extend(what if engine.reuse is not None else ())

    monkeypatch.setattr(engine, names[0], lambda one: (note(engine, -one.tiles), encode(one))[1])
    monkeypatch.setattr(CachedDecoder, names[1], lambda self: (note(self.engine, self.bucket), prefill(self))[1])
    monkeypatch.setattr(CachedDecoder, names[2],
                        lambda self, start, sizes: (note(self.engine, *sizes), rest(self, start, sizes))[1])
    return numbers


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """Names of the graphs that are compiled."""
    names: list[str] = []
    real = api._cell_graph_executor.compile

    def counted(cell, *args, **kwargs):
        phase, is_new = real(cell, *args, **kwargs)
        names.extend([type(cell).__name__] * is_new)
        return phase, is_new

    monkeypatch.setattr(api._cell_graph_executor, "compile", counted)
    return names


def test_the_second_question_pays_for_itself_only(engine, computed):
    tokens = check(engine, [sample(*ASKED)])
    assert computed == [128, -3]
    check(engine, [sample(*ASKED, tokens[0], text(2, 12))])
    assert computed[2:] == [FEW_POSITIONS]


@both_slowly
def test_a_new_picture_in_the_second_question(engine, computed, monkeypatch):
    monkeypatch.setattr(extending, "MANY_POSITIONS", 128)       # or it would not pay within the trained length
    asked = [text(0, 150), picture(0)]
    answer(engine, [sample(*asked)])
    check(engine, [sample(*asked, text(2, 9), picture(1, SQUARE), text(3, 30))])
    assert computed == [192, -3, 128, -5]


@both_slowly
def test_rows_of_a_batch_begin_where_each_is_known(engine):
    answer(engine, [sample(*ASKED)])
    answer(engine, [sample(text(5, 90))])
    batch = [sample(*ASKED, text(2, 12)), sample(text(5, 90), text(3, 30))]
    for beams in (1, 2):
        check(engine, batch, beams=beams)


@once
@pytest.mark.parametrize("ntk", ["public", "request"])
@pytest.mark.parametrize("length", [200, 250], ids=["short of the trained length", "passing it while decoding"])
def test_a_chat_that_passes_the_trained_length(engine, monkeypatch, length, ntk):
    monkeypatch.setattr(engine.config, "dynamic_ntk", ntk)
    parts = [text(0, length)]
    for more in (80, 9):
        parts += [check(engine, [sample(*parts)], 20)[0], text(more, more)]
    check(engine, [sample(*parts)], 20)


@once
def test_beyond_the_trained_length_a_longer_prompt_finds_no_keys_of_a_shorter_one(engine, computed):
    for parts in ([text(0, 280)], [text(0, 280)], [text(0, 280), text(1, 9)]):
        check(engine, [sample(*parts)])
    assert computed == [384, FEW_POSITIONS, 384]            # of the same length they are the same


@once
def test_modes_share_pictures_but_no_keys_and_nobody_waits_for_a_graph_without_need(engine, computed, monkeypatch):
    check(engine, [sample(*ASKED)])
    assert computed == [128, -3]
    saved = extending.saved_operations(engine.config, 112)
    monkeypatch.setattr(continuing, "COMPILING", 1.5 * saved / engine.config.num_hidden_layers)
    for _ in range(4):
        check(engine, [sample(*ASKED)], mode="web")
    # one answer whose beginning is known saves less than compiling takes, two save more
    assert computed[2:] == [128, 128, FEW_POSITIONS, FEW_POSITIONS]


@once
def test_prompts_of_large_models_always_go_in_calls(engine, computed, monkeypatch):
    rows, new = [sample(*ASKED), sample(text(5, 70))], text(2, 12)
    whole = [answer(engine, rows), answer(engine, [sample(*ASKED, new)])]
    assert computed == [128, -3, FEW_POSITIONS]
    monkeypatch.setattr(extending, "COMPILING", 0)                  # so this one is large
    engine.settle()
    engine.reuse.store.clear()
    again = [answer(engine, rows), answer(engine, [sample(*ASKED, new)])]
    assert computed[3:] == [FEW_POSITIONS, FEW_POSITIONS, -3, FEW_POSITIONS]
    for (logits, tokens), (expected, wanted) in zip(again, whole):
        assert tokens == wanted
        np.testing.assert_allclose(logits, expected, atol=2e-5)
    check(engine, rows, beams=2)                                    # and where nothing is kept


def test_which_models_are_large():
    assert extending.is_large(IXC25Config())
    assert not extending.is_large(IXC25Config(hidden_size=512, intermediate_size=2048, num_attention_heads=8,
                                              num_key_value_heads=2))


@once
def test_another_picture_with_the_same_words_is_looked_at(engine, computed):
    for seed in (0, 1, 0):
        check(engine, [sample(text(0, 20), picture(seed), text(1, 80))])
    assert computed == [128, -3, 128, -3, FEW_POSITIONS]


@once
def test_an_answer_that_was_left_or_lost_its_cache_leaves_nothing_wrong(engine):
    tokens = check(engine, [sample(*ASKED)])[0]
    left, never_begun = (engine.decoder([sample(*ASKED)], NEW) for _ in range(2))
    left.prefill()
    left.step(np.array(tokens[:1]))
    for decoder in (left, never_begun):
        decoder.close()
    lost, other = (engine.decoder([sample(*ASKED, *more)], NEW) for more in ([], [text(7, 1)]))
    engine.caches.limit, usual = 0, engine.caches.limit
    logits = [lost.prefill()]
    other.prefill()
    for token in tokens[:NEW - 1]:
        logits.append(lost.step(np.array([token])))
        other.step(np.array([9]))
    engine.caches.limit = usual
    assert [int(one.argmax()) for one in logits[:-1]] == tokens


@once
def test_little_room_keeps_what_fits_and_no_room_nothing(engine):
    store, usual = engine.reuse.store, engine.reuse.store.limit
    block = 2 * 2 * 2 * BLOCK * 8 * 4           # halves x layers x heads x positions x width x bytes
    for limit, held in ((0, 0), (block, block), (3 * block + 7, 3 * block), (usual, 7 * block + 17 * 64 * 4)):
        store.clear()
        store.limit = limit
        answer(engine, [sample(*ASKED)])
        engine.settle()
        assert store.bytes == held
        check(engine, [sample(*ASKED, text(2, 12))])
    store.limit = usual


@once
def test_after_a_reset_nothing_is_taken_over(model):
    other = Assistant(model, None).engine
    other.decoder([sample(*ASKED)], NEW).close()
    other.reuse.store.put(other.reuse.identity + b"block", np.zeros(3))
    before = other.reuse.identity
    other.reset()
    assert (len(other._closed), len(other.reuse.store)) == (0, 0)
    assert other.reuse.identity != before


@once
def test_weights_that_change_make_all_of_before_unknown(engine, model, computed):
    weight = model.model.layers[1].feed_forward.w2.weight
    kept = weight.asnumpy().copy()
    check(engine, [sample(*ASKED)])
    weight.set_data(Tensor(1.5 * kept))
    check(engine, [sample(*ASKED)])
    weight.set_data(Tensor(kept))
    assert computed == [128, -3, 128, -3]


class TestTheMarkOfWeights:
    def marked(self, *arrays):
        return reusing.weights_mark(Tensor(array) for array in arrays)

    @pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
    def test_every_number_counts_and_where_it_stands(self, dtype):
        table = np.random.default_rng(0).integers(0, 100, (3, 5000)).astype(dtype)
        before, found = self.marked(table, table[0]), set()
        assert self.marked(table.copy(), table[0].copy()) == before
        for place in ((0, 0), (1, 2600), (2, 4999)):
            other = table.copy()
            other[place] += 1
            found.add(self.marked(other, table[0]))
        found |= {self.marked(table[[0, 2, 1]], table[0]), self.marked(table[0], table), before}
        assert len(found) == 6

    def test_neighbouring_rows_that_change_places_are_seen(self):
        table = np.random.default_rng(0).standard_normal((256, 8)).astype(np.float32)
        order = np.arange(256)
        order[[5, 6]] = [6, 5]
        assert self.marked(table) != self.marked(table[order])

    def test_of_a_large_model_some_numbers_of_each_parameter_count(self, monkeypatch):
        monkeypatch.setattr(reusing, "WHOLE_BYTES", 1000)
        table = np.arange(4000, dtype=np.float32)
        once, all_of_it = table.copy(), table + 1
        once[7] += 1
        assert self.marked(once) == self.marked(table) != self.marked(all_of_it)


@once
def test_models_share_a_store_without_sharing_an_answer(model, engine):
    one, other = (Reuse(engine.reuse.store, model.config) for _ in range(2))
    answer(engine, [sample(*ASKED)])
    engine.settle()
    for reuse, found in ((one, 0), (other, 0), (engine.reuse, 7)):
        assert len(reuse.beginning(Prompt.of(sample(*ASKED)), "base", 117)) == found


@once
def test_what_is_prepared_is_compiled_and_nothing_else_changes(engine, compiled):
    live = engine.decoder([sample(text(4, 100))], NEW)
    first = live.prefill()
    tokens = answer(engine, [sample(*ASKED)])[1][0]
    del compiled[:]
    for _ in range(2):
        prepare(engine, 700, "base")
    assert compiled == ["ExtendGraph", "DecodeGraph"]
    decoder = engine.decoder([sample(*ASKED, tokens, text(2, 12))], 560)
    decoder.prefill()
    decoder.step(np.array([5]))
    assert len(compiled) == 2
    reuse, engine.reuse = engine.reuse, None
    expected = answer(engine, [sample(text(4, 100))])[0][1]
    engine.reuse = reuse
    np.testing.assert_allclose(live.step(first.argmax(-1)), expected, atol=2e-5)


@once
def test_a_chat_prepares_for_a_short_question_and_a_longer_one(kept, monkeypatch):
    asked = []
    monkeypatch.setattr(assistants, "prepare", lambda engine, positions, mode: asked.append((positions, mode)))
    kept.prepare(117, 6, "web")
    kept.prepare(1000, 6)                       # no longer than the model takes
    assert asked == [(139, "web"), (187, "web"), (1022, "base"), (1024, "base")]


class TestLookup:
    """Prompt lookup over the model's own caches; `test_lookup` has its rules."""

    options = GenerationOptions(max_new_tokens=30, stop_token_ids=())

    @pytest.fixture(autouse=True)
    def _nothing_is_kept(self, kept, monkeypatch):
        kept.engine.settle()
        monkeypatch.setattr(kept.engine, "reuse", None)

    @both_slowly
    @pytest.mark.parametrize("most", [4, 12], ids=["few rows", "many rows"])
    def test_many_random_models_say_the_same(self, model, kept, monkeypatch, most):
        repeated, passes = text(3, 12), []
        monkeypatch.setattr(kept.engine, "between_steps", lambda: passes.append(1))
        prompts, saved = [sample(repeated, text(1, 20), picture(0), repeated[:5])], 0
        weights = {one.name: one.asnumpy().copy() for one in model.get_parameters()}
        for seed in range(12):
            rng = np.random.default_rng(seed)
            for one in model.get_parameters():
                noise = 0.05 * rng.standard_normal(one.shape)
                one.set_data(Tensor((weights[one.name] * rng.choice([0.5, 1, 2]) + noise).astype(np.float32)))
            expected, before = kept.generate(prompts, self.options), len(passes)
            assert kept.generate(prompts, replace(self.options, prompt_lookup=most)) == expected
            saved += 2 * before - len(passes)
            del passes[:]
        for one in model.get_parameters():
            one.set_data(Tensor(weights[one.name]))
        assert saved > 5        # proposals were right now and then

    @once
    def test_batches_and_penalties(self, kept):
        prompts = [sample(text(1, 30), picture(0), text(2, 8)), sample(text(3, 9), text(3, 9)), sample(text(4, 30))]
        for penalty in (1.0, 1.2):
            options = replace(self.options, repetition_penalty=penalty)
            assert kept.generate(prompts, replace(options, prompt_lookup=4)) == kept.generate(prompts, options)

    @once
    @pytest.mark.parametrize("ntk", ["public", "request"])
    def test_beyond_the_trained_length(self, kept, monkeypatch, ntk):
        monkeypatch.setattr(kept.engine.config, "dynamic_ntk", ntk)
        prompt = [sample(text(1, 240))]
        assert kept.generate(prompt, replace(self.options, prompt_lookup=4)) == kept.generate(prompt, self.options)

    @once
    def test_a_lost_cache_is_found_again(self, kept):
        options, found = replace(self.options, prompt_lookup=4), []
        prompt, engine = sample(text(3, 9), text(3, 9)), kept.engine
        expected = kept.generate([prompt], options)[0]
        engine.caches.limit, usual = 0, engine.caches.limit
        other = engine.decoder([sample(text(5, 9))], 30)
        for (token,) in decode_steps(engine.decoder([prompt], 30), options, 1):
            found.append(token)
            other.prefill()                     # takes its memory
        engine.caches.limit = usual
        assert found == expected

    @once
    def test_other_devices_refuse_it(self, kept, monkeypatch):
        monkeypatch.setattr(assistants, "unavailable", lambda: "it is for the CPU")
        with pytest.raises(GenerationError, match=r"prompt_lookup is 4, but it is for the CPU\. Leave it out"):
            kept.generate([sample(text(0, 9))], GenerationOptions(prompt_lookup=4))


@once
def test_what_was_looked_up_is_taken_over_too(kept, engine, computed):
    options = GenerationOptions(max_new_tokens=30, stop_token_ids=(), prompt_lookup=4)
    tokens = kept.generate([sample(*ASKED)], options)[0]
    check(engine, [sample(*ASKED, tokens, text(2, 3))])
    assert computed == [128, -3, FEW_POSITIONS]
