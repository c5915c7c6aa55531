import pytest

from ternlm.config import ModelConfig, config_from_dict
from ternlm.config.layout import Layout
from ternlm.planner.step_traffic import parameters, step_traffic
from ternlm.planner.traffic import Traffic, add_up, axis_ranks, lie_on_several_nodes, world_axis


def sent(operation, ranks, payload):
    return Traffic(operation, "shard", ranks, False, payload).sent_bytes


def internlm(preset="internlm-7b", **sections):
    table = {
        "model": {"preset": preset},
        "data": {"seq_len": 2048, "sources": [{"name": "en", "path": "en"}]},
        "batch": {"global_sequences": 2048},
        "train": {"steps": 1},
        "compute": {"dtype": "bfloat16"},
    }
    return config_from_dict({**table, **sections})


def test_a_ring_sends_all_but_its_own_part_and_an_all_reduce_does_so_twice():
    assert sent("all_gather", 4, 400) == 300
    assert sent("reduce_scatter", 4, 400) == 300
    assert sent("all_to_all", 4, 400) == 300
    assert sent("all_reduce", 4, 400) == 600
    assert sent("send", 2, 400) == 400
    assert sent("recv", 2, 400) == 0


def test_traffic_of_one_kind_adds_up():
    one = Traffic("all_reduce", "shard", 8, False, 10)
    assert add_up([one, Traffic("send", "pipeline", 2, True, 1), one]) == [
        Traffic("all_reduce", "shard", 8, False, 20, 2),
        Traffic("send", "pipeline", 2, True, 1),
    ]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(world=48, pipeline=2, context=2, tensor=3, params=1, grads=2, optimizer=4),
        Layout(world=16, params=4, grads=4, optimizer=16),
        Layout(world=8, pipeline=2, tensor=2, optimizer=2),
    ],
)
def test_the_groups_of_each_axis_partition_the_ranks_and_multiply_to_all(layout):
    sizes = {"tensor": layout.tensor, "context": layout.context, "shard": layout.shard, "across": layout.across}
    sizes |= {"replicas": layout.data_ranks // layout.optimizer, "pipeline": layout.pipeline}
    for axis, size in sizes.items():
        groups = {axis_ranks(layout, layout.place(rank)).get(axis, (rank,)) for rank in range(layout.world)}
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world)), axis
        assert {len(group) for group in groups} == {size}, axis
    held = sizes["shard"] * sizes["across"] * sizes["replicas"]
    assert held * layout.tensor * layout.pipeline == layout.world


def test_groups_of_consecutive_data_ranks_are_cut_first():
    groups = axis_ranks(Layout(world=16, params=1, grads=2, optimizer=8), Layout(world=16).place(5))
    assert groups["shard"] == range(4, 6)
    assert groups["across"] == range(1, 9, 2)
    assert groups["replicas"] == range(5, 21, 8)


def test_the_group_of_all_ranks_is_called_by_the_axis_that_has_them_all():
    assert world_axis(Layout(world=8, optimizer=8)) == "shard"
    assert world_axis(Layout(world=8, optimizer=4)) == "world"
    assert world_axis(Layout(world=8)) == "replicas"


def test_ranks_count_node_by_node():
    assert not lie_on_several_nodes((0, 7), 8)
    assert lie_on_several_nodes((7, 8), 8)


@pytest.mark.parametrize("preset", ["internlm-7b", "internlm-20b", "internlm2-7b", "tiny-gqa"])
def test_parameters_add_up_to_the_models(preset):
    config = ModelConfig(preset=preset)
    counted = sum(p.row * p.shape[0] for unit in parameters(config) for p in unit)
    assert counted == config.num_params


def test_states_cut_over_a_node_send_an_eighth_of_the_gradients_between_nodes():
    config = internlm(sharding={"optimizer": 8})
    between = [t for t in step_traffic(config, 1024) if t.between_nodes and t.axis != "world"]
    # Every dimension of InternLM-7B divides by 8, so nothing is padded.
    assert [(t.operation, t.payload_bytes) for t in between] == [("all_reduce", 4 * config.model.num_params // 8)]
    inside = {t.operation: t.payload_bytes for t in step_traffic(config, 1024) if not t.between_nodes}
    assert inside == {"all_gather": 2 * config.model.num_params, "reduce_scatter": 4 * config.model.num_params}


def test_gradients_that_are_whole_are_reduced_once_a_step_and_cut_ones_with_each_microbatch():
    def reduced(grads):
        config = internlm(sharding={"grads": grads, "optimizer": 8}, batch={"global_sequences": 4096})
        return next(t for t in step_traffic(config, 1024) if t.operation == "reduce_scatter")

    assert reduced(grads=8).payload_bytes == 4 * reduced(grads=1).payload_bytes


def test_weights_cut_between_uses_are_gathered_twice_a_microbatch_but_for_the_embedding():
    config = internlm(sharding={"params": 8, "grads": 8, "optimizer": 8})
    model = config.model
    gathered = next(t for t in step_traffic(config, 1024) if t.operation == "all_gather")
    once = model.vocab_size * model.hidden_size + model.hidden_size  # with the final norm
    assert gathered.payload_bytes == 2 * 2 * (2 * (model.num_params - once) + once)  # two microbatches of bfloat16


def test_one_rank_sends_nothing():
    assert step_traffic(internlm(), 1) == []
