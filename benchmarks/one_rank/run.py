"""Measure what the code for many ranks costs a run on one: TernLM's step against the same work written out plainly.

    python benchmarks/one_rank/run.py

Both train the same model object, in alternating order inside one process, on the same batches: `train_step`, with its
mesh, pieces and agreements, and a bare loop of forward, loss, backward, clipping and AdamW. Writes
benchmarks/results/one_rank/one_rank.json and .md. Run it on a machine with nothing else to do.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from datetime import date
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from interleaved.figures import describe_hardware  # noqa: E402

from ternlm.config import config_from_dict  # noqa: E402
from ternlm.data.batch import Batch  # noqa: E402
from ternlm.data.prepare import prepare  # noqa: E402
from ternlm.data.train_tokenizer import train_tokenizer  # noqa: E402
from ternlm.ops.attention import make_segment_attend  # noqa: E402
from ternlm.ops.loss import chunked_cross_entropy  # noqa: E402
from ternlm.train.loop import Wishes, _agree, train_step  # noqa: E402
from ternlm.train.objective import chunk_tokens  # noqa: E402
from ternlm.train.run import Run, set_up  # noqa: E402


def main() -> None:
    """Measure pairs of steps and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200, help="pairs of steps, after four pairs of warm-up")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as the process may use")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "one_rank")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ternlm-one-rank-") as folder:
        run = start(Path(folder), args.layers, args.seq_len, args.threads)
        pairs = [measure_pair(run, index) for index in range(args.pairs + 4)][4:]
        run.loader.close()
    ratios = sorted(ours / bare for ours, bare in pairs)
    result = {
        "date": str(date.today()),
        "hardware": describe_hardware(torch.get_num_threads()),
        "torch": torch.__version__,
        "parameters": run.config.model.num_params,
        "tokens": args.seq_len,
        "seconds_ternlm_and_bare": pairs,
        "median_ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        "median_between": median_interval(ratios),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "one_rank.json").write_text(json.dumps(result, indent=1) + "\n")
    text = format_result(result)
    (args.out / "one_rank.md").write_text(text)
    print(text)


def median_interval(ordered: list[float]) -> tuple[float, float]:
    """Return the two measured values between which the true median is with 95% confidence (order statistics)."""
    reach = 0.98 * len(ordered) ** 0.5  # 1.96 standard deviations of a binomial of n and 1/2
    low, high = (len(ordered) - 1) / 2 - reach, (len(ordered) - 1) / 2 + reach
    return ordered[max(0, math.floor(low))], ordered[min(len(ordered) - 1, math.ceil(high))]


def start(folder: Path, layers: int, seq_len: int, threads: int) -> Run:
    """Set a run up on the text of this repository's own documentation."""
    docs = HERE.parents[1] / "docs"
    train_tokenizer([docs], 2048, folder / "tokenizer", format="text", include="*.md")
    prepare([docs], folder / "tokenizer", folder / "data", format="text", include="*.md")
    model = dict(
        vocab_size=32000,
        hidden_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        intermediate_size=1408,
        attention_bias=True,
        max_position_embeddings=seq_len,
    )
    settings = {
        "out": str(folder / "run"),
        "model": model,
        "data": {"seq_len": seq_len, "sources": [{"name": "docs", "path": str(folder / "data")}]},
        "batch": {"global_sequences": 1},
        "train": {"steps": 10**6},
        "compute": {"device": "cpu", "dtype": "float32", "compile": "on", "threads": threads},
        "checkpoint": {"every_steps": 0},
    }
    return set_up(config_from_dict(settings), resume="never")


def measure_pair(run: Run, index: int) -> tuple[float, float]:
    """Return the seconds of TernLM's step and of the bare one, on the same batch; every second pair in reverse."""
    microbatches = next(run.loader)
    seconds = {}
    for step in (ternlm_step, bare_step) if index % 2 else (bare_step, ternlm_step):
        began = time.perf_counter()
        step(run, microbatches)
        seconds[step] = time.perf_counter() - began
    return seconds[ternlm_step], seconds[bare_step]


def ternlm_step(run: Run, microbatches: list[Batch]) -> None:
    """Train one step as the loop does, agreement with the other ranks included."""
    facts = train_step(run, microbatches)
    _agree(run, facts, Wishes(None, None, False, 0.0))


def bare_step(run: Run, microbatches: list[Batch]) -> None:
    """Train one step by nothing but PyTorch, the model, its attention and its loss."""
    (batch,) = microbatches
    attend = make_segment_attend(batch.lengths, run.device)
    hidden_BTD = run.model(batch.tokens_BT, batch.positions_BT, attend)
    head = run.model.lm_head
    loss = partial(
        chunked_cross_entropy,
        targets_N=batch.targets_BT.flatten(),
        weights_N=batch.weights_BT.flatten(),
        chunk_tokens=chunk_tokens(head.out_features, run.device),
    )
    (head(hidden_BTD.flatten(0, 1), loss).total / batch.weights_BT.sum()).backward()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.optimizer.clip_norm)
    float(norm)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def format_result(result: dict) -> str:
    """Return the result in Markdown."""
    hardware, quartiles, between = result["hardware"], result["quartiles"], result["median_between"]
    ours, bare = (statistics.median(column) for column in zip(*result["seconds_ternlm_and_bare"], strict=True))
    return "\n".join(
        [
            "# One rank: TernLM's step against the same work written out plainly",
            "",
            f"{result['date']}; {hardware['processor']}, {hardware['cores']} cores, {hardware['threads']} threads, "
            f"{hardware['memory_gib']} GiB; torch {result['torch']}; {result['parameters'] / 1e6:.1f}M parameters, "
            f"1 x {result['tokens']} tokens, float32, compiled blocks; {len(result['seconds_ternlm_and_bare'])} pairs "
            "of steps in alternating order inside one process.",
            "",
            "| | median seconds |",
            "|---|---|",
            f"| TernLM's `train_step` | {ours:.3f} |",
            f"| forward, loss, backward, clipping, AdamW | {bare:.3f} |",
            f"| ratio, paired: median | {result['median_ratio']:.4f} |",
            f"| its 95% interval | {between[0]:.4f} to {between[1]:.4f} |",
            f"| quartiles of the pairs | {quartiles[0]:.4f} to {quartiles[1]:.4f} |",
            "",
            f"{'Met' if result['median_ratio'] <= 1.01 else '**Not met**'}: at most 1% slower.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
