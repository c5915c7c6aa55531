"""Writes docs/planner.md: how far the planner's predictions are from published runs, and why.

    python benchmarks/planner/report.py --rows ROWS.csv [--out FILE.md] [--json FILE.json] [--quick]

Any CSV of the columns in benchmarks/planner/README.md will do: rows that the fit hasn't seen are predicted with the
shipped constants. Without --quick, constants are fitted anew with each source and each model left out (minutes).
"""

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from judge import Judged, flat, judge, spread
from pages import (
    aims,
    all_rows,
    by_group,
    constants_section,
    curves_section,
    fitting,
    memory_section,
    summary,
)
from reasons import groups_to_one_side, reasons, worst_rows
from rows import read_rows

from ternlm.config.section import UserError
from ternlm.planner.fitted import Constants, fitted_constants

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Read rows, judge them, write the report and its figures; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="CSV of published runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "planner.md")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "planner" / "planner.json")
    parser.add_argument("--quick", action="store_true", help="no cross-validation")
    options = parser.parse_args(arguments)
    try:
        rows = read_rows(options.rows)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    c = fitted_constants()
    judged = judge(rows, c, cross_validate=not options.quick)
    about = _about(options.rows, options.quick)
    for path, text in ((options.out, _page(judged, c, about)), (options.json, _figures(judged, c, about))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    for aim in aims(judged):
        found = "-" if aim.found is None else f"{aim.found:.1%}"
        print(f"{aim.what}: {found}, aim {aim.bound:.0%}: {aim.verdict.strip('*')} ({aim.rows} rows)")
    return 0


def _about(rows: Path, quick: bool) -> dict[str, str]:
    command = ["python", "benchmarks/planner/report.py", "--rows", rows.name, *["--quick"] * quick]
    return {
        "date": str(date.today()),
        "command": shlex.join(command),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _page(judged: Sequence[Judged], c: Constants, about: dict[str, str]) -> str:
    sections = [
        ("Against the aims", summary(judged)),
        ("The model of a step", _MODEL + "\n\n" + constants_section(c)),
        ("How the constants were fitted and tested", fitting()),
        (
            "Error by source",
            "In %. Left out: by source.\n\n" + by_group(judged, "source", lambda j: j.row.source, "source"),
        ),
        (
            "Error by model and by device",
            "Left out: by model.\n\n"
            + by_group(judged, "model", lambda j: j.row.model, "model")
            + "\n\nLeft out: by source.\n\n"
            + by_group(judged, "device", lambda j: j.row.sheet.name, "source"),
        ),
        ("The ancestor's two curves", curves_section(judged)),
        ("Peak memory", memory_section(judged) if spread(j.memory_error for j in judged) else ""),
        ("Where it is wrong", _worst(judged, c)),
        ("Every row", all_rows(judged)),
    ]
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections if body)
    made = f"Python {about['python']}, numpy {about['numpy']}, {about['date']}."
    return f"# How far to trust the planner\n\n{_INTRODUCTION}\n\n    {about['command']}\n\n{made}\n\n{text}\n"


def _worst(judged: Sequence[Judged], c: Constants) -> str:
    if not spread(j.error for j in judged):
        return reasons(judged, c)
    groups = (
        "Models on a device whose errors lie to one side (bias of 3 % or more), and the constant that would have to "
        "move "
        "least, in widths of its prior, to halve them. Constants aren't moved for such a group: they are all rows'."
    )
    return (
        "The fifteen rows with the largest errors. The factor is what the part that takes longest would have to be "
        "multiplied with for the prediction to be right; others like it are of the same source, model, device and "
        f"recompute.\n\n{worst_rows(judged)}\n\n{groups}\n\n{groups_to_one_side(judged, c)}\n\n{reasons(judged, c)}"
    )


def _figures(judged: Sequence[Judged], c: Constants, about: dict[str, str]) -> str:
    def row(j: Judged) -> dict[str, Any]:
        return {
            "id": j.row.id,
            "source": j.row.source,
            "model": j.row.model,
            "tokens_per_second": {"published": j.row.tokens_per_second, "predicted": j.tokens_per_second},
            "left_out": j.left_out,
            "memory_gib": {"published": j.row.memory_gib, "predicted": j.memory_gib, "parts": j.memory_parts_gib},
            "share_of_step": j.shares,
        }

    found = [{"aim": a.what, "bound": a.bound, "found": a.found, "rows": a.rows} for a in aims(judged)]
    content = {**about, "constants": flat(c), "aims": found, "rows": [row(j) for j in judged]}
    return json.dumps(_rounded(content), indent=1) + "\n"


def _rounded(value: Any) -> Any:
    """Return the same with five significant digits in each number."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


_INTRODUCTION = """This page is generated; don't edit it. It holds the planner's predictions against runs that others
have published, a row each, and says where they are wrong. A prediction is of one device's tokens/s in a training step;
errors are predicted / published - 1. To judge the planner on other runs, hand the command a CSV of your own (the
columns are in [benchmarks/planner](../benchmarks/planner/README.md))."""

_MODEL = """A step is a list of kernels and messages that follows from the settings: each matrix product by its size,
attention, bytes that other kernels read and write, and collectives by group and bytes. The list is that of the real
program: tests hold its operations and bytes to the simulation (docs/simulation.md), which runs it. Turning it into time
takes the data sheets in `ternlm/planner/known.toml` and these constants:

- a product runs at a share of the peak, less where the summed dimension is short or the result has few tiles;
- attention has a rate of its own, less for short documents;
- all other kernels read and write memory at a share of its rate, and no kernel starts sooner than the launch allows;
- a collective takes its bytes over the links' share; groups over many nodes get less, and wait for each rank's hop;
- weights gathered and gradients reduced are hidden behind computation, as far as there is enough of it, but slow it;
- a pipeline stands idle while it fills and empties; the rank that takes longest counts;
- memory is counted tensor by tensor, at the two moments that can be the fullest."""


if __name__ == "__main__":
    sys.exit(main())
