"""How much memory an engine takes for keys and values."""

import psutil
import pytest
import torch

from ternlm.config.model import ModelConfig
from ternlm.config.section import ConfigError
from ternlm.infer.engine import Engine
from ternlm.infer.memory import bytes_per_token, check_num_tokens, choose_num_tokens
from ternlm.model.decoder import build_model
from ternlm.monitor.memory import free_memory

CONFIG = ModelConfig(preset="tiny-gqa", max_position_embeddings=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_takes_what_the_engine_holds_for_it(dtype):
    engine = Engine(build_model(CONFIG).to(dtype), 160)
    held = sum(layer.nbytes for layer in engine._cache.memory.layers)
    assert held == 160 * bytes_per_token(CONFIG, dtype)


def test_room_is_kept_for_what_may_run_where_there_is_memory():
    assert choose_num_tokens(CONFIG, torch.float32, 4, 10**9, "cpu") == 4 * 112
    each = bytes_per_token(CONFIG, torch.float32)
    assert choose_num_tokens(CONFIG, torch.float32, 64, each * 1000, "cpu") == 496
    assert choose_num_tokens(CONFIG, torch.float32, 64, each * 1000, "cuda") == 800
    with pytest.raises(ConfigError, match="too little for the keys and values of 16 tokens"):
        choose_num_tokens(CONFIG, torch.float32, 64, each * 20, "cpu")


def test_free_memory_is_some_of_all():
    free = free_memory(torch.device("cpu"))
    assert 2**20 < free < 2**60


def test_the_longest_text_is_the_models_or_the_memorys():
    model = build_model(CONFIG)
    assert Engine(model, 1600).longest == 100
    assert Engine(model, 64).longest == 64


def test_room_for_more_than_the_memory_holds_is_refused():
    each = bytes_per_token(CONFIG, torch.float32)
    free = 1112 * each  # of which a tenth is for what else a step holds
    assert check_num_tokens(CONFIG, torch.float32, 1000, free) == 1000
    with pytest.raises(ConfigError, match=r"1,001 tokens take .* keep room for at most 1,000"):
        check_num_tokens(CONFIG, torch.float32, 1001, free)


def test_memory_that_is_reserved_is_taken_at_once():
    config = ModelConfig(preset="tiny-gqa", max_position_embeddings=100)
    engine = Engine(build_model(config), 2**28 // bytes_per_token(config, torch.float32))
    before = psutil.Process().memory_info().rss
    engine.reserve()
    assert psutil.Process().memory_info().rss - before > 0.9 * 2**28
    assert all(not layer.any() for layer in engine._cache.memory.layers)
