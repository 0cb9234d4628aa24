"""The page at `/` as a text: one file, in two languages, that may do little."""
from __future__ import annotations

import json
import re

import pytest
from served import served

from mindformers_ixc.serving.page import FILES, SCRIPTS, page

MADE = page()
HTML = (FILES / "page.html").read_text(encoding="utf-8")
CODE = {path.stem: path.read_text(encoding="utf-8") for path in FILES.glob("*.js")}
PROGRAM = "".join(CODE.values())
STRINGS = json.loads((FILES / "strings.json").read_text(encoding="utf-8"))


def test_every_part_of_the_program_is_in_the_page():
    assert set(CODE) == set(SCRIPTS)
    assert all(text in MADE for text in CODE.values())
    assert not re.search(r"\{(mark|policy|style|strings|script|nonce)\}", MADE)


def test_the_page_names_nothing_outside_itself():
    spaces = {"http://www.w3.org/2000/svg"}         # a name, which nothing is fetched from
    assert set(re.findall(r"https?://[\w./-]+", MADE)) == spaces
    assert not re.search(r"""\b(src|href)=["'](?!#|data:)""", MADE)
    assert not re.search(r"@import|url\(|\bimport\s*[({\"']", MADE)


def policy(text: str) -> dict[str, list[str]]:
    found, = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    return {name: values for name, *values in map(str.split, found.split(";"))}


def test_its_policy_allows_its_own_program_and_its_own_server():
    rules = policy(MADE)
    nonce, = re.findall(r'<script nonce="([\w-]+)">', MADE)
    assert rules.pop("script-src") == [f"'nonce-{nonce}'"] and len(nonce) >= 22
    assert rules.pop("connect-src") == ["'self'"] and rules.pop("style-src") == ["'unsafe-inline'"]
    nothing = {name for name, values in rules.items() if values == ["'none'"]}
    assert nothing == {"default-src", "frame-src", "form-action", "base-uri"}
    assert {value for name in rules.keys() - nothing for value in rules[name]} == {"data:", "blob:"}
    assert MADE.index("Content-Security-Policy") < MADE.index("<style>") < MADE.index("<script")


def test_every_page_has_a_nonce_of_its_own():
    first, second = (policy(page())["script-src"] for _ in range(2))
    assert first != second


def test_text_never_becomes_html():
    assert not re.search(r"\.(innerHTML|outerHTML)\s*\+?=|insertAdjacentHTML|document\.write|\beval\b|new Function|"
                         r"createContextualFragment|setHTMLUnsafe|javascript:", PROGRAM)
    # what the model wrote is HTML in a sandboxed frame only
    assert PROGRAM.count("srcdoc:") == 1 and PROGRAM.count('make("iframe"') == 1
    assert "allow-same-origin" not in MADE and set(re.findall(r"allow-[a-z-]+", MADE)) == {"allow-scripts"}
    assert not re.search(r"<[^>]+\son\w+=", HTML)


def test_every_string_is_there_in_both_languages_with_the_same_values():
    for key, texts in STRINGS.items():
        assert set(texts) == {"en", "zh"} and all(text.strip() for text in texts.values()), key
        values = [set(re.findall(r"\{(\w+)\}", text)) for text in texts.values()]
        assert values[0] == values[1], key
        # what is not the same word in both has Chinese signs
        assert texts["en"] == texts["zh"] or re.search(r"[\u4e00-\u9fff]", texts["zh"]), key


def test_strings_that_are_used_are_there_and_those_that_are_there_are_used():
    used = set(re.findall(r'data-(?:t|hint|label)="(\w+)"', HTML)) | set(re.findall(r'\bt\("(\w+)"[,)]', PROGRAM))
    used |= {key for pair in re.findall(r'\? "(error_\w+)" : "(error_\w+)"', PROGRAM) for key in pair}
    # made of two parts: modes, what to try in them, options
    made = [prefix for prefix in ("mode_", "try_", "option_", "about_") if f'"{prefix}"' in PROGRAM]
    assert used <= set(STRINGS)
    assert sorted(key for key in STRINGS if key not in used and not key.startswith(tuple(made))) == []
    names = re.findall(r"^  (\w+): \{ least", CODE["options"], re.MULTILINE)
    assert len(names) == 7 and all(f"{kind}_{name}" in STRINGS for name in names for kind in ("option", "about"))


def test_no_word_stands_in_the_program_or_the_markup_itself():
    texts = re.findall(r">([^<>{}]+)<", HTML.partition("<body>")[2].partition("<noscript>")[0])
    assert {text.strip() for text in texts} <= {"", "mindformers_ixc"}
    assert not re.search(r'"aria-label": "|\btitle: "[^"]|aria-label="', PROGRAM + HTML)


def test_what_the_program_looks_for_is_in_the_page():
    made = set(re.findall(r'\bid: "([\w-]+)"', PROGRAM))
    assert set(re.findall(r'byId\("([\w-]+)"\)', PROGRAM)) <= set(re.findall(r'\bid="([\w-]+)"', HTML)) | made
    icons = set(re.findall(r'(?:icon|iconButton)\("(\w+)"', PROGRAM)) | set(re.findall(r'href="#i-(\w+)"', HTML))
    assert icons == set(re.findall(r'<symbol id="i-(\w+)"', HTML))


def test_strings_cannot_end_their_element(monkeypatch, tmp_path):
    from mindformers_ixc.serving import page as module

    (tmp_path / "strings.json").write_text('{"a": {"en": "</script><b>", "zh": "x"}}', encoding="utf-8")
    monkeypatch.setattr(module, "FILES", tmp_path)
    assert "<" not in module.strings() and json.loads(module.strings())["a"]["en"] == "</script><b>"


@pytest.mark.parametrize("name", ["--ground", "--ink", "--c0", "--seen"])
def test_colours_are_those_of_all_pages(name):
    from mindformers_ixc.pages import page as pages

    light, dark = re.findall(rf"{name}: (#\w+);", pages.page("t", ""))[:2]
    style = MADE.partition("<style>")[2].partition("</style>")[0]
    assert re.findall(rf"{name}: (#\w+);", style) == [light, dark, dark] and light != dark


def test_the_server_gives_a_page_of_its_own_to_everybody_unless_it_has_none():
    with served(api_key="right-key-123") as running, running.client() as client:
        first, second = client.get("/"), client.get("/")
        assert first.headers["content-type"].startswith("text/html") and first.headers["cache-control"] == "no-store"
        assert policy(first.text)["script-src"] != policy(second.text)["script-src"]
        assert client.get("/v1/models").status_code == 401
    with served(has_page=False) as running, running.client() as client:
        plain = client.get("/")
        assert plain.headers["content-type"].startswith("text/plain") and "<" not in plain.text
