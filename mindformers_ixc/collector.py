"""Pauses Python's cyclic garbage collector while MindFormers is imported.

The import creates very many objects that all stay alive. Walking them again and again, and once more when the
process ends, takes about a quarter of the time of `import mindformers_ixc` and finds nothing.
"""
from __future__ import annotations

import gc

_was_enabled = gc.isenabled()
gc.disable()


def resume() -> None:
    """Exempts what has been imported from collection and goes on collecting, if the collector was on."""
    gc.freeze()
    if _was_enabled:
        gc.enable()
