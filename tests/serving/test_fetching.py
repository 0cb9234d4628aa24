"""Pictures at addresses: from hosts that are named, from addresses that were looked at, and nothing else."""
from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mindformers_ixc.serving import fetching
from mindformers_ixc.serving.fetching import fetch, is_public
from mindformers_ixc.serving.wire import RequestError


class Handler(BaseHTTPRequestHandler):
    """Sends what the path says."""

    def do_GET(self):
        kind, _, rest = self.path[1:].partition("/")
        self.server.asked.append((self.path, self.headers["Host"]))
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", rest if "://" in rest else f"/{rest}")
            self.end_headers()
            return
        self.send_response(404 if kind == "missing" else 200)
        self.end_headers()
        self.wfile.write(b"x" * int(rest) if kind == "bytes" else b"picture")

    def log_message(self, *_):
        pass


@pytest.fixture
def host(monkeypatch):
    """A host that counts as public under the name `pictures.example`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port, real = server.server_port, socket.getaddrinfo

    def found(name, number, *rest, **more):
        return real("127.0.0.1" if name.endswith(".example") else name, number, *rest, **more)

    for name in ("SILENCE", "WHOLE"):
        monkeypatch.setattr(fetching, name, 120.0)
    monkeypatch.setattr(fetching.socket, "getaddrinfo", found)
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    server.address = f"http://pictures.example:{port}"
    server.hosts = [f"pictures.example:{port}"]
    yield server
    server.shutdown()
    server.server_close()


def test_a_picture_of_a_host_that_is_allowed(host):
    assert fetch(f"{host.address}/cat.png?size=2", host.hosts, 100, "url") == b"picture"
    assert host.asked == [("/cat.png?size=2", f"pictures.example:{host.server_port}")]


def test_redirects_within_it_are_followed_a_few_times(host):
    assert fetch(f"{host.address}/to/to/cat.png", host.hosts, 100, "url") == b"picture"
    with pytest.raises(RequestError, match="more than 3 times"):
        fetch(f"{host.address}/{'to/' * 5}cat.png", host.hosts, 100, "url")


@pytest.mark.parametrize("target", ["http://other.example/x", "http://127.0.0.1:1/x", "file:///etc/passwd",
                                    "ftp://pictures.example/x"])
def test_redirects_elsewhere_are_not(host, target):
    with pytest.raises(RequestError) as error:
        fetch(f"{host.address}/to/{target}", host.hosts, 100, "url")
    assert error.value.param == "url" and len(host.asked) == 1


def test_too_large_missing_and_gone(host):
    with pytest.raises(RequestError, match="more than 100 bytes") as error:
        fetch(f"{host.address}/bytes/101", host.hosts, 100, "url")
    assert error.value.status == 413
    with pytest.raises(RequestError, match="status 404"):
        fetch(f"{host.address}/missing/x", host.hosts, 100, "url")
    with pytest.raises(RequestError, match="cannot be fetched"):
        fetch("http://pictures.example:1/x", ["pictures.example:1"], 100, "url")


def test_one_that_takes_too_long(host, monkeypatch):
    monkeypatch.setattr(fetching, "WHOLE", -1.0)
    with pytest.raises(RequestError, match="was not there within"):
        fetch(f"{host.address}/cat.png", host.hosts, 100, "url")


@pytest.mark.parametrize(("address", "wanted"), [
    ("93.184.216.34", True), ("2606:2800:220:1::", True), ("127.0.0.1", False), ("10.0.0.1", False),
    ("172.16.5.4", False), ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
    ("0.0.0.0", False), ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False), ("::", False),
    ("fe80::1%eth0", False), ("fc00::1", False), ("::ffff:127.0.0.1", False), ("::ffff:93.184.216.34", True),
    ("2002:7f00:1::", False), ("64:ff9b::7f00:1", False),
    ("64:ff9b::5db8:d822", True), ("::127.0.0.1", False), ("::93.184.216.34", False), ("fec0::1", False),
    ("4000::1", False)])
def test_public_addresses(address, wanted):
    assert is_public(address) is wanted
