"""MindFormers finds everything by name, from YAML sections and from public model directories."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mindformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline
from mindformers.models.build_config import build_model_config
from mindformers.models.build_processor import build_processor
from mindformers.tools.register import MindFormerConfig, MindFormerRegister
from safetensors.numpy import load_file

import mindformers_ixc
from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import CheckpointError, ConfigError
from mindformers_ixc.resources import resolve_path


@pytest.fixture
def public_directory(tmp_path, goldens, monkeypatch):
    """A directory as the public repository has it, with the names of its remote code."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    fields = json.loads((goldens / "t1" / "config.json").read_text())
    remote = "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM"
    fields["auto_map"] = {"AutoConfig": "configuration_internlm_xcomposer2.InternLMXcomposer2Config",
                          "AutoModel": remote, "AutoModelForCausalLM": remote}
    fields.update(attn_implementation="eager", max_length=16384, torch_dtype="bfloat16", use_cache=False)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "auto_map": {"AutoTokenizer": ["tokenization_internlm_xcomposer2.InternLMXComposer2Tokenizer", None]},
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "padding_side": "right",
        "clean_up_tokenization_spaces": False, "tokenizer_class": "InternLMXComposer2Tokenizer"}))
    shutil.copy(demo_path("tokenizer.model"), tmp_path / "tokenizer.model")
    shutil.copy(goldens / "t1" / "model.safetensors", tmp_path / "model.safetensors")
    return tmp_path


def test_auto_classes_read_a_public_directory(public_directory):
    directory = str(public_directory)
    config = AutoConfig.from_pretrained(directory)
    assert type(config) is mindformers_ixc.IXC25Config
    assert (config.hidden_size, config.vision_config.image_size) == (64, 56)
    assert isinstance(AutoTokenizer.from_pretrained(directory), mindformers_ixc.InternLM2Tokenizer)
    processor = AutoProcessor.from_pretrained(directory)
    assert type(processor) is mindformers_ixc.IXC25Processor
    assert processor.image_processor.image_size == 56
    weights = load_file(public_directory / "model.safetensors")
    for auto in (AutoModel, AutoModelForCausalLM):
        model = auto.from_pretrained(directory)
        assert type(model) is mindformers_ixc.IXC25ForCausalLM
        assert all(np.array_equal(p.asnumpy(), weights.pop(p.name)) for p in model.get_parameters()) is True
        assert not weights
        weights = load_file(public_directory / "model.safetensors")


def test_a_saved_model_comes_back(public_directory, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(str(public_directory), seq_length=12)
    assert model.config.seq_length == 12
    model.save_pretrained(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    original = load_file(public_directory / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(np.array_equal(saved[name], original[name]) for name in saved)


@pytest.mark.parametrize(("kind", "name"), [
    ("config", "IXC25Config"), ("config", "IXC25VisionConfig"), ("models", "IXC25ForCausalLM"),
    ("models", "IXC25VisionModel"), ("tokenizer", "InternLM2Tokenizer"), ("tokenizer", "InternLMXComposer2Tokenizer"),
    ("processor", "IXC25Processor"), ("processor", "IXC25ImageProcessor"), ("processor", "IXC25VideoProcessor"),
    ("dataset", "IXC25SFTDataset"), ("dataset_loader", "IXC25DataLoader"), ("trainer", "IXC25Trainer"),
    ("wrapper", "IXC25TrainOneStepCell"), ("wrapper", "IXC25PipelineWithLossScaleCell"),
    ("callback", "IXC25Tracker"), ("pipeline", "multimodal_chat")])
def test_the_registry_holds(kind, name):
    assert MindFormerRegister.is_exist(kind, name)


def test_sections_of_a_yaml_file_become_instances():
    config = build_model_config(MindFormerConfig(
        type="IXC25Config", hidden_size=64, num_attention_heads=8, num_key_value_heads=4,
        vision_config={"type": "IXC25VisionConfig", "image_size": 112}))
    assert config.vision_config.image_size == 112
    processor = build_processor(MindFormerConfig(
        type="IXC25Processor", image_processor={"type": "IXC25ImageProcessor", "image_size": 112},
        tokenizer={"type": "InternLM2Tokenizer", "vocab_file": str(demo_path("tokenizer.model"))}))
    assert processor.image_processor.tokens_per_side == 4


def test_register_path_finds_the_classes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)   # MindFormers copies the module into ./modules
    monkeypatch.setenv("REGISTER_PATH", str(Path(__file__).parents[1]))
    config = MindFormerRegister.get_instance_from_cfg(
        MindFormerConfig(auto_register="register.IXC25Config", type="IXC25Config", vocab_size=77), "config")
    assert (type(config).__name__, config.vocab_size) == ("IXC25Config", 77)


@pytest.mark.parametrize("read", [
    AutoConfig.from_pretrained, AutoModel.from_pretrained, AutoModelForCausalLM.from_pretrained,
    AutoProcessor.from_pretrained, AutoTokenizer.from_pretrained, mindformers_ixc.IXC25ForCausalLM.from_pretrained,
    mindformers_ixc.IXC25Processor.from_pretrained, mindformers_ixc.InternLM2Tokenizer.from_pretrained,
    lambda name: pipeline("multimodal_chat", model=name)])
def test_a_hubs_name_is_refused_with_the_command(read):
    with pytest.raises(CheckpointError, match="huggingface-cli download internlm/internlm-xcomposer2d5-7b --local-dir"):
        read("internlm/internlm-xcomposer2d5-7b")


def test_the_shipped_model_is_known_by_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert AutoConfig.from_pretrained("starter").hidden_size == 128
    assert isinstance(AutoTokenizer.from_pretrained("starter"), mindformers_ixc.InternLM2Tokenizer)
    assert type(AutoProcessor.from_pretrained("starter")) is mindformers_ixc.IXC25Processor
    assert type(mindformers_ixc.IXC25Processor.from_pretrained("starter")) is mindformers_ixc.IXC25Processor
    for read in (AutoModel, AutoModelForCausalLM, mindformers_ixc.IXC25ForCausalLM):
        assert type(read.from_pretrained("starter")) is mindformers_ixc.IXC25ForCausalLM
    chat = pipeline("multimodal_chat", model="starter")
    image = str(resolve_path("pkg:mindformers_ixc/demo/images/cat.jpg"))
    assert chat({"query": "What is shown in the picture?", "images": [image]}) == [
        {"text_generation_text": "the face of a cat"}]
    (tmp_path / "starter").mkdir()
    with pytest.raises(ConfigError, match="there is starter in"):
        AutoModel.from_pretrained("starter")
