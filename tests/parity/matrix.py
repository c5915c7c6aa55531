"""The page docs/support_matrix.md: what is tested, and the errors found."""

import re
from collections.abc import Mapping
from itertools import combinations

from ternlm.config.support import AXES, TESTED, parse_case, untested_pairs

NAMES = ("loss", "norm", "metrics", "weights")
ROW = re.compile(r"^\| `(?P<text>\d+: [^`]+)` \|(?P<errors>.*)\|$", re.MULTILINE)

HEAD = """# What is tested on many devices

A run on several ranks combines features: ways of cutting it, and settings whose code meets those ways. It counts as
tested **if each of its features, and each two of them together, occur in one of the runs below**; how many ranks a
feature has doesn't count. Another combination is refused, with the nearest run of this list, unless
`parallel.allow_untested=true`. The list lies in `ternlm/config/support.py`; `tests/parity` trains every line of it for
3 updates on forked CPU ranks (gloo) and compares with one rank: the loss and the gradient's norm of each step, the sums
behind the metrics, the validation losses, and every weight.

In every run: float32, a model of 5 layers with grouped-query attention and biases, several documents packed into a
sequence (but with packing-*), clipping, a global batch of 8 or 16 sequences of 64 tokens. Not shown by this list:
bfloat16 and float16, also as `sharding.reduce_dtype`, which differ by rounding; CUDA and NCCL, where this doesn't run.

This page is written by `TERNLM_WRITE_MATRIX=1 pytest tests/parity/test_layouts.py -m ''`.

## Words

| word | settings |
|---|---|
| `tensor=2`, `tensor-sequence=2` | `parallel.tensor=2` with `parallel.sequence` false, true |
| `context-ring=2`, `context-all_to_all=2` | `parallel.context=2` and `parallel.context_method` |
| `pipeline-1f1b=2`, `-interleaved`, `-zero_bubble` | `parallel.pipeline=2` and `parallel.pipeline_schedule` |
| `pipeline-zero_bubble_v=2` | the same with `parallel.stages_per_rank=2`, whose stages lie in a V |
| `sharding=1/2/4` | `sharding.params`, `sharding.grads`, `sharding.optimizer` |
| `recompute`, `recompute-matmuls` | `compute.recompute` above 0, `compute.recompute_keep` nothing, matmuls |
| `compile` | `compute.compile` auto or on |
| `several-rows` | `batch.microbatch_sequences` above 1 |
| `rampup`, `spike` | `batch.rampup`; `train.spike`, and here one step that spikes and one with a NaN on one rank |
| `packing-across`, `packing-pad` | `data.packing`; `best_fit` counts as `packing-pad` |
| `tied`, `qk-norm`, `rope-dynamic` | `model.tie_word_embeddings`, `model.qk_norm`, `model.rope_scaling.kind` |
| `smoothing`, `z-loss`, `muon` | `loss.label_smoothing`, `loss.z_loss`, `optimizer.kind` |
| `lora`, `dora` | `adapter.kind`, with all targets; as features both are `adapter` |

As features, three sizes of sharding count as `sharding-1/1/1`, `sharding-1/1/k`, `sharding-1/k` or `sharding-k/k`, with
`wider-states` where the optimizer's states are cut over more ranks than gradients, and `copies` where over fewer than
there are; `data` is that ranks see different sequences.
"""


def page(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return the page's text for the greatest relative errors of each case."""
    lines = [
        "## Runs",
        "",
        "The greatest relative error on any rank; of weights, relative to the greatest weight of their tensor.",
        "",
        f"| ranks: what it combines | {' | '.join(NAMES)} |",
        f"|---|{'---|' * len(NAMES)}",
        *(f"| `{text}` | {' | '.join(f'{found[text][name]:.0e}' for name in NAMES)} |" for text in TESTED),
    ]
    return f"{HEAD}\n{_untested()}\n" + "\n".join(lines) + "\n"


def rows(text: str) -> list[tuple[str, dict[str, float]]]:
    """Read the cases of a page, and their errors."""
    return [
        (match["text"], dict(zip(NAMES, map(float, match["errors"].split("|")), strict=True)))
        for match in ROW.finditer(text)
    ]


def _untested() -> str:
    """Say which two features that could meet do so in no case."""
    every = sorted(set().union(*(parse_case(text).features for text in TESTED)))
    pairs = [pair for pair in combinations(every, 2) if not any(set(pair) <= axis for axis in AXES)]
    missing = [pair for pair in pairs if untested_pairs(pair)]
    lines = []
    while missing:
        # The feature with most of them first, so that each pair stands once and few lines tell all.
        first = max(every, key=lambda name: sum(name in pair for pair in missing))
        others = [b if a == first else a for a, b in missing if first in (a, b)]
        lines.append(f"- `{first}` with {', '.join(f'`{name}`' for name in others)}")
        missing = [pair for pair in missing if first not in pair]
    return "\n".join(["Features that meet in no run:", "", *(lines or ["- none"])]) + "\n"
