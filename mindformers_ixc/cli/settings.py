"""How pictures are read and answers decoded: what the command line says, and what a chat changes by `/set`."""
from __future__ import annotations

import argparse
import re

from mindformers_ixc.decoding_options import RULES, GenerationOptions, check_best_of
from mindformers_ixc.errors import GenerationError
from mindformers_ixc.sections import Rule, check_value, hint, whole

# Options that act on sampling only.
SAMPLING = ("temperature", "top_k", "top_p")

# What `/set` changes, in the order in which it is shown.
NAMES = ("do_sample", *SAMPLING, "seed", "num_beams", "repetition_penalty", "max_new_tokens",
         "prompt_lookup", "hd_num", "meta_instruction")

# Values of `/set` that are none of the decoder's.
OWN_RULES = {"hd_num": whole(1, ", or none (the model's own limit)"), "meta_instruction": Rule(lambda value: True, "")}

_WORDS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False, "none": None}


def generation_options(arguments: argparse.Namespace) -> dict:
    """The decoding options among the arguments, under the names of `GenerationOptions`."""
    names = ("max_new_tokens", "do_sample", "temperature", "top_p", "num_beams", "repetition_penalty", "seed",
             "prompt_lookup")
    return without_idle({name: getattr(arguments, name) for name in names
                         if getattr(arguments, name, None) is not None})


def image_options(arguments: argparse.Namespace) -> dict:
    """What was said of pictures, as arguments of `ImageProcessor`."""
    return {name: getattr(arguments, name) for name in ("transparency", "exif")
            if getattr(arguments, name, None) is not None}


def without_idle(options: dict) -> dict:
    """Options without those of sampling where nothing is sampled: there they would only be refused."""
    return options if options.get("do_sample") else {name: value for name, value in options.items()
                                                     if name not in SAMPLING}


class Settings:
    """The settings of a session.

    Args:
        arguments: of `chat`, where a session begins.
    """

    def __init__(self, arguments: argparse.Namespace):
        usual = GenerationOptions()
        self.values = {name: getattr(arguments, name, getattr(usual, name, None)) for name in NAMES}
        self.best_of = getattr(arguments, "best_of", None)

    @property
    def options(self) -> dict:
        """Of the decoder."""
        return without_idle({name: value for name, value in self.values.items()
                             if name in RULES and value is not None})

    def change(self, text: str) -> str:
        """Does what `/set` was given, `NAME VALUE` or `NAME=VALUE`.

        Returns:
            What holds now, as a sentence.

        Raises:
            GenerationError: for an unknown name or a value that it cannot have; nothing is changed then.
        """
        match = re.fullmatch(r"(\w+)(?:\s*=\s*|\s+)(.+)", text, re.DOTALL)
        if match is None:
            raise GenerationError(f"/set takes a name and a value, such as /set temperature 0.7; found {text[:60]!r}. "
                                  "/set alone shows all.")
        name, value = match[1], _value(match[1], match[2].strip())
        if name not in NAMES:
            raise GenerationError(f"There is no setting {name}; {hint(name, NAMES)}")
        changed, note = {**self.values, name: value}, ""
        if name == "temperature" and value == 0:
            changed, note = {**self.values, "do_sample": False}, " The likeliest token is taken from now on."
        elif name in SAMPLING and not self.values["do_sample"]:
            changed["do_sample"], note = True, " Answers are sampled from now on; /set do_sample off ends that."
        elif name == "num_beams" and isinstance(value, int) and value > 1:
            note = " With beams an answer is shown when it is whole."
        _check(name, value, changed)
        if self.best_of is not None:
            if not changed["do_sample"]:
                raise GenerationError(f"This chat gives the best of {self.best_of} samples (--best_of), which are "
                                      "drawn in any case; begin one without it for the likeliest tokens.")
            check_best_of(self.best_of, changed)
        self.values = changed
        return f"{name} is {shown_value(value)}.{note}"

    def table(self) -> str:
        """All settings, one a line."""
        idle = () if self.values["do_sample"] else SAMPLING
        return "\n".join(f"  {name:<19} {shown_value(self.values[name])}"
                         f"{' (no effect: do_sample is off)' if name in idle else ''}" for name in NAMES)


def _check(name: str, value: object, changed: dict) -> None:
    if name in OWN_RULES:
        if value is not None:
            check_value(name, value, OWN_RULES[name], GenerationError)
        return
    GenerationOptions(**{key: one for key, one in changed.items() if key in RULES})


def _value(name: str, text: str) -> object:
    """What a text means as the value of a setting; one that means nothing stays a text, which its rule refuses."""
    if name == "meta_instruction":
        return "" if text.lower() == "none" else text
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def shown_value(value: object) -> str:
    """A value as `/set` takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None or value == "" else str(value)
