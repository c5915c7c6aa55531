"""How a run is laid out over devices: degrees of parallelism and the three sizes of hybrid sharding."""

from typing import Any, Literal

from pydantic import GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from ternlm.config.section import Section, refuse_ignored, setting

AUTO = "auto"


def spelled_out(given: Any) -> Any:
    """Return what is given for the section `parallel` as a table, where it is short for one."""
    return {"auto": True} if given == AUTO else given


class OrAuto:
    """Marks the setting that holds the section, so that the schema has what is short for it, too."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"const": AUTO, "type": "string"}, handler(core)]}


class ParallelConfig(Section):
    """Degrees of parallelism. What they leave of the devices is data parallel.

    `parallel = "auto"` is short for `parallel.auto = true`.
    """

    auto: bool = setting(
        False,
        "take the fastest layout that the planner finds for these devices: degrees, sharding, recompute and "
        "microbatch, whatever the recipe says of them",
    )
    cluster: str = setting(
        "",
        "what the planner takes the devices for: a known cluster such as h100x8 or a file that `tern calibrate` "
        "wrote; what the device's name says if not given",
    )
    pipeline: int = setting(1, "stages that the layers are cut into", unit="ranks", gt=0)
    context: int = setting(1, "ranks that share each sequence", unit="ranks", gt=0)
    tensor: int = setting(1, "ranks that share each matrix; best inside one node", unit="ranks", gt=0)
    sequence: bool = setting(
        True, "cut what lies between the matrices along the sequence too; only with tensor above 1, saves memory"
    )
    context_method: Literal["ring", "all_to_all"] = setting(
        "ring",
        "ring: keys and values go round, any number of heads; all_to_all: each rank attends for some of the heads "
        "over the whole sequence, needs heads that divide",
    )
    pipeline_schedule: Literal["1f1b", "interleaved", "zero_bubble"] = setting(
        "1f1b",
        "1f1b: least memory; interleaved: several stages a rank, less idle time, more traffic; zero_bubble: weight "
        "gradients fill the idle time, more memory",
    )
    stages_per_rank: int = setting(1, "stages of each pipeline rank; only with interleaved and zero_bubble", gt=0)
    allow_untested: bool = setting(False, "train with a combination that docs/support_matrix.md doesn't list as tested")
    timeout_minutes: float = setting(
        10.0, "a rank that hears nothing from another for so long ends the job with an error", unit="minutes", gt=0
    )

    @model_validator(mode="before")
    @classmethod
    def _read_auto(cls, given: Any) -> Any:
        return spelled_out(given)

    @model_validator(mode="after")
    def _check(self) -> "ParallelConfig":
        if self.tensor == 1:
            refuse_ignored(self, ("sequence",), "tensor = 1", "raise tensor")
        if self.context == 1:
            refuse_ignored(self, ("context_method",), "context = 1", "raise context")
        if self.pipeline == 1:
            names = ("pipeline_schedule", "stages_per_rank")
            refuse_ignored(self, names, "pipeline = 1", "raise pipeline")
        if self.pipeline_schedule == "1f1b":
            other = "set pipeline_schedule to interleaved or zero_bubble"
            refuse_ignored(self, ("stages_per_rank",), "pipeline_schedule = '1f1b'", other)
        if self.pipeline > 1 and self.pipeline_schedule == "interleaved" and self.stages_per_rank == 1:
            raise ValueError("pipeline_schedule = 'interleaved' needs stages_per_rank of 2 or more; set it")
        return self


class ShardingConfig(Section):
    """Over how many data-parallel ranks each kind of state is cut; every size divides the next.

    1: each rank has all of it; -1: cut over all ranks. Groups are consecutive ranks, so that a size of up to the
    devices of a node keeps its traffic inside the node. Ranks that share a sequence count as data-parallel ranks here.
    """

    params: int = setting(1, "ranks over which the weights are cut between their uses", unit="ranks", ge=-1)
    grads: int = setting(
        1, "ranks over which gradients are cut; 1: reduced once per step, else once per microbatch", unit="ranks", ge=-1
    )
    optimizer: int = setting(-1, "ranks over which the optimizer's states are cut", unit="ranks", ge=-1)
    reduce_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "in which gradients are summed over ranks; bfloat16 halves the traffic; where optimizer is cut wider than "
        "gradients, the sum over those further groups stays float32",
    )

    @model_validator(mode="after")
    def _check(self) -> "ShardingConfig":
        for name in ("params", "grads", "optimizer"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} = 0 must be 1 (whole), -1 (over all ranks) or a number of ranks")
        return self
