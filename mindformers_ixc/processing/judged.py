"""Finished conversations as a reward model reads them: the turns of training, and the reward token at the end."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mindformers_ixc.errors import ConfigError, PromptError
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.image import HD_NUM_REWARD, Tiles
from mindformers_ixc.processing.messages import before_answer, read_answer, read_history, read_messages
from mindformers_ixc.processing.pictures import ImageSource
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.processing.prompt import IGNORE_INDEX, REWARD_TOKEN, chat_turns, check_text

# Role and text, the form of `Processor.encode_conversation`.
Turns = list[tuple[str, str]]


def judged_turns(chat: Any) -> tuple[Turns, list]:
    """Turns and pictures of a chat whose last message is the answer to be judged.

    Args:
        chat: messages `{"role": "user" | "assistant" | "system", "content": text or list of parts}` in turn, as in
            `messages.read_messages`.

    Raises:
        PromptError: naming the message and what is wrong with it.
    """
    if not isinstance(chat, (list, tuple)):
        raise PromptError(f"A chat must be a list of messages with 'role' and 'content', found {type(chat).__name__}.")
    last = chat[-1] if chat else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        role = last.get("role") if isinstance(last, Mapping) else None
        raise PromptError(f"The last message of a chat must be the assistant's, whose answer is judged; found role "
                          f"{role!r:.40}.")
    where = f"message {len(chat) - 1}"
    question = read_messages(before_answer(chat, where))
    return turns_of(question, read_answer(last, where)), question["images"]


def turns_of(question: Mapping[str, Any], answer: str) -> Turns:
    """Turns of a question (`query`, `history`, `meta_instruction`) and an answer to it.

    Raises:
        PromptError: when the answer is no text.
    """
    history = read_history(question.get("history"))
    return [*chat_turns(question["query"], history, question.get("meta_instruction") or ""),
            ("assistant", check_text(answer, "answer"))]


def encode_judged(processor: Processor, turns: Sequence[tuple[str, str]], images: Sequence[ImageSource] = (),
                  hd_num: int | None = None, where: str = "") -> EncodedSample:
    """A finished conversation as a reward model's prompt.

    Args:
        processor: of the model.
        turns: (role, text) from user and assistant in turn, after an optional system turn.
        images: images (a video's path, too) in the order of their places.
        hd_num: tiles of each image at most (public 9); several images share no limit here.
        where: what the conversation belongs to, for messages.

    Raises:
        PromptError: when places and images differ in number, or a text is none.
        ImageError: for an image that cannot be read.
        ConfigError: when the tokenizer lacks the reward token.
    """
    limit = HD_NUM_REWARD if hd_num is None else hd_num
    cut = [processor.image_processor.cut([image], limit, where=where) for image in images]
    tiles = Tiles.joined([one for one, _ in cut]) if cut else Tiles.none(processor.image_processor.image_size)
    encoded = tiles, [grid for _, grids in cut for grid in grids]
    return with_reward_token(processor.encode_conversation(turns, images, where, limit, encoded), processor)


def with_reward_token(sample: EncodedSample, processor: Processor) -> EncodedSample:
    """An encoded conversation with the reward token behind it, which carries no loss of its own.

    Raises:
        ConfigError: when the tokenizer lacks the token.
    """
    tokenizer = processor.tokenizer
    if REWARD_TOKEN not in tokenizer.control_pieces:
        raise ConfigError(f"{tokenizer.vocab_file} has no piece {REWARD_TOKEN}, at which a reward model's score is "
                          "read; take the tokenizer.model of the public model directory.")
    token = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
    return replace(sample, input_ids=np.append(sample.input_ids, token).astype(np.int32),
                   labels=np.append(sample.labels, IGNORE_INDEX).astype(np.int32),
                   image_mask=np.append(sample.image_mask, 0).astype(np.int32))
