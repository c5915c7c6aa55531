"""Context parallelism on gloo ranks: `attend` and whole models against one rank with whole sequences."""

import random
from contextlib import nullcontext
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from ternlm.config.model import ModelConfig
from ternlm.config.training import ComputeConfig
from ternlm.model.decoder import build_model
from ternlm.model.init import init_weights
from ternlm.ops.attention import make_segment_attend, masked_attention
from ternlm.parallel.apply import prepare_blocks
from ternlm.parallel.context import context_index, make_context_attend
from ternlm.parallel.ring import own_segments, ring_attention, ring_spans

CPU = torch.device("cpu")
T, H = 96, 8

FIXED = {
    "one document": [[T], [T]],
    "documents that end with chunks": [[24, 24, 48], [12, 36, 48]],
    "rows that differ": [[T], [1] * T, [5, 60, 31]],
    "documents shorter than a chunk": [[7] * 13 + [5], [3, 4] * 13 + [5]],
    "a document over several chunks": [[20, 57, 19], [1, 94, 1]],
    "equal rows, then another": [[50, 46], [50, 46], [46, 50]],
}


def random_rows(seed):
    """Three rows of documents of random lengths; about half of the seeds make some longer than a chunk."""
    draw = random.Random(seed)
    longest = draw.choice((6, 20, 60, T))
    rows = []
    for _ in range(3):
        row = []
        while sum(row) < T:
            row.append(draw.randint(1, min(longest, T - sum(row))))
        rows.append(row)
    return rows


ROWS = FIXED | {f"random {seed}": random_rows(seed) for seed in range(12)}


def error(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


# On the ranks


def attend_errors(heads):
    """Return, by method, heads and rows, the greatest relative error of the output and the three gradients."""
    group, errors = dist.group.WORLD, {}
    for method, N, K in heads:
        index = context_index(T, group.size(), group.rank(), method)
        for name, rows in ROWS.items():
            whole = [x.requires_grad_() for x in tensors(len(rows), N, K)]
            weight = torch.randn(whole[0].shape, generator=torch.Generator().manual_seed(1))
            offsets = torch.tensor([0, *(n for row in rows for n in row)]).cumsum(0)
            expected = masked_attention(*(x.double() for x in whole), offsets)
            expected_grads = torch.autograd.grad(expected, whole, weight.double())
            own = [x.detach()[:, index].requires_grad_() for x in whole]
            out = make_context_attend(rows, CPU, group, method)(*own, 0)
            grads = torch.autograd.grad(out, own, weight[:, index])
            pairs = zip((out, *grads), (expected, *expected_grads), strict=True)
            errors[method, N, K, name] = [error(a, b[:, index]) for a, b in pairs]
    return errors


def tensors(B, N, K):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, T, n, H, generator=generator) for n in (N, K, K)]


def model_errors(compile_blocks, cases):
    """Return, by method and recompute: the greatest error of hidden states and gradients, exchanges, and graphs.

    Exchanges are the bytes sent by the ring and how often all_to_all ran (0 in a graph).
    """
    config, group, errors = ModelConfig(preset="tiny-gqa", attention_bias=True), dist.group.WORLD, {}
    batches = [ROWS[name][:2] for name in ("one document", "rows that differ", "a document over several chunks")]
    tokens = torch.randint(512, (2, T), generator=torch.Generator().manual_seed(0))
    weight = torch.randn(2, T, config.hidden_size, generator=torch.Generator().manual_seed(1))
    whole = build_model(config)
    init_weights(whole, config, 1)
    for method, keep in cases:
        compute = ComputeConfig(compile="off", recompute=float(bool(keep)), recompute_keep=keep or "nothing")
        model = build_model(config)
        model.load_state_dict(whole.state_dict())
        prepare_blocks(model.model.layers, compute, compile_blocks)
        index = context_index(T, group.size(), group.rank(), method)
        found, all_to_alls, graphs = [], 0, counters["stats"]["unique_graphs"]
        for rows in batches:
            positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
            expected = whole(tokens, positions, make_segment_attend(rows, CPU))
            (expected * weight).sum().backward()
            with nullcontext() if compile_blocks else CountAllToAll() as count, count_sent_bytes() as sent:
                attend = make_context_attend(rows, CPU, group, method)
                hidden = model(tokens[:, index], positions[:, index], attend)
                (hidden * weight[:, index]).sum().backward()
            found.append(error(hidden, expected[:, index]))
            for a, b in zip(model.model.parameters(), whole.model.parameters(), strict=True):
                dist.all_reduce(a.grad)
                found.append(error(a.grad, b.grad))
                a.grad = b.grad = None
            all_to_alls += count.seen if count else 0
        exchanged = (sum(sent), all_to_alls // len(batches))
        errors[method, keep] = max(found), exchanged, counters["stats"]["unique_graphs"] - graphs
    return errors


class CountAllToAll(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen += op is torch.ops._c10d_functional.all_to_all_single.default
        return op(*args, **(kwargs or {}))


class count_sent_bytes:
    def __enter__(self):
        self.original, self.sent = dist.batch_isend_irecv, []
        dist.batch_isend_irecv = self.counted
        return self.sent

    def counted(self, operations):
        self.sent += [op.tensor.nbytes for op in operations if op.op is dist.isend]
        return self.original(operations)

    def __exit__(self, *error):
        dist.batch_isend_irecv = self.original


def operator_checks():
    """Run PyTorch's own checks of a custom operator, and count what bfloat16 sends and how far off it is."""
    group, rows = dist.group.WORLD, ROWS["rows that differ"]
    index = context_index(T, group.size(), group.rank(), "ring")
    own = [x[:, index].requires_grad_() for x in tensors(3, 4, 2)]
    offsets = torch.tensor(own_segments(rows, group.size(), group.rank()), dtype=torch.int32)
    spans = torch.tensor(ring_spans(rows, group.size(), group.rank()), dtype=torch.int32)
    torch.library.opcheck(ring_attention, (*own, offsets, spans, group.group_name))
    attend = make_context_attend(rows, CPU, group, "ring")
    expected = attend(*own, 0)
    expected_grads = torch.autograd.grad(expected.square().sum(), own)
    half = [x.detach().bfloat16().requires_grad_() for x in own]
    with count_sent_bytes() as forward:
        out = attend(*half, 0)
    with count_sent_bytes() as backward:
        grads = torch.autograd.grad(out.float().square().sum(), half)
    errors = [error(a.float(), b) for a, b in zip((out, *grads), (expected, *expected_grads), strict=True)]
    return max(errors), (sum(forward), sum(backward)), {out.dtype, *(grad.dtype for grad in grads)}


# Tests

HEADS = {
    2: [("ring", 4, 4), ("ring", 4, 2), ("ring", 3, 1), ("all_to_all", 4, 4), ("all_to_all", 4, 2)],
    3: [("ring", 4, 4), ("ring", 4, 2), ("all_to_all", 6, 3)],
    4: [("ring", 4, 4), ("ring", 4, 1), ("all_to_all", 4, 4), ("all_to_all", 8, 4)],
}


@pytest.mark.parametrize("world", HEADS)
def test_attention_over_ranks_equals_attention_over_whole_rows(world):
    found = run_ranks(world, attend_errors, HEADS[world])
    assert len(found[0]) == len(HEADS[world]) * len(ROWS)
    worst = {case: max(max(errors[case]) for errors in found) for case in found[0]}
    assert {case: value for case, value in worst.items() if not value <= 1e-5} == {}


CASES = [(method, keep) for method in ("ring", "all_to_all") for keep in (None, "nothing", "matmuls")]


@cache
def eager_model_errors():
    return run_ranks(2, model_errors, False, CASES)


@pytest.mark.parametrize(("method", "keep"), CASES)
def test_a_model_over_ranks_equals_one_rank_with_and_without_recompute(method, keep):
    assert max(errors[method, keep][0] for errors in eager_model_errors()) <= 1e-5


def test_recompute_that_keeps_attention_sends_nothing_again():
    exchanged = {case: value for case, (_, value, _) in eager_model_errors()[0].items()}
    config = ModelConfig(preset="tiny-gqa")
    layers = config.num_hidden_layers
    once = 2 * (2 * (T // 2) * config.kv_heads * config.head_size) * 4  # k and v of two rows, in float32
    assert exchanged["ring", None] == exchanged["ring", "matmuls"] == (layers * 3 * once, 0)
    assert exchanged["ring", "nothing"] == (layers * 4 * once, 0)
    assert exchanged["all_to_all", None] == exchanged["all_to_all", "matmuls"] == (0, layers * 4)
    assert exchanged["all_to_all", "nothing"] == (0, layers * 6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_compiled_blocks_over_ranks_equal_one_rank_and_compile_once(method):
    cases = [case for case in CASES if case[0] == method]
    for errors in run_ranks(2, model_errors, True, cases, timeout=400.0):
        assert max(value for value, _, _ in errors.values()) <= 1e-5
        assert {graphs for _, _, graphs in errors.values()} == {1}
        if method == "ring":
            assert errors["ring", None][1] == errors["ring", "matmuls"][1] < errors["ring", "nothing"][1]


def test_the_ring_operator_passes_pytorchs_own_checks_and_sends_gradients_in_float32():
    elements = 2 * 2 * (3 * (T // 3) * 2 * H)  # k and v, sent twice among three ranks
    for worst, sent, dtypes in run_ranks(3, operator_checks):
        assert sent == (elements * 2, elements * (2 + 4))  # bfloat16, and the gradients in float32
        assert dtypes == {torch.bfloat16}
        assert worst < 2e-2


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 8])
def test_the_ranks_indices_divide_the_sequence_among_them(method, degree):
    indices = [context_index(T, degree, rank, method) for rank in range(degree)]
    assert {len(index) for index in indices} == {T // degree}
    assert torch.equal(torch.cat(indices).sort().values, torch.arange(T))


def scores(rows, degree, rank):
    """Mark in (rows, T, T) how often a rank computes the score of each query and key."""
    seen = torch.zeros(len(rows), T, T, dtype=torch.int)
    held = [context_index(T, degree, (rank - step) % degree, "ring") for step in range(degree)]
    for start, end in pairwise(own_segments(rows, degree, rank)):
        row, first = divmod(start, T // degree)
        tokens = held[0][first : first + end - start]
        seen[row, tokens[:, None], tokens] += tokens[:, None] >= tokens
    for step, spans in enumerate(ring_spans(rows, degree, rank)):
        for row, (query, query_end, key, key_end) in enumerate(spans):
            seen[row, held[0][query:query_end, None], held[step][key:key_end]] += 1
    return seen


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", ROWS)
def test_the_ring_computes_each_score_of_the_documents_causal_mask_once(degree, name):
    document = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in ROWS[name]])
    expected = (document[:, :, None] == document[:, None]).tril().int()
    assert torch.equal(sum(scores(ROWS[name], degree, rank) for rank in range(degree)), expected)


@pytest.mark.parametrize("degree", [2, 3, 4, 8])
def test_every_rank_of_the_ring_has_equally_many_scores_of_one_document(degree):
    assert len({int(scores([[T]], degree, rank).sum()) for rank in range(degree)}) == 1
