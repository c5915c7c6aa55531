"""Which combinations of features are tested, and the refusal of others.

A combination is the set of a run's features, words such as `tensor` or `sharding-1/k`; degrees don't count. It is
tested if each of its features, and each two of them together, occur in a case of `TESTED`. tests/parity trains every
case and compares it with one rank: losses, gradient norms, metrics and all weights.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from ternlm.config.run import Config
from ternlm.config.section import ConfigError

if TYPE_CHECKING:  # layout.py calls this file
    from ternlm.config.layout import Layout

MATRIX = "docs/support_matrix.md"
AXES: tuple[frozenset[str], ...] = (
    frozenset({"tensor", "tensor-sequence"}),
    frozenset({"context-ring", "context-all_to_all"}),
    frozenset({"pipeline-1f1b", "pipeline-interleaved", "pipeline-zero_bubble", "pipeline-zero_bubble_v"}),
    frozenset({"sharding-1/1/1", "sharding-1/1/k", "sharding-1/k", "sharding-k/k"}),
    frozenset({"recompute", "recompute-matmuls"}),
    frozenset({"packing-across", "packing-pad"}),
)
"""Features of which a run has one at most."""


@dataclass(frozen=True)
class Case:
    """One tested run."""

    text: str
    """`RANKS: FEATURE...`, features with a degree as `tensor=2`, the three sharding sizes as `sharding=1/2/4`."""
    ranks: int
    degrees: dict[str, int]
    sharding: tuple[int, int, int]
    flags: frozenset[str]

    @property
    def data_ranks(self) -> int:
        """Ranks that hold the same weights."""
        cut = [degree for name, degree in self.degrees.items() if not name.startswith("context")]
        return self.ranks // _product(cut)

    @property
    def data(self) -> int:
        """Ranks that see different sequences."""
        return self.ranks // _product(self.degrees.values())

    @property
    def features(self) -> frozenset[str]:
        """What the run combines."""
        flags = frozenset("adapter" if flag in ("lora", "dora") else flag for flag in self.flags)
        return flags | set(self.degrees) | _sharding(*self.sharding, self.data_ranks, self.data > 1)


@functools.cache
def parse_case(text: str) -> Case:
    """Read a line of `TESTED`."""
    ranks, *words = text.split()
    pairs = [word.split("=") for word in words if "=" in word]
    degrees = {name: int(value) for name, value in pairs if name != "sharding"}
    sizes = next((value for name, value in pairs if name == "sharding"), "1/1/1").split("/")
    flags = frozenset(word for word in words if "=" not in word)
    params, grads, optimizer = map(int, sizes)
    return Case(text, int(ranks.rstrip(":")), degrees, (params, grads, optimizer), flags)


def features_of(config: Config, layout: "Layout") -> frozenset[str]:
    """Return what a run combines."""
    model, parallel, compute, packing = config.model, config.parallel, config.compute, config.data.packing
    schedule: str = parallel.pipeline_schedule
    if schedule == "zero_bubble" and parallel.stages_per_rank == 2:  # stages lie in a V
        schedule += "_v"
    flags = {
        "tensor": layout.tensor > 1 and not parallel.sequence,
        "tensor-sequence": layout.tensor > 1 and parallel.sequence,
        f"context-{parallel.context_method}": layout.context > 1,
        f"pipeline-{schedule}": layout.pipeline > 1,
        "several-rows": config.batch.microbatch_sequences > 1,
        "rampup": config.batch.rampup is not None,
        f"packing-{packing}": packing in ("across", "pad"),
        "packing-pad": packing in ("pad", "best_fit"),  # apart, with padding: the same to a layout
        "recompute": compute.recompute > 0 and compute.recompute_keep == "nothing",
        "recompute-matmuls": compute.recompute > 0 and compute.recompute_keep == "matmuls",
        "compile": compute.compile != "off",
        "tied": model.tie_word_embeddings,
        "qk-norm": model.qk_norm,
        "rope-dynamic": model.rope_scaling.kind == "dynamic",
        "smoothing": config.loss.label_smoothing > 0,
        "z-loss": config.loss.z_loss > 0,
        "muon": config.optimizer.kind == "muon",
        "spike": config.train.spike != "off",
        "adapter": config.adapter is not None,
    }
    sharding = _sharding(layout.params, layout.grads, layout.optimizer, layout.data_ranks, layout.data > 1)
    return frozenset(name for name, there in flags.items() if there) | sharding


def check_supported(config: Config, layout: "Layout") -> None:
    """Raise ConfigError for a combination that isn't tested, unless `parallel.allow_untested`."""
    if layout.world == 1 or config.parallel.allow_untested:
        return
    features = features_of(config, layout)
    missing = untested_pairs(features)
    if not missing:
        return
    named = "; ".join(" with ".join(dict.fromkeys(pair)) for pair in missing[:4])
    more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
    raise ConfigError(
        f"no test trains {named}{more}, which this run combines on {layout.world} ranks; the nearest tested run is "
        f"`{nearest_case(features).text}` ({MATRIX}); choose what is tested, or set parallel.allow_untested=true and "
        "compare some steps with one rank's"
    )


def untested_pairs(features: Iterable[str], tested: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """Return the pairs of features that occur in no case together; a feature that occurs in none, with itself."""
    cases = [parse_case(text).features for text in (TESTED if tested is None else tested)]
    ordered = sorted(features)
    lonely = [(name, name) for name in ordered if not any(name in case for case in cases)]
    pairs = [pair for pair in combinations(ordered, 2) if not any(case.issuperset(pair) for case in cases)]
    alone = {name for name, _ in lonely}
    return lonely + [pair for pair in pairs if not alone & set(pair)]


def nearest_case(features: frozenset[str]) -> Case:
    """Return the tested case that has most of these features, and of those the one with least else."""
    return max(map(parse_case, TESTED), key=lambda case: (len(case.features & features), -len(case.features)))


def _sharding(params: int, grads: int, optimizer: int, ranks: int, data: bool) -> set[str]:
    """Name how states are cut over the `ranks` that hold the same weights; data: some see different sequences."""
    if ranks == 1:
        return set()
    kind = "k/k" if params > 1 else "1/k" if grads > 1 else "1/1/k" if optimizer > 1 else "1/1/1"
    flags = {
        f"sharding-{kind}": True,
        "wider-states": 1 < grads < optimizer,
        "copies": 1 < optimizer < ranks,
        "data": data,
    }
    return {name for name, there in flags.items() if there}


def _product(numbers: Iterable[int]) -> int:
    product = 1
    for number in numbers:
        product *= number
    return product


# In every case: float32, packed documents (but with packing-*), grouped-query attention, biases, clipping; in all but
# the two whole microbatches of 8 data-parallel ranks, several microbatches a step.
TESTED: tuple[str, ...] = (
    "2: sharding=1/1/1",
    "2: sharding=1/1/2",
    "2: sharding=1/2/2",
    "2: sharding=2/2/2",
    "2: tensor=2",
    "2: tensor-sequence=2",
    "2: context-ring=2",
    "2: context-all_to_all=2",
    "2: sharding=1/1/1 recompute",
    "2: sharding=1/1/1 recompute-matmuls",
    "2: sharding=1/1/1 tied",
    "2: sharding=1/1/1 muon",
    "2: pipeline-1f1b=2",
    "2: pipeline-interleaved=2",
    "2: pipeline-zero_bubble=2",
    "2: pipeline-zero_bubble_v=2",
    "2: sharding=1/1/1 compile",
    "4: tensor-sequence=2 sharding=1/2/2",
    "4: tensor=4",
    "4: context-ring=4 sharding=1/2/4 packing-pad",
    (
        "4: context-ring=4 sharding=1/1/2 several-rows rampup packing-pad recompute-matmuls tied rope-dynamic "
        "smoothing z-loss muon spike"
    ),
    (
        "4: tensor-sequence=2 context-all_to_all=2 sharding=1/1/1 several-rows rampup packing-across recompute "
        "tied qk-norm smoothing z-loss muon"
    ),
    (
        "4: context-all_to_all=2 sharding=1/2/4 several-rows rampup recompute-matmuls tied qk-norm rope-dynamic "
        "smoothing z-loss spike"
    ),
    (
        "4: tensor=2 context-all_to_all=2 sharding=2/2/2 several-rows rampup packing-across recompute tied "
        "qk-norm rope-dynamic smoothing z-loss spike"
    ),
    (
        "4: context-ring=2 sharding=1/2/4 several-rows rampup packing-across recompute qk-norm rope-dynamic "
        "smoothing muon spike"
    ),
    (
        "4: tensor=2 context-all_to_all=2 sharding=1/1/2 rampup packing-pad recompute tied qk-norm rope-dynamic "
        "z-loss muon"
    ),
    "4: tensor-sequence=2 sharding=1/1/1 several-rows packing-pad recompute-matmuls tied rope-dynamic muon spike",
    "4: context-ring=4 sharding=2/2/2 several-rows rampup packing-across recompute-matmuls tied qk-norm muon",
    "4: tensor=2 context-ring=2 sharding=1/1/1 rampup recompute-matmuls qk-norm smoothing z-loss muon",
    "4: sharding=1/1/2 packing-across recompute tied qk-norm spike",
    "4: pipeline-1f1b=4",
    "4: pipeline-1f1b=2 sharding=1/2/2",
    (
        "4: context-ring=2 pipeline-1f1b=2 sharding=1/1/2 several-rows rampup packing-pad recompute-matmuls "
        "qk-norm rope-dynamic smoothing z-loss"
    ),
    (
        "4: context-ring=2 pipeline-interleaved=2 sharding=1/1/1 several-rows rampup packing-across recompute "
        "rope-dynamic smoothing z-loss muon spike"
    ),
    (
        "4: context-ring=2 pipeline-zero_bubble_v=2 sharding=1/1/2 several-rows rampup qk-norm rope-dynamic "
        "smoothing z-loss muon spike"
    ),
    (
        "4: context-all_to_all=2 pipeline-zero_bubble=2 sharding=1/1/2 several-rows packing-across qk-norm "
        "rope-dynamic smoothing z-loss muon"
    ),
    "4: context-all_to_all=2 pipeline-1f1b=2 sharding=1/1/1 rampup packing-across recompute z-loss spike",
    (
        "4: context-all_to_all=2 pipeline-interleaved=2 sharding=2/2/2 packing-pad recompute qk-norm smoothing "
        "z-loss muon"
    ),
    "4: tensor=2 pipeline-zero_bubble=2 rampup packing-pad smoothing z-loss muon spike",
    "4: pipeline-interleaved=2 sharding=1/2/2 packing-pad recompute-matmuls rope-dynamic smoothing spike",
    "4: context-ring=2 pipeline-zero_bubble=2 sharding=1/1/1 several-rows rampup qk-norm smoothing z-loss spike",
    "4: tensor=2 pipeline-interleaved=2 several-rows packing-pad qk-norm",
    (
        "4: context-all_to_all=2 sharding=1/1/2 compile several-rows rampup packing-pad recompute tied qk-norm "
        "rope-dynamic smoothing z-loss muon spike"
    ),
    "4: context-ring=4 sharding=1/2/4 compile packing-across recompute-matmuls smoothing z-loss",
    "4: tensor=2 sharding=2/2/2 compile packing-pad recompute tied smoothing z-loss spike",
    "4: tensor-sequence=2 context-ring=2 sharding=1/1/2 compile rampup recompute tied qk-norm smoothing",
    (
        "4: context-ring=2 pipeline-1f1b=2 sharding=2/2/2 compile several-rows rampup packing-pad "
        "recompute-matmuls z-loss spike"
    ),
    "4: tensor-sequence=2 pipeline-interleaved=2 compile rampup packing-pad recompute qk-norm z-loss muon spike",
    "8: sharding=1/2/4",
    "8: sharding=2/2/4 several-rows",
    "8: sharding=8/8/8 several-rows",
    "8: context-ring=2 sharding=1/2/8",
    "8: context-all_to_all=4 sharding=4/4/4",
    "8: tensor-sequence=2 context-ring=2 sharding=2/2/4",
    "8: tensor-sequence=4 sharding=1/2/2",
    "8: tensor=2 context-ring=4 sharding=1/2/2 several-rows rampup packing-pad tied z-loss muon spike",
    "8: tensor-sequence=2 context-ring=4 sharding=2/2/2 rampup packing-pad recompute tied rope-dynamic muon",
    "8: tensor=2 sharding=2/2/4 several-rows rampup packing-pad recompute-matmuls z-loss muon",
    "8: tensor-sequence=2 pipeline-1f1b=2 sharding=1/2/2",
    "8: tensor=2 pipeline-1f1b=2 sharding=2/2/2",
    "8: tensor-sequence=2 pipeline-interleaved=2 sharding=1/1/2",
    "8: tensor-sequence=2 pipeline-zero_bubble=2 sharding=1/1/2",
    "8: pipeline-1f1b=2 sharding=1/2/4",
    "8: pipeline-zero_bubble_v=2 sharding=1/1/2",
    "8: tensor=2 context-all_to_all=2 pipeline-zero_bubble_v=2 sharding=1/1/1 packing-across rope-dynamic spike",
    "8: context-ring=2 pipeline-1f1b=2 sharding=1/2/2 several-rows packing-pad recompute z-loss muon spike",
    (
        "8: tensor-sequence=2 context-ring=2 pipeline-zero_bubble_v=2 sharding=1/1/2 several-rows packing-pad "
        "qk-norm rope-dynamic smoothing z-loss spike"
    ),
    "8: context-ring=2 pipeline-interleaved=2 sharding=2/2/4 packing-across recompute-matmuls",
    "8: pipeline-zero_bubble=2 sharding=1/1/2 rampup packing-pad rope-dynamic smoothing spike",
    "8: context-ring=2 pipeline-interleaved=2 sharding=1/1/2 packing-pad recompute rope-dynamic muon spike",
    "2: pipeline-interleaved=2 lora",
    (
        "4: context-all_to_all=2 sharding=1/2/4 several-rows rampup recompute-matmuls tied qk-norm rope-dynamic "
        "smoothing z-loss spike dora"
    ),
    "4: tensor=2 sharding=2/2/2 compile packing-pad recompute tied smoothing z-loss spike lora",
    "4: context-all_to_all=2 pipeline-1f1b=2 sharding=1/1/1 rampup packing-across recompute z-loss spike lora",
    (
        "8: tensor-sequence=2 context-ring=2 pipeline-zero_bubble_v=2 sharding=1/1/2 several-rows packing-pad "
        "qk-norm rope-dynamic smoothing z-loss spike dora"
    ),
    "8: pipeline-zero_bubble=2 sharding=1/1/2 rampup packing-pad rope-dynamic smoothing spike dora",
)
