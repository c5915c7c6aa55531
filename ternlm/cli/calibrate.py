"""The verb `tern calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from ternlm.cli.options import Device, Dtype


def calibrate(
    out: Annotated[Path, typer.Option(help="File to write, for `--cluster`.")] = Path("cluster.toml"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    seconds: Annotated[float, typer.Option(help="Time for measuring.")] = 60.0,
) -> None:
    """Measure this machine, or all ranks under torchrun, and write a cluster file for the planner."""
    from ternlm.train.calibration.calibrate import calibrate

    calibrate(out, device, dtype, seconds)
