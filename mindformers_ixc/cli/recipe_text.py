"""A YAML file with its bases as the text of one file, comments included.

PyYAML says where every key and value of a file stands, so what is not changed is taken over as it was written. Sections
that both files have are merged entry by entry; everything else of the file replaces what its base has, comments too.
"""
from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mindformers_ixc.cli.recipe_files import BASE, FOLDER, find_config, header
from mindformers_ixc.cli.yaml_file import load_yaml, put_on_top, read_yaml
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.files import read_text
from mindformers_ixc.version import __version__

INDENT = "  "

# Columns in front of comments.
NOTES = 40


@dataclass
class Piece:
    """A key with its value as a file has them.

    Attributes:
        source: the file.
        start: place of the key's first character.
        end: place behind the last one, comments included.
        node: the value as it was parsed.
        is_alias: whether the value is nothing but an alias.
        value: what it is.
    """

    source: Source
    start: int
    end: int
    node: yaml.Node
    is_alias: bool
    value: Any


@dataclass
class Entry:
    """An entry of a section.

    Attributes:
        content: its key with its value, or the section that it is.
        above: lines of comments above it, and empty ones.
        note: a comment to be put behind the key of a section, or behind a piece that has it elsewhere.
    """

    content: Piece | Section
    above: list[str] = field(default_factory=list)
    note: str = ""


@dataclass
class Section:
    """A section, entry by entry.

    Attributes:
        entries: by their keys.
        anchor: its name, where aliases mean it.
        below: lines of comments behind the last entry.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    anchor: str = ""
    below: list[str] = field(default_factory=list)

    @property
    def value(self) -> dict:
        """What it holds."""
        return {key: entry.content.value for key, entry in self.entries.items()}


class Source:
    """A file, and where what stands in it.

    Args:
        path: the file.

    Raises:
        ConfigError: when it cannot be read, or is no mapping in block style.
    """

    def __init__(self, path: Path):
        self.text = read_text(path, ConfigError)
        load_yaml(self.text, str(path))      # nothing below looks for damage
        self.lines = self.text.splitlines()
        self.starts = [0]
        for line in self.text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        root = yaml.compose(self.text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode) or root.flow_style or not root.value:
            raise ConfigError(f"{path} must hold a mapping of sections, one line a key at least.")
        self.values: dict[int, Any] = {}
        self._construct(root)
        self.marks: list[Any] = [token for token in yaml.scan(self.text, Loader=yaml.SafeLoader)
                                 if isinstance(token, (yaml.AnchorToken, yaml.AliasToken))]
        self.root = self._section(root, len(header(self.text)), len(self.lines))

    def _construct(self, node: yaml.Node) -> None:
        """Notes the value of every node by the place where it begins, which is that of its anchor."""
        self.values[node.start_mark.index] = yaml.SafeLoader("").construct_document(node)
        inner = [value for key, value in node.value if _is_here(key, value)] if isinstance(node, yaml.MappingNode) \
            else [item for item in node.value if _is_here(node, item)] if isinstance(node, yaml.SequenceNode) else []
        for value in inner:
            self._construct(value)

    def _section(self, node: yaml.MappingNode, first: int, end: int) -> Section:
        """A section in block style, which takes up the lines from one to another."""
        section = Section(anchor=self._anchor(node))
        places = [key.start_mark.line for key, _ in node.value]
        above = self.lines[first:places[0]]
        for (key, value), place, following in zip(node.value, places, [*places[1:], end]):
            last = _last_line(key, value)
            while last + 1 < following and _is_comment_beyond(self.lines[last + 1], key.start_mark.column):
                last += 1
            if isinstance(value, yaml.MappingNode) and not value.flow_style and _is_here(key, value):
                note = re.search(r"\s(#.*)", self.lines[place])
                entry = Entry(self._section(value, place + 1, last + 1), note=note[1] if note else "")
            else:
                entry = Entry(self._piece(key, value, self.starts[last] + len(self.lines[last])))
            entry.above, above = [line.strip() for line in above], self.lines[last + 1:following]
            section.entries[key.value] = entry
        section.below = [line.strip() for line in above]
        return section

    def _piece(self, key: yaml.Node, value: yaml.Node, end: int) -> Piece:
        return Piece(self, key.start_mark.index, end, value, not _is_here(key, value),
                     self.values[value.start_mark.index])

    def in_entries(self, piece: Piece) -> tuple[Section, str]:
        """A section that is written in one piece (`{a: 1, b: 2}`), entry by entry, and the comment behind it.

        What stands behind a single entry is about that one.
        """
        pairs, whole = piece.node.value, piece.node.end_mark.index
        section = Section(anchor=self._anchor(piece.node))
        last = piece.end if len(pairs) == 1 else whole
        for (key, value), following in zip(pairs, [*(key.start_mark.index for key, _ in pairs[1:]), last]):
            if _is_here(key, value):
                end = value.end_mark.index
            else:
                end = next(mark.end_mark.index for mark in self.marks if mark.start_mark.index > key.start_mark.index)
            section.entries[key.value] = Entry(self._piece(key, value, end), note=self._note(end, following))
        return section, self._note(whole, piece.end) if len(pairs) != 1 else ""

    def _note(self, start: int, end: int) -> str:
        """The comments between two places, as one."""
        notes = re.findall(r"#\s*(.*)", self.text[start:end])
        return f"# {' '.join(note.strip() for note in notes)}" if notes else ""

    def aliased(self, alias: Any) -> Any:
        """What an alias stands for."""
        before = [mark for mark in self.marks if isinstance(mark, yaml.AnchorToken) and mark.value == alias.value
                  and mark.start_mark.index < alias.start_mark.index]
        return self.values[before[-1].start_mark.index]

    def _anchor(self, node: yaml.Node) -> str:
        found = re.match(r"&([\w-]+)", self.text[node.start_mark.index:])
        return found[1] if found else ""


def _is_here(key: yaml.Node, value: yaml.Node) -> bool:
    """Whether a value stands behind its key, and is no alias to what stands before."""
    return value.start_mark.index >= key.start_mark.index


def _last_line(key: yaml.Node, value: yaml.Node) -> int:
    """The last line of a value; block style would count what follows in."""
    if not _is_here(key, value):
        return key.start_mark.line
    if isinstance(value, yaml.CollectionNode) and not value.flow_style and value.value:
        last = value.value[-1]
        return _last_line(*last) if isinstance(last, tuple) else _last_line(value, last)
    end = value.end_mark
    return end.line - 1 if end.column == 0 and end.line > value.start_mark.line else end.line


def _is_comment_beyond(line: str, column: int) -> bool:
    text = line.lstrip()
    return text.startswith("#") and len(line) - len(text) > column


def merged(base: Section, own: Section) -> Section:
    """A section with another one's entries on top; a new entry stands beside the one that it stands beside there."""
    entries, before = dict(base.entries), ""
    names = list(own.entries)
    for i, (key, entry) in enumerate(own.entries.items()):
        if key in entries:
            entries[key] = _merged_entry(entries[key], entry)
        else:
            keys = list(entries)
            after = next((keys.index(name) for name in names[i:] if name in base.entries), len(keys))
            place = keys.index(before) + 1 if before else after
            entries = {name: entry if name == key else entries[name] for name in [*keys[:place], key, *keys[place:]]}
        before = key
    return Section(entries, own.anchor or base.anchor, [*base.below, *own.below])


def _merged_entry(base: Entry, own: Entry) -> Entry:
    old, new, above = base.content, own.content, own.above if any(own.above) else base.above
    if not isinstance(old.value, dict) or not isinstance(new.value, dict) or not old.value:
        return Entry(new, above, own.note)
    alias = next((one for one in (new, old) if isinstance(one, Piece) and one.is_alias), None)
    if alias is not None:
        return Entry(replace(alias, value=put_on_top(old.value, new.value)), above, own.note)
    (old, before), (new, note) = _in_entries(base), _in_entries(own)
    return Entry(merged(old, new), above, note or before)


def _in_entries(entry: Entry) -> tuple[Section, str]:
    content = entry.content
    return (content, entry.note) if isinstance(content, Section) else content.source.in_entries(content)


class Writer:
    """Writes sections as the lines of one file, in which an alias may have come to mean something else."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.anchored: dict[str, Any] = {}

    def write(self, section: Section, depth: int = 0) -> None:
        """Adds the lines of a section."""
        indent = INDENT * depth
        for key, entry in section.entries.items():
            self._add(entry.above, indent)
            if isinstance(entry.content, Section):
                anchor = f" &{entry.content.anchor}" if entry.content.anchor else ""
                self._add([f"{key}:{anchor}"], indent)
                self._note(entry.note)
                self.write(entry.content, depth + 1)
                if anchor:
                    self.anchored[entry.content.anchor] = entry.content.value
            else:
                self._add(self._lines_of(entry.content), indent)
                self._note(entry.note)
        self._add(section.below, indent)

    def _note(self, note: str) -> None:
        if note:
            self.lines[-1] = f"{self.lines[-1]:<{NOTES}} {note}"

    def _add(self, lines: list[str], indent: str) -> None:
        self.lines += [f"{indent}{line}".rstrip() for line in lines]

    def _lines_of(self, piece: Piece) -> list[str]:
        """A piece as it was written, from the column of its key on; an alias that no longer fits as its value."""
        source, place, parts = piece.source, piece.start, []
        for mark in source.marks:
            start, end = mark.start_mark.index, mark.end_mark.index
            if not piece.start <= start < piece.end:
                continue
            if isinstance(mark, yaml.AnchorToken):
                self.anchored[mark.value] = source.values[start]
                continue
            value = piece.value if piece.is_alias else source.aliased(mark)
            if mark.value not in self.anchored or _plain(self.anchored[mark.value]) != _plain(value):
                parts += [source.text[place:start], _in_line(value)]
                place = end
        lines = "".join([*parts, source.text[place:piece.end]]).splitlines()
        column = piece.start - source.text.rfind("\n", 0, piece.start) - 1
        return [lines[0], *(line[min(column, len(line) - len(line.lstrip())):] for line in lines[1:])]


def _in_line(value: Any) -> str:
    """A value in flow style."""
    return yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=10 ** 9).strip()[1:-1]


def merged_text(path: Path, name: str) -> str:
    """A recipe with its bases as one file that stands alone.

    Args:
        path: of the recipe.
        name: how its header is to call the file.

    Raises:
        ConfigError: when a file cannot be read, or the result would not say what the recipe says.
    """
    files = _chain(path)
    section = Section()
    for file in reversed(files):
        own = Source(file).root
        own.entries.pop("base_config", None)
        section = merged(section, own)
    writer = Writer()
    writer.write(section)
    text = "\n".join([*_header(files, name), *writer.lines]) + "\n"
    if _plain(load_yaml(text, name)) != _plain(read_yaml(path)):
        raise ConfigError(f"{path} and its bases cannot be written as one file with their comments; copy "
                          f"{', '.join(str(file) for file in files)} into one folder instead.")
    return text


def _chain(path: Path) -> list[Path]:
    """A file and its bases, each the base of the one before."""
    bases = load_yaml(read_text(path, ConfigError), str(path)).get("base_config") or []
    bases = [bases] if isinstance(bases, str) else bases
    return [path, *(file for base in bases for file in _chain(find_config(base, path)))]


def _header(files: list[Path], name: str) -> list[str]:
    """What the files say of themselves; of a base that is no recipe not what it is for (its first paragraph)."""
    own, *bases = files
    merged_in = f", with {' and '.join(base.name for base in bases)} merged in" if bases else ""
    lines = [f"The recipe {own.stem} of mindformers_ixc {__version__}{merged_in}.", ""]
    lines += [line.replace(f"{FOLDER}/{own.name}", name) for line in header(read_text(own, ConfigError))]
    for base in bases:
        said = header(read_text(base, ConfigError))
        if base.name.startswith(BASE):
            said = said[said.index("") + 1:] if "" in said else []
        if said:
            lines += ["", f"From {base.name}:", *said]
    return [f"# {line}".rstrip() for line in lines]


def _plain(value: Any) -> str:
    """A value as text, with the type of each number."""
    return json.dumps(value, sort_keys=True, default=str)
