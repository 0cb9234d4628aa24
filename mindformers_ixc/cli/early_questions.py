"""What can be said of a question to a model before MindFormers is imported, so that a mistake costs no wait."""
from __future__ import annotations

import argparse
import os

from mindformers_ixc.checkpoint.quantised import quantization_of, refuse_quantised, stored_weights
from mindformers_ixc.cli.early import SMALL, checkpoint_of
from mindformers_ixc.config import read_fields
from mindformers_ixc.data.preferences import load_preferences
from mindformers_ixc.decoding_options import LEAST_TEMPERATURE, RULES, check_reward
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.fields import FIELDS, field_rule
from mindformers_ixc.generation.preference_pairs import ENDINGS
from mindformers_ixc.generation.sampled_answers import LEAST_SAMPLES
from mindformers_ixc.processing.pictures import image_size
from mindformers_ixc.processing.prompt import check_asked
from mindformers_ixc.processing.tokenizer import check_directory
from mindformers_ixc.processing.video import is_video
from mindformers_ixc.resources import resolve_model, resolve_path
from mindformers_ixc.sections import Rule, above_0, check_value, is_number, whole

# Whole numbers of the command line that the decoder has no rule for.
COUNTS = {**dict.fromkeys(("hd_num", "batch_size", "max_length"), whole(1)),
          "num_samples": whole(LEAST_SAMPLES, "; of fewer none is better than another"),
          "reuse_bytes": field_rule("reuse_bytes", FIELDS["reuse_bytes"])}

# Which pairs `label` keeps.
LIMITS = {"min_margin": Rule(lambda value: is_number(value) and value >= 0, "a number of at least 0"),
          "max_length_ratio": above_0()}


def check_question(arguments: argparse.Namespace) -> None:
    """Refuses options of decoding that can have no effect or no meaning, pictures that are none, and models in part.

    Args:
        arguments: of `chat`, `eval`, `score` or `reference`; `model` is a directory with a config.json of this model,
            or `None` where a server has it.

    Raises:
        ConfigError: for an option's value.
        ImageError: for a picture that cannot be read.
        PromptError: for an empty question without a picture.
        DataError: for preference pairs that are none, where reading them takes no time.
        CheckpointError: for a model directory without weights, or with damaged ones; for a reward model that is asked
            for answers, and the other way round.
        FileNotFoundError: for one without a tokenizer, or a device that is not there.
    """
    _check_values(arguments, {**RULES, **COUNTS})
    if getattr(arguments, "command", None) == "sample" and arguments.temperature < LEAST_TEMPERATURE:
        raise ConfigError(f"--temperature is {arguments.temperature}; at less than {LEAST_TEMPERATURE} all samples "
                          "would be the likeliest answer, so give a larger one.")
    if getattr(arguments, "do_sample", False) and not arguments.temperature:
        raise ConfigError("--temperature is 0 and --do_sample is given; sampling takes a temperature above 0, and "
                          "without --do_sample the likeliest token is taken.")
    _check_best_of(arguments)
    lookup = getattr(arguments, "prompt_lookup", 0)
    for name, idle in (("do_sample", False), ("num_beams", 1)):
        if lookup and getattr(arguments, name, idle) != idle:
            raise ConfigError(f"--prompt_lookup is {lookup} and --{name} is given; what it proposes is verified by "
                              "greedy decoding, so leave one of them out.")
    question, pictures = getattr(arguments, "question", None), getattr(arguments, "image", None) or []
    if question is not None:
        check_asked(question, bool(pictures))
    for picture in pictures:
        if not is_video(picture):
            image_size(resolve_path(picture))
    if getattr(arguments, "pairs", None) and resolve_path(arguments.pairs).stat().st_size <= SMALL:
        load_preferences(arguments.pairs, arguments.image_folder, arguments.image_root, arguments.ignore_keys)
    if getattr(arguments, "server", None) is not None:
        if arguments.model is not None:
            raise ConfigError("--model and --server are both given; a server has its own model, leave one of them out.")
        return
    if arguments.model is None:
        raise ConfigError("Neither --model nor --server is given; name a model directory, or a server to ask.")
    check_directory(resolve_model(arguments.model))
    source = checkpoint_of(arguments.model, getattr(arguments, "command", None) == "score")
    if source is None:
        return
    if getattr(arguments, "command", None) == "reference":
        refuse_quantised(source, "reference")
    quantization = quantization_of(source)
    if quantization is not None:
        stored_weights(source, quantization)


def check_label(arguments: argparse.Namespace) -> None:
    """Refuses limits that are none, a file of pairs that would replace what it is made of, and other models.

    Args:
        arguments: of `label`.

    Raises:
        ConfigError: for an option's value or the file's name.
        CheckpointError: for a reward model that is none.
    """
    _check_values(arguments, {**COUNTS, **LIMITS})
    if not arguments.target.endswith(ENDINGS):
        raise ConfigError(f"DST is {arguments.target}; a file of pairs ends in {' or '.join(ENDINGS)}.")
    for given in (arguments.sampled, arguments.judge):
        if given and os.path.realpath(given) == os.path.realpath(arguments.target):
            raise ConfigError(f"DST is {arguments.target}, which the pairs are made of; name another file.")
    scores = os.path.splitext(os.path.realpath(arguments.target))[0] + ".scores.jsonl"
    if arguments.reward is not None and os.path.realpath(arguments.sampled) == scores:
        raise ConfigError(f"SAMPLES is {arguments.sampled}, which is where the scores of DST {arguments.target} are "
                          "kept; name another DST.")
    if arguments.reward is not None:
        read_fields(arguments.reward)
        check_directory(resolve_model(arguments.reward))
        checkpoint_of(arguments.reward, scores=True)


def _check_values(arguments: argparse.Namespace, rules: dict[str, Rule]) -> None:
    """Refuses options that are given and break their rule."""
    for name, rule in rules.items():
        value = getattr(arguments, name, None)
        if value is not None:
            check_value(f"--{name}", value, rule, ConfigError)


def _check_best_of(arguments: argparse.Namespace) -> None:
    """Looks at what chooses among several samples, and lets them be sampled."""
    count, reward = getattr(arguments, "best_of", None), getattr(arguments, "reward", None)
    check_reward(count, reward, vars(arguments))
    if reward is not None:
        checkpoint_of(reward, scores=True)
    if count is not None:
        arguments.do_sample = True
