"""Numbers and verdicts as text: three significant digits, units with prefixes, signed changes."""

from __future__ import annotations

import math

from moecap_eval.stats import Effect, Estimate

UNKNOWN = "not measured"
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
MARKS = {"better": "▲", "worse": "▼", "equivalent": "=", "inconclusive": "?", "noisy": "~"}  # without colour
PREFIXED = frozenset({"B", "B/s", "s"})  # units whose values carry a prefix
_DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float | None) -> str:
    """Three significant digits; thousands separated by a thin space; ``not measured`` for None."""
    if value is None:
        return UNKNOWN
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude >= 1e9 or magnitude < 1e-4:
        return f"{value:.2e}"
    if magnitude >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    digits = max(0, 2 - math.floor(math.log10(magnitude)))
    return f"{value:.{digits}f}"


def quantity(value: float | None, unit: str) -> str:
    """A number with its unit and a prefix: binary for bytes, decimal for their rates and for short times."""
    if value is None:
        return UNKNOWN
    if unit == "B":
        return byte_size(value)
    if unit in {"B/s", "FLOP/s", "FLOP"}:
        for scale, prefix in _DECIMAL:
            if abs(value) >= scale:
                return f"{number(value / scale)} {prefix}{unit}"
    if unit == "s" and 0 < abs(value) < 1:
        scale, prefix = (1e3, "m") if abs(value) >= 1e-3 else (1e6, "µ")
        return f"{number(scale * value)} {prefix}s"
    return f"{number(value)} {unit}".strip().replace(" /s", "/s")


def byte_size(value: float) -> str:
    """Bytes with a binary prefix."""
    step = 0 if value == 0 else min(len(_BINARY) - 1, max(0, int(math.log(abs(value), 1024))))
    return f"{number(value / 1024**step)} {_BINARY[step]}"


def change(value: float, effect: Effect, *, like: float | None = None) -> str:
    """An effect as readers say it: ``+12 %``, ``2.90×``, ``+0.020``.

    Ratios from a half to two are percentages, others factors; ``like`` takes the form of another value.
    """
    if effect == "difference":
        return signed(value, 3)
    reference = value if like is None else like
    if 0.5 < reference < 2:
        return f"{signed(100 * (value - 1), 1)}\u00a0%"
    return f"{value:.2f}×" if value < 10 else f"{number(value)}×"


def signed(value: float, digits: int) -> str:
    """A number with its sign (a real minus); no sign where it rounds to zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\u2212")


def interval(estimate: Estimate, effect: Effect) -> str:
    """The confidence interval in the form of its value; empty without one."""
    if estimate.low is None or estimate.high is None:
        return ""
    low, high = (change(bound, effect, like=estimate.value) for bound in (estimate.low, estimate.high))
    return f"{low} to {high}"


def p_value(value: float | None) -> str:
    """A p-value with two digits, or a dash where there is no test."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.2g}"
