"""What this package replaces, sets or reads inside MindFormers and MindSpore is there and does what is leaned upon.

The table in docs/architecture.md names, for each of these places, the test that notices a change; here are those that
no test of the package's own behaviour would notice, or only one that takes minutes.
"""
from __future__ import annotations

import ctypes
import inspect
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import mindspore.common.dtype as mstype
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from mindspore.ops import operations as P

from mindformers_ixc.checkpoint import strategy_file
from mindformers_ixc.generation import ascend
from mindformers_ixc.models.dropout import SeededDropout

MINDSPORE = Path(ms.__file__).parent


def names_used(function) -> set[str]:
    """Names that a function looks up when it runs, in its module or on objects."""
    return set(inspect.unwrap(function).__code__.co_names)


def test_the_symbol_that_is_preloaded_is_asked_for_by_the_front_end():
    symbol = "_ZN9mindspore6device19GetDeviceNameByTypeERKNS0_10DeviceTypeE"
    assert hasattr(ctypes.CDLL(str(MINDSPORE / "lib" / "libmindspore_core.so")), symbol)
    front_end = next(MINDSPORE.rglob("libmindspore_frontend*.so*"))
    assert symbol.encode() in front_end.read_bytes()


def test_groups_are_made_and_asked_for_by_the_functions_that_are_replaced():
    import mindspore.communication._comm_helper as helper
    import mindspore.communication.management as management

    for function, name in ((management.create_group, "_create_group_helper"), (management.get_rank, "_get_rank_helper"),
                           (management.get_group_size, "_get_size_helper")):
        assert name in names_used(function)
        assert callable(getattr(helper, name)) and callable(getattr(management, name))


def test_operators_take_the_name_of_their_group_from_the_function_that_is_replaced(monkeypatch):
    from mindspore.ops.operations import comm_ops

    asked = []
    monkeypatch.setattr(comm_ops, "_get_group", lambda group: asked.append(group) or group)
    P.Broadcast(0, "some_group")
    assert asked and set(asked) == {"some_group"}


def test_the_step_is_compiled_before_loading_by_the_function_that_is_replaced():
    from mindformers.checkpoint.utils import compile_model
    from mindformers.trainer import utils as trainer_utils
    from mindformers.utils import load_checkpoint_utils

    parameters = list(inspect.signature(compile_model).parameters)
    assert parameters[:2] == ["model", "dataset"] and {"do_eval", "do_predict"} <= set(parameters)
    for module in (trainer_utils, load_checkpoint_utils):
        assert module.compile_model is compile_model
        callers = [value for value in vars(module).values() if inspect.isfunction(value)
                   and value.__module__ == module.__name__ and "compile_model" in names_used(value)]
        assert callers, module.__name__
    for name in ("_train_network", "_eval_network", "_predict_network"):
        assert name in inspect.getsource(ms.Model)


@pytest.mark.parametrize("loss", [1.0, float("nan")])
def test_the_monitor_counts_keeps_and_writes_where_the_safe_one_steps_in(tmp_path, monkeypatch, loss):
    from mindformers.core.callback.callback import CheckpointMonitor

    from mindformers_ixc.training.checkpoints import SafeCheckpointMonitor
    from mindformers_ixc.training.resume import checkpoints_in

    # a run that resumed after the third step of an epoch of four, and has done two since
    monitor = SafeCheckpointMonitor(prefix="t", directory=str(tmp_path), keep_checkpoint_max=1, save_checkpoint_steps=1,
                                    checkpoint_format="safetensors", integrated_save=True, async_save=False,
                                    append_info=[{"step_num": 3, "epoch_num": 1, "loss_scale": 1}])
    assert (monitor._append_step_num, monitor._last_triggered_step) == (3, 0)
    assert monitor._config.keep_checkpoint_max == monitor._config._keep_checkpoint_max == 1
    folder = Path(monitor._directory)
    folder.mkdir(parents=True)
    old, new = folder / "t_rank_0-1_3.safetensors", folder / "t_rank_0-2_1.safetensors"
    old.touch()
    write, seen = CheckpointMonitor.remove_redundancy, []

    def remove_redundancy(self, network, cur_file, *rest):
        seen.append((Path(cur_file).name, old.exists(), new.exists()))
        write(self, network, cur_file, *rest)

    monkeypatch.setattr(CheckpointMonitor, "remove_redundancy", remove_redundancy)
    network = nn.TrainOneStepCell(nn.Dense(2, 2), nn.SGD([Parameter(Tensor([1.0]), "w")]))
    outputs = (Tensor(np.float32(loss)), Tensor(False), Tensor(1.0), Tensor(np.float32(0.1)), None)
    cb_params = SimpleNamespace(net_outputs=outputs, cur_step_num=2, cur_epoch_num=1, batch_num=4, epoch_num=2,
                                train_network=network, network=network, optimizer=None, dataset_sink_mode=False)
    monitor.save_checkpoint(cb_params)
    assert (cb_params.cur_step_num, cb_params.cur_epoch_num, monitor._append_step_num) == (2, 1, 3)
    assert monitor._config._keep_checkpoint_max == 1
    if not np.isfinite(loss):
        assert checkpoints_in(folder) == [old] and not seen
        return
    assert seen == [(f"unfinished_{new.name}", True, False)]
    assert checkpoints_in(folder) == [new] and monitor._last_triggered_step == 2
    counters = ms.load_checkpoint(str(new), format="safetensors")
    assert (int(counters["step_num"].asnumpy()), int(counters["epoch_num"].asnumpy())) == (5, 2)


def test_the_trainer_takes_its_model_by_name_and_sorts_callbacks_apart():
    from mindformers.trainer import base_trainer
    from mindspore.train.callback import RunContext

    from mindformers_ixc.training.trainer import _Parameters, resumable_model

    assert base_trainer.Model is ms.Model
    assert {"Model", "sort_callbacks"} <= names_used(base_trainer.BaseTrainer.training_process)
    assert isinstance(inspect.getattr_static(base_trainer.BaseTrainer, "sort_callbacks"), staticmethod)
    assert RunContext(_Parameters(cur_step_num=0)).original_args().cur_step_num == 0
    with resumable_model():
        assert base_trainer.Model is not ms.Model
        named = list(inspect.signature(base_trainer.Model.train).parameters)[:len(TRAIN_ARGUMENTS)]
        assert named == TRAIN_ARGUMENTS == list(inspect.signature(ms.Model.train).parameters)[:len(TRAIN_ARGUMENTS)]
    assert base_trainer.Model is ms.Model


TRAIN_ARGUMENTS = ["self", "epoch", "train_dataset", "callbacks", "dataset_sink_mode", "sink_size", "initial_epoch"]


@pytest.mark.parametrize("ends_well", [True, False])
def test_callbacks_know_one_another_and_are_left_however_a_run_ends(ends_well):
    from mindspore.dataset import NumpySlicesDataset
    from mindspore.train import Model
    from mindspore.train.callback import Callback

    class Seen(Callback):
        others, left = (), "not yet"

        def on_train_begin(self, run_context):
            self.others = run_context.original_args().list_callback

        def on_train_end(self, run_context):
            if not ends_well:
                raise ValueError("no")

        def __exit__(self, *error):
            self.left = error[0]

    first, second = Seen(), Callback()
    model = Model(nn.Dense(2, 1))
    data = NumpySlicesDataset({"x": np.ones((1, 2), np.float32)}).batch(1)
    try:
        model.train(1, data, [first, second], dataset_sink_mode=False)
    except ValueError:
        assert not ends_well
    assert first in first.others and second in first.others
    assert first.left is (None if ends_well else ValueError)


def test_the_import_of_mindformers_registers_and_leaves_the_collector_as_it_was():
    code = ("import gc, sys, mindformers_ixc\n"
            "assert not {'mindspore', 'mindformers'} & set(sys.modules)\n"
            "import mindformers\n"
            "from mindformers.tools.register import MindFormerRegister\n"
            "assert MindFormerRegister.is_exist('models', 'IXC25ForCausalLM')\n"
            "assert gc.isenabled() and gc.get_freeze_count() > 0\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_tables_of_mindformers_are_those_that_it_reads():
    from mindformers.mindformer_book import MindFormerBook
    from mindformers.pet import pet_model
    from mindformers.pipeline.registry_constant import PIPELINE_REGISTRY
    from mindpet.graph.freeze_utils import DELTA_LIST

    for name in ("partial_lora", "task_lora"):
        assert name in pet_model.PET_TYPE_TO_MODEL_MAPPING and name in pet_model.PET_TYPE_TO_CONFIG_MAPPING
        assert name in DELTA_LIST
    assert "multimodal_chat" in MindFormerBook.get_pipeline_support_task_list()
    assert "multimodal_chat" in PIPELINE_REGISTRY.get_supported_tasks()


def test_a_cells_phase_is_told_to_every_cell_below_by_the_setter():
    from mindformers_ixc.generation.slots import InferenceGraph

    told = []

    class Below(nn.Cell):
        compile_phase = property(lambda self: self._compile_phase, lambda self, value: told.append(value))

    graph = InferenceGraph()
    graph.below = Below()
    for phase in ("a", "a", "b"):
        graph.compile_phase = phase
    assert told == ["a", "b"]
    assert graph.compile_phase == "b"
    assert "compile_phase" in {name for function in vars(nn.Cell).values() if inspect.isfunction(function)
                               for name in function.__code__.co_names} | names_used(
        ms.common.api._CellGraphExecutor.compile)


def test_lazy_inline_marks_a_cell_that_has_been_built():
    from mindformers_ixc.models.placement import share_graph

    cell = nn.Dense(2, 2)
    assert not cell.cell_init_args.startswith("lazy_inline")
    share_graph(cell)
    assert cell.cell_init_args.startswith("lazy_inline_Dense")


def test_datasets_keep_what_is_hung_on_them_and_know_their_shard():
    from mindformers.dataset.base_dataset import BaseDataset
    from mindformers.trainer.base_trainer import BaseTrainer
    from mindspore.dataset import GeneratorDataset

    dataset = GeneratorDataset([np.zeros(2), np.ones(2)], ["x"], shuffle=False).batch(1)
    steps = []
    dataset.set_init_step = steps.append
    dataset.set_init_step(1)
    assert steps == [1]
    assert "set_init_step" in names_used(BaseTrainer.training_process)
    assert BaseDataset._generate_shard_info() == (0, 1)


def test_a_parameter_says_whether_it_is_cut_already():
    parameter = Parameter(Tensor(np.zeros(4, np.float32)), name="x")
    assert parameter.sliced is False
    parameter.set_data(Tensor(np.ones(2, np.float32)), True)      # of another shape: a slice
    assert parameter.sliced is True and parameter.shape == (2,)
    parameter.sliced = False
    assert parameter.sliced is False


def test_ascends_attention_has_the_parts_that_are_used():
    from mindformers.modules.flash_attention import FlashAttention
    from mindformers.modules.paged_attention_mgr import PagedAttentionMgr

    manager = PagedAttentionMgr(2, 8, 2, (3, 16, 2, 8), compute_dtype=mstype.float16)
    assert manager.key_cache.shape == manager.value_cache.shape == (3, 16, 2, 8)
    assert callable(manager.paged_attn) and callable(manager.shard)
    flash = FlashAttention(2, scale_value=0.5, next_tokens=0, input_layout="BNSD", sparse_mode=2)
    over = FlashAttention(2, scale_value=0.5, input_layout="BSND", sparse_mode=0)
    for one in (flash, over):
        assert isinstance(one.flash_attention, P.nn_ops.FlashAttentionScore)


def test_inference_kernels_are_switched_on_as_mindformers_does_it(monkeypatch):
    from mindformers.core.context.build_context import MFContextOperator, MSContextOperator
    from mindspore.context import get_jit_config

    told: dict = {}
    MSContextOperator._set_predict_jit_config(SimpleNamespace(config={"run_mode": "predict"}), {}, told)
    assert told == {"jit_config": ascend.BOOST}
    environment: dict = {}
    monkeypatch.setattr(os, "environ", environment)
    made = SimpleNamespace(run_mode="predict", use_graceful_exit=False, _get_precision_env=dict,
                           config=SimpleNamespace(get_value=lambda _, default: default))
    MFContextOperator.set_env(made, use_past=True)
    assert ascend.ENVIRONMENT.items() <= environment.items()
    assert isinstance(get_jit_config(), dict)
    assert callable(ms.hal.get_device_properties)
    assert ms.runtime.memory_allocated() == 0


def test_the_rate_of_a_built_dropout_can_be_changed():
    cell = SeededDropout(0.9, 1000)
    assert cell.generated.dropout.keep_prob == pytest.approx(0.1)
    cell.set_rate(0.25)
    cell.set_train(True)
    kept = cell(Tensor(np.ones((100, 1000), np.float32)), None).asnumpy()
    assert (kept == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert kept.max() == pytest.approx(1 / 0.75)


def test_a_compiled_graph_can_be_read():
    from mindspore.common.api import _cell_graph_executor
    from mindspore.nn.wrap.cell_wrapper import _VirtualDatasetCell
    from mindspore.train.mind_ir_pb2 import ModelProto

    cell = _VirtualDatasetCell(nn.Dense(3, 2))
    _cell_graph_executor.compile(cell, Tensor(np.zeros((1, 3), np.float32)), phase="upstream", do_convert=False)
    graph, executor = ModelProto(), _cell_graph_executor._graph_executor
    graph.ParseFromString(executor.get_func_graph_proto(cell.current_phase, "mind_ir", True))
    assert {"Dense", "MatMul"} & {primitive.op_type for primitive in graph.primitives}
    assert isinstance(cell.parameter_layout_dict, dict)
    for message, fields in {"NodeProto": ("input", "output", "op_type", "attribute", "domain", "primal_attr"),
                            "PrimitiveProto": ("name", "op_type", "attribute", "instance_name"),
                            "ModelProto": ("graph", "functions", "primitives")}.items():
        module = sys.modules["mindspore.train.mind_ir_pb2"]
        assert set(fields) <= set(getattr(module, message).DESCRIPTOR.fields_by_name)


def test_sections_of_a_yaml_have_templates():
    from mindformers.tools.register.template import CONFIG_NAME_TO_CLASS

    assert {"general_config", "runner_config", "parallel_config", "train_dataset", "model"} <= set(CONFIG_NAME_TO_CLASS)
    assert CONFIG_NAME_TO_CLASS["runner_config"]._raise_error_for_unexpected_key is True
    assert {"epochs", "batch_size", "gradient_accumulation_steps"} <= set(CONFIG_NAME_TO_CLASS["runner_config"].keys())


def test_the_templates_are_the_same_without_mindformers():
    from mindformers.tools.register.template import CONFIG_NAME_TO_CLASS

    from mindformers_ixc.cli import templates

    def said(classes) -> dict:        # keys alone: a run in this process may have changed values
        return {name: (one._raise_error_for_unexpected_key, list(one.keys())) for name, one in classes.items()}

    read = templates._read()
    assert said(read) == said(CONFIG_NAME_TO_CLASS)
    assert read["runner_config"].epochs == CONFIG_NAME_TO_CLASS["runner_config"].epochs


def test_mindformers_logs_by_handlers_of_its_own_loggers():
    from mindformers_ixc.cli.inference import quiet_mindformers

    found = [handler for name in list(logging.root.manager.loggerDict) if name.startswith("mindformers")
             for handler in logging.getLogger(name).handlers]
    shown = [handler for handler in found if isinstance(handler, logging.StreamHandler)
             and not isinstance(handler, logging.FileHandler) and handler not in logging.root.handlers]
    assert shown
    levels = [handler.level for handler in found]
    try:
        quiet_mindformers()
        assert {handler.level for handler in shown} == {logging.ERROR}
        assert all(handler.level == level for handler, level in zip(found, levels)
                   if isinstance(handler, logging.FileHandler))
    finally:
        for handler, level in zip(found, levels):
            handler.setLevel(level)


def test_the_command_may_choose_mindformers_log_folder(tmp_path):
    code = "import mindformers.tools.logger"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={"LOG_MF_PATH": str(tmp_path / "log"), "GLOG_v": "3", "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "log").rglob("*.log"))


def test_strategy_files_have_the_numbers_of_mindspores_format():
    from mindspore.train import node_strategy_pb2 as proto

    def numbers(message: str) -> dict[str, int]:
        return {field.name: field.number for field in getattr(proto, message).DESCRIPTOR.fields}

    assert numbers("ParallelStrategyMap") == {"current_stage": strategy_file._STAGE,
                                              "parallel_strategy_item": strategy_file._ITEMS,
                                              "parallel_layout_item": strategy_file._LAYOUTS}
    assert list(numbers("ParallelStrategyItem").values()) == [strategy_file._NAME, strategy_file._CONTENT]
    assert list(numbers("ParallelLayoutItem").values()) == [strategy_file._NAME, strategy_file._CONTENT]
    assert list(numbers("ParallelStrategys").values()) == [strategy_file._OWN_STAGE, strategy_file._INPUT]
    assert list(numbers("DevMatrix").values()) == list(numbers("TensorMap").values()) == [strategy_file._DIM]
    layouts = numbers("ParallelLayouts")
    assert list(layouts) == ["dev_matrix", "tensor_map", "param_split_shape", "indices_offset", "field",
                             "opt_weight_shard_step", "opt_weight_shard_size"]
    assert list(layouts.values()) == [strategy_file._MATRIX, strategy_file._MAP, strategy_file._SPLIT,
                                      strategy_file._OFFSET, strategy_file._FIELD, strategy_file._STEP,
                                      strategy_file._SHARDS]


def test_the_trainer_asks_the_methods_that_are_overridden_in_their_order():
    from mindformers.trainer.base_trainer import BaseTrainer
    from mindformers.wrapper.wrapper import MFTrainOneStepCell

    source = inspect.getsource(BaseTrainer.training_process)
    order = [source.index(f"self.{name}(") for name in
             ("set_config", "create_train_dataset", "create_network", "create_optimizer_scheduler",
              "create_model_wrapper")]
    assert order == sorted(order)
    assert "real_model" in names_used(BaseTrainer.create_network)
    assert '"type"] == "CheckpointMonitor"' in source           # so the safe one has to go by that name
    assert {"start_overflow_check", "get_overflow_status", "process_loss_scale", "grad_reducer",
            "clip_grad_norm"} <= names_used(MFTrainOneStepCell.construct)
