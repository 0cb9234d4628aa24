"""The scores of a data set, as VLMEvalKit computes them where it asks no judge."""
from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from mindformers_ixc.benchmarking.catalogue import Benchmark
from mindformers_ixc.benchmarking.matching import (
    chosen,
    listed,
    relaxed_correct,
    same_text,
    vqa_accuracy,
    yes_or_no,
)
from mindformers_ixc.benchmarking.prompts import choices_of
from mindformers_ixc.benchmarking.table_file import Cell, Row, typed
from mindformers_ixc.errors import ConfigError, DataError

# Rows that show the same question with its options moved lie so far apart.
ROLLED = 1_000_000

# MME's two halves, by category.
PERCEPTION = ("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene")
REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")

# Kinds of OCRBench's questions that are about reading text; the others stand by themselves.
READING = ("Regular Text Recognition", "Irregular Text Recognition", "Artistic Text Recognition",
           "Handwriting Recognition", "Digit String Recognition", "Non-Semantic Text Recognition")
FORMULAE = "Handwritten Mathematical Expression Recognition"
OTHERS = ("Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction", FORMULAE)

# Metrics for which the cell `answer` may hold a list, and the texts of one that VQA's accuracy needs for a whole point:
# three people who agree beside the one that is left out.
LISTED, VOTES = ("anls", "vqa", "relaxed", "exact", "ocrbench"), 4

# Below this similarity an answer is wrong rather than misread.
MISREAD = 0.5


@dataclass(frozen=True)
class Answered:
    """A row with what was answered.

    Attributes:
        cells: of the row.
        answer: the final one, as it is read back from a result file.
        expected: the cell `answer`, read back in the same way.
    """

    cells: Mapping[str, Cell]
    answer: str
    expected: str

    def cell(self, name: str) -> str | None:
        """A column as text; `None` where it is missing."""
        value = self.cells.get(name)
        return None if value is None else str(value)


# Names of scores with their values, the whole before its parts.
Scores = dict[str, float]

Metric = Callable[[Sequence[Answered]], Scores]


def can_score(benchmark: Benchmark, rows: Sequence[Row]) -> bool:
    """Whether the scores of a data set can be computed here: by a metric, and with answers in its table."""
    return bool(benchmark.metric) and any(row.cells.get("answer") is not None for row in rows)


def check_rows(benchmark: Benchmark, rows: Sequence[Row], path: object) -> None:
    """Refuses rows that could not be scored once they are answered.

    Raises:
        DataError: naming the first row.
        ConfigError: when a library is missing.
    """
    if not can_score(benchmark, rows):
        return
    if benchmark.metric == "anls":
        _levenshtein()
    if benchmark.metric in LISTED:
        for row in rows:
            if not listed(row.cells.get("answer")):
                raise DataError(f"{path}, row {row.index}: 'answer' is an empty list; it holds the texts that are "
                                "expected.")
    if benchmark.metric == "hallusion":
        for row in rows:
            if len(row.index.split("_")) < 6:
                raise DataError(f"{path}: the index {row.index!r} does not end in _SET_FIGURE_QUESTION, by which "
                                f"{benchmark.name} is scored.")
    if benchmark.metric == "circular":
        for row in rows:
            if not isinstance(row.cells["index"], int):
                raise DataError(f"{path}: the index {row.index!r} is no whole number; {benchmark.name} tells by it "
                                "which rows are one question.")
    if benchmark.metric == "mme":
        for row in rows:
            for name in ("category", "image_path"):
                if row.cells[name] is None:
                    raise DataError(f"{path}, row {row.index}: '{name}' is empty; {benchmark.name} is scored by it.")


def never_right(benchmark: Benchmark, rows: Sequence[Row]) -> list[str]:
    """What keeps rows from ever being counted as right, as VLMEvalKit counts: a sentence each, without its period."""
    found = []
    for row in rows if can_score(benchmark, rows) else ():
        answer = row.cells.get("answer")
        if answer is None:
            found.append(f"row {row.index}: 'answer' is empty")
        elif benchmark.metric in ("choice", "circular") and str(answer) not in choices_of(row.cells):
            found.append(f"row {row.index}: 'answer' is {str(answer)[:20]!r}, none of the letters of its options "
                         f"({', '.join(choices_of(row.cells)) or 'it has none'})")
        elif benchmark.metric in ("mme", "hallusion", "pope") and answer not in ("Yes", "No"):
            found.append(f"row {row.index}: 'answer' is {str(answer)[:20]!r}, and only Yes and No are counted")
        elif benchmark.metric == "vqa" and len(listed(answer)) < VOTES:
            found.append(f"row {row.index}: 'answer' has {len(listed(answer))} texts, and {VOTES} that agree are a "
                         "whole point")
    return found


def score(benchmark: Benchmark, rows: Sequence[Row], answers: Sequence[str]) -> Scores:
    """The scores of a data set.

    Args:
        benchmark: `can_score` says whether it has any.
        rows: that were asked about.
        answers: of each the final one, `FAILED` where there is none.

    Returns:
        In percent but for MME, whose scores are sums, and OCRBench's counts; the published line is `benchmark.main`.
    """
    expected = read_back([row.cells.get("answer") for row in rows])
    given = read_back(typed(answers))
    return METRICS[benchmark.metric]([Answered(row.cells, *texts) for row, texts in zip(rows, zip(given, expected))])


def read_back(column: Sequence[Cell]) -> list[str]:
    """A column as it comes out of a result file, as text: fractions that are all whole have become whole numbers."""
    if all(isinstance(cell, float) and cell.is_integer() for cell in column):
        column = [int(cell) for cell in column]  # type: ignore[arg-type]
    return ["nan" if cell is None else str(cell) for cell in column]


def _percent(values: Iterable[float]) -> float:
    return 100 * fmean(values)


def _parts(rows: Sequence[Answered], values: Sequence[float], columns: Sequence[str],
           mean: Callable[[Sequence[float]], float] = _percent) -> Scores:
    """The mean over all rows, and over those of each value of some columns, in order."""
    found = {"Overall": mean(values)}
    for column in columns:
        names = sorted({name for row in rows if (name := row.cell(column)) is not None})
        if column == "split" and len(names) < 2:
            names = []
        for name in names:
            found.setdefault(name, mean([value for row, value in zip(rows, values) if row.cell(column) == name]))
    return found


def _choices(rows: Sequence[Answered]) -> Scores:
    """One option of several."""
    return _parts(rows, [_is_right(row) for row in rows], ("split", "l2-category", "category"))


def _is_right(row: Answered) -> float:
    return float(_choice(row) == row.expected)


def _choice(row: Answered) -> str:
    return chosen(row.answer, choices_of(row.cells))


def _open_choices(rows: Sequence[Answered]) -> Scores:
    """MMMU's, where a question without options has two: its answer, and another one."""
    changed = []
    for row in rows:
        cells = row.cells
        if cells.get("A") is None:
            cells = {**cells, "A": row.expected, "B": "Other Answers"}
        letter = row.expected if len(row.expected) == 1 and "A" <= row.expected <= "Z" else "A"
        changed.append(Answered(cells, row.answer, letter))
    return _choices(changed)


def _circular(rows: Sequence[Answered]) -> Scores:
    """A question is right when it is right with its options in every order."""
    right: dict[int, bool] = {}
    first: dict[int, Answered] = {}
    for row in rows:
        index = int(str(row.cells["index"]))
        given = row.cells.get("g_index")
        group = index % ROLLED if given is None else int(float(str(given)))
        right[group] = right.get(group, True) and bool(_is_right(row))
        if group == index:
            first[group] = row
    kept = list(first)
    return _parts([first[group] for group in kept], [float(right[group]) for group in kept],
                  ("split", "l2-category", "category"))


def _texts(each: Callable[[str, list[str]], float]) -> Metric:
    """A score of an answer beside what is expected."""
    def metric(rows: Sequence[Answered]) -> Scores:
        values = [each(row.answer, listed(row.expected)) for row in rows]
        return _parts(rows, values, ("split",) if "split" in rows[0].cells else ("category",))
    return metric


def anls(answer: str, expected: list[str]) -> float:
    """The similarity to the nearest of the texts that are expected, 0 where it is below a half.

    1 - d / n, with d the letters to insert, delete or replace, case and white space ignored, and n the letters of the
    longer text as it stands.
    """
    distance = _levenshtein()
    text = " ".join(answer.lower().split())
    away = []
    for one in expected:
        length = max(len(one.upper()), len(answer.upper()))
        away.append(distance(" ".join(one.lower().split()), text) / length if length else 0.0)
    nearest = 1 - min(away)
    return nearest if nearest >= MISREAD else 0.0


def _levenshtein() -> Callable[[str, str], int]:
    try:
        return importlib.import_module("rapidfuzz.distance").Levenshtein.distance
    except ImportError as error:
        raise ConfigError("ANLS, by which this data set is scored, needs rapidfuzz; install it with `pip install "
                          "\"mindformers_ixc[eval]\"`.") from error


def _says(rows: Sequence[Answered]) -> list[str]:
    return [yes_or_no(row.answer) for row in rows]


def _mme(rows: Sequence[Answered]) -> Scores:
    """MME's sums: of each category the share of right answers, and that of pictures with both right, in percent."""
    right: dict[str, dict[str, list[bool]]] = {}
    for row, said in zip(rows, _says(rows)):
        pictures = right.setdefault(str(row.cells["category"]), {})
        pictures.setdefault(str(row.cells["image_path"]), []).append(said == row.expected)
    found = {name: _percent(value for one in pictures.values() for value in one)
             + _percent(float(all(one[:2])) for one in pictures.values()) for name, pictures in right.items()}
    halves = {title: sum(found.get(name, 0.0) for name in names)
              for title, names in (("perception", PERCEPTION), ("reasoning", REASONING))}
    return {"Overall": sum(halves.values()), **halves, **dict(sorted(found.items()))}


def _hallusion(rows: Sequence[Answered]) -> Scores:
    """HallusionBench's: right answers, figures and questions of which all answers are right."""
    said = _says(rows)
    figures: dict[tuple, list[bool]] = {}
    questions: dict[tuple, list[bool]] = {}
    values = []
    for row, one in zip(rows, said):
        part = str(row.cells["index"]).split("_")
        right = one == row.expected
        values.append(float(right))
        figures.setdefault((row.cell("l2-category"), part[3], part[4]), []).append(right)
        questions.setdefault((row.cell("l2-category"), part[3], part[5]), []).append(right)
    found = {"aAcc": _percent(values), "fAcc": _percent(float(all(one)) for one in figures.values()),
             "qAcc": _percent(float(all(one)) for one in questions.values())}
    parts = _parts(rows, values, ("category", "l2-category"))
    return {"mean of aAcc, fAcc, qAcc": fmean(found.values()), **found,
            **{f"aAcc {name}": value for name, value in parts.items() if name != "Overall"}}


def _pope(rows: Sequence[Answered]) -> Scores:
    """POPE's: F1 of yes over all rows, a row counting once for each of its categories, with its parts."""
    counted: list[tuple[str | None, str, str]] = []
    for row, said in zip(rows, _says(rows)):
        counted += [(name, said, row.expected) for name in (row.cell("category") or "").split(",")]
    found = {"Overall": 0.0, "accuracy": _percent(float(said == wanted) for _, said, wanted in counted)}
    found["Overall"], found["precision"], found["recall"] = _f1(counted)
    for name in sorted({str(one[0]) for one in counted if one[0]}):
        found[name] = _f1([one for one in counted if one[0] == name])[0]
    return found


def _f1(counted: Sequence[tuple[str | None, str, str]]) -> tuple[float, float, float]:
    """F1, precision and recall of `Yes`, in percent."""
    both = sum(said == wanted == "Yes" for _, said, wanted in counted)
    said_yes = sum(said == "Yes" for _, said, _ in counted)
    are_yes = sum(wanted == "Yes" for _, _, wanted in counted)
    precision, recall = both / said_yes if said_yes else 0.0, both / are_yes if are_yes else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return 100 * f1, 100 * precision, 100 * recall


def _ocrbench(rows: Sequence[Answered]) -> Scores:
    """OCRBench's: answers that have what is expected within them, counted; the published score is of 1,000."""
    counts = dict.fromkeys((*READING, *OTHERS), 0)
    for row in rows:
        category = str(row.cells["category"])
        blank = "" if category == FORMULAE else " "
        answer, expected = row.answer.strip(), [one.strip() for one in listed(row.expected)]
        if category != FORMULAE:
            answer, expected = answer.lower(), [one.lower() for one in expected]
        texts = [one.replace("\n", " ").replace(" ", blank) for one in (answer, *expected)]
        if any(one in texts[0] for one in texts[1:]):
            counts[category] = counts.get(category, 0) + 1
    total = sum(counts.values())
    return {"Final Score Norm": total / 10, "Final Score": float(total),
            "Text Recognition": float(sum(counts[name] for name in READING)),
            **{name: float(counts[name]) for name in OTHERS}}


# By the name that a data set has for it.
METRICS: dict[str, Metric] = {
    "choice": _choices, "circular": _circular, "mmmu": _open_choices, "anls": _texts(anls),
    "vqa": _texts(vqa_accuracy), "relaxed": _texts(relaxed_correct), "exact": _texts(same_text), "mme": _mme,
    "hallusion": _hallusion, "pope": _pope, "ocrbench": _ocrbench}
