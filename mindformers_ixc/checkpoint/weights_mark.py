"""By what answers know that they are of other weights, though the model directory has the same name."""
from __future__ import annotations

import hashlib
import os

from mindformers_ixc.config import CONFIG_FILE, read_fields
from mindformers_ixc.resources import resolve_model

# Suffixes of what a model directory answers by.
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".model")


def weights_mark(directory: str | os.PathLike) -> str:
    """Twelve letters that change with the weights of a model directory, without reading them.

    A directory that this package has written has digests, which move with it; of others the sizes and times of the
    files are taken.

    Raises:
        CheckpointError: when it is no model directory.
    """
    folder, total = resolve_model(directory), hashlib.sha256()
    if not (folder / CONFIG_FILE).is_file():
        read_fields(directory)      # which says what is wrong
    digests = folder / "digests.json"
    total.update((folder / CONFIG_FILE).read_bytes())
    if digests.is_file():
        total.update(digests.read_bytes())
    else:
        for path in sorted(folder.iterdir()):
            if path.suffix in _WEIGHTS:
                found = path.stat()
                total.update(f"{path.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return total.hexdigest()[:12]
