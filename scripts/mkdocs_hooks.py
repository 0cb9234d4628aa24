"""What mkdocs.yml needs beside docs/: README (both), CONTRIBUTING, CHANGELOG and the notebooks as pages, and links.

The documents are written for a repository that is read as files, so their links are paths; here those that lead to a
page or a picture become links to it, and those that lead to other files of the repository become their names.
"""
from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "README_zh.md": "index_zh.md", "CONTRIBUTING.md": "contributing.md",
         "CHANGELOG.md": "changelog.md"}
NOTEBOOKS = {f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}
SOURCES = {page: source for source, page in {**PAGES, **NOTEBOOKS}.items()}

_LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config) -> Files:
    """Adds the pages that lie beside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for source, page in NOTEBOOKS.items():
        pictures = f"{Path(page).stem}_files"
        text, found = MarkdownExporter().from_filename(str(ROOT / source), {"output_files_dir": pictures})
        text = text.replace("![png](", "![output](") + f"\n---\n\n`{source}` of the repository, as it was last run.\n"
        files.append(File.generated(config, page, content=text))
        for name, content in found["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Turns paths of the repository into links of the site."""
    place = page.file.src_uri
    folder = (ROOT / SOURCES.get(place, f"docs/{place}")).parent

    def site_link(found: re.Match) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        path = Path(os.path.normpath(folder / target))
        inside = path.relative_to(ROOT).as_posix()
        page_of = {**PAGES, **NOTEBOOKS}.get(inside)
        if page_of is None and inside.startswith("docs/") and path.exists():
            page_of = inside.removeprefix("docs/")
        if page_of is not None:
            return f"[{text}]({os.path.relpath(page_of, Path(place).parent)}{anchor})"
        return f"{text} (`{inside}`)" if path.exists() else found[0]      # strict: what is missing stays a bad link

    return _LINK.sub(site_link, markdown)
