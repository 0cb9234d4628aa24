"""`mindformers report`: what runs wrote down, as a page to look at and as pictures of the curves."""
from __future__ import annotations

import argparse
import io
from pathlib import Path

from mindformers_ixc import terminal
from mindformers_ixc.cli.report_page import CURVES, PAIRS, by_source, drawn, measured, page_of_run, page_of_runs
from mindformers_ixc.cli.report_runs import read_runs
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.files import check_target, write_whole
from mindformers_ixc.pages.page import is_own

# Where several runs are compared, in the working folder, unless --page says otherwise.
COMPARISON = "comparison.html"


def report(arguments: argparse.Namespace) -> int:
    """Writes the page of a run, `<output>/report.html`, and its curves, `<output>/report/*.png`.

    Several runs are compared on one page, without pictures beside it.

    Args:
        arguments: of the `report` subcommand.

    Returns:
        Exit code.

    Raises:
        ConfigError: when a folder has no log of steps.
        OSError: when the page cannot be written.
    """
    runs = read_runs(arguments.outputs)
    single = len(runs) == 1
    target = Path(arguments.page or (runs[0].folder / "report.html" if single else COMPARISON))
    check_target(target, "--page" if arguments.page else "The page")
    if not single and not arguments.page:
        _check_own(target)
    for run in runs:
        if run.problem:
            terminal.current.say(f"{run.name}: {run.problem}")
    write_whole(target, page_of_run(runs[0]) if single else page_of_runs(runs))
    print(target, file=arguments.answers)
    if single:
        _write_pictures(runs[0].folder / "report", runs[0].rows, runs[0].evaluations)
    return 0


def _check_own(target: Path) -> None:
    """Refuses to replace somebody else's page by one whose name nobody asked for."""
    if target.exists() and not is_own(target):
        raise ConfigError(f"{target} is there and is no page of this command; say with --page where the comparison is "
                          "to be written.")


def _write_pictures(folder: Path, rows: list[dict], evaluations: list[dict]) -> None:
    try:
        charts = draw(rows, evaluations)
    except ImportError:
        terminal.current.say(f"The page is whole. The same curves as pictures ({folder}/*.png) need matplotlib; run "
                             "`pip install 'mindformers_ixc[report]'`.")
        return
    folder.mkdir(exist_ok=True)
    for name, _, data in charts:
        write_whole(folder / f"{name}.png", data)


def draw(rows: list[dict], evaluations: list[dict]) -> list[tuple[str, str, bytes]]:
    """The curves as (file name, title, PNG).

    Args:
        rows: of `metrics.jsonl`.
        evaluations: of `evaluations.jsonl`.

    Raises:
        ImportError: when matplotlib is missing.
    """
    charts = []
    for name, title, key, logarithmic in CURVES:
        charts.append((name, title, _plot({"": drawn(rows, key)}, title, logarithmic)))
    for name, title, key in PAIRS:
        lines = {"real": drawn(rows, key), "computed": drawn(rows, f"computed_{key}")}
        charts.append((name, title, _plot(lines, title, False)))
    charts.append(("sources", "Loss by source", _plot(by_source(rows), "Loss by source", False)))
    losses, scores = measured(evaluations)
    for name, title, lines in (("evaluation_loss", "Held-out loss", losses), ("scores", "Held-out scores", scores)):
        charts.append((name, title, _plot(lines, title, False)))
    return [chart for chart in charts if chart[2]]


def _plot(lines: dict[str, list[tuple[int, float]]], title: str, logarithmic: bool) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - optional, and slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional, and slow to import

    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        return b""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, line in lines.items():
        axes.plot(*zip(*line), label=name, linewidth=1.2, marker="." if len(line) < 40 else None)
    axes.set(xlabel="step", ylabel=title)
    axes.grid(alpha=0.3)
    if logarithmic and all(value > 0 for line in lines.values() for _, value in line):
        axes.set_yscale("log")
    if any(lines):
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
