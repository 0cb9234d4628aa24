"""The page of one run, and that of several runs beside each other."""
from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from mindformers_ixc.cli.report_answers import answer_cards, compared_cards
from mindformers_ixc.cli.report_runs import Run, curve, is_finite
from mindformers_ixc.pages.page import cards, chart, duration, facts, line, page, section, table, text
from mindformers_ixc.scores import as_text
from mindformers_ixc.training_options import SHUFFLED

# Curves of a run that are there whenever their key is in its rows: file, title, key, logarithmic at first.
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

# Steps that were skipped and are named; of more the page says how many.
NAMED_STEPS = 8

# Rows of the table, by key of `metrics.jsonl`: medians of the steps after the first.
SPEEDS = {"samples_per_second": ("samples a second", "{:.3g}"),
          "positions_per_second": ("positions a second", "{:,.0f}"),
          "tiles_per_second": ("tiles a second", "{:.3g}"), "goodput": ("goodput", "{:.1%}"),
          "tflops": ("model TFLOPS a device", "{:.3g}"), "mfu": ("MFU", "{:.1%}"),
          "data_wait": ("waiting for data", "{:.1%}")}

# Keys whose values are no measurements, so that nothing of them is smoothed.
EXACT = ("learning_rate",)

SHARES = ("goodput", "mfu", "data_wait", "reward_accuracy")

# Colours of the style sheet; more curves than that share them.
COLOURS = 8

CONTROLS = """<div class="controls"><label>smoothing <input type="range" id="smoothing" min="0" max="0.98" step="0.02"
value="0.6"> <output id="smoothing-value">0.6</output></label>
<label>axis <select id="axis"><option value="x">steps</option><option value="t">hours</option></select></label></div>
<noscript><p class="note">The charts need JavaScript, which is switched off; OUTPUT/report has them as pictures.</p>
</noscript>"""


def drawn(rows: list[dict], key: str) -> list[tuple[int, float]]:
    """Steps and values of a key as they are drawn."""
    points = curve(rows, key)
    return points[1:] if key in SLOW_START else points


def by_source(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Steps and losses of each source."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        sources = row.get("sources")
        for source, values in sources.items() if isinstance(sources, dict) else ():
            if isinstance(values, dict) and is_finite(values.get("loss")):
                found.setdefault(source, []).append((row["step"], values["loss"]))
    return {Path(source).name: points for source, points in found.items()}


def measured(evaluations: list[dict]) -> tuple[dict, dict]:
    """Held-out losses and held-out scores: steps and values by name."""
    names = dict.fromkeys(key for row in evaluations for key in row if key != "step")
    lines = {name: curve(evaluations, name) for name in names}
    losses = {name: points for name, points in lines.items() if name.endswith("loss")}
    return losses, {name: points for name, points in lines.items() if name not in losses}


def held_out(evaluations: list[dict], key: str) -> dict[str, list[tuple[int, float]]]:
    """What is drawn beside a key of the steps: the same on held-out samples, and with other samples' pictures."""
    return {name: curve(evaluations, name) for name in (key, f"{SHUFFLED}{key}")}


def other_scores(evaluations: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Held-out scores that are drawn beside nothing."""
    beside = {name for _, _, key, _ in CURVES for name in held_out(evaluations, key)}
    return {name: points for name, points in measured(evaluations)[1].items() if name not in beside}


def page_of_run(run: Run) -> str:
    """The page of one run."""
    charts = _with_points(_charts(run))
    places = "".join(chart(number, one["title"]) for number, one in enumerate(charts))
    answers = answer_cards(run)
    scored = any(key.startswith("reward_") for row in run.evaluations for key in row)     # pairs, and no questions
    hint = "" if answers or scored or not run.evaluations else (
        '<p class="note">No answers were written down. They are when evaluation.metrics has a score that needs them, '
        "such as exact_match.</p>")
    body = (f"<h1>{text(run.folder.resolve().name)}</h1>{_status(run)}{_start(run)}{cards(_headline(run))}"
            + section("Curves", CONTROLS, f'<div class="charts">{places}</div>')
            + section("Sample answers", answers or hint)
            + section("Numbers", facts(numbers(run))) + section("Settings", _settings(run)))
    return page(run.folder.resolve().name, body, charts)


def _with_points(charts: Iterator[dict]) -> list[dict]:
    """Charts and curves that have something to draw."""
    kept = [{**one, "lines": [one_line for one_line in one["lines"] if one_line["x"]]} for one in charts]
    return [one for one in kept if one["lines"]]


def _charts(run: Run) -> Iterator[dict]:
    """The charts of one run, as the page's program takes them."""
    clock = run.clock
    for _, title, key, logarithmic in CURVES:
        beside = {name: points for name, points in held_out(run.evaluations, key).items() if points}
        lines = [line("training" if key == "loss" or beside else title, drawn(run.rows, key), 0, clock,
                      smooth=key not in EXACT)]
        lines += [line("held-out" if name == key else f"held-out, {name.replace('_', ' ')}", points, number, clock,
                       marks=True) for number, (name, points) in enumerate(beside.items(), 1)]
        yield {"title": title, "lines": lines, "log": logarithmic, "percent": key in SHARES}
    for _, title, key in PAIRS:
        yield {"title": title, "lines": [line("real", drawn(run.rows, key), 0, clock, smooth=True),
                                         line("computed", drawn(run.rows, f"computed_{key}"), 7, clock, smooth=True)]}
    sources = by_source(run.rows)
    if len(sources) > 1:      # of a single one it is the loss once more
        yield {"title": "Loss by source", "lines": [line(name, points, number % COLOURS, clock, smooth=True)
                                                    for number, (name, points) in enumerate(sources.items())]}
    yield {"title": "Held-out scores", "named": True, "lines": [
        line(name.replace("_", " "), points, number % COLOURS, clock, marks=True)
        for number, (name, points) in enumerate(other_scores(run.evaluations).items())]}


def _status(run: Run, name: str = "") -> str:
    """How far the run has come, in words, after its name if there are several."""
    last = run.rows[-1]
    if run.record.get("finished") is not None:
        state = "finished"
    elif last.get("seconds_left") == 0:
        state = "all steps done"
    else:
        state = "not finished: it is still running, or was stopped"
    before = f"<strong>{text(name)}</strong>: " if name else ""
    return f'<p class="sub">{before}{last["step"]:,} steps, {state}. {text(_devices(run))}</p>'


def _devices(run: Run) -> str:
    taken = f"Its steps took {duration(run.seconds)}"
    if run.devices is None:
        return f"{taken}; on which devices was not written down."
    target = next((f" ({start['device_target']})" for start in reversed(run.starts) if start.get("device_target")), "")
    total = f"; from start to end it took {duration(run.elapsed)}" if run.elapsed is not None else ""
    several = f", {duration(run.seconds * run.devices)} of a device in all" if run.devices > 1 else ""
    return f"{taken} on {run.devices} device{'' if run.devices == 1 else 's'}{target}{several}{total}."


def _start(run: Run) -> str:
    """The commands that began the run and went on with it."""
    lines = []
    for number, start in enumerate(run.starts):
        words = "Started" if number == 0 else "Gone on with"
        lines.append(_command(f"{words} {start.get('time', '')}", start))
    if run.record.get("ended"):
        lines.append(f'<p class="note">Ended {text(run.record["ended"])}</p>')
    if run.problem:
        lines.append(f'<p class="bad">{text(run.problem)}</p>')
    return "".join(lines)


def _command(before: str, start: dict) -> str:
    return f'<p class="note">{text(before)}</p><pre>{text(start.get("command") or "(not written down)")}</pre>'


def _headline(run: Run) -> dict[str, str]:
    """The numbers that are looked at first."""
    found = {"last loss": _loss(run.rows[-1])}
    losses, scores = measured(run.evaluations)
    for name, points in losses.items():
        if name == "loss" and points:
            found["lowest held-out loss"] = f"{min(value for _, value in points):.4g}"
    for name, points in scores.items():
        if points:
            found[f"best {name.replace('_', ' ')}"] = as_text(name, max(value for _, value in points))
    found["time in steps"] = duration(run.seconds)
    for key in ("samples_per_second", "goodput", "mfu"):
        value = _median(run.rows, key)
        if value is not None:
            found[SPEEDS[key][0]] = SPEEDS[key][1].format(value)
    return found


def numbers(run: Run) -> dict[str, object]:
    """The table of a run."""
    rows, last = run.rows, run.rows[-1]
    seconds = [row["seconds"] for row in rows[1:]] or [rows[0]["seconds"]]
    tokens = sum(row["tokens"] for row in rows if is_finite(row.get("tokens")))
    found: dict[str, object] = {
        "steps": f"{last['step']:,}", "first loss": _loss(rows[0]), "last loss": _loss(last),
        "median seconds a step": f"{statistics.median(seconds):.3g}", "time in steps": duration(run.seconds),
        "labelled tokens": f"{tokens:,}" if tokens else "",
        "steps skipped for overflow": sum(bool(row["overflow"]) for row in rows)}
    if any("skipped" in row for row in rows):
        found["steps skipped as spikes"] = _skipped(rows)
    if run.elapsed is not None:
        found["time from start to end"] = duration(run.elapsed)
    if run.devices is not None:
        found["devices"] = run.devices
    for key, (name, form) in SPEEDS.items():
        value = _median(rows, key)
        if value is not None:
            found[name] = form.format(value)
    last_measured = run.evaluations[-1] if run.evaluations else {}
    found.update({f"held-out {key.replace('_', ' ')}": as_text(key, value) for key, value in last_measured.items()
                  if key != "step" and is_finite(value)})
    return found


def _skipped(rows: list[dict]) -> str:
    """How many steps were skipped as spikes, and which."""
    steps = [str(row["step"]) for row in rows if row.get("skipped")]
    more = ", ..." if len(steps) > NAMED_STEPS else ""
    return f"{len(steps)}" + (f" ({', '.join(steps[:NAMED_STEPS])}{more})" if steps else "")


def _median(rows: list[dict], key: str) -> float | None:
    values = [row[key] for row in rows[1:] or rows if is_finite(row.get(key))]
    return statistics.median(values) if values else None


def _loss(row: dict) -> str:
    return f"{row['loss']:.4g}" if is_finite(row["loss"]) else "not finite"


def _settings(run: Run) -> str:
    settings = {key: _value(value) for key, value in sorted(run.settings().items())}
    if not settings:
        return '<p class="note">No run_config.json says which settings the run had.</p>'
    return (f"<details><summary>{len(settings)} settings, as run_config.json has them</summary>{facts(settings)}"
            "</details>")


def _value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return "none" if value is None else str(value)


def page_of_runs(runs: list[Run]) -> str:
    """One page that compares several runs."""
    charts = [{**one, "named": True} for one in _with_points(_compared(runs))]
    places = "".join(chart(number, one["title"]) for number, one in enumerate(charts))
    title = " · ".join(run.name for run in runs)
    body = (f"<h1>{text(title)}</h1>" + "".join(_status(run, run.name) for run in runs)
            + "".join(f'<p class="bad">{text(run.problem)}</p>' for run in runs if run.problem)
            + section("Numbers", _side_by_side(runs)) + section("Settings that differ", _differences(runs))
            + section("Curves", CONTROLS, f'<div class="charts">{places}</div>')
            + section("Last answers", compared_cards(runs))
            + section("Commands", "".join(_command(run.name, start) for run in runs for start in run.starts)))
    return page(title, body, charts)


def _compared(runs: list[Run]) -> Iterator[dict]:
    """Charts with a curve for each run."""
    clocks = [run.clock for run in runs]
    for _, title, key, logarithmic in CURVES:
        lines = [line(run.name, drawn(run.rows, key), number % COLOURS, clocks[number],
                      smooth=key not in EXACT) for number, run in enumerate(runs)]
        lines += [line(f"{run.name}, held-out", curve(run.evaluations, key), number % COLOURS, clocks[number],
                       marks=True, dashed=True) for number, run in enumerate(runs)]
        yield {"title": title, "lines": lines, "log": logarithmic, "percent": key in SHARES}
    for _, title, key in PAIRS:
        yield {"title": title, "lines": [line(run.name, drawn(run.rows, key), number % COLOURS, clocks[number],
                                              smooth=True) for number, run in enumerate(runs)]}
    for name in dict.fromkeys(name for run in runs for name in other_scores(run.evaluations)):
        yield {"title": f"Held-out {name.replace('_', ' ')}",
               "lines": [line(run.name, curve(run.evaluations, name), number % COLOURS, clocks[number], marks=True)
                         for number, run in enumerate(runs)]}


def _side_by_side(runs: list[Run]) -> str:
    columns = [numbers(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    return table(["", *(run.name for run in runs)],
                 ([name, *(column.get(name, "") for column in columns)] for name in names))


def _differences(runs: list[Run]) -> str:
    """Settings whose values are not the same in all runs."""
    settings = [{key: _value(value) for key, value in run.settings().items()} for run in runs]
    if not all(settings):
        missing = ", ".join(run.name for run, own in zip(runs, settings) if not own)
        return f'<p class="note">Nothing says which settings {text(missing)} had (no run_config.json).</p>'
    names = sorted({key for own in settings for key in own})
    different = [name for name in names if len({own.get(name) for own in settings}) > 1]
    if not different:
        return '<p class="note">None that was written down: only folders, callbacks and the like may differ.</p>'
    return table(["", *(run.name for run in runs)],
                 ([name, *(own.get(name, "not there") for own in settings)] for name in different),
                 range(len(runs) + 1))
