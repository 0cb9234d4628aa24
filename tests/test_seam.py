"""What imports neither MindSpore nor MindFormers, and that everything is registered all the same."""
from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import mindformers_ixc

FRAMEWORKS = ("mindspore", "mindformers")

# Host code: quick commands and child processes stand on it.
FREE_PACKAGES = ("processing", "data", "benchmarking", "parallel", "pages", "demo")
FREE_MODULES = (
    "chat_client", "config", "parameters", "errors", "files", "interruption", "resources", "sections", "terminal",
    "training_options", "version",
    "native", "native.building", "native.images",
    *(f"checkpoint.{name}" for name in (
        "ascend_packing", "calibration", "ckpt_file", "convert", "dtypes", "host_model", "inspection", "layer_rounding",
        "layouts", "merge", "model_config", "packing", "protobuf", "quantise", "quantised", "safetensors_file",
        "scaling", "sources", "strategy_file", "streaming", "tensor_file", "tensors", "torch_file", "writing")),
    *(f"planning.{name}" for name in (
        "workload", "memory", "cost", "search", "plan", "text", "page", "timeline", "few_layers", "check_layout")),
    "cpu_cluster", "cpu_cluster.build", "cpu_cluster.mailbox", "cpu_cluster.simulated",
    "cli", "cli.arguments", "cli.benchmark", "cli.checkpoints", "cli.data", "cli.data_plan", "cli.early", "cli.inputs",
    "cli.job", "cli.parsers", "cli.plan", "cli.report", "cli.report_page", "cli.run_config", "cli.templates",
    "cli.yaml_docs", "cli.yaml_file", "cli.data_preview", "cli.preview_page", "cli.preview_text",
)


def free_modules() -> list[str]:
    root = Path(mindformers_ixc.__file__).parent
    names = [name for package in FREE_PACKAGES
             for name in (package, *(f"{package}.{module.name}" for module in pkgutil.iter_modules([root / package])))]
    return ["mindformers_ixc", "mindformers_ixc_cli", *(f"mindformers_ixc.{name}" for name in (*names, *FREE_MODULES))]


def python(program: str, *arguments: str) -> str:
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False,
                            env={**os.environ, "GLOG_v": "3"})
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip().splitlines()[-1]


def test_host_code_imports_no_framework():
    program = ("import importlib, json, sys\n"
               "guilty = {}\n"
               "for name in sys.argv[1:]:\n"
               "    importlib.import_module(name)\n"
               f"    found = [f for f in {FRAMEWORKS!r} if f in sys.modules]\n"
               "    if found:\n"
               "        guilty[name] = found\n"
               "        break\n"
               "print(json.dumps(guilty))")
    names = free_modules()
    assert len(names) > 60
    assert json.loads(python(program, *names)) == {}


REGISTERED = ("from mindformers.tools.register import MindFormerRegister as r; from mindformers.pet.pet_model import "
              "PET_TYPE_TO_MODEL_MAPPING as pet; print(all(r.is_exist(kind, name) for kind, name in (('models', "
              "'IXC25ForCausalLM'), ('models', 'IXC25ForPreference'), ('config', 'IXC25Config'), ('tokenizer', "
              "'InternLM2Tokenizer'), ('processor', 'IXC25Processor'), ('trainer', 'IXC25Trainer'), ('dataset', "
              "'IXC25SFTDataset'), ('dataset', 'IXC25PreferenceDataset'), ('wrapper', 'IXC25TrainOneStepCell'), "
              "('pipeline', 'multimodal_chat'))) and {'partial_lora', 'task_lora'} <= set(pet))")


@pytest.mark.parametrize("first", [
    "import mindformers_ixc, mindformers",
    "import mindformers, mindformers_ixc",
    "import mindformers_ixc; mindformers_ixc.IXC25Config",
    "from mindformers_ixc.models.vision import IXC25VisionModel",
    "from mindformers_ixc.training.wrapper import IXC25TrainOneStepCell",
    "import mindspore, mindformers_ixc.generation.sampling",
])
def test_everything_is_registered_in_whatever_order(first):
    assert python(f"{first}\n{REGISTERED}") == "True"


def test_importing_mindformers_says_nothing_and_makes_no_folder_here(tmp_path):
    here, cache = tmp_path / "here", tmp_path / "cache"
    here.mkdir()
    program = ("import mindformers_ixc, mindformers\n"
               "from mindformers.tools import logger\n"
               "logger.info('a note afterwards')")
    variables = {key: value for key, value in os.environ.items() if key != "LOG_MF_PATH"}
    done = subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, text=True, check=True,
                          env={**variables, "GLOG_v": "3", "XDG_CACHE_HOME": str(cache)})
    assert done.stdout == "" and not list(here.iterdir())
    note, = done.stderr.splitlines()
    assert note.endswith("a note afterwards")
    log, = (cache / "mindformers_ixc" / "log").rglob("info.log")
    assert "a note afterwards" in log.read_text()


def test_importing_mindformers_leaves_pytorch_alone():
    pytest.importorskip("torch", reason="what is not installed is not imported")
    program = ("import sys, mindformers_ixc, mindformers, tensorboardX\n"
               "before = 'torch' in sys.modules\n"
               "import torch\n"
               "print(before, tensorboardX.x2num.make_np(torch.ones(2)).tolist(), hasattr(torch, 'Tensor'))")
    assert python(program) == "False [1.0, 1.0] True"


def test_names_of_the_package():
    assert set(mindformers_ixc.__all__) <= set(dir(mindformers_ixc))
    assert all(getattr(mindformers_ixc, name) is not None for name in mindformers_ixc.__all__)
    with pytest.raises(AttributeError, match="no attribute 'IXC25Confg'"):
        mindformers_ixc.IXC25Confg      # noqa: B018


RUN = ["run", "--config", str(Path(__file__).parents[1] / "yaml_configs" / "ixc25_sft_tiny.yaml")]


@pytest.mark.parametrize(("words", "sentence"), [
    ([*RUN, "--overwite"], "--overwite is neither an option nor a key of the YAML; did you mean --overwrite?"),
    ([*RUN, "--runner_config.epoch", "3"], "unknown key runner_config.epoch (value 3)"),
    ([*RUN, "--evaluation", "{metrics: [los]}"], "evaluation.metrics has 'los'"),
    ([*RUN, "--train_dataset_dir", "gone.json"], "The data file gone.json does not exist."),
    ([*RUN, "--train_dataset.tokenizer.vocab_file", "gone"], "The tokenizer file gone does not exist."),
    ([*RUN, "--load_checkpoint", "gone"], "load_checkpoint: gone does not exist."),
    ([*RUN, "--run_mode", "predict", "--predict_data", "gone.txt"], "The request file gone.txt does not exist."),
    ([*RUN, "--output_dir", "used"], "used already has metrics.jsonl of an earlier run."),
    (["launch", "-n", "3", *RUN], "in which each of the 3 devices trains a whole model"),
    (["run", "--config", "gone.yaml"], "The configuration file gone.yaml does not exist, and"),
    (["launch", "-n", "2", "--config", "gone.yaml"], "The configuration file gone.yaml does not exist, and"),
    (["chat", "--model", "gone", "hello"], "gone does not exist; a model directory holds config.json"),
    (["inspect", "gone"], "gone does not exist"),
    (["convert", "gone", "there"], "gone does not exist")])
def test_a_missing_file_is_said_before_anything_heavy_is_imported(tmp_path, words, sentence):
    program = ("import sys, mindformers_ixc_cli\n"
               "code = mindformers_ixc_cli.main(sys.argv[1:])\n"
               f"heavy = [f for f in {FRAMEWORKS!r} if f in sys.modules]\n"
               "print(code, heavy, file=sys.stderr)")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "metrics.jsonl").touch()
    result = subprocess.run([sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True,
                            check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["used"]      # a refusal leaves nothing behind
    *_, error, state = result.stderr.strip().splitlines()
    assert sentence in error and state == "1 []"
