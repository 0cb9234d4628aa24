"""Decoding options: what there is and what each may be, known before any library is imported."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from mindformers_ixc.errors import GenerationError
from mindformers_ixc.sections import Rule, check_value, is_number, is_whole, of_type, whole

# Below, scores divided by the temperature could leave the range of float32; the likeliest token is as good.
LEAST_TEMPERATURE = 1e-5

# Requests answered at once by run mode predict, unless the YAML's `predict_batch_size` says otherwise.
PREDICT_BATCH_SIZE = 4

# Tokens that prompt lookup may propose at once.
MOST_PROPOSED = 64

# What every option must be.
RULES = {
    "max_new_tokens": whole(1),
    "do_sample": Rule(lambda value: isinstance(value, (bool, np.bool_)), "True or False"),
    "temperature": Rule(lambda value: is_number(value) and value >= 0,
                        "a number of at least 0 (0: only without do_sample)"),
    "top_k": whole(0, " (0: no limit)"),
    "top_p": Rule(lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1 (1: no limit)"),
    # further out, scores would leave the range of float32
    "repetition_penalty": Rule(lambda value: is_number(value) and 1e-4 <= value <= 1e4,
                               "a number from 0.0001 to 10000 (1: no penalty)"),
    "num_beams": whole(1, " (1: no beam search)"),
    "length_penalty": Rule(lambda value: is_number(value) and abs(value) <= 50, "a number from -50 to 50"),
    "early_stopping": Rule(lambda value: isinstance(value, bool) or (isinstance(value, str) and value == "never"),
                           "True, False or 'never'"),
    "stop_token_ids": Rule(lambda value: all(is_whole(i, 0) for i in value), "token ids, whole numbers of at least 0"),
    "stop_strings": Rule(lambda value: all(isinstance(s, str) and s for s in value), "texts that are not empty"),
    "prompt_lookup": Rule(lambda value: is_whole(value, 0) and value <= MOST_PROPOSED,
                          f"a whole number from 0 to {MOST_PROPOSED} (0: off)"),
    "seed": Rule(lambda value: value is None or is_whole(value, 0), "a whole number of at least 0, or None"),
}


# What is beside the options of `GenerationOptions` in run mode predict.
BEST_RULES = {"best_of": whole(2, " (samples to choose from)"), "reward": of_type(str)}


def check_best_of(count: object, options: Mapping) -> None:
    """Refuses a number of samples that leaves nothing to choose from, and options that go with one answer only.

    Args:
        count: samples of a question.
        options: fields of `GenerationOptions` by name.

    Raises:
        GenerationError: naming the option.
    """
    check_value("best_of", count, BEST_RULES["best_of"], GenerationError)
    for name, idle in (("num_beams", 1), ("prompt_lookup", 0)):
        if options.get(name, idle) not in (idle, None):
            raise GenerationError(f"best_of is {count} and {name} is {options[name]}; samples are drawn token by "
                                  "token, so leave one of them out.")
    temperature: Any = options.get("temperature")
    if is_number(temperature) and 0 <= temperature < LEAST_TEMPERATURE:
        raise GenerationError(f"best_of is {count} and temperature is {temperature}; at less than {LEAST_TEMPERATURE} "
                              "all samples would be the likeliest answer, so give a larger one.")


def check_reward(count: object, reward: object, options: Mapping) -> None:
    """The same where there need not be several samples, but for a reward model that nothing chooses by.

    Args:
        count: samples of a question; `None` for one answer.
        reward: directory of the reward model, or `None`.
        options: as in `check_best_of`.

    Raises:
        GenerationError: naming the option.
    """
    if count is not None:
        check_best_of(count, options)
    elif reward is not None:
        raise GenerationError(f"reward is {reward}, but best_of is not said; a reward model chooses among several "
                              "samples, so say how many (--best_of 8).")


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is decoded.

    Attributes:
        max_new_tokens: new tokens at most, at least 1 (public chat default 1024).
        do_sample: sample instead of taking the likeliest token.
        temperature: divides the scores before sampling, at least 1e-5 then. Without `do_sample` it has no effect and 0,
            by which others ask for greedy decoding, is taken as such.
        top_k: only the k likeliest tokens are sampled; 0 is no limit (Hugging Face's implicit default is 50).
        top_p: only the likeliest tokens that together reach this probability are sampled, 0 to 1; 0 leaves one token.
        repetition_penalty: divides positive and multiplies negative scores of tokens already generated, above 0. It
            acts on logits in greedy decoding and sampling, on log-probabilities in beam search, and never on the
            prompt's tokens, because the public code hands the prompt over as embeddings.
        num_beams: beams; 1 is no beam search.
        length_penalty: a finished beam's score is divided by its length to this power.
        early_stopping: when beam search ends: True as soon as `num_beams` beams have ended, False when no running beam
            can be expected to get better, "never" when none can at all.
        stop_token_ids: ids that end an answer; the first also stands for the end of every finished beam.
        stop_strings: texts that end an answer. Ids alone do not show them: the caller, who has the tokenizer, passes a
            test of ids to the search functions and cuts the text.
        prompt_lookup: greedy decoding: so many tokens at most are proposed at a time, as they follow the last ones in
            the prompt or the answer so far, and verified in one pass; 0 is off. The answer is the same.
        seed: of sampling. An answer depends on its prompt and the seed, not on its place in a batch.

    Raises:
        GenerationError: for a value of the wrong type or outside its range; names the option.
    """

    max_new_tokens: int = 1024
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    prompt_lookup: int = 0
    seed: int | None = None

    def __post_init__(self):
        for name in RULES:
            value = getattr(self, name)
            if isinstance(value, (np.generic, np.ndarray)):         # numpy's scalars and lists are as good
                object.__setattr__(self, name, value.tolist())
        for name, single in (("stop_token_ids", Integral), ("stop_strings", str)):
            value = getattr(self, name)
            if isinstance(value, single):
                object.__setattr__(self, name, (value,))
            elif isinstance(value, Sequence):
                object.__setattr__(self, name, tuple(value))
            else:
                raise GenerationError(f"{name} is {value!r}; it must be a list or a tuple.")
        for name, rule in RULES.items():
            check_value(name, getattr(self, name), rule, GenerationError)
        if self.do_sample and self.temperature < LEAST_TEMPERATURE:
            raise GenerationError(f"temperature is {self.temperature!r} and do_sample is True; sampling takes a "
                                  f"temperature of at least {LEAST_TEMPERATURE}, or set do_sample=False for greedy "
                                  "decoding.")
        if self.prompt_lookup and (self.do_sample or self.num_beams > 1):
            other = "do_sample is True" if self.do_sample else f"num_beams is {self.num_beams}"
            raise GenerationError(f"prompt_lookup is {self.prompt_lookup} and {other}; what it proposes is verified "
                                  "by greedy decoding, so it takes do_sample=False and num_beams=1. Leave one of them "
                                  "out.")

    @property
    def tokens_kept(self) -> int:
        """Tokens that top-k and top-p leave each row at least.

        A beam must be able to go on however likely all of its stop ids are, so beam sampling keeps one token more than
        there are stop ids, and two without any.
        """
        return max(2, 1 + len(self.stop_token_ids)) if self.num_beams > 1 else 1
