"""What quantised weights change: scores and answers of a model, by bits and way of rounding.

    python benchmarks/quantization_error.py                                    # the starter on the demo's conversations
    python benchmarks/quantization_error.py --model out/model --data held_out.json --calibrate train.json
    python benchmarks/quantization_error.py --model out/charts/model --charts 192 --calibrate FILE   # charts drawn anew

Without --calibrate every second sample of the data calibrates, and the others measure, each question of theirs as chat
asks it. Everything is computed in float32 by the network on the host, from the weights as they are widened again. An
answer counts as exact when at each of its positions the likeliest token is the answer's, which is what greedy decoding
needs to give it. The scores' error is the root of the mean square over the positions that predict an answer's tokens,
relative to the scores' own deviation.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mindformers_ixc.checkpoint.host_model import HostModel
from mindformers_ixc.checkpoint.layer_rounding import AWQ_WAY, GPTQ_WAY, WAYS
from mindformers_ixc.checkpoint.quantise import quantize
from mindformers_ixc.checkpoint.quantised import widened
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.config import read_config
from mindformers_ixc.data.conversations import load_conversations
from mindformers_ixc.data.questions import Question, questions_of
from mindformers_ixc.demo import demo_path
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.processing.prompt import IGNORE_INDEX
from mindformers_ixc.resources import resolve_model


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="starter", help="model directory with full weights")
    parser.add_argument("--data", default=str(demo_path("train.json")), help="conversations with pictures")
    parser.add_argument("--charts", type=int, metavar="N", help="instead, N charts with two questions each, drawn as "
                        "those of the tiny stages and never seen")
    parser.add_argument("--calibrate", metavar="FILE", help="other conversations, which calibrate")
    parser.add_argument("--samples", type=int, default=64, help="that calibrate, at most")
    return parser.parse_args()


def scores_of(folder: str | Path, samples: list[EncodedSample]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of every sample the scores of its answer's positions, and the answer."""
    config = read_config(folder)
    model = HostModel(widened(open_source(folder)).tensors, config)
    states = [model.embeddings(sample) for sample in samples]
    for number in range(config.num_hidden_layers):
        layer = model.layer(number)
        states = [layer(x, sample.image_mask == 1) for x, sample in zip(states, samples)]
    norm, head, found = model.weight("model.norm.weight"), model.weight("output.weight"), []
    for x, sample in zip(states, samples):
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * norm
        answered = np.flatnonzero(sample.labels != IGNORE_INDEX)
        found.append((x[answered - 1] @ head.T, sample.labels[answered]))
    return found


def answered(question: Question, processor: Processor) -> EncodedSample:
    """A question as chat asks it, and its right answer behind it."""
    prompt = processor.encode_chat(**question.request(None))
    labels = processor.encode_conversation([("user", "?"), ("assistant", question.expected)]).labels
    answer = labels[labels != IGNORE_INDEX]
    return dataclasses.replace(
        prompt, input_ids=np.concatenate([prompt.input_ids, answer]),
        labels=np.concatenate([np.full_like(prompt.input_ids, IGNORE_INDEX), answer]),
        image_mask=np.concatenate([prompt.image_mask, np.zeros_like(answer)]))


def halves(data: str, folder: Path) -> tuple[Path, Path]:
    """Files of the samples that calibrate, and of those that measure."""
    rows = [{"id": one.index, "image": [str(image) for image in one.images],
             "conversations": [{"from": {"user": "human", "assistant": "bot"}.get(role, role), "value": text}
                               for role, text in one.turns]}
            for one in load_conversations(data) if one.images]
    files = folder / "calibrate.json", folder / "measure.json"
    for file, part in zip(files, (rows[::2], rows[1::2])):
        file.write_text(json.dumps(part), encoding="utf-8")
    return files


def drawn_charts(count: int, folder: Path) -> Path:
    """A file of questions about new charts."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
    import make_stages

    charts = make_stages.write_charts(folder, "new", count, random.Random("new"))
    make_stages.write_json(folder / "charts.json", [
        make_stages.sample(f"{place}-{number}", question, answer, path) for place, (path, colour, bars)
        in enumerate(charts) for number, (question, answer, _) in enumerate(make_stages.questions(colour, bars))])
    return folder / "charts.json"


def main() -> None:
    """Prints a line for each way."""
    arguments = parse()
    model = resolve_model(arguments.model)
    processor = Processor.from_directory(model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = drawn_charts(arguments.charts, folder) if arguments.charts else arguments.data
        calibrate, measure = (arguments.calibrate, data) if arguments.calibrate else halves(data, folder)
        samples = [answered(one, processor) for one in questions_of(load_conversations(measure)) if one.images]
        ways: dict[str, Callable[[Path], object]] = {
            "8 bits": lambda target: quantize(model, target, 8),
            "4 bits, rounded to the nearest": lambda target: quantize(model, target),
            **{f"4 bits, {name}": lambda target, ways=ways: quantize(
                model, target, calibrate=calibrate, samples=arguments.samples, ways=ways)
               for name, ways in {"AWQ": (AWQ_WAY,), "GPTQ": (GPTQ_WAY,), "the best of each": WAYS}.items()}}
        expected = scores_of(model, samples)
        deviation = sum(float(np.sum((one - one.mean(-1, keepdims=True)) ** 2)) for one, _ in expected)
        print(f"{arguments.model}: {len(samples)} questions that calibration has not seen")
        for number, (name, make) in enumerate({"full weights": None, **ways}.items()):
            if make is not None:
                make(folder / str(number))
            found = expected if make is None else scores_of(folder / str(number), samples)
            error = sum(float(np.sum((one - other) ** 2)) for (one, _), (other, _) in zip(expected, found))
            exact = sum(bool((scores.argmax(-1) == labels).all()) for scores, labels in found)
            print(f"{name:32}exact match {exact} of {len(samples)} ({100 * exact / len(samples):.1f} %), scores differ "
                  f"by {100 * (error / deviation) ** 0.5:.2f} %", flush=True)


if __name__ == "__main__":
    main()
