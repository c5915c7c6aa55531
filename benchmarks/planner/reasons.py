"""Where the planner is wrong, and what computing rows otherwise says of why. Reasons are shown only with their rows."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from judge import Judged, blame, flat, needed_factor, siblings, spread
from pages import percent, run_of, short_source, table

from ternlm.config.load import config_from_dict, config_to_dict
from ternlm.planner.fitted import Constants
from ternlm.planner.known import make_cluster
from ternlm.planner.memory import GIB, peak_memory
from ternlm.planner.step_time import Step, describe_step, step_time


def worst_rows(judged: Sequence[Judged], count: int = 15) -> str:
    """Return the rows with the largest errors, with the part of the step that dominates."""
    timed = [j for j in judged if j.error is not None]
    lines = []
    for j in sorted(timed, key=lambda j: -abs(j.error or 0))[:count]:
        part = next(iter(j.shares))
        factor = needed_factor(j, part)
        near = spread(other.error for other in siblings(j, judged))
        others = f"{percent(near.bias, signed=True)} ({near.count})" if near else "-"
        needed = f"{factor:.2f}" if factor else "-"
        name = f"{short_source(j)}: {j.row.model} {run_of(j)}"
        lines.append([name, percent(j.error, signed=True), f"{part}, {percent(j.shares[part])}", needed, others])
    head = [
        "run",
        "error, %>",
        "largest part, % of the step",
        "factor that mends it>",
        "others like it, bias % (rows)>",
    ]
    return table(head, lines)


def groups_to_one_side(judged: Sequence[Judged], c: Constants, least: float = 0.03) -> str:
    """Return the groups of model and device whose errors lie to one side, with the constant that could explain them."""
    timed = [j for j in judged if j.error is not None]
    lines = []
    for model, device in sorted({(j.row.model, j.row.sheet.name) for j in timed}):
        own = [j for j in timed if (j.row.model, j.row.sheet.name) == (model, device)]
        found = spread(j.error for j in own)
        if found is None or found.count < 2 or abs(found.bias) < least:
            continue
        one = blame(own, flat(c))
        told = ["no single one", "", ""]
        if one:
            told = [f"`{one.name}` x {one.factor:.2f}", f"{abs(one.widths):.1f}", percent(one.after)]
        lines.append([model, device, str(found.count), percent(found.bias, signed=True), percent(found.median), *told])
    head = [
        "model",
        "device",
        "rows>",
        "bias>",
        "median>",
        "constant that halves it",
        "prior's widths>",
        "median then>",
    ]
    return table(head, lines)


def reasons(judged: Sequence[Judged], c: Constants) -> str:
    """Return what could be shown of the known deviations, a paragraph each."""
    makers: tuple[Callable[[Sequence[Judged], Constants], str], ...] = (
        _apart,
        _two_a100s,
        _batch_unknown,
        _stages_in_turn,
        _hidden_tensor,
        _context,
        _too_full,
        _internevo,
        _large_models_memory,
    )
    return "\n\n".join(text for make in makers if (text := make(judged, c)))


def _again(j: Judged, c: Constants, step: Step, network: float = 0.0) -> float:
    """Return the error of another step in a row's place, on another network."""
    row = j.row
    assert row.tokens_per_second is not None
    cluster = make_cluster(row.sheet, row.devices_per_node, network or row.network_gbit_s, c, row.attention)
    layout = row.layout
    tokens = step.work.microbatches * step.work.microbatch_tokens * layout.data * layout.context
    return tokens / step_time(step, cluster).seconds / layout.world / row.tokens_per_second - 1


def _timed(judged: Sequence[Judged], which: Callable[[Judged], bool]) -> list[Judged]:
    return [j for j in judged if j.error is not None and which(j)]


def _list(items: Iterator[str]) -> str:
    return ", ".join(items)


def _apart(judged: Sequence[Judged], c: Constants) -> str:
    found = []
    for j in _timed(judged, lambda j: abs(j.error or 0) > 0.08):
        near = spread(other.error for other in siblings(j, judged))
        if near and near.count >= 3 and near.median < 0.05:
            found.append(
                f"{j.row.model} {run_of(j)} ({percent(j.error, signed=True)} %, the others {percent(near.median)} %)"
            )
    if not found:
        return ""
    return (
        f"**Figures that stand apart.** {'; '.join(found)}: at least three other rows of the same model, device and "
        f"source "
        "fit, so that nothing in the settings tells these apart. A measurement that was disturbed would look so; that "
        "can't be shown from here."
    )


def _two_a100s(judged: Sequence[Judged], c: Constants) -> str:
    both = {
        recompute: [
            spread(j.error for j in _timed(judged, lambda j, s=size, r=recompute: _is_a100(j, s, r)))
            for size in (40, 80)
        ]
        for recompute in (True, False)
    }
    (small, large), (small_kept, large_kept) = both[True], both[False]
    if not (small and large and small_kept and large_kept):
        return ""
    return (
        f"**A100 with 40 and with 80 GB.** Where blocks are recomputed, the bias is "
        f"{percent(small.bias, signed=True)} % on "
        f"40 GB ({small.count} rows) and {percent(large.bias, signed=True)} % on 80 GB ({large.count}); where they "
        f"aren't, "
        f"{percent(small_kept.bias, signed=True)} and {percent(large_kept.bias, signed=True)} %. Both devices have "
        f"the same "
        "peak and links in their data sheets, so no constant of the planner can part them. These are the largest "
        "models "
        "that fit. Which of allocation, clocks or software differed isn't published."
    )


def _is_a100(j: Judged, size: int, recompute: bool) -> bool:
    row = j.row
    is_one = "A100" in row.sheet.name and row.sheet.memory_gib == size and row.source.startswith("llm-foundry")
    return is_one and bool(row.config.compute.recompute) == recompute


def _batch_unknown(judged: Sequence[Judged], c: Constants) -> str:
    rows = _timed(judged, lambda j: "batch not stated" in j.row.note)
    if not rows:
        return ""
    lines = []
    for j in rows:
        row, errors = j.row, []
        for sequences in (1, 2, 4, 8):
            batch = {"microbatch_sequences": sequences, "global_sequences": sequences * row.layout.data}
            config = config_from_dict(config_to_dict(row.config) | {"batch": batch})
            step = describe_step(config, row.layout, row.devices_per_node, row.program)
            errors.append(percent(_again(j, c, step), signed=True))
        halved = percent(_again(j, c, row.step, row.network_gbit_s / 2), signed=True)
        lines.append([f"{row.model} {run_of(j)}", *errors, halved])
    return (
        "**Batch not stated.** Taken for 2 sequences a device. The error, in %, with other batches, and with 2 and "
        "half the "
        "network's rate:\n\n"
        + table(["run", "1>", "2>", "4>", "8>", "half the network>"], lines)
        + "\n\nNo one batch mends all of them: inside a node the prediction is too low, between nodes too high, as "
        "it would "
        "be if the network carried less than its rate."
    )


def _stages_in_turn(judged: Sequence[Judged], c: Constants) -> str:
    rows = _timed(judged, lambda j: "Megatron" in j.row.source and j.row.layout.pipeline > 1)
    if not rows:
        return ""

    def told(j: Judged) -> str:
        plain = {**config_to_dict(j.row.config)}
        plain["parallel"] = plain["parallel"] | {"pipeline_schedule": "1f1b", "stages_per_rank": 1}
        step = describe_step(config_from_dict(plain), j.row.layout, j.row.devices_per_node, j.row.program)
        return f"{j.row.model} {percent(_again(j, c, step), signed=True)} (now {percent(j.error, signed=True)})"

    return (
        "**Megatron-LM's pipelines.** Its README names neither microbatch nor schedule. With one sequence and one "
        "stage a "
        f"rank the errors would be, in %: {_list(told(j) for j in rows)}. Its own strong scaling needs stages that "
        f"take "
        "turns (`_stages_per_rank` in rows.py), which is what the rows are taken for."
    )


def _hidden_tensor(judged: Sequence[Judged], c: Constants) -> str:
    rows = _timed(judged, lambda j: j.row.program.hidden_tensor and j.row.layout.tensor > 1)
    if not rows:
        return ""

    def told(j: Judged) -> str:
        waited = replace(j.row.step, program=replace(j.row.program, hidden_tensor=False))
        now, then = percent(j.error, signed=True), percent(_again(j, c, waited), signed=True)
        return f"{short_source(j)} {j.row.model} tp{j.row.layout.tensor} {now} (all waited for: {then})"

    return (
        f"**Tensor parallelism that overlaps.** One constant, `tensor_exposed` = {c.tensor_exposed:.2f}, stands for "
        f"two "
        f"programs. Errors in %: {_list(told(j) for j in rows)}. The sources pull it apart. TernLM itself waits for "
        f"all "
        "of this traffic, so its predictions don't depend on it."
    )


def _context(judged: Sequence[Judged], c: Constants) -> str:
    rows = _timed(judged, lambda j: j.row.layout.context > 1)
    if not rows:
        return ""
    told = []
    for j in rows:
        degree = j.row.layout.context
        factor, traffic = needed_factor(j, "attention"), sum(s for p, s in j.shares.items() if "over context" in p)
        told.append(
            f"{j.row.model} cp{degree} of {j.row.config.data.seq_len} tokens is {percent(j.error, signed=True)} %, "
            f"with "
            f"attention {percent(j.shares['attention'])} % of the step and {percent(traffic)} % of it exchange that "
            f"isn't "
            f"hidden; attention that takes {factor or math.nan:.2f} times as long would mend it"
        )
    return (
        f"**Context parallelism.** {'; '.join(told)}. TernLM's ring gives all ranks the same work. A ring that "
        f"doesn't would "
        f"take up to {2 - 1 / rows[0].row.layout.context:.2f} times as long, so that this row's is neither."
    )


def _too_full(judged: Sequence[Judged], c: Constants) -> str:
    rows = _timed(judged, lambda j: j.row.source.startswith("llm-foundry"))
    if not rows:
        return ""
    filled = [j.memory_gib / j.row.sheet.memory_gib for j in rows]
    over = sum(share > 1 for share in filled)
    return (
        f"**Memory of runs that name none.** llm-foundry's {len(rows)} runs did fit, with the largest batch their "
        f"authors "
        f"could have: {over} of them are predicted not to, by {percent(max(filled) - 1)} % at worst; the median is "
        f"{percent(sorted(filled)[len(filled) // 2])} % of the device. Their framework's unfused kernels and whole "
        f"logits keep "
        "less than the planner takes them to. TernLM's own program is held to the simulation instead (tests/planner)."
    )


def _internevo(judged: Sequence[Judged], c: Constants) -> str:
    rows = [j for j in judged if j.memory_error is not None and "InternEvo" in j.row.source]
    if not rows:
        return ""

    def told(j: Judged) -> str:
        parts, states = j.memory_parts_gib, ("weights", "gradients", "optimizer")
        per_parameter = j.row.program.weight_bytes / j.row.layout.shard
        held = parts["weights"] / per_parameter  # Gi of parameters, those cut over data ranks too
        rest = sum(size for part, size in parts.items() if part not in states)
        each = ((j.row.memory_gib or 0) - rest) / held * j.row.layout.shard
        return f"{j.row.model} {run_of(j)} {each:.1f}"

    return (
        "**InternEvo's memory.** Figures are whole GB as printed, of what isn't said (allocated or reserved, which "
        "rank). "
        f"Bytes per parameter that they leave for weights, gradients and states: {_list(told(j) for j in rows)}. They "
        "aren't one number for a kind of layout, so that no rule can meet all of them. Its stages have equally many "
        "layers, "
        "the last one the head as well; cut as TernLM cuts them, pipelines would be, in %: "
        f"{_list(_cut_as_own(j, c) for j in rows if j.row.layout.pipeline > 1)}."
    )


def _cut_as_own(j: Judged, c: Constants) -> str:
    row = j.row
    cluster = make_cluster(row.sheet, row.devices_per_node, row.network_gbit_s, c, row.attention)
    memory = peak_memory(row.config, row.layout, cluster, replace(row.program, even_stages=False))
    error = memory.bytes / GIB / (row.memory_gib or math.nan) - 1
    return f"pp{row.layout.pipeline} {percent(error, signed=True)} (now {percent(j.memory_error, signed=True)})"


def _large_models_memory(judged: Sequence[Judged], c: Constants) -> str:
    rows = [j for j in judged if (j.memory_error or 0) < -0.05 and "torchtitan" in j.row.source]
    if not rows:
        return ""

    def told(j: Judged) -> str:
        row = j.row
        tokens = row.config.batch.microbatch_sequences * row.config.data.seq_len // row.layout.context
        stream = 2 * tokens * row.config.model.hidden_size / GIB
        missing = (row.memory_gib or 0) - j.memory_gib
        name = f"{row.model} {run_of(j)}"
        return f"{name} lacks {missing:.1f} GiB, {missing / stream:.1f} times a microbatch's whole hidden states"

    return (
        f"**torchtitan's large models.** {'; '.join(told(j) for j in rows)}. In its table asynchronous tensor "
        f"parallelism takes "
        "less memory, and interleaved stages less than 1F1B, though they keep more microbatches; the planner has "
        "neither. "
        "These are buffers or fragments of that program, which its settings don't show."
    )
