"""The message form people know from other chat interfaces, as the arguments of `IXC25Processor.encode_chat`."""
from __future__ import annotations

from collections.abc import Sequence

from mindformers_ixc.errors import PromptError
from mindformers_ixc.processing.prompt import IMAGE_PLACEHOLDER


def read_messages(messages: Sequence[dict]) -> dict:
    """Turns messages into query, images and history.

    Args:
        messages: `{"role": "user" | "assistant" | "system", "content": text or list}` in order, the last one from the
            user. A content list holds `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`; images
            stand where they are in the list.

    Returns:
        `query`, `images`, `history` and `meta_instruction`.

    Raises:
        PromptError: naming the message and what is wrong with it.
    """
    system = ""
    images: list = []
    texts: list[str] = []
    for number, message in enumerate(messages):
        where = f"message {number}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise PromptError(f"{where}: needs 'role' and 'content', found {message!r:.80}.")
        text, added = _read_content(message["content"], where)
        if message["role"] == "system":
            if number or added:
                raise PromptError(f"{where}: the system message comes first and holds text only.")
            system = text
            continue
        expected = ("user", "assistant")[len(texts) % 2]
        if message["role"] != expected:
            raise PromptError(f"{where}: expected one of the {expected}, found role {message['role']!r}; questions and "
                              "answers must alternate.")
        texts.append(text)
        images += added
    if len(texts) % 2 == 0:
        raise PromptError("The last message must be the user's question.")
    return {"query": texts[-1], "images": images, "history": list(zip(texts[:-1:2], texts[1::2])),
            "meta_instruction": system}


def _read_content(content: object, where: str) -> tuple[str, list]:
    if isinstance(content, str):
        return content, []
    if not isinstance(content, (list, tuple)):
        raise PromptError(f"{where}: 'content' must be text or a list of parts, found {type(content).__name__}.")
    text, images = "", []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image") or kind not in part:
            raise PromptError(f"{where}: a part must be {{'type': 'text', 'text': ...}} or {{'type': 'image', 'image': "
                              f"...}}, found {part!r:.80}.")
        if kind == "text":
            text += part["text"]
        else:
            text += IMAGE_PLACEHOLDER
            images.append(part["image"])
    return text, images
