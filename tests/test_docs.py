"""What the documentation names is there."""
from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
UPSTREAM = [row for row in ARCHITECTURE.partition("## What this package changes")[2].splitlines()
            if row.startswith("| ") and not row.startswith("| What")]


def test_the_table_of_upstream_changes_is_found():
    assert len(UPSTREAM) > 30


@pytest.mark.parametrize("row", UPSTREAM, ids=lambda row: row.split("|")[2].strip())
def test_a_row_of_the_upstream_table_names_files_and_tests_that_are_there(row):
    *_, files, _, tests, _ = re.split(r" ?\| ?", row)
    packages = re.findall(r"`([\w/]+\.(?:py|cc))`", files)
    assert packages
    folder = None
    for path in packages:
        places = [ROOT / "mindformers_ixc" / path, ROOT / path, *([folder / path] if folder else [])]
        found = [place for place in places if place.is_file()]
        assert found, path
        folder = found[0].parent
    named, file = re.findall(r"`([\w/.]*)::([\w:]+)`", tests), ""
    assert named
    for path, test in named:
        file = path or file
        text = (ROOT / file).read_text(encoding="utf-8")
        assert all(re.search(rf"^\s*(?:def|class) {name}\b", text, re.MULTILINE) for name in test.split("::")), test


def test_links_between_documents_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        for target in re.findall(r"\]\((?!https?://)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
