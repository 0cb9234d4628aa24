"""The error sentences of the package, read from its source, for docs/troubleshooting.md (scripts/write_docs.py).

A sentence is the text of an error that is made: one of the package's own classes, or an OSError. Values that are put
into it are shown by their names in capitals, constants as they are. Nothing is imported; the files are parsed.
"""
from __future__ import annotations

import ast
import builtins
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

OS_ERRORS = {name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, OSError)}
LONGEST = 24                              # of the name of a value


@dataclass
class Source:
    """A parsed module.

    Attributes:
        path: as the page shows it.
        about: the first sentence of its docstring.
        tree: its syntax.
        constants: texts and numbers that it gives names to; lists of them joined by commas.
        functions: its functions and methods by name.
        calls: calls of a name with arguments, in the order of lines, with what surrounds each: single assignments of
            the function that it stands in.
    """

    path: str
    about: str
    tree: ast.Module
    constants: dict[str, str] = field(default_factory=dict)
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    calls: list[tuple[ast.Call, dict[str, ast.expr]]] = field(default_factory=list)


@dataclass
class Sentence:
    """An error's text and the modules that say it."""

    text: str
    sources: list[Source]


def read_sources(root: Path) -> list[Source]:
    """The package's modules and the command's."""
    package = root / "mindformers_ixc"
    found = []
    for file in [*sorted(package.rglob("*.py")), root / "mindformers_ixc_cli.py"]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        path = file.relative_to(package if package in file.parents else root).as_posix()
        about = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
        source = Source(path, about, tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                source.functions.setdefault(node.name, node)
        for node in tree.body:
            if isinstance(node, ast.Assign):
                source.constants.update(_constants(node.targets[0], node.value))
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                source.constants.update(_constants(node.target, node.value))
        source.calls = sorted(_calls(tree, {}), key=lambda found: (found[0].lineno, found[0].col_offset))
        found.append(source)
    return found


def _constants(target: ast.expr, value: ast.expr) -> dict[str, str]:
    """What an assignment of a module gives names to."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = [_constants(one, part) for one, part in zip(target.elts, value.elts)]
        return {name: text for pair in pairs for name, text in pair.items()}
    if not isinstance(target, ast.Name):
        return {}
    if isinstance(value, ast.Constant) and isinstance(value.value, (str, int, float)):
        return {target.id: str(value.value)}
    parts = getattr(value, "elts", getattr(value, "keys", []))       # of a tuple or list, or of a dict
    texts = [str(part.value) for part in parts if isinstance(part, ast.Constant)]
    return {target.id: ", ".join(texts)} if texts and len(texts) == len(parts) else {}


def _calls(node: ast.AST, names: dict[str, ast.expr]) -> Iterator[tuple[ast.Call, dict[str, ast.expr]]]:
    """The calls in a piece of syntax."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call) and child.args and isinstance(child.func, ast.Name):
            yield child, names
        yield from _calls(child, _assigned_once(child) if isinstance(child, ast.FunctionDef) else names)


def _assigned_once(function: ast.FunctionDef) -> dict[str, ast.expr]:
    """Names of a function that have one value for good, and are none of its arguments."""
    times = Counter(node.id for node in ast.walk(function) if isinstance(node, ast.Name) and
                    isinstance(node.ctx, ast.Store))
    times.update(argument.arg for argument in ast.walk(function) if isinstance(argument, ast.arg))
    return {node.targets[0].id: node.value for node in ast.walk(function) if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name) and times[node.targets[0].id] == 1}


def error_classes(sources: list[Source]) -> set[str]:
    """Names of the package's own errors, those of single modules too, and of OSError and what derives from it."""
    own = {node.name for source in sources if source.path == "errors.py" for node in source.tree.body
           if isinstance(node, ast.ClassDef)} | OS_ERRORS
    while True:
        more = {node.name for source in sources for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)
                and any(isinstance(base, ast.Name) and base.id in own for base in node.bases)} - own
        if not more:
            return own
        own |= more


class Reader:
    """Reads the sentences of one module.

    Args:
        source: the module.
        sources: all of them, for constants and functions that it imports.
    """

    def __init__(self, source: Source, sources: list[Source]):
        self.source = source
        self.sources = sources
        self.names: dict[str, ast.expr] = {}

    def sentences(self, classes: set[str]) -> Iterator[str]:
        """Every sentence of the module, in the order of its lines.

        Args:
            classes: names of errors.
        """
        raised = {id(node.exc) for node in ast.walk(self.source.tree) if isinstance(node, ast.Raise)}
        for call, names in self.source.calls:
            self.names = names
            if call.func.id in classes or (call.func.id == "error" and id(call) in raised):
                first = call.args[0]
                number = isinstance(first, ast.Constant) and isinstance(first.value, int) and len(call.args) > 1
                for text in self._texts(call.args[number]):
                    sentence = " ".join(text.split())
                    if sum(map(str.islower, sentence)) > 4:       # others are made of values alone
                        yield sentence

    def _texts(self, node: ast.expr) -> list[str]:
        """What an expression may say; a function that makes the sentence is looked into."""
        if isinstance(node, ast.BoolOp):
            return [text for value in node.values for text in self._texts(value)]
        if isinstance(node, ast.Name) and node.id in self.names:
            return self._texts(self.names[node.id])
        source = self._home(node.func) if isinstance(node, ast.Call) else None
        if source is None:
            return [self._text(node)]
        function = source.functions[getattr(node.func, "attr", getattr(node.func, "id", ""))]
        other = Reader(source, self.sources)
        other.names = _assigned_once(function)
        returned = [part.value for part in ast.walk(function) if isinstance(part, ast.Return)]
        return [other._text(value) for value in returned if isinstance(value, (ast.JoinedStr, ast.Constant))]

    def _home(self, called: ast.expr) -> Source | None:
        """The module of a function that is called: this one, or the only one with a function of that name."""
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if name in self.source.functions:
            return self.source
        found = [source for source in self.sources if name in source.functions]
        return found[0] if len(found) == 1 else None

    def _text(self, node: ast.expr | None) -> str:
        """The text of an expression, with names for values."""
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else ""
        if isinstance(node, ast.JoinedStr):
            return self._joined(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._text(node.left) + self._text(node.right)
        return self._placeholder(node) if node else ""

    def _joined(self, node: ast.JoinedStr) -> str:
        """An f-string; a value that touches a word stands in brackets, since it is a piece of text or empty."""
        text, touching = "", False
        for part in node.values:
            value = isinstance(part, ast.FormattedValue)
            piece = self._value(part) if value else self._text(part)
            named = value and _is_name(piece)
            if touching and (named or re.match(r"(?!s\b)[A-Za-z]", piece)):
                text = re.sub(r"([A-Z_]+)$", r"[\1] ", text)
            elif named and text[-1:].isalpha() and not text.endswith(("\\u", "0x")):
                piece = f"[{piece}]"
            text, touching = text + piece, named and not piece.startswith("[")
        return text

    def _value(self, node: ast.FormattedValue) -> str:
        """A value in a text: the constant that it is, or its name."""
        value, own = node.value, self.source.functions.keys() - {"hint", "did_you_mean"}
        if isinstance(value, ast.Call) and getattr(value.func, "attr", "") == "join" and len(value.args) == 1:
            value = value.args[0]
        if isinstance(value, ast.Name):
            known = self._constant(value.id)
            if known is not None:
                return repr(known) if node.conversion == ord("r") else known
            if isinstance(self.names.get(value.id), (ast.JoinedStr, ast.IfExp)):
                value = self.names[value.id]
        if isinstance(value, ast.JoinedStr):
            return self._joined(value)
        if isinstance(value, ast.Call) and getattr(value.func, "id", "") in own and value.args[1:]:
            return self._placeholder(value.func)
        if isinstance(value, ast.Subscript) and isinstance(value.value, ast.Name):
            entries, place = (self._constant(value.value.id) or "").split(", "), getattr(value.slice, "value", None)
            if isinstance(place, int) and 0 <= place < len(entries) > 1:
                return entries[place]
        if isinstance(value, ast.BoolOp) and isinstance(value.op, ast.And):      # there only if something else is
            return f"[{self._text(value.values[-1])}]"
        if isinstance(value, ast.IfExp):
            first, second = self._text(value.body), self._text(value.orelse)
            if all(_is_name(text or "X") for text in (first, second)):
                return self._placeholder(node.value)
            return f"[{first} | {second}]" if first.strip() and second.strip() else f"[{first}{second}]"
        return self._placeholder(value)

    def _constant(self, name: str) -> str | None:
        if name in self.source.constants:
            return self.source.constants[name]
        found = {source.constants[name] for source in self.sources if name in source.constants}
        return found.pop() if len(found) == 1 and name.isupper() else None

    def _placeholder(self, node: ast.expr) -> str:
        """The name of a value in capitals."""
        name = _name(node).strip("_").upper() or "VALUE"
        words = name.split("_")
        while len("_".join(words)) > LONGEST and len(words) > 1:
            words.pop(0)
        return "_".join(words)[:LONGEST]


def _is_name(text: str) -> bool:
    """Whether a piece of a sentence is the name of a value."""
    return re.fullmatch(r"[A-Z][A-Z0-9_]*", text) is not None


def _name(node: ast.expr) -> str:
    """What a value is called in the source, empty for what has no name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        if node.attr == "__name__":
            return "type"
        return {"strerror": "reason", "parent": "folder"}.get(node.attr, node.attr)
    if isinstance(node, ast.Subscript):
        index = node.slice
        if isinstance(index, ast.Constant) and isinstance(index.value, str):
            return index.value
        return _name(node.value)
    if isinstance(node, ast.Call):
        return _name_of_call(node)
    if isinstance(node, ast.BinOp):
        return _name(node.left) or _name(node.right)
    if isinstance(node, ast.BoolOp):
        return _name(node.values[0])
    if isinstance(node, (ast.GeneratorExp, ast.ListComp)):
        return _name(node.elt)
    if isinstance(node, (ast.FormattedValue, ast.Starred)):
        return _name(node.value)
    if isinstance(node, (ast.JoinedStr, ast.Tuple)):
        parts = node.values if isinstance(node, ast.JoinedStr) else node.elts
        return next((name for name in map(_name, parts) if name), "")
    return ""


def _name_of_call(node: ast.Call) -> str:
    """What the result of a call is called: after its argument, a method's without one after its object."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if called == "len":
        return "number"
    if called in ("hint", "did_you_mean"):
        return "hint"
    if called == "type":
        return "type"
    argument = next((name for name in map(_name, reversed(node.args) if called == "map" else node.args) if name), "")
    if argument:
        return argument
    return (_name(node.func.value) if isinstance(node.func, ast.Attribute) else "") or called


def collect(root: Path) -> list[Sentence]:
    """Every sentence of the package once, with the modules that say it.

    Args:
        root: the folder of the repository.
    """
    sources = read_sources(root)
    classes = error_classes(sources)
    found: dict[str, Sentence] = {}
    for source in sources:
        for text in Reader(source, sources).sentences(classes):
            said = found.setdefault(text, Sentence(text, []))
            if source not in said.sources:
                said.sources.append(source)
    return list(found.values())
