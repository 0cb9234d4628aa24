"""Plans: what is read from the compiler's answer, what is wrong with it, text and JSON, errors of the command."""
from __future__ import annotations

import io
import json
import re
import subprocess

import pytest
import yaml
from planned import RECIPES, answer, recipe, workload

import mindformers_ixc_cli
from mindformers_ixc import ConfigError
from mindformers_ixc.cli import plan as plan_command
from mindformers_ixc.cli.plan import read_memory
from mindformers_ixc.cpu_cluster import simulated
from mindformers_ixc.errors import LayoutError
from mindformers_ixc.parallel.degrees import Degrees
from mindformers_ixc.planning import plan as plan_module
from mindformers_ixc.planning.cost import Assumptions
from mindformers_ixc.planning.memory import stage_memory
from mindformers_ixc.planning.plan import check_slices, cut_table, make_plan, read_stage
from mindformers_ixc.planning.text import plan_text
from mindformers_ixc.planning.workload import local_parameters

SFT = RECIPES / "ixc25_sft.yaml"
NETWORK = "Default/network-_VirtualDatasetCell/_backbone-IXC25ForCausalLM"


def operator(kind: str, purpose: str, size: int, group: list[int], per_step: bool = False,
             scope: str = NETWORK) -> dict:
    return {"operator": kind, "bytes": size, "group": group, "group_size": len(group), "purpose": purpose,
            "per_step": per_step, "scope": f"{scope}/{kind}-op0"}


@pytest.fixture
def sharded():
    """A workload with every kind of cut, and the fields it is from."""
    fields = recipe("sft")
    return workload(fields, Degrees(2, 2, 2, 8)), fields


@pytest.fixture
def compiler(monkeypatch, sharded):
    """Answers for MindSpore's compiler: as the formulae have it, with some messages."""
    placed, _ = sharded
    operators = (operator("AllReduce", "forward", 100, [0, 1]), operator("AllReduce", "forward", 50, [0, 1]),
                 operator("ReduceScatter", "gradient", 1000, [0, 2], per_step=True))
    monkeypatch.setattr(plan_module, "compile_stage", lambda fields, asked, stage, *_: answer(asked, stage, operators))
    return placed


def made(sharded, memory: int = 64 * 2 ** 30, compiled: bool = True):
    placed, fields = sharded
    return make_plan(fields, placed, memory, Assumptions(), compiled)


def test_the_state_is_the_compilers(compiler, sharded):
    found = made(sharded)
    for stage, own in zip(found.stages, local_parameters(compiler)):
        expected = stage_memory(compiler, stage.stage, own)
        assert stage.memory.compiled
        assert (stage.memory.parameters, stage.memory.gradients, stage.memory.optimizer) \
            == (expected.parameters, expected.gradients, expected.optimizer)
    assert found.checked == 942 and not found.problems and not found.notes


def test_moments_of_16_bit_parameters_are_float32_as_mindformers_keeps_them(sharded):
    placed, _ = sharded
    found = answer(placed, 0, ())
    for entry in found["parameters"]:
        if entry["name"].startswith("adam_"):
            entry["dtype"] = "BFloat16"          # what the compiled optimizer makes of such parameters
    expected = stage_memory(placed, 0, local_parameters(placed)[0])
    assert read_stage(placed, 0, found).memory.optimizer == expected.optimizer


def test_messages_of_micro_batches_are_multiplied(compiler, sharded):
    forward, gradient = made(sharded).stages[0].traffic
    # two micro batches were compiled of the eight of a step
    assert (forward.purpose, forward.bytes, forward.count, forward.per_step) == ("forward", 4 * 150, 4 * 2, False)
    assert (gradient.purpose, gradient.bytes, gradient.count, gradient.per_step) == ("gradient", 1000, 1, True)


def test_two_compiled_micro_batches_stand_for_those_that_are_accumulated():
    placed = workload(recipe("sft"), Degrees(1, 8, 1, 64))
    rows = (operator("AllReduce", "forward", 10, list(range(8))), operator("AllReduce", "forward", 10, list(range(8))),
            operator("AllReduce", "norm", 4, list(range(8)), per_step=True))
    forward, norm = read_stage(placed, 0, answer(placed, 0, rows)).traffic
    assert (forward.bytes, forward.count, forward.per_step) == (640, 64, False)
    assert (norm.bytes, norm.per_step) == (4, True)


def test_of_a_single_micro_batch_what_is_sent_once_is_known_by_its_purpose():
    placed = workload(recipe("sft"), Degrees(1, 8))
    rows = (operator("AllReduce", "forward", 10, list(range(8)), per_step=True),
            operator("AllReduce", "norm", 4, list(range(8)), per_step=True))
    forward, norm = read_stage(placed, 0, answer(placed, 0, rows)).traffic
    assert (forward.bytes, forward.per_step) == (10, False)
    assert (norm.bytes, norm.per_step) == (4, True)


def test_gathers_in_the_forward_pass_are_warned_of():
    placed, group = workload(recipe("sft"), Degrees(1, 2)), [0, 1]
    rows = (operator("AllGather", "optimizer", 8, group, True),
            operator("AllGather", "layout_change", 8, group, scope=f"{NETWORK}/vit-VisionTower/layers/3-VisionLayer"),
            operator("AllGather", "layout_change", 8, group, scope=f"{NETWORK}/vit-VisionTower/layers/4-VisionLayer"),
            operator("AllGather", "backward", 8, group, scope="Gradients/Default"))
    warning, = read_stage(placed, 0, answer(placed, 0, rows)).warnings
    assert "2 x AllGather in the forward pass" in warning and "vit-VisionTower/layers/N-VisionLayer" in warning


def test_the_gathers_of_sequence_parallel_are_meant():
    placed = workload(recipe("sft", parallel_config__use_seq_parallel=True), Degrees(1, 2))
    layer = f"{NETWORK}/model-InternLM2Model/layers-CellList/0-DecoderLayer"
    rows = (operator("AllGather", "layout_change", 8, [0, 1], scope=layer),
            operator("AllGather", "layout_change", 8, [0, 1], scope=f"{NETWORK}/chunked_losses-HeadLosses"),
            operator("AllGather", "layout_change", 8, [0, 1], scope=f"{NETWORK}/vision_proj-VisionProjector"))
    warning, = read_stage(placed, 0, answer(placed, 0, rows)).warnings
    assert "vision_proj" in warning


def test_slices_that_are_not_the_whole_are_named(sharded):
    placed, _ = sharded
    answers = [answer(placed, stage) for stage in range(2)]
    entry = next(row for row in answers[0]["parameters"] if row["name"].endswith("layers.0.attention.wqkv.weight"))
    entry["local"][1] //= 2
    doubled = dict(answers[1]["parameters"][0])
    answers[0]["parameters"].append(doubled)
    answers[1]["parameters"] = [row for row in answers[1]["parameters"] if row["name"] != "output.weight"]
    stages = [read_stage(placed, stage, given) for stage, given in enumerate(answers)]
    problems = check_slices(local_parameters(placed), stages)
    assert any("layers.0.attention.wqkv.weight: 4 slices" in problem for problem in problems)
    assert f"{doubled['name']} is in the graphs of stages 0 and 1." in problems
    assert "output.weight is in the graph of no stage." in problems
    assert len(problems) == 3


def test_slices_unlike_those_of_the_formulae_are_noted(monkeypatch, sharded):
    def unlike(fields, asked, stage, *_):
        given = answer(asked, stage)
        for row in given["parameters"]:
            if row["name"] == "output.weight":
                row.update(optimizer_shards=1, local=[row["local"][0] * 2, row["local"][1]])
        return given

    monkeypatch.setattr(plan_module, "compile_stage", unlike)
    note, = made(sharded).notes
    assert "slices of 1 parameters are not those of the formulae" in note and "output.weight" in note


def test_cuts_are_told_by_kind(sharded):
    rows = {(row["name"], tuple(row["shape"])): row for row in cut_table(made(sharded, compiled=False).stages)}
    row = rows["model.layers.N.attention.wqkv.weight", (6144, 4096)]
    assert (row["count"], row["local"], row["axis"], row["tensor_parallel"], row["optimizer_shards"], row["copies"]) \
        == (32, [1536, 4096], "rows", 2, 2, 1)
    row = rows["model.layers.N.attention.wo.weight", (4096, 4096)]
    assert (row["local"], row["axis"]) == ([2048, 2048], "columns")
    row = rows["model.norm.weight", (4096,)]
    assert (row["local"], row["axis"], row["optimizer_shards"], row["copies"]) == ([4096], None, 1, 4)


def test_the_text_fits_a_terminal_and_says_all(compiler, sharded):
    text = plan_text("ixc25_sft.yaml", made(sharded))
    assert max(map(len, text.splitlines())) <= 120
    for words in ("dp 2 x tp 2 x pp 2, 8 micro batches of 1 sample, global batch 16", "State is as compiled",
                  "forward pass", "sum of gradients", "efficiency", "6144 x 4096 -> 1536 x 4096",
                  "rows / 2, optimizer / 2", "942 parameters: the slices of all ranks are together the whole."):
        assert words in text
    assert text.splitlines()[-1].startswith("It fits: stage ")
    assert plan_text("x", made(sharded, 2 ** 30)).splitlines()[-1].startswith("It does not fit: stage ")


@pytest.mark.parametrize("columns", [40, 80, 100])
def test_the_text_fits_narrow_terminals_and_says_the_same(compiler, sharded, columns):
    wide, narrow = (plan_text("x", made(sharded), room) for room in (None, columns))
    assert max(map(len, narrow.splitlines())) <= columns
    numbers = [sorted(re.findall(r"(?<![\w.])[\d,]*\d\.\d+", text)) for text in (wide, narrow)]
    assert numbers[0] == numbers[1] and len(numbers[0]) > 30


def test_the_json_has_everything(compiler, sharded):
    found = json.loads(json.dumps(made(sharded).to_dict()))
    assert found["devices"] == 8 and found["fits"] and found["compiled"]
    assert found["layout"] == {"data_parallel": 2, "model_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 8}
    stage = found["stages"][1]
    assert (stage["stage"], stage["rank"], stage["layers"]) == (1, 4, [16, 31])
    memory = stage["memory"]
    assert memory["total"] == sum(memory[key] for key in ("parameters", "gradients", "optimizer", "activations"))
    assert memory["margin"] == found["device_memory"] - memory["total"] and memory["fits"]
    assert sum(memory["terms"].values()) == memory["activations"]
    assert set(stage["communication"][0]) == {"purpose", "operator", "bytes", "count", "group", "group_size",
                                              "per_step", "seconds"}
    assert stage["compilation"] == {"seconds": 1.5, "peak_bytes": 10 ** 9}
    assert found["slices"] == {"checked": 942, "problems": []}
    assert found["time"]["total"] > 0 and 0 < found["time"]["efficiency"] < 1
    assert found["assumptions"]["tflops"] == 320


def test_a_graph_that_does_not_compile_is_a_sentence(monkeypatch, sharded, tmp_path):
    trace = ("[ERROR] PARALLEL(1,2,python):2026-01-01-00:00:00.0 [mindspore/ccsrc/x.cc:12] ParallelInit] Size 4 is too "
             "much.\nTraceback (most recent call last):\n  File x\nRuntimeError: Parallel init failed\n\n"
             "----\n- C++ Call Stack: (For framework developers)\n----\nx.cc:97 ParallelInit\n")
    monkeypatch.setattr(simulated.subprocess, "run",
                        lambda *_, **__: subprocess.CompletedProcess([], 1, "", trace))
    monkeypatch.setattr(simulated, "preload_environment", lambda simulated: {})
    placed, fields = sharded
    with pytest.raises(LayoutError) as error:
        plan_module.compile_stage(fields, placed, 1, tmp_path)
    assert str(error.value).splitlines() == [
        "The step of stage 1 did not compile for dp 2 x tp 2 x pp 2:", "Size 4 is too much.",
        "RuntimeError: Parallel init failed"]


@pytest.mark.parametrize(("text", "size"), [("64GB", 64 * 2 ** 30), ("64GiB", 64 * 2 ** 30), ("64 g", 64 * 2 ** 30),
                                            ("32000MB", 32000 * 2 ** 20), ("0.5gb", 2 ** 29)])
def test_sizes_of_memory(text, size):
    assert read_memory(text) == size


@pytest.mark.parametrize("text", ["64", "lots", "GB", "-3GB", "0GB", "1e3GB", ""])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="is no size of memory; write 64GB"):
        read_memory(text)


def run(capfd, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `mindformers plan`, which must not compile."""
    parsed, rest = mindformers_ixc_cli.build_parser().parse_known_args(["plan", *words])
    parsed.rest = rest
    parsed.answers = io.StringIO()
    code = plan_command.plan(parsed)
    return code, parsed.answers.getvalue(), capfd.readouterr().err


@pytest.mark.parametrize(("words", "sentence"), [
    (["--data_parallel", "3"], "dp 3 x tp 4 x pp 1 are 12 devices, but there are 8. The degrees that fill them"),
    (["--model_parallel", "3"], "Tensor parallel 3 does not divide"),
    (["--pipeline_stage", "64", "--devices", "512"], "64 pipeline stages need as many decoder layers"),
    (["--model_parallel", "4", "--pipeline_stage", "2", "--micro_batch_num", "1"], "fewer than the 2 stages"),
    (["--model_parallel", "4", "--global_batch", "33"], "A global batch of 33 does not divide into 2 replicas"),
    (["--device_memory", "lots"], "--device_memory 'lots' is no size of memory"),
    (["--devices", "0"], "--devices is 0; it must be a whole number of at least 1"),
    (["--micro_batch_num", "0"], "--micro_batch_num is 0"),
    (["--utilisation", "40"], "--utilisation is 40; it must be above 0, and 1 at most"),
    (["--server_bandwidth", "-1"], "--server_bandwidth is -1; it must be above 0"),
    (["--search", "--model_parallel", "4"], "--search tries all degrees, so --model_parallel cannot be given"),
    (["--nonsense", "4"], "unknown key nonsense"),
    (["--parallel_config.context_parallel", "2"], "context_parallel is 2, which this model does not have"),
])
def test_bad_input_is_refused_before_anything_is_compiled(monkeypatch, capfd, words, sentence):
    monkeypatch.setattr(plan_module, "compile_stage", lambda *_: pytest.fail("compiled"))
    with pytest.raises(ConfigError) as error:
        run(capfd, "--config", str(SFT), "--devices", "8", *words)
    assert sentence in str(error.value)


def test_the_command_says_whether_it_fits(capfd):
    words = ["--config", str(SFT), "--devices", "8", "--no_compile"]
    code, text, _ = run(capfd, *words)
    assert code == 0 and "of 58.0" in text      # the file's max_device_memory
    code, text, _ = run(capfd, *words, "--device_memory", "16GB")
    assert code == 1 and "It does not fit" in text


@pytest.mark.parametrize("words", [[], ["--json"], ["--search"]])
def test_the_command_writes_a_page_beside_its_answer(capfd, tmp_path, words):
    target = tmp_path / "plan.html"
    options = ["--config", str(SFT), "--devices", "8", "--no_compile", *words]
    code, text, _ = run(capfd, *options)
    assert run(capfd, *options, "--html", str(target)) == (code, text, f"The page is {target}.\n")
    page = target.read_text(encoding="utf-8")
    assert "<h1>ixc25_sft.yaml on 8 devices</h1>" in page
    assert ("Layouts that fit" in page) == (words == ["--search"]) != ("Memory of a device" in page)


def test_a_page_that_cannot_be_written_is_refused_before_anything_else(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(mindformers_ixc_cli, "claim_stdout", io.StringIO)
    monkeypatch.setattr(mindformers_ixc_cli, "quiet_libraries", lambda: None)
    monkeypatch.setattr(plan_command, "plan", lambda *_: pytest.fail("planned"))
    words = ["plan", "--config", str(SFT), "--devices", "8", "--html", str(tmp_path / "no" / "plan.html")]
    assert mindformers_ixc_cli.main(words) == 1
    assert "error: --html " in capfd.readouterr().err


def test_a_step_that_does_not_compile_ends_the_command_with_its_sentence(monkeypatch, capfd):
    def refuse(*_):
        raise LayoutError("The step of stage 0 did not compile for dp 2 x tp 4 x pp 1:\nSize 4 is too much.")

    monkeypatch.setattr(plan_module, "compile_stage", refuse)
    monkeypatch.setattr(mindformers_ixc_cli, "claim_stdout", io.StringIO)
    monkeypatch.setattr(mindformers_ixc_cli, "quiet_libraries", lambda: None)
    assert mindformers_ixc_cli.main(["plan", "--config", str(SFT), "--devices", "8"]) == 1
    assert capfd.readouterr().err.splitlines()[-2:] == [
        "error: The step of stage 0 did not compile for dp 2 x tp 4 x pp 1:", "Size 4 is too much."]


def test_left_out_degrees_are_what_the_others_leave(capfd):
    words = ["--config", str(SFT), "--no_compile", "--json"]
    layout = json.loads(run(capfd, *words, "--devices", "16", "--model_parallel", "4")[1])["layout"]
    assert layout == {"data_parallel": 4, "model_parallel": 4, "pipeline_stage": 1, "micro_batch_num": 3}
    found = json.loads(run(capfd, *words, "--devices", "16", "--data_parallel", "4", "--global_batch", "32",
                           "--micro_batch_num", "2")[1])
    assert (found["global_batch"], found["micro_batch_samples"]) == (32, 4)


def test_overrides_reach_the_plan(capfd):
    words = ["--config", str(SFT), "--devices", "8", "--no_compile", "--json"]
    before, after = (json.loads(run(capfd, *words, *extra)[1])["stages"][0]["memory"]["parameters"]
                     for extra in ([], ["--model.model_config.num_hidden_layers", "16"]))
    assert after < 0.6 * before


def test_a_search_is_one_json_object(capfd):
    code, text, _ = run(capfd, "--config", str(SFT), "--devices", "8", "--no_compile", "--search", "--json")
    found = json.loads(text)
    assert code == 0 and found["plan"] is None
    best = found["search"]["fitting"][0]
    assert set(best) == {"layout", "micro_batch_samples", "stage", "memory", "time"}
    assert found["search"]["tried"] >= len(found["search"]["fitting"])
    code, text, _ = run(capfd, "--config", str(SFT), "--devices", "8", "--search", "--device_memory", "4GB")
    assert code == 1 and "0 of 20 combinations fit" in text and "Refused" in text


def test_the_best_layout_is_compiled(monkeypatch, capfd):
    asked = []

    def compile_stage(fields, placed, stage, *_):
        asked.append((placed.layout, fields["parallel_config"]["model_parallel"]))
        return answer(placed, stage)

    monkeypatch.setattr(plan_module, "compile_stage", compile_stage)
    code, text, _ = run(capfd, "--config", str(SFT), "--devices", "8", "--search")
    assert code == 0 and len(asked) == asked[0][0].pipeline_stage
    assert "The first of them:" in text and "State is as compiled" in text


def test_the_job_has_the_layout(monkeypatch, sharded, tmp_path):
    jobs = []

    def record(_, input, cwd, **__):
        jobs.append(json.loads(input))
        (tmp_path / "stage_1.json").write_text("{}")
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(simulated.subprocess, "run", record)
    monkeypatch.setattr(simulated, "preload_environment", lambda simulated: {})
    placed, fields = sharded
    before = yaml.safe_dump(fields)
    plan_module.compile_stage(fields, placed, 1, tmp_path)
    job, = jobs
    assert (job["devices"], job["rank"], job["micro_batches"]) == (8, 4, 2)
    section = job["fields"]["parallel_config"]
    assert (section["data_parallel"], section["model_parallel"], section["pipeline_stage"]) == (2, 2, 2)
    assert yaml.safe_dump(fields) == before
