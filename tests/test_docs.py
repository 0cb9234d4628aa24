"""What the documentation names is there."""
from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import mindformers_ixc
import mindformers_ixc_cli
from mindformers_ixc.scores import each_score

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BESIDE = [ROOT / "README.md", ROOT / "README_zh.md", ROOT / "CONTRIBUTING.md"]
CHINESE = [ROOT / "README_zh.md", *(page for page in PAGES if page.stem.endswith("_zh"))]
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
    for page in [*BESIDE, *PAGES]:
        for target in re.findall(r"\]\((?!https?://)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def _load(name: str):
    if str(ROOT / "scripts") not in sys.path:      # scripts import each other by name
        sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module(name)


def test_generated_blocks_are_those_of_the_code():
    found = list(_load("write_docs").pages())
    assert {page.name for page, _ in found} >= {"commands.md", "install.md", "sizes.md", "troubleshooting.md",
                                                "weights.md", "yaml.md"}
    for page, text in found:
        assert page.read_text(encoding="utf-8") == text, f"{page.name} is stale; run: python scripts/write_docs.py"


def test_sentences_of_the_package_are_found_in_every_topic():
    write_docs = _load("write_docs")
    texts = [sentence.text for sentence in write_docs.collect(ROOT)]
    assert len(texts) == len(set(texts)) > 450
    sections = write_docs.messages_text().split("## ")[1:]
    assert [section.partition("\n")[0] for section in sections] == list(write_docs.TOPICS)
    assert all(section.count("\n- `") > 5 for section in sections)


@pytest.mark.parametrize("topic, sentence", [
    ("Data and pictures", "NAME is empty; its first line must name the columns image, question, answer."),
    ("YAML and options", "SOURCE: the section model.model_config is missing."),
    ("Checkpoints and weights", "PATH is truncated: NAME should end at byte"),
    # made by a function of another module
    ("Checkpoints and weights", "PATH does not match its configuration: NUMBER parameters are missing"),
    ("Layouts and parallel runs", "Tensor parallel DEGREE does not divide this model"),
    ("Device and installation", "MindFormers is not installed; install this package with pip, which brings it."),
    ("Training and resuming", "is in use by another run"),
    # put together before the error is made
    ("Training and resuming", "Step STEP: the checkpoint could not be written to FOLDER"),
    ("Other", "The prompt has POSITIONS positions; this model takes LONGEST of prompt and answer together."),
])
def test_a_known_sentence_is_on_the_page_of_messages(topic, sentence):
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert sentence in text.partition(f"\n## {topic}\n")[2].partition("\n## ")[0]


def test_values_of_a_sentence_are_shown_by_name(tmp_path):
    (tmp_path / "mindformers_ixc").mkdir()
    (tmp_path / "mindformers_ixc_cli.py").write_text("", encoding="utf-8")
    (tmp_path / "mindformers_ixc" / "errors.py").write_text('''"""About errors.

More.
"""
KINDS, _LEAST = ("png", "jpeg"), 3
class OwnError(ValueError): pass
class _Narrow(OwnError): pass
def check(file, found, error=OwnError, prefix=""):
    short = f"{len(found)} of them" if found else "none"
    why = f"{file.path}: the entry {found[0]!r:.9} is bad, {short}."
    if found:
        raise _Narrow(why)
    if prefix:
        raise error(f"{prefix}the file {file.name} is no {', '.join(KINDS)}; at least {_LEAST} are needed")
    if file is None:
        raise ValueError("This one is not the user's to see.")
    if not KINDS:
        raise OSError(f"{file}: {error}")
    raise FileNotFoundError(_sentence(file.parent, type(found).__name__))
def _sentence(folder, kind):
    return f"{folder} is a {kind} and not a folder."
''', encoding="utf-8")
    found = _load("error_sentences").collect(tmp_path)
    assert [sentence.text for sentence in found] == [
        "PATH: the entry FOUND is bad, [NUMBER of them | none].",
        "[PREFIX] the file NAME is no png, jpeg; at least 3 are needed",
        "FOLDER is a KIND and not a folder."]
    assert {(source.path, source.about) for sentence in found for source in sentence.sources} == \
        {("errors.py", "About errors.")}


def test_every_command_and_option_is_on_the_page(capsys):
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    sections = {part.partition("\n")[0]: part for part in text.split("\n## ")[1:]}
    assert set(sections) == set(mindformers_ixc_cli.COMMANDS)
    for command, section in sections.items():
        options = re.findall(r"^\| (?:`-\w[^`]*`, )?`(--\w+)", section, re.MULTILINE)
        assert len(options) == len(set(options)) and f"mindformers {command} " in section
        with pytest.raises(SystemExit):
            mindformers_ixc_cli.parse([command, "--help"])
        helped = re.findall(r"^  (?:-\w.*, )?(--\w+)", capsys.readouterr().out, re.MULTILINE)
        assert set(options) == set(helped) - {"--help"}


def test_every_example_on_the_page_is_parsed():
    lines = re.findall(r"^mindformers .*", (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) > 20
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        if "..." not in words:
            assert mindformers_ixc_cli.parse(words).command == words[0]


def test_the_site_has_every_page_once():
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}
    nav = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(nav) == len(set(nav))
    assert set(nav) == notebooks | {page.name for page in PAGES} | {"index.md", "index_zh.md", "contributing.md",
                                                                    "changelog.md"}


def test_pictures_are_small_and_each_is_on_a_page():
    pictures = sorted((ROOT / "docs" / "images").glob("*.png"))
    assert len(pictures) >= 6 and max(picture.stat().st_size for picture in pictures) <= 150_000
    text = "".join(page.read_text(encoding="utf-8") for page in [*PAGES, *BESIDE])
    assert [picture.name for picture in pictures if f"images/{picture.name})" not in text] == []


def _fenced(text: str) -> list[str]:
    """Lines of a page's fenced blocks, each block's language first, without comments."""
    blocks = re.findall(r"^```(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"(^|\s+)# .*", "", line) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def _links(text: str) -> list[str]:
    """Where a page's links lead, but for those to the same page in the other language."""
    return sorted(re.sub(r"_zh\.md", ".md", target) for name, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text)
                  if name not in ("English", "简体中文"))


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
def test_a_chinese_page_has_the_commands_and_links_of_the_english_one(page):
    english = page.with_name(page.name.replace("_zh", ""))
    ours, theirs = page.read_text(encoding="utf-8"), english.read_text(encoding="utf-8")
    assert len(_fenced(theirs)) > 20
    assert _fenced(ours) == _fenced(theirs)
    assert _links(ours) == _links(theirs)
    assert f"[English]({english.name})" in ours and f"[简体中文]({page.name})" in theirs
    headings = [re.findall(r"^(#+) ", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
                for text in (ours, theirs)]
    assert headings[0] == headings[1]


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*BESIDE, *PAGES], ids=lambda page: page.name)
def test_links_to_headings_lead_to_one(page):
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        other = page.parent / target if target else page
        assert anchor in _anchors(other), f"{page.name}: {target}#{anchor}"


def test_the_map_from_paper_and_public_code_names_what_is_there():
    text = (ROOT / "docs" / "paper_to_code.md").read_text(encoding="utf-8")
    rows = [row.split("|")[-2] for row in text.splitlines() if row.startswith("| ") and "---" not in row]
    checked = 0
    for cell in rows:
        for path, names in re.findall(r"`([\w/]+\.(?:py|yaml))`(?:: ((?:`[\w.()=]+`(?:, )?)+))?", cell):
            file = next((place for place in (ROOT / "mindformers_ixc" / path, ROOT / path) if place.is_file()), None)
            assert file is not None, path
            source = file.read_text(encoding="utf-8")
            for name in re.findall(r"`([\w.]+)", names):
                assert all(re.search(rf"^\s*(?:def|class) {part}\b|^{part}\b.*=", source, re.MULTILINE)
                           for part in name.split(".")), f"{path}: {name}"
                checked += 1
    assert checked > 25


def test_the_scores_that_the_page_on_evaluation_shows_are_those_of_the_code():
    pytest.importorskip("rapidfuzz", reason="needs the extra eval")
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = [re.split(r" \| ", line.strip("| "))
            for line in text.partition("| answer | expected |")[2].partition("\n\n")[0].splitlines()[2:]]
    answers, expected, *shown = zip(*rows)
    names = ["exact_match", "anls", "relaxed_accuracy"]
    exact, anls, relaxed = each_score(answers, expected, names).values()
    folded, = each_score(answers, expected, ["exact_match"], ignore_case=True).values()
    assert len(rows) > 5
    assert [[float(value) for value in column] for column in shown] == \
        [[round(value, 3) for value in column] for column in (exact, folded, anls, relaxed)]


def test_the_flags_of_the_page_on_own_data_are_those_of_the_readme():
    drawing = re.compile(r"^python - <<'END'\n.*?^END$", re.MULTILINE | re.DOTALL)
    found = [drawing.search(page.read_text(encoding="utf-8"))[0] for page in (ROOT / "README.md",
                                                                              ROOT / "docs" / "own_data.md")]
    assert found[0] == found[1]


API = {page.name: re.findall(r"^::: (mindformers_ixc[\w.]*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
       for page in PAGES if page.stem.startswith("api")}


def test_every_public_name_has_one_entry_in_the_api_reference():
    entries = [entry for names in API.values() for entry in names]
    assert len(entries) == len(set(entries)) > 50
    public = {name for name in mindformers_ixc.__all__ if name not in ("ConfigError", "__version__")}
    assert public <= {entry.rpartition(".")[2] for entry in entries if entry.count(".") == 1}
    errors = ast.parse((ROOT / "mindformers_ixc" / "errors.py").read_text(encoding="utf-8"))
    assert all(ast.get_docstring(node) for node in errors.body if isinstance(node, ast.ClassDef))
    # what is registered with MindFormers and has no name of the package itself
    for name in ("IXC25DataLoader", "IXC25TrainOneStepCell", "IXC25PipelineWithLossScaleCell", "MultimodalChatPipeline",
                 "PartialLoRAPetConfig", "TaskLoRAPetConfig", "convert", "merge", "inspect", "convert_weight", "hub"):
        assert any(entry.endswith(f".{name}") for entry in entries), name


def test_entries_of_the_api_reference_have_docstrings():
    for entry in (entry for names in API.values() for entry in names if entry.count(".") > 1):
        parts = entry.split(".")
        place = next(number for number in range(len(parts), 0, -1)
                     if ROOT.joinpath(*parts[:number]).with_suffix(".py").is_file())
        node = ast.parse(ROOT.joinpath(*parts[:place]).with_suffix(".py").read_text(encoding="utf-8"))
        for name in parts[place:]:
            node = next(one for one in node.body if getattr(one, "name", None) == name)
        assert ast.get_docstring(node), entry


def test_the_site_builds_strictly_and_imports_nothing_of_mindspore(tmp_path):
    pytest.importorskip("material", reason="needs the extra docs")
    for name in ("mkdocstrings_handlers.python", "nbconvert"):
        pytest.importorskip(name, reason="needs the extra docs")
    for name in ("mindspore", "mindformers"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')\n", encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
                          cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "contributing" / "index.html").exists()
    page = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    for anchor in ("mindformers_ixc.IXC25ForCausalLM.chat", "mindformers_ixc.IXC25ForCausalLM.generate",
                   "mindformers_ixc.IXC25ForCausalLM.write_article"):
        assert f'id="{anchor}"' in page
    assert "write_artical" in page
    page = (tmp_path / "site" / "notebooks" / "plan_a_cluster" / "index.html").read_text(encoding="utf-8")
    pictures = re.findall(r'<img alt="output" src="([^"]+)"', page)
    assert len(pictures) >= 4
    assert all((tmp_path / "site" / "notebooks" / "plan_a_cluster" / name).is_file() for name in pictures)
    assert 'href="../../scaling/"' in page
    # a picture of a page is one, not its name
    assert 'src="../images/plan.png"' in (tmp_path / "site" / "scaling" / "index.html").read_text(encoding="utf-8")
