"""What can be said of a server's options before the libraries are imported."""
from __future__ import annotations

import argparse
import importlib.util
import os
from dataclasses import fields

from mindformers_ixc.chat_client import OWN_KEY_VARIABLE
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.files import check_target
from mindformers_ixc.interruption import JOB
from mindformers_ixc.sections import above_0, check_value
from mindformers_ixc.serving.limits import Limits
from mindformers_ixc.serving.listening import listen

# The packages of the extra `serve`.
PACKAGES = ("starlette", "uvicorn")

# Characters of a key at least.
SHORTEST_KEY = 8


def limits_of(arguments: argparse.Namespace) -> Limits:
    """The limits of a command line.

    Raises:
        ConfigError: for a value that is none.
    """
    given = {one.name: getattr(arguments, f"max_{one.name}") for one in fields(Limits)}
    return Limits(**{name: value for name, value in given.items() if value is not None})


def api_key(arguments: argparse.Namespace) -> str:
    """The key that clients must send; empty for none.

    Raises:
        ConfigError: for one that is too short to be one, or that no header can carry.
    """
    key = os.environ.get(OWN_KEY_VARIABLE, "") if arguments.api_key is None else arguments.api_key
    if not key and arguments.api_key is None:
        return ""
    if len(key) < SHORTEST_KEY or not all("!" <= letter <= "~" for letter in key):
        raise ConfigError(f"The API key has {len(key)} characters or one that no header carries; take at least "
                          f"{SHORTEST_KEY} letters and digits, such as `openssl rand -hex 24` gives.")
    return key


def _is_stream(path: str) -> bool:
    """Whether there is something that is neither a file nor a folder, such as `/dev/stderr`."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def check_serve(arguments: argparse.Namespace) -> None:
    """Refuses options that cannot be, a missing package, a port that is taken.

    Raises:
        ConfigError: with what to do.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"`serve` needs {' and '.join(missing)}; install them by pip install "
                          "\"mindformers_ixc[serve]\".")
    limits_of(arguments)
    api_key(arguments)
    for name in ("drain_seconds", "max_stall"):
        value = getattr(arguments, name)
        if value is not None:
            check_value(f"--{name}", value, above_0(), ConfigError)
    if arguments.image_root is not None and not os.path.isdir(arguments.image_root):
        raise ConfigError(f"--image_root {arguments.image_root} is no folder; name the one that all pictures lie in.")
    if arguments.log and not _is_stream(arguments.log):
        check_target(arguments.log, "--log")
    for name in arguments.allow_host:
        if "/" in name or "*" in name or name.count(":") == 1:
            raise ConfigError(f"--allow_host {name} is no name of a host; write one like proxy.example.org, without a "
                              "port.")
    for origin in arguments.allow_origin:
        if "*" in origin or not origin.startswith(("http://", "https://")) or origin.rstrip("/") != origin:
            raise ConfigError(f"--allow_origin {origin} is no origin; write one like https://example.org, without a "
                              "path.")
    for host in arguments.fetch_images:
        if "/" in host or "*" in host:
            raise ConfigError(f"--fetch_images {host} is no host; write a name like images.example.org, or name:port.")
    if JOB not in os.environ:       # of a launch's ranks the launcher has looked
        listen(arguments.host, arguments.port).close()
