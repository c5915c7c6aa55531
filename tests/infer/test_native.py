"""Attention by C functions over keys and values in blocks is the textbook's, whatever mix of pieces a pass has."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ternlm.config.model import ModelConfig
from ternlm.infer.engine import Engine, generate
from ternlm.infer.key_values import Cache, Piece
from ternlm.infer.native import NativeCache, make_cache
from ternlm.infer.paged import PagedCache
from ternlm.infer.params import SamplingParams
from ternlm.model.decoder import build_model
from ternlm.ops import native

CPU = torch.device("cpu")
HEADS = [
    (4, 4, 16),
    (9, 3, 64),
    (8, 1, 80),
    (7, 1, 48),
    (6, 2, 96),
    (4, 2, 112),
    (4, 1, 128),
    (2, 2, 256),
    pytest.param((128, 1, 16), marks=pytest.mark.slow),
]
pytestmark = pytest.mark.skipif(not native.is_available(CPU, torch.float32), reason="no C compiler")


def make(heads: tuple[int, int, int], num_blocks: int, dtype: torch.dtype = torch.float32) -> Cache:
    num_q, num_kv, size = heads
    config = ModelConfig(
        vocab_size=32, hidden_size=num_q * size, num_attention_heads=num_q, num_key_value_heads=num_kv,
        head_dim=size, num_hidden_layers=1, intermediate_size=16,
    )  # fmt: skip
    return make_cache(config, num_blocks, dtype, CPU)


class Texts:
    """Texts of random queries, keys and values, each with blocks of its own, far apart from each other."""

    def __init__(self, lengths: list[int], heads: tuple[int, int, int], dtype: torch.dtype) -> None:
        torch.manual_seed(1)
        self.num_q, self.num_kv, self.size = heads
        self.qkv = [torch.randn(length, heads[0] + 2 * heads[1], heads[2]).to(dtype) for length in lengths]
        numbers = [-(-length // 16) for length in lengths]
        self.num_blocks = sum(numbers)
        order = iter(torch.randperm(self.num_blocks).tolist())
        self.blocks = [[next(order) for _ in range(number)] for number in numbers]
        self.done = [0] * len(lengths)

    def attend(self, cache: Cache, counts: dict[int, int], num_rows: int = 0) -> torch.Tensor:
        """Take the next tokens of some texts through the cache, (T, N, H)."""
        pieces = [Piece(self.blocks[i], self.done[i], count) for i, count in counts.items()]
        positions = cache.place(pieces, num_rows)
        places = [place for i, count in counts.items() for place in range(self.done[i], self.done[i] + count)]
        assert positions[0, : len(places)].tolist() == places
        new = torch.cat([self.qkv[i][self.done[i] : self.done[i] + count] for i, count in counts.items()])
        if num_rows > len(new):
            new = torch.cat((new, torch.full((num_rows - len(new), *new.shape[1:]), math.nan, dtype=new.dtype)))
        q, k, v = new[None].split((self.num_q, self.num_kv, self.num_kv), dim=2)  # not contiguous
        for i, count in counts.items():
            self.done[i] += count
        return cache.attend(q, k, v, 0)[0]

    def expected(self, i: int, first: int) -> torch.Tensor:
        """What the text's tokens attend to from `first` on, in float64."""
        q, k, v = self.qkv[i][: self.done[i]].double().split((self.num_q, self.num_kv, self.num_kv), dim=1)
        k, v = (x.repeat_interleave(self.num_q // self.num_kv, 1) for x in (k, v))
        scores = torch.einsum("tnh,snh->nts", q, k) / math.sqrt(self.size)
        hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        return torch.einsum("nts,snh->tnh", scores.masked_fill(hidden, -math.inf).softmax(-1), v)[first:]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_textbooks_attention(heads, dtype):
    texts = Texts([1, 16, 17, 200, 256, 257, 530, 700], heads, dtype)
    cache = make(heads, texts.num_blocks, dtype)
    assert isinstance(cache, NativeCache)
    # Whole prompts, single first tokens, chunks of any size; then what is left but one; then singles only.
    for counts in (
        {3: 1, 7: 600, 1: 15, 6: 512, 4: 33},
        {4: 64, 5: 256, 3: 198, 2: 16, 7: 1, 6: 17},
        {4: 158, 7: 98},
        {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1},
    ):
        before = list(texts.done)
        out = texts.attend(cache, counts)
        for i, own in zip(counts, out.split(list(counts.values())), strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(own.double(), texts.expected(i, before[i]), rtol=tolerance, atol=tolerance)
    assert texts.done == [1, 16, 17, 200, 256, 257, 530, 700]


def test_a_text_is_the_same_to_the_last_bit_whatever_else_runs_and_on_any_number_of_threads():
    alone, among = (Texts([300, 700, 40, 90], (6, 2, 64), torch.float32) for _ in range(2))
    one, other = make((6, 2, 64), alone.num_blocks), make((6, 2, 64), alone.num_blocks)
    first = [alone.attend(one, {1: 650}), *(alone.attend(one, {1: 1}) for _ in range(3))]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        second = [among.attend(other, {0: 270, 1: 650, 2: 30})[270:920]]
        second += [among.attend(other, {2: 1, 1: 1, 3: 20, 0: 1})[1:2], among.attend(other, {0: 1, 1: 1})[1:]]
        second += [among.attend(other, {3: 5, 1: 1})[5:]]
    finally:
        torch.set_num_threads(threads)
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


def test_rows_beyond_the_pieces_are_zeros_and_change_nothing():
    texts, same = (Texts([40, 9], (4, 2, 16), torch.float32) for _ in range(2))
    cache, other = make((4, 2, 16), texts.num_blocks), make((4, 2, 16), texts.num_blocks)
    out = texts.attend(cache, {0: 39, 1: 8}, num_rows=64)
    assert torch.equal(out[:47], same.attend(other, {0: 39, 1: 8}))
    assert (out[47:] == 0).all()


def test_what_is_not_finite_stays_with_its_text():
    texts, same = (Texts([70, 70], (4, 2, 32), torch.float32) for _ in range(2))
    texts.qkv[0][3] = math.nan
    cache, other = make((4, 2, 32), texts.num_blocks), make((4, 2, 32), texts.num_blocks)
    for counts in ({0: 69, 1: 69}, {0: 1, 1: 1}):
        out, expected = texts.attend(cache, counts), same.attend(other, counts)
        assert torch.equal(out[counts[0] :], expected[counts[0] :])
        assert out[: counts[0]][3 if counts[0] > 1 else 0 :].isnan().all()


def test_what_a_text_has_left_in_a_block_is_not_read_by_the_next():
    texts, same = (Texts([70, 20], (4, 2, 32), torch.float32) for _ in range(2))
    texts.qkv[0][:] = math.nan
    cache, other = make((4, 2, 32), texts.num_blocks), make((4, 2, 32), texts.num_blocks)
    texts.attend(cache, {0: 70})
    texts.blocks[1] = texts.blocks[0][:2]
    for counts in ({1: 5}, {1: 1}, {1: 14}):
        assert torch.equal(texts.attend(cache, counts), same.attend(other, counts))


def test_tensors_that_were_not_announced_are_refused():
    texts = Texts([40], (4, 2, 16), torch.float32)
    cache = make((4, 2, 16), texts.num_blocks)
    cache.place([Piece(texts.blocks[0], 0, 40)])
    q, kv = torch.zeros(1, 40, 4, 16), torch.zeros(1, 40, 2, 16)
    for wrong in ((q[:, :39], kv[:, :39], kv[:, :39]), (q[:, :, :2], kv, kv), (q, kv[:, :39], kv), (q, kv, q)):
        with pytest.raises(ValueError, match=r"40 tokens or more were to come"):
            cache.attend(*wrong, 0)
    cache.attend(q, kv, kv, 0)


def test_the_default_dtype_changes_nothing():
    code = (
        "import torch; torch.set_default_dtype(torch.bfloat16)\n"
        "from test_native import Texts, make\n"
        "texts = Texts([300, 700], (8, 1, 64), torch.float32); cache = make((8, 1, 64), texts.num_blocks)\n"
        "texts.attend(cache, {0: 300, 1: 699}); out = texts.attend(cache, {1: 1})\n"
        "torch.testing.assert_close(out.double(), texts.expected(1, 699), rtol=1e-2, atol=1e-2)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_an_engine_writes_the_same_text_with_and_without(monkeypatch):
    torch.manual_seed(2)
    config = ModelConfig(
        vocab_size=160, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=112, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    model = build_model(config)
    for parameter in model.parameters():
        parameter.data.mul_(4)  # far from a tie of two tokens
    prompts = [[(7 * i + j) % 160 for j in range(length)] for i, length in enumerate((1, 16, 40, 300))]
    params = SamplingParams(max_new_tokens=24, temperature=0)
    assert isinstance(Engine(model, 64)._cache, NativeCache)
    texts = generate(model, prompts, params)
    monkeypatch.setattr(native, "library", lambda dtype: None)
    assert type(Engine(model, 64)._cache) is PagedCache
    assert generate(model, prompts, params) == texts


def test_heads_that_are_no_vectors_go_another_way():
    assert type(make((4, 2, 12), 2)) is PagedCache
    assert type(make((4, 2, 16), 2, torch.float16)) is PagedCache
