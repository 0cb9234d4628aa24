"""Published datasets, as they are published, to conversation files (`docs/data.md`).

Every converter takes the published JSON and gives samples `{"id", "image", "conversations"}`, or `{"id", "image",
"caption"}` for captions, whose question is chosen when they are read.
"""
from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mindformers_ixc.data.conversations import ROLES
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import write_whole

# OCR-VQA numbers its splits.
OCR_VQA_SPLITS = {1: "train", 2: "validation", 3: "test"}


def question_and_answer(identity: object, image: str | None, pairs: list[tuple[str, str]]) -> dict:
    """A conversation of questions and answers."""
    turns = [{"from": role, "value": text} for pair in pairs for role, text in zip(("human", "bot"), pair)]
    return {"id": identity, **({"image": image} if image else {}), "conversations": turns}


def coco_captions(captions: dict) -> Iterator[dict]:
    """COCO captions (`captions_train2017.json`): one sample for each caption."""
    names = {image["id"]: image["file_name"] for image in captions["images"]}
    for row in captions["annotations"]:
        yield {"id": row["id"], "image": names[row["image_id"]], "caption": row["caption"].strip()}


def vqa_v2(questions: dict, annotations: dict) -> Iterator[dict]:
    """VQA v2 (`v2_OpenEnded_mscoco_*_questions.json`, `v2_mscoco_*_annotations.json`): the answer most people gave."""
    answers = {row["question_id"]: row["multiple_choice_answer"] for row in annotations["annotations"]}
    for row in questions["questions"]:
        image = f"COCO_{questions['data_subtype']}_{row['image_id']:012d}.jpg"
        yield question_and_answer(row["question_id"], image, [(row["question"], answers[row["question_id"]])])


def text_vqa(data: dict) -> Iterator[dict]:
    """TextVQA (`TextVQA_0.5.1_*.json`): the most frequent of the ten answers, the first of equals."""
    for row in data["data"]:
        answer = Counter(row["answers"]).most_common(1)[0][0]
        yield question_and_answer(row["question_id"], f"{row['image_id']}.jpg", [(row["question"], answer)])


def ocr_vqa(data: dict, split: str = "train") -> Iterator[dict]:
    """OCR-VQA (`dataset.json`): all questions about a cover in one conversation.

    Args:
        data: the published file.
        split: `train`, `validation` or `test`.
    """
    for identity, row in data.items():
        if OCR_VQA_SPLITS.get(row["split"]) == split:
            suffix = os.path.splitext(row["imageURL"])[1] or ".jpg"
            yield question_and_answer(identity, f"{identity}{suffix}", list(zip(row["questions"], row["answers"])))


def share_gpt(rows: list) -> Iterator[dict]:
    """ShareGPT (and LLaVA) conversations, made to alternate.

    Shared conversations often begin with an answer or end with a question, and some have empty turns: those are left
    out. A turn of the one who spoke before is joined to that turn.
    """
    for row in rows:
        turns: list[tuple[str, str]] = []
        for turn in row["conversations"]:
            role, text = ROLES.get(str(turn["from"]).lower()), turn["value"].strip()
            if role in (None, "system") or not text or (not turns and role == "assistant"):
                continue
            if turns and turns[-1][0] == role:
                turns[-1] = (role, f"{turns[-1][1]}\n{text}")
            else:
                turns.append((role, text))
        turns = turns[:len(turns) // 2 * 2]
        if turns:
            pairs = [(turns[i][1], turns[i + 1][1]) for i in range(0, len(turns), 2)]
            yield question_and_answer(row.get("id"), row.get("image"), pairs)


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
                    images: str | os.PathLike | None = None, **options: str) -> int:
    """Converts a published dataset; an older target is replaced, whole.

    Args:
        kind: key of `CONVERTERS`.
        files: the published files, in the order `CONVERTERS` names them.
        target: conversation file to be written.
        images: folder that is put in front of image names.
        **options: of the converter (`split` of OCR-VQA).

    Returns:
        Number of samples.

    Raises:
        DataError: for another kind, missing or extra files, or files that are not in the published form.
    """
    if kind not in CONVERTERS:
        raise DataError(f"'{kind}' is no dataset that can be converted; the choices are {', '.join(CONVERTERS)}.")
    converter, names = CONVERTERS[kind]
    if len(files) != len(names):
        raise DataError(f"{kind} is made from {len(names)} files ({', '.join(names)}), {len(files)} were given.")
    contents = [_read(Path(file)) for file in files]
    try:
        samples = list(converter(*contents, **options))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise DataError(f"{', '.join(map(str, files))}: not in the form {kind} is published in "
                        f"({type(error).__name__}: {error}).") from error
    if not samples:
        raise DataError(f"{', '.join(map(str, files))} gives no samples.")
    if images is not None:
        for sample in samples:
            if "image" in sample:
                sample["image"] = os.path.join(images, sample["image"])
    write_whole(target, json.dumps(samples, ensure_ascii=False, indent=1))
    return len(samples)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON ({error}).") from error
