"""Web pages: what they are made from, and how an answer becomes a file."""
from __future__ import annotations

import os
import re
from pathlib import Path

from mindformers_ixc.errors import PromptError
from mindformers_ixc.files import check_target, read_text

RESUME_INSTRUCTION = "Build a personal web page (HTML) from the content of this resume:\n"
SCREENSHOT_INSTRUCTION = "Write the HTML code of the web page in this picture, styled with Tailwind CSS."

# The service that the model's pages fetch example images from has closed; this one takes the sizes the same way.
_ADDRESS = r"https://source\.unsplash\.com/random/(\d+)x(\d+)/?"
# What is looked for may hold spaces; where the address stands in quotes, it ends with these.
_CLOSED_IMAGES = re.compile(rf"(?<=\"){_ADDRESS}\?[^\"<>\n]*(?=\")|(?<='){_ADDRESS}\?[^'<>\n]*(?=')|"
                            rf"{_ADDRESS}(?:\?[^'\")\s]*)?")


def html_of(text: str) -> str:
    """The page in an answer: without a Markdown fence around it, example images from a service that is open."""
    fenced = re.search(r"```(?:html)?\s*\n(.*?)(?:\n```|\Z)", text, re.DOTALL)
    return _CLOSED_IMAGES.sub(_open_image, fenced[1] if fenced else text)


def _open_image(address: re.Match[str]) -> str:
    width, height = (size for size in address.groups() if size is not None)
    return f"https://picsum.photos/{width}/{height}"


def read_resume(path: str | os.PathLike) -> str:
    """Text of a resume.

    Raises:
        PromptError: when the file is missing, empty or no text.
    """
    try:
        text = read_text(path, PromptError)
    except OSError as error:
        raise PromptError(f"The resume {path} cannot be read ({error.strerror}); give the path of a Markdown "
                          "file.") from error
    if not text.strip():
        raise PromptError(f"The resume {path} is empty; give a Markdown file with text.")
    return text


def free_target(path: str | os.PathLike | None, overwrite: bool) -> Path | None:
    """Where a page goes.

    Raises:
        FileExistsError: when the file exists and may not be overwritten.
        OSError: when it cannot be written: its folder is missing, a folder stands in its place.
    """
    if path is None:
        return None
    path = Path(path)
    check_target(path, "save_to")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; choose another save_to, or set overwrite=True.")
    return path
