"""Compiles the inference graphs with Ascend's leaf cells, front end only, without a device.

    python scripts/compile_ascend.py            # the 7B model's heads in small layers, seconds
    python scripts/compile_ascend.py --config DIR_WITH_CONFIG_JSON
    python scripts/compile_ascend.py --public   # the 7B model's sizes; nothing of it is allocated
    python scripts/compile_ascend.py --tensor 2 --stages 2      # each stage of a parallel layout
    python scripts/compile_ascend.py --bits 4   # quantised weights, of 4 or 8 bits
    python scripts/compile_ascend.py --serving  # what a server has: pieces of prompts, steps of 1, 2, 4 and 8 rows

MindSpore's simulation stops behind the front end, so neither Ascend's package nor weights are needed. The script fails
unless the ViT's graph holds flash attention, the prefill graph and pieces that and the write to the paged cache, the
decode graph and steps paged attention, and all of these the fused RMSNorm; with --bits every one the product with
quantised weights; and when one of them breaks what is documented of it (ascend_rules.py).
"""
from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter

os.environ["MS_SIMULATION_LEVEL"] = "0"   # read while MindSpore is imported

import ascend_rules
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.common.api import _cell_graph_executor
from mindspore.train.mind_ir_pb2 import ModelProto

import mindformers_ixc  # noqa: F401 - registers the model
from mindformers_ixc.checkpoint.quantise import kind_of
from mindformers_ixc.checkpoint.quantised import OWN, Quantization
from mindformers_ixc.config import read_config
from mindformers_ixc.cpu_cluster.build import preload_environment
from mindformers_ixc.cpu_cluster.groups import simulate
from mindformers_ixc.device import assume_device, share_results
from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.generation.engine import InferenceEngine, bucket
from mindformers_ixc.generation.paged_batching import PagedBatchDecoder
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.stored_ascend import hold_on_ascend
from mindformers_ixc.parallel.degrees import Degrees, inference_layout

PROMPT, TOKEN = {"FlashAttentionScore", "ReshapeAndCache", "RmsNorm"}, {"PagedAttention", "ReshapeAndCache", "RmsNorm"}

# What graphs must hold, by the first word of their names.
NEEDED = {"ViT": {"FlashAttentionScore"}, "prefill": PROMPT, "decode": TOKEN, "piece": PROMPT, "step": TOKEN,
          "copy": {"ReshapeAndCache"}}

QUANTISED = "WeightQuantBatchMatmul"

MESSAGES = ("AllReduce", "AllGather", "ReduceScatter", "AlltoAll", "Broadcast", "Send", "Receive")

BROKEN = "broken rules"

PRELOADED = "COMPILE_ASCEND_PRELOADED"

# Few and narrow layers, but the 7B model's heads: 32 of 128 for 8 of keys and values, 16 of 64 in the tower.
TINY = {"vocab_size": 512, "hidden_size": 4096, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 32, "num_key_value_heads": 8, "plora_rank": 4, "task_lora_ranks": {"web": 4},
        "vision_config": {"image_size": 56, "hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16,
                          "intermediate_size": 32}}


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config", metavar="DIR", help="model directory whose config.json gives the sizes")
    parser.add_argument("--public", action="store_true", help="the 7B model's sizes")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel devices of a stage")
    parser.add_argument("--stages", type=int, default=1, help="pipeline stages")
    parser.add_argument("--bits", type=int, choices=[4, 8], help="of quantised weights, in one process")
    parser.add_argument("--serving", action="store_true", help="the graphs of a server, of one stage")
    parser.add_argument("--positions", type=int, default=16384, help="of a server's answers, prompt included")
    parser.add_argument("--piece", type=int, default=128, help="positions of a piece of a server's prompts")
    parser.add_argument("--rank", type=int, default=0, help="rank whose graphs are compiled")
    parser.add_argument("--rows", type=int, help="prompts of a batch (default 2), answers of a server at once (8)")
    parser.add_argument("--prompt", type=int, nargs="+", default=[100], help="positions of the prompts, one after "
                        "the other")
    parser.add_argument("--new", type=int, default=50, help="new tokens")
    arguments = parser.parse_args()
    if arguments.bits and arguments.tensor * arguments.stages > 1:
        parser.error("--bits is for one process")
    if arguments.serving and arguments.stages > 1:
        parser.error("--serving is for one stage")
    return arguments


def join_cluster(tensor: int, stages: int, rank: int) -> dict:
    """Makes this process a rank of a cluster that is not there; starts it again if it lacks what that takes.

    Returns:
        The fields of the model's configuration that say so.
    """
    if tensor * stages == 1:
        return {}
    variables = preload_environment(simulated=True)
    if os.environ.get(PRELOADED) is None:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **variables, PRELOADED: "1"})
    ms.set_device("CPU")
    simulate(rank, tensor * stages)
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", device_num=tensor * stages, global_rank=rank,
                                 full_batch=True, pipeline_stages=stages)
    share_results()
    return {"parallel_config": inference_layout(Degrees(1, tensor, stages))}


def operations(graph, *inputs, phase: str) -> Counter:
    """Compiles a graph and counts the primitives in it; shows what a rank sends, its largest tensor, broken rules."""
    start = time.perf_counter()
    _cell_graph_executor.compile(graph, *inputs, phase=phase, do_convert=False)
    proto = _cell_graph_executor._graph_executor.get_func_graph_proto(graph.current_phase, "mind_ir", True)
    model = ModelProto()
    model.ParseFromString(proto)
    found = Counter(ascend_rules.kind(node) for part in (model.graph, *model.functions) for node in part.node)
    found[BROKEN] = len(broken := ascend_rules.broken(ascend_rules.operators(model)))
    print(*broken, sep="\n", end="\n" if broken else "")
    largest = max(ascend_rules.tensors(model), key=math.prod)
    messages = ", ".join(f"{found[name]} {name}" for name in MESSAGES if found[name]) or "none"
    print(f"{phase}: compiled in {time.perf_counter() - start:.1f} s; largest tensor: {largest}; messages: {messages}",
          flush=True)
    return found


def compile_vision(engine: InferenceEngine) -> Counter:
    """Primitives of the graph of as many tiles as it takes at once."""
    side = engine.config.vision_config.image_size
    tiles = Tensor(np.zeros((1, engine.tiles_per_call, 3, side, side), np.float32))
    return operations(engine.vision, tiles, phase="ViT")


def compile_graphs(engine: InferenceEngine, prompt: int, new: int, rows: int) -> dict[str, Counter]:
    """Primitives of the prefill and decode graph of a batch."""
    config, positions = engine.config, bucket(prompt)
    slot = engine.slot(rows, bucket(prompt + new), "base")
    print(f"caches: {type(slot).__name__} of {slot.bytes / 2**20:.1f} MiB for {rows} x {positions} positions")
    lengths, size = np.full(rows, prompt, np.int32), config.head_size
    ids = Tensor(np.zeros((rows, positions), np.int32))
    embeds = Tensor(np.zeros((rows, positions, config.hidden_size), np.float32))   # the graph casts
    tables = Tensor(np.zeros((rows, positions, 1, 1, size), np.float32))
    prefill, decode = slot.graphs["base"]
    found = {"prefill": operations(prefill, ids, embeds, ids, tables, tables, Tensor(slot.start(lengths, positions)),
                                   Tensor(lengths - 1), phase="prefill")}
    tables = Tensor(np.zeros((rows, 1, config.query_groups + 2, size), np.float32))
    places = [Tensor(value) for value in slot.places(lengths)]
    found["decode"] = operations(decode, Tensor(lengths[:, None]), tables, tables, *places, phase="decode")
    return found


def compile_serving(engine: InferenceEngine, rows: int, positions: int, piece: int) -> dict[str, Counter]:
    """Primitives of the graphs of pieces of prompts, with pictures and without, of steps, and of a block's copy."""
    config, decoder, found = engine.config, PagedBatchDecoder(engine, rows, positions, piece), {}
    print(f"caches: {decoder.pool.count} blocks of {config.block_size} positions, {decoder.bytes / 2**20:.1f} MiB")
    ids, table = np.zeros((1, piece), np.int32), np.zeros((1, piece, config.head_size), np.float32)
    embeds = Tensor(np.zeros((1, piece, config.hidden_size), np.float32))
    for reach in decoder.reaches:
        for images, what in (((embeds, ids), "with pictures"), (None, "of text")):
            graph, = decoder.piece_graphs("base", piece, images is not None)
            inputs = graph.inputs(ids, (table, table), np.array([reach - piece]), np.array([piece]), images,
                                  np.array([piece - 1]), (np.zeros(reach // config.block_size, np.int32),))
            phase = f"piece {what} up to {reach}"
            found[phase] = operations(graph, *inputs, phase=phase)
    for count in decoder.sizes:
        ids = np.zeros(count, np.int32)
        table = np.zeros((count, 1, config.query_groups + 2, config.head_size), np.float32)
        tables = np.zeros((count, decoder.reaches[-1] // config.block_size), np.int32)
        found[f"step {count}"] = operations(decoder.step_graph("base", count),
                                            *map(Tensor, (ids[:, None], table, table, ids, tables, ids)),
                                            phase=f"step {count}")
    found["copy"] = operations(decoder.copy_graph, Tensor(np.zeros(1, np.int32)),
                               Tensor(np.zeros(config.block_size, np.int32)), phase="copy")
    return found


def hold_quantised(model: IXC25ForCausalLM, bits: int) -> None:
    """Gives a model the cells that it has when its weights are quantised."""
    names = [parameter.name for parameter in model.get_parameters()]
    kinds = {name: kind_of(name, model.config, Quantization(OWN, bits, "BF16")) for name in names}
    stems = {name[:-len(".weight")]: kind for name, kind in kinds.items() if kind is not None}
    held = hold_on_ascend(model, stems, model.config.compute_dtype)
    print(f"{len(held)} weights of 4 and 8 bits; full instead: {', '.join(sorted(stems.keys() - held.keys()))}")


def problems(found: dict[str, Counter], further: set[str]) -> dict[str, list[str]]:
    """What each graph lacks of what it needs, something `further` too, and whether it breaks a rule."""
    wrong = {}
    for phase, counts in found.items():
        needed = NEEDED[phase.split()[0]] | (further if phase != "copy" else set())
        wrong[phase] = sorted(needed - counts.keys()) + [BROKEN] * bool(counts[BROKEN])
    return {phase: names for phase, names in wrong.items() if names}


def main() -> int:
    """Compiles and checks; 1 when a fused operation is missing or breaks a rule."""
    arguments = parse()
    ms.set_context(mode=ms.GRAPH_MODE)
    fields = {"compute_dtype": "bfloat16", "param_init_type": "bfloat16", "use_past": True,
              **join_cluster(arguments.tensor, arguments.stages, arguments.rank)}
    if arguments.config:
        config = read_config(arguments.config, IXC25Config, **fields)
    else:
        config = IXC25Config(**fields, **({} if arguments.public else TINY))
    wrong: dict[str, list[str]] = {}
    further = {QUANTISED} if arguments.bits else set()
    with assume_device("Ascend"), nn.no_init_parameters():
        model = IXC25ForCausalLM(config)
        model.set_train(False)
        if arguments.bits:
            hold_quantised(model, arguments.bits)
        engine = InferenceEngine(model)
        if arguments.rank < arguments.tensor and not arguments.serving:     # the first stage has the tower
            wrong |= problems({"ViT": compile_vision(engine)}, further)
        if arguments.serving:
            served = compile_serving(engine, arguments.rows or 8, arguments.positions, arguments.piece)
            wrong |= problems(served, further)
        for prompt in [] if arguments.serving else arguments.prompt:
            wrong |= problems(compile_graphs(engine, prompt, arguments.new, arguments.rows or 2), further)
    print(f"missing: {wrong}" if wrong else "all fused operations are there and keep the rules")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
