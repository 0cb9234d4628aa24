"""Who answers the questions of a benchmark: a model in this process, or a server."""
from __future__ import annotations

import argparse
import importlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any

from PIL import Image

from mindformers_ixc import terminal
from mindformers_ixc.benchmarking.catalogue import Benchmark, tiles_of
from mindformers_ixc.benchmarking.prompts import Prompt, final_answer
from mindformers_ixc.chat_client import BUSY, ChatClient, image_part, text_part
from mindformers_ixc.cli.heavy import importing
from mindformers_ixc.data.questions import Question
from mindformers_ixc.errors import ConfigError, ImageError, ServerError
from mindformers_ixc.processing.image import ImageSource, partition_pixels
from mindformers_ixc.processing.pictures import EXIF, load_image
from mindformers_ixc.processing.prompt import PICTURE
from mindformers_ixc.sections import is_whole

if TYPE_CHECKING:
    from mindformers_ixc.generation.assistant import Assistant
    from mindformers_ixc.processing.encoded import EncodedSample

# Side of a tile of the public model in pixels, for a server that does not say its own.
TILE = 560

# Refusals of a server that the next question will meet as well, or that say nothing of the question.
_HOPELESS = (401, 403, 404, 405, *BUSY)


@dataclass
class Asked(Question):
    """A question of a benchmark.

    Attributes:
        prompt: how it is asked; `query` is its text.
    """

    prompt: Prompt = field(default_factory=lambda: Prompt(()))


@dataclass(frozen=True)
class Protocol:
    """How all questions are asked.

    Attributes:
        benchmark: the data set.
        mode: task LoRAs in use.
        hd_num: tiles of a single picture at most.
        num_beams: beams.
        max_new_tokens: of an answer.
        transparency: as in `load_image`.
        exif: as in `load_image`; `None` is the model's own.
    """

    benchmark: Benchmark
    mode: str
    hd_num: int
    num_beams: int
    max_new_tokens: int
    transparency: str
    exif: str | None


# Answers some questions: `{"answer": text}` or `{"error": sentence}` each.
Ask = Callable[[Sequence[Asked]], list[dict]]


class _Prompted:
    """An assistant that is asked with whole prompts, and pictures cut as in the published measurements.

    They are cut by the transform of training there, which enlarges small pictures; `hd_num` is per picture.
    """

    def __init__(self, assistant: Assistant, hd_num: int):
        self.assistant, self.hd_num = assistant, hd_num

    def encode(self, asked: Asked) -> EncodedSample:
        processor = self.assistant.processor
        assert processor is not None
        return processor.encode_pieces(asked.prompt.pieces(), asked.images, tiles_of(len(asked.images), self.hd_num),
                                       training=True)

    def answer_samples(self, samples: Sequence[EncodedSample], mode: str = "base", **options: Any) -> list[str]:
        # the published calls of `generate` end at </s> alone; what follows the end of a turn is cut from the text
        return self.assistant.answer_samples(samples, mode, stop_token_ids=self.assistant.stop_token_ids[:1], **options)


def local(arguments: argparse.Namespace, protocol: Protocol) -> Ask:
    """Loads `arguments.model`."""
    with importing(arguments):
        inference = importlib.import_module("mindformers_ixc.cli.inference")
        answer_questions = importlib.import_module("mindformers_ixc.generation.predict").answer_questions
    arguments.transparency = protocol.transparency
    with terminal.current.waiting(f"Loading {arguments.model}"):
        assistant = _Prompted(inference.load_assistant(arguments), protocol.hd_num)
    options = {"num_beams": protocol.num_beams, "max_new_tokens": protocol.max_new_tokens}
    if arguments.prompt_lookup:
        options["prompt_lookup"] = arguments.prompt_lookup

    def ask(batch: Sequence[Asked]) -> list[dict]:
        return _finished(protocol, answer_questions(assistant, batch, arguments.batch_size, protocol.mode, options))

    return ask


@dataclass(frozen=True)
class Served:
    """A model of a server.

    Attributes:
        client: of the server.
        name: of the model.
        mode: to be asked for; `None` where the name says it.
        tile: side of its tiles, in pixels.
        exif: how it reads pictures, unless the protocol says.
        weights: the server's mark of its weights; empty where it has none.
    """

    client: ChatClient
    name: str
    mode: str | None
    tile: int = TILE
    exif: str = "ignore"
    weights: str = ""

    @classmethod
    def find(cls, server: str, api_key: str | None, protocol: Protocol) -> Served:
        """Looks which model of a server answers, and whether it may be asked so.

        Raises:
            ServerError: when the server does not answer, or has no model.
            ConfigError: when the data set's prompts have marks of turns, and the server takes them for text; when it
                takes fewer beams or new tokens than all questions are asked with.
        """
        client = ChatClient(server, api_key)
        models = client.models()
        if not models:
            raise ServerError(f"{client.root} has no model.")
        found = next((one for one in models if one.get("mode") == protocol.mode), None)
        chosen = found or models[0]
        if protocol.benchmark.has_marks and chosen.get("control_tokens") is not True:
            raise ConfigError(f"The published prompt of {protocol.benchmark.name} has marks of turns within the "
                              f"question, which {client.root} takes for text; start it with --allow_control_tokens, or "
                              "give --model instead of --server.")
        _check_limits(client.root, chosen, protocol)
        images = chosen.get("images")
        tile, exif = (images.get("image_size"), images.get("exif")) if isinstance(images, dict) else (None, None)
        return cls(client, str(chosen["id"]), None if found or protocol.mode == "base" else protocol.mode,
                   int(tile) if tile is not None and is_whole(tile, 1) else TILE, exif if exif in EXIF else "ignore",
                   str(chosen.get("weights") or ""))

    def asking(self, protocol: Protocol) -> Ask:
        """Asks all questions of a batch at once."""
        return partial(_ask_server, self, protocol)


def _check_limits(root: str, model: Mapping[str, Any], protocol: Protocol) -> None:
    """Refuses what the server would refuse of every question, where it says what it takes."""
    for limit, option, value in (("max_beams", "num_beams", protocol.num_beams),
                                 ("max_new_tokens", "max_new_tokens", protocol.max_new_tokens)):
        most = model.get(limit)
        if is_whole(most, 1) and value > int(str(most)):
            raise ConfigError(f"{protocol.benchmark.name} is asked with --{option} {value}, and {root} takes {most} at "
                              f"most; start the server with --{limit} {value}, or ask with --{option} {most}.")


def _ask_server(served: Served, protocol: Protocol, batch: Sequence[Asked]) -> list[dict]:
    found: dict[int, dict | Exception] = {}

    def ask(place: int, asked: Asked) -> None:
        try:
            found[place] = _ask_one(served, protocol, asked)
        except Exception as error:
            found[place] = error

    # threads of a pool would keep the process after Ctrl-C until the server has answered
    threads = [Thread(target=ask, args=one, daemon=True) for one in enumerate(batch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = [found[place] for place in range(len(batch))]
    for one in results:
        if isinstance(one, Exception):
            raise one
    return _finished(protocol, [one for one in results if isinstance(one, dict)])


def _ask_one(served: Served, protocol: Protocol, asked: Asked) -> dict:
    limit = tiles_of(len(asked.images), protocol.hd_num)
    try:
        pictures = iter([image_part(_cut(image, limit, served, protocol)) for image in asked.images])
        content = [next(pictures) if piece is PICTURE else text_part(piece.text) for piece in asked.prompt.content]
        answer = served.client.complete(
            [{"role": "user", "content": content}], served.name, max_tokens=protocol.max_new_tokens, temperature=0,
            num_beams=protocol.num_beams, hd_num=limit, mode=served.mode)
    except ImageError as error:
        return {"error": str(error)}
    except ServerError as error:
        if error.status is None or error.status in _HOPELESS or error.status >= 500:
            raise           # the next question would meet the same
        return {"error": str(error)}
    return {"answer": answer.text}


def _cut(image: ImageSource, limit: int, served: Served, protocol: Protocol) -> bytes:
    """A picture resized and padded to whole tiles, as a PNG file: a server cuts it into these and changes nothing."""
    upright = load_image(image, "", protocol.transparency, protocol.exif or served.exif)
    pixels = partition_pixels(upright, limit, served.tile, training=True)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _finished(protocol: Protocol, results: Sequence[dict]) -> list[dict]:
    """Answers as they count."""
    return [{"answer": final_answer(protocol.benchmark, one["answer"])} if "answer" in one else one for one in results]
