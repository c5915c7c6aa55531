import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ternlm.ops import tiles
from ternlm.ops.attention import masked_attention, segment_mask

B, T, S, H = 2, 12, 20, 8


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(N, K, S=S, dtype=torch.float32):
    q, k, v = draw(B, T, N, H, seed=0), draw(B, S, K, H, seed=1), draw(B, S, K, H, seed=2)
    return [x.to(dtype) for x in (q, k, v)]


def error(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_the_cpu_kernel_and_plain_products_agree_on_a_rectangle(heads, kv_heads):
    q, k, v = qkv(heads, kv_heads)
    grad = draw(B, T, heads, H, seed=3)
    fast, plain = tiles.attend_rectangle(q, k, v), tiles.attend_plainly(q, k, v)
    assert max(map(error, fast, plain)) < 1e-6
    fast = tiles.attend_rectangle_backward(grad, q, k, v, fast)
    plain = tiles.attend_plainly_backward(grad, q, k, v, plain)
    assert max(map(error, fast, plain)) < 1e-6


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("bounds", [[0, 12, 24], [0, 3, 12, 13, 24]])
def test_the_cpu_kernel_and_plain_products_agree_on_segments(heads, kv_heads, bounds):
    q, k, v = qkv(heads, kv_heads, T)
    offsets = torch.tensor(bounds, dtype=torch.int32)
    grad = draw(B, T, heads, H, seed=3)
    mask = segment_mask(offsets, B, T)
    fast, plain = tiles.attend_segments(q, k, v, offsets), tiles.attend_plainly(q, k, v, mask)
    assert max(map(error, fast, plain)) < 1e-6
    assert error(plain.out_BTNH, masked_attention(q, k, v, offsets)) < 1e-6
    fast = tiles.attend_segments_backward(grad, q, k, v, fast, offsets)
    plain = tiles.attend_plainly_backward(grad, q, k, v, plain, mask)
    assert max(map(error, fast, plain)) < 1e-6


def test_plain_gradients_are_autograds():
    q, k, v = (x.requires_grad_() for x in qkv(4, 2, dtype=torch.float32))
    grad = draw(B, T, 4, H, seed=3)
    whole = tiles.attend_plainly(q, k, v)
    expected = torch.autograd.grad(whole.out_BTNH, (q, k, v), grad)
    with torch.no_grad():
        found = tiles.attend_plainly_backward(grad, q, k, v, tiles.Part(*(x.detach() for x in whole)))
    assert max(map(error, found, expected)) < 1e-6


def test_merged_parts_equal_the_whole_in_values_and_gradients():
    q, k, v = qkv(4, 2)
    grad = draw(B, T, 4, H, seed=3)
    whole = tiles.attend_rectangle(q, k, v)
    merged = tiles.attend_rectangle(q, k[:, :7], v[:, :7])
    tiles.merge_(merged, tiles.attend_rectangle(q, k[:, 7:], v[:, 7:]))
    assert max(map(error, merged, whole)) < 1e-6
    parts = [tiles.attend_rectangle_backward(grad, q, k[:, at], v[:, at], merged) for at in (slice(7), slice(7, S))]
    expected = tiles.attend_rectangle_backward(grad, q, k, v, whole)
    assert error(parts[0].q_BTNH + parts[1].q_BTNH, expected.q_BTNH) < 1e-6
    assert error(torch.cat([part.k_BSKH for part in parts], 1), expected.k_BSKH) < 1e-6
    assert error(torch.cat([part.v_BSKH for part in parts], 1), expected.v_BSKH) < 1e-6


def test_a_part_of_far_greater_or_smaller_weight_leaves_the_merge_finite():
    q, k, v = qkv(4, 4)
    merged = tiles.attend_rectangle(q, 1000 * k[:, :7], v[:, :7])
    tiles.merge_(merged, tiles.attend_rectangle(q, k[:, 7:], v[:, 7:]))
    whole = tiles.attend_plainly(q, torch.cat((1000 * k[:, :7], k[:, 7:]), 1), v)
    assert max(map(error, merged, whole)) < 1e-5


def test_the_calls_of_the_cuda_kernels_fit_their_signatures(monkeypatch):
    monkeypatch.setattr(tiles, "has_fused_kernel", lambda device: True)
    with FakeTensorMode():
        q, grad, k, v = (torch.empty(B, S, n, H, dtype=torch.bfloat16, device="cuda") for n in (4, 4, 2, 2))
        offsets = torch.empty(5, dtype=torch.int32, device="cuda")
        rectangle, segments = tiles.attend_rectangle(q, k, v), tiles.attend_segments(q, k, v, offsets)
        gradients = [
            tiles.attend_rectangle_backward(grad, q, k, v, rectangle),
            tiles.attend_segments_backward(grad, q, k, v, segments, offsets),
        ]
        for whole, grads in zip((rectangle, segments), gradients, strict=True):
            assert (whole.out_BTNH.shape, whole.lse_BTN.shape) == (q.shape, q.shape[:3])
            assert whole.lse_BTN.dtype == torch.float32
            assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
def test_cuda_parts_equal_those_of_a_cpu(dtype, bound):
    device = torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    q, grad, k, v = (torch.randn(2, 64, n, 64, generator=generator).to(dtype).float() for n in (4, 4, 2, 2))
    offsets = torch.tensor([0, 10, 64, 128], dtype=torch.int32)
    there = [x.to(device, dtype) for x in (grad, q, k, v)]
    whole, on_cuda = tiles.attend_rectangle(q, k, v), tiles.attend_rectangle(*there[1:])
    pairs = [*zip(on_cuda, whole, strict=True)]
    expected = tiles.attend_rectangle_backward(grad, q, k, v, whole)
    pairs += zip(tiles.attend_rectangle_backward(*there, on_cuda), expected, strict=True)
    whole, on_cuda = tiles.attend_segments(q, k, v, offsets), tiles.attend_segments(*there[1:], offsets.to(device))
    pairs += zip(on_cuda, whole, strict=True)
    expected = tiles.attend_segments_backward(grad, q, k, v, whole, offsets)
    pairs += zip(tiles.attend_segments_backward(*there, on_cuda, offsets.to(device)), expected, strict=True)
    assert max(error(a.cpu().float(), b) for a, b in pairs) < bound
