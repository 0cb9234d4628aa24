"""Preference pairs of sampled answers: the best and the worst of each prompt, in this package's own form of pairs."""
from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mindformers_ixc.data.forms import open_sample, read_pair
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import write_whole
from mindformers_ixc.generation.judge_file import Verdict
from mindformers_ixc.generation.sampled_answers import SampledPrompt
from mindformers_ixc.processing.messages import read_history
from mindformers_ixc.processing.prompt import chat_turns

# How a file of pairs may end: a JSON list, or JSON lines.
ENDINGS = (".json", ".jsonl")

# Why there is no pair of a prompt.
FAILED = "were not answered"
UNJUDGED = "have no verdict"
ALIKE = "have fewer than two different, finished answers"
UNUSABLE = "have a verdict that names an empty or unfinished answer"
CLOSE = "have a margin below the least"
LONG = "have a chosen answer that is too long beside the rejected one"
REPEATED = "ask what an earlier prompt asks"
UNREADABLE = "would be read otherwise as training data (a picture's mark in the text, for one)"


@dataclass(frozen=True)
class PairOptions:
    """Which pairs are kept.

    Attributes:
        min_margin: difference of the merits of best and worst at least; it is above 0 in any case.
        max_length_ratio: characters of the chosen answer for each of the rejected one at most; `None` is no limit.
    """

    min_margin: float = 0.0
    max_length_ratio: float | None = None


@dataclass
class Labelled:
    """Pairs, and what became of all prompts.

    Attributes:
        rows: the pairs, as data has them.
        margins: of the pairs for which there are merits.
        lengths: characters of chosen and rejected answer of each pair.
        dropped: prompts without a pair, by the reason.
    """

    rows: list[dict] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def report(self) -> str:
        """Lines that say how many pairs there are, and why there are no more."""
        count = len(self.rows)
        lines = [f"{count} pairs of {count + sum(self.dropped.values())} prompts."]
        if count:
            chosen, rejected = (sum(lengths) / count for lengths in zip(*self.lengths))
            lines.append(f"Chosen answers have {chosen:.1f} characters on average, rejected ones {rejected:.1f}.")
        if self.margins:
            lines.append(f"The margin is {sum(self.margins) / len(self.margins):.3f} on average.")
        lines += [f"Left out: {number} that {reason}." for reason, number in self.dropped.most_common()]
        return "\n".join(lines)


def label(prompts: Iterable[SampledPrompt], verdicts: Mapping[str, Verdict], target: str | os.PathLike,
          options: PairOptions) -> Labelled:
    """Makes pairs of the best and the worst answer of each prompt.

    Args:
        prompts: with their samples.
        verdicts: on the samples, by the prompts' ids as texts.
        target: file that the pairs are for: their pictures are named as they are found from its folder.
        options: which pairs are kept.

    Raises:
        DataError: for a picture that is not there, a margin where a verdict has none, or one that no number holds.
    """
    found = Labelled()
    asked: set[str] = set()
    folder = Path(os.path.realpath(target)).parent
    for prompt in prompts:
        chosen = _choose(prompt, verdicts.get(str(prompt.id)), options)
        if isinstance(chosen, str):
            found.dropped[chosen] += 1
            continue
        best, worst, margin = chosen
        texts = prompt.answers[best].strip(), prompt.answers[worst].strip()
        lengths = len(texts[0]), len(texts[1])
        question = json.dumps([prompt.question.get(key) for key in ("query", "history", "meta_instruction", "images")])
        row = _row(prompt, texts, margin, folder)
        if options.max_length_ratio is not None and lengths[0] > options.max_length_ratio * lengths[1]:
            found.dropped[LONG] += 1
        elif question in asked:
            found.dropped[REPEATED] += 1
        elif not _reads_alike(row, prompt, texts):
            found.dropped[UNREADABLE] += 1
        else:
            asked.add(question)
            found.rows.append(row)
            found.lengths.append(lengths)
            found.margins += [] if margin is None else [margin]
    return found


def _choose(prompt: SampledPrompt, verdict: Verdict | None,
            options: PairOptions) -> tuple[int, int, float | None] | str:
    """Numbers of best and worst answer with their margin (`None`: a judge named them), or why there are none."""
    if not prompt.answers:
        return FAILED
    usable_numbers = prompt.usable()
    if verdict is None:
        return ALIKE if len(usable_numbers) < 2 else UNJUDGED
    if verdict.pair is not None:
        if options.min_margin:
            raise DataError(f"--min_margin is {options.min_margin:g}, but the verdict on the prompt {prompt.id!r:.60} "
                            "names a pair and has no margin; leave the option out, or have the judge give scores.")
        usable = all(prompt.finished[number] and prompt.answers[number].strip() for number in verdict.pair)
        return (*verdict.pair, None) if usable else UNUSABLE
    if len(usable_numbers) < 2:
        return ALIKE
    best, worst = (pick(usable_numbers, key=verdict.merits.__getitem__) for pick in (max, min))
    margin = verdict.merits[best] - verdict.merits[worst]
    if not math.isfinite(margin):
        raise DataError(f"The verdict on the prompt {prompt.id!r:.60} has {verdict.merits[best]:g} and "
                        f"{verdict.merits[worst]:g}, whose difference is beyond a float's range; give smaller numbers.")
    return (best, worst, margin) if margin > 0 and margin >= options.min_margin else CLOSE


def _row(prompt: SampledPrompt, texts: tuple[str, str], margin: float | None, folder: Path) -> dict:
    """A pair as data has it: with `prompt`, or where rounds came before, as two conversations."""
    question = prompt.question
    row: dict = {"id": prompt.id}
    if question.get("images"):
        row["image"] = [_name_from(str(image), folder, prompt) for image in question["images"]]
    if question.get("meta_instruction"):
        row["system"] = question["meta_instruction"]
    history = read_history(question.get("history"))
    if history or not question["query"].strip():
        before = [{"from": role, "value": text} for role, text in chat_turns(question["query"], history)]
        for key, text in zip(("conversations_a", "conversations_b"), texts):
            row[key] = [*before, {"from": "assistant", "value": text}]
    else:
        row.update(prompt=question["query"], chosen=texts[0], rejected=texts[1])
    if margin is not None:
        row["metadata"] = {"margin": margin}
    return row


def _name_from(name: str, folder: Path, prompt: SampledPrompt) -> str:
    """A picture's name as it is found from a folder; relative ones start where `sample` was typed."""
    if not os.path.isfile(name):
        raise DataError(f"The picture {name} of the prompt {prompt.id!r:.60} does not exist; label where the samples "
                        "were drawn, since relative paths start there.")
    if os.path.isabs(name):
        return name
    place, base = os.path.split(name)
    return os.path.relpath(os.path.join(os.path.realpath(place or os.curdir), base), folder)


def _reads_alike(row: dict, prompt: SampledPrompt, texts: Sequence[str]) -> bool:
    """Whether data read from a row are the turns that were sampled from."""
    question = prompt.question
    turns = chat_turns(question["query"], read_history(question.get("history")), question.get("meta_instruction") or "")
    try:
        sides = read_pair(open_sample(row, "", (), "pair")[0], "")
    except DataError:
        return False
    return all(side.turns == [*turns, ("assistant", text)] and len(side.files) == len(question.get("images") or ())
               for side, text in zip(sides, texts))


def write_pairs(rows: Sequence[dict], target: str | os.PathLike) -> None:
    """Writes pairs, a JSON list or JSON lines by the ending of the name; the file is whole or not there."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if str(target).endswith(".jsonl"):
        write_whole(target, "".join(f"{line}\n" for line in lines), sync=True)
    else:
        write_whole(target, "[\n" + ",\n".join(lines) + "\n]\n", sync=True)
