"""OpenAI's chat interface as JSON: what a request may say, and errors and answers in its form."""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mindformers_ixc.decoding_options import RULES, GenerationOptions
from mindformers_ixc.errors import GenerationError
from mindformers_ixc.fields import MODE_ADAPTERS
from mindformers_ixc.sections import Rule, hint, is_number, is_whole
from mindformers_ixc.serving.settings import ServerSettings

# Lists and objects in one another that a request may have; messages with pictures need six.
DEEPEST = 12

# Most stop texts of a request and characters of each, likely tokens that `top_logprobs` shows: as OpenAI.
MOST_STOPS, LONGEST_STOP, MOST_LIKELY = 4, 256, 20


class RequestError(Exception):
    """A request that is refused, in OpenAI's form.

    Args:
        message: a sentence.
        param: the field it is about.
        status: of HTTP.
        code: short word for programs.
        retry_after: seconds after which it may be tried again.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None,
                 retry_after: int | None = None):
        # what a request has for a name may be half of a surrogate pair, which no response can be written with
        self.message, self.param = _writable(message), None if param is None else _writable(param)
        super().__init__(self.message)
        self.status, self.code, self.retry_after = status, code, retry_after

    @property
    def body(self) -> dict:
        """What the client gets."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "invalid_request_error",
                 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _writable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class FieldRule:
    """A field of a request.

    Attributes:
        rule: what its value must be.
        schema: the same for the OpenAPI page.
        meaning: in words.
    """

    rule: Rule
    schema: dict
    meaning: str


def _whole(least: int, most: int | None = None) -> FieldRule:
    text = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"
    schema: dict[str, Any] = {"type": "integer", "minimum": least}
    if most is not None:
        schema["maximum"] = most
    return FieldRule(Rule(lambda value: is_whole(value, least) and (most is None or value <= most), text), schema, "")


def _number(least: float, most: float) -> FieldRule:
    return FieldRule(Rule(lambda value: is_number(value) and least <= value <= most,
                          f"a number from {least:g} to {most:g}"),
                     {"type": "number", "minimum": least, "maximum": most}, "")


def _truth() -> FieldRule:
    return FieldRule(Rule(lambda value: isinstance(value, bool), "true or false"), {"type": "boolean"}, "")


def _text(longest: int) -> FieldRule:
    return FieldRule(Rule(lambda value: isinstance(value, str) and len(value) <= longest,
                          f"a text of at most {longest} characters"), {"type": "string"}, "")


def _meaning(rule: FieldRule, meaning: str) -> FieldRule:
    return FieldRule(rule.rule, rule.schema, meaning)


def _is_stop(value: object) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and len(texts) <= MOST_STOPS and all(
        isinstance(one, str) and 0 < len(one) <= LONGEST_STOP for one in texts)


# What a request may say beside `messages`; `null` is as if it were not said.
FIELDS: dict[str, FieldRule] = {
    "model": _meaning(_text(200), "name of the model; `NAME:write` and `NAME:web` are its modes"),
    "stream": _meaning(_truth(), "the answer comes as server-sent events"),
    "stream_options": FieldRule(
        Rule(lambda value: isinstance(value, dict) and set(value) <= {"include_usage"}
             and isinstance(value.get("include_usage", False), (bool, type(None))),
             "an object with include_usage, true or false"),
        {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
        "`include_usage`: a last event has the usage"),
    "n": _meaning(_whole(1, 128), "answers to the same question"),
    "stop": FieldRule(Rule(_is_stop, f"a text, or a list of at most {MOST_STOPS}, of 1 to {LONGEST_STOP} characters"),
                      {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 4}]},
                      "texts that end the answer and are no part of it"),
    "max_tokens": _meaning(_whole(1), "new tokens at most; the same as max_completion_tokens"),
    "max_completion_tokens": _meaning(_whole(1), "new tokens at most"),
    "temperature": _meaning(_number(0, 2), "0, or without temperature and top_p: the likeliest token is taken"),
    "top_p": _meaning(_number(0, 1), "the likeliest tokens that together reach this probability are sampled"),
    "seed": _meaning(FieldRule(Rule(lambda value: is_whole(value, 0) and value < 2 ** 63,
                                    "a whole number from 0 to 9223372036854775807"),
                               {"type": "integer", "minimum": 0}, ""), "of sampling; answer i of n has seed + i"),
    "logprobs": _meaning(_truth(), "log-probabilities of the answer's tokens"),
    "top_logprobs": _meaning(_whole(0, MOST_LIKELY), "so many likeliest tokens with each; needs logprobs"),
    "user": _meaning(_text(512), "not looked at"),
    "safety_identifier": _meaning(_text(512), "not looked at"),
    "prompt_cache_key": _meaning(_text(512), "not looked at; what prompts share is found by itself"),
    "top_k": _meaning(_whole(0), "only the k likeliest tokens are sampled; 0: no limit"),
    "num_beams": _meaning(_whole(1, 64), "beam search; not with stream, n or logprobs"),
    "repetition_penalty": _meaning(FieldRule(RULES["repetition_penalty"], {"type": "number"}, ""),
                                   "divides scores of tokens that the answer has; 1: none"),
    "length_penalty": _meaning(FieldRule(RULES["length_penalty"], {"type": "number"}, ""), "of beam search"),
    "hd_num": _meaning(_whole(1, 256), "tiles of a single picture at most"),
    "mode": FieldRule(Rule(lambda value: value in tuple(MODE_ADAPTERS), ", ".join(MODE_ADAPTERS),
                           verb="the choices are"),
                      {"type": "string", "enum": list(MODE_ADAPTERS)}, "task LoRAs in use"),
    "meta_instruction": _meaning(_text(1 << 16), "system turn; the same as a first message of the role system"),
}


def _nothing(*values: object) -> Callable[[object], bool]:
    return lambda value: any(type(value) is type(one) and value == one for one in values)


# Fields of OpenAI's that this model has nothing for: accepted at a value that asks for nothing.
NEUTRAL: dict[str, tuple[Callable[[object], bool], str]] = {
    "frequency_penalty": (_nothing(0, 0.0), "0; repetition_penalty is there"),
    "presence_penalty": (_nothing(0, 0.0), "0; repetition_penalty is there"),
    "logit_bias": (_nothing({}), "{}"),
    "tools": (_nothing([]), "[]; the model calls no tools"),
    "tool_choice": (_nothing("none", "auto"), "none or auto; the model calls no tools"),
    "parallel_tool_calls": (_nothing(True, False), "true or false"),
    "functions": (_nothing([]), "[]; the model calls no functions"),
    "function_call": (_nothing("none", "auto"), "none or auto; the model calls no functions"),
    "response_format": (_nothing({"type": "text"}), '{"type": "text"}; the model is not held to a form'),
    "modalities": (_nothing(["text"]), '["text"]'),
    "store": (_nothing(False), "false; nothing is stored"),
    "metadata": (_nothing({}), "{}; nothing is stored"),
    "service_tier": (_nothing("auto", "default"), "auto or default"),
    "prediction": (_nothing(), "left out"),
    "audio": (_nothing(), "left out"),
    "reasoning_effort": (_nothing("none"), "left out; the model answers at once"),
    "web_search_options": (_nothing(), "left out"),
    "verbosity": (_nothing("medium"), "left out"),
}


@dataclass(frozen=True)
class ChatRequest:
    """A request as it is to be answered.

    Attributes:
        model: as the client calls it.
        messages: as they came.
        mode: task LoRAs in use.
        options: of decoding; stop ids are added where the tokenizer is.
        n: answers.
        stream: whether pieces are sent.
        include_usage: whether a stream ends with its usage.
        likeliest: tokens shown with each; `None` without log-probabilities.
        hd_num: tiles of a single picture.
        meta_instruction: system turn; `None` where it is not said.
    """

    model: str
    messages: list
    mode: str
    options: GenerationOptions
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    likeliest: int | None = None
    hd_num: int | None = None
    meta_instruction: str | None = None


def read_json_object(content: bytes) -> dict:
    """The object in a request's body.

    Raises:
        RequestError: when it is none, or nested deeper than any request is.
    """
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    except RecursionError as error:
        raise RequestError(f"The body is nested more than {DEEPEST} deep.") from error
    except ValueError as error:
        raise RequestError(f"The body is no JSON in UTF-8 ({str(error)[:100]}); send an object.") from error
    if not isinstance(value, dict):
        raise RequestError(f"The body must be a JSON object, found {_kind(value)}.")
    inner: list = [value]
    for _ in range(DEEPEST):
        inner = [item for one in inner for item in (one.values() if isinstance(one, dict) else one)
                 if isinstance(item, (dict, list))]
    if inner:
        raise RequestError(f"The body is nested more than {DEEPEST} deep.")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(
        type(value), "a number")


def read_chat(body: Mapping[str, Any], settings: ServerSettings) -> ChatRequest:
    """A request of `/v1/chat/completions`.

    Raises:
        RequestError: naming the field.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in NEUTRAL:
            test, wanted = NEUTRAL[name]
            if not test(value):
                raise RequestError(f"{name} is not something that this model can do; it may be {wanted}.", name)
        elif name != "messages" and name not in FIELDS:
            raise RequestError(f"There is no field {name[:60]}; {hint(name[:60], [*FIELDS, 'messages'])}", name[:60])
        elif name in FIELDS and not FIELDS[name].rule.test(value):
            rule = FIELDS[name].rule
            raise RequestError(f"{name} is {_short(value)}; {rule.verb} {rule.wanted}.", name)
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages must be a list with at least one message, found {_short(messages)}.", "messages")
    model, mode = _model_and_mode(given, settings)
    _check_together(given, settings)
    usage = bool((given.get("stream_options") or {}).get("include_usage"))
    return ChatRequest(model, messages, mode, _options(given, settings), given.get("n", 1), given.get("stream", False),
                       usage, given.get("top_logprobs", 0) if given.get("logprobs") else None, given.get("hd_num"),
                       given.get("meta_instruction"))


def _model_and_mode(given: Mapping[str, Any], settings: ServerSettings) -> tuple[str, str]:
    model = given.get("model", settings.name)
    if model not in settings.models:
        raise RequestError(f"There is no model {model[:60]!r} here; {hint(model[:60], settings.models)}", "model", 404,
                           "model_not_found")
    named = settings.models[model]
    mode = given.get("mode", named)
    if named not in ("base", mode):
        raise RequestError(f"model {model} means mode {named}, and mode is {mode}; leave one of them out.", "mode")
    if mode not in settings.modes:
        raise RequestError(f"mode is {mode}, whose task LoRAs this model does not have; {hint(mode, settings.modes)}",
                           "mode")
    return model, mode


def _check_together(given: Mapping[str, Any], settings: ServerSettings) -> None:
    """Refuses fields that contradict one another, or exceed what the server allows."""
    limits = settings.limits
    if "stream_options" in given and not given.get("stream"):
        raise RequestError("stream_options is given without stream; it is for streams only.", "stream_options")
    if given.get("top_logprobs") and not given.get("logprobs"):
        raise RequestError("top_logprobs is given without logprobs; set logprobs to true.", "top_logprobs")
    for name, most in (("n", limits.answers), ("num_beams", limits.beams), ("max_tokens", limits.new_tokens),
                       ("max_completion_tokens", limits.new_tokens)):
        if given.get(name, 0) > most:
            raise RequestError(f"{name} is {_short(given[name])}; this server takes {most} at most.", name)
    both = [given[name] for name in ("max_tokens", "max_completion_tokens") if name in given]
    if len(set(both)) > 1:
        raise RequestError(f"max_tokens is {both[0]} and max_completion_tokens {both[1]}; they mean the same, leave "
                           "one of them out.", "max_completion_tokens")
    if given.get("num_beams", 1) > 1:
        for name, idle in (("stream", False), ("n", 1), ("logprobs", False)):
            if given.get(name, idle) != idle:
                raise RequestError(f"num_beams is {given['num_beams']}, and {name} is {_short(given[name])}; beams "
                                   "know their text only at the end, so leave one of them out.", name)


def _options(given: Mapping[str, Any], settings: ServerSettings) -> GenerationOptions:
    limits, stop = settings.limits, given.get("stop", [])
    temperature = given.get("temperature")
    # a value that rounds to 0 is greedy decoding, as elsewhere
    samples = (temperature is not None and temperature >= 1e-5) or (temperature is None and "top_p" in given)
    options: dict[str, Any] = {
        "max_new_tokens": given.get("max_completion_tokens", given.get("max_tokens", limits.new_tokens)),
        "do_sample": samples, "stop_strings": (stop,) if isinstance(stop, str) else tuple(stop),
        "top_k": given.get("top_k", 0), "num_beams": given.get("num_beams", 1),
        "repetition_penalty": given.get("repetition_penalty", 1.0),
        "length_penalty": given.get("length_penalty", 1.0), "seed": given.get("seed")}
    if samples:
        options |= {"temperature": float(1.0 if temperature is None else temperature), "top_p": given.get("top_p", 1.0)}
    try:
        return GenerationOptions(**options)
    except GenerationError as error:
        raise RequestError(str(error)) from error


def _short(value: object) -> str:
    if isinstance(value, (dict, list)):
        return f"{_kind(value)} of {len(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return "not finite"
    text = json.dumps(value, ensure_ascii=True, default=str) if not isinstance(value, int) or isinstance(value, bool) \
        else str(value) if value.bit_length() < 200 else "a number of many digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
