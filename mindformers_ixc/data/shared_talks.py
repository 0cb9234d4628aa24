"""ShareGPT and LLaVA conversations, as people shared them, made to alternate."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from mindformers_ixc.data.forms import MEDIA_KEYS, METADATA, PICTURE_METADATA, ROLES, TAG, holds, turn_keys
from mindformers_ixc.data.paths import cut, shown
from mindformers_ixc.errors import DataError

# Keys whose content the answers are about; without it they would be answers to something else.
NEEDED_KEYS = ("audio", "audios", "tools", "functions", "objects")


class Run(NamedTuple):
    """What one speaker says in one go, perhaps nothing."""

    role: str
    text: str


def share_gpt(rows: Iterable, dropped: Counter[str]) -> Iterator[dict]:
    """ShareGPT (and LLaVA) conversations, made to alternate.

    Shared conversations often begin with an answer or end with a question, and some have empty turns: those are left
    out. Turns of one speaker that follow one another directly are joined. An answer stays with the question right
    before it or goes.

    Args:
        rows: the published list; its turns are `conversations` or `messages`.
        dropped: counts what is left out.
    """
    for row in rows:
        if not isinstance(row, dict):
            dropped["entries that are no mapping"] += 1
            continue
        needed = next((key for key in NEEDED_KEYS if row.get(key)), None)
        runs = None if needed else _runs(row.get("conversations") or row.get("messages"), dropped)
        if needed:
            dropped[f"conversations with {needed}"] += 1
        if runs is None:
            continue
        system, pairs, lost = _pairs(runs)
        left = row.keys() - {*MEDIA_KEYS, *METADATA, *PICTURE_METADATA, "conversations", "messages"}
        if not system and isinstance(row.get("system"), str):
            system = row["system"].strip()
            left -= {"system"}
        media = {key: row[key] for key in MEDIA_KEYS if row.get(key)}
        if media and TAG.search("".join(run.text for run in lost)):
            dropped["conversations of which the turn with a picture's place is left out"] += 1
            continue
        _count(lost, dropped)
        if not pairs:
            dropped["conversations without a question that is answered"] += 1
            continue
        for key in (key for key in left if holds(row[key])):
            dropped[f"values of the key {cut(key)}"] += 1
        turns = [{"from": "system", "value": system}] if system else []
        turns += [{"from": role, "value": text} for pair in pairs for role, text in zip(("human", "bot"), pair)]
        yield {"id": row.get("id"), **media, "conversations": turns}


def _runs(turns: Any, dropped: Counter[str]) -> list[Run] | None:
    """The conversation by speakers; nothing of one with turns that cannot be read, which is counted."""
    if not isinstance(turns, list):
        dropped["conversations without a list of turns"] += 1
        return None
    runs: list[Run] = []
    for turn in turns:
        try:
            speaker, content = turn_keys(turn, "")
        except DataError:
            dropped["conversations with a turn without speaker or text"] += 1
            return None
        role, text = ROLES.get(turn[speaker].lower()), turn[content]
        if role is None:
            dropped[f"conversations with the unknown role {shown(turn[speaker])}"] += 1
            return None
        if not isinstance(text, str):
            dropped["conversations with a turn that is no text"] += 1
            return None
        if not text.strip():
            dropped["empty turns"] += 1
        if runs and runs[-1].role == role:
            runs[-1] = Run(role, f"{runs[-1].text}\n{text.strip()}".strip())
        else:
            runs.append(Run(role, text.strip()))
    return runs


def _pairs(runs: list[Run]) -> tuple[str, list[tuple[str, str]], list[Run]]:
    """The text of a leading system turn, questions with their answers, and the runs that are neither."""
    system = ""
    if runs and runs[0].role == "system":
        system, runs = runs[0].text, runs[1:]
    pairs, lost, i = [], [], 0
    while i < len(runs):
        pair = runs[i:i + 2]
        if [run.role for run in pair] != ["user", "assistant"]:
            lost.append(runs[i])
            i += 1
            continue
        if all(run.text for run in pair):
            pairs.append((pair[0].text, pair[1].text))
        else:
            lost += pair
        i += 2
    return system, pairs, lost


def _count(lost: list[Run], dropped: Counter[str]) -> None:
    for run in (run for run in lost if run.text):     # the empty ones are counted
        if run.role == "system":
            dropped["turns of the system after the first turn"] += 1
        elif run.role == "user":
            dropped["questions without an answer"] += 1
        else:
            dropped["answers without a question"] += 1
