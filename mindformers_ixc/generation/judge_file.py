"""A judge's file: what somebody else, a person or another model, says of the samples of each prompt.

JSON lines or a JSON list of objects with `id`, or one JSON object of ids. Of each prompt there is one of

- `scores`: a number for each sample, higher is better;
- `ranks`: a number for each sample, lower is better, equal ones are ties;
- `preferred` and `rejected`: numbers of two samples, from 0.

In an object of ids a list stands for `scores`. Other keys (reasons, a name) are the judge's own and are not read.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mindformers_ixc.errors import DataError
from mindformers_ixc.files import is_json_lines, parse_json, read_text, text_lines
from mindformers_ixc.generation.sampled_answers import SampledPrompt, is_identity
from mindformers_ixc.sections import is_number, is_whole

# Unknown ids that a message names.
NAMED = 5


@dataclass(frozen=True)
class Verdict:
    """What is known of the samples of a prompt.

    Attributes:
        merits: of each, higher is better; empty where a judge has named a pair only.
        pair: numbers of the preferred and the rejected sample, where a judge has named them.
    """

    merits: tuple[float, ...] = ()
    pair: tuple[int, int] | None = None


def read_judge(path: str | os.PathLike, prompts: Sequence[SampledPrompt]) -> dict[str, Verdict]:
    """The verdicts of a judge's file by the ids of prompts, as texts; not every prompt need have one.

    Args:
        path: the file.
        prompts: that were sampled.

    Raises:
        DataError: for ids of no prompt, all that are unknown counted and the first ones named; for a verdict that is
            none, or is not one of so many samples; for an id that comes twice.
        FileNotFoundError: when the file is missing.
    """
    # a line that failed has no id of its own but its number, which another prompt may have as its id
    known = {str(prompt.id): prompt for prompt in sorted(prompts, key=lambda prompt: bool(prompt.answers))}
    entries = _entries(path)
    unknown = list(dict.fromkeys(name for name, _, _ in entries if name not in known))
    if unknown:
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        raise DataError(f"{path} judges {len(unknown)} prompts that are not among the samples: the ids "
                        f"{', '.join(f'{name:.40}' for name in unknown[:NAMED])}{more}; give the file "
                        "that judges these samples.")
    verdicts: dict[str, Verdict] = {}
    for name, value, where in entries:
        if name in verdicts:
            raise DataError(f"{where}: the id {name} was judged before; leave one verdict.")
        # a prompt that could not be answered has no samples to be told apart
        if known[name].answers:
            verdicts[name] = _verdict(value, known[name], f"{where}, id {name}")
    return verdicts


def _entries(path: str | os.PathLike) -> list[tuple[str, Any, str]]:
    """Id, verdict and place of everything in the file."""
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path} is empty; it must say of each id what its samples are worth.")
    if is_json_lines(text, str(path)):
        rows = [(parse_json(line, f"{path}, line {number}", once=True), f"{path}, line {number}") for number, line in
                text_lines(text)]
    else:
        content = parse_json(text, str(path), once=True)
        if isinstance(content, dict) and "id" not in content:
            return [(name, value, str(path)) for name, value in content.items()]
        rows = [(row, f"{path}, entry {number}") for number, row in
                enumerate(content if isinstance(content, list) else [content])]
    for row, where in rows:
        if not isinstance(row, dict) or not is_identity(row.get("id")):
            raise DataError(f"{where}: must be an object with the 'id' of a prompt, found {row!r:.80}.")
    return [(str(row["id"]), row, where) for row, where in rows]


def _verdict(value: Any, prompt: SampledPrompt, where: str) -> Verdict:
    """A verdict in one of the forms."""
    given = {"scores": value} if isinstance(value, list) else value
    forms = [name for name in ("scores", "ranks", "preferred") if isinstance(given, dict) and name in given]
    if len(forms) != 1:
        found = ", ".join(map(str, given)) if isinstance(given, dict) else type(given).__name__
        raise DataError(f"{where}: needs one of 'scores', 'ranks', and 'preferred' with 'rejected', found "
                        f"{found or 'nothing'}.")
    if forms[0] == "preferred":
        return Verdict(pair=_pair(given, prompt, where))
    numbers, count = given[forms[0]], len(prompt.answers)
    if not isinstance(numbers, list) or len(numbers) != count:
        found = f"a list of {len(numbers)}" if isinstance(numbers, list) else type(numbers).__name__
        raise DataError(f"{where}: {forms[0]} must be a list of {count} numbers, one a sample, found {found}.")
    odd = [number for number in numbers if not is_number(number)]
    if odd:
        raise DataError(f"{where}: {forms[0]} has {odd[0]!r:.40}, which is no finite number.")
    sign = -1 if forms[0] == "ranks" else 1
    return Verdict(merits=tuple(sign * float(number) for number in numbers))


def _pair(given: dict, prompt: SampledPrompt, where: str) -> tuple[int, int]:
    numbers = list[int]()
    for key in ("preferred", "rejected"):
        number: Any = given.get(key)
        if not is_whole(number, 0) or number >= len(prompt.answers):
            raise DataError(f"{where}: {key} must be the number of a sample, from 0 to {len(prompt.answers) - 1}, "
                            f"found {number!r:.40}.")
        numbers.append(int(number))
    preferred, rejected = numbers
    if prompt.answers[preferred].strip() == prompt.answers[rejected].strip():
        raise DataError(f"{where}: the preferred answer, sample {preferred}, equals the rejected one, sample "
                        f"{rejected}, so there is nothing to prefer; take the verdict out.")
    return preferred, rejected
