"""The folder that a page of the documentation tells its story in, and how its blocks run there (`blocks`)."""
from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml
from blocks import ROOT, SHELLS, Block, commands, lacks, printed, repository_problems
from PIL import Image
from random_model import make, save

import mindformers_ixc_cli
from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.merge import merge
from mindformers_ixc.checkpoint.quantise import quantize
from mindformers_ixc.cli import early
from mindformers_ixc.cli.early import check_early
from mindformers_ixc.cli.early_device import SIMULATED
from mindformers_ixc.cli.inputs import check_inputs
from mindformers_ixc.cli.older_files import check_version
from mindformers_ixc.cli.yaml_file import merged_fields, read_yaml
from mindformers_ixc.data.conversations import load_conversations
from mindformers_ixc.data.preferences import load_preferences
from mindformers_ixc.demo import demo_path
from mindformers_ixc.resources import STARTER, resolve_model

# Of this repository what commands name.
LINKS = ("benchmarks", "docs", "mindformers_ixc", "scripts", "tests", "yaml_configs")

# Commands that run even in blocks that do not, since they do not import MindFormers.
QUICK = ("init", "plan", "convert", "merge", "inspect")

# What reads the blocks of other languages that do not run.
PARSERS: dict[str, Callable[[str], Any]] = {"python": ast.parse, "yaml": yaml.safe_load, "json": json.loads}

# Pictures that pages ask about or have in their data.
PICTURES = ("photo.jpg", "cat.jpg", "a.jpg", "b.jpg", "screenshot.png", "france.png", "old, torn.png", "photos/dog.jpg")

SAMPLE = [{"image": "cat.jpg", "conversations": [{"from": "human", "value": "What is shown?"},
                                                 {"from": "bot", "value": "a cat"}]}]
PAIR = [{"prompt": "What is shown?", "image": "cat.jpg", "chosen": "a cat", "rejected": "a dog"}]
STEP = {"step": 1, "epoch": 1, "loss": 2.5, "learning_rate": 1e-3, "overflow": False, "samples": [0], "seconds": 0.25,
        "grad_norm": 1.5, "samples_per_second": 4.0}
TEXTS = {"held_out.json": json.dumps(SAMPLE), "photos.json": json.dumps(SAMPLE), "data.txt": "photos.json 1\n",
         "q.jsonl": json.dumps({"query": "What is shown?", "images": ["cat.jpg"]}), "resume.md": "# Ada\n\nAnalyst.\n",
         "answers.jsonl": json.dumps({"query": "What is shown?", "images": ["cat.jpg"], "answer": "a cat"}) + "\n"}
# Public tables, of which the names count.
TABLES = ("ChartQA_TEST.tsv", "MMStar.tsv")

# Sizes that tensor parallel 8 divides, and that divide into groups of 128.
EIGHT = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 8,
         "vision_config": {"image_size": 28, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 8,
                           "intermediate_size": 16}}
PUBLIC = "internlm-xcomposer2d5-7b"


def _random(path: Path) -> None:
    """A small model in the public layout."""
    make(path, seed=len(path.name), **EIGHT)


def _starter(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(resolve_model(STARTER))


def _tokenizer(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(demo_path("tokenizer.model"))


def _ranks(path: Path) -> None:
    """What a run of two devices leaves."""
    convert(path.parent / PUBLIC, path, tensor_parallel=2)


def _parts(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    merge(path.parent.parent / PUBLIC, path, extract=["projector"])


def _adapter(path: Path) -> None:
    """A LoRA as PEFT writes it."""
    path.mkdir(parents=True)
    linear, size = "base_model.model.model.layers.0.attention.wo", EIGHT["hidden_size"]
    save(path / "adapter_model.safetensors", {f"{linear}.lora_A.weight": np.ones((2, size), np.float32),
                                              f"{linear}.lora_B.weight": np.ones((size, 2), np.float32)})
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}', encoding="utf-8")


def _reward(path: Path) -> None:
    """A reward model as it is published."""
    make(path, seed=1, reward_pooling="last", **EIGHT)


def _predictions(path: Path) -> None:
    """What answering a file of questions leaves."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"request": {"query": "Go"}, "answer": "Gone."}) + "\n", encoding="utf-8")


def _samples(path: Path) -> None:
    """What sampling from a file of questions leaves."""
    path.parent.mkdir(exist_ok=True)
    answers = [{"answer": "a cat", "logp": -0.5}, {"answer": "an animal", "logp": -0.75}]
    path.write_text("".join(json.dumps({"request": {"query": f"A {name}?"}, "id": name, "samples": answers}) + "\n"
                            for name in ("cat", "dog", "bird")), encoding="utf-8")


def _verdicts(path: Path) -> None:
    """What a judge says of those."""
    path.write_text('{"cat": [2, -1], "dog": {"preferred": 1, "rejected": 0}, "bird": {"ranks": [1, 2]}}',
                    encoding="utf-8")


def _pairs(path: Path) -> None:
    """What labelling leaves."""
    path.write_text(json.dumps([{"id": 0, "image": "cat.jpg", "prompt": "What is shown?", "chosen": "a cat",
                                 "rejected": "an animal"}]), encoding="utf-8")


def _awq(path: Path) -> None:
    """A model as it is published in four bits."""
    quantize(path.parent / PUBLIC, path, layout="awq")


def _log(path: Path) -> None:
    """The log of a run."""
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text(json.dumps(STEP) + "\n", encoding="utf-8")


def _own(path: Path) -> None:
    path.write_text("base_config: ixc25_own_tiny.yaml\nload_checkpoint: starter\n", encoding="utf-8")


# What the blocks of every page take as given, beside pictures and texts, and those of one page or of all others; blocks
# that are not run leave some of it.
EVERYWHERE: dict[str, Callable[[Path], None]] = {
    PUBLIC: _random, "ixc25": _random, "tokenizer.model": _tokenizer, "PUBLIC/tokenizer.model": _tokenizer}
GIVEN: dict[str, dict[str, Callable[[Path], None]]] = {
    "README.md": {"out/model": _starter, f"{PUBLIC}-4bit": _awq},
    "checkpoints.md": {"output": _ranks, "my_adapter": _adapter, "step_100": _random, "step_200": _random,
                       "step_300": _random, "out/model": _starter, f"{PUBLIC}-4bit": _awq},
    "parallel.md": {"ixc25_ms": _random},
    "preference_data.md": {"out/charts/model": _starter, "reward_model": _reward, "samples/samples.jsonl": _samples,
                           "verdicts.json": _verdicts, "pairs.json": _pairs},
    "reward.md": {"out/model": _starter, "out/charts/model": _starter, "reward_model": _reward,
                  f"{PUBLIC}-reward": _reward,
                  "out_predict/predictions.jsonl": _predictions},
    "stages.md": {"out/model": _starter, "ixc25_start": _random},
    "quickstart.md": {},        # its second step trains the model
    "training.md": {"out/trained_parts": _parts, "out_lora/trained_parts": _adapter,
                    "out": _log, "first": _log, "second": _log, "third": _log,
                    "my.yaml": _own},
}
OTHERS: dict[str, Callable[[Path], None]] = {"out/model": _starter}


class Story:
    """The folder of a page, and the blocks that ran in it.

    Small models stand for the large ones: random ones in the public layout, and the starter for what runs leave.
    """

    def __init__(self, folder: Path, page: str):
        self.folder, self.output, self._done = folder, "", set()
        for name in LINKS:
            (folder / name).symlink_to(ROOT / name)
        for name in PICTURES:
            (folder / name).parent.mkdir(exist_ok=True)
            Image.open(demo_path("images/cat.jpg")).convert("RGB").save(folder / name)
        for name, text in TEXTS.items():
            (folder / name).write_text(text, encoding="utf-8")
        for name in TABLES:
            (folder / name).write_text("index\n", encoding="utf-8")
        for name, put in {**EVERYWHERE, **GIVEN.get(page, OTHERS)}.items():
            put(folder / name)

    def through(self, block: Block, before: list[Block]) -> None:
        """Runs a block after those of its page that stand before it; for one that is not slow, without the slow ones.

        Args:
            block: to be run.
            before: all blocks of the page that stand before it.
        """
        for one in [*before, block]:
            if one not in self._done and (block.kind == "slow" or one.kind != "slow"):
                self._done.add(one)
                self._run(one)

    def _run(self, block: Block) -> None:
        if block.kind in ("run by", "not run") or block.generated:
            look_at(block)
        elif block.kind == "file":
            write(block)
        elif block.kind == "output":
            pieces = [piece.strip() for piece in re.split(r"\.\.\.|\n", block.text)]
            missing = lacks([piece for piece in pieces if piece], self.output)
            assert missing is None, f"{block.where}: the block before does not print '{missing}', but\n{self.output}"
        elif block.kind == "names files of":
            gone = [name for name in re.findall(r"\w+/\w+", block.text)
                    if not any((ROOT / block.about / f"{name}{ending}").exists() for ending in ("", ".py"))]
            assert not gone, f"{block.where}: {block.about} has no {', '.join(gone)}"
        else:
            self.output = {"bash": run_bash, "python": run_python, "yaml": check_yaml}[block.language](block)


def run_bash(block: Block) -> str:
    """Runs a shell block in the working folder; returns what it printed."""
    done = bash(block.text)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{block.where} ends with code {done.returncode}:\n{output[-3000:]}"
    missing = lacks(printed(block.text), done.stdout)
    assert missing is None, f"{block.where}: '{missing}' is not printed, but\n{done.stdout[-3000:]}"
    return output


def bash(text: str) -> subprocess.CompletedProcess:
    """Runs a shell's text, with this interpreter and the command that is installed beside it.

    It is a session of its own, so that no signal to the group that the tests run in ends one of its commands.
    """
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return subprocess.run(["bash", "-euo", "pipefail", "-c", text], capture_output=True, text=True, timeout=1800,
                          stdin=subprocess.DEVNULL, start_new_session=True,
                          env={**os.environ, "PATH": os.pathsep.join(places)})


def run_python(block: Block) -> str:
    """Executes a Python block; returns what it printed."""
    import mindspore as ms

    printed_text = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed_text):
            exec(compile(block.text, block.where, "exec"), {"__name__": "__main__"})
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)      # as all tests have it
    missing = lacks(printed(block.text), printed_text.getvalue())
    assert missing is None, f"{block.where}: '{missing}' is not printed, but\n{printed_text.getvalue()}"
    return printed_text.getvalue()


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """What is looked at is for Ascend, which need not be here, and for the 7B model, for which small ones stand in."""
    with mock.patch.dict(os.environ, {SIMULATED: "0"}), mock.patch.object(early, "begin"):
        yield


def check_yaml(block: Block) -> str:
    """Looks at a YAML block as `run` does before MindFormers is imported; a part of a recipe is put into one."""
    path = Path(f"block_{block.line}.yaml")
    base = "" if "base_config:" in block.text else f"base_config: {block.about or 'ixc25_sft_tiny'}.yaml\n"
    path.write_text(base + block.text, encoding="utf-8")
    fields = read_yaml(path)
    check_version(fields, str(path))
    words = ["run", "--config", str(path), "--output_dir", path.stem]
    if not fields["train_dataset"]["data_loader"]["dataset_dir"]:        # a 7B recipe leaves that to the user
        data = "held_out.json"
        if fields["train_dataset_task"]["type"] == "IXC25PreferenceDataset":
            data = f"{path.stem}.json"
            Path(data).write_text(json.dumps(PAIR), encoding="utf-8")
        words += ["--train_dataset.data_loader.dataset_dir", data,
                  "--train_dataset.tokenizer.vocab_file", str(demo_path("tokenizer.model"))]
    degrees = fields.get("parallel_config") or {}
    devices = math.prod(degrees.get(name) or 1 for name in ("data_parallel", "model_parallel", "pipeline_stage"))
    with elsewhere():
        check_early(mindformers_ixc_cli.parse(words), devices if fields.get("use_parallel") else None)
    return ""


def write(block: Block) -> None:
    """Writes a block to the file that its mark names; data are read as a run reads them."""
    path = Path(block.about)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text, encoding="utf-8")
    if path.suffix in (".json", ".jsonl", ".csv", ".tsv"):
        pairs = any(key in block.text for key in ('"chosen"', '"conversations_a"'))
        load = load_preferences if pairs else partial(load_conversations, weighs='"weight"' in block.text)
        assert load(path), f"{block.where} has no sample"


def look_at(block: Block) -> None:
    """Says of a block that is not run what can be said: commands are parsed, and their input must be right and there.

    Commands that do not import MindFormers take no time, so they run; `plan` does not compile. What is to be trained is
    there for the commands after it. Other languages are parsed.
    """
    if block.language in PARSERS:
        PARSERS[block.language](block.text)
    if block.language not in SHELLS:
        return
    problems = repository_problems(block.text)
    assert not problems, f"{block.where}: {', '.join(problems)}"
    for words, whole in commands(block.text):
        command = f"{block.where}: `mindformers {shlex.join(words)}`"
        try:
            arguments = mindformers_ixc_cli.parse(words)
            if not whole:
                continue
            with elsewhere():
                check_inputs(arguments, arguments.options)
        except SystemExit:
            raise AssertionError(f"{command} is not parsed") from None
        except (ValueError, OSError) as error:
            raise AssertionError(f"{command}: {error}") from error
        if block.generated:
            continue
        if words[0] in ("run", "launch") and "serve" not in words:
            _leave(arguments.run if words[0] == "launch" else arguments)
        elif words[0] in QUICK and not (words[0] == "init" and arguments.model):      # a model of 7B is not there
            done = bash(shlex.join(["mindformers", *words, *(["--no_compile"] if words[0] == "plan" else [])]))
            assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"


def _leave(arguments: argparse.Namespace) -> None:
    """The starter stands for the model that a run leaves, a random one for that of a reward run."""
    fields = merged_fields(arguments)
    folder = Path(fields.get("output_dir") or "output")
    if not (folder / "model").exists():
        is_reward = "IXC25ForReward" in json.dumps(fields.get("model"))
        (_reward if is_reward else _starter)(folder / "model")
