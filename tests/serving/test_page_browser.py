"""The page at `/` in a browser, in front of a server whose answers are told to it.

Pictures of it are kept in the folder that MINDFORMERS_IXC_SCREENSHOTS names, if it does.
"""
from __future__ import annotations

import base64
import json
import re
import subprocess
from pathlib import Path

import pytest
from needed import chromium
from page_visitor import RICH, WAIT_MS, WEB, WRITTEN, Visitor, answer
from playwright import sync_api as playwright
from scripted_decoder import ScriptedDecoder
from served import IMAGES, ROOT, STARTER, served
from test_serve_command import COMMAND

from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.serving.limits import Limits


@pytest.fixture(scope="module")
def processor():
    return Processor.from_directory(STARTER)


@pytest.fixture(scope="module")
def decoder(processor):
    return ScriptedDecoder(processor, answer, 0.002)


@pytest.fixture(scope="module")
def server(processor, decoder):
    with served(decoder, Limits(running=4, positions=2048, pictures=4), processor=processor) as running:
        yield running
        assert running.faults == []


@pytest.fixture(scope="module")
def browser():
    path = chromium()
    with playwright.sync_playwright() as tools:
        started = tools.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"],
                                         timeout=WAIT_MS)
        yield started
        started.close()


@pytest.fixture
def visit(browser, server):
    visitors = []

    def come(url: str = server.url, **options):
        visitors.append(Visitor(browser, url, **options))
        return visitors[-1]

    yield come
    for one in visitors:
        one.until(lambda: not one.elsewhere)        # noqa: B023 - it is called at once
        one.context.close()
        assert (one.unexpected, one.elsewhere) == ([], [])


def test_two_pictures_a_streamed_answer_stop_a_second_round_and_a_web_page(visit, server, decoder):
    visitor = visit()
    page = visitor.page
    visitor.bring("drop", "cat.jpg", "rocket.jpg")
    assert page.locator("#files li").count() == 2
    with decoder.held(after=20):
        visitor.ask("What do the two pictures show?", wait=False)
        playwright.expect(page.locator(".answer .text")).to_contain_text("cat")
        assert page.locator(".answer.running").count() == 1 and page.locator("#stop").is_visible()
    page.wait_for_selector(".answer:not(.running)")
    kinds = [part["type"] for part in visitor.asked[0]["messages"][0]["content"]]
    assert kinds == ["image_url", "image_url", "text"] and visitor.asked[0]["stream"]
    sent = visitor.asked[0]["messages"][0]["content"][1]["image_url"]["url"]
    assert base64.b64decode(sent.partition(",")[2]) == (IMAGES / "rocket.jpg").read_bytes()
    shown = page.locator(".answer .text")
    assert shown.locator("strong").first.inner_text() == "cat" and shown.locator("em").inner_text() == "rocket"
    assert shown.locator("td").all_inner_texts() == ["1", "a cat", "2", "a rocket"]
    assert shown.locator("ol > li").count() == 2 and shown.locator("ol ul li").inner_text() == "a tower beside it"
    assert shown.locator("pre").inner_text() == 'print("cat" < "rocket")'
    usage = page.locator(".usage").inner_text()
    assert re.fullmatch(r"\d+ tokens read \(\d+ of pictures\) · \d+ written · first after [\d.]+ s · "
                        r"[\d.,]+ a second", usage)
    assert page.locator("#said").inner_text().startswith("The first shows")
    visitor.shot("light")

    with decoder.held(after=50):
        visitor.ask("A long one", wait=False)
        playwright.expect(page.locator(".answer .text").last).to_contain_text("word after word word after word")
        page.keyboard.press("Escape")
        page.wait_for_selector(".answer:last-child:not(.running)")
    assert page.locator(".usage").last.inner_text().endswith("stopped")
    stopped = visitor.answers()[1]
    assert 30 < len(stopped) < 2000
    visitor.until(lambda: server.service.scheduler.is_idle)
    assert not server.decoder.rows          # the client that went away holds none

    visitor.ask("How many rounds?")
    sent = visitor.asked[2]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "user", "assistant", "user"]
    assert sent[1]["content"] == RICH and sent[3]["content"].strip() == stopped.strip()
    assert visitor.answers()[2] == "Questions so far: 3."

    page.get_by_role("radio", name="Web page").check()
    visitor.ask("A website for a research institution")
    assert visitor.asked[3]["model"] == "starter:web"
    frame = page.frame_locator(".framed iframe")
    assert frame.locator("h1").inner_text() == "Harbour Institute"
    assert frame.locator("#said").inner_text() == "no script has run"
    boxes = [page.locator(place).bounding_box() for place in (".answer.web .code", ".framed")]
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]        # beside its code
    assert "styles.example.org, scripts.example.org" in page.locator(".framed .note").inner_text()
    visitor.shot("web")
    visitor.until(lambda: server.service.scheduler.is_idle)


def test_the_page_of_the_model_is_alone_even_with_scripts(visit):
    visitor = visit()
    page = visitor.page
    page.get_by_role("radio", name="Web page").check()
    visitor.ask("A website")
    assert page.get_attribute("iframe", "sandbox") == ""
    frame = page.frame_locator(".framed iframe")
    frame.locator("a").click()          # leads to a part of the page
    assert frame.locator("#end").is_visible()
    page.get_by_role("switch", name="Allow scripts").check()
    playwright.expect(frame.locator("#said")).to_have_text(
        "a script has run, alone, without storage, without network")
    assert page.get_attribute("iframe", "sandbox") == "allow-scripts"
    frame.locator("button").click()
    assert frame.locator("button").inner_text() == "pressed"
    page.get_by_role("switch", name="Allow scripts").uncheck()
    playwright.expect(frame.locator("#said")).to_have_text("no script has run")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save the page as a file").click()
    assert Path(saved.value.path()).read_text() == WEB[8:-4]
    # what its script tried and was refused is said on the console: a picture of elsewhere, the list of models
    visitor.expected = "Content Security Policy|CORS|net::ERR_FAILED"
    visitor.until(lambda: len(visitor.errors) >= 2)


def test_a_page_of_the_model_leads_nowhere(visit):
    visitor = visit()
    page = visitor.page
    page.get_by_role("radio", name="Web page").check()
    visitor.ask("One that wants to leave")
    page.get_by_role("switch", name="Allow scripts").check()
    visitor.until(lambda: any("frame.example.org" in text for text in visitor.errors))
    said = "\n".join(visitor.errors)
    assert re.search("frame.example.org.*frame-src", said), said
    assert "allow-top-navigation" in said and "window.example.org" in said
    assert page.url.rstrip("/") == visitor.url and len(visitor.context.pages) == 1
    assert visitor.answers()[0].startswith("html") and page.locator(".error").count() == 0
    visitor.expected = "allow-top-navigation|window.example.org|frame.example.org"


def test_conversations_are_kept_named_exported_and_deleted(visit):
    visitor = visit()
    page = visitor.page
    visitor.bring("paste", "cat.jpg")
    visitor.ask("What is it?")
    page.get_by_role("button", name="New conversation").click()
    visitor.ask("How many rounds?")
    names = page.locator("#list .name")
    assert names.all_inner_texts() == ["How many rounds?", "What is it?"]
    page.get_by_role("button", name="Rename").click()
    page.keyboard.type("Counting")
    page.keyboard.press("Enter")
    page.evaluate(WRITTEN)
    visitor.open()
    playwright.expect(names).to_have_text(["Counting", "What is it?"])
    assert page.locator("article").count() == 0
    names.nth(1).click()
    playwright.expect(page.locator(".answer .text")).to_have_text("A cat.")
    assert page.locator(".question img").evaluate("(one) => one.decode()") is None
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export").click()
    exported = json.loads(Path(saved.value.path()).read_text())
    assert saved.value.suggested_filename == "What_is_it.json" and exported["title"] == "What is it?"
    assert exported["messages"][0] == visitor.asked[0]["messages"][0]
    assert exported["messages"][1] == {"role": "assistant", "content": "A cat."}
    page.get_by_role("button", name="Delete").click()
    page.locator("dialog").get_by_role("button", name="Cancel").click()
    assert names.count() == 2
    page.get_by_role("button", name="Delete").click()
    page.locator("dialog").get_by_role("button", name="Delete").click()
    playwright.expect(names).to_have_text(["Counting"])
    page.evaluate(WRITTEN)
    visitor.open()
    playwright.expect(names).to_have_text(["Counting"])


def test_tabs_know_of_each_other(visit):
    visitor = visit()
    other = visitor.context.new_page()
    other.goto(visitor.url)
    visitor.ask("What is it?")
    names = other.locator("#list .name")
    playwright.expect(names).to_have_text(["What is it?"])
    names.click()
    playwright.expect(other.locator(".answer .text")).to_have_text("A cat.")
    visitor.ask("How many rounds?")
    playwright.expect(other.locator(".answer .text").last).to_have_text("Questions so far: 2.")
    visitor.page.get_by_role("button", name="Delete").click()
    visitor.page.locator("dialog").get_by_role("button", name="Delete").click()
    playwright.expect(names).to_have_count(0)
    playwright.expect(other.locator("article")).to_have_count(0)


def test_a_question_is_edited_and_an_answer_given_anew(visit):
    visitor = visit()
    page = visitor.page
    visitor.bring("drop", "cat.jpg")
    visitor.ask("What is it?")
    visitor.ask("How many rounds?")
    page.get_by_role("button", name="Answer anew").click()
    page.wait_for_selector(".answer:last-child:not(.running)")
    assert visitor.asked[2] == visitor.asked[1] and len(visitor.answers()) == 2
    page.get_by_role("button", name="Edit and ask again").first.click()
    assert page.input_value("#question") == "What is it?" and page.locator("#files li").count() == 1
    visitor.ask("How many rounds now?")
    assert visitor.answers() == ["Questions so far: 1."]
    assert [part["type"] for part in visitor.asked[3]["messages"][0]["content"]] == ["image_url", "text"]
    page.get_by_role("button", name="Edit and ask again").click()
    page.keyboard.press("Escape")
    assert page.input_value("#question") == "" and page.locator("#files li").count() == 0
    page.locator(".answer").get_by_role("button", name="Copy").click()
    playwright.expect(page.locator("#said")).to_contain_text("Copied")


def test_settings_are_sent_and_wrong_ones_named(visit):
    visitor = visit()
    page = visitor.page
    page.get_by_role("button", name="Settings").click()
    for name, value in (("Temperature", "0.7"), ("Top p", "0.9"), ("New tokens at most", "12"), ("Seed", "5"),
                        ("Repetition penalty", "1.005"), ("Tiles at most", "2"), ("Instruction", "Be short.")):
        page.get_by_label(name, exact=True).fill(value)
    visitor.ask("Hello")
    body = visitor.asked[0]
    assert {name: body[name] for name in body if name not in ("messages", "model", "stream", "stream_options")} == {
        "temperature": 0.7, "top_p": 0.9, "max_tokens": 12, "seed": 5, "repetition_penalty": 1.005, "hd_num": 2,
        "meta_instruction": "Be short."}
    visitor.open()                                          # kept
    assert page.input_value("#option-seed") == "5" and page.locator("#settings").is_visible()
    page.get_by_label("Temperature", exact=True).fill("3")
    assert "Temperature must be a number from 0 to 2." in page.locator("#settings").inner_text()
    page.fill("#question", "Hello")
    page.keyboard.press("Enter")
    assert page.locator("#notice").inner_text().strip() == "Temperature must be a number from 0 to 2."
    assert len(visitor.asked) == 1
    page.get_by_role("button", name="Set all back").click()
    page.get_by_label("Beams", exact=True).fill("3")
    visitor.ask("Hello")
    assert visitor.asked[1]["num_beams"] == 3 and visitor.asked[1]["stream"] is False
    assert "temperature" not in visitor.asked[1] and visitor.answers() == ["A cat."]


def test_what_goes_wrong_is_a_sentence(visit):
    visitor = visit()
    page = visitor.page
    visitor.bring("drop", "notes.txt")
    assert "notes.txt is neither a picture nor a video." in page.locator("#notice").inner_text()
    visitor.ask("Where is <ImageHere>?")
    assert "marks a picture's place" in visitor.answers()[0]
    visitor.bring("drop", "clip.mp4")                       # whose content is none
    visitor.ask("And this?")
    # a question without an answer is not sent again
    assert [message["role"] for message in visitor.asked[1]["messages"]] == ["user"]
    assert visitor.asked[1]["messages"][0]["content"][0]["video_url"]["url"].startswith("data:video/mp4;base64,")
    assert page.locator(".answer .error").count() == 2
    visitor.bring("drop", *["cat.jpg"] * 5)
    page.keyboard.press("Enter")
    assert "would have 5 pictures; this server takes 4" in page.locator("#notice").inner_text()
    page.get_by_role("button", name="New conversation").click()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    for _ in range(5):
        page.locator("#files").get_by_role("button", name="Remove").first.click()
    visitor.ask("Hello")
    assert visitor.answers() == ["The server cannot be reached. Does it run?"]
    visitor.expected = "^Failed to load resource"


def test_a_key_is_asked_for_and_forgotten_with_the_tab(browser, processor):
    with served(ScriptedDecoder(processor, answer), Limits(running=4, positions=1024), processor=processor,
                api_key="right-key-123") as running:
        context = browser.new_context(locale="en")
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        page.goto(running.url)
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("The server does not know this key.").wait_for()
        page.get_by_label("API key").fill("right-key-123")
        page.get_by_role("button", name="Use").click()
        page.wait_for_selector("#modes label")
        page.fill("#question", "What?")
        page.keyboard.press("Enter")
        page.wait_for_selector(".answer:last-child:not(.running)")
        assert page.locator(".answer .text").inner_text() == "A cat."
        assert "right-key" not in page.evaluate("JSON.stringify(localStorage)")
        other = context.new_page()                          # another tab knows nothing of it
        other.goto(running.url)
        other.get_by_label("API key").wait_for()
        context.close()


def test_a_models_text_is_text(visit):
    visitor = visit()
    visitor.ask("Some markup")
    shown = visitor.page.locator(".answer .text")
    assert shown.inner_text().startswith('<img src=x onerror="document.title=1"> <b>bold</b> <script>')
    assert shown.locator("img, b, script, a").count() == 0 and visitor.page.title() == "starter"


def test_tiles_are_shown_as_the_model_sees_them(visit):
    visitor = visit()
    page = visitor.page
    visitor.bring("drop", "cat.jpg")
    page.get_by_role("button", name="cat.jpg: show as the model sees it").click()
    page.wait_for_selector(".grid img")
    assert "2 × 2 tiles of 112 × 112 pixels: 93 positions" in page.locator("dialog").inner_text()
    assert page.locator(".grid img").count() == 4
    assert page.locator("dialog img").evaluate_all("""async (all) => {
      await Promise.all(all.map((one) => one.decode()));
      return all.every((one) => one.naturalWidth > 0);
    }""")
    visitor.shot("tiles")
    page.keyboard.press("Escape")
    playwright.expect(page.locator("dialog")).to_be_hidden()


def test_a_video_is_shown_and_sent(visit):
    visitor = visit()
    page = visitor.page
    visitor.bring("drop", "clip.webm")
    page.get_by_role("button", name="clip.webm: show as the model sees it").click()
    page.wait_for_selector(".grid img")
    assert re.search(r"\d × \d tiles of 112 × 112 pixels", page.locator("dialog").inner_text())
    page.keyboard.press("Escape")
    visitor.ask("What happens?")
    sent = visitor.asked[0]["messages"][0]["content"][0]["video_url"]["url"]
    assert sent.startswith("data:video/webm;base64,") and visitor.answers() == ["A cat."]
    page.wait_for_function("document.querySelector('.question video').readyState >= 1")


def test_a_phone_in_chinese_and_the_dark(visit):
    visitor = visit(width=360, height=740, locale="zh-CN", color_scheme="dark", has_touch=True, is_mobile=True)
    page = visitor.page
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert page.locator("#history").is_hidden() and page.get_by_role("button", name="设置").is_visible()
    visitor.bring("drop", "cat.jpg", "rocket.jpg")
    page.fill("#question", "What do the two pictures show?")
    page.get_by_role("button", name="发送").click()
    page.wait_for_selector(".answer:not(.running)")
    visitor.shot("phone")
    page.get_by_role("radio", name="网页").check()
    page.fill("#question", "A small page")
    page.get_by_role("button", name="发送").click()
    page.wait_for_selector(".answer.web:not(.running)")
    code, framed = (page.locator(place).bounding_box() for place in (".answer.web .code", ".framed"))
    assert framed["y"] + framed["height"] <= code["y"] and framed["width"] <= 360
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.get_by_role("button", name="设置").click()
    assert page.get_by_label("温度", exact=True).is_visible()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="对话", exact=True).click()
    page.get_by_label("语言").select_option("en")
    assert page.get_by_role("button", name="New conversation").is_visible()
    page.get_by_label("Colours").select_option("light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    visitor.open()
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_everything_is_reached_by_the_keyboard_and_seen_there(visit):
    visitor = visit(color_scheme="dark")
    page = visitor.page
    visitor.bring("drop", "cat.jpg")
    visitor.ask("What do the two show?")
    visitor.shot("dark")
    reached, unnamed, unseen = [], [], []
    for _ in range(60):
        page.keyboard.press("Tab")
        name, seen, tag = page.evaluate("""() => {
          const one = document.activeElement, box = one.closest("#composer, #modes label") || one;
          const style = [one, one.nextElementSibling, box].filter((item) => item).map((item) => getComputedStyle(item));
          const label = one.labels && one.labels[0] && one.labels[0].innerText.split("\\n")[0];
          return [one.getAttribute("aria-label") || label || one.innerText,
            style.some((item) => item.outlineStyle !== "none" || item.boxShadow !== "none"), one.tagName];
        }""")
        if tag == "BODY":           # from the end it goes on at the beginning
            continue
        reached.append(name)
        if not name:
            unnamed.append(tag)
        if not seen:
            unseen.append(name)
    assert not unnamed and not unseen
    wanted = ["To the question", "New conversation", "Rename", "Export", "Delete", "Language", "Colours", "Settings",
              "cat.jpg: show as the model sees it", "Edit and ask again", "Answer anew", "Copy", "Question",
              "Add pictures or videos", "Chat"]
    assert [name for name in wanted if name not in reached] == []


@pytest.mark.slow
def test_the_starter_answers_on_the_page(browser, tmp_path):
    words = [*COMMAND, "--model", "starter", "--port", "0", "--log", str(tmp_path / "requests.log")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT) as server:
        try:
            line = next(line for line in server.stderr if " answers at " in line)
            visitor = Visitor(browser, line.partition(" answers at ")[2].partition("/v1")[0])
            visitor.bring("drop", "cat.jpg", "rocket.jpg")
            visitor.ask("What is shown in the picture?")
            assert visitor.answers()[0].strip()
            visitor.page.get_by_role("button", name="New conversation").click()
            visitor.bring("drop", "cat.jpg")
            visitor.ask("What is shown in the picture?")
            visitor.ask("What would be a good title?")
            assert visitor.answers() == ["the face of a cat", "Green Eyes"]
            assert "of pictures" in visitor.page.locator(".usage").last.inner_text()
            visitor.page.get_by_role("radio", name="Web page").check()
            visitor.ask("A website for a cat")
            assert visitor.page.locator(".answer .error").count() == 0
            visitor.shot("starter")
            assert (visitor.errors, visitor.elsewhere) == ([], [])
            visitor.context.close()
        finally:
            server.terminate()
