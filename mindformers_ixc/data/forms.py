"""The forms in which samples are written, by this and other trainers, as turns and the files they name.

Nothing of a sample is dropped: what is not read is an error that names the key, unless it holds nothing, is known to
describe the sample only (`METADATA`) or is named in `ignore_keys`. docs/data.md lists the forms.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mindformers_ixc.data.paths import cut, shown
from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.prompt import IMAGE_PLACEHOLDER
from mindformers_ixc.processing.video import is_video
from mindformers_ixc.sections import hint, is_number

# Names under which data sets have the user, the model and the system speak.
ROLES = {"human": "user", "user": "user", "prompter": "user",
         **dict.fromkeys(("bot", "gpt", "assistant", "chatgpt", "gpt4", "gpt-4", "gpt-3.5-turbo", "bing", "bard",
                          "claude", "gemini", "palm", "llama", "vicuna", "model", "chatbot", "ai"), "assistant"),
         "system": "system"}

# Other trainers' marks of a file's place in a question; every mark.
IMAGE_TAG, VIDEO_TAG = "<image>", "<video>"
TAG = re.compile("|".join((IMAGE_PLACEHOLDER, IMAGE_TAG, VIDEO_TAG)))

PICTURE_KEYS, VIDEO_KEYS = ("image", "images"), ("video", "videos")
MEDIA_KEYS = (*PICTURE_KEYS, *VIDEO_KEYS)

# Key of a turn that has the weight of an answer, as in OpenAI's fine-tuning format, and the least one that is not 0 and
# the largest: the rest is a mistake, since a step divides by the sum of its weights, which float32 must hold.
WEIGHT_KEY, LEAST_WEIGHT, LARGEST_WEIGHT = "weight", 1e-6, 1_000_000

# Keys of lists of turns.
LISTS = ("conversations", "messages")

# Keys of each form: those that show it is that form, and those that it may have besides.
FORMS = {"conversations": (("conversations",), ()), "messages": (("messages",), ()), "caption": (("caption",), ()),
         "query": (("query", "response"), ("history",)),
         "instruction": (("instruction", "output"), ("input", "history")),
         "prompt": (("prompt", "chosen", "rejected"), ("reference_logps",)),
         "conversations_a": (("conversations_a", "conversations_b"), ("reference_logps",))}
SAMPLE_FORMS = tuple(name for name in FORMS if name not in ("prompt", "conversations_a"))

# Every key that something is learnt from.
CONTENT_KEYS = tuple(dict.fromkeys((*MEDIA_KEYS, "system", *(key for own in FORMS.values() for part in own
                                                             for key in part))))

# Keys that only say where a sample comes from or what it is like; of the others, those that speak of a picture.
METADATA = frozenset((
    "id", "uid", "uuid", "idx", "index", "sample_id", "conversation_id", "question_id", "annotation_id", "hash",
    "source", "data_source", "dataset", "dataset_name", "subset", "split", "category", "type", "task", "task_type",
    "question_type", "answer_type", "topic", "difficulty", "tags", "model", "model_name", "lang", "language", "license",
    "created", "timestamp", "date", "score", "quality", "metadata", "meta", "meta_info", "tokens", "num_turns"))
PICTURE_METADATA = frozenset(("image_id", "video_id", "width", "height", "image_size"))

_KNOWN = METADATA.union(CONTENT_KEYS)
_KNOWN_WITH_FILES = _KNOWN | PICTURE_METADATA


class File(NamedTuple):
    """A picture or video that a sample names.

    Attributes:
        name: as written.
        field: the key it stands in, with its number.
        video: whether it is one.
    """

    name: str
    field: str
    video: bool


class Form(NamedTuple):
    """A sample without its form.

    Attributes:
        turns: (role, text), user and assistant in turn, after an optional system turn; `<ImageHere>` in a user's turn
            is a file's place, and a single file may go without.
        files: in the order of their places.
        weights: of the answers, one each, where weights are read.
    """

    turns: list[tuple[str, str]]
    files: list[File]
    weights: list[float]


def count_places(turns: Iterable[tuple[str, str]]) -> int:
    """Places of pictures in a conversation: those of its questions, since in answers `<ImageHere>` is text."""
    return sum(text.count(IMAGE_PLACEHOLDER) for role, text in turns if role == "user")


@dataclass
class _Place:
    """Where a file stands: its tag, whether the place is kept even for a single file, and the file if it is known."""

    tag: str
    kept: bool = False
    file: File | None = None


@dataclass
class _Turn:
    role: str
    pieces: list[str | _Place]
    field: str
    weight: float = 1.0

    @property
    def text(self) -> str:
        """Its text, places as `<ImageHere>`."""
        return "".join(piece if isinstance(piece, str) else IMAGE_PLACEHOLDER for piece in self.pieces)


def read_form(row: object, where: str, ignore_keys: Iterable[str] = (), ask: Callable[[], str] = str,
              weighs: bool = False) -> Form:
    """Reads a sample in any of the forms.

    Args:
        row: any value of a JSON file.
        where: file and sample, for messages.
        ignore_keys: keys to be left aside, of the sample and of its turns.
        ask: gives the question that a caption answers.
        weighs: whether answers may say how much they count.

    Raises:
        DataError: naming sample and key.
    """
    row, where = open_sample(row, where, ignore_keys, "sample")
    form = _form_of(row, where)
    if form == "caption":
        turns = [_Turn("user", _pieces(ask()), form), _Turn("assistant", [_text(row, form, where)], form)]
    elif form == "query":
        turns = [*_history(row, where), *_pair(row, "query", "response", where)]
    elif form == "instruction":
        turns = [*_history(row, where), *_pair(row, "instruction", "output", where, "input")]
    else:
        turns = _listed_turns(row.get(form), form, where, ignore_keys, weighs)
    return _finish(turns, row, form, where, weighs)


def read_pair(row: Mapping, where: str, ignore_keys: Iterable[str] = ()) -> tuple[Form, Form]:
    """The chosen and the rejected side of a preference pair that `open_sample` gave.

    Raises:
        DataError: naming sample and key.
    """
    if any(holds(row.get(key)) for key in FORMS["conversations_a"][0]):
        return _two_conversations(row, where, ignore_keys)
    if not any(holds(row.get(key)) for key in ("chosen", "rejected")):
        raise DataError(f"{where}, field chosen: is missing, and so is rejected; a pair has two answers, `chosen` and "
                        "`rejected` to a `prompt`, or `conversations_a` and `conversations_b`.")
    asked = next((key for key in LISTS if holds(row.get(key)) and not holds(row.get("prompt"))), "prompt")
    check_form_keys(row, "prompt", where, asked)
    chosen, rejected = (_finish(_pair_side(row, asked, side, where, ignore_keys), row, asked, where)
                        for side in ("chosen", "rejected"))
    return chosen, rejected


def _two_conversations(row: Mapping, where: str, ignore_keys: Iterable[str]) -> tuple[Form, Form]:
    """A pair in the public form of reward models' data: two conversations that differ in the last answer."""
    keys = FORMS["conversations_a"][0]
    check_form_keys(row, "conversations_a", where)
    chosen, rejected = (_finish(_listed_turns(row.get(key), key, where, ignore_keys), row, key, where) for key in keys)
    if chosen.turns[:-1] != rejected.turns[:-1]:
        raise DataError(f"{where}, field {keys[1]}: differs from {keys[0]} before the last answer, so they answer "
                        "different questions; take the pair out.")
    return chosen, rejected


def _pair_side(row: Mapping, asked: str, side: str, where: str, ignore_keys: Iterable[str]) -> list[_Turn]:
    """A question, as a text or as turns, and one of its answers, as a text or as a turn."""
    answer = row.get(side)
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict):
        answer = answer[0]
    if isinstance(answer, dict):
        (turn,), _ = _read_turns([answer], side, where, ignore_keys)
        if turn.role != "assistant":
            raise DataError(f"{where}, field {side}: must be an answer, found a turn of the {turn.role}.")
        answer = turn.text
    if asked == "prompt" and not isinstance(row.get(asked), list):
        return _pair({asked: row.get(asked), side: answer}, asked, side, where)
    turns, start = _read_turns(row[asked], asked, where, ignore_keys)
    if len(turns) - start != 1:
        raise DataError(f"{where}, field {asked}: a pair has one question and no round before it, whose answer would "
                        f"be trained on too; found {len(turns) - start} turns.")
    return [*turns, _Turn("assistant", [_text({side: answer}, side, where)], side)]


def open_sample(row: object, where: str, ignore_keys: Iterable[str], noun: str) -> tuple[dict, str]:
    """A sample without its ignored keys, and its name in messages with its id.

    Raises:
        DataError: when it is no mapping, or has keys of which nothing is known.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {noun} must be a mapping, found {type(row).__name__}.")
    where += f" (id {shown(row.get('id'))})"
    if isinstance(row.get("id"), (dict, list)):
        raise DataError(f"{where}, field id: must be a text or a number.")
    row = {key: value for key, value in row.items() if key not in ignore_keys}
    _check_keys(row, _KNOWN_WITH_FILES if any(map(holds, map(row.get, MEDIA_KEYS))) else _KNOWN, where, CONTENT_KEYS)
    return row, where


def holds(value: object) -> bool:
    """Whether a value says anything; tables with columns of several data sets are full of those that do not."""
    return value is not None and value not in ("", [], {})


def _check_keys(row: Mapping, known: Iterable[str], where: str, choices: Iterable[str], prefix: str = "") -> None:
    for key, value in row.items():
        if key not in known and holds(value):
            raise DataError(f"{where}, field {prefix}{cut(key)}: is not read, and what it holds ({shown(value)}) would "
                            f"be lost; {hint(key, choices)} If nothing is to be learnt from it, name the key in "
                            "ignore_keys.")


def _form_of(row: Mapping, where: str) -> str:
    found = [name for name in SAMPLE_FORMS if any(holds(row.get(key)) for key in FORMS[name][0])]
    of_a_pair = next((key for name in ("prompt", "conversations_a") for key in FORMS[name][0][-2:]
                      if holds(row.get(key))), None)
    if not found and of_a_pair:
        raise DataError(f"{where}, field {of_a_pair}: is that of a preference pair, and conversations are read here; "
                        "pairs are read where train_dataset_task.type is IXC25PreferenceDataset, as in the recipes "
                        "ixc25_dpo_tiny and ixc25_reward_tiny.")
    if not found:
        raise DataError(f"{where}, field conversations: must be a list of turns, found "
                        f"{shown(row.get('conversations'))}; a sample has one of {', '.join(SAMPLE_FORMS)}.")
    if len(found) > 1:
        raise DataError(f"{where}, field {found[1]}: the sample has {found[0]} already; give one of them, or name the "
                        "other in ignore_keys.")
    check_form_keys(row, found[0], where)
    return found[0]


def check_form_keys(row: Mapping, form: str, where: str, *more: str) -> None:
    """Refuses keys that belong to another form, those of `more` aside.

    Raises:
        DataError: naming the key.
    """
    own = (*MEDIA_KEYS, "system", *FORMS[form][0], *FORMS[form][1], *more)
    for key in row:
        if key in CONTENT_KEYS and key not in own and holds(row[key]):
            raise DataError(f"{where}, field {key}: is not read beside {FORMS[form][0][0]}, and what it holds "
                            f"({shown(row[key])}) would be lost; name the key in ignore_keys if it may.")


def _text(row: Mapping, key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}, field {key}: must be a text that is not empty, found {shown(value)}.")
    return value


def _pair(row: Mapping, question: str, answer: str, where: str, more: str = "") -> list[_Turn]:
    """A question and its answer from two keys; `more` is the key of what may stand below the question."""
    keys = [key for key in (question, more) if key and holds(row.get(key))] or [question]
    asked = "\n".join(_text(row, key, where) for key in keys)
    return [_Turn("user", _pieces(asked), question), _Turn("assistant", [_text(row, answer, where)], answer)]


def _history(row: Mapping, where: str) -> list[_Turn]:
    """The rounds of a key `history`, [question, answer] each."""
    rounds = row.get("history") or []
    if not isinstance(rounds, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in rounds):
        raise DataError(f"{where}, field history: must be a list of [question, answer], found {shown(rounds)}.")
    turns = []
    for i, pair in enumerate(rounds):
        question, answer = f"history[{i}][0]", f"history[{i}][1]"
        turns += _pair({question: pair[0], answer: pair[1]}, question, answer, where)
    return turns


def _listed_turns(rows: object, form: str, where: str, ignore_keys: Iterable[str],
                  weighs: bool = False) -> list[_Turn]:
    """The rounds of a key `conversations` or `messages`."""
    turns, start = _read_turns(rows, form, where, ignore_keys, weighs)
    if (len(turns) - start) % 2 or len(turns) == start:
        raise DataError(f"{where}, field {form}: ends without an answer.")
    return turns


def _read_turns(rows: object, form: str, where: str, ignore_keys: Iterable[str],
                weighs: bool = False) -> tuple[list[_Turn], int]:
    """Turns, whose order is checked, and the number of the first that is not the system's."""
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{where}, field {form}: must be a list of turns, found {shown(rows)}.")
    turns, start = [], 0
    for i, row in enumerate(rows):
        field = f"{form}[{i}]"
        speaker, content = turn_keys(row, f"{where}, field {field}")
        role = ROLES.get(str(row[speaker]).lower())
        if role is None:
            raise DataError(f"{where}, field {field}.{speaker}: {shown(row[speaker])} is no role; the choices are "
                            f"{', '.join(ROLES)}.")
        weighed = weighs and role == "assistant" and WEIGHT_KEY not in ignore_keys
        if role == "assistant" and not weighed and row.get(WEIGHT_KEY) is not None and WEIGHT_KEY not in ignore_keys:
            raise DataError(f"{where}, field {field}.{WEIGHT_KEY}: answers count by it with train_dataset.data_loader."
                            f"loss_on: weights, and nowhere else; set that, or name {WEIGHT_KEY} in ignore_keys.")
        own = (speaker, content, WEIGHT_KEY) if weighed else (speaker, content)
        if len(row) > 2:
            _check_keys(row, {*own, *METADATA, *ignore_keys}, where, own, f"{field}.")
        turns.append(_read_turn(role, row[content], f"{field}.{content}", where))
        if weighed and row.get(WEIGHT_KEY) is not None:
            turns[-1].weight = _weight(row[WEIGHT_KEY], f"{field}.{WEIGHT_KEY}", where)
        start = int(turns[0].role == "system")
        expected = ("user", "assistant")[(i - start) % 2]
        if i >= start and role != expected and form not in ("chosen", "rejected"):
            raise DataError(f"{where}, field {field}.{speaker}: expected a turn of the {expected}, found one of the "
                            f"{role}; questions and answers must alternate.")
    return turns, start


def _weight(value: object, field: str, where: str) -> float:
    if not is_number(value) or not (value == 0 or LEAST_WEIGHT <= float(value) <= LARGEST_WEIGHT):  # type: ignore
        raise DataError(f"{where}, field {field}: must be 0 or a number from {LEAST_WEIGHT:g} to {LARGEST_WEIGHT:,}, "
                        f"found {shown(value)}.")
    return float(value)  # type: ignore[arg-type]


def turn_keys(row: Any, where: str) -> tuple[str, str]:
    """The keys of a turn that hold its speaker and its content.

    Raises:
        DataError: when it is no mapping with one of each.
    """
    keys = [[key for key in names if row.get(key) is not None] if isinstance(row, dict) else []
            for names in (("from", "role"), ("value", "content"))]
    if [len(found) for found in keys] != [1, 1] or not isinstance(row[keys[0][0]], str):
        raise DataError(f"{where}: needs 'from' and a text 'value', or 'role' and 'content', found {shown(row)}.")
    return keys[0][0], keys[1][0]


def _read_turn(role: str, content: object, field: str, where: str) -> _Turn:
    turn = _Turn(role, [], field)
    if isinstance(content, str):
        turn.pieces = _pieces(content) if role == "user" else [content]
    elif isinstance(content, list):
        for i, part in enumerate(content):
            turn.pieces += _read_part(part, role, f"{field}[{i}]", where)
    else:
        raise DataError(f"{where}, field {field}: must be a text (a 'value' or 'content'), or a list of parts, found "
                        f"{shown(content)}.")
    if role == "assistant" and not turn.text.strip():
        raise DataError(f"{where}, field {field}: the answer is empty, so there is nothing to learn from it; take "
                        "question and answer out.")
    return turn


def _read_part(part: Any, role: str, field: str, where: str) -> list[str | _Place]:
    """A part of a content list: text, or a picture or video, named here or the next one of the sample's."""
    kind = part.get("type") if isinstance(part, dict) else None
    medium = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}.get(str(kind), "")
    if kind != "text" and not medium:
        raise DataError(f"{where}, field {field}: a part has the type text, image, image_url, video or video_url, "
                        f"found {shown(part)}.")
    keys = ("type", "text") if kind == "text" else ("type", medium, f"{medium}_url", "path", "url")
    _check_keys(part, keys, where, keys, f"{field}.")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise DataError(f"{where}, field {field}.text: must be a text, found {shown(part.get('text'))}.")
        return _pieces(part["text"]) if role == "user" else [part["text"]]
    if role != "user":
        raise DataError(f"{where}, field {field}: stands in a turn of the {role}; only questions have pictures.")
    named = [key for key in keys[1:] if holds(part.get(key))]
    tag = VIDEO_TAG if medium == "video" else IMAGE_TAG
    file = _file({key: part[key] for key in named}, medium == "video", field, where) if named else None
    return [_Place(tag, True, file)]


def _pieces(text: str) -> list[str | _Place]:
    """A question as text and the places of files."""
    pieces: list[str | _Place] = []
    end = 0
    for match in TAG.finditer(text):
        pieces += [text[end:match.start()], _Place(match.group())]
        end = match.end()
    return [*pieces, text[end:]]


def _files(row: Mapping, keys: Iterable[str], where: str) -> list[File]:
    """The files that a sample names by one of some keys."""
    given = [key for key in keys if holds(row.get(key))]
    if len(given) > 1:
        raise DataError(f"{where}, field {given[1]}: the sample has {given[0]} already; name all files in one of them.")
    video = given[:1] != [] and given[0] in VIDEO_KEYS
    return [_file(entry, video, f"{key}[{i}]" if isinstance(row[key], list) else key, where) for key in given
            for i, entry in enumerate(row[key] if isinstance(row[key], list) else [row[key]])]


def _file(entry: Any, video: bool, field: str, where: str) -> File:
    """A file from its path, or from a mapping that holds the path."""
    name = entry
    for _ in range(2):      # {"type": "image_url", "image_url": {"url": ...}} is the deepest
        if isinstance(name, dict):
            held = [value for key, value in name.items() if holds(value) and key != "detail"]
            known = all(key in ("path", "url", "image", "video", "image_url", "video_url", "detail")
                        for key, value in name.items() if holds(value))
            name = held[0] if known and len(held) == 1 else None
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where}, field {field}: must be a path or a list of paths, found {shown(entry)}.")
    if video and not is_video(name):
        raise DataError(f"{where}, field {field}: {cut(name)} is no video by the ending of its name.")
    return File(name, field, video or is_video(name))


def _finish(turns: list[_Turn], row: Mapping, form: str, where: str, weighs: bool = False) -> Form:
    """Adds a system turn of its own key, and gives the files their places and the answers their weights."""
    if holds(row.get("system")):
        if turns[0].role == "system":
            raise DataError(f"{where}, field system: there is a turn of the system too; give one of them.")
        turns = [_Turn("system", [_text(row, "system", where)], "system"), *turns]
    if turns[0].role == "system":
        if TAG.search(turns[0].text):
            raise DataError(f"{where}, field {turns[0].field}: a picture's place stands in the turn of the system; "
                            "only questions have pictures.")
        turns = turns if turns[0].text.strip() else turns[1:]
    pictures, videos = _files(row, PICTURE_KEYS, where), _files(row, VIDEO_KEYS, where)
    files = _assign([piece for turn in turns for piece in turn.pieces if isinstance(piece, _Place)], pictures, videos,
                    f"{where}, field {form}")
    for turn in turns:
        if not files and not turn.text.strip():
            raise DataError(f"{where}, field {turn.field}: the question is empty, and there is no picture to ask "
                            "about; take question and answer out.")
    weights = [turn.weight for turn in turns if weighs and turn.role == "assistant"]
    if weights and not any(weights):
        raise DataError(f"{where}, field {form}: every answer has the {WEIGHT_KEY} 0, so there is nothing to learn "
                        "from it; take the sample out.")
    return Form([(turn.role, _rendered(turn, len(files))) for turn in turns], files, weights)


def _rendered(turn: _Turn, files: int) -> str:
    """A turn's text; a single file whose place is another trainer's tag goes in front of everything, without one."""
    tags = [piece for piece in turn.pieces if isinstance(piece, _Place)]
    if files == 1 and tags and not tags[0].kept and tags[0].tag != IMAGE_PLACEHOLDER:
        return "".join(piece for piece in turn.pieces if isinstance(piece, str)).strip()
    return turn.text


def _assign(places: list[_Place], pictures: list[File], videos: list[File], where: str) -> list[File]:
    """The sample's files in the order of their places.

    Raises:
        DataError: when places and files differ in number or kind.
    """
    open_places = [place for place in places if place.file is None]
    rest = [*pictures, *videos]
    if not places and len(rest) == 1:
        return rest
    tags = [place.tag for place in open_places]
    if pictures and videos:
        if IMAGE_PLACEHOLDER in tags:
            raise DataError(f"{where}: with pictures and videos, {IMAGE_PLACEHOLDER} can be either; write {IMAGE_TAG} "
                            f"and {VIDEO_TAG}.")
        _compare(tags.count(IMAGE_TAG), [IMAGE_TAG], len(pictures), "pictures", where)
        _compare(tags.count(VIDEO_TAG), [VIDEO_TAG], len(videos), "videos", where)
        waiting = {IMAGE_TAG: iter(pictures), VIDEO_TAG: iter(videos)}
    else:
        _compare(len(tags), tags, len(rest), "pictures", where)
        waiting = dict.fromkeys((IMAGE_PLACEHOLDER, IMAGE_TAG, VIDEO_TAG), iter(rest))
    files = [place.file or next(waiting[place.tag]) for place in places]
    for place, file in zip(places, files):
        if place.tag == VIDEO_TAG and not file.video:
            raise DataError(f"{where}: {VIDEO_TAG} is the place of {cut(file.name)}, which is no video by the ending "
                            "of its name.")
    return files


def _compare(places: int, tags: list[str], files: int, noun: str, where: str) -> None:
    if places != files:
        named = " or ".join(dict.fromkeys(tags)) or IMAGE_PLACEHOLDER
        remedy = "and every place its picture; where it is meant as text, write it otherwise" if places else (
            f"{IMAGE_PLACEHOLDER}, {IMAGE_TAG} or {VIDEO_TAG}")
        raise DataError(f"{where}: {places} {named} for {files} {noun}; give every picture its place in a question "
                        f"(only a single picture may go without), {remedy}.")
