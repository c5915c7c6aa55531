"""A short training run on any layout, and how far it is from one rank's. Real data, loader, loss, optimizer, step."""

import math
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ternlm.config import Config, config_from_dict
from ternlm.config.layout import resolve_layout
from ternlm.data.prepare import prepare
from ternlm.data.train_tokenizer import train_tokenizer
from ternlm.parallel.mesh import make_mesh, one_rank
from ternlm.train.loop import train_step
from ternlm.train.run import Run, set_up

STEPS = 3
CPU = torch.device("cpu")

# Small, but nothing in it is even by chance: 5 layers, GQA, sizes that leave remainders over 4 and 8 ranks.
SETTINGS: dict[str, Any] = {
    "model": {
        "vocab_size": 264,
        "hidden_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "intermediate_size": 104,
        "attention_bias": True,
        "max_position_embeddings": 64,
        "init": {"kind": "plain", "std": 0.08},
    },
    "data": {"seq_len": 64, "sources": []},
    "batch": {"global_sequences": 16, "microbatch_sequences": 1},
    "train": {"steps": STEPS},
    # With the usual eps a weight whose gradient is rounding alone would move by a whole learning rate either way;
    # with this one the errors of weights fall from 1e-4 to 3e-6, and show what is really wrong.
    "optimizer": {"lr": 1e-2, "clip_norm": 0.5, "eps": 1e-4},
    "schedule": {"kind": "constant", "warmup_fraction": 0.0},
    "compute": {"device": "cpu", "dtype": "float32", "compile": "off", "threads": 1},
    "checkpoint": {"every_steps": 0},
    "monitor": {"progress": "off", "jsonl": False},
}


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with those of `changes`, which may be nested, in their place."""
    result = dict(settings)
    for name, value in changes.items():
        result[name] = merged(result.get(name, {}), value) if isinstance(value, Mapping) else value
    return result


def make_config(folder: Path, changes: Mapping[str, Any]) -> Config:
    """Return the settings of a run on the shards in `folder`."""
    sources = [{"name": name, "path": str(folder / name)} for name in ("en", "code")]
    return config_from_dict(
        merged(merged(SETTINGS, {"data": {"sources": sources}, "out": str(folder / "run")}), changes)
    )


def start(folder: Path, changes: Mapping[str, Any], resume: str = "auto") -> Run:
    """Set up a run on the ranks there are."""
    config = make_config(folder, changes)
    world = dist.get_world_size() if dist.is_initialized() else 1
    layout = resolve_layout(config, world)
    mesh = make_mesh(layout, dist.get_rank(), CPU) if world > 1 else one_rank(CPU)
    torch.manual_seed(0)
    return set_up(config, resume, mesh)


def run_steps(run: Run, steps: int = STEPS, before_step: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Train, and return losses, gradient norms, what was counted, and the weights that this rank holds."""
    losses, norms, sums = [], [], []
    for step in range(steps):
        if before_step is not None:
            before_step(step)
        facts = train_step(run, next(run.loader))
        assert facts is not None
        losses.append(facts.loss.mean)
        norms.append(facts.norm)
        sums.append(facts.loss.metrics)
    run.loader.close()
    weights = {p.name: (p.offset, p.shard().detach().clone()) for p in run.pieces}
    return {"losses": losses, "norms": norms, "sums": sums, "weights": weights}


def errors(found: Mapping[str, Any], truth: Mapping[str, Any]) -> dict[str, float]:
    """Return the greatest relative errors of losses, norms, metric sums and weights on this rank."""
    weight = 0.0
    for name, (offset, part) in found["weights"].items():
        whole = truth["weights"][name][1]
        place = tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))
        if part.numel():
            far = (part - whole[place]).abs().nan_to_num(nan=math.inf, posinf=math.inf).max()
            weight = max(weight, float(far / whole.abs().max()))
    return {
        "loss": _relative(found["losses"], truth["losses"]),
        "norm": _relative(found["norms"], truth["norms"]),
        "metrics": max(
            _relative(ours[name], theirs[name])
            for ours, theirs in zip(found["sums"], truth["sums"], strict=True)
            for name in theirs
        ),
        "weights": weight,
    }


def write_shards(folder: Path) -> None:
    """Write two sources, of code and of prose, from the standard library; documents of very different lengths."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = {"code": library / "argparse.py", "en": library / "pydoc_data" / "topics.py"}
    train_tokenizer(list(texts.values()), 264, folder / "tokenizer", format="text")
    for name, path in texts.items():
        prepare([path], folder / "tokenizer", folder / name, format="text", text_document="paragraph", workers=1)


def _relative(ours: list[float], theirs: list[float]) -> float:
    return max((_apart(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _apart(ours: float, theirs: float) -> float:
    if not math.isfinite(theirs):  # as the loss in which a spike is made
        return 0.0 if str(ours) == str(theirs) else math.inf
    return abs(ours - theirs) / max(abs(theirs), 1e-12) if math.isfinite(ours) else math.inf
