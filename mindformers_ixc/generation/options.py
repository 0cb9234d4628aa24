"""Decoding options as callers give them, and Hugging Face's names for them."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from mindformers_ixc.config import ModelConfig
from mindformers_ixc.decoding_options import RULES, GenerationOptions
from mindformers_ixc.errors import GenerationError
from mindformers_ixc.fields import MODE_ADAPTERS
from mindformers_ixc.sections import check_keys, check_value, one_of

__all__ = ["GenerationOptions", "NamedOptions", "check_mode", "hugging_face_options", "known_options"]


def check_mode(name: str, mode: str) -> None:
    """Raises `ConfigError` unless `mode`, the value of the argument `name`, is one of the model's modes."""
    check_value(name, mode, one_of(MODE_ADAPTERS))


def known_options(options: dict, others: Iterable[str] = ()) -> dict:
    """The options, if each is a field of `GenerationOptions` or among some others.

    Raises:
        GenerationError: naming an unknown one.
    """
    check_keys(options, [*RULES, *others], error=GenerationError, noun="option")
    return options


class NamedOptions(Protocol):
    """MindFormers' and Hugging Face's `GenerationConfig`."""

    def to_dict(self) -> dict[str, Any]:
        """The options by name."""


def hugging_face_options(generation_config: NamedOptions | dict[str, Any] | None, options: dict, length: int,
                         config: ModelConfig) -> GenerationOptions:
    """Options under Hugging Face's names as `GenerationOptions`; `length` is the prompts'."""
    given = generation_config or {}
    given = dict(given if isinstance(given, dict) else given.to_dict())
    fields = set(GenerationOptions.__dataclass_fields__) | {"max_length", "eos_token_id", "prompt_lookup_num_tokens"}
    given = {key: value for key, value in given.items() if key in fields and value is not None}
    given.update(options)
    if "prompt_lookup_num_tokens" in given:
        given.setdefault("prompt_lookup", given.pop("prompt_lookup_num_tokens") or 0)
    stops = given.pop("eos_token_id", config.eos_token_id)
    total = given.pop("max_length", None)
    if total is not None and "max_new_tokens" not in given:
        if total <= length:
            raise GenerationError(f"max_length is {total}, which the prompt of {length} positions fills; raise it or "
                                  "use max_new_tokens.")
        given["max_new_tokens"] = total - length
    stops = tuple(stops) if isinstance(stops, (list, tuple)) else (stops,)
    return GenerationOptions(**{"stop_token_ids": stops, **known_options(given)})
