"""Published runs, a row each, as what the planner takes: settings, layout, program and cluster.

A row is of another framework; what that does otherwise than TernLM is in `Program`, by the rules of `_program`. What a
row doesn't say is filled in by the rules of `_batch`.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from columns import SHEETS, read_lines

from ternlm.config import Config, config_from_dict
from ternlm.config.layout import Layout
from ternlm.config.section import ConfigError
from ternlm.planner.known import Sheet, sheets
from ternlm.planner.step_time import Step, describe_step
from ternlm.planner.work import Program


@dataclass(frozen=True)
class Row:
    """A published run."""

    id: str
    source: str
    model: str
    note: str
    sheet: Sheet
    devices_per_node: int
    network_gbit_s: float
    attention: str
    config: Config
    layout: Layout
    program: Program
    tokens_per_second: float | None
    """Of one device, as published."""
    memory_gib: float | None
    step: Step

    @property
    def tokens(self) -> int:
        """Of a step, over all devices."""
        return self.config.batch.global_sequences * self.config.data.seq_len


def read_rows(path: Path) -> list[Row]:
    """Read a CSV of the columns that benchmarks/planner/README.md lists.

    Raises ConfigError that names file, line, column, value, rule and remedy.
    """
    return [_row(where, line) for where, line in read_lines(path)]


def _row(where: str, line: dict[str, str]) -> Row:
    gpu = line["gpu"].lower()
    sheet = sheets()[SHEETS.get(gpu, gpu)]
    program = _program(line)
    layout = _layout(where, line)
    try:
        config = config_from_dict(_settings(line, layout, program))
    except ConfigError as error:
        raise ConfigError(f"{where}: the row's settings contradict each other; correct the row: {error}") from error
    if program.float8 and sheet.family == "ampere":
        raise ConfigError(f"{where}: precision = 'fp8' needs a device that has it; {line['gpu']} hasn't: write bf16")
    devices = _number(line, "gpus_per_node", 8)
    return Row(
        id=line["id"],
        source=line["source"],
        model=line["model"],
        note=line["note"],
        sheet=sheet,
        devices_per_node=devices,
        network_gbit_s=float(line["inter_node_gbit_per_node"] or sheet.network_gbit_s),
        attention=program.attention,
        config=config,
        layout=layout,
        program=program,
        tokens_per_second=float(line["tokens_per_s_per_gpu"]) if line["tokens_per_s_per_gpu"] else None,
        memory_gib=float(line["peak_memory_gib"]) if line["peak_memory_gib"] else None,
        step=describe_step(config, layout, devices, program),
    )


def _number(line: dict[str, str], name: str, default: int = 1) -> int:
    return int(float(line[name])) if line[name] else default


def _layout(where: str, line: dict[str, str]) -> Layout:
    world, *degrees = (_number(line, name) for name in ("n_gpus", "tensor", "pipeline", "context"))
    tensor, pipeline, context = degrees
    if world % math.prod(degrees):
        raise ConfigError(
            f"{where}: n_gpus = {world} must be a multiple of tensor x pipeline x context = {tensor} x {pipeline} x "
            f"{context}; correct one of them"
        )
    names = [f"shard_{what}" for what in ("params", "grads", "optimizer")]
    shards, data_ranks = [_number(line, name) for name in names], world // pipeline // tensor
    for name, shard in zip(names, shards, strict=True):
        if data_ranks % shard:
            raise ConfigError(
                f"{where}: {name} = {shard} must divide n_gpus / (tensor x pipeline) = {data_ranks}; correct one"
            )
    if "SHARD_GRAD_OP" in line["note"]:
        shards[0] = 1
    if "torchtitan" in line["source"] and pipeline > 1:  # its default: weights stay gathered, gradients add up whole
        shards[:2] = 1, 1
    return Layout(world, pipeline, context, tensor, *shards)


def _settings(line: dict[str, str], layout: Layout, program: Program) -> dict[str, Any]:
    microbatch, accumulation = _batch(line, layout)
    width, layers, heads = (_number(line, name) for name in ("intermediate_size", "num_layers", "num_heads"))
    stages = _stages_per_rank(line, layout.pipeline, layers // layout.pipeline)
    return {
        "model": {
            "hidden_size": _number(line, "hidden_size"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": _number(line, "num_kv_heads", heads),
            # Two matrices of this width have as many weights as three of two thirds of it.
            "intermediate_size": width if program.gated_mlp else width * 2 // 3,
            "vocab_size": _number(line, "vocab_size"),
            "tie_word_embeddings": line["tied"] == "1",
            "max_position_embeddings": _number(line, "seq_len"),
        },
        "data": {"seq_len": _number(line, "seq_len"), "sources": [{"name": "text", "path": "-"}]},
        "batch": {
            "global_sequences": microbatch * accumulation * layout.data,
            "microbatch_sequences": microbatch,
        },
        "train": {"steps": 1},
        "compute": {
            "dtype": "bfloat16",
            "compile": "on" if program.fused else "off",
            "recompute": 0.0 if line["recompute"] == "none" else 1.0,
        },
        "parallel": {
            "pipeline": layout.pipeline,
            "context": layout.context,
            "tensor": layout.tensor,
            "allow_untested": True,
            **({"pipeline_schedule": "interleaved", "stages_per_rank": stages} if stages > 1 else {}),
        },
        "sharding": {
            "params": layout.params,
            "grads": layout.grads,
            "optimizer": layout.optimizer,
            "reduce_dtype": "float32" if "Megatron" in line["source"] else "bfloat16",
        },
    }


def _program(line: dict[str, str]) -> Program:
    return Program(
        float8=line["precision"] == "fp8",
        fused=line["compiled"] == "1" or "Megatron" in line["source"],
        attention="biased"
        if line["model"].startswith("MPT")
        else "flash1"
        if line["attention"] == "flash1"
        else "flash2",
        gated_mlp=line["gated_mlp"] != "0",
        halved_recompute=line["recompute"] == "selective",
        # Megatron-LM's README names the overlap of tensor-parallel traffic among what the runs used.
        float8_messages=line["precision"] == "fp8" and "torchtitan" in line["source"],
        hidden_tensor="Megatron" in line["source"] or "async TP" in line["note"],
        broadcasts="InternLM" in line["source"],
        even_stages=True,
        whole_recompute="InternLM" in line["source"],  # reentrant; all others stop where nothing more is needed
        whole_logits=True,
        logit_bytes=14.0,
        **_memory(line),
    )


def _memory(line: dict[str, str]) -> dict[str, float]:
    """Return InternEvo's bytes per parameter, as its table implies: 27; in all others they are TernLM's.

    Where nothing is cut, its own optimizer has gradients a second time, flattened in bfloat16.
    """
    if "InternEvo" not in line["source"]:
        return {}
    return {"weight_bytes": 2.0, "state_bytes": 20.0 if int(line["shard_params"]) > 1 else 22.0}


def _batch(line: dict[str, str], layout: Layout) -> tuple[int, int]:
    """Return sequences of a microbatch and how many microbatches there are, by what the row leaves open.

    A global batch in the note is one microbatch without a pipeline, and microbatches of one sequence with it. Where the
    batch isn't stated, it is 2 sequences, what most runs of 4,096 tokens have. torchtitan cuts a rank's batch into as
    many microbatches as the pipeline has ranks.
    """
    microbatch, accumulation = (
        int(line[name]) if line[name] else 0 for name in ("micro_batch_sequences", "gradient_accumulation")
    )
    total = re.search(r"global batch (\d+)", line["note"])
    if total and not (microbatch and accumulation):
        each = max(int(total[1]) // layout.data, 1)
        microbatch = microbatch or (1 if layout.pipeline > 1 else each)
        accumulation = accumulation or max(each // microbatch, 1)
    microbatch, accumulation = microbatch or 2, accumulation or 1
    if layout.pipeline > 1 and accumulation == 1:
        count = min(layout.pipeline, microbatch)
        return microbatch // count, count
    return microbatch, accumulation


def _stages_per_rank(line: dict[str, str], pipeline: int, layers_per_rank: int) -> int:
    """Return how many stages take turns on a rank.

    Megatron-LM's README doesn't say. But it says that GPT-3 at one batch of 1,152 sequences went from 47 % MFU on 96
    H100s to 42 % on 4,608. There a rank had 12 microbatches, and with one stage each the 6 ranks of the row's pipeline
    would stand idle for 5 of 17 microbatches' time, which leaves 33 %. So stages take turns: as many as divide the
    layers, up to 8.
    """
    if pipeline > 1 and "Megatron" in line["source"] and layers_per_rank:
        return max(each for each in range(1, min(layers_per_rank, 8) + 1) if layers_per_rank % each == 0)
    return _number(line, "virtual_stages")
