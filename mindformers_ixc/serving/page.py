"""The page to chat at `/`: one HTML document that needs nothing else and reaches nothing but its own server."""
from __future__ import annotations

import functools
import re
import secrets
from pathlib import Path

from mindformers_ixc import pages
from mindformers_ixc.pages.page import MARK

FILES = Path(__file__).parent / "page_files"

# The program's parts, in the order in which they need each other.
SCRIPTS = ("texts", "store", "wire", "options", "markdown", "frame", "files", "conversation", "view", "main")

# What the page may do; the frame with a page that the model wrote inherits it. The page's own program has a nonce, and
# so have scripts in the frame once they are allowed; styles need none, for a page that is written has them in its
# elements. Pictures are data or files that were chosen, requests go to this server alone, and the frame holds what is
# given to it and can be led nowhere else.
POLICY = ("default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data: blob:; "
          "media-src data: blob:; font-src data:; connect-src 'self'; frame-src 'none'; form-action 'none'; "
          "base-uri 'none'")


def page() -> str:
    """The page, with a nonce of its own."""
    return _page().replace("{nonce}", secrets.token_urlsafe(18))


@functools.lru_cache(maxsize=1)
def _page() -> str:
    """The page with a place for its nonce."""
    parts = {"style": _colours() + _read("style.css"), "strings": strings(), "mark": MARK, "policy": POLICY,
             "script": '"use strict";\n{\n' + "".join(_read(f"{name}.js") for name in SCRIPTS) + "}\n"}
    return re.sub(r"\{(\w+)\}", lambda found: parts.get(found[1], found[0]), _read("page.html"))


def strings() -> str:
    """The table of strings as JSON that cannot end the element it stands in."""
    return _read("strings.json").replace("<", "\\u003c")


def _read(name: str) -> str:
    return (FILES / name).read_text(encoding="utf-8")


def _colours() -> str:
    """The colours of all pages, light or dark as the system is, or as the reader chooses."""
    style = (Path(pages.__file__).parent / "style.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    return (f":root {{{light}}}\n:root[data-theme=light] {{ color-scheme: light; }}\n"
            f"@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{{dark}}} }}\n"
            f":root[data-theme=dark] {{ color-scheme: dark; {dark}}}\n")
