"""Ranks and their places: the numbers of a layout, resolved for a world size and checked against the model.

The mesh is (pipeline, replicate, shard, context, tensor), tensor fastest. States are cut over the "data ranks" of a
(pipeline, tensor) place: the data-parallel ranks times the context ranks, which hold the same weights.
"""

from dataclasses import dataclass

from ternlm.config.parallel import ShardingConfig
from ternlm.config.run import Config
from ternlm.config.section import ConfigError
from ternlm.config.stages import check_pipeline
from ternlm.config.support import check_supported


@dataclass(frozen=True)
class Layout:
    """The degrees of one run; all numbers are of ranks."""

    world: int = 1
    pipeline: int = 1
    context: int = 1
    tensor: int = 1
    params: int = 1
    """Data ranks over which weights are cut between their uses; likewise the next two, each divides the next."""
    grads: int = 1
    optimizer: int = 1

    @property
    def data(self) -> int:
        """Ranks that see different sequences."""
        return self.world // (self.pipeline * self.context * self.tensor)

    @property
    def data_ranks(self) -> int:
        """Ranks that hold the same weights: of data times context parallelism."""
        return self.data * self.context

    @property
    def shard(self) -> int:
        """Data ranks among which FSDP cuts, gathers and reduce-scatters."""
        return self.grads if self.grads > 1 else self.optimizer

    @property
    def across(self) -> int:
        """Groups of `shard` ranks over which the optimizer's states are cut once more."""
        return self.optimizer // self.shard

    @property
    def reshard(self) -> bool:
        """Whether weights are given back after each use, and gathered again in backward."""
        return self.params > 1

    def place(self, rank: int) -> "Place":
        """Return where `rank` stands."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return Place(rank, pipeline, data, context, tensor)


@dataclass(frozen=True)
class Place:
    """A rank's coordinates in a layout."""

    rank: int = 0
    pipeline: int = 0
    data: int = 0
    context: int = 0
    tensor: int = 0


def resolve_layout(config: Config, world: int) -> Layout:
    """Return the layout of `world` ranks; raises ConfigError where the numbers don't fit each other or the model.

    Also where the combination isn't tested, unless `parallel.allow_untested`.
    """
    parallel, sharding = config.parallel, config.sharding
    if parallel.auto:
        raise ConfigError(
            "parallel.auto = true leaves the layout to the planner, which hasn't chosen it; `tern plan` shows what it "
            "chooses, and the settings to type instead"
        )
    degrees = parallel.pipeline * parallel.context * parallel.tensor
    if world % degrees:
        raise ConfigError(
            f"parallel.pipeline x context x tensor = {parallel.pipeline} x {parallel.context} x {parallel.tensor} = "
            f"{degrees} must divide the number of ranks, {world}; start a multiple of {degrees} ranks or lower a degree"
        )
    params, grads, optimizer = _group_sizes(sharding, world // parallel.pipeline // parallel.tensor)
    layout = Layout(world, parallel.pipeline, parallel.context, parallel.tensor, params, grads, optimizer)
    config.batch.check_ranks(layout.data)
    _check_tensor(config, layout)
    if layout.tensor > 1 and config.adapter and config.adapter.base == "nf4":
        raise ConfigError(
            f"adapter.base = 'nf4' needs whole matrices, and parallel.tensor = {layout.tensor} cuts them; set "
            "adapter.base to 'auto', or parallel.tensor to 1"
        )
    _check_context(config, layout)
    check_pipeline(config, layout)
    if config.sample.every_steps and layout.tensor * layout.pipeline > 1:
        raise ConfigError(
            f"sample.every_steps = {config.sample.every_steps} needs whole layers on each rank; parallel.tensor "
            f"x pipeline is {layout.tensor * layout.pipeline}; set sample.every_steps=0 sample.prompts=[] and sample "
            "from a checkpoint with `tern generate`"
        )
    check_supported(config, layout)
    return layout


def _group_sizes(sharding: ShardingConfig, ranks: int) -> tuple[int, int, int]:
    sizes = {name: getattr(sharding, name) for name in ("params", "grads", "optimizer")}
    resolved = {name: ranks if size == -1 else size for name, size in sizes.items()}
    before, inner = "1", 1
    for name, size in resolved.items():
        if size > ranks or ranks % size:
            raise ConfigError(
                f"sharding.{name} = {sizes[name]} must divide the data ranks (data times context parallel), "
                f"{ranks} here; choose one of {_divisors(ranks)}, or -1 for all"
            )
        if size % inner:
            raise ConfigError(
                f"sharding.{name} = {sizes[name]} must be a multiple of {before}: params, grads and optimizer are cut "
                "ever finer in this order; raise it, or lower the other"
            )
        before, inner = f"sharding.{name} = {sizes[name]}", size
    if 1 < resolved["params"] < resolved["grads"]:
        raise ConfigError(
            f"sharding.params = {sizes['params']} must be 1 or equal to sharding.grads = {sizes['grads']}: gradients "
            "are reduced in the group that gathers the weights; cut only the optimizer's states wider"
        )
    return resolved["params"], resolved["grads"], resolved["optimizer"]


def _check_tensor(config: Config, layout: Layout) -> None:
    if layout.tensor == 1:
        return
    model, degree = config.model, layout.tensor
    for name, size in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_key_value_heads", model.kv_heads),
        ("intermediate_size", model.intermediate_size),
        ("vocab_size", model.vocab_size),
    ):
        if size % degree:
            remedy = f"choose one of {_divisors(size)[:8]}"
            if name == "vocab_size":
                remedy = f"set model.vocab_size={-(-size // degree) * degree}, whose further rows stay unused"
            raise ConfigError(f"parallel.tensor = {degree} must divide model.{name} = {size}; {remedy}")
    if config.parallel.sequence and config.data.seq_len // layout.context % degree:
        raise ConfigError(
            f"parallel.tensor = {degree} must divide the tokens of a sequence on one rank, data.seq_len / "
            f"parallel.context = {config.data.seq_len // layout.context}; set parallel.sequence=false or another length"
        )


def _check_context(config: Config, layout: Layout) -> None:
    if layout.context == 1:
        return
    model, degree = config.model, layout.context
    if config.data.seq_len % (2 * degree):
        raise ConfigError(
            f"data.seq_len = {config.data.seq_len} must be a multiple of 2 x parallel.context = {2 * degree}: each "
            "rank takes an early and a late part of every sequence; choose another length or degree"
        )
    heads = model.kv_heads // layout.tensor
    if config.parallel.context_method == "all_to_all" and heads % degree:
        raise ConfigError(
            f"parallel.context = {degree} must divide the key/value heads of a rank, {heads}, with context_method = "
            f"'all_to_all'; choose one of {_divisors(heads)} or context_method=ring"
        )


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]
