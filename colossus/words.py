"""Numbers in words: short, with units, and never wrong by more than their last digit."""

from __future__ import annotations

import math

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
BINARY = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))
WATTS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def count(value: float) -> str:
    """1,234 as it is, larger numbers with three digits: 12.3k, 1.3M, 405B."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    return _scaled(value, UNITS, "")


def size(num_bytes: float) -> str:
    """5.3 MB. Decimal, as storage is sold."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} bytes"
    return _scaled(num_bytes, BYTES, " ")


def memory(num_bytes: float) -> str:
    """58.3 GiB, 94.2 MiB. Binary, as memory is."""
    if num_bytes < 999.5:
        return f"{num_bytes:.0f} bytes"
    factor, unit = next((f, u) for f, u in BINARY if num_bytes >= 999.5 / 1024 * f)
    return _scaled(num_bytes / factor, (), " ") + unit


def energy(kilowatt_hours: float) -> str:
    """198 Wh, 14.2 kWh, 6.3 GWh."""
    return _of_unit(1e3 * kilowatt_hours, "Wh")


def power(watts: float) -> str:
    """850 W, 11.2 kW, 2.3 MW."""
    return _of_unit(watts, "W")


def _of_unit(value: float, unit: str) -> str:
    names = tuple((factor, prefix + unit) for factor, prefix in WATTS)
    scaled = _scaled(value, names, " ").strip()
    return scaled if scaled.endswith(unit) else f"{scaled} {unit}"


def dollars(value: float) -> str:
    """$0.43, $432, $9,870, $17.2M."""
    if not math.isfinite(value):
        return f"${value}"
    if 0 < value < 0.005:
        return "<$0.01"
    if value < 9_999.5:
        return f"${value:,.2f}" if 0 < value < 99.995 else f"${value:,.0f}"
    return f"${_scaled(value, UNITS, '')}"


def span(seconds: float) -> str:
    """16.6 s, 85.8 ms, 12 us: of one step, three digits."""
    if not math.isfinite(seconds) or seconds >= 9_999.5:
        return duration(seconds)
    return _scaled(seconds, SECONDS, " ") if seconds >= 1e-6 else f"{seconds:.1g} s"


def rate(flops_per_second: float) -> str:
    """183 GFLOP/s."""
    names = ((1e18, "EFLOP/s"), (1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s"))
    return _scaled(max(flops_per_second, 1e6), names, " ")


def duration(seconds: float) -> str:
    """0.05 s, 12 s, 5 min 12 s, 3 h 20 min, 2 d 4 h."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    whole = round(seconds)
    for unit, name, part, part_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= unit:
            rest = whole % unit // part
            return f"{whole // unit} {name}" + (f" {rest} {part_name}" if rest else "")
    raise AssertionError(seconds)


def clock(seconds: float) -> str:
    """2:31, 1:02:31: for a line that changes in place."""
    whole = max(0, round(seconds))
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def percent(share: float) -> str:
    """4.2%, 54%."""
    if not math.isfinite(share):
        return str(share)
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{100 * share:.0f}%" if abs(share) >= 0.0995 or share == 0 else f"{100 * share:.1f}%"


def short(value: float, digits: int = 3) -> str:
    """A number of no known size: 0.00031, 2.13, 1.2e-07."""
    return f"{value:.{digits}g}"


def plural(number: int, noun: str) -> str:
    """1 step, 2 steps, 2 batches."""
    many = "es" if noun.endswith(("ch", "sh", "s", "x")) else "s"
    return f"{count(number)} {noun}" + ("" if number == 1 else many)


def _scaled(value: float, units: tuple[tuple[float, str], ...], gap: str) -> str:
    """Three significant digits; 999,999 is 1M and not 1,000k."""
    rounded = float(f"{value:.3g}")
    factor, unit = next(((f, u) for f, u in units if abs(rounded) >= f), (1.0, ""))
    scaled = rounded / factor
    digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    text = f"{scaled:,.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if digits else text}{gap}{unit}"
