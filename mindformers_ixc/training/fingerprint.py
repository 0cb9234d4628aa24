"""What a graph follows from, as one number: a graph that was compiled earlier may be taken again only if it is equal.

A graph is made of the cells' Python attributes (numbers, constant tensors, primitives with theirs, functions with what
they enclose), of the code that is compiled, of MindSpore's own passes and of the shapes of what comes in. All of that
is read here; something of an unknown kind is an error, and no graph is kept then.
"""
from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import os
import platform
import re
import sys
import types
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.ops.primitive import Primitive

# Settings of MindSpore that change what is compiled.
_SETTINGS = ("mode", "device_target", "jit_level", "deterministic", "max_call_depth", "grad_for_scalar",
             "jit_syntax_level", "memory_optimize_level")

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), range, slice, np.generic, np.dtype,
          re.Pattern, enum.Enum, Path)


class UnknownKind(TypeError):
    """Something that a fingerprint cannot be taken of."""


@functools.cache
def sources() -> str:
    """Digest of all files of this package that code is compiled from."""
    digest, folder = hashlib.sha256(), Path(__file__).resolve().parent.parent
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".c", ".h")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def fingerprint(cell: nn.Cell, inputs: Iterable[Any]) -> str:
    """A digest that is another one wherever the graph of a cell could be.

    Args:
        cell: what is compiled.
        inputs: what it is called with; shapes and types count.

    Raises:
        UnknownKind: for an attribute whose value is not known to be read wholly.
    """
    reader = _Reader()
    reader.add("versions", [sys.version, platform.machine(), ms.__version__, version("mindformers"), sources()])
    reader.add("settings", [(name, str(_setting(name))) for name in _SETTINGS])
    reader.add("environment", sorted(item for item in os.environ.items() if item[0].startswith(("MS_", "MINDSPORE_"))))
    reader.add("inputs", [(str(value.dtype), tuple(value.shape)) if isinstance(value, Tensor) else value
                          for value in inputs])
    reader.add("cell", cell)
    return reader.finish()


def _setting(name: str) -> Any:
    try:
        return ms.get_context(name)
    except (ValueError, RuntimeError):        # not one of this version
        return None


class _Reader:
    """Goes through objects and takes in all that a graph could be made of."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.seen: dict[int, int] = {}
        self.files: set[str] = set()
        self.kept: list[Any] = []                 # so that no other object gets the place of one that was seen
        self.blank = (set(vars(nn.Cell())) | {"cell_init_args"}) - {"_buffers", "_jit_config_dict"}

    def finish(self) -> str:
        """The digest, once the files are read that code was met from."""
        for name in sorted(self.files):
            self._note("file", hashlib.sha256(Path(name).read_bytes()).hexdigest())
        return self.digest.hexdigest()

    def _note(self, *words: Any) -> None:
        self.digest.update(repr(words).encode() + b"\n")

    def add(self, place: str, value: Any) -> None:
        """Takes a value in; `place` says where it was met, for messages."""
        if isinstance(value, _PLAIN):
            self._note(type(value).__qualname__, repr(value))
            return
        if type(value).__module__ == "mindspore._c_expression.typing":         # MindSpore's dtypes
            self._note(str(value))
            return
        if id(value) in self.seen:
            self._note("seen", self.seen[id(value)])
            return
        self.seen[id(value)] = len(self.seen)
        self.kept.append(value)
        self._note(type(value).__module__, type(value).__qualname__)
        self._parts(place, value)

    def _parts(self, place: str, value: Any) -> None:
        if isinstance(value, Parameter):
            self._note(value.name, str(value.dtype), tuple(value.shape), value.requires_grad)
        elif isinstance(value, Tensor):
            self._array(value.float().asnumpy() if value.dtype == ms.bfloat16 else value.asnumpy(), str(value.dtype))
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self._array(value, str(value.dtype))
        elif isinstance(value, dict):
            self._items(place, value.items())
        elif isinstance(value, (list, tuple)):
            self._items(place, enumerate(value))
        elif isinstance(value, (set, frozenset)):
            self._items(place, enumerate(sorted(value, key=repr)))
        elif isinstance(value, type):
            self._code_of(value)
        elif isinstance(value, functools.partial):
            self._items(place, [("function", value.func), ("args", value.args), ("keywords", value.keywords)])
        elif isinstance(value, types.MethodType):
            self._items(place, [("function", value.__func__), ("self", value.__self__)])
        elif isinstance(value, types.FunctionType):
            self._function(place, value)
        elif isinstance(value, types.CodeType):
            self._note(value.co_code, value.co_names, value.co_varnames)
            self.add(place, value.co_consts)
        elif isinstance(value, types.BuiltinFunctionType):
            self._note(value.__qualname__)
        elif isinstance(value, nn.Cell):
            self._cell(place, value)
        else:
            self._object(place, value)

    def _array(self, array: np.ndarray, kind: str) -> None:
        self._note(kind, array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest())

    def _items(self, place: str, items: Iterable[tuple[Any, Any]]) -> None:
        for key, value in items:
            self._note("key", str(key))
            self.add(f"{place}.{key}", value)
        self._note("end")

    def _code_of(self, kind: type) -> None:
        for base in kind.__mro__:
            self._file_of(base)

    def _file_of(self, code: Any) -> None:
        """Notes the file that a class or function is written in, unless MindSpore's version stands for it."""
        module = getattr(code, "__module__", "") or ""
        if module.split(".")[0] in ("mindspore", "builtins", "pybind11_builtins"):
            return
        try:
            self.files.add(inspect.getfile(code))
        except (TypeError, OSError):
            if module.split(".")[0] not in sys.stdlib_module_names:
                raise UnknownKind(f"{code} has no source") from None

    def _function(self, place: str, function: types.FunctionType) -> None:
        self._file_of(function)
        self._note(function.__qualname__, function.__code__.co_firstlineno)
        for part in (function.__code__, function.__defaults__, function.__kwdefaults__):
            self.add(place, part)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            self.add(f"{place}.{name}", cell.cell_contents)

    def _cell(self, place: str, cell: nn.Cell) -> None:
        self._code_of(type(cell))
        self._items(place, cell.get_flags().items())
        self._note(cell.training, cell.phase, len(cell._params))
        self._items(place, cell._params.items())
        self._items(place, cell._primitives.items())
        unread = self.blank.union(getattr(type(cell), "not_compiled", ()))       # what only the host looks at
        self._items(place, [(name, value) for name, value in vars(cell).items() if name not in unread])
        self._items(place, cell._cells.items())

    def _object(self, place: str, value: Any) -> None:
        """An object of any class: its attributes, and of a primitive what MindSpore holds of it."""
        if not hasattr(value, "__dict__"):
            raise UnknownKind(f"{place} is of a kind that is not read: {type(value).__qualname__}")
        self._code_of(type(value))
        if isinstance(value, Primitive):
            self._items(place, sorted(value.attrs.items()))
            self._note(value.name)
        self._items(place, vars(value).items())
