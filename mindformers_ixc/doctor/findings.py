"""One thing that was looked at, and how a list of them is printed."""
from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

OK, NOTE, PROBLEM = "ok", "note", "problem"

# Of the columns in front of the text: the longest state and the longest usual topic, with a gap.
_STATE, _TOPIC = 9, 14


@dataclass(frozen=True)
class Finding:
    """What was found about one topic.

    Attributes:
        topic: a word or two.
        state: `ok`; `note` for what limits or surprises but stops nothing; `problem` for what would stop a run.
        text: what was found.
        advice: what to do, where there is something to be done.
    """

    topic: str
    state: str
    text: str
    advice: str = ""


def has_problems(findings: Iterable[Finding]) -> bool:
    """Whether anything was found that would stop a run."""
    return any(finding.state == PROBLEM for finding in findings)


def findings_text(findings: list[Finding], width: int = 100) -> str:
    """A block of lines for each finding, and one line that sums them up.

    Args:
        findings: in the order in which they are shown.
        width: columns of the terminal; in narrow ones the text stands below its topic.
    """
    narrow = width < 60
    indent = 4 if narrow else _STATE + _TOPIC
    blocks = []
    for finding in findings:
        head = f"{finding.state:{_STATE}}{finding.topic:{_TOPIC - 1}} "
        first = "" if narrow else head
        lines = textwrap.wrap(finding.text, width, initial_indent=" " * indent if narrow else first,
                              subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
        if narrow:
            lines.insert(0, head.rstrip())
        if finding.advice:
            lines += textwrap.wrap(f"-> {finding.advice}", width, initial_indent=" " * indent,
                                   subsequent_indent=" " * (indent + 3), break_long_words=False,
                                   break_on_hyphens=False)
        blocks.append("\n".join(lines))
    return "\n".join([*blocks, "", summary(findings)])


def summary(findings: Iterable[Finding]) -> str:
    """The last line: how many problems and notes there are."""
    states = [finding.state for finding in findings]
    problems, notes = states.count(PROBLEM), states.count(NOTE)
    counted = f"{notes} note{'' if notes == 1 else 's'}"
    if not problems:
        return f"Nothing here stops a run ({counted})."
    return f"{problems} problem{'' if problems == 1 else 's'} would stop a run ({counted}); each says what to do."
