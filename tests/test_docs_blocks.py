"""Every fenced block of the documentation runs, or is marked with the reason why it does not (`helpers/blocks`)."""
from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from blocks import ROOT, commands, lacks, logical_lines, printed, problems_of, read_blocks, repository_problems
from story import Story, bash
from yaml import YAMLError

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md",
         *(page for page in sorted((ROOT / "docs").glob("*.md")) if not page.stem.endswith("_zh"))]
# Their blocks are those of the English pages (tests/test_docs.py) but for comments, so they carry no marks.
CHINESE = [ROOT / "README_zh.md", *sorted((ROOT / "docs").glob("*_zh.md"))]
BLOCKS = {page: read_blocks(page)[0] for page in PAGES}
# Examples of the commands' own help, which tests/test_docs.py parses.
TOLD = [block for page in PAGES if page.name != "commands.md" for block in BLOCKS[page]]


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """The folder of each page's story, made when it is asked for."""
    made: dict[Path, Story] = {}

    def story(page: Path) -> Story:
        if page not in made:
            made[page] = Story(tmp_path_factory.mktemp(page.stem), page.name)
        return made[page]

    return story


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_marks_are_right_and_nothing_lacks_one(page):
    blocks, problems = read_blocks(page)
    assert problems + [problem for block in blocks for problem in problems_of(block)] == []


@pytest.mark.parametrize("block", [
    pytest.param(block, id=f"{block.page.name}-{block.line}", marks=[pytest.mark.slow] if block.kind == "slow" else [])
    for block in TOLD])
def test_a_block_runs_where_its_page_has_come_to(block, stories, monkeypatch):
    story = stories(block.page)
    monkeypatch.chdir(story.folder)
    story.through(block, BLOCKS[block.page][:BLOCKS[block.page].index(block)])


@pytest.mark.slow
def test_the_first_passing_test_ends_as_contributing_says():
    command, shown = BLOCKS[ROOT / "CONTRIBUTING.md"][:2]
    done = bash(f"cd {ROOT} && {logical_lines(command.text)[-1]} -p no:cacheprovider")
    words = [re.sub(r"^=+ | in [\d.]+s( \([\d:]+\))? =+$", "", text.splitlines()[-1])
             for text in (done.stdout, shown.text)]
    assert words[0] == words[1]


def _page(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


@pytest.mark.parametrize(("text", "problem"), [
    ("<!-- not run: a test -->\n\nText\n\n```bash\nls\n```\n", "no block follows the mark 'not run: a test'"),
    ("<!-- slow -->\n\n\n```bash\nls\n```\n", "no block follows the mark 'slow'"),
    ("<!-- slow -->\nText.\n", "no block follows the mark 'slow'"),
    ("```bash\nls\n```\n<!-- slow -->\n", "no block follows"),
    ("```bash\nls\n", "the block does not end"),
    ("<!-- not run -->\n```bash\nls\n```\n", "the mark 'not run' says nothing"),
    ("<!-- not run: -->\n```bash\nls\n```\n", "the mark 'not run' says nothing"),
    ("<!-- slow: minutes -->\n```bash\nls\n```\n", "the mark 'slow' takes no text"),
    ("<!-- not ran: never -->\n```bash\nls\n```\n", "'not ran: never' is no mark"),
    ("```text\nfour\n```\n", "a block of text needs a mark"),
    ("```\nfour\n```\n", "a block of no language needs a mark"),
    ("<!-- slow -->\n```text\nfour\n```\n", "a block of text does not run"),
    ("<!-- merged into: base_tiny -->\n```bash\nls\n```\n", "only YAML is merged"),
    ("<!-- names files of: gone -->\n```text\na/b\n```\n", "gone is no folder"),
    ("<!-- run by: tests/gone.py::test_it -->\n```bash\nls\n```\n", "tests/gone.py does not exist"),
    ("<!-- run by: tests/test_docs.py::test_gone -->\n```bash\nls\n```\n", "tests/test_docs.py has no test_gone"),
    ("<!-- run by: tests/test_docs.py::test_every_example_on_the_page_is_parsed, ::test_gone -->\n```bash\nls\n```\n",
     "tests/test_docs.py has no test_gone"),
    ("<!-- run by: tests/test_docs.py -->\n```bash\nls\n```\n", "name the test in it"),
    ("<!-- run by: scripts/test.sh -->\n```bash\nmypy --strict\n```\n", "scripts/test.sh has no line 'mypy --strict'"),
])
def test_a_mark_that_is_wrong_or_stale_is_told(tmp_path, text, problem):
    blocks, problems = read_blocks(_page(tmp_path, text))
    found = problems + [more for block in blocks for more in problems_of(block)]
    assert len(found) == 1 and problem in found[0]


def test_blocks_are_read_with_indentation_marks_and_generated_ones(tmp_path):
    blocks, problems = read_blocks(_page(tmp_path, """Text

```bash
ls \\
  --all     # everything
```

1. A list:

    <!-- not run: no list -->

    ```text
    one
      two
    ```

<!-- table: begin -->
```text
computed
```
<!-- table: end -->

````yaml
a: "```"
````
"""))
    assert problems == [] and not [problem for block in blocks for problem in problems_of(block)]
    assert [(block.line, block.language, block.kind, block.about, block.generated) for block in blocks] == [
        (3, "bash", "", "", False), (12, "text", "not run", "no list", False), (18, "text", "", "", True),
        (23, "yaml", "", "", False)]
    assert blocks[1].text == "one\n  two\n" and blocks[3].text == 'a: "```"\n'
    assert logical_lines(blocks[0].text) == ["ls --all"]


def test_commands_of_a_block_are_found():
    text = ("mindformers chat --model m 'What # is it?'     # prints a cat\nmindformers launch -n 8 ...\n"
            "msrun --join True \\\n  mindformers run --config a.yaml\npython - <<'END'\nmindformers = 1  # none\nEND\n")
    assert commands(text) == [(["chat", "--model", "m", "What # is it?"], True), (["launch", "-n", "8"], False),
                              (["run", "--config", "a.yaml"], False)]
    assert printed(text) == ["a cat"]
    assert lacks(["a", "c"], "a b c") is None and lacks(["c", "a"], "a b c") == "a"


def test_scripts_and_their_options_must_be_there():
    assert repository_problems("python scripts/parity.py tests/data/goldens --mode pynative\nscripts/test.sh\n") == []
    assert repository_problems("python scripts/parity.py --modes x\npython scripts/gone.py --mode x\n") == [
        "scripts/parity.py has no option --modes", "scripts/gone.py does not exist"]


@pytest.fixture(scope="module")
def folder(stories):
    return stories(Path("other.md"))


@pytest.mark.parametrize(("mark", "block", "message"), [
    ("", "bash\nls\nls gone | cat", "ends with code 2"),
    ("", "bash\necho Lima     # prints Peru", "'Peru' is not printed"),
    ("", "python\nprint('Lima')     # prints Peru", "'Peru' is not printed"),
    ("", "yaml\ntrain_part: [vision]", "train_part"),
    ("", "yaml\nevaluation: {dataset_dir: gone.json}", "gone.json"),
    ("not run: a test", "bash\nmindformers chat --modell m", "is not parsed"),
    ("not run: a test", "bash\nmindformers run --config ixc25_sft_tiny --runner_config.epoch 3", "epoch"),
    ("not run: a test", "bash\nmindformers chat --model out/model --image gone.png 'What?'", "gone.png does not exist"),
    ("not run: a test", "bash\nmindformers plan --config ixc25_sft --devices 8 --model_parallel 3", "3"),
    ("not run: a test", "python\nprint(", "never closed|EOF"),
    ("not run: a test", "yaml\na: [1", "expected ',' or ']'"),
    ("file: a.json", 'json\n[{"image": "gone.png", "query": "What?", "response": "a cat"}]', "gone.png"),
    ("names files of: mindformers_ixc", "text\ncli/run, cli/gone", "has no cli/gone"),
    ("output", "text\nnothing of the kind", "does not print 'nothing of the kind'"),
])
def test_a_block_that_is_wrong_fails(folder, tmp_path, monkeypatch, mark, block, message):
    text = (f"<!-- {mark} -->\n" if mark else "") + f"```{block}\n```\n"
    [found], problems = read_blocks(_page(tmp_path, text))
    monkeypatch.chdir(folder.folder)
    assert problems + problems_of(found) == []
    with pytest.raises((AssertionError, ValueError, OSError, SyntaxError, YAMLError), match=message):
        folder.through(found, [])


def test_output_is_that_of_the_block_before(folder, tmp_path, monkeypatch):
    text = ("```bash\nseq 5; echo 'loss 0.3, rate 1' >&2\n```\n"
            "<!-- output -->\n```text\n1\n...\n5\nloss ..., rate 1\n```\n")
    monkeypatch.chdir(folder.folder)
    blocks, _ = read_blocks(_page(tmp_path, text))
    folder.through(blocks[1], blocks[:1])


def test_a_quick_block_does_not_wait_for_a_slow_one(folder, tmp_path, monkeypatch):
    text = "<!-- slow -->\n```bash\ntouch slow\n```\n```bash\ntouch quick\n```\n"
    monkeypatch.chdir(folder.folder)
    blocks, _ = read_blocks(_page(tmp_path, text))
    folder.through(blocks[1], blocks[:1])
    assert (folder.folder / "quick").exists() and not (folder.folder / "slow").exists()
    folder.through(blocks[0], [])
    assert (folder.folder / "slow").exists()


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
def test_a_chinese_page_has_the_blocks_of_the_english_one_and_no_marks(page):
    ours, problems = read_blocks(page)
    english = BLOCKS[page.with_name(page.name.replace("_zh", ""))]
    assert problems == [] and not [block.where for block in ours if block.kind]
    assert [block.language for block in ours] == [block.language for block in english]


def test_most_blocks_run():
    kinds = Counter(block.kind for block in TOLD if block.language in ("bash", "python", "yaml"))
    assert kinds[""] + kinds["slow"] + kinds["merged into"] > 20
