"""Fits the planner's constants to published runs, and tests them on what a fit hasn't seen.

    python benchmarks/planner/fit.py ROWS.csv [--write]

Least squares of the logarithms of predicted over published tokens/s, with less weight for outliers (soft L1) and for
sources of many rows, from prior values with widths: a constant that the rows say nothing of stays where it was. Gauss-
Newton with numerical derivatives. --write replaces ternlm/planner/fitted.toml.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rows import Row, read_rows

from ternlm.planner.fitted import Constants, Family
from ternlm.planner.known import make_cluster
from ternlm.planner.step_time import step_time

# Value and width (of the logarithm) of what is known without these rows: kernels' benchmarks, NCCL's tests.
PRIORS: dict[str, tuple[float, float]] = {
    "ampere.matmul": (0.86, 0.07),
    "ampere.attention": (0.60, 0.2),
    "ampere.attention_backward": (0.45, 0.2),
    "hopper.matmul": (0.72, 0.1),
    "hopper.attention": (0.40, 0.2),
    "hopper.attention_backward": (0.30, 0.2),
    "power": (0.4, 0.3),
    "float8": (1.6, 0.15),
    "flash1": (0.52, 0.2),
    "biased": (0.7, 0.2),
    "half_inner": (120.0, 0.7),
    "half_waves": (0.2, 0.7),
    "half_attention": (600.0, 0.7),
    "memory": (0.82, 0.1),
    "launch_us": (5.0, 0.3),
    "node": (0.75, 0.15),
    "network": (0.8, 0.1),
    "contention": (0.5, 0.4),
    "nodes_to_half": (300.0, 0.7),
    "hop_us": (4.0, 0.7),
    "broadcast_hop_us": (9.0, 0.7),
    "tensor_exposed": (0.4, 0.5),
    "overhead": (0.02, 0.7),
}
# Of memory, read off torchtitan's rows and not fitted: the rest of these rows' tensors is counted.
SET = {"reserve_gib": 1.5, "fragmentation": 0.04}
DEVIATION = 0.05  # of a published figure from what its settings would give again


def constants(values: dict[str, float]) -> Constants:
    """Return the constants of flat names."""
    flat = SET | {name: value for name, value in values.items() if "." not in name}
    for family in ("ampere", "hopper"):
        prefix = f"{family}."
        own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        flat[family] = Family(**own)
    return Constants(**flat)


def predict(row: Row, c: Constants) -> float:
    """Return tokens/s of a device."""
    cluster = make_cluster(row.sheet, row.devices_per_node, row.network_gbit_s, c, row.attention)
    return row.tokens / step_time(row.step, cluster).seconds / row.layout.world


def fit(rows: Sequence[Row], rounds: int = 12) -> dict[str, float]:
    """Return the constants that fit best."""
    names = list(PRIORS)
    prior = np.log([PRIORS[name][0] for name in names])
    width = np.array([PRIORS[name][1] for name in names])
    published = np.log([row.tokens_per_second for row in rows])
    count = Counter(row.source for row in rows)
    weight = np.array([count[row.source] ** -0.25 for row in rows])
    weight /= weight.mean()

    def values(x: np.ndarray) -> dict[str, float]:
        found = dict(zip(names, np.exp(prior + x * width).tolist(), strict=True))
        return {name: min(value, 1.0) if _is_share(name) else value for name, value in found.items()}

    def residuals(x: np.ndarray) -> np.ndarray:
        c = constants(values(x))
        return (np.log([predict(row, c) for row in rows]) - published) / DEVIATION

    def cost(x: np.ndarray) -> float:
        r = residuals(x)
        return float(np.sum(weight * 8 * (np.sqrt(1 + r * r / 4) - 1)) + x @ x)

    return values(_minimize(residuals, cost, weight, len(names), rounds))


def _is_share(name: str) -> bool:
    fields = {**Constants.model_fields, **{f"x.{n}": f for n, f in Family.model_fields.items()}}
    field = fields[name if "." not in name else f"x.{name.split('.')[1]}"]
    return any(getattr(rule, "le", None) == 1 for rule in field.metadata)


def _minimize(
    residuals: Callable[[np.ndarray], np.ndarray],
    cost: Callable[[np.ndarray], float],
    weight: np.ndarray,
    size: int,
    rounds: int,
) -> np.ndarray:
    x = np.zeros(size)
    best = cost(x)
    for _ in range(rounds):
        r = residuals(x)
        slopes = np.stack([(residuals(x + 0.02 * unit) - r) / 0.02 for unit in np.eye(size)], axis=1)
        w = weight / np.sqrt(1 + r * r / 4)
        step = np.linalg.solve(slopes.T @ (w[:, None] * slopes) + np.eye(size), -(slopes.T @ (w * r) + x))
        scale = 1.0
        while scale > 1e-3 and cost(x + scale * step) > best:
            scale /= 2
        x = x + scale * step
        gained, best = best - cost(x), cost(x)
        if gained < 0.01:
            break
    return x


def left_out(rows: Sequence[Row], by: Callable[[Row], str]) -> dict[str, float]:
    """Return each row's prediction, by id, from a fit to all rows of other groups."""
    found = {}
    for group in sorted({by(row) for row in rows}):
        c = constants(fit([row for row in rows if by(row) != group]))
        found |= {row.id: predict(row, c) for row in rows if by(row) == group}
    return found


def summarize(errors: Sequence[float]) -> str:
    """Return median and 90th percentile of absolute errors."""
    sizes = np.abs(errors)
    return f"{len(sizes):4d} rows, median {np.median(sizes):.1%}, 90th percentile {np.quantile(sizes, 0.9):.1%}"


def main() -> None:
    """Fit, test, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--show", type=int, default=0, help="print so many of the worst rows")
    parser.add_argument("--quick", action="store_true", help="no cross-validation")
    options = parser.parse_args()
    rows = [row for row in read_rows(options.rows) if row.tokens_per_second]
    values = fit(rows)
    c = constants(values)
    for name, value in values.items():
        print(f"{name:28} {value:10.4g}   prior {PRIORS[name][0]:g}")
    error = {row.id: math.expm1(math.log(predict(row, c) / row.tokens_per_second)) for row in rows}
    print("fitted", summarize(list(error.values())))
    for source in sorted({row.source for row in rows}):
        own = [error[row.id] for row in rows if row.source == source]
        print(f"  {source[:24]:24} {summarize(own)}, bias {np.median(own):+.1%}")
    for row in sorted(rows, key=lambda row: -abs(error[row.id]))[: options.show]:
        cluster = make_cluster(row.sheet, row.devices_per_node, row.network_gbit_s, c, row.attention)
        time = step_time(row.step, cluster)
        parts = " ".join(f"{k}={v / time.seconds:.2f}" for k, v in time.parts.items() if v > 0.01 * time.seconds)
        layout, batch = row.layout, row.config.batch
        print(
            f"{error[row.id]:+.1%} {row.source[:12]} {row.model} {row.sheet.name[7:16]} x{layout.world} "
            f"seq {row.config.data.seq_len} rows {batch.microbatch_sequences} tp{layout.tensor} pp{layout.pipeline} "
            f"{row.note[:14]} {row.tokens_per_second:.0f} | {parts}"
        )
    if not options.quick:
        for name, by in (("source", lambda row: row.source), ("model", lambda row: row.model)):
            found = left_out(rows, by)
            errors = {row.id: found[row.id] / row.tokens_per_second - 1 for row in rows}
            print(f"left out by {name}", summarize(list(errors.values())))
            for group in sorted({by(row) for row in rows}):
                own = [errors[row.id] for row in rows if by(row) == group]
                print(f"  {group[:24]:24} {summarize(own)}, bias {np.median(own):+.1%}")
    if options.write:
        _write(values)


def _write(values: dict[str, float]) -> None:
    path = Path(__file__).parents[2] / "ternlm" / "planner" / "fitted.toml"
    lines = [
        "# Written by benchmarks/planner/fit.py; docs/planner.md says to what it was fitted and how well it fits.\n"
    ]
    lines += [f"{name} = {value:.4g}" for name, value in (values | SET).items() if "." not in name]
    for family in ("ampere", "hopper"):
        lines += ["", f"[{family}]"]
        lines += [f"{n.split('.')[1]} = {v:.4g}" for n, v in values.items() if n.startswith(f"{family}.")]
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
