"""Numbers, sizes and times as a person reads them."""

import math
from collections.abc import Sequence
from typing import Any

NONE = "–"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """Four significant digits, thousands apart; whole numbers whole; NaN and infinities by name; text as it is."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not is_number(value):
        return str(value)
    if isinstance(value, int):
        return _minus(f"{value:,}")
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e9 or size < 1e-4:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return _minus(f"{mantissa}e{int(exponent)}")
    if size >= 10 and value == int(value):
        return _minus(f"{int(value):,}")
    return _minus(f"{value:,.{_decimals(size)}f}")


def column(values: Sequence[Any]) -> list[str]:
    """The cells of one column: numbers of one size get one number of decimals, so that they line up."""
    finite = [abs(v) for v in values if is_number(v) and math.isfinite(v)]
    sizes = [v for v in finite if v]
    whole = all(v == int(v) for v in finite)
    if whole or not sizes or max(sizes) >= 1e9 or max(sizes) < 1e-3 or max(sizes) / min(sizes) >= 1e4:
        return [shown(int(v)) if whole and is_number(v) and math.isfinite(v) else shown(v) for v in values]
    decimals = _decimals(max(sizes))
    return [_minus(f"{v:,.{decimals}f}") if is_number(v) and math.isfinite(v) else shown(v) for v in values]


def signed(value: float) -> str:
    return shown(value) if value <= 0 or math.isnan(value) else f"+{shown(value)}"


def size(count: int) -> str:
    """Bytes in the unit that suits them: powers of 1024."""
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "bytes" or value >= 100 else f"{value:.1f} {units[0]}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _decimals(largest: float) -> int:
    return max(0, 3 - math.floor(math.log10(largest)))


def _minus(text: str) -> str:
    return text.replace("-", "−", 1) if text.startswith("-") else text
