"""Pictures at http(s) addresses, for a server that was told from which hosts.

A name that is allowed may lead anywhere, so what it resolves to is looked at, and the connection goes to the very
address that was looked at: private ones, this machine and its neighbours are never asked.
"""
from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Sequence
from urllib.parse import SplitResult, urljoin, urlsplit

from mindformers_ixc.serving.wire import RequestError
from mindformers_ixc.version import __version__

# Seconds that a host may be silent, and that a picture may take in all; times it may send elsewhere.
SILENCE, WHOLE, REDIRECTS = 10.0, 30.0, 3

CHUNK = 1 << 16

# Addresses of IPv4 as networks of IPv6 alone write them.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's, reachable for everybody."""
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    if found in _NAT64:
        mapped = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
    if mapped is not None:
        return is_public(str(mapped))
    # ::/8 has IPv4's addresses in an old form, fec0::/10 networks of one place; both count as global
    return found.is_global and not (found.is_multicast or found.is_reserved or getattr(found, "is_site_local", False))


def fetch(url: str, hosts: Sequence[str], largest: int, param: str) -> bytes:
    """What lies at an address.

    Args:
        url: http or https.
        hosts: allowed, `name` or `name:port`.
        largest: bytes at most.
        param: the field it stands in, for messages.

    Raises:
        RequestError: when it may not be or cannot be fetched.
    """
    deadline = time.monotonic() + WHOLE
    for _ in range(REDIRECTS + 1):
        target = _checked(url, hosts, param)
        content, location = _ask(target, largest, deadline, param)
        if location is None:
            return content
        url = urljoin(url, location)
    raise RequestError(f"{param}: the host sent from one address to the next more than {REDIRECTS} times; name the "
                       "picture itself.", param)


def _checked(url: str, hosts: Sequence[str], param: str) -> SplitResult:
    """The parts of an address that may be asked."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RequestError(f"{param} is no address that can be read.", param) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestError(f"{param} must be an http or https address.", param)
    if parts.username is not None or parts.password is not None:
        raise RequestError(f"{param} has a name or password in front of the host; pictures are fetched without.", param)
    if any(not " " < letter < "\x7f" for letter in url):
        raise RequestError(f"{param} has a space, a control character or a letter beyond ASCII; write it in percent "
                           "form.", param)
    usual = {"http": 80, "https": 443}[parts.scheme]
    names = {f"{parts.hostname}:{port or usual}"} | ({parts.hostname} if port in (None, usual) else set())
    if names.isdisjoint(host.lower() for host in hosts):
        raise RequestError(f"{param}: pictures of the host {parts.hostname[:80]} are not fetched; the server was told "
                           "which are (--fetch_images). Send the picture as a data URL.", param, 403)
    return parts


def _address(parts: SplitResult, param: str) -> tuple[str, int]:
    """Where to connect to."""
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise RequestError(f"{param}: the host {parts.hostname} is not known.", param) from error
    addresses = [str(one[4][0]) for one in found]
    if not addresses or not all(map(is_public, addresses)):
        raise RequestError(f"{param}: the host {parts.hostname} leads to an address that is not public, which is not "
                           "asked.", param, 403)
    return addresses[0], port


def _ask(parts: SplitResult, largest: int, deadline: float, param: str) -> tuple[bytes, str | None]:
    """The content at an address, or where it is to be asked for."""
    host, port = _address(parts, param)
    try:
        plain = socket.create_connection((host, port), timeout=SILENCE)
        with plain:
            assert parts.hostname is not None
            wire = plain if parts.scheme == "http" else \
                ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname)
            with wire:
                connection = http.client.HTTPConnection(parts.hostname, port)
                connection.sock = wire
                path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", path, headers={"User-Agent": f"mindformers_ixc/{__version__}",
                                                         "Accept": "image/*, video/*"})
                answer = connection.getresponse()
                if answer.status in (301, 302, 303, 307, 308):
                    return b"", answer.getheader("Location") or ""
                if answer.status != 200:
                    raise RequestError(f"{param}: the host answered with status {answer.status}.", param)
                return _content(answer, largest, deadline, param), None
    except (OSError, http.client.HTTPException) as error:
        raise RequestError(f"{param}: the picture cannot be fetched ({type(error).__name__}).", param) from error


def _content(answer: http.client.HTTPResponse, largest: int, deadline: float, param: str) -> bytes:
    content = bytearray()
    while piece := answer.read1(CHUNK):
        content += piece
        if len(content) > largest:
            raise RequestError(f"{param}: what lies there has more than {largest} bytes, the most that is taken.",
                               param, 413)
        if time.monotonic() > deadline:
            raise RequestError(f"{param}: the picture was not there within {WHOLE:g} s.", param)
    return bytes(content)
