"""The settings of each tested combination (ternlm/config/support.py), and its training on the ranks there are."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_steps import STEPS, errors, merged, run_steps, start

from ternlm.config.support import Case, parse_case
from ternlm.data.batch import Batch
from ternlm.model.init import fill_initial
from ternlm.parallel.mesh import Mesh
from ternlm.train.objective import Loss, LossFn
from ternlm.train.validate import validate

# What each feature means in settings. Those of `MODEL` change what is trained, the others only how.
MODEL: dict[str, dict[str, Any]] = {
    "tied": {"model": {"tie_word_embeddings": True}},
    "qk-norm": {"model": {"qk_norm": True}},
    "rope-dynamic": {
        "model": {"max_position_embeddings": 32, "rope_scaling": {"kind": "dynamic", "factor": 2.0}},
    },
    "smoothing": {"loss": {"label_smoothing": 0.1}},
    "z-loss": {"loss": {"z_loss": 1e-3}},
    "muon": {"optimizer": {"kind": "muon"}},
    "rampup": {"batch": {"rampup": {"start": 8, "increment": 8, "every": 1}}},
    "spike": {"train": {"spike": "skip", "spike_window": 1, "steps": STEPS + 2}},
    "packing-across": {"data": {"packing": "across"}},
    "packing-pad": {"data": {"packing": "pad"}},
    "lora": {"adapter": {"rank": 4, "alpha": 8.0}, "load": {"from": "base"}},
    "dora": {"adapter": {"kind": "dora", "rank": 3, "alpha": 6.0}, "load": {"from": "base"}},
}
LAYOUT: dict[str, Callable[[int], dict[str, Any]]] = {
    "tensor": lambda degree: {"parallel": {"tensor": degree, "sequence": False}},
    "tensor-sequence": lambda degree: {"parallel": {"tensor": degree}},
    "context-ring": lambda degree: {"parallel": {"context": degree}},
    "context-all_to_all": lambda degree: {"parallel": {"context": degree, "context_method": "all_to_all"}},
    "pipeline-1f1b": lambda degree: {"parallel": {"pipeline": degree}},
    "pipeline-interleaved": lambda degree: {
        "parallel": {"pipeline": degree, "pipeline_schedule": "interleaved", "stages_per_rank": 2}
    },
    "pipeline-zero_bubble": lambda degree: {"parallel": {"pipeline": degree, "pipeline_schedule": "zero_bubble"}},
    "pipeline-zero_bubble_v": lambda degree: {
        "parallel": {"pipeline": degree, "pipeline_schedule": "zero_bubble", "stages_per_rank": 2}
    },
}
COMPUTE: dict[str, dict[str, Any]] = {
    "recompute": {"compute": {"recompute": 0.8}},
    "recompute-matmuls": {"compute": {"recompute": 0.8, "recompute_keep": "matmuls"}},
    "compile": {"compute": {"compile": "on"}},
    "several-rows": {"batch": {"microbatch_sequences": 2}},
}
ALWAYS = {"parallel": {"allow_untested": True}, "validation": {"max_sequences": 8}}


def settings_of(case: Case) -> dict[str, Any]:
    """Return the changes to `rank_steps.SETTINGS` that make the case."""
    params, grads, optimizer = case.sharding
    settings = merged(model_settings(case), {"sharding": dict(params=params, grads=grads, optimizer=optimizer)})
    for name, degree in case.degrees.items():
        settings = merged(settings, LAYOUT[name](degree))
    for name in sorted(case.flags & COMPUTE.keys()):
        settings = merged(settings, COMPUTE[name])
    return settings


def model_settings(case: Case) -> dict[str, Any]:
    """Return those of the changes that one rank needs to train the same."""
    settings = merged(ALWAYS, {"batch": {"global_sequences": _batch(case)}})
    for name in model_of(case).split()[1:]:
        settings = merged(settings, MODEL[name])
    return settings


def model_of(case: Case) -> str:
    """Name what one rank trains for the case."""
    return " ".join([f"{_batch(case)}-sequences", *sorted(case.flags & MODEL.keys())])


def _batch(case: Case) -> int:
    piped = any(name.startswith("pipeline") for name in case.degrees)
    return 16 if "rampup" in case.flags or case.data >= (4 if piped else 8) else 8  # as few as the case can do with


def train_alone(folder: Path, texts: Sequence[str]) -> None:
    """Write what one rank finds for every model among the cases."""
    for case in {model_of(case): case for case in map(parse_case, texts)}.values():
        torch.save(_train(folder, case, model_settings(case)), folder / f"{model_of(case)}.pt")


def train_cases(folder: Path, texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Train the cases on this group of ranks; return each one's errors against one rank's."""
    found: dict[str, dict[str, float]] = {}
    for case in map(parse_case, texts):
        began = time.monotonic()
        try:
            result = _train(folder, case, settings_of(case))
        except Exception as trouble:
            raise RuntimeError(f"in case {case.text!r}") from trouble
        truth = torch.load(folder / f"{model_of(case)}.pt")
        assert _names_on_all_ranks(result) == truth["weights"].keys()
        found[case.text] = {**errors(result, truth), "seconds": time.monotonic() - began}
        torch._dynamo.reset()  # a compiled block is no other model's
    return found


def _train(folder: Path, case: Case, settings: Mapping[str, Any]) -> dict[str, Any]:
    held_out: dict[str, Any] = {"data": {"validation": [{"name": "held", "path": str(folder / "code")}]}}
    if "adapter" in settings:
        held_out["load"] = {"from": str(_base(folder, case))}
    run = start(folder, merged(settings, held_out), resume="never")
    if "adapter" in settings:  # which would else begin at nothing
        for piece in run.pieces:
            fill_initial(piece.shard().detach(), f"{piece.name}.start", run.config.model, 1, piece.shape, piece.offset)
    loss_fn = run.loss_fn

    def spoil(step: int) -> None:
        run.loss_fn = _spoilt(loss_fn, run.mesh, step)

    found = run_steps(run, run.config.train.steps, spoil if "spike" in case.flags else None)
    assert run.progress.updates == STEPS, f"{run.progress.updates} updates in {run.progress.step} steps"
    found["sums"].append({name: [value] for name, value in validate(run).items()})
    return found


def _base(folder: Path, case: Case) -> Path:
    """Return a model for adapters to be trained on, which is made where it isn't there."""
    flags = sorted(case.flags & {"tied", "qk-norm", "rope-dynamic"})
    base = folder / "-".join(["base", *flags])
    if not base.exists():
        settings: dict[str, Any] = {"out": str(base)}
        for name in flags:
            settings = merged(settings, MODEL[name])
        run = start(folder, settings, resume="never")
        run.save()
        run.saver.finish()
    return base


def _names_on_all_ranks(result: Mapping[str, Any]) -> set[str]:
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, set(result["weights"]))
    return set().union(*names)


def _spoilt(loss_fn: LossFn, mesh: Mesh, step: int) -> LossFn:
    """Make the second step's loss a spike, and the fourth's gradients not finite, on one rank of many alone."""
    layout, place = mesh.layout, mesh.place
    last = (place.data, place.context, place.tensor) == (layout.data - 1, layout.context - 1, layout.tensor - 1)

    def spoilt(head: Any, hidden_BTD: torch.Tensor, batch: Batch) -> Loss:
        if step == 3 and last and hidden_BTD.requires_grad:
            hidden_BTD.register_hook(lambda gradient: gradient * float("nan"))
        loss = loss_fn(head, hidden_BTD, batch)
        return Loss(loss.total * (3.0 if step == 1 else 1.0), loss.tokens, loss.metrics)

    return spoilt
