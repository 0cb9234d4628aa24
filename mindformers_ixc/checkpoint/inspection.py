"""Says what is in a checkpoint: parts, counts, formats, what is missing or surplus, and whether the bytes are right."""
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mindformers_ixc.checkpoint.digests import check_files, differences, group_by_digests
from mindformers_ixc.checkpoint.dtypes import FLOATING
from mindformers_ixc.checkpoint.family import describe_member, is_of_family, know_member, unused_missing
from mindformers_ixc.checkpoint.quantised import (
    AWQ,
    NUMBERS,
    Quantization,
    StoredWeight,
    quantization_of,
    stored_weights,
    widened,
)
from mindformers_ixc.checkpoint.sources import OpenedCheckpoint, is_state, open_source
from mindformers_ixc.checkpoint.tensors import JoinedTensor, LazyTensor
from mindformers_ixc.config import read_config
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.parameters import BUFFERS, PARTS, UNUSED, base_name, parameter_table, part_of
from mindformers_ixc.tables import Column, table, wrapped

# Of the table of parts.
COLUMNS = (Column("part", 18, left=True), Column("tensors", 9), Column("parameters", 17), Column("bytes", 17),
           Column("formats", left=True, gap=2))


@dataclass
class Part:
    """Tensors of one part.

    Attributes:
        tensors: how many.
        parameters: numbers in them.
        bytes: they take.
        formats: how many tensors have each format.
    """

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    formats: dict[str, int] = field(default_factory=dict)


@dataclass
class Report:
    """What `inspect` found in a checkpoint.

    Attributes:
        path: the checkpoint.
        kind: `public`, `mindspore` or `ranks`.
        files: that hold it.
        layout: ranks and pipeline stages, for `ranks`.
        parts: by name, in the order of `parameters.PARTS`; then `optimizer states`, `buffers`,
            `not used here` and `other`.
        missing: parameters of the configuration that are not there; `None` without a configuration.
        surplus: tensors that the configuration does not have.
        wrong_shapes: name, shape found and shape asked for.
        wrong_formats: name and format of weights that are no numbers of floating point.
        tensors: name, format and shape of each, if asked for.
        has_digests: whether all files have digests, `digests.json` or checksums in an index.
        verified: how many digests were compared; `None` if not asked for.
        damaged: tensors, headers and other files whose bytes do not have their digest.
        differing: tensors of which ranks hold copies that are not equal (the first rank's is taken); `None` if not
            asked for.
        quantization: how weights are kept as whole numbers, as a sentence; `None` where they are not.
        member: which model of the family it is and what it can do here, as a sentence; `None` where nothing says so.
        of_family: whether its `config.json`, if it has one, is not another model's.
    """

    path: str
    kind: str
    files: list[str]
    layout: dict[str, int] | None
    parts: dict[str, Part]
    missing: list[str] | None = None
    surplus: list[str] = field(default_factory=list)
    wrong_shapes: list[tuple] = field(default_factory=list)
    wrong_formats: list[tuple] = field(default_factory=list)
    tensors: list[tuple] | None = None
    has_digests: bool = False
    verified: int | None = None
    damaged: list[str] = field(default_factory=list)
    differing: list[str] | None = None
    quantization: str | None = None
    member: str | None = None
    of_family: bool = True

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=2)

    def to_text(self, room: int | None = None) -> str:
        """The report as a table and sentences.

        Args:
            room: columns of the terminal, `None` for what is none.
        """
        files = f"{len(self.files)} file{'' if len(self.files) == 1 else 's'}"
        ranks = f", {self.layout['ranks']} ranks, {self.layout['pipeline_stages']} pipeline stages" \
            if self.layout else ""
        lines = wrapped(f"{self.path}: {self.kind} checkpoint, {files}{ranks}", room, "  ")
        parts = self.parts.values()
        total = Part(sum(part.tensors for part in parts), sum(part.parameters for part in parts),
                     sum(part.bytes for part in parts))
        lines += table(COLUMNS, (_row(name, part) for name, part in [*self.parts.items(), ("all", total)]), room)
        lines += [f"{name}  {dtype}  {tuple(shape)}" for name, dtype, shape in self.tensors or []]
        return "\n".join([*lines, *(line for sentence in self._sentences() for line in wrapped(sentence, room))])

    def _sentences(self) -> list[str]:
        lines = [sentence for sentence in (self.member, self.quantization) if sentence]
        if self.missing is None and self.of_family:
            lines.append("No config.json was found, so what is missing cannot be said; name one with --config.")
        elif self.of_family and not (self.missing or self.surplus or self.wrong_shapes or self.wrong_formats):
            lines.append("It holds exactly what its configuration asks for.")
        if self.missing:
            lines.append(f"{len(self.missing)} parameters are missing: {_some(self.missing)}")
        if self.surplus:
            lines.append(f"{len(self.surplus)} tensors are surplus: {_some(self.surplus)}")
        lines += [f"{name} has shape {tuple(found)}, the configuration asks for {tuple(asked)}."
                  for name, found, asked in self.wrong_shapes]
        if self.wrong_formats:
            lines.append(f"{len(self.wrong_formats)} weights are in a format that is not read: "
                         + _some([f"{name} ({dtype})" for name, dtype in self.wrong_formats]))
        if self.verified:
            lines.append(f"{self.verified} checksums compared, {len(self.damaged)} differ"
                         + (f": {_some(self.damaged)}" if self.damaged else "."))
        elif self.verified is None and self.has_digests:
            lines.append("Not verified: its bytes were not compared with its digests; --verify does that.")
        if not self.has_digests:
            lines.append(f"{'Some of its files have' if self.verified else 'It has'} no digests, so damage to "
                         "bytes cannot be noticed.")
        if self.differing:
            lines.append(f"The ranks' copies of {len(self.differing)} tensors are not equal (the first rank's is "
                         f"taken): {_some(self.differing)}")
        elif self.differing is not None:
            lines.append("Copies of a tensor that several ranks hold are equal.")
        return lines


def _row(name: str, part: Part) -> list[str]:
    formats = ", ".join(f"{count} x {dtype}" for dtype, count in sorted(part.formats.items()))
    return [name, f"{part.tensors:,}", f"{part.parameters:,}", f"{part.bytes:,}", formats]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def inspect(path: str | Path, config: str | Path | None = None, strategy: str | Path | None = None,
            verify: bool = False, list_tensors: bool = False) -> Report:
    """Looks into a checkpoint; only headers are read unless digests are compared.

    Args:
        path: any checkpoint `convert` reads.
        config: `config.json` or its directory to compare with; by default the checkpoint's own.
        strategy: strategy of ranks, if it is not in the usual place.
        verify: compare the bytes with their digests, and the copies that ranks hold with each other.
        list_tensors: list every tensor.

    Raises:
        CheckpointError: when it is no checkpoint or is damaged, or there are no digests to compare.
    """
    source = open_source(path, strategy, verify=False)
    quantization = quantization_of(source)
    stored = stored_weights(source, quantization) if quantization is not None else {}
    parts: dict[str, Part] = {}
    for name, tensor in source.tensors.items():
        part = parts.setdefault(_part(name, stored), Part())
        part.tensors += 1
        part.parameters += _parameters(name, tensor, stored)
        part.bytes += tensor.nbytes
        part.formats[tensor.dtype] = part.formats.get(tensor.dtype, 0) + 1
    order = [*PARTS, "optimizer states", "buffers", "not used here", "other"]
    cut = source.strategy
    layout = {"ranks": cut.ranks, "pipeline_stages": cut.stage_count} if cut else None
    report = Report(str(source.path), source.kind, [str(file) for file in source.files], layout,
                    {name: parts[name] for name in order if name in parts})
    if quantization is not None:
        report.quantization = _in_words(quantization, len(stored))
    report.member, report.of_family = describe_member(source), is_of_family(source)
    report.has_digests = group_by_digests([*source.files, *source.strategy_files])[1]
    if list_tensors:
        report.tensors = [(name, tensor.dtype, tensor.shape) for name, tensor in source.tensors.items()]
    found = Path(config) if config else source.config_file
    if found is not None and (config or report.of_family):
        _compare(report, widened(source), found)
    if verify:
        _verify(report, source)
    return report


def _parameters(name: str, tensor: LazyTensor, stored: Mapping[str, StoredWeight]) -> int:
    """Numbers of the model in a tensor: of a weight that is whole numbers all of its own, of its scales none."""
    stem, _, last = name.rpartition(".")
    if stem not in stored or last not in stored[stem].parts:
        return math.prod(tensor.shape)
    return math.prod(stored[stem].shape) if last == NUMBERS else 0


def _in_words(quantization: Quantization, count: int) -> str:
    layout = "AWQ's layout (gemm)" if quantization.method == AWQ else f"the layout {quantization.method}"
    return (f"Quantised: the decoder's linears have {quantization.bits} bits, in {layout}; {count} weights are whole "
            "numbers. `mindformers convert SRC DST --to hf` makes full weights of them.")


def _part(name: str, stored: Mapping[str, StoredWeight] | None = None) -> str:
    stem = name.rpartition(".")[0]
    if stored and stem in stored:
        name = f"{stem}.weight"
    if base_name(name) != name:
        return "optimizer states"
    if BUFFERS.match(name):
        return "buffers"
    if name in UNUSED:
        return "not used here"
    return part_of(name) or "other"


def _compare(report: Report, source: OpenedCheckpoint, config: Path) -> None:
    table = parameter_table(know_member(read_config(config), source))
    report.missing = [*(name for name in table if name not in source.tensors), *unused_missing(source)]
    for name, tensor in source.tensors.items():
        if _part(name) in ("optimizer states", "buffers", "not used here") or is_state(name):
            continue
        if name not in table:
            report.surplus.append(name)
        elif tensor.shape != table[name].shape:
            report.wrong_shapes.append((name, tensor.shape, table[name].shape))
        elif tensor.dtype not in FLOATING:
            report.wrong_formats.append((name, tensor.dtype))


def _verify(report: Report, source: OpenedCheckpoint) -> None:
    if source.kind == "ranks":
        report.differing = [name for name, tensor in source.tensors.items()
                            if isinstance(tensor, JoinedTensor) and not tensor.copies_agree()]
    groups, _ = group_by_digests([*source.files, *source.strategy_files])
    if not groups and source.kind != "ranks":
        raise CheckpointError(f"{source.path} has no digests to compare with; what this package writes has.")
    report.verified = 0
    for digests, names in groups:
        if source.path.is_dir() and source.kind != "ranks":     # the tokenizer, too
            names = list(digests.files)
        check_files(digests, names)
        for found in differences(digests, names):
            report.verified += 1
            if found is not None:
                prefix = f"{found.file}: " if source.kind == "ranks" or not found.part else ""
                report.damaged.append(f"{prefix}{found.part}" if found.part else found.file)
