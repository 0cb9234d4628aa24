"""What mkdocs.yml needs beside docs/: README (both), CONTRIBUTING and CHANGELOG as pages, links to and from them.

The documents are written for a repository that is read as files, so their links are paths; here those that lead to a
page become links to it, and those that lead to other files of the repository become their names.
"""
from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "README_zh.md": "index_zh.md", "CONTRIBUTING.md": "contributing.md",
         "CHANGELOG.md": "changelog.md"}

_LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config) -> Files:
    """Adds the pages that lie beside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Turns paths of the repository into links of the site."""
    from_root = page.file.src_uri in PAGES.values()
    folder = ROOT if from_root else (ROOT / "docs" / page.file.src_uri).parent

    def site_link(found: re.Match) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        path = Path(os.path.normpath(folder / target))
        inside = path.relative_to(ROOT).as_posix()
        if inside in PAGES:
            return f"[{text}]({PAGES[inside]}{anchor})"
        if ROOT / "docs" in path.parents:         # a page, or a picture
            return f"[{text}]({path.relative_to(ROOT / 'docs').as_posix()}{anchor})"
        return f"{text} (`{inside}`)" if path.exists() else found[0]      # strict: what is missing stays a bad link

    return _LINK.sub(site_link, markdown)
