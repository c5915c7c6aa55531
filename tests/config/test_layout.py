from typing import Any

import pytest

from ternlm.config import Config, ConfigError, config_from_dict
from ternlm.config.layout import Layout, Place, resolve_layout


def make(**changes: dict[str, Any]) -> Config:
    settings: dict[str, dict[str, Any]] = {
        "model": {"preset": "tiny-gqa", "vocab_size": 250, "num_hidden_layers": 4},
        "data": {"seq_len": 24, "sources": [{"name": "en", "path": "data/en"}]},
        "batch": {"global_sequences": 48},
        "train": {"steps": 1},
        "parallel": {"allow_untested": True},
    }
    for name, values in changes.items():
        settings[name] = {**settings.get(name, {}), **values}
    return config_from_dict(settings)


def test_one_rank_has_nothing_to_cut() -> None:
    assert resolve_layout(make(), 1) == Layout()


@pytest.mark.parametrize(
    ("sizes", "resolved", "shard", "across", "reshard"),
    [
        ((1, 1, 1), (1, 1, 1), 1, 1, False),
        ((1, 1, 2), (1, 1, 2), 2, 1, False),
        ((1, 2, 2), (1, 2, 2), 2, 1, False),
        ((2, 2, 2), (2, 2, 2), 2, 1, True),
        ((-1, -1, -1), (8, 8, 8), 8, 1, True),
        ((1, 1, -1), (1, 1, 8), 8, 1, False),
        ((1, 2, -1), (1, 2, 8), 2, 4, False),
        ((2, 2, 4), (2, 2, 4), 2, 2, True),
    ],
)
def test_three_sizes_say_what_is_cut_where(sizes, resolved, shard, across, reshard) -> None:
    names = ("params", "grads", "optimizer")
    layout = resolve_layout(make(sharding=dict(zip(names, sizes, strict=True))), 8)
    assert (layout.params, layout.grads, layout.optimizer) == resolved
    assert (layout.shard, layout.across, layout.reshard) == (shard, across, reshard)


def test_places_count_tensor_fastest_then_context_then_data_then_pipeline() -> None:
    layout = Layout(world=16, pipeline=2, context=2, tensor=2)
    assert layout.data == 2
    assert [layout.place(rank) for rank in (0, 1, 2, 4, 8, 15)] == [
        Place(0, 0, 0, 0, 0),
        Place(1, 0, 0, 0, 1),
        Place(2, 0, 0, 1, 0),
        Place(4, 0, 1, 0, 0),
        Place(8, 1, 0, 0, 0),
        Place(15, 1, 1, 1, 1),
    ]


@pytest.mark.parametrize(
    ("world", "changes", "message"),
    [
        (6, {"parallel": {"tensor": 4}}, r"1 x 1 x 4 = 4 must divide the number of ranks, 6; start a multiple of 4"),
        (3, {"parallel": {"tensor": 3}}, r"parallel\.tensor = 3 must divide model\.num_attention_heads = 4"),
        (4, {"parallel": {"tensor": 4}}, r"parallel\.tensor = 4 must divide model\.num_key_value_heads = 2"),
        (
            2,
            {"parallel": {"tensor": 2}, "model": {"vocab_size": 251}},
            r"divide model\.vocab_size = 251; set model\.vocab_size=252",
        ),
        (
            2,
            {"parallel": {"tensor": 2}, "data": {"seq_len": 25}},
            r"parallel\.context = 25; set parallel\.sequence=false",
        ),
        (2, {"parallel": {"context": 2}, "data": {"seq_len": 26}}, r"data\.seq_len = 26 must be a multiple of .* 4"),
        (
            4,
            {"parallel": {"context": 4, "context_method": "all_to_all"}},
            r"parallel\.context = 4 must divide the key/value heads of a rank, 2",
        ),
        (8, {"parallel": {"pipeline": 8}}, r"must be at most model\.num_hidden_layers = 4"),
        (
            2,
            {"parallel": {"pipeline": 2}, "model": {"tie_word_embeddings": True}},
            r"tie_word_embeddings = true needs embedding and head on one rank",
        ),
        (
            4,
            {"parallel": {"pipeline": 4}, "batch": {"global_sequences": 2}},
            r"at least 4 microbatches a step.*= 2; raise the global batch",
        ),
        (5, {}, r"batch\.global_sequences = 48 must be a multiple of .* 1 x 5 = 5; choose 50"),
        (
            4,
            {"sharding": {"optimizer": 3}},
            r"sharding\.optimizer = 3 must divide the data ranks .*4 here.*\[1, 2, 4\]",
        ),
        (
            4,
            {"sharding": {"grads": 4, "optimizer": 2}},
            r"sharding\.optimizer = 2 must be a multiple of sharding\.grads = 4",
        ),
        (
            2,
            {"parallel": {"tensor": 2}, "sample": {"every_steps": 5, "prompts": ["The"]}},
            r"sample\.every_steps = 5 needs whole layers.*set sample\.every_steps=0 sample\.prompts=\[\]",
        ),
        (4, {"sharding": {"params": 2, "grads": 4}}, r"sharding\.params = 2 must be 1 or equal to sharding\.grads = 4"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(world: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_layout(make(**{name: dict(values) for name, values in changes.items()}), world)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("sharding", {"params": 0}, "params = 0 must be 1"),
        ("parallel", {"context_method": "all_to_all"}, "no effect with context = 1"),
        ("parallel", {"sequence": False}, "sequence = False has no effect with tensor = 1; .* or raise tensor"),
        ("parallel", {"stages_per_rank": 2}, "no effect with pipeline = 1"),
        ("parallel", {"pipeline": 2, "pipeline_schedule": "interleaved"}, "needs stages_per_rank of 2 or more"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(section: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**{section: values})
