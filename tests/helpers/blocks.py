"""Fenced blocks of the documentation: where they stand, how they are marked, and what running one means.

A page is a story: its blocks run one after the other in one folder. What a block is without a mark says its language:

    bash      run by bash; what `# prints TEXT` behind a line says must be in its output
    python    executed
    yaml      merged into a recipe (the one it names as base_config, else ixc25_sft_tiny) and checked as `run` does

A mark is an HTML comment in the line before the block, at the fence's indentation; in a list an empty line is between
them, or the site gets an empty paragraph. The rendered page does not show it:

    <!-- slow -->                         runs with the slow tests; so does what needs what it leaves
    <!-- merged into: RECIPE -->          of yaml: another recipe
    <!-- file: NAME -->                   written to the folder of the page, and read by the package if it is data
    <!-- output -->                       the block before prints these lines; `...` stands for anything
    <!-- names files of: FOLDER -->       every a/b in it is a module or folder of FOLDER
    <!-- run by: tests/FILE.py::TEST -->  a test does the same; or a script that has the block's lines
    <!-- not run: REASON -->              commands are parsed and their input is looked at all the same
"""
from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Marks, and whether a text follows.
MARKS = {"slow": False, "merged into": True, "file": True, "output": False, "names files of": True, "run by": True,
         "not run": True}

# Languages whose blocks are run when nothing is said; those of a shell, whose commands are looked at in any case.
RUN = ("bash", "python", "yaml")
SHELLS = ("bash", "console", "sh", "shell")

_COMMENT = re.compile(r" *<!-- *(.*?) *-->")
_FENCE = re.compile(r"( *)(`{3,}|~{3,})(.*)")
_SHELL_COMMENT = re.compile(r"""("[^"]*"|'[^']*')|(?:^|\s+)#\s.*""")
_OPTION = re.compile(r"--[a-z]\w*")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: file it stands in.
        line: of its opening fence, from 1.
        language: behind the fence.
        text: between the fences, without their indentation.
        kind: of its mark, empty without one.
        about: text of its mark.
        generated: whether it stands between the markers of scripts/write_docs.py.
    """

    page: Path
    line: int
    language: str
    text: str
    kind: str = ""
    about: str = ""
    generated: bool = False

    @property
    def where(self) -> str:
        """Page and line, as an editor takes them."""
        path = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page
        return f"{path}:{self.line}"


def read_blocks(page: Path) -> tuple[list[Block], list[str]]:
    """The blocks of a page, and what is wrong with its marks."""
    blocks, problems, generated = [], [], False
    mark, lines = None, page.read_text(encoding="utf-8").splitlines()
    places = iter(range(len(lines)))
    for place in places:
        fence, comment = _FENCE.fullmatch(lines[place]), _COMMENT.fullmatch(lines[place])
        if mark is not None and not lines[place].strip() and lines[place - 1].strip():
            continue
        if mark is not None and not fence:
            problems.append(f"{page.name}:{place}: no block follows the mark '{': '.join(filter(None, mark))}'")
        if fence:
            indent, ticks, language = fence.groups()
            start, text = place + 1, []
            for place in places:
                if lines[place].strip() == ticks:
                    break
                text.append(lines[place][len(indent):])
            else:
                problems.append(f"{page.name}:{start}: the block does not end")
            blocks.append(Block(page, start, language.strip(), "\n".join(text) + "\n", *(mark or ("", "")), generated))
            mark = None
            continue
        mark = None
        if comment and re.search(r": (begin|end)$", comment[1]):
            generated = comment[1].endswith("begin")
        elif comment:
            kind, _, about = (part.strip() for part in comment[1].partition(":"))
            mark = (kind, about)
            if kind not in MARKS:
                problems.append(f"{page.name}:{place + 1}: '{comment[1]}' is no mark; there are {', '.join(MARKS)}")
            elif MARKS[kind] != bool(about):
                problems.append(f"{page.name}:{place + 1}: the mark '{kind}' " +
                                ("says nothing" if MARKS[kind] else "takes no text"))
    if mark is not None:
        problems.append(f"{page.name}: no block follows its last mark")
    return blocks, problems


def problems_of(block: Block) -> list[str]:
    """What is wrong with a block's mark, or that it needs one."""
    found = []
    if not block.kind and not block.generated and block.language not in RUN:
        found.append(f"a block of {block.language or 'no language'} needs a mark")
    if block.kind == "merged into" and block.language != "yaml":
        found.append(f"only YAML is merged into a recipe, and this is {block.language}")
    if block.kind == "slow" and block.language not in RUN:
        found.append(f"a block of {block.language} does not run, so it is not slow")
    if block.kind == "names files of" and not (ROOT / block.about).is_dir():
        found.append(f"{block.about} is no folder")
    if block.kind == "run by":
        path = ""
        for name in block.about.split(", "):
            path = name.partition("::")[0] or path      # `::TEST` is of the file that was named before
            found += _missing(path, name.split("::")[1:], block)
    return [f"{block.where}: {problem}" for problem in found]


def _missing(path: str, inside: list[str], block: Block) -> list[str]:
    """Why what is named does not run a block: a test that is not there, a script without its lines."""
    if not (ROOT / path).is_file():
        return [f"{path} does not exist"]
    source = (ROOT / path).read_text(encoding="utf-8")
    if inside:
        return [f"{path} has no {part}" for part in inside
                if not re.search(rf"^\s*(?:def|class) {re.escape(part)}\b", source, re.MULTILINE)]
    if path.startswith("tests/"):
        return [f"{path}: name the test in it (::test)"]
    return [f"{path} has no line '{line}'" for line in logical_lines(block.text)
            if not re.search(rf"^{re.escape(line)}", source, re.MULTILINE)]


def logical_lines(text: str) -> list[str]:
    """Lines of a shell block, joined where they go on, without comments; a here-document is left whole."""
    joined = re.sub(r"\s*\\\n\s*", " ", re.sub(r"<<'?(\w+)'?\n.*?\n\1\n", "\n", text, flags=re.DOTALL))
    lines = (_SHELL_COMMENT.sub(lambda found: found[1] or "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]


def commands(text: str) -> list[tuple[list[str], bool]]:
    """Every `mindformers` command of a shell block, behind another program such as msrun too.

    Returns:
        Of each the words behind the program's name, without `...`; whether that is all there is to the command.
    """
    found = []
    for line in logical_lines(text):
        words = shlex.split(line)
        if "mindformers" in words:
            own = words[words.index("mindformers") + 1:]
            found.append(([word for word in own if word != "..."], words[0] == "mindformers" and "..." not in words))
    return found


def printed(text: str) -> list[str]:
    """What the comments of a shell block say that it prints."""
    return [said.strip() for said in re.findall(r"\s# prints (.*)$", text, re.MULTILINE)]


def lacks(expected: list[str], output: str) -> str | None:
    """The first of some texts that is not in an output, at or behind the place of those before it."""
    start = 0
    for text in expected:
        start = output.find(text, start)
        if start < 0:
            return text
        start += len(text)
    return None


def repository_problems(text: str) -> list[str]:
    """Scripts of this repository that a shell block names and that are not there, and options they do not have."""
    problems = []
    for line in logical_lines(text):
        words = shlex.split(line)
        scripts = [word for word in words if re.match(r"(scripts|benchmarks|peers|tests)/.*\.(py|sh)$", word)]
        problems += [f"{word} does not exist" for word in scripts if not (ROOT / word).is_file()]
        if words[0] == "python" and scripts and (ROOT / scripts[0]).is_file():
            source = (ROOT / scripts[0]).read_text(encoding="utf-8")
            problems += [f"{scripts[0]} has no option {word}" for word in words
                         if _OPTION.fullmatch(word) and f'"{word}"' not in source]
    return problems
