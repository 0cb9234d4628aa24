"""Messages of a request as a question for the model: texts stay texts, pictures are read and measured."""
from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union
from urllib.parse import unquote_to_bytes

from mindformers_ixc.data.paths import find_file
from mindformers_ixc.errors import ImageError, PromptError, VideoError
from mindformers_ixc.generation.requests import error_sentence
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.image import plan_partition
from mindformers_ixc.processing.messages import read_messages
from mindformers_ixc.processing.pictures import image_size
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.processing.prompt import IMAGE_PLACEHOLDER
from mindformers_ixc.processing.stored import StoredFile
from mindformers_ixc.processing.video import board_grid, board_size, is_video
from mindformers_ixc.serving.fetching import fetch
from mindformers_ixc.serving.settings import ServerSettings
from mindformers_ixc.serving.wire import ChatRequest, RequestError

ROLES = ("system", "developer", "user", "assistant")

# Kinds of parts with the keys that each has beside its type, and the keys of an address.
_PARTS = {"text": ("text",), "image_url": ("image_url",), "video_url": ("video_url",)}
_URL_KEYS = ("url", "detail")

# Keys of a message that clients send back as they got them; anything but nothing in them would be lost.
_EMPTY = ("refusal", "tool_calls", "function_call", "audio", "annotations", "reasoning_content", "name")

# `data:image/png;base64,` before a file's content.
_DATA = re.compile(r"data:(?P<kind>image|video)/(?P<type>[\w.+-]{1,60})(?:;[\w=.+-]{1,60})*?(?P<base64>;base64)?,",
                   re.ASCII | re.IGNORECASE)

# Characters that a data URL may have in percent form: each byte is a Python object of its own until they are joined,
# and nobody but authors of drawings writes one so.
LONGEST_PERCENT = 1 << 20

# What decoders of videos go by, from the type in a data URL.
_SUFFIXES = {"quicktime": ".mov", "x-msvideo": ".avi", "x-matroska": ".mkv", "webm": ".webm", "ogg": ".ogv",
             "mpeg": ".mpg", "3gpp": ".3gp", "x-flv": ".flv", "x-ms-wmv": ".wmv", "mp2t": ".ts"}

# A picture as the processor takes it: its bytes, or a video's file.
Source = Union[bytes, str, StoredFile]


@dataclass
class Given:
    """A picture or video of a request: where it stands and what it is."""

    param: str
    source: Source

    @property
    def file(self) -> StoredFile | str:
        """What its header is read from."""
        content = self.source
        return StoredFile("the picture", lambda: content) if isinstance(content, bytes) else content

    def refusal(self, error: ImageError | VideoError) -> RequestError:
        """An error about it for the client, whom paths of the server are no business of."""
        text = error_sentence(error).replace("the picture's bytes", "the picture")
        if isinstance(self.source, str):
            text = text.replace(self.source, os.path.basename(self.source))
        return RequestError(f"{self.param}: {text}", self.param)


def read_question(request: ChatRequest, settings: ServerSettings) -> tuple[dict, list[Given]]:
    """A request as arguments of `Processor.encode_chat`; pictures are read or fetched, so this may take a while.

    Raises:
        RequestError: naming the field.
    """
    pictures: list[Given] = []
    messages = [_message(message, f"messages[{number}]", settings, pictures)
                for number, message in enumerate(request.messages)]
    if request.meta_instruction is not None:
        if messages[0]["role"] == "system":
            raise RequestError("meta_instruction is given, and messages[0] is of the role system; they mean the same, "
                               "leave one of them out.", "meta_instruction")
        messages.insert(0, {"role": "system", "content": request.meta_instruction})
    try:
        question = read_messages(messages)
    except PromptError as error:
        raise RequestError(f"messages: {error}", "messages") from error
    return {**question, "hd_num": request.hd_num}, pictures


def _message(message: Any, where: str, settings: ServerSettings, pictures: list[Given]) -> dict:
    """A message in the form of `read_messages`; its pictures go to the list."""
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object with role and content.", where)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RequestError(f"{where}.role is {str(role)[:40]!r}; the choices are {', '.join(ROLES)}.", f"{where}.role")
    _check_keys(message, ("role", "content"), where, _EMPTY)
    if isinstance(content, str):
        parts: list[Any] = [{"type": "text", "text": content}]
    elif isinstance(content, list):
        parts = content
    else:
        raise RequestError(f"{where}.content must be a text or a list of parts.", f"{where}.content")
    read = [_part(part, f"{where}.content[{number}]", role, settings, pictures) for number, part in enumerate(parts)]
    return {"role": "system" if role == "developer" else role, "content": read}


def _check_keys(given: dict, read: Sequence[str], where: str, empty: Sequence[str] = ()) -> None:
    """Refuses what would be lost; what is `null` says nothing."""
    for key, value in given.items():
        if key not in read and value is not None and not (key in empty and not value):
            raise RequestError(f"{where}.{key[:40]} is not read, and what it says would be lost; leave it out.",
                               f"{where}.{key[:40]}")


def _part(part: Any, where: str, role: str, settings: ServerSettings, pictures: list[Given]) -> dict:
    if not isinstance(part, dict) or "type" not in part:
        raise RequestError(f"{where} must be an object with a type: {', '.join(_PARTS)}.", f"{where}.type")
    kind = part["type"]
    if not isinstance(kind, str) or kind not in _PARTS:
        raise RequestError(f"{where}.type is {str(kind)[:40]!r}; the choices are {', '.join(_PARTS)}.",
                           f"{where}.type")
    _check_keys(part, ("type", *_PARTS[kind]), where)
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise RequestError(f"{where}.text must be a text.", f"{where}.text")
        if IMAGE_PLACEHOLDER in text and role != "assistant" and not settings.control_tokens:
            raise RequestError(f"{where}.text has {IMAGE_PLACEHOLDER}, which marks a picture's place and cannot be "
                               "asked about; pictures are parts of their own here.", f"{where}.text")
        return {"type": "text", "text": text}
    if role != "user":
        raise RequestError(f"{where} is a picture in a message of the {role}; only the user's have pictures.", where)
    value = part.get(kind)
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str) or not url:
        raise RequestError(f"{where}.{kind}.url must be a text.", f"{where}.{kind}.url")
    if isinstance(value, dict):
        _check_keys(value, _URL_KEYS, f"{where}.{kind}")
    detail = value.get("detail") if isinstance(value, dict) else None
    if detail not in (None, "auto", "high"):
        raise RequestError(f"{where}.{kind}.detail is {str(detail)[:40]!r}; it may be auto or high. hd_num says how "
                           "many tiles a picture has.", f"{where}.{kind}.detail")
    if len(pictures) >= settings.limits.pictures:
        raise RequestError(f"{where} is one picture too many; this server takes {settings.limits.pictures} a request.",
                           where)
    source = read_source(url, f"{where}.{kind}.url", settings, kind == "video_url")
    pictures.append(Given(f"{where}.{kind}.url", source))
    return {"type": "image", "image": source}


def read_source(url: str, param: str, settings: ServerSettings, video: bool = False) -> Source:
    """A picture or video by its address.

    Args:
        url: data URL; a path below the server's image_root; an http(s) address of an allowed host.
        param: the field it stands in.
        settings: of the server.
        video: whether it is said to be a video.

    Raises:
        RequestError: when it may not be or cannot be read.
    """
    if url[:5].lower() == "data:":
        return _from_data_url(url, param, settings, video)
    if url.lower().startswith(("http://", "https://")):
        if not settings.hosts:
            raise RequestError(f"{param} is an address, and this server fetches none (--fetch_images HOST allows one); "
                               "send the picture as a data URL.", param, 403)
        content = fetch(url, settings.hosts, settings.limits.body, param)
        name = url.partition("?")[0].partition("#")[0]
        if video or is_video(name):
            return StoredFile(f"video{name[name.rfind('.'):] if is_video(name) else '.mp4'}", lambda: content)
        return content
    if "://" in url and not url.startswith("file://"):
        raise RequestError(f"{param} is an address of the kind {url.partition('://')[0][:20]!r}; of addresses http and "
                           "https are fetched, where the server allows them. Send the picture as a data URL.", param)
    return _below_root(url, param, settings)


def _from_data_url(url: str, param: str, settings: ServerSettings, video: bool) -> Source:
    match = _DATA.match(url[:300])
    if match is None:
        raise RequestError(f"{param} must begin like data:image/png;base64, or data:video/mp4;base64, and go on with "
                           "the file.", param)
    text = url[match.end():]
    if not match["base64"] and len(text) > LONGEST_PERCENT:
        raise RequestError(f"{param} has {len(text)} characters in percent form, of which {LONGEST_PERCENT} are taken; "
                           "send the file in base64, as data:image/png;base64,...", param, 413)
    try:
        content = base64.b64decode(text, validate=True) if match["base64"] else unquote_to_bytes(text)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{param}: what follows the comma is no base64: letters, digits, + and /, = at the end, no "
                           "spaces or new lines.", param) from error
    if not content:
        raise RequestError(f"{param} has no content behind the comma.", param)
    if video or match["kind"] == "video":
        return StoredFile(f"video{_SUFFIXES.get(match['type'].lower(), '.mp4')}", lambda: content)
    return content


def _below_root(name: str, param: str, settings: ServerSettings) -> Source:
    root = settings.image_root
    if root is None:
        raise RequestError(f"{param} is no data URL, and this server reads no files (--image_root DIR allows those of "
                           "a folder); send the picture as a data URL.", param, 403)
    missing = RequestError(f"{param}: there is no such picture in the server's folder of pictures.", param)
    try:
        path = find_file(name, [root], root)
        if is_video(path):
            return str(path)
        with open(path, "rb") as file:
            content = file.read(settings.limits.body + 1)
    except (ValueError, OSError) as error:     # a sentence with paths is none of a client's business
        raise missing from error
    if len(content) > settings.limits.body:
        raise RequestError(f"{param}: the file has more than {settings.limits.body} bytes.", param, 413)
    return content


def check_pictures(given: list[Given], hd_num: int | None, processor: Processor, settings: ServerSettings) -> None:
    """Refuses pictures that are too many or too large, by their headers, before pixels are read.

    Raises:
        RequestError: naming the picture.
    """
    images, limits, tiles = processor.image_processor, settings.limits, 0
    limit = images.hd_num_for(len(given), hd_num)
    for one in given:
        try:
            if is_video(one.source):
                grid = board_grid(board_size(one.source), images.image_size)
            else:
                width, height = image_size(one.file, images.exif)
                if width * height > limits.pixels:
                    raise RequestError(f"{one.param}: the picture has {width} x {height} pixels; this server takes "
                                       f"{limits.pixels} in all.", one.param, 413)
                grid = plan_partition(width, height, limit, images.image_size).grid
        except (ImageError, VideoError) as error:
            raise one.refusal(error) from error
        tiles += grid.tiles + 1
        if tiles > limits.tiles:
            raise RequestError(f"{one.param}: with this picture the request has {tiles} tiles, more than this server "
                               f"takes ({limits.tiles}); lower hd_num or send fewer pictures.", one.param, 413)


def _first_bad(pictures: Sequence[Given], processor: Processor) -> Given:
    """The first picture that cannot be cut, of some with one that cannot: each is tried by itself."""
    for one in pictures[:-1]:
        try:
            processor.image_processor.cut([one.source], 1)
        except (ImageError, VideoError):
            return one
    return pictures[-1]


def encode(request: ChatRequest, processor: Processor, settings: ServerSettings) -> EncodedSample:
    """A request as a prompt; its pictures are cut.

    Raises:
        RequestError: naming the field.
    """
    _check_length(request, processor, settings)
    question, pictures = read_question(request, settings)
    check_pictures(pictures, request.hd_num, processor, settings)
    try:
        sample = processor.encode_chat(**question, control_tokens=settings.control_tokens)
    except PromptError as error:
        raise RequestError(f"messages: {error}", "messages") from error
    except (ImageError, VideoError) as error:
        raise _first_bad(pictures, processor).refusal(error) from error
    positions = len(sample.input_ids)
    if positions >= settings.limits.positions:
        raise _too_long(str(positions), settings)
    return sample


def _check_length(request: ChatRequest, processor: Processor, settings: ServerSettings) -> None:
    """Refuses texts that cannot fit, before they are made tokens: of a body's size that takes minutes and gigabytes.

    Raises:
        RequestError: naming the messages.
    """
    letters = len(request.meta_instruction or "")
    for message in request.messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else [{"text": content}]:
            text = part.get("text") if isinstance(part, dict) else None
            letters += len(text) if isinstance(text, str) else 0
    least = letters // processor.tokenizer.longest_piece
    if least >= settings.limits.positions:
        raise _too_long(f"{least} or more", settings)


def _too_long(positions: str, settings: ServerSettings) -> RequestError:
    return RequestError(f"The messages take {positions} positions; prompt and answer may have "
                        f"{settings.limits.positions} here. Shorten them, lower hd_num or send fewer pictures.",
                        "messages", 400, "context_length_exceeded")
