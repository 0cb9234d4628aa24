"""Published datasets, as they are published, to conversation files (`docs/data.md`).

Every converter takes the published JSON and gives samples `{"id", "image", "conversations"}`, or `{"id", "image",
"caption"}` for captions, whose question is chosen when they are read. What it leaves out it counts by reason.
"""
from __future__ import annotations

import contextlib
import json
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mindformers_ixc.data.forms import MEDIA_KEYS, read_form
from mindformers_ixc.data.paths import missing_file
from mindformers_ixc.data.records import open_records
from mindformers_ixc.data.records.published import Published
from mindformers_ixc.data.shared_talks import share_gpt
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import whole_file

# OCR-VQA numbers its splits.
OCR_VQA_SPLITS = {"1": "train", "2": "validation", "3": "test"}

# Reasons that a message lists; the rest are counted.
LISTED_REASONS = 10


def question_and_answer(identity: object, image: str, pairs: list[tuple[str, str]]) -> dict:
    """A conversation of questions and answers about a picture."""
    turns = [{"from": role, "value": text} for pair in pairs for role, text in zip(("human", "bot"), pair)]
    return {"id": identity, "image": image, "conversations": turns}


def is_text(value: object) -> bool:
    """Whether a value is a text that says something."""
    return isinstance(value, str) and bool(value.strip())


def is_number_or_text(value: object) -> bool:
    """Whether a value can name a picture."""
    return is_text(value) or (isinstance(value, int) and not isinstance(value, bool))


def coco_captions(captions: dict, dropped: Counter[str]) -> Iterator[dict]:
    """COCO captions (`captions_train2017.json`): one sample for each caption."""
    names = {str(image["id"]): image["file_name"] for image in captions["images"]}
    for row in captions["annotations"]:
        name = names.get(str(row.get("image_id")))
        if not is_text(row.get("caption")):
            dropped["captions that are empty or no text"] += 1
        elif not is_text(name):
            dropped["captions of pictures that the file does not have"] += 1
        else:
            yield {"id": row.get("id"), "image": name, "caption": row["caption"].strip()}


def vqa_v2(questions: dict, annotations: dict, dropped: Counter[str]) -> Iterator[dict]:
    """VQA v2 (`v2_OpenEnded_mscoco_*_questions.json`, `v2_mscoco_*_annotations.json`): the answer most people gave."""
    answers = {str(row["question_id"]): row["multiple_choice_answer"] for row in annotations["annotations"]}
    for row in questions["questions"]:
        answer = answers.get(str(row["question_id"]))
        if not is_text(row.get("question")):
            dropped["questions that are empty or no text"] += 1
        elif not is_text(answer):
            dropped["questions without an answer"] += 1
        elif not str(row.get("image_id")).isdecimal():
            dropped["questions without the number of a picture"] += 1
        else:
            image = f"COCO_{questions['data_subtype']}_{int(row['image_id']):012d}.jpg"
            yield question_and_answer(row["question_id"], image, [(row["question"], str(answer))])


def text_vqa(data: dict, dropped: Counter[str]) -> Iterator[dict]:
    """TextVQA (`TextVQA_0.5.1_*.json`): the most frequent of the ten answers, the first of equals."""
    for row in data["data"]:
        given = row.get("answers")
        answers = Counter(filter(is_text, given if isinstance(given, list) else []))
        if not is_text(row.get("question")):
            dropped["questions that are empty or no text"] += 1
        elif not answers:
            dropped["questions without an answer"] += 1
        elif not is_number_or_text(row.get("image_id")):
            dropped["questions without a picture"] += 1
        else:
            answer = answers.most_common(1)[0][0]
            yield question_and_answer(row["question_id"], f"{row['image_id']}.jpg", [(row["question"], answer)])


def ocr_vqa(data: dict, dropped: Counter[str], split: str = "train") -> Iterator[dict]:
    """OCR-VQA (`dataset.json`): all questions about a cover in one conversation.

    Args:
        data: the published file.
        dropped: counts what is left out.
        split: `train`, `validation` or `test`.
    """
    for identity, row in data.items():
        found = OCR_VQA_SPLITS.get(str(row.get("split")))
        if found is None:
            dropped["covers of an unknown split"] += 1
        if found != split:
            continue
        questions, answers = row.get("questions"), row.get("answers")
        if not isinstance(questions, list) or not isinstance(answers, list) or len(questions) != len(answers):
            dropped["covers without as many answers as questions"] += 1
            continue
        pairs = [pair for pair in zip(questions, answers) if all(map(is_text, pair))]
        if len(pairs) < len(questions):
            dropped["questions or answers that are empty or no text"] += len(questions) - len(pairs)
        if pairs and not is_text(row.get("imageURL")):
            dropped["covers without a picture"] += 1
        elif pairs:
            suffix = os.path.splitext(urlsplit(row["imageURL"]).path)[1] or ".jpg"
            yield question_and_answer(identity, f"{identity}{suffix}", pairs)


# Converter and the files it takes, by the name of the dataset.
CONVERTERS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "coco_captions": (coco_captions, ("captions",)),
    "vqa_v2": (vqa_v2, ("questions", "annotations")),
    "text_vqa": (text_vqa, ("data",)),
    "ocr_vqa": (ocr_vqa, ("data",)),
    "share_gpt": (share_gpt, ("conversations",)),
    "llava": (share_gpt, ("conversations",)),
}


def convert_dataset(kind: str, files: list[str | os.PathLike], target: str | os.PathLike,
                    images: str | os.PathLike | None = None, dropped: Counter[str] | None = None,
                    lines: bool = False, **options: str) -> int:
    """Converts a published dataset, sample by sample; an older target is replaced, whole.

    Args:
        kind: key of `CONVERTERS`.
        files: the published files, in the order `CONVERTERS` names them.
        target: conversation file to be written.
        images: folder that is put in front of the names of pictures and videos.
        dropped: takes the number of what is left out, by reason.
        lines: whether the target is JSON lines, or a JSON list.
        **options: of the converter (`split` of OCR-VQA).

    Returns:
        Number of samples.

    Raises:
        DataError: for another kind, missing or extra files, files that are not in the published form, or a target that
            is one of them.
        FileNotFoundError: for a missing file or a missing folder of the target.
    """
    if kind not in CONVERTERS:
        raise DataError(f"'{kind}' is no dataset that can be converted; the choices are {', '.join(CONVERTERS)}.")
    converter, names = CONVERTERS[kind]
    if len(files) != len(names):
        raise DataError(f"{kind} is made from {len(names)} files ({', '.join(names)}), {len(files)} were given.")
    _check_target(Path(target), files)
    dropped = Counter() if dropped is None else dropped
    count = 0
    with whole_file(target) as part, open(part, "w", encoding="utf-8") as out:
        try:
            contents = [_read(Path(file), "conversations" in names) for file in files]
            for sample in converter(*contents, dropped=dropped, **options):
                if _is_readable(sample, dropped):
                    _put_below(sample, images)
                    out.write(_line_of(sample) if lines else _entry_of(sample, count))
                    count += 1
        except DataError:
            raise
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise DataError(f"{', '.join(map(str, files))}: not in the form {kind} is published in "
                            f"({type(error).__name__}: {str(error)[:80]}).") from error
        if not count:
            raise DataError(f"{', '.join(map(str, files))} gives no samples{drops_text(dropped)}.")
        out.write("" if lines else "\n]")
    return count


def _line_of(sample: dict) -> str:
    return json.dumps(sample, ensure_ascii=False) + "\n"


def _entry_of(sample: dict, count: int) -> str:
    """A sample in a list, behind so many others."""
    text = textwrap.indent(json.dumps(sample, ensure_ascii=False, indent=1), " ", lambda line: True)
    return ("[\n" if not count else ",\n") + text


def _put_below(sample: dict, images: str | os.PathLike | None) -> None:
    for key in (key for key in MEDIA_KEYS if images is not None and key in sample):
        sample[key] = _below(str(images), sample[key])


def drops_text(dropped: Counter[str]) -> str:
    """What was left out, by reason, for the end of a sentence; nothing where nothing was."""
    if not dropped:
        return ""
    reasons = [f"{count} {reason}" for reason, count in dropped.most_common(LISTED_REASONS)]
    rest = sum(dropped.values()) - sum(count for _, count in dropped.most_common(LISTED_REASONS))
    return f"; left out: {', '.join(reasons)}{f', {rest} for other reasons' if rest else ''}"


def _check_target(target: Path, files: list[str | os.PathLike]) -> None:
    if not target.parent.is_dir():
        raise FileNotFoundError(f"The folder of the target {target} does not exist.")
    if any(target.exists() and Path(file).exists() and target.samefile(file) for file in files):
        raise DataError(f"The target {target} is one of the published files, which it would replace; name another one.")


def _read(file: Path, listed: bool) -> Any:
    if not file.is_file():
        raise missing_file(f"The data file {file}", file)
    if not listed:
        with contextlib.suppress(TypeError):          # it is a list
            published = Published(file)
            published.check()
            return published
    records = open_records(file, "conversation")
    return (records.read(index, place).row for index, place in records)


def _is_readable(sample: dict, dropped: Counter[str]) -> bool:
    """Whether training will read a sample; another one is counted by what the reader says of it."""
    try:
        read_form(sample, "", ask=lambda: "What?")
    except DataError as error:
        said = str(error).partition("), ")[2].partition(";")[0].rstrip(".")
        dropped[f"samples that could not be read again ({said})"] += 1
        return False
    return True


def _below(folder: str, names: Any) -> Any:
    """Names of files with a folder in front, in whatever way a sample writes them."""
    if isinstance(names, list):
        return [_below(folder, name) for name in names]
    if isinstance(names, dict):
        return {key: _below(folder, name) for key, name in names.items()}
    return os.path.join(folder, names) if names else names
