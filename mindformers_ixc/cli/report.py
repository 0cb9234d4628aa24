"""`mindformers report`: what a run wrote down, as charts and one page."""
from __future__ import annotations

import argparse
import base64
import html
import io
import statistics
from pathlib import Path

from mindformers_ixc.errors import ConfigError
from mindformers_ixc.files import EVALUATIONS_FILE, METRICS_FILE, read_metrics, write_whole

# Curves of a run that are there whenever their key is in its rows: file, title, key, logarithmic.
CURVES = (("loss", "Loss", "loss", False), ("learning_rate", "Learning rate", "learning_rate", False),
          ("grad_norm", "Gradient norm before clipping", "grad_norm", True),
          ("throughput", "Samples a second", "samples_per_second", False),
          ("goodput", "Goodput: share of the operations that real positions and tiles need", "goodput", False),
          ("tflops", "Model TFLOPS a device", "tflops", False),
          ("mfu", "Model FLOPs utilisation (MFU)", "mfu", False),
          ("data_wait", "Share of a step spent waiting for data", "data_wait", False),
          ("reward_margin", "Reward margin", "reward_margin", False),
          ("reward_accuracy", "Reward accuracy", "reward_accuracy", False),
          ("logp_chosen", "Log-probability of chosen answers", "logp_chosen", False))

# Curves of two keys: what is real, and what was computed.
PAIRS = (("positions", "Positions a second", "positions_per_second"), ("tiles", "Tiles a second", "tiles_per_second"))

# Keys whose first value is that of the compiler, not of the run.
SLOW_START = ("samples_per_second", "tflops", "mfu", "data_wait", "positions_per_second", "tiles_per_second",
              "computed_positions_per_second", "computed_tiles_per_second")

# Rows of the table, by key of `metrics.jsonl`: medians of the steps after the first.
SPEEDS = {"samples_per_second": ("samples a second", "{:.3g}"),
          "positions_per_second": ("positions a second", "{:,.0f}"),
          "tiles_per_second": ("tiles a second", "{:.3g}"), "goodput": ("goodput", "{:.1%}"),
          "tflops": ("model TFLOPS a device", "{:.3g}"), "mfu": ("MFU", "{:.1%}"),
          "data_wait": ("waiting for data", "{:.1%}")}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em}}img{{max-width:100%}}
table{{border-collapse:collapse}}td,th{{padding:.2em .8em;text-align:right;border-bottom:1px solid #ccc}}</style></head>
<body><h1>{title}</h1>{body}</body></html>
"""


def report(arguments: argparse.Namespace) -> int:
    """Draws the curves of a run into `<output>/report/*.png` and `<output>/report.html`.

    Returns:
        Exit code.

    Raises:
        ConfigError: when the folder has no log of steps, or matplotlib is missing.
    """
    folder = Path(arguments.output)
    # a row that lacks what every step has is another program's or was edited
    rows = [row for row in read_metrics(folder / METRICS_FILE) if {"step", "loss", "seconds", "overflow"} <= set(row)]
    if not rows:
        raise ConfigError(f"{folder} has no {METRICS_FILE} with steps in it; name the --output_dir of a run.")
    evaluations = [row for row in read_metrics(folder / EVALUATIONS_FILE) if "step" in row]
    charts = draw(rows, evaluations)
    (folder / "report").mkdir(exist_ok=True)
    for name, _, data in charts:
        write_whole(folder / "report" / f"{name}.png", data)
    body = _table(rows, evaluations)
    for _, title, data in charts:
        body += f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    page = PAGE.format(title=html.escape(folder.resolve().name), body=body)
    write_whole(folder / "report.html", page)
    print(folder / "report.html", file=arguments.answers)
    return 0


def draw(rows: list[dict], evaluations: list[dict]) -> list[tuple[str, str, bytes]]:
    """The curves as (file name, title, PNG).

    Args:
        rows: of `metrics.jsonl`.
        evaluations: of `evaluations.jsonl`.
    """
    charts = []
    for name, title, key, logarithmic in CURVES:
        charts.append((name, title, _plot({"": _curve(rows, key)}, title, logarithmic)))
    for name, title, key in PAIRS:
        lines = {"real": _curve(rows, key), "computed": _curve(rows, f"computed_{key}")}
        charts.append((name, title, _plot(lines, title, False)))
    sources = dict.fromkeys(source for row in rows for source in row.get("sources", {}))
    by_source = {Path(source).name: [(row["step"], row["sources"][source]["loss"]) for row in rows
                                     if source in row.get("sources", {})] for source in sources}
    charts.append(("sources", "Loss by source", _plot(by_source, "Loss by source", False)))
    names = dict.fromkeys(key for row in evaluations for key in row if key != "step")
    measured = {name: [(row["step"], row[name]) for row in evaluations if name in row] for name in names}
    losses = {name: line for name, line in measured.items() if name.endswith("loss")}
    scores = {name: line for name, line in measured.items() if name not in losses}
    for name, title, lines in (("evaluation_loss", "Held-out loss", losses), ("scores", "Held-out scores", scores)):
        charts.append((name, title, _plot(lines, title, False)))
    return [chart for chart in charts if chart[2]]


def _plot(lines: dict[str, list[tuple[float, float]]], title: str, logarithmic: bool) -> bytes:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - optional
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ConfigError("Reports need matplotlib; run `pip install 'mindformers_ixc[report]'`.") from error
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


def _curve(rows: list[dict], key: str) -> list[tuple[float, float]]:
    """Steps and values of a key."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return points[1:] if key in SLOW_START else points


def _table(rows: list[dict], evaluations: list[dict]) -> str:
    last, seconds = rows[-1], [row["seconds"] for row in rows[1:]] or [rows[0]["seconds"]]
    first, final = ("not finite" if row["loss"] is None else f"{row['loss']:.4g}" for row in (rows[0], last))
    facts = {"steps": last["step"], "first loss": first, "last loss": final,
             "median seconds a step": f"{statistics.median(seconds):.3g}",
             "labelled tokens": sum(row.get("tokens", 0) for row in rows) or "",
             "steps skipped for overflow": sum(row["overflow"] for row in rows)}
    for key, (name, form) in SPEEDS.items():
        values = [row[key] for row in rows[1:] or rows if row.get(key) is not None]
        if values:
            facts[name] = form.format(statistics.median(values))
    facts.update({f"held-out {key}": f"{value:.4g}" for key, value in (evaluations[-1] if evaluations else {}).items()
                  if key != "step"})
    return "<table>" + "".join(f"<tr><th>{key}</th><td>{value}</td></tr>" for key, value in facts.items()) + "</table>"

