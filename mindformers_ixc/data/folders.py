"""A folder of pictures with a table, or another file of conversations, as data."""
from __future__ import annotations

from pathlib import Path

from mindformers_ixc.data.records.tables import COLUMNS, TABLE_ENDINGS, is_table
from mindformers_ixc.errors import DataError

# Files of conversations, and pictures, by the endings of their names.
CONVERSATION_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".parquet", ".tar",
                        ".mindrecord")
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def find_data(given: str) -> str:
    """The file of some data: itself, or the one table or conversation file of a folder.

    Args:
        given: a file or a folder.

    Raises:
        DataError: for a folder that has none or several, with what to do.
        FileNotFoundError: when there is nothing.
    """
    path = Path(given).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{given} does not exist; name a folder with pictures and a table, or a .csv, .json, "
                                ".jsonl or .txt file.")
    if path.is_file():
        if not (is_table(path) or path.name.lower().endswith((*CONVERSATION_ENDINGS, ".txt"))):
            raise DataError(f"{given} is no data by the ending of its name; it must be a .csv, .json, .jsonl or .txt "
                            "file (or .parquet, .tar, .mindrecord), or a folder with pictures and a table.")
        return str(path)
    names = sorted(name for name in path.iterdir() if name.is_file())
    for endings in (TABLE_ENDINGS, CONVERSATION_ENDINGS):
        found = [name for name in names if name.name.lower().endswith(endings)]
        if len(found) > 1:
            raise DataError(f"{given} has {len(found)} files that may be the data ("
                            f"{', '.join(name.name for name in found[:3])}); name the one to take.")
        if found:
            return str(found[0])
    pictures = [name.name for name in names if name.suffix.lower() in PICTURE_ENDINGS]
    for name in names:
        is_table(name)        # a spreadsheet's own file is refused with what to do
    raise DataError(f"{given} has {len(pictures)} pictures and no table of questions. Write {path / 'questions.csv'}: "
                    f"the first line is `{','.join(COLUMNS)}`, every other one a question, such as "
                    f"`{pictures[0] if pictures else 'cat.jpg'},What is shown in the picture?,a cat`.")
