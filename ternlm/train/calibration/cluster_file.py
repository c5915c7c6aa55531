"""Writes what was measured as a cluster file: TOML that the planner loads, each figure with how it was got.

Measures nothing itself.
"""

from collections.abc import Mapping
from pathlib import Path

from ternlm.config.load import config_to_dict
from ternlm.config.section import fields_of
from ternlm.data.atomic import write_atomically
from ternlm.planner.cluster import Cluster, Links, NumberFormat, Rates
from ternlm.train.calibration.links import LinkFigures
from ternlm.train.calibration.rates import DeviceFigures


def make_cluster(
    name: str,
    device: str,
    memory_gib: float,
    peak_tflops: float | None,
    dtype: NumberFormat,
    source: str,
    figures: DeviceFigures,
    links: LinkFigures,
) -> Cluster:
    """Return the cluster of what was measured.

    memory_gib: of one device. dtype: measured in. peak_tflops: by the data sheet; that of the fastest product if None.
    """
    return Cluster(
        name=name,
        device=device,
        devices_per_node=links.devices_per_node,
        memory_gib=memory_gib,
        peak_tflops=peak_tflops or figures.largest_tflops,
        dtype=dtype,
        source=source,
        rates=figures.rates,
        links=Links(
            node_gb_s=links.node_gb_s,
            network_gb_s=links.network_gb_s,
            hop_us=links.hop_us,
            contention=links.contention,
        ),
    )


def write_cluster(path: Path, cluster: Cluster, how: Mapping[str, str]) -> None:
    """Write the cluster file. how: a comment to each figure, by its name with the section: `rates.memory_gb_s`."""
    write_atomically(path, render_cluster(cluster, how).encode())


def render_cluster(cluster: Cluster, how: Mapping[str, str]) -> str:
    """Return the cluster as TOML; figures that nothing was measured for are left at their defaults."""
    table = config_to_dict(cluster)
    lines = ["# Written by `tern calibrate`; `--cluster FILE` takes it."]
    lines += _lines({name: value for name, value in table.items() if not isinstance(value, dict)}, "", how, Cluster)
    for name, section in (("rates", Rates), ("links", Links)):
        lines += ["", f"[{name}]", *_lines(table[name], f"{name}.", how, section)]
    return "\n".join(lines) + "\n"


def _lines(values: Mapping[str, object], prefix: str, how: Mapping[str, str], section: type) -> list[str]:
    lines = []
    for name, value in values.items():
        field = fields_of(section)[name]
        known = f"{prefix}{name}" in how
        if not known and not field.is_required() and value == field.get_default(call_default_factory=True):
            continue
        shown = f"{value:.4g}" if isinstance(value, float) else _quoted(value) if isinstance(value, str) else str(value)
        if isinstance(value, float) and not any(mark in shown for mark in ".en"):
            shown += ".0"
        extra = field.json_schema_extra
        unit = str(extra.get("unit", "")) if isinstance(extra, dict) else ""
        comment = ", ".join(part for part in (unit, how.get(f"{prefix}{name}", "")) if part)
        lines.append(f"{name} = {shown}" + (f"  # {comment}" if comment else ""))
    return lines


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
