import gc
import itertools
import random
from collections import Counter
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ternlm.config.model import ModelConfig
from ternlm.config.stages import split_layers, stage_costs, stages_of
from ternlm.config.training import LossConfig
from ternlm.data.batch import Batch
from ternlm.model.decoder import build_empty_model, build_model
from ternlm.model.init import init_weights
from ternlm.ops.attention import make_segment_attend
from ternlm.parallel.pipeline import Pipeline, Reduction, Travelling
from ternlm.parallel.recompute import recompute_blocks
from ternlm.parallel.stages import Microbatch, cut_stage, join_stages
from ternlm.train.objective import next_token_loss

CPU = torch.device("cpu")
LOSS = next_token_loss(LossConfig(z_loss=1e-3))
PLAIN = {"kind": "plain", "std": 0.05}
CONFIG = ModelConfig(preset="tiny-gqa", num_hidden_layers=5, attention_bias=True, qk_norm=True, init=PLAIN)
DYNAMIC = ModelConfig(
    preset="tiny-gqa",
    num_hidden_layers=5,
    max_position_embeddings=16,
    rope_scaling={"kind": "dynamic", "factor": 2.0},
    init=PLAIN,
)
LOSS_TOLERANCE, GRAD_TOLERANCE = 2e-5, 1e-5


def make_batch(number, rows=2, tokens=32):
    """Packed documents of lengths that differ from microbatch to microbatch."""
    rng, generator = random.Random(number), torch.Generator().manual_seed(number)
    lengths = []
    for _ in range(rows):
        cuts = sorted(rng.sample(range(1, tokens), rng.randrange(4)))
        lengths.append(tuple(b - a for a, b in itertools.pairwise([0, *cuts, tokens])))
    weights = (torch.rand(rows, tokens, generator=generator) < 0.8).float()
    return Batch(
        tokens_BT=torch.randint(512, (rows, tokens), generator=generator),
        targets_BT=torch.randint(512, (rows, tokens), generator=generator) * (weights != 0),
        weights_BT=weights,
        positions_BT=torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]),
        lengths=tuple(lengths),
        types_B=torch.zeros(rows, dtype=torch.long),
        names=("data",),
    )


def microbatch_of(batch, constant):
    def loss(head, hidden_BTD):
        found = LOSS(head, hidden_BTD, batch)
        return found.total * constant, found.total.detach()

    return Microbatch(batch.tokens_BT, batch.positions_BT, make_segment_attend(batch.lengths, CPU), loss)


def whole_step(config, batches, constant, autocast=nullcontext):
    """Return the losses and gradients of the whole model on one rank."""
    model = build_empty_model(config, CPU)
    init_weights(model, config, seed=1)
    losses = []
    for batch in batches:
        with autocast():
            hidden = model(batch.tokens_BT, batch.positions_BT, make_segment_attend(batch.lengths, CPU))
            total = LOSS(model.lm_head, hidden, batch).total
        (total * constant).backward()
        losses.append(float(total.detach()))
    return losses, {name: p.grad for name, p in model.named_parameters()}


def build_stages(config, group, schedule="1f1b", stages_per_rank=1):
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    cuts = split_layers(config.num_hidden_layers, ranks * stages_per_rank, *stage_costs(config, 32))
    with torch.device("meta"):
        model = build_model(config)
    last = len(cuts) - 1
    indices = stages_of(rank, ranks, schedule, stages_per_rank)
    stages = {i: cut_stage(model, cuts[i], first=i == 0, last=i == last) for i in indices}
    part = join_stages(stages.values())
    part.to_empty(device=CPU)
    init_weights(part, config, seed=1)
    return stages


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def off(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def step_errors(pipeline, config, rank_batches, data_rank=0, autocast=nullcontext, watch=None):
    """Run a step; return the greatest relative error of its losses and gradients, and clear the gradients."""
    constant = 0.01
    losses, grads = whole_step(config, list(itertools.chain(*rank_batches)), constant, autocast)
    own = rank_batches[data_rank]
    with watch or nullcontext():
        found = pipeline.run([microbatch_of(batch, constant) for batch in own], autocast)
    assert len(found) == (len(own) if pipeline.rank == pipeline.last_rank else 0)
    before = sum(len(each) for each in rank_batches[:data_rank])
    grad_error = 0.0
    for name, parameter in join_stages(pipeline.stages.values()).named_parameters():
        grad_error = max(grad_error, off(full(parameter.grad), grads[name]))
        parameter.grad = None
    return loss_error(found, losses[before:]), grad_error


def loss_error(found, wanted):
    return max((abs(float(a) / b - 1) for a, b in zip(found, wanted, strict=False)), default=0.0)


def worst(errors):
    return tuple(max(values) for values in zip(*errors, strict=True))


def evaluation_errors(pipeline, config, count, rows):
    batches = [make_batch(1000 + i, rows) for i in range(count)]
    losses, _ = whole_step(config, batches, 1.0)
    found = pipeline.evaluate([microbatch_of(batch, 1.0) for batch in batches])
    assert len(found) == (count if pipeline.rank == pipeline.last_rank else 0)
    return loss_error(found, losses), 0.0


def run_case(group, config, schedule, stages_per_rank, counts, prepare=lambda stage: None):
    """Train and evaluate with numbers of microbatches that change; the first ones come back, to find them kept."""
    stages = build_stages(config, group, schedule, stages_per_rank)
    for stage in stages.values():
        prepare(stage)
    pipeline = Pipeline(stages, schedule, group, CPU, Travelling(config.hidden_size, torch.float32))
    errors = []
    for step, count in enumerate(counts):
        errors.append(step_errors(pipeline, config, [[make_batch(100 * step + i) for i in range(count)]]))
        errors.append(evaluation_errors(pipeline, config, count=2 * step + 1, rows=step + 1))
    assert num_activations(config) == 0
    return worst(errors)


def num_activations(config):
    """Count tensors of a residual stream that are still there: nothing is to be held from step to step."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
    shapes = [tensor.shape for tensor in tensors if not tensor.is_meta]
    return sum(len(shape) == 3 and shape[1:] == (32, config.hidden_size) for shape in shapes)


def half_precision_case(group):
    """The residual stream travels in bfloat16."""
    stages = build_stages(CONFIG, group)
    pipeline = Pipeline(stages, "1f1b", group, CPU, Travelling(CONFIG.hidden_size, torch.bfloat16))
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    return step_errors(pipeline, CONFIG, [[make_batch(i) for i in range(3)]], autocast=autocast)


def prepare_blocks(change):
    return lambda stage: change(list(stage.model.layers))


def compile_blocks(blocks):
    for block in blocks:
        block.compile(backend="aot_eager")


def two_ranks():
    group = dist.group.WORLD
    again = prepare_blocks(partial(recompute_blocks, fraction=1.0, keep="nothing"))
    kept = prepare_blocks(partial(recompute_blocks, fraction=1.0, keep="matmuls"))
    return {
        "1f1b": run_case(group, CONFIG, "1f1b", 1, (4, 7, 4)),
        "interleaved": run_case(group, CONFIG, "interleaved", 2, (4, 6, 4)),
        "zero bubble": run_case(group, CONFIG, "zero_bubble", 1, (4, 6, 4)),
        "zero bubble in a V": run_case(group, CONFIG, "zero_bubble", 2, (4, 7, 2)),
        "dynamic rope": run_case(group, DYNAMIC, "interleaved", 2, (2,)),
        "recompute": run_case(group, CONFIG, "1f1b", 1, (3,), again),
        "recompute, matmuls kept": run_case(group, CONFIG, "interleaved", 2, (4,), kept),
        "bfloat16": half_precision_case(group),
    }


def two_ranks_compiled():
    return {"compiled": run_case(dist.group.WORLD, CONFIG, "interleaved", 2, (4, 2), prepare_blocks(compile_blocks))}


class Collectives(TorchDispatchMode):
    """Counts gathers and reductions."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for name in ("allgather", "reduce_scatter"):
            self.counts[name] += name in str(func)
        return func(*args, **(kwargs or {}))


def shard(stage, mesh, reshard):
    for module in (*stage.model.layers, *([stage.lm_head] if stage.last else [])):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(stage, mesh=mesh, reshard_after_forward=reshard)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def sharded_case(mesh, schedule, stages_per_rank, reduction):
    group = mesh["pipeline"].get_group()
    stages = build_stages(CONFIG, group, schedule, stages_per_rank)
    for stage in stages.values():
        shard(stage, mesh["data"], reduction.reshard)
    pipeline = Pipeline(stages, schedule, group, CPU, Travelling(CONFIG.hidden_size, torch.float32), reduction)
    errors = []
    for step, count in enumerate((2, 4)):
        batches = [[make_batch(100 * step + 10 * rank + i) for i in range(count)] for rank in range(2)]
        seen = Collectives()
        errors.append(step_errors(pipeline, CONFIG, batches, mesh["data"].get_local_rank(), watch=seen))
        errors.append(evaluation_errors(pipeline, CONFIG, count=3, rows=2))
    return (*worst(errors), {name: count / num_units(stages) for name, count in seen.counts.items()})


def num_units(stages):
    """Modules that FSDP gathers and reduces at once: blocks, head and what is left (embedding, norm)."""
    return sum(len(stage.model.layers) + stage.first + 2 * stage.last for stage in stages.values())


def cut_for_tensor(stage, mesh):
    """Cut a stage over tensor ranks, its residual stream along T."""
    norm = SequenceParallel(use_local_output=True)
    whole, cut = (Replicate(), None, None, None), (Shard(1), None, None, None)
    plan = {
        "model.layers.*.self_attn": PrepareModuleInput(input_layouts=cut, desired_input_layouts=whole),
        "model.layers.*.mlp": PrepareModuleInput(input_layouts=cut[:1], desired_input_layouts=whole[:1]),
    }
    if stage.first:
        plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    if stage.last:
        plan["model.norm"] = norm
    for name in ("input_layernorm", "post_attention_layernorm"):
        plan[f"model.layers.*.{name}"] = norm
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        plan[f"model.layers.*.{name}"] = ColwiseParallel()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{name}"] = RowwiseParallel(output_layouts=Shard(1))
    parallelize_module(stage, mesh, plan)


def tensor_case(mesh, schedule, stages_per_rank):
    config = CONFIG.model_copy(update={"qk_norm": False})
    group, tensor = mesh["pipeline"].get_group(), mesh["data"]
    stages = build_stages(config, group, schedule, stages_per_rank)
    for stage in stages.values():
        cut_for_tensor(stage, tensor)
        if stage.last:
            stage.model.norm.register_forward_hook(
                lambda module, given, out: DTensor.from_local(out, tensor, [Shard(1)]).full_tensor()
            )
    travelling = Travelling(config.hidden_size, torch.float32, sequence_degree=2)
    pipeline = Pipeline(stages, schedule, group, CPU, travelling)
    return step_errors(pipeline, config, [[make_batch(i) for i in range(4)]])


def four_ranks():
    group = dist.group.WORLD
    wide = CONFIG.model_copy(update={"num_hidden_layers": 9})
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
    return {
        "1f1b": run_case(group, CONFIG, "1f1b", 1, (4, 7)),
        "interleaved": run_case(group, wide, "interleaved", 2, (4, 8)),
        "zero bubble": run_case(group, CONFIG, "zero_bubble", 1, (4, 8)),
        "zero bubble in a V": run_case(group, wide, "zero_bubble", 2, (4, 9)),
        "1f1b, tensor and sequence": tensor_case(mesh, "1f1b", 1),
        "interleaved, tensor and sequence": tensor_case(mesh, "interleaved", 2),
    }


def four_ranks_sharded():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
    once, each, cut = Reduction(), Reduction(each_microbatch=True), Reduction(each_microbatch=True, reshard=True)
    return {
        "1f1b, once": sharded_case(mesh, "1f1b", 1, once),
        "1f1b, each": sharded_case(mesh, "1f1b", 1, each),
        "1f1b, cut": sharded_case(mesh, "1f1b", 1, cut),
        "interleaved, once": sharded_case(mesh, "interleaved", 2, once),
        "interleaved, cut": sharded_case(mesh, "interleaved", 2, cut),
        "zero bubble, once": sharded_case(mesh, "zero_bubble", 1, once),
        "zero bubble in a V, once": sharded_case(mesh, "zero_bubble", 2, once),
    }


def check(errors_by_rank):
    errors = {name: worst([each[name][:2] for each in errors_by_rank]) for name in errors_by_rank[0]}
    for name, (loss, grad) in errors.items():
        print(f"{name}: loss {loss:.1e}, gradients {grad:.1e}")
    assert {name: e for name, e in errors.items() if e[0] > LOSS_TOLERANCE or e[1] > GRAD_TOLERANCE} == {}


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, two_ranks),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, two_ranks_compiled), (4, four_ranks))),
    ],
    ids=["2 ranks", "2 ranks, compiled", "4 ranks"],
)
def test_losses_and_gradients_equal_one_rank(world, cases):
    check(run_ranks(world, cases, timeout=300))


@pytest.mark.slow
def test_sharded_stages_equal_one_rank_and_reduce_once_a_step_or_once_a_microbatch():
    found = run_ranks(4, four_ranks_sharded, timeout=300)
    check(found)
    traffic = {"once": (1, 1), "each": (1, 4), "cut": (8, 4)}  # gathers and reductions of a unit with 4 microbatches
    for cases in found:
        for name, (_, _, counts) in cases.items():
            assert (counts["allgather"], counts["reduce_scatter"]) == traffic[name.split()[-1]], name


def wrong_travellers():
    stages = build_stages(CONFIG, dist.group.WORLD)
    pipeline = Pipeline(stages, "1f1b", dist.group.WORLD, CPU, Travelling(CONFIG.hidden_size, torch.bfloat16))
    with pytest.raises(ValueError, match="must have one shape, not") as different:
        pipeline.run([microbatch_of(make_batch(0), 1.0), microbatch_of(make_batch(1, rows=3), 1.0)])
    if dist.get_rank():
        return str(different.value)
    with pytest.raises(ValueError, match=r"stage 0 gave .* torch.float32, and .* torch.bfloat16 is what travels"):
        pipeline.evaluate([microbatch_of(make_batch(0), 1.0)])
    return str(different.value)


def test_activations_of_another_shape_or_type_than_stated_are_refused():
    assert "[(2, 32, 64), (3, 32, 64)]" in run_ranks(2, wrong_travellers)[0]
