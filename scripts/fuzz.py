"""Fuzzes what reads other people's files: nothing but this package's own errors may come out.

    python scripts/fuzz.py                          # all targets, 5 minutes each
    python scripts/fuzz.py header ckpt --seconds 60
    python scripts/fuzz.py --replay                 # the corpus only, without atheris

Each target runs in a process of its own (atheris ends it). Inputs that reach new code are the next ones' parents; the
first are those of tests/data/fuzz/TARGET and, for JSON targets, values built from the keys that the reader knows. An
input that fails is written to ./fuzz-TARGET-*; put it into the corpus with the fix.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests" / "data" / "fuzz"

# An input that begins with this byte is no text, but a recipe from which a JSON value of known keys is built.
STRUCTURED = 0

ODD_VALUES = (None, True, False, 0, -1, 2**63, 1e308, float("nan"), "", " ", "\u2028", "\ud83d", "a\0b", "/", "..",
              "x" * 5000, [], {}, [[]], "<ImageHere>", "<image>", "</s>", "[UNUSED_TOKEN_145]", "cat.jpg")


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        modules: imported before fuzzing, so that their branches are counted.
        run: takes an input; it raises what the reader raises.
        words: keys and values the reader knows, for JSON targets.
        template: a value the reader takes, which is changed at one place.
    """

    modules: tuple[str, ...]
    run: Callable[[bytes], None]
    words: tuple[str, ...] = ()
    template: Any = None


# Where the files that readers take are written; in a process that fuzzes it is the parent's, who removes it.
FOLDER = Path()


def written(name: str, content: bytes) -> Path:
    """A file of that name and content."""
    path = FOLDER / name
    path.write_bytes(content)
    return path


@functools.cache
def processor() -> Any:
    """The demo's processor, with small tiles."""
    from mindformers_ixc.demo import demo_path
    from mindformers_ixc.processing.processor import ImageProcessor, Processor
    from mindformers_ixc.processing.tokenizer import Tokenizer

    return Processor(ImageProcessor(56, hd_num=2), Tokenizer(str(demo_path("tokenizer.model"))))


def read_all(path: Path) -> None:
    """Opens a checkpoint and reads what it holds, unless it claims to be large."""
    from mindformers_ixc.checkpoint.sources import open_source

    for tensor in open_source(path).tensors.values():
        if math.prod(tensor.shape) < 2**18:
            tensor.whole()


def run_header(data: bytes) -> None:
    """A safetensors file whose header is the input."""
    read_all(written("model.safetensors", struct.pack("<Q", len(data)) + data + bytes(256)))


def run_file(data: bytes) -> None:
    """A safetensors file."""
    read_all(written("whole.safetensors", data))


def run_ckpt(data: bytes) -> None:
    """A .ckpt file."""
    read_all(written("a.ckpt", data))


def run_index(data: bytes) -> None:
    """An index beside one good file."""
    place = FOLDER / "index"
    if not place.is_dir():
        place.mkdir()
        header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        (place / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    (place / "model.safetensors.index.json").write_bytes(data)
    read_all(place)


def run_config(data: bytes) -> None:
    """A config.json."""
    from mindformers_ixc.config import read_config

    read_config(written("config.json", data))


def run_messages(data: bytes) -> None:
    """Messages of a chat, as a prompt."""
    from mindformers_ixc.files import parse_json
    from mindformers_ixc.processing.messages import read_messages

    processor().encode_chat(**read_messages(parse_json(data, "the messages")))


def run_requests(data: bytes) -> None:
    """A file of requests, and their prompts."""
    from mindformers_ixc import errors
    from mindformers_ixc.generation.requests import read_requests

    for request in read_requests(written("requests.jsonl", data)):
        if request.question is not None:
            # an error of one request is that request's, as in run mode predict
            with contextlib.suppress(errors.PromptError, errors.ImageError, errors.VideoError):
                processor().encode_chat(**request.question)


def run_conversations(data: bytes) -> None:
    """A file of conversations, and their training rows."""
    from mindformers_ixc.data.conversations import load_conversations

    for sample in load_conversations(written("data.json", data)):
        processor().encode_conversation(sample.turns, sample.images, sample.where)


def run_prompts(data: bytes) -> None:
    """A question, a round before it and a system turn; a NUL byte stands between them."""
    parts = (data.decode("utf-8", "surrogateescape" if data[:1] == b"s" else "replace") + "\0\0\0").split("\0")
    processor().encode_chat(parts[0], history=[(parts[1], parts[2])], meta_instruction=parts[3])


def run_yaml(data: bytes) -> None:
    """A YAML of a run, every key checked."""
    from mindformers_ixc.cli.run_config import check_fields
    from mindformers_ixc.cli.yaml_file import read_yaml, tie_data_section

    fields = read_yaml(written("run.yaml", data))
    tie_data_section(fields)
    check_fields(fields, "run.yaml")


MESSAGES = [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "a cat"}, {"role": "user", "content": "Sure?"}]
SAMPLES = [{"id": "1", "image": ["cat.jpg"], "conversations": [{"from": "human", "value": "<ImageHere>What?"},
                                                              {"from": "gpt", "value": "a cat"}]},
           {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
CHECKPOINT = "mindformers_ixc.checkpoint.sources"
PROCESSOR = "mindformers_ixc.processing.processor"

TARGETS = {
    "header": Target((CHECKPOINT,), run_header, ("dtype", "shape", "data_offsets", "F32", "BF16", "__metadata__"),
                     {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
                      "b": {"dtype": "BF16", "shape": [], "data_offsets": [16, 18]}}),
    "file": Target((CHECKPOINT,), run_file),
    "ckpt": Target((CHECKPOINT,), run_ckpt),
    "index": Target((CHECKPOINT,), run_index, ("weight_map", "metadata", "checksums", "a", "a.safetensors"),
                    {"metadata": {"total_size": 8}, "weight_map": {"a": "a.safetensors"}}),
    "config": Target(("mindformers_ixc.config",), run_config,
                     ("hidden_size", "vision_config", "rope_scaling", "factor", "type", "dynamic", "vocab_size"),
                     {"model_type": "internlmxcomposer2", "hidden_size": 64, "num_attention_heads": 8,
                      "num_key_value_heads": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0},
                      "vision_config": {"image_size": 56, "patch_size": 14, "hidden_size": 32},
                      "task_lora_ranks": {"sft": 4}}),
    "messages": Target((PROCESSOR, "mindformers_ixc.processing.messages"), run_messages,
                       ("role", "content", "type", "text", "image", "user", "assistant", "system"), MESSAGES),
    "requests": Target((PROCESSOR, "mindformers_ixc.generation.requests"), run_requests,
                       ("query", "images", "history", "meta_instruction", "hd_num", "messages"),
                       {"query": "What?", "images": [], "history": [["Q", "A"]], "hd_num": 4}),
    "conversations": Target((PROCESSOR, "mindformers_ixc.data.conversations"), run_conversations,
                            ("id", "image", "images", "video", "conversations", "messages", "from", "value", "human",
                             "gpt", "role", "content", "caption"), SAMPLES),
    "prompts": Target((PROCESSOR,), run_prompts),
    "yaml": Target(("mindformers_ixc.cli.run_config",), run_yaml),
}


def own_errors() -> tuple[type[Exception], ...]:
    """What may come out: the classes of `errors.py`, and a missing file's."""
    errors = importlib.import_module("mindformers_ixc.errors")
    found = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Exception)]
    return (*found, FileNotFoundError)


def built_value(data: bytes, words: tuple[str, ...], template: Any) -> Any:
    """The template with odd values at places that the input chooses."""
    value, steps = json.loads(json.dumps(template)), list(data) or [0]
    choices = [*ODD_VALUES, *words]
    while len(steps) >= 3:
        depth, what, how = steps.pop(0), steps.pop(0), steps.pop(0)
        place = value
        for _ in range(depth % 5):
            inner = list(place.values()) if isinstance(place, dict) else place
            if not inner or not isinstance(inner[what % len(inner)], (dict, list)):
                break
            place = inner[what % len(inner)]
        odd = copy.deepcopy(choices[how % len(choices)])
        if isinstance(place, dict):
            keys = [*place, *words]
            key = keys[what % len(keys)]
            place.pop(key, None) if how % 17 == 0 else place.update({key: odd})
        else:
            place.insert(what % (len(place) + 1), odd)
    return value


def run_input(target: Target, data: bytes) -> None:
    """Runs one input; whatever is not an error of the package comes out."""
    if target.template is not None and data[:1] == bytes([STRUCTURED]):
        data = json.dumps(built_value(data[1:], target.words, target.template)).encode()
    try:
        target.run(data)
    except own_errors():
        pass


def replay(name: str, folder: Path) -> int:
    """Runs the corpus of a target, and its template with an odd value at each place.

    Args:
        name: of the target.
        folder: for the files that readers take.

    Returns:
        How many inputs there were.
    """
    global FOLDER
    FOLDER = folder
    inputs = [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
    template = TARGETS[name].template
    if template is not None:
        inputs += [json.dumps(template).encode(), *(bytes([STRUCTURED, d, w, h]) for d in range(4) for w in range(6)
                                                    for h in range(0, 36, 5))]
    for data in inputs:
        run_input(TARGETS[name], data)
    return len(inputs)


def fuzz(name: str, seconds: int, seed: int, folder: Path) -> None:
    """Fuzzes one target in this process, which ends with it."""
    import atheris

    global FOLDER
    FOLDER, target = folder, TARGETS[name]
    with atheris.instrument_imports(include=["mindformers_ixc"]):
        for module in target.modules:
            importlib.import_module(module)
    seeds = FOLDER / "seeds"
    seeds.mkdir()
    if target.template is not None:
        (seeds / "template").write_bytes(json.dumps(target.template).encode())
        (seeds / "structured").write_bytes(bytes([STRUCTURED, 1, 0, 3]))
    options = [f"-max_total_time={seconds}", f"-seed={seed}", "-timeout=120", "-rss_limit_mb=4096", "-max_len=65536",
               f"-artifact_prefix={Path.cwd()}/fuzz-{name}-", "-verbosity=0", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(seeds), *([str(CORPUS / name)] if (CORPUS / name).is_dir() else [])],
                  functools.partial(run_input, target))
    atheris.Fuzz()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=300, help="for each target (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--replay", action="store_true", help="run the corpus only")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)      # says that this is a process that fuzzes
    return parser.parse_args()


def run_target(name: str, seconds: int, seed: int, folder: Path) -> bool:
    """Fuzzes one target in a process of its own, and says what came out; returns whether it was good."""
    command = [sys.executable, __file__, name, "--folder", str(folder), "--seconds", str(seconds), "--seed", str(seed)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                            check=False)
    runs = [line.split()[-1] for line in result.stdout.splitlines() if "number_of_executed_units" in line]
    good = result.returncode == 0 and bool(runs)
    outcome = "only errors of the package" if good else "FAILED"
    print(f"{name}: {runs[0] if runs else 'no'} inputs, {outcome}", flush=True)
    if not good:
        print(result.stdout[-6000:], flush=True)
    return good


def main() -> None:
    """Runs the targets one after the other."""
    arguments = parse()
    names = arguments.targets or list(TARGETS)
    if arguments.folder:
        fuzz(names[0], arguments.seconds, arguments.seed, arguments.folder)
    failed = []
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    for name in names:
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            if arguments.replay:
                print(f"{name}: {replay(name, Path(folder))} inputs, only errors of the package", flush=True)
            elif not run_target(name, arguments.seconds, arguments.seed, Path(folder)):
                failed.append(name)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
