"""Keys and values in bfloat16: half the memory, the shipped model's answers, and everything that works on a cache."""
from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from mindformers_ixc import native
from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.generation import continuing
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.slots import cache_bytes
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.resources import STARTER
from mindformers_ixc.training import trainer

# without a compiler there are no kernels, as docs/install.md says
needs_kernels = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")

QUESTION = "What would be a good title?"
SAMPLES = [sample for sample in json.loads(demo_path("train.json").read_text(encoding="utf-8"))
           if sample["conversations"][0]["value"] == QUESTION]
QUERIES = [{"query": QUESTION, "images": [str(demo_path(sample["image"]))]} for sample in SAMPLES]


@pytest.fixture(scope="module")
def halved():
    return Assistant.from_directory(STARTER, cache_dtype="bfloat16")


@pytest.fixture(scope="module")
def full():
    return Assistant.from_directory(STARTER)


def logits(assistant: Assistant) -> np.ndarray:
    """Of the prompt and of five given tokens after it, `(6, V)`."""
    sample = assistant.encode(QUERIES[0])
    decoder = assistant.engine.decoder([sample], 8)
    found = [decoder.prefill()[0]] + [decoder.step(np.array([token], np.int32))[0] for token in (5, 70, 9, 33, 14)]
    decoder.close()
    return np.stack(found)


@needs_kernels
class TestHalved:
    def test_the_starter_answers_as_before(self, halved):
        assert halved.answer(QUERIES, max_new_tokens=16) == [one["conversations"][1]["value"] for one in SAMPLES]

    def test_logits_differ_by_the_rounding_of_16_bits(self, halved, full):
        found, expected = logits(halved), logits(full)
        difference = np.abs(found - expected).max()
        assert 0 < difference < 0.02 * np.abs(expected).max()

    def test_a_cache_takes_half_the_memory(self, halved, full):
        for assistant in (halved, full):
            assistant.answer(QUERIES[:1], max_new_tokens=16)
        sizes = [{key: slot.bytes for key, slot in assistant.engine._slots.items()} for assistant in (halved, full)]
        shared = set(sizes[0]) & set(sizes[1])
        assert shared
        assert all(2 * sizes[0][key] == sizes[1][key] for key in shared)
        config = halved.model.config
        assert cache_bytes(config, 1, 128) * 2 == cache_bytes(full.model.config, 1, 128)

    def test_beams_take_over_one_another(self, halved):
        assert halved.answer(QUERIES[:1], max_new_tokens=8, num_beams=2) == [SAMPLES[0]["conversations"][1]["value"]]

    def test_what_a_store_kept_gives_the_same_answer(self, monkeypatch, halved):
        history = [(QUESTION, SAMPLES[0]["conversations"][1]["value"])]
        query = [{"query": "Where would you see this?", "images": QUERIES[0]["images"], "history": history}]
        alone = Assistant.from_directory(STARTER, cache_dtype="bfloat16", reuse_bytes=0)
        known = []
        begin = continuing.Continuing._rest
        monkeypatch.setattr(continuing.Continuing, "_rest",
                            lambda self, at, sizes: known.append(at.tolist()) or begin(self, at, sizes))
        monkeypatch.setattr(continuing.Continuing, "_worth_compiling", lambda *_: True)
        monkeypatch.setattr(continuing, "pays", lambda *_: True)
        halved.answer(QUERIES[:1], max_new_tokens=16)
        assert halved.answer(query, max_new_tokens=16) == alone.answer(query, max_new_tokens=16)
        assert known
        assert min(known[0]) > 0

    def test_prompt_lookup_gives_the_same_answer(self, halved):
        plain = halved.answer(QUERIES[:2], max_new_tokens=16)
        assert halved.answer(QUERIES[:2], max_new_tokens=16, prompt_lookup=4) == plain


def test_without_kernels_it_is_refused_before_weights_are_read(monkeypatch):
    monkeypatch.setenv(native.SWITCH, "0")
    with pytest.raises(ConfigError, match="cache_dtype is bfloat16, which is for a single process on a CPU"):
        Assistant.from_directory(STARTER, cache_dtype="bfloat16")


def test_another_dtype_is_refused():
    with pytest.raises(ConfigError, match="cache_dtype is 'int8'"):
        IXC25Config(cache_dtype="int8")


def test_a_yaml_of_predict_says_it_too(monkeypatch):
    given = {}
    monkeypatch.setattr(trainer.Assistant, "from_directory", lambda directory, **fields: given.update(fields) or [])
    monkeypatch.setattr(trainer, "read_requests", lambda _: [])
    monkeypatch.setattr(trainer, "predict", lambda load, *_: load())
    section = {"cache_dtype": "bfloat16", "fused_norm": False, "hidden_size": 7}
    config = SimpleNamespace(get=lambda _: None, predict_batch_size=1, load_checkpoint="starter",
                             model=SimpleNamespace(model_config=section))
    assert trainer.IXC25Trainer.predict(SimpleNamespace(), config) == []
    assert given == {"cache_dtype": "bfloat16", "fused_norm": False}
