"""MindFormers' own list of the keys of a YAML, without the seconds that its import takes."""
from __future__ import annotations

import ast
import functools
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Protocol

from mindformers_ixc.errors import ConfigError

# Where MindFormers keeps the list: a module that needs nothing of MindFormers but its logger.
MODULE = "mindformers.tools.register.template"


class Template(Protocol):
    """What is used of a section's class: its public attributes are the section's keys with their defaults."""

    _raise_error_for_unexpected_key: bool

    @classmethod
    def keys(cls) -> list[str]: ...


def section_templates() -> dict[str, type[Template]]:
    """Classes of the sections by name; `general_config` is the top level.

    Raises:
        ConfigError: when MindFormers is not installed.
    """
    module = sys.modules.get(MODULE)
    return module.CONFIG_NAME_TO_CLASS if module is not None else _read()


@functools.cache
def _read() -> dict[str, type[Template]]:
    """Runs the module's text, without its imports from MindFormers: `PathFinder` imports no package either."""
    spec = PathFinder.find_spec("mindformers")
    if spec is None or spec.origin is None:
        raise ConfigError("MindFormers is not installed; install this package with pip, which brings it.")
    path = Path(spec.origin).parent.joinpath(*MODULE.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    tree.body = [node for node in tree.body
                 if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mindformers"))]
    names: dict[str, Any] = {"__name__": MODULE}
    exec(compile(tree, str(path), "exec"), names)
    return names["CONFIG_NAME_TO_CLASS"]
