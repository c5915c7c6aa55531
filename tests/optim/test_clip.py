import pytest
import torch

from ternlm.optim.clip import gradient_norm, scale_gradients
from ternlm.parallel.mesh import one_rank
from ternlm.parallel.pieces import Piece


def parameters():
    made = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    made[0].grad, made[1].grad = torch.tensor([1.0, 2.0, 2.0]), torch.full((2, 2), 2.0)
    made.append(torch.nn.Parameter(torch.zeros(1)))  # the last has no gradient
    return [Piece(str(i), tuple(p.shape), (0,) * p.ndim, 0, p, p) for i, p in enumerate(made)]


def norm_of(pieces):
    return gradient_norm(pieces, one_rank(torch.device("cpu")))


def test_the_norm_is_over_all_gradients():
    assert norm_of(parameters()) == pytest.approx(5.0)


@pytest.mark.parametrize("divisor", [1.0, 4.0])
def test_clipping_scales_all_gradients_to_the_largest_norm(divisor):
    given = parameters()
    scale_gradients(given, norm_of(given) / divisor, divisor, 1.0)
    assert norm_of(given) == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(given[0].tensor.grad, torch.tensor([0.2, 0.4, 0.4]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_norm", [0.0, 6.0])
def test_smaller_gradients_and_no_clipping_only_divide(max_norm):
    given = parameters()
    scale_gradients(given, norm_of(given) / 2, 2.0, max_norm)
    assert torch.equal(given[0].tensor.grad, torch.tensor([0.5, 1.0, 1.0]))
