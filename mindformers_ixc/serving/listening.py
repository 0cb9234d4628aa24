"""The socket of a server."""
from __future__ import annotations

import errno
import socket

from mindformers_ixc.errors import ConfigError

# Connections that the system keeps until they are taken.
BACKLOG = 128


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: when the port is taken, or the address is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small pieces at once where the protocol is said
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"Port {port} of {host} is taken, by another server perhaps; run with "
                              f"--port {_free_port(family, host)}, which is free.") from error
        reason = error.strerror or error
        raise ConfigError(f"--host {host} --port {port} cannot be listened on ({reason}); 127.0.0.1 is this machine "
                          "alone, 0.0.0.0 every network it is in.") from error
    except OverflowError as error:
        found.close()
        raise ConfigError(f"--port is {port}; ports are numbered 0 to 65535 (0: a free one).") from error
    return found


def _free_port(family: int, host: str) -> int:
    with socket.socket(family, socket.SOCK_STREAM) as other:
        other.bind((host, 0))
        return int(other.getsockname()[1])
