"""Memory by formula: state against numbers counted by hand, activations against the tensors they stand for."""
from __future__ import annotations

import pytest
from planned import recipe, workload

from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.parallel.degrees import Degrees
from mindformers_ixc.planning.memory import _Sizes, activation_terms, stage_memory
from mindformers_ixc.planning.workload import local_parameters, read_workload

# Numbers a device of tensor parallel 8 holds of the 7B model without task LoRAs, counted by hand.
DECODER_LAYER = (6144 * 4096 + 4096 * 4096 + 3 * 14336 * 4096) // 8 + 2 * 4096
LOW_RANK_OF_LAYER = (3 * 256 * 4096 + (6144 + 2 * 14336) * 256 // 8      # whole A and rows of B: wqkv, w1, w3
                     + 256 * (4096 + 14336) // 8 + 2 * 4096 * 256)       # columns of A and whole B: wo, w2
VISION_LAYER = 12 * 1024 * 1024 // 8 + (3 * 1024 + 4096) // 8 + 6 * 1024
VISION_REST = 1024 + 1024 * 588 + 1601 * 1024 + 2 * 1024
PROJECTOR = 2 * 4096 * 4096 // 8 + 4096 // 8 + 4096 + 2 * 4096           # and the separators
TENSOR_PARALLEL_8 = (2 * 92544 * 4096 // 8 + 32 * (DECODER_LAYER + LOW_RANK_OF_LAYER) + 4096 + 24 * VISION_LAYER
                     + VISION_REST + PROJECTOR)


def memory_of(fields: dict, layout: Degrees, stage: int = 0):
    placed = workload(fields, layout)
    return stage_memory(placed, stage, local_parameters(placed)[stage])


def terms_of(fields: dict, layout: Degrees, stage: int = 0) -> dict:
    placed = workload(fields, layout)
    return activation_terms(placed, stage, local_parameters(placed)[stage])


def test_state_of_the_7b_model_under_tensor_parallel_8():
    memory = memory_of(recipe("sft", parallel__enable_parallel_optimizer=False), Degrees(1, 8))
    assert TENSOR_PARALLEL_8 == 1_234_114_048
    assert memory.parameters == memory.gradients == 4 * TENSOR_PARALLEL_8
    assert memory.optimizer == 8 * TENSOR_PARALLEL_8


def test_optimizer_sharding_leaves_each_of_8_replicas_an_eighth():
    memory = memory_of(recipe("sft"), Degrees(8, 1, 1, 4))
    # 8.680 B numbers of 4 bytes; what is small or does not divide stays whole
    assert memory.parameters == pytest.approx(8.680e9 * 4 / 8, rel=0.01)
    assert memory.optimizer == 2 * memory.parameters
    # accumulated gradients are not spread unless that is asked for
    assert memory.gradients == pytest.approx(8.680e9 * 4, rel=0.01)
    spread = memory_of(recipe("sft", parallel__parallel_optimizer_config={"gradient_accumulation_shard": True}),
                       Degrees(8, 1, 1, 4))
    assert spread.gradients == spread.parameters


def test_frozen_parts_have_neither_gradients_nor_moments():
    memory = memory_of(recipe("sft", train_parts=["projector"]), Degrees(1, 1))
    assert memory.gradients == 4 * (2 * 4096 * 4096 + 2 * 4096)
    assert memory.optimizer == 2 * memory.gradients


def test_every_parameter_is_on_one_stage_and_its_slices_are_the_whole():
    placed = workload(recipe("sft"), Degrees(2, 2, 4, 4))
    by_stage = local_parameters(placed)
    names = [parameter.name for own in by_stage for parameter in own]
    assert len(names) == len(set(names)) == 942
    for own in by_stage:
        for parameter in own:
            whole = 1
            for length in parameter.shape:
                whole *= length
            assert parameter.size * parameter.slices == whole, parameter.name
    assert {parameter.name for parameter in by_stage[0]} >= {"model.tok_embeddings.weight", "plora_sub_GN"}
    assert {parameter.name for parameter in by_stage[3]} >= {"model.norm.weight", "output.weight"}


def test_unused_task_loras_are_not_in_the_graph():
    fields = recipe("sft", model__model_config__task_lora_ranks={"sft": 256, "dpo": 256, "web": 512})
    names = {parameter.name for parameter in local_parameters(workload(fields, Degrees()))[0]}
    assert not any(".lora_" in name for name in names)
    assert not any("post_layernorm" in name for name in names)


@pytest.mark.parametrize(("chunk", "positions"), [(4096, 4096), (10 ** 6, 8192)])
def test_logits_are_those_of_a_chunk_and_cut_by_tensor_parallel(chunk, positions):
    # compute dtype twice (logits and gradient), float32 four times; small layers, so that the logits are the largest
    fields = recipe("sft", recompute_config__recompute=True, model__model_config__use_flash_attention=True,
                    model__model_config__loss_chunk=chunk, model__model_config__intermediate_size=64,
                    model__model_config__plora_rank=0, model__model_config__max_tiles=1)
    for degree in (1, 4):
        terms = terms_of(fields, Degrees(1, degree))
        assert terms["at work: logits and loss"] == positions * 92544 * (2 * 2 + 4 * 4) / degree


def test_the_chunk_is_a_quarter_of_the_logits_at_the_most():
    whole, chunks = (_logits(recipe("sft", model__model_config__loss_chunk=chunk)) for chunk in (8192, 1024))
    assert whole == 8192 * 92544 * (2 * 2 + 4 * 4) / 8 and chunks == whole / 8


def _logits(fields: dict) -> float:
    return _Sizes(workload(fields, Degrees(1, 8))).logits()


def test_packed_rows_need_no_mask_of_their_own_on_ascend():
    fused = {"model__model_config__use_flash_attention": True, "model__model_config__packing": True}
    assert terms_of(recipe("sft", **fused), Degrees(1, 8))["causal mask"] == 2048 ** 2
    composed = recipe("sft", model__model_config__packing=True)
    assert terms_of(composed, Degrees(1, 8))["causal mask"] == 8192 ** 2 * 4


def test_tiles_travel_as_bytes_and_global_views_as_numbers():
    columns = ["input_ids", "labels", "pixel_values", "global_views", "view_index", "vision_index", "image_mask",
               "position_ids", "segment_ends", "noise_seed", "source"]
    fields = recipe("sft", train_dataset__input_columns=columns, model__model_config__max_images=5,
                    model__model_config__max_segments=16)
    bytes_of_a_row = (19 * 3 * 560 ** 2 + 5 * 3 * 560 ** 2 * 4                # tiles, global views
                      + 4 * (4 * 8192 + 19 + 8192 + 16 + 1 + 8192))           # texts, views, segments, seed, source
    assert terms_of(fields, Degrees(1, 8, 1, 2))["inputs of the step"] == 2 * bytes_of_a_row


def test_a_pair_has_two_texts_and_one_set_of_pictures():
    fields = recipe("dpo", parallel__full_batch=True, train_dataset__input_columns=[
        "input_ids", "labels", "pixel_values", "global_views", "view_index", "vision_index", "image_mask",
        "reference_logps"], model__model_config__max_images=2)
    config = read_workload(fields).config
    tiles, length = config.max_tiles, config.seq_length
    assert terms_of(fields, Degrees(1, 8))["inputs of the step"] == (
        tiles * 3 * 560 ** 2 + 2 * 3 * 560 ** 2 * 4 + 4 * (2 * 4 * length + tiles + 2))


def test_a_step_with_a_reference_keeps_the_losses_of_the_policy_not_its_logits():
    fields = recipe("dpo", train_dataset__input_columns=list(BATCH_COLUMNS))
    config = read_workload(fields).config
    terms = terms_of(fields, Degrees(1, 8))
    assert terms["losses of the policy"] == 2 * 4 * 2 * config.seq_length
    assert "logits of the policy" not in terms


def test_recomputed_layers_keep_their_inputs_only():
    terms = terms_of(recipe("sft"), Degrees(1, 8))
    assert terms["layer inputs"] == 32 * 8192 * 4096 * 2
    assert "attention scores" not in terms and "feed-forward" not in terms
    assert terms["vision layer inputs"] == 24 * 19 * 1601 * 1024 * 2


def test_composed_attention_keeps_its_scores_and_the_fused_one_does_not():
    plain = recipe("sft", recompute_config__recompute=False)
    scores = terms_of(plain, Degrees(1, 8))["attention scores"]
    # 4 heads a device, float32 softmax and its bfloat16 copy, 32 layers
    assert scores == 32 * 4 * 8192 ** 2 * (4 + 2)
    fused = terms_of(recipe("sft", recompute_config__recompute=False, model__model_config__use_flash_attention=True),
                     Degrees(1, 8))
    assert fused["attention scores"] == 32 * 4 * 8192 * 64
    selected = terms_of(recipe("sft", recompute_config__recompute=False, recompute_config__select_recompute=True),
                        Degrees(1, 8))
    assert "attention scores" not in selected
    assert selected["feed-forward"] < terms_of(plain, Degrees(1, 8))["feed-forward"]


def test_sequence_parallel_divides_what_lies_between_the_linears():
    whole = terms_of(recipe("sft"), Degrees(1, 8))
    cut = terms_of(recipe("sft", parallel_config__use_seq_parallel=True), Degrees(1, 8))
    assert cut["layer inputs"] == whole["layer inputs"] / 8


def test_earlier_stages_hold_more_micro_batches():
    inputs = [terms_of(recipe("sft"), Degrees(1, 1, 4, 8), stage)["layer inputs"] for stage in range(4)]
    one = 8 * 8192 * 4096 * 2        # 8 layers a stage
    assert inputs == [4 * one, 3 * one, 2 * one, one]


def test_a_frozen_vision_tower_keeps_nothing():
    terms = terms_of(recipe("sft", train_parts=["language"]), Degrees(1, 8))
    assert "vision layer inputs" not in terms and "projector" not in terms


def test_every_device_gets_the_whole_batch_with_full_batch():
    whole = terms_of(recipe("sft"), Degrees(4, 2, 1, 2))["inputs of the step"]
    own = terms_of(recipe("sft", parallel__full_batch=False), Degrees(4, 2, 1, 2))["inputs of the step"]
    assert whole == 4 * own == 8 * (19 * 3 * 560 * 560 * 4 + 4 * 8192 * 4)


def test_the_update_counts_when_there_are_few_activations():
    terms = terms_of(recipe("sft", model__model_config__seq_length=64, model__model_config__max_tiles=1),
                     Degrees(1, 8, 1, 2))
    assert set(terms) == {"inputs of the step", "unscaled gradients"}


def test_sharded_weights_are_gathered_in_the_dtype_of_their_products():
    placed = workload(recipe("sft"), Degrees(2, 4, 1, 32))
    matrices = [own for own in local_parameters(placed)[0] if len(own.shape) > 1]
    table = next(own for own in matrices if own.name == "model.tok_embeddings.weight")
    gathered = [own for own in matrices if own.optimizer_shards > 1]
    assert table in gathered and sum(own.used_size for own in gathered) > 0.99 * sum(own.used_size for own in matrices)
    expected = 2 * (sum(own.used_size for own in gathered) + table.used_size)       # bfloat16, the embedding float32
    found = terms_of(recipe("sft"), Degrees(2, 4, 1, 32))["gathered and cast weights"]
    assert found == pytest.approx(expected, rel=1e-3)


def test_weights_are_gathered_again_only_where_no_graph_is_shared():
    again = {"recompute_config__parallel_optimizer_comm_recompute": True}
    kept = terms_of(recipe("sft"), Degrees(2, 4, 1, 32))["gathered and cast weights"]
    assert terms_of(recipe("sft", **again), Degrees(2, 4, 1, 32))["gathered and cast weights"] == kept
    alone = recipe("sft", model__model_config__disable_lazy_inline=True, **again)
    assert terms_of(alone, Degrees(2, 4, 1, 32))["gathered and cast weights"] < 0.3 * kept
