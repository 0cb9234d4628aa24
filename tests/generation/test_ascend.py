"""Doors to inference switch Ascend's kernels on before anything is compiled; blocks, tiles and memory by device."""
from __future__ import annotations

import json
import os
from argparse import Namespace
from types import SimpleNamespace

import mindspore as ms
import pytest
from mindspore import nn
from mindspore.common.api import _cell_graph_executor
from random_model import SIZES

from mindformers_ixc import (
    InternLM2Tokenizer,
    IXC25Config,
    IXC25ForCausalLM,
    IXC25ImageProcessor,
    IXC25Processor,
)
from mindformers_ixc.cli import inference
from mindformers_ixc.cli import reference as reference_command
from mindformers_ixc.demo import demo_path
from mindformers_ixc.device import assume_device
from mindformers_ixc.errors import ConfigError, GenerationError
from mindformers_ixc.generation import ascend, causal_lm, engine, loading
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.engine import InferenceEngine
from mindformers_ixc.generation.pipeline import MultimodalChatPipeline
from mindformers_ixc.generation.slots import PagedSlot, cache_bytes, make_slot
from mindformers_ixc.training import trainer

BOOST = {"jit_level": "O0", "infer_boost": "on"}
HALF = {"compute_dtype": "bfloat16", "use_past": True}


@pytest.fixture
def said(monkeypatch):
    """What MindSpore is told: every jit_config, and "compiled" or "loaded" for what may only come after one."""
    events: list = []
    set_context = ms.set_context

    def record(**options):
        if "jit_config" in options:
            events.append(options.pop("jit_config"))
        if options:
            set_context(**options)

    monkeypatch.setattr(ms, "set_context", record)
    monkeypatch.setattr(ascend, "get_jit_config",
                        lambda: next((event for event in reversed(events) if isinstance(event, dict)), {}))
    monkeypatch.setattr(type(_cell_graph_executor), "compile", lambda *_, **__: events.append("compiled"))
    for module in (loading, causal_lm):
        monkeypatch.setattr(module, "load_weights", lambda *_: events.append("loaded"))
        monkeypatch.setattr(module, "open_source", lambda *_: SimpleNamespace(tensors={}, config_file=None))
    monkeypatch.setattr(inference, "quiet_mindformers", lambda: None)
    monkeypatch.setattr(ms, "set_device", lambda _: None)
    for name in ascend.ENVIRONMENT:
        monkeypatch.setenv(name, "")       # put back as it was at the end
        monkeypatch.delenv(name)
    return events


def model(**fields) -> IXC25ForCausalLM:
    with nn.no_init_parameters():
        return IXC25ForCausalLM(IXC25Config(**{**SIZES, **fields}))


@pytest.fixture
def folder(tmp_path):
    """A model directory without weights, which are not loaded here."""
    fields = IXC25Config(**{**SIZES, "vocab_size": 1024}).to_public_dict()
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    (tmp_path / "tokenizer.model").write_bytes(demo_path("tokenizer.model").read_bytes())
    return tmp_path


def command(folder) -> Namespace:
    return Namespace(model=str(folder), device_target="Ascend", verbose=False, control_tokens=False, transparency=None,
                     exif=None)


def processor() -> IXC25Processor:
    return IXC25Processor(IXC25ImageProcessor(28), InternLM2Tokenizer(str(demo_path("tokenizer.model"))))


def a_pipeline(fields: dict) -> MultimodalChatPipeline:
    parts = processor()
    return MultimodalChatPipeline(model(vocab_size=1024, **fields), parts.tokenizer, processor=parts)


def predicted(folder) -> None:
    """run_mode predict up to where it asks for its assistant."""
    config = SimpleNamespace(get=lambda _: None, predict_batch_size=1, load_checkpoint=str(folder),
                             model=SimpleNamespace(model_config=HALF))
    trainer.IXC25Trainer.predict(SimpleNamespace(), config, input_data=None)


DOORS = {
    "chat and eval": lambda folder: inference.load_assistant(command(folder)),
    "reference": lambda folder: reference_command.reference(command(folder)),
    "Assistant.from_directory": lambda folder: Assistant.from_directory(folder, **HALF),
    "load_model": lambda folder: loading.load_model(folder, **HALF),
    "from_pretrained": lambda folder: IXC25ForCausalLM.from_pretrained(str(folder), **HALF),
    "Assistant": lambda _: Assistant(model(**HALF), None),
    "pipeline": lambda _: a_pipeline(HALF),
    "pipeline of a model as it is": lambda _: a_pipeline({}),
    "run_mode predict": predicted,
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_switches_the_kernels_on_once_and_first(door, said, folder, monkeypatch):
    monkeypatch.setattr(reference_command, "add_reference_logps", lambda *_: said.append("compiled"))
    monkeypatch.setattr(reference_command, "image_options", lambda _: {})
    monkeypatch.setattr(Namespace, "__getattr__", lambda *_: None, raising=False)
    monkeypatch.setattr(trainer, "predict", lambda load, *_: said.append(load()) or [])
    monkeypatch.setattr(trainer, "read_requests", lambda _: [])
    monkeypatch.setattr(trainer, "get_output_root_path", lambda: str(folder))
    with assume_device("Ascend"):
        DOORS[door](folder)
    assert said[0] == BOOST
    assert said.count(BOOST) == 1
    assert {name: os.environ.get(name) for name in ascend.ENVIRONMENT} == {
        "MS_ALLOC_CONF": "enable_vmm:False", "CPU_AFFINITY": "True",
        "MS_INTERNAL_DISABLE_CUSTOM_KERNEL_LIST": "PagedAttention"}


def test_other_devices_and_training_processes_are_left_alone(said, folder):
    Assistant.from_directory(folder, use_past=True)       # on the CPU
    with assume_device("Ascend"):
        InferenceEngine(model(compute_dtype="bfloat16"))      # evaluation while training: no use_past
    assert said == ["loaded"]
    assert not set(ascend.ENVIRONMENT) & os.environ.keys()


def test_what_the_caller_set_stays(said, monkeypatch):
    monkeypatch.setenv("MS_ALLOC_CONF", "enable_vmm:True")
    said.append({"jit_level": "O0", "infer_boost": "off"})
    with assume_device("Ascend"):
        ascend.prepare_inference()
        with pytest.raises(ConfigError, match=r"'infer_boost': 'off'.*only with infer_boost on"):
            ascend.prepare_inference(paged=True)
        said[:] = [{"jit_level": "O1"}]
        ascend.prepare_inference()
        with pytest.raises(ConfigError, match="takes jit_level O0"):
            InferenceEngine(model(**HALF))
        assert said == [{"jit_level": "O1"}]
        said[:] = [{"infer_boost": "on"}]
        ascend.prepare_inference(paged=True)
    assert said[1:] == [BOOST]
    assert os.environ["MS_ALLOC_CONF"] == "enable_vmm:True"


def test_blocks_are_what_the_rows_need_unless_the_yaml_says():
    public = IXC25Config()
    assert (public.block_size, public.num_blocks) == (128, None)
    assert ascend.blocks_needed(public, 1, 24576) == 192           # the trained length
    assert ascend.blocks_needed(public, 3, 98305) == 3 * 769
    assert ascend.blocks_needed(IXC25Config(num_blocks=200), 1, 24576) == 200
    with pytest.raises(ConfigError, match=r"num_blocks is 100, but 1 row\(s\) of up to 24576 .* take 192 blocks"):
        ascend.blocks_needed(IXC25Config(num_blocks=100), 1, 24576)
    for wrong in (0, True, "many"):
        with pytest.raises(ConfigError, match="num_blocks"):
            IXC25Config(num_blocks=wrong)


def test_blocks_of_a_server_are_what_its_answers_can_fill_as_far_as_memory_goes(monkeypatch):
    public = IXC25Config()
    assert ascend.pool_blocks(public, 8, 16384, 0) == 8 * 128 + 1      # one is nobody's
    assert ascend.pool_blocks(IXC25Config(num_blocks=300), 8, 16384, 0) == 300
    with pytest.raises(ConfigError, match=r"num_blocks is 100, but .* up to 16384 positions takes 128 blocks"):
        ascend.pool_blocks(IXC25Config(num_blocks=100), 8, 16384, 0)
    # a block of the 7B model in 16 bits takes 16 MiB: 2 x 32 layers x 128 positions x 8 heads x 128 x 2 bytes
    half = IXC25Config(compute_dtype="bfloat16")
    monkeypatch.setattr(ascend, "device_memory", lambda: 32 << 30)
    monkeypatch.setattr(ms.runtime, "memory_allocated", lambda: 1 << 30)
    assert ascend.pool_blocks(half, 8, 16384, 17 << 30) == int((15 << 30) * ascend.POOL_SHARE) // (16 << 20) == 640
    monkeypatch.setattr(ms.runtime, "memory_allocated", lambda: 31 << 30)
    with pytest.raises(ConfigError, match=r"memory for 42 blocks, but .* takes 128 .*--max_positions"):
        ascend.pool_blocks(half, 8, 16384, 17 << 30)


def test_a_paged_cache_by_default_takes_a_full_length_request():
    slot = PagedSlot(IXC25Config(**{**SIZES, "num_hidden_layers": 1, **HALF}), 1, 24576)
    assert slot.caches[0].keys.shape == (192, 128, 4, 4)
    assert slot.bytes == cache_bytes(IXC25Config(**{**SIZES, "num_hidden_layers": 1, **HALF}), 1, 24576)


@pytest.mark.parametrize(("fields", "most"), [({"block_size": 24}, 4096), ({"hidden_size": 2048}, 64)])
def test_blocks_that_the_kernel_does_not_take_are_refused(fields, most):
    with assume_device("Ascend"), pytest.raises(ConfigError, match=f"block_size .* multiples of 16 up to {most} for"):
        make_slot(IXC25Config(**{**SIZES, **HALF, **fields}), 1, 64)


def test_the_tower_is_fused_and_takes_more_tiles_on_ascend(said):
    with assume_device("Ascend"):
        fused, composed = (InferenceEngine(model(**fields)) for fields in (HALF, {"compute_dtype": "bfloat16"}))
    tower = fused.model.vit.vision_tower.vision_model
    assert tower.is_flash
    assert fused.tiles_per_call == engine.ASCEND_TILES == 8
    assert not composed.model.vit.vision_tower.vision_model.is_flash
    assert composed.tiles_per_call == InferenceEngine(model(**HALF)).tiles_per_call == 5
    public = {"image_size": 560, "num_hidden_layers": 1}
    assert InferenceEngine(model(vision_config=public)).tiles_per_call == 1


def test_what_the_device_cannot_hold_is_refused_by_its_memory(said, monkeypatch):
    monkeypatch.setattr(engine, "device_memory", lambda: 1 << 30)
    monkeypatch.setattr(ms.runtime, "memory_allocated", lambda: 900 << 20)
    with assume_device("Ascend"):
        asked = InferenceEngine(model(**HALF))
        asked._check_memory(1, 4096)
        with pytest.raises(GenerationError, match="beside the weights this device has 0 GiB"):
            asked._check_memory(16, 49152)


def test_memory_of_the_device_is_its_own_or_what_mindspore_may_take(monkeypatch):
    assert ascend.device_memory() is None
    known = {"device_target": "Ascend", "device_id": 0, "max_device_memory": 1024.0}
    monkeypatch.setattr(ms, "get_context", known.get)
    properties = SimpleNamespace(total_memory=64 << 30)
    monkeypatch.setattr(ms.hal, "get_device_properties", lambda *_: properties)
    assert ascend.device_memory() == 64 << 30
    known["max_device_memory"] = 58.0
    assert ascend.device_memory() == 58 << 30
    properties.total_memory = 0        # the device is not in use yet
    assert ascend.device_memory() is None
