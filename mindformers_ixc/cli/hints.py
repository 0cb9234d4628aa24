"""What to say of questions and answers that show that somebody is at a loss."""
from __future__ import annotations

import re

# A question about a picture that is taken to be there: "the picture", "this photo", 这张图.
_ABOUT_A_PICTURE = re.compile(
    r"\b(?:the|this|that|these|those|my|attached|above)\s+(?:\w+\s+)?"
    r"(?:picture|image|photo|photograph|screenshot|chart)s?\b"
    r"|\bphotos? (?:above|attached)\b"
    r"|[这那该此](?:[一两几]?[张幅个些])?(?:图|照片|截图)|(?:图|照片|画面|截图)片?[中里上]",
    re.IGNORECASE)


def picture_hint(question: str, has_pictures: bool,
                 way: str = "/image PATH adds one to the next question") -> list[str]:
    """A hint for a question about a picture that was not given; `way` says how to give one."""
    if has_pictures or not _ABOUT_A_PICTURE.search(question):
        return []
    return [f"hint: the question is about a picture, and none has been given; {way}."]


def empty_hint(parameters: int) -> str:
    """A hint for an answer without text by a model of so many parameters."""
    return (f"hint: the answer is empty: the model ended it before the first word. A model that has been trained "
            f"little does so (this one has {_human(parameters)} parameters), and so does one that is asked what it "
            "never saw; train longer, or ask as its training data does.")


def _human(number: int) -> str:
    for size, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.1f} {name}"
    return str(number)
