import pytest
import torch

from ternlm.ops.attention import make_segment_attend, masked_attention, segment_attention

CPU = torch.device("cpu")


def qkv(B, T, N, K, H, grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H)]
    return [torch.randn(s, generator=generator).requires_grad_(grad) for s in shapes]


def offsets(lengths):
    return torch.tensor([0, *[n for row in lengths for n in row]]).cumsum(0).int()


LENGTHS = [
    [[24], [24]],
    [[8, 8, 8], [8, 8, 8]],
    [[1, 23], [10, 5, 9]],
    [[1] * 24, [24]],
]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_segment_attention_equals_masked_attention_in_values_and_gradients(lengths, heads, kv_heads):
    fast, slow = qkv(2, 24, heads, kv_heads, 16, grad=True), qkv(2, 24, heads, kv_heads, 16, grad=True)
    out = make_segment_attend(lengths, CPU)(*fast, 0)
    expected = masked_attention(*slow, offsets(lengths))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_a_segment_does_not_see_the_one_before_it():
    q, k, v = qkv(1, 16, 2, 2, 8)
    attend = make_segment_attend([[6, 10]], CPU)
    before = attend(q, k, v, 0)
    k[:, :6], v[:, :6] = 100.0, -100.0
    assert torch.equal(attend(q, k, v, 0)[:, 6:], before[:, 6:])


def test_the_operator_passes_pytorchs_own_checks():
    args = (*qkv(2, 6, 4, 2, 8, grad=True), offsets([[2, 4], [6]]))
    torch.library.opcheck(segment_attention, args)


def test_zero_length_segments_change_nothing():
    q, k, v = qkv(1, 8, 2, 2, 8)
    plain, _ = segment_attention(q, k, v, torch.tensor([0, 3, 8], dtype=torch.int32))
    padded, _ = segment_attention(q, k, v, torch.tensor([0, 3, 3, 8, 8], dtype=torch.int32))
    assert torch.equal(plain, padded)
