import pytest
import torch
import torch.nn.functional as F

from ternlm.ops import loss
from ternlm.ops.loss import chunked_cross_entropy


def inputs(N=50, D=16, V=37):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    weights = torch.rand(N, generator=generator) * (torch.rand(N, generator=generator) > 0.3)
    return hidden, weight, targets, weights


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
def test_chunked_loss_and_gradients_equal_pytorchs(chunk, smoothing, z_loss):
    hidden, weight, targets, weights = inputs()
    losses = chunked_cross_entropy(
        hidden, weight, targets, weights, chunk_tokens=chunk, label_smoothing=smoothing, z_loss=z_loss
    )
    (losses.total * 0.25).backward()
    ours = hidden.grad, weight.grad
    hidden.grad = weight.grad = None

    logits = hidden @ weight.T
    per_token = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    expected = ((per_token + z_loss * logits.logsumexp(1) ** 2) * weights).sum()
    (expected * 0.25).backward()
    torch.testing.assert_close(losses.total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[0], hidden.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1], weight.grad, rtol=1e-5, atol=1e-5)
    kept = weights != 0
    plain = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses.nll_N, plain.detach() * kept, rtol=1e-5, atol=1e-5)
    assert torch.equal(losses.correct_N, (logits.argmax(1) == targets) & kept)


def test_no_gradient_is_made_where_none_is_wanted():
    hidden, weight, targets, weights = inputs()
    with torch.no_grad():
        losses = chunked_cross_entropy(hidden, weight, targets, weights, chunk_tokens=16)
    assert not losses.total.requires_grad
    frozen = chunked_cross_entropy(hidden, weight.detach(), targets, weights, chunk_tokens=16)
    frozen.total.backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_a_batch_without_trained_tokens_has_zero_loss_and_zero_gradients():
    hidden, weight, targets, _ = inputs()
    losses = chunked_cross_entropy(hidden, weight, targets, torch.zeros(50), chunk_tokens=16)
    losses.total.backward()
    assert losses.total == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_bfloat16_hidden_states_give_float32_gradients_of_the_weight():
    hidden, weight, targets, weights = inputs()
    half = hidden.detach().bfloat16().requires_grad_()
    losses = chunked_cross_entropy(half, weight, targets, weights, chunk_tokens=16)
    losses.total.backward()
    assert weight.grad.dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16
    reference = (F.cross_entropy(half.float() @ weight.T, targets, reduction="none") * weights).sum()
    torch.testing.assert_close(losses.total, reference, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("num_trained", [0, 1, 15, 16, 17, 90, 95, 96])
def test_few_numbers_of_rows_occur_whatever_is_trained(num_trained, monkeypatch):
    torch.manual_seed(num_trained)
    hidden, head, targets = torch.randn(96, 8), torch.randn(30, 8), torch.randint(30, (96,))
    weights = torch.zeros(96)
    weights[torch.randperm(96)[:num_trained]] = torch.rand(num_trained) + 0.1
    expected = (torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="none") * weights).sum()
    rows, apply = [], loss._ChunkedCrossEntropy.apply

    def noting(*given):
        rows.append(len(given[0]))
        return apply(*given)

    monkeypatch.setattr(loss._ChunkedCrossEntropy, "apply", noting)
    found = loss.chunked_cross_entropy(hidden, head, targets, weights, chunk_tokens=50)
    torch.testing.assert_close(found.total, expected)
    assert ((found.nll_N != 0) == (weights != 0)).all()
    assert rows == [-(-num_trained // 16) * 16]
