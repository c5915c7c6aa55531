import torch

from ternlm.optim.muon import Muon, orthogonalise


def test_singular_values_come_close_to_one():
    for shape in ((32, 32), (64, 16), (16, 64)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalise(matrix))
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_updates_equal_pytorchs_muon_up_to_its_bfloat16():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(48, 24)) for _ in range(2))
    mine = Muon([ours], lr=0.1, momentum=0.9, weight_decay=0.2)
    reference = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.2)
    for _ in range(4):
        ours.grad = torch.randn(48, 24)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    moved = (theirs - 1).norm()
    assert (ours - theirs).norm() / moved < 0.02
