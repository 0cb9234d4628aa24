"""What each line of a chat does to the conversation; a stand-in answers."""
from __future__ import annotations

import json
import re
import shutil

import pytest

from mindformers_ixc.cli.chat_session import Measured, Reply, Session
from mindformers_ixc.cli.hints import empty_hint, picture_hint
from mindformers_ixc.data.conversations import load_conversations
from mindformers_ixc.demo import demo_path
from mindformers_ixc.processing.processor import ImageProcessor
from mindformers_ixc_cli import parse

CAT, ROCKET = (str(demo_path(f"images/{name}.jpg")) for name in ("cat", "rocket"))


class Chat:
    """A session whose answers count up; `asked` has (question, mode, options) of each."""

    def __init__(self, tmp_path, *words: str):
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(
            {"model_type": "internlmxcomposer2", "task_lora_ranks": {"sft": 4, "dpo": 4}}))
        self.asked: list[tuple] = []
        self.said: list[str] = []
        self.next: Reply | Exception | None = None
        self.session = Session(parse(["chat", "--model", str(model), *words]), self.answer, ImageProcessor(56, 14),
                               self.said.append)

    def answer(self, query: dict, mode: str, options: dict) -> Reply:
        self.asked.append((query, mode, options))
        found, self.next = self.next, None
        if isinstance(found, Exception):
            raise found
        return found or Reply(f"answer {len(self.asked)}", False, Measured(10, 2, 0.1, 0.5, 5, 1.5))

    def __call__(self, line: str) -> str:
        """What is said to a line."""
        before = len(self.said)
        assert self.session.line(line)
        return "\n".join(self.said[before:])

    def refuses(self, line: str, words: str) -> None:
        """A line is refused, and the conversation stays what it was."""
        before = repr(self.session.talk), self.session.mode, repr(self.session.settings.values)
        with pytest.raises((ValueError, OSError), match=words):
            self.session.line(line)
        assert before == (repr(self.session.talk), self.session.mode, repr(self.session.settings.values))

    @property
    def pictures(self) -> list[str]:
        return [picture.name for picture in self.session.talk.pictures]


@pytest.fixture
def chat(tmp_path):
    return Chat(tmp_path)


def test_questions_carry_the_conversation(chat):
    chat("Hello")
    chat(f"/image {CAT}")
    chat("What is this?")
    chat("And now?")
    query, mode, options = chat.asked[-1]
    assert query["history"] == [("Hello", "answer 1"), ("<ImageHere>What is this?", "answer 2")]
    assert (query["query"], mode, options["max_new_tokens"]) == ("And now?", "base", 1024)
    with open(CAT, "rb") as file:
        assert query["images"] == [file.read()]
    chat("/new")
    chat("Hello")
    assert chat.asked[-1][0]["history"] == chat.asked[-1][0]["images"] == []


def test_an_image_is_confirmed_with_size_tiles_and_positions(chat):
    said = chat(f"/image {CAT}")
    width, height, columns, rows, positions = map(int, re.fullmatch(
        r"cat\.jpg: (\d+) x (\d+) pixels, (\d+) x (\d+) tiles and the whole at a glance, (\d+) positions\.",
        said).groups())
    sample, grids = chat.session.processor.cut([CAT])
    assert (width, height, columns, rows) == (448, 298, grids[0].columns, grids[0].rows)
    assert len(sample) == columns * rows + 1
    assert positions == chat.session.processor.token_count(grids[0])
    said = chat(f"/image {ROCKET}")
    grids = chat.session.processor.cut([CAT, ROCKET])[1]
    assert f"All 2 pictures take {sum(map(chat.session.processor.token_count, grids))};" in said


def test_a_failed_image_is_forgotten(chat, tmp_path):
    broken, half = tmp_path / "broken.jpg", tmp_path / "half.jpg"
    broken.write_text("no picture")
    with open(CAT, "rb") as file:
        half.write_bytes(file.read()[:3000])
    chat(f"/image {CAT}")
    chat.refuses("/image none.png", "none.png does not exist")
    chat.refuses(f"/image {broken}", "broken.jpg")
    chat.refuses(f"/image {half}", "half.jpg is damaged")
    chat.refuses(f"/image {tmp_path}", "is a folder")
    chat.refuses(f"/image '{ROCKET}' none.png", "none.png does not exist")
    chat.refuses("/image 'none.png", "quote without its partner")
    chat.refuses("/video none.mp4", "none.mp4")
    assert chat.pictures == ["cat.jpg"]
    chat("What is this?")
    assert len(chat.asked[-1][0]["images"]) == 1


def test_home_quotes_and_spaces_work_in_paths(chat, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(CAT, tmp_path / "my cat.jpg")
    for path in ("~/my cat.jpg", '"~/my cat.jpg"', "~/my\\ cat.jpg", f"'{tmp_path}/my cat.jpg'"):
        chat(f"/image {path}")
    assert chat.pictures == ["my cat.jpg"] * 4


def test_a_picture_that_is_gone_afterwards_stays_in_the_conversation(chat, tmp_path):
    path = tmp_path / "a.jpg"
    shutil.copy(CAT, path)
    chat(f"/image {path}")
    path.unlink()
    chat("What is this?")
    chat("And now?")
    with open(CAT, "rb") as file:
        assert chat.asked[-1][0]["images"] == [file.read()]


def test_undo_takes_back_pictures_then_rounds(chat):
    chat("Hello")
    chat(f"/image {CAT}")
    chat("What is this?")
    chat(f"/image {ROCKET}")
    assert "rocket.jpg is taken back" in chat("/undo")
    assert '"What is this?" and its answer are forgotten. Its pictures wait' in chat("/undo")
    assert chat.pictures == ["cat.jpg"]
    chat("What is that?")
    assert chat.asked[-1][0]["query"] == "<ImageHere>What is that?"
    assert chat.asked[-1][0]["history"] == [("Hello", "answer 1")]
    for _ in range(3):
        chat("/undo")
    assert "nothing to take back" in chat("/undo")


def test_retry_asks_the_last_question_again_with_its_own_pictures(chat):
    chat.refuses("/retry", "no question to ask again")
    chat("Hello")
    chat(f"/image {CAT}")
    chat("What is this?")
    chat(f"/image {ROCKET}")
    assert "same answer comes" in chat("/retry")
    assert chat.asked[-1][0] == chat.asked[-2][0]
    assert chat.pictures == ["cat.jpg", "rocket.jpg"]
    chat("And that?")
    assert chat.asked[-1][0]["history"][-1] == ("<ImageHere>What is this?", "answer 3")
    chat("/set temperature 1")
    assert chat("/retry") == ""
    chat("/set seed 1")
    assert "seed is fixed" in chat("/retry")


@pytest.mark.parametrize("outcome", [ValueError("too long"), Reply("", True, Measured())])
def test_a_question_that_is_not_answered_leaves_everything_as_it_was(chat, outcome):
    chat("Hello")
    chat(f"/image {CAT}")
    for line in ("What is this?", "/retry"):
        before = repr(chat.session.talk)
        chat.next = outcome
        try:
            chat.session.line(line)
        except ValueError as error:
            assert error is outcome
        assert repr(chat.session.talk) == before


def test_a_stopped_answer_stays_as_far_as_it_came(chat):
    chat.next = Reply("the the", True, Measured())
    chat("Tell me")
    chat("Go on")
    assert chat.asked[-1][0]["history"] == [("Tell me", "the the")]


def test_modes_the_model_has_can_be_chosen(chat):
    assert chat("/mode") == "The mode is base."
    assert chat("/mode write") == "The mode is write."
    chat("Hello")
    assert chat.asked[-1][1] == "write"
    chat.refuses("/mode web", "needs the task LoRAs web, which this model does not have; the mode stays write")
    chat.refuses("/mode paint", "/mode is 'paint'; the choices are base, write, web")


def test_settings_hold_for_the_questions_that_follow(chat):
    chat("/set temperature 0.5")
    chat("/set hd_num 2")
    chat("/set meta_instruction Be short.")
    chat("Hello")
    query, _, options = chat.asked[-1]
    assert (query["hd_num"], query["meta_instruction"], options["temperature"]) == (2, "Be short.", 0.5)
    assert "1 x 1 tile and" in chat(f"/image {CAT}")
    chat.refuses("/set temperature hot", "must be a number")
    assert len(chat("/set").splitlines()) == 11


def test_stats_are_of_the_last_answer(chat):
    assert "no answer to measure" in chat("/stats")
    chat("Hello")
    assert chat("/stats") == ("10 positions and 2 tiles in, 5 tokens out; first token after 0.50 s, 0.10 s of which "
                              "the prompt took to prepare, 4.0 tokens a second after it; 1.50 s in all.")
    chat.next = Reply("", False, Measured(10, 0, 0.1, 0.5, 1, 0.5))
    chat("Hello")
    assert "a second after it" not in chat("/stats")


def test_a_saved_conversation_is_markdown_or_a_sample_for_training(chat, tmp_path):
    chat.refuses("/save talk.md", "nothing to save yet")
    chat(f"/image {CAT}")
    chat("What is\nthis?")
    chat("Sure?")
    chat("/set meta_instruction Be short.")
    chat(f"/image {ROCKET}")                             # waits: no part of what was said
    assert "2 questions" in chat(f"/save {tmp_path}/talk.json")
    (sample,) = load_conversations(tmp_path / "talk.json")
    assert sample.turns == [("system", "Be short."), ("user", "<ImageHere>What is\nthis?"), ("assistant", "answer 1"),
                            ("user", "Sure?"), ("assistant", "answer 2")]
    assert [str(image) for image in sample.images] == [CAT]
    chat(f"/save '{tmp_path}/my talk.md'")
    assert (tmp_path / "my talk.md").read_text() == (
        f"## Question\n\nWhat is\nthis?\n\n![cat.jpg](<{CAT}>)\n\nanswer 1\n\n## Sure?\n\nanswer 2\n")
    chat("More?")
    chat(f"/save '{tmp_path}/my talk.md'")               # its own file again
    assert "answer 3" in (tmp_path / "my talk.md").read_text()
    (tmp_path / "mine.md").write_text("mine")
    chat.refuses(f"/save {tmp_path}/mine.md", "exists already")
    chat.refuses(f"/save {tmp_path}/none/talk.md", "is no folder")
    chat.refuses("/save", "path of one file")
    assert (tmp_path / "mine.md").read_text() == "mine"


@pytest.mark.parametrize(("line", "words"), [
    ("/imgae x.png", "/imgae is no command; did you mean /image"), ("/nonsense", "/nonsense is no command"),
    (CAT, f"is a file; /image {re.escape(CAT)} adds it")])
def test_unknown_commands_say_what_can_be_meant(chat, line, words):
    chat.refuses(line, words)
    assert not chat.asked


def test_lines_that_ask_nothing(chat):
    assert chat("") == ""
    assert "/retry" in chat("/help")
    assert not chat.asked
    assert "No picture has been given" in chat("/image")
    chat(f"/image {CAT}")
    assert chat("/image") == "Pictures so far: cat.jpg."
    chat("/etc is a folder.\nWhat is in it?")            # several lines are a question
    assert chat.asked[-1][0]["query"] == "<ImageHere>/etc is a folder.\nWhat is in it?"
    assert not chat.session.line("/quit")


def test_pictures_of_the_command_line_wait_for_the_first_question(tmp_path):
    chat = Chat(tmp_path, "--image", CAT)
    chat("What is this?")
    assert chat.asked[-1][0]["query"] == "<ImageHere>What is this?"


@pytest.mark.parametrize(("question", "hinted"), [
    ("What is shown in the picture?", True), ("Describe this large photo.", True), ("这张图里有什么？", True),
    ("图中有什么？", True), ("What would be a good title?", False), ("What is image processing?", False),
    ("Picture a house.", False), ("什么是地图？", False)])
def test_a_question_about_a_picture_that_is_not_there_gets_a_hint(chat, question, hinted):
    assert ("none has been given; /image PATH" in chat(question)) == hinted
    chat(f"/image {CAT}")
    assert chat(question) == ""
    assert picture_hint(question, True) == []


@pytest.mark.parametrize(("count", "words"), [(1_400_000, "1.4 million"), (8_400_000_000, "8.4 billion"),
                                              (950, "950"), (3200, "3.2 thousand")])
def test_the_hint_for_an_empty_answer_says_how_large_the_model_is(count, words):
    assert f"this one has {words} parameters" in empty_hint(count)
