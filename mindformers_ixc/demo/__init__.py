"""Demo data shipped with the package: twelve images, questions about them, and a small tokenizer.

``train.json`` holds single-turn questions, ``multi.json`` several turns, two images and text only,
``data.txt`` lists both in the public ``<json> <thousands>`` format, ``tokenizer.model`` is a SentencePiece
model of 1024 pieces with the public model's special tokens, and ``images/`` holds the images (origins and
licences in ``README.md``). All but the README is written by ``scripts/make_demo.py``. An answer depends on
the image: the same questions are asked of all of them.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["demo_path"]


def demo_path(name: str = "") -> Path:
    """Path of a demo file, or of the demo folder itself when ``name`` is empty.

    Args:
        name: path relative to the demo folder with forward slashes, for example ``"train.json"`` or
            ``"images/cat.jpg"``.

    Returns:
        An existing path on disk (the package is never installed zipped).

    Raises:
        FileNotFoundError: the demo has no such file.
    """
    folder = Path(str(files(__name__)))
    path = folder / name
    if not path.exists():
        known = sorted(
            p.relative_to(folder).as_posix()
            for p in folder.rglob("*")
            if p.is_file() and p.suffix not in (".py", ".pyc")
        )
        raise FileNotFoundError(f"The demo has no file {name!r}; choose one of: {', '.join(known)}.")
    return path
