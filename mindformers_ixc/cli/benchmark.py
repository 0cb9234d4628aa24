"""`mindformers eval --benchmark`: a public benchmark asked as published, scored, and written down for VLMEvalKit."""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from mindformers_ixc import terminal
from mindformers_ixc.benchmarking.catalogue import BENCHMARKS, NUM_BEAMS, TILES, Benchmark
from mindformers_ixc.benchmarking.matching import FAILED
from mindformers_ixc.benchmarking.prompts import make_prompt
from mindformers_ixc.benchmarking.scoring import Scores, can_score, check_rows, never_right, score
from mindformers_ixc.benchmarking.table_file import BenchmarkTable, Row
from mindformers_ixc.benchmarking.workbook import check_library, write_results
from mindformers_ixc.checkpoint.weights_mark import weights_mark
from mindformers_ixc.cli.answer_file import AnswerFile, Answers
from mindformers_ixc.cli.arguments import Usual
from mindformers_ixc.cli.benchmark_asking import Asked, Protocol, Served, local
from mindformers_ixc.cli.benchmark_options import is_name
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import check_target, read_json, write_whole
from mindformers_ixc.resources import model_name
from mindformers_ixc.tables import Column, table

# Rows that one sentence names.
NAMED = 3

# The folder of a run of VLMEvalKit's in which it looks for result files; it tells runs by names of this form.
RUN_FOLDER = "T00000000-000000"

# Where results go unless `--output_dir` says otherwise.
OUTPUT = "benchmarks"

# Of what answered, that may differ between scores in one table: what every data set has its own of, and where.
_OF_EACH = ("benchmark", "max_new_tokens", "device_target")


class _Questions:
    """The rows of a table as questions.

    Args:
        source: the table.
        rows: those that are asked about.
    """

    def __init__(self, source: BenchmarkTable, rows: Sequence[Row]):
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Asked]:
        for row in self.rows:
            prompt = make_prompt(self.source.benchmark, row.cells, row.count)
            expected = row.cells.get("answer")
            yield Asked(row.index, prompt.text, [], self.source.pictures(row), "" if expected is None else
                        str(expected), prompt=prompt)


def run_benchmark(arguments: argparse.Namespace) -> int:
    """Asks what has no answer yet, scores, and writes the result files.

    Everything that can be refused is refused before a model is loaded or asked.

    Returns:
        Exit code: 1 when no question could be answered.
    """
    benchmark = BENCHMARKS[arguments.benchmark]
    check_library()
    protocol = _protocol(arguments, benchmark)
    with terminal.current.waiting(f"Reading {arguments.data}"):
        source = BenchmarkTable(arguments.data, benchmark, arguments.image_folder, arguments.image_root)
        rows = source.rows[:arguments.max_samples]
        check_rows(benchmark, rows, arguments.data)
    served = None if arguments.server is None else Served.find(arguments.server, arguments.api_key, protocol)
    model = arguments.model_name or _file_name(served.name if served else model_name(arguments.model))
    folder = Path(arguments.output_dir or OUTPUT) / model
    path = folder / f"{benchmark.name}.answers.jsonl"
    for target in (path, folder / RUN_FOLDER / "x"):
        check_target(target, "--output_dir", make_folder=True)
    _say_what(source, rows, benchmark)
    run = _run_of(arguments, protocol, model, served)
    with AnswerFile(str(path), _Questions(source, rows), run) as file:
        if file.done:
            terminal.current.say(f"{len(file.done)} of {len(rows)} answers are in {path} already.")
        if len(file.done) < len(rows):
            _answer_rest(file, arguments, protocol, served)
        failed = _name_failed(file.done)
        answers = [FAILED if "error" in row else row["answer"] for row in file.done]
    _write(folder, model, source, rows, answers, failed)
    scores = score(benchmark, rows, answers) if can_score(benchmark, rows) else {}
    if not scores:
        terminal.current.say(_no_scores(benchmark))
    _note(folder, benchmark, run, scores, rows, len(source.rows))
    _show(arguments, folder, run, benchmark, scores)
    return int(failed == len(rows))


def _protocol(arguments: argparse.Namespace, benchmark: Benchmark) -> Protocol:
    """The published settings, and what was said instead."""
    def said(value: int | None, published: int) -> int:
        return published if value is None or isinstance(value, Usual) else value

    return Protocol(benchmark, arguments.mode, said(arguments.hd_num, TILES), said(arguments.num_beams, NUM_BEAMS),
                    said(arguments.max_new_tokens, benchmark.max_new_tokens), arguments.transparency or "public",
                    arguments.exif)


def _run_of(arguments: argparse.Namespace, protocol: Protocol, model: str, served: Served | None) -> dict:
    """What must be the same for answers to belong together."""
    if served:
        by = {"served": served.name, **({"weights": served.weights} if served.weights else {})}
    else:
        by = {"weights": weights_mark(arguments.model), "device_target": arguments.device_target}
    return {"model": model, "benchmark": protocol.benchmark.name, **by, "mode": protocol.mode,
            "hd_num": protocol.hd_num, "num_beams": protocol.num_beams, "max_new_tokens": protocol.max_new_tokens,
            "transparency": protocol.transparency, "exif": protocol.exif}


def _file_name(name: str) -> str:
    """A model's name, as a part of names of files."""
    name = name.rstrip("/").rpartition("/")[2].replace(":", "_")        # servers may give one a path for a name
    return name if is_name(name) else "model"


def _say_what(source: BenchmarkTable, rows: Sequence[Row], benchmark: Benchmark) -> None:
    """Says what of the table is not asked about, and what can only count as wrong."""
    if source.left_out:
        terminal.current.say(f"Rows without a picture are left out, as VLMEvalKit does: {source.left_out}.")
    if len(rows) < len(source.rows):
        terminal.current.say(f"The first {len(rows)} of {len(source.rows)} questions are asked; the scores are of "
                             "those.")
    lost = never_right(benchmark, rows)
    if lost:
        more = f"; and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
        terminal.current.say(f"WARNING: whatever is answered, VLMEvalKit does not count these as right: "
                             f"{'; '.join(lost[:NAMED])}{more}.")


def _answer_rest(file: AnswerFile, arguments: argparse.Namespace, protocol: Protocol, served: Served | None) -> None:
    """Answers what has no answer yet."""
    size = arguments.batch_size
    ask = served.asking(protocol) if served else local(arguments, protocol)
    with terminal.current.counting(len(file.questions), "answering", "question", initial=len(file.done)) as bar:
        while batch := file.ahead(size):
            file.add(ask([one for one in batch if isinstance(one, Asked)]))
            bar.update(len(batch))


def _name_failed(rows: Answers) -> int:
    """Says which questions could not be answered, and why; gives their number."""
    failed = 0
    for row in rows:
        if "error" in row:
            failed += 1
            terminal.current.say(f"row {row['id']}: {row['error']}")
    if failed:
        terminal.current.say(f"{failed} of {len(rows)} questions could not be answered and count as wrong.")
    return failed


def _write(folder: Path, model: str, source: BenchmarkTable, rows: Sequence[Row], answers: Sequence[str],
           failed: int) -> None:
    target = folder / RUN_FOLDER / f"{model}_{source.benchmark.name}.xlsx"
    long = write_results(target, source.columns, rows, answers)
    if failed or len(rows) < len(source.rows):
        goes_on = "VLMEvalKit's run.py takes it when all questions are answered"
    else:
        goes_on = (f"VLMEvalKit's run.py goes on from it: --mode eval --work-dir {folder.parent} --model {model} "
                   f"--data {source.benchmark.name}")
    terminal.current.say(f"{target} is written; {goes_on}.")
    if long:
        terminal.current.say(f"{long} of its cells were longer than a workbook takes, and are cut.")


def _no_scores(benchmark: Benchmark) -> str:
    if not benchmark.metric:
        return f"{benchmark.name} is scored by a judge, another model that VLMEvalKit asks; here are the answers only."
    return f"The table has no answers to score by; {benchmark.name} is scored where they are known."


def _note(folder: Path, benchmark: Benchmark, run: dict, scores: Scores, rows: Sequence[Row], total: int) -> None:
    """Keeps the scores for the table of all data sets."""
    noted = {"benchmark": benchmark.name, "model": run["model"], "questions": len(rows), "of": total, "scores": scores,
             "run": run}
    write_whole(folder / f"{benchmark.name}.scores.json", json.dumps(noted, ensure_ascii=False, indent=1) + "\n")


def _show(arguments: argparse.Namespace, folder: Path, run: dict, benchmark: Benchmark, scores: Scores) -> None:
    """The scores beside the paper's: of this data set with its parts, then of all that the model was asked so."""
    main = benchmark.main if benchmark.main in scores else next(iter(scores), "")
    columns = [Column(benchmark.name, left=True), Column("this run", 8, gap=2), Column("paper", 8, gap=2)]
    lines = [[name, f"{value:.1f}", _paper(benchmark) if name == main else ""]
             for name, value in sorted(scores.items(), key=lambda item: item[0] != main)]
    shown = list(table(columns, lines)) if lines else []
    noted = _noted(folder, run)
    if len(noted) > 1 or not lines:
        columns = [Column("data set", left=True), Column("this model", gap=2), Column("paper", 8, gap=2),
                   Column("questions", gap=2), Column("", left=True, gap=2)]
        shown += ["", *table(columns, [_line(one) for one in noted])] if shown else table(
            columns, [_line(one) for one in noted])
    print("\n".join(shown), file=arguments.answers)
    if benchmark.note and scores:
        terminal.current.say(f"{benchmark.name}: {benchmark.note}.")


def _paper(benchmark: Benchmark) -> str:
    return "" if benchmark.paper is None else f"{benchmark.paper:.1f}"


def _noted(folder: Path, run: dict) -> list[dict]:
    """The scores of all data sets that a model was asked, in the catalogue's order.

    Of another one in a folder of the same name, or with other settings, they are left out.
    """
    found = {}
    for path in folder.glob("*.scores.json"):
        try:
            one = read_json(path)
        except (DataError, OSError):
            continue
        if isinstance(one, dict) and one.get("benchmark") in BENCHMARKS and isinstance(one.get("scores"), dict) \
                and _of_all(one.get("run")) == _of_all(run):
            found[one["benchmark"]] = one
    return [found[name] for name in BENCHMARKS if name in found]


def _of_all(run: object) -> dict:
    """What is the same of all data sets that a model was asked."""
    return {name: value for name, value in run.items() if name not in _OF_EACH} if isinstance(run, dict) else {}


def _line(noted: dict) -> list[str]:
    benchmark, scores = BENCHMARKS[noted["benchmark"]], noted["scores"]
    value = scores.get(benchmark.main, next(iter(scores.values()), None))
    whole = noted.get("questions") == noted.get("of")
    asked = str(noted.get("questions")) if whole else f"{noted.get('questions')} of {noted.get('of')}"
    return [benchmark.name, "-" if value is None else f"{value:.1f}", _paper(benchmark), asked, benchmark.note]
