"""Whether a YAML file was written for another version of this package, and what has changed since.

One function a change, in the order of CHANGELOG.md. What is only new needs none: older files do without.
"""
from __future__ import annotations

from collections.abc import Callable

from mindformers_ixc.errors import ConfigError


def check_version(fields: dict, source: str) -> None:
    """Refuses what an earlier version took and this one does not.

    Args:
        fields: of the YAML, overrides applied; not checked yet.
        source: name of the file, for the messages.

    Raises:
        ConfigError: one sentence for each change, with what to write now.
    """
    found = [sentence for sentence in (change(fields) for change in CHANGES) if sentence]
    if found:
        raise ConfigError(f"{source} was written for an earlier version of mindformers_ixc. {' '.join(found)}")


def _section(fields: dict, name: str) -> dict:
    found = fields.get(name)
    return found if isinstance(found, dict) else {}


def _columns(fields: dict) -> list:
    found = _section(fields, "train_dataset").get("input_columns")
    return found if isinstance(found, list) else []


def _is_own(fields: dict) -> bool:
    """Whether the data set is one of this package's."""
    return str(_section(fields, "train_dataset_task").get("type")).startswith("IXC25")


def _segments(fields: dict) -> str:
    if not _is_own(fields) or "segment_ids" not in _columns(fields):
        return ""
    return ("The column segment_ids of train_dataset.input_columns is gone: packed rows are told by segment_ends, "
            "where their segments end; write segment_ends in its place.")


def _global_views(fields: dict) -> str:
    columns = _columns(fields)
    missing = [name for name in ("global_views", "view_index") if name not in columns]
    if not _is_own(fields) or "pixel_values" not in columns or not missing:
        return ""
    return (f"Global views have columns of their own, since local tiles travel as bytes: add {' and '.join(missing)} "
            "to train_dataset.input_columns.")


def _strategy(fields: dict) -> str:
    strategy = _section(fields, "parallel").get("dataset_strategy")
    if not isinstance(strategy, list) or not (_segments(fields) or _global_views(fields)):
        return ""
    return "Take parallel.dataset_strategy out: it follows from the columns now."


CHANGES: tuple[Callable[[dict], str], ...] = (_segments, _global_views, _strategy)
