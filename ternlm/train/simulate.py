"""One rank's training step of a run on any number of devices, on none: fake ranks, fake tensors, the real program.

What is built and stepped is what `ternlm.train` builds and steps; only memory, values and messages are missing. Counts
bytes of tensors, by kind, and every collective; knows nothing of time. Blocks run uncompiled.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from ternlm.config import Config
from ternlm.config.layout import Layout, Place, resolve_layout
from ternlm.data.batch import Batch
from ternlm.model.linear import adapted
from ternlm.monitor.allocations import AllocationLedger
from ternlm.monitor.collectives import CollectiveRecorder
from ternlm.monitor.timeline import NominalRates, Timeline
from ternlm.optim.groups import build_optimizers
from ternlm.parallel.mesh import Mesh, make_mesh
from ternlm.parallel.pieces import clear_gradients, make_pieces
from ternlm.planner.step_traffic import chunk_tokens
from ternlm.planner.traffic import Traffic, add_up
from ternlm.train.distributed import build_laid_out
from ternlm.train.objective import LossFn, next_token_loss
from ternlm.train.precision import autocast
from ternlm.train.step import accumulate_gradients, update_weights


@dataclass(frozen=True)
class Simulation:
    """What one rank holds and sends in one step after the first."""

    layout: Layout
    place: Place
    devices_per_node: int
    microbatches: int
    dtype: str
    """Of the matrix products and of gathered weights."""
    peak_bytes: dict[str, int]
    """Live bytes by kind when their sum was largest."""
    resting_bytes: dict[str, int]
    """Live bytes by kind between steps."""
    traffic: list[Traffic]
    """All collectives of the step, by kind."""
    flops: float
    """Operations of matrix products and attention."""
    trace: Timeline = field(repr=False, compare=False)

    def write_timeline(self, path: Path) -> None:
        """Write what happened when, as a trace for Perfetto."""
        about = {"world": self.layout.world, "rank": self.place.rank, "microbatches": self.microbatches}
        self.trace.write(path, {**about, "dtype": self.dtype})


def simulate(
    config: Config,
    world: int,
    rank: int = 0,
    devices_per_node: int = 8,
    rates: NominalRates | None = None,
) -> Simulation:
    """Run one step of one rank under fake ranks and fake tensors, as if it had run before.

    rates: of the trace. One document fills each sequence, the costliest case.
    Raises ConfigError where the layout doesn't fit.
    """
    layout = resolve_layout(config, world)
    dtype = torch.bfloat16 if config.compute.dtype == "auto" else getattr(torch, config.compute.dtype)
    trace = Timeline(rates or NominalRates(), _attention_flops(layout))
    ledger = AllocationLedger(lambda: trace.memory(ledger.now))
    with ExitStack() as stack:
        stack.enter_context(_fake_ranks(world, rank))
        mesh = _told(make_mesh(layout, rank, torch.device("cpu")), config)
        recorder = CollectiveRecorder(mesh, devices_per_node, trace.collective)
        fake = stack.enter_context(FakeTensorMode())
        for mode in (_Answers(fake), trace, ledger, recorder):
            stack.enter_context(mode)
        step = _make_step(config, mesh, dtype, ledger, trace)
        ledger.reset_peak()
        recorder.records.clear()
        trace.clear()
        microbatches = step()
    return Simulation(
        layout,
        layout.place(rank),
        devices_per_node,
        microbatches,
        str(dtype).removeprefix("torch."),
        dict(ledger.peak),
        dict(ledger.now),
        add_up(record for record in recorder.records if not _is_greeting(record)),
        trace.flops,
        trace,
    )


def _is_greeting(record: Traffic) -> bool:
    """Whether this is what neighbours in a pipeline send each other once, one float32, before the first step."""
    return record.axis == "pipeline" and record.payload_bytes == 4


def _make_step(config: Config, mesh: Mesh, dtype: torch.dtype, ledger: AllocationLedger, trace: Timeline) -> Any:
    """Build the run; return what trains one step of it and returns the number of its microbatches."""
    laid_out = build_laid_out(config, mesh, dtype, compile_blocks=False)
    parameters = list(laid_out.model.parameters())
    made = make_pieces(laid_out.model, mesh, config.parallel.sequence)
    pieces = [piece for piece in made if piece.parameter.requires_grad]
    optimizers = build_optimizers(pieces, config.optimizer, mesh)
    packed = [linear.packed for linear in adapted(laid_out.model).values() if linear.packed]
    ledger.mark("parameters", parameters, [(weight.codes, weight.scales) for weight in packed])
    for optimizer in optimizers:
        _count_states(optimizer, ledger)
    loss_fn = _watched_loss(config, mesh, ledger, trace)
    for module in laid_out.pipeline.stages.values() if laid_out.pipeline else [laid_out.model]:
        module.register_forward_pre_hook(lambda *unused: trace.phase("forward"))
        if laid_out.pipeline:
            module.register_forward_hook(lambda *unused: trace.phase("backward"))

    # Optimizer states come into being at the first update: here, so that the step is one of those after it.
    for piece in pieces:
        piece.tensor.grad = torch.empty_like(piece.tensor)
    for optimizer in optimizers:
        optimizer.step()
    clear_gradients(pieces)

    def step() -> int:
        batches = list(_microbatches(config, mesh.layout))
        loss = accumulate_gradients(laid_out, loss_fn, batches, partial(autocast, mesh.device, dtype))
        ledger.mark("gradients", [parameter.grad for parameter in parameters])
        trace.phase("update")
        update_weights(pieces, optimizers, mesh, config.optimizer.clip_norm, loss.divisor)
        trace.phase(None)
        return len(batches)

    return step


def _watched_loss(config: Config, mesh: Mesh, ledger: AllocationLedger, trace: Timeline) -> LossFn:
    vocab, hidden = config.model.vocab_size // mesh.layout.tensor, config.model.hidden_size
    # As many tokens at a time as a GPU would take, where the settings leave it open.
    settings = config.loss.model_copy(update={"chunk_tokens": chunk_tokens(config)})
    loss_fn = next_token_loss(settings, torch.zeros(config.model.vocab_size, dtype=torch.int32))

    def kind(tensor: Tensor) -> str | None:
        if tuple(tensor.shape) == (vocab, hidden):
            return "gradients"
        return "logits" if tensor.ndim == 2 and tensor.shape[1] == vocab else None

    def watched(*args: Any) -> Any:
        with ledger.within(kind):
            loss = loss_fn(*args)
        trace.phase("backward")
        return loss

    return watched


def _count_states(optimizer: Optimizer, ledger: AllocationLedger) -> None:
    """Count what an optimizer makes in its step as its own."""
    open_scope = ExitStack()
    optimizer.register_step_pre_hook(lambda *unused: open_scope.enter_context(ledger.within("optimizer")))
    optimizer.register_step_post_hook(lambda *unused: open_scope.close())


def _microbatches(config: Config, layout: Layout) -> Iterator[Batch]:
    """Yield one step's microbatches of one data-parallel rank."""
    rows, tokens = config.batch.microbatch_sequences, config.data.seq_len
    names = tuple(source.name for source in config.data.sources)
    for _ in range(config.batch.global_sequences // (rows * layout.data)):
        ids, targets, places = (torch.zeros((rows, tokens), dtype=torch.int64) for _ in range(3))
        types = torch.zeros(rows, dtype=torch.int64)
        yield Batch(ids, targets, torch.ones(rows, tokens), places, ((tokens,),) * rows, types, names)


@contextmanager
def _fake_ranks(world: int, rank: int) -> Iterator[None]:
    # From PyTorch's tests, where its own simulations take it from: importing it makes the backend known.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _told(mesh: Mesh, config: Config) -> Mesh:
    """Return the mesh with an answer to what ranks of a pipeline ask the last one: which sums the loss has."""
    names = ["nll", "tokens", "correct", "bytes"]

    class ToldMesh(Mesh):
        def tell_pipeline(self, value: Any) -> Any:
            return names if value is None else value

    return ToldMesh(**{field.name: getattr(mesh, field.name) for field in fields(mesh)})


class _Answers(TorchDispatchMode):
    """Answers the host when it reads a value of a fake tensor: true, or 1, so that the step goes its usual way."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        # A private name: weak references to made tensors, for nobody here; with one, `Module.to_empty` can't put a
        # parameter in another's place.
        self._memo = fake.fake_tensor_converter.meta_converter.tensor_memo

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
            self._memo.clear()
            return result
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
        if args[0].dtype == torch.bool:
            return True
        return 1.0 if args[0].dtype.is_floating_point else 1


def _attention_flops(layout: Layout) -> dict[str, Callable[..., float]]:
    """Return the operations of the attention operators, which PyTorch can't count, for one document a sequence.

    Causal, per query and key, in units of heads x head size: q.k and the weighted sum forward; in backward the scores
    again and four gradients. Half of the keys are masked, a multiply and an add are two operations.
    """

    def count(factor: float, q_BTNH: Tensor, *unused: Any) -> float:  # or its gradient, of the same shape
        return factor * q_BTNH.numel() * q_BTNH.shape[1]

    forward, backward = partial(count, 2.0), partial(count, 5.0)
    ring = partial(count, 2.0 * layout.context), partial(count, 5.0 * layout.context)
    return {
        "ternlm::segment_attention": forward,
        "ternlm::segment_attention_backward": backward,
        "ternlm::ring_attention": ring[0],
        "ternlm::ring_attention_backward": ring[1],
    }
