"""`mindformers plan`: what a step needs on a cluster that need not be there."""
from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from dataclasses import fields as fields_of
from pathlib import Path

from mindformers_ixc import terminal
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.checkpoint.start import OVERRIDE, begin
from mindformers_ixc.cli.inputs import read_memory
from mindformers_ixc.cli.run_config import check_fields
from mindformers_ixc.cli.yaml_file import apply_overrides, parse_overrides, read_yaml, tie_data_section
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.files import write_whole
from mindformers_ixc.parallel.degrees import DEGREES
from mindformers_ixc.planning.cost import Assumptions
from mindformers_ixc.planning.page import plan_page
from mindformers_ixc.planning.plan import Plan, make_plan
from mindformers_ixc.planning.rows import RowMeans, read_rows, steps_of_run
from mindformers_ixc.planning.search import Candidate, Search, search
from mindformers_ixc.planning.text import plan_text, search_text
from mindformers_ixc.planning.workload import Workload, place, read_workload
from mindformers_ixc.resources import resolve_model
from mindformers_ixc.sections import Rule, check_value, is_number, whole
from mindformers_ixc.tables import columns_of

# Of a device, unless an option or the YAML's context.max_device_memory says otherwise.
DEVICE_MEMORY = "64GB"


def _adopt_start(fields: dict) -> None:
    """Takes the sizes that a YAML leaves to the directory which its run starts with, where that directory is here."""
    start, section = fields.get("load_checkpoint"), (fields.get("model") or {}).get("model_config")
    if start and isinstance(section, dict) and resolve_model(start).exists():
        begin(section, open_source(start, verify=False), fields.get(OVERRIDE) or ())


def plan(arguments: argparse.Namespace) -> int:
    """`mindformers plan`: prints whether a YAML fits a cluster, and how long its step takes.

    Args:
        arguments: of the `plan` subcommand; `rest` holds further words, taken as overrides.

    Returns:
        Exit code: 0 if it fits.

    Raises:
        ConfigError: for a wrong key, value or layout; nothing has been compiled then.
        LayoutError: when a graph does not compile.
    """
    fields = _fields(arguments)
    memory, assumptions = _device_memory(arguments, fields), _assumptions(arguments, fields)
    asked = _with_rows(arguments, fields, read_workload(fields))
    workload: Workload | None
    name, found, room = Path(arguments.config).name, None, columns_of(arguments.answers)
    if arguments.search:
        found = _search(arguments, asked, memory, assumptions)
        if not arguments.json:
            print(search_text(name, found, arguments.top, room), file=arguments.answers)
        workload = found.fitting[0].workload if found.fitting else None
    else:
        workload = place(asked, arguments.devices, _degrees(arguments), arguments.global_batch)
    made = None
    if workload is not None and not (found and arguments.no_compile):
        made = make_plan(fields, workload, memory, assumptions, not arguments.no_compile,
                         terminal.current.note, arguments.every_layer,
                         _steps(arguments, fields, workload))
        if not arguments.json:
            print(("\nThe first of them:\n" if found else "") + plan_text(name, made, room), file=arguments.answers)
    if arguments.json:
        print(json.dumps(_as_json(found, made), indent=1), file=arguments.answers)
    if arguments.html:
        write_whole(arguments.html, plan_page(name, made, found, arguments.top))
        terminal.current.say(f"The page is {arguments.html}.")
    return 0 if workload is not None and (made is None or made.fits) else 1


def _fields(arguments: argparse.Namespace) -> dict:
    """The YAML's fields with the overrides, checked."""
    fields = read_yaml(arguments.config)
    apply_overrides(fields, parse_overrides(arguments.rest))
    if arguments.data is not None:
        apply_overrides(fields, {"train_dataset.data_loader.dataset_dir": arguments.data})
    tie_data_section(fields)
    check_fields(fields, arguments.config)
    _adopt_start(fields)
    return fields


def _with_rows(arguments: argparse.Namespace, fields: dict, workload: Workload) -> Workload:
    """The workload with what its rows hold, as the data or an option say."""
    if arguments.mean_samples is not None:
        _check_mean_samples(arguments, workload)
        return replace(workload, rows=RowMeans(arguments.mean_samples))
    if arguments.data is None:
        return workload
    if workload.preference:
        raise ConfigError("--data is given with a recipe for preference pairs, which are not packed and are not "
                          "measured; leave it out.")
    return replace(workload, rows=read_rows(fields.get("train_dataset") or {}, workload.config))


def _check_mean_samples(arguments: argparse.Namespace, workload: Workload) -> None:
    if arguments.data is not None:
        raise ConfigError("--mean_samples and --data both say how many samples share a row; give one of them.")
    if not workload.config.packing:
        raise ConfigError("--mean_samples is given, but model.model_config.packing is False, so a row is one sample.")
    check_value("--mean_samples", arguments.mean_samples,
                Rule(lambda value: is_number(value) and 1 <= value <= workload.config.max_segments,
                     f"a number from 1 to max_segments {workload.config.max_segments}"))


def _steps(arguments: argparse.Namespace, fields: dict, workload: Workload) -> int | None:
    """Steps of the run, if they are known."""
    if arguments.steps is not None:
        check_value("--steps", arguments.steps, whole(1))
        return arguments.steps
    return steps_of_run(fields, workload.rows, workload.global_batch) if arguments.data and workload.rows else None


def _device_memory(arguments: argparse.Namespace, fields: dict) -> int:
    if arguments.device_memory is not None:
        return read_memory(arguments.device_memory)
    own = (fields.get("context") or {}).get("max_device_memory")
    return read_memory(own, "context.max_device_memory") if own else read_memory(DEVICE_MEMORY)


def _assumptions(arguments: argparse.Namespace, fields: dict) -> Assumptions:
    peak = {"tflops": fields["device_tflops"]} if fields.get("device_tflops") else {}
    given = {field.name: getattr(arguments, field.name) for field in fields_of(Assumptions)
             if getattr(arguments, field.name, None) is not None}
    for name, value in given.items():
        if value <= 0 or (name == "utilisation" and value > 1):
            limits = "above 0, and 1 at most" if name == "utilisation" else "above 0"
            raise ConfigError(f"--{name} is {value:g}; it must be {limits}.")
    return Assumptions(**{**peak, **given})


def _degrees(arguments: argparse.Namespace) -> dict[str, int | None]:
    return {name: getattr(arguments, name) for name in DEGREES}


def _search(arguments: argparse.Namespace, workload: Workload, memory: int, assumptions: Assumptions) -> Search:
    given = [f"--{name}" for name, value in _degrees(arguments).items() if value is not None]
    if given:
        raise ConfigError(f"--search tries all degrees, so {' and '.join(given)} cannot be given with it.")
    check_value("--top", arguments.top, whole(1))
    return search(workload, arguments.devices, arguments.global_batch or workload.global_batch, memory, assumptions)


def _as_json(found: Search | None, made: Plan | None) -> dict | None:
    planned = made.to_dict() if made else None
    if found is None:
        return planned
    return {"search": {"devices": found.devices, "global_batch": found.global_batch, "tried": found.tried,
                       "device_memory": found.device_memory,
                       "fitting": [_candidate(candidate) for candidate in found.fitting],
                       "refused": [asdict(entry) for entry in found.refused]},
            "plan": planned}


def _candidate(candidate: Candidate) -> dict:
    return {"layout": asdict(candidate.workload.layout), "micro_batch_samples": candidate.workload.samples,
            "stage": candidate.stage, "memory": candidate.memory.total,
            "time": {**asdict(candidate.time), "total": candidate.time.total,
                     "efficiency": candidate.time.efficiency}}
