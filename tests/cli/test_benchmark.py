"""`mindformers eval --benchmark`, answered by stand-ins: a server, and a model in this process."""
from __future__ import annotations

import base64
import importlib
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import openpyxl
import pytest
from benchmark_tables import SAID, TABLES, picture, write_table
from PIL import Image
from standin_server import serving

from mindformers_ixc.benchmarking.catalogue import BENCHMARKS
from mindformers_ixc.cli.benchmark_asking import TILE
from mindformers_ixc.cli.evaluate import evaluate
from mindformers_ixc.cli.inputs import check_inputs
from mindformers_ixc.errors import ConfigError, DataError, ServerError
from mindformers_ixc.processing.image import partition_pixels, plan_partition
from mindformers_ixc_cli import parse


def run(*words: str) -> tuple[int, list[str]]:
    """Exit code and standard output of `eval`."""
    arguments = parse(["eval", *words])
    arguments.answers = io.StringIO()
    check_inputs(arguments, arguments.options)
    return evaluate(arguments), arguments.answers.getvalue().splitlines()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server():
    """A server that gives the answers of `SAID` for the data set that a test names by `server.asks`."""
    with serving(lambda body: next(state.says)) as state:
        state.models[0]["control_tokens"] = True

        def asks(name):
            state.says = iter(SAID[name])
            return "--server", state.url, "--benchmark", name, "--data", f"{name}.tsv", "--batch_size", "1"

        state.asks = asks
        yield state


def answers_of(name, model="stand-in"):
    with open(f"benchmarks/{model}/{name}.answers.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("name", TABLES)
def test_every_kind_from_its_table_to_its_result_file(server, tmp_path, name, capsys):
    write_table(tmp_path, name)
    code, lines = run(*server.asks(name))
    assert code == 0
    sheet = openpyxl.load_workbook(f"benchmarks/stand-in/T00000000-000000/stand-in_{name}.xlsx").active
    head, *rows = sheet.iter_rows(values_only=True)
    assert "image" not in head and head[-1] == "prediction"
    assert [row[-1] for row in rows] == [one["answer"] for one in answers_of(name)]
    assert len(rows) == len(SAID[name]) == len(server.asked)
    assert {one["max_tokens"] for one in server.asked} == {BENCHMARKS[name].max_new_tokens}
    assert {(one["num_beams"], one["temperature"]) for one in server.asked} == {(3, 0)}
    said = capsys.readouterr().err
    if BENCHMARKS[name].metric:
        paper = BENCHMARKS[name].paper
        assert paper is None or lines[1].split()[-1] == f"{paper:.1f}"
        assert f"--mode eval --work-dir benchmarks --model stand-in --data {name}." in said
    else:
        assert "is scored by a judge" in said and lines[1].split()[:2] == [name, "-"]


def test_the_scores_stand_beside_the_papers_and_those_of_all_sets_below(server, tmp_path):
    for name in ("ChartQA_TEST", "MMStar"):
        write_table(tmp_path, name)
    assert run(*server.asks("ChartQA_TEST"))[1] == [
        "ChartQA_TEST  this run     paper", "Overall           75.0      82.2", "augmented         50.0",
        "human            100.0"]
    assert run(*server.asks("MMStar"))[1] == [
        "MMStar   this run     paper", "Overall      50.0      59.9", "animals      50.0", "things       50.0", "",
        "data set      this model     paper  questions", "MMStar              50.0      59.9          4",
        "ChartQA_TEST        75.0      82.2          4"]


def test_scores_of_another_model_or_with_other_settings_are_in_no_table_with_these(server, tmp_path):
    for name in ("ChartQA_TEST", "MMStar"):
        write_table(tmp_path, name)
    run(*server.asks("ChartQA_TEST"), "--model_name", "model")
    words = (*server.asks("MMStar"), "--model_name", "model")
    one_alone = run(*words, "--num_beams", "1", "--output_dir", "other")[1]
    shutil.copy("benchmarks/model/ChartQA_TEST.scores.json", "other/model")
    assert run(*words, "--num_beams", "1", "--output_dir", "other")[1] == one_alone
    server.models[0]["id"] = "another"
    assert run(*server.asks("MMStar"), "--model_name", "model")[1] == one_alone
    assert len(one_alone) == 4


def test_what_is_answered_is_not_asked_again(server, tmp_path, capsys):
    write_table(tmp_path, "MMStar")
    words = server.asks("MMStar")
    first = run(*words, "--max_samples", "3")
    assert len(server.asked) == 3 and "The first 3 of 4 questions are asked" in capsys.readouterr().err
    assert "questions" not in first[1][0]
    with open("benchmarks/stand-in/MMStar.answers.jsonl", "rb+") as file:
        file.truncate(len(file.read()) - 9)         # a killed run
    server.says = iter(["ginger", "A"])
    _, lines = run(*words)
    assert len(server.asked) == 5 and lines[1].split() == ["Overall", "50.0", "59.9"]
    assert "2 of 4 answers are in benchmarks/stand-in/MMStar.answers.jsonl already" in capsys.readouterr().err
    assert run(*words)[1] == lines and len(server.asked) == 5


def test_answers_of_another_set_or_model_or_with_other_settings_are_refused(server, tmp_path):
    for name in ("MMStar", "MathVista_MINI"):
        write_table(tmp_path, name)
    run(*server.asks("MMStar"))
    words = ("--server", server.url, "--data", "MMStar.tsv", "--benchmark")
    with pytest.raises(DataError, match=r"with other settings than this run's: num_beams 3 \(now 1\); choose another"):
        run(*words, "MMStar", "--num_beams", "1")
    server.models[0]["id"] = "another"
    with pytest.raises(DataError, match=r"served stand-in \(now another\)"):
        run(*words, "MMStar", "--model_name", "stand-in")
    server.models[0] |= {"id": "stand-in", "weights": "1234"}
    with pytest.raises(DataError, match=r"of other weights or settings than this run's: weights none \(now 1234\);"):
        run(*words, "MMStar")
    del server.models[0]["weights"]
    shutil.copy("benchmarks/stand-in/MMStar.answers.jsonl", "benchmarks/stand-in/AI2D_TEST.answers.jsonl")
    with pytest.raises(DataError, match=r"benchmark MMStar \(now AI2D_TEST\)"):
        run(*words, "AI2D_TEST")
    path = tmp_path / "MMStar.tsv"
    path.write_text(path.read_text().replace("What is shown?", "What is hidden?"))
    with pytest.raises(DataError, match="an answer to another question than number 1"):
        run(*words, "MMStar")


def test_a_question_that_is_refused_counts_as_wrong_and_a_server_that_is_gone_ends_the_run(server, tmp_path, capsys):
    write_table(tmp_path, "MMStar")
    words = server.asks("MMStar")
    server.refusals = [(400, b'{"error": {"message": "The prompt is too long."}}', {})]
    code, lines = run(*words, "--max_samples", "2")
    assert code == 0 and lines[1].split()[1] == "0.0"
    said = capsys.readouterr().err
    assert "row 0: The prompt is too long." in said and "1 of 2 questions could not be answered" in said
    assert "takes it when all questions are answered" in said
    sheet = openpyxl.load_workbook("benchmarks/stand-in/T00000000-000000/stand-in_MMStar.xlsx").active
    assert sheet.cell(2, sheet.max_column).value == "Failed to obtain answer via API."
    server.refusals = [(500, b"", {})]
    with pytest.raises(ServerError, match="answers 500"):
        run(*words)
    assert len(answers_of("MMStar")) == 2


def test_a_server_that_stays_busy_ends_the_run_and_no_question_counts_as_wrong(server, tmp_path, monkeypatch):
    write_table(tmp_path, "MMStar")
    monkeypatch.setattr("mindformers_ixc.chat_client.time", SimpleNamespace(sleep=lambda seconds: None))
    words = server.asks("MMStar")
    server.refusals = [(429, b'{"error": {"message": "Too many of yours wait."}}', {})] * 4
    with pytest.raises(ServerError, match="Too many of yours wait"):
        run(*words)
    _, lines = run(*words)
    assert lines[1].split() == ["Overall", "50.0", "59.9"] and len(server.asked) == 8


def test_what_a_server_gets(server, tmp_path):
    write_table(tmp_path, "MMStar")
    run(*server.asks("MMStar"), "--api_key", "secret", "--hd_num", "9")
    body = server.asked[2]
    parts = body["messages"][0]["content"]
    assert len(body["messages"]) == 1 and body["messages"][0]["role"] == "user"
    assert [part.get("text") for part in parts] == ["Image1: ", None, "; Image2: ", None,
                                                    ";" + parts[4]["text"].removeprefix(";")]
    assert parts[4]["text"].startswith(";Question: Which is the rocket?\nContext: N/A\nOptions: A. the first B. the")
    assert (body["model"], body["hd_num"], "mode" in body) == ("stand-in", 4, False)
    assert server.asked[0]["hd_num"] == 9 and set(server.keys) == {"Bearer secret"}


def test_a_server_cuts_what_it_gets_into_the_tiles_that_were_meant(server, tmp_path):
    """Its own transform, which is the one of inference, leaves such pictures as they are."""
    for width, height in ((300, 200), (700, 1999), (1400, 1000), (561, 44), (40, 900)):
        for limit in (4, 9, 36):
            meant = partition_pixels(Image.effect_noise((width, height), 60).convert("RGB"), limit, TILE, training=True)
            plan = plan_partition(meant.shape[1], meant.shape[0], limit, TILE)
            assert plan.resized == plan.padded == (meant.shape[1], meant.shape[0])
    write_table(tmp_path, "MMStar")
    whole = Image.open(io.BytesIO(base64.b64decode(picture("cat.jpg"))))
    for number, tile in enumerate((TILE, 112)):
        if tile != TILE:
            server.models[0]["images"] = {"image_size": tile}      # as a server of another size says
        run(*server.asks("MMStar"), "--output_dir", f"out{tile}")
        parts = server.asked[4 * number]["messages"][0]["content"]
        sent = Image.open(io.BytesIO(base64.b64decode(parts[0]["image_url"]["url"].partition(",")[2])))
        again = partition_pixels(sent, 36, tile)
        assert sent.size == plan_partition(*whole.size, 36, tile, training=True).padded
        assert np.array_equal(again, np.asarray(sent))


def test_a_server_says_whether_pictures_are_turned_by_their_exif_unless_the_command_does(server, tmp_path):
    write_table(tmp_path, "MMStar")
    file, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (1800, 300)).save(file, "JPEG", exif=turned)
    path = tmp_path / "MMStar.tsv"
    path.write_text(path.read_text().replace(picture("cat.jpg"), base64.b64encode(file.getvalue()).decode()))
    for number, (own, words, is_upright) in enumerate((
            (None, (), False), ("apply", (), True), ("apply", ("--exif", "ignore"), False), ("other", (), False))):
        server.models[0]["images"] = {} if own is None else {"exif": own}
        run(*server.asks("MMStar"), *words, "--output_dir", f"out{number}", "--max_samples", "1")
        parts = server.asked[-1]["messages"][0]["content"]
        sent = Image.open(io.BytesIO(base64.b64decode(parts[0]["image_url"]["url"].partition(",")[2])))
        assert (sent.height > sent.width) is is_upright


@pytest.mark.parametrize("name", ["MME", "HallusionBench", "POPE"])
def test_marks_of_turns_need_a_server_that_takes_them(server, tmp_path, name):
    write_table(tmp_path, name)
    words = server.asks(name)
    run(*words)
    text = "".join(part.get("text", "") for part in server.asked[0]["messages"][0]["content"])
    assert "[UNUSED_TOKEN_146]user\n" in text
    for said in (False, None):
        server.models[0]["control_tokens"] = said
        with pytest.raises(ConfigError, match=r"which .* takes for text; start it with --allow_control_tokens"):
            run(*words)


@pytest.mark.parametrize(("limit", "most", "option"), [("max_beams", 2, "num_beams"), ("max_new_tokens", 4,
                                                                                       "max_new_tokens")])
def test_a_server_that_would_refuse_every_question_is_not_asked(server, tmp_path, limit, most, option):
    write_table(tmp_path, "MMStar")
    words = server.asks("MMStar")
    server.models[0][limit] = most
    with pytest.raises(ConfigError, match=rf"asked with --{option} \d, .* at most; start the server with --{limit}"):
        run(*words)
    assert not server.asked
    run(*words, f"--{option}", str(most))
    assert len(server.asked) == 4


def test_another_mode_is_another_model_of_the_server_or_a_field(server, tmp_path):
    write_table(tmp_path, "MMStar")
    run(*server.asks("MMStar"), "--mode", "write")
    assert {one["model"] for one in server.asked} == {"stand-in:write"} and "mode" not in server.asked[0]
    assert len(answers_of("MMStar", "stand-in_write")) == 4
    server.models = [{"id": "only"}]
    run(*server.asks("MMStar"), "--mode", "web")
    assert (server.asked[-1]["model"], server.asked[-1]["mode"]) == ("only", "web")
    server.models = []
    with pytest.raises(ServerError, match="has no model"):
        run(*server.asks("MMStar"))


@pytest.mark.parametrize(("words", "said"), [
    ((), "eval needs --model DIR, or --benchmark NAME with --server URL"),
    (("--model", "starter", "--server", "http://h"), "--server is given without --benchmark"),
    (("--model", "starter", "--num_beams", "3"), "--num_beams is given without --benchmark"),
    (("--benchmark", "MMStar"), "--benchmark needs --model DIR or --server URL, one of the two"),
    (("--benchmark", "MMStar", "--model", "starter", "--server", "http://h"), "one of the two"),
    (("--benchmark", "MMStar", "--model", "starter", "--api_key", "k"), "--api_key is given without --server"),
    (("--benchmark", "MMStar", "--model", "starter", "--metrics", "anls"), "--metrics does not go with --benchmark"),
    (("--benchmark", "MMStar", "--server", "http://h", "--device_target", "Ascend"), "--device_target is given with"),
    (("--benchmark", "MMStar", "--server", "http://h", "--max_samples", "0"), "--max_samples is 0; it must be"),
    (("--benchmark", "MMStar", "--server", "http://h", "--model_name", "a/b"), "it may have no slash"),
    (("--benchmark", "MMStar", "--model", "starter", "--prompt_lookup", "4"), "--prompt_lookup goes with --num_beams"),
    (("--benchmark", "MMStar", "--server", "http://h", "--num_beams", "0"), "--num_beams is 0; it must be"),
    (("--benchmark", "MMStar", "--server", "h", "--max_new_tokens", "9"), "'h' is no address of a server")])
def test_options_that_do_not_go_together(tmp_path, words, said):
    write_table(tmp_path, "MMStar")
    with pytest.raises((ConfigError, ServerError), match=said):
        run("--data", "MMStar.tsv", *words)
    assert not (tmp_path / "benchmarks").exists()


def test_an_unknown_benchmark_names_what_is_known(capsys):
    with pytest.raises(SystemExit):
        run("--data", "x.tsv", "--model", "starter", "--benchmark", "MMStr")
    said = capsys.readouterr().err
    assert "did you mean MMStar?" in said and all(name in said for name in BENCHMARKS)


def test_a_model_in_this_process_is_asked_with_whole_prompts(tmp_path, monkeypatch):
    """Beams, tokens and stop ids of the published calls; pictures by the transform of training."""
    write_table(tmp_path, "MMStar")
    cut, asked = [], []

    def encode(pieces, images, hd_num, training):
        cut.append((len(images), hd_num, training))
        return SimpleNamespace(text="".join(piece.text for piece in pieces))

    def answer_samples(samples, mode, **options):
        asked.append((samples[0].text, mode, options))
        return ["The answer is B"]

    assistant = SimpleNamespace(processor=SimpleNamespace(encode_pieces=encode), stop_token_ids=(2, 92542),
                                answer_samples=answer_samples)
    given = []

    def load(arguments):
        given.append(arguments.transparency)
        return assistant

    def answer_questions(prompted, questions, size, mode, options):
        return [{"answer": prompted.answer_samples([prompted.encode(one)], mode, **options)[0]} for one in questions]

    found = {"mindformers_ixc.cli.inference": SimpleNamespace(load_assistant=load),
             "mindformers_ixc.generation.predict": SimpleNamespace(answer_questions=answer_questions)}
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: found.get(name) or real(name, *rest))
    code, lines = run("--model", "starter", "--benchmark", "MMStar", "--data", "MMStar.tsv")
    assert code == 0 and lines[1].split() == ["Overall", "50.0", "59.9"]
    assert cut == [(1, 36, True), (1, 36, True), (2, 9, True), (1, 36, True)] and given == ["public"]
    text, mode, options = asked[0]
    assert text.startswith("[UNUSED_TOKEN_146]user\nQuestion: What is shown?") and mode == "base"
    assert options == {"num_beams": 3, "max_new_tokens": 5, "stop_token_ids": (2,)}
    assert answers_of("MMStar", "starter")[0]["run"]["weights"]


@pytest.mark.slow
def test_the_starter_answers_a_benchmark(tmp_path):
    write_table(tmp_path, "POPE")
    words = ("--model", "starter", "--benchmark", "POPE", "--data", "POPE.tsv", "--hd_num", "4", "--max_samples", "2")
    code, lines = run(*words)
    assert code == 0 and lines[0].split() == ["POPE", "this", "run", "paper"]
    assert all(one["answer"] and one["run"]["hd_num"] == 4 for one in answers_of("POPE", "starter"))


def test_answers_about_other_pictures_are_not_gone_on_from(server, tmp_path):
    write_table(tmp_path, "MMStar")
    run(*server.asks("MMStar"))
    path = tmp_path / "MMStar.tsv"
    lines = path.read_text().split("\n")
    cells, place = lines[1].split("\t"), lines[0].split("\t").index("image")
    assert len(cells[place]) > 64       # a picture, no reference
    cells[place] = picture("receipt.png")
    path.write_text("\n".join([lines[0], "\t".join(cells), *lines[2:]]))
    with pytest.raises(DataError, match="an answer to another question than number 1"):
        run("--server", server.url, "--data", "MMStar.tsv", "--benchmark", "MMStar")


def test_what_can_only_count_as_wrong_is_said(server, tmp_path, capsys):
    write_table(tmp_path, "MMStar")
    path = tmp_path / "MMStar.tsv"
    lines = [line.split("\t") for line in path.read_text().split("\n")]
    lines[1][lines[0].index("answer")] = "e"
    path.write_text("\n".join(map("\t".join, lines)))
    run(*server.asks("MMStar"))
    said = capsys.readouterr().err
    assert "WARNING: whatever is answered, VLMEvalKit does not count these as right: row " in said and "'e'" in said
