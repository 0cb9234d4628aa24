"""What is refused before MindFormers is imported, command by command, and what is said of it."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import mindformers_ixc_cli
from mindformers_ixc.checkpoint.quantise import quantize
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.checkpoint.tensor_file import TensorFile
from mindformers_ixc.cli import ending
from mindformers_ixc.cli.early_device import check_device
from mindformers_ixc.cli.inputs import check_inputs
from mindformers_ixc.cli.plan import plan
from mindformers_ixc.cli.recipe_files import recipes
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.resources import resolve_model
from mindformers_ixc.terminal import Terminal

RUN = ("run", "--config", "ixc25_sft_tiny", "--output_dir", "out")
CHAT = ("chat", "--model", "starter")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with what is given in place of the right thing."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("cards").mkdir()
    Path("cards/questions.csv").touch()
    Path("words.txt").write_text("words")
    Path("noise.png").write_bytes(bytes(range(256)))
    Path("none.json").write_text("[]")
    Path("other.csv").write_text("picture,question,answer\n")
    Image.new("RGB", (8, 8)).save("dot.png")
    Path("text.yaml").write_text("base_config: ixc25_sft_tiny\nlr_schedule:\n  learning_rate: 1e-4\n")
    shutil.copytree(resolve_model("starter"), "half", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree("half", "run/model")
    shutil.copytree("half", "cached/snapshots/0a1b")
    shutil.copytree(resolve_model("starter"), "mute", ignore=shutil.ignore_patterns("tokenizer.model"))
    return tmp_path


def refusal(*words: str) -> str:
    """What is said of a command line by what looks at it before MindFormers is imported."""
    with pytest.raises((ValueError, OSError)) as caught:
        check_inputs(mindformers_ixc_cli.parse(list(words)), [])
    return str(caught.value)


@pytest.mark.parametrize(("words", "said"), [
    (("--model", "gone", "hello"), "gone does not exist; a model directory holds config.json"),
    (("--model", "words.txt", "hello"), "words.txt is a file; a model directory"),
    (("--model", "run", "hello"), "run/model has one: is that meant?"),
    (("--model", "cached", "hello"), "cached/snapshots/0a1b has one: is that meant?"),
    (("--model", "half", "hello"), "which are not in half; copy them too"),
    (("--model", "mute", "hello"), "mute/tokenizer.model does not exist"),
    ((*CHAT[1:], "--image", "folder", "hello"), "folder is a folder; give the path of a file"),
    ((*CHAT[1:], "--image", "noise.png", "hello"), "noise.png is no image file that is known"),
    ((*CHAT[1:], "--image", "dot.png", "--image", "gone.png", "hello"), "gone.png does not exist"),
    ((*CHAT[1:], "--temperature", "-1", "hello"), "--temperature is -1.0; it must be a number of at least 0"),
    ((*CHAT[1:], "--temperature", "0", "--do_sample", "hello"), "sampling takes a temperature above 0"),
    ((*CHAT[1:], "--top_p", "1.5", "hello"), "--top_p is 1.5; it must be a number from 0 to 1"),
    ((*CHAT[1:], "--max_new_tokens", "0", "hello"), "--max_new_tokens is 0; it must be a whole number of at least 1"),
    ((*CHAT[1:], "--num_beams", "0"), "--num_beams is 0"),
    ((*CHAT[1:], "--prompt_lookup", "65"), "--prompt_lookup is 65; it must be a whole number from 0 to 64"),
    ((*CHAT[1:], "--prompt_lookup", "4", "--do_sample"), "--prompt_lookup is 4 and --do_sample is given"),
    ((*CHAT[1:], "--prompt_lookup", "4", "--num_beams", "3"), "--prompt_lookup is 4 and --num_beams is given"),
    ((*CHAT[1:], "--reuse_bytes", "-1"), "--reuse_bytes is -1; it must be a whole number from 0"),
    ((*CHAT[1:], "--hd_num", "0"), "--hd_num is 0"),
    ((*CHAT[1:], "  "), "The query is empty and there is no picture"),
    ((*CHAT[1:], "--device_target", "Ascend", "hello"), "mindformers doctor --device_target Ascend"),
])
def test_chat(words, said, monkeypatch):
    monkeypatch.setattr("mindformers_ixc.cli.early_device.FILES", {"CPU": None, "Ascend": "no_such_device*"})
    assert said in refusal("chat", *words)


@pytest.mark.parametrize(("words", "said"), [
    (("--data", "folder"), "folder is a folder; give the path of a file."),
    (("--data", "/dev/null"), "/dev/null is a device and no regular file; write what it holds to one, and name that."),
    (("--data", "cards"), "cards is a folder; give the path of a file: is cards/questions.csv meant?"),
    (("--data", "none.json", "--batch_size", "0"), "--batch_size is 0"),
    (("--data", "none.json", "--max_new_tokens", "-1"), "--max_new_tokens is -1"),
])
def test_eval(words, said):
    assert said in refusal("eval", "--model", "starter", *words)


@pytest.mark.parametrize(("words", "said"), [
    (("--context.device_target", "TPU"), "context.device_target is 'TPU'; the choices are CPU, GPU, Ascend"),
    (("--runner_config.epochs", "0"), "runner_config.epochs is 0; it must be a whole number of at least 1"),
    (("--train_dataset.batch_size", "-2"), "train_dataset.batch_size is -2"),
    (("--lr_schedule.learning_rate", "fast"), "lr_schedule.learning_rate is 'fast'; it must be a number"),
    (("--optimizer.learning_rate", "-1"), "optimizer.learning_rate is -1"),
    (("--lr_schedule.warmup_ratio", "2"), "lr_schedule.warmup_ratio is 2; it must be a number from 0 to 1"),
    (("--seed", "-5"), "seed is -5"),
    (("--train_dataset.hd_num", "0"), "train_dataset.hd_num is 0; it must be a whole number of at least 1"),
    (("--train_dataset.image_transform", "none"), "the choices are training, inference"),
    (("--train_dataset.max_bad_share", "3"), "max_bad_share is 3; it must be a number from 0 to 1"),
    (("--runner_wrapper.max_grad_norm", "-1"), "runner_wrapper.max_grad_norm is -1; it must be a number above 0"),
    (("--context.max_device_memory", "lots"), "context.max_device_memory 'lots' is no size of memory"),
    (("--model.model_config.hidden_size", "100"), "model.model_config: hidden_size 100 does not divide"),
    (("--train_dataset.seq_length", "100"), "seq_length 160 but train_dataset has seq_length 100"),
    (("--train_dataset.data_loader.dataset_dir", "none.json"), "none.json must hold a JSON list with at least one"),
    (("--train_dataset.data_loader.dataset_dir", "other.csv"), "'picture' is none of them"),
    (("--train_dataset.data_loader.dataset_dir", "folder"), "folder has 0 pictures and no table of questions"),
    (("--load_checkpoint", "folder"), "folder holds no checkpoint"),
    (("--load_checkpoint", "half"), "which are not in half; copy them too"),
    (("--load_checkpoint", "starter", "--model.model_config.hidden_size", "64"), "contradicts config.json"),
    (("--resume_training", "True"), "so there is no run to go on with"),
    (("--output_dir", "words.txt"), "words.txt is no folder"),
    (("--output_dir", "words.txt/deep/down"), "words.txt is no folder"),
    (("--run_mode", "predict"), "give the file of requests as --predict_data FILE"),
])
def test_run(words, said):
    assert said in refusal(*RUN, *words)
    assert not Path("out").exists()


def test_a_few_bad_samples_are_no_reason_to_refuse_a_run(folder):
    def write(bad):
        turns = [{"from": "human", "value": "what?"}, {"from": "bot", "value": "a dot"}]
        Path("few.json").write_text(json.dumps([
            {"id": number, "image": "gone.png" if number < bad else "dot.png", "conversations": turns}
            for number in range(150)]))

    words = (*RUN, "--train_dataset.data_loader.dataset_dir", "few.json")
    write(1)
    check_inputs(mindformers_ixc_cli.parse(list(words)), [])
    assert "sample 0 (id 0), field image: the picture gone.png does" in refusal(
        *words, "--train_dataset.max_bad_share", "0")
    write(2)
    assert refusal(*words).endswith(
        "2 of 150 samples cannot be used, more than the share max_bad_share 0.01 allows.")


def test_data_beside_the_yaml_but_not_where_the_command_is_typed(folder, monkeypatch):
    (folder / "run" / "own.yaml").write_text(
        "base_config: ixc25_sft_tiny\ntrain_dataset:\n  data_loader:\n    dataset_dir: own.json\n")
    (folder / "run" / "own.json").write_text("[]")
    assert refusal("run", "--config", "run/own.yaml", "--output_dir", "out").endswith(
        f"The data file own.json does not exist. It is in {folder / 'run'}, beside the YAML: paths start where the "
        "command is typed, so type it there.")
    monkeypatch.chdir(folder / "run")
    assert "own.json must hold a JSON list" in refusal("run", "--config", "own.yaml", "--output_dir", "out")


def test_held_out_data_and_pairs_are_read_as_the_run_reads_them():
    Path("held.json").write_text(json.dumps([{"image": "dot.png", "conversations": [
        {"from": "human", "value": "What?"}, {"from": "bot", "value": "A dot."}]}]))
    Path("pairs.json").write_text(json.dumps([{"image": "dot.png", "prompt": "What?", "chosen": "A dot.",
                                               "rejected": "A cat."}]))
    Path("elsewhere").mkdir()
    shutil.move("dot.png", "elsewhere/dot.png")
    held = ("--evaluation.dataset_dir", "held.json", "--evaluation.every", "0")
    assert "dot.png does not exist" in refusal(*RUN, *held)
    check_inputs(mindformers_ixc_cli.parse([*RUN, *held, "--evaluation.image_folder", "elsewhere"]), [])
    pairs = ("run", "--config", "ixc25_dpo_tiny", "--output_dir", "out", "--train_dataset.data_loader.dataset_dir",
             "[pairs.json, pairs.json]")
    assert "dot.png does not exist" in refusal(*pairs)
    check_inputs(mindformers_ixc_cli.parse([*pairs, "--train_dataset.data_loader.image_folder", "elsewhere"]), [])


def test_what_there_is_to_say_of_a_checkpoint_is_not_said_before_it_is_loaded(caplog):
    shutil.copytree(resolve_model("starter"), "wrapped")
    index = Path("wrapped/model.safetensors.index.json")
    file = next(Path("wrapped").glob("*.safetensors"))
    tensors = {f"module.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}))
    Path("wrapped/digests.json").unlink(missing_ok=True)
    check_inputs(mindformers_ixc_cli.parse(["chat", "--model", "wrapped", "hello"]), [])
    assert not caplog.records
    open_source("wrapped", verify=False)
    assert "are read without module." in caplog.text


def test_a_number_that_yaml_takes_for_text_is_said_to_be_one():
    assert refusal("run", "--config", "text.yaml", "--output_dir", "out").endswith(
        "lr_schedule.learning_rate is '1e-4'; it must be a number of at least 0. YAML reads a number as text that is "
        "quoted or has no point before its exponent; write 0.0001.")


@pytest.mark.parametrize("name", [name for name in recipes() if name.endswith("_tiny")])
def test_recipes_of_small_models_are_not_refused(name):
    arguments = mindformers_ixc_cli.parse(["run", "--config", name, "--output_dir", "out"])
    section = {"ixc25_web_tiny": "starter", "ixc25_dpo_tiny": "starter"}.get(name)
    if section:
        arguments.load_checkpoint = section
    check_inputs(arguments, [])
    assert not Path("out").exists()


def test_a_launch_of_no_device():
    assert "-n is 0; it must be at least 1" in refusal("launch", "-n", "0", "--config", "ixc25_sft_tiny")


def test_weights_that_take_pytorch_are_left_for_later(monkeypatch):
    Path("half/model.safetensors.index.json").unlink()
    assert "holds no checkpoint" in refusal("chat", "--model", "half", "hello")
    Path("half/pytorch_model.bin").write_bytes(b"no weights")
    monkeypatch.setattr("mindformers_ixc.cli.early.open_source", lambda *_, **__: pytest.fail("was opened"))
    check_inputs(mindformers_ixc_cli.parse(["chat", "--model", "half", "hello"]), [])


@pytest.mark.parametrize(("model", "words"), [("gone", "gone does not exist"), ("starter", "it has no score head")])
def test_a_reward_model_that_is_none_is_refused_before_the_run(model, words):
    said = refusal("run", "--config", "ixc25_grpo_tiny", "--load_checkpoint", "starter", "--output_dir", "out",
                   "--rollout.rewards", "{reward_model: 1.0}", "--rollout.reward_model", model)
    assert words in said and not Path("out").exists()


def test_preference_pairs_that_are_none():
    said = refusal("reference", "none.json", "target.json", "--model", "starter")
    assert said.startswith("none.json must hold a JSON list with at least one pair")


def test_data_plan_names_its_data_first():
    from mindformers_ixc.cli.data_plan import data_plan

    arguments = mindformers_ixc_cli.parse(["data", "plan", "gone.json", "--config", "ixc25_sft"])
    with pytest.raises(FileNotFoundError, match=r"The data file gone\.json does not exist"):
        data_plan(arguments)


def test_devices_by_their_files(tmp_path):
    (tmp_path / "davinci0").touch()
    check_device("Ascend", "context.device_target", tmp_path)
    check_device("CPU", "context.device_target", tmp_path)
    with pytest.raises(ConfigError, match=r"context\.device_target is 'GPU', but this machine shows no such device"):
        check_device("GPU", "context.device_target", tmp_path)
    (tmp_path / "davinci0").unlink()
    with pytest.raises(ConfigError, match=r"is not said, which means Ascend, .*--context\.device_target CPU computes"):
        check_device(None, "context.device_target", tmp_path)


@pytest.mark.parametrize("words", [("recipes",), ("inspect", "starter"), ("chat", "--help"), ()])
def test_a_command_whose_output_nobody_reads_ends_quietly(words):
    reading, writing = os.pipe()
    os.close(reading)
    command = subprocess.run([sys.executable, "-m", "mindformers_ixc", *words], stdout=writing,
                             stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    os.close(writing)
    if words in (("recipes",), ("inspect", "starter")):         # of help argparse itself passes over it
        assert command.returncode == ending.NOBODY_READS == 141
    assert "error" not in command.stderr.lower() and "broken" not in command.stderr.lower()


@pytest.mark.parametrize("words", ["recipes", "--help", "inspect starter", "inspect gone"])
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_without_streams_does_what_it_does_with_them(words, closed):
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m mindformers_ixc {words} {closed}"], capture_output=True,
                          text=True, timeout=300, check=False)
    assert done.returncode == (1 if "gone" in words else 0)
    assert "Traceback" not in done.stderr


def test_a_full_disk_behind_standard_output_is_a_sentence():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "mindformers_ixc", "recipes"], stdout=full, text=True,
                              stderr=subprocess.PIPE, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: Something cannot be read or written: No space left on device.\n"


def test_the_closed_end_of_a_pipe_is_seen():
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        assert not ending.is_unread(stream)
        os.close(reading)
        assert ending.is_unread(None, stream)


def test_an_error_of_a_library_leads_to_its_log(tmp_path):
    terminal = Terminal()
    with pytest.raises(TypeError) as caught, terminal.libraries_to(tmp_path / "run.log"):
        raise TypeError("Cosine: must be float\n" + "-" * 52 + "\n- C++ Call Stack: (For framework developers)")
    assert terminal.last_log == tmp_path / "run.log"
    said = ending.fault_of(caught.value, terminal.last_log)
    assert said == f"TypeError: Cosine: must be float\nThe lines that led there are in {tmp_path / 'run.log'}."
    assert "Traceback" in (tmp_path / "run.log").read_text()


def test_what_c_code_has_not_written_yet_goes_to_the_log(tmp_path):
    program = ("import ctypes, pathlib\nfrom mindformers_ixc.terminal import current\n"
               "with current.libraries_to(pathlib.Path('c.log')):\n    ctypes.CDLL(None).printf(b'late words')\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert done.stdout == "" and (tmp_path / "c.log").read_text() == "late words"


@pytest.mark.parametrize("module", ["numpy", "mindformers_ixc.terminal"])
def test_ctrl_c_while_the_command_itself_is_imported_shows_no_traceback(tmp_path, module):
    program = tmp_path / "mindformers"
    # the signal comes where a finder is asked for a module
    program.write_text(f"""import signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
from mindformers_ixc_cli import main
sys.exit(main())
""")
    done = subprocess.run([sys.executable, program, "inspect", "starter"], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, check=False)
    assert done.returncode in (130, -signal.SIGINT)
    assert done.stdout == "" and done.stderr in ("", "SIGINT ended this command.\n")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The starter with numbers of four bits, in both layouts."""
    place = tmp_path_factory.mktemp("quantised")
    return {layout: quantize("starter", place / layout, layout=layout) for layout in ("mindformers_ixc", "awq")}


@pytest.mark.parametrize("layout", ["mindformers_ixc", "awq"])
@pytest.mark.parametrize("words", [
    RUN, ("launch", "-n", "2", *RUN[1:]), ("plan", *RUN[1:3], "--devices", "1"),
    (*RUN, "--model.model_config.pet_config", "{pet_type: lora, target_modules: '.*wo'}"),
    ("reference", "pairs.json", "x.json")],
    ids=["run", "launch", "plan", "lora", "reference"])
def test_a_quantised_model_where_full_weights_are_needed(words, layout, quantised):
    model = str(quantised[layout])
    Path("pairs.json").write_text(json.dumps([{"id": 0, "prompt": "Hello", "chosen": "Hi", "rejected": "No"}]))
    what = "reference" if words[0] == "reference" else "training"
    given = ("--model", model) if words[0] == "reference" else ("--load_checkpoint", model)
    said = (plan_refusal if words[0] == "plan" else refusal)(*words, *given)
    assert said == (f"{model} is quantised, and {what} needs full weights: take those it was made from, or widen it: "
                    f"mindformers convert {model} TARGET --to hf.")
    assert not Path("out").exists()


def plan_refusal(*words: str) -> str:
    """What `plan` says, which looks at the checkpoint itself."""
    with pytest.raises((ValueError, OSError)) as caught:
        plan(mindformers_ixc_cli.parse(list(words)))
    return str(caught.value)


def test_a_quantised_model_that_lacks_something_is_no_model_to_ask(quantised):
    small = quantised["mindformers_ixc"]
    shutil.copytree(small, "damaged", ignore=shutil.ignore_patterns("*.safetensors*", "digests*"))
    arrays = {name: (tensor.dtype, tensor.whole()) for name, tensor in open_source(small).tensors.items()}
    missing = "model.layers.2.feed_forward.w2.scales"
    del arrays[missing]
    file = TensorFile(Path("damaged/model.safetensors"), [(name, dtype, value.shape)
                                                          for name, (dtype, value) in arrays.items()])
    file.open()
    for name, (_, value) in arrays.items():
        file.write(name, 0, value)
    file.close()
    assert f"without {missing}, which says what its numbers mean" in refusal("chat", "--model", "damaged", "hello")
    fields = json.loads(Path("damaged/config.json").read_text())
    fields["quantization_config"]["group_size"] = 64
    Path("damaged/config.json").write_text(json.dumps(fields))
    assert "group_size 64; groups of 128 are read" in refusal("eval", "--model", "damaged", "--data", "none.json")
