"""Decoding with and without prompt lookup, of answers that repeat their input and of answers that do not.

    python benchmarks/prompt_lookup.py --threads 2

The model has the sizes of decode.py, and weights that make it say a known text: the head's row of a token is the
embedding of the one before it in a cycle through the whole vocabulary, and what the layers add is small. So each pass
computes what a trained model's would, and what the answer repeats is a matter of the prompt:

* transcript: the prompt holds all that is answered, as a page does whose text is read out;
* corrected: the same, but every 8th token of it is another one;
* new: the prompt holds nothing of it;
* misleading: the prompt holds every pair of tokens of the answer, each followed by a wrong one.

First the tokens are compared, then all take turns; the medians of the rounds are printed.
"""
from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

from decode import PROMPT, medium_config, prompt

NEW_TOKENS = 96
PROPOSED = (0, 4, 7)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    return parser.parse_args()


def reciting_model():
    """A model that says token after token of a cycle, and the cycle, an array."""
    import numpy as np
    from mindspore import Tensor

    from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM

    model, rng = IXC25ForCausalLM(medium_config()), np.random.default_rng(0)
    cycle = np.append(rng.permutation(np.arange(3, model.config.vocab_size)), [0, 1, 2])
    embeddings = rng.standard_normal(model.model.tok_embeddings.weight.shape).astype(np.float32)
    for parameter in model.get_parameters():
        scale = 1e-3 if ".wo." in parameter.name or ".w2." in parameter.name else parameter.shape[-1] ** -0.5
        value = np.ones(parameter.shape) if "norm" in parameter.name else scale * rng.standard_normal(parameter.shape)
        parameter.set_data(Tensor(value.astype(np.float32)))
    head = np.empty_like(embeddings)
    head[np.roll(cycle, -1)] = embeddings[cycle]
    model.model.tok_embeddings.weight.set_data(Tensor(embeddings))
    model.output.weight.set_data(Tensor(head))
    model.set_train(False)
    return model, cycle


def prompts(config, cycle) -> dict:
    """A prompt of each kind, of 512 positions with a 2 x 2 picture; all are answered alike."""
    from dataclasses import replace

    import numpy as np

    base, rng = prompt(config), np.random.default_rng(3)
    text = np.flatnonzero(base.image_mask == 0)
    room = text[text > np.flatnonzero(base.image_mask)[-1]]
    others = cycle[4000:]
    answer = cycle[:NEW_TOKENS + 2]
    corrected = answer.copy()
    corrected[7::8] = rng.choice(others, len(corrected[7::8]))
    misleading = np.stack((answer[:-1], answer[1:], rng.choice(others, len(answer) - 1)), 1).ravel()
    documents = {"transcript": answer, "corrected": corrected, "new": [], "misleading": misleading[-len(room) + 3:]}
    found = {}
    for name, document in documents.items():
        ids = np.where(base.image_mask == 1, base.input_ids, rng.choice(others, PROMPT)).astype(np.int32)
        ids[room[:len(document)]] = document
        ids[-1] = answer[0]         # what it has said last
        found[name] = replace(base, input_ids=ids)
    return found


def decode(engine, sample, proposed: int):
    """One greedy answer; seconds a token after the first, passes, and the tokens."""
    from mindformers_ixc.generation.options import GenerationOptions
    from mindformers_ixc.generation.search import decode_steps

    passes = []
    engine.between_steps = lambda: passes.append(1)
    options = GenerationOptions(max_new_tokens=NEW_TOKENS, stop_token_ids=(), prompt_lookup=proposed)
    decoder, tokens, start = engine.decoder([sample], NEW_TOKENS), [], 0.0
    for (token,) in decode_steps(decoder, options, 1):
        start = start or time.perf_counter()
        tokens.append(token)
    seconds = time.perf_counter() - start
    decoder.close()
    return seconds / (NEW_TOKENS - 1), len(passes), tokens


def main() -> None:
    """Compares, measures, prints."""
    arguments = parse()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:arguments.threads])
    import mindspore as ms

    import mindformers_ixc  # noqa: F401 - registers the model
    from mindformers_ixc.generation.engine import InferenceEngine

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    model, cycle = reciting_model()
    engine, samples = InferenceEngine(model), prompts(model.config, cycle)
    expected = cycle[1:NEW_TOKENS + 1].tolist()
    for name, sample in samples.items():
        for proposed in PROPOSED:
            if decode(engine, sample, proposed)[2] != expected:
                sys.exit(f"{name}, prompt_lookup {proposed}: other tokens; its time would mean nothing.")
    print(f"tokens equal in all {len(samples) * len(PROPOSED)} cases")
    found: dict[tuple[str, int], list] = {(name, proposed): [] for name in samples for proposed in PROPOSED}
    for _ in range(arguments.rounds):
        for name, proposed in found:
            found[name, proposed].append(decode(engine, samples[name], proposed)[:2])
    print(f"{arguments.threads} thread(s), medians of {arguments.rounds}, {NEW_TOKENS} tokens")
    print(f"{'answer':14}{'prompt_lookup':>14}{'passes':>8}{'ms a token':>12}{'gain':>8}")
    for (name, proposed), values in found.items():
        each = statistics.median(seconds for seconds, _ in values)
        without = statistics.median(seconds for seconds, _ in found[name, 0])
        print(f"{name:14}{proposed:14}{values[0][1]:8}{each * 1e3:12.2f}{without / each:8.2f}")


if __name__ == "__main__":
    main()
