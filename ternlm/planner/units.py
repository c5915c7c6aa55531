"""Numbers with units, for the eye. No torch here."""

import math

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def human_bytes(count: float) -> str:
    """Write a number of bytes with about three figures and a unit."""
    power = min(int(math.log2(max(count, 1)) // 10), 4)
    value = count / 2 ** (10 * power)
    return f"{value:.0f} {_BINARY[power]}" if value >= 100 else f"{value:.3g} {_BINARY[power]}"


def human_flops(count: float) -> str:
    """Write a number of operations with about three figures and a unit."""
    unit, size = ("TFLOP", 1e12) if count >= 1e12 else ("GFLOP", 1e9) if count >= 1e9 else ("MFLOP", 1e6)
    return f"{count / size:,.0f} {unit}" if count >= 100 * size else f"{count / size:.3g} {unit}"


def human_count(count: float) -> str:
    """Write a number with about three figures: 7.32 B, 4.19 M."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def human_seconds(seconds: float) -> str:
    """Write a time with about three figures: 12.3 ms, 4.2 s, 1.5 hours, 12 days."""
    for size, unit in ((172_800, "days"), (7_200, "hours"), (120, "minutes"), (1, "s"), (1e-3, "ms")):
        if seconds >= size:
            size = {"days": 86_400, "hours": 3_600, "minutes": 60}.get(unit, size)
            return f"{seconds / size:.3g} {unit}" if seconds / size < 1000 else f"{seconds / size:,.0f} {unit}"
    return f"{seconds * 1e6:.3g} us"
