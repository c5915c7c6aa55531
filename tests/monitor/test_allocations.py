import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ternlm.monitor.allocations import KINDS, AllocationLedger

B, D, M = 32, 16, 64
FLOAT = 4


@pytest.fixture(autouse=True)
def no_collector():
    """Nothing that the ledger follows may need the collector: it would be counted for too long."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def held(**by_kind):
    return {**dict.fromkeys(KINDS, 0), **by_kind}


def train(ledger, fake=False):
    """Take two steps of a small network; return it and what was held after each part of the second."""
    model = nn.Sequential(nn.Linear(D, M, bias=False), nn.ReLU(), nn.Linear(M, D, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    moments = {}
    with ledger:
        ledger.mark("parameters", list(model.parameters()))
        for _ in range(2):
            ledger.reset_peak()
            x_BD = torch.ones(B, D)
            y_BD = model(x_BD)
            moments["forward"] = dict(ledger.now)
            y_BD.sum().backward()
            del y_BD
            moments["backward"] = dict(ledger.now)
            with ledger.within("optimizer"):
                optimizer.step()
            optimizer.zero_grad()
            moments["update"] = dict(ledger.now)
        del x_BD
    return model, optimizer, moments


PARAMETERS = 2 * D * M * FLOAT
STATES = 2 * PARAMETERS + 2 * FLOAT  # two moments, and a step for each of two weights
INPUT = B * D * FLOAT


def test_each_kind_of_a_small_network_has_the_bytes_that_its_shapes_say():
    _, _, moments = train(AllocationLedger())
    saved = 1 * B * M * FLOAT  # what ReLU gave; what it took is not needed
    output = B * D * FLOAT
    assert moments["forward"] == held(parameters=PARAMETERS, optimizer=STATES, activations=INPUT + saved + output)
    assert moments["backward"] == held(parameters=PARAMETERS, optimizer=STATES, gradients=PARAMETERS, activations=INPUT)
    assert moments["update"] == held(parameters=PARAMETERS, optimizer=STATES, activations=INPUT)


def test_the_peak_is_described_as_it_was_at_that_moment():
    ledger = AllocationLedger()
    train(ledger)
    assert ledger.peak_total == sum(ledger.peak.values()) >= ledger.total
    # Backward through ReLU: its output, its gradient before and after, the second weight's gradient.
    assert ledger.peak["gradients"] >= PARAMETERS // 2
    assert ledger.peak["optimizer"] == STATES


def test_fake_tensors_are_counted_like_real_ones_and_take_no_memory():
    real, fake = AllocationLedger(), AllocationLedger()
    *_, moments = train(real)
    with FakeTensorMode():
        *_, again = train(fake)
    assert moments == again
    assert real.peak == fake.peak


def test_what_is_held_equals_the_live_storages_of_a_real_run():
    ledger = AllocationLedger()
    model, optimizer, _ = train(ledger)
    tensors = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    assert ledger.total == sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def test_views_share_their_storage_and_its_end():
    ledger = AllocationLedger()
    with ledger:
        whole = torch.zeros(100)
        part = whole[10:20].view(2, 5)
        assert ledger.now["activations"] == 400
        del whole
        assert ledger.now["activations"] == 400
        del part
        assert ledger.now["activations"] == 0


def test_a_storage_that_is_resized_is_counted_at_its_size():
    ledger = AllocationLedger()
    with ledger:
        weight = torch.zeros(100)
        ledger.mark("gathered", weight)
        weight.untyped_storage().resize_(0)
        assert ledger.now["gathered"] == 0
        weight.untyped_storage().resize_(400)
        assert ledger.now["gathered"] == 400
    assert torch.UntypedStorage.resize_ is not None
    weight.untyped_storage().resize_(0)  # no longer followed
    assert ledger.now["gathered"] == 400


def test_a_scope_says_what_new_tensors_are_by_looking_at_them():
    ledger = AllocationLedger()
    with ledger, ledger.within(lambda tensor: "logits" if tensor.shape[-1] == 7 else None):
        kept = torch.zeros(3, 7), torch.zeros(3, 5)
    assert ledger.now == held(logits=84, activations=60)
    del kept


def test_only_what_a_tensor_was_taken_for_can_be_corrected():
    ledger = AllocationLedger()
    with ledger:
        tensor = torch.zeros(10)
        ledger.mark("parameters", tensor)
        ledger.mark("communication", tensor, only="activations")
    assert ledger.now == held(parameters=40)


def test_a_gradient_in_another_dtype_is_a_gradient_too():
    ledger = AllocationLedger()
    with ledger:
        gradient = torch.ones(10)
        ledger.mark("gradients", gradient)
        kept = gradient.double(), gradient.clone(), gradient + 1
    assert ledger.now == held(gradients=160, activations=40)
    del kept


def test_a_recomputed_block_holds_less_between_forward_and_backward():
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(D, M), nn.ReLU(), nn.Linear(M, M), nn.ReLU(), nn.Linear(M, D))
    x_BD = torch.ones(B, D, requires_grad=True)
    plain, again = AllocationLedger(), AllocationLedger()
    with plain:
        out = model(x_BD)
    with again:
        out_again = checkpoint(model, x_BD, use_reentrant=False)
    assert plain.now["activations"] - again.now["activations"] == 2 * B * M * FLOAT
    del out, out_again
