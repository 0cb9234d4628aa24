"""Writes what can be computed into the pages of docs/: commands, versions, sizes, memory, fields, messages.

    python scripts/write_docs.py            # rewrites what stands between the marker lines, everything else stays
    python scripts/write_docs.py --check    # 1 if a page is not what the code says

MindSpore is not imported. tests/test_docs.py holds the pages to it.
"""
from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from error_sentences import Sentence, collect

from mindformers_ixc.benchmarking.catalogue import BENCHMARKS
from mindformers_ixc.cli.parsers import build_parser
from mindformers_ixc.cli.yaml_docs import fields_text, section_text
from mindformers_ixc.cli.yaml_file import apply_overrides, read_yaml, tie_data_section
from mindformers_ixc.cli.yaml_keys import SECTIONS
from mindformers_ixc.config import ModelConfig
from mindformers_ixc.doctor.versions import PAIRS
from mindformers_ixc.parameters import parameter_table
from mindformers_ixc.planning.memory import stage_memory
from mindformers_ixc.planning.workload import local_parameters, place, read_workload
from mindformers_ixc.processing.image import image_token_count, plan_partition

ROOT = Path(__file__).resolve().parents[1]
GIB = 2 ** 30

# Of the plans in docs/weights.md: what is trained, recipe, devices, tensor-parallel degree, further words.
BF16 = "--model.model_config.param_init_type bfloat16"
PLANS = [("everything", "ixc25_sft", 1, 1, ""), ("everything", "ixc25_sft", 2, 2, ""),
         ("everything", "ixc25_sft", 4, 4, ""), ("everything", "ixc25_sft", 8, 4, ""),
         ("everything", "ixc25_sft_16", 16, 4, ""), ("everything", "ixc25_sft_64", 32, 4, ""),
         ("everything", "ixc25_sft_64", 64, 4, ""),
         ("a LoRA", "ixc25_web", 1, 1, ""), ("a LoRA, all weights in bfloat16", "ixc25_web", 1, 1, BF16),
         ("a LoRA", "ixc25_web", 2, 2, ""), ("a LoRA, all weights in bfloat16", "ixc25_web", 2, 2, BF16),
         ("a LoRA", "ixc25_web", 4, 2, ""), ("a LoRA", "ixc25_web", 8, 4, ""),
         ("a LoRA", "ixc25_web_16", 16, 4, ""), ("a LoRA", "ixc25_web_64", 32, 4, ""),
         ("a LoRA", "ixc25_web_64", 64, 4, "")]

# Pictures of docs/sizes.md, width and height in pixels.
PICTURES = ((560, 560), (800, 600), (1280, 720), (1920, 1080), (1080, 1920), (2480, 3508), (4096, 512))

# Topics of docs/troubleshooting.md, each with its introduction and its modules: the longest beginning of a path counts.
TOPICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Data and pictures": (
        "From `run`, `data`, `init`, `chat` and `eval`, before a run starts or when a request is read: conversations, "
        "tables, pictures, videos, questions. The forms of data are in [data.md](data.md), those of requests in "
        "[inference.md](inference.md).",
        ("data/", "processing/", "native/", "demo/", "cli/data", "cli/init_data", "cli/chat_pictures",
         "generation/requests", "generation/webpage", "generation/predict", "generation/shares",
         "training/datasets", "planning/rows")),
    "YAML and options": (
        "From every command that reads a YAML, a `config.json` or words of the command line, at once and before "
        "anything is loaded. The keys are in [yaml.md](yaml.md), the options in [commands.md](commands.md). Of every "
        "section a wrong value is told as `KEY is VALUE; it must be ...` or `KEY is VALUE; the choices are ...`, a "
        "missing key as `SECTION lacks KEY.`, and one that there is not as `unknown key KEY (value VALUE); did you "
        "mean ...?`.",
        ("cli/", "config", "rope", "sections", "resources", "decoding_options", "preference_options",
         "grpo_options", "training_options", "generation/options", "models/", "scores", "training/parts",
         "training/pet", "mindformers_ixc_cli")),
    "Checkpoints and weights": (
        "From `convert`, `inspect`, `merge`, and from whatever loads a model. Formats and digests are in "
        "[checkpoints.md](checkpoints.md), the public weights in [weights.md](weights.md).",
        ("checkpoint/", "cli/checkpoints", "hub", "registration", "convert_weight")),
    "Serving": (
        "From `serve`, before its port opens, and from `chat --server`. What a running server says to a request is in "
        "its answer, with the name of the field; [serving.md](serving.md) has fields and limits.",
        ("serving/", "cli/serve", "cli/early_serve", "cli/chat_server")),
    "Layouts and parallel runs": (
        "From `launch`, `plan` and runs with `use_parallel`: degrees, batches, ranks and their folders. "
        "[parallel.md](parallel.md) has the keys, [scaling.md](scaling.md) the plans.",
        ("parallel/", "planning/", "cpu_cluster/", "cli/launch", "cli/job", "cli/plan", "training/relayout",
         "training/joining")),
    "Device and installation": (
        "What is missing on the machine, or what a device does not take. `mindformers doctor` looks at all of it; "
        "[install.md](install.md) says what belongs together.",
        ("device", "doctor/", "generation/ascend", "generation/slots", "cpu_cluster/build", "cli/templates")),
    "Training and resuming": (
        "From a run on its way, at its start from a checkpoint or at its end. [training.md](training.md) describes the "
        "output folder, checkpoints and signals.",
        ("training/", "trackers", "interruption", "operations")),
    "Other": ("Answers, chat, reports and files that any command reads or writes.",
              ("", "generation/", "cli/chat", "cli/settings", "cli/report", "cli/answer_file")),
}


def commands_text() -> str:
    """Every command with its usage, options and examples, from the parser."""
    return "\n\n".join(_command(name, parser) for name, parser in sorted(_commands(build_parser()).items()))


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Parsers of the subcommands by name."""
    return next(dict(action.choices) for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    """The section of one command."""
    rows = [_option(action) for action in parser._actions if action.dest != "help" and action.help != argparse.SUPPRESS]
    blocks = [f"## {name}", parser.description or "", "\n".join(["| option | meaning |", "|---|---|", *rows])]
    example, _, text = (parser.epilog or "").partition("\n")
    if text:
        lines = [re.sub(r"^  ", "", line) for line in text.splitlines()]
        blocks += [example.rstrip(":").capitalize() + ":", "\n".join(["```bash", *lines, "```"])]
    return "\n\n".join(block for block in blocks if block)


def _option(action: argparse.Action) -> str:
    """The row of one option; its default where the help does not say it."""
    values = "" if action.nargs == 0 else f" {_values(action)}"
    names = ", ".join(f"`{name}{values}`" for name in action.option_strings) or f"`{_values(action)}`"
    text = action.help or ""
    if action.required and action.option_strings:
        text += " (required)"
    default = action.default
    if default not in (None, False, "", argparse.SUPPRESS) and default != [] and "default" not in text:
        text += f" (default: {default})"
    return f"| {names} | {_cell(text)} |"


def _values(action: argparse.Action) -> str:
    """What stands behind an option, as its usage shows it."""
    shown = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper())
    if isinstance(shown, tuple):
        return " ".join(shown)
    return {"+": f"{shown} ...", "*": f"[{shown} ...]", "?": f"[{shown}]"}.get(str(action.nargs), str(shown))


def _cell(text: str) -> str:
    return (text % {"default": "", "prog": "mindformers"} if "%(" in text else text.replace("%%", "%")) \
        .replace("|", r"\|").replace("<", "&lt;")


def pairs_text() -> str:
    """The table of versions that go together."""
    rows = [f"| {pair.mindspore} | {pair.mindformers} | {pair.cann} | {pair.driver} | {', '.join(pair.python)} | "
            f"{_linked(pair.source)} |" for pair in PAIRS]
    return "\n".join(["| MindSpore | MindFormers | CANN | driver and firmware | Python | source |",
                      "|---|---|---|---|---|---|", *rows])


def _linked(text: str) -> str:
    text = text.replace("scripts/check_matrix.sh", "`check_matrix.sh`")
    return re.sub(r"(https?://[^\s;]+)", r"[MindFormers](\1)", text)


def memory_text() -> str:
    """What a device holds for each plan, by formula."""
    head = ["| trains | devices | dp x tp | parameters | gradients | optimizer | activations | GiB a device | fits |",
            "|---|---|---|---|---|---|---|---|---|"]
    return "\n".join([*head, *map(_plan_row, PLANS)])


def _plan_row(plan: tuple[str, str, int, int, str]) -> str:
    what, recipe, devices, degree, more = plan
    fields = read_yaml(ROOT / "yaml_configs" / f"{recipe}.yaml")
    words = more.split()
    apply_overrides(fields, {key[2:]: value for key, value in zip(words[::2], words[1::2])})
    tie_data_section(fields)
    workload = place(read_workload(fields), devices, {"model_parallel": degree, "pipeline_stage": 1})
    memory = max((stage_memory(workload, stage, parameters) for stage, parameters in
                  enumerate(local_parameters(workload))), key=lambda stage: stage.total)
    parts = (memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.total)
    fits = "yes" if memory.total <= 58 * GIB else "no"
    layout = f"{workload.layout.data_parallel} x {degree}"
    return f"| {what} | {devices} | {layout} | {' | '.join(f'{part / GIB:.1f}' for part in parts)} | {fits} |"


def plan_commands_text() -> str:
    """The commands behind `memory_text`."""
    lines = [f"mindformers plan --config yaml_configs/{recipe}.yaml --devices {devices} --model_parallel {degree} "
             f"--no_compile{' ' if more else ''}{more}" for _, recipe, devices, degree, more in PLANS]
    return "\n".join(["```bash", *lines, "```"])


def chat_text() -> str:
    """What the weights and the cache of a chat take, by sizes of the public model."""
    whole = _numbers(ModelConfig())
    without = _numbers(ModelConfig(task_lora_ranks={}))
    rows = []
    for name, numbers in (("all of it, the three task LoRAs too", whole),
                          ("without task LoRAs (`convert --drop sft dpo web`)", without)):
        rows.append(f"| {name} | {numbers / 1e9:.2f} | {2 * numbers / 1e9:.1f} GB | {2 * numbers / GIB:.1f} | "
                    f"{4 * numbers / GIB:.1f} | {1.2 * 4 * numbers / GIB:.0f} |")
    return "\n".join(["| weights | 10^9 numbers | on disk | GiB in bfloat16 (Ascend) | GiB in float32 (CPU) | "
                      "peak on a CPU, 1.2 times |", "|---|---|---|---|---|---|", *rows])


def _numbers(config: ModelConfig) -> int:
    return sum(math.prod(entry.shape) for entry in parameter_table(config).values())


def sizes_text() -> str:
    """Tiles and positions of pictures, by the public rules of inference and training."""
    rows = []
    for width, height in PICTURES:
        cells = []
        for training, hd_num in ((False, 24), (True, 18)):
            grid = plan_partition(width, height, hd_num, training=training).grid
            cells.append(f"{grid.rows} x {grid.columns} = {grid.tiles} | {image_token_count(grid, 20):,}")
        rows.append(f"| {width} x {height} | {' | '.join(cells)} |")
    return "\n".join(["| picture | tiles in chat (of 24) | positions | tiles in training (of 18) | positions |",
                      "|---|---|---|---|---|", *rows])


def benchmarks_text() -> str:
    """Every public benchmark: how it is asked and scored, and what the paper has."""
    rows = []
    for one in BENCHMARKS.values():
        paper = "" if one.paper is None else f"{one.paper:.1f}"
        rows.append(f"| `{one.name}` | {one.prompt} | {one.max_new_tokens} | {one.metric or 'a judge'} | {paper} | "
                    f"{one.note.replace('scored by VLMEvalKit with a judge; ', '')} |")
    return "\n".join(["| data set | prompt | new tokens | scored by | paper | |", "|---|---|---|---|---|---|", *rows])


def messages_text() -> str:
    """Every error sentence of the package: topics, in them modules, in them sentences."""
    sentences, parts = collect(ROOT), []
    for topic, (introduction, _) in TOPICS.items():
        parts += [f"## {topic}", introduction]
        chosen = [sentence for sentence in sentences if _topic(sentence.sources[0].path) == topic]
        for path in dict.fromkeys(sentence.sources[0].path for sentence in chosen):
            own = [sentence for sentence in chosen if sentence.sources[0].path == path]
            parts += [f"**`{path}`**: {own[0].sources[0].about}", "\n".join(map(_item, own))]
    return "\n\n".join(parts)


def _topic(path: str) -> str:
    """Which topic a module's sentences belong to."""
    return max((len(start), topic) for topic, (_, starts) in TOPICS.items() for start in starts
               if path.startswith(start))[1]


def _item(sentence: Sentence) -> str:
    """A sentence as an item of a list, as code: it stands there as a terminal shows it."""
    text = f"`` {sentence.text} ``" if "`" in sentence.text else f"`{sentence.text}`"
    others = ", ".join(f"`{source.path}`" for source in sentence.sources[1:])
    return f"- {text}" + (f" (also {others})" if others else "")


BLOCKS: dict[str, Callable[[], str]] = {
    "fields": fields_text, **{f"keys {name or 'top'}": partial(section_text, name) for name in SECTIONS},
    "commands": commands_text, "versions": pairs_text, "memory": memory_text, "plan commands": plan_commands_text,
    "benchmarks": benchmarks_text, "chat memory": chat_text, "picture sizes": sizes_text, "messages": messages_text}

_BLOCK = re.compile(r"^(<!-- (\w[\w. ]*): begin -->\n).*?^(<!-- \2: end -->)$", re.MULTILINE | re.DOTALL)


def written(text: str) -> str:
    """A page with today's blocks between its markers."""
    return _BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", text)


def pages() -> Iterator[tuple[Path, str]]:
    """Every page that has a block, with what it should be."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if _BLOCK.search(text):
            yield page, written(text)


def main() -> int:
    """Rewrites the pages, or says which are stale."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a page is stale")
    check = parser.parse_args().check
    stale = [(page, text) for page, text in pages() if page.read_text(encoding="utf-8") != text]
    for page, text in stale:
        print(f"{page.relative_to(ROOT)} {'is stale' if check else 'written'}")
        if not check:
            page.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
