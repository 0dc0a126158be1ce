"""The report's cost sheet and machine tables: every figure with its unit and source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moecap_eval.comparison import Comparison
from moecap_eval.records import Records
from moecap_eval.report.numbers import UNKNOWN, byte_size, number, quantity
from moecap_eval.utilisation import MEASURES, Utilisation, peaks_of, utilisation

UNITS = {
    "device_usd": "USD",
    "host_usd": "USD",
    "watts": "W",
    "lifetime_years": "years",
    "utilisation": "share of the time in use",
    "usd_per_kwh": "USD/kWh",
    "pue": "total power / computing power",
    "usd_per_hour": "USD/h",
    "memory_accounting": "",
}


def cost_sheet(records: Records, comparison: Comparison) -> dict[str, Any]:
    """Assumptions with their source, then what each arm cost."""
    section = records.config.get("cost") or {}
    assumptions = [
        {"name": key.replace("_", " "), "value": _amount(value, UNITS.get(key, "")), "source": "config"}
        for key, value in section.items()
        if key != "memory" and value is not None
    ]
    for tier, part in (section.get("memory") or {}).items():
        assumptions += [
            {"name": f"memory {tier}: {key.replace('_', ' ')}", "value": number(value), "source": "config"}
            for key, value in part.items()
        ]
    rows = []
    for arm in (comparison.baseline, *comparison.arms):
        blocks = records.blocks.get(arm, [])
        usd = [block.usd for block in blocks]
        work = sum(block.work for block in blocks)
        known = bool(blocks) and None not in usd
        total = sum(value or 0.0 for value in usd)
        energy = [block.energy_j for block in blocks]
        measured = bool(blocks) and None not in energy
        sources = sorted({block.energy_source for block in blocks})
        rows.append(
            {
                "arm": arm,
                "time": quantity(sum(block.wall_s for block in blocks), "s") if blocks else UNKNOWN,
                "energy": quantity(sum(value or 0.0 for value in energy), "J") if measured else UNKNOWN,
                "source": ", ".join(sources),
                "total": f"{number(total)} USD" if known else UNKNOWN,
                "per_million": f"{number(1e6 * total / work)} USD" if known and work else UNKNOWN,
            }
        )
    watts = float(section.get("watts") or 0.0)
    return {
        "assumptions": assumptions,
        "rows": rows,
        "what_if": section.get("memory_accounting") == "used",
        "priced": bool(section),
        "watts": f"{watts:g} W" if watts else "",
        "unmetered": all(row["source"] == "none" for row in rows),
        "unit": records.work_unit,
    }


def utilisation_tables(records: Records, comparison: Comparison) -> dict[str, Any]:
    """Shares of the peaks, bytes by component and bytes moved per link; empty without recorded passes."""
    shares: list[dict[str, Any]] = []
    components: list[dict[str, Any]] = []
    links: list[dict[str, Any]] = []
    reasons: list[str] = []
    stated_links = (records.environment.get("hardware") or {}).get("links") or {}
    names: list[str] = []
    sources = [peak.source for peak in reversed(peaks_of(records.environment))]
    for arm in (comparison.baseline, *comparison.arms):
        found = utilisation(records, arm)
        if found is None:
            continue
        work = sum(block.work for block in records.blocks[arm])
        shares.append({"arm": arm, "cells": [_share_cell(found, measure, sources) for measure in MEASURES]})
        reasons += [f"{arm}: {text}" for text in dict.fromkeys(found.reasons.values())]
        names += [name for name, size in found.bytes_by_component.items() if size and name not in names]
        total = sum(found.bytes_by_component.values())
        components.append({"arm": arm, "sizes": found.bytes_by_component, "total": total, "work": work})
        for link, size in sorted(found.moved_bytes.items()):
            rate, peak = size / found.duration_s, stated_links.get(link)
            links.append(
                {
                    "arm": arm,
                    "link": link.replace("->", " → "),
                    "total": byte_size(size),
                    "per_work": byte_size(size / work),
                    "rate": quantity(rate, "B/s"),
                    "share": f"{100 * rate / peak['value']:.2f} % of {quantity(peak['value'], 'B/s')}"
                    if peak
                    else "",
                    "used": size > 0,
                }
            )
    return {
        "shares": shares,
        "measures": MEASURES,
        "reasons": reasons,
        "sources": sources,
        "components": [
            {
                "arm": entry["arm"],
                "parts": [
                    {
                        "name": name.replace("_", " "),
                        "per_work": byte_size(entry["sizes"].get(name, 0) / entry["work"]),
                        "share": f"{100 * entry['sizes'].get(name, 0) / entry['total']:.1f} %",
                    }
                    for name in names
                ],
                "total": byte_size(entry["total"] / entry["work"]),
            }
            for entry in components
            if entry["total"]
        ],
        "component_names": [name.replace("_", " ") for name in names],
        "links": [
            row for row in links if any(other["used"] for other in links if other["link"] == row["link"])
        ],
        "links_seen": bool(links),
        "unit": records.work_unit,
    }


def _share_cell(found: Utilisation, measure: str, sources: Sequence[str]) -> list[str]:
    """A measure against each peak, the measured one first."""
    values = [(source, found.shares.get((measure, source))) for source in sources]
    return [UNKNOWN if value is None else f"{100 * value:.2f} %" for _, value in values]


def environment_rows(records: Records) -> list[dict[str, str]]:
    """Machine, versions and peaks, each with its source."""
    env = records.environment
    rows = [
        (
            "processor",
            f"{env.get('cpu') or 'unknown'}, {env.get('cpu_count')} logical cores",
            "operating system",
        ),
        ("GPU", ", ".join(env.get("gpus") or []) or "none", "nvidia-smi"),
        (
            "main memory",
            byte_size(env["memory_bytes"]) if env.get("memory_bytes") else "unknown",
            "operating system",
        ),
        (
            "platform",
            f"{env.get('platform', 'unknown')}, Python {env.get('python', 'unknown')}",
            "operating system",
        ),
        ("source revision", str(env.get("git_commit") or "unknown"), "git"),
        *((name, version, "package metadata") for name, version in (env.get("packages") or {}).items()),
    ]
    return [{"name": name, "value": value, "source": source} for name, value, source in rows]


def peak_rows(records: Records) -> list[dict[str, str]]:
    """Stated and measured peaks side by side."""
    profile = records.environment.get("hardware") or {}
    measured = records.environment.get("measured_peaks") or {}
    rows: list[dict[str, str]] = []
    for tier, data in (profile.get("tiers") or {}).items():
        rows.append(
            {
                "name": f"{tier} read bandwidth",
                "stated": quantity(data.get("bytes_per_s"), "B/s"),
                "source": f"{data.get('source')}, {data.get('date')}",
                "measured": quantity(measured.get("read_bytes_per_s"), "B/s") if not rows else UNKNOWN,
            }
        )
    own = {
        k: v.get("value") if isinstance(v, dict) else v
        for k, v in (measured.get("flops_per_s") or {}).items()
    }
    stated = profile.get("flops_per_s") or {}
    for dtype in [*stated, *(name for name in own if name not in stated)]:
        figure = stated.get(dtype) or {}
        rows.append(
            {
                "name": f"{dtype} matrix products",
                "stated": quantity(figure.get("value"), "FLOP/s"),
                "source": f"{figure.get('source')}, {figure.get('date')}" if figure else "",
                "measured": quantity(own.get(dtype), "FLOP/s"),
            }
        )
    return rows


def _amount(value: Any, unit: str) -> str:
    text = number(float(value)) if isinstance(value, int | float) else str(value)
    return f"{text} {unit}".strip()
