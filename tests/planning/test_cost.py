"""Time by formula: rings, products, pipelines, against numbers counted by hand."""
from __future__ import annotations

import dataclasses

import pytest
from planned import recipe, workload

from mindformers_ixc.parallel.degrees import Degrees
from mindformers_ixc.planning.cost import Assumptions, Traffic, stage_traffic, stage_work, step_time
from mindformers_ixc.planning.rows import RowMeans
from mindformers_ixc.planning.workload import local_parameters

ROUND = Assumptions(tflops=100, utilisation=0.5, server_bandwidth=100, network_bandwidth=10, latency=0)


def traffic_of(fields: dict, layout: Degrees, stage: int = 0) -> dict:
    placed = workload(fields, layout)
    return {(one.purpose, one.operator, one.group): one
            for one in stage_traffic(placed, stage, local_parameters(placed)[stage])}


@pytest.mark.parametrize(("operator", "size", "seconds"), [
    ("AllReduce", 8e9, 2 * 7 / 8 * 8e9 / 100e9), ("ReduceScatter", 8e9, 7 / 8 * 8e9 / 100e9),
    ("AllGather", 1e9, 7 / 8 * 8e9 / 100e9), ("Send", 1e9, 0.01), ("AlltoAll", 8e9, 7 / 8 * 8e9 / 100e9)])
def test_messages_in_a_server(operator, size, seconds):
    one = Traffic("forward", operator, size, 1, tuple(range(8)))
    assert one.seconds(ROUND) == pytest.approx(seconds)


def test_a_group_over_two_servers_takes_the_network():
    inside, across = (Traffic("gradient", "AllReduce", 1e9, 1, group, True) for group in ((0, 7), (7, 8)))
    assert across.seconds(ROUND) == pytest.approx(10 * inside.seconds(ROUND))


def test_a_group_of_one_sends_nothing():
    assert Traffic("forward", "AllReduce", 1e9, 4, (3,)).seconds(ROUND) == 0


def test_latency_counts_for_every_message_of_a_micro_batch_and_once_for_gradients():
    slow = Assumptions(latency=1.0)
    assert Traffic("forward", "Send", 0, 5, (0, 1)).seconds(slow) == 5
    assert Traffic("gradient", "AllReduce", 0, 5, (0, 1), per_step=True).seconds(slow) == 1


def test_products_of_the_language_model():
    placed = workload(recipe("sft", model__model_config__plora_rank=0), Degrees(1, 1, 32, 32))
    work = stage_work(placed, 5, local_parameters(placed)[5])          # one decoder layer alone
    linears = 6144 * 4096 + 4096 * 4096 + 3 * 14336 * 4096
    forward = 2 * 8192 * linears + 4 * 8192 ** 2 * 4096
    assert (work.forward, work.backward, work.again) == (forward, 2 * forward, forward)


def test_a_frozen_layer_has_no_gradient_of_its_weights():
    fields = recipe("sft", model__model_config__plora_rank=0, train_parts=["vision"],
                    model__model_config__use_flash_attention=True, recompute_config__recompute=False)
    placed = workload(fields, Degrees(1, 1, 32, 32))
    work = stage_work(placed, 5, local_parameters(placed)[5])
    products = 2 * 8192 * (6144 * 4096 + 4096 * 4096 + 3 * 14336 * 4096)
    attention = 4 * 8192 ** 2 * 4096 / 2                               # the masked half is left out
    assert work.forward == products + attention
    assert work.backward == products + 2.5 * attention
    assert work.again == 0


def test_packed_samples_see_only_themselves():
    fields = recipe("sft", model__model_config__plora_rank=0, model__model_config__use_flash_attention=True,
                    recompute_config__recompute=False, model__model_config__packing=True)
    placed = workload(fields, Degrees(1, 1, 32, 32))
    products = 2 * 8192 * (6144 * 4096 + 4096 * 4096 + 3 * 14336 * 4096)
    squares = {None: 8192 ** 2, RowMeans(4.0): 8192 ** 2 / 4, RowMeans(4.0, 8000.0, 12.0, squares=1e7): 1e7}
    for rows, square in squares.items():
        known = dataclasses.replace(placed, rows=rows)
        work = stage_work(known, 5, local_parameters(known)[5])
        assert work.forward == products + 4 * square * 4096 / 2
        assert work.backward == 2 * products + 2.5 * 4 * square * 4096 / 2


def test_unpacked_rows_compute_their_whole_square():
    rows = RowMeans(1.0, 3000.0, 6.0, squares=1e6)
    plain = workload(recipe("sft", model__model_config__use_flash_attention=True), Degrees(1, 1, 32, 32))
    known = dataclasses.replace(plain, rows=rows)
    assert stage_work(known, 5, local_parameters(known)[5]) == stage_work(plain, 5, local_parameters(plain)[5])


def test_the_head_is_computed_again_for_the_gradients_of_its_chunks():
    fields = recipe("sft", recompute_config__recompute=False, model__model_config__use_flash_attention=True)
    placed = workload(fields, Degrees(1, 1, 32, 32))
    assert stage_work(placed, 31, local_parameters(placed)[31]).again == 2 * 8192 * 92544 * 4096


def test_whole_low_rank_sides_are_computed_by_every_device():
    alone, cut = (workload(recipe("sft"), Degrees(1, degree)) for degree in (1, 8))
    one, eighth = (stage_work(placed, 0, local_parameters(placed)[0]).forward for placed in (alone, cut))
    assert one / 8 < eighth < one / 7


def test_a_tensor_parallel_step_sums_twice_a_layer_and_its_gradients_do_too():
    found = traffic_of(recipe("sft", recompute_config__recompute=False), Degrees(1, 8))
    group = tuple(range(8))
    wide, narrow = 8192 * 4096 * 2, 8192 * 256 * 2
    tower, table, rows = 19 * 1601 * 1024 * 2, 8192 * 4096 * 4, 7602 * 4096 * 2
    expected = 32 * 2 * (wide + narrow) + 24 * 2 * tower + table + rows
    # and those of the loss, in the forward pass maximum and sum of a chunk twice
    assert found["backward", "AllReduce", group].bytes == expected + 2 * 8192 * 4
    assert found["forward", "AllReduce", group].bytes == expected + 5 * 8192 * 4


def test_sums_of_the_tower_are_done_again_only_if_that_is_asked_for():
    group, tower = tuple(range(8)), 24 * 2 * 19 * 1601 * 1024 * 2
    asked = {again: traffic_of(recipe("sft", recompute_config__mp_comm_recompute=again), Degrees(1, 8))
             for again in (True, False)}
    more = asked[True]["forward", "AllReduce", group].bytes - asked[False]["forward", "AllReduce", group].bytes
    wide, narrow = 8192 * 4096 * 2, 8192 * 256 * 2
    assert more == tower / 2 + 32 * (wide + 2 * narrow)


def test_sequence_parallel_sends_as_much_in_other_operators():
    layout = Degrees(1, 8)
    cut = traffic_of(recipe("sft", parallel_config__use_seq_parallel=True), layout)
    whole = traffic_of(recipe("sft"), layout)
    seconds = [sum(one.seconds(ROUND) for one in found.values()) for found in (cut, whole)]
    assert seconds[0] == pytest.approx(seconds[1], rel=0.15)
    assert ("layout_change", "AllGather", tuple(range(8))) in cut
    assert not any(purpose == "layout_change" for purpose, *_ in whole)


def test_gradients_are_summed_over_the_devices_that_hold_a_copy():
    found = traffic_of(recipe("sft", parallel__enable_parallel_optimizer=False), Degrees(4, 2))
    replicas, stage = (0, 2, 4, 6), tuple(range(8))
    assert {key[2] for key in found if key[0] == "gradient"} == {replicas, stage}
    sharded = traffic_of(recipe("sft"), Degrees(4, 2))
    assert ("optimizer", "AllGather", replicas) in sharded
    scattered = sharded["gradient", "ReduceScatter", replicas]
    assert scattered.bytes + sharded["gradient", "AllReduce", replicas].bytes \
        == found["gradient", "AllReduce", replicas].bytes
    # gathered in bfloat16, scattered in float32
    assert sharded["optimizer", "AllGather", replicas].bytes * 4 * 2 == pytest.approx(scattered.bytes, rel=0.1)


def test_stages_send_activations_on_and_gradients_back():
    found = traffic_of(recipe("sft"), Degrees(1, 2, 4, 8), stage=1)
    size = 8 * 8192 * 4096 * 2
    assert found["pipeline", "Send", (2, 4)].bytes == found["pipeline", "Receive", (2, 4)].bytes == size
    assert found["pipeline", "Send", (0, 2)].bytes == size


def test_equal_stages_have_the_bubble_of_the_book():
    fields = recipe("sft", train_parts=["language"], model__model_config__vision_config__num_hidden_layers=1,
                    model__model_config__plora_rank=0, model__model_config__max_tiles=1)
    placed = workload(fields, Degrees(1, 1, 4, 16))
    parameters = local_parameters(placed)
    free = [[] for _ in parameters]
    time = step_time(placed, ROUND, parameters, free)
    # three stages' worth more than the sixteen micro batches, were all stages as slow as the slowest
    assert time.bubble == pytest.approx(time.compute * 3 / 16, rel=0.25)
    assert time.total == time.compute + time.bubble
    assert 0.5 < time.efficiency < 1
