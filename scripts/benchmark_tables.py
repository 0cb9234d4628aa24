"""Small tables in VLMEvalKit's form, one of each kind of benchmark, made from the demo's pictures.

For tests and scripts/vlmeval_check.py: `write_table(folder, name)` writes `NAME.tsv`, `SAID[name]` are answers to its
questions, right and wrong ones, as a model may give them.
"""
from __future__ import annotations

import base64
import csv
from pathlib import Path

from mindformers_ixc.resources import resolve_path

_SPLITS = ("dev", "validation")


def picture(name: str) -> str:
    """A picture of the demo in base64."""
    return base64.b64encode(resolve_path(f"pkg:mindformers_ixc/demo/images/{name}").read_bytes()).decode()


def _choices() -> list[dict]:
    """A hint, a cell that names another row's picture, two pictures, and a row without any."""
    return [
        {"index": 0, "question": "What is shown?", "image": picture("cat.jpg"), "A": "the face of a cat", "B": "a dog",
         "C": "N/A", "answer": "A", "category": "animals"},
        {"index": 1, "question": "Which colour\nstands out (B) most?", "image": "0", "A": "red", "B": "ginger",
         "C": "blue", "hint": "Look at the fur.", "answer": "B", "category": "animals"},
        {"index": 2, "question": "Which is the rocket?", "image": str([picture("coffee.jpg"), picture("rocket.jpg")]),
         "A": "the first", "B": "the second", "C": "none", "answer": "B", "category": "things"},
        {"index": 3, "question": "What is shown here?", "image": "", "A": "x", "B": "y", "answer": "A",
         "category": "things"},
        {"index": 4, "question": "Where would you see this?", "image": picture("astronaut.jpg"), "A": "at NASA",
         "B": "at home", "C": "in a \"cafe\"", "answer": "A", "category": "things"}]


def _circular() -> list[dict]:
    """Two questions, each with its options in two orders."""
    rows = []
    for number, (name, right, wrong) in enumerate((("coffee.jpg", "a cup of coffee", "a rocket"),
                                                   ("receipt.png", "a receipt", "a cat"))):
        for turned in (0, 1):
            options = (wrong, right) if turned else (right, wrong)
            rows.append({"index": number + 1_000_000 * turned, "question": "What is shown?",
                         "image": str(number) if turned else picture(name), "A": options[0], "B": options[1],
                         "answer": "AB"[turned], "category": ("identity", "text")[number],
                         "l2-category": "finegrained_perception (instance-level)", "split": "dev"})
    return rows


def _mmmu() -> list[dict]:
    """Questions of two splits, one without options."""
    rows: list[dict] = [
        {"question": "<image 1> How many bars are there?", "image": picture("bar_chart.png"), "A": "three", "B": "nine",
         "C": "four", "answer": "C"},
        {"question": "<image 1> Name the second word.", "image": picture("timetable.png"), "answer": "departure"},
        {"question": "<image 1> and <image 2>: which is a chart?", "A": "<image 1>", "B": "<image 2>", "answer": "B",
         "image": str([picture("receipt.png"), picture("line_chart.png")])}]
    return [{"index": f"q_{number}", "split": _SPLITS[number > 0], "category": "Art", **row}
            for number, row in enumerate(rows)]


def _yes_or_no(questions: list[tuple[str, str, str, str]], end: str = "") -> list[dict]:
    return [{"index": number, "question": f"{question}{end}", "image": picture(name), "image_path": name,
             "answer": answer, "category": category}
            for number, (name, question, answer, category) in enumerate(questions)]


def _mme() -> list[dict]:
    """Two questions about each picture."""
    return _yes_or_no([("cat.jpg", "Is this a cat?", "Yes", "existence"), ("cat.jpg", "Is this a dog?", "No",
                                                                          "existence"),
                       ("rocket.jpg", "Is this a rocket?", "Yes", "existence"),
                       ("rocket.jpg", "Is this a coin?", "No", "existence"),
                       ("coins.jpg", "Are there coins?", "Yes", "numerical_calculation"),
                       ("coins.jpg", "Is there one coin only?", "No", "numerical_calculation")],
                      " Please answer yes or no.")


def _hallusion() -> list[dict]:
    rows = _yes_or_no([("bar_chart.png", "Are there four bars?", "Yes", "VD"),
                       ("bar_chart.png", "Are there no bars?", "No", "VD"),
                       ("line_chart.png", "Is there a line?", "Yes", "VS"),
                       ("timetable.png", "Is it a map?", "No", "VS")])
    for row, index in zip(rows, ("VD_figure_1_0_1_0", "VD_figure_1_0_1_1", "VS_chart_1_0_0_0", "VS_table_1_1_0_0")):
        row.update({"index": index, "l2-category": index.split("_")[1]})
    return rows


def _pope() -> list[dict]:
    return _yes_or_no([("cat.jpg", "Is there a cat in the image?", "Yes", "adversarial,popular"),
                       ("cat.jpg", "Is there a dog in the image?", "No", "adversarial"),
                       ("coffee.jpg", "Is there a spoon in the image?", "Yes", "popular,random"),
                       ("coffee.jpg", "Is there a rocket in the image?", "No", "random")])


def _texts(rows: list[tuple[str, str, object]], **columns: list) -> list[dict]:
    return [{"index": number + 1, "question": question, "image": picture(name), "answer": str(answer),
             **{key: values[number] for key, values in columns.items()}}
            for number, (name, question, answer) in enumerate(rows)]


def _vqa() -> list[dict]:
    """Ten people's answers each."""
    return _texts([("receipt.png", "What is it?", ["a receipt"] * 4 + ["the bill"] * 6),
                   ("timetable.png", "How many columns?", ["2"] * 2 + ["two"] + ["three"] * 7),
                   ("coffee.jpg", "What is in the cup?", ["don't know"] * 10)])


def _anls() -> list[dict]:
    return _texts([("receipt.png", "What is the sum?", ["12.50", "$ 12.50"]),
                   ("timetable.png", "Where does it go?", ["Paris"]), ("receipt.png", "Whose is it?", ["N/A"])])


def _relaxed() -> list[dict]:
    return _texts([("bar_chart.png", "How high is the first bar?", 50), ("bar_chart.png", "What share?", "12.5%"),
                   ("line_chart.png", "Which colour is the line?", "Red"), ("line_chart.png", "The last value?", 0)],
                  split=["human", "human", "augmented", "augmented"])


def _exact() -> list[dict]:
    return _texts([("receipt.png", "Who wrote it?", "Anna Lee"), ("cat.jpg", "What is it?", "None")])


def _ocrbench() -> list[dict]:
    return _texts([("receipt.png", "What is written?", ["TOTAL", "SUM"]), ("timetable.png", "What is the formula?",
                                                                           ["x ^ 2\n+ 1"]),
                   ("timetable.png", "What is the title?", ["Departures"])],
                  category=["Regular Text Recognition", "Handwritten Mathematical Expression Recognition",
                            "Doc-oriented VQA"])


def _judged() -> list[dict]:
    return _texts([("coins.jpg", "How many coins are there?", 24), ("cat.jpg", "Describe it.", "A cat.")])


TABLES = {"MMStar": _choices, "MMBench_DEV_EN": _circular, "MMMU_DEV_VAL": _mmmu, "MME": _mme,
          "HallusionBench": _hallusion, "POPE": _pope, "TextVQA_VAL": _vqa, "DocVQA_VAL": _anls,
          "ChartQA_TEST": _relaxed, "OCRVQA_TESTCORE": _exact, "OCRBench": _ocrbench, "MathVista_MINI": _judged,
          "MMVet": _judged}

# What a model may say to the questions that are asked, in order; rows without a picture are not asked.
SAID = {
    "MMStar": ["A.", "The answer is C", "ginger", "A[UNUSED_TOKEN_145]\n"],
    "MMBench_DEV_EN": ["A", "B", "A", "A"],
    "MMMU_DEV_VAL": ["four", "the departure", "B. <image"],
    "MME": ["Yes.", "No", "yes, it is", "Yes", "Unsure", "No, many"],
    "HallusionBench": ["yes", "No.", "no", "No"],
    "POPE": ["Yes", "yes", "maybe", "no"],
    "TextVQA_VAL": ["The receipt!", "2", "dont know"],
    "DocVQA_VAL": ["$12.50", "Pari", "n/a"],
    "ChartQA_TEST": ["52.5", "0.12", "red", "0.0"],
    "OCRVQA_TESTCORE": ["anna lee ", "Nothing"],
    "OCRBench": ["The total is 5", "y = x^2 + 1", "arrivals"],
    "MathVista_MINI": ["24", "a cat"], "MMVet": ["24", "a cat"]}


def write_table(folder: str | Path, name: str) -> Path:
    """Writes the table of a data set of `TABLES`."""
    rows, path = TABLES[name](), Path(folder) / f"{name}.tsv"
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([row.get(column, "") for column in columns] for row in rows)
    return path
