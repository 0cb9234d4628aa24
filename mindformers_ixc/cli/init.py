"""`mindformers init`: a YAML file for data of one's own, from a few answers. MindFormers is not imported."""
from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mindformers_ixc import terminal
from mindformers_ixc.checkpoint.quantised import SECTION, refuse_quantised
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.cli.init_data import describe, measure
from mindformers_ixc.cli.init_text import Choices, next_steps, yaml_text
from mindformers_ixc.cli.inputs import read_memory
from mindformers_ixc.cli.yaml_file import read_yaml
from mindformers_ixc.config import CONFIG_FILE, ModelConfig, read_config
from mindformers_ixc.data.folders import find_data
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.files import check_target, read_json, write_whole
from mindformers_ixc.parameters import parameter_table
from mindformers_ixc.resources import STARTER, resolve_model
from mindformers_ixc.tables import columns_of, wrapped

# Parameters from which on a model is trained by the recipes of the 7B model.
LARGE = 10 ** 9

DEVICES = ("CPU", "GPU", "Ascend")

# Devices that there are 7B recipes for, and their memory.
COUNTS, MEMORY = ("8", "16", "64"), "64GB"


def init(arguments: argparse.Namespace) -> int:
    """Asks for what no option says, checks it, writes the YAML and prints what to type next.

    Questions are asked on a terminal only; elsewhere what was not said takes its default.

    Raises:
        ConfigError: for an unusable answer, or a file that is there already.
        DataError: for unusable data, in the sentences of a run.
    """
    ask = Questions(arguments)
    data = ask("data", None, find_data, "Your data: a folder with pictures and a CSV table (columns image, question, "
               "answer), or a .csv, .json, .jsonl or .txt file")
    model = ask("model", STARTER, _model, "Model to begin with: a model directory, or starter, the small trained one "
                "of this package")
    large = is_large(read_config(model))
    device = ask("device", "Ascend" if large else "CPU", _one_of(DEVICES), f"Device: {', '.join(DEVICES)}")
    if large and device != "Ascend":
        raise ConfigError(f"{model} has the size of the 7B recipes, which are for Ascend; give --device Ascend, or "
                          f"begin with --model {STARTER}.")
    devices = int(ask("devices", COUNTS[0], _one_of(COUNTS), f"Devices: {', '.join(COUNTS)}")) if large else 1
    _check_idle(arguments, large, device)
    memory = ask("memory", MEMORY, _memory, "Memory of a device") if device != "CPU" else None
    target = ask("output", "my.yaml", _unused if not arguments.overwrite else _file, "YAML file to write")
    with terminal.current.doing(f"Reading {data}", at_once=True):
        measured = measure(data, model)
    choices = Choices(data, model, device, memory, devices, large)
    write_whole(target, yaml_text(choices, target, measured))
    room = columns_of(arguments.answers)
    for line in [*describe(data, ask.given["data"], measured), *next_steps(choices, target, measured)]:
        print(*([line] if line.startswith(terminal.COMMAND) else wrapped(line, room)), sep="\n", file=arguments.answers)
    return 0


def _check_idle(arguments: argparse.Namespace, large: bool, device: str) -> None:
    """Refuses options that cannot be followed, in place of passing over them.

    Raises:
        ConfigError: for several devices of a small model, and a size of memory that is none.
    """
    if not large and arguments.devices not in (None, "1"):
        raise ConfigError(f"--devices is {arguments.devices}; a model of this size trains on one device. Leave it out, "
                          "or begin with the 7B model (--model).")
    if device == "CPU" and arguments.memory is not None:
        _memory(arguments.memory)


def is_large(config: ModelConfig) -> bool:
    """Whether a model is trained by the 7B recipes."""
    return sum(math.prod(entry.shape) for entry in parameter_table(config).values()) >= LARGE


class Questions:
    """Answers: an option's value, else what is typed, else the default.

    Attributes:
        given: the answers as they were given, by name.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.given: dict[str, str] = {}
        self.asks = sys.stdin.isatty()

    def __call__(self, name: str, default: str | None, check: Callable[[str], str], text: str) -> str:
        """One answer, checked; what was typed wrongly is asked for again.

        Args:
            name: of the option.
            default: what an empty line stands for; `None`: there is none.
            check: gives the value of an answer, or raises what is wrong with it.
            text: the question.

        Raises:
            ConfigError: when there is no answer.
        """
        said = getattr(self.arguments, name)
        if said is None and not self.asks:
            said = default
        if said is not None:
            return self._checked(name, said, check)
        while self.asks:
            terminal.current.say(f"{text}{f' [{default}]' if default else ''}")
            try:
                typed = input("> ").strip() or default
            except EOFError:
                break
            try:
                if typed:
                    return self._checked(name, typed, check)
            except (ValueError, OSError) as error:
                terminal.current.fault(str(error))
        raise ConfigError(f"mindformers init needs --{name}. {text}.")

    def _checked(self, name: str, said: str, check: Callable[[str], str]) -> str:
        if not said.isprintable():
            raise ConfigError(f"--{name} {said!r:.80} has a character that cannot be printed and would break "
                              "a line of the YAML; rename the file.")
        self.given[name] = said
        return check(said)


def _model(given: str) -> str:
    """A model directory's name that is fit to begin with."""
    directory = given if given == STARTER else str(Path(given).expanduser())
    config = read_config(directory)
    if SECTION in read_json(resolve_model(directory) / CONFIG_FILE, ConfigError):
        refuse_quantised(open_source(resolve_model(directory), verify=False), "training")
    section = read_yaml("ixc25_own_tiny.yaml")["model"]["model_config"]
    if not is_large(config) and (config.hidden_size, config.num_hidden_layers) != (
            section["hidden_size"], section["num_hidden_layers"]):
        raise ConfigError(f"{given} has neither the size of the 7B model nor that of the tiny recipes (hidden_size "
                          f"{section['hidden_size']}); docs/yaml.md says how a YAML for it is written.")
    return directory


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """A check that takes a few words, however they are capitalised."""
    def check(given: str) -> str:
        found = next((choice for choice in choices if choice.lower() == given.strip().lower()), None)
        if found is None:
            raise ConfigError(f"'{given}' is none of the choices {', '.join(choices)}.")
        return found

    return check


def _memory(given: str) -> str:
    read_memory(given, "--memory")
    return given.strip()


def _file(given: str) -> str:
    """A file that can be written; it gets the ending of a YAML."""
    path = Path(given).expanduser()
    target = str(path if path.suffix in (".yaml", ".yml") else path.with_name(f"{path.name}.yaml"))
    check_target(target, "--output")
    return target


def _unused(given: str) -> str:
    """The same, of a file that is not there."""
    target = _file(given)
    if Path(target).exists():
        raise ConfigError(f"{target} is there already; give another --output, or --overwrite to replace it.")
    return target
