"""What `mindformers init` writes: the YAML file, and the commands to type next."""
from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from mindformers_ixc.cli.init_data import Measured
from mindformers_ixc.cli.inputs import read_memory
from mindformers_ixc.data.questions import as_typed
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.resources import STARTER, is_starter

# Little data: steps of a run, and epochs at least and at most. The tiny recipe learns 56 questions in 560 steps from
# nothing, with 40 epochs.
STEPS, EPOCHS = 480, (3, 60)
BATCH_SIZE = 4

# Of a run of the tiny model on one core, for an estimate.
SECONDS_A_STEP = 0.3

# Devices of a server, of which the recipe has no number in its name.
SERVER = 8

# Both names of the data section mean one section.
TIES = ("train_dataset_task: {dataset_config: *train_dataset}",)

# Share of a device's memory that MindSpore may take, as in the 7B recipes.
SHARE = 58 / 64

# Positions of a sample that a run on a laptop can be asked to hold.
MOST_POSITIONS = 1024


@dataclass(frozen=True)
class Choices:
    """What was asked.

    Attributes:
        data: file of the data.
        model: model directory, or the shipped one's name.
        device: as in `context.device_target`.
        memory: of a device, as text; `None` where it does not matter.
        devices: of the run.
        large: whether the recipes are those of the 7B model.
    """

    data: str
    model: str
    device: str
    memory: str | None
    devices: int
    large: bool


def yaml_text(choices: Choices, target: str, measured: Measured) -> str:
    """The YAML file.

    Args:
        choices: what was asked.
        target: name of the file.
        measured: the data.

    Raises:
        ConfigError: for samples that are too long for a run of this size.
    """
    return _large(choices, target) if choices.large else _small(choices, target, measured)


def text(value: str) -> str:
    """A text as YAML reads it back, whatever is in it."""
    return json.dumps(value, ensure_ascii=False)


def output_of(target: str, data: str) -> str:
    """The run's folder, beside the YAML file and called like it; another one if the data lies there."""
    folder = Path(target).with_suffix("")
    inside = folder.resolve() in Path(data).resolve().parents
    return str(folder.with_name(f"{folder.name}_run") if inside else folder)


def epochs_for(steps: int) -> int:
    """Epochs of so many steps after which little data is learnt."""
    fewest, most = EPOCHS
    return max(fewest, min(most, math.ceil(STEPS / steps)))


def batches(measured: Measured) -> tuple[int, int]:
    """Samples of a step, and steps of an epoch, of little data; a batch is of one kind."""
    size = min(BATCH_SIZE, measured.fewest_of_a_kind)
    return size, measured.samples // size


def _noted(line: str, note: str) -> str:
    """A line of YAML with a comment, in the column where recipes have theirs."""
    return f"{line:<40} # {note}"


def _small(choices: Choices, target: str, measured: Measured) -> str:
    """A run of the tiny model."""
    samples, longest = measured.samples, measured.longest.positions
    if longest > MOST_POSITIONS:
        raise ConfigError(f"{measured.longest.where} is {longest} positions long; the tiny model is for "
                          f"{MOST_POSITIONS} at most. Shorten its text, or take fewer pictures in one sample.")
    size, steps = batches(measured)
    epochs = epochs_for(steps)
    starter = is_starter(choices.model)
    other = "or a model directory, to go on with that one" if starter else f"or {STARTER}, the shipped one"
    lines = [
        f"# Written by `mindformers init` for {choices.data}: {samples} samples.",
        "# Any key of a recipe can be changed here, or on the command line: --runner_config.epochs 20.",
        "#",
        f"#   mindformers run --config {shlex.quote(target)}",
        "",
        _noted("base_config: ixc25_own_tiny.yaml", "the shipped recipe that this file changes"),
        "",
        _noted(f"output_dir: {text(output_of(target, choices.data))}", "the trained model comes to its folder `model`"),
        _noted(f"load_checkpoint: {text(choices.model)}", f"what the run begins with; {other}"),
        "",
        "runner_config:",
        _noted(f"  epochs: {epochs}", "times that every sample is seen; more if answers are still wrong"),
        _noted(f"  batch_size: &batch_size {size}", f"{steps} steps an epoch, {steps * epochs} in all"),
        "",
        "train_dataset: &train_dataset",
        "  data_loader:",
        _noted(f"    dataset_dir: {text(choices.data)}", "relative to where the command is typed"),
        *([] if starter else [_tokenizer(choices.model)]),
        _noted(f"  seq_length: &seq_length {_rounded(longest)}", f"the longest sample is {longest} positions"),
        _noted(f"  max_tiles: &max_tiles {max(2, measured.tiles)}", "tiles of a sample at most, with global views"),
        "  batch_size: *batch_size",
        *TIES, "",
        "model:",
        "  model_config:",
        "    seq_length: *seq_length",
        "    max_tiles: *max_tiles",
        *([] if choices.device == "CPU" else ["", _device(choices)])]
    return "\n".join(lines) + "\n"


def _large(choices: Choices, target: str) -> str:
    """A run of the 7B model."""
    recipe = "ixc25_sft.yaml" if choices.devices == SERVER else f"ixc25_sft_{choices.devices}.yaml"
    lines = [
        f"# Written by `mindformers init` for {choices.data}: fine-tuning of {choices.model} on {choices.devices} "
        "devices.",
        "# Any key of the recipe can be changed here, or on the command line: --runner_config.epochs 2.",
        f"# Which seq_length and max_tiles suit the data: mindformers data plan {shlex.quote(choices.data)} --config "
        f"{shlex.quote(target)}",
        "#",
        f"#   mindformers plan --config {shlex.quote(target)} --devices {choices.devices}",
        f"#   mindformers launch -n {choices.devices} --config {shlex.quote(target)}",
        "",
        _noted(f"base_config: {recipe}", "the shipped recipe that this file changes"),
        "",
        _noted(f"output_dir: {text(output_of(target, choices.data))}", "the trained model comes to its folder `model`"),
        _noted(f"load_checkpoint: {text(choices.model)}", "what the run begins with"),
        "",
        "train_dataset: &train_dataset",
        "  data_loader:",
        _noted(f"    dataset_dir: {text(choices.data)}", "relative to where the command is typed"),
        _tokenizer(choices.model),
        *TIES, "",
        _device(choices)]
    return "\n".join(lines) + "\n"


def _tokenizer(model: str) -> str:
    return f"  tokenizer: {{vocab_file: {text(str(Path(model) / 'tokenizer.model'))}}}"


def _device(choices: Choices) -> str:
    """The section of the device: MindSpore's limit on its memory."""
    limit = f"{max(1, int(read_memory(str(choices.memory), '--memory') * SHARE / 2 ** 30))}GB"
    return _noted(f"context: {{device_target: {choices.device}, max_device_memory: {limit}}}",
                  f"of {choices.memory}; the rest is the runtime's")


def _rounded(positions: int) -> int:
    return -(-positions // 8) * 8


def next_steps(choices: Choices, target: str, measured: Measured) -> list[str]:
    """What to type next."""
    if choices.large:
        config = shlex.quote(target)
        return [f"{target} is written: fine-tuning of {choices.model} on {choices.devices} devices of "
                f"{choices.memory}.",
                "Ask what it needs, without devices, then train:",
                f"    mindformers plan --config {config} --devices {choices.devices}",
                f"    mindformers launch -n {choices.devices} --config {config}"]
    image, question = as_typed(entry.sides[0] for entry in measured.data.measured)
    model = shlex.quote(str(Path(output_of(target, choices.data)) / "model"))
    steps = batches(measured)[1]
    minutes = max(1, round(steps * epochs_for(steps) * SECONDS_A_STEP / 60))
    begin = "the starter, the small trained model of this package," if is_starter(choices.model) else choices.model
    return [f"{target} is written. The run begins with {begin}",
            f"and takes about {minutes} minute{'s' * (minutes > 1)} on a laptop. Type:",
            f"    mindformers run --config {shlex.quote(target)}",
            f"    mindformers chat --model {model} --image {image} {question}",
            f"    mindformers eval --model {model} --data {shlex.quote(choices.data)}"]
